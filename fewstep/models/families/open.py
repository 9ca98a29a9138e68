"""A folder with a diffusers pipeline -> its family, or a refusal that says what would work."""

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from fewstep.errors import DataError, did_you_mean
from fewstep.models.families import qwen_image
from fewstep.models.families.contract import Family
from fewstep.models.families.flux2_klein import Flux2Klein
from fewstep.models.families.qwen_image_21 import QwenImage21
from fewstep.models.families.sana import Sana
from fewstep.models.families.stable_diffusion_3 import StableDiffusion3
from fewstep.models.families.z_image import ZImage
from fewstep.models.foreign import loading

WHAT = "model"

FAMILIES: dict[str, Callable[[Any], Family]] = {
    "QwenImagePipeline": qwen_image.text_to_image,
    "QwenImageEditPlusPipeline": qwen_image.edit_plus,
    "QwenImage21Pipeline": QwenImage21,
    "Flux2KleinPipeline": Flux2Klein,
    "SanaPipeline": Sana,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "ZImagePipeline": ZImage,
}


def open_family(
    path: Path | str,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    components: Mapping[str, Any] | None = None,
) -> Family:
    """The adapter of the pipeline in `path`; `components` are used in place of the stored ones.

    Nothing is fetched: a model is a folder. Components that two pipelines share are loaded once by
    handing those of the first to the second.
    """
    path, components = Path(path), dict(components or {})
    kind = read_kind(path, given=components)
    with loading(path, what=WHAT):
        import diffusers

        pipe = getattr(diffusers, kind).from_pretrained(
            path, dtype=dtype, local_files_only=True, use_safetensors=True, **components
        )
    return adapt(pipe.to(device))


def adapt(pipe: Any) -> Family:
    """The adapter of a pipeline that is already in memory; its weights are frozen."""
    kind = type(pipe).__name__
    if kind not in FAMILIES:
        raise DataError(f"{WHAT}: {kind} is not supported; {did_you_mean(kind, FAMILIES)}")
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    return FAMILIES[kind](pipe)


def read_kind(path: Path, *, given: Collection[str] = ()) -> str:
    """The pipeline class that the folder's model_index.json names. DataError where it is of no
    family, or where a component that it names, and that is not `given`, is missing."""
    index = read_index(path)
    kind = index.get("_class_name")
    if kind not in FAMILIES:
        raise DataError(
            f"{WHAT}: {path} holds a {kind or 'pipeline without _class_name'}, which is not "
            f"supported; {did_you_mean(str(kind), FAMILIES)}"
        )
    _refuse_missing_folders(path, index, given)
    return kind


def read_index(path: Path) -> dict[str, Any]:
    file = path / "model_index.json"
    if not file.is_file():
        found = "does not exist"
        if path.is_dir():
            found = f"has no {file.name}"
            if (path / "config.json").is_file():
                found += " (but a config.json: it is one component of a pipeline)"
            inner = sorted(p.parent for p in path.glob(f"*/{file.name}"))
            found += f"; did you mean {inner[0]}?" if inner else ""
        raise DataError(f"{WHAT}: {path} {found}; give the folder of a whole diffusers pipeline")
    try:
        index = json.loads(file.read_bytes())
    except ValueError as error:
        raise DataError(f"{WHAT}: {file} is not valid JSON ({error}); copy it again") from None
    if not isinstance(index, dict):
        raise DataError(f"{WHAT}: {file} is not a JSON object; copy it again")
    return index


def _refuse_missing_folders(path: Path, index: Mapping[str, Any], given: Collection[str]) -> None:
    """Before a gigabyte is read: every component that the index names is there."""
    needed = [
        name
        for name, entry in index.items()
        if isinstance(entry, list) and len(entry) == 2 and entry[0] is not None
    ]
    missing = [n for n in needed if n not in given and not (path / n).is_dir()]
    if missing:
        raise DataError(
            f"{WHAT}: {path} lacks the folder{'s' if len(missing) > 1 else ''} "
            f"{', '.join(missing)}, which model_index.json names; copy the whole pipeline"
        )
