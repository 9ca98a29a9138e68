"""What every foreign model needs when it is opened from a folder: checks, identity, messages."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fewstep.errors import DataError

IDENTITY_SUFFIXES = (".json", ".txt", ".model", ".safetensors")


def read_config(path: Path, *, what: str) -> dict[str, Any]:
    """The folder's config.json, or a message that says what kind of folder was expected."""
    if not path.is_dir():
        state = "is a file, not a folder" if path.exists() else "does not exist"
        raise DataError(f"{what}: {path} {state}; give a local folder with config.json and weights")
    file = path / "config.json"
    if not file.exists():
        found = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
        inner = sorted(p.parent.name for p in path.glob("*/config.json"))
        hint = f"; did you mean {path / inner[0]}?" if inner else ""
        raise DataError(f"{what}: {path} has no config.json (found: {found}){hint}")
    try:
        config = json.loads(file.read_bytes())
    except ValueError as error:
        raise DataError(f"{what}: {file} is not valid JSON ({error}); copy it again") from None
    if not isinstance(config, dict):
        raise DataError(f"{what}: {file} is not a JSON object; copy it again")
    if not any(path.glob("*.safetensors")):
        raise DataError(
            f"{what}: {path} has no .safetensors weights; convert older .bin files first "
            f"(save_pretrained(..., safe_serialization=True))"
        )
    return config


def fingerprint(path: Path) -> str:
    """A hash of the configuration, tokenizer and weights in the folder."""
    digest = blake2b(digest_size=8)
    for file in sorted(path.iterdir()):
        if file.suffix in IDENTITY_SUFFIXES and file.is_file():
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            with open(file, "rb") as stream:
                while block := stream.read(1 << 22):
                    digest.update(block)
    return digest.hexdigest()


@contextmanager
def loading(path: Path, *, what: str) -> Iterator[None]:
    """Turn what diffusers and transformers raise on unfit files into one message."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in ("diffusers", "transformers"):
            raise
        raise DataError(
            f"{what}: {path} needs the package {error.name}; pip install 'fewstep[diffusers]'"
        ) from None
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"{what}: {path} cannot be loaded ({type(error).__name__}: {reason}); "
            f"the weights are damaged or belong to another config.json; copy the folder again"
        ) from error


def refuse_missing(path: Path, missing: list[str], *, what: str) -> None:
    """Both libraries give a weight that is not in the file random values; refuse that."""
    if missing:
        shown = ", ".join(sorted(missing)[:3])
        raise DataError(
            f"{what}: the weights in {path} lack {len(missing)} tensors that config.json asks for "
            f"({shown}, ...); they belong to another model, copy the folder again"
        )
