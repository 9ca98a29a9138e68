"""Sampling: the time grid that training and playback share, and the Euler sampler of both.

A student is played with its K grid times and no guidance, a teacher with many steps and guidance.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fewstep.core.process import euler_step
from fewstep.core.types import Condition

Guided = Callable[[Tensor, Tensor, Condition], Tensor]
"""(x_t, t, cond) -> x_0, with whatever guidance applies."""


def shifted_grid(steps: int, shift: float) -> tuple[float, ...]:
    """Times t_0 = 1 > ... > t_{K-1} > 0 of a K-step sampler with static shift; a last 0 is implied.

    Shift 3 with 4 steps gives 1, 0.9, 0.75, 0.5: the grid of published 4-step Qwen-Image students.
    """
    uniform = [1 - i / steps for i in range(steps)]
    return tuple(shift * t / (1 + (shift - 1) * t) for t in uniform)


def sample(denoise: Guided, noise: Tensor, cond: Condition, grid: Sequence[float]) -> Tensor:
    """Integrate from t = grid[0] to 0 with Euler steps, starting at `noise` [b, ...]; float32.

    Evaluation k happens at grid[k]; the last step returns the network's x_0 itself.
    """
    x = noise.float()
    for t, t_next in zip(grid, (*grid[1:], 0.0), strict=True):
        x = step(x, denoise, cond, t, t_next)
    return x


def step(x: Tensor, denoise: Guided, cond: Condition, t: float, t_next: float) -> Tensor:
    """One evaluation at t and the Euler step to t_next."""
    now = torch.full((len(x),), t, device=x.device)
    return euler_step(x, denoise(x, now, cond).float(), now, torch.full_like(now, t_next))
