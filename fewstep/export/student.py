"""What an export starts from: a finished student, and what its card tells of how it was made."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fewstep.export.base import Base, Entry
from fewstep.export.lora import Lora
from fewstep.export.schedule import Times

LORA_FILE = "pytorch_lora_weights.safetensors"
"""The name that `load_lora_weights` looks for in a folder."""
COMFYUI_FILE = "comfyui_lora.safetensors"


@dataclass(frozen=True)
class Student:
    """A network on the base of a pipeline, and how it is played."""

    name: str
    base: Base
    weights: Mapping[str, Entry]
    """Where the tensors of its transformer lie: in the base's files, or in the student's own."""
    lora: Lora
    """What is added to them; empty where the student was trained whole."""
    times: Times
    tasks: tuple[str, ...]
    """Of "t2i" and "edit", those it was trained for."""
    size: tuple[int, int]
    """Height and width of the images it was trained on."""
    precision: str
    """bf16 or fp32: that of the network in training."""
    companion: Path | None = None
    """A second pipeline in which the same network does the tasks that the base's class cannot:
    Qwen-Image draws and Qwen-Image-Edit-Plus edits."""
    source_resolution: int = 1024
    """Side of a square with the area to which Qwen-Image 2.1 resizes its sources."""


@dataclass(frozen=True)
class History:
    """How a student came about; every text is Markdown."""

    recipe: str
    """The recipe, as YAML."""
    teachers: tuple[Mapping[str, str], ...] = ()
    """One row a teacher; all have the same columns."""
    data: tuple[Mapping[str, str], ...] = ()
    """One row a pool."""
    evaluation: str = ""
    hashes: Mapping[str, str] = field(default_factory=dict)
    """What decided the student: recipe, data and weights, by name."""
    cost: str = ""
