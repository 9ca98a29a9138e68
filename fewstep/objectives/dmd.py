"""Distribution matching distillation: arXiv 2606.03746 eq. 3-4.

After DMD (arXiv 2311.18828) and DMD2 (arXiv 2405.14867).

    grad_theta KL(p_stu || p_tea)
        = E [ (d x_theta / d theta)^T (s_stu(x_t, t, c) - s_real(x_t, t, c)) ]   (eq. 4)

No GAN. Everything is float32.
"""

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fewstep.core.process import expand, shift_time, velocity

State = Float[Tensor, "b *s"]


def renoise_time(
    u: Float[Tensor, " b"], *, low: float, high: float, shift: float
) -> Float[Tensor, " b"]:
    """t ~ p_t from uniform u: uniform on [low, high], then warped by the shift."""
    return shift_time(low + (high - low) * u, shift)


def dmd_direction(
    x: State, fake: State, real: State, *, normaliser: Literal["teacher", "none"]
) -> State:
    """The direction in which KL(p_stu || p_tea) grows at the student's sample x; step against it.

    `fake` and `real` are x_0 predictions at the same (x_t, t). Their scores differ by
    s_stu - s_real = (1 - t) / t^2 (fake - real); DMD (arXiv 2311.18828) replaces the factor
    of t by a per-sample normaliser, 1 / mean |x - real|, so that every noise level pushes about
    equally. 'none' keeps the plain difference fake - real.
    """
    difference = fake.float() - real.float()
    if normaliser == "none":
        return difference
    return difference / expand(distance_to(real, x), x)


def distance_to(real: State, x: State) -> Float[Tensor, " b"]:
    """mean |x - real| of each sample; never 0."""
    return (x.float() - real.float()).abs().flatten(1).mean(1).clamp_min(1e-6)


def dmd_loss(x: State, direction: State) -> Float[Tensor, ""]:
    """A scalar whose gradient with respect to x is direction / x.numel() and nothing else.

    0.5 mean (x - sg[x - direction])^2, the usual surrogate: x carries gradient, the scores never.
    """
    target = (x - direction).detach()
    return 0.5 * F.mse_loss(x.float(), target.float())


def fake_velocity_loss(predicted_v: State, x: State, eps: State) -> Float[Tensor, ""]:
    """Flow matching (eq. 2) of the fake score on the student's samples: || v - (eps - x) ||^2."""
    return F.mse_loss(predicted_v.float(), velocity(x.detach().float(), eps.float()))
