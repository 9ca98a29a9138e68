"""The cells of a study as scripts for a cluster; each line is the command of one cell.

A cell is one process on one device. A script that is started again goes on where it was stopped.
"""

import shlex
import typing
from collections.abc import Sequence
from typing import Literal

from fewstep.errors import RecipeError

Target = Literal["slurm", "torchrun", "shell"]

SLURM = """\
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --array=0-{last}
#SBATCH --output={logs}/%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --ntasks=1
#SBATCH --time={minutes}{gpu}
# {count} cells; the longest is predicted to take {longest}. Add --account and --partition of yours.
# A job that is killed, requeued or submitted again goes on from the cell's last checkpoint.
set -e
cd {cwd}
exec {command} --cell "$SLURM_ARRAY_TASK_ID"
"""

SCRIPT = """\
#!/bin/bash
# {count} cells, one after the other; lines may be spread over machines that share the folder.
# Started again it skips finished cells and goes on from the last checkpoint of an unfinished one.
cd {cwd}
failed=0
{lines}
exit "$failed"
"""


def check_target(name: str | None) -> Target | None:
    """As typed by the user. Raises RecipeError for no such target."""
    for target in typing.get_args(Target):
        if name == target:
            return target
    if name is None:
        return None
    raise RecipeError(
        f"{name!r} is no kind of script", field="--emit", hint="use slurm, torchrun or shell"
    )


def emit(
    target: Target,
    *,
    name: str,
    python: str,
    arguments: Sequence[str],
    cells: Sequence[str],
    longest: float,
    gpu: bool,
    cwd: str,
    logs: str,
) -> str:
    """A script. `arguments` follow `fewstep`; `cells` are names in the order of their indices.

    `longest` is the predicted time of the longest cell in seconds; the script asks for twice that.
    """
    launcher = [python, "-m", "fewstep.cli"]
    if target == "torchrun":
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
        launcher = [python, *torchrun, "-m", "fewstep.cli"]
    command = shlex.join([*launcher, *arguments])
    if target == "slurm":
        return SLURM.format(
            name=shlex.quote(f"fewstep-{name}"),
            last=len(cells) - 1,
            logs=logs,
            minutes=max(10, -(-int(2 * longest) // 60)),
            gpu="\n#SBATCH --gpus-per-task=1" if gpu else "",
            count=len(cells),
            longest=f"{longest:.0f} s",
            cwd=shlex.quote(cwd),
            command=command,
        )
    lines = [f"{command} --cell {index} || failed=1  # {cell}" for index, cell in enumerate(cells)]
    return SCRIPT.format(count=len(cells), cwd=shlex.quote(cwd), lines="\n".join(lines))
