"""The GAN of DMD2 (arXiv 2405.14867, section 4.3): real images against the student's, re-noised.

The discriminator is a small head on hidden features of the fake score network. DMD2 takes the
bottleneck of a UNet; a transformer has none, so the features are those of its middle block.
"""

from typing import Any, Protocol, runtime_checkable

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Logits = Float[Tensor, " b"]


@runtime_checkable
class Features(Protocol):
    """A score network that shows what it makes of an image half-way."""

    @property
    def feature_width(self) -> int: ...

    def features(self, x_t: Tensor, t: Tensor, cond: Any, /) -> Float[Tensor, "b n w"]:
        """Hidden image tokens of the middle block, with gradient to x_t and to the network."""
        ...


class Head(nn.Module):
    """Logit of 'real' from the hidden tokens of an image: a layer per token, then their mean."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.token = nn.Linear(width, width)
        self.out = nn.Linear(width, 1)

    def forward(self, tokens: Float[Tensor, "b n w"]) -> Logits:
        return self.out(F.silu(self.token(self.norm(tokens))).mean(1)).squeeze(1).float()


def discriminator_loss(real: Logits, fake: Logits) -> Float[Tensor, ""]:
    """-E log D(real) - E log (1 - D(fake)) with D the sigmoid of the logit.

    Its minimiser is the logit log p_real / p_student at each noise level.
    """
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def generator_loss(fake: Logits) -> Float[Tensor, ""]:
    """-E log D(fake), which does not saturate where the discriminator is sure."""
    return F.softplus(-fake).mean()
