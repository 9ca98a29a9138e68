"""One update of the paper's DMD: fake score, then student (arXiv 2606.03746 eq. 3-7).

The algorithm on one screen:

batch -> rollout(student, k) -> re-noise -> real = sum_m lambda[k][m](c) teacher_m, fake
      -> dmd direction -> student; the fake score follows the student in between

The other objectives are in `train.methods`, in the same words; what all share is below.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.core.process import add_noise, uniform_time
from fewstep.core.types import Batch, Condition
from fewstep.errors import RunError
from fewstep.guidance import classifier_free, real_denoised
from fewstep.models.cast import Cast, Trainable
from fewstep.objectives.anchor import anchor_loss, anchor_velocity
from fewstep.objectives.dmd import dmd_direction, dmd_loss, fake_velocity_loss, renoise_time
from fewstep.recipe.plan import Plan
from fewstep.recipe.schema import Adam, DecoupledDmd, Dmd, Recipe, Renoise
from fewstep.rollout import rollout
from fewstep.samplers import shifted_grid, step
from fewstep.train.instruments import Told, describe
from fewstep.train.ranks import ALONE, Agreed, Ranks
from fewstep.train.sharding import clip, whole


@dataclass(frozen=True)
class Score:
    """What the networks said about the student's samples at (x_t, t), as x_0 in float32."""

    x_t: Tensor
    t: Tensor
    fake: Tensor
    real: Tensor
    answers: Mapping[str, Tensor] = field(default_factory=dict)


def update_fake(
    cast: Cast, batch: Batch, k: int, plan: Plan, recipe: Recipe, noise: torch.Generator
) -> tuple[Tensor, Told]:
    """Loss of the fake score network on fresh samples of the student (flow matching, eq. 2)."""
    assert isinstance(recipe.objective, Dmd | DecoupledDmd)
    with torch.no_grad():
        x = rollout(cast.student, draw_noise(batch, noise), batch.cond, plan.grid, k)
    t, eps = draw_renoising(batch, recipe.objective.renoise, noise)
    predicted = cast.fake.predict_v(add_noise(x, eps, t), t, batch.cond)
    loss = fake_velocity_loss(predicted, x, eps)
    check_finite(loss, "fake-score loss", batch)
    return loss, {"loss/fake": loss.item(), f"loss/fake/{batch.task}": loss.item()}


def update_student(
    cast: Cast, batch: Batch, k: int, plan: Plan, recipe: Recipe, noise: torch.Generator
) -> tuple[Tensor, Told]:
    """Loss of the student at step k, whose gradient is eq. 7, and what to log about it."""
    objective = recipe.objective
    assert isinstance(objective, Dmd)
    start = draw_noise(batch, noise)
    x = rollout(cast.student, start, batch.cond, plan.grid, k)
    t, eps = draw_renoising(batch, objective.renoise, noise)
    with torch.no_grad():
        score = compare_scores(cast, batch, k, plan, add_noise(x, eps, t), t)
        direction = dmd_direction(x, score.fake, score.real, normaliser=objective.normaliser)
    loss, metrics = matching_loss(batch, k, plan, x, direction, score)
    if k == 0 and objective.anchor.weight:
        anchored = first_step_loss(cast, batch, start, x, plan, recipe)
        metrics["loss/anchor"] = anchored.item()
        loss = loss + objective.anchor.weight * anchored
        check_finite(loss, "student loss", batch)
    return loss, metrics


def matching_loss(
    batch: Batch, k: int, plan: Plan, x: Tensor, direction: Tensor, score: Score
) -> tuple[Tensor, Told]:
    """The loss whose gradient at x is `direction` (over numel), checked, and what to log."""
    check_finite(direction, "score difference", batch)
    loss = dmd_loss(x, direction)
    check_finite(loss, "student loss", batch)
    seen = {"fake": score.fake, "real": score.real, "answers": score.answers}
    told = describe(batch, k, plan, x_t=score.x_t, t=score.t, **seen)
    return loss, student_metrics(loss, batch, k) | told


def student_metrics(loss: Tensor, batch: Batch, k: int) -> Told:
    return {f"loss/student/k{k}": loss.item(), f"loss/student/{batch.task}": loss.item()}


def compare_scores(
    cast: Cast, batch: Batch, k: int, plan: Plan, x_t: Tensor, t: Tensor, *, guided: bool = True
) -> Score:
    """The fake score, and the real score of step k mixed over the teachers (eq. 5).

    `plan` has lambda as it stands at this update (`Distillation.schedule.at`). Not `guided`: the
    teachers' bare conditional answers, of scale 1.
    """
    weights, scales, company = teacher_mix(batch, k, plan)
    scales = scales if guided else dict.fromkeys(scales, 1.0)
    real, answers = real_denoised(cast.teachers, weights, scales, x_t, t, batch.cond, company)
    for name, answer in unweighted(cast, batch, k, plan, scales, x_t, t).items():
        answers[name] = torch.where(answer.isnan(), answers.get(name, answer), answer)
    return Score(x_t, t, cast.fake(x_t, t, batch.cond).float(), real, answers)


class Mix(NamedTuple):
    """How the teachers are mixed at one step."""

    weights: list[dict[str, float]]
    """lambda for each sample."""
    scales: dict[str, float]
    """Each teacher's CFG scale."""
    company: list[dict[str, float]]
    """lambda for each sample of the batch's company."""


def teacher_mix(batch: Batch, k: int, plan: Plan) -> Mix:
    own, company = (
        [plan.condition(batch.task, c) for c in categories]
        for categories in (batch.categories, batch.company)
    )
    scales = {name: scale for c in (*own, *company) for name, scale in c.cfg.items()}
    return Mix([c.weights[k] for c in own], scales, [c.weights[k] for c in company])


def unweighted(
    cast: Cast,
    batch: Batch,
    k: int,
    plan: Plan,
    scales: Mapping[str, float],
    x_t: Tensor,
    t: Tensor,
) -> dict[str, Tensor]:
    """Answers of teachers that an adaptive rule wants to know though their lambda is 0."""

    def row(category: str) -> dict[str, float]:
        entry = plan.condition(batch.task, category)
        heard = entry.heard[k] if entry.heard else ()
        return {name: 1.0 for name in heard if name not in entry.weights[k]}

    rows, company = ([row(c) for c in some] for some in (batch.categories, batch.company))
    return real_denoised(cast.teachers, rows, scales, x_t, t, batch.cond, company)[1]


def first_step_loss(
    cast: Cast, batch: Batch, noise: Tensor, x: Tensor, plan: Plan, recipe: Recipe
) -> Tensor:
    """Anchor of the first step: the base teacher walks a few steps from the same noise."""
    assert isinstance(recipe.objective, Dmd)
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
    module: Trainable,
    optimiser: torch.optim.Optimizer,
    settings: Adam,
    lr: float,
    name: str,
    ranks: Ranks = ALONE,
) -> float:
    """Average over the ranks, clip, check, step, clear. Returns the norm before clipping.

    A norm that is not finite stops the run before the weights are touched, on all ranks, which have
    the same one. `name` is the network's and begins with the part of `optim` that its settings come
    from.
    """
    ranks.average_gradients(module)
    limit = settings.clip if settings.clip is not None else float("inf")
    norm = clip(module, limit)
    if not torch.isfinite(norm):
        broken = next(
            n
            for n, p in module.named_parameters()
            if p.grad is not None and not whole(p.grad).isfinite().all()
        )
        settings_of = name.partition(".")[0]
        raise Agreed(
            f"the gradient of {name}.{broken} is not finite; nothing was updated, the last "
            f"checkpoint is kept; lower optim.{settings_of}.lr or raise optim.warmup, then use "
            "--resume"
        )
    for group in optimiser.param_groups:
        group["lr"] = lr
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return norm.item()


def draw_noise(batch: Batch, generator: torch.Generator) -> Tensor:
    """Starting noise, made on the CPU so that every device draws the same."""
    noise = draw_rows(batch, lambda n: torch.randn(n, *batch.shape, generator=generator))
    return noise.to(batch.cond.device)


def draw_rows(batch: Batch, draw: Callable[[int], Tensor]) -> Tensor:
    """This device's rows of what is drawn for all: several devices see what one with as large a
    micro-batch would see, and their generators stay alike."""
    return batch.share.take(draw(len(batch) * batch.share.of))


def draw_uniform(batch: Batch, generator: torch.Generator) -> Tensor:
    """Uniform in [0, 1) for each sample."""
    device = batch.cond.device
    return draw_rows(batch, lambda n: uniform_time(n, generator, device))


def draw_renoising(
    batch: Batch, times: Renoise, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """t ~ p_t for each sample, and fresh noise (eq. 3)."""
    u = draw_uniform(batch, generator)
    t = renoise_time(u, low=times.low, high=times.high, shift=times.shift)
    return t, draw_noise(batch, generator)


def check_finite(x: Tensor, name: str, batch: Batch) -> None:
    """Raises where a value is not finite; where devices wait for each other, on all of them."""
    if batch.anywhere(not torch.isfinite(x).all()):
        raise RunError(
            f"the {name} is not finite; nothing was updated, the last checkpoint is kept; lower "
            "the learning rates or raise the objective's smallest time, then use --resume"
        )


def warmed(lr: float, step_index: int, warmup: int) -> float:
    """The learning rate of update `step_index` (from 0) with a linear warm-up."""
    return lr * min(1.0, (step_index + 1) / warmup) if warmup else lr
