"""The decoder's second training: where a walk arrives, and what is left as it is."""

import numpy as np
import torch
from torch import Tensor

from fewstep.lab import train_autoencoder
from fewstep.lab.pools import encode_images, load_autoencoder, to_pixels
from fewstep.lab.refine_decoder import Examples, refine, walk_back
from fewstep.lab.train_autoencoder import training_images
from fewstep.models.autoencoder import Autoencoder
from fewstep.models.lab import LabCondition

UNSAID = LabCondition(torch.zeros(3, 2, dtype=torch.long), torch.ones(3, 2, dtype=torch.bool))


def test_a_walk_back_arrives_where_an_exact_teacher_points() -> None:
    generator = torch.Generator().manual_seed(0)
    x_0, eps = (torch.randn(3, 16, 8, 8, generator=generator) for _ in range(2))
    seen = []

    def exact(x_t: Tensor, t: Tensor, cond: LabCondition) -> Tensor:
        seen.append(t[0].item())
        line = (1 - t[:, None, None, None]) * x_0 + t[:, None, None, None] * eps
        assert torch.allclose(x_t, line, atol=1e-5)
        return x_0

    assert torch.allclose(walk_back(exact, x_0, UNSAID, 0.5, eps), x_0, atol=1e-5)
    assert np.allclose(sorted(set(seen), reverse=True), [0.5, 0.4, 0.3, 0.2, 0.1])


def test_refining_mends_what_arrived_and_leaves_the_encoder(monkeypatch) -> None:
    monkeypatch.setattr(train_autoencoder, "AVERAGING", 1.0)  # few updates: the newest weights
    model = load_autoencoder().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    images = training_images(64, 3)
    true = encode_images(model, images)
    noise = torch.randn(true.shape, generator=torch.Generator().manual_seed(1))
    examples = Examples(images, true, (true.float() + 0.5 * noise).half())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    error = errors(model, examples)
    refined = refine(model, examples, 12, 0).state_dict()
    assert errors(model, examples) < 0.97 * error
    for name, value in before.items():
        assert name.startswith("decoder.") or torch.equal(value, refined[name]), name


@torch.inference_mode()
def errors(model: Autoencoder, examples: Examples) -> float:
    """Mean squared error of what is drawn from where the walks arrived."""
    drawn = model.decode(examples.arrived.float())
    return (drawn - to_pixels(examples.images)).square().mean().item()
