"""Phased consistency distillation: PCM (arXiv 2405.18407) eq. 3-5, on the student's own grid.

The phases of the trajectory are the student's steps, [t_{k+1}, t_k]. On each,

    f^k(x_t, t) = the point at t_{k+1} that the student's answer at (x_t, t) leads to   (eq. 3)
    x_n = one step of the guided teacher from x_{n+1} ~ noised real data               (eq. 4)
    loss = d(f_theta^k(x_{n+1}, t_{n+1}), f_{theta-}^k(x_n, t_n))                       (eq. 5)

with d the squared error and theta- = stop-gradient of theta (the paper's mu = 0). Without the
adversarial loss of its section 3.3.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fewstep.core.process import Time, euler_step, expand

State = Float[Tensor, "b *s"]


def phase(start: float, end: float, substeps: int, shift: float) -> tuple[float, ...]:
    """`substeps` + 1 times from `start` down to `end`, uniform before the shift.

    Those of all phases together are the teacher's own grid where the shift is that of the
    student's grid: 4 student steps of 10 substeps at shift 3 are `shifted_grid(40, 3)`.
    """
    first, last = (t / (shift - (shift - 1) * t) for t in (start, end))
    uniform = [first + (last - first) * i / substeps for i in range(1, substeps)]
    return (start, *(shift * u / (1 + (shift - 1) * u) for u in uniform), end)


def land(x_t: State, x_0: State, t: Time, edge: float) -> State:
    """f(x_t, t) (eq. 3): the Euler step to `edge`; x_t itself where t is the edge already."""
    above = torch.where(t > edge, t, 1.0)  # any time but 0, which has no step to itself
    landed = euler_step(x_t, x_0, above, torch.full_like(t, edge))
    return torch.where(expand(t, x_t) > edge, landed, x_t)


def consistency_loss(landing: State, target: State) -> Float[Tensor, ""]:
    """Squared distance of two landings at the edge; only the first carries gradient (eq. 5)."""
    return F.mse_loss(landing.float(), target.detach().float())
