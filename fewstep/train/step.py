"""One update of a distillation: fake score, then student (arXiv 2606.03746 eq. 3-7).

The algorithm on one screen:

batch -> rollout(student, k) -> re-noise -> real = sum_m lambda[k][m](c) teacher_m, fake
      -> dmd direction -> student; the fake score follows the student in between
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn

from fewstep.core.process import add_noise, uniform_time
from fewstep.core.types import Batch, Condition
from fewstep.errors import RunError
from fewstep.guidance import classifier_free, real_denoised
from fewstep.models.cast import Cast
from fewstep.objectives.anchor import anchor_loss, anchor_velocity
from fewstep.objectives.dmd import dmd_direction, dmd_loss, fake_velocity_loss, renoise_time
from fewstep.recipe.plan import Plan
from fewstep.recipe.schema import Adam, Recipe
from fewstep.rollout import rollout
from fewstep.samplers import shifted_grid, step

Metrics = dict[str, float]


@dataclass(frozen=True)
class Score:
    """What the networks said about the student's samples at x_t, as x_0 in float32."""

    fake: Tensor
    real: Tensor
    answers: Mapping[str, Tensor] = field(default_factory=dict)


def update_fake(
    cast: Cast, batch: Batch, k: int, plan: Plan, recipe: Recipe, noise: torch.Generator
) -> Tensor:
    """Loss of the fake score network on fresh samples of the student (flow matching, eq. 2)."""
    with torch.no_grad():
        x = rollout(cast.student, draw_noise(batch, noise), batch.cond, plan.grid, k)
    t, eps = draw_renoising(batch, recipe, noise)
    predicted = cast.fake.predict_v(add_noise(x, eps, t), t, batch.cond)
    loss = fake_velocity_loss(predicted, x, eps)
    check_finite(loss, "fake-score loss")
    return loss


def update_student(
    cast: Cast, batch: Batch, k: int, plan: Plan, recipe: Recipe, noise: torch.Generator
) -> tuple[Tensor, Metrics]:
    """Loss of the student at step k, whose gradient is eq. 7, and what to log about it."""
    start = draw_noise(batch, noise)
    x = rollout(cast.student, start, batch.cond, plan.grid, k)
    t, eps = draw_renoising(batch, recipe, noise)
    with torch.no_grad():
        score = compare_scores(cast, batch, k, plan, add_noise(x, eps, t), t)
        direction = dmd_direction(x, score.fake, score.real, normaliser=recipe.objective.normaliser)
    check_finite(direction, "score difference")
    loss = dmd_loss(x, direction)
    metrics = {f"loss/student/k{k}": loss.item(), f"loss/student/{batch.task}": loss.item()}
    if k == 0 and recipe.objective.anchor.weight:
        anchored = first_step_loss(cast, batch, start, x, plan, recipe)
        metrics["loss/anchor"] = anchored.item()
        loss = loss + recipe.objective.anchor.weight * anchored
    check_finite(loss, "student loss")
    return loss, metrics | describe(batch, k, plan, score)


def compare_scores(cast: Cast, batch: Batch, k: int, plan: Plan, x_t: Tensor, t: Tensor) -> Score:
    """The fake score, and the real score of step k mixed over the teachers (eq. 5)."""
    weights = [plan.weights(batch.task, c)[k] for c in batch.categories]
    scales = {
        m: s for c in set(batch.categories) for m, s in plan.condition(batch.task, c).cfg.items()
    }
    real, answers = real_denoised(cast.teachers, weights, scales, x_t, t, batch.cond)
    return Score(cast.fake(x_t, t, batch.cond).float(), real, answers)


def first_step_loss(
    cast: Cast, batch: Batch, noise: Tensor, x: Tensor, plan: Plan, recipe: Recipe
) -> Tensor:
    """Anchor of the first step: the base teacher walks a few steps from the same noise."""
    anchor = recipe.objective.anchor
    name = recipe.student.init
    teacher, scale = cast.teachers[name], recipe.teachers[name].cfg[batch.task]

    def guided(x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return classifier_free(teacher, x_t, t, cond, scale)

    times = shifted_grid(anchor.of, recipe.teachers[name].shift)[: anchor.steps + 1]
    with torch.no_grad():
        state = noise
        for now, then in pairwise(times):
            state = step(state, guided, batch.cond, now, then)
    t = torch.full((len(batch),), plan.grid[0], device=x.device)
    return anchor_loss(x, noise, t, anchor_velocity(noise, state, times[-1]))


def apply_gradients(
    module: nn.Module, optimiser: torch.optim.Optimizer, settings: Adam, lr: float, name: str
) -> float:
    """Clip, check, step, clear. Returns the gradient norm before clipping.

    A norm that is not finite stops the run before the weights are touched.
    """
    limit = settings.clip if settings.clip is not None else float("inf")
    norm = nn.utils.clip_grad_norm_(module.parameters(), limit)
    if not torch.isfinite(norm):
        broken = next(
            n
            for n, p in module.named_parameters()
            if p.grad is not None and not p.grad.isfinite().all()
        )
        raise RunError(
            f"the gradient of {name}.{broken} is not finite; nothing was updated, the last "
            f"checkpoint is kept; lower optim.{name}.lr or raise optim.warmup, then use --resume"
        )
    for group in optimiser.param_groups:
        group["lr"] = lr
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return norm.item()


def describe(batch: Batch, k: int, plan: Plan, score: Score) -> Metrics:
    """Each teacher's mismatch to the fake score and share of the update; the gap by category."""
    metrics: Metrics = {}
    gap = (score.real - score.fake).flatten(1)
    pulls: dict[str, float] = {}
    for name, answer in score.answers.items():
        share = torch.tensor(
            [plan.weights(batch.task, c)[k].get(name, 0.0) for c in batch.categories]
        )
        seen = share > 0
        own = (answer[seen] - score.fake[seen]).flatten(1).norm(dim=1)
        scale = score.fake[seen].flatten(1).norm(dim=1).clamp_min(1e-6)
        metrics[f"mismatch/{name}/k{k}"] = (own / scale).mean().item()
        pulls[name] = (share[seen].to(own) * own).sum().item()
    for name, pull in pulls.items():
        metrics[f"share/{name}"] = pull / max(sum(pulls.values()), 1e-12)
    for category in sorted(set(batch.categories)):
        rows = [i for i, c in enumerate(batch.categories) if c == category]
        metrics[f"gap/{category}"] = gap[rows].square().mean().sqrt().item()
    return metrics


def draw_noise(batch: Batch, generator: torch.Generator) -> Tensor:
    """Starting noise, made on the CPU so that every device draws the same."""
    noise = torch.randn(len(batch), *batch.shape, generator=generator)
    return noise.to(batch.cond.text.device)


def draw_renoising(
    batch: Batch, recipe: Recipe, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """t ~ p_t for each sample, and fresh noise (eq. 3)."""
    device, r = batch.cond.text.device, recipe.objective.renoise
    t = renoise_time(
        uniform_time(len(batch), generator, device), low=r.low, high=r.high, shift=r.shift
    )
    return t, draw_noise(batch, generator)


def check_finite(x: Tensor, name: str) -> None:
    if not torch.isfinite(x).all():
        raise RunError(
            f"the {name} is not finite; nothing was updated, the last checkpoint is kept; lower "
            "the learning rates or raise objective.renoise.low, then use --resume"
        )


def warmed(lr: float, step_index: int, warmup: int) -> float:
    """The learning rate of update `step_index` (from 0) with a linear warm-up."""
    return lr * min(1.0, (step_index + 1) / warmup) if warmup else lr
