"""Recipe -> Plan: all arithmetic and all refusals, before a weight is loaded.

A plan never changes what was asked. What cannot be done as asked is a RecipeError that says what
would work.
"""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import TypeVar

from fewstep.errors import RecipeError, did_you_mean
from fewstep.recipe.checks import check_objective, check_source, check_teachers
from fewstep.recipe.cost import Cost, Memory, estimate_cost, estimate_memory, evaluations_per_step
from fewstep.recipe.facts import Facts, Machine, gather_facts
from fewstep.recipe.schema import (
    ExplicitGrid,
    GuidanceRule,
    Pool,
    Recipe,
    Strict,
    Task,
)

SUM_TOLERANCE = 1e-6

Name = TypeVar("Name", bound=str)


class Guidance(Strict):
    """The teachers of one condition: lambda[k][m] and the CFG scale of each."""

    task: Task
    category: str
    rule: int
    """Index of the guidance rule that matched."""
    weights: tuple[dict[str, float], ...]
    """One row per student step; only the non-zero entries."""
    cfg: dict[str, float]


class TaskQuota(Strict):
    task: Task
    share: float
    micro_batches: int
    """Over the whole budget; every device works on the same task at the same time."""
    samples: int


class PoolQuota(Strict):
    pool: str
    task: Task
    category: str
    size: int
    samples: int
    """Over the whole budget, in student updates."""
    passes: float
    """How often the pool is gone through."""


class BatchPlan(Strict):
    batch: int
    micro_batch: int
    devices: int
    accumulation: int
    """Micro-batches per student update on each device."""


class Plan(Strict):
    name: str
    recipe_hash: str
    machine: str
    grid: tuple[float, ...]
    """t_0 = 1 > ... > t_{K-1} > 0; the student's step k goes from t_k to t_{k+1}, t_K = 0."""
    guidance: tuple[Guidance, ...]
    teachers: tuple[str, ...]
    """Those that a condition or the anchor uses, in the recipe's order; no other needs loading."""
    tasks: tuple[TaskQuota, ...]
    pools: tuple[PoolQuota, ...]
    batch: BatchPlan
    updates: int
    cost: Cost
    memory: Memory

    def weights(self, task: Task, category: str) -> tuple[dict[str, float], ...]:
        """lambda[k][m] of one condition."""
        return self.condition(task, category).weights

    def condition(self, task: Task, category: str) -> Guidance:
        for entry in self.guidance:
            if (entry.task, entry.category) == (task, category):
                return entry
        known = ", ".join(f"{entry.task}/{entry.category}" for entry in self.guidance)
        raise KeyError(f"the plan has no condition {task}/{category}; it has {known}")


def make_plan(recipe: Recipe, machine: Machine, facts: Facts | None = None) -> Plan:
    """Everything that will happen, or a refusal. Pure when `facts` are given."""
    facts = gather_facts(recipe) if facts is None else facts
    check_teachers(recipe, facts)
    check_source(recipe, facts)
    check_objective(recipe)
    grid = student_grid(recipe)
    guidance = _resolve_guidance(recipe, steps=len(grid))
    batch = _batch_arithmetic(recipe, devices=machine.devices)
    tasks, pools = _resolve_quotas(recipe, batch)
    used = {name for entry in guidance for row in entry.weights for name in row}
    if recipe.objective.anchor.weight > 0:
        used.add(recipe.student.init)
    teachers = tuple(name for name in recipe.teachers if name in used)
    shares = {quota.pool: quota.samples for quota in pools}
    nfe_real = _real_score_nfe(recipe, guidance, shares)
    return Plan(
        name=recipe.name,
        recipe_hash=recipe.content_hash(),
        machine=f"{machine.devices} x {machine.name}",
        grid=grid,
        guidance=guidance,
        teachers=teachers,
        tasks=tasks,
        pools=pools,
        batch=batch,
        updates=recipe.budget.updates,
        cost=estimate_cost(
            recipe,
            steps=len(grid),
            nfe_real=nfe_real,
            samples={quota.task: quota.samples for quota in tasks},
            machine=machine,
            model=facts.model,
        ),
        memory=estimate_memory(
            recipe,
            teachers=len(teachers),
            tasks=tuple(quota.task for quota in tasks),
            model=facts.model,
        ),
    )


def shift_time(t: float, shift: float) -> float:
    """t -> s t / (1 + (s - 1) t): later (noisier) times for s > 1."""
    return shift * t / (1 + (shift - 1) * t)


def student_grid(recipe: Recipe) -> tuple[float, ...]:
    """The times t_0 > ... > t_{K-1} at which the student is evaluated."""
    spec = recipe.student.grid
    if isinstance(spec, ExplicitGrid):
        grid = spec.t
    else:
        grid = tuple(
            shift_time((spec.steps - k) / spec.steps, spec.shift) for k in range(spec.steps)
        )
    field = "student.grid.t"
    for k, t in enumerate(grid):
        if not 0 < t <= 1:
            raise RecipeError(
                f"t_{k} = {t:g} lies outside (0, 1]", field=field, hint="the final 0 is implied"
            )
        if k and t >= grid[k - 1]:
            raise RecipeError(
                f"t_{k} = {t:g} does not lie below t_{k - 1} = {grid[k - 1]:g}",
                field=field,
                hint=f"use strictly descending times, such as {sorted(set(grid), reverse=True)}",
            )
    if grid[0] != 1:
        raise RecipeError(
            f"t_0 = {grid[0]:g}, but an image starts from pure noise",
            field=field,
            hint="use 1.0 for the first time",
        )
    return grid


def apportion(weights: Mapping[Name, int | float], total: int) -> dict[Name, int]:
    """How often each name is drawn in `total` draws; sums to `total` exactly.

    The quota method (Balinski and Young 1975), as `data.mixture.Quota` draws, so that the plan
    says what happens; tests hold the two together. Counts repeat after sum(w) draws for whole w.
    """
    exact = {name: Fraction(str(weight)) for name, weight in weights.items() if weight > 0}
    scale = math.lcm(*(weight.denominator for weight in exact.values()))
    whole = {name: int(weight * scale) for name, weight in exact.items()}
    divisor = math.gcd(*whole.values())
    whole = {name: w // divisor for name, w in whole.items()}
    period = sum(whole.values())
    rounds, rest = divmod(total, period)
    extra = dict.fromkeys(whole, 0)
    for n in range(1, rest + 1):
        behind = {name: n * w - extra[name] * period for name, w in whole.items()}
        eligible = [name for name in whole if behind[name] > 0]
        urgency = {n: (Fraction(extra[n] + 1, whole[n]), -behind[n]) for n in eligible}
        extra[min(eligible, key=urgency.__getitem__)] += 1
    return {name: rounds * w + extra[name] for name, w in whole.items()}


def _resolve_guidance(recipe: Recipe, *, steps: int) -> tuple[Guidance, ...]:
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
    if len(rule.weights) not in (1, steps):
        raise RecipeError(
            f"has {len(rule.weights)} rows of weights for {steps} student steps",
            field=field,
            hint=f"use {steps} rows, or 1 for all steps",
        )
    for k, row in enumerate(rule.weights):
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
        rows = rule.weights * steps if len(rule.weights) == 1 else rule.weights
        weights = tuple({name: w for name, w in row.items() if w > 0} for row in rows)
        names = [name for name in recipe.teachers if any(name in row for row in weights)]
        for name in names:
            if task not in recipe.teachers[name].tasks:
                able = [n for n, teacher in recipe.teachers.items() if task in teacher.tasks]
                raise RecipeError(
                    f"teacher {name!r} is to guide {task}/{category}, but lacks the task {task!r}",
                    field=f"guidance[{index}] ({_describe(rule)})",
                    hint=f"teachers with {task}: {', '.join(able) or 'none'}",
                )
        cfg = {name: recipe.teachers[name].cfg[task] for name in names}
        return Guidance(task=task, category=category, rule=index, weights=weights, cfg=cfg)
    raise RecipeError(
        f"no rule matches {task}/{category}",
        field="guidance",
        hint="let the last rule have no `when`, so that it matches everything",
    )


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


def _batch_arithmetic(recipe: Recipe, *, devices: int) -> BatchPlan:
    batch, micro_batch = recipe.budget.batch, recipe.budget.micro_batch
    unit = micro_batch * devices
    if batch % unit:
        fitting = [str(n * unit) for n in (batch // unit, batch // unit + 1) if n]
        raise RecipeError(
            f"{batch} does not divide over micro_batch {micro_batch} x {devices} "
            f"device{'s' if devices > 1 else ''}",
            field="budget.batch",
            hint=f"use {' or '.join(fitting)}",
        )
    return BatchPlan(
        batch=batch, micro_batch=micro_batch, devices=devices, accumulation=batch // unit
    )


def _resolve_quotas(
    recipe: Recipe, batch: BatchPlan
) -> tuple[tuple[TaskQuota, ...], tuple[PoolQuota, ...]]:
    """Exact numbers over the whole budget: micro-batches per task, samples per pool."""
    mixture: dict[Task, float] = {
        task: weight for task, weight in recipe.data.mixture.items() if weight > 0
    }
    if not mixture:
        raise RecipeError("every weight is 0", field="data.mixture", hint="use t2i: 1, edit: 1")
    total = recipe.budget.updates * batch.accumulation
    counts = apportion(mixture, total)
    tasks: list[TaskQuota] = []
    pools: list[PoolQuota] = []
    for task, composition in recipe.data.composition.items():
        for name in composition:
            _check_composition_entry(recipe, task, name)
    for task, weight in mixture.items():
        share = weight / sum(mixture.values())
        if counts[task] == 0:
            raise RecipeError(
                f"leaves {task!r} without a micro-batch: its share is {share:.3g} of {total}",
                field="data.mixture",
                hint=f"use budget.updates >= {math.ceil(1 / share / batch.accumulation)}, "
                f"or {task}: 0",
            )
        samples = counts[task] * batch.micro_batch * batch.devices
        tasks.append(TaskQuota(task=task, share=share, micro_batches=counts[task], samples=samples))
        weights = {n: w for n, w in recipe.data.composition.get(task, {}).items() if w > 0}
        if not weights:
            raise RecipeError(
                f"no pool has a weight, but data.mixture gives {task!r} {weight:g}",
                field=f"data.composition.{task}",
                hint=f"pools with this task: {_pools_of(recipe, task)}; or use mixture {task}: 0",
            )
        for name, number in apportion(weights, samples).items():
            pools.append(_pool_quota(name, recipe.data.pools[name], number))
    return tuple(tasks), tuple(pools)


def _pool_quota(name: str, pool: Pool, samples: int) -> PoolQuota:
    return PoolQuota(
        pool=name,
        task=pool.task,
        category=pool.category,
        size=pool.size,
        samples=samples,
        passes=samples / pool.size,
    )


def _check_composition_entry(recipe: Recipe, task: Task, name: str) -> None:
    field = f"data.composition.{task}.{name}"
    if name not in recipe.data.pools:
        raise RecipeError(
            "there is no such pool", field=field, hint=did_you_mean(name, recipe.data.pools)
        )
    actual = recipe.data.pools[name].task
    if actual != task:
        raise RecipeError(
            f"the pool is of task {actual!r}",
            field=field,
            hint=f"pools of {task!r}: {_pools_of(recipe, task)}",
        )


def _pools_of(recipe: Recipe, task: Task) -> str:
    return (
        ", ".join(name for name, pool in recipe.data.pools.items() if pool.task == task) or "none"
    )


def _real_score_nfe(
    recipe: Recipe, guidance: tuple[Guidance, ...], samples: Mapping[str, int]
) -> dict[Task, float]:
    """Per task: teacher evaluations for one real score, mean over the steps k and the pools."""
    by_condition = {
        (entry.task, entry.category): sum(
            evaluations_per_step(recipe.teachers[name], entry.task)
            for row in entry.weights
            for name in row
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
