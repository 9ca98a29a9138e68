"""A plan as tables for the terminal."""

import math
from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from fewstep.recipe.cost import Cost, Memory
from fewstep.recipe.guidance import Guidance
from fewstep.recipe.judging import JudgePlan
from fewstep.recipe.plan import Plan, Size
from fewstep.recipe.schema import LambdaTable


def render_plan(plan: Plan) -> RenderableType:
    """The step grid with lambda per condition, the quotas, the batch, the cost and the memory."""
    return Group(
        f"[bold]{plan.name}[/bold]  recipe {plan.recipe_hash}  on {plan.machine}",
        _guidance_table(plan),
        *_adaptive_lines(plan),
        _quota_table(plan),
        _batch_line(plan),
        *([_size_table(plan.size)] if plan.size else []),
        _cost_table(plan.cost, plan.updates),
        *([_judge_line(plan.judge)] if plan.judge else []),
        _memory_table(plan.memory),
        *(f"[bold]note:[/bold] {escape(note)}" for note in plan.notes),
    )


def _guidance_table(plan: Plan) -> Table:
    table = Table(title="teacher weights lambda at each student step", title_justify="left")
    table.add_column("condition")
    for k, t in enumerate(plan.grid):
        table.add_column(f"k={k}  t={t:.3g}")
    table.add_column("CFG")
    for names, entry in _grouped(plan.guidance):
        cfg = ", ".join(f"{name} {scale:g}" for name, scale in entry.cfg.items())
        if entry.adaptive is None:
            table.add_row(names, *_mixes(entry.weights), cfg)
            continue
        table.add_row(names, *_mixes(entry.adaptive.start), cfg)
        table.add_row("  moving towards", *_mixes(entry.weights), "", end_section=True)
    return table


def _mixes(rows: LambdaTable) -> list[str]:
    """`0.5 base + 0.5 t2i` for each step."""
    return [
        " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in row.items())
        for row in rows
    ]


def _adaptive_lines(plan: Plan) -> Iterator[str]:
    """How lambda moves, in the words of docs/stability.md."""
    trained = {quota.task for quota in plan.tasks}
    for names, entry in _grouped(plan.guidance):
        if (rule := entry.adaptive) is None or entry.task not in trained:
            continue
        yield (
            f"{names} moves at a speed of {rule.rate:g} an update while the mismatch of the "
            f"gaining teachers is at most {rule.tolerance:g} x that of the losing ones, slower "
            f"above, not at {rule.limit:g} x, back beyond; all the way takes at least "
            f"{math.ceil(1 / rule.rate):,} of {plan.updates:,} updates. A teacher without weight "
            f"is measured every {rule.every} updates."
        )


def _grouped(guidance: tuple[Guidance, ...]) -> Iterator[tuple[str, Guidance]]:
    """Conditions of one task that met the same rule share a line."""
    groups: dict[tuple[str, int], list[Guidance]] = {}
    for entry in guidance:
        groups.setdefault((entry.task, entry.rule), []).append(entry)
    for (task, _), entries in groups.items():
        yield f"{task}: {', '.join(entry.category for entry in entries)}", entries[0]


def _quota_table(plan: Plan) -> Table:
    table = Table(title="exact quotas over the whole budget", title_justify="left")
    for heading in ("task", "pool"):
        table.add_column(heading)
    for heading in ("share", "micro-batches", "samples", "pool size", "passes"):
        table.add_column(heading, justify="right")
    for task in plan.tasks:
        share = f"{100 * task.share:.3g} %"
        numbers = f"{task.micro_batches:,}", f"{task.samples:,}"
        table.add_row(f"[bold]{task.task}[/bold]", "", share, *numbers, "", "")
        for pool in (pool for pool in plan.pools if pool.task == task.task):
            part = f"{100 * pool.samples / task.samples:.3g} %"
            sizes = f"{pool.size:,}", f"{pool.passes:.2f}"
            table.add_row("", pool.pool, part, "", f"{pool.samples:,}", *sizes)
    return table


def _batch_line(plan: Plan) -> str:
    batch = plan.batch
    return (
        f"{plan.updates:,} updates; batch {batch.batch} = micro-batch {batch.micro_batch} "
        f"x {batch.devices} device(s) x {batch.accumulation} accumulated"
    )


def _size_table(size: Size) -> Table:
    networks = f"{size.networks} network{'s' if size.networks > 1 else ''}"
    table = Table(
        title=f"{networks} of {size.params:,} parameters, {size.trained:,} trained",
        title_justify="left",
    )
    table.add_column("one sample")
    headings = ("tokens", "forward", "student, forward and backward", "kept in between")
    for heading in headings:
        table.add_column(heading, justify="right")
    for task, one in size.tasks.items():
        flops = (f"{flop / 1e12:,.3g} TFLOP" for flop in (one.forward_flop, one.training_flop))
        table.add_row(task, f"{one.tokens:,}", *flops, _bytes(one.kept))
    return table


def _cost_table(cost: Cost, updates: int) -> Table:
    table = Table(title="cost in network evaluations (NFE)", title_justify="left")
    table.add_column("part")
    table.add_column("NFE", justify="right")
    parts = {
        "student: rollout up to step k": cost.nfe_rollout,
        "student: backward": cost.nfe_student_backward,
        "teachers with CFG": cost.nfe_real,
        "fake score": cost.nfe_fake_score,
        "fake-score updates": cost.nfe_fake_updates,
        "first-step anchor": cost.nfe_anchor,
        "discriminator": cost.nfe_gan,
        "student: answer at the neighbour": cost.nfe_target,
    }
    for part, nfe in parts.items():
        if nfe:
            table.add_row(part, f"{nfe:.2f}")
    table.add_section()
    table.add_row("one sample", f"{cost.nfe_per_sample:.2f}")
    table.add_row("one update", f"{cost.nfe_per_update:,.0f}")
    table.add_row(
        f"{updates:,} updates: {cost.flop:.2e} FLOP, about",
        f"[bold]{_duration(cost.seconds)}[/bold]",
    )
    table.add_row(
        f"evaluation: {cost.evaluation_nfe:,.0f} NFE, about", _duration(cost.evaluation_seconds)
    )
    return table


def _judge_line(judge: JudgePlan) -> str:
    return (
        f"judge: {escape(judge.model)}, up to {judge.images:,} images in {judge.requests:,} "
        f"requests, {judge.parallel} at a time; answers that cannot be read are asked for again"
    )


REAL_ONLY = ("autoencoder", "blocks gathered for their use", "margin for what is not computed")
"""Parts that a lab's plan does not have."""


def _memory_table(memory: Memory) -> Table:
    table = Table(title="memory on one device, estimated", title_justify="left")
    table.add_column("part")
    table.add_column("size", justify="right")
    parts = {
        "student (weights, gradients, Adam, EMA)": memory.student,
        "fake score, discriminator": memory.fake,
        "teachers": memory.teachers,
        "autoencoder": memory.autoencoder,
        "blocks gathered for their use": memory.gathered,
        "activations": memory.activations,
        "margin for what is not computed": memory.margin,
    }
    for part, size in parts.items():
        if size or part not in REAL_ONLY:
            table.add_row(part, _bytes(size))
    table.add_section()
    table.add_row("all", f"[bold]{_bytes(memory.total)}[/bold]")
    if memory.evaluation:
        table.add_row("evaluation at the end, by the lead alone", _bytes(memory.evaluation))
    return table


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _bytes(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**29 else f"{size / 2**20:.0f} MiB"
