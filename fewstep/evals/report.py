"""`write_report`: a run folder -> report.html, results.md and results.csv beside its recipe."""

import csv
import io
import os
import re
from pathlib import Path
from typing import NamedTuple

from fewstep.errors import cannot_write
from fewstep.evals.findings import (
    TASK_TITLES,
    Findings,
    Run,
    category_title,
    lede,
    phases,
    read_run,
    show_interval,
    show_seconds,
    speed_up,
)
from fewstep.evals.report_html import render
from fewstep.evals.stats import Interval, Rank, Scope, judge_noise

CSV_COLUMNS = (
    "model",
    "nfe",
    "task",
    "category",
    "judge",
    "scored",
    "unscored",
    "missing",
    "coverage",
    "mean",
    "mean_low",
    "mean_high",
    "against",
    "pairs",
    "dropped",
    "ratio",
    "ratio_low",
    "ratio_high",
    "difference",
    "difference_low",
    "difference_high",
    "wins",
    "ties",
    "losses",
    "rank",
    "rank_best",
    "rank_worst",
    "seconds_per_image",
    "speed_up",
)


class ReportPaths(NamedTuple):
    html: Path
    markdown: Path
    csv: Path
    run: Run
    """What they were written from."""


def write_report(
    run_dir: Path,
    *,
    judge: str | None = None,
    reference: str | None = None,
    student: str | None = None,
) -> ReportPaths:
    """Write all three forms; whatever the run folder lacks is named in them.

    Without a choice: the judge of the last row, the teacher with most evaluations as reference,
    and the last model whose name starts with "student".
    """
    run = read_run(run_dir, judge=judge, reference=reference, student=student)
    paths = ReportPaths(
        run_dir / "report.html", run_dir / "results.md", run_dir / "results.csv", run
    )
    write_whole(paths.html, render(run))
    write_whole(paths.markdown, markdown(run))
    write_whole(paths.csv, table(run.findings))
    return paths


def markdown(run: Run) -> str:
    """The headline, the categories and the cost, for a README or a model card."""
    found = run.findings
    lines = [f"# {plain(run.name)}", ""]
    if found is not None:
        lines += [plain(sentence) for sentence in lede(found)]
        lines += ["", *_headline(found), ""]
        for task in found.tasks:
            lines += [f"## {TASK_TITLES[task]}", "", *_categories(found, task), ""]
        lines += [
            "Mean scores from 1 to 5 by "
            f"{plain(found.judge)}, each category with the same weight, with 95% bootstrap "
            "intervals. Percentages are paired. A rank such as 1–2 is not separable.",
            "",
        ]
        noise = judge_noise(found.rows)
        if noise is not None:
            lines += [
                f"One judgement of an image scatters by {noise:.2f} (standard deviation).",
                "",
            ]
    cost = [f"{plain(name)} {show_seconds(seconds)}" for name, seconds in _cost(run)]
    if cost:
        device = (run.summary or {}).get("device", "unknown device")
        lines += [f"Cost on {plain(str(device))}: {', '.join(cost)}.", ""]
    if run.notes:
        lines += ["Left out:", "", *(f"- {plain(note)}" for note in run.notes), ""]
    return "\n".join(lines)


def table(found: Findings | None) -> str:
    """A line per model, task and category, plus one per model and task (category `all`)."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    if found is None:
        return out.getvalue()
    for task in found.tasks:
        for scope in found.scopes(task):
            for model in found.cast.models:
                if (model, scope) in found.groups:
                    record = _record(found, model, scope)
                    writer.writerow([record.get(column) for column in CSV_COLUMNS])
    return out.getvalue()


def _record(found: Findings, model: str, scope: Scope) -> dict[str, str | int | float | None]:
    group, reference = found.groups[model, scope], found.cast.reference
    record: dict[str, str | int | float | None] = {
        "model": model,
        "nfe": found.cast.nfe[model].get(scope[0]),
        "task": scope[0],
        "category": scope[1] or "all",
        "judge": found.judge,
        "scored": group.scored,
        "unscored": group.unscored,
        "missing": group.missing,
        "coverage": round(group.coverage, 4),
        **_bounds("mean", group.mean),
        "seconds_per_image": found.seconds.get(model),
        "speed_up": speed_up(found, model),
    }
    versus = found.versus.get((model, reference, scope)) if reference else None
    if versus is not None:
        record |= {
            "against": reference,
            "pairs": versus.pairs,
            "dropped": versus.dropped,
            **_bounds("ratio", versus.ratio),
            **_bounds("difference", versus.difference),
            "wins": versus.wins,
            "ties": versus.ties,
            "losses": versus.losses,
        }
    rank = _rank(found, model, scope)
    if rank is not None:
        record |= {"rank": rank.rank, "rank_best": rank.best, "rank_worst": rank.worst}
    return record


def _bounds(name: str, interval: Interval | None) -> dict[str, float | None]:
    if interval is None:
        return {}
    return {
        key: None if bound is None else round(bound, 4)
        for key, bound in zip((name, f"{name}_low", f"{name}_high"), interval, strict=True)
    }


def _headline(found: Findings) -> list[str]:
    cast = found.cast
    head = ["model", "NFE"]
    for task in found.tasks:
        head += [TASK_TITLES[task], *([f"of {cast.reference}"] if cast.reference else [])]
    body = []
    for model in cast.models:
        cells = [model, cast.show_nfe(model)]
        for task in found.tasks:
            group = found.groups.get((model, (task, None)))
            cells.append(show_interval(group.mean if group else None))
            if cast.reference:
                versus = found.versus.get((model, cast.reference, (task, None)))
                own = "reference" if model == cast.reference else "–"
                cells.append(show_interval(versus.ratio, percent=True) if versus else own)
        seconds, faster = found.seconds.get(model), speed_up(found, model)
        cells.append("–" if seconds is None else show_seconds(seconds))
        cells.append("–" if faster is None else f"{faster:.1f}×")
        body.append(cells)
    return markdown_table([*head, "per image", "speed-up"], body)


def _categories(found: Findings, task: str) -> list[str]:
    scopes = found.scopes(task)
    head = ["model", "NFE", *(category_title(category) for _, category in scopes), "rank"]
    body = []
    for model in found.cast.models:
        cells = [model, found.cast.show_nfe(model, task)]
        for scope in scopes:
            group = found.groups.get((model, scope))
            told = show_interval(group.mean if group else None)
            if group is not None and group.coverage < 1:
                told += f" ({group.scored} of {group.asked})"
            cells.append(told)
        rank = _rank(found, model, (task, None))
        settled = rank is not None and rank.best == rank.worst
        cells.append("–" if rank is None else str(rank.best) if settled else _range(rank))
        body.append(cells)
    return markdown_table(head, body)


def _range(rank: Rank) -> str:
    return f"{rank.best}–{rank.worst}"


def _rank(found: Findings, model: str, scope: Scope) -> Rank | None:
    return next((entry for entry in found.rankings[scope].ranks if entry.model == model), None)


def _cost(run: Run) -> list[tuple[str, float]]:
    spent = phases(run.summary)
    total = [("total", sum(spent.values()))] if len(spent) > 1 else []
    return [*spent.items(), *total]


def markdown_table(head: list[str], body: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * 2 + ["---:"] * (len(head) - 2), *body]
    cells = [[cell if cell.startswith("---") else plain(cell) for cell in line] for line in lines]
    return [f"| {' | '.join(line)} |" for line in cells]


def plain(text: str) -> str:
    """One line that Markdown shows as it is."""
    return re.sub(r"([\\`*_<>|])", r"\\\1", " ".join(text.split()))


def write_whole(path: Path, text: str) -> None:
    """All or nothing: an older report stays whole if the disk is full."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise cannot_write(path, error) from error
