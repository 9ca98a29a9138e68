"""What a cell runs on, the command that runs it, and what it said last. Asks no torch."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fewstep.errors import RecipeError

CPU = "cpu"


@dataclass(frozen=True)
class Slot:
    """A place for one cell at a time."""

    number: int
    device: str
    """`cpu`, or a GPU as CUDA_VISIBLE_DEVICES names it."""
    threads: int

    def environment(self, outer: Mapping[str, str], *, threads: int = 0) -> dict[str, str]:
        """For the run: its threads, or `threads` where it began with other ones; its device."""
        count = str(threads or self.threads)
        own = {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}
        if self.device != CPU:
            own["CUDA_VISIBLE_DEVICES"] = self.device
        return dict(outer) | own


def make_slots(jobs: int | None, gpus: Sequence[str], cores: int) -> tuple[Slot, ...]:
    """One job per GPU where nothing is asked, on a CPU one with all cores. More jobs share both."""
    jobs = jobs or max(1, len(gpus))
    if not gpus and jobs > cores:
        raise RecipeError(
            f"{jobs} jobs on {cores} cores", field="--jobs", hint=f"use {cores} or fewer"
        )
    threads = max(1, cores // jobs)
    return tuple(Slot(n, gpus[n % len(gpus)] if gpus else CPU, threads) for n in range(jobs))


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """As CUDA_VISIBLE_DEVICES says, else all that the driver lists."""
    if "CUDA_VISIBLE_DEVICES" in environment:
        named = environment["CUDA_VISIBLE_DEVICES"].split(",")
        return [name.strip() for name in named if name.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    found = [line for line in listed.stdout.splitlines() if line.startswith("GPU ")]
    return [str(number) for number in range(len(found))]


def cores_here(environment: Mapping[str, str]) -> int:
    """That this process may use; OMP_NUM_THREADS asks for fewer."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    asked = environment.get("OMP_NUM_THREADS", "")
    return min(cores, int(asked)) if asked.isdigit() and int(asked) else cores


def distill_command(folder: Path, *, resume: bool) -> list[str]:
    """`fewstep distill` of the recipe in `folder`, into `folder`."""
    recipe = str(folder / "cell.yaml")
    command = [sys.executable, "-m", "fewstep.cli", "distill", recipe, "--out", str(folder)]
    return [*command, "--resume"] if resume else command


def evaluate_command(folder: Path) -> list[str]:
    return [sys.executable, "-m", "fewstep.cli", "eval", str(folder)]


def last_words(log: Path, *, since: int = 0, lines: int = 3) -> str:
    """The end of what a run printed after byte `since`."""
    with log.open("rb") as file:
        file.seek(since)
        printed = file.read().decode(errors="replace").splitlines()
    said = [line.strip() for line in printed if line.strip()]
    return " | ".join(said[-lines:])[-600:] or "it printed nothing"
