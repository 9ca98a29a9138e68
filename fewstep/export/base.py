"""The pipeline that a student was trained on, read from its folder without loading a weight."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fewstep.errors import CheckpointError, DataError
from fewstep.export.lora import Lora
from fewstep.models.families.open import read_index, read_kind
from fewstep.models.foreign import read_config

NETWORK = "transformer"
LICENCE_FILES = ("LICENSE*", "LICENCE*", "license*", "licence*")


@dataclass(frozen=True)
class Entry:
    """A tensor that lies in a file."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """As safetensors names it: F32, BF16, ..."""


@dataclass(frozen=True)
class Base:
    """A folder with a pipeline of a known family."""

    path: Path
    pipeline: str
    """Class name, the first line of model_index.json."""
    index: Mapping[str, Any]
    config: Mapping[str, Any]
    """Of its transformer."""
    tensors: Mapping[str, Entry]
    """Of its transformer, in the order of the files."""


def open_base(path: Path) -> Base:
    """DataError for a folder that is no pipeline of a family that students are made of."""
    pipeline = read_kind(path)
    config = read_config(path / NETWORK, what=f"base {path}")
    entries = read_entries(weight_files(path / NETWORK))
    return Base(path, pipeline, read_index(path), config, entries)


def read_entries(files: Iterable[Path]) -> dict[str, Entry]:
    """Name -> file, shape and precision of every tensor, from the headers alone."""
    entries: dict[str, Entry] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118
                    part = stored.get_slice(name)
                    entries[name] = Entry(file, tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file}: damaged or not safetensors ({error}); copy the base again"
            ) from None
    return entries


def weight_files(folder: Path) -> list[Path]:
    """The files of the plain variant: those of the index where there is one, else the one file."""
    for index in sorted(folder.glob("*.safetensors.index.json")):
        if index.name.count(".") == 3:  # name.safetensors.index.json, without a variant
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise DataError(f"{folder} lacks {missing[0]}, which its index names")
            return [folder / name for name in names]
    return sorted(folder.glob("diffusion_pytorch_model.safetensors")) or sorted(
        folder.glob("*.safetensors")
    )


def check_lora_fits(lora: Lora, base: Base, *, where: str) -> None:
    """CheckpointError where the LoRA names a module that the base lacks or has in another size."""
    for module, factors in lora.items():
        entry = base.tensors.get(f"{module}.weight")
        wanted = (factors.up.shape[0], factors.down.shape[1])
        if entry is None or entry.shape != wanted:
            has = "no such module" if entry is None else f"one of {entry.shape}"
            raise CheckpointError(
                f"{where}: changes {module}, a matrix of {wanted}, and the {base.pipeline} in "
                f"{base.path} has {has}; it is a LoRA of another base, give that one with --base"
            )


def check_whole_fits(weights: Mapping[str, Entry], base: Base, *, where: str) -> None:
    """CheckpointError where a student trained whole has other tensors than the base."""
    shapes, wanted = (
        {name: entry.shape for name, entry in entries.items()}
        for entries in (weights, base.tensors)
    )
    for name in [*wanted, *shapes]:
        if shapes.get(name) != wanted.get(name):
            raise CheckpointError(
                f"{where}: tensor {name} is {shapes.get(name, 'missing')} here and "
                f"{wanted.get(name, 'missing')} in {base.path}; give its own base with --base"
            )


@dataclass(frozen=True)
class Licence:
    name: str | None
    """As the base's README states it."""
    files: tuple[Path, ...]


def licence_of(base: Path) -> Licence:
    """What the base's README declares, and its licence files. Nothing is guessed."""
    import yaml

    name = None
    readme = base / "README.md"
    if readme.is_file():
        text = readme.read_text(errors="replace")
        if text.startswith("---"):
            try:
                header = yaml.safe_load(text.split("---", 2)[1])
            except (yaml.YAMLError, IndexError):
                header = None
            if isinstance(header, dict) and isinstance(header.get("license"), str):
                declared = (header["license"], header.get("license_name"))
                name = " ".join(str(part) for part in declared if part)
    files = sorted({file for pattern in LICENCE_FILES for file in base.glob(pattern)})
    return Licence(name, tuple(file for file in files if file.is_file()))
