"""From a run folder to files: grids, folded scales, merged shards, the card, and every refusal.

The base here is a folder with a few tensors; that real pipelines play what is written is held in
tests/families/test_export.py.
"""

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.cli import app, guarded
from fewstep.commands.export import export as run_export
from fewstep.errors import (
    CheckpointError,
    DataError,
    DiskError,
    FewstepError,
    RecipeError,
    RunError,
)
from fewstep.export.base import licence_of, open_base
from fewstep.export.checkpoint import merge, plan_shards
from fewstep.export.lora import DOWN, UP, fold, save_lora
from fewstep.export.run_folder import read_student
from fewstep.export.schedule import Playback, grid_of, playback_of
from fewstep.models.foreign import fingerprint
from fewstep.recipe.facts import Machine
from fewstep.recipe.load import dump_yaml, load_recipe
from fewstep.recipe.plan import make_plan
from fewstep.samplers import shifted_grid

RECIPE = Path(__file__).parents[1] / "recipes/lab/unified.yaml"
EVEN, OWN = ("QwenImagePipeline", "ZImagePipeline"), ("StableDiffusion3Pipeline", "SanaPipeline")

# --- grids ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipeline", EVEN)
def test_a_shifted_grid_is_a_static_shift(pipeline) -> None:
    assert playback_of(pipeline, (1.0, 0.9, 0.75, 0.5)) == Playback({"shift": 3.0})


@pytest.mark.parametrize("pipeline", OWN)
def test_schedulers_that_place_their_own_steps_need_a_terminal(pipeline) -> None:
    """Their steps end at the smallest sigma, so that the shift itself does not give the grid.

    Without that small sigma, 1 - sigma = w / (2 - w) at w = 0, 1/3, 2/3, 1 is 0, 1/5, 1/2, 1, and
    half of it is 1 - t: shift 2 and terminal 1/2.
    """
    times = (1.0, 0.9, 0.75, 0.5)
    assert grid_of(pipeline, Playback({"shift": 3.0}), 4)[3] == pytest.approx(0.009, abs=1e-3)
    held = playback_of(pipeline, times)
    assert held.scheduler["shift_terminal"] == 0.5 and held.sigmas is None
    assert held.scheduler["shift"] == pytest.approx(2.0, abs=5e-3)
    assert grid_of(pipeline, held, 4) == pytest.approx(times, abs=1e-6)


@pytest.mark.parametrize("pipeline", [*EVEN, *OWN])
def test_every_shifted_grid_is_held_without_an_argument(pipeline) -> None:
    rng = np.random.default_rng(0)
    for steps in range(1, 9):
        times = shifted_grid(steps, float(rng.uniform(0.3, 9)))
        held = playback_of(pipeline, times)
        assert held.sigmas is None and not held.scheduler.get("use_dynamic_shifting")
        assert grid_of(pipeline, held, steps) == pytest.approx(times, abs=1e-6)


@pytest.mark.parametrize("pipeline", [*EVEN, *OWN])
def test_a_grid_that_no_shift_gives_needs_sigmas(pipeline) -> None:
    times = (1.0, 0.9, 0.6, 0.2)
    assert playback_of(pipeline, times) == Playback({"shift": 1.0}, sigmas=times)


def test_qwen_image_21_keeps_any_grid_in_its_pipeline() -> None:
    times = (1.0, 0.9, 0.6, 0.2)
    held = playback_of("QwenImage21Pipeline", times)
    assert held == Playback({"shift": 1.0}, sample_sigmas=times)


# --- a tiny base and a run ------------------------------------------------------------------------

MODULES = {"transformer_blocks.0.attn.to_q": (6, 4), "transformer_blocks.1.attn.to_v": (3, 5)}
CONFIG = {"kind": "lora", "pipeline": "QwenImagePipeline", "rank": 2, "alpha": 6.0}


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lora_tensors(rank: int = 2) -> dict[str, Tensor]:
    tensors = {}
    for seed, (module, (rows, columns)) in enumerate(MODULES.items()):
        tensors[module + DOWN] = draw((rank, columns), 10 + seed)
        tensors[module + UP] = draw((rows, rank), 20 + seed)
    return tensors


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "tiny-base"
    weights = {f"{module}.weight": draw(shape, 0).bfloat16() for module, shape in MODULES.items()}
    weights |= {f"{module}.bias": draw(shape[:1], 1) for module, shape in MODULES.items()}
    weights["steps"] = torch.arange(5)
    (path / "transformer").mkdir(parents=True)
    save_file(weights, path / "transformer/diffusion_pytorch_model.safetensors")
    (path / "transformer/config.json").write_text('{"num_layers": 2}')
    (path / "vae").mkdir()
    save_file({"w": torch.ones(3)}, path / "vae/diffusion_pytorch_model.safetensors")
    (path / "vae/config.json").write_text("{}")
    (path / "scheduler").mkdir()
    index = {
        "_class_name": "QwenImagePipeline",
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "transformer": ["diffusers", "QwenImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLQwenImage"],
    }
    (path / "model_index.json").write_text(json.dumps(index))
    return path


Write = Callable[..., Path]


@pytest.fixture
def write_run(tmp_path: Path, base: Path) -> Write:
    """A finished run; arguments replace fields of its student's header."""

    def write(
        tensors: dict[str, Tensor] | None = None, *, config: Any = None, **about: Any
    ) -> Path:
        folder = tmp_path / "run"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        recipe = load_recipe(RECIPE, {})
        plan = make_plan(recipe, Machine())
        (folder / "recipe.yaml").write_text(dump_yaml(recipe))
        (folder / "plan.json").write_text(plan.model_dump_json())
        (folder / "identity.json").write_text('{"recipe": "abcd", "teachers.base": "0123"}')
        (folder / "results.md").write_text("# lab-unified\n\n| model | score |\n| --- | --- |\n")
        told = {
            "recipe": "tiny",
            "grid": [1.0, 0.9, 0.75, 0.5],
            "base": str(base),
            "tasks": ["t2i"],
            "size": [64, 96],
            "precision": "bf16",
            "base_stamp": fingerprint(base / "transformer"),
        }
        header = {"config": json.dumps(config or CONFIG), "about": json.dumps({**told, **about})}
        save_file(tensors or lora_tensors(), folder / "student.safetensors", metadata=header)
        return folder

    return write


def export(folder: Path, to: str = "lora", **options: Any) -> Path:
    options = {"out": folder.parent / f"as_{to}", "dtype": None, "base": None, **options}
    run_export(folder, to=to, **options)
    return options["out"]


def student_of(folder: Path) -> Any:
    recipe = load_recipe(folder / "recipe.yaml", {})
    return read_student(folder / "student.safetensors", recipe)


# --- what is written ------------------------------------------------------------------------------


def test_the_scale_is_folded_in(write_run) -> None:
    """alpha / r = 3, and no alpha is left that a reader could apply again."""
    stored = load_file(export(write_run()) / "pytorch_lora_weights.safetensors")
    given = lora_tensors()
    assert stored.keys() == {f"transformer.{name}" for name in given}
    for module in MODULES:
        a, b = (stored[f"transformer.{module}{suffix}"] for suffix in (DOWN, UP))
        torch.testing.assert_close(b @ a, 3.0 * given[module + UP] @ given[module + DOWN])


def test_each_module_is_folded_by_its_own_rank() -> None:
    tensors = {"a" + DOWN: torch.ones(2, 3), "a" + UP: torch.ones(3, 2)}
    tensors |= {"b" + DOWN: torch.ones(8, 3), "b" + UP: torch.ones(3, 8)}
    lora = fold(tensors, alpha=4.0, where="test")
    assert lora["a"].up[0, 0] == 2.0 and lora["b"].up[0, 0] == 0.5


@pytest.mark.parametrize(("dtype", "stored"), [(None, torch.bfloat16), ("fp32", torch.float32)])
def test_the_update_is_merged(write_run, base, dtype, stored) -> None:
    """Against float64, in the base's precision or in the one that is asked for."""
    out = export(write_run(), "diffusers", dtype=dtype)
    before = load_file(base / "transformer/diffusion_pytorch_model.safetensors")
    after = load_file(out / "transformer/diffusion_pytorch_model.safetensors")
    given = lora_tensors()
    assert after.keys() == before.keys()
    for module in MODULES:
        update = 3.0 * given[module + UP].double() @ given[module + DOWN].double()
        expected = before[f"{module}.weight"].double() + update
        assert after[f"{module}.weight"].dtype == stored
        tolerance = 2**-8 if stored == torch.bfloat16 else 1e-6
        torch.testing.assert_close(
            after[f"{module}.weight"].double(), expected, rtol=tolerance, atol=1e-6
        )
        assert torch.equal(after[f"{module}.bias"], before[f"{module}.bias"])
    assert after["steps"].dtype == torch.int64


def test_shards_hold_everything_once(write_run, base, tmp_path) -> None:
    student = student_of(write_run())
    merge(student, tmp_path / "one")
    merge(student, tmp_path / "many", shard=100)
    one = load_file(tmp_path / "one/diffusion_pytorch_model.safetensors")
    index = json.loads(
        (tmp_path / "many/diffusion_pytorch_model.safetensors.index.json").read_text()
    )
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) == len(set(index["weight_map"].values())) > 1
    many: dict[str, Tensor] = {}
    for file in files:
        shard = load_file(file)
        assert not many.keys() & shard.keys()
        assert all(index["weight_map"][name] == file.name for name in shard)
        many |= shard
    assert many.keys() == one.keys() and all(torch.equal(many[n], one[n]) for n in one)


def test_shards_are_filled_in_order() -> None:
    assert plan_shards({"a": 4, "b": 4, "c": 9, "d": 1}, 8) == [["a", "b"], ["c"], ["d"]]
    assert plan_shards({"a": 9, "b": 8, "c": 1}, 8) == [["a"], ["b"], ["c"]]


def test_a_sharded_base_is_read_whole(write_run, base, tmp_path) -> None:
    student = student_of(write_run())
    merge(student, tmp_path / "many", shard=100)
    shutil.rmtree(base / "transformer")
    shutil.copytree(tmp_path / "many", base / "transformer")
    assert open_base(base).tensors.keys() == student.base.tensors.keys()
    next((base / "transformer").glob("*00002-of-*")).unlink()
    with pytest.raises(DataError, match=r"00002-of-.*which its index names"):
        open_base(base)


def test_the_rest_of_the_pipeline_is_the_base(write_run, base) -> None:
    (base / "LICENSE").write_text("terms")
    (base / "README.md").write_text("the base's own card")
    out = export(write_run(), "diffusers")
    weights = "vae/diffusion_pytorch_model.safetensors"
    assert (out / weights).samefile(base / weights)
    assert (out / "vae/config.json").read_text() == "{}"
    assert not (out / "vae/config.json").samefile(base / "vae/config.json")
    index = json.loads((out / "model_index.json").read_text())
    before = json.loads((base / "model_index.json").read_text())
    assert index.pop("scheduler") == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    before.pop("scheduler")
    assert index == before
    assert json.loads((out / "scheduler/scheduler_config.json").read_text())["shift"] == 3.0
    assert (out / "LICENSE").read_text() == "terms"
    assert "the base's own card" not in (out / "README.md").read_text()


def test_a_student_trained_whole_takes_the_place_of_the_transformer(write_run, base) -> None:
    stored = load_file(base / "transformer/diffusion_pytorch_model.safetensors")
    whole = {n: w.float() + 1 if w.is_floating_point() else w for n, w in stored.items()}
    folder = write_run(whole, config={"kind": "full", "pipeline": "QwenImagePipeline"})
    out = export(folder, "diffusers")
    after = load_file(out / "transformer/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(after[n], whole[n].to(stored[n].dtype)) for n in stored)
    with pytest.raises(RecipeError, match=r"trained whole.*--to diffusers"):
        export(folder, "lora")
    whole.pop("steps")
    folder = write_run(whole, config={"kind": "full", "pipeline": "QwenImagePipeline"})
    with pytest.raises(CheckpointError, match=r"tensor steps is missing here"):
        export(folder, "diffusers", out=folder.parent / "again")


def test_the_default_folder_lies_in_the_run(write_run) -> None:
    folder = write_run()
    export(folder, "comfyui", out=None)
    names = {file.name for file in (folder / "export/comfyui").iterdir()}
    assert names == {"README.md", "comfyui_lora.safetensors"}


# --- the card -------------------------------------------------------------------------------------


def test_the_card_tells_how_the_student_came_about(write_run) -> None:
    folder = write_run()
    out = export(folder)
    text = (out / "README.md").read_text()
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert recipe == yaml.safe_load((folder / "recipe.yaml").read_text())
    plan = json.loads((folder / "plan.json").read_text())
    for pool in plan["pools"]:
        assert f"| {pool['pool']} | {pool['task']} | {pool['category']} | " in text
        assert f"| {pool['size']:,} | {pool['samples']:,} |" in text
    for name in plan["teachers"]:
        assert f"| {name} | `bundled:{name}` | t2i, edit | t2i 3, edit 2 | 40 |" in text
    assert "| model | score |" in text and "# lab-unified" not in text
    assert "1, 0.9, 0.75, 0.5" in text and "64 x 96" in text
    file = sha256((out / "pytorch_lora_weights.safetensors").read_bytes()).hexdigest()
    assert f"| pytorch_lora_weights.safetensors | `{file}` |" in text
    assert "| teachers.base | `0123` |" in text


def test_the_licence_of_the_base_is_told_and_never_guessed(write_run, base) -> None:
    def card() -> str:
        out = export(write_run())
        text = (out / "README.md").read_text()
        shutil.rmtree(out)
        return text

    assert "**Unknown:**" in card()
    (base / "README.md").write_text("Apache, more or less")
    assert "**Unknown:**" in card() and "\nlicense:" not in card()
    (base / "LICENSE.md").write_text("terms")
    assert "whose terms are in `LICENSE.md`, copied here" in card()
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: tiny-rail\n---\n# Tiny")
    assert "**other tiny-rail**" in card() and "\nlicense: other\n" in card()
    assert licence_of(base).name == "other tiny-rail"


def test_a_grid_that_needs_sigmas_is_told_in_the_card_and_the_terminal(write_run, capsys) -> None:
    out = export(write_run(grid=[1.0, 0.9, 0.6, 0.2]))
    text = (out / "README.md").read_text()
    assert "**Every call needs `sigmas=`.** FlowMatchEulerDiscreteScheduler cannot" in text
    assert "sigmas=[1.0, 0.9, 0.6, 0.2]," in text
    assert "every call needs sigmas=[1.0, 0.9, 0.6, 0.2]" in capsys.readouterr().out


# --- refusals -------------------------------------------------------------------------------------


def refused(error: type[FewstepError], match: str, folder: Path, **options: Any) -> None:
    """And nothing is left behind."""
    with pytest.raises(error, match=match):
        export(folder, **options)
    assert not list(folder.parent.glob("as_*"))


def test_what_cannot_be_asked_for(write_run, tmp_path) -> None:
    folder = write_run()
    refused(RecipeError, r"'onnx' is no target; .*diffusers, lora, comfyui", folder, to="onnx")
    refused(RecipeError, r"'int4' is no precision; .*bf16, fp16, fp32", folder, dtype="int4")
    refused(RunError, r"exists and is not empty; choose another --out", folder, out=tmp_path)
    code = guarded(lambda: app(["export", str(folder), "--to", "onnx"]))
    assert code == 2


def test_a_run_that_is_not_finished(write_run) -> None:
    folder = write_run()
    (folder / "student.safetensors").unlink()
    refused(RunError, r"its student is not finished; `fewstep distill .*--resume` goes on", folder)


def test_a_student_of_the_lab(write_run) -> None:
    folder = write_run(config={"channels": 16, "grid": 8})
    refused(RunError, r"fewstep's own \(MMDiT\).*`fewstep sample` does", folder)


def test_a_base_that_moved(write_run, base, tmp_path) -> None:
    folder = write_run()
    base.rename(tmp_path / "elsewhere")
    refused(RunError, r"tiny-base is no longer there; say where it lies now with --base", folder)
    export(folder, base=tmp_path / "elsewhere")


def test_a_base_that_changed(write_run, base) -> None:
    folder = write_run()
    weights = load_file(base / "transformer/diffusion_pytorch_model.safetensors")
    weights["transformer_blocks.0.attn.to_q.bias"][0] += 1
    save_file(weights, base / "transformer/diffusion_pytorch_model.safetensors")
    refused(CheckpointError, r"transformer is not what this student was trained on", folder)


def test_a_base_of_another_pipeline(write_run, base) -> None:
    index = json.loads((base / "model_index.json").read_text())
    folder = write_run(config={**CONFIG, "pipeline": "ZImagePipeline"})
    refused(CheckpointError, r"trained on a ZImagePipeline, and .* holds a QwenImageP", folder)
    (base / "model_index.json").write_text(json.dumps({**index, "_class_name": "FluxPipeline"}))
    refused(DataError, r"holds a FluxPipeline.*known: .*ZImagePipeline", folder)
    (base / "model_index.json").write_text(json.dumps(index))
    shutil.rmtree(base / "vae")
    refused(DataError, r"lacks the folder vae", folder)


def test_a_lora_of_another_base(write_run) -> None:
    extra = {"layers.0.x" + DOWN: torch.ones(2, 3), "layers.0.x" + UP: torch.ones(3, 2)}
    folder = write_run(lora_tensors() | extra)
    refused(CheckpointError, r"changes layers\.0\.x.*no such module; it is a LoRA of anot", folder)
    tensors = lora_tensors()
    tensors[next(iter(MODULES)) + UP] = torch.ones(7, 2)
    folder = write_run(tensors)
    refused(CheckpointError, r"to_q, a matrix of \(7, 4\).*has one of \(6, 4\)", folder)


def test_tensors_that_are_no_lora(write_run) -> None:
    name = next(iter(MODULES))
    odd = {name + ".lora_magnitude_vector.weight": torch.ones(6)}
    refused(CheckpointError, r"magnitude_vector.* is no part of a LoRA", write_run(odd))
    tensors = lora_tensors()
    del tensors[name + UP]
    refused(CheckpointError, r"to_q\.lora_B\.weight is missing", write_run(tensors))
    convolution = {name + DOWN: torch.ones(2, 4, 3, 3), name + UP: torch.ones(6, 2, 1, 1)}
    refused(CheckpointError, r"no LoRA of a linear layer; leave", write_run(convolution))


def test_headers_that_no_run_writes(write_run) -> None:
    refused(CheckpointError, r"\(grid: .*train it again", write_run(grid=[]))
    config = {key: value for key, value in CONFIG.items() if key != "alpha"}
    refused(CheckpointError, r"has no alpha", write_run(config=config))


def test_a_network_that_comfyui_does_not_run(write_run, base) -> None:
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps({**index, "_class_name": "SanaPipeline"}))
    folder = write_run(config={**CONFIG, "pipeline": "SanaPipeline"})
    refused(RecipeError, r"SanaPipeline itself; use --to lora or", folder, to="comfyui")


def test_weights_into_which_nothing_can_be_merged(write_run, base) -> None:
    path = base / "transformer/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    name = next(iter(MODULES)) + ".weight"
    weights[name] = weights[name].to(torch.float8_e4m3fn)
    save_file(weights, path)
    folder = write_run()
    refused(
        CheckpointError, r"to_q\.weight is stored as F8_E4M3.*--to lora", folder, to="diffusers"
    )
    assert (export(folder) / "pytorch_lora_weights.safetensors").is_file()


def test_an_unfinished_export_is_removed(write_run, base) -> None:
    """A link whose file was never downloaded; found when other files are already written."""
    (base / "vae/config.json").unlink()
    (base / "vae/config.json").symlink_to("../blobs/0123")
    refused(
        DataError, r"vae/config\.json links to .*0123, which is not", write_run(), to="diffusers"
    )


def test_a_file_that_cannot_be_written(write_run, tmp_path) -> None:
    with pytest.raises(DiskError, match=r"could not be written.*is the disk full"):
        save_lora(student_of(write_run()).lora, tmp_path / "nowhere" / "file.safetensors")
