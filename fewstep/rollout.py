"""Back-simulation: the student walks its own few-step trajectory and answers at one step with gradient."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.core.types import Condition, Denoiser
from fewstep.samplers import step


def rollout(
    student: Denoiser, noise: Tensor, cond: Condition, grid: Sequence[float], k: int
) -> Tensor:
    """x_theta = G_theta(eps, c) seen at step k: D_student at t_k after k steps of the student's own.

    The steps before k run without gradient, exactly as `samplers.sample` plays them back, so that
    training meets the states of inference (backward simulation, DMD2, arXiv 2405.14867).
    With k = K - 1 the result is the student's sample.
    """
    assert 0 <= k < len(grid), (k, grid)
    x = noise.float()
    with torch.no_grad():
        for t, t_next in zip(grid[:k], grid[1 : k + 1], strict=True):
            x = step(x, student, cond, t, t_next)
    return student(x, torch.full((len(x),), grid[k], device=x.device), cond).float()
