"""`fewstep prompts`: write a pool, classify one, check one. Nothing heavy at module level."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewstep.errors import DataError, Interrupted, RecipeError, RunError

if TYPE_CHECKING:
    from fewstep.endpoint import Endpoint, Usage
    from fewstep.prompts.budget import Budget
    from fewstep.prompts.check import Findings, Overlap
    from fewstep.prompts.pool import PoolFile
    from fewstep.prompts.rules import Kind
    from fewstep.prompts.spec import Spec

app = typer.Typer(help="Pools of prompts: write, classify, check.", no_args_is_help=True)

Out = Annotated[Path, typer.Option("--out", "-o", help="The .jsonl to write or to go on with.")]
File = Annotated[Path, typer.Argument(metavar="FILE", help=".jsonl, .csv, .tsv or lines.")]
Specs = Annotated[
    list[Path] | None, typer.Option("--spec", help="Of own categories; may be repeated.")
]
Column = Annotated[str, typer.Option(help="Key or column that holds the prompt.")]
Instructions = Annotated[
    bool, typer.Option("--instructions", help="The lines are editing instructions.")
]
Against = Annotated[
    list[Path] | None,
    typer.Option(help="An evaluation set that must not be repeated; may be repeated."),
]
AgainstColumn = Annotated[str, typer.Option(help="Its key or column.")]
Url = Annotated[
    str | None, typer.Option(help="OpenAI-compatible, such as http://localhost:8000/v1.")
]
Model = Annotated[str | None, typer.Option(help="The model's name at the endpoint.")]
KeyName = Annotated[str, typer.Option("--key-env", help="Environment variable with the key.")]
Workers = Annotated[int, typer.Option(min=1, max=256, help="Requests at a time.")]
Timeout = Annotated[float, typer.Option(min=0.1, help="Seconds without an answer.")]
PriceIn = Annotated[float | None, typer.Option(min=0, help="Per million input tokens.")]
PriceOut = Annotated[float | None, typer.Option(min=0, help="Per million output tokens.")]
MaxCost = Annotated[float | None, typer.Option(min=0, help="Do not start, or go on, beyond it.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be asked, and stop.")]


@app.command()
def write(
    spec_file: Annotated[Path, typer.Argument(metavar="SPEC", help="See recipes/prompts/.")],
    out: Out,
    endpoint: Url = None,
    model: Model = None,
    key_env: KeyName = "OPENAI_API_KEY",
    count: Annotated[int | None, typer.Option(min=1, help="Instead of the spec's.")] = None,
    against: Against = None,
    against_column: AgainstColumn = "prompt",
    workers: Workers = 4,
    timeout: Timeout = 120.0,
    price_in: PriceIn = None,
    price_out: PriceOut = None,
    max_cost: MaxCost = None,
    dry_run: DryRun = False,
) -> None:
    """Write a category pool through an endpoint; the same command goes on after a stop."""
    from fewstep.prompts.budget import Budget
    from fewstep.prompts.pool import read_entries, read_rows
    from fewstep.prompts.spec import load_spec, open_grid
    from fewstep.prompts.write import Writer
    from fewstep.prompts.write import write as write_pool

    spec = load_spec(spec_file)
    spec = spec if count is None else spec.model_copy(update={"count": count})
    grid = open_grid(spec, spec_file)
    foreign = [entry.text for path in against or [] for entry in read_entries(path, against_column)]
    kept = read_rows(out)
    writer = Writer(spec, grid, kept, where=str(out), against=foreign)
    lack = sum(map(writer.missing, writer.quotas))
    typer.echo(
        f"{spec.category}: {spec.count:,} {spec.kind}s in {len(writer.quotas):,} of {grid.cells:,} "
        f"cells; {len(kept):,} are there, {lack:,} to write"
    )
    budget, expected = Budget(price_in, price_out, max_cost), writer.estimate()
    typer.echo(f"estimate: {_priced(expected, budget)}; prompts refused and redone come on top")
    budget.check(expected)
    if dry_run or not lack:
        for message in writer.messages(writer.jobs()[0]) if lack else []:
            typer.echo(f"\n[{message['role']}]\n{message['content']}")
        return
    server = _endpoint(endpoint, model, key_env, timeout)
    with _appending(out, len(kept)) as pool:
        outcome = write_pool(
            writer, pool, server, workers=workers, budget=budget, tell=_ticker(len(kept))
        )
    typer.echo(f"{out}: {outcome.written:,} written; measured: {_priced(outcome.usage, budget)}")
    for reason, number in outcome.refused.most_common():
        typer.echo(f"  refused {number:,}: {reason}")
    if outcome.missing:
        raise RunError(
            f"{outcome.missing:,} prompts are missing, in cells where nothing was accepted any "
            "more (reasons above); the same command tries again, or loosen the spec"
        )


@app.command()
def classify(
    file: File,
    out: Out,
    column: Column = "prompt",
    spec: Specs = None,
    instructions: Instructions = False,
    truth: Annotated[str | None, typer.Option(help="Column of known categories.")] = None,
    endpoint: Url = None,
    model: Model = None,
    key_env: KeyName = "OPENAI_API_KEY",
    workers: Workers = 4,
    timeout: Timeout = 120.0,
    price_in: PriceIn = None,
    price_out: PriceOut = None,
    max_cost: MaxCost = None,
    dry_run: DryRun = False,
) -> None:
    """Sort prompts into categories by rule, with --endpoint by a model, and compare the two."""
    from fewstep.prompts import classify as classes
    from fewstep.prompts.budget import Budget
    from fewstep.prompts.pool import read_entries, read_rows
    from fewstep.prompts.rules import category_by_rule
    from fewstep.prompts.spec import rules_for

    kind, specs = _kind(instructions), _specs(spec, instructions)
    rules = rules_for(kind, specs)
    entries, kept = read_entries(file, column), read_rows(out)
    if truth is not None and not all(isinstance(entry.row.get(truth), str) for entry in entries):
        raise RecipeError(f"{file} has no such column in every row", field=f"--truth {truth}")
    if endpoint is None:
        if out.exists():
            raise RunError(f"{out} is there already; choose another --out")
        rows = [classes.row_of(one, category_by_rule(one.text, rules), None) for one in entries]
        with _appending(out, len(kept)) as pool:
            for row in rows:
                pool.append(row)
    else:
        told = classes.DESCRIPTIONS[kind] | {one.category: one.description for one in specs}
        jobs = classes.batches(classes.still_open(entries, kept, str(out)))
        budget, expected = (
            Budget(price_in, price_out, max_cost),
            classes.estimate_classes(jobs, kind, told),
        )
        typer.echo(f"estimate: {_priced(expected, budget)}")
        budget.check(expected)
        if dry_run:
            return
        server = _endpoint(endpoint, model, key_env, timeout)
        with _appending(out, len(kept)) as pool:
            spent = classes.classify_by_model(
                jobs,
                pool,
                server,
                kind=kind,
                rules=rules,
                descriptions=told,
                workers=workers,
                budget=budget,
                tell=_ticker(len(kept)),
            )
        typer.echo(f"measured: {_priced(spent, budget)}")
        rows = read_rows(out)
        _compare(rows, "category_rule", "category_model")
    typer.echo(f"{out}: {_counts([row['category'] for row in rows])}")
    if truth is not None:
        known = {entry.line: entry.row[truth] for entry in entries}
        _compare([row | {truth: known[row["line"]]} for row in rows], truth, "category_rule")
        if endpoint is not None:
            _compare([row | {truth: known[row["line"]]} for row in rows], truth, "category_model")


@app.command()
def check(
    file: File,
    column: Column = "prompt",
    spec: Specs = None,
    instructions: Instructions = False,
    against: Against = None,
    against_column: AgainstColumn = "prompt",
    near: Annotated[
        float, typer.Option(min=0.05, max=1.0, help="Jaccard index of a near-duplicate.")
    ] = 0.6,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Duplicates, lengths, languages, categories, quotations; fails on overlap with --against."""
    from fewstep.prompts.check import check as check_entries
    from fewstep.prompts.check import overlaps
    from fewstep.prompts.pool import read_entries
    from fewstep.prompts.spec import rules_for

    kind = _kind(instructions)
    entries = read_entries(file, column)
    scope = "source_caption" if instructions else ""
    found = check_entries(
        entries, rules_for(kind, _specs(spec, instructions)), near=near, scope=scope
    )
    shared = {
        path: overlaps(entries, read_entries(path, against_column), near=near)
        for path in against or []
    }
    if as_json:
        listed = {str(path): [one._asdict() for one in some] for path, some in shared.items()}
        typer.echo(json.dumps(found.as_json() | {"overlap": listed}, indent=2, ensure_ascii=False))
    else:
        _print_findings(file, found)
        for path, some in shared.items():
            typer.echo(f"overlap with {path}: {len(some):,} of {len(entries):,} prompts")
            _print_pairs(some[:5])
    if any(shared.values()):
        number = len({one.line for some in shared.values() for one in some})
        raise DataError(
            f"{file}: {number:,} prompts repeat the evaluation set; take them out before training"
        )


def _print_findings(file: Path, found: "Findings") -> None:
    def share(number: int) -> str:
        return f"{number:,} ({100 * number / found.prompts:.1f} %)"

    length, quoted = found.words, found.quoted_words
    typer.echo(f"{file}: {found.prompts:,} prompts")
    typer.echo(f"duplicates       {share(found.repeated)}")
    typer.echo(f"near-duplicates  {share(found.nearly_repeated)}")
    _print_pairs(found.examples)
    typer.echo(
        f"words            {length.least} to {length.most}, median {length.median:g}, "
        f"mean {length.mean:.1f}, 95 % within {length.p95:.0f}"
    )
    for title, counts in (("language", found.languages), ("category by rule", found.categories)):
        listed = ", ".join(f"{name} {share(number)}" for name, number in counts.items())
        typer.echo(f"{title:<16} {listed}")
    typer.echo(f"quote text       {share(found.quoting)}")
    if found.quotations:
        typer.echo(
            f"quoted words     {quoted.least} to {quoted.most}, median {quoted.median:g}, "
            f"95 % within {quoted.p95:.0f}, in {found.quotations:,} quotations"
        )


def _print_pairs(pairs: "tuple[Overlap, ...] | list[Overlap]") -> None:
    for one in pairs:
        text = one.text if len(one.text) <= 70 else one.text[:69] + "\u2026"
        typer.echo(f"  {one.line} ~ {one.other_line} ({one.jaccard:.2f}): {text}")


def _compare(rows: list[dict[str, Any]], first: str, second: str) -> None:
    """How far two columns agree, and what becomes of each category of the first."""
    from fewstep.prompts.classify import agreement

    found = agreement([(row[first], row[second]) for row in rows])
    typer.echo(
        f"{first} and {second} agree on {100 * found.share:.1f} % of {found.number:,}, "
        f"kappa {found.kappa:.2f}"
    )
    for name in sorted({row[first] for row in rows}):
        typer.echo(f"  {name} -> {_counts([row[second] for row in rows if row[first] == name])}")


def _counts(names: list[str]) -> str:
    from collections import Counter

    return ", ".join(f"{name} {number:,}" for name, number in Counter(names).most_common())


def _priced(usage: "Usage", budget: "Budget") -> str:
    said = f"{usage.requests:,} requests, {usage.tokens_in:,} + {usage.tokens_out:,} tokens"
    if usage.unreported:
        said += f" ({usage.unreported:,} replies without counts)"
    cost = budget.cost(usage)
    return said if cost is None else f"{said}, {cost:.2f} at the given prices"


def _endpoint(url: str | None, model: str | None, key_env: str, timeout: float) -> "Endpoint":
    from fewstep.endpoint import Endpoint

    if url is None or model is None:
        missing = "--endpoint" if url is None else "--model"
        raise RecipeError("is missing", field=missing, hint="or look at it first with --dry-run")
    key = os.environ.get(key_env)
    return Endpoint(url, model, key=key, key_name=key_env, timeout=timeout)


def _kind(instructions: bool) -> "Kind":
    return "instruction" if instructions else "prompt"


def _specs(paths: list[Path] | None, instructions: bool) -> "list[Spec]":
    from fewstep.prompts.spec import load_spec

    specs = [load_spec(path) for path in paths or []]
    for spec, path in zip(specs, paths or []):
        if spec.kind != _kind(instructions):
            raise RecipeError(f"is of kind {spec.kind}", field=f"--spec {path}")
    return specs


@contextmanager
def _appending(out: Path, kept: int) -> "Iterator[PoolFile]":
    """The pool, which had `kept` rows when it was read."""
    from fewstep.prompts.pool import PoolFile

    pool = PoolFile(out, kept)
    try:
        yield pool
    except KeyboardInterrupt:
        raise Interrupted(f"stopped by you; {out} is kept, the same command goes on") from None
    finally:
        pool.close()


def _ticker(kept: int) -> Callable[[int], None]:
    """A line of progress, at most every 5 seconds."""
    begun = last = time.monotonic()

    def tell(written: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > 5:
            last = now
            typer.echo(f"{kept + written:,} rows, {written / (now - begun):.1f}/s")

    return tell
