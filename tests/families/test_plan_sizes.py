"""Sizes in plans of real models against the real thing: tiny networks that really run on the CPU.

Counts of FLOPs, saved tensors and the allocator's peak come from torch's own instruments, not from
the ledger that is tested.
"""

import gc
import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fewstep.errors import RecipeError
from fewstep.models.families import size as sizes
from fewstep.models.families.released import RELEASED
from fewstep.models.roles import LoraSpec, SharedNetwork, lora_roles
from fewstep.real.size import ASSUMED, measure, plan_real
from fewstep.recipe.facts import gather_facts
from fewstep.recipe.load import load_recipe
from fewstep.recipe.plan import make_plan

from . import fixtures, stock
from .fixtures import SIZE
from .folders import save_pipeline, write_prompts

ROOT = Path(__file__).parents[2]
RECIPES = sorted(
    path
    for name in (
        *("qwen_image", "qwen_image_edit", "qwen_image_21", "flux2_klein", "sd35"),
        *("z_image", "sana"),
    )
    for path in (ROOT / "recipes" / name).glob("*.yaml")
)
CASES = {
    "qwen_image": ("QwenImagePipeline", "t2i"),
    "qwen_image_edit": ("QwenImageEditPlusPipeline", "edit"),
    "qwen_image_21": ("QwenImage21Pipeline", "t2i"),
    "qwen_image_21_edit": ("QwenImage21Pipeline", "edit"),
    "flux2_klein": ("Flux2KleinPipeline", "t2i"),
    "flux2_klein_edit": ("Flux2KleinPipeline", "edit"),
    "sd3": ("StableDiffusion3Pipeline", "t2i"),
    "z_image": ("ZImagePipeline", "t2i"),
    "sana": ("SanaPipeline", "t2i"),
}
CPU = torch.device("cpu")
BATCH, SOURCE, TEXT = 2, 64, 20


class Stage:
    """A tiny network with student and fake score, on one device, and one evaluation of it."""

    def __init__(self, name: str, device: torch.device, *, checkpointing: bool) -> None:
        self.kind, task = CASES[name]
        real = fixtures.pipeline(name).transformer
        if device.type == "meta":
            network = sizes.build(type(real).__name__, real.config, torch.float32)
        else:
            network = type(real).from_config(dict(real.config))
        self.family = sizes.hollow_family(self.kind, network, None)
        self.shared = SharedNetwork(network)
        with device:
            self.student, self.fake = lora_roles(self.family, self.shared, LoraSpec(4, 4.0), seed=0)
        if checkpointing:
            self.shared.checkpoint_blocks()
        self.network = network
        self.given = sizes.example(
            self.family,
            BATCH,
            SIZE,
            torch.float32,
            task=task,
            text_tokens=TEXT,
            source=SOURCE,
            device=device,
        )
        for value in (self.given[0], self.given[2].text.states, self.given[2].source):
            if device.type == "cpu" and value is not None:
                value.normal_()

    def answer(self) -> Tensor:
        with self.shared.playing("student"):
            return self.family.velocity(*self.given, self.network)


@pytest.fixture(scope="module")
def hollow() -> Callable[[str, bool], Stage]:
    return lambda name, checkpointing: Stage(name, sizes.META, checkpointing=checkpointing)


@pytest.fixture(scope="module")
def real() -> Callable[[str, bool], Stage]:
    return lambda name, checkpointing: Stage(name, CPU, checkpointing=checkpointing)


# --- FLOPs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_forward_flops_are_those_that_torch_counts(name: str, hollow: Any, real: Any) -> None:
    own, stage = sizes.forward_pass(hollow(name, False).answer), real(name, False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        stage.answer()
    assert own.flop == pytest.approx(counter.get_total_flops(), rel=1e-9)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_training_flops(name: str, checkpointing: bool, hollow: Any, real: Any) -> None:
    """Kernels that never keep the scores multiply five times backwards, torch's reference four."""
    tried, stage = hollow(name, checkpointing), real(name, checkpointing)
    own = sizes.training_pass(tried.answer, tried.student.parameters())
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = stage.answer()
        torch.autograd.backward(out, torch.ones_like(out))
    products = sum(
        flop for op, flop in counter.get_flop_counts()["Global"].items() if str(op) == "aten.bmm"
    )
    counted = counter.get_total_flops()
    # Nearly all products of batches are attention's (SANA's linear attention has others).
    counted += products / (8 if checkpointing else 6)
    assert own.flop == pytest.approx(counted, rel=0.01)


# --- bytes ----------------------------------------------------------------------------------------


class Box:
    """Shows when autograd lets go of what it saved."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


def saved_storages(stage: Stage) -> tuple[dict[int, int], Tensor]:
    """Bytes by place of what autograd keeps for an answer, and the answer that keeps it.

    What only leads to discarded outputs is let go before the answer is there.
    """
    boxes: list[weakref.ref[Box]] = []

    def pack(value: Tensor) -> Box:
        box = Box(value)
        boxes.append(weakref.ref(box))
        return box

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.value):
        out = stage.answer()
    live = [box.value.untyped_storage() for ref in boxes if (box := ref()) is not None]
    return {storage.data_ptr(): storage.nbytes() for storage in live}, out


@pytest.mark.parametrize("name", CASES)
def test_what_is_kept_is_what_autograd_saves(name: str, hollow: Any, real: Any) -> None:
    tried, stage = hollow(name, False), real(name, False)
    sizes.forward_pass(tried.answer)  # fills caches of positions
    own = sizes.training_pass(tried.answer, tried.student.parameters())
    stage.answer()
    (first, out), (again, other) = saved_storages(stage), saved_storages(stage)
    assert out is not other  # both alive: what both keep is weights and inputs
    made = sum(size for place, size in again.items() if place not in first)
    assert own.kept == pytest.approx(made, rel=0.05)


def allocated(act: Callable[[], Any]) -> tuple[int, int]:
    """What torch's CPU allocator gave out during `act` beyond what it had before: the most at any
    time, and what was left while its result lived."""
    gc.collect()  # cycles of an earlier pass would be freed in this one's time
    with torch.profiler.profile(profile_memory=True) as profile:
        result = act()
    live = peak = 0
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    event: Any
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    del result
    return peak, live


RNG_STATE = torch.get_rng_state().nbytes
"""Kept on the CPU for every checkpointed block, wherever the network is."""


def stacks(network: Any) -> list[Any]:
    return [m for m in network.children() if isinstance(m, torch.nn.ModuleList) and len(m[0:])]


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_kept_and_peak_are_what_the_allocator_gave(
    name: str, checkpointing: bool, hollow: Any, real: Any
) -> None:
    tried, stage = hollow(name, checkpointing), real(name, checkpointing)
    sizes.forward_pass(tried.answer)
    stage.answer()
    own = sizes.training_pass(tried.answer, tried.student.parameters())
    for parameter in stage.student.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def act() -> None:
        out = stage.answer()
        torch.autograd.backward(out, torch.ones_like(out))

    # Convolutions, which SANA alone has, take room for themselves on the CPU.
    assert own.peak == pytest.approx(allocated(act)[0], rel=0.12 if name == "sana" else 0.09)
    states = RNG_STATE * sum(map(len, stacks(stage.network))) if checkpointing else 0
    assert own.kept == pytest.approx(allocated(stage.answer)[1] - states, rel=0.05)


def test_checkpointing_keeps_less_and_computes_more(hollow: Any) -> None:
    plain, thin = (
        sizes.training_pass(stage.answer, stage.student.parameters())
        for stage in (hollow("qwen_image", False), hollow("qwen_image", True))
    )
    assert thin.kept < plain.kept / 3
    assert thin.flop == pytest.approx(plain.flop + plain.forward_flop, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_equal_blocks_need_not_all_be_run(checkpointing: bool) -> None:
    config = {**fixtures.pipeline("qwen_image").transformer.config, "num_layers": 7}
    network = sizes.build("QwenImageTransformer2DModel", config, torch.bfloat16)
    family = sizes.hollow_family("QwenImagePipeline", network, None)
    shared = SharedNetwork(network)
    with sizes.META:
        student, _ = lora_roles(family, shared, LoraSpec(4, 4.0), seed=0)
    if checkpointing:
        shared.checkpoint_blocks()
    given = sizes.example(family, 1, (256, 256), torch.bfloat16, task="t2i")

    def measure() -> sizes.Pass:
        def answer() -> Tensor:
            with shared.playing("student"):
                return family.velocity(*given, network)

        return sizes.training_pass(answer, student.parameters())

    measure()
    assert sizes.at_full_depth(network, measure) == measure()
    assert len(network.transformer_blocks) == 7


# --- parameters -----------------------------------------------------------------------------------

PUBLISHED = {
    "Qwen-Image": 20.43,
    "Qwen-Image-2.1": 7.115,
    "FLUX.2-klein-base-4B": 3.876,
    "stable-diffusion-3.5-medium": 2.243,
    "Z-Image": 6.155,
    "Sana_1600M_1024px_BF16_diffusers": 1.604,
}
"""Billions of parameters. Released files of SANA take 3.22 GB in bf16 (1.61 with its buffers)."""


@pytest.mark.parametrize("name", RELEASED)
def test_released_networks_are_built_whole(name: str) -> None:
    known = RELEASED[name]
    network = sizes.build(known.network, known.config, torch.bfloat16)
    with torch.device("meta"):
        direct = getattr(fixtures.diffusers, known.network)(**known.config)
    count = sum(p.numel() for p in network.parameters())
    assert count == sum(p.numel() for p in direct.parameters())
    assert {p.device.type for p in network.parameters()} == {"meta"}
    if name in PUBLISHED:
        assert count / 1e9 == pytest.approx(PUBLISHED[name], abs=1e-3)


# --- plans ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sizes")
    write_prompts(place / "prompts")
    with ExitStack() as stack:
        stack.enter_context(stock.tiny_sources())
        save_pipeline(fixtures.qwen_image_21(), place / "tiny")
    about = {
        "extends": str(ROOT / "recipes/qwen_image_21/one_80gb.yaml"),
        "model": {"path": str(place / "tiny"), "size": list(SIZE), "source_resolution": 96},
    }
    file = place / "recipe.yaml"
    file.write_text(json.dumps(about))
    return file


def tiny_overrides(file: Path) -> dict[str, str]:
    return {
        "data.source.path": str(file.parent / "prompts"),
        "data.pools": "{a: {task: t2i, category: scene, size: 3}, "
        "b: {task: edit, category: object, size: 3}}",
        "data.composition": "{t2i: {a: 1}, edit: {b: 1}}",
        "teachers.special.lora": "null",
    }


def test_trained_bytes_are_exact(tiny_recipe: Path) -> None:
    """Weights, gradients and moments as a real optimiser holds them."""
    recipe = load_recipe(tiny_recipe, tiny_overrides(tiny_recipe))
    plan = plan_real(recipe)
    network = fixtures.pipeline("qwen_image_21").transformer
    assert plan.size is not None
    assert plan.size.params == sum(p.numel() for p in network.parameters())
    family = sizes.hollow_family(
        "QwenImage21Pipeline", type(network).from_config(dict(network.config)), None
    )
    shared = SharedNetwork(family.pipe.transformer)
    student, _ = lora_roles(family, shared, LoraSpec(64, 64.0), seed=0)
    own = list(student.parameters())
    optimiser = torch.optim.AdamW(own)
    for parameter in own:
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    moments = [
        value for state in optimiser.state.values() for value in state.values() if value.ndim
    ]
    average = [parameter.clone() for parameter in own]
    kept = [*own, *(p.grad for p in own if p.grad is not None), *moments, *average]
    assert plan.memory.student == sum(value.nbytes for value in kept)
    assert plan.memory.fake == sum(value.nbytes for value in (*own, *moments))
    assert plan.memory.teachers == 2 * plan.size.params


@pytest.mark.slow
def test_a_whole_update_stays_within_the_plan(tiny_recipe: Path) -> None:
    """The allocator during fake and student updates, against activations and gradients."""
    from fewstep.commands.distill import needed
    from fewstep.real.ensemble import RealEnsemble
    from fewstep.real.pipelines import Pipelines
    from fewstep.train import loop

    changes = {
        "precision": "fp32",
        "data.source.cache": str(tiny_recipe.parent / "cache"),
        "evaluation.per_category": "1",
        "log.probe": "null",
        "log.sample_seeds": "1",
        "budget.batch": "1",
        "model.cast.rank": "4",
        "model.cast.alpha": "4",
        "data.mixture": "{t2i: 1, edit: 0}",
    }
    recipe = load_recipe(tiny_recipe, tiny_overrides(tiny_recipe) | changes)
    plan = plan_real(recipe)
    with ExitStack() as stack:
        stack.enter_context(stock.tiny_sources())
        stack.enter_context(stock.processors_without_video())
        ensemble = RealEnsemble(recipe, Pipelines(recipe.model, torch.float32, CPU))
        domain = ensemble.open_domain()
        pools: Any = {
            name: domain.pool(p.category, p.size, 0, task=p.task, targets=False)
            for name, p in recipe.data.pools.items()
        }
        cast = ensemble.cast(needed(recipe, plan))
        state = loop.Distillation(cast, pools, recipe, plan, domain.sample_shape)
        loop.train_step(state)
        peak, _ = allocated(lambda: [loop.train_step(state) for _ in range(2)])
    conds = [domain.take("t2i", [prompt]) for prompt in pools["a"].prompts]
    lengths = [part.text.states.shape[1] for c in conds for _, part in c.seen_by("student")]
    longest = max(lengths)
    cond = conds[lengths.index(longest)]
    x, t = torch.randn(1, *domain.sample_shape), torch.full((1,), 0.5)
    with torch.no_grad():
        forward, _ = allocated(lambda: cast.student.predict_v(x, t, cond))
    _, kept = allocated(lambda: cast.student.predict_v(x, t, cond))
    model = measure(recipe, gather_facts(recipe), ("t2i",), text_tokens=longest).model
    assert model.trained is not None
    passes = model.passes["t2i"]
    assert passes.forward_bytes == pytest.approx(forward, rel=0.1)
    blocks = len(cast.student.shared.network.transformer_blocks)  # type: ignore[attr-defined]
    assert passes.kept_bytes == pytest.approx(kept - RNG_STATE * blocks, rel=0.1)
    expected = 4 * model.trained + max(
        passes.training_bytes, passes.kept_bytes + passes.forward_bytes
    )
    assert peak == pytest.approx(expected, rel=0.1)


def test_cost_and_memory_follow_from_the_passes(tiny_recipe: Path) -> None:
    """By hand: what an update of DMD evaluates, and the moments at which memory is fullest."""
    changes = {"data.mixture": "{t2i: 1, edit: 0}", "log.probe": "null"}
    recipe = load_recipe(tiny_recipe, tiny_overrides(tiny_recipe) | changes)
    facts = measure(recipe, gather_facts(recipe), ("t2i",))
    made = facts.model.passes["t2i"]
    # So that none of the moments hides the others.
    trained = replace(made, kept_bytes=2 * made.training_bytes)
    drawn = replace(made, forward_bytes=2 * made.training_bytes)
    for passes, batch, images in (
        (made, None, 1),  # as many as in training
        (trained, None, 1),
        (drawn, None, 1),
        (drawn, 3, 3),
        (drawn, 100, 4),  # log.sample_seeds, and evaluation.per_category
    ):
        drawing = recipe.evaluation.model_copy(update={"batch": batch})
        recipe = recipe.model_copy(update={"evaluation": drawing})
        model = replace(facts.model, passes={"t2i": passes})
        plan = make_plan(recipe, ASSUMED, replace(facts, model=model))
        walked = 1.5 * passes.student_flop  # k = 0 .. 3 steps without gradient
        student = walked + passes.training_flop + passes.student_flop  # the last: the fake score
        fake = walked + passes.student_flop + passes.training_flop
        teachers = 2 * (1 + 1 + 2 + 1) / 4 * passes.teacher_flop
        samples = recipe.budget.updates * recipe.budget.batch
        assert plan.cost.flop == pytest.approx(samples * (student + 5 * fake + teachers))
        moments = (
            passes.training_bytes,
            passes.kept_bytes + passes.forward_bytes,
            images * passes.forward_bytes,
            passes.decoder_bytes,
            4 * (facts.model.trained or 0),
        )
        assert plan.memory.activations == max(moments)
        assert plan.memory.margin == 2**30 + round(max(moments) / 10)


@pytest.mark.slow
def test_an_absent_model_is_planned_on_paper_only_if_it_is_known(tiny_recipe: Path) -> None:
    there = load_recipe(tiny_recipe, tiny_overrides(tiny_recipe))
    assert plan_real(there).notes == ()
    path = ROOT / "recipes/qwen_image_21/one_80gb.yaml"
    with pytest.raises(RecipeError, match="does not exist"):
        plan_real(load_recipe(path, {}))
    with pytest.raises(RecipeError, match="does not exist"):
        plan_real(load_recipe(path, {"model.path": "models/Unheard-Of"}), on_paper=True)
    plan = plan_real(load_recipe(path, {}), on_paper=True)
    assert plan.notes[0] == (
        "models/Qwen-Image-2.1 is not here: sizes are those of the released Qwen-Image-2.1"
    )


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_ready_recipes_can_be_planned_and_fit(path: Path) -> None:
    recipe = load_recipe(path, {})
    devices = 8 if recipe.model.roles.shard else 1
    plan = plan_real(recipe, devices=devices, on_paper=True)
    assert plan.size is not None and plan.cost.flop > 0 and plan.evaluates
    if plan.size.networks == 1:
        assert plan.memory.total < ASSUMED.memory, plan.notes


@pytest.mark.slow
def test_a_20b_plan_allocates_no_weights() -> None:
    command = [sys.executable, "-m", "fewstep", "plan", "--json"]
    script = (
        "import resource, sys; from fewstep.cli import app; app(sys.argv[1:], standalone_mode="
        "False); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
    )
    path = ROOT / "recipes/qwen_image_edit/one_80gb.yaml"
    done = subprocess.run(
        [command[0], "-c", script, "plan", str(path), "--json"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    plan = json.loads(done.stdout)
    assert plan["size"]["params"] == 20_430_401_088
    assert plan["memory"]["total"] < 76e9
    assert int(done.stderr.split()[-1]) * 1024 < 3 * 2**30
