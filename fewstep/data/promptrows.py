"""The rows of a prompt file, format by format, with a way to the images that they name.

What a row must say is checked in `promptfiles.py`.
"""

import csv
import difflib
import io
import json
import re
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from fewstep.data.folder import LISTS, json_lines, near_file
from fewstep.data.shards import SUFFIXES, refuse_truncated, sample_values
from fewstep.errors import DataError
from fewstep.recipe.available import SOURCE_KEYS, TARGET_KEYS

PROMPT_KEYS = ("prompt", "caption", "text")
OTHER_KEYS = ("category", "split", "id")
KEYS = ("instruction", *PROMPT_KEYS, *SOURCE_KEYS, *OTHER_KEYS)
FORMATS = ".txt, .jsonl, .csv, .parquet or .tar"


class Found(NamedTuple):
    """An image that has been found, not yet read."""

    name: str
    file: Path
    """The file that it lies in."""
    part: str
    """Where in the file; empty for the whole."""
    load: Callable[[], bytes]


class PromptRow(NamedTuple):
    file: str
    where: str
    values: dict[str, Any]
    find: Callable[[Any], Found | str]
    """From what the row says of an image to the image, or to what is wrong with it."""


Reader = Callable[[list[str]], Iterator[PromptRow]]
"""Yields the rows, and appends the problems of those that it cannot read."""
Rows = Callable[[list[Path], list[str]], Iterator[PromptRow]]
IMAGES_ALONE = sum(TARGET_KEYS.values(), ())
"""Columns of tables with nothing in them but real images."""


def reader_of(path: Path, *, targets: bool = False) -> Reader:
    """By the name of a file, or by what lies in a folder. Only with `targets` are the columns of
    real images read in tables; else it is taken that every row has its own."""
    keys = (*KEYS, *IMAGES_ALONE) if targets else KEYS
    if path.is_dir():
        files, rows = _in_folder(path, keys)
        return partial(rows, files)
    if not path.exists():
        siblings = [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise DataError(f"prompts: {path} does not exist{hint}")
    formats: dict[str, Rows] = {
        ".txt": _text_rows,
        ".jsonl": _json_rows,
        ".csv": _csv_rows,
        ".parquet": partial(_parquet_rows, keys),
        ".tar": _shard_rows,
    }
    if path.suffix.lower() not in formats:
        raise DataError(f"prompts: {path} is no {FORMATS} file; give one of these, or a folder")
    return partial(formats[path.suffix.lower()], [path])


def _in_folder(path: Path, keys: tuple[str, ...]) -> tuple[list[Path], Rows]:
    """What lies in the folder decides, and there must be one kind of it."""
    if (path / "dataset_dict.json").exists():
        splits = ", ".join(sorted(p.parent.name for p in path.glob("*/state.json")))
        raise DataError(f"prompts: {path} holds the splits {splits}; give the folder of one")
    kinds: dict[str, tuple[list[Path], Rows]] = {
        "jsonl lists": ([path / name for name in LISTS if (path / name).exists()], _json_rows),
        "webdataset shards": (sorted(path.glob("*.tar")), _shard_rows),
        "Parquet files": (sorted(path.glob("*.parquet")), partial(_parquet_rows, keys)),
        "a datasets folder": (_arrow_files(path), partial(_arrow_rows, keys)),
    }
    found = {name: kind for name, kind in kinds.items() if kind[0]}
    if len(found) > 1:
        raise DataError(f"prompts: {path} holds {' and '.join(found)}; keep one kind in a folder")
    if not found:
        inside = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
        raise DataError(
            f"prompts: {path} holds no {', '.join(LISTS)}, *.tar, *.parquet or datasets folder "
            f"(found: {inside}); give one of them, or a {FORMATS} file"
        )
    return next(iter(found.values()))


# --- lists ----------------------------------------------------------------------------------------


def _text_rows(files: list[Path], problems: list[str]) -> Iterator[PromptRow]:
    for path in files:
        for number, line in enumerate(_text(path).split("\n"), start=1):
            if line.strip():
                where = f"{path.name} line {number}"
                yield PromptRow(path.name, where, {"prompt": line}, _file_finder(path.parent))


def _json_rows(files: list[Path], problems: list[str]) -> Iterator[PromptRow]:
    for path in files:
        for where, values in json_lines(path, problems):
            yield PromptRow(path.name, where, values, _file_finder(path.parent))


def _csv_rows(files: list[Path], problems: list[str]) -> Iterator[PromptRow]:
    """The first line names the columns; an empty cell says nothing; `sources` are parted by `;`."""
    for path in files:
        reader = csv.DictReader(io.StringIO(_text(path), newline=""), restkey="", strict=True)
        try:
            columns = reader.fieldnames or []
            if not {"instruction", *PROMPT_KEYS} & {*columns}:
                problems.append(
                    f"{path.name} line 1: names no column prompt, caption, text or instruction "
                    f"(found: {', '.join(columns) or 'nothing'}); the first line names the columns"
                )
                continue
            for cells in reader:
                where = f"{path.name} line {reader.line_num}"
                if "" in cells or None in cells.values():
                    problems.append(
                        f"{where}: not {len(columns)} cells as in line 1; quote those with commas"
                    )
                    continue
                values: dict[str, Any] = {key: cell for key, cell in cells.items() if cell}
                if "sources" in values:
                    values["sources"] = [s.strip() for s in values["sources"].split(";")]
                yield PromptRow(path.name, where, values, _file_finder(path.parent))
        except csv.Error as error:
            problems.append(f"{path.name} line {reader.line_num}: not valid CSV ({error})")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"prompts: {path} is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from None


def _file_finder(folder: Path) -> Callable[[Any], Found | str]:
    """Names are relative to the list's folder, or absolute."""

    def find(value: Any) -> Found | str:
        if not isinstance(value, str) or not value.strip():
            return f"an image is {str(value)[:40]!r}; give the name of a file"
        file = folder / Path(value).expanduser()
        if not file.is_file():
            near = "" if Path(value).is_absolute() else near_file(folder, value)
            return f"{value} does not exist{near}"
        return Found(value, file, "", file.read_bytes)

    return find


# --- webdataset shards ----------------------------------------------------------------------------

SOURCE_ROLE = re.compile(r"source\d*")


def _shard_rows(paths: list[Path], problems: list[str]) -> Iterator[PromptRow]:
    """`key.json` or `key.txt` with the prompt; sources are `key.source.png`, or `key.source0.png`,
    `key.source1.png`, ..., or the samples whose keys the JSON names; the real image is
    `key.target.png` or `key.png`. Other images are not read."""
    samples: dict[str, _Sample] = {}
    for path in paths:
        for key, members in _members(path).items():
            if key in samples:
                problems.append(
                    f"{path.name} sample {key}: the key occurs twice; make it unique in all shards"
                )
            samples[key] = _Sample(path, members)
    for key, sample in samples.items():
        if not sample.members.keys() & {"json", "txt"}:
            continue  # an image that others may name as their source
        where = f"{sample.shard.name} sample {key}"
        texts = {s: sample.read(s) for s in ("json", "txt") if s in sample.members}
        values = sample_values(where, texts, problems)
        own = sorted(filter(SOURCE_ROLE.fullmatch, sample.images), key=lambda r: int(r[6:] or 0))
        if own:
            values["sources"] = [f"{key}.{role}" for role in own]
        task = "edit" if values.get("instruction") else "t2i"
        for role, name in (("target", f"{key}.target"), ("", key)):
            if role in sample.images:
                values[TARGET_KEYS[task][0]] = name
                break
        yield PromptRow(sample.shard.name, where, values, partial(_find_member, samples))


class _Sample(NamedTuple):
    shard: Path
    members: dict[str, tarfile.TarInfo]
    """By suffix: 'json', 'png', 'source.png'."""

    @property
    def images(self) -> dict[str, str]:
        """Suffix by role; the role of a plain image is ''."""
        split = ((suffix, suffix.rpartition(".")) for suffix in self.members)
        return {role: suffix for suffix, (role, _, kind) in split if kind in SUFFIXES}

    def read(self, suffix: str) -> bytes:
        member = self.members[suffix]
        with open(self.shard, "rb") as stream:
            stream.seek(member.offset_data)
            return stream.read(member.size)


def _members(path: Path) -> dict[str, dict[str, tarfile.TarInfo]]:
    refuse_truncated(path)
    found: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                key, suffix = _key_and_suffix(member.name)
                if member.isreg() and suffix:
                    found.setdefault(key, {})[suffix.lower()] = member
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); write it again") from None
    return found


def _key_and_suffix(name: str) -> tuple[str, str]:
    """webdataset's key: the path up to the first dot of its last part; hidden files have none."""
    path = PurePosixPath(name)
    key, _, suffix = path.name.partition(".")
    return (str(path.with_name(key)), suffix) if key else ("", "")


def _find_member(samples: dict[str, _Sample], value: Any) -> Found | str:
    """`value` is the key of a sample with one plain image, or a key, a dot and a role."""
    key, role = _key_and_suffix(str(value))
    images = samples[key].images if key in samples else {}
    if role not in images:
        known = [other for other, sample in samples.items() if "" in sample.images]
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]}?" if near else "give the key of another sample"
        return f"no sample {value!r} with an image; {hint}"
    sample, suffix = samples[key], images[role]
    name = f"{sample.shard.name}/{key}.{suffix}"
    return Found(name, sample.shard, f"{key}.{suffix}", partial(sample.read, suffix))


# --- tables: Parquet, and the Arrow files of a datasets folder ------------------------------------


def _parquet_rows(
    keys: tuple[str, ...], files: list[Path], problems: list[str]
) -> Iterator[PromptRow]:
    for path in files:
        with _arrow(path):
            import pyarrow.parquet

            table = pyarrow.parquet.ParquetFile(path)
            names = table.schema_arrow.names
            columns = [name for name in names if name in keys]
            groups = range(table.num_row_groups)

        # One row group in memory: images are asked for in the order of the rows.
        @lru_cache(maxsize=1)
        def part(i: int, path: Path = path, table: Any = table, columns: Any = columns) -> Any:
            with _arrow(path):
                return table.read_row_group(i, columns=columns)

        yield from _table_rows(
            path, columns, _unread(names, keys), [partial(part, i) for i in groups]
        )


def _arrow_rows(
    keys: tuple[str, ...], files: list[Path], problems: list[str]
) -> Iterator[PromptRow]:
    """Mapped into memory, which `datasets` does too."""
    for path in files:
        with _arrow(path):
            import pyarrow

            table = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_all()
            columns = [name for name in table.schema.names if name in keys]
            batches = table.select(columns).to_batches()
        parts = [lambda batch=batch: batch for batch in batches]
        yield from _table_rows(path, columns, _unread(table.schema.names, keys), parts)


def _unread(names: list[str], keys: tuple[str, ...]) -> list[str]:
    """Columns of real images that nobody asked for."""
    return [name for name in names if name in IMAGES_ALONE and name not in keys]


def _arrow_files(path: Path) -> list[Path]:
    """What the state.json that `save_to_disk` writes names."""
    try:
        state = json.loads((path / "state.json").read_bytes())
        return [path / entry["filename"] for entry in state["_data_files"]]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError):
        raise DataError(f"prompts: {path / 'state.json'} is damaged; save it again") from None


def _table_rows(
    path: Path, columns: list[str], unread: list[str], parts: list[Callable[[], Any]]
) -> Iterator[PromptRow]:
    """An image is the name of a file, bytes, or what `datasets` calls an image: a dict of `bytes`
    and `path`; a list of them where there are several. Of what is `unread` a row has the place."""
    images = [name for name in columns if name in (*SOURCE_KEYS, *IMAGES_ALONE)]
    rest = [name for name in columns if name not in images]
    number = 0
    for part in parts:
        for at, values in enumerate(part().select(rest).to_pylist()):
            number += 1
            where = f"{path.name} row {number}"
            values |= {name: f"{where} {name}" for name in unread}
            for name in images:
                cell = part().column(name)[at].as_py()
                if cell is not None:
                    several = isinstance(cell, list)
                    values[name] = (
                        [(name, i) for i in range(len(cell))] if several else (name, None)
                    )
            yield PromptRow(path.name, where, values, partial(_find_cell, path, where, part, at))


def _find_cell(
    path: Path, where: str, part: Callable[[], Any], at: int, place: tuple[str, int | None]
) -> Found | str:
    column, i = place

    def cell() -> Any:
        value = part().column(column)[at].as_py()
        value = value if i is None else value[i]
        if isinstance(value, dict):
            return value.get("path") if value.get("bytes") is None else value["bytes"]
        return value

    value = cell()
    if isinstance(value, bytes):
        name = column if i is None else f"{column}[{i}]"
        return Found(f"{where} {name}", path, f"{where} {name}", cell)
    return _file_finder(path.parent)(value)


@contextmanager
def _arrow(path: Path) -> Iterator[None]:
    """What is needed to read tables, and one message for what is wrong with them."""
    try:
        import pyarrow
    except ModuleNotFoundError:
        raise DataError(
            f"prompts: {path} needs the package pyarrow; pip install 'fewstep[data]', or write the "
            f"prompts to a .jsonl file"
        ) from None
    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"prompts: {path} cannot be read ({reason}); write it again") from None
