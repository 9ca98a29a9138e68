"""`fewstep judge run`: what a run has drawn, judged by an endpoint. No network is loaded here."""

import os
from collections.abc import Collection, Mapping
from pathlib import Path

from fewstep.commands.report import report
from fewstep.errors import RecipeError, RunError
from fewstep.evals.judging import judge_drawn
from fewstep.evals.rows import Item, read_rows
from fewstep.judges.endpoint import FIELD, EndpointJudge, open_judge
from fewstep.recipe.load import load_recipe
from fewstep.session import Clock, progress, say


def judge_again(run_dir: Path, *, overrides: Mapping[str, str]) -> None:
    """Judge what a run has drawn; no network is loaded and nothing is drawn."""
    if not (run_dir / "eval" / "rows.jsonl").is_file():
        raise RunError(
            f"run folder {run_dir}: nothing is drawn there yet; `fewstep eval {run_dir}` draws"
        )
    recipe = load_recipe(run_dir / "recipe.yaml", overrides)
    judge = open_judge(recipe.evaluation.judge, os.environ)
    if judge is None:
        raise RecipeError(
            "is missing",
            field=FIELD,
            where=str(run_dir / "recipe.yaml"),
            hint="add it there, or give it with --set evaluation.judge.url=... and so on",
        )
    stopped = judge_run(run_dir, judge)
    report(run_dir, judge=judge.name)
    complain(run_dir, stopped)


def judge_run(run_dir: Path, judge: EndpointJudge, only: Collection[Item] | None = None) -> str:
    """Ask for what has no score yet; why it stopped early, if it did."""
    clock, out = Clock(run_dir), run_dir / "eval"
    count = len(read_rows(out / "rows.jsonl").rows) if only is None else len(only)
    with clock("judge"), progress("judge", count) as advance:
        found = judge_drawn(
            out, judge, only=only, on_progress=lambda done, _total: advance(done, judge.name)
        )
    spent = judge.usage
    tokens = f"{spent.tokens_in:,} + {spent.tokens_out:,} tokens"
    say(
        f"judged by {judge.name}: {found.scored:,} images have a score, {found.left:,} have none; "
        f"{spent.requests:,} requests, {tokens}"
    )
    if found.outdated:
        say(
            f"{found.outdated:,} of them had a score here of another prompt, source or image, or "
            "one that does not say of which: it does not count any more"
        )
    if spent.requests:
        clock.note(judging={"served by": sorted(judge.served), **spent._asdict()})
    return found.stopped


def complain(run_dir: Path, stopped: str) -> None:
    """RunError where the judge stopped; the report says what is there."""
    if stopped:
        raise RunError(
            f"{stopped}\nthe images are kept with the scores so far; `fewstep judge run {run_dir}` "
            "goes on and draws nothing"
        )
