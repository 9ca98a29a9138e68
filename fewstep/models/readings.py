"""A batch of conditions of real models, as each role reads them, whatever their layouts.

The student reads a prompt as it is; a teacher may read it within its own template, and guide away
from its own negative prompt. The networks take one layout a call (`FamilyCondition.layout`), so a
batch that mixes layouts is answered layout by layout.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.models.families.contract import FamilyCondition, stack

Answer = Callable[[Tensor, Tensor, FamilyCondition], Tensor]
"""(x_t, t, cond) -> v, or hidden tokens, of one layout."""


@dataclass(frozen=True)
class Readings:
    """A `core.types.Condition`: for each sample what each reader sees, one sample at a time."""

    rows: tuple[Mapping[str, FamilyCondition], ...]
    """By reader. Readers that see the same share an object."""

    @property
    def device(self) -> torch.device:
        return next(iter(self.rows[0].values())).device

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: slice | Tensor) -> "Readings":
        if isinstance(index, slice):
            return Readings(self.rows[index])
        places = index.nonzero().flatten() if index.dtype == torch.bool else index
        return Readings(tuple(self.rows[i] for i in places.tolist()))

    def without_text(self) -> "Readings":
        """For readers that have a negative prompt; the others are left out."""
        return Readings(
            tuple(
                {who: c.without_text() for who, c in row.items() if c.negative is not None}
                for row in self.rows
            )
        )

    def to(self, device: torch.device) -> "Readings":
        return Readings(tuple(_moved(row, device) for row in self.rows))

    def seen_by(self, reader: str) -> Iterator[tuple[list[int], FamilyCondition]]:
        """Places in the batch and the condition there, once for each layout."""
        groups: dict[Hashable, list[int]] = {}
        for i, row in enumerate(self.rows):
            groups.setdefault(row[reader].layout, []).append(i)
        for places in groups.values():
            yield places, stack([self.rows[i][reader] for i in places])


def answer_all(
    answer: Answer,
    x_t: Tensor,
    t: Tensor,
    cond: Readings,
    reader: str,
    *,
    calls: Callable[[int], int] = int,
) -> Tensor:
    """[b, ...] in float32, in the order of the batch.

    `calls` says of the number of layouts how often to call, at least as often. What comes on top
    is thrown away; in a backward pass it takes part with gradient 0.
    """
    assert len(x_t) == len(t) == len(cond)
    groups = list(cond.seen_by(reader))
    order = [place for places, _ in groups for place in places]
    groups += [groups[0]] * (calls(len(groups)) - len(groups))
    parts = [answer(x_t[places], t[places], part).float() for places, part in groups]
    back = torch.tensor(order, device=x_t.device).argsort()
    return torch.cat(parts)[back]


def readings_of(conditions: Sequence[Mapping[str, FamilyCondition]]) -> Readings:
    """One batch of single samples."""
    assert all(len(c) == 1 for row in conditions for c in row.values())
    return Readings(tuple(conditions))


def _moved(
    row: Mapping[str, FamilyCondition], device: torch.device
) -> Mapping[str, FamilyCondition]:
    """What readers share is moved once."""
    moved = {id(cond): cond.to(device) for cond in row.values()}
    return {who: moved[id(cond)] for who, cond in row.items()}
