"""A study's folder: where its cells lie, what became of them, and which code and recipe made them.

study.yaml study.json            what was asked, resolved; every cell with its hashes
costs.json                       this machine's measured speed, see `predict`
cells/<variant>/seed<k>/         a run folder of `fewstep distill`, and beside its own files
    cell.yaml cell.json          its recipe; its state (`CellState`)
    cell.lock sweep.log          held while somebody works on it; what the run printed
reference/                       the same for the models that are judged once
"""

import fcntl
import hashlib
import json
import os
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TextIO

from pydantic import Field, ValidationError

from fewstep.errors import RunError
from fewstep.recipe.facts import BUNDLED_WEIGHTS, weights_path
from fewstep.recipe.load import dump_yaml, load_yaml
from fewstep.recipe.schema import Recipe, Strict
from fewstep.sweep.study import Cell, Reference, Study

PACKAGE = Path(__file__).parent.parent
BESIDE = ("sweep", "study_report", "prompts", "export")
"""Rooms that start runs or read what they left, and so do not decide a cell's result."""
LAB_INSTRUMENTS = ("autoencoder", "reader")
"""Weights that every lab recipe uses without naming them."""


class Identity(NamedTuple):
    """What decides a cell's result. Cells are compared only where all but the recipe agree."""

    recipe_hash: str
    evaluation_hash: str
    """Of the cases and of what is measured during training."""
    code_hash: str


class CellState(Strict):
    """`cell.json`."""

    status: Literal["queued", "running", "done", "failed"] = "queued"
    """`running` without a held lock is a cell whose sweep was killed; the next one goes on."""
    recipe_hash: str
    evaluation_hash: str
    code_hash: str
    attempts: int = 0
    """Failures so far."""
    seconds: Annotated[float, Field(ge=0.0)] = 0.0
    """Of this machine, over all starts that ended under the eyes of a sweep."""
    starts: int = 0
    """1: `seconds` is one uninterrupted run, and may teach the prediction."""
    error: str = ""
    """The last lines of a failed start."""
    device: str = ""
    threads: int = 0
    """CPU threads that it began with; a resumed cell keeps them, for its sums to be the same."""
    started: str = ""
    finished: str = ""

    @property
    def identity(self) -> Identity:
        return Identity(self.recipe_hash, self.evaluation_hash, self.code_hash)


class PlannedCell(Strict):
    """An entry of study.json."""

    index: int
    variant: str
    seed: int
    folder: str
    recipe_hash: str
    evaluation_hash: str
    code_hash: str
    predicted_seconds: float


@dataclass(frozen=True)
class CellRun:
    """A cell as it lies on disk."""

    variant: str
    seed: int
    folder: Path
    predicted_seconds: float
    state: CellState

    @property
    def status(self) -> str:
        return self.state.status


@dataclass(frozen=True)
class StudyRun:
    folder: Path
    study: Study
    cells: tuple[CellRun, ...]

    @property
    def reference(self) -> Path:
        """The run folder of the models that were judged once; may not be there yet."""
        return self.folder / "reference"

    def finished(self) -> tuple[CellRun, ...]:
        return tuple(cell for cell in self.cells if cell.status == "done")


def open_study(folder: str | Path) -> StudyRun:
    """Read what a sweep has done so far.

    Raises RunError when there is no study or a finished cell was made by other code, another recipe
    or on other cases than study.json says.
    """
    folder = Path(folder)
    if not (folder / "study.json").is_file():
        raise RunError(f"{folder}: holds no study; `fewstep sweep STUDY --out {folder}` makes one")
    cells = []
    for entry in _read_study_json(folder):
        path = folder / entry.folder
        planned = Identity(entry.recipe_hash, entry.evaluation_hash, entry.code_hash)
        state = read_state(path) or CellState(**planned._asdict())
        if state.status == "done" and state.identity != planned:
            raise RunError(
                f"{path}: was made with {difference(state.identity, planned)} than the study's "
                "other cells; `fewstep sweep` with --redo makes it again"
            )
        cells.append(CellRun(entry.variant, entry.seed, path, entry.predicted_seconds, state))
    return StudyRun(folder, load_yaml(folder / "study.yaml", Study), tuple(cells))


def _read_study_json(folder: Path) -> list[PlannedCell]:
    try:
        content = json.loads((folder / "study.json").read_text())
        return [PlannedCell.model_validate(entry) for entry in content["cells"]]
    except (ValueError, KeyError, TypeError):
        raise RunError(
            f"{folder / 'study.json'}: damaged; `fewstep sweep` writes it again"
        ) from None


def write_study(
    folder: Path, study: Study, cells: tuple[Cell, ...], predicted: dict[str, float]
) -> None:
    """study.yaml and study.json; `predicted` are seconds by the cell's name.

    A finished cell keeps what was predicted before it ran.
    """
    kept: dict[str, float] = {}
    if (folder / "study.json").exists():
        before = {entry.folder: entry.predicted_seconds for entry in _read_study_json(folder)}
        for cell in cells:
            path = cell_folder(Path(), cell)
            state = read_state(folder / path)
            if state and state.status == "done" and str(path) in before:
                kept[cell.name] = before[str(path)]
    entries = [
        PlannedCell(
            index=cell.index,
            variant=cell.variant,
            seed=cell.seed,
            folder=str(cell_folder(Path(), cell)),
            predicted_seconds=round((predicted | kept)[cell.name], 1),
            **identity_of(cell)._asdict(),
        ).model_dump()
        for cell in cells
    ]
    write_atomically(folder / "study.yaml", dump_yaml(study))
    write_atomically(
        folder / "study.json", json.dumps({"study": study.name, "cells": entries}, indent=2)
    )


def cell_folder(out: Path, cell: Cell | Reference) -> Path:
    if isinstance(cell, Reference):
        return out / "reference"
    return out / "cells" / cell.variant / f"seed{cell.seed}"


def read_state(folder: Path) -> CellState | None:
    """None where no sweep has been yet."""
    path = folder / "cell.json"
    if not path.exists():
        return None
    try:
        return CellState.model_validate_json(path.read_bytes())
    except ValidationError:
        raise RunError(f"{path}: damaged; delete {folder}, its cell will be run anew") from None


def write_state(folder: Path, state: CellState) -> None:
    write_atomically(folder / "cell.json", state.model_dump_json(indent=2))


def has_checkpoint(folder: Path) -> bool:
    return any((folder / "checkpoints" / name).exists() for name in ("last.pt", "previous.pt"))


def lock(folder: Path) -> TextIO | None:
    """Claim a cell; None while somebody else works on it.

    The claim belongs to the open file. A run that inherits it keeps the cell claimed when the sweep
    that started it is killed, and it ends with the last of the two, whatever ends them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / "cell.lock").open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


# --- identity -------------------------------------------------------------------------------------


def identity_of(cell: Cell | Reference) -> Identity:
    recipe = cell.recipe
    log = recipe.log.model_dump(mode="json")
    evaluation = recipe.evaluation.model_dump(mode="json", exclude={"batch"})  # shows no difference
    measured = {"evaluation": evaluation, "probe": log["probe"]}
    return Identity(recipe.content_hash(), _digest(measured), code_hash(recipe))


def code_hash(recipe: Recipe) -> str:
    """16 hex digits over what makes a result besides the recipe: code, torch, named weights.

    The code is every .py file of the package but those of the rooms `BESIDE` a run.
    """
    weights = {weights_path(teacher.weights) for teacher in recipe.teachers.values()}
    if recipe.data.source.kind == "lab":
        weights |= {BUNDLED_WEIGHTS / f"{name}.safetensors" for name in LAB_INSTRUMENTS}
    code = {
        str(path.relative_to(PACKAGE)): _file_digest(path)
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.relative_to(PACKAGE).parts[0] not in BESIDE
    }
    return _digest([code, version("torch"), sorted(_file_digest(path) for path in weights)])


def _file_digest(path: Path) -> str:
    status = path.stat()
    return _digest_as_of(path, status.st_mtime_ns, status.st_size)


@cache
def _digest_as_of(path: Path, _changed: int, _size: int) -> str:
    """Large weights are read once, and again when they were written anew."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def difference(before: Identity, now: Identity) -> str:
    """What a user calls the parts that are not the same."""
    names = {
        "recipe_hash": "another recipe",
        "evaluation_hash": "another evaluation",
        "code_hash": "other code or weights",
    }
    parts = zip(Identity._fields, before, now, strict=True)
    return " and ".join(names[field] for field, a, b in parts if a != b)


def write_atomically(path: Path, text: str) -> None:
    """Several jobs of one study may write the same file at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.{os.getpid()}.part")
    scratch.write_text(text)
    scratch.replace(path)
