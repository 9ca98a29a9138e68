"""webdataset shards (*.tar) to the same rows and images as a folder with .jsonl lists.

A sample is `key.png` with `key.json`, or `key.source.png`, `key.target.png` and `key.json`.
"""

import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fewstep.data.pixels import RawImage
from fewstep.data.rows import Row
from fewstep.errors import DataError

SUFFIXES = ("png", "jpg", "jpeg", "webp")


def read_shards(shards: list[Path], rows: list[Row], problems: list[str]) -> Iterator[RawImage]:
    """Yields each image; `rows` and `problems` are complete when it is exhausted."""
    image_of: dict[str, str] = {}
    by_key: list[Row] = []
    for shard in shards:
        for sample in _samples(shard):
            key = sample.pop("__key__")
            del sample["__url__"]
            where = f"{shard.name} sample {key}"
            if key in image_of:
                problems.append(f"{where}: the key occurs twice; make it unique over all shards")
                continue
            values = sample_values(where, sample, problems)
            names = {s: f"{shard.name}/{key}.{s}" for s in sample if _is_image(s)}
            by_role = {s.rpartition(".")[0]: name for s, name in names.items()}
            if len(by_role) < len(names) or set(by_role) not in ({""}, {"source", "target"}):
                problems.append(
                    f"{where}: holds {', '.join(sorted(sample))}; a sample is one image key.png, "
                    f"or a pair key.source.png and key.target.png, with key.json"
                )
                continue
            image_of[key] = by_role.get("", by_role.get("target", ""))
            rows += _rows_of(where, values, by_role, by_key)
            for suffix, name in names.items():
                yield RawImage(name, where, sample[suffix])
    for row in by_key:
        source = row.values.get("source")
        if source in image_of:
            rows.append(row._replace(values=row.values | {"source": image_of[source]}))
        else:
            problems.append(
                f"{row.where}: has an instruction, but its 'source' is {source!r}; "
                f"give the key of another sample"
            )


def _is_image(suffix: str) -> bool:
    return suffix.rpartition(".")[2] in SUFFIXES


def _rows_of(
    where: str, values: dict[str, Any], by_role: dict[str, str], by_key: list[Row]
) -> Iterator[Row]:
    """A plain image gives a caption row, an edit row by the key of its source, or both."""
    if "target" in by_role:
        yield Row(where, "edit", values | by_role)
        return
    edited = values.get("instruction") is not None
    if edited:
        by_key.append(Row(where, "edit", values | {"target": by_role[""]}))
    if not edited or values.get("caption") is not None:
        yield Row(where, "t2i", values | {"file": by_role[""]})


def sample_values(where: str, sample: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """What the json and the txt of a sample say."""
    unread = [s for s in sample if s not in ("json", "txt") and not _is_image(s)]
    if unread:
        problems.append(
            f"{where}: '.{unread[0]}' is not read; a sample may have json, txt (its caption) and "
            f"{', '.join(SUFFIXES)}"
        )
    values: Any = {}
    try:
        values = json.loads(sample["json"]) if "json" in sample else {}
        if "txt" in sample and isinstance(values, dict) and values.get("caption") is None:
            values["caption"] = sample["txt"].decode()
    except ValueError as error:
        problems.append(f"{where}: its json or txt is unreadable ({error}); write it as UTF-8")
    if not isinstance(values, dict):
        problems.append(f"{where}: its json is not an object; write {{...}}")
        return {}
    return values


def _samples(shard: Path) -> Iterator[dict[str, Any]]:
    try:
        from webdataset.tariterators import group_by_keys, tar_file_expander
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "webdataset":
            raise
        raise DataError(
            f"{shard} is a webdataset shard, which needs one more package; "
            f"pip install 'fewstep[data]', or unpack it into images and captions.jsonl"
        ) from None
    refuse_truncated(shard)
    with open(shard, "rb") as stream:
        try:
            yield from group_by_keys(tar_file_expander([{"url": str(shard), "stream": stream}]))
        except (tarfile.TarError, EOFError, ValueError) as error:
            reason = error.args[0] if error.args else type(error).__name__
            raise DataError(f"{shard} cannot be read ({reason}); write it again") from None


def refuse_truncated(shard: Path) -> None:
    """tarfile takes an archive that was cut between two members for a complete one."""
    with open(shard, "rb") as stream:
        stream.seek(max(0, os.path.getsize(shard) - 1024))
        if stream.read() != bytes(1024):
            raise DataError(
                f"{shard} is truncated (no end-of-archive mark) or not a tar file; copy it again"
            )
