"""Sample grids while a model trains: one row a category, always the same cases and noise."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewstep.core.types import Condition, Task
from fewstep.domain import Case, Domain
from fewstep.evals.grid import grid
from fewstep.evals.runner import Draw, batches, noise_of, sources_of

Part = tuple[Tensor, Condition]
"""Noise and conditions of what is drawn at once."""


class Preview:
    """Cases and noise never change, so grids of different moments can be compared."""

    def __init__(
        self,
        domain: Domain,
        conditions: Sequence[tuple[Task, str]],
        per_category: int,
        *,
        seed: int,
        batch: int,
    ) -> None:
        self.domain = domain
        self.rows: list[tuple[list[Case], list[Part]]] = []
        for task, category in conditions:
            cases = domain.cases(task, category, per_category, seed, evaluation=False)
            self.rows.append((cases, [self._prepared(part) for part in batches(cases, batch)]))

    def _prepared(self, cases: Sequence[Case]) -> Part:
        cond = self.domain.condition([case.prompt for case in cases], sources_of(cases))
        return noise_of(cases, self.domain), cond

    @torch.inference_mode()
    def draw(self, sampler: Draw) -> Image.Image:
        """For edits each result stands to the right of its source."""
        lines, labels = [], []
        for cases, parts in self.rows:
            drawn = [self.domain.decode(sampler(*part, cases[0].task)) for part in parts]
            images = np.concatenate(drawn)
            sources = sources_of(cases)
            tiles = (
                list(images)
                if sources is None
                else [t for pair in zip(sources, images, strict=True) for t in pair]
            )
            size = Image.fromarray(images[0]).size
            shown = [Image.fromarray(tile) for tile in tiles[: max(len(cases), 8)]]
            lines.append([tile if tile.size == size else tile.resize(size) for tile in shown])
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
