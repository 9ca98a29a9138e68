"""The log of an evaluation: one JSON line an image, appended the moment it is scored.

The file is the product. It survives a kill at any byte, an evaluation that starts again skips what
is already scored, and statistics and report read nothing else about scores.
"""

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fewstep.errors import DataError, cannot_write

Name = Annotated[str, Field(min_length=1)]
Item = tuple[str, str, int]
"""(model, case, seed): one image, whoever judges it."""
PENDING = "unscored: not judged yet"
"""Status of an image that is drawn and waits for its judge."""


class RowKey(NamedTuple):
    """What makes two rows the same measurement."""

    model: str
    case: str
    seed: int
    judge: str


class Row(BaseModel):
    """One image and its score, or the reason why it has none. Paths are relative to `eval/`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: Name
    nfe: Annotated[int, Field(ge=0)]
    """Network evaluations per image; 0 for rows that no network made, such as true renders."""
    task: Literal["t2i", "edit"]
    category: Name
    case: Name
    prompt: str
    seed: int
    image: str
    source: str | None = None
    target: str | None = None
    score: Annotated[float, Field(ge=1, le=5)] | None
    subscores: dict[str, float] = {}
    reasons: tuple[str, ...] = ()
    judgements: tuple[float, ...] = ()
    """The single scores of a judge that was asked several times; `score` is their mean."""
    status: str
    """`ok`, or `unscored: why`."""
    seconds: Annotated[float, Field(ge=0)] | None = None
    judge: Name
    content: str | None = None
    """`pictures.content_of` what was drawn or judged; None in rows from before this was kept."""

    @model_validator(mode="after")
    def _score_and_status_agree(self) -> "Row":
        if self.status == "ok":
            if self.score is None:
                raise ValueError("status is 'ok' but there is no score")
        elif not self.status.removeprefix("unscored: ").strip() or not self.status.startswith(
            "unscored: "
        ):
            raise ValueError(f"status must be 'ok' or 'unscored: why', not {self.status!r}")
        elif self.score is not None:
            raise ValueError(f"status is {self.status!r} but there is a score")
        return self

    @property
    def key(self) -> RowKey:
        return RowKey(self.model, self.case, self.seed, self.judge)

    @property
    def item(self) -> Item:
        return self.model, self.case, self.seed


class RowFile(NamedTuple):
    """What a rows file holds."""

    rows: tuple[Row, ...]
    """The latest row of each key, in the order in which the keys first came."""
    superseded: int
    """Older rows of a key that was scored again; those that only waited are not counted."""
    truncated: str | None
    """What was left out at the end of the file, where a write was cut off."""


class _Parsed(NamedTuple):
    rows: list[Row]
    tail: bytes
    """The end of the file after the last newline: empty, a whole row or a part of one."""
    tail_is_row: bool


def read_rows(path: Path) -> RowFile:
    """Read a rows file; a cut-off last line is left out and named, any other damage is an error."""
    rows, tail, tail_is_row = _parse(path)
    latest = {row.key: row for row in rows}
    truncated = None
    if tail.strip() and not tail_is_row:
        truncated = (
            f"{path.name}: the last line is cut off after {len(tail)} bytes and was left out"
        )
    judged = sum(row.status != PENDING or row is latest[row.key] for row in rows)
    return RowFile(tuple(latest.values()), judged - len(latest), truncated)


class RowWriter:
    """Appends rows; a written one outlives the process. Opening repairs a cut-off last line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        except OSError as error:
            raise cannot_write(path, error) from error
        rows, tail, tail_is_row = _parse(path)
        self._latest = {row.key: row for row in rows}
        self.drawn: dict[Item, Row] = {row.item: row for row in rows}
        """The latest row of each image, of whatever judge."""
        self._file = path.open("ab", buffering=0)
        self._size = path.stat().st_size
        if tail_is_row:
            self._append(b"\n")
        elif tail:
            self._size -= len(tail)
            self._file.truncate(self._size)

    def scored(self, key: RowKey) -> Row | None:
        """The latest row of this key if it has a score; unscored rows are tried again."""
        row = self._latest.get(key)
        return row if row and row.status == "ok" else None

    def write(self, row: Row) -> None:
        self._append(row.model_dump_json().encode() + b"\n")
        self._latest[row.key] = row
        self.drawn[row.item] = row

    def _append(self, line: bytes) -> None:
        """Write all of `line` or nothing, so that no later row is glued to a broken one."""
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
        except OSError as error:
            self._file.truncate(self._size)
            kept = f"the {len(self._latest)} images logged so far are safe"
            again = f"{kept}: make room and start the evaluation again"
            raise cannot_write(self.path, error, again) from error
        self._size += len(line)

    def close(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> "RowWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _parse(path: Path) -> _Parsed:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    *lines, tail = data.split(b"\n")
    rows = [
        _parse_row(line, path=path, number=number)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    tail_is_row = bool(tail.strip()) and _is_json(tail)
    if tail_is_row:
        rows.append(_parse_row(tail, path=path, number=len(lines) + 1))
    return _Parsed(rows, tail, tail_is_row)


def _parse_row(line: bytes, *, path: Path, number: int) -> Row:
    try:
        return Row.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        what = f"{where}: {first['msg']}" if where else first["msg"]
        raise DataError(
            f"{path}, line {number}: {what}. Correct or delete this line; the report needs every "
            "row before the last to be whole"
        ) from error


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except ValueError:
        return False
    return True
