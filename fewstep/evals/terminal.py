"""The report in the terminal: the headline and the means by category, in 80 columns."""

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fewstep.evals.findings import (
    TASK_TITLES,
    Findings,
    Run,
    category_title,
    lede,
    phases,
    show_interval,
    show_seconds,
    speed_up,
)


def summary(run: Run) -> RenderableType:
    """What `results.md` says, but for the intervals of categories."""
    found, parts = run.findings, []
    if found is not None:
        parts += [*map(Text, lede(found)), _headline(found)]
        parts += [_categories(found, task) for task in found.tasks]
        judged = f"\nMeans from 1 to 5 by {found.judge}; [95 % intervals]; percentages are paired."
        parts.append(Text(judged))
    spent = phases(run.summary)
    if spent:
        told = ", ".join(f"{name} {show_seconds(seconds)}" for name, seconds in spent.items())
        parts.append(Text(f"Took {show_seconds(sum(spent.values()))}: {told}."))
    parts += [Text(f"left out: {note}") for note in run.notes]
    return Group(*parts)


def _table(title: str) -> Table:
    return Table(
        title=f"\n{escape(title)}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,  # the box parts columns by a space already; six categories need the width
        show_edge=False,
    )


def _headline(found: Findings) -> Table:
    """The score of a cell over its share of the reference's."""
    cast = found.cast
    table = _table(f"score, and share of {cast.reference}" if cast.reference else "score")
    table.add_column("model", no_wrap=True)
    for name in ("NFE", *(TASK_TITLES[task] for task in found.tasks), "per image"):
        table.add_column(name, justify="right", no_wrap=True)
    for model in cast.models:
        cells = [model, cast.show_nfe(model)]
        for task in found.tasks:
            group = found.groups.get((model, (task, None)))
            told = show_interval(group.mean if group else None)
            versus = found.versus.get((model, cast.reference or "", (task, None)))
            share = show_interval(versus.ratio, percent=True) if versus else ""
            cells.append(f"{told}\n{share}")
        seconds, faster = found.seconds.get(model), speed_up(found, model)
        pace = "–" if seconds is None else show_seconds(seconds)
        cells.append(pace if faster is None else f"{pace}\n{faster:.1f}×")
        table.add_row(*map(escape, cells), style="bold" if model == cast.student else "")
    return table


def _categories(found: Findings, task: str) -> Table:
    scopes = found.scopes(task)
    table = _table(TASK_TITLES[task])
    table.add_column("model", no_wrap=True)
    for _, category in scopes:
        table.add_column(category_title(category), justify="right")
    table.add_column("rank", justify="right")
    ranks = {entry.model: entry for entry in found.rankings[task, None].ranks}
    for model in found.cast.models:
        groups = [found.groups.get((model, scope)) for scope in scopes]
        means = [f"{g.mean.value:.2f}" if g is not None and g.mean else "–" for g in groups]
        rank = ranks.get(model)
        place = "–"
        if rank is not None:
            place = str(rank.best) if rank.best == rank.worst else f"{rank.best}–{rank.worst}"
        cells = map(escape, (model, *means, place))
        table.add_row(*cells, style="bold" if model == found.cast.student else "")
    return table
