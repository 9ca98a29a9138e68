"""Draw every case with every contestant, judge it, log a row; what is logged is not done again."""

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewstep.core.types import Condition, Task
from fewstep.domain import Case, Domain, Verdict
from fewstep.evals.pictures import content_of, read_picture
from fewstep.evals.rows import PENDING, Item, Row, RowKey, RowWriter, read_rows

Draw = Callable[[Tensor, Condition, Task], Tensor]
"""A way of sampling: (noise, condition, task) -> latents."""


@dataclass(frozen=True)
class Contestant:
    """A model with its way of sampling."""

    name: str
    nfe: Mapping[Task, int]
    draw: Draw
    stamp: str
    """Changes with the weights and the way of sampling."""


def noise_of(cases: Sequence[Case], domain: Domain) -> Tensor:
    """The starting noise of each case, from its own seed, so that batches do not matter."""
    return torch.stack([domain.noise(case.seed) for case in cases])


def sources_of(cases: Sequence[Case]) -> list[np.ndarray] | None:
    return [case.source for case in cases if case.source is not None] or None


def evaluate(
    cases: Sequence[Case],
    contestants: Sequence[Contestant],
    domain: Domain,
    out: Path,
    *,
    batch: int,
    judged_later: str | None = None,
    on_progress: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> None:
    """Fill `out/rows.jsonl` and `out/images/`; rows that are already scored are not drawn again.

    A contestant is asked for the tasks that its `nfe` names. With `judged_later`, the name of a
    judge, images are drawn alone: their rows wait for `judging.judge_drawn`, and an image that any
    judge has a row for is not drawn again. Rows count as they are found: `forget_changed` clears
    those that do not hold any more. Progress counts function evaluations, of which a teacher needs
    many more for an image than a student.
    """
    work = [(c, [case for case in cases if case.task in c.nfe]) for c in contestants]
    total, done = sum(c.nfe[case.task] for c, own in work for case in own), 0
    with RowWriter(out / "rows.jsonl") as rows:
        for contestant, own in work:
            for group in batches(own, batch):
                if judged_later is None:
                    left = [c for c in group if not rows.scored(_key(contestant, c, domain))]
                else:
                    left = [c for c in group if _item(contestant, c) not in rows.drawn]
                if left:
                    _draw_and_judge(left, contestant, domain, out, rows, judged_later)
                done += sum(contestant.nfe[case.task] for case in group)
                on_progress(done, total, contestant.name)


def forget_changed(
    contestants: Sequence[Contestant],
    cases: Sequence[Case],
    out: Path,
    *,
    judged_later: str | None = None,
) -> list[str]:
    """Clear the rows that do not hold any more; in words, whose and why.

    Rows carry a contestant's name and a case's id alone. `out/stamps.json` says which weights stood
    behind a name, so that a student trained anew in the same folder is not judged by its
    predecessor's images; `content` says what was judged, so that a prompt, a source or an image
    that is another one since is drawn and judged anew.
    """
    stamps, rows = out / "stamps.json", out / "rows.jsonl"
    known = json.loads(stamps.read_text()) if stamps.exists() else {}
    changed = {c.name for c in contestants if known.get(c.name) != c.stamp}
    asked = {_item(c, case): case for c in contestants for case in cases}
    logged = read_rows(rows).rows if rows.exists() else ()
    kept, anew, outdated = [], Counter[str](), Counter[str]()
    for row in logged:
        if row.model in changed:
            anew[row.model] += 1
        elif row.item in asked and not _holds(row, asked[row.item], out, judged_later):
            outdated[row.model] += 1
        else:
            kept.append(row)
    out.mkdir(parents=True, exist_ok=True)
    if len(kept) < len(logged):
        _replace(rows, "".join(row.model_dump_json() + "\n" for row in kept))
    _replace(stamps, json.dumps(known | {c.name: c.stamp for c in contestants}, indent=2))
    return [
        f"{name} is not what was scored here before: its {count} images are drawn again"
        for name, count in anew.items()
    ] + [
        f"{name}: {count} images are drawn again, because the prompt, the source or the image is "
        "not the one that was scored here before, or not known to be"
        for name, count in outdated.items()
    ]


def _holds(row: Row, case: Case, out: Path, judged_later: str | None) -> bool:
    """Whether a row is still of this case and of the image that lies there."""
    try:
        image = read_picture(out / row.image)
    except OSError:
        return False
    if row.content is None:  # from before it was kept: judged again, which needs no new drawing
        return judged_later is not None and row.prompt == case.prompt
    return row.content == _content(case, image)


def _content(case: Case, image: np.ndarray) -> str:
    return content_of(case.task, case.category, case.prompt, image, case.source, case.target)


def _item(contestant: Contestant, case: Case) -> Item:
    return contestant.name, case.id, case.seed


def _replace(path: Path, text: str) -> None:
    scratch = path.with_name(path.name + ".part")
    scratch.write_text(text)
    scratch.replace(path)


def batches(cases: Sequence[Case], batch: int) -> list[list[Case]]:
    """Up to `batch` cases each, of one task."""
    groups: list[list[Case]] = []
    for task in dict.fromkeys(case.task for case in cases):
        same = [case for case in cases if case.task == task]
        groups += [same[i : i + batch] for i in range(0, len(same), batch)]
    return groups


def _key(contestant: Contestant, case: Case, domain: Domain) -> RowKey:
    return RowKey(contestant.name, case.id, case.seed, domain.judge_name)


def _draw_and_judge(
    cases: list[Case],
    contestant: Contestant,
    domain: Domain,
    out: Path,
    rows: RowWriter,
    judged_later: str | None,
) -> None:
    cond = domain.condition([case.prompt for case in cases], sources_of(cases))
    noise = noise_of(cases, domain)
    begun = time.perf_counter()
    latents = contestant.draw(noise, cond, cases[0].task)
    seconds = (time.perf_counter() - begun) / len(cases)
    images = domain.decode(latents)
    if judged_later is None:
        verdicts, judge = domain.judge(images, cases), domain.judge_name
    else:
        waiting = Verdict(None, {}, (), unscored=PENDING.removeprefix("unscored: "))
        verdicts, judge = [waiting] * len(cases), judged_later
    for case, image, verdict in zip(cases, images, verdicts, strict=True):
        rows.write(_row(case, image, verdict, contestant, judge, seconds, out))


def _row(
    case: Case,
    image: np.ndarray,
    verdict: Verdict,
    contestant: Contestant,
    judge: str,
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
        judgements=verdict.judgements,
        status=f"unscored: {verdict.unscored}" if verdict.score is None else "ok",
        seconds=seconds,
        judge=judge,
        content=_content(case, image),
    )


def _save(image: np.ndarray, out: Path, name: str) -> str:
    path = out / "images" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return str(path.relative_to(out))
