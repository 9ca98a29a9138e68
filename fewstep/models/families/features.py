"""Hidden states of a transformer half-way, as a discriminator reads them (`objectives.gan`).

The network is run with the first half of its blocks alone, so that the second half costs neither
time nor memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor

from fewstep.models.families.contract import Family, FamilyCondition


def features(
    family: Family, x_t: Tensor, t: Float[Tensor, " b"], cond: FamilyCondition, model: Any = None
) -> Float[Tensor, "b n w"]:
    """Hidden tokens of the target after the first half of the blocks, row by row of the image.

    Those of text and sources are left out. Gradients go through as ever, also where blocks are
    checkpointed or compiled: these stay the same modules.
    """
    network = family.pipe.transformer if model is None else model
    seen: list[Tensor] = []
    last = network.get_submodule(family.trunk.last)
    handle = last.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        with _first_half(network, family.trunk.blocks):
            family.velocity(x_t, t, cond, network)
    finally:
        handle.remove()
    (hidden,) = seen
    return family.trunk.target(hidden, x_t)


def feature_width(network: Any) -> int:
    """Channels of a token between the blocks."""
    config = network.config
    return config.get("dim") or config["num_attention_heads"] * config["attention_head_dim"]


@contextmanager
def _first_half(network: Any, lists: tuple[str, ...]) -> Iterator[None]:
    """Of an odd number of blocks the smaller part."""
    whole = {name: getattr(network, name) for name in lists}
    left = sum(map(len, whole.values())) // 2
    try:
        for name, blocks in whole.items():
            setattr(network, name, blocks[:left])
            left -= min(left, len(blocks))
        yield
    finally:
        for name, blocks in whole.items():
            setattr(network, name, blocks)
