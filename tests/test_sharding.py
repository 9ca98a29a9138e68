"""What is done with a cast in parts, in forks of this process: norms, checks, states on disk.

Networks that are really sharded are in `tests/families/test_sharding.py`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from fewstep.errors import CheckpointError
from fewstep.recipe.schema import Adam
from fewstep.train.checkpoint import LAST, has_state, load_last, save_state, sharded
from fewstep.train.ranks import ALONE, Agreed, Ranks
from fewstep.train.sharding import clip, join, load_parts, save_parts, split, whole
from fewstep.train.step import apply_gradients

from .ranked import forked, start

SHAPES = {"a": (5, 3), "b": (2,), "c": (4, 2)}


def random(seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: scale * torch.randn(s, generator=generator) for n, s in SHAPES.items()}


def spread(tensors: dict[str, Tensor], ranks: Ranks) -> dict[str, DTensor]:
    """Each tensor over the ranks, as `fully_shard` has it."""
    mesh = init_device_mesh("cpu", (ranks.world,))
    return {n: distribute_tensor(t, mesh, [Shard(0)]) for n, t in tensors.items()}


@dataclass
class Parts:
    """A `Trainable` of parameters in parts."""

    own: dict[str, nn.Parameter]

    def parameters(self) -> Any:
        return iter(self.own.values())

    def named_parameters(self) -> Any:
        return iter(self.own.items())


def module(ranks: Ranks, gradients: dict[str, Tensor]) -> Parts:
    """Parameters 0 with these gradients; `b` has none."""
    zeros = spread({n: torch.zeros(s) for n, s in SHAPES.items()}, ranks)
    own = {n: nn.Parameter(value) for n, value in zeros.items()}
    for name, value in spread(gradients, ranks).items():
        own[name].grad = value if name != "b" else None
    return Parts(own)


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0.5, 100.0])
def test_gradients_in_parts_are_clipped_by_the_norm_of_all_of_them(limit: float) -> None:
    gradients = random(0)
    norm = sum(gradients[n].double().square().sum() for n in ("a", "c")).sqrt()  # type: ignore[union-attr]
    factor = min(1.0, limit / norm.item())

    def job(ranks: Ranks) -> tuple[float, dict[str, list], bool]:
        made = module(ranks, gradients)
        found = clip(made, limit).item()
        kept = {n: whole(p.grad).tolist() for n, p in made.own.items() if p.grad is not None}
        return found, kept, made.own["b"].grad is None

    for found, kept, none in forked(job):
        assert found == pytest.approx(norm.item(), rel=1e-6) and none
        for name, value in kept.items():
            wanted = factor * gradients[name]
            torch.testing.assert_close(torch.tensor(value), wanted, rtol=1e-5, atol=1e-7)


def test_a_part_that_is_not_finite_stops_all_ranks_before_the_weights_move() -> None:
    gradients = random(0)
    gradients["c"][3, 1] = torch.inf  # in the last rank's part alone

    def job(ranks: Ranks) -> tuple[str, float]:
        made = module(ranks, gradients)
        optimiser = torch.optim.AdamW(made.parameters(), lr=1.0)
        try:
            apply_gradients(made, optimiser, Adam(), 1.0, "student", ranks)
        except Agreed as error:
            return str(error), max(whole(p.detach()).abs().max().item() for p in made.own.values())
        return "", -1.0

    for told, moved in forked(job):
        assert "gradient of student.c is not finite" in told and moved == 0


def test_a_step_in_parts_is_that_of_the_whole() -> None:
    """Average, clip, AdamW: the mean over ranks is in the gradients already and not taken again."""
    gradients = random(0)
    own = {n: nn.Parameter(torch.zeros(s)) for n, s in SHAPES.items()}
    for name in ("a", "c"):
        own[name].grad = gradients[name].clone()
    settings = Adam(lr=0.1, clip=0.5)
    optimiser = torch.optim.AdamW(own.values(), lr=0.1, weight_decay=0.0)
    norm = apply_gradients(Parts(own), optimiser, settings, 0.1, "student")

    def job(ranks: Ranks) -> tuple[float, dict[str, list]]:
        made = module(ranks, gradients)
        optimiser = torch.optim.AdamW(made.parameters(), lr=0.1, weight_decay=0.0)
        found = apply_gradients(made, optimiser, settings, 0.1, "student", ranks)
        return found, {n: whole(p.detach()).tolist() for n, p in made.own.items()}

    for found, weights in forked(job):
        assert found == pytest.approx(norm, rel=1e-6)
        for name, value in weights.items():
            torch.testing.assert_close(torch.tensor(value), own[name].detach())


# --- batches --------------------------------------------------------------------------------------


def test_a_batch_knows_the_categories_and_troubles_of_all_ranks() -> None:
    """A cast in parts is only said to be one here: drawing does not touch it."""

    def job(ranks: Ranks) -> list[tuple[Any, ...]]:
        d = start("dmd", ranks)
        d.in_parts = True
        drawn = [d.draw("student")[0] for _ in range(4)]
        return [
            (b.categories, b.company, b.anywhere(ranks.rank == 1), b.anywhere(False)) for b in drawn
        ]

    first, second = forked(job)
    for (a, company, found, nowhere), (b, other, *_) in zip(first, second, strict=True):
        assert company == other == a + b and found and not nowhere
    assert {company for _, company, *_ in first} > {("object",) * 8}


# --- states ---------------------------------------------------------------------------------------


def state(tensors: dict[str, Any], step: int) -> dict[str, Any]:
    return {
        "step": step,
        "student": {n: tensors[n] for n in ("a", "b")},
        "optimiser": {"state": {0: {"exp_avg": tensors["c"], "step": torch.tensor(2.0)}}},
        "noise": torch.arange(3),
    }


def test_split_and_join_are_inverse() -> None:
    def job(ranks: Ranks) -> tuple[bool, list, list]:
        parts = spread(random(0), ranks)
        rest, found = split(state(parts, 3))
        again = join(rest, found)
        same = again["student"]["b"] is parts["b"]
        return same, sorted(found), [*again["optimiser"]["state"][0]]

    places = [("optimiser", "state", 0, "exp_avg"), ("student", "a"), ("student", "b")]
    assert forked(job)[1] == (True, sorted(places), ["step", "exp_avg"])


def saved(path: Path, *seeds: int) -> None:
    """One state after the other, by two ranks."""

    def job(ranks: Ranks) -> None:
        for seed in seeds:
            save_parts(state(spread(random(seed), ranks), seed), path, ranks)

    forked(job)


def loaded(path: Path, world: int) -> list[tuple[dict[str, list], Any, str]]:
    """What each of `world` ranks has afterwards, and what it is told."""

    def job(ranks: Ranks) -> tuple[dict[str, list], Any, str]:
        fresh = state(spread({n: torch.zeros(s) for n, s in SHAPES.items()}, ranks), 0)
        del fresh["optimiser"]["state"][0]  # as before the first update
        try:
            found, notice = load_parts(fresh, path, ranks)
        except (Agreed, CheckpointError) as error:
            return {}, None, str(error)
        assert found["student"]["a"] is not None
        held = found["student"] | {"c": found["optimiser"]["state"][0]["exp_avg"]}
        assert all(isinstance(value, DTensor) for value in held.values())
        return {n: whole(t).tolist() for n, t in held.items()}, found["step"], notice

    return forked(job, world)


def is_state(found: dict[str, list], seed: int) -> bool:
    return found == {n: t.tolist() for n, t in random(seed).items()}


@pytest.mark.parametrize("world", [2, 3])
def test_a_state_comes_back_on_any_number_of_ranks(tmp_path: Path, world: int) -> None:
    saved(tmp_path / LAST, 1, 2)
    for found, step, notice in loaded(tmp_path / LAST, world):
        assert is_state(found, 2) and step == 2 and not notice
    assert has_state(tmp_path / LAST)
    left = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert left == {"last", "previous"}


@pytest.mark.parametrize("damage", ["truncated", "missing", "garbled", "no list", "no table"])
def test_a_damaged_state_gives_way_to_the_one_before(tmp_path: Path, damage: str) -> None:
    saved(tmp_path / LAST, 1, 2)
    names = {"no list": "rest.pt", "no table": ".metadata"}
    file = sharded(tmp_path / LAST) / names.get(damage, "__1_0.distcp")
    content = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(content[:-1])
    elif damage in ("garbled", "no table"):
        file.write_bytes(bytes(len(content)))
    else:
        file.unlink()
    for found, step, notice in loaded(tmp_path / LAST, 2):
        assert is_state(found, 1) and step == 1
        assert "going on from the one before it" in notice


def test_without_a_sound_state_a_run_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / LAST, 1)
    (sharded(tmp_path / LAST) / "rest.pt").unlink()
    for _, step, told in loaded(tmp_path / LAST, 2):
        assert step is None and "nothing to go on from" in told


def test_a_full_disk_leaves_the_last_state(tmp_path: Path, monkeypatch: Any) -> None:
    saved(tmp_path / LAST, 1)

    def job(ranks: Ranks) -> tuple[str, int]:
        from torch.distributed.checkpoint import filesystem

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        if ranks.rank == 1:
            monkeypatch.setattr(filesystem, "_write_item", full)
        try:
            save_parts(state(spread(random(2), ranks), 2), tmp_path / LAST, ranks)
        except Agreed as error:
            return str(error), error.exit_code
        return "", 0

    for told, code in forked(job):
        assert "rank 1 could not write its part (No space left on device)" in told and code == 6
    assert all(is_state(found, 1) for found, _, _ in loaded(tmp_path / LAST, 2))


def test_whole_and_split_states_are_not_taken_for_each_other(tmp_path: Path) -> None:
    save_state({"step": 1}, tmp_path / "whole" / LAST)
    with pytest.raises(
        CheckpointError, match=r"without model\.cast\.shard; resume with shard: false"
    ):
        load_parts({}, tmp_path / "whole" / LAST, ALONE)
    saved(tmp_path / "parts" / LAST, 1)
    with pytest.raises(CheckpointError, match=r"in parts by several devices; resume with torchrun"):
        load_last(tmp_path / "parts" / LAST)
