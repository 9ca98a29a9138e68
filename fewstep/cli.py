"""The command line: reads arguments, calls `commands`, and turns mistakes into one clear message.

Nothing heavy is imported here at module level, so that `fewstep --help` answers at once.
"""

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fewstep.errors import FULL, DiskError, FewstepError, Interrupted, RecipeError
from fewstep.prompts.cli import app as prompts


class Commands(TyperGroup):
    """Ctrl-C anywhere is an `Interrupted` with exit code 130, not the parser's "Aborted"."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted("stopped by you") from None


app = typer.Typer(
    name="fewstep",
    cls=Commands,
    help="Distil a multi-step flow-matching image model into a student of a few evaluations.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
lab = typer.Typer(help="The bundled lab.", no_args_is_help=True)
app.add_typer(lab, name="lab")
app.add_typer(prompts, name="prompts")
judge = typer.Typer(help="Judges of real images.", no_args_is_help=True)
app.add_typer(judge, name="judge")

Recipe = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, see recipes/.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a field: --set budget.updates=10."),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="The run folder.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")]


@app.command()
def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    devices: Annotated[int, typer.Option(min=1, help="Number of devices to plan for.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Print what a recipe will do, or why it cannot."""
    from rich.console import Console

    from fewstep.recipe.facts import local_machine
    from fewstep.recipe.load import load_recipe
    from fewstep.recipe.plan import make_plan
    from fewstep.recipe.render import render_plan

    asked = load_recipe(recipe, parse_overrides(overrides))
    if asked.model.is_real:
        from fewstep.real.size import plan_real

        made = plan_real(asked, devices=devices, on_paper=True)
    else:
        made = make_plan(asked, local_machine(devices))
    if as_json:
        typer.echo(made.model_dump_json(indent=2))
    else:
        Console().print(render_plan(made))


@app.command()
def distill(
    recipe: Recipe,
    out: Out,
    overrides: Overrides = None,
    resume: Resume = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
) -> None:
    """Train a few-step student from the recipe's teachers."""
    from fewstep.commands.distill import distill as run_distill

    with keeping_state(out):
        run_distill(
            recipe, out=out, overrides=parse_overrides(overrides), resume=resume, dry_run=dry_run
        )


@app.command()
def sweep(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="See recipes/studies/.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The study's folder (runs/NAME).")
    ] = None,
    overrides: Overrides = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Cells at a time (one per GPU; 1 on a CPU).")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Predict what the study costs and stop.")
    ] = False,
    measure: Annotated[
        bool, typer.Option(help="Time a few updates on this machine for the prediction.")
    ] = True,
    redo: Annotated[
        bool, typer.Option("--redo", help="Delete and rerun cells of other code or recipes.")
    ] = False,
    cell: Annotated[
        int | None, typer.Option(min=0, help="Run this cell alone, for cluster jobs.")
    ] = None,
    emit: Annotated[
        str | None, typer.Option(metavar="slurm|torchrun|shell", help="Print a script instead.")
    ] = None,
) -> None:
    """Run a study: every variant with every seed, each a run of its own; goes on where it was."""
    from fewstep.sweep.command import sweep as run_sweep
    from fewstep.sweep.emit import check_target

    run_sweep(
        study,
        out=out,
        overrides=parse_overrides(overrides),
        environment=os.environ,
        jobs=jobs,
        dry_run=dry_run,
        measure_first=measure,
        redo=redo,
        only=cell,
        target=check_target(emit),
    )


@app.command()
def teach(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A teacher's configuration.")],
    out: Out,
    overrides: Overrides = None,
    resume: Resume = False,
) -> None:
    """Train a multi-step teacher."""
    from fewstep.commands.teach import teach as run_teach

    with keeping_state(out):
        run_teach(config, out=out, overrides=parse_overrides(overrides), resume=resume)


@app.command()
def cache(
    recipe: Recipe,
    overrides: Overrides = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read what is there, and encode damaged files again.")
    ] = False,
    prune: Annotated[
        bool, typer.Option("--prune", help="List and delete what this recipe does not use.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell what is missing and its size, and stop.")
    ] = False,
) -> None:
    """Encode the prompts and source images of a recipe for real models."""
    from fewstep.commands.cache import cache as run_cache

    changes = parse_overrides(overrides)
    run_cache(recipe, overrides=changes, verify=verify, prune=prune, dry_run=dry_run)


@app.command()
def sample(
    weights: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder or weights file.")],
    prompts: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="A prompt; may be repeated.")
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A file with a prompt a line.")] = None,
    source: Annotated[Path | None, typer.Option(help="An image to edit.")] = None,
    instruction: Annotated[str | None, typer.Option(help="What to change in --source.")] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, such as 0,3 or 0-7.")] = "0-3",
    out: Annotated[Path, typer.Option("--out", "-o", help="The image to write.")] = Path(
        "sample.png"
    ),
    model: Annotated[str, typer.Option(help="student, teacher or teacher:<name>.")] = "student",
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps of a teacher.")] = None,
) -> None:
    """Draw a grid of images from a student or a teacher."""
    check_sample_request(prompts, prompt_file, source, instruction)
    from fewstep.commands.sample import sample as run_sample

    run_sample(
        weights,
        prompts=prompts or [],
        prompt_file=prompt_file,
        source=source,
        instruction=instruction,
        seeds=parse_seeds(seeds),
        out=out,
        model=model,
        steps=steps,
    )


@app.command("eval")
def evaluate(run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]) -> None:
    """Score student and teachers on the evaluation split."""
    from fewstep.commands.evaluate import evaluate as run_evaluate

    with keeping_rows(run_dir):
        run_evaluate(run_dir)


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run or study folder.")],
    by: Annotated[
        str | None, typer.Option("--judge", help="Of a run's judges; that of the last row.")
    ] = None,
) -> None:
    """Write report.html, results.md and results.csv from an evaluated run or a study."""
    if (run_dir / "study.json").is_file():
        if by is not None:
            raise RecipeError("is for the report of a run", field="--judge", hint="leave it out")
        from fewstep.study_report.write import write_study_report

        written = write_study_report(run_dir)
        typer.echo(f"verdicts: {written.verdicts}\nreport: {written.html}")
        return
    from fewstep.commands.report import report as run_report

    run_report(run_dir, judge=by)


@app.command()
def recommend(
    studies: Annotated[list[Path], typer.Argument(metavar="STUDY...", help="Study folders.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The recipe to write.")] = Path(
        "recommended.yaml"
    ),
) -> None:
    """Write the recipe that finished studies support, with the evidence as comments."""
    from fewstep.study_report.recommend import recommend as write_recommendation

    typer.echo(f"recipe: {write_recommendation(studies, out)}")


@app.command()
def export(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run's folder.")],
    to: Annotated[
        str,
        typer.Option(help="diffusers (a whole pipeline), lora (diffusers' names) or comfyui."),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The folder to write; RUN/export/TO.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="bf16, fp16 or fp32; else as base or LoRA are stored.")
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="Where the base lies now, if it has moved.")
    ] = None,
) -> None:
    """Write the student for stock tools: diffusers or ComfyUI, with a model card."""
    from fewstep.commands.export import export as run_export

    run_export(run_dir, to=to, out=out, dtype=dtype, base=base)


@lab.command()
def score(
    weights: Annotated[Path, typer.Argument(metavar="WEIGHTS", help="A lab teacher's weights.")],
    per_category: Annotated[int, typer.Option(min=2, help="Cases per category.")] = 24,
    seed: Annotated[int, typer.Option(min=0, help="Of the cases.")] = 1000,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 40,
    train: Annotated[bool, typer.Option("--train", help="Use the training split.")] = False,
) -> None:
    """Judge a lab teacher, category by category."""
    from fewstep.commands.lab import lab_score

    lab_score(weights, per_category=per_category, seed=seed, steps=steps, train=train)


@lab.command()
def words() -> None:
    """Print the words that prompts of the lab may use."""
    from fewstep.commands.lab import lab_words

    lab_words()


@judge.command("run")
def judge_again(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    overrides: Overrides = None,
) -> None:
    """Judge what a run has drawn by evaluation.judge; nothing is drawn or loaded."""
    from fewstep.commands.judge import judge_again as run_judge

    with keeping_rows(run_dir, "judge run"):
        run_judge(run_dir, overrides=parse_overrides(overrides))


@judge.command("check")
def judge_check(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="A recipe of lab or folder, or a run folder.")
    ],
    overrides: Overrides = None,
    per_category: Annotated[int, typer.Option(min=2, help="Originals per category.")] = 24,
    seed: Annotated[int, typer.Option(min=0, help="Of originals and controls.")] = 0,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="JSON with every number.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count the requests, stop.")] = False,
) -> None:
    """Measure a judge: how often it puts a picture above its spoilt copy."""
    from fewstep.commands.judge_check import check_judge

    check_judge(
        source,
        overrides=parse_overrides(overrides),
        per_category=per_category,
        seed=seed,
        out=out,
        dry_run=dry_run,
    )


def main() -> None:
    sys.exit(guarded(app, debug=bool(os.environ.get("FEWSTEP_DEBUG"))))


def guarded(command: Callable[[], object], *, debug: bool = False) -> int:
    """Run a command; a mistake of the user becomes a message on stderr and an exit code.

    With `debug` it keeps its traceback. Mistakes in the arguments are the parser's business.
    """
    try:
        command()
    except FewstepError as error:
        if debug:
            raise
        return _complain(str(error), error.exit_code)
    except OSError as error:
        if debug or error.errno not in FULL | _FORBIDDEN:
            raise
        if error.errno in _FORBIDDEN:
            return _complain(f"{error.filename}: {_FORBIDDEN[error.errno]}", FewstepError.exit_code)
        file = f" while writing {error.filename}" if error.filename else ""
        hint = "; what was saved before is intact: make room, then start again, a run with --resume"
        return _complain(FULL[error.errno] + file + hint, DiskError.exit_code)
    return 0


_FORBIDDEN = {
    errno.EACCES: "you may not open it; choose another place, or change its permissions",
    errno.EROFS: "lies on a disk that can only be read; choose another place",
}


def _complain(message: str, code: int) -> int:
    typer.secho(f"error: {message}", fg=typer.colors.RED, err=True)
    return code


@contextmanager
def keeping_state(out: Path) -> Iterator[None]:
    """Ctrl-C during a run says where the state is and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        states = [out / "checkpoints" / name for name in ("last.pt", "previous.pt")]
        kept = next((state for state in states if state.exists()), None)
        if kept is not None:
            message = f"stopped by you; state kept in {kept}, go on with --resume"
        else:
            message = f"stopped by you before the first checkpoint; nothing to resume in {out}"
        raise Interrupted(message) from None


@contextmanager
def keeping_rows(run_dir: Path, command: str = "eval") -> Iterator[None]:
    """Ctrl-C during an evaluation says that what is scored stays scored."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped by you; what is scored is kept, `fewstep {command} {run_dir}` goes on"
        ) from None


def parse_overrides(overrides: list[str] | None) -> dict[str, str]:
    """["a.b=1"] -> {"a.b": "1"}."""
    parsed: dict[str, str] = {}
    for entry in overrides or []:
        key, equals, value = entry.partition("=")
        if not equals or not key:
            raise RecipeError(
                "is no KEY=VALUE", where=f"--set {entry}", hint="such as --set budget.updates=10"
            )
        if key in parsed:
            raise RecipeError("is set twice", field=key, where=f"--set {entry}", hint="keep one")
        parsed[key] = value
    return parsed


def parse_seeds(text: str) -> list[int]:
    """0,3,8-10 -> [0, 3, 8, 9, 10]."""
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or int(last or first) < int(first):
            raise RecipeError(
                f"{part.strip()!r} is no seed or range", field="--seeds", hint="use 0,3 or 0-7"
            )
        seeds.extend(range(int(first), int(last or first) + 1))
    return seeds


def check_sample_request(
    prompts: list[str] | None,
    prompt_file: Path | None,
    source: Path | None,
    instruction: str | None,
) -> None:
    """An edit is a source and an instruction; everything else is made from prompts."""
    if (source is None) != (instruction is None):
        missing = "--instruction" if instruction is None else "--source"
        raise RecipeError("an edit needs a source and an instruction", hint=f"add {missing}")
    if source is not None and (prompts or prompt_file):
        raise RecipeError(
            "a source image together with prompts", hint="use --instruction for an edit"
        )
    if source is None and not prompts and not prompt_file:
        raise RecipeError("nothing to draw", hint="use --prompt, --prompt-file or --source")


if __name__ == "__main__":
    main()
