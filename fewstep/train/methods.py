"""One update of every objective, and which networks it trains beside the student.

Each is written as its paper has it, from the same parts as the DMD of `train.step`. An update takes
(cast, batch, k, plan, recipe, noise) and returns a loss and what to log; only the network it is for
receives gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from fewstep.core.process import add_noise, euler_step
from fewstep.core.types import Batch, Condition, Denoiser, GuidedDenoiser
from fewstep.errors import RunError
from fewstep.guidance import real_denoised
from fewstep.models.cast import Cast
from fewstep.objectives.consistency import consistency_loss, land, phase
from fewstep.objectives.decoupled import augmentation_time, decoupled_direction
from fewstep.objectives.dmd import dmd_direction, fake_velocity_loss
from fewstep.objectives.gan import Features, Head, discriminator_loss, generator_loss
from fewstep.objectives.tdm import diffuse, fake_trajectory_loss, huber_direction, interval
from fewstep.objectives.trajectory import regression_loss
from fewstep.recipe.plan import Plan
from fewstep.recipe.schema import (
    Consistency,
    DecoupledDmd,
    Dmd,
    Dmd2,
    Recipe,
    Tdm,
    TrajectoryRegression,
)
from fewstep.rollout import rollout, walk
from fewstep.samplers import step
from fewstep.train.instruments import Told
from fewstep.train.step import (
    check_finite,
    compare_scores,
    draw_noise,
    draw_renoising,
    draw_rows,
    draw_uniform,
    matching_loss,
    student_metrics,
    teacher_mix,
    update_fake,
    update_student,
)

Update = Callable[
    [Cast, Batch, int, Plan, Recipe, torch.Generator],
    tuple[Tensor, Told],
]


@dataclass(frozen=True)
class Method:
    """What is trained how, and how often in one update."""

    student: Update
    fake: Update | None = None
    """None where no fake score takes part."""
    fake_updates: int = 0
    head: Head | None = None
    """A discriminator's, trained with the fake score."""


@dataclass(frozen=True)
class RealBatch(Batch):
    """A batch that also has the real image of each sample."""

    target: Tensor


@dataclass(frozen=True)
class WalkBatch(Batch):
    """A batch that also has the teacher's state of each sample at every time of the grid."""

    states: Tensor  # [K + 1, b, ...], from noise to x_0


def make_method(cast: Cast, recipe: Recipe) -> Method:
    """The updates of the recipe's objective, with a new discriminator where it has one."""
    objective = recipe.objective
    match objective:
        case Dmd():
            return Method(update_student, update_fake, objective.fake_updates)
        case DecoupledDmd():
            return Method(decoupled_student, update_fake, objective.fake_updates)
        case Dmd2():
            head = _new_head(cast, recipe.seed)
            return Method(
                partial(dmd2_student, head), partial(dmd2_fake, head), objective.fake_updates, head
            )
        case Tdm():
            return Method(tdm_student, tdm_fake, objective.fake_updates)
        case Consistency():
            return Method(consistency_student)
        case TrajectoryRegression():
            return Method(trajectory_student)


# --- DMD2 -----------------------------------------------------------------------------------------


def dmd2_fake(
    head: Head,
    cast: Cast,
    batch: Batch,
    k: int,
    plan: Plan,
    recipe: Recipe,
    noise: torch.Generator,
) -> tuple[Tensor, Told]:
    """Flow matching on the student's samples, and telling them from the data's real images."""
    objective = recipe.objective
    assert isinstance(objective, Dmd2) and isinstance(batch, RealBatch)
    with torch.no_grad():
        x = rollout(cast.student, draw_noise(batch, noise), batch.cond, plan.grid, k)
    t, eps = draw_renoising(batch, objective.renoise, noise)
    loss = fake_velocity_loss(cast.fake.predict_v(add_noise(x, eps, t), t, batch.cond), x, eps)
    t, eps = draw_renoising(batch, objective.gan.renoise, noise)  # the same for real and fake
    real, fake = (
        realism(head, cast, add_noise(image, eps, t), t, batch.cond) for image in (batch.target, x)
    )
    gan = discriminator_loss(real, fake)
    check_finite(loss, "fake-score loss", batch)
    check_finite(gan, "discriminator loss", batch)
    metrics = {"loss/fake": loss.item(), f"loss/fake/{batch.task}": loss.item()}
    accuracy = ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
    metrics |= {"loss/gan/head": gan.item(), "gan/accuracy": accuracy.item()}
    return loss + objective.gan.fake_weight * gan, metrics


def dmd2_student(
    head: Head,
    cast: Cast,
    batch: Batch,
    k: int,
    plan: Plan,
    recipe: Recipe,
    noise: torch.Generator,
) -> tuple[Tensor, Told]:
    """DMD, and -log D of the student's re-noised sample."""
    objective = recipe.objective
    assert isinstance(objective, Dmd2)
    x = rollout(cast.student, draw_noise(batch, noise), batch.cond, plan.grid, k)
    t, eps = draw_renoising(batch, objective.renoise, noise)
    with torch.no_grad():
        score = compare_scores(cast, batch, k, plan, add_noise(x, eps, t), t)
        direction = dmd_direction(x, score.fake, score.real, normaliser=objective.normaliser)
    loss, metrics = matching_loss(batch, k, plan, x, direction, score)
    t, eps = draw_renoising(batch, objective.gan.renoise, noise)
    # The slope at x is taken by itself, so that the fake score and the head receive no gradient.
    sample = x.detach().requires_grad_()
    gan = generator_loss(realism(head, cast, add_noise(sample, eps, t), t, batch.cond))
    (slope,) = torch.autograd.grad(gan, sample)
    check_finite(slope, "gradient of the discriminator", batch)
    metrics["loss/gan/student"] = gan.item()
    return loss + objective.gan.student_weight * (slope * (x - x.detach())).sum(), metrics


def realism(head: Head, cast: Cast, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
    """The discriminator's logit of each re-noised image."""
    assert isinstance(cast.fake, Features)
    return head(cast.fake.features(x_t, t, cond))


def _new_head(cast: Cast, seed: int) -> Head:
    if not isinstance(cast.fake, Features):
        raise RunError("objective dmd2: this model shows no features to a discriminator; use dmd")
    device = next(cast.fake.parameters()).device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Head(cast.fake.feature_width).to(device)


# --- Decoupled DMD --------------------------------------------------------------------------------


def decoupled_student(
    cast: Cast, batch: Batch, k: int, plan: Plan, recipe: Recipe, noise: torch.Generator
) -> tuple[Tensor, Told]:
    """Distribution matching with bare teachers at one time, CFG augmentation at another."""
    objective = recipe.objective
    assert isinstance(objective, DecoupledDmd)
    x = rollout(cast.student, draw_noise(batch, noise), batch.cond, plan.grid, k)
    t, eps = draw_renoising(batch, objective.renoise, noise)
    times = objective.augmentation_renoise
    t_ca = augmentation_time(
        draw_uniform(batch, noise),
        low=times.low,
        high=times.high,
        shift=times.shift,
        below=plan.grid[k] if objective.below_step else 1.0,
    )
    eps_ca = draw_noise(batch, noise)
    with torch.no_grad():
        score = compare_scores(cast, batch, k, plan, add_noise(x, eps, t), t, guided=False)
        augmentation = augment(cast, batch, k, plan, add_noise(x, eps_ca, t_ca), t_ca)
        direction = decoupled_direction(
            x,
            score.fake,
            score.real,
            augmentation,
            matching_weight=objective.matching_weight,
            augmentation_weight=objective.augmentation_weight,
            normaliser=objective.normaliser,
        )
    return matching_loss(batch, k, plan, x, direction, score)


def augment(cast: Cast, batch: Batch, k: int, plan: Plan, x_t: Tensor, t: Tensor) -> Tensor:
    """sum_m lambda_m (guided_m - conditional_m) at step k: what guidance adds, in x_0."""
    weights, scales, company = teacher_mix(batch, k, plan)
    added = torch.zeros_like(x_t, dtype=torch.float32)
    for name in sorted(name for name, scale in scales.items() if scale != 1):
        share = torch.tensor([row.get(name, 0.0) for row in weights], device=x_t.device)
        seen = share.nonzero().squeeze(1)
        if not len(seen) and any(row.get(name) for row in company):
            seen = seen.new_zeros(1)  # a sample of weight 0, for company's sake
        if len(seen):
            own = added_by_guidance(
                cast.teachers[name], x_t[seen], t[seen], batch.cond[seen], scales[name]
            )
            added[seen] += share[seen].view(-1, *[1] * (x_t.ndim - 1)) * own.float()
    return added


def added_by_guidance(
    teacher: Denoiser, x_t: Tensor, t: Tensor, cond: Condition, scale: float
) -> Tensor:
    """(s - 1) (cond - uncond), or what the teacher's own rule of guidance adds."""
    conditional = teacher(x_t, t, cond)
    if isinstance(teacher, GuidedDenoiser):
        return teacher.guided(x_t, t, cond, scale) - conditional
    return (scale - 1) * (conditional - teacher(x_t, t, cond.without_text()))


# --- TDM ------------------------------------------------------------------------------------------


def tdm_fake(
    cast: Cast, batch: Batch, k: int, plan: Plan, recipe: Recipe, noise: torch.Generator
) -> tuple[Tensor, Told]:
    """Score matching of the student's states at t_{k+1}, diffused up to t_k."""
    with torch.no_grad():
        _, x_s, s = next_state(cast, draw_noise(batch, noise), batch, k, plan)
    tau, xi = draw_between(batch, k, plan, recipe, noise)
    predicted = cast.fake.predict_v(diffuse(x_s, xi, s, tau), tau, batch.cond)
    loss = fake_trajectory_loss(predicted, x_s, xi, s, tau)
    check_finite(loss, "fake-score loss", batch)
    return loss, {"loss/fake": loss.item(), f"loss/fake/{batch.task}": loss.item()}


def tdm_student(
    cast: Cast, batch: Batch, k: int, plan: Plan, recipe: Recipe, noise: torch.Generator
) -> tuple[Tensor, Told]:
    """The student's state at t_{k+1} against the teacher's law there.

    d x_s / d x = 1 - t_{k+1} / t_k is a constant of the step and left to lambda_tau, so that the
    steps push alike; the direction is applied to x.
    """
    objective = recipe.objective
    assert isinstance(objective, Tdm)
    x, x_s, s = next_state(cast, draw_noise(batch, noise), batch, k, plan)
    tau, xi = draw_between(batch, k, plan, recipe, noise)
    with torch.no_grad():
        score = compare_scores(cast, batch, k, plan, diffuse(x_s, xi, s, tau), tau)
        if objective.normaliser == "huber":
            direction = huber_direction(score.fake, score.real)
        else:
            direction = dmd_direction(x, score.fake, score.real, normaliser=objective.normaliser)
    return matching_loss(batch, k, plan, x, direction, score)


def next_state(
    cast: Cast, start: Tensor, batch: Batch, k: int, plan: Plan
) -> tuple[Tensor, Tensor, float]:
    """The student's x_0 at step k with gradient, its Euler state at t_{k+1}, and that time."""
    now, then = (*plan.grid, 0.0)[k : k + 2]
    state = walk(cast.student, start, batch.cond, plan.grid, k)
    t = torch.full((len(batch),), now, device=start.device)
    x = cast.student(state, t, batch.cond).float()
    return x, euler_step(state, x, t, torch.full_like(t, then)), then


def draw_between(
    batch: Batch, k: int, plan: Plan, recipe: Recipe, noise: torch.Generator
) -> tuple[Tensor, Tensor]:
    """tau uniform in the interval of step k, and fresh noise."""
    assert isinstance(recipe.objective, Tdm)
    start, end = (*plan.grid, 0.0)[k : k + 2]
    low, high = interval(start, end, low=recipe.objective.low, high=recipe.objective.high)
    u = draw_uniform(batch, noise)
    return low + (high - low) * u, draw_noise(batch, noise)


# --- without a fake score -------------------------------------------------------------------------


def consistency_student(
    cast: Cast, batch: Batch, k: int, plan: Plan, recipe: Recipe, noise: torch.Generator
) -> tuple[Tensor, Told]:
    """Two neighbours on the guided teacher's path through a noised real image land alike."""
    objective = recipe.objective
    assert isinstance(objective, Consistency) and isinstance(batch, RealBatch)
    start, edge = (*plan.grid, 0.0)[k : k + 2]
    shift = recipe.teachers[recipe.student.init].shift
    times = torch.tensor(phase(start, edge, objective.substeps, shift), device=batch.cond.device)
    draw = partial(torch.randint, 0, objective.substeps, generator=noise)
    n = draw_rows(batch, lambda count: draw((count,))).to(times.device)
    t, t_next = times[n], times[n + 1]
    x_t = add_noise(batch.target, draw_noise(batch, noise), t)
    landing = land(x_t, cast.student(x_t, t, batch.cond).float(), t, edge)
    with torch.no_grad():
        x_0 = guided_mix(cast, batch, k, plan, x_t, t, batch.cond)
        x_next = euler_step(x_t, x_0, t, t_next)
        target = land(x_next, cast.student(x_next, t_next, batch.cond).float(), t_next, edge)
    loss = consistency_loss(landing, target)
    check_finite(loss, "student loss", batch)
    return loss, student_metrics(loss, batch, k)


def trajectory_student(
    cast: Cast, batch: Batch, k: int, plan: Plan, recipe: Recipe, noise: torch.Generator
) -> tuple[Tensor, Told]:
    """From the teacher's state at t_k, one step must land on its state at t_{k+1}."""
    assert isinstance(batch, WalkBatch)
    start, end = (*plan.grid, 0.0)[k : k + 2]
    t = torch.full((len(batch),), start, device=batch.states.device)
    state, target = batch.states[k], batch.states[k + 1]
    loss = regression_loss(cast.student(state, t, batch.cond).float(), state, t, target, end)
    check_finite(loss, "student loss", batch)
    return loss, student_metrics(loss, batch, k)


@torch.no_grad()
def teacher_states(
    cast: Cast, batch: Batch, plan: Plan, recipe: Recipe, noise: torch.Generator
) -> Tensor:
    """The guided teachers' walk from fresh noise, seen at t_0 .. t_K [K + 1, b, ...].

    Within step k it follows the mix of that step (arXiv 2606.03746 eq. 5).
    """
    objective = recipe.objective
    assert isinstance(objective, TrajectoryRegression)
    shift = recipe.teachers[recipe.student.init].shift
    states = [draw_noise(batch, noise)]
    for k, (start, end) in enumerate(pairwise((*plan.grid, 0.0))):
        state, mix = states[-1], partial(guided_mix, cast, batch, k, plan)
        for t, t_next in pairwise(phase(start, end, objective.substeps, shift)):
            state = step(state, mix, batch.cond, t, t_next)
        states.append(state)
    walked = torch.stack(states)
    check_finite(walked, "teacher's trajectory", batch)
    return walked


def guided_mix(
    cast: Cast, batch: Batch, k: int, plan: Plan, x_t: Tensor, t: Tensor, cond: Condition
) -> Tensor:
    """The real x_0 of step k: guided teachers, mixed by lambda."""
    weights, scales, company = teacher_mix(batch, k, plan)
    return real_denoised(cast.teachers, weights, scales, x_t, t, cond, company)[0]
