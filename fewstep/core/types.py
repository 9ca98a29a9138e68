"""What algorithms know of models and data: a denoiser, a condition, a batch."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

Task = Literal["t2i", "edit"]


@runtime_checkable
class Condition(Protocol):
    """What each image of a batch is conditioned on: text, and for editing the source images.

    What is inside is between the data that makes conditions and the models that read them:
    `models.lab.LabCondition`, `models.families.contract.FamilyCondition` and `models.readings`.
    """

    @property
    def device(self) -> torch.device: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: slice | Tensor, /) -> "Condition":
        """Samples by slice, or by an index tensor of any device."""
        ...

    def without_text(self) -> "Condition":
        """The unconditional branch of classifier-free guidance: text dropped, sources kept."""
        ...

    def to(self, device: torch.device, /) -> "Condition": ...


@runtime_checkable
class Denoiser(Protocol):
    """D(x_t, t, condition) -> x_0, the posterior mean of the clean image; t is [b] in float32.

    `cond` is the kind of `Condition` that the denoiser was made for.
    """

    def __call__(self, x_t: Tensor, t: Tensor, cond: Any, /) -> Tensor: ...


@runtime_checkable
class GuidedDenoiser(Protocol):
    """A denoiser that brings its own rule of guidance, which is part of what it says."""

    def __call__(self, x_t: Tensor, t: Tensor, cond: Any, /) -> Tensor: ...

    def guided(self, x_t: Tensor, t: Tensor, cond: Any, scale: float, /) -> Tensor:
        """x_0 under guidance of scale s; 1 is none and costs one evaluation."""
        ...


Rows = TypeVar("Rows", Tensor, tuple[str, ...], list[int])


class Share(NamedTuple):
    """Part `part` of `of` equal parts of a micro-batch: what one of several devices has of it."""

    part: int = 0
    of: int = 1

    def take(self, rows: Rows) -> Rows:
        """Its own of all devices' rows."""
        own = len(rows) // self.of
        return rows[self.part * own : (self.part + 1) * own]


@dataclass(frozen=True)
class Batch:
    """One micro-batch: a single task, a category for each sample, and their conditions."""

    task: Task
    categories: tuple[str, ...]
    cond: Condition
    shape: tuple[int, ...]  # of one sample's state, without the batch axis
    share: Share = field(default=Share(), kw_only=True)
    """What this is of the micro-batch of all devices; noise is drawn for all of it."""
    company: tuple[str, ...] = field(default=(), kw_only=True)
    """Categories of all devices' samples, where networks are split over the devices and answer all
    of them at the same time: what one device asks, the others ask too."""
    anywhere: Callable[[bool], bool] = field(default=bool, kw_only=True)
    """Whether something is so on one of these devices; here alone, where none waits for another."""

    def __len__(self) -> int:
        return len(self.categories)
