"""Refusals that compute nothing: do teachers, data and objective fit each other and the disk.

Those that belong to a computation (grid, lambda, batch, quotas) are made where it is, in `plan`.
"""

from fewstep.errors import RecipeError, did_you_mean
from fewstep.recipe.facts import BUNDLED, Facts
from fewstep.recipe.schema import LAB_CATEGORIES, FolderSource, Recipe


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
                hint="train it with `fewstep teach`, or use bundled:<name>",
            )
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
    if source.kind != recipe.model.family:
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


def check_objective(recipe: Recipe) -> None:
    anchor, init = recipe.objective.anchor, recipe.student.init
    if anchor.steps >= anchor.of:
        raise RecipeError(
            f"steps={anchor.steps} does not lie below of={anchor.of}",
            field="objective.anchor",
            hint="the target is a state on the way, such as 5 of 30",
        )
    lacking = [
        task
        for task, weight in recipe.data.mixture.items()
        if weight > 0 and task not in recipe.teachers[init].tasks
    ]
    if anchor.weight > 0 and lacking:
        raise RecipeError(
            f"the teacher {init!r} is to make the target, but lacks the task {lacking[0]!r}",
            field="objective.anchor",
            hint=f"use weight: 0, or data.mixture {lacking[0]}: 0",
        )
    renoise = recipe.objective.renoise
    if renoise.low >= renoise.high:
        raise RecipeError(
            f"low={renoise.low:g} does not lie below high={renoise.high:g}",
            field="objective.renoise",
            hint="use 0 <= low < high <= 1, such as low: 0.02, high: 0.98",
        )
