"""Hidden states for a discriminator: what the stock pipeline's own network has half-way.

The reference is a plain hook on the block that ends the first half, while the diffusers pipeline
itself draws; which of its tokens are the image's is counted here by hand.
"""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.models.families.features import feature_width, features
from fewstep.models.roles import FamilyRole, LoraSpec, SharedNetwork, full_copy, lora_roles
from fewstep.objectives.gan import Features

from .fixtures import CASES, SIZE, STEPS, apart, call, condition, family, noise
from .test_roles import Stage, gradients, loss_of, singles

TOKENS = (SIZE[0] // 16) * (SIZE[1] // 16)
HALF = {  # the last block of the first half of the tiny networks, which have two
    name: "layers.0" if name == "z_image" else "transformer_blocks.0" for name in CASES
}


def image_tokens(name: str, out: Any) -> Tensor:
    """Of a block's output: joint blocks answer with (text, image); 2.1 has the image at the end."""
    if name == "sana":  # each latent is a token, of 8 pixels in the tiny autoencoder
        return out[:, : 4 * TOKENS]
    image = out[1] if isinstance(out, tuple) else out
    return image[:, -TOKENS:] if name.startswith("qwen_image_21") else image[:, :TOKENS]


def seen_by_the_pipeline(name: str) -> list[tuple[Tensor, Tensor]]:
    """At each step of the pipeline: its state before, and the image tokens half-way."""
    hidden: list[Tensor] = []
    states = [noise(name)]
    block = family(name).pipe.transformer.get_submodule(HALF[name])

    def keep(pipe: Any, step: int, t: Any, state: dict[str, Any]) -> dict[str, Any]:
        states.append(state["latents"].clone())
        return {}

    handle = block.register_forward_hook(lambda *given: hidden.append(given[-1]))
    try:
        call(name, "static", 1.0, output_type="latent", callback_on_step_end=keep)
    finally:
        handle.remove()
    assert len(hidden) == STEPS
    return [(state, image_tokens(name, out)) for state, out in zip(states, hidden)]


@pytest.mark.parametrize("name", CASES)
def test_features_are_what_the_pipelines_network_has_half_way(name: str) -> None:
    seen = seen_by_the_pipeline(name)
    adapter, cond = family(name), condition(name)
    network = adapter.pipe.transformer
    whole = dict(network.named_parameters())
    grid = adapter.sigmas(STEPS, SIZE)
    for t, (x_t, wanted) in zip(grid, seen):
        now = torch.full((len(wanted),), t)
        with torch.no_grad():
            found = features(adapter, x_t.reshape(noise(name).shape), now, cond)
        assert found.shape[2] == feature_width(network) and wanted.abs().max() > 0.1
        assert apart(found, wanted) <= 1e-5 * max(1.0, wanted.abs().max().item())
    assert list(dict(network.named_parameters())) == list(whole)
    assert all(p is whole[n] for n, p in network.named_parameters())


@pytest.mark.parametrize("name", CASES)
def test_the_network_is_whole_again_after_an_error(name: str) -> None:
    adapter, cond = family(name), condition(name)
    network = adapter.pipe.transformer
    before = dict(network.named_modules())
    narrow = replace(cond.text, states=cond.text.states[..., :3])
    with pytest.raises(Exception):  # noqa: B017  whatever the network says of it
        features(adapter, noise(name), torch.ones(2), replace(cond, text=narrow))
    assert dict(network.named_modules()) == before
    assert not network.get_submodule(adapter.trunk.last)._forward_pre_hooks


def test_half_of_a_network_with_two_kinds_of_blocks() -> None:
    """FLUX.2 with 2 double and 5 single blocks: the first half is both double ones and a single."""
    adapter, cond = family("flux2_klein"), condition("flux2_klein")
    network = deepcopy(adapter.pipe.transformer)
    for blocks, number in (("transformer_blocks", 2), ("single_transformer_blocks", 5)):
        (block,) = getattr(network, blocks)
        torch.manual_seed(0)
        more = [deepcopy(block) for _ in range(number)]
        for each in more:
            for parameter in each.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
        setattr(network, blocks, torch.nn.ModuleList(more))
    x, t = noise("flux2_klein"), torch.full((2,), 0.7)
    hidden: list[Tensor] = []
    network.single_transformer_blocks[0].register_forward_hook(lambda *a: hidden.append(a[-1]))
    with torch.no_grad():
        adapter.velocity(x, t, cond, network)
        found = features(adapter, x, t, cond, network)
    text = cond.text.states.shape[1]
    assert apart(found, hidden[0][:, text : text + TOKENS]) <= 1e-5
    assert len(network.single_transformer_blocks) == 5 and len(network.transformer_blocks) == 2


ROLES = ["qwen_image_edit", "qwen_image_21_edit", "flux2_klein_edit", "z_image", "sd3", "sana"]


@pytest.mark.parametrize("name", ROLES)
def test_a_role_shows_features_with_its_own_adapter(name: str) -> None:
    """And the frozen network keeps what it shows. The reference has the LoRA in its weights."""
    stage = Stage(name)
    before = stage.fake.features(stage.x_t, stage.t, stage.cond)
    assert isinstance(stage.fake, Features) and before.shape[2] == stage.fake.feature_width
    stage.scatter(stage.fake, 3)
    moved = stage.fake.features(stage.x_t, stage.t, stage.cond)
    assert apart(stage.student.features(stage.x_t, stage.t, stage.cond), before) == 0.0
    network, factors = stage.pristine, stage.fake.state_dict()
    for module in {key.rsplit(".lora_", 1)[0] for key in factors}:
        a, b = (factors[f"{module}.lora_{part}.weight"] for part in "AB")
        network.get_submodule(module).weight.data += 2.0 * b @ a  # alpha / rank = 6 / 3
    wanted = features(stage.family, stage.x_t, stage.t, condition(name), network).float()
    size = wanted.abs().max().item()
    assert apart(moved, wanted) <= 2e-6 * size and apart(moved, before) > 0.01 * size


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize(
    "name", ["qwen_image_edit", "qwen_image_21_edit", "flux2_klein", "z_image"]
)
def test_gradients_of_features_are_those_of_a_copy_whatever_plays_in_between(
    name: str, checkpointing: bool
) -> None:
    """To the image and to the fake score's adapter; the reference is a network of its own."""
    stage = Stage(name, double=True)
    for seed, role in enumerate((stage.student, stage.fake)):
        stage.scatter(role, seed)
    alone = Stage(name, double=True)
    alone.scatter(alone.fake, 1)
    if checkpointing:
        stage.shared.checkpoint_blocks()
    found, wanted = [], []
    for each, slopes in ((stage, found), (alone, wanted)):
        x = each.x_t.clone().requires_grad_()
        hidden = each.fake.features(x, each.t, each.cond)
        if each is stage:
            with torch.no_grad():
                stage.student.features(stage.x_t, stage.t, stage.cond)
            with stage.shared.playing("student"):
                loss_of(hidden).backward()
        else:
            loss_of(hidden).backward()
        slopes += [x.grad, gradients(each.fake)]
    assert not gradients(stage.student)
    assert found[0].abs().max() > 1e-4
    assert apart(found[0], wanted[0]) <= 1e-6 * wanted[0].abs().max().item()
    assert found[1].keys() == wanted[1].keys() and found[1]
    largest = max(g.abs().max().item() for g in wanted[1].values())
    assert all(apart(g, wanted[1][key]) <= 1e-5 * largest for key, g in found[1].items())
    half = {"flux2_klein": "single_", "z_image": "layers.1."}.get(name, "transformer_blocks.1.")
    assert not any(key.startswith(half) for key in found[1]), "the second half has played"


def test_a_full_copy_shows_its_own_features() -> None:
    adapter, cond = family("qwen_image"), condition("qwen_image")
    shared = SharedNetwork(deepcopy(adapter.pipe.transformer))
    fake = full_copy(adapter, shared)
    frozen = FamilyRole(adapter, shared, reader="student")
    x, t, readings = noise("qwen_image"), torch.full((2,), 0.5), singles(cond)
    before = frozen.features(x, t, readings)
    assert apart(fake.features(x, t, readings), before) <= 1e-6
    with torch.no_grad():
        fake.trained["img_in.weight"].mul_(2)
    assert apart(fake.features(x, t, readings), before) > 0.1
    assert torch.equal(frozen.features(x, t, readings), before)


def test_features_do_not_depend_on_a_second_adapter() -> None:
    adapter = family("qwen_image")
    shared = SharedNetwork(deepcopy(adapter.pipe.transformer))
    student, fake = lora_roles(adapter, shared, LoraSpec(2, 2.0), seed=0)
    assert student.feature_width == fake.feature_width == 32
