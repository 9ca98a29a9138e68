"""Trajectories of the teacher as training data: made when first needed, then gone over again.

They are part of the checkpoint, so that a resumed run has the same bits and walks nothing twice.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor


class Walk(NamedTuple):
    """One micro-batch: sample i is entry `indices[i]` of the pool `pools[i]`."""

    pools: tuple[str, ...]
    indices: list[int]
    states: Tensor
    """The teacher's states at t_0 .. t_K [K + 1, b, ...], float32, on the CPU."""


class Walks:
    """The first `count` micro-batches, over and over."""

    def __init__(self, count: int) -> None:
        self.count, self.position = count, 0
        self.made: list[Walk] = []

    def next(self, make: Callable[[], Walk]) -> Walk:
        if self.position < self.count:
            self.made.append(make())
        walk = self.made[self.position % self.count]
        self.position += 1
        return walk

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "made": [tuple(walk) for walk in self.made]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]
        self.made = [Walk(*walk) for walk in state["made"]]
