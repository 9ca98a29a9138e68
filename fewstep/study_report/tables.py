"""The tables of a study in the paper's layout, as words; HTML and Markdown only set them.

Table 1 is data composition, 2 guidance, 3 and 4 task mixture; what has no role comes after them.
The teachers, scored on the same cases, are rows of every table.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

from fewstep.evals.findings import TASK_TITLES, category_title, show_interval, show_seconds
from fewstep.study_report.curves import ONSET, all_stability
from fewstep.study_report.intervals import Estimate
from fewstep.study_report.read import DONE, Study
from fewstep.study_report.verdicts import ERROR, Takeaway


class Entry(NamedTuple):
    """A table cell: what it says, and in small what it rests on."""

    text: str
    small: str = ""
    best: bool = False


@dataclass(frozen=True)
class Table:
    title: str
    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]


class Group(NamedTuple):
    """Rows of the paper that belong in one table, and what they scored there (Gemini / GPT)."""

    title: str
    tasks: tuple[str, ...]
    paper: dict[str, dict[str, str]]
    """Average by task and role; the roles are in the table's order."""


GROUPS = (
    Group(
        "Table 1: data composition",
        ("t2i",),
        {
            "t2i": {
                "e1": "3.30/4.13",
                "e2": "3.42/4.15",
                "e3": "2.63/3.29",
                "e4": "3.40/4.06",
                "e5": "3.02/3.62",
            }
        },
    ),
    Group(
        "Table 2: teacher guidance",
        ("t2i", "edit"),
        {
            "t2i": {
                "base_only": "",
                "specialised_only": "",
                "constant": "",
                "stepwise": "3.56/4.15",
                "adaptive": "",
            },
            "edit": dict.fromkeys(
                ("base_only", "specialised_only", "constant", "stepwise", "adaptive"), ""
            ),
        },
    ),
    Group(
        "Tables 3 and 4: task mixture",
        ("edit", "t2i"),
        {
            "edit": {
                "zero_shot": "2.77/3.28",
                "r9to1": "2.58/3.31",
                "r7to3": "2.87/3.36",
                "r5to5": "2.97/3.41",
                "r3to7": "",
            },
            "t2i": {
                "zero_shot": "3.56/4.15",
                "r9to1": "3.60/4.18",
                "r7to3": "3.60/4.20",
                "r5to5": "3.65/4.16",
                "r3to7": "",
            },
        },
    ),
)
PAPER_TEACHERS = {
    "base": {"t2i": "3.41/4.09"},
    "special": {"t2i": "3.74/4.26", "edit": "2.77/3.44"},
}


class Place(NamedTuple):
    """Where a model stands among those of its table."""

    best: int
    worst: int
    not_separable: tuple[str, ...]


def score_tables(study: Study) -> list[Table]:
    """Every variant with a finished cell, in the table or tables of its roles."""
    made: list[Table] = []
    placed: set[str] = set()
    for group in GROUPS:
        for task in group.tasks:
            by_variant = {
                name: (role, paper)
                for role, paper in group.paper[task].items()
                if (name := study.variant(role)) is not None
            }
            if by_variant and task in study.tasks:
                title = f"{group.title}, {TASK_TITLES[task].lower()}"
                made.append(_scores(study, title, task, by_variant))
                placed |= set(by_variant)
    rest = [v for v in study.titles if v not in placed and study.finished(v)]
    for task in study.tasks:
        if rest:
            title = f"Variants outside the paper's tables, {TASK_TITLES[task].lower()}"
            made.append(_scores(study, title, task, dict.fromkeys(rest, ("", ""))))
    return made


def ranks(study: Study, models: Sequence[str], task: str) -> dict[str, Place]:
    """Places that the intervals of all paired differences leave open, together (Bonferroni)."""
    pairs = list(combinations(models, 2))
    level = 1 - ERROR / max(1, len(pairs))
    above: dict[str, int] = dict.fromkeys(models, 0)
    below: dict[str, int] = dict.fromkeys(models, 0)
    open_: dict[str, list[str]] = {model: [] for model in models}
    for a, b in pairs:
        estimate = study.estimate({a: 1, b: -1}, task, level=level)
        if estimate is None or not estimate.interval.excludes_zero:
            open_[a].append(b)
            open_[b].append(a)
            continue
        winner, loser = (a, b) if estimate.interval.value > 0 else (b, a)
        below[winner] += 1
        above[loser] += 1
    return {m: Place(1 + above[m], len(models) - below[m], tuple(open_[m])) for m in models}


def show_place(place: Place) -> Entry:
    if place.best == place.worst:
        return Entry(str(place.best))
    return Entry(f"{place.best}–{place.worst}", "not separable")


def _scores(study: Study, title: str, task: str, variants: dict[str, tuple[str, str]]) -> Table:
    categories = list(study.scores[task].cases)
    scored = {name for name, _ in study.scores[task].values}
    models = [m for m in (*study.references, *variants) if m in scored]
    places = ranks(study, models, task)
    rows = []
    for model in models:
        role, paper = variants.get(model, ("", _paper_teacher(study, model, task)))
        seeds = len(study.finished(model))
        name = study.titles.get(model, model)
        about = [role, f"{seeds} seed{'s' if seeds > 1 else ''}" if seeds else "reference"]
        cells = [Entry(name, ", ".join(part for part in about if part))]
        for category in (*categories, None):
            best = category is None and places[model].best == 1 and len(models) > 1
            cells.append(_score(study, model, task, category, best=best))
        rows.append((*cells, show_place(places[model]), Entry(paper or "–")))
    head = ("Model", *(category_title(c) for c in (*categories, None)), "Rank", "Paper, average")
    counts = ", ".join(
        f"{category_title(name).lower()} {len(cases)}"
        for name, cases in study.scores[task].cases.items()
    )
    caption = (
        f"Mean score of 1 to 5 by {study.judge} with 95% intervals over prompts and training "
        f"seeds; prompts: {counts}. A rank such as 1–2 is not separable: the interval of a paired "
        "difference includes 0, with all pairs of the table held at once. Bold: not separable from "
        "the best. The paper's column is another teacher under other judges (Gemini / GPT)."
    )
    return Table(title, caption, head, tuple(rows))


def _score(
    study: Study, model: str, task: str, category: str | None, *, best: bool = False
) -> Entry:
    estimate = study.estimate({model: 1}, task, category)
    if estimate is None:
        return Entry("–", "nothing scored")
    value, low, high = estimate.interval
    small = f"[{low:.2f}, {high:.2f}]" if low is not None and high is not None else "no interval"
    if estimate.dropped:
        small += f", {estimate.cases} of {estimate.cases + estimate.dropped}"
    return Entry(f"{value:.2f}", small, best)


def _paper_teacher(study: Study, model: str, task: str) -> str:
    if model == study.base_teacher:
        return PAPER_TEACHERS["base"].get(task, "")
    if model == study.specialised_teacher(task):
        return PAPER_TEACHERS["special"].get(task, "")
    return ""


def verdict_table(takeaways: Sequence[Takeaway]) -> Table:
    rows = []
    for takeaway in takeaways:
        rows.append(
            (
                Entry(f"{takeaway.number}. {takeaway.statement}", takeaway.rule),
                Entry(takeaway.verdict, takeaway.lacks, takeaway.verdict == "reproduced"),
            )
        )
    caption = (
        "On this teacher, by the rule: reproduced if the whole interval lies on the paper's side, "
        "not reproduced if it lies on the other side or within the margin, undecided otherwise."
    )
    return Table("Takeaways", caption, ("Takeaway and its contrast", "Verdict"), tuple(rows))


def contrast_table(takeaway: Takeaway) -> Table:
    rows = []
    for claim in takeaway.claims:
        for contrast in claim.contrasts:
            estimate = contrast.estimate
            told, n = "–", "–"
            if estimate is not None:
                told = show_interval(estimate.interval, sign=True)
                parts = [f"{estimate.seeds} seeds"]
                if estimate.cases:
                    parts.insert(0, f"{estimate.cases} prompts")
                if estimate.dropped:
                    parts.append(f"{estimate.dropped} dropped")
                n = ", ".join(parts)
            rows.append(
                (
                    Entry(contrast.words, claim.words),
                    Entry(told, f"{estimate.level:.1%} interval" if estimate else contrast.lacks),
                    Entry(n),
                    Entry(contrast.verdict, f"needs {contrast.needs}" if contrast.needs else ""),
                    Entry(contrast.paper),
                )
            )
    head = ("Contrast", "Difference", "Sample", "Verdict", "Paper")
    return Table(f"Takeaway {takeaway.number}", takeaway.rule, head, tuple(rows))


def stability_table(study: Study) -> Table | None:
    """Figure 3 in numbers: when each training began to fall, if it did."""
    rows = []
    for entry in all_stability(study):
        rows.append(
            (
                Entry(study.titles[entry.variant], f"seed {entry.seed}"),
                Entry(TASK_TITLES[entry.task]),
                Entry(f"{entry.peak:.2f}", f"at {entry.peak_step:g}"),
                Entry(f"{entry.final:.2f}"),
                Entry(f"{entry.fall:.2f}"),
                Entry("–" if entry.onset is None else f"{entry.onset:g}"),
                Entry("–" if entry.collapsed is None else f"{entry.collapsed:g}"),
                Entry("–" if entry.mismatch is None else f"× {entry.mismatch:.2f}"),
            )
        )
    if not rows:
        return None
    head = (
        "Variant",
        "Task",
        "Best probe",
        "Last probe",
        "Fall",
        "Destabilises at",
        "Collapse alarm at",
        "Mismatch, late / early",
    )
    caption = (
        "Probes are a few training-split prompts, scored during training. “Destabilises at” is "
        f"the first probe from which the score stays more than {ONSET:g} below the best before it, "
        "to the end. Noise makes every fall positive; takeaway 3 compares two strategies' falls."
    )
    return Table("Stability during training (figure 3)", caption, head, tuple(rows))


def cost_table(study: Study) -> Table:
    rows = []
    for cell in study.cells:
        spent = show_seconds(cell.seconds) if cell.seconds and cell.status == DONE else "–"
        counts = f"{cell.scored} scored"
        if cell.unscored or cell.missing:
            counts += f", {cell.unscored} unscored, {cell.missing} missing"
        rows.append(
            (
                Entry(study.titles[cell.variant], f"{cell.variant}, seed {cell.seed}"),
                Entry(cell.status),
                Entry(counts if cell.status == DONE else "–"),
                Entry(spent, f"predicted {show_seconds(cell.predicted)}"),
                Entry(cell.recipe_hash),
                Entry(cell.code_hash),
            )
        )
    total = sum(cell.seconds or 0.0 for cell in study.cells)
    done = sum(cell.status == DONE for cell in study.cells)
    caption = f"{done} of {len(study.cells)} cells finished; {show_seconds(total)} spent in all."
    head = ("Cell", "Status", "Images", "Time", "Recipe", "Code")
    return Table("Cells and cost", caption, head, tuple(rows))


def against_base(study: Study, task: str) -> tuple[Table, list[str]] | None:
    """Table 2's claim, a 4-evaluation student above its 80-evaluation base teacher, and why not.

    The student may inherit only what the specialised teacher has over the base: the headroom.
    """
    base, special = study.base_teacher, study.specialised_teacher(task)
    students = [
        name
        for role in ("stepwise", "constant", "adaptive")
        if (name := study.variant(role)) is not None
    ]
    if base is None or not students or task not in study.tasks:
        return None
    scopes = [*study.scores[task].cases, None]
    level = 1 - ERROR / len(students)
    rows = []
    for name in students:
        cells = [study.estimate({name: 1, base: -1}, task, c, level=level) for c in scopes]
        rows.append(
            (Entry(f"{study.titles[name]} − {base}"), *(_difference(cell) for cell in cells))
        )
    headroom = None
    if special is not None:
        cells = [study.estimate({special: 1, base: -1}, task, c) for c in scopes]
        headroom = cells[-1]
        rows.append((Entry(f"{special} − {base}", "headroom"), *(_difference(c) for c in cells)))
    paper = " Paper: +0.15 / +0.06, with a headroom of +0.33 / +0.17." if task == "t2i" else ""
    table = Table(
        f"Against the base teacher at its full evaluations, {TASK_TITLES[task].lower()}",
        f"{level:.1%} intervals, so that all students hold at once. Bold: 0 is outside.{paper}",
        ("Difference", *(category_title(c) for c in scopes)),
        tuple(rows),
    )
    finals = {n: study.estimate({n: 1, base: -1}, task, level=level) for n in students}
    return table, _why(study, task, finals, headroom)


def _difference(estimate: Estimate | None) -> Entry:
    if estimate is None:
        return Entry("–", "not scored for both")
    told = show_interval(estimate.interval, sign=True)
    value, _, bounds = told.partition(" ")
    return Entry(value, bounds or "no interval", estimate.interval.excludes_zero)


def _why(
    study: Study, task: str, finals: dict[str, Estimate | None], headroom: Estimate | None
) -> list[str]:
    """The answer in sentences; where no student wins, what stands in the way."""
    known = {name: estimate for name, estimate in finals.items() if estimate is not None}
    winners = [n for n, e in known.items() if e.interval.low is not None and e.interval.low > 0]
    if winners:
        names = ", ".join(study.titles[name] for name in winners)
        return [f"Above the base teacher at its full evaluations: {names}."]
    if not known:
        return ["No student is scored on the same prompts as the base teacher."]
    name, best = max(known.items(), key=lambda entry: entry[1].interval.value)
    said = ["No multi-teacher student is separably above the base teacher at its full evaluations."]
    gap = show_interval(best.interval, sign=True)
    said.append(f"The nearest is {study.titles[name]}, at {gap} from it.")
    if best.interval.value > 0:
        said.append(f"To separate that would take {best.needed(best.interval.value)}.")
    if headroom is None:
        said.append("No teacher specialised on this task was scored: the headroom is not known.")
    elif headroom.interval.low is not None and headroom.interval.low > 0:
        lost = headroom.interval.value - best.interval.value
        said.append(
            f"The specialised teacher is {show_interval(headroom.interval, sign=True)} above the "
            f"base: of this headroom {lost:.2f} is lost on the way to few evaluations."
        )
    else:
        said.append(
            "The specialised teacher itself is not separably above the base teacher "
            f"({show_interval(headroom.interval, sign=True)}): hardly anything is there to inherit."
        )
    worst = []
    for category in study.scores[task].cases:
        own = study.estimate({name: 1, study.base_teacher or "": -1}, task, category)
        if own is not None and own.interval.high is not None and own.interval.high < 0:
            worst.append(f"{category_title(category).lower()} −{-own.interval.value:.2f}")
    if worst:
        said.append(f"It lies separably below in: {', '.join(worst)}.")
    return said
