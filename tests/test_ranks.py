"""Several ranks train as one: the same draws shared out, one gradient, one voice, one resume."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fewstep.core.types import Share
from fewstep.errors import CheckpointError, DataError, RunError
from fewstep.sweep.command import sweep
from fewstep.train import loop
from fewstep.train.ranks import ALONE, Agreed, Ranks, joined, world_of

from .ranked import (
    OBJECTIVES,
    ROOT,
    distil,
    environment,
    forked,
    run_job,
    start,
    torchrun,
)
from .test_run import write_recipe, write_teacher

# --- without processes ----------------------------------------------------------------------------


def test_a_share_is_one_of_equal_parts_in_order() -> None:
    rows = torch.arange(12)
    parts = [Share(index, 3).take(rows).tolist() for index in range(3)]
    assert parts == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert Share().take(rows) is not None and len(Share().take(rows)) == 12
    assert Share(1, 2).take(("a", "b")) == ("b",)


def loss_and_gradient(
    d: loop.Distillation, role: str
) -> tuple[float, int, dict[str, torch.Tensor]]:
    """Of the next micro-batch."""
    update, module = {
        "student": (d.method.student, d.cast.student),
        "fake": (d.method.fake, d.cast.fake),
    }[role]
    assert update
    batch, k = d.draw(role)
    loss, _ = update(d.cast, batch, k, d.plan, d.recipe, d.noise)
    loss.backward()
    found = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    for p in module.parameters():
        p.grad = None
    return loss.item(), k, found


@pytest.mark.parametrize("kind", [k for k in OBJECTIVES if k != "trajectory_regression"])
def test_the_mean_gradient_of_the_ranks_is_that_of_one_large_device(kind: str) -> None:
    """Four micro-batches, of both tasks, one after the other: the generators stay alike."""
    one = start(kind, micro_batch=8)
    two = [start(kind, Ranks(rank, 2)) for rank in range(2)]
    role = "fake" if one.method.fake else "student"
    for turn in (role, "student", role, "student"):
        loss, k, whole = loss_and_gradient(one, turn)
        parts = [loss_and_gradient(d, turn) for d in two]
        assert [step for _, step, _ in parts] == [k, k]
        assert loss == pytest.approx(sum(part[0] for part in parts) / 2, rel=1e-5)
        assert parts[0][0] != parts[1][0], "the ranks see the same"
        for name, gradient in whole.items():
            mean = (parts[0][2][name] + parts[1][2][name]) / 2
            torch.testing.assert_close(mean, gradient, rtol=1e-3, atol=1e-6)


def test_without_torchrun_a_run_is_alone() -> None:
    with joined({}) as ranks:
        assert ranks is ALONE
    with joined({"WORLD_SIZE": "1", "RANK": "0"}) as ranks:  # as in the cells of a sweep
        assert ranks is ALONE and ranks.is_lead


def test_variables_that_torchrun_did_not_set_are_refused() -> None:
    with (
        pytest.raises(RunError, match="LOCAL_RANK is not set; start with torchrun"),
        joined({"WORLD_SIZE": "2", "RANK": "0"}),
    ):
        pass
    with pytest.raises(RunError, match="WORLD_SIZE=two is no number"):
        world_of({"WORLD_SIZE": "two"})

    with pytest.raises(RunError, match="several sweeps"):
        sweep(Path("study.yaml"), out=None, overrides={}, environment={"WORLD_SIZE": "2"})


# --- in forks of this process ---------------------------------------------------------------------


def test_gradients_become_their_mean_and_what_has_none_keeps_none() -> None:
    def job(ranks: Ranks) -> list[list[float] | None]:
        module = torch.nn.Module()
        for name in "abc":
            module.register_parameter(name, torch.nn.Parameter(torch.zeros(2)))
        a, b, _ = module.parameters()
        a.grad = torch.tensor([1.0, -2.0]) * (ranks.rank + 1)
        if ranks.rank == 1:
            b.grad = torch.tensor([6.0, 9.0])
        ranks.average_gradients(module)
        return [None if p.grad is None else p.grad.tolist() for p in module.parameters()]

    wanted = [[2.0, -4.0], [2.0, 3.0], None]  # over ranks 0, 1, 2
    assert forked(job, world=3) == [wanted] * 3


def test_every_rank_hears_all_in_order_and_gathers_all_rows() -> None:
    def job(ranks: Ranks) -> tuple[list[str], list[float], bool]:
        heard = ranks.collect(lambda: [f"{ranks.rank}a", f"{ranks.rank}b"])
        rows = ranks.gather_rows(torch.full((2, 1), float(ranks.rank)), dim=1)
        return heard, rows.flatten().tolist(), ranks.is_lead

    heard, rows = ["0a", "0b", "1a", "1b"], [0.0, 1.0, 0.0, 1.0]
    assert forked(job) == [(heard, rows, True), (heard, rows, False)]


def test_a_users_mistake_on_one_rank_is_known_to_all() -> None:
    def job(ranks: Ranks) -> tuple[str, int]:
        def compute() -> list[int]:
            if ranks.rank == 1:
                raise DataError("no such file")
            return []

        try:
            ranks.collect(compute)
        except Agreed as error:
            return str(error), error.exit_code
        return "", 0

    assert forked(job) == [("rank 1: no such file", 3)] * 2


def test_ranks_that_have_parted_are_found() -> None:
    def job(ranks: Ranks) -> str:
        ranks.check_alike("nothing", lambda: 1.5)
        try:
            ranks.check_alike("the weights", lambda: 1.5 + 1e-12 * ranks.rank)
        except Agreed as error:
            return str(error)
        return ""

    assert all("do not agree on the weights: 1.5, 1.500000000001" in told for told in forked(job))


def test_the_lead_goes_first_and_alone_draws_and_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train_step(d: loop.Distillation) -> dict[str, float]:
        d.step += 1
        return {"loss/student": 1.0}

    monkeypatch.setattr(loop, "train_step", train_step)

    def job(ranks: Ranks) -> tuple[list[str], list[str], bool]:
        def prepare() -> bool:
            before = (tmp_path / "cache").exists()
            time.sleep(0.2)
            (tmp_path / "cache").touch()
            return before

        found = ranks.lead_first(prepare)
        drawn: list[str] = []
        out = tmp_path / str(ranks.rank)
        out.mkdir()
        loop.distil(
            start("dmd", ranks),
            out,
            on_step=lambda step, metrics: None,
            on_sample=lambda step: drawn.append(f"sample {step}"),
        )
        return drawn, sorted(str(p.relative_to(out)) for p in out.rglob("*.pt")), found

    states = ["checkpoints/last.pt", "checkpoints/previous.pt"]
    assert forked(job) == [(["sample 4"], states, False), ([], [], True)]


# --- as torchrun starts them ----------------------------------------------------------------------


def state_of(folder: Path) -> dict:
    return torch.load(folder / "checkpoints/last.pt", weights_only=True)


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_ranks_make_the_student_of_one_large_device(tmp_path: Path) -> None:
    """Every objective, four updates of two micro-batches; then one device goes on."""
    done = run_job("every_objective", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    for kind in OBJECTIVES:
        one, out = start(kind, micro_batch=8), tmp_path / "one" / kind
        before = start(kind, micro_batch=8).state_dict()
        out.parent.mkdir(exist_ok=True)
        distil(one, out)
        wanted, found = one.state_dict(), state_of(tmp_path / "two" / kind)
        for role in ("student", "fake", "head"):
            for name, tensor in (wanted[role] or {}).items():
                torch.testing.assert_close(found[role][name], tensor, rtol=0, atol=2e-5)
        moved = [(before["student"][n] - w).abs().max() for n, w in wanted["student"].items()]
        assert max(moved) > 3e-3
        for name, average in wanted["ema"]["average"].items():
            torch.testing.assert_close(found["ema"]["average"][name], average, rtol=0, atol=2e-5)
        for a, b in zip(rows_of(tmp_path / "two" / kind), rows_of(out), strict=True):
            assert a.keys() == b.keys()
            for key in a.keys() - {"seconds"}:
                assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-6), (kind, key)
        assert torch.equal(found["noise"], wanted["noise"])
        assert found["mixtures"] == wanted["mixtures"]

    one = start("dmd", micro_batch=4)
    one.load_state_dict(state_of(tmp_path / "two/dmd") | {"recipe": one.plan.recipe_hash})
    assert one.step == 4 and loop.train_step(one)["grad_norm/student"] > 0
    one = start("trajectory_regression", micro_batch=4)
    state = state_of(tmp_path / "two/trajectory_regression") | {"recipe": one.plan.recipe_hash}
    with pytest.raises(CheckpointError, match="by 2 devices, and this run has 1; resume with 2"):
        one.load_state_dict(state)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "message"),
    [
        ("not_finite_on_one", "error: rank 1: the fake-score loss is not finite"),
        ("other_weights_on_one", "error: the ranks do not agree on the weights"),
    ],
)
def test_what_goes_wrong_on_one_rank_stops_all_with_one_message(
    tmp_path: Path, job: str, message: str
) -> None:
    begun = time.monotonic()
    done = run_job(job, tmp_path / "out")
    assert done.returncode != 0 and time.monotonic() - begun < 120
    assert done.stderr.count("error: ") == 1 and message in done.stderr, done.stderr
    assert not (tmp_path / "out/checkpoints").exists()


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "recipe.yaml", write_teacher(tmp_path / "base.safetensors"))


def distill(recipe: Path, out: Path, *options: str, ranks: int = 2) -> list[str]:
    asked = ("--set", "budget.batch=4", "--set", "precision=fp32", *options)
    return torchrun("fewstep.cli", "distill", recipe, "--out", out, *asked, ranks=ranks)


def finish(command: list[str]) -> str:
    done = subprocess.run(
        command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_run_whose_rank_was_killed_resumes_to_the_same_student(
    recipe: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    told = finish(distill(recipe, whole))
    assert "2 device(s)" in told and told.count("report: ") == 1
    log, noise = killed / "metrics.jsonl", (tmp_path / "torchrun.log").open("w")
    with (
        noise,
        subprocess.Popen(
            distill(recipe, killed), env=environment(), cwd=ROOT, stdout=noise, stderr=noise
        ) as process,
    ):
        while not (log.exists() and log.read_text().count("\n") > 10):
            assert process.poll() is None, Path(noise.name).read_text()
            time.sleep(0.02)
        os.kill(second_rank(process.pid), signal.SIGKILL)
        assert process.wait(60) != 0
    assert not (killed / "student.safetensors").exists()

    told = finish(distill(recipe, killed, "--resume"))
    assert "resumed at update 8 of 24" in told or "resumed at update 16 of 24" in told
    a, b = (load_file(folder / "student.safetensors") for folder in (whole, killed))
    assert all(torch.equal(a[name], b[name]) for name in a)
    rows = [[r | {"seconds": 0} for r in rows_of(folder)] for folder in (whole, killed)]
    assert rows[0] == rows[1] and len(rows[0]) == 24
    left = sorted(path.name for path in killed.iterdir())
    assert left == sorted(path.name for path in whole.iterdir())


def second_rank(agent: int) -> int:
    """The process of local rank 1 among torchrun's."""
    for child in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
        if b"\0LOCAL_RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes():
            return int(child)
    raise AssertionError("torchrun has no second rank")
