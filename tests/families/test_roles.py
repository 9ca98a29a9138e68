"""Roles on one network: they start as it, train apart, and no switch costs a gradient.

The reference for every gradient is a network of its own with the LoRA merged into its weights, by
the chain rule. The traps of peft that the scheme avoids are shown to be real beside it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.errors import CheckpointError, DataError, RecipeError
from fewstep.guidance import classifier_free
from fewstep.models.families.contract import FamilyCondition, Text
from fewstep.models.readings import Readings, answer_all, readings_of
from fewstep.models.roles import (
    STUDENT,
    FamilyRole,
    LoraSpec,
    SharedNetwork,
    full_copy,
    lora_roles,
)

from .fixtures import LONG, SHORT, SIZE, apart, condition, family, pipeline
from .folders import write_lora

SPEC = LoraSpec(rank=3, alpha=6.0)
NETWORKS = ["qwen_image", "qwen_image_edit", "qwen_image_21", "qwen_image_21_edit"]
EVERY = [*NETWORKS, "z_image", "sd3", "flux2_klein", "flux2_klein_edit", "sana"]


def singles(cond: FamilyCondition, reader: str = STUDENT) -> Readings:
    return readings_of([{reader: cond[slice(i, i + 1)]} for i in range(len(cond))])


class Stage:
    """A base, its student and fake score, and a batch; weights of the roles moved off 0."""

    def __init__(self, name: str, *, double: bool = False, seed: int = 0) -> None:
        self.family, cond = family(name), condition(name)
        network = deepcopy(self.family.pipe.transformer)
        self.pristine = deepcopy(network)
        if double:
            network, self.pristine, cond = network.double(), self.pristine.double(), doubled(cond)
        self.shared = SharedNetwork(network)
        self.base = FamilyRole(self.family, self.shared, reader=STUDENT)
        self.student, self.fake = lora_roles(self.family, self.shared, SPEC, seed=seed)
        self.cond = singles(cond)
        generator = torch.Generator().manual_seed(1)
        shape = self.family.noise_shape(len(cond), SIZE)
        dtype = torch.float64 if double else torch.float32
        self.x_t = torch.randn(shape, generator=generator, dtype=dtype)
        self.t = torch.linspace(0.9, 0.6, len(cond))

    def scatter(self, role: FamilyRole, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in role.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))

    def velocity(self, role: FamilyRole) -> Tensor:
        return role.predict_v(self.x_t, self.t, self.cond)


def doubled(cond: FamilyCondition) -> FamilyCondition:
    def of(text: Text | None) -> Text | None:
        if text is None:
            return None
        pooled = None if text.pooled is None else text.pooled.double()
        return Text(text.states.double(), text.mask, pooled, text.slots)

    text = of(cond.text)
    assert text is not None
    source = None if cond.source is None else cond.source.double()
    return FamilyCondition(text, of(cond.negative), cond.size, source, cond.source_sizes)


def gradients(role: FamilyRole) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in role.named_parameters() if p.grad is not None}


def merged_gradients(stage: Stage, role: FamilyRole) -> dict[str, Tensor]:
    """What the LoRA's gradient must be: that of a network with W + s B A, by the chain rule."""
    scale, network = SPEC.alpha / SPEC.rank, stage.pristine
    factors = {name: parameter.detach() for name, parameter in role.named_parameters()}
    modules = sorted({name.rsplit(".lora_", 1)[0] for name in factors})
    for module in modules:
        a, b = (factors[f"{module}.lora_{part}.weight"] for part in "AB")
        weight = network.get_submodule(module).weight
        weight.data += scale * (b @ a).to(weight.dtype)
        weight.requires_grad_(True)
    alone = FamilyRole(stage.family, SharedNetwork(network), reader=STUDENT)
    for module in modules:
        network.get_submodule(module).weight.requires_grad_(True)
    loss_of(stage.velocity(alone)).backward()
    found = {}
    for module in modules:
        a, b = (factors[f"{module}.lora_{part}.weight"] for part in "AB")
        gradient = network.get_submodule(module).weight.grad
        if gradient is not None:
            found[f"{module}.lora_A.weight"] = scale * b.T @ gradient
            found[f"{module}.lora_B.weight"] = scale * gradient @ a.T
    return found


def loss_of(v: Tensor) -> Tensor:
    return (v * torch.linspace(-1, 1, v.numel(), dtype=v.dtype).view_as(v)).sum()


@pytest.mark.parametrize("name", EVERY)
def test_roles_begin_as_the_base_and_alike(name: str) -> None:
    stage = Stage(name)
    base = stage.family.velocity(stage.x_t, stage.t, condition(name), stage.pristine).float()
    for role in (stage.base, stage.student, stage.fake):
        assert apart(stage.velocity(role), base) <= 2e-6
    own, other = stage.student.state_dict(), stage.fake.state_dict()
    assert own.keys() == other.keys()
    assert all(torch.equal(own[key], other[key]) for key in own)
    assert any(own[key].any() for key in own if ".lora_A." in key)
    assert not any(own[key].any() for key in own if ".lora_B." in key)


@pytest.mark.parametrize("name", EVERY)
def test_each_role_hears_its_own_weights_alone(name: str) -> None:
    stage = Stage(name)
    before = stage.velocity(stage.base)
    stage.scatter(stage.student, 1)
    moved = stage.velocity(stage.student)
    assert apart(moved, before) > 0.01
    assert torch.equal(stage.velocity(stage.fake), before)
    assert torch.equal(stage.velocity(stage.base), before)
    stage.scatter(stage.fake, 2)
    assert apart(stage.velocity(stage.fake), moved) > 0.01
    assert torch.equal(stage.velocity(stage.student), moved)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_those_of_a_merged_copy_whatever_plays_in_between(
    name: str, checkpointing: bool
) -> None:
    """The student's backward pass comes after the fake score and the base have played."""
    stage = Stage(name, double=True)
    for seed, role in enumerate((stage.student, stage.fake)):
        stage.scatter(role, seed)
    if checkpointing:
        stage.shared.checkpoint_blocks()
    v = stage.velocity(stage.student)
    fake = stage.velocity(stage.fake)
    with torch.no_grad():
        stage.velocity(stage.base)
    loss_of(v).backward()
    assert not gradients(stage.fake), "the student's loss reached the fake score"
    found = gradients(stage.student)
    loss_of(fake).backward()
    for role, own in ((stage.student, found), (stage.fake, gradients(stage.fake))):
        wanted = merged_gradients(Copy(stage), role)
        assert own.keys() == wanted.keys() and len(own) > 20
        largest = max(g.abs().max().item() for g in wanted.values())
        assert largest > 1e-3
        for key, gradient in wanted.items():
            assert apart(own[key].double(), gradient.double()) <= 1e-5 * largest, key
    assert not any(
        p.grad is not None for n, p in stage.shared.network.named_parameters() if "lora" not in n
    )


class Copy(Stage):
    """The same stage with a fresh pristine network, for `merged_gradients` changes it."""

    def __init__(self, stage: Stage) -> None:
        self.__dict__ |= stage.__dict__
        self.pristine = deepcopy(stage.pristine)


def test_trap_a_switch_by_peft_before_the_backward_pass_loses_the_gradients() -> None:
    """What `SharedNetwork` avoids: the same step with peft's own switch."""
    stage = Stage("qwen_image_21")
    stage.scatter(stage.student, 1)
    network = stage.shared.network
    network.set_adapter("student")
    v = answer_all(
        lambda x, t, c: stage.family.velocity(x, t, c, network),
        stage.x_t,
        stage.t,
        stage.cond,
        STUDENT,
    )
    network.set_adapter("fake")
    loss_of(v).backward() if v.requires_grad else None
    assert not gradients(stage.student), "the trap is gone; is the scheme still needed?"
    stage = Stage("qwen_image_21")
    stage.scatter(stage.student, 1)
    v = stage.velocity(stage.student)
    stage.velocity(stage.fake)
    loss_of(v).backward()
    assert len(gradients(stage.student)) == len(stage.student.trained)


def test_trap_plain_checkpointing_recomputes_in_the_wrong_role() -> None:
    """What `checkpoint_blocks` avoids: diffusers' own function after a switch."""
    found = {}
    for kind in ("kept", "plain", "ours"):
        stage = Stage("qwen_image_21")
        stage.scatter(stage.student, 1)
        stage.scatter(stage.fake, 2)
        if kind == "plain":
            stage.shared.network.enable_gradient_checkpointing()
        if kind == "ours":
            stage.shared.checkpoint_blocks()
        v = stage.velocity(stage.student)
        with stage.shared.playing("fake"):
            loss_of(v).backward()
        found[kind] = gradients(stage.student)
    largest = max(g.abs().max().item() for g in found["kept"].values())

    def worst(kind: str) -> float:
        return max(
            apart(found[kind].get(n, torch.zeros_like(g)), g) for n, g in found["kept"].items()
        )

    assert worst("plain") > 0.05 * largest, "the trap is gone; is the scheme still needed?"
    assert worst("ours") == 0.0


def test_the_role_comes_back_after_a_nested_one_and_after_an_error() -> None:
    stage = Stage("qwen_image_21")
    stage.scatter(stage.student, 1)
    moved = stage.velocity(stage.student)
    with stage.shared.playing("student"):
        with pytest.raises(ZeroDivisionError), stage.shared.playing(None):
            raise ZeroDivisionError
        inside = stage.family.velocity(
            stage.x_t, stage.t, condition("qwen_image_21"), stage.shared.network
        )
    assert apart(inside.float(), moved) <= 2e-6


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # dynamo looks at gradients of what has none
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_compiled_blocks_play_every_role(checkpointing: bool) -> None:
    """One graph for each role; dynamo alone, which needs no compiler."""
    check_compiled("eager", checkpointing)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_blocks_with_the_real_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:
        pytest.skip(f"no C++ compiler here: {error}")
    check_compiled("inductor", checkpointing=True)


def check_compiled(backend: str, checkpointing: bool) -> None:
    torch._dynamo.reset()
    plain, compiled = Stage("qwen_image_21"), Stage("qwen_image_21")
    compiled.shared.compile_blocks(backend=backend)
    tolerance = 0.0 if backend == "eager" else 2e-5
    for stage in (plain, compiled):
        stage.scatter(stage.student, 1)
        stage.scatter(stage.fake, 2)
        if checkpointing:
            stage.shared.checkpoint_blocks()
    for _ in range(2):
        wanted, found = (
            [stage.velocity(role) for role in (stage.student, stage.fake, stage.base)]
            for stage in (plain, compiled)
        )
        for a, b in zip(wanted, found, strict=True):
            assert apart(a.detach(), b.detach()) <= tolerance
        for v in (wanted[0], found[0]):
            loss_of(v).backward()
    own, other = gradients(plain.student), gradients(compiled.student)
    largest = max(g.abs().max().item() for g in own.values())
    assert own.keys() == other.keys()
    assert all(apart(own[key], other[key]) <= max(tolerance, 1e-6) * largest for key in own)
    assert not gradients(compiled.fake)


# --- teachers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen_image", "qwen_image_21", "z_image", "sd3", "flux2_klein"])
def test_a_teachers_lora_is_what_the_pipeline_makes_of_the_file(name: str, tmp_path: Path) -> None:
    stage = Stage(name)
    file = write_lora(stage.pristine, tmp_path / "special.safetensors")
    stage.shared.load_lora("teacher-special", file, stage.family.pipe)
    teacher = FamilyRole(stage.family, stage.shared, reader=STUDENT, adapter="teacher-special")
    with loaded(name, file) as network:
        wanted = stage.family.velocity(stage.x_t, stage.t, condition(name), network).float()
    assert apart(stage.velocity(teacher), wanted) <= 2e-6
    assert apart(wanted, stage.velocity(stage.base)) > 0.01
    assert apart(stage.velocity(stage.student), stage.velocity(stage.base)) == 0.0
    assert not any(p.requires_grad for p in stage.shared.parameters_of("teacher-special").values())
    assert all(p.requires_grad for p in stage.student.parameters())
    assert all(p.requires_grad for p in stage.fake.parameters())
    assert not list(teacher.parameters())


@contextmanager
def loaded(name: str, file: Path) -> Iterator[Any]:
    """The pipeline's own network with the LoRA, by diffusers' own hand."""
    pipe = pipeline(name)
    pristine = pipe.transformer
    pipe.transformer = deepcopy(pristine)
    try:
        pipe.load_lora_weights(file)
        yield pipe.transformer
    finally:
        pipe.transformer = pristine


def test_the_order_in_which_roles_are_added_does_not_matter(tmp_path: Path) -> None:
    """peft leaves only its newest adapter trainable."""
    stage = Stage("qwen_image_21")
    file = write_lora(stage.pristine, tmp_path / "special.safetensors")
    first = SharedNetwork(deepcopy(stage.pristine))
    first.load_lora("teacher-special", file, stage.family.pipe)
    student, fake = lora_roles(stage.family, first, SPEC, seed=0)
    assert student.trained.keys() == stage.student.trained.keys()
    trainable = {id(p) for p in first.network.parameters() if p.requires_grad}
    assert trainable == {id(p) for role in (student, fake) for p in role.parameters()}


def test_guidance_is_the_familys_own_away_from_the_readers_negative() -> None:
    name = "qwen_image"
    stage, cond = Stage(name), condition(name)
    other = family(name).encode([SHORT, LONG], size=SIZE, negative="blurry")
    rows = [
        {STUDENT: cond[slice(i, i + 1)], "words": other[slice(i, i + 1)]} for i in range(len(cond))
    ]
    both = readings_of(rows)
    for reader, read in ((STUDENT, cond), ("words", other)):
        teacher = FamilyRole(stage.family, stage.shared, reader=reader)
        found = classifier_free(teacher, stage.x_t, stage.t, both, 4.0)
        v, v_uncond = (
            stage.family.velocity(stage.x_t, stage.t, text, stage.pristine)
            for text in (read, read.without_text())
        )
        wanted = stage.x_t - stage.t.view(-1, 1, 1) * stage.family.cfg(v, v_uncond, 4.0)
        assert apart(found, wanted) <= 2e-6
        bare = classifier_free(teacher, stage.x_t, stage.t, both, 1.0)
        assert apart(bare, stage.family(stage.x_t, stage.t, read, stage.pristine)) <= 2e-6
    uncond = stage.family(stage.x_t, stage.t, other.without_text(), stage.pristine)
    assert apart(found, uncond + 4.0 * (bare - uncond)) > 0.05, "the rule acts on v, not on x_0"


# --- batches of mixed layout ----------------------------------------------------------------------


def test_a_batch_of_mixed_layouts_is_answered_as_each_alone() -> None:
    """Prompts of unequal length and sources of other sizes, in an order that is no group's."""
    stage = Stage("qwen_image_21")
    conditions = [
        stage.family.encode([text], size=SIZE) for text in (SHORT, LONG, SHORT, LONG, "moon")
    ]
    batch = readings_of([{STUDENT: c} for c in conditions])
    x = torch.randn(5, *stage.x_t.shape[1:], generator=torch.Generator().manual_seed(5))
    t = torch.linspace(0.9, 0.1, 5)
    found = stage.student(x, t, batch)
    for i in range(5):
        one = slice(i, i + 1)
        assert apart(found[one], stage.student(x[one], t[one], batch[one])) <= 2e-6
    places = torch.tensor([3, 0])
    picked = stage.student(x[places], t[places], batch[places])
    assert apart(picked, found[places]) <= 2e-6
    chosen = torch.tensor([True, False, False, True, False])
    assert [id(row) for row in batch[chosen].rows] == [id(batch.rows[i]) for i in (0, 3)]


# --- what is stored, what is refused --------------------------------------------------------------


def test_a_roles_state_is_its_own_and_comes_back(tmp_path: Path) -> None:
    stage, other = Stage("qwen_image_21"), Stage("qwen_image_21", seed=9)
    stage.scatter(stage.student, 1)
    save_file(stage.student.state_dict(), tmp_path / "student.safetensors")
    state = load_file(tmp_path / "student.safetensors")
    base = dict(stage.pristine.named_parameters())
    assert not state.keys() & base.keys()
    for key in state:
        module, _, part = key.rpartition(".lora_")
        assert part in ("A.weight", "B.weight") and f"{module}.weight" in base
    other.student.load_state_dict(state)
    assert torch.equal(other.velocity(other.student), stage.velocity(stage.student))
    first = next(iter(state))
    with pytest.raises(CheckpointError, match="is missing"):
        other.student.load_state_dict({k: v for k, v in state.items() if k != first})
    with pytest.raises(CheckpointError, match="another rank"):
        other.student.load_state_dict(state | {first: state[first][:1]})


def test_targets_are_chosen_by_their_endings() -> None:
    stage = Stage("qwen_image_21")
    shared = SharedNetwork(deepcopy(stage.pristine))
    picked = shared.select(stage.family.lora_targets, ["to_q", "img_mlp.out"])
    assert picked == [
        f"transformer_blocks.{i}.{part}" for i in (0, 1) for part in ("attn.to_q", "img_mlp.out")
    ]
    with pytest.raises(RecipeError, match=r"to_quit.*to_q"):
        shared.select(stage.family.lora_targets, ["to_quit"])


@pytest.mark.parametrize("name", EVERY)
def test_default_targets_are_attention_and_mlp(name: str) -> None:
    found = Stage(name).shared.select(family(name).lora_targets, None)
    assert found and not any("mod" in n.split(".")[-1].lower() or "norm" in n for n in found)
    assert any("to_q" in n for n in found)


def test_a_lora_of_another_base_is_refused(tmp_path: Path) -> None:
    stage = Stage("qwen_image_21")
    other = write_lora(family("z_image").pipe.transformer, tmp_path / "z.safetensors")
    with pytest.raises(DataError, match="does not have; give a LoRA that was trained on this base"):
        stage.shared.load_lora("teacher-z", other, stage.family.pipe)
    wide = {
        k: torch.cat([v, v], dim=1)
        for k, v in load_file(write_lora(stage.pristine, tmp_path / "own.safetensors")).items()
    }
    save_file(wide, tmp_path / "wide.safetensors")
    with pytest.raises(DataError, match=r"with 64 inputs, and this QwenImage21.* has 32"):
        stage.shared.load_lora("teacher-wide", tmp_path / "wide.safetensors", stage.family.pipe)
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    with pytest.raises(DataError, match="cannot be read"):
        stage.shared.load_lora("teacher-torn", tmp_path / "torn.safetensors", stage.family.pipe)
    with pytest.raises(DataError, match="no such file"):
        stage.shared.load_lora("teacher-none", tmp_path / "none.safetensors", stage.family.pipe)


# --- full copies ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["qwen_image", "qwen_image_21"])
def test_full_copies_train_apart_in_float32(name: str, dtype: torch.dtype) -> None:
    fam, cond = family(name, dtype), singles(condition(name, dtype))
    base = deepcopy(fam.pipe.transformer)
    shared = SharedNetwork(base)
    teacher = FamilyRole(fam, shared, reader=STUDENT)
    lora_roles(fam, shared, SPEC, seed=0)  # a teacher's adapter must not be copied along
    student, fake = full_copy(fam, shared), full_copy(fam, shared)
    assert student.trained.keys() == dict(fam.pipe.transformer.named_parameters()).keys()
    assert all(p.dtype == torch.float32 and p.requires_grad for p in student.parameters())
    x = torch.randn(fam.noise_shape(2, SIZE), generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0.9, 0.6])
    before = teacher(x, t, cond)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        v = student.predict_v(x, t, cond)
        fake.predict_v(x, t, cond)
    assert apart(x - t.view(-1, 1, 1) * v.detach(), before) <= (
        0.2 if dtype == torch.bfloat16 else 2e-6
    )
    loss_of(v).backward()
    assert sum(p.grad is not None and bool(p.grad.any()) for p in student.parameters()) > 20
    assert not any(p.grad is not None for p in fake.parameters())
    assert not any(p.grad is not None for p in base.parameters())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.01)
    assert torch.equal(teacher(x, t, cond), before)


def test_a_lora_is_float32_on_a_network_in_bfloat16() -> None:
    fam = family("qwen_image_21", torch.bfloat16)
    shared = SharedNetwork(deepcopy(fam.pipe.transformer))
    student, _ = lora_roles(fam, shared, SPEC, seed=0)
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert shared.network.transformer_blocks[0].attn.to_q.base_layer.weight.dtype == torch.bfloat16
    cond = singles(condition("qwen_image_21", torch.bfloat16))
    x = torch.randn(fam.noise_shape(2, SIZE), generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0.9, 0.6])
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        v = student.predict_v(x, t, cond)
    exact = fam.velocity(x, t, condition("qwen_image_21", torch.bfloat16)).float()
    assert v.dtype == torch.float32 and torch.equal(v.detach(), exact)
    loss_of(v).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in student.parameters())
