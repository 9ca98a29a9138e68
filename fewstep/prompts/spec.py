"""What a pool is to be: a category, a grid of attributes, templates, and what a prompt must meet.

A spec is a YAML file (recipes/prompts/). No torch.
"""

import hashlib
import json
import random
import re
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from fewstep.errors import RecipeError, did_you_mean
from fewstep.prompts.pool import read_entries
from fewstep.prompts.rules import BUILTIN, OTHER, Kind, Rule
from fewstep.recipe.load import load_yaml
from fewstep.recipe.schema import Count, Strict, Word

_SLOT = re.compile(r"\{([A-Za-z0-9_.-]+)\}")
SOURCE = "source"
"""The slot of a source caption in templates for instructions."""


class Span(Strict):
    min: Annotated[int, Field(ge=0)]
    max: Count

    def holds(self, number: int) -> bool:
        return self.min <= number <= self.max


class Quotes(Strict):
    number: Span = Span(min=1, max=3)
    """Quotations in a prompt."""
    words: Span = Span(min=1, max=12)
    """Words, or Chinese characters, in each quotation."""


class Sources(Strict):
    file: Annotated[str, Field(min_length=1)]
    """Captions of the images to edit: .jsonl, .csv, .tsv or a caption a line; relative to the
    spec."""
    column: str = "caption"
    """The key or the column that holds the caption."""


class Request(Strict):
    prompts: Count = 8
    """Asked for in one request."""
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] = 0.9
    max_tokens: Count | None = None
    """Of one reply; null leaves it to the endpoint."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """Further fields of the request's body, such as {chat_template_kwargs: {...}}."""


class Spec(Strict):
    kind: Kind = "prompt"
    """instruction: edits of given source captions."""
    category: Word
    description: Annotated[str, Field(min_length=1)]
    """What the category is; told to the model, when writing and when classifying."""
    language: Literal["en", "zh", "other"] = "en"
    """other: named in the description; only English and Chinese are told apart from the rest."""
    count: Count = 20_000
    """Prompts to write; the paper's pools have 20,000 each."""
    seed: int = 0
    """Of the order of the grid."""
    templates: Annotated[tuple[str, ...], Field(min_length=1)]
    """The request, with {attribute} slots of the grid; used in turn from cell to cell."""
    grid: dict[Word, Annotated[tuple[str, ...], Field(min_length=1)]]
    """Values of each attribute; a cell is one value of each."""
    sources: Sources | None = None
    length: Span = Span(min=8, max=120)
    """Words, or Chinese characters, in a prompt."""
    quotes: Quotes | None = None
    """For text-centric prompts; null asks nothing of quotations."""
    near_duplicate: Annotated[float, Field(gt=0.0, le=1.0)] = 0.6
    """Jaccard index of three-word runs from which on a prompt repeats another one."""
    rule: Rule | None = None
    """The category's own rule; null takes the built-in one of that name."""
    check_category: bool = True
    """Whether a prompt that the rule puts into another category is refused."""
    request: Request = Request()


class Cell(NamedTuple):
    number: int
    """Place in the order of the grid, from 0."""
    attributes: dict[str, str]
    source: dict[str, str]
    """Of an instruction: `source_caption`, and the image's `source` where the list names it."""


class Grid:
    """The cells of a spec in an order that keeps every value of every attribute level.

    The values are shuffled by the seed; cell i has the digits q of i in the mixed radix of the
    axes, and takes value (q_1 + .. + q_a) mod n_a on axis a. Each cell comes once, and any first
    part of the order uses the values of an axis about equally often.
    """

    def __init__(self, spec: Spec, sources: list[dict[str, str]]) -> None:
        generator = random.Random(spec.seed)
        self._names = sorted(spec.grid)
        self._values = [
            generator.sample(spec.grid[name], len(spec.grid[name])) for name in self._names
        ]
        self._sources = generator.sample(sources, len(sources))
        self._sizes = [len(values) for values in self._values]
        if sources:
            self._sizes.append(len(sources))
        # The longest axis first: the others are level whenever it has been gone through once.
        self._order = sorted(range(len(self._sizes)), key=lambda axis: -self._sizes[axis])
        self.cells = prod(self._sizes)
        asked = {"kind": spec.kind, "category": spec.category, "language": spec.language}
        content = [asked, self._names, self._values, self._sources]
        self.stamp = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]
        """Changes with the meaning of a cell's index, not with the count."""

    def cell(self, index: int) -> Cell:
        picked: dict[int, int] = {}
        rest, total = index, 0
        for axis in self._order:
            rest, digit = divmod(rest, self._sizes[axis])
            total += digit
            picked[axis] = total % self._sizes[axis]
        attributes = {
            name: values[picked[axis]]
            for axis, (name, values) in enumerate(zip(self._names, self._values))
        }
        source = self._sources[picked[len(self._names)]] if self._sources else {}
        return Cell(index, attributes, source)

    def quotas(self, count: int) -> dict[int, int]:
        """Prompts per cell: equal but for one, the first cells of the order having one more."""
        each, more = divmod(count, self.cells)
        used = self.cells if each else more
        return {index: each + (index < more) for index in range(used)}


def load_spec(path: Path) -> Spec:
    """Read and check a spec; RecipeError names the field."""
    spec = load_yaml(path, Spec)
    where = str(path)
    if (spec.sources is None) == (spec.kind == "instruction"):
        if spec.sources is None:
            problem, hint = "is missing", "give {file: ...}, the captions of images to edit"
        else:
            problem, hint = "is for instructions", "say kind: instruction, or leave it out"
        raise RecipeError(problem, field="sources", hint=hint, where=where)
    names = {*spec.grid, SOURCE} if spec.kind == "instruction" else {*spec.grid}
    used = {slot for template in spec.templates for slot in _SLOT.findall(template)}
    if SOURCE in spec.grid:
        raise RecipeError("is the slot of the source caption", field="grid.source", where=where)
    for slot in sorted(used - names):
        raise RecipeError(
            f"{{{slot}}} is no attribute of the grid",
            field="templates",
            hint=did_you_mean(slot, sorted(names)),
            where=where,
        )
    for name in sorted(names - used):
        raise RecipeError(
            "no template uses it", field=f"grid.{name}", hint=f"write {{{name}}}", where=where
        )
    for name, values in spec.grid.items():
        if len(set(values)) < len(values):
            raise RecipeError("a value is given twice", field=f"grid.{name}", where=where)
    for field, span in spans(spec).items():
        if span.min > span.max:
            raise RecipeError(f"min {span.min} > max {span.max}", field=field, where=where)
    if spec.category == OTHER:
        raise RecipeError("`other` is what no rule matches", field="category", where=where)
    if spec.check_category and spec.rule is None and spec.category not in BUILTIN[spec.kind]:
        raise RecipeError(
            f"there is no built-in rule for {spec.category!r}",
            field="rule",
            hint=f"give one, or check_category: false; built in: {', '.join(BUILTIN[spec.kind])}",
            where=where,
        )
    if spec.check_category and spec.rule is None and spec.language == "other":
        raise RecipeError(
            "the built-in rules know English and Chinese",
            field="rule",
            hint="give one, or check_category: false",
            where=where,
        )
    return spec


def spans(spec: Spec) -> dict[str, Span]:
    found = {"length": spec.length}
    if spec.quotes:
        found |= {"quotes.number": spec.quotes.number, "quotes.words": spec.quotes.words}
    return found


def open_grid(spec: Spec, path: Path) -> Grid:
    """The grid with its source captions; `path` is the spec's."""
    if spec.sources is None:
        return Grid(spec, [])
    entries = read_entries(path.parent / spec.sources.file, spec.sources.column)
    sources = []
    for entry in entries:
        image = entry.row.get("file")
        named = {"source": image} if isinstance(image, str) else {}
        sources.append({"source_caption": entry.text} | named)
    return Grid(spec, sources)


def fill(template: str, cell: Cell) -> str:
    known = cell.attributes | {SOURCE: cell.source.get("source_caption", "")}
    return _SLOT.sub(lambda slot: known[slot[1]], template).strip()


def rules_for(kind: Kind, specs: list[Spec]) -> dict[str, Rule]:
    """The built-in rules, with those of the specs over or beside them."""
    own = {spec.category: spec.rule for spec in specs if spec.rule is not None}
    return BUILTIN[kind] | own
