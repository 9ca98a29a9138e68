"""What a run folder holds and what its rows say: the numbers behind every form of the report.

A part that is missing becomes a note, never a failure. Rows that are damaged or contradict each
other are an error, because every number rests on them.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import fmean

from fewstep.errors import DataError
from fewstep.evals import stats
from fewstep.evals.rows import Row, read_rows
from fewstep.evals.stats import Comparison, Group, Interval, Ranking, Scope

TASK_TITLES = {"t2i": "Text-to-image", "edit": "Editing"}
CATEGORY_TITLES = {
    "landscape": "Landscape",
    "portrait": "Portrait",
    "text": "Text-centric",
    "scene": "Scene",
    "enhance": "Enhancement",
    "object": "Object",
    "text_edit": "Text edit",
    "identity": "Identity",
    "style": "Style",
}

Series = dict[str, list[tuple[float, float]]]  # metric key -> (step, value), by step


@dataclass(frozen=True)
class Cast:
    """Who is who: the models in the order of the tables, and the three that are compared."""

    models: tuple[str, ...]
    nfe: dict[str, dict[str, int]]
    """By model and task."""
    reference: str | None
    """The teacher at its full number of evaluations."""
    cut: str | None
    """A teacher at fewer evaluations, the student's number if there is such a one."""
    student: str | None

    def show_nfe(self, model: str, task: str | None = None) -> str:
        """`80`, or `80 / 120` if the tasks differ."""
        own = self.nfe[model]
        counts = [own[name] for name in TASK_TITLES if name in own and task in (None, name)]
        return " / ".join(str(count) for count in dict.fromkeys(counts)) or "–"


@dataclass(frozen=True)
class Findings:
    """The statistics of one judge's rows."""

    judge: str
    rows: tuple[Row, ...]
    cast: Cast
    groups: dict[tuple[str, Scope], Group]
    versus: dict[tuple[str, str, Scope], Comparison]
    """By (model, against, scope): every model against the reference, the student against cut."""
    rankings: dict[Scope, Ranking]
    gap_closed: dict[str, Interval]
    seconds: dict[str, float]

    @property
    def tasks(self) -> tuple[str, ...]:
        present = {row.task for row in self.rows}
        return tuple(task for task in TASK_TITLES if task in present)

    def categories(self, task: str) -> tuple[str, ...]:
        present = {row.category for row in self.rows if row.task == task}
        known = [name for name in CATEGORY_TITLES if name in present]
        return (*known, *sorted(present.difference(known)))

    def scopes(self, task: str) -> tuple[Scope, ...]:
        return (*((task, category) for category in self.categories(task)), (task, None))


@dataclass(frozen=True)
class Run:
    """A run folder as found."""

    path: Path
    name: str
    date: str
    recipe: str | None
    plan: dict[str, object] | None
    summary: dict[str, object] | None
    metrics: Series
    samples: tuple[Path, ...]
    """Sample grids written during training, oldest first."""
    findings: Findings | None
    notes: tuple[str, ...]
    """What is missing or was left out, in words."""


def read_run(
    path: Path,
    *,
    judge: str | None = None,
    reference: str | None = None,
    student: str | None = None,
) -> Run:
    """Read what is there. Without `judge`, the one of the last row; see `cast_models` for roles."""
    if not path.is_dir():
        raise DataError(f"{path} is not a run folder; pass the folder that holds recipe.yaml")
    notes: list[str] = []
    recipe = path / "recipe.yaml"
    if not recipe.is_file():
        notes.append("recipe.yaml is missing: the recipe is not shown")
    text = recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else None
    plan = read_object(path / "plan.json", "the plan is not shown", notes)
    summary = read_object(path / "summary.json", "device and cost are not known", notes)
    metrics = read_metrics(path / "metrics.jsonl", notes)
    samples = tuple(sorted((path / "images").glob("step_*.png")))
    if not samples:
        notes.append("images/step_*.png is missing: no samples from training")
    findings = None
    if (path / "eval" / "rows.jsonl").is_file():
        file = read_rows(path / "eval" / "rows.jsonl")
        if file.truncated:
            notes.append(f"eval/{file.truncated}; the evaluation was interrupted")
        if file.superseded:
            notes.append(f"{file.superseded} older rows of images that were scored again: not used")
        if file.rows:
            findings = find(file.rows, judge=judge, reference=reference, student=student)
            notes.extend(_judge_notes(file.rows, findings.judge))
        else:
            notes.append("eval/rows.jsonl holds no rows: no scores, no comparison")
    else:
        notes.append("eval/rows.jsonl is missing: no scores, no comparison")
    return Run(
        path=path,
        name=_name(path, plan, text),
        date=_date(path, summary),
        recipe=text,
        plan=plan,
        summary=summary,
        metrics=metrics,
        samples=samples,
        findings=findings,
        notes=tuple(notes),
    )


def find(
    rows: Sequence[Row],
    *,
    judge: str | None = None,
    reference: str | None = None,
    student: str | None = None,
) -> Findings:
    """All statistics of the report."""
    judges = sorted({row.judge for row in rows})
    if judge is not None and judge not in judges:
        raise DataError(f"no row was scored by judge {judge!r}; judges: {', '.join(judges)}")
    judge = rows[-1].judge if judge is None else judge
    chosen = stats.comparable(rows, judge=judge)
    cast = cast_models(chosen, reference=reference, student=student)
    scopes = stats.scopes(chosen)
    pairs = {(model, cast.reference) for model in cast.models if model != cast.reference}
    pairs |= {(cast.student, cast.cut)}
    versus = {}
    for model, against in pairs:
        if model is None or against is None:
            continue
        for scope in scopes:
            task, category = scope
            found = stats.compare(chosen, model, against, task=task, category=category)
            if found is not None:
                versus[model, against, scope] = found
    rankings = {}
    for scope in scopes:
        task, category = scope
        scored = {
            r.model
            for r in chosen
            if r.task == task and category in (None, r.category) and r.score is not None
        }
        models = [model for model in cast.models if model in scored]
        rankings[scope] = stats.rank(chosen, models, task=task, category=category)
    gaps = {}
    if cast.student and cast.cut and cast.reference:
        for task in sorted({row.task for row in chosen}):
            gap = stats.gap_closed(
                chosen, student=cast.student, cut=cast.cut, teacher=cast.reference, task=task
            )
            if gap is not None:
                gaps[task] = gap
    seconds = {name: stats.seconds_per_image(chosen, name) for name in cast.models}
    return Findings(
        judge=judge,
        rows=tuple(chosen),
        cast=cast,
        groups={(g.model, (g.task, g.category)): g for g in stats.summarise(chosen)},
        versus=versus,
        rankings=rankings,
        gap_closed=gaps,
        seconds={name: value for name, value in seconds.items() if value is not None},
    )


def cast_models(
    rows: Sequence[Row], *, reference: str | None = None, student: str | None = None
) -> Cast:
    """Students are the models whose name starts with "student"; they come last in every table.

    The reference is the other model with most evaluations, the first by name among equals. The cut
    teacher is one with the student's evaluations; of several the strongest, so that the student is
    held against the best that its budget buys without training.
    """
    by_task: dict[str, dict[str, int]] = {}
    for row in rows:
        by_task.setdefault(row.model, {})[row.task] = row.nfe
    nfe = {model: max(counts.values()) for model, counts in by_task.items()}
    for role, name in (("reference", reference), ("student", student)):
        if name is not None and name not in nfe:
            raise DataError(f"{role} {name!r} has no rows; models: {', '.join(sorted(nfe))}")
    students = {name for name in nfe if name.lower().startswith("student")}
    students = (students | {student}) - {reference, None}
    models = sorted(nfe, key=lambda name: (name in students, -nfe[name], name))
    others = [name for name in models if name not in students]
    if student is None:
        student = next((name for name in reversed(models) if name in students), None)
    if reference is None:
        reference = next(iter(others), None)
    shorter = [name for name in others if reference and nfe[name] < nfe[reference]]
    strength = {m: fmean([r.score or 1.0 for r in rows if r.model == m]) for m in shorter}
    shorter.sort(key=lambda m: (student is None or nfe[m] != nfe[student], nfe[m], -strength[m], m))
    return Cast(tuple(models), by_task, reference, next(iter(shorter), None), student)


def lede(found: Findings) -> list[str]:
    """One sentence a task, in words that the tables bear out."""
    cast, sentences = found.cast, []
    if cast.student is None or cast.reference is None:
        return sentences
    for task in found.tasks:
        versus = found.versus.get((cast.student, cast.reference, (task, None)))
        if versus is None:
            continue
        sentence = (
            f"On {TASK_TITLES[task].lower()}, {cast.student} with "
            f"{cast.show_nfe(cast.student, task)} evaluations reaches {versus.ratio.value:.1%} of "
            f"the score of {cast.reference} with {cast.show_nfe(cast.reference, task)}"
        )
        beside = found.versus.get((cast.student, cast.cut, (task, None))) if cast.cut else None
        cut = cast.show_nfe(cast.cut, task) if cast.cut else ""
        if beside is not None and beside.difference.excludes_zero:
            way = "above" if beside.difference.value > 0 else "below"
            gap = abs(beside.difference.value)
            sentence += f", {gap:.2f} points {way} the teacher cut to {cut}"
        elif beside is not None:
            sentence += f", not separable from the teacher cut to {cut}"
        sentences.append(sentence + ".")
    return sentences


def speed_up(found: Findings, model: str) -> float | None:
    """How many times faster than the reference, in median seconds per image."""
    reference = found.seconds.get(found.cast.reference or "")
    own = found.seconds.get(model)
    return reference / own if reference and own else None


def phases(summary: dict[str, object] | None) -> dict[str, float]:
    """Wall seconds by phase from summary.json; one number is one phase."""
    seconds = (summary or {}).get("seconds")
    if isinstance(seconds, int | float):
        return {"total": float(seconds)}
    if not isinstance(seconds, dict):
        return {}
    return {str(name): float(s) for name, s in seconds.items() if isinstance(s, int | float)}


def category_title(category: str | None) -> str:
    if category is None:
        return "Average"
    return CATEGORY_TITLES.get(category, category.replace("_", " "))


def show_interval(interval: Interval | None, *, percent: bool = False, sign: bool = False) -> str:
    """`4.31 [4.22, 4.40]`, `97.2% [95.9, 98.4]`, or a dash."""
    if interval is None:
        return "–"
    factor, digits, unit = (100, 1, "%") if percent else (1, 2, "")
    form = f"{'+' if sign else ''}.{digits}f"
    shown = f"{interval.value * factor:{form}}{unit}"
    if interval.low is not None and interval.high is not None:
        shown += f" [{interval.low * factor:{form}}, {interval.high * factor:{form}}]"
    return shown.replace("-", "−")


def show_bounds(interval: Interval, *, percent: bool = False) -> str:
    """`[4.22, 4.40]` or `[95.9, 98.4]`."""
    if interval.low is None or interval.high is None:
        return "no interval"
    if percent:
        return f"[{interval.low * 100:.1f}, {interval.high * 100:.1f}]"
    return f"[{interval.low:.2f}, {interval.high:.2f}]"


def show_seconds(seconds: float) -> str:
    """`21 ms`, `1.25 s`, `9 min 12 s`, `2 h 05 min`."""
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _judge_notes(rows: Sequence[Row], judge: str) -> list[str]:
    others = Counter(row.judge for row in rows if row.judge != judge)
    return [f"{n} rows by another judge, {name}: not used" for name, n in sorted(others.items())]


def read_object(path: Path, lost: str, notes: list[str]) -> dict[str, object] | None:
    if not path.is_file():
        notes.append(f"{path.name} is missing: {lost}")
        return None
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        notes.append(f"{path.name} is not JSON ({error}): {lost}")
        return None
    if not isinstance(found, dict):
        notes.append(f"{path.name} is not a JSON object: {lost}")
        return None
    return found


def read_metrics(path: Path, notes: list[str]) -> Series:
    """Every number by key and step. Of a step logged twice, after a resume, the later stands."""
    if not path.is_file():
        notes.append("metrics.jsonl is missing: no curves")
        return {}
    found: dict[str, dict[float, float]] = {}
    unreadable: list[int] = []
    not_finite: dict[str, float] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        step = record.get("step") if isinstance(record, dict) else None
        if not isinstance(record, dict) or not isinstance(step, int | float):
            unreadable.append(number)
            continue
        for key, value in record.items():
            if key == "step" or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if math.isfinite(value):
                found.setdefault(key, {})[float(step)] = float(value)
            else:
                not_finite.setdefault(key, step)
    if unreadable:
        lines = ", ".join(str(number) for number in unreadable[:5])
        more = "" if len(unreadable) <= 5 else f" and {len(unreadable) - 5} more"
        notes.append(f"metrics.jsonl: no step could be read from line {lines}{more}; left out")
    for key, step in sorted(not_finite.items()):
        notes.append(f"metrics.jsonl: {key} is not finite, first at step {step:g}")
    return {key: sorted(points.items()) for key, points in sorted(found.items())}


def _name(path: Path, plan: dict[str, object] | None, recipe: str | None) -> str:
    if plan and isinstance(plan.get("name"), str):
        return str(plan["name"])
    match = re.search(r"^name:\s*[\"']?([^\"'#\n]+)", recipe or "", flags=re.MULTILINE)
    return match[1].strip() if match else path.resolve().name


def _date(path: Path, summary: dict[str, object] | None) -> str:
    if summary and isinstance(summary.get("date"), str):
        return str(summary["date"])
    newest = max((file.stat().st_mtime for file in path.rglob("*.json*")), default=None)
    return (
        "unknown" if newest is None else datetime.fromtimestamp(newest).strftime("%Y-%m-%d %H:%M")
    )
