"""What tests run as several processes, `torchrun ... -m tests.ranked JOB FOLDER`, and the starting.

Each job is a function of the ranks and a folder.
"""

import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from fewstep.cli import guarded
from fewstep.models.cast import make_cast
from fewstep.recipe.facts import Facts, Machine
from fewstep.recipe.plan import make_plan
from fewstep.train import loop
from fewstep.train.ranks import ALONE, Ranks, joined

from .test_loop import SHAPE, tiny_model, tiny_pool, tiny_recipe
from .test_methods import KINDS

T = TypeVar("T")
ROOT = Path(__file__).parents[1]
OBJECTIVES = KINDS | {
    "anchored": {"kind": "dmd", "anchor": {"weight": 0.5, "steps": 2, "of": 6}, "fake_updates": 1}
}
OPTIM = {"student": {"lr": 1e-3}, "fake": {"lr": 1e-3}, "warmup": 0}


def start(kind: str, ranks: Ranks = ALONE, *, micro_batch: int = 4) -> loop.Distillation:
    """Micro-batches of 8 over all devices, two to an update, if `micro_batch` is 8 / world."""
    recipe = tiny_recipe(
        objective=OBJECTIVES[kind],
        precision="fp32",
        optim=OPTIM,
        ema={"decay": 0.5},
        budget={"updates": 4, "batch": 16, "micro_batch": micro_batch},
        log={"save_every": 2},
    )
    machine = Machine(devices=ranks.world)
    plan = make_plan(recipe, machine, Facts(bundled=frozenset({"base", "text"})))
    cast = make_cast(tiny_model(0), {"base": tiny_model(0), "text": tiny_model(1)})
    pools = {}
    for seed, (name, pool) in enumerate(recipe.data.pools.items()):
        target = torch.randn(24, *SHAPE, generator=torch.Generator().manual_seed(100 + seed)).half()
        pools[name] = replace(tiny_pool(pool.task, pool.category, seed), target=target)
    return loop.Distillation(cast, pools, recipe, plan, SHAPE, ranks)


def distil(d: loop.Distillation, out: Path) -> None:
    out.mkdir(exist_ok=True)
    loop.distil(d, out, on_step=lambda step, metrics: None, on_sample=lambda step: None)


# --- jobs -----------------------------------------------------------------------------------------


def every_objective(ranks: Ranks, out: Path) -> None:
    for kind in OBJECTIVES:
        with ranks.folder(out / kind) as own:
            distil(start(kind, ranks), own)


def not_finite_on_one(ranks: Ranks, out: Path) -> None:
    d = start("dmd", ranks)
    if ranks.rank == 1:
        with torch.no_grad():
            next(d.cast.fake.parameters()).fill_(torch.inf)
    with ranks.folder(out) as own:
        distil(d, own)


def other_weights_on_one(ranks: Ranks, out: Path) -> None:
    d = start("dmd", ranks)
    if ranks.rank == 1:
        with torch.no_grad():
            next(d.cast.student.parameters()).view(-1)[0] += 1e-4
    with ranks.folder(out) as own:
        distil(d, own)


# --- starting them --------------------------------------------------------------------------------


def torchrun(*arguments: object, ranks: int = 2) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [sys.executable, *launcher, "-m", *map(str, arguments)]


def environment() -> dict[str, str]:
    """Of a process that finds this checkout's package before any other."""
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return os.environ | own


def run_job(job: str, out: Path, *, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    out.mkdir(exist_ok=True)
    command = torchrun("tests.ranked", job, out, ranks=ranks)
    return subprocess.run(
        command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def forked(job: Callable[[Ranks], T], world: int = 2) -> list[T]:
    """What `job` returns in each of a few forks of this process, which start at once. They cannot
    call `backward` (torch forbids it after a fork)."""
    context = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    pipes = [context.Pipe(duplex=False) for _ in range(world)]

    def child(rank: int) -> None:
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""}
        os.environ.update(shared | own)
        with joined(os.environ) as ranks:
            result = job(ranks)
        pipes[rank][1].send(result)

    children = [context.Process(target=child, args=(rank,)) for rank in range(world)]
    for process in children:
        process.start()
    for process in children:
        process.join(50)
        process.kill()
    assert [process.exitcode for process in children] == [0] * world
    return [receive.recv() for receive, _ in pipes]


def main() -> None:
    job, out = sys.argv[1:]
    torch.set_num_threads(1)

    def do() -> None:
        with joined(os.environ) as ranks:
            globals()[job](ranks, Path(out))

    sys.exit(guarded(do))


if __name__ == "__main__":
    main()
