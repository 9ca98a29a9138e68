"""What a caption or edit row may say, and which split it belongs to (docs/data.md).

Pure checks on parsed rows; reading them is in `folder.py` and `shards.py`.
"""

import difflib
import json
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

from fewstep.errors import refuse

Split = Literal["train", "eval", "eval_pair"]
Task = Literal["t2i", "edit"]

SPLITS: dict[str, Split] = {
    "train": "train",
    "eval": "eval",
    "val": "eval",
    "valid": "eval",
    "validation": "eval",
    "test": "eval",
    "eval_pair": "eval_pair",
    "val_pair": "eval_pair",
}
REQUIRED: dict[Task, tuple[str, ...]] = {
    "t2i": ("file", "caption"),
    "edit": ("source", "target", "instruction"),
}
OPTIONAL: dict[Task, tuple[str, ...]] = {
    "t2i": ("category", "split", "text", "subject"),
    "edit": ("category", "split", "source_caption", "target_caption", "family"),
}
IMAGE_KEYS: dict[Task, tuple[str, ...]] = {"t2i": ("file",), "edit": ("source", "target")}


class Row(NamedTuple):
    where: str
    """Where the user finds it: 'captions.jsonl line 3'."""
    task: Task
    values: dict[str, Any]

    @property
    def files(self) -> list[str]:
        return [self.values[key] for key in IMAGE_KEYS[self.task]]


def check_rows(rows: list[Row]) -> list[str]:
    """Every problem that shows without the images, one line each."""
    problems: list[str] = []
    seen: dict[tuple[str, ...], str] = {}
    for where, task, values in rows:
        own = [f"{where}: {problem}" for problem in _check_values(task, values)]
        problems += own
        if own:
            continue
        identity = (task, *(values[key].strip() for key in REQUIRED[task]))
        if identity in seen:
            what = "file and caption" if task == "t2i" else "source, target and instruction"
            problems.append(f"{where}: same {what} as {seen[identity]}; remove one of them")
        seen.setdefault(identity, where)
        if task == "edit" and values["source"] == values["target"]:
            problems.append(f"{where}: source and target are the same image; remove the row")
    unsplit = [row.where for row in rows if row.values.get("split") is None]
    if unsplit and len(unsplit) < len(rows):
        problems.append(
            f"{unsplit[0]}: {len(unsplit)} of {len(rows)} rows have no split and the others have "
            f"one; give every row a split, or none"
        )
    return problems


def _check_values(task: Task, values: dict[str, Any]) -> Iterator[str]:
    known = (*REQUIRED[task], *OPTIONAL[task])
    missing = [key for key in known if key not in values]
    for key in values:
        near = [] if key in known else difflib.get_close_matches(key, missing, n=1, cutoff=0.85)
        if near:
            yield f"unknown key '{key}'; did you mean '{near[0]}'?"
    for key in REQUIRED[task]:
        if key not in values:
            who = "an edit" if task == "edit" else "a caption row"
            yield f"no '{key}'; {who} needs {', '.join(REQUIRED[task])}"
        elif not isinstance(values[key], str):
            yield f"'{key}' is {json.dumps(values[key])[:40]}; give a string"
        elif not values[key].strip():
            yield f"'{key}' is empty; write one or remove the row"
        elif key in IMAGE_KEYS[task] and not _is_inside(values[key]):
            yield f"'{key}' is {values[key]!r}; give a path relative to the folder, without '..'"
    for key in OPTIONAL[task]:
        if not isinstance(values.get(key), str | None):
            yield f"'{key}' is {json.dumps(values[key])[:40]}; give a string or leave it out"
    split = values.get("split")
    allowed = [name for name in SPLITS if task == "edit" or SPLITS[name] != "eval_pair"]
    if isinstance(split, str) and split not in allowed:
        yield f"split '{split}' is unknown; use one of {', '.join(allowed)}"


def _is_inside(name: str) -> bool:
    parts = PurePosixPath(name)
    return not parts.is_absolute() and ".." not in parts.parts and "\0" not in name


def assign_splits(
    path: Path, rows: list[Row], digest_of: dict[str, str], eval_fraction: float
) -> list[Split]:
    """One split for each row such that no image content and no subject is on both sides.

    `digest_of` maps a file to the hash of its content, so that a copy under another name counts as
    the same image. Rows that name their splits are believed, and refused where they leak.
    """
    if rows[0].values.get("split") is None:
        return _derived_splits(rows, digest_of, eval_fraction)
    splits: list[Split] = [SPLITS[row.values["split"]] for row in rows]
    refuse(path, [*_leaks(rows, splits, digest_of)])
    return splits


def _links(row: Row, digest_of: dict[str, str]) -> list[tuple[str, str]]:
    """What a training row must not share with an evaluation row."""
    links = [("image", digest_of[file]) for file in row.files]
    subject = row.values.get("subject" if row.task == "t2i" else "family")
    return [*links, ("subject", subject)] if subject else links


def _leaks(rows: list[Row], splits: list[Split], digest_of: dict[str, str]) -> Iterator[str]:
    first: dict[tuple[str, str], dict[Split, Row]] = {}
    trained: dict[tuple[str, ...], Row] = {}
    for row, split in zip(rows, splits, strict=True):
        if split == "train" and row.task == "edit":
            trained[tuple(digest_of[file] for file in row.files)] = row
        if split != "eval_pair":
            for link in _links(row, digest_of):
                first.setdefault(link, {}).setdefault(split, row)
    for (kind, name), uses in first.items():
        if len(uses) < 2:
            continue
        train, held = uses["train"], uses["eval"]
        if kind == "image":
            shared = (f for row in (train, held) for f in row.files if digest_of[f] == name)
            name = " = ".join(dict.fromkeys(shared))
        yield (
            f"{held.where} is evaluation, {train.where} is training, but both have the {kind} "
            f"{name}; give both one split"
        )
    for row, split in zip(rows, splits, strict=True):
        pair = tuple(digest_of[file] for file in row.files)
        if split == "eval_pair" and pair in trained:
            yield f"{row.where}: this pair is also trained on ({trained[pair].where}); remove one"


def _derived_splits(
    rows: list[Row], digest_of: dict[str, str], eval_fraction: float
) -> list[Split]:
    """Whole groups of linked rows go to one side, by a hash of the group's first file name.

    The largest group always trains. If chance holds out none, the lowest hash is held out.
    """
    parent: dict[tuple[str, str], tuple[str, str]] = {}

    def find(link: tuple[str, str]) -> tuple[str, str]:
        while parent.setdefault(link, link) != link:
            parent[link] = parent[parent[link]]
            link = parent[link]
        return link

    for row in rows:
        links = _links(row, digest_of)
        for link in links:
            parent[find(links[0])] = find(link)
    roots = [find(_links(row, digest_of)[0]) for row in rows]
    members: dict[tuple[str, str], set[str]] = {}
    for root, row in zip(roots, rows, strict=True):
        members.setdefault(root, set()).update(row.files)
    position = {root: _unit_hash(min(files)) for root, files in members.items()}
    largest = max(members, key=lambda root: (len(members[root]), position[root]))
    others = sorted((p, root) for root, p in position.items() if root != largest)
    held_out = {root for p, root in others if p < eval_fraction}
    if not held_out and others and eval_fraction > 0:
        held_out = {others[0][1]}
    return ["eval" if root in held_out else "train" for root in roots]


def _unit_hash(name: str) -> float:
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest()) / 2**64
