"""Scores for pictures that are drawn already, by a judge that takes its time.

Whatever stops the judge, the pictures and the scores so far stay, and the same call goes on.
"""

from collections import deque
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from fewstep.domain import Question, Verdict
from fewstep.endpoint import EndpointDown, replies
from fewstep.errors import RecipeError
from fewstep.evals.pictures import content_of, content_on_disk, read_picture
from fewstep.evals.rows import PENDING, Item, Row, RowWriter

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
    outdated: int
    """Pictures whose score was of something else than is there now."""


def judge_drawn(
    out: Path,
    judge: Judge,
    *,
    only: Collection[Item] | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Judged:
    """Judge the pictures of `out/rows.jsonl` that this judge has not scored yet.

    `only` are the (model, case, seed) to look at; all of them without it. A score counts for what
    was judged: where prompt or pictures are others now, or where the row does not say which they
    were, it is judged again. Rows of other judges stay as they are.
    """
    with RowWriter(out / "rows.jsonl") as rows:
        drawn = [row for item, row in rows.drawn.items() if only is None or item in only]
        outdated = _forget_outdated(drawn, judge.name, rows, out)
        todo = deque(row for row in drawn if not rows.scored(row.key._replace(judge=judge.name)))
        total, done = len(drawn), len(drawn) - len(todo)
        stopped, failures = "", 0
        try:
            if todo:
                judge.greet()
            for row, told in replies(lambda row: _ask(judge, row, out), todo, judge.workers):
                rows.write(_judged(row, told, judge.name))
                done += 1
                on_progress(done, total)
                failures = failures + 1 if told.outage else 0
                if told.outage and failures >= PATIENCE:
                    raise told.outage
        except (EndpointDown, RecipeError) as error:
            stopped = str(error)
        scored = sum(rows.scored(row.key._replace(judge=judge.name)) is not None for row in drawn)
    return Judged(scored, total - scored, stopped, outdated)


def _forget_outdated(drawn: list[Row], judge: str, rows: RowWriter, out: Path) -> int:
    """Let rows of `judge` wait again that are not of what is there now; how many.

    A picture that cannot be read any more keeps its score: there is nothing to judge instead.
    """
    outdated = 0
    for row in drawn:
        scored = rows.scored(row.key._replace(judge=judge))
        if scored is None:
            continue
        # The prompt of the latest drawing, whoever judged that one.
        now = content_on_disk(row, out)
        if now is not None and now != scored.content:
            waiting = Verdict(None, {}, (), unscored=PENDING.removeprefix("unscored: "))
            rows.write(_judged(row, _Told(waiting, now), judge))
            outdated += 1
    return outdated


class _Told(NamedTuple):
    verdict: Verdict
    content: str | None
    outage: EndpointDown | None = None


def _ask(judge: Judge, row: Row, out: Path) -> _Told:
    try:
        image = read_picture(out / row.image)
        source = None if row.source is None else read_picture(out / row.source)
        target = None if row.target is None else read_picture(out / row.target)
    except OSError:
        return _Told(Verdict(None, {}, (), unscored="its picture is missing or damaged"), None)
    content = content_of(row.task, row.category, row.prompt, image, source, target)
    try:
        question = Question(row.task, row.category, row.prompt, image, source)
        return _Told(judge.ask(question), content)
    except EndpointDown as down:
        told = Verdict(None, {}, (), unscored=f"the endpoint {down.reason}")
        return _Told(told, content, down)


def _judged(row: Row, told: _Told, judge: str) -> Row:
    verdict = told.verdict
    return Row.model_validate(
        row.model_dump()
        | {
            "score": verdict.score,
            "subscores": verdict.subscores,
            "reasons": verdict.reasons,
            "judgements": verdict.judgements,
            "status": f"unscored: {verdict.unscored}" if verdict.score is None else "ok",
            "judge": judge,
            "content": told.content,
        }
    )
