"""The pipelines of a recipe's `model`, opened when they are needed and only in the parts that are.

Encoders and networks are never in memory together: prompts are encoded first, and kept.
"""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from fewstep.core.types import Task
from fewstep.errors import DataError
from fewstep.models.families.contract import Family
from fewstep.models.families.encoders import open_encoders
from fewstep.models.families.open import open_family, read_index, read_kind
from fewstep.models.families.qwen_image_21 import QwenImage21
from fewstep.models.foreign import loading
from fewstep.recipe.families import BASE, EDIT, PIPELINES
from fewstep.recipe.schema import Model

Place = Literal["base", "edit"]


@dataclass
class Pipelines:
    """`base` is the pipeline in model.path, `edit` the one in model.edit_path."""

    model: Model
    dtype: torch.dtype
    device: torch.device
    load_on: torch.device | None = None
    """Where networks wait that are split over several devices; None = on the device."""
    _open: dict[Place, Family] = field(default_factory=dict)

    def folder(self, place: Place) -> Path:
        path = self.model.path if place == BASE else self.model.edit_path
        assert path is not None, "refused by the plan"
        return Path(path).expanduser()

    @cached_property
    def places(self) -> dict[Task, Place]:
        """Which pipeline reads the prompts of a task."""
        found: dict[Task, Place] = {}
        known = PIPELINES[self.model.family]
        places: tuple[Place, ...] = (BASE, EDIT) if self.model.edit_path else (BASE,)
        for place in places:  # the second folder is given for the sake of editing
            found |= dict.fromkeys(known[read_kind(self.folder(place))], place)
        return found

    def family(self, place: Place) -> Family:
        """Network and autoencoder, without text encoders."""
        if place not in self._open:
            folder = self.folder(place)
            parts: dict[str, Any] = {
                name: None for name in read_index(folder) if name.startswith("text_encoder")
            }
            for other in self._open.values():
                parts["vae"] = other.pipe.vae
            first = str(self.load_on or self.device)
            opened = open_family(folder, device=first, dtype=self.dtype, components=parts)
            opened.pipe.vae.to(self.device)
            self._open[place] = self._configured(opened)
        return self._open[place]

    def encoders(self, place: Place) -> Family:
        """Text encoders and autoencoder, without the network; the caller lets go of them."""
        opened = open_encoders(self.folder(place), device=str(self.device), dtype=self.dtype)
        return self._configured(opened)

    def _configured(self, family: Family) -> Family:
        if isinstance(family, QwenImage21) and self.model.source_resolution is not None:
            family.resolution = self.model.source_resolution
        return family

    def network(self, weights: str) -> Any:
        """The transformer that a teacher's `weights` name."""
        if weights in (BASE, EDIT):
            return self.family(weights).pipe.transformer
        folder = network_folder(Path(weights).expanduser())
        kind = type(self.family(BASE).pipe.transformer)
        with loading(folder, what="teacher"):
            network, info = kind.from_pretrained(
                folder,
                torch_dtype=self.dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
        if info["missing_keys"]:
            raise DataError(f"teacher: {folder} lacks {sorted(info['missing_keys'])[0]}")
        return network.to(self.load_on or self.device)


def network_folder(path: Path) -> Path:
    """Of a pipeline, or the folder itself where it is that of a network."""
    inner = path / "transformer"
    return inner if inner.is_dir() else path
