"""The processes of one run, one a device: who this one is, and what they tell each other.

torchrun starts them and ends all when one fails. Every rank makes the same draws and keeps its
share (`core.types.Share`): the ranks of a run see what one large device would see.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from fewstep.core.types import Share
from fewstep.errors import FewstepError, RunError
from fewstep.models.cast import Trainable

T = TypeVar("T")

STEP_TIMEOUT = timedelta(minutes=30)
"""For gradients: longer than any update."""
WAIT_TIMEOUT = timedelta(days=2)
"""For words: longer than the lead may encode, draw, write or evaluate."""


class Agreed(RunError):
    """An error that every rank knows of; the lead alone tells the user."""

    def __init__(self, message: str, exit_code: int = RunError.exit_code) -> None:
        self.exit_code = exit_code
        super().__init__(message)


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run; one alone says nothing to anybody."""

    rank: int = 0
    world: int = 1
    words: Any = None
    """The process group for what is not on a GPU: metrics, errors, waiting."""

    @property
    def is_lead(self) -> bool:
        """Whether this rank writes."""
        return self.rank == 0

    @property
    def share(self) -> Share:
        return Share(self.rank, self.world)

    def collect(self, compute: Callable[[], list[T]]) -> list[T]:
        """What `compute` lists, of all ranks in their order, the same on each.

        A FewstepError of any rank stops all of them; in any other they end when torchrun ends them.
        """
        if self.world == 1:
            return compute()
        own: list[T] = []
        problem, code = "", 0
        try:
            own = compute()
        except FewstepError as error:
            problem, code = str(error), error.exit_code
        told: list[Any] = [None] * self.world
        with self._company():
            dist.all_gather_object(told, (own, problem, code), group=self.words)
        for rank, (_, problem, code) in enumerate(told):
            if problem:
                raise Agreed(problem if rank == 0 else f"rank {rank}: {problem}", code)
        return [row for rows, _, _ in told for row in rows]

    def each(self, compute: Callable[[], T]) -> T:
        """`compute` on every rank; an error of any stops all."""
        made: list[T] = []

        def here() -> list[None]:
            made.append(compute())
            return []

        self.collect(here)
        return made[0]

    def most(self, number: int) -> int:
        """The largest of the numbers that the ranks say, each its own."""
        if self.world == 1:
            return number
        largest = torch.tensor(number)
        with self._company():
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.words)
        return int(largest)

    def anywhere(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return bool(self.most(int(flag)))

    def lead_first(self, compute: Callable[[], T]) -> T:
        """`compute` on the lead, then on all others: they find what it has left on the disk."""
        made: list[T] = []

        def turn(mine: bool) -> list[None]:
            if mine:
                made.append(compute())
            return []

        self.collect(lambda: turn(self.is_lead))
        if self.world > 1:
            self.collect(lambda: turn(not self.is_lead))
        return made[0]

    def wait(self) -> None:
        """Until every rank has come here."""
        if self.world > 1:
            with self._company():
                dist.barrier(group=self.words)

    def check_alike(self, what: str, value: Callable[[], object]) -> None:
        """Raises on all ranks where `value` is not the same on each."""
        if self.world == 1:
            return
        found = self.collect(lambda: [value()])
        if any(other != found[0] for other in found):
            raise Agreed(
                f"the ranks do not agree on {what}: {', '.join(map(str, found))}; use one kind of "
                "device and one version of torch, then --resume"
            )

    def average_gradients(self, module: Trainable) -> None:
        """The mean over the ranks in place of each gradient, by one all-reduce in float32.

        A parameter without gradient on every rank keeps none. Of a sharded network the backward
        pass has left the mean already.
        """
        own = [p for p in module.parameters() if not isinstance(p, DTensor)]
        if self.world == 1 or not own:
            return
        present = torch.tensor([float(p.grad is not None) for p in own], device=own[0].device)
        parts = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in own]
        flat = torch.cat([present, *(part.float() for part in parts)])
        with self._company():
            dist.all_reduce(flat)
        present, *means = flat.split([len(own), *(p.numel() for p in own)])
        for p, there, mean in zip(own, present.tolist(), means, strict=True):
            p.grad = (mean / self.world).view_as(p).to(p.dtype) if there else None

    def gather_rows(self, own: Tensor, *, dim: int) -> Tensor:
        """The parts of all ranks behind each other along `dim`, on the CPU."""
        if self.world == 1:
            return own.cpu()
        own = own.cpu().contiguous()
        parts = [torch.empty_like(own) for _ in range(self.world)]
        with self._company():
            dist.all_gather(parts, own, group=self.words)
        return torch.cat(parts, dim)

    @contextmanager
    def folder(self, out: Path) -> Iterator[Path]:
        """Where this rank may write: `out` for the lead, elsewhere a folder that is soon gone."""
        if self.is_lead:
            yield out
        else:
            with TemporaryDirectory(prefix="fewstep-rank-") as scratch:
                yield Path(scratch)

    @contextmanager
    def _company(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # gloo's and NCCL's when a peer is gone, or too late
            raise RunError(
                f"rank {self.rank}: lost the other ranks ({str(error).splitlines()[0]}); what "
                "stopped them is told elsewhere, then go on with --resume"
            ) from None


ALONE = Ranks()


def world_of(environment: Mapping[str, str]) -> int:
    """How many processes torchrun has started; 1 without it."""
    world = environment.get("WORLD_SIZE", "1")
    if not world.isdigit() or world == "0":
        raise RunError(f"WORLD_SIZE={world} is no number of processes; start with torchrun")
    return int(world)


@contextmanager
def joined(environment: Mapping[str, str]) -> Iterator[Ranks]:
    """This process among those that torchrun has started, each on the GPU of its local rank.

    NCCL carries gradients between GPUs, gloo between CPUs. All leave together when all is done; one
    that fails leaves at once, and torchrun ends the others.
    """
    world = world_of(environment)
    if world == 1:
        yield ALONE
        return
    names = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in names if name not in environment]:
        raise RunError(
            f"WORLD_SIZE={world}, but {missing[0]} is not set; start with torchrun (its page is "
            "docs/distributed.md), or unset WORLD_SIZE to train on one device"
        )
    backend = "gloo"
    if torch.cuda.is_available():
        local, gpus = int(environment["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise RunError(
                f"local rank {local}, but this machine shows {gpus} GPUs; use --nproc-per-node "
                f"{gpus} or fewer"
            )
        torch.cuda.set_device(local)  # the device that "cuda" is from here on
        backend = "nccl"
    dist.init_process_group(backend, timeout=STEP_TIMEOUT)
    words = dist.new_group(backend="gloo", timeout=WAIT_TIMEOUT)
    ranks = Ranks(dist.get_rank(), world, words)
    try:
        yield ranks
    except Agreed as error:
        if ranks.is_lead:
            raise
        raise SystemExit(error.exit_code) from None
    ranks.wait()
    dist.destroy_process_group()
