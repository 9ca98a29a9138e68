"""The queue: starts cells as devices get free, keeps their states, survives their failures.

Each cell is a `fewstep distill` of its own, so that a crash, a leak or a lack of memory is that
cell's alone. A killed sweep loses nothing but what its cells did after their last checkpoints.
"""

import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TextIO

from fewstep.errors import RunError
from fewstep.recipe.load import dump_yaml
from fewstep.sweep.devices import Slot, distill_command, evaluate_command, last_words
from fewstep.sweep.layout import (
    CellState,
    Identity,
    cell_folder,
    difference,
    has_checkpoint,
    identity_of,
    lock,
    read_state,
    write_atomically,
    write_state,
)
from fewstep.sweep.progress import Display
from fewstep.sweep.study import Cell, Reference

MAX_ATTEMPTS = 3
POLL = 0.2
"""Seconds between two looks at the running cells."""
GRACE = 10.0
"""Seconds that a run may take to stop."""

Work = Cell | Reference


@dataclass
class Running:
    """A started cell."""

    cell: Work
    folder: Path
    process: subprocess.Popen[bytes]
    claim: TextIO
    log_begin: int
    """Where in sweep.log this start begins, in bytes."""
    state: CellState
    begun: float = field(default_factory=time.monotonic)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.begun


def check_identities(out: Path, cells: Sequence[Work], *, redo: bool) -> None:
    """No result and no checkpoint of other code or another recipe stays in the study's folder.

    Raises RunError that names such cells; with `redo` they are deleted, and so are those that
    failed too often, to be run anew.
    """
    stale: dict[Path, str] = {}
    for cell in cells:
        folder = cell_folder(out, cell)
        state, now = read_state(folder), identity_of(cell)
        if state is None:
            continue
        if state.identity != now and (state.status == "done" or has_checkpoint(folder)):
            stale[folder] = f"{cell.name} ({difference(state.identity, now)})"
        elif redo and _given_up(state):
            stale[folder] = cell.name
    if stale and not redo:
        named = ", ".join(list(stale.values())[:3]) + (" and more" if len(stale) > 3 else "")
        raise RunError(
            f"{out}: {len(stale)} of {len(cells)} cells were made differently: {named}; results "
            "are not mixed: --redo deletes these cells and runs them anew, another --out keeps them"
        )
    for folder, name in stale.items():
        claim = lock(folder)
        if claim is None:
            raise RunError(f"{out}: another sweep is at work on {name}; stop that one first")
        with claim:
            shutil.rmtree(folder)


def run_queue(
    cells: Sequence[Work],
    out: Path,
    slots: Sequence[Slot],
    environment: Mapping[str, str],
    display: Display,
) -> list[str]:
    """Run what is not done; returns what failed, a line a cell.

    On KeyboardInterrupt or SIGTERM the runs are stopped and a KeyboardInterrupt goes on to the
    caller. Raises RunError when the code or the weights change meanwhile.
    """
    queue = _Queue(list(cells), out, environment, display)
    running: dict[Slot, Running] = {}
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        while queue.waiting or running:
            for slot in slots:
                if slot not in running and (run := queue.start_next(slot)):
                    running[slot] = run
            for slot, run in list(running.items()):
                if run.process.poll() is not None:
                    del running[slot]
                    queue.finish(run)
            display.tick([(run.cell, run.folder, run.elapsed) for run in running.values()])
            if queue.waiting or running:
                time.sleep(POLL)
    finally:
        for run in running.values():
            _stop(run)
        signal.signal(signal.SIGTERM, before)
    return queue.failed


@dataclass
class _Queue:
    waiting: list[Work]
    out: Path
    environment: Mapping[str, str]
    display: Display
    failed: list[str] = field(default_factory=list)
    planned: dict[str, Identity] = field(init=False)

    def __post_init__(self) -> None:
        self.planned = {cell.name: identity_of(cell) for cell in self.waiting}

    def start_next(self, slot: Slot) -> Running | None:
        """Start the first cell that is not done, not given up and not worked on by others."""
        for cell in list(self.waiting):
            folder = cell_folder(self.out, cell)
            claim = lock(folder)
            if claim is None:
                self.display.busy(cell)
                continue
            self.waiting.remove(cell)
            state = read_state(folder) or CellState(**self.planned[cell.name]._asdict())
            if state.status == "done":
                self.display.found(cell)
            elif _given_up(state):
                self._fail(cell, f"given up after {state.attempts} attempts: {state.error}")
                self.display.ended(cell, state)
            else:
                return self._start(cell, folder, state, claim, slot)
            claim.close()
        return None

    def _start(
        self, cell: Work, folder: Path, state: CellState, claim: TextIO, slot: Slot
    ) -> Running:
        now = identity_of(cell)
        if now != self.planned[cell.name]:
            claim.close()
            raise RunError(
                f"{difference(self.planned[cell.name], now)} since this sweep began: {cell.name} "
                "would not be comparable with the cells before it; start the sweep again"
            )
        resume = has_checkpoint(folder)
        threads = state.threads if resume and state.threads else slot.threads
        state = state.model_copy(
            update={
                **now._asdict(),
                "status": "running",
                "device": slot.device,
                "threads": threads,
                "starts": state.starts + 1,
                "started": state.started or _now(),
            }
        )
        write_atomically(folder / "cell.yaml", dump_yaml(cell.recipe))
        command = distill_command(folder, resume=resume)
        if isinstance(cell, Reference):
            write_atomically(folder / "recipe.yaml", dump_yaml(cell.recipe))
            write_atomically(folder / "plan.json", cell.plan.model_dump_json(indent=2))
            command = evaluate_command(folder)
        write_state(folder, state)
        with (folder / "sweep.log").open("ab") as log:
            begin = log.tell()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=slot.environment(self.environment, threads=threads),
                pass_fds=[claim.fileno()],
            )
        self.display.started(cell, resumed=resume)
        return Running(cell, folder, process, claim, begin, state)

    def finish(self, run: Running) -> None:
        """Keep what became of a run that has ended by itself."""
        code = run.process.returncode
        changes: dict[str, object] = {"seconds": run.state.seconds + run.elapsed, "error": ""}
        error = ""
        if code:
            how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
            error = f"{how}: {last_words(run.folder / 'sweep.log', since=run.log_begin)}"
        elif identity_of(run.cell) != self.planned[run.cell.name]:
            error = "the code or the weights changed while it ran"
        if error:
            changes |= {"status": "failed", "attempts": run.state.attempts + 1, "error": error}
            self._fail(run.cell, error)
        else:
            changes |= {"status": "done", "finished": _now()}
        state = run.state.model_copy(update=changes)
        write_state(run.folder, state)
        run.claim.close()
        self.display.ended(run.cell, state)

    def _fail(self, cell: Work, error: str) -> None:
        self.failed.append(f"{cell.name}: {error}")


def _given_up(state: CellState) -> bool:
    return state.status == "failed" and state.attempts >= MAX_ATTEMPTS


def _stop(run: Running) -> None:
    """End a run now; what it did since its last checkpoint is lost."""
    run.process.terminate()
    try:
        run.process.wait(GRACE)
    except subprocess.TimeoutExpired:
        run.process.kill()
        run.process.wait()
    spent = run.state.seconds + run.elapsed
    write_state(run.folder, run.state.model_copy(update={"status": "queued", "seconds": spent}))
    run.claim.close()


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
