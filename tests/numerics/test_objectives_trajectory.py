"""Consistency distillation and trajectory regression, where the teacher's path is known exactly.

For a Gaussian the exact denoiser is affine, so that the teacher's Euler walk is an affine map, and
a student that is affine at each time can follow it without error.
"""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fewstep.core.process import add_noise, euler_step
from fewstep.objectives.consistency import consistency_loss, land, phase
from fewstep.objectives.trajectory import regression_loss
from fewstep.samplers import sample, shifted_grid

from .exact import GaussianMixture, every, float64, gaussian, generator, no_condition

GRID = shifted_grid(4, 3.0)
EDGES = (*GRID, 0.0)


def world() -> GaussianMixture:
    return gaussian(float64([0.7, -0.4]), float64([[0.9, 0.0], [0.5, 0.6]]))


def close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def walk(x: Tensor, times: tuple[float, ...]) -> Tensor:
    for t, t_next in pairwise(times):
        x = euler_step(x, world().denoised(x, every(t, x)), every(t, x), every(t_next, x))
    return x


# --- phases ---------------------------------------------------------------------------------------


def test_phases_together_are_the_teachers_own_grid() -> None:
    parts = [phase(t, end, 10, 3.0) for t, end in pairwise(EDGES)]
    joined = [t for part in parts for t in part[:-1]]
    assert joined == pytest.approx(shifted_grid(40, 3.0), abs=1e-12)
    assert [part[0] for part in parts] == list(GRID) and parts[-1][-1] == 0.0


def test_a_phase_without_shift_is_uniform() -> None:
    assert phase(0.8, 0.2, 3, 1.0) == pytest.approx((0.8, 0.6, 0.4, 0.2))
    assert phase(0.8, 0.2, 1, 5.0) == (0.8, 0.2)


# --- consistency ----------------------------------------------------------------------------------


def test_landing_by_hand_and_at_the_edge() -> None:
    """x_edge = x_0 + edge / t (x_t - x_0); at t = edge the state stays as it is, also at 0."""
    x_t, x_0 = torch.randn(2, 3, 2, generator=generator(0))
    t = torch.tensor([0.8, 0.5, 0.25])
    got = land(x_t, x_0, t, 0.25)
    close(got[0], x_0[0] + 0.25 / 0.8 * (x_t[0] - x_0[0]), 1e-6)
    assert torch.equal(got[2], x_t[2])
    zero = land(x_t, x_0, torch.tensor([0.8, 0.0, 0.0]), 0.0)
    assert torch.equal(zero[0], x_0[0]) and torch.equal(zero[1:], x_t[1:])


def test_consistency_gradient_is_of_the_first_landing_alone() -> None:
    a, b = torch.randn(2, 4, 3, generator=generator(1))
    a.requires_grad_()
    b.requires_grad_()
    consistency_loss(a, b).backward()
    assert a.grad is not None and b.grad is None
    close(a.grad, 2 * (a - b).detach() / a.numel(), 1e-6)


@pytest.mark.parametrize("k", range(4))
def test_consistency_is_solved_by_the_teachers_walk_to_the_edge(k: int) -> None:
    """One affine student per fine time, the loss minimised at each by least squares.

    From the edge upwards each time's target is made by the time below, as self-consistency has it.
    What results must be the composed walk of the teacher: f(x_t, t) = walk(x_t, t -> edge).
    """
    start, edge = EDGES[k : k + 2]
    times = phase(start, edge, 5, 3.0)
    answers: dict[float, Tensor] = {}  # by time: [3, 2], the affine map to x_0

    def landed(x: Tensor, t: float) -> Tensor:
        ones = torch.ones(len(x), 1, dtype=torch.float64)
        answer = torch.cat([x, ones], 1) @ answers[t] if t in answers else x
        return land(x, answer, every(t, x), edge)

    for t_next, t in pairwise(times[::-1]):
        x_0 = world().draw(50, generator(2))
        eps = torch.randn(50, 2, generator=generator(3), dtype=torch.float64)
        x_t = add_noise(x_0, eps, every(t, x_0))
        x_next = euler_step(
            x_t, world().denoised(x_t, every(t, x_t)), *(every(u, x_t) for u in (t, t_next))
        )
        target = landed(x_next, t_next)
        features = torch.cat([x_t, torch.ones(50, 1, dtype=torch.float64)], 1)

        def loss(theta: Tensor, x=x_t, t=t, target=target, features=features) -> Tensor:
            answer = features @ theta.view(3, 2)
            return consistency_loss(land(x, answer, every(t, x), edge), target)

        zero = torch.zeros(6, dtype=torch.float64)
        slope = torch.autograd.functional.jacobian(loss, zero)
        bend = torch.autograd.functional.hessian(loss, zero)
        assert isinstance(slope, Tensor) and isinstance(bend, Tensor)
        answers[t] = torch.linalg.solve(bend, -slope).view(3, 2)
    fresh = torch.randn(20, 2, generator=generator(4), dtype=torch.float64)
    close(landed(fresh, start), walk(fresh, times), 1e-4)


# --- trajectory regression ------------------------------------------------------------------------


def test_a_student_that_regresses_the_walk_plays_the_teachers_sample() -> None:
    """Least squares at each of the 4 steps; 4 evaluations then give what the teacher's 40 give."""
    noise = torch.randn(60, 2, generator=generator(5), dtype=torch.float64)
    states = [noise]
    for start, end in pairwise(EDGES):
        states.append(walk(states[-1], phase(start, end, 10, 3.0)))
    answers = []
    for k, (start, end) in enumerate(pairwise(EDGES)):
        features = torch.cat([states[k], torch.ones(60, 1, dtype=torch.float64)], 1)

        def loss(theta: Tensor, k=k, start=start, end=end, features=features) -> Tensor:
            x = features @ theta.view(3, 2)
            return regression_loss(x, states[k], every(start, x), states[k + 1], end)

        zero = torch.zeros(6, dtype=torch.float64)
        slope = torch.autograd.functional.jacobian(loss, zero)
        bend = torch.autograd.functional.hessian(loss, zero)
        assert isinstance(slope, Tensor) and isinstance(bend, Tensor)
        answers.append(torch.linalg.solve(bend, -slope).view(3, 2))

    def student(x_t: Tensor, t: Tensor, _cond: object) -> Tensor:
        (k,) = [i for i, t_k in enumerate(GRID) if abs(t_k - t[0].item()) < 1e-6]
        return torch.cat([x_t, torch.ones(len(x_t), 1)], 1) @ answers[k].float()

    fresh = torch.randn(20, 2, generator=generator(6))
    played = sample(student, fresh, no_condition(20), GRID)
    walked = sample(world(), fresh, no_condition(20), shifted_grid(40, 3.0))
    close(played, walked, 1e-4)
    coarse = sample(world(), fresh, no_condition(20), GRID)
    assert (coarse - walked).abs().max() > 0.05, "4 steps of the teacher itself would do"


def test_regression_gradient_by_hand() -> None:
    """|| (state - x) / t - (state - target) / (t - end) ||^2; targets carry no gradient."""
    x, state, target = torch.randn(3, 4, 3, generator=generator(7))
    x.requires_grad_()
    target.requires_grad_()
    t = torch.full((4,), 0.75)
    loss = regression_loss(x, state, t, target, 0.5)
    loss.backward()
    error = (state - x) / 0.75 - (state - target) / 0.25
    close(loss, error.square().mean(), 1e-5)
    assert x.grad is not None and target.grad is None
    close(x.grad, (-2 / 0.75 * error / x.numel()).detach(), 1e-5)
