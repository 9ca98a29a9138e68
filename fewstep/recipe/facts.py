"""What a plan has to know beyond the recipe: the machine, the size of the model, what lies on disk.

`gather_facts` alone looks at the disk beyond the recipe; `make_plan` is pure given its facts.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from fewstep.recipe.available import count_available, find_image_problems
from fewstep.recipe.families import (
    BASE,
    EDIT,
    TOKEN,
    PipelineFacts,
    lora_problem,
    read_pipeline,
)
from fewstep.recipe.schema import FolderSource, LoraCast, PromptSource, Recipe

BUNDLED_WEIGHTS = Path(__file__).parent.parent / "lab" / "weights"
BUNDLED = "bundled:"

# Measured on the lab model: bf16 autocast sustains about 100 GFLOP/s on one core of a laptop.
FLOPS_PER_CORE = 100e9


@dataclass(frozen=True)
class Machine:
    name: str = "cpu"
    devices: int = 1
    flops: float = 2 * FLOPS_PER_CORE
    """Floating-point operations per second that one device sustains in training."""
    memory: int = 8 * 2**30
    """Bytes on one device."""


@dataclass(frozen=True)
class Passes:
    """Of a real model at one task, as `models.families.size` has measured: FLOPs of a sample, and
    bytes of a micro-batch beyond weights, inputs and the gradients of parameters."""

    tokens: int
    """Length of the joint sequence."""
    teacher_flop: float
    """Forwards, without adapters."""
    student_flop: float
    """Forwards, with the adapter."""
    training_flop: float
    """Forwards and backwards, with what checkpointing computes again."""
    forward_bytes: int
    """Largest during a forward pass without gradient."""
    kept_bytes: int
    """From the forward pass to the backward pass."""
    training_bytes: int
    """Largest during both."""
    decoder_bytes: int
    """Largest while the autoencoder makes one image."""


@dataclass(frozen=True)
class ModelSize:
    params: int
    image_tokens: int
    text_tokens: int
    source_tokens: int
    width: int = 256
    depth: int = 6
    trained: int | None = None
    """Parameters that student and fake score have of their own; None = all."""
    networks: int | None = None
    """Frozen networks, where teachers and LoRA roles share them; None = one a teacher."""
    autoencoder: int = 0
    """Parameters of the autoencoder of a real model."""
    loras: int = 0
    """Parameters of the teachers' LoRAs."""
    block: int = 0
    """Bytes of the largest block of a network in training, with its adapters; 0 = not measured."""
    outside: int = 0
    """Bytes of such a network outside its blocks."""
    passes: Mapping[str, Passes] = field(default_factory=dict)
    """By task; empty where nothing was measured, and the plan estimates."""


LAB_MODEL = ModelSize(params=5_400_000, image_tokens=16, text_tokens=24, source_tokens=16)


@dataclass(frozen=True)
class Facts:
    bundled: frozenset[str] = frozenset()
    """Names that `bundled:<name>` may take."""
    weights_problems: Mapping[str, str] = field(default_factory=dict)
    """By teacher: what is wrong with its weights file; absent when nothing is."""
    source_missing: bool = False
    """The folder of the data source is not there."""
    available: Mapping[str, int] = field(default_factory=dict)
    """By pool: the number of prompts at hand, where known."""
    image_problems: tuple[str, ...] = ()
    """What rows of prompts name that is not there, and which name nothing that is needed."""
    model: ModelSize = LAB_MODEL
    pipelines: Mapping[str, PipelineFacts] = field(default_factory=dict)
    """Of a real model: what lies in model.path (`base`), in model.edit_path (`edit`), and in every
    other folder that a teacher's `weights` name."""
    lora_problems: Mapping[str, str] = field(default_factory=dict)
    """By teacher: what is wrong with its LoRA file; absent when nothing is."""
    notes: tuple[str, ...] = ()
    """What a reader of the plan has to know about these facts."""


def local_machine(devices: int = 1) -> Machine:
    """This computer's CPU. Accelerators are described by `run`, which may import torch."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(
        name=f"cpu, {cores} cores",
        devices=devices,
        flops=cores * FLOPS_PER_CORE / devices,
        memory=memory // devices,
    )


def gather_facts(recipe: Recipe) -> Facts:
    """Look at the disk: bundled weights, headers of weights files, the data folder."""
    if recipe.model.is_real:
        return _real_facts(recipe)
    files = BUNDLED_WEIGHTS.glob("*.safetensors")
    bundled = frozenset(file.stem for file in files if read_model_size(file).model)
    problems: dict[str, str] = {}
    model = LAB_MODEL
    for name, teacher in recipe.teachers.items():
        if teacher.weights.startswith(BUNDLED) and teacher.weights[len(BUNDLED) :] not in bundled:
            continue  # the plan refuses the name itself
        header = read_model_size(weights_path(teacher.weights))
        if header.model is None:
            problems[name] = header.problem
        elif name == recipe.student.init:
            model = header.model
    source = recipe.data.source
    missing = isinstance(source, FolderSource) and not _exists(source.path)
    return Facts(
        bundled=bundled,
        weights_problems=problems,
        source_missing=missing,
        available=count_available(recipe),
        model=model,
    )


TEXT_TOKENS = 256
"""Of a prompt to a real model, for estimates."""


def _real_facts(recipe: Recipe) -> Facts:
    model, source = recipe.model, recipe.data.source
    named = {BASE: model.path, EDIT: model.edit_path}
    asked = {teacher.weights for teacher in recipe.teachers.values()} - set(named)
    folders = {name: path for name, path in named.items() if path} | {w: w for w in asked}
    found = {name: read_pipeline(Path(path).expanduser()) for name, path in folders.items()}
    nothing = PipelineFacts(problem="nothing")
    loras = {
        name: lora_problem(Path(teacher.lora).expanduser(), found.get(teacher.weights, nothing))
        for name, teacher in recipe.teachers.items()
        if teacher.lora and not found.get(teacher.weights, nothing).problem
    }
    init = recipe.teachers.get(recipe.student.init)
    own = found.get(init.weights if init else BASE, nothing)
    side = TOKEN.get(model.family, 16)
    used = {teacher.weights for teacher in recipe.teachers.values()}
    spec = model.roles
    size = ModelSize(
        params=own.params,
        image_tokens=model.size[0] * model.size[1] // side**2,
        text_tokens=TEXT_TOKENS,
        source_tokens=(model.source_resolution or 1024) ** 2 // side**2,
        width=own.width,
        depth=own.depth,
        trained=own.lora_params(spec.rank) if isinstance(spec, LoraCast) else own.params,
        networks=len(used),
    )
    return Facts(
        source_missing=isinstance(source, PromptSource) and not _exists(source.path),
        available=count_available(recipe),
        image_problems=find_image_problems(recipe),
        model=size,
        pipelines=found,
        lora_problems={name: problem for name, problem in loras.items() if problem},
    )


def weights_path(weights: str) -> Path:
    """Where the weights of `bundled:<name>` or of a path lie."""
    if weights.startswith(BUNDLED):
        return BUNDLED_WEIGHTS / f"{weights[len(BUNDLED) :]}.safetensors"
    return Path(weights).expanduser()


class WeightsHeader(NamedTuple):
    model: ModelSize | None
    problem: str = ""
    """Why there is no model."""


def read_model_size(path: Path) -> WeightsHeader:
    """The size of a model written by fewstep, from the header of its .safetensors file alone."""
    if not path.is_file():
        return WeightsHeader(None, f"there is no file {path}")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            return WeightsHeader(None, f"{path} is no .safetensors file, or truncated")
        try:
            header = json.loads(file.read(length))
            about = header.pop("__metadata__", {})
            ends = [entry["data_offsets"][1] for entry in header.values()]
            params = sum(math.prod(entry["shape"]) for entry in header.values())
        except (ValueError, AttributeError, KeyError, TypeError):
            return WeightsHeader(None, f"{path} is no .safetensors file: its header is damaged")
    if size != 8 + length + max(ends, default=0):
        expected = 8 + length + max(ends, default=0)
        return WeightsHeader(None, f"{path} is truncated: {size} bytes of {expected}")
    config = json.loads(about.get("config", "{}"))
    if not {"grid", "patch", "width", "depth", "max_text"} <= config.keys():
        return WeightsHeader(None, f"{path} holds no teacher written by `fewstep teach`")
    image_tokens = (config["grid"] // config["patch"]) ** 2
    return WeightsHeader(
        ModelSize(
            params=params,
            image_tokens=image_tokens,
            text_tokens=config["max_text"],
            source_tokens=image_tokens,
            width=config["width"],
            depth=config["depth"],
        )
    )


def _exists(path: str) -> bool:
    is_pattern = any(sign in path for sign in "*?[{")
    return is_pattern or Path(path).expanduser().exists()
