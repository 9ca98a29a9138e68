"""Complete training states on disk: written whole or not at all, and refused when damaged.

The last state and the one before it are kept, so that a damaged one costs a few updates, not a run.
"""

import json
import os
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fewstep.errors import CheckpointError, DiskError

LAST = Path("checkpoints") / "last.pt"
"""The newest state, in a run folder; the one before it lies beside it as `previous.pt`."""


class Resumed(NamedTuple):
    state: dict[str, Any]
    notice: str
    """What the user should know about where it came from; empty when all is well."""


def save_state(state: dict[str, Any], path: Path) -> None:
    """Write a state atomically and keep the one that was there as `previous.pt`.

    A crash or a full disk leaves both as they were.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".part")
    try:
        with scratch.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        scratch.unlink(missing_ok=True)
        causes = (error, error.__context__)  # torch may put an error of its own over the disk's
        disk = next((e for e in causes if isinstance(e, OSError)), None)
        if disk is None:
            raise error.__context__ or error from None
        kept = "the one before it is untouched" if path.exists() else "there is none before it"
        raise DiskError(
            f"checkpoint {path}: could not be written ({disk.strerror}), {kept}; make room, then "
            "go on with --resume"
        ) from None
    if path.exists():
        path.replace(previous_of(path))
    scratch.replace(path)


def load_state(path: Path) -> dict[str, Any]:
    """Read a state. Raises CheckpointError when the file is missing, truncated or not a state."""
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path}: no such file")
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"checkpoint {path}: truncated or damaged ({type(error).__name__})"
        ) from None
    if not isinstance(state, dict):
        raise CheckpointError(f"checkpoint {path}: holds no state of a training")
    return state


def load_last(path: Path) -> Resumed:
    """The state at `path`, or the one before it where that is damaged or missing."""
    if sharded(path).exists():
        raise CheckpointError(
            f"checkpoint {sharded(path)}: was written in parts by several devices; resume with "
            "torchrun, two devices or more and model.cast.shard: true"
        )
    try:
        return Resumed(load_state(path), "")
    except CheckpointError as last:
        try:
            state = load_state(previous_of(path))
        except CheckpointError as previous:
            raise CheckpointError(
                f"{last}; {previous}; there is nothing to go on from, start anew with another --out"
            ) from None
        return Resumed(state, f"{last}; going on from the one before it, {previous_of(path)}")


def has_state(path: Path) -> bool:
    """Whole or sharded."""
    return any(p.exists() or sharded(p).exists() for p in (path, previous_of(path)))


def previous_of(path: Path) -> Path:
    return path.with_name("previous.pt")


def sharded(path: Path) -> Path:
    """The folder of a state in parts (`train.sharding`), where a whole one would be the file."""
    return path.with_suffix("")


def forget_after(metrics: Path, step: int) -> None:
    """Cut metrics.jsonl back to `step`: what came after it will be trained and logged again."""
    if not metrics.exists():
        return
    lines = metrics.read_text().splitlines(keepends=True)
    scratch = metrics.with_name(metrics.name + ".part")
    scratch.write_text("".join(line for line in lines if _step_of(line) <= step))
    scratch.replace(metrics)


def _step_of(line: str) -> int:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # a line cut off by the crash
        return sys.maxsize
