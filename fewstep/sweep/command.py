"""`fewstep sweep`, top to bottom: load, check, predict, then run, or print, or write a script."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console
from rich.table import Column, Table

from fewstep.errors import CellsFailed, Interrupted, RecipeError, RunError
from fewstep.sweep.devices import CPU, Slot, cores_here, make_slots, visible_gpus
from fewstep.sweep.emit import Target, emit
from fewstep.sweep.engine import Work, check_identities, run_queue
from fewstep.sweep.layout import (
    cell_folder,
    code_hash,
    read_state,
    write_atomically,
    write_study,
)
from fewstep.sweep.predict import (
    Measurement,
    measure,
    predict_all,
    requests_to_measure,
    wall_clock,
)
from fewstep.sweep.progress import Display, duration
from fewstep.sweep.study import Cell, Reference, Study, load_study, make_cells, make_reference

console = Console()


def sweep(
    study_path: Path,
    *,
    out: Path | None,
    overrides: Mapping[str, str],
    environment: Mapping[str, str],
    jobs: int | None = None,
    dry_run: bool = False,
    measure_first: bool = True,
    redo: bool = False,
    only: int | None = None,
    target: Target | None = None,
) -> None:
    """Run a study's cells, or `only` one, or prepare the folder and print the script for `target`.

    `only` counts the cells from 0; the reference models come after the last cell. Raises
    CellsFailed when some cells failed, after all others have run.
    """
    if environment.get("WORLD_SIZE", "1") != "1":
        raise RunError(
            "torchrun has started several sweeps, which would run the same cells; start one, "
            "without torchrun or with --nproc-per-node 1"
        )
    study = load_study(study_path, overrides)
    cells = make_cells(study)
    reference = make_reference(study, cells)
    everything: list[Work] = [*cells, *([reference] if reference else [])]
    work = everything if only is None else [pick(everything, only)]
    slots = make_slots(jobs, visible_gpus(environment), cores_here(environment))
    out = out or Path("runs") / study.name
    check_folder(out, study)
    if not dry_run:
        check_identities(out, work if redo else everything, redo=redo)
    measured = known_measurement(out, cells, slots[0])
    if measured is None and measure_first and only is None and target is None and left(out, work):
        asked = requests_to_measure(cells)
        judge = f" and up to {asked:,} requests to the judge" if asked else ""
        say(f"measuring this machine on a few updates{judge} ...")
        measured = measure(cells, slots[0], environment)
    predicted = predict_all(everything, out, measured, slots[0])
    if dry_run:
        print_prediction(study, everything, work, predicted, out, slots)
        return
    if measured is not None:
        write_atomically(out / "costs.json", measured.model_dump_json(indent=2))
    write_study(out, study, cells, predicted)
    if target is not None:
        print_script(target, study_path, out, overrides, study, work, predicted, slots[0])
        return
    try:
        with Display(work, predicted, len(slots), console) as display:
            failed = run_queue(work, out, slots, environment, display)
    except KeyboardInterrupt:
        again = f"`fewstep sweep {study_path} --out {out}`"
        raise Interrupted(f"stopped by you; finished cells are kept, {again} goes on") from None
    if failed:
        raise CellsFailed(len(failed), len(work), failed)
    say(f"{len(work)} of {len(work)} done: {out}")


def check_folder(out: Path, study: Study) -> None:
    """Raises RunError where `out` holds something else than this study."""
    if out.exists() and not out.is_dir():
        raise RunError(f"{out}: is a file; choose another --out")
    if not out.exists() or not any(out.iterdir()):
        return
    found = out / "study.json"
    if not found.exists():
        raise RunError(f"{out}: holds other files and no study; choose another --out")
    try:
        name = json.loads(found.read_text())["study"]
    except (ValueError, KeyError, TypeError):
        raise RunError(f"{found}: damaged; delete this file, the cells are kept") from None
    if name != study.name:
        raise RunError(f"{out}: holds the study {name!r}, not {study.name!r}; choose another --out")


def pick(work: Sequence[Work], index: int) -> Work:
    if index >= len(work):
        raise RecipeError(
            f"there is no cell {index}", field="--cell", hint=f"use 0 to {len(work) - 1}"
        )
    return work[index]


def left(out: Path, work: Sequence[Work]) -> list[Work]:
    """What is not done."""
    states = {cell.name: read_state(cell_folder(out, cell)) for cell in work}
    return [cell for cell in work if (s := states[cell.name]) is None or s.status != "done"]


def known_measurement(out: Path, cells: Sequence[Cell], slot: Slot) -> Measurement | None:
    """What an earlier start of this study measured, if it still holds."""
    try:
        found = Measurement.model_validate_json((out / "costs.json").read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
    here = (slot.device, slot.threads, code_hash(cells[0].recipe))
    return found if (found.device, found.threads, found.code) == here else None


def print_prediction(
    study: Study,
    everything: Sequence[Work],
    work: Sequence[Work],
    predicted: Mapping[str, float],
    out: Path,
    slots: Sequence[Slot],
) -> None:
    names = Column("variant", no_wrap=True)
    table = Table(names, "cells", "seconds per cell", "updates", "samples", title=study.name)
    if everything[0].plan.judge:
        table.add_column("judge requests per cell")
    for name in study.variants:
        own = [cell for cell in everything if isinstance(cell, Cell) and cell.variant == name]
        mean = sum(predicted[cell.name] for cell in own) / len(own)
        samples = sum(quota.samples for quota in own[0].plan.tasks)
        updates = own[0].plan.updates
        cost = f"{mean:.0f}", str(updates), str(samples), *_asked(own[0])
        table.add_row(name, str(len(own)), *cost)
    if isinstance(last := everything[-1], Reference):
        cost = f"{predicted[last.name]:.0f}", "", "", *_asked(last)
        table.add_row(last.name, "1", *cost)
    console.print(table)
    to_run = left(out, work)
    seconds = [predicted[cell.name] for cell in to_run]
    done = f" {len(work) - len(seconds)} are done." if len(seconds) < len(work) else ""
    jobs = f"{len(slots)} job{'s' if len(slots) > 1 else ''}"
    say(f"{len(seconds)} cells to run, {sum(seconds):.0f} s in all.{done}")
    say(f"With {jobs} on {where(slots)}: {duration(wall_clock(seconds, len(slots)))}.")
    if judges := [cell.plan.judge for cell in to_run if cell.plan.judge]:
        asked, images = sum(j.requests for j in judges), sum(j.images for j in judges)
        say(
            f"Up to {asked:,} requests to {judges[0].model} for {images:,} images; its price is "
            "the endpoint's."
        )


def _asked(cell: Work) -> list[str]:
    """Requests to the judge as a cell of the table, where an endpoint judges."""
    return [f"{cell.plan.judge.requests:,}"] if cell.plan.judge else []


def where(slots: Sequence[Slot]) -> str:
    devices = sorted({slot.device for slot in slots})
    if devices == [CPU]:
        return f"the CPU, {slots[0].threads} threads each"
    return f"GPU {', '.join(devices)}"


def print_script(
    target: Target,
    study_path: Path,
    out: Path,
    overrides: Mapping[str, str],
    study: Study,
    work: Sequence[Work],
    predicted: Mapping[str, float],
    slot: Slot,
) -> None:
    sets = [part for key, value in overrides.items() for part in ("--set", f"{key}={value}")]
    logs = (out / "logs").resolve()
    if target == "slurm":
        logs.mkdir(parents=True, exist_ok=True)  # Slurm makes no folder for its logs
    script = emit(
        target,
        name=study.name,
        python=sys.executable,
        arguments=["sweep", str(study_path), "--out", str(out), *sets],
        cells=[cell.name for cell in work],
        longest=max(predicted[cell.name] for cell in work),
        gpu=slot.device != CPU,
        cwd=str(Path.cwd()),
        logs=str(logs),
    )
    print(script, end="")


def say(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
