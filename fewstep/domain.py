"""What a run asks of the world its images come from: prompts, latents, evaluation cases, a judge.

Two worlds answer: `lab.domain` (procedural, exact truth) and `data.domain` (a folder of images).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from fewstep.core.types import Condition, Task
from fewstep.data.pools import AnyPool, Pool

Images = np.ndarray
"""uint8 [n, h, w, 3]"""


@dataclass(frozen=True)
class Case:
    """One thing to draw and judge. `seed` makes the starting noise, the same for every model."""

    id: str
    task: Task
    category: str
    prompt: str
    seed: int
    truth: object
    source: np.ndarray | None = None
    target: np.ndarray | None = None


@dataclass(frozen=True)
class Verdict:
    """A judge's word on one image: 1-5, sub-scores, reasons; `unscored` says why it has none."""

    score: float | None
    subscores: dict[str, float]
    reasons: tuple[str, ...]
    unscored: str = ""
    judgements: tuple[float, ...] = ()
    """The single scores, where a judge was asked several times and `score` is their mean."""


@dataclass(frozen=True)
class Question:
    """What a judge without the truth is shown of one image: all of it, and not who made it."""

    task: Task
    category: str
    prompt: str
    image: np.ndarray
    """uint8 [h, w, 3], as is `source`."""
    source: np.ndarray | None = None


@runtime_checkable
class Domain(Protocol):
    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Of one state: channels, height and width, or tokens and channels."""
        ...

    @property
    def image_size(self) -> int | None:
        """Side of an image in pixels; None where sources are taken as they are."""
        ...

    @property
    def judge_name(self) -> str: ...

    def pool(self, category: str, size: int, seed: int, *, task: Task, targets: bool) -> AnyPool:
        """Training prompts of a category; `targets` adds the latents that teachers train on."""
        ...

    def condition(self, prompts: Sequence[str], sources: Sequence[np.ndarray] | None) -> Condition:
        """`sources` are one image uint8 [h, w, 3] for each prompt."""
        ...

    def noise(self, seed: int) -> Tensor:
        """The starting noise of one image."""
        ...

    def decode(self, latents: Tensor) -> Images: ...

    def cases(
        self, task: Task, category: str, count: int, seed: int, *, evaluation: bool = True
    ) -> list[Case]: ...

    def judge(self, images: Images, cases: Sequence[Case]) -> list[Verdict]: ...


@runtime_checkable
class TeachableDomain(Domain, Protocol):
    """A world that an `MMDiT` can be trained for."""

    def text_sizes(self) -> dict[str, int]:
        """What a network needs to know of the text: vocabulary or text_width, and max_text."""
        ...

    def pool(self, category: str, size: int, seed: int, *, task: Task, targets: bool) -> Pool: ...
