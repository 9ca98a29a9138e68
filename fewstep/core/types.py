"""What algorithms know of models and data: a denoiser, a condition, a batch."""

from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Task = Literal["t2i", "edit"]


@dataclass(frozen=True)
class Condition:
    """What an image is conditioned on: text, and for editing a source image.

    `text` is token ids [b, l] (lab) or encoder states [b, l, d]; `text_mask` [b, l] is true where
    text is real; `source` [b, c, h, w] lies in the model's own space, or is None for text-to-image.
    """

    text: Tensor
    text_mask: Bool[Tensor, "b l"]
    source: Float[Tensor, "b c h w"] | None = None

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, index: slice | Tensor) -> "Condition":
        source = None if self.source is None else self.source[index]
        return Condition(self.text[index], self.text_mask[index], source)

    def without_text(self) -> "Condition":
        """The unconditional branch of classifier-free guidance: text dropped, source kept."""
        return replace(self, text=self.text[:, :0], text_mask=self.text_mask[:, :0])

    def to(self, device: torch.device) -> "Condition":
        source = None if self.source is None else self.source.to(device)
        return Condition(self.text.to(device), self.text_mask.to(device), source)


@runtime_checkable
class Denoiser(Protocol):
    """D(x_t, t, condition) -> x_0, the posterior mean of the clean image; t is [b] in float32."""

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition, /) -> Tensor: ...


@dataclass(frozen=True)
class Batch:
    """One micro-batch: a single task, a category for each sample, and their conditions."""

    task: Task
    categories: tuple[str, ...]
    cond: Condition
    shape: tuple[int, ...]  # of one sample's state, without the batch axis

    def __len__(self) -> int:
        return len(self.categories)
