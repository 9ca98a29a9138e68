"""A pool: the prompts of one category as conditions, with source and target latents if any."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from fewstep.core.types import Condition, Task
from fewstep.models.lab import LabCondition


@runtime_checkable
class AnyPool(Protocol):
    """n conditions of one task and category."""

    @property
    def task(self) -> Task: ...

    @property
    def category(self) -> str: ...

    def __len__(self) -> int: ...

    def gather(
        self, pools: Sequence[Any], indices: Sequence[int], /
    ) -> tuple[Condition, Tensor | None]:
        """The condition of sample i of each (pool, index), and the targets if all have one.

        All are of one task and of this pool's kind.
        """
        ...


@dataclass(frozen=True)
class Pool:
    """n conditions of one task and category, in memory.

    `text` is token ids [n, l] or states [n, l, d] padded on the right, `lengths` [n] the real
    lengths. `source` (edits) and `target` (teacher training) are latents [n, c, h, w] in float16.
    """

    task: Task
    category: str
    prompts: tuple[str, ...]
    text: Tensor
    lengths: Tensor
    source: Tensor | None = None
    target: Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def gather(
        self, pools: "Sequence[Pool]", indices: Sequence[int], /
    ) -> tuple[LabCondition, Tensor | None]:
        return gather(list(pools), list(indices))


def pad_tokens(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Token ids as one int64 tensor padded with 0, and their lengths."""
    lengths = torch.tensor([len(row) for row in rows])
    text = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for i, row in enumerate(rows):
        text[i, : len(row)] = torch.tensor(row)
    return text, lengths


def gather(pools: list[Pool], indices: list[int]) -> tuple[LabCondition, Tensor | None]:
    """The condition of sample i of each (pool, index), and the targets if all have one.

    Text is trimmed to the longest one.
    All pools must be of one task: a micro-batch has either sources everywhere or nowhere.
    """
    lengths = torch.stack([p.lengths[i] for p, i in zip(pools, indices, strict=True)])
    longest = int(lengths.max())
    text = torch.stack([_fit(p.text[i], longest) for p, i in zip(pools, indices, strict=True)])
    mask = torch.arange(longest) < lengths[:, None]
    condition = LabCondition(text, mask, _stack([p.source for p in pools], indices))
    return condition, _stack([p.target for p in pools], indices)


def _fit(row: Tensor, length: int) -> Tensor:
    if len(row) >= length:
        return row[:length]
    return torch.cat([row, row.new_zeros(length - len(row), *row.shape[1:])])


def _stack(columns: list[Tensor | None], indices: list[int]) -> Tensor | None:
    rows = [column[i] for column, i in zip(columns, indices, strict=True) if column is not None]
    if not rows:
        return None
    assert len(rows) == len(indices), "pools with and without images in one batch"
    return torch.stack(rows).float()
