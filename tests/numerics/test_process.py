"""The linear path and its conversions, in float64 against definitions and the exact mixture."""

import pytest
import torch
from torch import Tensor

from fewstep.core.process import (
    add_noise,
    eps_from_x0,
    euler_step,
    score_from_x0,
    shift_time,
    uniform_time,
    v_from_x0,
    velocity,
    x0_from_score,
    x0_from_v,
)

from .exact import every, float64, generator, in_the_plane


def states() -> tuple[Tensor, Tensor, Tensor]:
    """x_0 and eps [50, 3, 4, 4] and a time for each sample in [0.02, 0.98]."""
    draw = generator(0)
    x_0, eps = torch.randn(2, 50, 3, 4, 4, generator=draw, dtype=torch.float64)
    return x_0, eps, torch.linspace(0.02, 0.98, 50, dtype=torch.float64)


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def test_path_runs_from_data_to_noise() -> None:
    x_0, eps, _ = states()
    assert torch.equal(add_noise(x_0, eps, torch.zeros(50, dtype=torch.float64)), x_0)
    assert torch.equal(add_noise(x_0, eps, torch.ones(50, dtype=torch.float64)), eps)
    by_hand = add_noise(float64([[8.0]]), float64([[4.0]]), float64([0.25]))
    assert by_hand.item() == 0.75 * 8 + 0.25 * 4


def test_velocity_is_the_slope_of_the_path() -> None:
    x_0, eps, t = states()
    h = 1e-3  # the path is straight: any step gives the slope
    slope = (add_noise(x_0, eps, t + h) - add_noise(x_0, eps, t)) / h
    close(velocity(x_0, eps), slope, 1e-10)


def test_conversions_return_what_made_the_state() -> None:
    x_0, eps, t = states()
    x_t = add_noise(x_0, eps, t)
    close(x0_from_v(x_t, velocity(x_0, eps), t), x_0)
    close(v_from_x0(x_t, x_0, t), velocity(x_0, eps))
    close(eps_from_x0(x_t, x_0, t), eps)
    close(score_from_x0(x_t, x_0, t) * t.view(-1, 1, 1, 1), -eps)


def test_round_trips() -> None:
    x_0, eps, t = states()
    x_t = add_noise(x_0, eps, t)
    guess = torch.randn(x_0.shape, generator=generator(1), dtype=torch.float64)
    close(x0_from_v(x_t, v_from_x0(x_t, guess, t), t), guess)
    close(x0_from_score(x_t, score_from_x0(x_t, guess, t), t), guess)
    # eps and x_0 rebuild the state; the velocity is their difference
    close(add_noise(guess, eps_from_x0(x_t, guess, t), t), x_t)
    close(velocity(guess, eps_from_x0(x_t, guess, t)), v_from_x0(x_t, guess, t))


@pytest.mark.parametrize("t", (0.05, 0.3, 0.7, 0.99))
def test_score_of_the_posterior_mean_is_grad_log_density(t: float) -> None:
    """Tweedie: score_from_x0(x_t, E[x_0 | x_t]) = grad log p(x_t), the latter by autograd."""
    mixture = in_the_plane()
    x_t = torch.randn(40, 2, generator=generator(2), dtype=torch.float64).requires_grad_()
    times = every(t, x_t)
    (gradient,) = torch.autograd.grad(mixture.log_prob(x_t, times).sum(), x_t)
    x_t = x_t.detach()
    exact = mixture.denoised(x_t, times)
    close(score_from_x0(x_t, exact, times), gradient, 1e-10)
    close(x0_from_score(x_t, gradient, times), exact, 1e-10)


def test_marginal_velocity_moves_the_density() -> None:
    """Continuity: d/dt p(x_t) + div(p v) = 0 with v from the exact D; central differences."""
    mixture, h = in_the_plane(), 1e-4
    x = torch.randn(30, 2, generator=generator(3), dtype=torch.float64)
    t = 0.6

    def density(x: Tensor, t: float) -> Tensor:
        return mixture.log_prob(x, every(t, x)).exp()

    def flux(x: Tensor) -> Tensor:
        times = every(t, x)
        return density(x, t).unsqueeze(1) * v_from_x0(x, mixture.denoised(x, times), times)

    change = (density(x, t + h) - density(x, t - h)) / (2 * h)
    steps = h * torch.eye(2, dtype=torch.float64)
    divergence = sum((flux(x + e) - flux(x - e))[:, i] / (2 * h) for i, e in enumerate(steps))
    assert change.abs().max() > 0.05, "the test must see a density that changes"
    close(change, -torch.as_tensor(divergence), 1e-7)


def test_euler_step_moves_along_the_line_through_x_0() -> None:
    x_0, eps, t = states()
    x_t, t_next = add_noise(x_0, eps, t), 0.3 * t
    moved = euler_step(x_t, x_0, t, t_next)
    close(moved, add_noise(x_0, eps, t_next))
    close(moved, x_t + (t_next - t).view(-1, 1, 1, 1) * v_from_x0(x_t, x_0, t))
    assert torch.equal(euler_step(x_t, x_0, t, torch.zeros_like(t)), x_0)
    assert torch.equal(euler_step(x_t, x_0, t, t), x_t)


def test_shift_keeps_the_ends_and_its_inverse_is_the_reciprocal() -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    for shift in (0.5, 1.0, 3.0, 6.0):
        warped = shift_time(t, shift)
        assert warped[0] == 0 and warped[-1] == 1 and (warped.diff() > 0).all()
        close(shift_time(warped, 1 / shift), t)
    assert shift_time(float64([0.5]), 3.0).item() == 0.75  # 3 / 2 over 1 + 2 / 2
    # arXiv 2403.03206 eq. 23: the shift multiplies the noise-to-signal ratio t / (1 - t)
    inside = t[1:-1]
    warped = shift_time(inside, 3.0)
    close(warped / (1 - warped), 3.0 * inside / (1 - inside))


def test_uniform_time_is_the_generators_stream() -> None:
    drawn = uniform_time(4000, generator(5), torch.device("cpu"))
    assert torch.equal(drawn, torch.rand(4000, generator=generator(5)))
    assert drawn.min() >= 0 and drawn.max() < 1
    assert drawn.mean().item() == pytest.approx(0.5, abs=5 / (12 * 4000) ** 0.5)
