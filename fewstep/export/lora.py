"""A student's low-rank update with its scale folded in, by the module of the network it changes.

After folding the update of a weight is up @ down and nothing else, so that a reader which ignores
alpha, or takes a missing one for the rank, is right.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fewstep.errors import CheckpointError, DiskError

DOWN, UP = ".lora_A.weight", ".lora_B.weight"
"""What follows the name of a module, as peft writes it."""
DIFFUSERS = "transformer."
"""The prefix under which pipelines of diffusers look for the LoRA of their transformer."""


class Factors(NamedTuple):
    """W + up @ down."""

    down: Float[Tensor, "r i"]
    up: Float[Tensor, "o r"]


Lora = Mapping[str, Factors]
"""By module of the transformer, such as transformer_blocks.0.attn.to_q."""


def fold(tensors: Mapping[str, Tensor], *, alpha: float, where: str) -> dict[str, Factors]:
    """peft's tensors of one adapter, with alpha / r multiplied into B.

    CheckpointError for a tensor that is no part of a LoRA on a linear layer.
    """
    lora = {}
    for name in tensors:
        if not name.endswith((DOWN, UP)):
            raise CheckpointError(
                f"{where}: tensor {name} is no part of a LoRA ({DOWN}, {UP}); only those, without "
                "biases or magnitudes, can be exported"
            )
    for module in modules_of(tensors):
        down, up = tensors.get(module + DOWN), tensors.get(module + UP)
        if down is None or up is None:
            missing = DOWN if down is None else UP
            raise CheckpointError(f"{where}: tensor {module}{missing} is missing; copy it again")
        if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
            raise CheckpointError(
                f"{where}: {module} has factors {tuple(up.shape)} and {tuple(down.shape)}, which "
                "are no LoRA of a linear layer; leave this module out of the LoRA's targets"
            )
        lora[module] = Factors(down, (up.float() * (alpha / down.shape[0])).to(up.dtype))
    if not lora:
        raise CheckpointError(f"{where}: holds no LoRA")
    return lora


def modules_of(names: Iterable[str]) -> list[str]:
    """Each module once, in the order of the file."""
    return list(dict.fromkeys(n.removesuffix(DOWN).removesuffix(UP) for n in names))


def delta(factors: Factors) -> Float[Tensor, "o i"]:
    """The update of a weight, in float32."""
    return factors.up.float() @ factors.down.float()


def save_lora(
    lora: Lora, path: Path, *, prefix: str = DIFFUSERS, dtype: torch.dtype | None = None
) -> None:
    """One file of {prefix}{module}.lora_{A,B}.weight, without alphas: their absence means r."""
    tensors = {}
    for module, factors in lora.items():
        for suffix, tensor in ((DOWN, factors.down), (UP, factors.up)):
            tensors[prefix + module + suffix] = tensor.to(dtype or tensor.dtype).contiguous()
    save_tensors(tensors, path)


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """A safetensors file. DiskError where it cannot be written."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except (SafetensorError, OSError) as error:
        raise DiskError(f"{path}: could not be written ({error}); is the disk full?") from None
