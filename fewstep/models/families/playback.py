"""Sampling exactly as diffusers plays a model: its time grid, its guidance, its rounding.

`fewstep.samplers` is what training uses, with a float32 state; here the state is rounded to the
network's precision after each step, as the pipelines do.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fewstep.core.process import x0_from_v
from fewstep.errors import DataError, RecipeError
from fewstep.models.families.contract import Family, FamilyCondition, Grid


def check_scheduler(scheduler: Any) -> None:
    """Other schedulers mean another process, another solver, or noise from outside."""
    kind = type(scheduler).__name__
    if kind != "FlowMatchEulerDiscreteScheduler":
        raise DataError(
            f"the pipeline's scheduler is {kind}; supported is FlowMatchEulerDiscreteScheduler"
        )
    if scheduler.config.stochastic_sampling:
        raise DataError(
            "the pipeline's scheduler has stochastic_sampling=true, whose noise comes from the "
            "global generator; set it to false in scheduler/scheduler_config.json"
        )


def scheduler_grid(
    scheduler: Any,
    sigmas: Sequence[float] | None,
    *,
    mu: float | None = None,
    n: int | None = None,
) -> Grid:
    """What a copy of the scheduler makes of `sigmas`, or of its own n steps (shift, float32)."""
    fresh = type(scheduler).from_config(scheduler.config)
    with np.errstate(invalid="ignore", divide="ignore"):
        fresh.set_timesteps(n, sigmas=None if sigmas is None else list(sigmas), mu=mu)
    grid = tuple(fresh.sigmas.tolist())
    if not all(map(math.isfinite, grid)):
        raise RecipeError(
            f"the scheduler's shift_terminal={fresh.config.shift_terminal} cannot place "
            f"{len(grid) - 1} step(s)",
            hint="use at least 2 steps, or a scheduler with shift_terminal null",
        )
    return grid


def check_steps(n: int, custom: Sequence[float] | None) -> None:
    if n < 1:
        raise RecipeError(f"{n} steps were asked for", hint="use at least 1")
    if custom is not None and len(custom) != n:
        raise RecipeError(f"{n} steps were asked for, but {len(custom)} sigmas are given")


def evenly_spaced(n: int, custom: Sequence[float] | None = None) -> Sequence[float]:
    """1, ..., 1/n before the shift, unless the user gives the values."""
    check_steps(n, custom)
    return np.linspace(1.0, 1 / n, n).tolist() if custom is None else custom


def dynamic_mu(scheduler: Any, tokens: int) -> float:
    """log of the shift for an image of this many tokens (`calculate_shift` of the pipelines)."""
    config = scheduler.config
    slope = (config.max_shift - config.base_shift) / (
        config.max_image_seq_len - config.base_image_seq_len
    )
    return tokens * slope + (config.base_shift - slope * config.base_image_seq_len)


def rounded_time(t: Float[Tensor, " b"], dtype: torch.dtype) -> Float[Tensor, " b"]:
    """t as pipelines hand it over: 1000 t is rounded, so that bf16 turns 0.75 into 0.7539."""
    return (t * 1000).to(dtype) / 1000


def denoised(
    family: Family, x_t: Tensor, t: Float[Tensor, " b"], cond: FamilyCondition, model: Any
) -> Tensor:
    """D = x_t - t v in float32, whatever the precision of the network."""
    v = family.velocity(x_t, t, cond, model)
    return x0_from_v(x_t.float(), v.float(), t)


def guided_velocity(
    family: Family,
    x_t: Tensor,
    t: Float[Tensor, " b"],
    cond: FamilyCondition,
    scale: float,
    model: Any = None,
) -> Tensor:
    """v with the family's own rule of guidance; scale 1 costs one evaluation."""
    v = family.velocity(x_t, t, cond, model)
    if scale == 1.0:
        return v
    return family.cfg(v, family.velocity(x_t, t, cond.without_text(), model), scale)


@torch.no_grad()
def play(
    family: Family,
    noise: Tensor,
    cond: FamilyCondition,
    grid: Grid,
    *,
    scale: float = 1.0,
    model: Any = None,
) -> Tensor:
    """The pipeline's latents: Euler steps in float32, each rounded to the network's precision."""
    x, times = noise, torch.tensor(grid, dtype=torch.float32, device=noise.device)
    for t, t_next in pairwise(times):
        v = guided_velocity(family, x, t.expand(len(x)), cond, scale, model)
        x = (x.float() + (t_next - t) * v).to(v.dtype)
    return x
