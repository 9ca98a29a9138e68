"""The recipe that studies support: composition, lambda table and ratio, with the evidence beside.

A default is kept unless another variant is separably better. What is better is decided on the
average of each task that the variants of a role group were trained on, with all intervals of the
group held at once (Bonferroni), so that the best of several is not chosen by luck.
"""

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fewstep.errors import RunError
from fewstep.evals.findings import TASK_TITLES, show_interval
from fewstep.evals.report import write_whole
from fewstep.recipe.facts import local_machine
from fewstep.recipe.load import dump_brief_yaml, load_recipe
from fewstep.recipe.plan import make_plan
from fewstep.recipe.schema import TASKS, GuidanceRule, Recipe
from fewstep.study_report.read import Study, read_study
from fewstep.study_report.verdicts import ERROR, judge

WIDTH = 96


class Aspect(NamedTuple):
    """One of the three choices of a recipe, and the roles that offer it."""

    name: str
    field: str
    default: str
    because: str
    """Why the default is the one to keep where nothing is separable."""
    roles: dict[str, int]
    """How much there is to each: the simplest of those that are not separable is chosen."""


ASPECTS = (
    Aspect(
        "composition",
        "data.composition",
        "e5",
        "it leaves no category out without evidence",
        {"e1": 1, "e2": 1, "e3": 1, "e4": 2, "e5": 3},
    ),
    Aspect(
        "guidance",
        "guidance",
        "base_only",
        "one teacher is the simplest and cheapest real score",
        {"base_only": 1, "specialised_only": 1, "constant": 2, "stepwise": 3, "adaptive": 4},
    ),
    Aspect(
        "ratio",
        "data.mixture",
        "r5to5",
        "it favours neither task",
        dict.fromkeys(("zero_shot", "r9to1", "r7to3", "r5to5", "r3to7"), 1),
    ),
)


@dataclass(frozen=True)
class Choice:
    """What one study says about one aspect."""

    study: Study
    aspect: Aspect
    role: str
    recipe: Recipe
    """Of a finished cell that plays the role."""
    settled: bool
    """Separably better than the default, or the default separably better than all others."""
    evidence: tuple[str, ...]


def recommend(folders: Sequence[Path], out: Path) -> Path:
    """Write the recipe to `out`.

    Raises RunError where the studies speak of no aspect, contradict each other or used other
    teachers, or `out` is there already.
    """
    if out.exists():
        raise RunError(f"{out} is there already; choose another --out")
    studies = [read_study(folder) for folder in folders]
    choices: dict[str, Choice] = {}
    for aspect in ASPECTS:
        found = [c for study in studies if (c := choose(study, aspect)) is not None]
        if found:
            choices[aspect.name] = _agree(found)
    if not choices:
        names = ", ".join(str(folder) for folder in folders)
        raise RunError(
            f"{names}: no finished cells play two roles of one table (such as e1 and e2, or "
            "base_only and stepwise), so there is nothing to choose between; see `roles` in "
            "study.yaml"
        )
    recipe = compose(choices)
    make_plan(recipe, local_machine())  # for its refusals, before anything is written
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, annotate(recipe, studies, choices))
    written = load_recipe(out)
    assert written == recipe, "comments must not change the recipe"
    return out


def choose(study: Study, aspect: Aspect) -> Choice | None:
    """None where fewer than two roles of the aspect have finished cells."""
    present = {role: name for role in aspect.roles if (name := study.variant(role)) is not None}
    if len(present) < 2:
        return None
    recipes = {role: _recipe_of(study, name) for role, name in present.items()}
    default = aspect.default if aspect.default in present else next(iter(present))
    trained = {task for recipe in recipes.values() for task in recipe.data.trained()}
    tasks = [task for task in study.tasks if task in trained]
    pairs = len(present) * (len(present) - 1) // 2
    level = 1 - ERROR / max(1, pairs * len(tasks))
    found = {
        role: _compare(study, present, role, default, tasks, level=level)
        for role in present
        if role != default
    }
    evidence = [line for duel in found.values() for line in duel.lines]
    better = {role: duel.total for role, duel in found.items() if duel.better}
    if "specialised_only" in better and _destabilises(study):
        del better["specialised_only"]
        evidence.append("specialised_only is left out: takeaway 3 was reproduced, it destabilises")
    worse = sum(duel.worse for duel in found.values())
    if better:
        role, lines = _simplest(study, present, aspect, better, tasks, level=level)
        evidence += [f"chosen: {role}, separably better than {default}", *lines]
    else:
        role = default
        if worse == len(found):
            evidence.append(f"kept the default, {default}: every other is separably worse")
        elif default == aspect.default:
            evidence.append(f"not separable; kept the default, {default}, because {aspect.because}")
        else:
            evidence.append(f"not separable; kept {default}, the simplest of those trained")
    settled = bool(better) or worse == len(found)
    return Choice(study, aspect, role, recipes[role], settled, tuple(evidence))


class _Duel(NamedTuple):
    better: bool
    """Separably on some task and on none separably the other way."""
    worse: bool
    total: float
    """Of the differences, over the tasks."""
    lines: list[str]


def _compare(
    study: Study,
    present: dict[str, str],
    role: str,
    other: str,
    tasks: Sequence[str],
    *,
    level: float,
) -> _Duel:
    signs, total, lines = [], 0.0, []
    for task in tasks:
        weights = {present[role]: 1.0, present[other]: -1.0}
        estimate = study.estimate(weights, task, level=level)
        where = TASK_TITLES[task].lower()
        if estimate is None:
            lines.append(f"{role} − {other}, {where}: not scored for both")
            continue
        above = estimate.interval.value > 0
        sign = (1 if above else -1) if estimate.interval.excludes_zero else 0
        word = {1: "better", -1: "worse", 0: "not separable"}[sign]
        lines.append(
            f"{role} − {other}, {where}: {show_interval(estimate.interval, sign=True)} "
            f"({level:.1%} interval, {estimate.cases} prompts, {estimate.seeds} seeds): {word}"
        )
        signs.append(sign)
        total += estimate.interval.value
    return _Duel(1 in signs and -1 not in signs, -1 in signs and 1 not in signs, total, lines)


def _simplest(
    study: Study,
    present: dict[str, str],
    aspect: Aspect,
    better: dict[str, float],
    tasks: Sequence[str],
    *,
    level: float,
) -> tuple[str, list[str]]:
    """Of those that the highest mean is not separably better than, and why."""
    best = max(better, key=lambda role: better[role])
    level_with, lines = [best], []
    for role in better:
        if role == best:
            continue
        duel = _compare(study, present, best, role, tasks, level=level)
        lines += duel.lines
        if not duel.better:
            level_with.append(role)
    chosen = min(level_with, key=lambda role: (aspect.roles[role], -better[role]))
    if chosen != best:
        lines.append(f"{chosen} is simpler than {best}, and not separable from it")
    elif len(level_with) > 1:
        rest = ", ".join(level_with[1:])
        lines.append(f"{rest}: also better, not separable from {best} and not simpler")
    return chosen, lines


def compose(choices: dict[str, Choice]) -> Recipe:
    """The base recipe of the first study with the chosen parts in its place."""
    first = next(iter(choices.values()))
    start = load_recipe(first.study.base) if first.study.base.is_file() else first.recipe
    for choice in choices.values():
        if choice.recipe.teachers != first.recipe.teachers:
            raise RunError(
                f"{first.study.path} and {choice.study.path} used different teachers, and what "
                "holds for one says nothing of the other; recommend from one of them"
            )
    data: dict[str, Any] = {}
    composition = dict(start.data.composition)
    if (choice := choices.get("composition")) is not None:
        for task in choice.recipe.data.trained():
            composition[task] = choice.recipe.data.composition[task]
    data["composition"] = composition
    if (choice := choices.get("ratio")) is not None:
        data["mixture"] = choice.recipe.data.mixture
    rules = start.guidance
    if (choice := choices.get("guidance")) is not None:
        rules = _rules(choice.recipe, start)
    return start.model_copy(
        update={
            "name": "recommended",
            "data": start.data.model_copy(update=data),
            "guidance": rules,
        }
    )


def annotate(recipe: Recipe, studies: Sequence[Study], choices: dict[str, Choice]) -> str:
    """The recipe as YAML with the evidence above the fields it is for."""
    lines = ["# Written by `fewstep recommend`. What each choice rests on stands above its field."]
    for study in studies:
        verdicts = ", ".join(f"takeaway {t.number} {t.verdict}" for t in judge(study))
        lines += _comment(f"{study.name}: {verdicts}; judge {study.judge}", "")
    absent = [aspect for aspect in ASPECTS if aspect.name not in choices]
    for aspect in absent:
        lines += _comment(f"{aspect.field}: no study of it was given; as in the base recipe", "")
    text = dump_brief_yaml(recipe)
    for choice in choices.values():
        *_, key = choice.aspect.field.split(".")
        indent = "  " * choice.aspect.field.count(".")
        comments = _comment(f"{choice.aspect.name}, from {choice.study.name}:", indent)
        for fact in choice.evidence:
            comments += _comment(f"- {fact}", indent)
        above = "\n".join(comments)
        text, count = re.subn(
            rf"^{indent}{key}:", lambda match, above=above: f"{above}\n{match[0]}", text, flags=re.M
        )
        assert count == 1, f"{choice.aspect.field} stands once in a recipe"
    return "\n".join(lines) + "\n" + text


def _agree(found: Sequence[Choice]) -> Choice:
    """The settled one of several; RunError where two of the same weight differ."""
    settled = [choice for choice in found if choice.settled] or list(found)
    first = settled[0]
    for other in settled[1:]:
        if _part(other) != _part(first):
            raise RunError(
                f"{first.study.path} and {other.study.path} disagree on {first.aspect.field}: "
                f"{first.role} or {other.role}; recommend from one of them"
            )
    return first


def _part(choice: Choice) -> object:
    recipe = choice.recipe
    if choice.aspect.name == "composition":
        return {task: recipe.data.composition[task] for task in recipe.data.trained()}
    if choice.aspect.name == "ratio":
        total = sum(recipe.data.mixture.values())
        return {task: round(weight / total, 6) for task, weight in recipe.data.mixture.items()}
    return [rule.model_dump() for rule in recipe.guidance]


def _rules(chosen: Recipe, start: Recipe) -> tuple[GuidanceRule, ...]:
    """The chosen rules for the tasks they were trained with, the base recipe's for the rest."""
    trained = sorted(chosen.data.trained(), key=TASKS.index)
    if set(trained) == set(TASKS):
        return chosen.guidance
    narrowed = []
    for task in trained:
        for rule in chosen.guidance:
            if rule.when.task in (None, task):
                when = rule.when.model_copy(update={"task": task})
                narrowed.append(rule.model_copy(update={"when": when}))
    return (*narrowed, *(rule for rule in start.guidance if rule.when.task not in trained))


def _recipe_of(study: Study, variant: str) -> Recipe:
    """Of its first finished cell."""
    folder = study.finished(variant)[0].folder
    path = folder / "recipe.yaml"
    return load_recipe(path if path.is_file() else folder / "cell.yaml")


def _destabilises(study: Study) -> bool:
    return any(t.number == 3 and t.verdict == "reproduced" for t in judge(study))


def _comment(text: str, indent: str) -> list[str]:
    first, rest = f"{indent}# ", f"{indent}#   "
    return textwrap.wrap(
        " ".join(text.split()), WIDTH, initial_indent=first, subsequent_indent=rest
    )
