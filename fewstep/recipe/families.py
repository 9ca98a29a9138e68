"""What a recipe may say of real models: which pipelines make a family, and what lies in a folder.

Only configuration files and headers are read. How a pipeline is run is in `models.families`.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Task = Literal["t2i", "edit"]

PIPELINES: dict[str, dict[str, tuple[Task, ...]]] = {
    "qwen_image": {"QwenImagePipeline": ("t2i",), "QwenImageEditPlusPipeline": ("edit",)},
    "qwen_image_21": {"QwenImage21Pipeline": ("t2i", "edit")},
    "flux2_klein": {"Flux2KleinPipeline": ("t2i", "edit")},
    "stable_diffusion_3": {"StableDiffusion3Pipeline": ("t2i",)},
    "z_image": {"ZImagePipeline": ("t2i",)},
    "sana": {"SanaPipeline": ("t2i",)},
}
"""Pipeline classes of a family, each with what it can do."""

MULTIPLE = {"qwen_image_21": 32, "sana": 32}
"""What height and width must be multiples of; 16 in the other families."""

TOKEN = {"sana": 32}
"""Pixels along a side of one token; 16 in the other families."""

BASE, EDIT = "base", "edit"
"""Names that `teachers.<name>.weights` may take for the networks of model.path, model.edit_path."""


@dataclass(frozen=True)
class PipelineFacts:
    """What a folder with a pipeline, or with the network of one, tells without loading it."""

    kind: str = ""
    """Class of the pipeline; empty where the folder holds a network alone."""
    network: str = ""
    """Class of the network."""
    problem: str = ""
    """Why it cannot be used; the rest is empty then."""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Of the network's tensors."""
    width: int = 0
    depth: int = 0

    @property
    def params(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    def lora_params(self, rank: int) -> int:
        """About how many a LoRA on attention and MLP has."""
        inner = ("attn", "attention", "mlp", "ff", "feed_forward")
        return sum(
            rank * sum(shape)
            for name, shape in self.shapes.items()
            if len(shape) == 2 and any(f".{part}" in name for part in inner)
        )


def read_pipeline(path: Path) -> PipelineFacts:
    """A folder with model_index.json, or one component with config.json."""
    if not path.is_dir():
        state = "is a file, not a folder" if path.exists() else "does not exist"
        return PipelineFacts(problem=f"{path} {state}")
    index = _read(path / "model_index.json")
    kind = str(index.get("_class_name", ""))
    folder = path / "transformer" if kind else path
    missing = [
        name
        for name, entry in index.items()
        if isinstance(entry, list) and len(entry) == 2 and entry[0] and not (path / name).is_dir()
    ]
    if missing:
        return PipelineFacts(problem=f"{path} lacks the folder {missing[0]}, which its index names")
    config = _read(folder / "config.json")
    if "_class_name" not in config:
        return PipelineFacts(
            problem=f"{path} holds no pipeline and no network of one (no model_index.json, and no "
            "config.json with a _class_name)"
        )
    try:
        shapes = read_shapes(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return PipelineFacts(problem=f"{folder} holds damaged weights ({error})")
    if not shapes:
        return PipelineFacts(problem=f"{folder} holds no .safetensors weights")
    heads = config.get("num_attention_heads", 0) * config.get("attention_head_dim", 0)
    depth = config.get("num_layers", config.get("n_layers", 1))
    return PipelineFacts(
        kind=kind,
        network=str(config["_class_name"]),
        shapes=shapes,
        width=heads or config.get("dim", 1),
        depth=depth + config.get("num_single_layers", 0),
    )


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """By tensor, over all .safetensors files of a folder. ValueError for a damaged file."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        shapes |= read_header(file)
    return shapes


def read_header(file: Path) -> dict[str, tuple[int, ...]]:
    """Shapes by tensor of one .safetensors file. ValueError if it is damaged or truncated."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{file.name} is no .safetensors file, or truncated")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != 8 + length + end:
        raise ValueError(f"{file.name} is truncated: {size} bytes of {8 + length + end}")
    return {name: tuple(entry["shape"]) for name, entry in header.items()}


def lora_problem(file: Path, base: PipelineFacts) -> str:
    """What is wrong with a LoRA file for a base, as far as its header shows; empty if nothing.

    Names that are not diffusers' own (`transformer.<module>.lora_A.weight`) are left to the
    pipeline, which converts them when it is loaded.
    """
    if not file.is_file():
        return f"there is no LoRA file {file}"
    try:
        shapes = read_header(file)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{file} cannot be read ({error})"
    if not any("lora" in name for name in shapes):
        return f"{file} holds no LoRA"
    for name, shape in shapes.items():
        for suffix, side in ((".lora_A.weight", 1), (".lora_B.weight", 0)):
            if not (name.startswith("transformer.") and name.endswith(suffix)):
                continue
            module = name.removeprefix("transformer.").removesuffix(suffix)
            own = base.shapes.get(f"{module}.weight")
            if own is None:
                return f"{file} is the LoRA of another base: {module} is not in {base.network}"
            if shape[side] != own[side]:
                return (
                    f"{file} is the LoRA of another base: {module} has {shape[side]} "
                    f"{('outputs', 'inputs')[side]} there and {own[side]} here"
                )
    return ""


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
