"""Which task, pool and sample come next: exact ratios at every moment, resumable bit for bit.

No images and no torch: this yields names and indices. Every state is a small JSON-able dict.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Generic, TypeVar
from zlib import crc32

import numpy as np

from fewstep.errors import CheckpointError, RecipeError
from fewstep.recipe.schema import Task

Name = TypeVar("Name", bound=str)


class Quota(Generic[Name]):
    """Names in fixed proportions: after any n draws each count is within 1 of n * w / sum(w).

    The quota method of Balinski and Young (1975): among the names that one more draw would leave
    below n * w / sum(w) + 1, take the smallest (count + 1) / w; of equals the one furthest behind,
    then the first. Taking whoever is furthest behind at once is simpler, but breaks the bound from
    six names on (1, 1, 1, 5, 5, 5). All arithmetic is in whole numbers; a float weight means the
    decimal that it prints as.
    """

    def __init__(self, weights: Mapping[Name, int | float]) -> None:
        self.weights = _whole_numbers(weights)
        self.total = sum(self.weights.values())
        self.counts = dict.fromkeys(self.weights, 0)

    @property
    def drawn(self) -> int:
        return sum(self.counts.values())

    def next(self) -> Name:
        n = self.drawn + 1
        behind = {name: n * w - self.counts[name] * self.total for name, w in self.weights.items()}
        eligible = [name for name in self.weights if behind[name] > 0]
        best = min(
            eligible,
            key=lambda name: (Fraction(self.counts[name] + 1, self.weights[name]), -behind[name]),
        )
        self.counts[best] += 1
        return best

    def take(self, n: int) -> tuple[Name, ...]:
        return tuple(self.next() for _ in range(n))

    def state_dict(self) -> dict[str, Any]:
        return {"weights": dict(self.weights), "counts": dict(self.counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if dict(state["weights"]) != self.weights:
            raise CheckpointError(
                f"the checkpoint drew with the weights {dict(state['weights'])}, the recipe says "
                f"{self.weights} (as whole numbers); resume with the old ones or start anew"
            )
        self.counts = {name: int(state["counts"][name]) for name in self.weights}


class PoolCursor:
    """Indices 0 .. size-1, each once an epoch, in an order that depends on (seed, epoch) alone."""

    def __init__(self, size: int, seed: int) -> None:
        assert size > 0 and seed >= 0, (size, seed)
        self.size, self.seed = size, seed
        self.epoch, self.position = 0, 0
        self._order = self._shuffled()

    def _shuffled(self) -> np.ndarray:
        # numpy promises the same raw words in all versions, but not the same `permutation`.
        raw = np.random.Philox(np.random.SeedSequence([self.seed, self.epoch])).random_raw(
            self.size
        )
        return np.argsort(raw, kind="stable").astype(np.int64)

    def take(self, n: int) -> np.ndarray:
        parts = [np.empty(0, np.int64)]
        while n > 0:
            if self.position == self.size:
                self.epoch, self.position = self.epoch + 1, 0
                self._order = self._shuffled()
            part = self._order[self.position : self.position + n]
            self.position += len(part)
            n -= len(part)
            parts.append(part)
        return np.concatenate(parts)

    def state_dict(self) -> dict[str, int]:
        return {
            "size": self.size,
            "seed": self.seed,
            "epoch": self.epoch,
            "position": self.position,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        if (state["size"], state["seed"]) != (self.size, self.seed):
            raise CheckpointError(
                f"the checkpoint's pool has {state['size']} samples and seed {state['seed']}, this "
                f"one {self.size} and {self.seed}; resume with the same data and seed or start anew"
            )
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
        self._order = self._shuffled()


@dataclass(frozen=True)
class Draw:
    """One micro-batch: sample i is entry `indices[i]` of the pool `pools[i]` of `task`."""

    task: Task
    pools: tuple[str, ...]
    indices: np.ndarray


class Mixture:
    """Task by micro-batch, pool by sample, index by epoch; each level exact and resumable.

    With a constant batch size the task ratio is exact in samples too. A name of weight 0 is never
    drawn and may be an empty pool.
    """

    def __init__(
        self,
        task_weights: Mapping[Task, int | float],
        composition: Mapping[Task, Mapping[str, int | float]],
        pool_sizes: Mapping[Task, Mapping[str, int]],
        *,
        seed: int,
    ) -> None:
        self.tasks = Quota(task_weights)
        self.pools: dict[Task, Quota[str]] = {}
        self.cursors: dict[tuple[Task, str], PoolCursor] = {}
        for task in self.tasks.weights:
            if task not in composition:
                known = ", ".join(composition) or "none"
                raise RecipeError(
                    f"the task '{task}' has a share of the mixture but no pools; "
                    f"tasks with pools: {known}"
                )
            self.pools[task] = Quota(composition[task])
            for pool in self.pools[task].weights:
                size = pool_sizes.get(task, {}).get(pool, 0)
                if size < 1:
                    filled = [f"{p} ({n})" for p, n in pool_sizes.get(task, {}).items() if n]
                    raise RecipeError(
                        f"the pool '{pool}' of task '{task}' has weight "
                        f"{composition[task][pool]} but no samples; "
                        f"pools with samples: {', '.join(filled) or 'none'}"
                    )
                # Each pool has its own stream, which does not move when another pool is added.
                own_seed = crc32(f"{task}/{pool}".encode()) + (seed << 32)
                self.cursors[task, pool] = PoolCursor(size, own_seed)

    def next(self, batch_size: int) -> Draw:
        assert batch_size > 0, batch_size
        task = self.tasks.next()
        pools = self.pools[task].take(batch_size)
        indices = [int(self.cursors[task, pool].take(1)[0]) for pool in pools]
        return Draw(task, pools, np.array(indices, np.int64))

    def state_dict(self) -> dict[str, Any]:
        return {
            "tasks": self.tasks.state_dict(),
            "pools": {task: quota.state_dict() for task, quota in self.pools.items()},
            "cursors": {f"{t}/{p}": cursor.state_dict() for (t, p), cursor in self.cursors.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """All or nothing: a refused state leaves the mixture as it was."""
        before = self.state_dict()
        try:
            self._load(state)
        except CheckpointError:
            self._load(before)
            raise

    def _load(self, state: Mapping[str, Any]) -> None:
        self.tasks.load_state_dict(state["tasks"])
        for task, quota in self.pools.items():
            quota.load_state_dict(state["pools"][task])
        for (task, pool), cursor in self.cursors.items():
            cursor.load_state_dict(state["cursors"][f"{task}/{pool}"])


def _whole_numbers(weights: Mapping[Name, int | float]) -> dict[Name, int]:
    """The smallest whole numbers in the same proportion, without the zeros."""
    for name, weight in weights.items():
        if not math.isfinite(weight) or weight < 0:
            raise RecipeError(f"the weight of '{name}' is {weight}; use 0 or a positive number")
    exact = {name: Fraction(str(weight)) for name, weight in weights.items() if weight > 0}
    if not exact:
        raise RecipeError(
            f"the weights {dict(weights)} have nothing above 0; give at least one a share"
        )
    scale = math.lcm(*(w.denominator for w in exact.values()))
    whole = {name: int(w * scale) for name, w in exact.items()}
    divisor = math.gcd(*whole.values())
    return {name: w // divisor for name, w in whole.items()}
