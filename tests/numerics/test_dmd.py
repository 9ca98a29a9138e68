"""DMD against closed forms: on Gaussians its expected gradient is that of a KL known exactly."""

from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from fewstep.core.process import add_noise, score_from_x0, shift_time, x0_from_v
from fewstep.core.types import Condition
from fewstep.objectives.dmd import (
    dmd_direction,
    dmd_loss,
    fake_velocity_loss,
    renoise_time,
)
from fewstep.rollout import rollout
from fewstep.samplers import sample, shifted_grid

from .exact import (
    GaussianMixture,
    every,
    float64,
    gaussian,
    gaussian_kl,
    generator,
    in_the_plane,
    no_condition,
    normal_line,
    on_the_line,
    sign_cube,
)

TIMES = (0.2, 0.5, 0.8, 0.95)


def close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def test_gradient_of_the_loss_is_the_direction_over_numel() -> None:
    """Bit for bit where x - direction is exact in float32; to its rounding otherwise."""
    draw = generator(0)
    x = (torch.randint(-64, 64, (4, 2, 8), generator=draw) / 16).requires_grad_()
    direction = (torch.randint(-64, 64, (4, 2, 8), generator=draw) / 16).requires_grad_()
    dmd_loss(x, direction).backward()
    assert x.grad is not None and torch.equal(x.grad, direction.detach() / x.numel())
    assert direction.grad is None

    x, direction = torch.randn(2, 4, 2, 8, generator=draw)
    x.requires_grad_()
    dmd_loss(x, direction).backward()
    assert x.grad is not None
    close(x.grad * x.numel(), direction, 1e-6)


def test_no_gradient_through_the_scores() -> None:
    """fake and real depend on x here, as they would without no_grad: nothing of it counts."""
    x = torch.randn(4, 3, generator=generator(1)).requires_grad_()
    fake, real = (2 * x).sin(), x.cos()
    direction = dmd_direction(x, fake, real, normaliser="teacher")
    dmd_loss(x, direction).backward()
    assert x.grad is not None
    close(x.grad * x.numel(), direction.detach(), 1e-6)


def test_gradient_reaches_a_half_precision_student_in_float32_arithmetic() -> None:
    x = torch.randn(4, 3, generator=generator(2)).bfloat16().requires_grad_()
    fake, real = torch.randn(2, 4, 3, generator=generator(3)).bfloat16()
    direction = dmd_direction(x.detach(), fake, real, normaliser="none")
    assert direction.dtype == torch.float32
    assert torch.equal(direction, fake.float() - real.float())
    loss = dmd_loss(x, direction)
    loss.backward()
    assert loss.dtype == torch.float32 and x.grad is not None
    close(x.grad.float() * x.numel(), direction, 1e-2)


@pytest.mark.parametrize("t", TIMES)
def test_direction_is_the_score_difference(t: float) -> None:
    """fake - real = t^2 / (1 - t) (s_stu - s_real), with the exact scores of two mixtures."""
    student, teacher = (
        gaussian(float64([0.4, -0.3]), float64([[0.8, 0.0], [0.3, 0.5]])),
        in_the_plane(),
    )
    x_t = torch.randn(30, 2, generator=generator(4), dtype=torch.float64)
    times = every(t, x_t)
    found = dmd_direction(
        x_t, student.denoised(x_t, times), teacher.denoised(x_t, times), normaliser="none"
    )
    wanted = t**2 / (1 - t) * (student.score(x_t, times) - teacher.score(x_t, times))
    close(found.double(), wanted, 1e-6)


@pytest.mark.parametrize("t", TIMES)
def test_expected_gradient_of_a_gaussian_student_is_that_of_the_kl(t: float) -> None:
    """Student x = m + A z, teacher a Gaussian, both in the plane, normaliser 'none'.

        E[(d x / d theta)^T (fake - real)] = t^2 / (1 - t)^2  d/d theta KL(p_stu,t || p_tea,t)

    One factor 1 / (1 - t) is of fake - real = t^2 / (1 - t) (s_stu - s_real), the other of
    d x_t / d x = 1 - t, which the KL's own gradient has and eq. 4 leaves to the weighting. The
    integrand is quadratic in (z, xi), so the corners of a cube give the expectation exactly.
    """
    teacher = gaussian(float64([0.7, -0.4]), float64([[0.9, 0.0], [0.5, 0.6]]))
    mean = float64([-0.5, 0.3]).requires_grad_()
    root = float64([[0.4, 0.1], [-0.2, 1.1]]).requires_grad_()
    z, xi = sign_cube(4).split(2, dim=1)

    x = mean + z @ root.mT
    x_t = add_noise(x.detach(), xi, every(t, x))
    fake = gaussian(mean.detach(), root.detach()).denoised(x_t, every(t, x))
    real = teacher.denoised(x_t, every(t, x))
    loss = dmd_loss(x, dmd_direction(x, fake, real, normaliser="none"))
    found = torch.autograd.grad(loss, (mean, root))

    kl = gaussian_kl(gaussian(mean, root), teacher, t)
    wanted = torch.autograd.grad(kl, (mean, root))
    dimensions = 2  # the loss is a mean over them
    for ours, closed in zip(found, wanted, strict=True):
        weighted = t**2 / (1 - t) ** 2 * closed
        assert weighted.abs().max() > 1e-3, "a test of nothing"
        close(dimensions * ours, weighted, 5e-7)


@pytest.mark.parametrize("t", TIMES)
def test_expected_gradient_towards_a_mixture_is_that_of_the_kl(t: float) -> None:
    """The same with a three-mode teacher on the line; KL and expectation by fine quadrature."""
    teacher = on_the_line()
    theta = float64([0.3, 0.7]).requires_grad_()  # mean, standard deviation
    nodes, share = normal_line(401)
    z, xi = (n.unsqueeze(1) for n in torch.cartesian_prod(nodes, nodes).T)
    weight = torch.outer(share, share).flatten().unsqueeze(1)

    x = (theta[0] + theta[1] * z).detach().requires_grad_()
    x_t = add_noise(x.detach(), xi, every(t, x))
    fake = student_on_the_line(theta.detach()).denoised(x_t, every(t, x))
    real = teacher.denoised(x_t, every(t, x))
    (push,) = torch.autograd.grad(dmd_loss(x, dmd_direction(x, fake, real, normaliser="none")), x)
    push = push * x.numel() * weight
    found = torch.stack([push.sum(), (push * z).sum()])  # d x / d mean = 1, d x / d std = z

    line = torch.linspace(-12, 12, 24_001, dtype=torch.float64).unsqueeze(1)
    times, width = every(t, line), float(line[1] - line[0])
    log_q = student_on_the_line(theta).log_prob(line, times)
    kl = (log_q.exp() * (log_q - teacher.log_prob(line, times))).sum() * width
    (wanted,) = torch.autograd.grad(kl, theta)
    weighted = t**2 / (1 - t) ** 2 * wanted
    assert (weighted.abs() > 1e-3).all(), "a test of nothing"
    close(found, weighted, 5e-7)


def student_on_the_line(theta: Tensor) -> GaussianMixture:
    return gaussian(theta[:1], theta[1:].view(1, 1))


@pytest.mark.parametrize("normaliser", ("none", "teacher"))
def test_descent_with_exact_scores_reaches_the_teacher(
    normaliser: Literal["teacher", "none"],
) -> None:
    """Two-step student, D(x, t_k) = m_k + x A_k^T: all of rollout, re-noise, DMD and playback.

    Its answers at each step are Gaussian, so the fake score is exact as well. At the end they have
    the teacher's mean and covariance at both steps, and so has the sample.
    """
    teacher = gaussian(float64([0.7, -0.4]), float64([[0.9, 0.0], [0.5, 0.6]]))
    grid, draw = shifted_grid(2, 3.0), generator(7)
    student = AffineStudent(grid)
    optimiser = torch.optim.Adam(student.parameters(), lr=0.05)
    updates = 300
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.02, updates)
    for update in range(updates):
        k = update % 2
        x = rollout(student, torch.randn(64, 2, generator=draw), no_condition(64), grid, k)
        t = renoise_time(torch.rand(64, generator=draw), low=0.02, high=0.98, shift=2.0)
        x_t = add_noise(x.detach(), torch.randn(64, 2, generator=draw), t)
        fake = student.law(k)(x_t, t, no_condition(64))
        real = teacher(x_t, t, no_condition(64))
        loss = dmd_loss(x, dmd_direction(x.detach(), fake, real, normaliser=normaliser))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()

    for k in range(2):
        close(student.law(k).means, teacher.means, 1e-4)
        close(student.law(k).covariances, teacher.covariances, 1e-4)
    with torch.no_grad():
        x = sample(student, torch.randn(100_000, 2, generator=draw), no_condition(100_000), grid)
    close(x.mean(0).double(), teacher.means[0], 0.02)
    close(x.T.cov().double(), teacher.covariances[0], 0.02)


class AffineStudent(nn.Module):
    """D(x_t, t_k) = m_k + x_t A_k^T in the plane, whose law at step k is known."""

    def __init__(self, grid: tuple[float, ...]) -> None:
        super().__init__()
        self.grid = grid
        self.mean = nn.Parameter(torch.zeros(len(grid), 2))
        self.root = nn.Parameter(torch.eye(2).repeat(len(grid), 1, 1) * 0.3)

    def forward(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        (k,) = [i for i, t_k in enumerate(self.grid) if abs(t_k - t[0].item()) < 1e-6]
        return self.mean[k] + x_t @ self.root[k].mT

    def law(self, k: int) -> GaussianMixture:
        """The law of the answer at step k: the affine maps of the steps so far, composed."""
        mean, root = torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
        for i, (t, t_next) in enumerate(zip(self.grid, (*self.grid[1:], 0.0), strict=True)):
            a, m = self.root[i].detach().double(), self.mean[i].detach().double()
            mean_0, root_0 = m + a @ mean, a @ root
            if i == k:
                return gaussian(mean_0, root_0)
            keep = t_next / t
            mean, root = keep * mean + (1 - keep) * mean_0, keep * root + (1 - keep) * root_0
        raise AssertionError(k)


def test_normaliser_by_hand() -> None:
    x = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    real = torch.tensor([[0.0, 1.0], [10.0, 30.0]])
    fake = torch.tensor([[2.0, 2.0], [12.0, 31.0]])
    # mean |x - real| is 1.5 and 20
    wanted = torch.tensor([[2 / 1.5, 1 / 1.5], [2 / 20, 1 / 20]])
    close(dmd_direction(x, fake, real, normaliser="teacher"), wanted, 1e-6)
    assert torch.equal(dmd_direction(x, fake, real, normaliser="none"), fake - real)


def test_normaliser_belongs_to_one_sample() -> None:
    """Ten times the distance of sample 1: a tenth of its push; the others keep every bit."""
    x, fake, real = torch.randn(3, 4, 2, 3, 3, generator=generator(8))
    before = dmd_direction(x, fake, real, normaliser="teacher")
    x = x.clone()
    x[1] = real[1] + 10 * (x[1] - real[1])
    after = dmd_direction(x, fake, real, normaliser="teacher")
    close(after[1], before[1] / 10, 1e-5)
    assert torch.equal(after[[0, 2, 3]], before[[0, 2, 3]])


def test_normaliser_of_a_perfect_sample_is_finite() -> None:
    x = torch.zeros(1, 3)
    direction = dmd_direction(x, torch.full((1, 3), 1e-3), x, normaliser="teacher")
    close(direction, torch.full((1, 3), 1e3), 1e-4)


@pytest.mark.parametrize("t", TIMES)
def test_minimiser_of_the_fake_loss_is_the_posterior_mean(t: float) -> None:
    """Among affine networks on the samples of a Gaussian student, where the optimum is affine.

    Found by one Newton step in float64 (the loss is quadratic), expectation exact on the cube.
    """
    student = gaussian(float64([0.4, -0.3]), float64([[0.8, 0.0], [0.3, 0.5]]))
    z, eps = sign_cube(4).split(2, dim=1)
    x = student.means[0] + z @ torch.linalg.cholesky(student.covariances[0]).mT
    x_t = add_noise(x, eps, every(t, x))
    features = torch.cat([x_t, torch.ones(len(x), 1, dtype=torch.float64)], dim=1)

    def loss(theta: Tensor) -> Tensor:
        return fake_velocity_loss(features @ theta.view(3, 2), x, eps)

    zero = torch.zeros(6, dtype=torch.float64)
    slope = torch.autograd.functional.jacobian(loss, zero)
    bend = torch.autograd.functional.hessian(loss, zero)
    assert isinstance(slope, Tensor) and isinstance(bend, Tensor)
    assert torch.linalg.eigvalsh(bend).min() > 0
    best = features @ torch.linalg.solve(bend, -slope).view(3, 2)
    denoised = x0_from_v(x_t, best, every(t, x))
    close(denoised, student.denoised(x_t, every(t, x)), 5e-6)
    close(
        t**2 * score_from_x0(x_t, denoised, every(t, x)),
        t**2 * student.score(x_t, every(t, x)),
        5e-6,
    )


def test_the_fake_loss_sends_no_gradient_into_the_student() -> None:
    x, fake = (v.requires_grad_() for v in torch.randn(2, 4, 3, generator=generator(9)))
    eps = torch.randn(4, 3, generator=generator(10))
    fake_velocity_loss(fake, x, eps).backward()
    assert x.grad is None and fake.grad is not None
    close(fake.grad, 2 * (fake - (eps - x)).detach() / x.numel(), 1e-6)


def test_renoise_time_closed_form() -> None:
    u = torch.tensor([0.0, 0.25, 0.5, 1.0])
    close(renoise_time(u, low=0.02, high=0.98, shift=1.0), 0.02 + 0.96 * u, 1e-6)
    # uniform part 0.2, 0.4, 0.6, 1.0; shift 3: 3 t / (1 + 2 t)
    wanted = torch.tensor([0.6 / 1.4, 1.2 / 1.8, 1.8 / 2.2, 1.0])
    close(renoise_time(u, low=0.2, high=1.0, shift=3.0), wanted, 1e-6)


@pytest.mark.parametrize("shift", (1.0, 3.0))
def test_renoise_time_has_the_stated_law(shift: float) -> None:
    """Undoing the shift must give back a uniform draw on [low, high]."""
    low, high = 0.1, 0.9
    t = renoise_time(torch.rand(20_000, generator=generator(11)), low=low, high=high, shift=shift)
    inside = (t >= shift_time(torch.tensor(low), shift) - 1e-6) & (
        t <= shift_time(torch.tensor(high), shift) + 1e-6
    )
    assert inside.all()
    ranks = (shift_time(t, 1 / shift).sort().values - low) / (high - low)
    uniform = (torch.arange(20_000) + 0.5) / 20_000
    assert (ranks - uniform).abs().max() < 0.0137  # Kolmogorov-Smirnov at p = 0.001
