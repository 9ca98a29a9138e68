"""What the lists of a recipe's data say, read before anything loads: rows, and images that are not
there.

Only lists of text are read. What else is wrong in them, what lies in tables and shards, and how
many rows the splits of a folder without declared splits leave to training, is found out when the
data is opened.
"""

import csv
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fewstep.recipe.schema import (
    WITH_REAL_IMAGES,
    FolderSource,
    PromptSource,
    Recipe,
    Task,
)

LISTS = ("captions.jsonl", "edits.jsonl")
SOURCE_KEYS = ("source", "sources")
TARGET_KEYS: dict[Task, tuple[str, ...]] = {"t2i": ("image", "file"), "edit": ("target",)}
"""What rows of prompts call the real image that shows their prompt, or that their instruction leads
to."""


class ListRow(NamedTuple):
    where: str
    """For messages: 'edits.jsonl line 3'."""
    folder: Path
    """That the names of images are relative to."""
    values: dict[str, Any]

    @property
    def task(self) -> Task:
        return "edit" if self.values.get("instruction") else "t2i"

    @property
    def category(self) -> str:
        return self.values.get("category") or "general"

    @property
    def is_trained(self) -> bool:
        return (self.values.get("split") or "train") == "train"


def count_available(recipe: Recipe) -> dict[str, int]:
    """By pool, the number of rows of its task and category; at most so many can be trained on.

    Empty where the source is no list, or cannot be read: opening it will say why.
    """
    rows = _rows_of(recipe)
    if rows is None:
        return {}
    counts = Counter((row.task, row.category) for row in rows if row.is_trained)
    return {name: counts[p.task, p.category] for name, p in recipe.data.pools.items()}


def find_image_problems(recipe: Recipe) -> tuple[str, ...]:
    """Images that rows of prompts name and that are not there, by file, line and field.

    Where the objective learns from real images, also the rows of the pools that name none.
    """
    if not isinstance(recipe.data.source, PromptSource):
        return ()
    with_targets = isinstance(recipe.objective, WITH_REAL_IMAGES)
    trained = {(pool.task, pool.category) for pool in recipe.data.pools.values()}
    folders: dict[Path, frozenset[str]] = {}
    problems: list[str] = []
    for row in _rows_of(recipe) or ():
        asked = row.is_trained and with_targets
        keys = (*SOURCE_KEYS, *(TARGET_KEYS[row.task] if asked else ()))
        for key in keys:
            for name in _names(row.values.get(key)):
                if not _is_there(row.folder / Path(name).expanduser(), folders):
                    problems.append(f"{row.where}: {key} {name} does not exist")
        named = any(row.values.get(key) for key in TARGET_KEYS[row.task])
        if asked and not named and (row.task, row.category) in trained:
            wanted = " or ".join(f"'{key}'" for key in TARGET_KEYS[row.task])
            kind = recipe.objective.kind
            problems.append(f"{row.where}: {kind} learns from real images; name one as {wanted}")
    return tuple(problems)


def _names(value: Any) -> Iterator[str]:
    """Of the files that a row names; what is no name is left to the reader of the list."""
    values = value if isinstance(value, list) else [value]
    yield from (name for name in values if isinstance(name, str) and name.strip())


def _is_there(file: Path, folders: dict[Path, frozenset[str]]) -> bool:
    """By one listing of each folder: asking for every file is slow on a disk far away."""
    folder = file.parent
    if folder not in folders:
        folders[folder] = frozenset(os.listdir(folder)) if folder.is_dir() else frozenset()
    return file.name in folders[folder] or file.is_file()


def _rows_of(recipe: Recipe) -> list[ListRow] | None:
    source = recipe.data.source
    if not isinstance(source, FolderSource | PromptSource):
        return None
    try:
        rows = _rows(Path(source.path).expanduser())
        return None if rows is None else list(rows)
    except (OSError, ValueError, TypeError, csv.Error):
        return None


def _rows(path: Path) -> Iterator[ListRow] | None:
    if path.is_dir():
        lists = [path / name for name in LISTS if (path / name).is_file()]
        return (row for file in lists for row in _objects(file)) if lists else None
    if path.suffix.lower() == ".jsonl":
        return _objects(path)
    if path.suffix.lower() == ".csv":
        return _cells(path)
    if path.suffix.lower() == ".txt":
        return _lines(path)
    return None


def _objects(file: Path) -> Iterator[ListRow]:
    with open(file, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield ListRow(f"{file.name} line {number}", file.parent, {**json.loads(line)})


def _cells(file: Path) -> Iterator[ListRow]:
    with open(file, encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        for values in reader:
            where = f"{file.name} line {reader.line_num}"
            if values.get("sources"):
                values["sources"] = [name.strip() for name in values["sources"].split(";")]
            yield ListRow(where, file.parent, values)


def _lines(file: Path) -> Iterator[ListRow]:
    with open(file, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield ListRow(f"{file.name} line {number}", file.parent, {"prompt": line})
