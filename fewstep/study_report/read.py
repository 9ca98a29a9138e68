"""What a study's folder holds, as far as it has come: cells, scores, curves, probe pictures.

A cell that is missing or unfinished becomes a note and stays out of every number. Rows that are
damaged or contradict each other are an error, because every number rests on them.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean

from fewstep.errors import DataError
from fewstep.evals import stats
from fewstep.evals.findings import CATEGORY_TITLES, TASK_TITLES, Series, read_metrics
from fewstep.evals.rows import Row, read_rows
from fewstep.study_report.intervals import Column, Estimate, Scores, Wobble, contrast, wobble
from fewstep.sweep.layout import CellRun, StudyRun, open_study
from fewstep.sweep.study import Study as Plan

DONE = "done"


@dataclass(frozen=True)
class Cell:
    """One variant trained with one seed."""

    variant: str
    seed: int
    folder: Path
    status: str
    """`done`, or what it is instead."""
    recipe_hash: str
    code_hash: str
    seconds: float | None
    predicted: float
    curves: Series
    scored: int
    unscored: int
    missing: int
    """Images that another cell has a row for and this one does not."""


@dataclass(frozen=True)
class Study:
    """A study as found, with the statistics that every table and verdict is made of."""

    path: Path
    base: Path
    """The recipe that its variants start from, where it lay when the study was made."""
    name: str
    question: str
    titles: dict[str, str]
    """Of the variants, in the order of study.yaml."""
    roles: dict[str, str]
    """The paper's roles (e1, stepwise, r5to5, ...) and the variants that play them."""
    takeaways: tuple[int, ...]
    cells: tuple[Cell, ...]
    """Every cell of the study, finished or not."""
    references: dict[str, int]
    """Teachers scored on the same cases, with their evaluations per image; most first."""
    scores: dict[str, Scores]
    rows: tuple[Row, ...]
    """Of one judge; `model` is `variant@seed` for a student."""
    judge: str
    notes: tuple[str, ...]

    @cached_property
    def _wobbles(self) -> dict[tuple[str, str | None], Wobble | None]:
        return {
            (task, category): wobble(scores, list(self.titles), category)
            for task, scores in self.scores.items()
            for category in (*scores.cases, None)
        }

    def estimate(
        self,
        weights: Mapping[str, float],
        task: str,
        category: str | None = None,
        *,
        level: float = 0.95,
    ) -> Estimate | None:
        """A contrast of variants and references; None where one of them has no scores."""
        scores = self.scores.get(task)
        if scores is None or (category is not None and category not in scores.cases):
            return None
        seeds_wobble = self._wobbles[task, category]
        return contrast(scores, weights, category, seeds_wobble, level=level)

    def wobble(self, task: str, category: str | None = None) -> Wobble | None:
        return self._wobbles[task, category]

    def finished(self, variant: str) -> list[Cell]:
        return [c for c in self.cells if c.variant == variant and c.status == DONE]

    def variant(self, role: str) -> str | None:
        """Who plays a role; None where nobody does or none of its cells is finished."""
        name = self.roles.get(role)
        return name if name is not None and self.finished(name) else None

    @property
    def base_teacher(self) -> str | None:
        """The base teacher at its full number of evaluations (table 2's first row)."""
        own = [name for name in self.references if re.fullmatch(r"teacher-\d+nfe", name)]
        return max(own, key=lambda name: self.references[name], default=None)

    def specialised_teacher(self, task: str) -> str | None:
        """The one specialised on this task, at its full number of evaluations."""
        own = [name for name in self.references if re.fullmatch(rf"teacher-{task}-\d+nfe", name)]
        return max(own, key=lambda name: self.references[name], default=None)

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(task for task in TASK_TITLES if task in self.scores)


def read_study(folder: Path) -> Study:
    """Everything a report or a recommendation needs. DataError for a folder that is no study."""
    place = open_study(folder)
    notes: list[str] = []
    rows = _collect(place, notes)
    judge, chosen = "", []
    if rows:
        judge = rows[-1].judge
        chosen = stats.comparable(rows, judge=judge)
        if others := len(rows) - len(chosen):
            notes.append(f"{others} rows by another judge than {judge}: not used")
    else:
        notes.append("nothing is evaluated yet: no scores")
    for model, why, count in stats.unscored_reasons(chosen):
        notes.append(f"{model}: {count} images not scored ({why})")
    asked = {(row.case, row.seed) for row in chosen}
    cells = tuple(_cell(cell, chosen, len(asked), notes) for cell in place.cells)
    students = {student_name(cell.variant, cell.seed) for cell in place.cells}
    nfe: dict[str, int] = {}
    for row in chosen:
        if row.model not in students:
            nfe[row.model] = max(row.nfe, nfe.get(row.model, 0))
    for name in sorted(nfe):
        if missing := len(asked) - sum(row.model == name for row in chosen):
            notes.append(f"{name}: {missing} of {len(asked)} images have no row")
    return Study(
        path=folder,
        base=Path(place.study.base),
        name=place.study.name,
        question=place.study.question,
        titles=_titles(place.study),
        roles=dict(place.study.roles),
        takeaways=tuple(place.study.takeaways),
        cells=cells,
        references=dict(sorted(nfe.items(), key=lambda entry: (-entry[1], entry[0]))),
        scores=_scores(chosen, place.cells),
        rows=tuple(chosen),
        judge=judge,
        notes=tuple(notes),
    )


def _rows(path: Path, who: str, notes: list[str]) -> list[Row]:
    if not path.is_file():
        notes.append(f"{who}: no evaluation rows")
        return []
    file = read_rows(path)
    if file.truncated:
        notes.append(f"{who}: {file.truncated}")
    return list(file.rows)


def _collect(place: StudyRun, notes: list[str]) -> list[Row]:
    """The students' rows, called `variant@seed`, and the references' under their own names."""
    rows: list[Row] = []
    for cell in place.cells:
        who = student_name(cell.variant, cell.seed)
        if cell.status != DONE:
            notes.append(f"{who}: {cell.status}; in no number")
            continue
        found = _rows(cell.folder / "eval" / "rows.jsonl", who, notes)
        models = sorted({row.model for row in found})
        students = [name for name in models if name.startswith("student")]
        if len(students) > 1:
            raise DataError(
                f"{cell.folder}: rows of two students, {' and '.join(students)}; delete its "
                "eval folder and evaluate it again"
            )
        rows += [row.model_copy(update={"model": who}) for row in found if row.model in students]
    found = _rows(place.reference / "eval" / "rows.jsonl", "reference", notes)
    return [*found, *rows]


def _titles(study: Plan) -> dict[str, str]:
    titles = {name: v.title for name, v in study.variants.items()}
    shared = Counter(titles.values())
    return {n: f"{title} ({n})" if shared[title] > 1 else title for n, title in titles.items()}


def student_name(variant: str, seed: int) -> str:
    return f"{variant}@{seed}"


def _scores(rows: Sequence[Row], cells: Sequence[CellRun]) -> dict[str, Scores]:
    columns: dict[str, Column] = {
        student_name(cell.variant, cell.seed): (cell.variant, cell.seed) for cell in cells
    }
    found: dict[str, Scores] = {}
    for task in TASK_TITLES:
        asked: dict[str, set[int]] = {}
        cases: dict[str, dict[str, None]] = {}
        by_case: dict[Column, dict[str, dict[int, float]]] = {}
        for row in rows:
            if row.task != task:
                continue
            asked.setdefault(row.case, set()).add(row.seed)
            cases.setdefault(row.category, {})[row.case] = None
            own = by_case.setdefault(columns.get(row.model, (row.model, None)), {})
            if row.score is not None:
                own.setdefault(row.case, {})[row.seed] = row.score
        if cases:
            found[task] = Scores(
                task,
                {name: tuple(cases[name]) for name in _in_order(cases)},
                {
                    column: {
                        case: fmean(scores.values())
                        for case, scores in own.items()
                        if len(scores) == len(asked[case])
                    }
                    for column, own in by_case.items()
                },
            )
    return found


def _in_order(categories: Iterable[str]) -> list[str]:
    present = set(categories)
    known = [name for name in CATEGORY_TITLES if name in present]
    return [*known, *sorted(present.difference(known))]


def _cell(place: CellRun, rows: Sequence[Row], asked: int, notes: list[str]) -> Cell:
    who = student_name(place.variant, place.seed)
    own = [row for row in rows if row.model == who]
    scored = sum(row.score is not None for row in own)
    missing = asked - len(own) if place.status == DONE else 0
    if missing and own:
        notes.append(f"{who}: {missing} of {asked} images have no row")
    curves: Series = {}
    if (place.folder / "metrics.jsonl").is_file():
        own_notes: list[str] = []
        curves = read_metrics(place.folder / "metrics.jsonl", own_notes)
        notes.extend(f"{who}: {note}" for note in own_notes)
    return Cell(
        variant=place.variant,
        seed=place.seed,
        folder=place.folder,
        status=place.status,
        recipe_hash=place.state.recipe_hash,
        code_hash=place.state.code_hash,
        seconds=place.state.seconds or None,
        predicted=place.predicted_seconds,
        curves=curves,
        scored=scored,
        unscored=len(own) - scored,
        missing=missing,
    )
