"""A Gaussian mixture on the linear path: density, score and posterior mean in closed form, float64.

    x_0 ~ sum_i w_i N(m_i, S_i),  x_t = (1 - t) x_0 + t eps
    p(x_t) = sum_i w_i N(x_t; (1 - t) m_i, C_i),   C_i = (1 - t)^2 S_i + t^2 I

Nothing here uses `fewstep.core.process`, so that agreement with it means something.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.types import Condition
from fewstep.models.lab import LabCondition


@dataclass(frozen=True)
class GaussianMixture:
    """weights [m], means [m, d], covariances [m, d, d]. Called, it is a `Denoiser`."""

    weights: Tensor
    means: Tensor
    covariances: Tensor

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition, /) -> Tensor:
        return self.denoised(x_t.double(), t.double()).to(x_t.dtype)

    def log_prob(self, x_t: Tensor, t: Tensor) -> Tensor:
        """log p(x_t) [b]."""
        return self._log_joint(x_t, t).logsumexp(1)

    def score(self, x_t: Tensor, t: Tensor) -> Tensor:
        """grad log p = - sum_i r_i C_i^-1 (x_t - (1 - t) m_i), r_i = p(i | x_t)."""
        return -(self._shares(x_t, t) * self._whitened(x_t, t)).sum(1)

    def denoised(self, x_t: Tensor, t: Tensor) -> Tensor:
        """E[x_0 | x_t] = sum_i r_i (m_i + (1 - t) S_i C_i^-1 (x_t - (1 - t) m_i))."""
        keep = (1 - t).view(-1, 1, 1)
        pulled = (self.covariances @ self._whitened(x_t, t).unsqueeze(-1)).squeeze(-1)
        return (self._shares(x_t, t) * (self.means + keep * pulled)).sum(1)

    def cdf(self, x_0: Tensor) -> Tensor:
        """P(X_0 <= x_0) for d = 1; x_0 is [b, 1], the result [b]."""
        z = (x_0 - self.means[:, 0]) / self.covariances[:, 0, 0].sqrt()
        return (self.weights * torch.special.ndtr(z)).sum(1)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """x_0 [count, d]."""
        which = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        z = torch.randn(count, self.means.shape[1], generator=generator, dtype=torch.float64)
        root = torch.linalg.cholesky(self.covariances)[which]
        return self.means[which] + (root @ z.unsqueeze(-1)).squeeze(-1)

    def _noisy(self, t: Tensor) -> Tensor:
        keep, noise = (1 - t).view(-1, 1, 1, 1), t.view(-1, 1, 1, 1)
        identity = torch.eye(self.means.shape[1], dtype=torch.float64)
        return keep**2 * self.covariances + noise**2 * identity

    def _centred(self, x_t: Tensor, t: Tensor) -> Tensor:
        return x_t.unsqueeze(1) - (1 - t).view(-1, 1, 1) * self.means

    def _whitened(self, x_t: Tensor, t: Tensor) -> Tensor:
        """C_i^-1 (x_t - (1 - t) m_i) [b, m, d]."""
        return torch.linalg.solve(self._noisy(t), self._centred(x_t, t))

    def _log_joint(self, x_t: Tensor, t: Tensor) -> Tensor:
        squared = (self._centred(x_t, t) * self._whitened(x_t, t)).sum(2)
        volume = torch.logdet(2 * math.pi * self._noisy(t))
        return self.weights.log() - 0.5 * (squared + volume)

    def _shares(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self._log_joint(x_t, t).softmax(1).unsqueeze(-1)


def gaussian(mean: Tensor, root: Tensor) -> GaussianMixture:
    """N(mean, root root^T) as a mixture of one."""
    one = torch.ones(1, dtype=torch.float64)
    return GaussianMixture(one, mean.unsqueeze(0), (root @ root.mT).unsqueeze(0))


def gaussian_kl(q: GaussianMixture, p: GaussianMixture, t: float) -> Tensor:
    """KL(q_t || p_t) of two Gaussians, each diffused to time t."""
    identity = torch.eye(q.means.shape[1], dtype=torch.float64)
    q_cov, p_cov = ((1 - t) ** 2 * m.covariances[0] + t**2 * identity for m in (q, p))
    apart = (1 - t) * (q.means[0] - p.means[0])
    trace = torch.linalg.solve(p_cov, q_cov).trace()
    squared = apart @ torch.linalg.solve(p_cov, apart)
    return 0.5 * (trace + squared - len(apart) + p_cov.logdet() - q_cov.logdet())


def on_the_line() -> GaussianMixture:
    """Three unequal modes in one dimension."""
    return GaussianMixture(
        float64([0.5, 0.2, 0.3]),
        float64([[-1.5], [0.2], [1.1]]),
        float64([[[0.25]], [[0.09]], [[0.16]]]),
    )


def in_the_plane() -> GaussianMixture:
    """Three correlated modes in two dimensions."""
    return GaussianMixture(
        float64([0.5, 0.2, 0.3]),
        float64([[-1.0, 0.5], [1.2, 0.3], [0.1, -1.4]]),
        float64([[[0.3, 0.1], [0.1, 0.2]], [[0.1, -0.05], [-0.05, 0.4]], [[0.2, 0.0], [0.0, 0.1]]]),
    )


def float64(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def every(t: float, like: Tensor) -> Tensor:
    """The time t for each sample of `like`, in float64."""
    return torch.full((len(like),), t, dtype=torch.float64)


def no_condition(count: int) -> LabCondition:
    return LabCondition(
        torch.zeros(count, 0, dtype=torch.int64), torch.zeros(count, 0, dtype=torch.bool)
    )


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sign_cube(dimensions: int) -> Tensor:
    """All corners of {-1, 1}^d: their plain mean is E f(z), z ~ N(0, I), for f of degree <= 3."""
    return torch.cartesian_prod(*[float64([-1.0, 1.0])] * dimensions).view(-1, dimensions)


def normal_line(points: int, *, reach: float = 9.0) -> tuple[Tensor, Tensor]:
    """Nodes and weights of E f(z), z ~ N(0, 1), by the trapezoidal rule (spectral for smooth f)."""
    z = torch.linspace(-reach, reach, points, dtype=torch.float64)
    weight = (-0.5 * z**2).exp()
    return z, weight / weight.sum()
