"""`fewstep report` of a run; that of a study is in `study_report`."""

from pathlib import Path

from fewstep.errors import RunError
from fewstep.evals.report import write_report
from fewstep.evals.terminal import summary
from fewstep.session import console, say


def report(run_dir: Path, *, judge: str | None = None) -> None:
    """report.html, results.md and results.csv of an evaluated run, by the judge of the last row
    where none is named."""
    if not run_dir.is_dir():
        raise RunError(
            f"run folder {run_dir}: there is none; `fewstep distill RECIPE --out {run_dir}` makes "
            "it"
        )
    if not any((run_dir / name).exists() for name in ("recipe.yaml", "metrics.jsonl", "eval")):
        raise RunError(
            f"run folder {run_dir}: nothing to report in it; give a folder that `fewstep distill` "
            "wrote"
        )
    paths = write_report(run_dir, judge=judge)
    console.print(summary(paths.run))
    say(f"report: {paths.html}")
