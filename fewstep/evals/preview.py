"""Sample grids while a model trains: fixed cases of the training split and fixed noise, one row a category."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewstep.core.types import Condition, Task
from fewstep.domain import Case, Domain
from fewstep.evals.grid import grid
from fewstep.evals.runner import noise_of


class Preview:
    """Cases and noise never change, so grids of different moments can be compared."""

    def __init__(
        self, domain: Domain, categories: Mapping[str, Task], per_category: int, seed: int
    ) -> None:
        self.domain = domain
        self.rows: list[tuple[list[Case], Condition, Tensor]] = []
        for category, task in categories.items():
            cases = domain.cases(task, category, per_category, seed, evaluation=False)
            self.rows.append((cases, domain.condition([c.prompt for c in cases], sources_of(cases)),
                              noise_of(cases, domain.sample_shape)))  # fmt: skip

    @torch.inference_mode()
    def draw(self, sampler: Callable[[Tensor, Condition, Task], Tensor]) -> Image.Image:
        """For edits each result stands to the right of its source."""
        lines, labels = [], []
        for cases, cond, noise in self.rows:
            images = self.domain.decode(sampler(noise, cond, cases[0].task))
            sources = sources_of(cases)
            tiles = (
                list(images)
                if sources is None
                else [t for pair in zip(sources, images, strict=True) for t in pair]
            )
            lines.append([Image.fromarray(tile) for tile in tiles[: max(len(cases), 8)]])
            labels.append(cases[0].category)
        widest = max(len(line) for line in lines)
        blank = Image.new("RGB", lines[0][0].size, "white")
        full = [line + [blank] * (widest - len(line)) for line in lines]
        return grid(
            full,
            row_labels=labels,
            column_labels=[""] * widest,
            scale=max(1, 96 // full[0][0].width),
        )


def sources_of(cases: Sequence[Case]) -> np.ndarray | None:
    found = [case.source for case in cases if case.source is not None]
    return np.stack(found) if found else None
