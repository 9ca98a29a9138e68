"""Back-simulation: the student walks its own few steps and answers at one of them with gradient."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fewstep.core.types import Condition, Denoiser
from fewstep.samplers import step


def rollout(
    student: Denoiser, noise: Tensor, cond: Condition, grid: Sequence[float], k: int
) -> Tensor:
    """x_theta = G_theta(eps, c) seen at step k: D_student at t_k after k of its own steps.

    With k = K - 1 the result is the student's sample.
    """
    x = walk(student, noise, cond, grid, k)
    return student(x, torch.full((len(x),), grid[k], device=x.device), cond).float()


def walk(
    student: Denoiser, noise: Tensor, cond: Condition, grid: Sequence[float], k: int
) -> Tensor:
    """The student's state at t_k, after k of its own steps from the noise at t_0.

    These run without gradient, exactly as `samplers.sample` plays them back, so that training meets
    the states of inference (backward simulation, DMD2, arXiv 2405.14867).
    """
    assert 0 <= k < len(grid), (k, grid)
    x = noise.float()
    with torch.no_grad():
        for t, t_next in pairwise(grid[: k + 1]):
            x = step(x, student, cond, t, t_next)
    return x
