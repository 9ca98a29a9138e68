"""Recipe -> Plan: all arithmetic and all refusals, before a weight is loaded.

A plan never changes what was asked. What cannot be done as asked is a RecipeError that says what
would work.
"""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import TypeVar

from fewstep.errors import RecipeError, did_you_mean
from fewstep.recipe.checks import check_objective, check_probe, check_source, check_teachers
from fewstep.recipe.cost import Cost, Memory, estimate_cost, estimate_memory, splits_cast
from fewstep.recipe.facts import Facts, Machine, ModelSize, gather_facts
from fewstep.recipe.guidance import Guidance, real_score_nfe, resolve_guidance
from fewstep.recipe.judging import JudgePlan, plan_judge
from fewstep.recipe.real_checks import check_model
from fewstep.recipe.schema import (
    TASKS,
    Dmd,
    ExplicitGrid,
    Pool,
    Recipe,
    Strict,
    Task,
)

Name = TypeVar("Name", bound=str)


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


class TaskSize(Strict):
    tokens: int
    """Length of the joint sequence: text, sources, target."""
    forward_flop: float
    """Of the frozen network on one sample."""
    training_flop: float
    """Of the student, forwards and backwards."""
    kept: int
    """Bytes that a micro-batch keeps for the backward pass."""


class Size(Strict):
    params: int
    """Of one network."""
    networks: int
    """Frozen networks in memory."""
    trained: int
    """Parameters of the student."""
    tasks: dict[Task, TaskSize]


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
    size: Size | None = None
    """Of a real model."""
    judge: JudgePlan | None = None
    """Where an endpoint judges."""
    evaluates: bool = True
    """Whether `fewstep distill` evaluates: not where no single device holds a cast in parts."""
    notes: tuple[str, ...] = ()
    """What to know before relying on these numbers."""

    def weights(self, task: Task, category: str) -> tuple[dict[str, float], ...]:
        """lambda[k][m] of one condition."""
        return self.condition(task, category).weights

    def group(self, task: Task, category: str) -> str:
        """The conditions that share this one's lambda: `t2i`, or `t2i/text` of several groups."""
        peers = [entry for entry in self.guidance if entry.task == task]
        rule = self.condition(task, category).rule
        own = [entry.category for entry in peers if entry.rule == rule]
        return task if len(own) == len(peers) else f"{task}/{'+'.join(own)}"

    def condition(self, task: Task, category: str) -> Guidance:
        for entry in self.guidance:
            if (entry.task, entry.category) == (task, category):
                return entry
        known = ", ".join(f"{entry.task}/{entry.category}" for entry in self.guidance)
        raise KeyError(f"the plan has no condition {task}/{category}; it has {known}")


def make_plan(recipe: Recipe, machine: Machine, facts: Facts | None = None) -> Plan:
    """Everything that will happen, or a refusal. Pure when `facts` are given."""
    facts = gather_facts(recipe) if facts is None else facts
    check_model(recipe, facts)
    check_teachers(recipe, facts)
    check_source(recipe, facts)
    check_probe(recipe)
    grid = student_grid(recipe)
    check_objective(recipe, grid)
    guidance = resolve_guidance(recipe, steps=len(grid))
    batch = _batch_arithmetic(recipe, devices=machine.devices)
    tasks, pools = _resolve_quotas(recipe, batch)
    used = {name for entry in guidance for name in entry.cfg}
    if isinstance(recipe.objective, Dmd) and recipe.objective.anchor.weight > 0:
        used.add(recipe.student.init)
    teachers = tuple(name for name in recipe.teachers if name in used)
    shares = {quota.pool: quota.samples for quota in pools}
    nfe_real = real_score_nfe(recipe, guidance, shares)
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
            devices=machine.devices,
        ),
        size=_size(facts.model),
        judge=plan_judge(recipe, steps=len(grid)),
        notes=(*facts.notes, *_device_notes(recipe, machine)),
    )


def _size(model: ModelSize) -> Size | None:
    if not model.passes:
        return None
    return Size(
        params=model.params,
        networks=model.networks or 1,
        trained=model.params if model.trained is None else model.trained,
        tasks={
            task: TaskSize(
                tokens=passes.tokens,
                forward_flop=passes.teacher_flop,
                training_flop=passes.training_flop,
                kept=passes.kept_bytes,
            )
            for task, passes in model.passes.items()
            if task in TASKS
        },
    )


def _device_notes(recipe: Recipe, machine: Machine) -> tuple[str, ...]:
    if machine.devices == 1:
        alone = recipe.model.is_real and recipe.model.roles.shard
        return ("model.cast.shard changes nothing on one device",) if alone else ()
    split = splits_cast(recipe, machine.devices)
    cast = "over which the cast is split" if split else "each with the whole cast"
    return (
        f"{machine.devices} devices, {cast}, when torchrun starts as many "
        "processes (docs/distributed.md); the hours are arithmetic alone, without the time of "
        "communication",
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


def _batch_arithmetic(recipe: Recipe, *, devices: int) -> BatchPlan:
    batch, micro_batch = recipe.budget.batch, recipe.budget.micro_batch
    unit = micro_batch * devices
    if batch % unit:
        fitting = [str(n * unit) for n in (batch // unit, batch // unit + 1) if n]
        per_device, uneven = divmod(batch, devices)
        fits = per_device < micro_batch and not uneven
        smaller = f", or budget.micro_batch {per_device}" if fits else ""
        raise RecipeError(
            f"{batch} does not divide over micro_batch {micro_batch} x {devices} "
            f"device{'s' if devices > 1 else ''}",
            field="budget.batch",
            hint=f"use {' or '.join(fitting)}{smaller}",
        )
    return BatchPlan(
        batch=batch, micro_batch=micro_batch, devices=devices, accumulation=batch // unit
    )


def _resolve_quotas(
    recipe: Recipe, batch: BatchPlan
) -> tuple[tuple[TaskQuota, ...], tuple[PoolQuota, ...]]:
    """Exact numbers over the whole budget: micro-batches per task, samples per pool."""
    mixture = recipe.data.trained()
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
