"""A folder of real images with captions and edits: checked in full, split without leaks, in memory.

Reads `captions.jsonl` / `edits.jsonl` or webdataset shards into the same records (docs/data.md).
Encoders and their caches are in `latents.py`.
"""

import difflib
import json
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.data.pixels import PixelCache, Progress, RawImage
from fewstep.data.rows import (
    Row,
    Split,
    Task,
    assign_splits,
    check_rows,
)
from fewstep.data.shards import read_shards
from fewstep.errors import SHOWN_PROBLEMS, DataError, refuse

LISTS: dict[str, Task] = {"captions.jsonl": "t2i", "edits.jsonl": "edit"}


@dataclass(frozen=True, slots=True)
class CaptionRecord:
    file: str
    image: int
    """Index into `ImageFolder.pixels`."""
    caption: str
    category: str
    split: Split
    text: str | None
    """The words that are readable in the image."""
    subject: str | None


@dataclass(frozen=True, slots=True)
class EditRecord:
    source: str
    target: str
    source_image: int
    target_image: int
    instruction: str
    category: str
    split: Split
    source_caption: str | None
    target_caption: str | None


class ImageFolder:
    """Records and pixels. Made by `open`; never changes afterwards."""

    def __init__(
        self, path: Path, image_size: int, rows: list[Row], cache: PixelCache, eval_fraction: float
    ) -> None:
        self.path, self.image_size = path, image_size
        self.files: tuple[str, ...] = tuple(cache.index["files"])
        self.pixel_digests: tuple[str, ...] = tuple(cache.index["pixel_digests"])
        """A hash of each image's pixels at this size."""
        self._pixels = cache.pixels
        self._image_of = {file: i for i, file in enumerate(self.files)}
        digest_of = dict(zip(self.files, cache.index["file_digests"], strict=True))
        self.captions: list[CaptionRecord] = []
        self.edits: list[EditRecord] = []
        splits = assign_splits(path, rows, digest_of, eval_fraction)
        for row, split in zip(rows, splits, strict=True):
            if row.task == "t2i":
                self.captions.append(self._caption(row.values, split))
            else:
                self.edits.append(self._edit(row.values, split))
        self.notices: tuple[str, ...] = (*cache.notices(image_size), *self._split_notices())
        self._assert_disjoint(digest_of)

    @classmethod
    def open(
        cls,
        path: Path | str,
        image_size: int,
        *,
        cache_dir: Path | str,
        eval_fraction: float = 0.1,
        progress: Progress | None = None,
    ) -> "ImageFolder":
        """Check everything, or raise a `DataError` that lists what is wrong and what would work.

        `eval_fraction` is used only where the rows name no split.
        """
        assert image_size > 0 and 0 <= eval_fraction < 1, (image_size, eval_fraction)
        path, cache_dir = Path(path).absolute(), Path(cache_dir).absolute()
        if not path.is_dir():
            what = "is a file" if path.exists() else "does not exist"
            raise DataError(f"{path} {what}; give the folder that holds captions.jsonl")
        if cache_dir.resolve().is_relative_to(path.resolve()):
            raise DataError(
                f"the cache folder {cache_dir} is inside the data folder; choose one outside it"
            )
        shards = sorted(path.glob("*.tar"))
        lists = [name for name in LISTS if (path / name).exists()]
        if shards and lists:
            raise DataError(
                f"{path} has both {lists[0]} and {shards[0].name}; keep one format in a folder"
            )
        if not shards and not lists:
            found = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
            raise DataError(
                f"{path} has no captions.jsonl, edits.jsonl or *.tar (found: {found}); write "
                f'lines such as {{"file": "images/a.png", "caption": "a red kite"}}, one an image'
            )
        if shards:
            rows, cache = _open_shards(path, shards, image_size, cache_dir, progress)
        else:
            rows, cache = _open_lists(path, lists, image_size, cache_dir, progress)
        return cls(path, image_size, rows, cache, eval_fraction)

    def pixels(self, indices: np.ndarray | Sequence[int]) -> np.ndarray:
        """uint8 [n, h, w, 3], RGB, a copy."""
        return np.array(self._pixels[np.asarray(indices, np.int64)])

    def rows(self, task: Task, split: Split, category: str | None = None) -> np.ndarray:
        """Indices into `captions` or `edits`: the pool that a mixture draws from."""
        records = self.captions if task == "t2i" else self.edits
        chosen = (
            i
            for i, record in enumerate(records)
            if record.split == split and category in (None, record.category)
        )
        return np.array([*chosen], np.int64)

    def categories(self, task: Task, split: Split) -> dict[str, int]:
        """How many records each category has, by name."""
        records = self.captions if task == "t2i" else self.edits
        counts = Counter(record.category for record in records if record.split == split)
        return dict(sorted(counts.items()))

    def _caption(self, values: dict[str, Any], split: Split) -> CaptionRecord:
        return CaptionRecord(
            file=values["file"],
            image=self._image_of[values["file"]],
            caption=values["caption"].strip(),
            category=values.get("category") or "general",
            split=split,
            text=values.get("text"),
            subject=values.get("subject"),
        )

    def _edit(self, values: dict[str, Any], split: Split) -> EditRecord:
        return EditRecord(
            source=values["source"],
            target=values["target"],
            source_image=self._image_of[values["source"]],
            target_image=self._image_of[values["target"]],
            instruction=values["instruction"].strip(),
            category=values.get("category") or "general",
            split=split,
            source_caption=values.get("source_caption"),
            target_caption=values.get("target_caption"),
        )

    def _split_notices(self) -> Iterator[str]:
        trained = {record.caption for record in self.captions if record.split == "train"}
        held = [record.caption for record in self.captions if record.split == "eval"]
        shared = sum(caption in trained for caption in held)
        if shared:
            yield f"{shared} of {len(held)} evaluation captions are also training captions"
        if not any(record.split == "eval" for record in (*self.captions, *self.edits)):
            yield "nothing is held out for evaluation; give the rows a split, or add subjects"

    def _assert_disjoint(self, digest_of: dict[str, str]) -> None:
        used: dict[Split, set[str]] = {"train": set(), "eval": set(), "eval_pair": set()}
        for caption in self.captions:
            used[caption.split].add(digest_of[caption.file])
        for edit in self.edits:
            used[edit.split].update((digest_of[edit.source], digest_of[edit.target]))
        assert used["train"].isdisjoint(used["eval"]), "an evaluation image is trained on"


def _open_lists(
    path: Path, lists: list[str], image_size: int, cache_dir: Path, progress: Progress | None
) -> tuple[list[Row], PixelCache]:
    rows: list[Row] = []
    problems: list[str] = []
    for name in lists:
        rows += _read_list(path / name, LISTS[name], problems)
    problems += check_rows(rows)
    refuse(path, problems)
    if not rows:
        raise DataError(f"{' and '.join(lists)} in {path} hold no rows; add one for each image")
    first_use = {file: row.where for row in reversed(rows) for file in row.files}
    files = list(dict.fromkeys(file for row in rows for file in row.files))
    listing = []
    for file in files:
        found = _file_stat(path / file)
        if found is None:
            near = near_file(path, file) if len(problems) < SHOWN_PROBLEMS else ""
            problems.append(f"{first_use[file]}: {file} does not exist{near}")
        else:
            listing.append([file, *found])
    refuse(path, problems)

    def images(rows: list[Row], problems: list[str]) -> Iterator[RawImage]:
        for file in files:
            try:
                content = (path / file).read_bytes()
            except OSError as error:
                problems.append(f"{first_use[file]}: {file} cannot be read ({error.strerror})")
                continue
            yield RawImage(file, first_use[file], content)

    cache = PixelCache.get(
        cache_dir,
        path,
        image_size,
        listing=listing,
        images=images,
        count=len(files),
        progress=progress,
    )
    return rows, cache


def _open_shards(
    path: Path, shards: list[Path], image_size: int, cache_dir: Path, progress: Progress | None
) -> tuple[list[Row], PixelCache]:
    cache = PixelCache.get(
        cache_dir,
        path,
        image_size,
        listing=[[shard.name, *(_file_stat(shard) or ())] for shard in shards],
        images=lambda rows, problems: read_shards(shards, rows, problems),
        count=None,
        progress=progress,
    )
    rows = [Row(*row) for row in cache.index["rows"]]
    refuse(path, check_rows(rows))
    if not rows:
        raise DataError(f"the shards of {path} hold no samples; a sample is key.png and key.json")
    return rows, cache


def _read_list(file: Path, task: Task, problems: list[str]) -> Iterator[Row]:
    for where, values in json_lines(file, problems):
        yield Row(where, task, values)


def json_lines(file: Path, problems: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each object of a .jsonl file stands, and the object; empty lines are skipped."""
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        where = f"{file.name} line {number}"
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if not line.strip():
            continue
        try:
            values = json.loads(line.decode())
        except UnicodeDecodeError:
            problems.append(f"{where}: not UTF-8; save the file as UTF-8")
        except json.JSONDecodeError as error:
            problems.append(f"{where}: not valid JSON ({error}); one object a line")
        else:
            if isinstance(values, dict):
                yield where, values
            else:
                problems.append(f"{where}: not a JSON object; write {{...}}")


def _file_stat(file: Path) -> tuple[int, int, int] | None:
    try:
        found = file.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not stat.S_ISREG(found.st_mode):
        return None
    # The change time sees a replacement that kept the old modification time (cp -p, rsync -t).
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def near_file(path: Path, file: str) -> str:
    """A hint for a `file` that is not below `path`."""
    folder = (path / file).parent
    if not folder.is_dir():
        return f", nor does the folder {folder.relative_to(path)}; paths start at {path.name}/"
    near = difflib.get_close_matches(Path(file).name, sorted(os.listdir(folder)), n=1, cutoff=0.75)
    if near:
        return f"; did you mean {(folder / near[0]).relative_to(path)}?"
    return "; add the file or remove the row"
