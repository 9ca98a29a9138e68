"""The loop around one update: draw, update, now and then log, sample, save. Resumes bit for bit."""

import json
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from fewstep.core.types import Batch, Task
from fewstep.data.mixture import Mixture
from fewstep.data.pools import Pool, gather
from fewstep.errors import CheckpointError
from fewstep.models.cast import Cast
from fewstep.models.lab import MMDiT
from fewstep.recipe.plan import Plan
from fewstep.recipe.schema import Adam, Recipe
from fewstep.train.checkpoint import LAST, forget_after, load_last, save_state
from fewstep.train.ema import Ema
from fewstep.train.step import Metrics, apply_gradients, update_fake, update_student, warmed


@dataclass(frozen=True)
class Due:
    """When periodic work happens."""

    every: int
    last: int

    def __call__(self, step: int) -> bool:
        return step % self.every == 0 or step == self.last


class Distillation:
    """Everything a distillation consists of: cast, optimisers, average, mixtures, generators, step.

    Two mixtures: the student's, whose quotas the plan promises exactly, and the fake score's, which
    follows the same proportions at its own pace. `control` draws what steers the program (the step
    k) and is the same on every rank; `noise` makes data.
    """

    def __init__(
        self,
        cast: Cast,
        pools: Mapping[str, Pool],
        recipe: Recipe,
        plan: Plan,
        shape: tuple[int, ...],
    ) -> None:
        self.cast, self.pools, self.recipe, self.plan, self.shape = cast, pools, recipe, plan, shape
        self.student_optimiser = make_adam(cast.student, recipe.optim.student)
        self.fake_optimiser = make_adam(cast.fake, recipe.optim.fake)
        self.ema = Ema(cast.student, recipe.ema.decay) if recipe.ema else None
        self.mixtures = {"student": self._mixture(0), "fake": self._mixture(1)}
        self.control = torch.Generator().manual_seed(recipe.seed)
        self.noise = torch.Generator().manual_seed(recipe.seed + 1)
        self.step = 0

    def _mixture(self, offset: int) -> Mixture:
        data = self.recipe.data
        sizes: dict[Task, dict[str, int]] = {"t2i": {}, "edit": {}}
        for name, pool in self.pools.items():
            sizes[pool.task][name] = len(pool)
        tasks: dict[Task, float] = {task: w for task, w in data.mixture.items() if w > 0}
        return Mixture(tasks, data.composition, sizes, seed=2 * self.recipe.seed + offset)

    def draw(self, role: str) -> tuple[Batch, int]:
        """The next micro-batch for `role` and the step k at which the student answers."""
        draw = self.mixtures[role].next(self.plan.batch.micro_batch)
        pools = [self.pools[name] for name in draw.pools]
        cond, _ = gather(pools, draw.indices.tolist())
        k = int(torch.randint(len(self.plan.grid), (), generator=self.control))
        device = next(self.cast.student.parameters()).device
        categories = tuple(p.category for p in pools)
        return Batch(pools[0].task, categories, cond.to(device), self.shape), k

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
        self.control.set_state(state["control"])
        self.noise.set_state(state["noise"])


def make_adam(module: nn.Module, settings: Adam) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        module.parameters(),
        lr=settings.lr,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
    )


def train_step(d: Distillation) -> Metrics:
    """One student update with its fake-score updates; returns what happened."""
    recipe, plan, cast = d.recipe, d.plan, d.cast
    rows: list[Metrics] = []
    parts = plan.batch.accumulation
    fake_lr = warmed(recipe.optim.fake.lr, d.step, recipe.optim.warmup)
    for _ in range(recipe.objective.fake_updates):
        for _ in range(parts):
            batch, k = d.draw("fake")
            with mixed_precision(d):
                loss = update_fake(cast, batch, k, plan, recipe, d.noise)
            (loss / parts).backward()
            rows.append({"loss/fake": loss.item(), f"loss/fake/{batch.task}": loss.item()})
        norm = apply_gradients(cast.fake, d.fake_optimiser, recipe.optim.fake, fake_lr, "fake")
        rows.append({"grad_norm/fake": norm})
    for _ in range(parts):
        batch, k = d.draw("student")
        with mixed_precision(d):
            loss, metrics = update_student(cast, batch, k, plan, recipe, d.noise)
        (loss / parts).backward()
        rows.append(metrics)
    lr = warmed(recipe.optim.student.lr, d.step, recipe.optim.warmup)
    norm = apply_gradients(cast.student, d.student_optimiser, recipe.optim.student, lr, "student")
    if d.ema:
        d.ema.update(cast.student)
    d.step += 1
    return mean_of(rows) | {"grad_norm/student": norm, "lr/student": lr}


def mixed_precision(d: Distillation) -> torch.autocast:
    """bf16 for the networks' matrices. Without the weight cache: a cast made in a part without
    gradient would be reused where the gradient is needed, and silently lose it."""
    device = next(d.cast.student.parameters()).device.type
    return torch.autocast(
        device, torch.bfloat16, enabled=d.recipe.precision == "bf16", cache_enabled=False
    )


def mean_of(rows: list[Metrics]) -> Metrics:
    """The mean of each key over the rows that have it."""
    keys = sorted({key for row in rows for key in row})
    return {key: fmean(row[key] for row in rows if key in row) for key in keys}


def distil(
    d: Distillation,
    out: Path,
    *,
    on_step: Callable[[int, Metrics], None],
    on_sample: Callable[[int], None],
) -> None:
    """Run to the end of the budget; metrics.jsonl and complete states go into `out`."""
    log, last = d.recipe.log, d.plan.updates
    log_due, sample_due, save_due = (
        Due(n, last) for n in (log.every, log.sample_every, log.save_every)
    )
    with (out / "metrics.jsonl").open("a") as file:
        while d.step < last:
            begun = time.perf_counter()
            metrics = train_step(d)
            if log_due(d.step):
                metrics["seconds"] = time.perf_counter() - begun
                file.write(json.dumps({"step": d.step, **metrics}) + "\n")
                file.flush()
            on_step(d.step, metrics)
            if sample_due(d.step):
                on_sample(d.step)
            if save_due(d.step):
                save_state(d.state_dict(), out / LAST)


def resume(d: Distillation, out: Path) -> str:
    """Go on from the last whole state in `out` and forget metrics written after it.

    Returns what the user should know about that state; empty when all is well.
    """
    state, notice = load_last(out / LAST)
    d.load_state_dict(state)
    forget_after(out / "metrics.jsonl", d.step)
    return notice


def result_of(d: Distillation) -> MMDiT:
    """A copy of the averaged student, or without EMA of the student itself, for sampling."""
    student = deepcopy(d.cast.student)
    if d.ema:
        d.ema.copy_to(student)
    return student.eval()
