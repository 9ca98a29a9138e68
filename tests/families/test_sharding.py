"""Tiny networks of the real classes in parts on two ranks, against the same whole on one device.

torchrun runs this module: `... -m tests.families.test_sharding JOB FOLDER`, a job being a function
of the ranks and the folder. What jobs find they leave there, and the tests look at it.
"""

import gc
import json
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from fewstep.cli import guarded
from fewstep.commands.distill import read_and_plan, train
from fewstep.commands.evaluate import evaluate
from fewstep.commands.sample import sample
from fewstep.models.readings import answer_all, readings_of
from fewstep.models.roles import STUDENT, FamilyRole, SharedNetwork, full_copy
from fewstep.models.sharding import Shards
from fewstep.train import loop
from fewstep.train.ranks import Ranks, joined
from fewstep.train.sharding import gathered, whole

from ..ranked import ROOT, environment, forked, torchrun
from . import stock
from .fixtures import LONG, SHORT, SIZE, apart, condition, family
from .test_distil import distilled, folder, place, recipe_of, same_tensors, tiny, write
from .test_real_images import write_pairs
from .test_roles import EVERY, NETWORKS, Stage, gradients, loss_of, singles

__all__ = ["folder", "place", "tiny"]


def run_job(job: str, out: Path) -> subprocess.CompletedProcess[str]:
    out.mkdir(exist_ok=True)
    command = torchrun("tests.families.test_sharding", job, out)
    return subprocess.run(
        command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=500
    )


def shards_of(ranks: Ranks) -> Shards:
    return Shards(init_device_mesh("cpu", (ranks.world,)), ranks.most)


# --- jobs: networks -------------------------------------------------------------------------------


def networks(ranks: Ranks, out: Path) -> None:
    """Every family's roles and a full copy, in parts and whole; each rank has its own inputs."""
    shards = shards_of(ranks)
    found: dict[str, Any] = {f"roles/{n}": compare_roles(n, ranks, shards) for n in EVERY}
    found["layouts"] = compare_layouts(ranks, shards)
    for precision in ("fp32", "bf16"):
        found[f"full/{precision}"] = compare_full(ranks, shards, precision)
    found["released"] = released(shards)
    torch.save(found, out / f"{ranks.rank}.pt")


def compare_roles(name: str, ranks: Ranks, shards: Shards) -> dict[str, Any]:
    """Two micro-batches of the student; before each backward pass the others play too."""
    plain, parts = Stage(name), Stage(name)
    for stage in (plain, parts):
        for seed, role in enumerate((stage.student, stage.fake)):
            stage.scatter(role, seed)
        generator = torch.Generator().manual_seed(10 + ranks.rank)
        stage.x_t = torch.randn(stage.x_t.shape, generator=generator)
        if name in NETWORKS:
            stage.shared.checkpoint_blocks()
    split(parts.shared, parts, shards)
    found: dict[str, Any] = {"bytes": bytes_of(parts.shared, plain.shared)}
    answers: list[list[Tensor]] = []
    for stage in (plain, parts):
        student_turn(stage)
        v, fake, base = student_turn(stage)
        found["others"] = len(gradients(stage.fake))
        loss_of(fake).backward()
        answers.append([v, fake.detach(), base])
    found["answers"] = max(map(apart, *answers))
    for role in ("student", "fake"):
        found[role] = against_the_mean(getattr(plain, role), getattr(parts, role), ranks)
    return found


def student_turn(stage: Stage) -> tuple[Tensor, Tensor, Tensor]:
    """What student, fake score and base say; the student's backward pass comes after all three."""
    v, fake = stage.velocity(stage.student), stage.velocity(stage.fake)
    with torch.no_grad():
        base = stage.velocity(stage.base)
    loss_of(v).backward()
    return v.detach(), fake, base


def against_the_mean(plain: FamilyRole, parts: FamilyRole, ranks: Ranks) -> dict[str, float]:
    """Gradients in parts against the mean over the ranks of those of whole networks."""
    ranks.average_gradients(plain)
    wanted, mine = gradients(plain), {n: whole(g) for n, g in gradients(parts).items()}
    assert wanted.keys() == mine.keys()
    return {
        "number": len(wanted),
        "largest": max(g.abs().max().item() for g in wanted.values()),
        "apart": max(apart(mine[n], g) for n, g in wanted.items()),
    }


def split(network: SharedNetwork, stage: Stage, shards: Shards) -> None:
    network.shard(stage.family.trunk.blocks, shards)
    for role in (stage.student, stage.fake):
        role.take_parameters()


def bytes_of(parts: SharedNetwork, plain: SharedNetwork) -> tuple[int, int]:
    """That this rank has of the parameters, and that the whole network has."""
    own = sum(p.to_local().untyped_storage().nbytes() for p in parts.network.parameters())
    return own, sum(p.nbytes for p in plain.network.parameters())


def compare_layouts(ranks: Ranks, shards: Shards) -> dict[str, float]:
    """One layout on the first rank, two on the second."""
    plain, parts = Stage("qwen_image_21"), Stage("qwen_image_21")
    texts = ((SHORT, SHORT), (SHORT, LONG))[ranks.rank]
    read = [plain.family.encode([text], size=SIZE) for text in texts]
    for stage in (plain, parts):
        stage.cond = readings_of([{STUDENT: c} for c in read])
        stage.scatter(stage.student, 1)
    split(parts.shared, parts, shards)
    answers = []
    for stage in (plain, parts):
        v = stage.velocity(stage.student)
        loss_of(v).backward()
        answers.append(v.detach())
    found = against_the_mean(plain.student, parts.student, ranks)
    return found | {"answers": apart(*answers)}


def compare_full(ranks: Ranks, shards: Shards, precision: str) -> dict[str, float]:
    """A copy plays without gradient before and after its weights are moved, as EMA does, under
    inference mode first; then it is trained."""
    name, dtype = "qwen_image_21", {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    fam, cond = family(name, dtype), singles(condition(name, dtype))
    base = SharedNetwork(deepcopy(fam.pipe.transformer))
    plain, parts = full_copy(fam, base), full_copy(fam, base)
    parts.shared.shard(fam.trunk.blocks, shards)
    parts.take_parameters()
    generator = torch.Generator().manual_seed(20 + ranks.rank)
    x, t = torch.randn(fam.noise_shape(2, SIZE), generator=generator), torch.tensor([0.9, 0.6])
    answers: dict[int, list[Tensor]] = {0: [], 1: []}
    for i, role in enumerate((plain, parts)):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            with torch.inference_mode():
                answers[i].append(role.predict_v(x, t, cond))
            with torch.no_grad():
                answers[i].append(role.predict_v(x, t, cond))
                for parameter in role.parameters():
                    parameter.mul_(1.1)
                answers[i].append(role.predict_v(x, t, cond))
            v = role.predict_v(x, t, cond)
        loss_of(v).backward()
        answers[i].append(v.detach())
    found = against_the_mean(plain, parts, ranks)
    moved = apart(answers[0][1], answers[0][2])
    return found | {"answers": max(map(apart, answers[0], answers[1])), "moved": moved}


def released(shards: Shards) -> tuple[int, int]:
    """Bytes that leave this process when a copy is split and has then played forwards and
    backwards: whether the whole, and what is gathered, is let go of. And those of the whole."""
    fam, cond = family("qwen_image"), singles(condition("qwen_image"))
    base = SharedNetwork(deepcopy(fam.pipe.transformer))
    base.network.float()
    x = torch.randn(fam.noise_shape(2, SIZE))
    size = sum(p.nbytes for p in base.network.parameters())
    role = full_copy(fam, base)
    before = living_bytes()
    role.shared.shard(fam.trunk.blocks, shards)
    role.take_parameters()
    for _ in range(2):
        loss_of(role.predict_v(x, torch.tensor([0.9, 0.6]), cond)).backward()
    for parameter in role.parameters():
        parameter.grad = None
    return before - living_bytes(), size


def living_bytes() -> int:
    gc.collect()
    plain = [t for t in gc.get_objects() if type(t) in (Tensor, torch.nn.Parameter)]
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in plain)}
    return sum(storages.values())


# --- jobs: runs -----------------------------------------------------------------------------------

ADAPTIVE = {
    "weights": [{"words": 1.0}],
    "adaptive": {"start": [{"base": 1.0}], "rate": 0.5, "every": 1},
}
OBJECTIVES: dict[str, tuple[str, dict[str, Any]]] = {
    "dmd2": ("lora", {"kind": "dmd2", "fake_updates": 1}),
    "dmd2_full": ("full", {"kind": "dmd2", "fake_updates": 1}),
    "decoupled": ("lora", {"kind": "decoupled_dmd", "fake_updates": 1}),
    "tdm": ("lora", {"kind": "tdm", "fake_updates": 1}),
    "consistency": ("lora", {"kind": "consistency", "substeps": 2}),
    "trajectory": ("full", {"kind": "trajectory_regression", "substeps": 2, "trajectories": 4}),
    "anchored": (
        "lora",
        {"kind": "dmd", "fake_updates": 1, "anchor": {"weight": 0.5, "steps": 2, "of": 6}},
    ),
}
CASTS = {
    "lora": {"kind": "lora", "rank": 4, "alpha": 8.0, "checkpointing": True, "shard": True},
    "full": {"kind": "full", "shard": True},
}


def go(name: str, ranks: Ranks, folder: Path, *, out: str = "", resume: bool = False) -> None:
    """The recipe `name`.yaml into a run folder, up to the student's file."""
    run = folder / (out or name)
    with ranks.folder(run) as own:
        recipe, plan = ranks.collect(lambda: [read_and_plan(folder / f"{name}.yaml", {}, ranks)])[0]
        train(recipe, plan, ranks, run, own, resume=resume)


def runs(ranks: Ranks, folder: Path) -> None:
    for name in CASTS:
        go(name, ranks, folder)


def objectives(ranks: Ranks, folder: Path) -> None:
    for name in OBJECTIVES:
        go(name, ranks, folder)


def killed(ranks: Ranks, folder: Path) -> None:
    """The second rank dies in the third update."""
    step = loop.train_step

    def train_step(d: loop.Distillation) -> Any:
        if d.step == 2 and ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(d)

    loop.train_step = train_step
    go("full", ranks, folder, out="killed")


def resumed(ranks: Ranks, folder: Path) -> None:
    go("full", ranks, folder, out="killed", resume=True)


def not_finite(ranks: Ranks, folder: Path) -> None:
    """The second rank alone meets a value that is not finite."""
    draw = loop.Distillation.draw

    def draw_bad(self: loop.Distillation, role: str) -> Any:
        batch, k = draw(self, role)
        if self.step == 1 and ranks.rank == 1:
            for row in batch.cond.rows:  # type: ignore[attr-defined]
                row[STUDENT].text.states.fill_(torch.nan)
        return batch, k

    loop.Distillation.draw = draw_bad
    go("full", ranks, folder, out="broken")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with ExitStack() as stack:
        stack.enter_context(stock.tiny_sources())
        stack.enter_context(stock.processors_without_video())

        def do() -> None:
            with joined(os.environ) as ranks:
                globals()[sys.argv[1]](ranks, Path(sys.argv[2]))

        sys.exit(guarded(do))


# --- in forks of this process: forwards alone -----------------------------------------------------


def copy_of_21(shards: Shards | None = None) -> FamilyRole:
    fam = family("qwen_image_21")
    role = full_copy(fam, SharedNetwork(deepcopy(fam.pipe.transformer)))
    if shards:
        role.shared.shard(fam.trunk.blocks, shards)
        role.take_parameters()
    return role


def test_the_lead_alone_keeps_the_gathered_student() -> None:
    wanted = copy_of_21().state_dict()

    def job(ranks: Ranks) -> tuple[int, bool]:
        found = gathered(copy_of_21(shards_of(ranks)), keep=ranks.is_lead).state_dict()
        return len(found), all(torch.equal(found[name], wanted[name]) for name in found)

    assert forked(job) == [(len(wanted), True), (0, True)]


def test_what_plays_is_what_the_weights_are_now() -> None:
    """First under inference mode, then as in training; then the weights are moved, as EMA moves
    them, with no backward pass in between."""
    fam, cond = family("qwen_image_21"), singles(condition("qwen_image_21"))
    x = torch.randn(fam.noise_shape(2, SIZE), generator=torch.Generator().manual_seed(3))

    def answers(role: FamilyRole) -> list[Tensor]:
        t = torch.tensor([0.9, 0.6])
        with torch.inference_mode():
            found = [role(x, t, cond)]
        with torch.no_grad():
            found.append(role(x, t, cond))
            for parameter in role.parameters():
                parameter.mul_(1.1)
            return [*found, role(x, t, cond)]

    wanted = answers(copy_of_21())

    def job(ranks: Ranks) -> tuple[list[float], int]:
        role = copy_of_21(shards_of(ranks))
        return list(map(apart, answers(role), wanted)), role.shared.calls(3 + ranks.rank)

    for found, calls in forked(job):
        assert max(found) <= 1e-6 and calls == 4
    assert apart(*wanted[1:]) > 0.1


def test_calls_beyond_the_layouts_change_neither_answer_nor_gradient() -> None:
    cond = singles(condition("qwen_image_21"))
    x, t = torch.randn(2, 3), torch.rand(2)
    found = []
    for more in (0, 3):
        weight, asked = torch.ones(3, requires_grad=True), []

        def answer(x_t: Tensor, now: Tensor, part: Any, weight=weight, asked=asked) -> Tensor:
            asked.append(len(part))
            return weight * x_t

        out = answer_all(answer, x, t, cond, STUDENT, calls=lambda n, more=more: n + more)
        loss_of(out).backward()
        assert len(asked) == 1 + more
        found.append((out.detach(), weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# --- networks -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("networks")
    done = run_job("networks", out)
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(out / f"{rank}.pt") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_a_network_in_parts_answers_and_learns_as_the_whole(compared: Any, name: str) -> None:
    """Roles may play in between, blocks be computed again; gradients are averaged once."""
    for found in (rank[f"roles/{name}"] for rank in compared):
        assert found["answers"] <= 1e-6
        assert found["others"] == 0, "the student's loss reached the fake score"
        for role in (found["student"], found["fake"]):
            assert role["number"] > 10 and role["apart"] <= 1e-5 * role["largest"]
        own, all_of_it = found["bytes"]
        assert 0.5 <= own / all_of_it < 0.56


@pytest.mark.slow
def test_ranks_with_unequal_numbers_of_layouts_do_not_wait_for_ever(compared: Any) -> None:
    for found in (rank["layouts"] for rank in compared):
        assert found["answers"] <= 1e-6
        assert found["apart"] <= 1e-5 * found["largest"] and found["number"] > 10


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_full_copy_in_parts_plays_what_its_weights_are(compared: Any, precision: str) -> None:
    """Also after they were moved between two calls without gradient."""
    tolerance = {"fp32": 1e-6, "bf16": 1e-6}[precision]
    for found in (rank[f"full/{precision}"] for rank in compared):
        assert found["answers"] <= tolerance < 0.01 < found["moved"]
        assert found["apart"] <= 1e-4 * found["largest"] and found["number"] > 20


@pytest.mark.slow
def test_what_was_gathered_is_let_go_of(compared: Any) -> None:
    for freed, all_of_it in (rank["released"] for rank in compared):
        assert 0.45 < freed / all_of_it < 0.51


# --- runs -----------------------------------------------------------------------------------------


class Runs:
    """Two ranks' runs of every cast, and the recipes that one device can go through as well."""

    def __init__(self, path: Path, recipes: dict[str, dict[str, Any]]) -> None:
        self.path, self.recipes = path, recipes
        for name, recipe in recipes.items():
            write(recipe, path / f"{name}.yaml")

    def on_one_device(self, name: str) -> Path:
        """With micro-batches as large as those of both ranks together."""
        recipe = deepcopy(self.recipes[name])
        recipe["budget"]["micro_batch"] *= 2
        recipe["evaluation"]["models"] = ["student"]
        return distilled(recipe, self.path / f"one-{name}")


@pytest.fixture(scope="module")
def made(place: Path, folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    path = tmp_path_factory.mktemp("runs")
    recipes = {}
    for name, cast in CASTS.items():
        recipe = recipe_of(place, folder, "qwen_image_21", model__cast=cast, optim__warmup=0)
        recipe["optim"] |= {"student": {"lr": 1e-3}, "fake": {"lr": 1e-3}}
        recipe["budget"] |= {"updates": 3, "batch": 8, "micro_batch": 2}
        recipe["log"] |= {"probe": {"every": 1, "per_category": 1, "seeds": 2}, "sample_every": 1}
        recipes[name] = recipe
    runs = Runs(path, recipes)
    done = run_job("runs", path)
    assert done.returncode == 0, done.stdout + done.stderr
    return runs


@pytest.fixture(scope="module")
def others(folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Every other objective, with real images; lambda of texts moves by what is measured."""
    path = tmp_path_factory.mktemp("objectives")
    write_pairs(path / "prompts")
    place = folder("qwen_image_21").parent
    recipes = {}
    for name, (cast, objective) in OBJECTIVES.items():
        given = {"model__cast": CASTS[cast], "objective": objective, "optim__warmup": 0}
        recipe = recipe_of(place, folder, "qwen_image_21", **given)
        recipe["data"]["source"] |= {"path": str(path / "prompts"), "cache": str(path / "cache")}
        recipe["optim"] |= {"student": {"lr": 1e-3}, "fake": {"lr": 1e-3}}
        recipe["budget"] |= {"updates": 2, "batch": 4, "micro_batch": 1}
        if "fake_updates" in objective:
            adaptive = {"when": {"category": "text"}} | ADAPTIVE
            recipe["guidance"] = [adaptive, *recipe["guidance"][1:]]
        recipes[name] = recipe
    runs = Runs(path, recipes)
    done = run_job("objectives", path)
    assert done.returncode == 0, done.stdout + done.stderr
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains_in_parts(others: Runs, name: str) -> None:
    one, two = others.on_one_device(name), others.path / name
    a, b = (load_file(out / "student.safetensors") for out in (two, one))
    for key, tensor in b.items():
        torch.testing.assert_close(a[key], tensor, rtol=0, atol=5e-5)
    for found, wanted in zip(rows_of(two), rows_of(one), strict=True):
        assert found.keys() == wanted.keys() and found["grad_norm/student"] > 0
        for key in found.keys() - {"seconds"}:
            assert found[key] == pytest.approx(wanted[key], rel=2e-3, abs=2e-3), key


def rows_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASTS)
def test_two_ranks_in_parts_train_the_student_of_one_device(made: Runs, name: str) -> None:
    """T2I and edits, prompts of unequal length, two teachers of which one is for texts alone; grids
    and probes in between. What is left is the order of sums, in float32."""
    one, two = made.on_one_device(name), made.path / name
    a, b = (load_file(out / "student.safetensors") for out in (two, one))
    assert a.keys() == b.keys()
    for key, tensor in b.items():
        torch.testing.assert_close(a[key], tensor, rtol=0, atol=5e-5)
    for found, wanted in zip(rows_of(two), rows_of(one), strict=True):
        assert found.keys() == wanted.keys() and found["grad_norm/student"] > 0
        for key in found.keys() - {"seconds"}:
            assert found[key] == pytest.approx(wanted[key], rel=2e-3, abs=2e-3), key
    names = [{str(p.relative_to(out)) for p in out.rglob("*.png")} for out in (two, one)]
    assert names[0] == {name for name in names[1] if not name.startswith("eval")}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASTS)
def test_the_student_of_a_run_in_parts_is_played_by_one_device(made: Runs, name: str) -> None:
    evaluate(made.path / name)
    assert len((made.path / name / "eval/rows.jsonl").read_text().splitlines()) > 2
    options: dict[str, Any] = {"prompt_file": None, "source": None, "instruction": None}
    options |= {"seeds": [7], "model": "student", "steps": None}
    out = made.path / f"{name}.png"
    sample(made.path / name, prompts=["A cat at night"], out=out, **options)
    assert out.is_file()


@pytest.mark.slow
def test_a_killed_run_in_parts_resumes_to_the_same_bits(made: Runs) -> None:
    died = run_job("killed", made.path)
    assert died.returncode != 0 and not (made.path / "killed/student.safetensors").exists()
    assert [row["step"] for row in rows_of(made.path / "killed")] == [1, 2]
    done = run_job("resumed", made.path)
    assert done.returncode == 0, done.stdout + done.stderr
    whole, again = (made.path / n / "student.safetensors" for n in ("full", "killed"))
    assert same_tensors(whole, again)
    rows = [[r | {"seconds": 0} for r in rows_of(made.path / n)] for n in ("full", "killed")]
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_a_value_that_is_not_finite_on_one_rank_stops_all_in_parts(made: Runs) -> None:
    done = run_job("not_finite", made.path)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1, done.stderr
    assert "the fake-score loss is not finite; nothing was updated" in done.stderr


# --- what a plan counts ---------------------------------------------------------------------------


def test_autocast_keeps_copies_of_a_full_casts_weights() -> None:
    """In 16 bit, from the forward pass to the backward pass, as the plan has it: those of all
    blocks, of none where they are computed again."""
    found = {}
    for checkpointing in (False, True):
        role, cond = copy_of_21(), singles(condition("qwen_image_21"))
        if checkpointing:
            role.shared.checkpoint_blocks()
        weights = [p for p in role.parameters() if p.ndim == 2]
        matrices = {shape for p in weights for shape in (tuple(p.shape), tuple(p.shape[::-1]))}
        kept: list[Tensor] = []

        def keep(tensor: Tensor, matrices=matrices, kept=kept) -> Tensor:
            if tensor.dtype == torch.bfloat16 and tuple(tensor.shape) in matrices:
                kept.append(tensor)
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
        ):
            x = torch.randn(role.family.noise_shape(2, SIZE))
            role.predict_v(x, torch.tensor([0.9, 0.6]), cond)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
        found[checkpointing] = sum(storages.values())
    blocks = copy_of_21().shared.network.transformer_blocks
    inside = sum(p.numel() for p in blocks.parameters() if p.ndim == 2)
    assert found[False] - found[True] == 2 * inside
