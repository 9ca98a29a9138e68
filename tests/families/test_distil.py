"""`fewstep distill` on tiny pipelines of the real classes: cache, distil, resume, sample, play."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from fewstep.commands.distill import distill
from fewstep.commands.opening import open_ensemble, read_run
from fewstep.commands.sample import sample
from fewstep.contestants import NO_GUIDANCE, play_teacher, sampler
from fewstep.errors import DataError, RecipeError
from fewstep.models.cast import Role
from fewstep.models.families.playback import play
from fewstep.real.domain import RealPool
from fewstep.real.ensemble import RealEnsemble
from fewstep.recipe.facts import Machine
from fewstep.recipe.load import load_recipe
from fewstep.recipe.plan import Plan, make_plan
from fewstep.samplers import shifted_grid
from fewstep.train import loop

from . import fixtures, stock
from .fixtures import SIZE, apart, scheduler
from .folders import save_pipeline, write_lora, write_prompts

MAKE: dict[str, Callable[..., Any]] = {
    "qwen_image": fixtures.qwen_image,
    "qwen_image_edit": fixtures.qwen_image_edit,
    "qwen_image_21": fixtures.qwen_image_21,
    "flux2_klein": fixtures.flux2_klein,
    "stable_diffusion_3": fixtures.stable_diffusion_3,
    "z_image": fixtures.z_image,
    "sana": fixtures.sana,
}
BOTH = ("t2i", "edit")
CHECKPOINTED = {"kind": "lora", "rank": 2, "checkpointing": True}


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Any:
    with ExitStack() as stack:
        stack.enter_context(stock.tiny_sources())
        stack.enter_context(stock.processors_without_video())
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("distil")
    write_prompts(path / "prompts")
    return path


@pytest.fixture(scope="module")
def folder(place: Path) -> Any:
    @cache
    def make(name: str) -> Path:
        pipe = MAKE[name]("static")
        write_lora(pipe.transformer, place / f"{name}.lora.safetensors")
        return save_pipeline(pipe, place / name)

    return make


def recipe_of(place: Path, folder: Any, family: str, **changes: Any) -> dict[str, Any]:
    """Two teachers, of which one is a LoRA with words of its own; edits where the family can."""
    pair = family == "qwen_image"
    edits = pair or family in ("qwen_image_21", "flux2_klein")
    model: dict[str, Any] = {"family": family, "path": str(folder(family)), "size": list(SIZE)}
    model["cast"] = {"kind": "lora", "rank": 4, "alpha": 8.0}
    if pair:
        model["edit_path"] = str(folder("qwen_image_edit"))
    if family == "qwen_image_21":
        model["source_resolution"] = 96
    tasks = ["t2i", "edit"] if edits and not pair else ["t2i"]
    teachers: dict[str, Any] = {
        "base": {
            "weights": "base",
            "tasks": tasks,
            "cfg": dict.fromkeys(tasks, 3.0),
            "steps": 3,
            "grid": "pipeline",
        },
        "words": {
            "weights": "base",
            "lora": str(place / f"{family}.lora.safetensors"),
            "tasks": ["t2i"],
            "cfg": {"t2i": 2.0},
            "template": "{prompt}, sharp letters",
            "negative": "blurry",
        },
    }
    if pair:
        teachers["editor"] = {
            "weights": "edit",
            "tasks": ["edit"],
            "cfg": {"edit": 2.0},
            "steps": 3,
        }
    pools = {name: {"task": "t2i", "category": name, "size": 3} for name in ("scene", "text")} | (
        {"object": {"task": "edit", "category": "object", "size": 3}} if edits else {}
    )
    guidance: list[dict[str, Any]] = [
        {"when": {"category": "text"}, "weights": [{"base": 0.5, "words": 0.5}]},
        *([{"when": {"task": "edit"}, "weights": [{"editor": 1.0}]}] if pair else []),
        {"weights": [{"base": 1.0}]},
    ]
    recipe = {
        "name": f"tiny-{family}",
        "model": model,
        "teachers": teachers,
        "student": {"init": "editor" if pair else "base"},
        "data": {
            "source": {
                "kind": "prompts",
                "path": str(place / "prompts"),
                "cache": str(place / "cache"),
            },
            "pools": pools,
            "composition": {"t2i": {"scene": 1, "text": 1}}
            | ({"edit": {"object": 1}} if edits else {}),
            "mixture": {"t2i": 1, "edit": 1} if edits else {"t2i": 1},
        },
        "guidance": guidance,
        "objective": {"kind": "dmd", "fake_updates": 1},
        "optim": {"student": {"lr": 1e-2}, "fake": {"lr": 1e-2}, "warmup": 0},
        "ema": {"decay": 0.5},
        "budget": {"updates": 4, "batch": 2, "micro_batch": 2},
        "precision": "fp32",
        "log": {"sample_every": 4, "save_every": 2, "sample_seeds": 1, "probe": None},
        "evaluation": {"per_category": 1, "models": ["teacher", "student"]},
    }
    for dotted, value in changes.items():
        *path, last = dotted.split("__")
        holder: Any = recipe
        for key in path:
            holder = holder[key]
        holder[last] = value
    return recipe


def write(recipe: dict[str, Any], path: Path) -> Path:
    path.write_text(yaml.safe_dump(recipe))
    return path


def distilled(recipe: dict[str, Any], out: Path, **options: Any) -> Path:
    distill(write(recipe, out.with_suffix(".yaml")), out=out, overrides={}, **options)
    return out


def same_tensors(a: Path, b: Path) -> bool:
    one, other = load_file(a), load_file(b)
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("family", ["qwen_image_21", "qwen_image"])
@pytest.mark.slow
def test_a_joint_distillation_from_cache_to_stock_playback(
    place: Path, folder: Any, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T2I and edits, two teachers or more, LoRA roles; killed, resumed bit for bit, sampled."""
    recipe = recipe_of(place, folder, family)
    whole = distilled(recipe, tmp_path / "whole")
    student = whole / "student.safetensors"
    with safe_open(student, "pt") as file:
        about = file.metadata()
    config, told = json.loads(about["config"]), json.loads(about["about"])
    started = "qwen_image_edit" if family == "qwen_image" else family
    assert (config["kind"], config["rank"], config["alpha"]) == ("lora", 4, 8.0)
    assert told["base"] == str(folder(started)) and told["size"] == list(SIZE)
    assert told["grid"] == list(shifted_grid(4, 3.0)) and told["tasks"] == list(BOTH)
    assert any(value.any() for key, value in load_file(student).items() if ".lora_B." in key)
    rows = [json.loads(line) for line in (whole / "eval/rows.jsonl").read_text().splitlines()]
    assert {row["status"] for row in rows} == {"unscored: the recipe names no evaluation.judge"}
    assert all(row["score"] is None and (whole / "eval" / row["image"]).is_file() for row in rows)
    assert (whole / "report.html").is_file() and (whole / "images/step_000004.png").is_file()
    assert not any(
        p.suffix == ".pt" and p.stat().st_size > 3e6 for p in (whole / "checkpoints").iterdir()
    )

    with monkeypatch.context() as patch:  # everything is in the cache: no encoder may be opened
        patch.setattr("fewstep.real.pipelines.open_encoders", None)
        kill_after(patch, 3)
        with pytest.raises(Killed):
            distilled(recipe, tmp_path / "killed")
    distilled(recipe, tmp_path / "killed", resume=True)
    assert same_tensors(student, tmp_path / "killed/student.safetensors")

    picture = tmp_path / "seen.png"
    ask = {"prompts": ["A cat at night"], "prompt_file": None, "source": None, "instruction": None}
    options = {"seeds": [7], "out": picture, "model": "student", "steps": None}
    sample(whole, **ask, **options)
    assert picture.is_file()
    Image.fromarray(np.zeros((64, 128, 3), np.uint8)).save(tmp_path / "source.png")
    ask |= {"prompts": [], "source": tmp_path / "source.png", "instruction": "make it blue"}
    sample(whole, **ask, **options)
    check_playback(whole, folder(started), family)


class Killed(Exception):
    pass


def kill_after(patch: pytest.MonkeyPatch, updates: int) -> None:
    """The train step that would come after so many raises."""
    real = loop.train_step

    def train_step(d: loop.Distillation) -> Any:
        if d.step == updates:
            raise Killed
        return real(d)

    patch.setattr(loop, "train_step", train_step)


def check_playback(out: Path, base: Path, family: str) -> None:
    """Stock diffusers with the LoRA and a shift-3 scheduler draws what fewstep's sampler draws."""
    recipe, plan = read_run(out)
    ensemble = open_ensemble(recipe)
    assert isinstance(ensemble, RealEnsemble)
    student, domain = ensemble.student(out / "student.safetensors"), ensemble.open_domain()
    task, prompt = ("edit", "make it blue") if family == "qwen_image" else ("t2i", "A cat at night")
    image = np.asarray(fixtures.source(128, 64, 1))
    cond = domain.condition([prompt], [image] if task == "edit" else None)
    draw = sampler(student, NO_GUIDANCE, plan.grid, recipe.precision, ensemble.device)
    found = draw(domain.noise(5)[None], cond, task)
    for reader, wanted in (("student", True), ("base", False)):
        pipe: Any = stock_pipeline(base)
        pipe.scheduler = scheduler("static")
        if wanted:
            fold_into(pipe.transformer, out / "student.safetensors", 8.0 / 4)
        asked: dict[str, Any] = {"prompt": prompt}
        if task == "edit":
            asked["image"] = [Image.fromarray(image)]
        latents = pipe(
            **asked,
            height=SIZE[0],
            width=SIZE[1],
            num_inference_steps=4,
            true_cfg_scale=1.0,
            generator=torch.Generator().manual_seed(5),
            output_type="latent",
        ).images
        assert (apart(latents, found) <= 1e-5) == wanted, (reader, apart(latents, found))


def stock_pipeline(base: Path) -> Any:
    """With the positions of image tokens, which diffusers does not hand on (docs/families.md)."""
    from fewstep.models.families.qwen_image import forward_image_positions

    pipe = fixtures.diffusers.DiffusionPipeline.from_pretrained(base)
    if type(pipe).__name__ == "QwenImageEditPlusPipeline":
        forward_image_positions(pipe.text_encoder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def fold_into(network: Any, file: Path, scale: float) -> None:
    tensors = load_file(file)
    for key, down in tensors.items():
        if key.endswith(".lora_A.weight"):
            module = key.removesuffix(".lora_A.weight")
            update = scale * tensors[f"{module}.lora_B.weight"] @ down
            network.get_submodule(module).weight.data += update


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("flux2_klein", {}),
        ("stable_diffusion_3", {}),
        ("z_image", {}),
        ("sana", {"model__cast": CHECKPOINTED}),
        ("qwen_image_21", {"precision": "bf16"}),
        ("qwen_image", {"precision": "bf16", "model__cast": CHECKPOINTED}),
        ("qwen_image_21", {"model__cast": {"kind": "full"}}),
        ("qwen_image_21", {"model__cast": {"kind": "full"}, "precision": "bf16"}),
    ],
    ids=["flux2", "sd3", "z", "sana", "21-bf16", "pair-bf16", "21-full", "21-full-bf16"],
)
def test_every_family_distils(
    place: Path, folder: Any, family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    short = {"budget__updates": 2, "evaluation__models": ["student"], "log__sample_every": 2}
    recipe = recipe_of(place, folder, family, **short, **changes)
    out = distilled(recipe, tmp_path / "out")
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 2 and all(m["grad_norm/student"] > 0 for m in metrics)
    assert all(m["grad_norm/fake"] > 0 for m in metrics)
    assert any("words" in key for row in metrics for key in row)
    tensors = load_file(out / "student.safetensors")
    assert all(value.isfinite().all() for value in tensors.values())
    is_lora = recipe["model"]["cast"]["kind"] == "lora"
    assert all((".lora_" in key) == is_lora for key in tensors)


@pytest.mark.slow
def test_teachers_share_networks_and_read_their_own_words(place: Path, folder: Any) -> None:
    recipe, _ = planned(recipe_of(place, folder, "qwen_image_21"), place)
    ensemble = open_ensemble(recipe)
    cast = ensemble.cast(["base", "words"])
    assert isinstance(ensemble, RealEnsemble)
    shared = ensemble.shared("base")
    roles: list[Any] = [cast.student, cast.fake, *cast.teachers.values()]
    assert all(role.shared is shared for role in roles)
    domain = ensemble.open_domain()
    pool = domain.pool("text", 3, recipe.seed, task="t2i", targets=False)
    assert isinstance(pool, RealPool)
    cond, target = pool.gather([pool, pool], [0, 2])
    assert target is None and len(cond) == 2 and isinstance(cast.student, Role)
    x = torch.stack([domain.noise(seed) for seed in (1, 2)])
    t = torch.tensor([0.9, 0.5])
    with torch.no_grad():
        said = {name: teacher(x, t, cond) for name, teacher in cast.teachers.items()}
        own = cast.student(x, t, cond)
    family = ensemble.pipelines.encoders("base")
    network = ensemble.pipelines.family("base").pipe.transformer
    for i, prompt in enumerate(pool.prompts[j].prompt for j in (0, 2)):
        one = slice(i, i + 1)
        plain = family.encode([prompt], size=SIZE)
        words = family.encode([f"{prompt}, sharp letters"], size=SIZE, negative="blurry")
        assert apart(own[one], family(x[one], t[one], plain, network)) <= 2e-6
        assert apart(said["base"][one], own[one]) <= 2e-6
        assert torch.equal(cond.rows[i]["words"].text.states, words.text.states)
        avoided = cond.rows[i]["words"].without_text().text
        assert torch.equal(avoided.states, words.without_text().text.states)
    assert apart(said["words"], said["base"]) > 0.01


def planned(recipe: dict[str, Any], place: Path) -> tuple[Any, Plan]:
    loaded = load_recipe(write(recipe, place / f"{recipe['name']}.yaml"))
    return loaded, make_plan(loaded, Machine())


def test_the_multi_step_reference_is_the_pipeline_itself(place: Path, folder: Any) -> None:
    """`grid: pipeline` and the family's guidance: what `playback.play` draws, which is held to the
    pipelines by test_parity."""
    recipe, _ = planned(recipe_of(place, folder, "qwen_image_21"), place)
    ensemble = open_ensemble(recipe)
    assert isinstance(ensemble, RealEnsemble)
    player = play_teacher("base", recipe, ensemble)
    domain = ensemble.open_domain()
    cond = domain.condition(["A cat"], None)
    found = player.draw(domain.noise(3)[None], cond, "t2i")
    family = ensemble.pipelines.family("base")
    whole = ensemble.pipelines.encoders("base").encode(["A cat"], size=SIZE, negative=" ")
    noise = family.noise(1, SIZE, torch.Generator().manual_seed(3))
    wanted = play(family, noise, whole, family.sigmas(3, SIZE), scale=3.0)
    assert player.nfe == {"t2i": 6, "edit": 6} and apart(found, wanted) <= 1e-5


@pytest.mark.parametrize(
    ("family", "changes", "told"),
    [
        ("sana", {"data__mixture": {"t2i": 1, "edit": 1}}, r"model.family.*'edit'.*qwen_image"),
        ("sana", {"model__family": "z_image"}, r"holds a SanaPipeline.*use family: sana"),
        ("sana", {"model__path": "nowhere"}, r"nowhere does not exist"),
        ("sana", {"model__path": None}, r"model.path: is missing.*SanaPipeline"),
        ("sana", {"model__size": [64, 100]}, r"width is 100.*use 96 or 128"),
        ("sana", {"model__source_resolution": 96}, r"leave it out"),
        ("sana", {"model__family": "lab"}, r"model.path.*not for the family 'lab'"),
        ("sana", {"data__source": {"kind": "lab"}}, r"use kind: prompts"),
        ("sana", {"teachers__words__template": "sharp"}, r"does not hold \{prompt\} once"),
        ("sana", {"teachers__words__lora": "none.safetensors"}, r"no LoRA file"),
        ("sana", {"teachers__words__weights": "elsewhere"}, r"elsewhere does not exist.*use base"),
        ("sana", {"teachers__words__weights": "edit"}, r"model.edit_path, which is not given"),
        ("sana", {"student__init": "words"}, r"'words' is a LoRA.*start from a teacher without"),
        ("qwen_image", {"model__edit_path": None}, r"QwenImageEditPlusPipeline|edit_path"),
    ],
)
def test_what_cannot_be_is_refused_before_a_weight_is_loaded(
    place: Path, folder: Any, family: str, changes: dict[str, Any], told: str
) -> None:
    recipe = recipe_of(place, folder, family, **changes)
    with pytest.raises(RecipeError, match=told):
        planned(recipe, place)


def test_loras_and_checkpoints_of_another_base_are_refused(place: Path, folder: Any) -> None:
    other = str(folder("z_image"))
    recipe = recipe_of(place, folder, "sana")
    recipe["teachers"]["words"]["lora"] = str(place / "z_image.lora.safetensors")
    with pytest.raises(RecipeError, match=r"teachers.words.lora: .*of another base: .*not in Sana"):
        planned(recipe, place)
    recipe = recipe_of(place, folder, "sana")
    recipe["teachers"]["words"] |= {"lora": None, "weights": other}
    with pytest.raises(RecipeError, match=r"holds a ZImageTransformer2DModel.*SanaTransformer"):
        planned(recipe, place)
    vae = Path(other) / "vae"
    vae.rename(place / "aside")
    try:
        with pytest.raises(RecipeError, match="lacks the folder vae"):
            planned(recipe_of(place, folder, "z_image"), place)
    finally:
        (place / "aside").rename(vae)


def test_prompts_that_are_not_there_are_refused_by_name(
    place: Path, folder: Any, tmp_path: Path
) -> None:
    recipe = recipe_of(place, folder, "sana")
    recipe["data"]["pools"]["scene"]["category"] = "castle"
    with pytest.raises(RecipeError, match="there are 0 of t2i/castle"):
        planned(recipe, place)
    recipe["data"]["pools"]["scene"] |= {"category": "scene", "size": 9}
    with pytest.raises(RecipeError, match="there are 3 of t2i/scene; use 3 or fewer"):
        planned(recipe, place)
    rows = (place / "prompts/captions.jsonl").read_text().replace('"eval"', '"train"')
    (tmp_path / "captions.jsonl").write_text(rows)
    recipe["data"]["source"]["path"] = str(tmp_path)
    recipe["data"]["pools"]["scene"]["size"] = 4
    loaded, _ = planned(recipe, place)
    with pytest.raises(DataError, match="no eval prompts of t2i/scene; there are none"):
        open_ensemble(loaded).open_domain()
