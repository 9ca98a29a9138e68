"""Guidance rules -> lambda[k][m] of every condition, fixed or moving; what a real score costs."""

import math
from collections.abc import Mapping

from fewstep.errors import RecipeError, did_you_mean
from fewstep.recipe.cost import evaluations_per_score
from fewstep.recipe.schema import (
    Adaptive,
    Consistency,
    GuidanceRule,
    LambdaTable,
    Recipe,
    Strict,
    Task,
    TrajectoryRegression,
)

SUM_TOLERANCE = 1e-6


class Guidance(Strict):
    """The teachers of one condition: lambda[k][m] and the CFG scale of each."""

    task: Task
    category: str
    rule: int
    """Index of the guidance rule that matched."""
    weights: tuple[dict[str, float], ...]
    """One row per student step; only the non-zero entries. Of an adaptive rule, where it goes."""
    cfg: dict[str, float]
    adaptive: Adaptive | None = None
    """How lambda moves; its `start` has one row per student step, with the non-zero entries."""
    heard: tuple[tuple[str, ...], ...] = ()
    """By step, teachers to evaluate though their lambda is 0, to know their mismatch; set by
    `train.adaptive` for the updates that measure."""

    def at_step(self, k: int) -> tuple[str, ...]:
        """The teachers that may have a weight at step k."""
        start = self.adaptive.start[k] if self.adaptive else {}
        return tuple(name for name in self.cfg if name in self.weights[k] or name in start)


def resolve_guidance(recipe: Recipe, *, steps: int) -> tuple[Guidance, ...]:
    """Which rule each condition meets, and that every rule is right and met by one."""
    for index, rule in enumerate(recipe.guidance):
        _check_rule(recipe, index, rule, steps)
    conditions = recipe.data.conditions()
    entries = tuple(
        _resolve_condition(recipe, task, category, steps) for task, category in conditions
    )
    met = {entry.rule for entry in entries}
    for index, rule in enumerate(recipe.guidance):
        if index not in met:
            shadowed = any(_matches(rule, task, category) for task, category in conditions)
            reason = "every condition it matches is taken by an earlier rule"
            listed = ", ".join(f"{task}/{category}" for task, category in conditions)
            raise RecipeError(
                f"never applies: {reason if shadowed else f'no pool has {_describe(rule)}'}",
                field=f"guidance[{index}]",
                hint="move it up or remove it" if shadowed else f"the pools have {listed}",
            )
    return entries


def _check_rule(recipe: Recipe, index: int, rule: GuidanceRule, steps: int) -> None:
    field = f"guidance[{index}] ({_describe(rule)})"
    _check_table(recipe, field, rule.weights, steps)
    if rule.adaptive is None:
        return
    _check_table(recipe, f"{field}.adaptive.start", rule.adaptive.start, steps)
    tolerance, limit = rule.adaptive.tolerance, rule.adaptive.limit
    if tolerance >= limit:
        raise RecipeError(
            f"tolerance={tolerance:g} does not lie below limit={limit:g}",
            field=f"{field}.adaptive",
            hint="lambda moves at full speed up to the tolerance, and back above the limit",
        )
    if _rows(rule.adaptive.start, steps) == _rows(rule.weights, steps):
        raise RecipeError(
            "start is the same as weights: nothing would move",
            field=f"{field}.adaptive",
            hint="begin with the base teacher alone, or remove `adaptive`",
        )
    if isinstance(recipe.objective, Consistency | TrajectoryRegression):
        raise RecipeError(
            f"objective {recipe.objective.kind!r} has no score of the student to measure against",
            field=f"{field}.adaptive",
            hint="use dmd, or remove `adaptive`",
        )


def _check_table(recipe: Recipe, field: str, table: LambdaTable, steps: int) -> None:
    if len(table) not in (1, steps):
        raise RecipeError(
            f"has {len(table)} rows of weights for {steps} student steps",
            field=field,
            hint=f"use {steps} rows, or 1 for all steps",
        )
    for k, row in enumerate(table):
        for name, weight in row.items():
            if name not in recipe.teachers:
                raise RecipeError(
                    f"row k={k}: no teacher is called {name!r}",
                    field=field,
                    hint=did_you_mean(name, recipe.teachers),
                )
            if not 0 <= weight <= 1:
                raise RecipeError(
                    f"row k={k}: lambda of {name!r} is {weight:g}",
                    field=field,
                    hint="use a number in [0, 1]",
                )
        total = math.fsum(row.values())
        if abs(total - 1) > SUM_TOLERANCE:
            raise RecipeError(
                f"row k={k}: lambda sums to {total:g}, not 1",
                field=field,
                hint=_rescaled(row, total),
            )


def _resolve_condition(recipe: Recipe, task: Task, category: str, steps: int) -> Guidance:
    for index, rule in enumerate(recipe.guidance):
        if not _matches(rule, task, category):
            continue
        weights, adaptive = _rows(rule.weights, steps), rule.adaptive
        tables = weights
        if adaptive:
            adaptive = adaptive.model_copy(update={"start": _rows(adaptive.start, steps)})
            tables += adaptive.start
        names = [name for name in recipe.teachers if any(name in row for row in tables)]
        for name in names:
            if task not in recipe.teachers[name].tasks:
                able = [n for n, teacher in recipe.teachers.items() if task in teacher.tasks]
                raise RecipeError(
                    f"teacher {name!r} is to guide {task}/{category}, but lacks the task {task!r}",
                    field=f"guidance[{index}] ({_describe(rule)})",
                    hint=f"teachers with {task}: {', '.join(able) or 'none'}",
                )
        cfg = {name: recipe.teachers[name].cfg[task] for name in names}
        return Guidance(
            task=task,
            category=category,
            rule=index,
            weights=weights,
            cfg=cfg,
            adaptive=adaptive,
        )
    raise RecipeError(
        f"no rule matches {task}/{category}",
        field="guidance",
        hint="let the last rule have no `when`, so that it matches everything",
    )


def _rows(table: LambdaTable, steps: int) -> LambdaTable:
    """One row per student step, with the non-zero entries."""
    rows = table * steps if len(table) == 1 else table
    return tuple({name: weight for name, weight in row.items() if weight > 0} for row in rows)


def _matches(rule: GuidanceRule, task: Task, category: str) -> bool:
    return rule.when.task in (None, task) and rule.when.category in (None, category)


def _describe(rule: GuidanceRule) -> str:
    asked = [("task", rule.when.task), ("category", rule.when.category)]
    return ", ".join(f"{key}={value}" for key, value in asked if value is not None) or "everything"


def _rescaled(row: Mapping[str, float], total: float) -> str:
    if total <= 0:
        return "give one teacher the weight 1"
    scaled = ", ".join(f"{name}: {weight / total:.4g}" for name, weight in row.items())
    return f"in the same proportions: {{{scaled}}}"


def real_score_nfe(
    recipe: Recipe, guidance: tuple[Guidance, ...], samples: Mapping[str, int]
) -> dict[Task, float]:
    """Per task: teacher evaluations for one real score, mean over the steps k and the pools.

    Of an adaptive rule the most there can be: all teachers of both its tables at every step.
    """
    by_condition = {
        (entry.task, entry.category): sum(
            evaluations_per_score(recipe.objective, recipe.teachers[name], entry.task)
            for k in range(len(entry.weights))
            for name in entry.at_step(k)
        )
        / len(entry.weights)
        for entry in guidance
    }
    sums: dict[Task, float] = {}
    totals: dict[Task, int] = {}
    for name, number in samples.items():
        pool = recipe.data.pools[name]
        sums[pool.task] = sums.get(pool.task, 0) + number * by_condition[pool.task, pool.category]
        totals[pool.task] = totals.get(pool.task, 0) + number
    return {task: sums[task] / totals[task] for task in sums}
