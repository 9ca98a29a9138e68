"""From `fewstep distill` on a real family to stock diffusers: the run's own images come back."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from torch import Tensor

from fewstep.commands.distill import distill
from fewstep.commands.export import export
from fewstep.commands.opening import open_ensemble, read_run
from fewstep.contestants import NO_GUIDANCE, play_student, sampler, student_weights

from . import stock
from .fixtures import SIZE, apart, qwen_image_21, source
from .folders import save_pipeline, write_prompts

RECIPE = {
    "name": "tiny-21",
    "model": {
        "family": "qwen_image_21",
        "path": "base",
        "size": list(SIZE),
        "source_resolution": 96,
        "cast": {"kind": "lora", "rank": 2, "alpha": 6.0},
    },
    "teachers": {
        "base": {"weights": "base", "tasks": ["t2i", "edit"], "cfg": {"t2i": 1.0, "edit": 1.0}}
    },
    "student": {"init": "base"},
    "data": {
        "source": {"kind": "prompts", "path": "prompts", "cache": "cache"},
        "pools": {
            "scene": {"task": "t2i", "category": "scene", "size": 2},
            "object": {"task": "edit", "category": "object", "size": 2},
        },
        "composition": {"t2i": {"scene": 1}, "edit": {"object": 1}},
        "mixture": {"t2i": 1, "edit": 1},
    },
    "guidance": [{"weights": [{"base": 1.0}]}],
    "objective": {"kind": "dmd", "fake_updates": 1},
    "optim": {"student": {"lr": 0.02}, "fake": {"lr": 0.02}, "warmup": 0},
    "ema": None,
    "budget": {"updates": 2, "batch": 2, "micro_batch": 1},
    "precision": "fp32",
    "log": {"probe": None, "sample_every": 100, "save_every": 100},
    "evaluation": {"per_category": 1, "models": ["student"]},
}
"""The learning rate moves the student far from its base in two updates."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_distilled_student_plays_in_stock_diffusers(kind, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_pipeline(qwen_image_21("static"), tmp_path / "base")
    write_prompts(tmp_path / "prompts")
    source(128, 64, 1).save(tmp_path / "source.png")
    cast = {"kind": "full"} if kind == "full" else RECIPE["model"]["cast"]
    recipe = {**RECIPE, "model": {**RECIPE["model"], "cast": cast}}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    out = tmp_path / "run"
    with stock.tiny_sources(), stock.processors_without_video():
        distill(Path("recipe.yaml"), out=out, overrides={})
        expected = own_latents(out)
        before = own_latents(out, trained=False)
    assert all(apart(a, b) > 0.05 for a, b in zip(expected, before))
    for to in ("lora", "diffusers") if kind == "lora" else ("diffusers",):
        export(out, to=to, out=tmp_path / f"as_{to}", dtype=None, base=None)
        played = stock.play(tmp_path / f"as_{to}")["latents"]
        assert len(played) == len(expected) == 2
        apart_by = [apart(a, b) for a, b in zip(played, expected)]
        assert max(apart_by) <= 1e-5, (apart_by, [e.abs().max() for e in expected])


def own_latents(out: Path, *, trained: bool = True) -> list[Tensor]:
    """What the run itself draws for the prompts and the seed in the card; or its base does."""
    recipe, plan = read_run(out)
    ensemble = open_ensemble(recipe)
    draw = play_student(student_weights(out), recipe, plan, ensemble).draw
    if not trained:
        base = ensemble.teacher("base")
        draw = sampler(base, NO_GUIDANCE, plan.grid, recipe.precision, ensemble.device)
    noise = ensemble.open_domain().noise(0)[None]
    pixels = np.asarray(Image.open("source.png").convert("RGB"))
    drawn = ensemble.open_domain().condition(["a red lighthouse"], None)
    edited = ensemble.open_domain().condition(["make it winter"], [pixels])
    return [draw(noise, drawn, "t2i"), draw(noise, edited, "edit")]
