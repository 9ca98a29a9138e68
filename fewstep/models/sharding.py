"""One network over several devices: each has a part of every weight and gathers a block to play it.

FSDP2 (`fully_shard`): parameters become DTensors, split along their first dimension, and with them
gradients, moments and averages. What goes on between the devices in training is in `train`.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Shards:
    """The devices over which networks are split."""

    mesh: DeviceMesh
    most: Callable[[int], int]
    """The largest of the numbers that the devices say, each its own, at the same time."""


def shard(network: nn.Module, blocks: Sequence[str], mesh: DeviceMesh) -> None:
    """Split the network where it is, on the devices of `mesh`; `blocks` names its lists of blocks.

    All is gathered for one block, or for what is outside the blocks, and let go of after its use,
    the root too: torch would keep the root gathered until the next backward pass, and what is
    played in between without gradient would not see that the optimiser has moved the weights.
    Every parameter is gathered as it is kept, so that the network computes what it would whole.
    """
    from torch.distributed.fsdp import fully_shard

    options: Any = {"mesh": mesh, "reshard_after_forward": True}
    modules = [block for name in blocks for block in network.get_submodule(name).children()]
    for module in (*modules, network):
        sharded = fully_shard(module, **options)
        # Room that is first made in inference mode, by a sampler, could not be used in training.
        sharded.unshard()
        sharded.reshard()
    # No family changes what the network returns in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")


def gather_for_backward(network: Any, hidden: Tensor) -> None:
    """Before a backward pass from `hidden`, something that a sharded network made on its way.

    What lies outside the blocks is gathered when a gradient comes to what the network returned, and
    from here none does.
    """
    if hidden.requires_grad:
        hidden.register_hook(lambda _: network.unshard())
