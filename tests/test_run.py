"""Whole commands as a user meets them: a mistake is one message, an exit code, nothing lost."""

import contextlib
import io
import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console

from fewstep import session
from fewstep.cli import app, guarded
from fewstep.evals.rows import read_rows
from fewstep.lab import grammar
from fewstep.models.lab import MMDiT, MMDiTConfig, load_mmdit, save_weights

UPDATES, SAVE_EVERY = 24, 8


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Fewstep = Callable[..., Outcome]


@pytest.fixture
def fewstep(capsys: pytest.CaptureFixture[str]) -> Fewstep:
    """The command line in this process: arguments -> exit code and what it printed."""

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        try:
            code = guarded(lambda: app([str(argument) for argument in arguments]))
        except SystemExit as exit:
            code = int(exit.code or 0)
        printed = capsys.readouterr()
        return Outcome(code, printed.out, printed.err)

    return call


def complaint(outcome: Outcome, code: int) -> str:
    """The one line that a mistake prints."""
    assert outcome.code == code, outcome
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome.err
    return outcome.err.removeprefix("error: ").rstrip("\n")


def write_teacher(path: Path, *, seed: int = 0, **changes: int) -> Path:
    """A teacher of the lab's shape that knows nothing, small enough to distil in a second."""
    torch.manual_seed(seed)
    sizes = {"width": 32, "depth": 1, "heads": 2, "vocabulary": len(grammar.vocabulary()) + 1}
    model = MMDiT(MMDiTConfig(**(sizes | changes)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_weights(model, path, config=model.config, about={})
    return path


def write_recipe(path: Path, weights: Path) -> Path:
    teacher = {"weights": str(weights), "tasks": ["t2i", "edit"], "cfg": {"t2i": 2, "edit": 1}}
    recipe = {
        "name": "tiny",
        "model": {"family": "lab"},
        "teachers": {"base": teacher | {"steps": 3}},
        "student": {"init": "base"},
        "data": {
            "source": {"kind": "lab"},
            "pools": {
                "portrait": {"task": "t2i", "category": "portrait", "size": 4},
                "style": {"task": "edit", "category": "style", "size": 4},
            },
            "composition": {"t2i": {"portrait": 1}, "edit": {"style": 1}},
            "mixture": {"t2i": 1, "edit": 1},
        },
        "guidance": [{"weights": [{"base": 1.0}]}],
        "objective": {"kind": "dmd", "fake_updates": 1},
        "budget": {"updates": UPDATES, "batch": 2, "micro_batch": 2},
        "precision": "fp32",
        "log": {"sample_every": 1000, "save_every": SAVE_EVERY, "sample_seeds": 1},
        "evaluation": {"per_category": 1, "models": ["teacher", "student"]},
    }
    path.write_text(yaml.safe_dump(recipe))
    return path


class World(NamedTuple):
    recipe: Path
    run: Path
    """A whole run of `recipe`, never interrupted. Tests work on copies."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    recipe = write_recipe(folder / "tiny.yaml", write_teacher(folder / "base.safetensors"))
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(None):
        assert guarded(lambda: app(["distill", str(recipe), "--out", str(folder / "run")])) == 0
    return World(recipe, folder / "run")


@pytest.fixture
def finished(world: World, tmp_path: Path) -> Path:
    """A copy of the whole run."""
    return Path(shutil.copytree(world.run, tmp_path / "run"))


@pytest.fixture
def stopped(finished: Path) -> Path:
    """The run as it was when update 16 of 24 was saved."""
    for name in ("student.safetensors", "results.md", "results.csv", "report.html"):
        (finished / name).unlink()
    shutil.rmtree(finished / "eval")
    (finished / "checkpoints" / "previous.pt").replace(finished / "checkpoints" / "last.pt")
    return finished


def same_student(a: Path, b: Path) -> bool:
    one, other = (load_mmdit(run / "student.safetensors").state_dict() for run in (a, b))
    return all(torch.equal(value, other[name]) for name, value in one.items())


def steps_logged(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes: writes fail as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# --- a run ----------------------------------------------------------------------------------------


def test_a_whole_run_leaves_everything_that_architecture_md_promises(world: World) -> None:
    run = world.run
    for name in (
        "recipe.yaml",
        "plan.json",
        "metrics.jsonl",
        "images/step_000024.png",
        "checkpoints/last.pt",
        "checkpoints/previous.pt",
        "student.safetensors",
        "eval/rows.jsonl",
        "eval/stamps.json",
        "summary.json",
        "report.html",
        "results.md",
        "results.csv",
    ):
        assert (run / name).is_file(), name
    assert not list(run.rglob("*.part"))
    assert steps_logged(run) == list(range(1, UPDATES + 1))
    assert {row.model for row in read_rows(run / "eval" / "rows.jsonl").rows} == {
        "teacher-6nfe",
        "student-4nfe",
    }


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("budget.updats=3", "budget.updats: unknown key; did you mean 'updates'?"),
        ("studnt.init=base", "studnt: unknown key; did you mean 'student'?"),
        ("teachers.base.weights=gone.safetensors", "there is no file gone.safetensors"),
        ("student.init=bsae", "no teacher is called 'bsae'; did you mean 'base'?"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused_before_anything_is_written(
    world: World, tmp_path: Path, fewstep: Fewstep, override: str, expected: str
) -> None:
    told = fewstep("distill", world.recipe, "--out", tmp_path / "run", "--set", override)
    assert expected in complaint(told, 2)
    assert not (tmp_path / "run").exists()


def test_a_missing_recipe_names_the_nearest_one(
    world: World, tmp_path: Path, fewstep: Fewstep
) -> None:
    told = fewstep("distill", world.recipe.with_name("tinny.yaml"), "--out", tmp_path / "run")
    assert "there is no such file; did you mean 'tiny.yaml'?" in complaint(told, 2)


def test_truncated_weights_are_refused_before_anything_is_written(
    tmp_path: Path, fewstep: Fewstep
) -> None:
    weights = write_teacher(tmp_path / "base.safetensors")
    size = weights.stat().st_size
    cut(weights)
    recipe = write_recipe(tmp_path / "tiny.yaml", weights)
    told = complaint(fewstep("distill", recipe, "--out", tmp_path / "run"), 2)
    assert f"base.safetensors is truncated: {size // 2} bytes of {size}" in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"channels": 4}, "channels 4 instead of 16"),
        ({"grid": 4}, "grid 4 instead of 8"),
        ({"vocabulary": 0, "text_width": 8}, r"vocabulary 0 instead of \d+, text_width 8 instead"),
    ],
)
def test_teachers_of_another_family_are_refused_and_the_folder_can_be_used_again(
    tmp_path: Path, fewstep: Fewstep, changes: dict[str, int], expected: str
) -> None:
    """A second teacher whose latents or text are not those of the first and of the data."""
    recipe = write_recipe(tmp_path / "tiny.yaml", write_teacher(tmp_path / "base.safetensors"))
    data = yaml.safe_load(recipe.read_text())
    other = write_teacher(tmp_path / "other.safetensors", **changes)
    data["teachers"]["other"] = data["teachers"]["base"] | {"weights": str(other)}
    data["guidance"] = [{"weights": [{"base": 0.5, "other": 0.5}]}]
    recipe.write_text(yaml.safe_dump(data))
    told = complaint(fewstep("distill", recipe, "--out", tmp_path / "run"), 2)
    assert told.startswith("teachers.other.weights: ") and re.search(expected, told)
    assert "is of another family than the data" in told

    write_teacher(tmp_path / "other.safetensors", seed=1)
    told = fewstep("distill", recipe, "--out", tmp_path / "run", "--set", "budget.updates=2")
    assert told.code == 0


# --- resume ---------------------------------------------------------------------------------------


def test_ctrl_c_says_where_the_state_is_and_a_resumed_run_equals_the_uninterrupted_one(
    world: World, tmp_path: Path, fewstep: Fewstep
) -> None:
    out = tmp_path / "run"
    arguments = ["distill", str(world.recipe), "--out", str(out)]
    process = subprocess.Popen(
        # a long evaluation, so that the signal comes in time on any machine
        [sys.executable, "-m", "fewstep.cli", *arguments, "--set", "evaluation.per_category=999"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # as here: sums depend on the threads
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    last = out / "checkpoints" / "last.pt"
    wait_for(last.exists, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == f"error: stopped by you; state kept in {last}, go on with --resume\n"

    told = fewstep(*arguments, "--resume")
    assert told.code == 0 and re.search(r"resumed at update (8|16|24) of 24", told.out)
    assert same_student(out, world.run)
    assert steps_logged(out) == steps_logged(world.run)


def test_a_truncated_checkpoint_falls_back_on_the_one_before_it(
    world: World, finished: Path, fewstep: Fewstep
) -> None:
    cut(finished / "checkpoints" / "last.pt")
    (finished / "student.safetensors").unlink()
    told = fewstep("distill", world.recipe, "--out", finished, "--resume")
    assert told.code == 0
    assert re.search(
        r"last\.pt: truncated or damaged \(\w+\); going on from the one before it, .*previous\.pt",
        told.out,
    )
    assert "resumed at update 16 of 24" in told.out
    assert same_student(finished, world.run)
    assert steps_logged(finished) == steps_logged(world.run)


def test_without_any_whole_checkpoint_both_are_named(
    world: World, finished: Path, fewstep: Fewstep
) -> None:
    for name in ("last.pt", "previous.pt"):
        cut(finished / "checkpoints" / name)
    told = complaint(fewstep("distill", world.recipe, "--out", finished, "--resume"), 4)
    assert re.search(r"last\.pt: truncated.*previous\.pt: truncated.*start anew", told)


def test_a_full_disk_keeps_the_checkpoint_and_says_what_to_do(
    world: World, stopped: Path, fewstep: Fewstep
) -> None:
    last = stopped / "checkpoints" / "last.pt"
    before = last.read_bytes()
    with full_disk(len(before) // 2):
        told = fewstep("distill", world.recipe, "--out", stopped, "--resume")
    assert complaint(told, 6) == (
        f"checkpoint {last}: could not be written (File too large), the one before it is "
        "untouched; make room, then go on with --resume"
    )
    assert last.read_bytes() == before
    assert [file.name for file in last.parent.iterdir()] == ["last.pt"]
    assert fewstep("distill", world.recipe, "--out", stopped, "--resume").code == 0
    assert same_student(stopped, world.run)


@pytest.mark.parametrize("lost", ["student.safetensors", "eval/rows.jsonl", "report.html", ""])
def test_a_full_disk_has_one_exit_code_whatever_is_written(
    world: World, finished: Path, fewstep: Fewstep, lost: str
) -> None:
    """The student, rows and images, a report, a sample; the same command is right afterwards."""
    if lost:
        (finished / lost).unlink()
    command = {
        "student.safetensors": ("distill", world.recipe, "--out", finished, "--resume"),
        "eval/rows.jsonl": ("eval", finished),
        "report.html": ("report", finished),
        "": ("sample", finished, "-p", "a red house", "--seeds", "0-1"),
    }[lost]
    with full_disk(1000):
        complaint(fewstep(*command), 6)
    assert fewstep(*command).code == 0


def test_another_recipe_or_retrained_teachers_are_not_resumed(
    world: World, stopped: Path, fewstep: Fewstep
) -> None:
    kept = (stopped / "recipe.yaml").read_text()
    told = fewstep("distill", world.recipe, "--out", stopped, "--resume", "--set", "seed=5")
    assert re.search("recipe is not what this run began with", complaint(told, 4))

    weights = world.recipe.with_name("base.safetensors")
    before = weights.read_bytes()
    try:
        write_teacher(weights, seed=9)
        told = fewstep("distill", world.recipe, "--out", stopped, "--resume")
    finally:
        weights.write_bytes(before)
    assert "teachers.base.weights is not what this run began with" in complaint(told, 4)
    assert (stopped / "recipe.yaml").read_text() == kept


def test_the_recipe_that_a_run_keeps_resumes_it(stopped: Path, fewstep: Fewstep) -> None:
    told = fewstep("distill", stopped / "recipe.yaml", "--out", stopped, "--resume")
    assert told.code == 0 and "resumed at update 16 of 24" in told.out


def test_a_run_is_never_overwritten(world: World, stopped: Path, fewstep: Fewstep) -> None:
    told = complaint(fewstep("distill", world.recipe, "--out", stopped), 5)
    assert told == f"{stopped} already holds a run; go on with --resume, or choose another --out"
    told = complaint(fewstep("distill", world.recipe, "--out", world.recipe), 5)
    assert "no run can be kept there (File exists)" in told
    told = complaint(fewstep("distill", world.recipe, "--out", "/proc/none"), 5)
    assert "/proc/none: no run can be kept there (No such file" in told
    mine = stopped.parent / "recipe.yaml"
    mine.write_text("precious: true")
    told = complaint(fewstep("distill", world.recipe, "--out", stopped.parent), 5)
    assert "holds a recipe.yaml that no run wrote" in told
    assert mine.read_text() == "precious: true"


def test_a_start_without_a_checkpoint_can_be_repeated(
    world: World, stopped: Path, fewstep: Fewstep
) -> None:
    shutil.rmtree(stopped / "checkpoints")
    told = fewstep("distill", world.recipe, "--out", stopped, "--resume")
    assert "nothing to resume, there is no checkpoint; start it without" in complaint(told, 4)
    assert fewstep("distill", world.recipe, "--out", stopped).code == 0
    assert same_student(stopped, world.run)
    assert steps_logged(stopped) == steps_logged(world.run)


# --- teach ----------------------------------------------------------------------------------------


def test_a_teacher_falls_back_too_and_equals_the_uninterrupted_one(
    tmp_path: Path, fewstep: Fewstep
) -> None:
    config = tmp_path / "teach.yaml"
    config.write_text(
        "name: tiny-teacher\nsource: {kind: lab}\npool_size: 4\nprecision: fp32\n"
        "network: {width: 32, depth: 1, heads: 2}\ncomposition: {t2i: {portrait: 1}}\n"
        "mixture: {t2i: 1}\nbudget: {updates: 4, batch: 2}\n"
        "log: {every: 1, sample_every: 100, save_every: 1}\n"
    )
    out = tmp_path / "teacher"
    assert fewstep("teach", config, "--out", out).code == 0
    whole = load_mmdit(out / "teacher.safetensors").state_dict()
    steps = steps_logged(out)
    cut(out / "checkpoints" / "last.pt")
    told = fewstep("teach", config, "--out", out, "--resume", "--set", "budget.batch=3")
    assert "recipe is not what this run began with" in complaint(told, 4)
    told = fewstep("teach", config, "--out", out, "--resume")
    assert told.code == 0 and "resumed at update 3 of 4" in told.out
    assert "going on from the one before it" in told.out
    again = load_mmdit(out / "teacher.safetensors").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    assert steps_logged(out) == steps == [1, 2, 3, 4]

    told = complaint(fewstep("sample", out, "-p", "a person"), 5)
    assert "it holds a teacher; distil it first" in told
    for override, expected in (
        ("composition={t2i: {portrat: 1}}", "no t2i category 'portrat'; did you mean 'portrait'?"),
        ("composition={edit: {portrait: 1}}", "t2i has a share of the mixture, but no category"),
        ("mixture={t2i: 0}", "mixture: no task has a share"),
        ("init=gone.safetensors", "init: there is no file gone.safetensors"),
        ("network.heads=3", "heads must divide width"),
    ):
        told = fewstep("teach", config, "--out", tmp_path / "new", "--set", override)
        assert expected in complaint(told, 2)


# --- evaluation and report ------------------------------------------------------------------------


def test_seeds_per_case_draws_the_same_case_again_from_other_noise(
    finished: Path, fewstep: Fewstep
) -> None:
    recipe = finished / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("seeds_per_case: 1", "seeds_per_case: 2"))
    assert fewstep("eval", finished).code == 0
    lines = (finished / "eval" / "rows.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for model in {row["model"] for row in rows}:
        twice = [row for row in rows if (row["model"], row["case"]) == (model, "t2i-portrait-0000")]
        assert len({row["seed"] for row in twice}) == 2
        assert len({row["prompt"] for row in twice}) == 1
        one, other = ((finished / "eval" / row["image"]).read_bytes() for row in twice)
        assert one != other


@pytest.mark.slow
def test_ctrl_c_in_an_evaluation_keeps_what_is_scored(finished: Path, fewstep: Fewstep) -> None:
    recipe, rows = finished / "recipe.yaml", finished / "eval" / "rows.jsonl"
    rows.unlink()
    # long, so that the signal comes in time on any machine; then short, to see the end
    recipe.write_text(recipe.read_text().replace("per_category: 1\n", "per_category: 400\n"))
    process = subprocess.Popen(
        [sys.executable, "-m", "fewstep.cli", "eval", str(finished)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: rows.exists() and rows.stat().st_size > 0, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == (
        f"error: stopped by you; what is scored is kept, `fewstep eval {finished}` goes on\n"
    )
    before = rows.read_bytes()
    assert before.endswith(b"\n") and before.count(b"\n") < 1600

    recipe.write_text(recipe.read_text().replace("per_category: 400\n", "per_category: 33\n"))
    assert fewstep("eval", finished).code == 0
    assert rows.read_bytes().startswith(before)
    assert read_rows(rows).superseded == 0 and len(read_rows(rows).rows) >= 4 * 33


def test_an_evaluation_cut_off_in_the_middle_keeps_its_rows_and_goes_on(
    finished: Path, fewstep: Fewstep
) -> None:
    rows = finished / "eval" / "rows.jsonl"
    lines = rows.read_bytes().splitlines(keepends=True)
    rows.write_bytes(lines[0] + lines[1] + lines[2][:40])
    drawn = {row.image for row in read_rows(rows).rows}
    before = {name: (finished / "eval" / name).stat().st_mtime_ns for name in drawn}
    assert fewstep("eval", finished).code == 0
    after = rows.read_bytes().splitlines(keepends=True)
    assert after[:2] == lines[:2] and len(after) == len(lines)
    scores = [[json.loads(line)["score"] for line in text] for text in (after, lines)]
    assert scores[0] == scores[1]
    assert {n: (finished / "eval" / n).stat().st_mtime_ns for n in drawn} == before


def test_a_student_trained_anew_is_scored_anew_and_the_others_are_not(
    finished: Path, fewstep: Fewstep
) -> None:
    rows = finished / "eval" / "rows.jsonl"
    before = rows.read_bytes().splitlines()
    write_teacher(finished / "student.safetensors", seed=7)
    told = fewstep("eval", finished)
    assert told.code == 0
    expected = "student-4nfe is not what was scored here before: its 2 images are drawn again"
    assert expected in told.out
    after = rows.read_bytes().splitlines()
    of_teacher = [line for line in before if b'"teacher-' in line]
    assert len(after) == len(before) and after[: len(of_teacher)] == of_teacher
    assert after[len(of_teacher) :] != before[len(of_teacher) :]

    told = fewstep("eval", finished)  # nothing has changed now
    assert told.code == 0 and "drawn again" not in told.out
    assert rows.read_bytes().splitlines() == after


def test_an_unfinished_run_has_no_student_to_evaluate_or_sample(
    stopped: Path, fewstep: Fewstep
) -> None:
    for command in (("eval", stopped), ("sample", stopped, "-p", "a person")):
        told = complaint(fewstep(*command), 5)
        assert "its student is not finished" in told and "--resume` goes on" in told


def test_models_that_cannot_be_told_apart_or_lack_the_task(
    finished: Path, fewstep: Fewstep
) -> None:
    recipe = finished / "recipe.yaml"
    data = yaml.safe_load(recipe.read_text())
    data["teachers"]["base"]["steps"] = 2
    data["evaluation"]["models"] = ["teacher", "teacher_cut"]
    recipe.write_text(yaml.safe_dump(data))
    told = complaint(fewstep("eval", finished), 2)
    assert told.startswith("evaluation.models: two of them are called teacher-4nfe")

    data["teachers"]["base"] |= {"tasks": ["t2i"], "cfg": {"t2i": 2.0}}
    data["evaluation"]["models"] = ["teacher"]
    recipe.write_text(yaml.safe_dump(data))
    Image.new("RGB", (32, 32)).save(finished / "source.png")
    arguments = ("--source", finished / "source.png", "--instruction", "add a hat")
    told = fewstep("sample", finished, *arguments, "--model", "teacher")
    assert complaint(told, 2).startswith("--model: teacher-4nfe was not trained for edit")


def test_report_of_nothing(tmp_path: Path, fewstep: Fewstep) -> None:
    told = complaint(fewstep("report", tmp_path / "none"), 5)
    assert told.startswith(f"run folder {tmp_path / 'none'}: there is none")
    told = complaint(fewstep("report", tmp_path), 5)
    assert told.startswith(f"run folder {tmp_path}: nothing to report in it")
    assert not list(tmp_path.iterdir())
    told = complaint(fewstep("eval", tmp_path), 5)
    assert told.startswith(f"run folder {tmp_path}: no plan.json in it; give a folder")


# --- sample ---------------------------------------------------------------------------------------


def test_source_images_of_every_kind_are_taken_and_changes_are_told(
    world: World, tmp_path: Path, fewstep: Fewstep
) -> None:
    grey = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)
    clear = Image.fromarray(np.dstack([np.full((48, 64, 3), 90), grey // 257]).astype(np.uint8))
    for name, image, told_of in (
        ("rgba.png", clear, "transparent and laid on white"),
        ("grey.png", clear.convert("L"), "L and converted to RGB"),
        ("palette.gif", clear.convert("RGB").quantize(8), "P and converted to RGB"),
        ("cmyk.jpg", clear.convert("CMYK"), "CMYK and converted to RGB"),
        ("deep.png", Image.fromarray(grey), "16-bit grey and reduced to 8 bits"),
        ("tiny.png", Image.new("RGB", (3, 2), "red"), "3 x 2 pixels, enlarged to 32 x 32"),
        ("large.png", Image.new("RGB", (300, 90), "red"), "of which the centred 90 x 90 are taken"),
    ):
        image.save(tmp_path / name)
        arguments = ("--source", tmp_path / name, "--instruction", "make it a pencil sketch")
        out = tmp_path / f"{name}.out.png"
        told = fewstep("sample", world.run, *arguments, "--seeds", "0-1", "--out", out)
        assert told.code == 0 and told_of in told.out, name
        assert f"2 images by student-4nfe: {out}" in told.out and out.is_file()


def test_a_picture_that_cannot_be_placed_is_refused_before_anything_is_drawn(
    world: World, tmp_path: Path, fewstep: Fewstep
) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "folder" / "out.png"
    told = complaint(fewstep("sample", world.run, "-p", "a person", "--out", out), 2)
    assert told.startswith(f"--out: no folder {out.parent} can be made (Not a directory)")


def test_source_images_that_cannot_be_read(world: World, tmp_path: Path, fewstep: Fewstep) -> None:
    Image.effect_noise((64, 64), 60).convert("RGB").save(tmp_path / "cut.png")
    cut(tmp_path / "cut.png")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").touch()
    for name, expected in (
        ("gone.png", "cannot be read (No such file or directory)"),
        ("text.png", "no image, or damaged; PNG, JPEG"),
        ("empty.png", "no image, or damaged; PNG, JPEG"),
        ("cut.png", "cannot be read"),
        ("", "cannot be read (Is a directory)"),
    ):
        arguments = ("--source", tmp_path / name, "--instruction", "make it a pencil sketch")
        told = fewstep("sample", world.run, *arguments, "--out", tmp_path / "out.png")
        message = complaint(told, 3)
        assert message.startswith(f"source image {tmp_path / name}: ") and expected in message
        assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a portrait of a persn", "do not know the word 'persn'; did you mean 'person'?"),
        ("a zyxw", "do not know the word 'zyxw'"),
        ('a poster reading " 7UP "', "sign text '7UP' needs 1 to 5 letters"),
        ("", "prompt: empty; say what to draw"),
        ("a person , " * 9, "27 words, commas and letters of signs; the lab's teachers read 24"),
    ],
)
def test_prompts_that_the_lab_does_not_understand(
    world: World, tmp_path: Path, fewstep: Fewstep, prompt: str, expected: str
) -> None:
    told = fewstep("sample", world.run, "-p", prompt, "--out", tmp_path / "out.png")
    assert expected in complaint(told, 3)
    assert not (tmp_path / "out.png").exists()


def test_the_lab_tells_its_words(fewstep: Fewstep) -> None:
    told = fewstep("lab", "words")
    assert told.code == 0 and " sunset " in told.out and "1 to 5 letters" in told.out


def test_prompt_files(world: World, tmp_path: Path, fewstep: Fewstep) -> None:
    file, out = tmp_path / "prompts.txt", tmp_path / "out.png"
    for content, expected in (
        (b"", "no prompt in it; write one a line"),
        (b"\n  \n", "no prompt in it; write one a line"),
        (b"a person\n\xff\xfe", "is not UTF-8 text (byte 9); save it as UTF-8"),
    ):
        file.write_bytes(content)
        told = complaint(fewstep("sample", world.run, "--prompt-file", file, "--out", out), 3)
        assert told == f"prompt file {file}: {expected}"
    told = complaint(fewstep("sample", world.run, "--prompt-file", tmp_path / "none"), 3)
    assert "none: cannot be read (No such file or directory)" in told
    file.write_bytes("\ufeffa person\n\nface , happy\n".encode())
    told = fewstep("sample", world.run, "--prompt-file", file, "--seeds", "0-2", "--out", out)
    assert told.code == 0 and "6 images by student-4nfe" in told.out
    pool = tmp_path / "pool.jsonl"
    pool.write_text('{"prompt": "a person", "category": "portrait"}\n{"prompt": "face , happy"}\n')
    told = fewstep("sample", world.run, "--prompt-file", pool, "--seeds", "0-2", "--out", out)
    assert told.code == 0 and "6 images by student-4nfe" in told.out
    pool.write_text('{"promt": "a person"}\n')
    told = fewstep("sample", world.run, "--prompt-file", pool, "--out", out)
    assert told.code == 3 and "pool.jsonl line 1" in told.err
    assert "did you mean 'prompt'" in told.err


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (("--steps", "8"), 2, "--steps: 8 steps of a student trained for 4; leave it out, or use"),
        (("--model", "studnt"), 2, "--model: 'studnt' is no model; use student, teacher or"),
        (("--model", "teacher:bse"), 2, "no teacher 'bse'; did you mean 'base'?"),
        (("--out", "picture"), 2, "--out: picture is no picture; end it in one of .png"),
        (("--seeds", "3-1"), 2, "--seeds: '3-1' is no seed or range"),
    ],
)
def test_options_of_sample_that_cannot_be(
    world: World, fewstep: Fewstep, arguments: tuple[str, ...], code: int, expected: str
) -> None:
    assert expected in complaint(fewstep("sample", world.run, "-p", "face", *arguments), code)


def test_sample_of_runs_and_weights_that_are_not_there(
    world: World, finished: Path, tmp_path: Path, fewstep: Fewstep
) -> None:
    told = complaint(fewstep("sample", tmp_path / "none", "-p", "face"), 5)
    assert told == f"{tmp_path / 'none'}: there is no such run folder or weight file"
    student, out = finished / "student.safetensors", tmp_path / "out.png"
    told = complaint(fewstep("sample", student, "-p", "face", "--model", "teacher"), 2)
    assert "is a weight file, which is taken for the student's; give the run folder" in told
    assert fewstep("sample", student, "-p", "face", "--out", out).code == 0
    told = fewstep("sample", finished, "-p", "face", "--model", "teacher", "--steps", "2",
                   "--out", out)  # fmt: skip
    assert told.code == 0 and "4 images by teacher-4nfe" in told.out
    cut(student)
    assert "damaged" in complaint(fewstep("sample", finished, "-p", "face", "--out", out), 4)
    write_teacher(student, channels=4)
    told = complaint(fewstep("sample", finished, "-p", "face", "--out", out), 2)
    assert told.startswith("student: ") and "channels 4 instead of 16" in told


# --- progress -------------------------------------------------------------------------------------

NOTE = "loss/fake 0.123 grad_norm/student 0.123 [b]grad_norm/fake[/b] 12.123 and more of the same"


def shown_progress(monkeypatch: pytest.MonkeyPatch, *, terminal: bool, done: int = 0) -> str:
    """What 80 columns see of updates `done` to 300, ten seconds each."""
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=terminal, color_system=None)
    clock = itertools.count(0, 10)
    monkeypatch.setattr(session, "console", console)
    monkeypatch.setattr(session.time, "monotonic", lambda: float(now[0]))
    now = [next(clock)]
    with session.progress("distil", 300, done) as advance:
        for step in (done + 1, done + 2, 300):
            now[0] = next(clock)
            advance(step, NOTE)
    return out.getvalue()


def test_a_long_note_leaves_count_and_time_left_on_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = shown_progress(monkeypatch, terminal=True).replace("\r", "\n").splitlines()
    assert any("300/300" in line and "loss/fake" in line for line in lines)
    assert not any("same" in line for line in lines), "cut, and not on another line"
    assert all(len(re.sub(r"\x1b\[[0-9?]*[a-zA-Z]", "", line)) <= 80 for line in lines)


def test_without_a_terminal_progress_is_a_whole_line_with_the_time_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = shown_progress(monkeypatch, terminal=False, done=100).splitlines()
    assert lines == [
        f"distil: 102/300, 0.10/s, 33 min 00 s left. {NOTE}",
        f"distil: 300/300, 6.67/s. {NOTE}",
    ]
