"""The loop around one update: draw, update, now and then log, sample, save. Resumes bit for bit.

Every rank runs it; what is one thing of all of them is said by `train.ranks`.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.core.types import Batch, Condition, Task
from fewstep.data.mixture import Mixture
from fewstep.data.pools import AnyPool
from fewstep.errors import CheckpointError
from fewstep.models.cast import Cast, Role, Trainable
from fewstep.recipe.plan import Plan
from fewstep.recipe.schema import Adam, Recipe, TrajectoryRegression
from fewstep.train.adaptive import Schedule
from fewstep.train.checkpoint import LAST, forget_after, load_last, save_state
from fewstep.train.ema import Ema
from fewstep.train.instruments import Metrics, Told, mean_of
from fewstep.train.methods import RealBatch, Update, WalkBatch, make_method, teacher_states
from fewstep.train.ranks import ALONE, Ranks
from fewstep.train.sharding import is_sharded, load_parts, save_parts
from fewstep.train.step import apply_gradients, warmed
from fewstep.train.walks import Walk, Walks


@dataclass(frozen=True)
class Due:
    """When periodic work happens: now and then and at the end, or at given steps alone."""

    every: int
    last: int
    steps: tuple[int, ...] | None = None

    def __call__(self, step: int) -> bool:
        if self.steps is not None:
            return step in self.steps
        return step % self.every == 0 or step == self.last


class Distillation:
    """Everything a distillation consists of: cast, optimisers, average, mixtures, generators, step.

    Two mixtures: the student's, whose quotas the plan promises exactly, and the fake score's, which
    follows the same proportions at its own pace. `control` draws what steers the program (the step
    k); `noise` makes data. All of it is the same on every rank, which takes its share of each draw:
    a state knows nothing of how many there are.
    """

    def __init__(
        self,
        cast: Cast,
        pools: Mapping[str, AnyPool],
        recipe: Recipe,
        plan: Plan,
        shape: tuple[int, ...],
        ranks: Ranks = ALONE,
    ) -> None:
        assert plan.batch.devices == ranks.world, "a plan is for as many devices as there are"
        self.cast, self.pools, self.recipe, self.plan, self.shape = cast, pools, recipe, plan, shape
        self.ranks, self.in_parts = ranks, is_sharded(cast.student)
        self.student_optimiser = make_adam(cast.student, recipe.optim.student)
        self.method = make_method(cast, recipe)
        self.fake_optimiser = make_adam(cast.fake, recipe.optim.fake)
        head = self.method.head
        self.head_optimiser = make_adam(head, recipe.optim.fake) if head else None
        self.walks = make_walks(recipe, plan)
        self.ema = Ema(cast.student, recipe.ema.decay) if recipe.ema else None
        self.mixtures = {"student": self._mixture(0), "fake": self._mixture(1)}
        self.schedule = Schedule(plan)
        self.control = torch.Generator().manual_seed(recipe.seed)
        self.noise = torch.Generator().manual_seed(recipe.seed + 1)
        self.step = 0

    def _mixture(self, offset: int) -> Mixture:
        data = self.recipe.data
        sizes: dict[Task, dict[str, int]] = {"t2i": {}, "edit": {}}
        for name, pool in self.pools.items():
            sizes[pool.task][name] = len(pool)
        return Mixture(data.trained(), data.composition, sizes, seed=2 * self.recipe.seed + offset)

    def draw(self, role: str) -> tuple[Batch, int]:
        """The next micro-batch for `role` and the step k at which the student answers."""
        if self.walks:
            batch = self._next_walk(self.walks, role)
        else:
            batch = self._gather(*self._draw(role))
        return batch, int(torch.randint(len(self.plan.grid), (), generator=self.control))

    def _draw(self, role: str) -> tuple[tuple[str, ...], list[int]]:
        """The micro-batch of all ranks together."""
        draw = self.mixtures[role].next(micro_batch_of_all(self.plan))
        return draw.pools, draw.indices.tolist()

    def _gather(self, names: tuple[str, ...], indices: list[int]) -> Batch:
        """This rank's share of them."""
        share = self.ranks.share
        about: dict[str, Any] = {"share": share}
        if self.in_parts:
            about["company"] = tuple(self.pools[name].category for name in names)
            about["anywhere"] = self.ranks.anywhere
        names, indices = share.take(names), share.take(indices)
        pools = [self.pools[name] for name in names]

        def read() -> tuple[Condition, Tensor | None]:
            return pools[0].gather(pools, indices)

        cond, target = self.ranks.each(read) if self.in_parts else read()
        device = next(self.cast.student.parameters()).device
        parts = pools[0].task, tuple(p.category for p in pools), cond.to(device), self.shape
        if target is None:
            return Batch(*parts, **about)
        return RealBatch(*parts, target.to(device), **about)

    def _next_walk(self, walks: Walks, role: str) -> Batch:
        def make() -> Walk:
            drawn = self._draw(role)
            batch = self._gather(*drawn)
            with mixed_precision(self):
                states = teacher_states(self.cast, batch, self.plan, self.recipe, self.noise)
            return Walk(*drawn, self.ranks.gather_rows(states, dim=1))

        walk = walks.next(make)
        b = self._gather(walk.pools, walk.indices)
        states = b.share.take(walk.states.transpose(0, 1)).transpose(0, 1).to(b.cond.device)
        about: dict[str, Any] = {"share": b.share, "company": b.company, "anywhere": b.anywhere}
        return WalkBatch(b.task, b.categories, b.cond, b.shape, states, **about)

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "recipe": self.plan.recipe_hash,
            "student": self.cast.student.state_dict(),
            "fake": self.cast.fake.state_dict(),
            "student_optimiser": self.student_optimiser.state_dict(),
            "fake_optimiser": self.fake_optimiser.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "mixtures": {role: mixture.state_dict() for role, mixture in self.mixtures.items()},
            "schedule": self.schedule.state_dict(),
            "head": head.state_dict() if (head := self.method.head) else None,
            "head_optimiser": self.head_optimiser.state_dict() if self.head_optimiser else None,
            "walks": self.walks.state_dict() if self.walks else None,
            "control": self.control.get_state(),
            "noise": self.noise.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["recipe"] != self.plan.recipe_hash:
            raise CheckpointError("the checkpoint was made by another recipe; resume with that one")
        self.step = state["step"]
        self.cast.student.load_state_dict(state["student"])
        self.cast.fake.load_state_dict(state["fake"])
        self.student_optimiser.load_state_dict(state["student_optimiser"])
        self.fake_optimiser.load_state_dict(state["fake_optimiser"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        for role, mixture in self.mixtures.items():
            mixture.load_state_dict(state["mixtures"][role])
        self.schedule.load_state_dict(state["schedule"])
        if self.method.head and self.head_optimiser:
            self.method.head.load_state_dict(state["head"])
            self.head_optimiser.load_state_dict(state["head_optimiser"])
        if self.walks:
            self.walks.load_state_dict(state["walks"])
            self._check_walks(self.walks)
        self.control.set_state(state["control"])
        self.noise.set_state(state["noise"])

    def _check_walks(self, walks: Walks) -> None:
        """They were made in micro-batches of all ranks, which cannot be shared out otherwise."""
        before, now = {len(walk.indices) for walk in walks.made}, micro_batch_of_all(self.plan)
        if before - {now}:
            devices = max(before) // self.plan.batch.micro_batch
            raise CheckpointError(
                f"the checkpoint's trajectories were made by {devices} devices, and this run has "
                f"{self.ranks.world}; resume with {devices}"
            )


def micro_batch_of_all(plan: Plan) -> int:
    """Samples that all devices work on at the same time."""
    return plan.batch.micro_batch * plan.batch.devices


def make_walks(recipe: Recipe, plan: Plan) -> Walks | None:
    """Where the teacher's trajectories are kept, if the objective has any."""
    if not isinstance(recipe.objective, TrajectoryRegression):
        return None
    return Walks(recipe.objective.trajectories // micro_batch_of_all(plan))


def make_adam(module: Trainable, settings: Adam) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        module.parameters(),
        lr=settings.lr,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
    )


def train_step(d: Distillation) -> Metrics:
    """One student update with its fake-score updates; returns what happened."""
    recipe, cast = d.recipe, d.cast
    plan = d.schedule.at(d.step)  # lambda as it stands; constant during the update
    rows: list[Told] = []
    fake_lr = warmed(recipe.optim.fake.lr, d.step, recipe.optim.warmup)
    for _ in range(d.method.fake_updates):
        assert d.method.fake
        rows += accumulate(d, d.method.fake, "fake", plan)
        settings = recipe.optim.fake, fake_lr
        norm = apply_gradients(cast.fake, d.fake_optimiser, *settings, "fake", d.ranks)
        rows.append({"grad_norm/fake": norm})
        if head := d.method.head:
            assert d.head_optimiser
            apply_gradients(head, d.head_optimiser, *settings, "fake.discriminator", d.ranks)
    rows += accumulate(d, d.method.student, "student", plan)
    settings = recipe.optim.student, warmed(recipe.optim.student.lr, d.step, recipe.optim.warmup)
    norm = apply_gradients(cast.student, d.student_optimiser, *settings, "student", d.ranks)
    if d.ema:
        d.ema.update(cast.student)
    d.step += 1
    metrics = mean_of(rows)  # of all ranks, so that lambda moves alike on each
    metrics |= d.schedule.observe(d.step, metrics)
    return metrics | {"grad_norm/student": norm, "lr/student": settings[1]}


def accumulate(d: Distillation, update: Update, role: str, plan: Plan) -> list[Told]:
    """Gradients of `update` over the micro-batches of one optimiser step, and what they told on all
    ranks. A value that is not finite on one of them stops all."""

    def compute() -> list[Told]:
        rows = []
        for _ in range(plan.batch.accumulation):
            batch, k = d.draw(role)
            with mixed_precision(d):
                loss, metrics = update(d.cast, batch, k, plan, d.recipe, d.noise)
            (loss / plan.batch.accumulation).backward()
            rows.append(metrics)
        return rows

    return d.ranks.collect(compute)


def mixed_precision(d: Distillation) -> torch.autocast:
    """bf16 for the networks' matrices. Without the weight cache: a cast made in a part without
    gradient would be reused where the gradient is needed, and silently lose it."""
    device = next(d.cast.student.parameters()).device.type
    return torch.autocast(
        device, torch.bfloat16, enabled=d.recipe.precision == "bf16", cache_enabled=False
    )


def distil(
    d: Distillation,
    out: Path,
    *,
    on_step: Callable[[int, Metrics], None],
    on_sample: Callable[[int], None],
    on_probe: Callable[[int], Metrics] = lambda step: {},
) -> None:
    """Run to the end of the budget; metrics.jsonl and complete states go into `out`.

    What `on_probe` returns is logged with the step that it was asked at. Only the lead draws, and
    only the lead saves; the others wait, and what they log is for no one. With a sharded cast all
    draw the same, because no rank can without the others, and each saves its parts.
    """
    log, last = d.recipe.log, d.plan.updates
    log_due, sample_due, save_due = (
        Due(n, last) for n in (log.every, log.sample_every, log.save_every)
    )
    draws = d.ranks.is_lead or d.in_parts
    probe_due = Due(log.probe.every, last, log.probe.steps) if log.probe else lambda step: False
    with (out / "metrics.jsonl").open("a") as file:
        while d.step < last:
            begun = time.perf_counter()
            metrics = train_step(d)
            metrics["seconds"] = time.perf_counter() - begun
            probed = on_probe(d.step) if probe_due(d.step) and draws else {}
            if log_due(d.step) or probed:
                metrics |= probed
                file.write(json.dumps({"step": d.step, **metrics}) + "\n")
                file.flush()
            on_step(d.step, metrics)
            if sample_due(d.step) and draws:
                on_sample(d.step)
            if save_due(d.step):
                save(d, out)
            d.ranks.wait()  # until the lead has drawn and written


def save(d: Distillation, out: Path) -> None:
    if d.in_parts:
        save_parts(d.state_dict(), out / LAST, d.ranks)
        return
    d.ranks.check_alike("the weights", lambda: checksum(d))
    if d.ranks.is_lead:
        save_state(d.state_dict(), out / LAST)


def checksum(d: Distillation) -> float:
    """Equal on ranks that have the same weights, to the bit."""
    roles = (d.cast.student, d.cast.fake)
    return sum(p.detach().double().abs().sum().item() for r in roles for p in r.parameters())


def resume(d: Distillation, out: Path) -> str:
    """Go on from the last whole state in `out` and forget metrics written after it.

    All ranks read the same file. Returns what the user should know about that state; empty when all
    is well.
    """

    parts = load_parts(d.state_dict(), out / LAST, d.ranks) if d.in_parts else None

    def load() -> list[str]:
        state, notice = parts or load_last(out / LAST)
        d.load_state_dict(state)
        return [notice]

    notices = d.ranks.collect(load)
    d.ranks.check_alike("the update of the last checkpoint", lambda: d.step)
    if d.ranks.is_lead:
        forget_after(out / "metrics.jsonl", d.step)
    return notices[0]


@contextmanager
def averaged_student(d: Distillation) -> Iterator[Role]:
    """The student with its averaged weights in place, the result of a run; for a while, because a
    large network is not there twice. Without EMA it is the student as it stands."""
    own = {name: p.detach().clone() for name, p in d.cast.student.named_parameters()}
    if d.ema:
        d.ema.copy_to(d.cast.student)
    try:
        yield d.cast.student
    finally:
        with torch.no_grad():
            for name, p in d.cast.student.named_parameters():
                p.copy_(own[name])
