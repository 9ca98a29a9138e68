"""Decoupled DMD, TDM and the GAN of DMD2 against closed forms on Gaussians."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.core.process import add_noise, shift_time, x0_from_score
from fewstep.objectives.decoupled import augmentation_time, decoupled_direction
from fewstep.objectives.dmd import dmd_direction, dmd_loss, fake_velocity_loss, renoise_time
from fewstep.objectives.gan import Head, discriminator_loss, generator_loss
from fewstep.objectives.tdm import (
    HUBER,
    diffuse,
    fake_trajectory_loss,
    huber_direction,
    interval,
)
from fewstep.samplers import shifted_grid

from .exact import every, float64, gaussian, generator, normal_line, on_the_line, sign_cube

STATES = ((0.9, 0.95), (0.5, 0.6), (0.5, 0.75), (0.0, 0.3))
"""(s, tau): a student's state at s, diffused to tau."""


def close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


# --- Decoupled DMD --------------------------------------------------------------------------------


@pytest.mark.parametrize("normaliser", ("none", "teacher"))
def test_both_terms_at_one_state_are_dmd_with_the_guided_teacher(normaliser) -> None:
    """arXiv 2511.22677 eq. 5 = eq. 6: real_cfg - fake = (cond - fake) + (alpha - 1) (cond - un)."""
    x, fake, cond, uncond = torch.randn(4, 5, 3, generator=generator(0))
    for alpha in (1.0, 3.0, 7.5):
        guided = uncond + alpha * (cond - uncond)
        found = decoupled_direction(
            x,
            fake,
            cond,
            (alpha - 1) * (cond - uncond),
            matching_weight=1.0,
            augmentation_weight=1.0,
            normaliser=normaliser,
        )
        close(found, dmd_direction(x, fake, guided, normaliser=normaliser), 2e-5)


def test_each_term_alone() -> None:
    x, fake, cond, pull = torch.randn(4, 5, 3, generator=generator(1))

    def direction(matching: float, augmentation: float) -> Tensor:
        return decoupled_direction(
            x,
            fake,
            cond,
            pull,
            matching_weight=matching,
            augmentation_weight=augmentation,
            normaliser="none",
        )

    assert torch.equal(direction(1.0, 0.0), fake - cond)
    assert torch.equal(direction(0.0, 1.0), -pull)  # descent moves x along what guidance adds
    close(direction(2.0, 0.5), 2 * (fake - cond) - 0.5 * pull, 1e-6)


@pytest.mark.parametrize("shift", (1.0, 3.0))
def test_augmentation_is_never_noisier_than_the_student(shift: float) -> None:
    """Uniform before the shift from low to where the shift reaches t_k; all of p_t at t_0 = 1."""
    u = torch.linspace(0, 1, 11)
    for below in shifted_grid(4, 3.0):
        t = augmentation_time(u, low=0.02, high=0.98, shift=shift, below=below)
        top = min(0.98, below / (shift - (shift - 1) * below))
        close(t, shift_time(0.02 + (top - 0.02) * u, shift), 1e-6)
        assert t.max() <= below + 1e-6
    free = augmentation_time(u, low=0.02, high=0.98, shift=shift, below=1.0)
    close(free, renoise_time(u, low=0.02, high=0.98, shift=shift), 1e-6)


# --- TDM ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("s", "tau"), STATES)
def test_diffusing_a_noised_sample_gives_the_path_at_the_later_time(s: float, tau: float) -> None:
    """Of x_0 = 1: mean 1 - tau, variance tau^2, whatever s; by the corners of a cube exactly."""
    eps, xi = sign_cube(2).split(1, dim=1)
    x_0 = torch.ones_like(eps)
    x_tau = diffuse(add_noise(x_0, eps, every(s, eps)), xi, s, every(tau, eps))
    close(x_tau.mean(), float64([1 - tau])[0], 1e-12)
    close(x_tau.var(correction=0), float64([tau**2])[0], 1e-12)


@pytest.mark.parametrize(("s", "tau"), STATES)
def test_minimiser_of_the_fake_loss_has_the_score_of_the_diffused_state(
    s: float, tau: float
) -> None:
    """x_s ~ N(m, S) of any covariance, also one that no x_0 could have: score by its closed form.

    Affine networks, the optimum by one Newton step in float64.
    """
    mean, root = float64([0.4, -0.3]), float64([[0.5, 0.0], [0.2, 0.3]])
    z, xi = sign_cube(4).split(2, dim=1)
    x_s = mean + z @ root.mT
    time = every(tau, x_s)
    x_tau = diffuse(x_s, xi, s, time)
    features = torch.cat([x_tau, torch.ones(len(x_s), 1, dtype=torch.float64)], dim=1)

    def loss(theta: Tensor) -> Tensor:
        return fake_trajectory_loss(features @ theta.view(3, 2), x_s, xi, s, time)

    zero = torch.zeros(6, dtype=torch.float64)
    slope = torch.autograd.functional.jacobian(loss, zero)
    bend = torch.autograd.functional.hessian(loss, zero)
    assert isinstance(slope, Tensor) and isinstance(bend, Tensor)
    v = features @ torch.linalg.solve(bend, -slope).view(3, 2)

    a = (1 - tau) / (1 - s)
    covariance = a**2 * root @ root.mT + (tau**2 - a**2 * s**2) * torch.eye(2, dtype=torch.float64)
    score = -torch.linalg.solve(covariance, (x_tau - a * mean).mT).mT
    close(x_tau - tau * v, x0_from_score(x_tau, score, time), 5e-5)


def test_at_s_0_the_fake_loss_is_flow_matching() -> None:
    predicted, x, xi = torch.randn(3, 6, 4, generator=generator(2), dtype=torch.float64)
    tau = torch.rand(6, generator=generator(3), dtype=torch.float64) * 0.9 + 0.05
    found = fake_trajectory_loss(predicted, x, xi, 0.0, tau)
    close(found.float(), fake_velocity_loss(predicted, x, xi), 1e-5)


@pytest.mark.parametrize(("start", "s"), list(pairwise((*shifted_grid(4, 3.0), 0.0))))
def test_the_fake_loss_is_of_order_one_at_every_step(start: float, s: float) -> None:
    """Also as tau goes to s, where the target in v diverges, and for small 1 - tau."""
    x_s, xi = torch.randn(2, 500, 4, generator=generator(4))
    for tau in (s + 1e-4, (s + start) / 2, min(start, 0.98)):
        loss = fake_trajectory_loss(torch.zeros(500, 4), x_s, xi, s, torch.full((500,), tau))
        assert 0.5 < loss < 5, (tau, loss)


@pytest.mark.parametrize(("s", "tau"), STATES)
def test_expected_gradient_is_that_of_the_kl_of_the_diffused_state(s: float, tau: float) -> None:
    """Student state x_s = m + A z, teacher's data a Gaussian; normaliser 'none', exact scores.

        E[(d x_s / d theta)^T (fake - real)] = tau^2 / ((1 - tau) a) d KL(p_{tau|s} || p_tau)

    one factor of fake - real = tau^2 / (1 - tau) (s_fake - s_real), one of d x_tau / d x_s = a.
    """
    teacher = gaussian(float64([0.7, -0.4]), float64([[0.9, 0.0], [0.5, 0.6]]))
    mean = float64([-0.2, 0.3]).requires_grad_()
    root = float64([[0.7, 0.1], [-0.2, 0.8]]).requires_grad_()
    z, xi = sign_cube(4).split(2, dim=1)
    a = (1 - tau) / (1 - s)

    x_s = mean + z @ root.mT
    time = every(tau, x_s)
    x_tau = diffuse(x_s.detach(), xi, s, time)
    identity = torch.eye(2, dtype=torch.float64)
    covariance = a**2 * root @ root.mT + (tau**2 - a**2 * s**2) * identity
    away = (x_tau - a * mean).mT
    fake = x0_from_score(x_tau, -torch.linalg.solve(covariance, away).mT.detach(), time)
    real = teacher.denoised(x_tau, time)
    loss = dmd_loss(x_s, dmd_direction(x_s, fake, real, normaliser="none"))
    found = torch.autograd.grad(loss, (mean, root), retain_graph=True)

    p_cov = (1 - tau) ** 2 * teacher.covariances[0] + tau**2 * identity
    apart = a * mean - (1 - tau) * teacher.means[0]
    kl = 0.5 * (
        torch.linalg.solve(p_cov, covariance).trace()
        + apart @ torch.linalg.solve(p_cov, apart)
        - covariance.logdet()
    )
    wanted = torch.autograd.grad(kl, (mean, root))
    for ours, closed in zip(found, wanted, strict=True):
        weighted = tau**2 / ((1 - tau) * a) * closed
        assert weighted.abs().max() > 1e-4, "a test of nothing"
        close(2 * ours, weighted, 5e-6)  # the loss is a mean over two dimensions


def test_huber_direction_is_the_gradient_of_the_pseudo_huber_distance() -> None:
    """(1 / b) sum_i (sqrt(|d_i|^2 + c^2 n) - c sqrt(n)) / sqrt(n), c = 0.00054, by autograd."""
    fake, real = torch.randn(2, 4, 3, 5, generator=generator(5), dtype=torch.float64)
    real[1] = fake[1] + 1e-4 * real[1]  # near the bend
    x = torch.zeros_like(fake).requires_grad_()
    target = (x - (fake - real)).detach()
    squared = (x - target).square().flatten(1).sum(1)
    loss = ((squared + HUBER**2 * 15).sqrt() - HUBER * 15**0.5).mean() / 15**0.5
    (wanted,) = torch.autograd.grad(loss, x)
    (found,) = torch.autograd.grad(dmd_loss(x, huber_direction(fake, real)), x)
    close(found, wanted, 1e-4)


def test_intervals_of_the_steps_meet_and_do_not_overlap() -> None:
    grid = (*shifted_grid(4, 3.0), 0.0)
    parts = [interval(grid[k], grid[k + 1], low=0.02, high=0.98) for k in range(4)]
    assert parts == [(0.9, 0.98), (0.75, 0.9), (0.5, 0.75), (0.02, 0.5)]


# --- the GAN of DMD2 ------------------------------------------------------------------------------


def test_best_discriminator_is_the_log_ratio_of_the_densities() -> None:
    """Two Gaussians on the line, re-noised: their log ratio is quadratic, and so is the logit.

    Newton's method on the exact expected loss, by quadrature.
    """
    t = 0.3
    real, fake = (gaussian(float64([m]), float64([[r]])) for m, r in ((0.5, 0.6), (-0.3, 0.9)))
    nodes, share = normal_line(201)

    def noised(m: float, r: float) -> Tensor:
        return (1 - t) * m + ((1 - t) ** 2 * r**2 + t**2) ** 0.5 * nodes

    points = [noised(0.5, 0.6), noised(-0.3, 0.9)]

    def loss(theta: Tensor) -> Tensor:
        on_real, on_fake = (theta[0] + theta[1] * x + theta[2] * x**2 for x in points)
        # the loss is a plain mean: a draw with weight w is len(x) w draws
        sign = torch.cat([-on_real, on_fake])
        return (F.softplus(sign) * torch.cat([share, share])).sum()

    theta = torch.zeros(3, dtype=torch.float64)
    for _ in range(30):
        slope = torch.autograd.functional.jacobian(loss, theta)
        bend = torch.autograd.functional.hessian(loss, theta)
        assert isinstance(slope, Tensor) and isinstance(bend, Tensor)
        theta = theta - torch.linalg.solve(bend, slope)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).unsqueeze(1)
    ratio = real.log_prob(x, every(t, x)) - fake.log_prob(x, every(t, x))
    close(theta[0] + theta[1] * x[:, 0] + theta[2] * x[:, 0] ** 2, ratio, 1e-6)

    # and the code's loss is that sum, here with draws of equal weight
    logits = [theta[0] + theta[1] * x[:, 0], theta[1] + theta[2] * x[:, 0]]
    plain = F.softplus(-logits[0]).mean() + F.softplus(logits[1]).mean()
    close(discriminator_loss(logits[0], logits[1]), plain, 1e-12)


def test_generator_loss_pushes_to_where_the_discriminator_says_real() -> None:
    logits = float64([-3.0, 0.0, 3.0]).requires_grad_()
    generator_loss(logits).backward()
    assert logits.grad is not None
    close(logits.grad, -torch.sigmoid(-logits.detach()) / 3, 1e-9)
    assert logits.grad[0].abs() > logits.grad[2].abs()  # strongest where it fails: not saturating


def test_the_head_learns_to_tell_two_laws_of_tokens_apart() -> None:
    draw = generator(6)
    torch.manual_seed(0)
    head = Head(8)
    optimiser = torch.optim.Adam(head.parameters(), lr=1e-2)
    shift = torch.randn(8, generator=draw)
    for _ in range(60):
        fake = torch.randn(32, 4, 8, generator=draw)
        real = torch.randn(32, 4, 8, generator=draw) + shift
        optimiser.zero_grad()
        discriminator_loss(head(real), head(fake)).backward()
        optimiser.step()
    fresh = torch.randn(200, 4, 8, generator=draw)
    assert (head(fresh) < 0).float().mean() > 0.9
    assert (head(fresh + shift) > 0).float().mean() > 0.9


def test_a_mixture_is_the_fixed_point_of_the_state_objective() -> None:
    """With the student's state distributed as the teacher's at s, fake and real agree: no push."""
    world, s, tau = on_the_line(), 0.5, 0.7
    x_0 = world.draw(2000, generator(7))
    eps, xi = torch.randn(2, 2000, 1, generator=generator(8), dtype=torch.float64)
    x_s = add_noise(x_0, eps, every(s, x_0))
    x_tau = diffuse(x_s, xi, s, every(tau, x_s))
    drawn = world.draw(2000, generator(9))
    other = add_noise(
        drawn, torch.randn(2000, 1, generator=generator(10)).double(), every(tau, x_s)
    )
    ranks = torch.searchsorted(other[:, 0].sort().values, x_tau[:, 0].sort().values)
    uniform = torch.arange(2000) + 0.5
    assert (ranks - uniform).abs().max() / 2000 < 1.95 * (2 / 2000) ** 0.5  # two-sample KS, 0.1 %
