"""The report as one HTML page that works from disk: no network, no other file.

Sections from the top: what was run, the headline, categories, wins and losses, pictures, stability,
curves, samples, failures, recipe and plan.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from string import Template

from fewstep.evals import stability
from fewstep.evals.curves import draw, panels
from fewstep.evals.findings import (
    TASK_TITLES,
    Findings,
    Run,
    category_title,
    phases,
    show_interval,
    show_seconds,
)
from fewstep.evals.gallery import Pictures, failures, side_by_side, training_samples
from fewstep.evals.markup import Html, h, join
from fewstep.evals.stats import TIE, Comparison, Interval, Rank, Scope, judge_noise

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
        sections += [_headline(found), _categories(found), _wins(found), gallery]
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


def page(name: str, body: Html) -> str:
    """A whole document around `body`, with the report's style and script inside."""
    assets = files("fewstep.evals") / "report_assets"
    script = (assets / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Template((assets / "report.html").read_text(encoding="utf-8")).substitute(
        title=join([f"{name} · fewstep report"]),
        style=(assets / "report.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=f"sha256-{digest}",
        body=body,
    )


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
            f"On {_lower(task)}, {cast.student} with {cast.show_nfe(cast.student, task)} "
            f"evaluations reaches {versus.ratio.value:.1%} of the score of {cast.reference} "
            f"with {cast.show_nfe(cast.reference, task)}"
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
        detail = f"95% interval {_bounds(versus.ratio, percent=True)}, {versus.pairs} pairs"
        gap = found.gap_closed.get(task)
        if gap is not None:
            detail += f"; {gap.value:.0%} of the gap to {cast.cut} closed"
        blocks.append((f"{versus.ratio.value:.1%}", f"of {cast.reference}, {_lower(task)}", detail))
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


def _headline(found: Findings) -> Html:
    cast = found.cast
    head: list[Html] = [h("th", "Model"), h("th", "NFE")]
    for task in found.tasks:
        head.append(h("th", TASK_TITLES[task], class_="total"))
        if cast.reference:
            head.append(h("th", f"of {cast.reference}"))
    head += [h("th", "per image", class_="total"), h("th", "speed-up")]
    body = []
    for model in cast.models:
        cells: list[Html] = [h("th", model, scope="row"), h("td", cast.show_nfe(model))]
        for task in found.tasks:
            cells.append(_score_cell(found, model, (task, None), total=True))
            if cast.reference:
                versus = found.versus.get((model, cast.reference, (task, None)))
                cells.append(_ratio_cell(versus, own=model == cast.reference))
        seconds, faster = found.seconds.get(model), speed_up(found, model)
        cells.append(h("td", "–" if seconds is None else show_seconds(seconds), class_="total"))
        cells.append(h("td", "–" if faster is None else f"{faster:.1f}×"))
        body.append(_row(found, model, cells))
    told = (
        "Mean score on a scale of 1 to 5, each category with the same weight, with 95% bootstrap "
        f"intervals below. Percentages of {cast.reference} are paired: only images that are scored "
        "for both. Time per image is the median."
    )
    return h(
        "section",
        h("h2", "Scores"),
        h("p", told, class_="hint"),
        _table(head, body),
        _dropped(found),
        id="headline",
    )


def _dropped(found: Findings) -> Html | None:
    lines = []
    for (model, against, (task, category)), versus in sorted(
        found.versus.items(), key=lambda entry: (entry[0][0], entry[0][1], entry[0][2][0])
    ):
        if category is not None or not versus.dropped:
            continue
        line = (
            f"{model} against {against}, {_lower(task)}: {versus.pairs} pairs, {versus.dropped} "
            f"images dropped (scored only for {model}: {versus.only_model}, only for {against}: "
            f"{versus.only_against}, for neither: {versus.neither})"
        )
        if versus.categories_dropped:
            names = ", ".join(category_title(name) for name in versus.categories_dropped)
            line += f"; without {names}"
        lines.append(h("li", line))
    if not lines:
        return None
    return h("details", h("summary", "Images left out of the pairs"), h("ul", lines), class_="hint")


def _categories(found: Findings) -> Html:
    parts: list[Html] = [
        h("h2", "By category"),
        h(
            "p",
            "Ranks use the images scored for all models of a table. A range such as 1–2 means that "
            "the paired 95% interval of at least one difference includes 0: not separable. "
            "Bold: not separable from the best.",
            class_="hint",
        ),
    ]
    for task in found.tasks:
        scopes = found.scopes(task)
        head = [h("th", "Model"), h("th", "NFE")]
        for scope in scopes:
            counts = sorted({g.scored for (_, s), g in found.groups.items() if s == scope})
            told = str(counts[-1]) if len(counts) == 1 else f"{counts[0]}–{counts[-1]}"
            title = h("span", f"n = {told}", class_="ci")
            kind = "total" if scope[1] is None else None
            head.append(h("th", category_title(scope[1]), title, class_=kind))
        head.append(h("th", "Rank"))
        ranks = {entry.model: entry for entry in found.rankings[task, None].ranks}
        body = []
        for model in found.cast.models:
            cells = [h("th", model, scope="row"), h("td", found.cast.show_nfe(model, task))]
            cells += [_score_cell(found, model, s, total=s[1] is None) for s in scopes]
            body.append(_row(found, model, [*cells, _rank_cell(ranks.get(model))]))
        dropped = found.rankings[task, None].dropped
        parts += [h("h3", TASK_TITLES[task]), _table(head, body)]
        if dropped:
            told = (
                f"Ranked on {found.rankings[task, None].images} images; {dropped} are not scored "
            )
            parts.append(h("p", told + "for every model.", class_="hint"))
    return h("section", parts, id="categories")


def _wins(found: Findings) -> Html | None:
    cast, parts = found.cast, []
    if cast.student is None:
        return None
    for against in (cast.reference, cast.cut):
        shown = [
            found.versus[cast.student, against, scope]
            for task in found.tasks
            for scope in found.scopes(task)
            if against is not None and (cast.student, against, scope) in found.versus
        ]
        if not shown:
            continue
        bounds = [bound for versus in shown for bound in versus.difference if bound is not None]
        span = min(-0.05, *bounds), max(0.05, *bounds)
        parts += [
            h("h3", f"{cast.student} against {against}"),
            h(
                "div",
                [
                    h("span", text, class_="head")
                    for text in ("", "win, tie, loss", "mean difference", "")
                ],
                [_wins_line(versus, span=span) for versus in shown],
                class_="wtl",
            ),
        ]
    if not parts:
        return None
    told = f"Same case, same seed. A tie is a difference of at most {TIE:g} points."
    return h("section", h("h2", "Wins and losses"), h("p", told, class_="hint"), parts, id="wins")


def _wins_line(versus: Comparison, *, span: tuple[float, float]) -> Html:
    counts = {"w": versus.wins, "t": versus.ties, "l": versus.losses}
    names = {"w": "wins", "t": "ties", "l": "losses"}
    bar = []
    for kind, count in counts.items():
        label = str(count) if count > 0.04 * versus.pairs else None
        tip, width = f"{count} {names[kind]}", f"flex:{count} 0 0"
        if count:
            bar.append(h("i", label, class_=kind, title=tip, style=width))
    title = category_title(versus.category)
    if versus.category is None:
        title = f"{TASK_TITLES[versus.task]}, all"
    told = ", ".join(f"{count} {names[kind]}" for kind, count in counts.items())
    ink = None
    if versus.difference.excludes_zero:
        ink = "up-ink" if versus.difference.value > 0 else "down-ink"
    return join(
        [
            h("span", title, class_="all" if versus.category is None else None),
            h("div", bar, class_="bar", role="img", aria_label=f"{title}: {told}"),
            h("div", _whisker(versus.difference, span=span), class_="plot"),
            h("span", show_interval(versus.difference, sign=True), class_=f"diff {ink or ''}"),
        ]
    )


def _whisker(interval: Interval, *, span: tuple[float, float]) -> Html:
    low, high = span

    def x(value: float) -> str:
        return f"{6 + (value - low) / (high - low) * 288:.1f}"

    kind = ""
    if interval.excludes_zero:
        kind = "up" if interval.value > 0 else "down"
    line = None
    if interval.low is not None and interval.high is not None:
        line = h("line", x1=x(interval.low), x2=x(interval.high), y1=11, y2=11, class_="span")
    return h(
        "svg",
        h("line", x1=x(0.0), x2=x(0.0), y1=0, y2=22, class_="zero"),
        line,
        h("circle", cx=x(interval.value), cy=11, r=3.6),
        viewBox="0 0 300 22",
        class_=f"whisker {kind}",
        role="img",
        aria_label=f"mean difference {show_interval(interval, sign=True)}",
    )


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
    return _table(head, body)


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


def _table(head: Sequence[Html], body: Sequence[Html]) -> Html:
    return h("div", h("table", h("thead", h("tr", head)), h("tbody", body)), class_="scroll")


def _row(found: Findings, model: str, cells: Sequence[Html]) -> Html:
    return h("tr", cells, class_="student" if model == found.cast.student else None)


def _score_cell(found: Findings, model: str, scope: Scope, *, total: bool) -> Html:
    group = found.groups.get((model, scope))
    if group is None or group.mean is None:
        left_out = None
        if group is not None and group.scored:
            left_out = h("span", "a category has no score", class_="ci")
        return h("td", "–", left_out, class_="total" if total else None)
    ranks = found.rankings[scope].ranks
    best = len(ranks) > 1 and any(entry.model == model and entry.best == 1 for entry in ranks)
    low = None
    if group.coverage < 1:
        low = h("span", f"{group.scored} of {group.asked}", class_="ci low-n")
    classes = [name for name, on in (("best", best), ("total", total)) if on]
    return h(
        "td",
        h("span", f"{group.mean.value:.2f}", class_="mean"),
        h("span", _bounds(group.mean), class_="ci"),
        low,
        class_=" ".join(classes) or None,
    )


def _ratio_cell(versus: Comparison | None, *, own: bool) -> Html:
    if own:
        return h("td", h("span", "reference", class_="ci"))
    if versus is None:
        return h("td", "–")
    return h(
        "td",
        f"{versus.ratio.value:.1%}",
        h("span", _bounds(versus.ratio, percent=True), class_="ci"),
    )


def _rank_cell(rank: Rank | None) -> Html:
    if rank is None:
        return h("td", "–")
    if rank.best == rank.worst:
        return h("td", rank.best)
    told = f"not separable from {', '.join(rank.not_separable)}" if rank.not_separable else None
    return h("td", f"{rank.best}–{rank.worst}", title=told)


def _bounds(interval: Interval, *, percent: bool = False) -> str:
    if interval.low is None or interval.high is None:
        return "no interval"
    if percent:
        return f"[{interval.low * 100:.1f}, {interval.high * 100:.1f}]"
    return f"[{interval.low:.2f}, {interval.high:.2f}]"


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


def _lower(task: str) -> str:
    return TASK_TITLES[task].lower()
