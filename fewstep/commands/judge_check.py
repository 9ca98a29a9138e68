"""`fewstep judge check`: how often a judge puts a picture above its spoilt copies."""

import json
import os
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
from rich.table import Table

from fewstep.commands.opening import open_domain
from fewstep.core.types import Task
from fewstep.data.domain import FolderDomain
from fewstep.domain import Case, Domain, Question, Verdict
from fewstep.endpoint import replies
from fewstep.errors import DataError, RecipeError, RunError
from fewstep.evals.findings import cast_models
from fewstep.evals.pictures import read_picture
from fewstep.evals.rows import read_rows
from fewstep.judges.controls import (
    ORIGINAL,
    Ask,
    Checked,
    Control,
    Pictures,
    Standing,
    check,
    pooled,
    spoil,
)
from fewstep.judges.endpoint import FIELD, EndpointJudge, open_judge
from fewstep.lab.corrupt import swapped_letters
from fewstep.lab.domain import LabDomain
from fewstep.lab.edits import Edit
from fewstep.lab.world import render
from fewstep.recipe.facts import local_machine
from fewstep.recipe.judging import GREETING
from fewstep.recipe.load import load_recipe
from fewstep.recipe.plan import make_plan
from fewstep.recipe.schema import PromptSource, Recipe
from fewstep.session import console, progress, say, write_text


@dataclass(frozen=True)
class Originals:
    """Pictures of one task and category that ought to score high."""

    pictures: Pictures
    cases: tuple[Case, ...]
    controls: tuple[Control, ...]


def check_judge(
    source: Path,
    *,
    overrides: Mapping[str, str],
    per_category: int,
    seed: int,
    out: Path | None,
    dry_run: bool,
) -> None:
    """How often the judge puts a picture above its spoilt copies."""
    recipe_path = source / "recipe.yaml" if source.is_dir() else source
    recipe = load_recipe(recipe_path, overrides)
    judge = open_judge(recipe.evaluation.judge, os.environ)
    if judge is None and source.is_dir():
        raise RecipeError(
            "is missing, and a run's pictures have no truth to be judged by",
            field=FIELD,
            where=str(recipe_path),
            hint="give it with --set evaluation.judge.url=... and so on",
        )
    if source.is_dir():
        domain, groups = None, from_run(source, per_category, seed)
    else:
        make_plan(recipe, local_machine())  # for its refusals
        domain, groups = from_recipe(recipe, per_category, seed, truth=judge is None)
    pictures = sum(len(g.cases) + sum(len(c.at) for c in g.controls) for g in groups)
    name = domain.judge_name if judge is None and domain else judge.name if judge else ""
    requests = "" if judge is None else f", {requests_for(pictures, judge):,} requests"
    say(f"{name}: {pictures:,} pictures, originals and controls{requests}")
    if dry_run:
        return
    if judge is not None:
        judge.greet()
        ask = by_endpoint(judge)
    else:
        assert domain is not None
        ask = by_domain(domain)
    checked = []
    with progress("judge", pictures) as advance:
        done = 0
        for group in groups:
            checked.append(check(group.pictures, group.cases, group.controls, ask))
            done += len(group.cases) + sum(len(c.at) for c in group.controls)
            advance(done, group.cases[0].category)
    show(name, checked)
    if out is not None:
        write_text(out, json.dumps(as_json(name, checked), indent=2))


def requests_for(pictures: int, judge: EndpointJudge) -> int:
    return pictures * judge.settings.repeats + GREETING


def by_endpoint(judge: EndpointJudge) -> Ask:
    def ask(pictures: Pictures, cases: Sequence[Case]) -> list[Verdict]:
        asked = deque(
            (i, Question(case.task, case.category, case.prompt, picture, case.source))
            for i, (picture, case) in enumerate(zip(pictures, cases, strict=True))
        )
        told = replies(lambda job: judge.ask(job[1]), asked, judge.workers)
        found = {i: verdict for (i, _), verdict in told}
        return [found[i] for i in range(len(cases))]

    return ask


def by_domain(domain: Domain) -> Ask:
    """The world's own judge, which knows the truth."""
    return lambda pictures, cases: domain.judge(np.stack(pictures), cases)


def from_recipe(
    recipe: Recipe, per_category: int, seed: int, *, truth: bool
) -> tuple[Domain, list[Originals]]:
    """True renders of the lab or images of the folder, of the training split.

    Without `truth` the cases carry none: they are for a judge that reads prompts.
    """
    source = recipe.data.source
    if isinstance(source, PromptSource):
        raise RecipeError(
            "prompts have no pictures to check a judge with",
            field="data.source.kind",
            hint="give the folder of a run that has drawn some, or a recipe of lab or folder",
        )
    domain = open_domain(source)
    groups = []
    for task, category in recipe.data.conditions():
        cases = domain.cases(task, category, per_category, seed, evaluation=False)
        rng = np.random.default_rng([seed, len(groups)])
        pictures = [picture_of(case, domain) for case in cases]
        blind = cases if truth else [replace(case, truth=None) for case in cases]
        controls = spoil(pictures, blind, rng)
        if isinstance(domain, LabDomain) and category in ("text", "text_edit"):
            spelt = [misspelt_render(case, rng) for case in cases]
            everywhere = tuple(range(len(cases)))
            controls.append(Control("swapped letters", everywhere, spelt, tuple(blind)))
        groups.append(Originals(pictures, tuple(blind), tuple(controls)))
    return domain, groups


def picture_of(case: Case, domain: Domain) -> np.ndarray:
    """What the case asks for, as it truly looks."""
    if case.target is not None:
        return case.target
    if isinstance(domain, FolderDomain):
        return domain.folder.pixels([cast(int, case.truth)])[0]
    scene, _ = cast(tuple, case.truth)
    return render(scene)


def misspelt_render(case: Case, rng: np.random.Generator) -> np.ndarray:
    """The true picture with two letters of its sign exchanged."""
    truth, _ = cast(tuple, case.truth)
    return render(swapped_letters(truth.after if isinstance(truth, Edit) else truth, rng))


def from_run(run_dir: Path, per_category: int, seed: int) -> list[Originals]:
    """What the teacher of most evaluations has drawn in this run."""
    path = run_dir / "eval" / "rows.jsonl"
    if not path.is_file():
        raise RunError(f"run folder {run_dir}: no pictures; `fewstep eval {run_dir}` draws some")
    rows = {row.item: row for row in read_rows(path).rows}.values()
    model = cast_models(list(rows)).reference
    if model is None:
        raise DataError(f"{path}: no teacher has drawn anything there; evaluate one with the run")
    say(f"originals: what {model} has drawn in {run_dir}")
    groups = []
    own = [row for row in rows if row.model == model and (path.parent / row.image).is_file()]
    for task, category in dict.fromkeys((row.task, row.category) for row in own):
        some = [row for row in own if (row.task, row.category) == (task, category)][:per_category]
        cases = [
            Case(
                row.case,
                cast(Task, row.task),
                row.category,
                row.prompt,
                row.seed,
                None,
                None if row.source is None else read_picture(path.parent / row.source),
            )
            for row in some
        ]
        pictures = [read_picture(path.parent / row.image) for row in some]
        rng = np.random.default_rng([seed, len(groups)])
        groups.append(Originals(pictures, tuple(cases), tuple(spoil(pictures, cases, rng))))
    return groups


def show(name: str, checked: Sequence[Checked]) -> None:
    controls = list(dict.fromkeys(one.name for group in checked for one in group.standings[1:]))
    table = Table("control", *("right order", "95 %", "ties", "pairs", "unscored"), title=name)
    for control in [*controls, ""]:
        one = pooled(checked, control)
        counts = (f"{number:,}" for number in (one.ties, one.pairs, one.unscored))
        table.add_row(control or "all", *shares(one), *counts, end_section=control == controls[-1])
    console.print(table)
    for group in checked:
        table = Table("control", "score", "right order", "95 %", "ties", "unscored")
        table.title = f"{group.task}: {group.category}"
        for one in group.standings:
            score = "-" if one.score is None else f"{one.score:.2f}"
            own = ("", "", "") if one.name == ORIGINAL else (*shares(one), f"{one.ties:,}")
            table.add_row(one.name, score, *own, f"{one.unscored:,}")
        console.print(table)
    weak = [c for c in controls if (bounds := pooled(checked, c).interval) and bounds[0] <= 0.5]
    if weak:
        say(f"not told from guessing: {', '.join(weak)}")


def shares(one: Standing) -> tuple[str, str]:
    if one.accuracy is None or one.interval is None:
        return "-", "-"
    low, high = one.interval
    return f"{one.accuracy:.1%}", f"{low:.1%} - {high:.1%}"


def as_json(name: str, checked: Sequence[Checked]) -> dict[str, object]:
    return {
        "judge": name,
        "groups": [
            {
                "task": group.task,
                "category": group.category,
                "standings": [
                    asdict(one) | {"accuracy": one.accuracy, "interval": one.interval}
                    for one in group.standings
                ],
            }
            for group in checked
        ],
    }
