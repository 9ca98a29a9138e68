"""The teacher's loss (eq. 2) and its training times, against what is known of them."""

import pytest
import torch
from torch import Tensor

from fewstep.core.process import add_noise
from fewstep.models.lab import LabCondition, MMDiT, MMDiTConfig
from fewstep.train.teach import flow_matching_loss


class Oracle(MMDiT):
    """Knows x_0 and keeps what it was asked: answers v = (x_t - x_0) / t, plus an error."""

    def __init__(self, x_0: Tensor, error: float = 0.0) -> None:
        super().__init__(MMDiTConfig(width=8, depth=1, heads=1, vocabulary=2))
        self.x_0, self.error = x_0, error
        self.asked: list[tuple[Tensor, Tensor]] = []

    def predict_v(self, x_t: Tensor, t: Tensor, cond: LabCondition) -> Tensor:
        self.asked.append((x_t, t))
        return (x_t - self.x_0) / t.view(-1, 1, 1, 1) + self.error


def loss_of(model: Oracle, x_0: Tensor, shift: float) -> float:
    generator = torch.Generator().manual_seed(3)
    no_text = torch.zeros(len(x_0), 0, dtype=torch.int64)
    cond = LabCondition(no_text, no_text.bool())
    return flow_matching_loss(model, x_0, cond, generator, shift=shift).item()


def test_loss_is_the_mean_square_of_the_velocitys_error() -> None:
    x_0 = torch.randn(64, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    assert loss_of(Oracle(x_0), x_0, 1.0) < 1e-9
    assert loss_of(Oracle(x_0, error=0.3), x_0, 2.0) == pytest.approx(0.09, rel=1e-4)


def test_times_are_logit_normal_and_shifted() -> None:
    """z ~ N(0, 1), t = sigmoid(z); the shift s adds log s to the logit of t (arXiv 2403.03206)."""
    x_0 = torch.zeros(20_000, 1, 1, 1)
    for shift in (1.0, 2.0, 3.0):
        model = Oracle(x_0)
        loss_of(model, x_0, shift)
        logits = torch.logit(model.asked[0][1].double())
        wanted = torch.log(torch.tensor(shift, dtype=torch.float64)).item()
        assert logits.mean().item() == pytest.approx(wanted, abs=0.03)
        assert logits.std().item() == pytest.approx(1.0, abs=0.03)


def test_noise_is_standard_and_mixed_at_the_time_the_model_is_told() -> None:
    x_0 = torch.full((20_000, 1, 1, 1), 2.0)
    model = Oracle(x_0)
    loss_of(model, x_0, 2.0)
    x_t, t = model.asked[0]
    eps = (x_t - add_noise(x_0, torch.zeros_like(x_0), t)) / t.view(-1, 1, 1, 1)
    assert eps.mean().item() == pytest.approx(0.0, abs=0.03)
    assert eps.std().item() == pytest.approx(1.0, abs=0.03)
