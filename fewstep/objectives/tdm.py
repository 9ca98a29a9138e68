"""Trajectory distribution matching: TDM (arXiv 2503.06674).

The student's state x_s at each of its grid times s = t_{k+1}, not its x_0, is matched to the
teacher's law at s:

    sum_k E_{tau in [t_{k+1}, t_k]} lambda_tau KL(p_{theta, tau | s} || p_{tea, tau})

where p_{theta, tau | s} is the law of x_s diffused further from s to tau. The intervals of the
steps do not overlap, so that one fake score network can know all their laws by its time alone.
"""

from jaxtyping import Float
from torch import Tensor

from fewstep.core.process import Time, expand

State = Float[Tensor, "b *s"]

HUBER = 0.00054
"""c of the pseudo-Huber distance per square root of a dimension."""


def interval(start: float, end: float, *, low: float, high: float) -> tuple[float, float]:
    """The part of [end, start] = [t_{k+1}, t_k] that lies in [low, high]."""
    return max(end, low), min(start, high)


def diffuse(x_s: State, xi: State, s: float, tau: Time) -> State:
    """x_tau = a x_s + b xi: noise added to a state at time s, so that data's law goes to data's.

    a = (1 - tau) / (1 - s) and b^2 = tau^2 - a^2 s^2 on the linear path.
    """
    a, b = _coefficients(s, tau)
    return expand(a, x_s) * x_s + expand(b, x_s) * xi


def fake_trajectory_loss(
    predicted_v: State, x_s: State, xi: State, s: float, tau: Time
) -> Float[Tensor, ""]:
    """Denoising score matching of the law of x_tau: the score of p(x_tau | x_s) is -xi / b.

    In v, of which the score is -(x_tau + (1 - tau) v) / tau:  v = (tau xi / b - x_tau) / (1 - tau).
    The weight ((1 - s) b / tau)^2 turns the error in v into one in xi / a: of order one at every
    step, also next to s, and with the same minimiser. At s = 0 it is 1 and this is
    `dmd.fake_velocity_loss`. The authors' demo regresses x_0 with importance weights instead; this
    target is exact and needs none.
    """
    x_tau = diffuse(x_s, xi, s, tau).detach().float()
    _, b = (expand(c, x_tau) for c in _coefficients(s, tau))
    t = expand(tau, x_tau)
    error = b / t * predicted_v.float() - (xi.float() - b / t * x_tau) / (1 - t)
    return ((1 - s) * error).square().mean()


def huber_direction(fake: State, real: State) -> State:
    """The gradient of the pseudo-Huber distance sqrt(mean d^2 + c^2) - c, d = fake - real.

    The paper's surrogate is sqrt(|d|^2 + c^2 n) - c sqrt(n) over n dimensions with c = 0.00054;
    divided by sqrt(n) here, so that its scale does not grow with the image.
    """
    difference = fake.float() - real.float()
    squared = difference.square().flatten(1).mean(1)
    return difference / expand((squared + HUBER**2).sqrt(), difference)


def _coefficients(s: float, tau: Time) -> tuple[Time, Time]:
    a = (1 - tau) / (1 - s)
    return a, (tau.square() - a.square() * s**2).clamp_min(0).sqrt()
