"""One recipe's student updates with random weights of real size: peak memory and seconds, measured
and planned. Nothing is loaded: networks are made on the device, conditions are noise.

    python tools/measure_update.py RECIPE --out FILE [--updates N] [--toy]
    python tools/measure_update.py --table FILE...
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fewstep.core.types import Task
from fewstep.models.cast import Cast
from fewstep.models.families.size import example, hollow_family
from fewstep.models.readings import Readings, readings_of
from fewstep.models.roles import FamilyRole, LoraSpec, SharedNetwork, lora_roles
from fewstep.real.size import config_of, plan_real
from fewstep.recipe.load import load_recipe
from fewstep.recipe.plan import Plan
from fewstep.recipe.schema import LoraCast, Recipe
from fewstep.train import loop

TOLERANCE = 0.1
TOY = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
TOY_SIZE, TOY_SOURCE = (64, 96), 64


class NoisePool:
    """Conditions of one task, made of noise: what a network reads, without any encoder."""

    def __init__(self, task: Task, category: str, family: Any, recipe: Recipe, toy: bool) -> None:
        self.task, self.category = task, category
        dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
        size = TOY_SIZE if toy else recipe.model.size
        source = TOY_SOURCE if toy else 1024
        _, _, cond = example(
            family, 1, size, dtype, task=task, source=source, device=torch.device("cpu")
        )
        cond.text.states.normal_()
        if cond.source is not None:
            cond.source.normal_()
        cond = replace(cond, negative=cond.text)
        readers = {"student": cond} | dict.fromkeys(recipe.teachers, cond)
        self.readings = readings_of([readers])

    def __len__(self) -> int:
        return 1024

    def gather(self, pools: "Sequence[NoisePool]", indices: Sequence[int]) -> tuple[Readings, None]:
        return Readings(tuple(row for pool in pools for row in pool.readings.rows)), None


def random_network(kind: str, config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Made on the device, in its precision, never anywhere else."""
    import diffusers

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            network = getattr(diffusers, kind).from_config(dict(config))
    finally:
        torch.set_default_dtype(before)
    return network.to(dtype)


def stage(recipe: Recipe, plan: Plan, device: torch.device, toy: bool) -> loop.Distillation:
    """Student, fake score and teachers as the recipe casts them, and pools of noise."""
    spec = recipe.model.roles
    assert isinstance(spec, LoraCast), "the tool is for adapters"
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    kind, config = config_of(Path(recipe.model.path or ""), "transformer")
    vae_kind, vae_config = config_of(Path(recipe.model.path or ""), "vae")
    if toy:
        config = {**config, **TOY, "axes_dims_rope": (4, 6, 6)}
    network = random_network(kind, config, dtype, device)
    vae = None if toy else random_network(vae_kind, vae_config, dtype, device)
    pipelines = {"QwenImageTransformer2DModel": "QwenImageEditPlusPipeline"}
    family = hollow_family(pipelines.get(kind, "QwenImage21Pipeline"), network, vae)
    shared = SharedNetwork(network)
    alpha = float(spec.rank) if spec.alpha is None else spec.alpha
    student, fake = lora_roles(family, shared, LoraSpec(spec.rank, alpha), seed=recipe.seed)
    teachers = {}
    for name in plan.teachers:
        adapter = None
        if recipe.teachers[name].lora:
            adapter = f"teacher-{name}"
            shared.add_lora(adapter, LoraSpec(spec.rank, alpha), family.lora_targets, seed=1)
            for parameter in shared.parameters_of(adapter).values():
                parameter.data = parameter.data.to(dtype)
                parameter.requires_grad_(False)
        teachers[name] = FamilyRole(family, shared, reader=name, adapter=adapter)
    if spec.checkpointing:
        shared.checkpoint_blocks()
    pools: Any = {
        name: NoisePool(pool.task, pool.category, family, recipe, toy)
        for name, pool in recipe.data.pools.items()
    }
    size = TOY_SIZE if toy else recipe.model.size
    shape = tuple(family.noise_shape(1, size)[1:])
    return loop.Distillation(Cast(student, fake, teachers), pools, recipe, plan, shape)


def measure(path: Path, updates: int, toy: bool) -> dict[str, Any]:
    changes = {"log.probe": "null", "log.sample_seeds": "1", "evaluation.per_category": "1"}
    if toy:
        changes |= {"model.cast.rank": "4", "budget.batch": "2"}
    recipe = load_recipe(path, changes)
    plan = plan_real(recipe, on_paper=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not toy:
        sys.exit("no CUDA device here; --toy tries the commands on a CPU")
    state = stage(recipe, plan, device, toy)
    loop.train_step(state)  # kernels are chosen, optimisers' moments are made
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    norms = [loop.train_step(state)["grad_norm/student"] for _ in range(updates)]
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - begun) / updates
    memory = plan.memory
    return {
        "recipe": str(path.parent.name),
        "toy": toy,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "params": plan.size.params if plan.size else None,
        "planned": None if toy else memory.total - memory.margin,
        "planned_with_margin": None if toy else memory.total,
        "allocated": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "reserved": torch.cuda.max_memory_reserved() if device.type == "cuda" else None,
        "seconds_per_update": seconds,
        "tflop_per_update": plan.cost.flop / plan.updates / 1e12,
        "batch": recipe.budget.batch,
        "grad_norms": norms,
    }


def table(files: list[Path]) -> str:
    rows = [json.loads(file.read_text()) for file in files]
    lines = [
        "| recipe | device | planned, GB | allocated | reserved | gap | s per update | TFLOP/s |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        found = "- | - | -"
        if row["allocated"]:
            gap = row["planned"] / row["allocated"] - 1
            found = (
                f"{row['allocated'] / 1e9:.1f} | {row['reserved'] / 1e9:.1f} | {100 * gap:+.1f} %"
            )
        planned = "-" if row["toy"] else f"{row['planned'] / 1e9:.1f}"
        rate = "-" if row["toy"] else f"{row['tflop_per_update'] / row['seconds_per_update']:.0f}"
        lines.append(
            f"| {row['recipe']}{' (toy)' if row['toy'] else ''} | {row['device']} | "
            f"{planned} | {found} | {row['seconds_per_update']:.2f} | {rate} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        print(table(args.files))
        rows = [json.loads(file.read_text()) for file in args.files]
        gaps = [abs(r["planned"] / r["allocated"] - 1) for r in rows if r["allocated"]]
        sys.exit(1 if any(gap > TOLERANCE for gap in gaps) else 0)
    result = measure(args.files[0], args.updates, args.toy)
    text = json.dumps(result, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
