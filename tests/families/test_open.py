"""A folder becomes a family, or a message names what is wrong with it and what would work."""

import builtins
import json
from pathlib import Path

import pytest
import torch

from fewstep.errors import DataError
from fewstep.models.families.open import adapt, open_family
from fewstep.models.families.playback import play

from .fixtures import (
    LONG,
    SHORT,
    SIZE,
    apart,
    diffusers,
    qwen_image,
    qwen_image_edit,
    scheduler,
    sources,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen") / "model"
    qwen_image("static").save_pretrained(path)
    return path


def copy_of(folder: Path, to: Path) -> Path:
    """A folder of links, so that one thing in it can be broken."""
    to.mkdir()
    for item in folder.iterdir():
        (to / item.name).symlink_to(item)
    return to


def _latents(adapter, images=()) -> torch.Tensor:
    cond = adapter.encode([SHORT, LONG], images, size=SIZE)
    x = adapter.noise(2, SIZE, torch.Generator().manual_seed(0))
    return play(adapter, x, cond, adapter.sigmas(2, SIZE), scale=4.0)


def test_a_stored_pipeline_opens_as_what_was_stored(folder: Path) -> None:
    opened = open_family(folder)
    assert opened.tasks == ("t2i",)
    assert not any(p.requires_grad for p in opened.pipe.transformer.parameters())
    assert apart(_latents(opened), _latents(adapt(qwen_image("static")))) == 0.0
    half = open_family(folder, dtype=torch.bfloat16)
    assert half.noise(1, SIZE, torch.Generator()).dtype == torch.bfloat16


def test_components_are_shared_between_pipelines(tmp_path: Path) -> None:
    """Also how a processor gets in whose own loading needs torchvision."""
    edit = qwen_image_edit("static")
    expected, processor = _latents(adapt(edit), sources()), edit.processor
    edit.register_modules(processor=None)
    edit.save_pretrained(tmp_path / "edit")
    index = json.loads((tmp_path / "edit/model_index.json").read_text())
    index["processor"] = ["transformers", "Qwen2VLProcessor"]
    (tmp_path / "edit/model_index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="lacks the folder processor"):
        open_family(tmp_path / "edit")
    shared = {"processor": processor, "text_encoder": edit.text_encoder}
    opened = open_family(tmp_path / "edit", components=shared)
    assert opened.pipe.text_encoder is edit.text_encoder
    assert apart(_latents(opened, sources()), expected) == 0.0


def test_unsupported_pipelines_are_named_with_what_is_supported(folder, tmp_path) -> None:
    broken = copy_of(folder, tmp_path / "other")
    (broken / "model_index.json").unlink()
    (broken / "model_index.json").write_text('{"_class_name": "QwenImageEditPipeline"}')
    with pytest.raises(DataError, match=r"QwenImageEditPipeline.*QwenImageEditPlusPipeline"):
        open_family(broken)


def test_missing_folders_are_named(folder: Path, tmp_path: Path) -> None:
    broken = copy_of(folder, tmp_path / "partial")
    (broken / "vae").unlink()
    with pytest.raises(DataError, match="lacks the folder vae"):
        open_family(broken)
    (broken / "tokenizer").unlink()
    with pytest.raises(DataError, match=r"lacks the folders .*vae"):
        open_family(broken)


def test_a_wrong_folder_is_recognised(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        open_family(tmp_path / "nothing")
    with pytest.raises(DataError, match="one component of a pipeline"):
        open_family(folder / "transformer")
    with pytest.raises(DataError, match=r"did you mean .*model\?"):
        open_family(folder.parent)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        open_family(tmp_path)


def test_damaged_weights_are_named(folder: Path, tmp_path: Path) -> None:
    broken = copy_of(folder, tmp_path / "damaged")
    (broken / "vae").unlink()
    (broken / "vae").mkdir()
    (broken / "vae/config.json").write_bytes((folder / "vae/config.json").read_bytes())
    (broken / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"torn")
    with pytest.raises(DataError, match="cannot be loaded"):
        open_family(broken)


def test_without_diffusers_the_extra_is_named(folder: Path, monkeypatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args, **kwargs):
        if name == "diffusers":
            raise ModuleNotFoundError("No module named 'diffusers'", name="diffusers")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(DataError, match=r"fewstep\[diffusers\]"):
        open_family(folder)


def test_another_scheduler_can_be_given(tmp_path: Path) -> None:
    """How released SANA pipelines, which come with a multistep solver, are opened."""
    pipe = qwen_image("static")
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler()
    pipe.save_pretrained(tmp_path / "solver")
    with pytest.raises(DataError, match="DPMSolverMultistepScheduler"):
        open_family(tmp_path / "solver")
    given = {"scheduler": scheduler("static")}
    opened = open_family(tmp_path / "solver", components=given)
    assert opened.sigmas(4, SIZE) == pytest.approx((1, 0.9, 0.75, 0.5, 0))
