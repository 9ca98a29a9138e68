"""Scores in the HTML report: the headline, the categories, wins and losses, as tables and bars."""

from collections.abc import Sequence

from fewstep.evals.findings import (
    TASK_TITLES,
    Findings,
    category_title,
    show_bounds,
    show_interval,
    show_seconds,
    speed_up,
)
from fewstep.evals.markup import Html, h, join, table
from fewstep.evals.stats import TIE, Comparison, Interval, Rank, Scope


def headline(found: Findings) -> Html:
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
        table(head, body),
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
            f"{model} against {against}, {TASK_TITLES[task].lower()}: {versus.pairs} pairs, "
            f"{versus.dropped} images dropped (scored only for {model}: {versus.only_model}, only "
            f"for {against}: {versus.only_against}, for neither: {versus.neither})"
        )
        if versus.categories_dropped:
            names = ", ".join(category_title(name) for name in versus.categories_dropped)
            line += f"; without {names}"
        lines.append(h("li", line))
    if not lines:
        return None
    return h("details", h("summary", "Images left out of the pairs"), h("ul", lines), class_="hint")


def categories(found: Findings) -> Html:
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
        parts += [h("h3", TASK_TITLES[task]), table(head, body)]
        if dropped:
            told = (
                f"Ranked on {found.rankings[task, None].images} images; {dropped} are not scored "
            )
            parts.append(h("p", told + "for every model.", class_="hint"))
    return h("section", parts, id="categories")


def wins(found: Findings) -> Html | None:
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
        h("span", show_bounds(group.mean), class_="ci"),
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
        h("span", show_bounds(versus.ratio, percent=True), class_="ci"),
    )


def _rank_cell(rank: Rank | None) -> Html:
    if rank is None:
        return h("td", "–")
    if rank.best == rank.worst:
        return h("td", rank.best)
    told = f"not separable from {', '.join(rank.not_separable)}" if rank.not_separable else None
    return h("td", f"{rank.best}–{rank.worst}", title=told)
