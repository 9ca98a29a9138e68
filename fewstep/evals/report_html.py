"""The report as one HTML page that works from disk: no network, no other file.

Sections from the top: what was run, the headline, categories, wins and losses, pictures, stability,
curves, samples, failures, recipe and plan.
"""

import json
from collections.abc import Mapping, Sequence

from fewstep.evals import score_tables, stability
from fewstep.evals.curves import draw, panels
from fewstep.evals.findings import (
    TASK_TITLES,
    Findings,
    Run,
    lede,
    phases,
    show_bounds,
    show_seconds,
    speed_up,
)
from fewstep.evals.gallery import Pictures, failures, side_by_side, training_samples
from fewstep.evals.markup import Html, h, join, page, table
from fewstep.evals.stats import judge_noise

PANELS_OPEN = 9
"""Further panels of curves are folded away."""


def render(run: Run) -> str:
    """The whole page."""
    found = run.findings
    sections: list[Html | None] = []
    notes = list(run.notes)
    if found is not None:
        pictures = Pictures(run.path / "eval")
        gallery, failed = side_by_side(found, pictures), failures(found, pictures)
        unread = sorted(set(pictures.failed))
        if unread:
            more = "" if len(unread) == 1 else f" and {len(unread) - 1} more"
            notes.append(f"images that could not be shown: eval/{unread[0]}{more}")
        sections += [
            score_tables.headline(found),
            score_tables.categories(found),
            score_tables.wins(found),
            gallery,
        ]
        sections += [stability.section(run), _curves(run), training_samples(run), failed]
    else:
        sections += [stability.section(run), _curves(run), training_samples(run)]
    sections += [_recipe(run), _plan(run)]
    body = [
        _header(run, notes),
        _contents(found is not None, run),
        h("main", sections, h("footer", "Written by fewstep report from ", run.path.name)),
    ]
    return page(run.name, join(body))


def _header(run: Run, notes: Sequence[str]) -> Html:
    found, summary = run.findings, run.summary or {}
    facts: list[tuple[str, str]] = [("Date", run.date)]
    if "device" in summary:
        facts.append(("Device", _words(summary["device"])))
    if found is not None:
        models = ", ".join(
            f"{name} ({found.cast.show_nfe(name)} NFE)" for name in found.cast.models
        )
        facts += [("Models", models), ("Judge", found.judge), ("Seeds", _seeds(found))]
        facts.append(("Coverage", _coverage(found)))
        if (noise := judge_noise(found.rows)) is not None:
            facts.append(("One judgement scatters by", f"{noise:.2f}"))
    hidden = {"date", "device", "seconds", "name", "pools"}
    facts += [
        (key.replace("_", " ").capitalize(), _words(value))
        for key, value in summary.items()
        if key not in hidden
    ]
    told = [h("p", " ".join(lede(found)), class_="lede")] if found and lede(found) else []
    return h(
        "header",
        h("div", "fewstep report", class_="eyebrow"),
        h("h1", run.name),
        told,
        _figures(run) if found is not None else None,
        h("dl", [h("div", h("dt", name), h("dd", text)) for name, text in facts], class_="facts"),
        _phases(run),
        _notes(notes),
        class_="top",
    )


def _figures(run: Run) -> Html | None:
    found = run.findings
    if found is None or found.cast.student is None or found.cast.reference is None:
        return None
    cast, blocks = found.cast, []
    for task in found.tasks:
        versus = found.versus.get((found.cast.student, found.cast.reference, (task, None)))
        if versus is None:
            continue
        detail = f"95% interval {show_bounds(versus.ratio, percent=True)}, {versus.pairs} pairs"
        gap = found.gap_closed.get(task)
        if gap is not None:
            detail += f"; {gap.value:.0%} of the gap to {cast.cut} closed"
        blocks.append(
            (
                f"{versus.ratio.value:.1%}",
                f"of {cast.reference}, {TASK_TITLES[task].lower()}",
                detail,
            )
        )
    faster = speed_up(found, found.cast.student)
    if faster is not None:
        own, full = found.seconds[found.cast.student], found.seconds[found.cast.reference]
        times = f"{show_seconds(full)} → {show_seconds(own)}, median"
        blocks.append((f"{faster:.1f}×", "faster per image", times))
    spent = phases(run.summary)
    if spent:
        device = (run.summary or {}).get("device")
        told = f"on {_words(device)}" if device else "wall time"
        blocks.append((show_seconds(sum(spent.values())), "for the whole run", told))
    cells = [h("div", h("strong", a), h("em", b), h("span", c)) for a, b, c in blocks]
    return h("div", cells, class_="figures") if cells else None


def _phases(run: Run) -> Html | None:
    spent = phases(run.summary)
    total = sum(spent.values())
    if len(spent) < 2 or total <= 0:
        return None
    bars = [
        h("i", class_=f"s{i % 8}", style=f"width:{seconds / total:.2%}")
        for i, seconds in enumerate(spent.values())
    ]
    key = [
        h("li", h("i", class_=f"s{i % 8}"), f"{name} {show_seconds(seconds)}")
        for i, (name, seconds) in enumerate(spent.items())
    ]
    return join(
        [
            h("div", bars, class_="phases", role="img", aria_label="wall time by phase"),
            h("ul", key, class_="phase-key"),
        ]
    )


def _notes(notes: Sequence[str]) -> Html | None:
    if not notes:
        return None
    lines = h("ul", [h("li", note) for note in notes])
    return h("div", h("b", "What this report leaves out"), lines, class_="notes", role="note")


def _contents(scored: bool, run: Run) -> Html:
    links = []
    if scored:
        links += [("headline", "Scores"), ("categories", "Categories"), ("wins", "Wins and losses")]
        links.append(("side-by-side", "Side by side"))
    if any(stability.is_stability(key) for key in run.metrics):
        links.append(("stability", "Stability"))
    if run.metrics:
        links.append(("curves", "Curves"))
    if run.samples:
        links.append(("training", "Samples"))
    if scored:
        links.append(("failures", "Failures"))
    if run.recipe is not None:
        links.append(("recipe", "Recipe"))
    if run.plan is not None:
        links.append(("plan", "Plan"))
    return h("nav", h("ul", [h("li", h("a", text, href=f"#{to}")) for to, text in links]))


def _curves(run: Run) -> Html | None:
    if not run.metrics:
        return None
    shown = {k: points for k, points in run.metrics.items() if not stability.is_stability(k)}
    drawn = [draw(panel) for panel in panels(shown)]
    folded = drawn[PANELS_OPEN:]
    rest = h(
        "details",
        h("summary", f"{len(folded)} more"),
        h("div", folded, class_="curves"),
    )
    return h(
        "section",
        h("h2", "Curves"),
        h(
            "p",
            "Over training steps, with the last value of each. Pale lines are raw.",
            class_="hint",
        ),
        h("div", drawn[:PANELS_OPEN], class_="curves"),
        rest if folded else None,
        id="curves",
    )


def _recipe(run: Run) -> Html | None:
    if run.recipe is None:
        return None
    return h("section", h("h2", "Recipe"), h("pre", h("code", run.recipe)), id="recipe")


def _plan(run: Run) -> Html | None:
    if run.plan is None:
        return None
    plain = {key: value for key, value in run.plan.items() if not _is_nested(value)}
    parts: list[Html] = [h("h2", "Plan"), _pairs(plain)]
    for key, value in run.plan.items():
        if key in plain:
            continue
        title = h("h3", key.replace("_", " ").capitalize())
        if isinstance(value, list):
            parts += [title, _records([item for item in value if isinstance(item, dict)])]
        elif isinstance(value, dict):
            parts += [title, _pairs(value)]
    whole = h("pre", h("code", json.dumps(run.plan, indent=2, ensure_ascii=False)))
    parts.append(h("details", h("summary", "plan.json"), whole))
    return h("section", parts, id="plan", class_="plan")


def _is_nested(value: object) -> bool:
    return isinstance(value, dict) or (
        isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)
    )


def _pairs(values: Mapping[str, object]) -> Html:
    lines = [
        h("tr", h("th", key.replace("_", " ")), h("td", _words(value)))
        for key, value in values.items()
    ]
    return h("div", h("table", h("tbody", lines)), class_="scroll")


def _records(records: Sequence[Mapping[str, object]]) -> Html:
    keys = list(dict.fromkeys(key for record in records for key in record))
    head = [h("th", key.replace("_", " ")) for key in keys]
    body = [h("tr", [h("td", _words(record.get(key))) for key in keys]) for record in records]
    return table(head, body)


def _words(value: object) -> str:
    """JSON in one line: `base 0.7, text 0.3`."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e5 else f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_words(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ("; " if _is_nested(value) else ", ").join(_words(item) for item in value)
    return str(value)


def _seeds(found: Findings) -> str:
    seeds = sorted({row.seed for row in found.rows})
    if len(seeds) <= 6:
        return ", ".join(str(seed) for seed in seeds)
    return f"{len(seeds)} seeds, {seeds[0]} to {seeds[-1]}"


def _coverage(found: Findings) -> str:
    told = []
    for model in found.cast.models:
        groups = [g for (name, (_, c)), g in found.groups.items() if name == model and c is None]
        asked = sum(g.asked for g in groups)
        told.append((sum(g.scored for g in groups), asked, model))
    if all(scored == asked for scored, asked, _ in told):
        return f"100%, {told[0][1]} images per model" if told else "–"
    return ", ".join(f"{model} {scored} of {asked}" for scored, asked, model in told)
