"""What a sweep shows: cells done, each running cell's own update, time left. Files are its source.

On a terminal a live table; elsewhere a line for every event.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table

from fewstep.sweep.layout import CellState
from fewstep.sweep.predict import wall_clock
from fewstep.sweep.study import Cell, Reference

TAIL = 4096
"""Bytes at the end of metrics.jsonl in which its last whole line lies."""


class Display:
    def __init__(
        self,
        cells: Sequence[Cell | Reference],
        predicted: Mapping[str, float],
        jobs: int,
        console: Console | None = None,
    ) -> None:
        self.console = console or Console()
        self.left = {cell.name: predicted[cell.name] for cell in cells}
        """Predicted seconds of what is not done."""
        self.total, self.jobs = len(cells), jobs
        self.took = self.expected = 0.0
        self.told: set[str] = set()
        self.live = Live(console=self.console, refresh_per_second=2, transient=True)

    def __enter__(self) -> "Display":
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.live.stop()

    def started(self, cell: Cell | Reference, *, resumed: bool) -> None:
        self.say(f"{cell.name}: {'goes on from its checkpoint' if resumed else 'started'}")

    def found(self, cell: Cell | Reference) -> None:
        """It was done before."""
        del self.left[cell.name]

    def busy(self, cell: Cell | Reference) -> None:
        if cell.name not in self.told:
            self.told.add(cell.name)
            self.say(f"{cell.name}: another sweep, or the run of a killed one, is at work on it")

    def ended(self, cell: Cell | Reference, state: CellState) -> None:
        predicted = self.left.pop(cell.name)
        if state.status == "failed":
            self.say(f"{cell.name}: failed, {state.error}")
            return
        if state.starts == 1:
            self.took += state.seconds
            self.expected += predicted
        done = self.total - len(self.left)
        left = duration(self.seconds_left())
        self.say(
            f"{cell.name}: done in {duration(state.seconds)}; {done} of {self.total}, {left} left"
        )

    def seconds_left(self, elapsed: Mapping[str, float] | None = None) -> float:
        """Predictions of what is not done, corrected by what the cells so far took."""
        pace = self.took / self.expected if self.expected else 1.0
        spent = elapsed or {}
        return wall_clock(
            [
                max(pace * seconds - spent.get(name, 0.0), 0.0)
                for name, seconds in self.left.items()
            ],
            self.jobs,
        )

    def tick(self, running: Sequence[tuple[Cell | Reference, Path, float]]) -> None:
        """Running cells with their folders and seconds so far."""
        if not self.console.is_terminal:
            return
        done = self.total - len(self.left)
        left = self.seconds_left({cell.name: elapsed for cell, _, elapsed in running})
        table = Table.grid(padding=(0, 2))
        table.add_row(f"{done} of {self.total} cells", "", f"{duration(left)} left")
        for cell, folder, elapsed in running:
            table.add_row(f"  {cell.name}", where_it_is(cell, folder), duration(elapsed))
        self.live.update(table)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def where_it_is(cell: Cell | Reference, folder: Path) -> str:
    """The stage of a running cell, by the files it has written."""
    if isinstance(cell, Reference) or (folder / "student.safetensors").exists():
        return "evaluating"
    return f"update {last_update(folder / 'metrics.jsonl')} of {cell.plan.updates}"


def last_update(metrics: Path) -> int:
    """The last whole line's step; 0 before there is one."""
    if not metrics.exists():
        return 0
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - TAIL))
        lines = file.read().split(b"\n")[:-1]
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):  # cut at the front by TAIL
            break
    return 0


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
