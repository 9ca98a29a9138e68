"""A run's folder and its voice in the terminal: whose folder it is, time spent, progress, files.

What the commands do is in `commands`.
"""

import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

from fewstep.errors import CheckpointError, RunError
from fewstep.sweep.progress import duration
from fewstep.train.checkpoint import LAST, has_state

console = Console()
PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def claim(out: Path, identity: Mapping[str, str], *, resume: bool) -> None:
    """Make `out` the folder of this run and of no other.

    `identity` is what decides the outcome, such as the recipe's hash. A start that never came to a
    checkpoint or a result may be repeated without --resume.
    """
    marker = out / "identity.json"
    if resume:
        if not has_state(out / LAST):
            raise CheckpointError(
                f"{out}: nothing to resume, there is no checkpoint; start it without --resume"
            )
        before = read_json(marker)
        for name, value in identity.items():
            if before.get(name, value) != value:
                raise CheckpointError(
                    f"{out}: {name} is not what this run began with; resume with the recipe in "
                    f"{out / 'recipe.yaml'} and its weights as they were, or choose another --out"
                )
    else:
        results = ("student.safetensors", "teacher.safetensors", "eval/rows.jsonl")
        if has_state(out / LAST) or any((out / name).exists() for name in results):
            raise RunError(
                f"{out} already holds a run; go on with --resume, or choose another --out"
            )
        if (out / "recipe.yaml").exists() and not marker.exists():
            raise RunError(
                f"{out} holds a recipe.yaml that no run wrote, and a run would replace it; choose "
                "another --out"
            )
        try:
            out.mkdir(parents=True, exist_ok=True)
            (out / "metrics.jsonl").unlink(missing_ok=True)
        except (
            FileExistsError,
            FileNotFoundError,
            NotADirectoryError,
            PermissionError,
        ) as error:
            raise RunError(
                f"{out}: no run can be kept there ({error.strerror}); choose another --out"
            ) from None
    write_text(marker, json.dumps(identity, indent=2))


def stamp_of(weights: Path, *playback: object) -> str:
    """6 hex digits that change with a weight file and with how it is played back."""
    if not weights.is_file():
        raise CheckpointError(f"weights {weights}: no such file")
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(repr(playback).encode())
    return digest.hexdigest()[:6]


def stamp(*facts: object) -> str:
    """6 hex digits that change with these facts."""
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:6]


def say(text: str) -> None:
    """A line as it is; nothing for an empty one."""
    if text:
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def read_json(path: Path) -> dict[str, Any]:
    """A small file of the run folder; empty when it is not there yet."""
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise RunError(f"{path}: damaged; delete it") from None


def write_text(path: Path, text: str) -> None:
    scratch = path.with_name(path.name + ".part")
    scratch.write_text(text)
    scratch.replace(path)


def save_image(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@dataclass
class Clock:
    """Seconds per phase, kept in summary.json across resumes."""

    out: Path

    def __post_init__(self) -> None:
        self.summary = read_json(self.out / "summary.json")
        self.summary.setdefault("seconds", {})

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        begun = time.monotonic()
        try:
            yield
        finally:
            spent = self.summary["seconds"].get(phase, 0.0) + time.monotonic() - begun
            self.summary["seconds"][phase] = round(spent, 2)
            self.note()

    @property
    def seconds(self) -> float:
        return sum(self.summary["seconds"].values())

    def note(self, **facts: object) -> None:
        self.summary |= facts | {"device": device_name(), "torch": torch.__version__}
        write_text(self.out / "summary.json", json.dumps(self.summary, indent=2))


def compute_device() -> torch.device:
    """The first GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads, {platform.machine()}"


@contextmanager
def progress(title: str, total: int, done: int = 0) -> Iterator[Callable[[int, str], None]]:
    """A bar with count, rate and time left; where there is no terminal, a line now and then.

    The note takes the width that the others leave, and is cut to it.
    """
    begun, first = time.monotonic(), done
    last = [begun]
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TextColumn("{task.fields[pace]}"),
        TextColumn(
            "{task.fields[note]}",
            markup=False,
            table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
        ),
        console=console,
        disable=not console.is_terminal,
        expand=True,
    )
    with bar:
        task = bar.add_task(title, total=total, completed=done, pace="", note="")

        def advance(now: int, note: str) -> None:
            elapsed = time.monotonic() - begun
            rate = (now - first) / elapsed if elapsed else 0.0
            left = f", {duration((total - now) / rate)} left" if rate and now < total else ""
            pace = f"{rate:.2f}/s{left}"
            bar.update(task, completed=now, pace=pace, note=note)
            if not console.is_terminal and (time.monotonic() - last[0] > 10 or now == total):
                say(f"{title}: {now}/{total}, {pace}. {note}".rstrip())
                last[0] = time.monotonic()

        yield advance
