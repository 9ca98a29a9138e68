"""Refusals that compute nothing: do teachers, data and objective fit each other and the disk.

Those that belong to a computation (grid, lambda, batch, quotas) are made where it is, in `plan`.
"""

from itertools import pairwise

from fewstep.errors import RecipeError, did_you_mean, refuse
from fewstep.recipe.facts import BUNDLED, Facts
from fewstep.recipe.real_checks import check_real_teacher
from fewstep.recipe.schema import (
    LAB_CATEGORIES,
    Anchor,
    Consistency,
    DecoupledDmd,
    Dmd,
    Dmd2,
    FolderSource,
    PromptSource,
    Recipe,
    Renoise,
    Tdm,
    TrajectoryRegression,
)


def check_teachers(recipe: Recipe, facts: Facts) -> None:
    for name, teacher in recipe.teachers.items():
        field = f"teachers.{name}.weights"
        bundled = teacher.weights.removeprefix(BUNDLED)
        if bundled != teacher.weights:
            if recipe.model.family != "lab":
                raise RecipeError(
                    f"{teacher.weights!r} belongs to the lab, but model.family is "
                    f"{recipe.model.family!r}",
                    field=field,
                    hint="give the path of a .safetensors file written by `fewstep teach`",
                )
            if bundled not in facts.bundled:
                raise RecipeError(
                    f"no bundled weights are called {bundled!r}",
                    field=field,
                    hint=did_you_mean(bundled, sorted(facts.bundled)),
                )
        if name in facts.weights_problems:
            raise RecipeError(
                facts.weights_problems[name],
                field=field,
                hint="train it with `fewstep teach`"
                + (", or use bundled:<name>" if recipe.model.family == "lab" else ""),
            )
        if recipe.model.is_real:
            check_real_teacher(recipe, name, facts)
        for task in teacher.tasks:
            if task not in teacher.cfg:
                raise RecipeError(
                    f"has no scale for {task!r}, which this teacher was trained for",
                    field=f"teachers.{name}.cfg",
                    hint=f"add {task}: 1.0 for no guidance",
                )
        for task in teacher.cfg:
            if task not in teacher.tasks:
                raise RecipeError(
                    f"gives a scale for {task!r}, which is not among the teacher's tasks",
                    field=f"teachers.{name}.cfg",
                    hint=f"remove it, or add {task!r} to teachers.{name}.tasks",
                )
    if recipe.student.init not in recipe.teachers:
        raise RecipeError(
            f"no teacher is called {recipe.student.init!r}",
            field="student.init",
            hint=did_you_mean(recipe.student.init, recipe.teachers),
        )
    _check_models(recipe)


def _check_models(recipe: Recipe) -> None:
    for model in recipe.evaluation.models:
        kind, _, name = model.partition(":")
        if kind not in ("student", "teacher", "teacher_cut") or (name and kind == "student"):
            raise RecipeError(
                f"{model!r} is no model to evaluate",
                field="evaluation.models",
                hint="use student, teacher, teacher_cut, teacher:<name> or teacher_cut:<name>",
            )
        if name and name not in recipe.teachers:
            raise RecipeError(
                f"{model!r} names no teacher",
                field="evaluation.models",
                hint=did_you_mean(name, recipe.teachers),
            )


def check_source(recipe: Recipe, facts: Facts) -> None:
    source = recipe.data.source
    if source.kind != recipe.model.family and not recipe.model.is_real:
        raise RecipeError(
            f"{source.kind!r} data for a model of family {recipe.model.family!r}",
            field="data.source.kind",
            hint=f"use {recipe.model.family!r}, or change model.family",
        )
    if isinstance(source, FolderSource) and facts.source_missing:
        raise RecipeError(
            f"there is no {source.path}",
            field="data.source.path",
            hint="give a folder with captions.jsonl and/or edits.jsonl",
        )
    for name, pool in recipe.data.pools.items():
        if source.kind == "lab" and pool.category not in LAB_CATEGORIES[pool.task]:
            raise RecipeError(
                f"the lab has no {pool.task} category {pool.category!r}",
                field=f"data.pools.{name}.category",
                hint=did_you_mean(pool.category, LAB_CATEGORIES[pool.task]),
            )
        available = facts.available.get(name, pool.size)
        if pool.size > available:
            raise RecipeError(
                f"{pool.size} prompts are asked for, but there are {available} of "
                f"{pool.task}/{pool.category}",
                field=f"data.pools.{name}.size",
                hint=f"use {available} or fewer" if available else "remove the pool",
            )
    if isinstance(source, PromptSource):
        refuse(source.path, facts.image_problems)


def check_probe(recipe: Recipe) -> None:
    probe, updates = recipe.log.probe, recipe.budget.updates
    late = [step for step in (probe and probe.steps) or () if step > updates]
    if late:
        raise RecipeError(
            f"{late[0]} lies after the last of {updates} updates",
            field="log.probe.steps",
            hint=f"use steps up to {updates}",
        )


def check_objective(recipe: Recipe, grid: tuple[float, ...]) -> None:
    """`grid` is the student's, t_0 .. t_{K-1}."""
    objective = recipe.objective
    match objective:
        case Dmd():
            _check_times(objective.renoise, "objective.renoise")
            _check_anchor(recipe, objective.anchor)
        case Dmd2():
            _check_times(objective.renoise, "objective.renoise")
            _check_times(objective.gan.renoise, "objective.gan.renoise")
        case DecoupledDmd():
            _check_times(objective.renoise, "objective.renoise")
            _check_times(objective.augmentation_renoise, "objective.augmentation_renoise")
            if objective.matching_weight == objective.augmentation_weight == 0:
                raise RecipeError(
                    "both weights are 0, so that nothing would be learned",
                    field="objective.matching_weight",
                    hint="use 1 for both terms, or 0 for one of them",
                )
        case Tdm():
            _check_intervals(objective, grid)
        case TrajectoryRegression():
            batch = recipe.budget.batch
            if objective.trajectories % batch:
                fitting = max(1, round(objective.trajectories / batch)) * batch
                raise RecipeError(
                    f"{objective.trajectories} does not divide into batches of {batch}",
                    field="objective.trajectories",
                    hint=f"use {fitting}",
                )
        case Consistency():
            pass


def _check_times(times: Renoise, field: str) -> None:
    if times.low >= times.high:
        raise RecipeError(
            f"low={times.low:g} does not lie below high={times.high:g}",
            field=field,
            hint="use 0 <= low < high <= 1, such as low: 0.02, high: 0.98",
        )


def _check_intervals(objective: Tdm, grid: tuple[float, ...]) -> None:
    for k, (start, end) in enumerate(pairwise((*grid, 0.0))):
        if max(end, objective.low) >= min(start, objective.high):
            raise RecipeError(
                f"no time of step k={k}, {end:g} to {start:g}, lies between "
                f"low={objective.low:g} and high={objective.high:g}",
                field="objective.low" if start <= objective.low else "objective.high",
                hint=f"use low < {grid[-1]:g} and high > {(*grid, 0.0)[1]:g}",
            )


def _check_anchor(recipe: Recipe, anchor: Anchor) -> None:
    init = recipe.student.init
    if anchor.steps >= anchor.of:
        raise RecipeError(
            f"steps={anchor.steps} does not lie below of={anchor.of}",
            field="objective.anchor",
            hint="the target is a state on the way, such as 5 of 30",
        )
    lacking = [t for t in recipe.data.trained() if t not in recipe.teachers[init].tasks]
    if anchor.weight > 0 and lacking:
        raise RecipeError(
            f"the teacher {init!r} is to make the target, but lacks the task {lacking[0]!r}",
            field="objective.anchor",
            hint=f"use weight: 0, or data.mixture {lacking[0]}: 0",
        )
