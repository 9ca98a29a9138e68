"""The linear (rectified-flow) path of arXiv 2606.03746 eq. 1; conversions of x_0, v, eps, score.

    x_t = (1 - t) x_0 + t eps,   t = 0 data, t = 1 noise,   v = eps - x_0

This is the one home of the noise convention; nothing else in the project writes these formulas.
"""

import torch
from jaxtyping import Float
from torch import Tensor

Time = Float[Tensor, " b"]
State = Float[Tensor, "b *s"]


def expand(t: Time, like: State) -> Tensor:
    """t with trailing axes of size one, ready to broadcast against `like`."""
    return t.view(-1, *[1] * (like.ndim - 1))


def add_noise(x_0: State, eps: State, t: Time) -> State:
    """x_t = (1 - t) x_0 + t eps (eq. 1)."""
    t_ = expand(t, x_0)
    return (1 - t_) * x_0 + t_ * eps


def velocity(x_0: State, eps: State) -> State:
    """v = eps - x_0, the flow-matching target (eq. 2)."""
    return eps - x_0


def x0_from_v(x_t: State, v: State, t: Time) -> State:
    """x_0 = x_t - t v."""
    return x_t - expand(t, x_t) * v


def v_from_x0(x_t: State, x_0: State, t: Time) -> State:
    """v = (x_t - x_0) / t, for t > 0."""
    return (x_t - x_0) / expand(t, x_t)


def eps_from_x0(x_t: State, x_0: State, t: Time) -> State:
    """eps = (x_t - (1 - t) x_0) / t, for t > 0."""
    t_ = expand(t, x_t)
    return (x_t - (1 - t_) * x_0) / t_


def score_from_x0(x_t: State, x_0: State, t: Time) -> State:
    """s = -(x_t - (1 - t) x_0) / t^2: the score of p(x_t), x_0 the posterior mean (Tweedie)."""
    t_ = expand(t, x_t)
    return -(x_t - (1 - t_) * x_0) / t_.square()


def x0_from_score(x_t: State, score: State, t: Time) -> State:
    """x_0 = (x_t + t^2 s) / (1 - t), for t < 1."""
    t_ = expand(t, x_t)
    return (x_t + t_.square() * score) / (1 - t_)


def euler_step(x_t: State, x_0: State, t: Time, t_next: Time) -> State:
    """One Euler step of dx/dt = v from t to t_next, given the denoised x_0; t_next = 0 is x_0."""
    ratio = expand(t_next / t, x_t)
    return ratio * x_t + (1 - ratio) * x_0


def shift_time(t: Tensor, shift: float) -> Tensor:
    """t' = s t / (1 + (s - 1) t): the static shift of flow matching (SD3, arXiv 2403.03206)."""
    return shift * t / (1 + (shift - 1) * t)


def uniform_time(count: int, generator: torch.Generator, device: torch.device) -> Time:
    """`count` uniform draws from [0, 1), made on the generator's device and moved."""
    return torch.rand(count, generator=generator, device=generator.device).to(device)
