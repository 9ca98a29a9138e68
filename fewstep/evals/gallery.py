"""The pictures of the report: side-by-side cases, failures and training samples, all inlined."""

import base64
import io
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from fewstep.evals.findings import TASK_TITLES, Findings, Run, category_title, show_interval
from fewstep.evals.grid import on_white
from fewstep.evals.markup import Html, h
from fewstep.evals.rows import Row
from fewstep.evals.stats import Interval, unscored_reasons

TINY = 128
"""Images up to this side are inlined as they are, and enlarged by the browser without blur."""
THUMBNAIL = 256
MAX_CASES = 400
WORST = 8
UNSCORED_SHOWN = 60
TRAINING_SHOWN = 12
TRAINING_SIDE = 900


@dataclass
class Pictures:
    """Inlines image files and remembers which could not be read."""

    folder: Path
    failed: list[str] = field(default_factory=list)

    def show(self, path: str, *, alt: str, side: int = THUMBNAIL) -> Html:
        """An <img>, linked to the file if it was made smaller, or a box that says what is wrong."""
        try:
            with Image.open(self.folder / path) as file:
                image = on_white(file)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            self.failed.append(path)
            why = "missing" if isinstance(error, FileNotFoundError) else "cannot be read"
            return h("div", f"image {why}", class_="pic none", role="img", aria_label=alt)
        data = io.BytesIO()
        if max(image.size) <= TINY:
            image.save(data, "png", optimize=True)
            return h("img", src=data_uri(data, "png"), alt=alt, class_="pic tiny")
        large = max(image.size) > side
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        image.save(data, "webp", quality=82)
        shown = h("img", src=data_uri(data, "webp"), alt=alt, class_="pic")
        where = quote(f"{self.folder.name}/{path}")
        return h("a", shown, href=where, title="open the file at full size") if large else shown


@dataclass(frozen=True)
class Case:
    """The rows of one case and seed, a row per model."""

    place: int
    rows: dict[str, Row]

    @property
    def any(self) -> Row:
        return next(iter(self.rows.values()))

    def difference(self, model: str | None, against: str | None) -> float | None:
        first, second = self.score(model), self.score(against)
        return None if first is None or second is None else first - second

    def score(self, model: str | None) -> float | None:
        row = self.rows.get(model or "")
        return None if row is None else row.score


def collect_cases(findings: Findings) -> list[Case]:
    """All cases, one of each category after the other, so that a first screen shows them all."""
    found: dict[tuple[str, int], dict[str, Row]] = {}
    for row in findings.rows:
        found.setdefault((row.case, row.seed), {})[row.model] = row
    order = [scope for task in findings.tasks for scope in findings.scopes(task)]
    seen: dict[tuple[str, str], int] = {}
    ranked = []
    for item, rows in sorted(found.items()):
        row = next(iter(rows.values()))
        turn = seen[row.task, row.category] = seen.get((row.task, row.category), 0) + 1
        ranked.append(((turn, order.index((row.task, row.category)), item), rows))
    ranked.sort(key=lambda entry: entry[0])
    return [Case(place, rows) for place, (_, rows) in enumerate(ranked)]


def choose_cases(cases: Sequence[Case], findings: Findings, *, limit: int) -> list[Case]:
    """At most `limit` cases: half by biggest loss, a quarter by biggest win, the rest drawn."""
    if len(cases) <= limit:
        return list(cases)
    cast = findings.cast
    gaps = {case.place: case.difference(cast.student, cast.reference) for case in cases}
    scored = sorted((gap, place) for place, gap in gaps.items() if gap is not None)
    losses = [place for _, place in scored[: limit // 2]]
    wins = [place for _, place in scored[limit // 2 :][-(limit // 4) :]]
    kept = {*losses, *wins}
    rest = [case.place for case in cases if case.place not in kept]
    kept |= set(random.Random(0).sample(rest, min(len(rest), limit - len(kept))))
    return [case for case in cases if case.place in kept]


def side_by_side(findings: Findings, pictures: Pictures, *, limit: int = MAX_CASES) -> Html:
    """Every case with the images, scores and reasons of all models, and tools to find one."""
    cases = collect_cases(findings)
    shown = choose_cases(cases, findings, limit=limit)
    options = [h("option", "all cases", value="")]
    for task in findings.tasks:
        title = TASK_TITLES[task]
        options.append(h("option", f"{title}, all", value=task))
        options.extend(
            h("option", f"{title}, {category_title(name)}", value=f"{task}/{name}")
            for name in findings.categories(task)
        )
    cast = findings.cast
    orders = [("mixed", "categories in turn")]
    if cast.student and cast.reference:
        orders += [("loss", "biggest loss first"), ("win", "biggest win first")]
    tools = h(
        "div",
        h("label", "Show", h("select", options, id="scope")),
        h("label", "Order", h("select", [h("option", t, value=v) for v, t in orders], id="order")),
        h("label", "Find", h("input", type="search", id="words", placeholder="words, case id")),
        h("label", "Size", h("input", type="range", id="size", min=64, max=320, value=136)),
        h("output", id="count"),
        class_="tools",
    )
    told = "Same prompt and same seed for every model."
    if cast.student and cast.reference:
        told += f" A loss is an image where {cast.student} scores below {cast.reference}."
    if len(shown) < len(cases):
        told += (
            f" {len(shown)} of {len(cases)} cases are shown: the biggest losses, the biggest wins "
            "and a random draw of the others; the tables above use all of them."
        )
    return h(
        "section",
        h("h2", "Side by side"),
        h("p", told, class_="hint"),
        tools,
        h("div", [_case(case, findings, pictures) for case in shown], id="cases"),
        h("button", "Show more", id="more", class_="more", type="button"),
        id="side-by-side",
    )


def failures(findings: Findings, pictures: Pictures) -> Html:
    """What was not scored and why, what is missing, and where the student is at its worst."""
    parts: list[Html] = [h("h2", "Failures")]
    reasons = unscored_reasons(findings.rows)
    if reasons:
        table = h(
            "table",
            h(
                "thead",
                h("tr", h("th", "Model"), h("th", "Why", class_="words"), h("th", "Images")),
            ),
            h(
                "tbody",
                [
                    h("tr", h("th", model), h("td", why, class_="words"), h("td", count))
                    for model, why, count in reasons
                ],
            ),
        )
        unscored = [row for row in findings.rows if row.score is None]
        left_out = len(unscored) - UNSCORED_SHOWN
        parts += [
            h("h3", "Not scored"),
            h("p", "These images are in no mean. Each is counted in the coverage.", class_="hint"),
            h("div", table, class_="scroll"),
            h(
                "div",
                [_cell(row, findings, pictures) for row in unscored[:UNSCORED_SHOWN]],
                class_="cells loose",
            ),
        ]
        if left_out > 0:
            parts.append(h("p", f"{left_out} more are in eval/rows.jsonl.", class_="hint"))
    else:
        parts.append(h("p", "Every image that was made was scored."))
    missing = [
        f"{model}: {group.missing} of {group.asked} in {TASK_TITLES[task]}"
        for (model, (task, category)), group in sorted(
            findings.groups.items(), key=lambda entry: (entry[0][0], entry[0][1][0])
        )
        if category is None and group.missing
    ]
    if missing:
        parts += [
            h("h3", "Missing rows"),
            h("p", "Images that another model has and this one does not."),
            h("ul", [h("li", line) for line in missing]),
        ]
    student = findings.cast.student
    if student is not None:
        scored = [case for case in collect_cases(findings) if case.score(student) is not None]
        scored.sort(key=lambda case: (case.score(student), case.place))
        parts += [
            h("h3", f"Lowest scores of {student}"),
            [_case(case, findings, pictures) for case in scored[:WORST]],
        ]
    return h("section", parts, id="failures")


def training_samples(run: Run) -> Html | None:
    """Sample grids, evenly spaced over training, the last always among them."""
    if not run.samples:
        return None
    last, shown = len(run.samples) - 1, min(TRAINING_SHOWN, len(run.samples))
    picks = sorted({round(i * last / max(1, shown - 1)) for i in range(shown)} | {last})
    pictures = Pictures(run.path)
    figures = []
    for path in (run.samples[i] for i in picks):
        step = path.stem.removeprefix("step_").lstrip("0") or "0"
        image = pictures.show(
            f"images/{path.name}", alt=f"samples at step {step}", side=TRAINING_SIDE
        )
        figures.append(h("figure", image, h("figcaption", f"step {step}")))
    return h(
        "section",
        h("h2", "Samples during training"),
        h("div", figures, class_="strip"),
        id="training",
    )


def _case(case: Case, findings: Findings, pictures: Pictures) -> Html:
    row, cast = case.any, findings.cast
    cells = []
    if row.source:
        cells.append(_given("Source", row.source, row, pictures))
    cells += [
        _cell(case.rows[model], findings, pictures) for model in cast.models if model in case.rows
    ]
    if row.target:
        cells.append(_given("Target", row.target, row, pictures))
    gap = case.difference(cast.student, cast.reference)
    return h(
        "article",
        h(
            "div",
            h("div", f"{TASK_TITLES[row.task]} · {category_title(row.category)}", class_="kind"),
            h("blockquote", row.prompt),
            _delta(gap, cast.reference) if gap is not None else None,
            h("div", f"{row.case} · seed {row.seed}", class_="where"),
            class_="about",
        ),
        h("div", cells, class_="cells"),
        class_="case",
        data_task=row.task,
        data_category=row.category,
        data_place=case.place,
        data_difference="" if gap is None else f"{gap:.4f}",
    )


def _delta(gap: float, against: str | None) -> Html:
    ink = "up-ink" if gap > 0 else "down-ink" if gap < 0 else None
    number = h("b", show_interval(Interval(gap, None, None), sign=True), class_=ink)
    return h("div", number, f" against {against}", class_="delta")


def _cell(row: Row, findings: Findings, pictures: Pictures) -> Html:
    score = "not scored" if row.score is None else f"{row.score:.2f}"
    reasons = list(row.reasons)
    if row.score is None:
        reasons.insert(0, row.status.removeprefix("unscored: "))
    subscores = " · ".join(f"{name} {value:.1f}" for name, value in row.subscores.items())
    alt = f"{row.model}, seed {row.seed}, score {score}: {row.prompt}"
    return h(
        "figure",
        pictures.show(row.image, alt=alt),
        h(
            "figcaption",
            h("span", row.model, class_="who"),
            h(
                "span",
                score,
                h("span", f" {row.nfe} NFE"),
                class_="score none" if row.score is None else "score",
            ),
            h("span", subscores, class_="sub") if subscores else None,
            h("ul", [h("li", reason) for reason in reasons]) if reasons else None,
        ),
        class_="student" if row.model == findings.cast.student else None,
    )


def _given(title: str, path: str, row: Row, pictures: Pictures) -> Html:
    image = pictures.show(path, alt=f"{title.lower()} of {row.case}: {row.prompt}")
    caption = h("figcaption", h("span", title, class_="who"), h("span", "given", class_="sub"))
    return h("figure", image, caption, class_="given")


def data_uri(data: io.BytesIO, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"
