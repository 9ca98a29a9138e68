"""A run folder -> the student to export and the story of how it came about.

What does not fit together is refused here: another kind of model, a base that has changed.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import safe_open

from fewstep.errors import CheckpointError, RunError
from fewstep.export.base import (
    NETWORK,
    Base,
    check_lora_fits,
    check_whole_fits,
    open_base,
    read_entries,
)
from fewstep.export.lora import fold
from fewstep.export.student import History, Student
from fewstep.models.foreign import fingerprint
from fewstep.models.lab import read_header
from fewstep.recipe.load import dump_yaml
from fewstep.recipe.plan import Plan
from fewstep.recipe.schema import LabSource, Recipe, Task

SAMPLES = (".jsonl", ".tar", ".txt", ".csv", ".parquet")
"""The files that prompts and pairs are read from; images are not hashed."""


class Config(BaseModel):
    """The `config` of a family's student, in the header of student.safetensors."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    kind: Literal["lora", "full"]
    pipeline: str
    alpha: float | None = None


class About(BaseModel):
    """Its `about`, as far as playback needs it."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    recipe: str
    grid: tuple[float, ...] = Field(min_length=1)
    base: str
    tasks: tuple[Task, ...] = Field(min_length=1)
    size: tuple[int, int]
    precision: Literal["bf16", "fp32"]
    base_stamp: str | None = None
    """`fingerprint` of the base's transformer when the student was trained."""
    source_resolution: int = 1024


def read_student(weights: Path, recipe: Recipe, *, base: Path | None = None) -> Student:
    """The student of a finished run; `base` is where its base lies now, if that has moved."""
    config, about = _read_header(weights)
    where = f"student {weights}"
    opened = _open_base(Path(about.base), base, about.base_stamp, where=where)
    if opened.pipeline != config.pipeline:
        raise CheckpointError(
            f"{where}: was trained on a {config.pipeline}, and {opened.path} holds a "
            f"{opened.pipeline}; give its own base with --base"
        )
    entries, lora = opened.tensors, {}
    if config.kind == "full":
        entries = read_entries([weights])
        check_whole_fits(entries, opened, where=where)
    else:
        if config.alpha is None:
            raise CheckpointError(f"{where}: its header has no alpha; train it again")
        with safe_open(weights, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        lora = fold(tensors, alpha=config.alpha, where=where)
        check_lora_fits(lora, opened, where=where)
    return Student(
        name=about.recipe,
        base=opened,
        weights=entries,
        lora=lora,
        times=about.grid,
        tasks=about.tasks,
        size=about.size,
        precision=about.precision,
        companion=_companion(recipe, Path(about.base)),
        source_resolution=about.source_resolution,
    )


def _read_header(weights: Path) -> tuple[Config, About]:
    config, about = read_header(weights)
    if "kind" not in config:
        raise RunError(
            f"student {weights}: is a network of fewstep's own (MMDiT), which no stock pipeline "
            "plays; `fewstep sample` does. Exported are students of a diffusers pipeline"
        )
    try:
        return Config.model_validate(config), About.model_validate(about)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise CheckpointError(
            f"student {weights}: its header is not one that `fewstep distill` writes ({field}: "
            f"{first['msg']}); train it again"
        ) from None


def _open_base(trained_on: Path, moved: Path | None, stamp: str | None, *, where: str) -> Base:
    path = moved or trained_on
    if moved is None and not path.is_dir():
        raise RunError(
            f"{where}: its base {path} is no longer there; say where it lies now with --base"
        )
    base = open_base(path)
    if stamp is not None and fingerprint(path / NETWORK) != stamp:
        raise CheckpointError(
            f"{where}: {path / NETWORK} is not what this student was trained on (its files have "
            "changed since); give the unchanged base with --base"
        )
    return base


def _companion(recipe: Recipe, base: Path) -> Path | None:
    """Of the recipe's two pipelines, the one that the student did not start from."""
    folders = [
        Path(path).expanduser() for path in (recipe.model.path, recipe.model.edit_path) if path
    ]
    return next((folder for folder in folders if folder.resolve() != base.resolve()), None)


def read_history(run: Path, recipe: Recipe, plan: Plan) -> History:
    """Recipe, teachers, data and evaluation of a run; the hashes are of now, and say so."""
    results, summary = run / "results.md", run / "summary.json"
    return History(
        recipe=dump_yaml(recipe),
        teachers=tuple(_teacher(name, recipe) for name in plan.teachers),
        data=tuple(
            {
                "pool": pool.pool,
                "task": pool.task,
                "category": pool.category,
                "prompts or pairs": f"{pool.size:,}",
                "samples seen": f"{pool.samples:,}",
            }
            for pool in plan.pools
        ),
        evaluation=_evaluation(results.read_text()) if results.is_file() else "",
        hashes={**_identity(run), **_data_hashes(recipe)},
        cost=_cost(json.loads(summary.read_text())) if summary.is_file() else "",
    )


def _teacher(name: str, recipe: Recipe) -> dict[str, str]:
    teacher = recipe.teachers[name]
    return {
        "teacher": name,
        "weights": f"`{Path(teacher.weights).name}`",
        "tasks": ", ".join(teacher.tasks),
        "guidance": ", ".join(f"{task} {scale:g}" for task, scale in teacher.cfg.items()),
        "steps": str(teacher.steps),
    }


def _evaluation(results: str) -> str:
    """results.md without its title, one level deeper."""
    lines = [f"#{line}" if line.startswith("#") else line for line in results.splitlines()]
    return "\n".join(line for line in lines if not line.startswith("## ")).strip()


def _identity(run: Path) -> dict[str, str]:
    identity = run / "identity.json"
    found = json.loads(identity.read_text()) if identity.is_file() else {}
    return {str(name): str(value) for name, value in found.items()}


def _data_hashes(recipe: Recipe) -> dict[str, str]:
    """SHA-256 of the files that samples are read from, as they are at the export."""
    source, hashes = recipe.data.source, {}
    if isinstance(source, LabSource):
        return {}
    path = Path(source.path).expanduser()
    for file in [path] if path.is_file() else sorted(path.glob("*")):
        if file.suffix in SAMPLES:
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            hashes[f"data file {file.name}, at the export"] = digest
    return hashes


def _cost(summary: Mapping[str, Any]) -> str:
    seconds = sum(summary.get("seconds", {}).values())
    facts = [
        f"{summary['updates']:,} updates" if "updates" in summary else "",
        f"{summary['samples']:,} samples" if "samples" in summary else "",
        f"{seconds / 60:.1f} minutes on {summary['device']}" if "device" in summary else "",
    ]
    told = ", ".join(fact for fact in facts if fact)
    return f"It took {told}." if told else ""
