"""`write_study_report`: a study's folder -> report.html, results.md, results.csv, verdicts.json."""

import csv
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

from fewstep.evals import stats
from fewstep.evals.findings import CATEGORY_TITLES, show_interval
from fewstep.evals.report import markdown_table, plain, write_whole
from fewstep.study_report.page import render
from fewstep.study_report.read import DONE, Study, read_study, student_name
from fewstep.study_report.story import Story, tell
from fewstep.study_report.tables import Table
from fewstep.study_report.verdicts import MARGIN, Contrast, Takeaway

CSV_COLUMNS: tuple[str, ...] = (
    "variant",
    "roles",
    "seed",
    "nfe",
    "task",
    "category",
    "judge",
    "mean",
    "scored",
    "unscored",
    "missing",
    "recipe_hash",
    "code_hash",
    "seconds",
)


class StudyReportPaths(NamedTuple):
    html: Path
    markdown: Path
    csv: Path
    verdicts: Path


def write_study_report(folder: Path) -> StudyReportPaths:
    """Write all forms; what is missing or unfinished is named in them.

    Raises RunError for a folder that holds no study, DataError for damaged rows.
    """
    study = read_study(folder)
    story = tell(study)
    paths = StudyReportPaths(
        folder / "report.html",
        folder / "results.md",
        folder / "results.csv",
        folder / "verdicts.json",
    )
    write_whole(paths.html, render(study, story))
    write_whole(paths.markdown, markdown(study, story))
    write_whole(paths.csv, table(study))
    write_whole(paths.verdicts, json.dumps(verdicts(study, story), indent=2, ensure_ascii=False))
    return paths


def markdown(study: Study, story: Story) -> str:
    lines = [f"# {plain(study.name)}", "", plain(study.question), ""]
    lines += [*(plain(sentence) for sentence in story.lede), ""]
    for made in story.tables:
        lines += [f"## {plain(made.title)}", "", *_set(made), "", plain(made.caption), ""]
        lines += [
            line
            for table, said in story.against_base
            if table is made
            for line in (plain(said), "")
        ]
    lines += ["## What this study does not show", ""]
    lines += [*(f"- {plain(limit)}" for limit in story.limits), ""]
    if study.notes:
        lines += ["## Left out", "", *(f"- {plain(note)}" for note in study.notes), ""]
    return "\n".join(lines)


def _set(made: Table) -> list[str]:
    body = [
        [f"{cell.text} ({cell.small})" if cell.small else cell.text for cell in row]
        for row in made.rows
    ]
    return markdown_table(list(made.head), body)


def table(study: Study) -> str:
    """One line a variant, seed, task and category; references have no seed.

    `mean` is over the scored images, each case weighing the same. The category `all` is the mean of
    the categories' means. An unfinished cell has one line, without numbers.
    """
    out = io.StringIO()
    writer = csv.DictWriter(out, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    groups = {(g.model, g.task, g.category): g for g in stats.summarise(study.rows, draws=1)}
    nfe = {(row.model, row.task): row.nfe for row in study.rows}
    roles: dict[str, list[str]] = {}
    for role, name in study.roles.items():
        roles.setdefault(name, []).append(role)
    lines: list[tuple[str, dict[str, Any]]] = [
        (name, {"variant": name}) for name in study.references
    ]
    for cell in study.cells:
        about: dict[str, Any] = {
            "variant": cell.variant,
            "roles": " ".join(roles.get(cell.variant, [])),
            "seed": cell.seed,
            "recipe_hash": cell.recipe_hash,
            "code_hash": cell.code_hash,
            "seconds": cell.seconds,
        }
        if cell.status == DONE:
            lines.append((student_name(cell.variant, cell.seed), about))
        else:
            writer.writerow(about)
    order = {name: i for i, name in enumerate(CATEGORY_TITLES)}
    scopes = sorted(
        stats.scopes(study.rows),
        key=lambda scope: (scope[0] != "t2i", scope[1] is None, order.get(scope[1] or "", 99)),
    )
    for model, about in lines:
        for task, category in scopes:
            group = groups.get((model, task, category))
            if group is None:
                continue
            writer.writerow(
                about
                | {
                    "nfe": nfe.get((model, task)),
                    "task": task,
                    "category": category or "all",
                    "judge": study.judge,
                    "mean": None if group.mean is None else round(group.mean.value, 4),
                    "scored": group.scored,
                    "unscored": group.unscored,
                    "missing": group.missing,
                }
            )
    return out.getvalue()


def verdicts(study: Study, story: Story) -> dict[str, Any]:
    """For scripts: every contrast with its numbers and rule."""
    return {
        "study": study.name,
        "judge": study.judge,
        "margin": MARGIN,
        "cells": {
            "asked": len(study.cells),
            "finished": sum(cell.status == DONE for cell in study.cells),
        },
        "takeaways": [_takeaway(takeaway) for takeaway in story.takeaways],
    }


def _takeaway(takeaway: Takeaway) -> dict[str, Any]:
    return {
        "number": takeaway.number,
        "statement": takeaway.statement,
        "rule": takeaway.rule,
        "verdict": takeaway.verdict,
        "lacks": takeaway.lacks,
        "claims": [
            {
                "words": claim.words,
                "verdict": claim.verdict,
                "contrasts": [_contrast(contrast) for contrast in claim.contrasts],
            }
            for claim in takeaway.claims
        ],
    }


def _contrast(contrast: Contrast) -> dict[str, Any]:
    found: dict[str, Any] = {
        "words": contrast.words,
        "verdict": contrast.verdict,
        "reproduced_above": contrast.above,
        "not_reproduced_below": contrast.below,
        "two_sided": contrast.two_sided,
        "paper": contrast.paper,
        "needs": contrast.needs,
    }
    if contrast.estimate is not None:
        value, low, high = contrast.estimate.interval
        found |= {
            "value": value,
            "low": low,
            "high": high,
            "level": contrast.estimate.level,
            "prompts": contrast.estimate.cases,
            "dropped": contrast.estimate.dropped,
            "seeds": contrast.estimate.seeds,
            "shown": show_interval(contrast.estimate.interval, sign=True),
        }
    return found
