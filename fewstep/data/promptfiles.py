"""Prompts and edit instructions from files: text, JSON lines, CSV, Parquet, shards, datasets.

Unlike `folder.py` this asks for no target images, unless an objective learns from real ones: what
distillation needs is prompts, and the sources that instructions speak of. Everything is checked
before anything is encoded; all that is wrong is listed with file and line. How the rows of each
format are found is in `promptrows.py`.
"""

import difflib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from fewstep.data.memo import Memo
from fewstep.data.pixels import IMAGE_FORMATS, UNREADABLE, read_rgb
from fewstep.data.promptrows import (
    KEYS,
    OTHER_KEYS,
    PROMPT_KEYS,
    SOURCE_KEYS,
    TARGET_KEYS,
    Found,
    PromptRow,
    Reader,
    reader_of,
)
from fewstep.data.rows import SPLITS, Split, Task
from fewstep.errors import refuse


@dataclass(frozen=True)
class SourceImage:
    """An image to edit, or a real one to learn from, wherever it lies: a file, a member of a
    shard, a cell of a table."""

    name: str
    digest: str
    """A hash of its bytes; two images are equal if these are."""
    converted: str
    """What `open` has to do to make it RGB, in words; empty if nothing."""
    size: tuple[int, int]
    """Height and width, upright."""
    load: Callable[[], bytes] = field(repr=False, compare=False)

    def open(self) -> Image.Image:
        """Upright and RGB, as `pixels.read_rgb` makes it."""
        return read_rgb(self.load())[0]


@dataclass(frozen=True)
class PromptRecord:
    id: str
    """The row's own `id`, or where it was found."""
    where: str
    """For messages: 'edits.jsonl line 3'."""
    prompt: str
    """Or the instruction, for edits."""
    category: str
    split: Split
    sources: tuple[SourceImage, ...] = ()
    """In the order in which the instruction counts them; none for text-to-image."""
    target: SourceImage | None = None
    """The real image; None where it was not asked for, or there is none."""
    shows: str = ""
    """Tells the real images of a training prompt apart: the digest where they are read, else what
    the row calls its own; empty where there is none."""

    @property
    def task(self) -> Task:
        return "edit" if self.sources else "t2i"


def read_prompts(
    path: Path | str, memo: Memo | None = None, *, targets: bool = False
) -> list[PromptRecord]:
    """All prompts of a file or folder, or a `DataError` that lists what is wrong.

    A file is .txt, .jsonl, .csv, .parquet or .tar (webdataset). A folder holds captions.jsonl and
    edits.jsonl, several .parquet or .tar files, or what `datasets` saved to disk. `memo` remembers
    which images were read and found good. `targets`: also the real images of training rows.
    """
    path, memo = Path(path).expanduser(), Memo() if memo is None else memo
    problems: list[str] = []
    records = list(_records(reader_of(path, targets=targets), memo, problems, targets))
    problems += _repeated(records)
    if not records and not problems:
        problems = ["no prompt in it; write one a line"]
    refuse(path, problems)
    memo.save()
    return records


def conversions(records: Sequence[PromptRecord]) -> list[str]:
    """One line for each way in which images were changed, for the user to know."""
    told = []
    for role, each in (
        ("source", [source for record in records for source in record.sources]),
        ("target", [record.target for record in records if record.target is not None]),
    ):
        images = {image.digest: image.converted for image in each}
        counts = Counter(converted for converted in images.values() if converted)
        told += [f"{n} of {len(images)} {role} images were {w}" for w, n in sorted(counts.items())]
    return told


def _records(
    reader: Reader, memo: Memo, problems: list[str], targets: bool
) -> Iterator[PromptRecord]:
    called: dict[str, tuple[str, str]] = {}
    for row in reader(problems):
        own = list(_check(row, called))
        if not own:
            sources = [_image(row, value, memo, own) for value in _sources(row)]
            target = _target(row, memo, own) if targets else None
            shows = target.digest if target is not None else _named_target(row)
            if not own:
                yield PromptRecord(
                    id=str(row.values.get("id") or row.where),
                    where=row.where,
                    prompt=row.values[_prompt_key(row)].strip(),
                    category=row.values.get("category") or "general",
                    split=SPLITS[row.values.get("split") or "train"],
                    sources=tuple(source for source in sources if source is not None),
                    target=target,
                    shows=shows,
                )
        problems += [f"{row.where}: {problem}" for problem in own]


def _prompt_key(row: PromptRow) -> str:
    """What the row calls its prompt; '' where it has none, and the first where it has several."""
    keys = ("instruction", *PROMPT_KEYS)
    return next((key for key in keys if row.values.get(key) is not None), "")


def _sources(row: PromptRow) -> list[Any]:
    given = next((row.values[k] for k in SOURCE_KEYS if row.values.get(k) is not None), [])
    return given if isinstance(given, list) else [given]


def _check(row: PromptRow, called: dict[str, tuple[str, str]]) -> Iterator[str]:
    """What is wrong with the row, as far as shows without its images.

    `called` holds, by file and task, what the first row called its prompt, and where.
    """
    missing = [key for key in KEYS if row.values.get(key) is None]
    for key in row.values:
        near = [] if key in KEYS else difflib.get_close_matches(key, missing, n=1, cutoff=0.85)
        if near:
            yield f"unknown key '{key}'; did you mean '{near[0]}'?"
    name = _prompt_key(row)
    if not name:
        yield "no prompt; give it as 'prompt', 'caption' or 'text', or as 'instruction' for an edit"
        return
    for key in (name, *OTHER_KEYS):
        if not isinstance(row.values.get(key), str | None) and key != "id":
            yield f"'{key}' is {str(row.values[key])[:40]}; give a string"
            return
    if not row.values[name].strip():
        yield f"'{name}' is empty; write one or remove the row"
    rivals = [
        key for key in ("instruction", "prompt", "caption") if row.values.get(key) is not None
    ]
    if len(rivals) > 1:
        yield f"has both '{rivals[0]}' and '{rivals[1]}'; keep one, or make two rows of it"
    kind = f"{row.file} {'instruction' if name == 'instruction' else 'prompt'}"
    first, where = called.setdefault(kind, (name, row.where))
    if first != name:
        yield f"calls its prompt '{name}', and {where} calls it '{first}'; use one name"
    if row.values.get("source") is not None and row.values.get("sources") is not None:
        yield "has both 'source' and 'sources'; keep one"
    if name == "instruction" and not _sources(row):
        yield "an instruction without 'source'; name the image, or call it 'prompt'"
    if name != "instruction" and _sources(row):
        yield f"has a source image, but '{name}' is no instruction; call it 'instruction'"
    if (row.values.get("split") or "train") not in SPLITS:
        yield f"split '{row.values['split']}' is unknown; use one of {', '.join(SPLITS)}"


def _target(row: PromptRow, memo: Memo, own: list[str]) -> SourceImage | None:
    """The real image of a row that is trained on; the others are not looked at."""
    given = _target_keys(row)
    if not given:
        return None
    value = row.values[given[0]]
    if len(given) > 1 or isinstance(value, list):
        own.append(f"has several real images in {' and '.join(map(repr, given))}; keep one")
        return None
    return _image(row, value, memo, own)


def _named_target(row: PromptRow) -> str:
    return " ".join(str(row.values[key]) for key in _target_keys(row))


def _target_keys(row: PromptRow) -> list[str]:
    """Where a row that is trained on names its real image."""
    if SPLITS[row.values.get("split") or "train"] != "train":
        return []
    names = TARGET_KEYS["edit" if _prompt_key(row) == "instruction" else "t2i"]
    return [name for name in names if row.values.get(name) is not None]


def _image(row: PromptRow, value: Any, memo: Memo, own: list[str]) -> SourceImage | None:
    """The image behind a row's value, decoded once to see that it can be."""
    found = row.find(value)
    if isinstance(found, str):
        own.append(found)
        return None
    try:
        digest, converted, size = memo.get(
            found.file, f"image and size {found.part}", lambda: _look(found)
        )
    except UnidentifiedImageError:
        known = ", ".join(IMAGE_FORMATS)
        own.append(f"{found.name} is no image, or damaged; {known} can be read")
        return None
    except UNREADABLE as error:
        reason = str(error) or type(error).__name__
        own.append(f"{found.name} cannot be read ({reason}); replace it or remove the row")
        return None
    height, width = size
    return SourceImage(found.name, digest, converted, (height, width), found.load)


def _look(found: Found) -> list[Any]:
    content = found.load()
    image, converted = read_rgb(content)
    digest = blake2b(content, digest_size=16).hexdigest()
    return [digest, converted, [image.height, image.width]]


def _repeated(records: list[PromptRecord]) -> Iterator[str]:
    """A prompt has one row, or a training row for each of its real images: whether or not these are
    read, so that a file is right for every objective or for none."""
    first: dict[tuple[str, ...], dict[str, str]] = {}
    ids: dict[str, str] = {}
    for record in records:
        prompt = (record.task, record.prompt, *(image.digest for image in record.sources))
        shown = first.setdefault(prompt, {})  # by image, where
        if shown and (not record.shows or "" in shown or record.shows in shown):
            what = "instruction and source" if record.sources else "prompt"
            before = shown.get(record.shows) or next(iter(shown.values()))
            yield f"{record.where}: same {what} as {before}; remove one of them"
        elif record.id in ids:
            yield f"{record.where}: same id {record.id!r} as {ids[record.id]}; give it another"
        shown.setdefault(record.shows, record.where)
        ids.setdefault(record.id, record.where)
