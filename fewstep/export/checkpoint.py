"""The student as a whole pipeline: the base with the update merged into its transformer.

One shard is in memory at a time. Everything but the transformer and the scheduler is the base's:
weights are hard links where the disk allows it, small files are copies.
"""

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from fewstep.errors import CheckpointError, DataError
from fewstep.export.base import NETWORK, Entry
from fewstep.export.lora import delta, save_tensors
from fewstep.export.schedule import SCHEDULER, Playback
from fewstep.export.student import Student

SHARD = 5 * 2**30
"""Bytes; what a shard may hold, and so about what memory a merge takes."""
STEM = "diffusion_pytorch_model"
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
"""The precisions that may be merged into and changed; everything else stays as it is."""


def write_pipeline(
    student: Student,
    playback: Playback,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    shard: int = SHARD,
) -> None:
    """A folder for `DiffusionPipeline.from_pretrained`. `dtype` None keeps the base's."""
    base = student.base
    for item in sorted(base.path.iterdir()):
        if item.name in (NETWORK, "scheduler", "model_index.json", "README.md", ".cache"):
            continue
        if item.is_dir():
            _borrow_folder(item, out / item.name)
        else:
            _borrow(item, out / item.name)
    merge(student, out / NETWORK, dtype=dtype, shard=shard)
    write_scheduler(playback, out)
    index = {**base.index, "scheduler": ["diffusers", SCHEDULER]}
    if playback.sample_sigmas is not None:
        index["sample_sigmas"] = list(playback.sample_sigmas)
    write_json(out / "model_index.json", index)


def merge(
    student: Student, out: Path, *, dtype: torch.dtype | None = None, shard: int = SHARD
) -> None:
    """W + up @ down in float32 for every module of the LoRA, in shards of at most `shard` bytes."""
    out.mkdir(parents=True)
    base = student.base
    shutil.copyfile(base.path / NETWORK / "config.json", out / "config.json")
    targets = {name: FLOATS.get(entry.dtype) for name, entry in base.tensors.items()}
    if dtype is not None:
        targets = {name: None if was is None else dtype for name, was in targets.items()}
    sizes = {name: _size(base.tensors[name], target) for name, target in targets.items()}
    shards = plan_shards(sizes, shard)
    names = [f"{STEM}.safetensors"]
    if len(shards) > 1:
        names = [f"{STEM}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, tensors in zip(names, shards, strict=True):
        merged = {name: _merged(student, name, targets[name]) for name in tensors}
        save_tensors(merged, out / file)
    if len(shards) > 1:
        placed = {name: file for file, tensors in zip(names, shards) for name in tensors}
        about = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": placed}
        write_json(out / f"{STEM}.safetensors.index.json", about)


def plan_shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in their order; a tensor larger than the limit gets a shard of its own."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _merged(student: Student, name: str, target: torch.dtype | None) -> torch.Tensor:
    entry = student.weights[name]
    with safe_open(entry.file, framework="pt") as stored:
        weight = stored.get_tensor(name)
    factors = student.lora.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
    if factors is None:
        return weight if target is None else weight.to(target)
    if target is None:
        raise CheckpointError(
            f"{entry.file}: {name} is stored as {entry.dtype}, into which nothing can be merged; "
            "use --to lora, or a base in bf16 or float32"
        )
    return (weight.float() + delta(factors)).to(target)


def _size(entry: Entry, target: torch.dtype | None) -> int:
    """Bytes; where the precision stays as it is and is no common one, an estimate."""
    return math.prod(entry.shape) * (1 if target is None else target.itemsize)


def write_scheduler(playback: Playback, out: Path) -> None:
    """scheduler/scheduler_config.json, by the scheduler's own hand."""
    import diffusers

    getattr(diffusers, SCHEDULER)(**playback.scheduler).save_pretrained(out / "scheduler")


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _borrow_folder(folder: Path, to: Path) -> None:
    to.mkdir()
    for item in sorted(folder.iterdir()):
        if item.is_dir():
            _borrow_folder(item, to / item.name)
        else:
            _borrow(item, to / item.name)


def _borrow(file: Path, to: Path) -> None:
    """A link for weights, which nobody edits in place; a copy for everything else."""
    real = file.resolve()  # downloaded folders are full of symbolic links
    if not real.is_file():
        raise DataError(f"base: {file} links to {real}, which is not there; copy the base again")
    if file.suffix == ".safetensors":
        try:
            os.link(real, to)
        except OSError:
            pass  # another disk, or one without links
        else:
            return
    shutil.copyfile(real, to)
