"""The lab as a domain: cases of the procedural world, latents of its autoencoder, the oracle."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Final, cast

import numpy as np
import torch
from torch import Tensor

from fewstep.core.types import Task
from fewstep.data.pools import Pool, pad_tokens
from fewstep.domain import Case, Images, Verdict
from fewstep.errors import DataError
from fewstep.lab import grammar
from fewstep.lab.edits import Edit
from fewstep.lab.pools import draw_case, encode_images, load_autoencoder, make_pool, to_images
from fewstep.lab.world import SIZE, render
from fewstep.models.lab import LabCondition

MAX_TEXT: Final = 24
"""Tokens of a prompt, more than any caption or instruction of the grammar has."""


class LabDomain:
    def __init__(self) -> None:
        self.autoencoder = load_autoencoder()

    @cached_property
    def oracle(self) -> Any:
        from fewstep.lab.oracle import load_oracle

        return load_oracle()

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return (16, 8, 8)

    @property
    def image_size(self) -> int:
        return SIZE

    def text_sizes(self) -> dict[str, int]:
        return {"vocabulary": len(grammar.vocabulary()) + 1, "max_text": MAX_TEXT}

    @property
    def judge_name(self) -> str:
        return self.oracle.name

    def pool(self, category: str, size: int, seed: int, *, task: Task, targets: bool) -> Pool:
        pool = make_pool(category, size, seed, self.autoencoder, targets=targets)
        assert pool.task == task, (category, task)
        return pool

    def condition(
        self, prompts: Sequence[str], sources: Sequence[np.ndarray] | None
    ) -> LabCondition:
        tokens = [grammar.encode(prompt) for prompt in prompts]
        for prompt, row in zip(prompts, tokens, strict=True):
            if len(row) > MAX_TEXT:
                raise DataError(
                    f"prompt {prompt!r}: {len(row)} words, commas and letters of signs; the lab's "
                    f"teachers read {MAX_TEXT} of them"
                )
        text, lengths = pad_tokens(tokens)
        mask = torch.arange(text.shape[1]) < lengths[:, None]
        latents = (
            None if sources is None else encode_images(self.autoencoder, np.stack(sources)).float()
        )
        return LabCondition(text, mask, latents)

    def noise(self, seed: int) -> Tensor:
        return torch.randn(self.sample_shape, generator=torch.Generator().manual_seed(seed))

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Images:
        with torch.autocast("cpu", torch.bfloat16):
            return to_images(self.autoencoder.decode(latents.float().cpu()))

    def cases(
        self, task: Task, category: str, count: int, seed: int, *, evaluation: bool = True
    ) -> list[Case]:
        """`count` cases of a category; case i is the same whatever `count` is."""
        rng = np.random.default_rng([seed, sum(category.encode())])
        found = []
        for i in range(count):
            truth, phrase = draw_case(category, rng, evaluation=evaluation)
            source, target = truth.images() if isinstance(truth, Edit) else (None, render(truth))
            found.append(
                Case(
                    f"{task}-{category}-{i:04d}",
                    task,
                    category,
                    phrase.text,
                    seed + i,
                    (truth, phrase.says),
                    source,
                    target if task == "edit" else None,
                )
            )
        return found

    def judge(self, images: Images, cases: Sequence[Case]) -> list[Verdict]:
        """Cases of one task."""
        pairs = [cast(tuple[Any, tuple[str, ...]], case.truth) for case in cases]
        truths, says = zip(*pairs, strict=True)
        if cases[0].task == "edit":
            found = self.oracle.judge_edit(images, list(truths))
        else:
            found = self.oracle.judge_t2i(images, list(truths), list(says))
        return [Verdict(j.score, dict(j.subscores), tuple(j.reasons)) for j in found]
