"""Sampling through an adapter is sampling with diffusers, and every wrong convention is seen."""

import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from fewstep.core.process import euler_step
from fewstep.models.families.contract import Family, FamilyCondition, stack
from fewstep.models.families.playback import evenly_spaced, play

from .fixtures import (
    CASES,
    LONG,
    SHORT,
    SIZE,
    STEPS,
    adapt,
    apart,
    call,
    condition,
    diffusers,
    family,
    noise,
    qwen_image_edit,
    reference,
    scheduler,
)

FLOOR = 5e-3
"""A wrong convention moves latents of unit variance by more than this."""

EDIT = [name for name, case in CASES.items() if case.sources]


def played(
    name: str, scale: float, dtype: torch.dtype = torch.float32, *, prefix: bool = False
) -> torch.Tensor:
    adapter, cond = family(name, dtype), condition(name, dtype)
    if prefix:
        cond = adapter.with_prefix(cond)
    return play(adapter, noise(name, dtype), cond, adapter.sigmas(STEPS, SIZE), scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name, case in CASES.items() for kind in case.schedulers]
)
def test_latents_are_those_of_the_pipeline(name, kind, scale, dtype) -> None:
    expected = reference(name, kind, scale, dtype)
    family(name, dtype).pipe.scheduler = scheduler(kind)
    latents = played(name, scale, dtype)
    assert latents.dtype == expected.dtype
    assert apart(latents, expected) <= CASES[name].tolerance


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["qwen_image_21", "qwen_image_21_edit"])
def test_prefix_is_exact(name, dtype, scale) -> None:
    expected = reference(name, "static", scale, dtype)
    family(name, dtype).pipe.scheduler = scheduler("static")
    assert apart(played(name, scale, dtype, prefix=True), expected) == 0.0


@pytest.mark.parametrize("name", CASES)
def test_decoded_pixels_are_those_of_the_pipeline(name) -> None:
    expected = call(name, "static", 1.0, output_type="pt")
    pixels = family(name).decode(reference(name, "static", 1.0), SIZE)
    assert apart((pixels / 2 + 0.5).clamp(0, 1), expected) <= 1e-6
    assert expected.std() > 0.01


@pytest.mark.parametrize("name", CASES)
def test_the_float32_sampler_of_training_plays_the_same(name) -> None:
    """Training's Euler step meets the adapter as a plain D -> x_0; it differs by rounding only."""
    adapter = family(name)
    expected = reference(name, "static", 1.0)
    adapter.pipe.scheduler = scheduler("static")
    grid = adapter.sigmas(STEPS, SIZE)
    x = noise(name)
    with torch.no_grad():
        for t, t_next in pairwise(torch.tensor(grid)):
            now = t.expand(len(x))
            x = euler_step(x, adapter(x, now, condition(name)), now, t_next.expand(len(x)))
    assert apart(x, expected) <= 1e-5


def _wrong_velocity(change: Callable[..., torch.Tensor]) -> Callable[[Any], Any]:
    def broken(adapter: Any) -> Any:
        right, wrong = adapter.velocity, copy.copy(adapter)
        wrong.velocity = lambda x, t, cond, model=None: change(right, x, t, cond)
        return wrong

    return broken


def _wrong_cfg(adapter: Any) -> Any:
    """Plain guidance where the family rescales, rescaled where it is plain."""
    wrong = copy.copy(adapter)

    def plain(cond: torch.Tensor, uncond: torch.Tensor, scale: float) -> torch.Tensor:
        return uncond + scale * (cond - uncond)

    def rescaled(cond: torch.Tensor, uncond: torch.Tensor, scale: float) -> torch.Tensor:
        guided = plain(cond, uncond, scale)
        return guided * cond.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)

    a, b = torch.randn(2, 1, 3, 5, generator=torch.Generator().manual_seed(0))
    is_plain = torch.allclose(adapter.cfg(a, b, 4.0), plain(a, b, 4.0), atol=1e-5)
    wrong.cfg = rescaled if is_plain else plain
    return wrong


WRONG_NETWORKS = {
    "t scale": _wrong_velocity(lambda v, x, t, c: v(x, 1000 * t, c)),
    "1 - t": _wrong_velocity(lambda v, x, t, c: v(x, 1 - t, c)),
    "sign": _wrong_velocity(lambda v, x, t, c: -v(x, t, c)),
    "guidance rule": _wrong_cfg,
}


def _without_mask(cond: FamilyCondition) -> FamilyCondition:
    return replace(cond, text=replace(cond.text, mask=None))


def _zero_source(cond: FamilyCondition) -> FamilyCondition:
    assert cond.source is not None
    return replace(cond, source=torch.zeros_like(cond.source))


def _swapped_shapes(cond: FamilyCondition) -> FamilyCondition:
    assert len(set(cond.source_sizes)) == 2
    return replace(cond, source_sizes=tuple((w, h) for h, w in cond.source_sizes))


def _other_order(cond: FamilyCondition) -> FamilyCondition:
    """Latents and shapes change places; the prompt still counts the images the old way."""
    assert cond.source is not None
    (h, w), second = cond.source_sizes
    a, b = cond.source[:, : h * w], cond.source[:, h * w :]
    return replace(cond, source=torch.cat([b, a], dim=1), source_sizes=(second, (h, w)))


WRONG_SOURCES = {
    "zero source": _zero_source,
    "source shapes": _swapped_shapes,
    "source order": _other_order,
}


@pytest.mark.parametrize("wrong", WRONG_NETWORKS)
@pytest.mark.parametrize("name", CASES)
def test_wrong_network_conventions_are_seen(name, wrong) -> None:
    expected = reference(name, "static", 4.0)
    adapter = family(name)
    adapter.pipe.scheduler = scheduler("static")
    broken = WRONG_NETWORKS[wrong](adapter)
    grid = adapter.sigmas(STEPS, SIZE)
    assert apart(play(broken, noise(name), condition(name), grid, scale=4.0), expected) > FLOOR


@pytest.mark.parametrize("wrong", WRONG_SOURCES)
@pytest.mark.parametrize("name", EDIT)
def test_wrong_sources_are_seen(name, wrong) -> None:
    expected = reference(name, "static", 1.0)
    adapter, cond = family(name), WRONG_SOURCES[wrong](condition(name))
    adapter.pipe.scheduler = scheduler("static")
    grid = adapter.sigmas(STEPS, SIZE)
    assert apart(play(adapter, noise(name), cond, grid), expected) > FLOOR


@pytest.mark.parametrize("name", CASES)
def test_unshifted_sigmas_are_seen(name) -> None:
    expected = reference(name, "static", 1.0)
    grid = (*evenly_spaced(STEPS), 0.0)
    assert apart(play(family(name), noise(name), condition(name), grid), expected) > FLOOR


@pytest.mark.parametrize("name", ["qwen_image", "z_image", "sana"])
def test_a_missing_text_mask_is_seen(name) -> None:
    expected = reference(name, "static", 1.0)
    adapter, cond = family(name), condition(name)
    adapter.pipe.scheduler = scheduler("static")
    assert cond.text.mask is not None and not cond.text.mask.all()
    grid = adapter.sigmas(STEPS, SIZE)
    assert apart(play(adapter, noise(name), _without_mask(cond), grid), expected) > FLOOR


def test_an_unrounded_time_is_seen_in_bf16() -> None:
    """t = 0.75 reaches the bf16 network as 0.7539, because 1000 t is rounded."""
    name, dtype = "qwen_image", torch.bfloat16
    adapter, cond = family(name, dtype), condition(name, dtype)
    x, seen = noise(name, dtype), []
    hook = adapter.pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["timestep"]), with_kwargs=True
    )
    with torch.no_grad():
        adapter.velocity(x, torch.tensor([0.75, 0.5]), cond)
    hook.remove()
    assert seen[0].tolist() == [0.75390625, 0.5]


def test_edits_of_unequal_length_share_a_batch() -> None:
    """Padding is exact in Qwen-Image-Edit-Plus, which its pipeline alone (batch 1) cannot show."""
    name = "qwen_image_edit"
    adapter, images = family(name), CASES[name].images()
    adapter.pipe.scheduler = scheduler("static")
    both = adapter.encode([SHORT, LONG], images, size=SIZE)
    assert both.text.mask is not None
    grid = adapter.sigmas(STEPS, SIZE)
    x = noise(name).expand(2, -1, -1)
    together = play(adapter, x, both, grid, scale=4.0)
    assert apart(together[1:], reference(name, "static", 4.0)) <= 3e-6
    unmasked = play(adapter, x, _without_mask(both), grid)
    assert apart(unmasked[:1], play(adapter, x[:1], both[:1], grid)) > FLOOR


def test_one_network_serves_text_to_image_and_editing() -> None:
    """A T2I condition through the editing network is QwenImagePipeline with that network."""
    edit = family("qwen_image_edit")
    edit.pipe.scheduler = scheduler("static")
    shared = {k: v for k, v in edit.pipe.components.items() if k != "processor"}
    pipe = diffusers.QwenImagePipeline(**shared)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        prompt=[SHORT, LONG],
        true_cfg_scale=1.0,
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    cond = adapt(pipe).encode([SHORT, LONG], size=SIZE)
    x = edit.noise(2, SIZE, torch.Generator().manual_seed(0))
    assert apart(play(edit, x, cond, edit.sigmas(STEPS, SIZE)), expected) == 0.0


def test_image_positions_reach_the_text_encoder() -> None:
    """Without the hook diffusers 0.42 encodes edits with other positions, and says nothing."""
    name = "qwen_image_edit"
    bare = qwen_image_edit()
    size = (96, 96)
    read = [image.resize(size) for image in CASES[name].images()]
    with torch.no_grad():
        silent, _ = bare.encode_prompt([LONG], image=read)
        hooked, _ = family(name).pipe.encode_prompt([LONG], image=read)
        inputs = bare.processor(
            text=[bare.prompt_template_encode.format(_pictures(2) + LONG)],
            images=read,
            padding=True,
            return_tensors="pt",
        )
        out = bare.text_encoder(**inputs, output_hidden_states=True)
    explicit = out.hidden_states[-1][:, bare.prompt_template_encode_start_idx :]
    assert "mm_token_type_ids" in inputs
    assert apart(hooked, explicit) == 0.0
    assert apart(silent, explicit) > 5e-4


def _pictures(count: int) -> str:
    pad = "<|vision_start|><|image_pad|><|vision_end|>"
    return "".join(f"Picture {i + 1}: {pad}" for i in range(count))


def test_stacked_conditions_equal_one_call() -> None:
    adapter = family("qwen_image")
    one = adapter.encode([SHORT, LONG], size=SIZE)
    many = stack([adapter.encode([p], size=SIZE) for p in (SHORT, LONG)])
    assert one.text.mask is not None and many.text.mask is not None
    assert torch.equal(one.text.mask, many.text.mask)
    assert apart(one.text.states, many.text.states) <= 1e-6
    assert many.negative is not None and many.negative.mask is None and len(many) == 2


def test_adapters_keep_the_contract() -> None:
    for name in CASES:
        adapter = family(name)
        assert isinstance(adapter, Family)
        shape = noise(name).shape
        assert adapter.noise_shape(len(CASES[name].prompts), SIZE) == shape
