"""Files of prompts: any list is read, a pool is appended to line by line."""

import csv
import fcntl
import io
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from fewstep.errors import DataError, RunError, did_you_mean
from fewstep.prompts.text import words


class Entry(NamedTuple):
    line: int
    """Line of the file, from 1; in a table the record, the header not counted."""
    text: str
    row: dict[str, Any]


def read_entries(path: Path, column: str = "prompt") -> list[Entry]:
    """Prompts of a .jsonl, .csv or .tsv file (`column`), or a prompt a line in any other.

    Empty lines are left out; DataError for a file that cannot be read, a missing column and a
    prompt without a word.
    """
    text = _text(path)
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        lines = [(number, line) for number, line in _lines(text) if line.strip()]
        rows = [(number, _object(line, path, number)) for number, line in lines]
    elif suffix in (".csv", ".tsv"):
        table = csv.DictReader(io.StringIO(text), delimiter="," if suffix == ".csv" else "\t")
        rows = [(number, dict(row)) for number, row in enumerate(table, start=1)]
    else:
        rows = [(number, {column: line}) for number, line in _lines(text) if line.strip()]
    entries = []
    for number, row in rows:
        found = row.get(column)
        if column not in row:
            raise DataError(
                f"{path}:{number}: no column {column!r}; give --column: "
                f"{did_you_mean(column, [str(key) for key in row])}"
            )
        if not isinstance(found, str) or not words(found):
            raise DataError(f"{path}:{number}: {column} is {found!r}, no prompt")
        entries.append(Entry(number, found.strip(), row))
    if not entries:
        raise DataError(f"{path}: no prompt in it")
    return entries


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a pool so far; none where there is no file, a line cut short left out."""
    if not path.exists():
        return []
    whole = "".join(_text(path).rpartition("\n")[:2])
    return [_object(line, path, number) for number, line in _lines(whole)]


class PoolFile:
    """A .jsonl that only grows; a row is with the operating system before `append` returns.

    A last line that a kill cut short is taken off on opening. One writer at a time: RunError while
    another holds the file, and where it no longer has the `rows` that the caller read of it.
    """

    def __init__(self, path: Path, rows: int) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except (IsADirectoryError, FileExistsError, NotADirectoryError) as error:
            raise DataError(f"{path}: no pool can be kept there ({error.strerror})") from None
        try:  # the claim belongs to the open file: it ends with this process, whatever ends it
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise RunError(f"{path}: another command is writing it; let it end first") from None
        if len(read_rows(path)) != rows:
            self.close()
            raise RunError(f"{path}: another command has written to it; start this one again")
        os.truncate(self._file, path.read_bytes().rfind(b"\n") + 1)

    def append(self, row: dict[str, Any]) -> None:
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        while line:
            line = line[os.write(self._file, line) :]

    def close(self) -> None:
        os.close(self._file)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def _lines(text: str) -> list[tuple[int, str]]:
    """Only at line feeds: other separators may stand inside JSON strings."""
    return list(enumerate(text.removesuffix("\n").split("\n"), start=1)) if text else []


def _object(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise DataError(f"{path}:{number}: is no JSON object; mend or delete this line")
    return row
