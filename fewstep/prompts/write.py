"""Writes a pool: one request per grid cell, every prompt checked, every accepted one kept at once.

A cell that lacks prompts is asked for again, so that quotas are exact; the pool file is the only
state, and the same command goes on from it.
"""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fewstep.endpoint import Endpoint, Messages, Reply, Usage, json_in, replies
from fewstep.errors import RunError
from fewstep.prompts.budget import HAN, LATIN, Budget, estimate
from fewstep.prompts.near import NearIndex
from fewstep.prompts.pool import PoolFile
from fewstep.prompts.rules import category_by_rule
from fewstep.prompts.spec import Cell, Grid, Spec, fill, rules_for
from fewstep.prompts.text import fingerprint, language, quotations, words

TRIES = 6
"""Requests in a row that may bring a cell nothing before it is given up."""
SHOWN = 5
"""Prompts of the cell that are shown to the model, so that it does not repeat them."""

_ROLE = {
    "prompt": "You write prompts for a text-to-image model: what is seen, in plain sentences, "
    "without camera settings, quality words or addressing anyone.",
    "instruction": "You write instructions for an image-editing model: one change to a given "
    "image, said as a user would, without describing what stays as it is.",
}
_LANGUAGE = {"en": " in English", "zh": " in Chinese", "other": ""}
_SAID = {"prompt": "exactly as written", "instruction": "exactly as the image shows it"}


class Job(NamedTuple):
    cell: int
    number: int
    """Prompts asked for."""
    barren: int = 0
    """Requests of this cell in a row, before this one, of which nothing was accepted."""


@dataclass
class Outcome:
    """What a run of `write` did; `missing` prompts are those of cells given up."""

    written: int = 0
    missing: int = 0
    usage: Usage = field(default_factory=Usage)
    refused: Counter[str] = field(default_factory=Counter)


class Writer:
    """A pool on its way to its quotas: what to ask for next, and what to take of a reply.

    `rows` were written before, `where` names their file; no prompt may repeat one of `against`.
    """

    def __init__(
        self,
        spec: Spec,
        grid: Grid,
        rows: Sequence[dict[str, Any]] = (),
        *,
        where: str = "pool",
        against: Sequence[str] = (),
    ) -> None:
        self.spec, self.grid = spec, grid
        self.quotas = grid.quotas(spec.count)
        self.near = NearIndex(spec.near_duplicate)
        self.hashes: set[tuple[str, str]] = set()
        self.rules = rules_for(spec.kind, [spec])
        self.written: dict[int, list[str]] = {}
        for number, row in enumerate(rows, start=1):
            cell, text = row.get("cell"), row.get("prompt")
            if row.get("grid") != grid.stamp or not isinstance(cell, int) or not text:
                raise RunError(
                    f"{where}:{number}: not written from this grid (kind, category, language, "
                    "grid, sources and seed must stay as they were); choose another --out"
                )
            self._remember(grid.cell(cell), text)
        self.foreign = NearIndex(spec.near_duplicate)
        for text in against:
            self.foreign.add("", text)

    def missing(self, cell: int) -> int:
        return max(0, self.quotas.get(cell, 0) - len(self.written.get(cell, ())))

    def jobs(self) -> "deque[Job]":
        """Unfilled cells in the order of the grid; a cell has one request under way at most."""
        each = self.spec.request.prompts
        return deque(
            Job(cell, min(each, lack)) for cell in self.quotas if (lack := self.missing(cell))
        )

    def estimate(self) -> Usage:
        """Every request from here to the end, were all prompts accepted."""
        each, length = self.spec.request.prompts, self.spec.length
        unit = HAN if self.spec.language == "zh" else LATIN
        # Brackets and quotation marks around each prompt come on top of its words.
        typical = (length.min + length.max) / 2 * unit + 6

        def requests():
            for cell in self.quotas:
                lack = self.missing(cell)
                for done in range(0, lack, each):
                    job = Job(cell, min(each, lack - done))
                    yield self.messages(job), job.number * typical + 6

        return estimate(requests())

    def messages(self, job: Job) -> Messages:
        spec, cell = self.spec, self.grid.cell(job.cell)
        asked = [fill(spec.templates[cell.number % len(spec.templates)], cell)]
        unit = "characters" if spec.language == "zh" else "words"
        different = f"{job.number} clearly different {spec.kind}s" if job.number > 1 else "1"
        asked.append(
            f"Write {different}{_LANGUAGE[spec.language]}, each of {spec.length.min} to "
            f"{spec.length.max} {unit}."
        )
        if spec.quotes:
            number, size = spec.quotes.number, spec.quotes.words
            asked.append(
                f"Each quotes {number.min} to {number.max} texts in double quotation marks, "
                f"{_SAID[spec.kind]}, of {size.min} to {size.max} {unit} each."
            )
        known = self.written.get(job.cell, [])[-SHOWN:]
        if known:
            listed = "\n".join(f"- {text}" for text in known)
            asked.append(f"These are written already; do not repeat them:\n{listed}")
        asked.append('Answer with JSON alone: {"prompts": ["...", ...]}')
        system = f"{_ROLE[spec.kind]}\nCategory: {spec.description}"
        return [
            {"role": "system", "content": system},
            {"role": "user", "content": "\n\n".join(asked)},
        ]

    def accept(self, job: Job, reply: Reply, refused: Counter[str]) -> list[dict[str, Any]]:
        """The rows of a reply that the pool takes; why it does not take others is counted."""
        if reply.problem:
            refused[reply.problem] += job.number
            return []
        found = json_in(reply.text)
        offered = found.get("prompts") if isinstance(found, dict) else found
        if not isinstance(offered, list):
            refused["no list of prompts in the reply"] += job.number
            return []
        cell, rows = self.grid.cell(job.cell), []
        for text in offered:
            if not self.missing(job.cell):
                break
            reason = self.objection(text, cell)
            if reason:
                refused[reason] += 1
                continue
            text = " ".join(text.split())
            self._remember(cell, text)
            rows.append(self._row(cell, text))
        return rows

    def objection(self, text: object, cell: Cell) -> str:
        """Why a text is no prompt for the pool; empty when it is."""
        spec = self.spec
        if not isinstance(text, str) or not words(text):
            return "not a text"
        if not spec.length.holds(len(words(text))):
            return "too short" if len(words(text)) < spec.length.min else "too long"
        if language(text) != spec.language:
            return "another language"
        if spec.quotes:
            quoted = quotations(text)
            if not spec.quotes.number.holds(len(quoted)):
                return "number of quotations"
            if not all(spec.quotes.words.holds(len(words(quote))) for quote in quoted):
                return "length of a quotation"
        if spec.check_category and category_by_rule(text, self.rules) != spec.category:
            return "another category"
        scope = _scope(cell)
        if (scope, fingerprint(text)) in self.hashes:
            return "duplicate"
        if self.near.find(text, scope):
            return "near-duplicate"
        if self.foreign.find(text):
            return "overlaps --against"
        return ""

    def _remember(self, cell: Cell, text: str) -> None:
        scope = _scope(cell)
        self.hashes.add((scope, fingerprint(text)))
        self.near.add("", text, scope)
        self.written.setdefault(cell.number, []).append(text)

    def _row(self, cell: Cell, text: str) -> dict[str, Any]:
        spec = self.spec
        row: dict[str, Any] = {"prompt": text, "category": spec.category}
        if spec.kind == "instruction":
            row |= {"instruction": text} | cell.source
        return row | {
            "language": language(text),
            "attributes": cell.attributes,
            "hash": fingerprint(text),
            "cell": cell.number,
            "grid": self.grid.stamp,
        }


def _scope(cell: Cell) -> str:
    """The same instruction for another image is no repetition."""
    return cell.source.get("source_caption", "")


def write(
    writer: Writer,
    pool: PoolFile,
    endpoint: Endpoint,
    *,
    workers: int,
    budget: Budget,
    tell: Callable[[int], None],
) -> Outcome:
    """Ask until every quota is filled or a cell is given up; `tell` hears the number
    written after every reply."""
    request = writer.spec.request
    fields = {"temperature": request.temperature, **request.extra}
    if request.max_tokens is not None:
        fields["max_tokens"] = request.max_tokens
    outcome = Outcome()
    jobs = writer.jobs()

    def ask(job: Job) -> Reply:
        return endpoint.ask(writer.messages(job), **fields)

    for job, reply in replies(ask, jobs, workers):
        rows = writer.accept(job, reply, outcome.refused)
        for row in rows:
            pool.append(row | {"model": endpoint.model})
        outcome.written += len(rows)
        outcome.usage = outcome.usage.plus(reply.usage)
        tell(outcome.written)
        budget.watch(outcome.usage)
        barren = 0 if rows else job.barren + 1
        lack = writer.missing(job.cell)
        if lack and barren < TRIES:
            jobs.append(Job(job.cell, min(request.prompts, lack), barren))
        elif lack:
            outcome.missing += lack
    return outcome
