"""What a study will cost in seconds, from a short measured run of it or from its finished cells.

The plan counts evaluations and operations; how fast this machine does them, and what starting,
preparing and judging cost beside them, is measured by really running a few updates of a cell.
"""

import json
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median

from fewstep.errors import RunError
from fewstep.recipe.facts import local_machine
from fewstep.recipe.load import dump_yaml
from fewstep.recipe.plan import make_plan
from fewstep.recipe.schema import TASKS, Recipe, Strict, Task
from fewstep.sweep.devices import Slot, distill_command, last_words
from fewstep.sweep.layout import cell_folder, code_hash, read_state
from fewstep.sweep.study import Cell, Reference

UPDATES, POOL, CASES = 6, 96, 4
"""Size of the measured run: seconds, and yet enough of each to be told from the start."""


class Costs(Strict):
    """Seconds that cells with one kind of objective take."""

    start: float
    """Of a process: imports before, the report after."""
    load: float
    """Data and teachers, without prompts."""
    prompt: dict[Task, float]
    """One prompt or source of a pool."""
    operation: float
    """One floating-point operation of the training, as the plan counts them."""
    image: float
    """One image of the student, in its evaluation or in a probe: drawn, judged and kept."""
    judge: float = 0.0
    """One image at the endpoint that judges it, where there is one."""
    evaluation: float
    """One evaluation of the network in drawing a teacher's image."""
    once: float
    """Per image of a probe: the base teacher's picture of it, drawn once. Has the first checkpoint
    and sample grid in it; without a probe it is these alone."""


class Measurement(Strict):
    device: str
    threads: int
    code: str
    costs: dict[str, Costs]
    """By the kind of objective."""


def measure(cells: Sequence[Cell], slot: Slot, environment: Mapping[str, str]) -> Measurement:
    """Run a few updates of the dearest cell of each kind of objective, in a folder of its own.

    Raises RunError with what such a run printed when it failed: the study would fail likewise.
    """
    return Measurement(
        device=slot.device,
        threads=slot.threads,
        code=code_hash(cells[0].recipe),
        costs={k: _short_run(cell, slot, environment) for k, cell in _dearest(cells).items()},
    )


def requests_to_measure(cells: Sequence[Cell]) -> int:
    """How often `measure` asks the endpoint that judges."""
    plans = [make_plan(_shortened(c.recipe), local_machine()) for c in _dearest(cells).values()]
    return sum(plan.judge.requests for plan in plans if plan.judge)


def _dearest(cells: Sequence[Cell]) -> dict[str, Cell]:
    """By the kind of objective."""
    by_cost = sorted(cells, key=lambda cell: cell.plan.cost.flop)
    return {cell.recipe.objective.kind: cell for cell in by_cost}


def _short_run(cell: Cell, slot: Slot, environment: Mapping[str, str]) -> Costs:
    recipe = _shortened(cell.recipe)
    with tempfile.TemporaryDirectory(prefix="fewstep-measure-") as scratch:
        out = Path(scratch)
        (out / "cell.yaml").write_text(dump_yaml(recipe))
        begun = time.monotonic()
        with (out / "sweep.log").open("w") as log:
            code = subprocess.run(
                distill_command(out, resume=False),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=slot.environment(environment),
                check=False,
            ).returncode
        wall = time.monotonic() - begun
        if code:
            raise RunError(
                f"measuring {cell.name}: its first updates failed; {last_words(out / 'sweep.log')}"
            )
        return _read_costs(out, recipe, wall)


def _shortened(recipe: Recipe) -> Recipe:
    """A few updates of the same cost, a few prompts and cases; one checkpoint, grid and probe."""
    pools = {
        name: pool.model_copy(update={"size": min(pool.size, POOL)})
        for name, pool in recipe.data.pools.items()
    }
    never = 10 * UPDATES
    changes = {"every": 1, "sample_every": never, "save_every": never}
    log = recipe.log.model_copy(update=changes)
    if log.probe is not None:
        smallest = {"every": never, "steps": None, "per_category": 1, "seeds": 2}
        log = log.model_copy(update={"probe": log.probe.model_copy(update=smallest)})
    cases = min(recipe.evaluation.per_category, CASES)
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"pools": pools}),
            "budget": recipe.budget.model_copy(update={"updates": UPDATES}),
            "log": log,
            "evaluation": recipe.evaluation.model_copy(
                update={
                    "per_category": cases,
                    "seeds_per_case": 1,
                    "models": ("student", "teacher"),
                }
            ),
        }
    )


def _read_costs(out: Path, recipe: Recipe, wall: float) -> Costs:
    plan = make_plan(recipe, local_machine())
    summary = json.loads((out / "summary.json").read_text())
    lines = (out / "metrics.jsonl").read_text().splitlines()
    updates = [json.loads(line)["seconds"] for line in lines]
    phases: dict[str, float] = summary["seconds"]
    pools: dict[str, float] = summary["pools"]
    prompt: dict[Task, float] = {}
    for task in TASKS:
        own = [n for n, pool in recipe.data.pools.items() if pool.task == task and n in pools]
        if own:
            size = sum(recipe.data.pools[name].size for name in own)
            prompt[task] = sum(pools[name] for name in own) / size
    logged = [json.loads(line) for line in (out / "eval" / "rows.jsonl").read_text().splitlines()]
    # One an image, which has a line when it is drawn and one when an endpoint has judged it.
    rows = {(row["model"], row["case"], row["seed"]): row for row in logged}.values()
    teachers = [row for row in rows if row["model"].startswith("teacher")]
    drawing = sum(row["seconds"] for row in teachers)
    image = (phases["evaluate"] - drawing) / len(rows)
    beside = phases["distil"] - sum(updates)
    return Costs(
        start=wall - sum(phases.values()),
        load=phases["prepare data and teachers"] - sum(pools.values()),
        prompt=prompt,
        # The first update also warms up caches and kernels.
        operation=median(updates[1:]) * plan.updates / plan.cost.flop,
        image=image,
        judge=phases.get("judge", 0.0) / len(rows),
        evaluation=drawing / sum(row["nfe"] for row in teachers),
        once=max(beside - _probed(recipe) * image, 0.0) / max(_probed(recipe), 1),
    )


def predict(cell: Cell | Reference, measured: Measurement) -> float:
    """Seconds of a cell that has a device to itself."""
    recipe, plan = cell.recipe, cell.plan
    costs = measured.costs.get(recipe.objective.kind) or next(iter(measured.costs.values()))
    judging = plan.judge.images * costs.judge if plan.judge else 0.0
    if isinstance(cell, Reference):
        drawn = len(recipe.evaluation.models) * _images(recipe) * costs.image
        return costs.start + drawn + judging + plan.cost.evaluation_nfe * costs.evaluation
    prepare = sum(quota.size * costs.prompt.get(quota.task, 0.0) for quota in plan.pools)
    train = plan.cost.flop * costs.operation
    drawn = _images(recipe) + _probes(recipe) * _probed(recipe)
    probes = max(_probed(recipe), 1) * costs.once
    return costs.start + costs.load + prepare + train + probes + drawn * costs.image + judging


def _images(recipe: Recipe) -> int:
    """Of one model in the evaluation."""
    spec = recipe.evaluation
    return len(recipe.data.conditions()) * spec.per_category * spec.seeds_per_case


def _probed(recipe: Recipe) -> int:
    """Images of one probe, which draws for the trained tasks alone."""
    probe = recipe.log.probe
    trained = recipe.data.trained()
    conditions = sum(task in trained for task, _ in recipe.data.conditions())
    return probe.per_category * probe.seeds * conditions if probe else 0


def _probes(recipe: Recipe) -> int:
    probe, updates = recipe.log.probe, recipe.budget.updates
    if probe is None:
        return 0
    if probe.steps:
        return len(probe.steps)
    return -(-updates // probe.every)


def nominal(cell: Cell | Reference) -> float:
    """Seconds by the plan alone, for a machine that nobody measured."""
    cost = cell.plan.cost
    return cost.evaluation_seconds + (0.0 if isinstance(cell, Reference) else cost.seconds)


def predict_all(
    cells: Sequence[Cell | Reference], out: Path, measured: Measurement | None, slot: Slot
) -> dict[str, float]:
    """Seconds by the cell's name. Finished cells correct what was measured, or the plan.

    A variant that has finished with another seed is taken by its own time; all others are scaled
    by how much longer the finished ones took than predicted.
    """
    raw = {cell.name: predict(cell, measured) if measured else nominal(cell) for cell in cells}
    took: dict[str, float] = {}
    for cell in cells:
        state = read_state(cell_folder(out, cell))
        whole = state is not None and state.status == "done" and state.starts == 1
        if state and whole and (state.device, state.threads) == (slot.device, slot.threads):
            took[cell.name] = state.seconds
    trained = [cell for cell in cells if isinstance(cell, Cell) and cell.name in took]
    scale = 1.0
    if trained:
        scale = sum(took[c.name] for c in trained) / sum(raw[c.name] for c in trained)
    found: dict[str, float] = {}
    for cell in cells:
        alike = [
            took[c.name] for c in trained if isinstance(cell, Cell) and c.variant == cell.variant
        ]
        found[cell.name] = took.get(cell.name, fmean(alike) if alike else scale * raw[cell.name])
    return found


def wall_clock(seconds: Sequence[float], jobs: int) -> float:
    """When the last of these cells ends if each free job takes the next one."""
    busy = [0.0] * jobs
    for cell in seconds:
        busy[busy.index(min(busy))] += cell
    return max(busy)
