"""A student -> a folder of files: whole, or not at all."""

import hashlib
import shutil
from pathlib import Path

import torch

from fewstep.errors import RecipeError, RunError, did_you_mean
from fewstep.export import comfyui
from fewstep.export.base import licence_of
from fewstep.export.card import card
from fewstep.export.checkpoint import write_pipeline, write_scheduler
from fewstep.export.lora import save_lora
from fewstep.export.schedule import Playback, playback_of
from fewstep.export.student import COMFYUI_FILE, LORA_FILE, History, Student
from fewstep.export.usage import CAN

TARGETS = ("diffusers", "lora", "comfyui")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def export(
    student: Student, history: History, out: Path, *, to: str, dtype: str | None = None
) -> Playback:
    """`to` is "diffusers" (a whole pipeline), "lora" or "comfyui" (one file each).

    `dtype` None keeps the precision of the base's weights, or of the LoRA. All refusals come
    before the first file; a folder that could not be finished is removed.
    """
    check_request(to, dtype, out)
    if to != "diffusers" and not student.lora:
        raise RecipeError(
            "this student was trained whole, so there is no LoRA to export",
            field="--to",
            hint="use --to diffusers",
        )
    for task in student.tasks:
        if task not in CAN[student.base.pipeline] and student.companion is None:
            raise RunError(
                f"student {student.name} was trained for {task}, which a {student.base.pipeline} "
                "alone does not do, and its recipe names no second pipeline (model.path, "
                "model.edit_path)"
            )
    if to == "comfyui":
        comfyui.check_supported(student.base.pipeline)
        comfyui.rename(student.base.pipeline, student.lora, student.base.config)
    playback = playback_of(student.base.pipeline, student.times)
    scratch = out.with_name(out.name + ".part")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        hashes = _write(student, playback, scratch, to, DTYPES[dtype] if dtype else None)
        licence = licence_of(student.base.path)
        if to != "diffusers":  # a whole pipeline has taken them along
            for file in licence.files:
                shutil.copyfile(file, scratch / file.name)
        text = card(student, history, playback, licence, to=to, folder=out.name, hashes=hashes)
        (scratch / "README.md").write_text(text)
        if out.exists():
            out.rmdir()
        scratch.replace(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return playback


def check_request(to: str, dtype: str | None, out: Path) -> None:
    """RecipeError for a target or precision that does not exist, RunError for a folder in use."""
    if to not in TARGETS:
        raise RecipeError(f"{to!r} is no target", field="--to", hint=did_you_mean(to, TARGETS))
    if dtype is not None and dtype not in DTYPES:
        raise RecipeError(
            f"{dtype!r} is no precision", field="--dtype", hint=did_you_mean(dtype, DTYPES)
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} exists and is not empty; choose another --out")


def _write(
    student: Student, playback: Playback, out: Path, to: str, dtype: torch.dtype | None
) -> dict[str, str]:
    """The files of a target, and the hashes of those that are the student's alone."""
    if to == "diffusers":
        write_pipeline(student, playback, out, dtype=dtype)
        return {}
    if to == "lora":
        save_lora(student.lora, out / LORA_FILE, dtype=dtype)
        write_scheduler(playback, out)
        return {LORA_FILE: sha256(out / LORA_FILE)}
    native = comfyui.rename(student.base.pipeline, student.lora, student.base.config)
    save_lora(native, out / COMFYUI_FILE, prefix=comfyui.PREFIX, dtype=dtype)
    return {COMFYUI_FILE: sha256(out / COMFYUI_FILE)}


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
