"""The exact mixture itself, against quadrature, numerical differentiation and Monte-Carlo."""

import math

import pytest
import torch

from .exact import GaussianMixture, every, float64, generator, in_the_plane, on_the_line

TIMES = (0.15, 0.5, 0.9)


@pytest.mark.parametrize("t", TIMES)
def test_density_and_posterior_mean_equal_their_integrals(t: float) -> None:
    """p(x_t) = int p(x_0) N(x_t; (1 - t) x_0, t^2) dx_0 and D = int x_0 ... dx_0 / p(x_t)."""
    mixture = on_the_line()
    x_t = torch.linspace(-3, 3, 25, dtype=torch.float64).unsqueeze(1)
    x_0 = torch.linspace(-9, 9, 20_001, dtype=torch.float64)
    width = float(x_0[1] - x_0[0])
    modes = torch.distributions.Normal(mixture.means[:, 0], mixture.covariances[:, 0, 0].sqrt())
    prior = (mixture.weights * modes.log_prob(x_0.unsqueeze(1)).exp()).sum(1)
    likelihood = (-0.5 * ((x_t - (1 - t) * x_0) / t) ** 2).exp() / (t * math.sqrt(2 * math.pi))
    density = (prior * likelihood).sum(1) * width
    mean = (x_0 * prior * likelihood).sum(1) * width / density

    times = every(t, x_t)
    torch.testing.assert_close(mixture.log_prob(x_t, times).exp(), density, rtol=1e-11, atol=0)
    torch.testing.assert_close(
        mixture.denoised(x_t, times).squeeze(1), mean, rtol=1e-11, atol=1e-11
    )


@pytest.mark.parametrize("t", TIMES)
def test_density_integrates_to_one_in_the_plane(t: float) -> None:
    side = torch.linspace(-7, 7, 211, dtype=torch.float64)
    x_t = torch.cartesian_prod(side, side)
    mass = in_the_plane().log_prob(x_t, every(t, x_t)).exp().sum() * (side[1] - side[0]) ** 2
    assert mass.item() == pytest.approx(1, abs=1e-10)


@pytest.mark.parametrize("t", (0.0, *TIMES, 1.0))
def test_score_is_the_gradient_of_log_density(t: float) -> None:
    """Central differences, step 1e-5."""
    mixture, h = in_the_plane(), 1e-5
    x_t = 1.5 * torch.randn(40, 2, generator=generator(0), dtype=torch.float64)
    times = every(t, x_t)
    columns = [
        (mixture.log_prob(x_t + h * e, times) - mixture.log_prob(x_t - h * e, times)) / (2 * h)
        for e in torch.eye(2, dtype=torch.float64)
    ]
    numeric = torch.stack(columns, 1)
    torch.testing.assert_close(mixture.score(x_t, times), numeric, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("t", (0.4, 0.8))
def test_posterior_mean_equals_monte_carlo(t: float) -> None:
    """Draws of x_0 weighted by N(x_t; (1 - t) x_0, t^2 I); within 5 standard errors."""
    mixture = in_the_plane()
    x_0 = mixture.draw(400_000, generator(1))
    for point in ([0.3, -0.2], [-0.8, 0.6], [0.0, -1.0]):
        x_t = float64([point])
        weight = (-0.5 * ((x_t - (1 - t) * x_0) / t).square().sum(1)).exp()
        share = (weight / weight.sum()).unsqueeze(1)
        mean = (share * x_0).sum(0)
        error = (share * (x_0 - mean)).square().sum(0).sqrt()
        exact = mixture.denoised(x_t, every(t, x_t))[0]
        assert ((exact - mean).abs() < 5 * error).all(), (exact, mean, error)
        assert (error < 0.01).all(), "the bound above is only worth something if it is tight"


def test_ends_of_the_path() -> None:
    """At t = 1 nothing is known, so D is the mean of the data; at t = 0 D is the identity."""
    mixture = in_the_plane()
    x = torch.randn(10, 2, generator=generator(2), dtype=torch.float64)
    mean = (mixture.weights @ mixture.means).expand_as(x)
    torch.testing.assert_close(mixture.denoised(x, every(1.0, x)), mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(mixture.denoised(x, every(0.0, x)), x, rtol=0, atol=1e-12)


def test_each_sample_has_its_own_time() -> None:
    mixture: GaussianMixture = in_the_plane()
    x = torch.randn(3, 2, generator=generator(3), dtype=torch.float64)
    together = mixture.denoised(x, float64([0.1, 0.5, 0.9]))
    alone = [mixture.denoised(x[i : i + 1], float64([t])) for i, t in enumerate((0.1, 0.5, 0.9))]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-14, atol=1e-14)
