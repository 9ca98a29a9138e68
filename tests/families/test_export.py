"""What is exported plays in stock diffusers, in a fresh process, as fewstep itself plays it."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from fewstep.export.base import open_base
from fewstep.export.checkpoint import merge
from fewstep.export.lora import DOWN, UP, fold
from fewstep.export.student import History, Student
from fewstep.export.write import export
from fewstep.models.families.playback import play
from fewstep.models.families.qwen_image_21 import QwenImage21
from fewstep.samplers import shifted_grid

from . import stock
from .fixtures import CASES, SIZE, adapt, apart, source
from .folders import save_pipeline

TIMES = shifted_grid(4, 3.0)
PROMPTS = {"t2i": "a red lighthouse", "edit": "make it winter"}
TASKS = {
    "qwen_image": ("t2i",),
    "qwen_image_edit": ("edit",),
    "qwen_image+qwen_image_edit": ("t2i", "edit"),
    "qwen_image_edit+qwen_image": ("t2i", "edit"),
    "qwen_image_21": ("t2i", "edit"),
    "flux2_klein": ("t2i", "edit"),
    "sd3": ("t2i",),
    "z_image": ("t2i",),
    "sana": ("t2i",),
}
ALPHA = 8.0
RESOLUTION = 96
"""Side of the sources in Qwen-Image 2.1."""
EFFECT = 0.05
"""The random LoRAs move the latents by more than this, so that a wrong scale is seen."""


def random_lora(network: Any, seed: int = 0) -> dict[str, Tensor]:
    """On every linear layer, with ranks 2 and 4, so that alpha / r is not one number."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    linear = [n for n, m in network.named_modules() if isinstance(m, torch.nn.Linear)]
    for i, name in enumerate(linear):
        rows, columns = network.get_submodule(name).weight.shape
        rank = 4 if i % 3 else 2
        tensors[name + DOWN] = 0.1 * torch.randn(rank, columns, generator=generator)
        tensors[name + UP] = 0.1 * torch.randn(rows, rank, generator=generator)
    return tensors


@contextmanager
def with_lora(network: Any, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """W x + alpha / r B A x, as training has it, and with nothing of what is tested here."""

    def adding(down: Tensor, up: Tensor) -> Any:
        def add(module: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            return out + ALPHA / len(down) * (args[0] @ down.T @ up.T)

        return add

    handles = [
        network.get_submodule(name.removesuffix(DOWN)).register_forward_hook(
            adding(tensors[name], tensors[name.removesuffix(DOWN) + UP])
        )
        for name in tensors
        if name.endswith(DOWN)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def drawn(
    pipes: list[Any], network: Any, task: str, tensors: Mapping[str, Tensor], picture: Path
) -> Tensor:
    """fewstep's own latents, in that pipeline which does the task."""
    family = next(f for f in map(adapt, pipes) if task in f.tasks)
    if isinstance(family, QwenImage21):
        family.resolution = RESOLUTION
    images = [Image.open(picture)] if task == "edit" else []
    cond = family.encode([PROMPTS[task]], images, size=SIZE, negative=None)
    noise = family.noise(1, SIZE, torch.Generator().manual_seed(0))
    with with_lora(network, tensors):
        return play(family, noise, cond, (*TIMES, 0.0), model=network)


@dataclass(frozen=True)
class Trained:
    """A tiny base on disk, a student of it, and what fewstep draws with both."""

    student: Student
    expected: dict[str, Tensor]


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export")
    source(128, 64, 1).save(path / "source.png")
    return path


@pytest.fixture(scope="session")
def trained(place: Path) -> Any:
    @cache
    def make(name: str) -> Trained:
        """`a+b`: the network of a, played in the pipelines of both."""
        first, *second = name.split("+")
        pipes = [CASES[each].make() for each in (first, *second)]
        network = pipes[0].transformer
        tensors = random_lora(network)
        folders = [save_pipeline(p, place / f"{name}_{i}") for i, p in enumerate(pipes)]
        base, expected = open_base(folders[0]), {}
        for task in TASKS[name]:
            expected[task] = drawn(pipes, network, task, tensors, place / "source.png")
            assert (
                apart(drawn(pipes, network, task, {}, place / "source.png"), expected[task])
                > EFFECT
            )
        student = Student(
            name=f"tiny_{name}",
            base=base,
            weights=base.tensors,
            lora=fold(tensors, alpha=ALPHA, where="student"),
            times=TIMES,
            tasks=TASKS[name],
            size=SIZE,
            precision="fp32",
            companion=folders[1] if second else None,
            source_resolution=RESOLUTION,
        )
        return Trained(student, expected)

    return make


def exported(trained: Trained, place: Path, to: str) -> Path:
    out = place / f"{trained.student.name}_{to}"
    if not out.exists():
        export(trained.student, History(recipe="name: tiny"), out, to=to)
    return out


def agree(played: Mapping[str, Any], trained: Trained) -> None:
    """One image for each task, at the trained times, with fewstep's latents."""
    assert len(played["latents"]) == len(trained.expected)
    for (task, expected), sigmas, latents in zip(
        trained.expected.items(), played["sigmas"], played["latents"]
    ):
        assert sigmas.tolist() == pytest.approx((*TIMES, 0.0), abs=1e-6), task
        assert apart(latents, expected) <= 1e-5, task


ALL = list(product(TASKS, ("lora", "diffusers")))


@pytest.mark.parametrize(("name", "to"), ALL)
def test_the_code_in_the_card_plays_the_student(name, to, trained, place) -> None:
    agree(stock.play(exported(trained(name), place, to)), trained(name))


@pytest.mark.parametrize("name", ["qwen_image", "qwen_image_21", "sd3", "z_image", "sana"])
def test_a_grid_that_no_shift_gives_is_played_as_the_card_says(name, trained, place) -> None:
    """Through the call's sigmas, or sample_sigmas; without them the pipeline plays another grid."""
    student = replace(trained(name).student, times=(1.0, 0.9, 0.6, 0.2))
    out = place / f"{name}_explicit"
    playback = export(student, History(recipe="name: tiny"), out, to="lora")
    expected = pytest.approx((*student.times, 0.0), abs=1e-6)
    assert all(sigmas.tolist() == expected for sigmas in stock.play(out)["sigmas"])
    card = (out / "README.md").read_text()
    forgotten = re.sub(r"    (sample_)?sigmas=.*\n", "", card)
    assert forgotten.count("\n") < card.count("\n")
    (out / "README.md").write_text(forgotten)
    assert not any(sigmas.tolist() == expected for sigmas in stock.play(out)["sigmas"])
    assert (playback.sigmas is None) == (name == "qwen_image_21")


@pytest.mark.parametrize("name", ["qwen_image", "sd3"])
def test_the_grid_does_not_depend_on_the_size(name, trained, place) -> None:
    student = replace(trained(name).student, size=(128, 192), tasks=("t2i",))
    out = place / f"{name}_large"
    export(student, History(recipe="name: tiny"), out, to="lora")
    (sigmas,) = stock.play(out)["sigmas"]
    assert sigmas.tolist() == pytest.approx((*TIMES, 0.0), abs=1e-6)


def test_a_merge_in_many_shards_loads_as_one(trained, place) -> None:
    made = trained("qwen_image")
    merge(made.student, place / "shards", shard=100_000)
    merge(made.student, place / "single")
    assert len(list((place / "shards").glob("*.safetensors"))) > 3
    kind = type(CASES["qwen_image"].make().transformer)
    networks = [kind.from_pretrained(place / name) for name in ("shards", "single")]
    states = [network.state_dict() for network in networks]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])


@pytest.mark.slow
def test_a_fresh_process_without_fewstep_plays_the_student(trained, place) -> None:
    folders = {(name, to): exported(trained(name), place, to) for name, to in ALL}
    subprocess.run(
        [sys.executable, "-m", "tests.families.stock", *map(str, folders.values())],
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
    )
    for (name, _), folder in folders.items():
        agree(torch.load(folder / "played.pt"), trained(name))
