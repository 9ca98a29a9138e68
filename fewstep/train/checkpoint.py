"""Complete training states on disk: written whole or not at all, and refused when damaged."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from fewstep.errors import CheckpointError


def save_state(state: dict[str, Any], path: Path) -> None:
    """Write a state atomically: a crash or a full disk leaves the previous file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".part")
    try:
        torch.save(state, scratch)
        scratch.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        scratch.unlink(missing_ok=True)
        raise CheckpointError(
            f"checkpoint {path}: could not be written ({error}); free some disk space and run again with "
            "--resume, the previous checkpoint is untouched"
        ) from None


def load_state(path: Path) -> dict[str, Any]:
    """Read a state. Raises CheckpointError when the file is missing, truncated or not a state."""
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path}: no such file")
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"checkpoint {path}: truncated or damaged ({type(error).__name__}); resume from an older "
            "one in the same folder"
        ) from None
