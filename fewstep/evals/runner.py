"""Draw every case with every contestant, judge it and log a row: interrupted work is kept and skipped next time."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewstep.core.types import Condition, Task
from fewstep.domain import Case, Domain, Verdict
from fewstep.evals.rows import Row, RowKey, RowWriter


@dataclass(frozen=True)
class Contestant:
    """A model with its way of sampling: (noise, condition, task) -> latents."""

    name: str
    nfe: Mapping[Task, int]
    draw: Callable[[Tensor, Condition, Task], Tensor]


def noise_of(cases: Sequence[Case], shape: tuple[int, ...]) -> Tensor:
    """The starting noise of each case, from its own seed, so that batches do not matter."""
    return torch.stack(
        [torch.randn(shape, generator=torch.Generator().manual_seed(case.seed)) for case in cases]
    )


def evaluate(
    cases: Sequence[Case],
    contestants: Sequence[Contestant],
    domain: Domain,
    out: Path,
    *,
    batch: int = 32,
    on_progress: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> None:
    """Fill `out/rows.jsonl` and `out/images/`; rows that are already scored are not drawn again."""
    total, done = len(cases) * len(contestants), 0
    with RowWriter(out / "rows.jsonl") as rows:
        for contestant in contestants:
            for group in _groups(cases, batch):
                left = [c for c in group if not rows.is_scored(_key(contestant, c, domain))]
                if left:
                    _draw_and_judge(left, contestant, domain, out, rows)
                done += len(group)
                on_progress(done, total, contestant.name)


def _groups(cases: Sequence[Case], batch: int) -> list[list[Case]]:
    """Batches of one task each."""
    groups: list[list[Case]] = []
    for task in dict.fromkeys(case.task for case in cases):
        same = [case for case in cases if case.task == task]
        groups += [same[i : i + batch] for i in range(0, len(same), batch)]
    return groups


def _key(contestant: Contestant, case: Case, domain: Domain) -> RowKey:
    return RowKey(contestant.name, case.id, case.seed, domain.judge_name)


def _draw_and_judge(
    cases: list[Case], contestant: Contestant, domain: Domain, out: Path, rows: RowWriter
) -> None:
    sources = (
        None
        if cases[0].source is None
        else np.stack([c.source for c in cases if c.source is not None])
    )
    cond = domain.condition([case.prompt for case in cases], sources)
    noise = noise_of(cases, domain.sample_shape)
    begun = time.perf_counter()
    latents = contestant.draw(noise, cond, cases[0].task)
    seconds = (time.perf_counter() - begun) / len(cases)
    images = domain.decode(latents)
    verdicts = domain.judge(images, cases)
    for case, image, verdict in zip(cases, images, verdicts, strict=True):
        rows.write(_row(case, image, verdict, contestant, domain, seconds, out))


def _row(
    case: Case,
    image: np.ndarray,
    verdict: Verdict,
    contestant: Contestant,
    domain: Domain,
    seconds: float,
    out: Path,
) -> Row:
    return Row(
        model=contestant.name,
        nfe=contestant.nfe[case.task],
        task=case.task,
        category=case.category,
        case=case.id,
        prompt=case.prompt,
        seed=case.seed,
        image=_save(image, out, f"{contestant.name}/{case.id}-{case.seed}"),
        source=None if case.source is None else _save(case.source, out, f"source/{case.id}"),
        target=None if case.target is None else _save(case.target, out, f"target/{case.id}"),
        score=verdict.score,
        subscores=verdict.subscores,
        reasons=verdict.reasons,
        status=f"unscored: {verdict.unscored}" if verdict.score is None else "ok",
        seconds=seconds,
        judge=domain.judge_name,
    )


def _save(image: np.ndarray, out: Path, name: str) -> str:
    path = out / "images" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return str(path.relative_to(out))
