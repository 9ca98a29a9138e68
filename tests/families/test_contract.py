"""Conditions as data, time grids, refusals, gradients: what adapters promise beyond parity."""

from dataclasses import replace

import pytest
import torch

from fewstep.errors import DataError, RecipeError
from fewstep.models.families.contract import stack
from fewstep.models.families.playback import check_scheduler, play
from fewstep.models.families.qwen_image_21 import QwenImage21

from .fixtures import (
    CASES,
    EQUAL,
    LONG,
    SHORT,
    SIZE,
    STEPS,
    adapt,
    apart,
    condition,
    diffusers,
    family,
    flux2_klein,
    noise,
    qwen_image,
    qwen_image_21,
    scheduler,
    source,
    sources,
)

EDIT = [name for name, case in CASES.items() if case.sources]


@pytest.mark.parametrize("name", CASES)
def test_a_sample_does_not_depend_on_its_neighbours(name) -> None:
    """cond[i] of a batch of two gives what the whole batch gives for sample i."""
    adapter = family(name)
    adapter.pipe.scheduler = scheduler("static")
    cond, grid = condition(name), adapter.sigmas(STEPS, SIZE)
    both = stack([cond[:1], cond[-1:]])
    x = adapter.noise(2, SIZE, torch.Generator().manual_seed(1))
    together = play(adapter, x, both, grid, scale=4.0)
    alone = play(adapter, x[1:], both[1:], grid, scale=4.0)
    picked = play(adapter, x[[1]], both[torch.tensor([1])], grid, scale=4.0)
    assert len(both) == 2 and len(both[1:]) == 1
    assert apart(together[1:], alone) <= 1e-5
    assert apart(alone, picked) == 0.0


def test_without_text_is_the_negative_branch() -> None:
    adapter = family("qwen_image")
    cond = adapter.encode([LONG], size=SIZE, negative=SHORT)
    assert (
        apart(cond.without_text().text.states, adapter.encode([SHORT], size=SIZE).text.states)
        < 1e-6
    )
    with pytest.raises(RecipeError, match="negative prompt"):
        cond.without_text().without_text()
    moved = cond.to(torch.device("meta"))
    assert moved.text.states.is_meta and moved.without_text().text.states.is_meta


def test_conditions_with_and_without_negative_do_not_mix() -> None:
    adapter = family("qwen_image")
    with pytest.raises(DataError, match="without negative prompt"):
        stack([adapter.encode([LONG], size=SIZE, negative=n) for n in (" ", None)])


def test_long_prompts_are_cut_where_the_pipeline_cuts_them() -> None:
    cond = family("qwen_image").encode(["color, " * 400], size=SIZE)
    assert cond.text.states.shape[1] == 512


@pytest.mark.parametrize("name", CASES)
def test_encode_image_makes_the_latents_that_decode_reads(name) -> None:
    """The normalisation is undone: a round trip is the autoencoder's own."""
    adapter = family(name)
    image = torch.rand(1, 3, *SIZE, generator=torch.Generator().manual_seed(2)) * 2 - 1
    x_0 = adapter.encode_image(image)
    assert x_0.shape == adapter.noise_shape(1, SIZE)
    pixels, vae = adapter.decode(x_0, SIZE), adapter.pipe.vae
    if pixels.shape[1] == 4:
        image = torch.cat([image, torch.ones_like(image[:, :1])], dim=1)
    with torch.no_grad():
        frames = image[:, :, None] if CASES[name].frames else image
        coded = vae.encode(frames)
        z = coded.latent if name == "sana" else coded.latent_dist.mode()
        expected = vae.decode(z, return_dict=False)[0]
    assert apart(pixels, expected.reshape(pixels.shape)) <= 1e-5


@pytest.mark.parametrize("name", EDIT)
def test_sources_go_through_encode_image(name) -> None:
    """A source in the condition has the latents that training would give the same image."""
    adapter = family(name)
    image = source(96, 96, 3)
    cond = adapter.encode([LONG], [image], size=SIZE)
    pixels = adapter.pipe.image_processor.preprocess(image.convert("RGB"), height=96, width=96)
    assert apart(cond.source, adapter.encode_image(pixels)) <= 1e-6


def test_gradients_reach_the_network_and_the_state() -> None:
    adapter, cond = family("qwen_image"), condition("qwen_image")
    network = adapter.pipe.transformer
    x = noise("qwen_image").requires_grad_()
    weight = network.proj_out.weight.requires_grad_()
    adapter(x, torch.tensor([0.5, 0.5]), cond).square().sum().backward()
    weight.requires_grad_(False)
    assert weight.grad is not None and weight.grad.abs().sum() > 0
    assert x.grad is not None and x.grad.abs().sum() > 0
    weight.grad = None


def test_another_network_takes_the_place_of_the_pipelines_own() -> None:
    adapter, cond, x = family("qwen_image"), condition("qwen_image"), noise("qwen_image")
    calls = []

    def other(**arguments: torch.Tensor) -> tuple[torch.Tensor]:
        calls.append(arguments)
        return (torch.ones_like(arguments["hidden_states"]),)

    t = torch.tensor([0.5, 0.5])
    assert apart(adapter(x, t, cond, other), x - 0.5) == 0.0
    assert len(calls) == 1


def test_a_prefix_belongs_to_one_network() -> None:
    adapter = family("qwen_image_21")
    cond = adapter.with_prefix(condition("qwen_image_21"))
    x, t = noise("qwen_image_21"), torch.tensor([0.5, 0.5])
    with pytest.raises(AssertionError, match="another model"):
        adapter.velocity(x, t, cond, torch.nn.Identity())
    assert cond.to(torch.device("cpu")).text.prefix is None


def test_a_prefix_takes_the_place_of_text_and_sources() -> None:
    """With it the network no longer looks at them, on either branch of guidance."""
    adapter, cond = family("qwen_image_21_edit"), condition("qwen_image_21_edit")
    x, t = noise("qwen_image_21_edit"), torch.tensor([0.5, 0.5])

    def blind(text):
        return replace(text, states=torch.zeros_like(text.states))

    def velocities(c):
        with torch.no_grad():
            return adapter.velocity(x, t, c), adapter.velocity(x, t, c.without_text())

    expected, ready = velocities(cond), adapter.with_prefix(cond)
    for change in (
        replace(ready, text=blind(ready.text), negative=blind(ready.negative)),
        replace(ready, source=torch.zeros_like(cond.source)),
    ):
        for right, cached in zip(expected, velocities(change)):
            assert apart(right, cached) == 0.0


def test_21_refuses_what_padding_would_move() -> None:
    adapter = family("qwen_image_21")
    with pytest.raises(DataError, match=r"cannot share a batch.*layout"):
        adapter.encode([SHORT, LONG], size=SIZE)
    short, long, equal = (adapter.encode([p], size=SIZE) for p in (SHORT, LONG, EQUAL))
    with pytest.raises(DataError, match="different layout"):
        stack([short, long])
    assert long.layout == equal.layout != short.layout
    assert len(stack([long, equal])) == 2


def test_layouts_part_sources_of_other_shapes() -> None:
    adapter = family("qwen_image_edit")
    one, two = (adapter.encode([LONG], images, size=SIZE) for images in (sources()[:1], sources()))
    assert one.layout != two.layout
    with pytest.raises(DataError, match="different layout"):
        stack([one, two])
    shorter = adapter.encode([SHORT], sources(), size=SIZE)
    assert shorter.layout == two.layout


def test_stored_sigmas_of_21_fix_the_grid() -> None:
    pipe = qwen_image_21("static", sample_sigmas=[1.0, 0.7, 0.4])
    pipe.set_progress_bar_config(disable=True)
    adapter = QwenImage21(pipe, resolution=96)
    with pytest.raises(RecipeError, match="sample_sigmas fix 3"):
        adapter.sigmas(4, SIZE)
    expected = pipe(
        prompt=LONG,
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=40,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    cond = adapter.encode([LONG], size=SIZE)
    x = adapter.noise(1, SIZE, torch.Generator().manual_seed(0))
    assert apart(play(adapter, x, cond, adapter.sigmas(3, SIZE)), expected) == 0.0


def test_published_four_step_schedulers_give_one_grid() -> None:
    adapter = family("qwen_image")
    for kind in ("static", "lightning"):
        adapter.pipe.scheduler = scheduler(kind)
        assert adapter.sigmas(4, SIZE) == pytest.approx((1, 0.9, 0.75, 0.5, 0))


def test_a_distilled_flux2_knows_no_guidance() -> None:
    adapter = adapt(flux2_klein(is_distilled=True))
    with pytest.raises(RecipeError, match="distilled"):
        adapter.cfg(torch.ones(1), torch.zeros(1), 4.0)


def test_custom_sigmas_are_shifted_as_the_pipeline_shifts_them() -> None:
    adapter = family("qwen_image")
    adapter.pipe.scheduler = scheduler("static")
    grid = adapter.sigmas(2, SIZE, custom=[1.0, 0.25])
    assert grid == pytest.approx((1.0, 0.5, 0.0))
    with pytest.raises(RecipeError, match="2 steps"):
        adapter.sigmas(2, SIZE, custom=[1.0])


def test_impossible_grids_are_refused() -> None:
    adapter = family("qwen_image")
    adapter.pipe.scheduler = scheduler("dynamic")
    with pytest.raises(RecipeError, match=r"shift_terminal.*at least 2"):
        adapter.sigmas(1, SIZE)
    with pytest.raises(RecipeError, match="0 steps"):
        adapter.sigmas(0, SIZE)


@pytest.mark.parametrize("name", CASES)
def test_sizes_are_refused_and_not_rounded(name) -> None:
    adapter, images = family(name), CASES[name].images()
    with pytest.raises(RecipeError, match=r"width is 100.*use 96 or"):
        adapter.encode([LONG], images, size=(64, 100))
    with pytest.raises(RecipeError, match="height is 50"):
        adapter.noise_shape(1, (50, 96))


def test_tasks_are_refused_by_name() -> None:
    with pytest.raises(RecipeError, match=r"QwenImagePipeline makes images from text only.*Edit"):
        family("qwen_image").encode([LONG], sources(), size=SIZE)
    with pytest.raises(RecipeError, match=r"ZImagePipeline .*text only"):
        family("z_image").encode([LONG], sources(), size=SIZE)
    with pytest.raises(RecipeError, match="QwenImageEditPlusPipeline edits, and no source"):
        family("qwen_image_edit").encode([LONG], size=SIZE)


def test_other_schedulers_are_refused() -> None:
    with pytest.raises(DataError, match="FlowMatchHeunDiscreteScheduler"):
        check_scheduler(diffusers.FlowMatchHeunDiscreteScheduler())
    random = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    with pytest.raises(DataError, match="stochastic_sampling"):
        check_scheduler(random)
    pipe = qwen_image()
    pipe.transformer.register_to_config(guidance_embeds=True)
    with pytest.raises(DataError, match="guidance_embeds"):
        adapt(pipe)
