"""How many rows a recipe's pools can train on, counted in its lists before anything loads.

Only lists of text are counted. What is wrong in them, and how many rows the splits of a folder
without declared splits leave to training, is found out when the data is opened.
"""

import csv
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fewstep.recipe.schema import FolderSource, PromptSource, Recipe

LISTS = ("captions.jsonl", "edits.jsonl")


def count_available(recipe: Recipe) -> dict[str, int]:
    """By pool, the number of rows of its task and category; at most so many can be trained on.

    Empty where the source is no list, or cannot be read: opening it will say why.
    """
    source = recipe.data.source
    if not isinstance(source, FolderSource | PromptSource):
        return {}
    try:
        rows = _rows(Path(source.path).expanduser())
        counts = None if rows is None else Counter(map(_condition, filter(_is_trained, rows)))
    except (OSError, ValueError, TypeError, csv.Error):
        return {}
    if counts is None:
        return {}
    return {name: counts[p.task, p.category] for name, p in recipe.data.pools.items()}


def _rows(path: Path) -> Iterator[dict[str, Any]] | None:
    if path.is_dir():
        lists = [path / name for name in LISTS if (path / name).is_file()]
        return (row for file in lists for row in _objects(file)) if lists else None
    if path.suffix.lower() == ".jsonl":
        return _objects(path)
    if path.suffix.lower() == ".csv":
        return _cells(path)
    return None


def _objects(file: Path) -> Iterator[dict[str, Any]]:
    with open(file, encoding="utf-8-sig") as lines:
        for line in lines:
            if line.strip():
                yield {**json.loads(line)}


def _cells(file: Path) -> Iterator[dict[str, Any]]:
    with open(file, encoding="utf-8-sig", newline="") as lines:
        yield from csv.DictReader(lines)


def _is_trained(row: dict[str, Any]) -> bool:
    return (row.get("split") or "train") == "train"


def _condition(row: dict[str, Any]) -> tuple[str, str]:
    return "edit" if row.get("instruction") else "t2i", row.get("category") or "general"
