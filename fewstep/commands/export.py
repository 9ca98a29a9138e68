"""`fewstep export`: a finished student for diffusers or ComfyUI."""

from pathlib import Path

from fewstep.commands.opening import read_run
from fewstep.contestants import student_weights
from fewstep.export import write as exporting
from fewstep.export.run_folder import read_history, read_student
from fewstep.export.schedule import SCHEDULER
from fewstep.session import say


def export(
    run_dir: Path, *, to: str, out: Path | None, dtype: str | None, base: Path | None
) -> None:
    """The finished student as files that stock tools read."""
    out = run_dir / "export" / to if out is None else out
    exporting.check_request(to, dtype, out)
    recipe, plan = read_run(run_dir)
    student = read_student(student_weights(run_dir), recipe, base=base)
    history = read_history(run_dir, recipe, plan)
    playback = exporting.export(student, history, out, to=to, dtype=dtype)
    if playback.sigmas is not None:
        say(f"{SCHEDULER} cannot hold this grid: every call needs sigmas={list(playback.sigmas)}")
    say(f"exported for {to}: {out}, README.md says how to use it")
