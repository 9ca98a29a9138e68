"""What a list of prompts is made of: repetitions, lengths, languages, quotations, overlap."""

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import mean, median, quantiles
from typing import Any, NamedTuple

from fewstep.prompts.near import NearIndex
from fewstep.prompts.pool import Entry
from fewstep.prompts.rules import Rule, category_by_rule
from fewstep.prompts.text import language, normal_form, quotations, words


class Spread(NamedTuple):
    """Of whole numbers; all 0 where there are none."""

    least: int
    median: float
    mean: float
    p95: float
    most: int


class Overlap(NamedTuple):
    """A prompt that repeats one of another list."""

    line: int
    other_line: int
    jaccard: float
    """1 also for equal words in another order."""
    text: str


class Findings(NamedTuple):
    prompts: int
    repeated: int
    """Prompts that an earlier one equals, but for case, spacing and punctuation."""
    nearly_repeated: int
    """Further ones that nearly repeat an earlier one."""
    words: Spread
    languages: dict[str, int]
    categories: dict[str, int]
    """By rule."""
    quoting: int
    """Prompts that quote text."""
    quotations: int
    quoted_words: Spread
    """Words, or Chinese characters, of a quotation."""
    examples: tuple[Overlap, ...]
    """Of repetitions, exact and near, the first ones."""

    def as_json(self) -> dict[str, Any]:
        found = self._asdict()
        found["words"], found["quoted_words"] = self.words._asdict(), self.quoted_words._asdict()
        found["examples"] = [example._asdict() for example in self.examples]
        return found


def check(
    entries: Sequence[Entry],
    rules: Mapping[str, Rule],
    *,
    near: float,
    examples: int = 5,
    scope: str = "",
) -> Findings:
    """`near` is the Jaccard index from which on prompts nearly repeat each other.

    `scope` names a key of the rows, such as source_caption: only within its values are prompts
    repetitions.
    """
    index, seen = NearIndex(near), dict[tuple[str, str], int]()
    repeated, nearly, shown = 0, 0, list[Overlap]()
    for entry in entries:
        within = str(entry.row.get(scope, "")) if scope else ""
        first = seen.setdefault((within, normal_form(entry.text)), entry.line)
        if first != entry.line:
            repeated += 1
            shown.append(Overlap(entry.line, first, 1.0, entry.text))
            continue
        match = index.add(str(entry.line), entry.text, within)
        if match:
            nearly += 1
            shown.append(Overlap(entry.line, int(match.name), match.jaccard, entry.text))
    quoted = [quotations(entry.text) for entry in entries]
    flat = [len(words(quotation)) for found in quoted for quotation in found]
    return Findings(
        prompts=len(entries),
        repeated=repeated,
        nearly_repeated=nearly,
        words=spread([len(words(entry.text)) for entry in entries]),
        languages=_counted(language(entry.text) for entry in entries),
        categories=_counted(category_by_rule(entry.text, rules) for entry in entries),
        quoting=sum(bool(found) for found in quoted),
        quotations=len(flat),
        quoted_words=spread(flat),
        examples=tuple(shown[:examples]),
    )


def overlaps(entries: Sequence[Entry], others: Sequence[Entry], *, near: float) -> list[Overlap]:
    """The entries that repeat, exactly or nearly, one of the others."""
    index = NearIndex(near)
    for other in others:
        index.add(str(other.line), other.text)
    found = [(entry, index.find(entry.text)) for entry in entries]
    return [
        Overlap(entry.line, int(match.name), match.jaccard, entry.text)
        for entry, match in found
        if match
    ]


def spread(numbers: Sequence[int]) -> Spread:
    if not numbers:
        return Spread(0, 0.0, 0.0, 0.0, 0)
    high = quantiles(numbers, n=20, method="inclusive")[-1] if len(numbers) > 1 else numbers[0]
    return Spread(min(numbers), median(numbers), mean(numbers), high, max(numbers))


def _counted(names: Any) -> dict[str, int]:
    return dict(Counter(names).most_common())
