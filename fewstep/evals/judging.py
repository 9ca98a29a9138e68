"""Scores for pictures that are drawn already, by a judge that takes its time.

Whatever stops the judge, the pictures and the scores so far stay, and the same call goes on.
"""

from collections import deque
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from fewstep.domain import Question, Verdict
from fewstep.endpoint import EndpointDown, replies
from fewstep.errors import RecipeError
from fewstep.evals.rows import Item, Row, RowWriter

PATIENCE = 3
"""Pictures in a row that the judge could not be asked about, until it counts as down."""


@runtime_checkable
class Judge(Protocol):
    """A judge far away. It is never told which model made a picture."""

    @property
    def name(self) -> str:
        """Changes with whatever changes its scores."""
        ...

    @property
    def workers(self) -> int:
        """Questions at a time."""
        ...

    def greet(self) -> None:
        """Raise RecipeError or EndpointDown where it cannot judge anything."""
        ...

    def ask(self, question: Question) -> Verdict:
        """Called from several threads. EndpointDown where this question got no answer."""
        ...


class Judged(NamedTuple):
    scored: int
    left: int
    """Pictures without a score, for whatever reason."""
    stopped: str
    """Why the judge was not asked about all of them; empty if it was."""


def judge_drawn(
    out: Path,
    judge: Judge,
    *,
    only: Collection[Item] | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Judged:
    """Judge the pictures of `out/rows.jsonl` that this judge has not scored yet.

    `only` are the (model, case, seed) to look at; all of them without it. Rows of other judges
    stay as they are.
    """
    with RowWriter(out / "rows.jsonl") as rows:
        drawn = [row for item, row in rows.drawn.items() if only is None or item in only]
        todo = deque(row for row in drawn if not rows.is_scored(row.key._replace(judge=judge.name)))
        total, done = len(drawn), len(drawn) - len(todo)
        stopped, failures = "", 0
        try:
            if todo:
                judge.greet()
            for row, told in replies(lambda row: _ask(judge, row, out), todo, judge.workers):
                rows.write(_judged(row, told.verdict, judge.name))
                done += 1
                on_progress(done, total)
                failures = failures + 1 if told.outage else 0
                if told.outage and failures >= PATIENCE:
                    raise told.outage
        except (EndpointDown, RecipeError) as error:
            stopped = str(error)
        scored = sum(rows.is_scored(row.key._replace(judge=judge.name)) for row in drawn)
    return Judged(scored, total - scored, stopped)


class _Told(NamedTuple):
    verdict: Verdict
    outage: EndpointDown | None = None


def _ask(judge: Judge, row: Row, out: Path) -> _Told:
    try:
        image = read_picture(out / row.image)
        source = None if row.source is None else read_picture(out / row.source)
    except OSError:
        return _Told(Verdict(None, {}, (), unscored="its picture is missing or damaged"))
    try:
        return _Told(judge.ask(Question(row.task, row.category, row.prompt, image, source)))
    except EndpointDown as down:
        return _Told(Verdict(None, {}, (), unscored=f"the endpoint {down.reason}"), down)


def _judged(row: Row, told: Verdict, judge: str) -> Row:
    return Row.model_validate(
        row.model_dump()
        | {
            "score": told.score,
            "subscores": told.subscores,
            "reasons": told.reasons,
            "judgements": told.judgements,
            "status": f"unscored: {told.unscored}" if told.score is None else "ok",
            "judge": judge,
        }
    )


def read_picture(path: Path) -> np.ndarray:
    """uint8 [h, w, 3]."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))
