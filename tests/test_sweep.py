"""Studies: what is refused, what is never mixed, what survives a kill, and what it will cost."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from fewstep.errors import CellsFailed, RecipeError, RunError
from fewstep.evals.rows import read_rows
from fewstep.recipe.facts import local_machine
from fewstep.recipe.judging import GREETING
from fewstep.recipe.load import load_layered, load_recipe
from fewstep.recipe.plan import make_plan
from fewstep.recipe.schema import Task
from fewstep.sweep import layout
from fewstep.sweep.command import check_folder, known_measurement, pick
from fewstep.sweep.command import sweep as run_sweep
from fewstep.sweep.devices import CPU, Slot, cores_here, last_words, make_slots, visible_gpus
from fewstep.sweep.emit import Target, check_target, emit
from fewstep.sweep.engine import MAX_ATTEMPTS, Work, check_identities, run_queue
from fewstep.sweep.layout import (
    CellState,
    cell_folder,
    code_hash,
    identity_of,
    lock,
    open_study,
    read_state,
    write_state,
    write_study,
)
from fewstep.sweep.predict import (
    Costs,
    Measurement,
    measure,
    nominal,
    predict,
    predict_all,
    requests_to_measure,
    wall_clock,
)
from fewstep.sweep.progress import Display, duration, last_update
from fewstep.sweep.study import Cell, load_study, make_cells, make_reference
from tests.test_judge import Seen, brightness, eyes
from tests.test_run import same_student, steps_logged, write_recipe, write_teacher

ROOT = Path(__file__).parent.parent
STUDIES = ROOT / "recipes" / "studies"

Write = Callable[..., Path]


def study_in(folder: Path) -> Write:
    """A study of two variants over a tiny recipe; keywords replace its fields."""
    base = write_recipe(folder / "tiny.yaml", write_teacher(folder / "base.safetensors"))

    def write_study_file(**changes: Any) -> Path:
        study = {
            "name": "small",
            "question": "does it run?",
            "base": base.name,
            "budget": {"updates": 6, "batch": 2},
            "set": {"log.save_every": 2, "log.probe": None},
            "variants": {
                "slow": {"title": "one fake update"},
                "fast": {"title": "three", "set": {"objective": {"fake_updates": 3}}},
            },
            "reference": ["teacher"],
            "evaluation": {"per_category": 2, "seed": 50},
        }
        path = folder / "small.yaml"
        path.write_text(yaml.safe_dump(study | changes, sort_keys=False))
        return path

    return write_study_file


@pytest.fixture
def write(tmp_path: Path) -> Write:
    return study_in(tmp_path)


def cells_of(path: Path) -> tuple[Cell, ...]:
    return make_cells(load_study(path))


# --- what a study asks ----------------------------------------------------------------------------


def test_a_cell_is_the_base_with_the_layers_over_it(write: Write):
    path = write(
        seeds=[0, 7],
        set={"log.save_every": 2, "optim": {"student": {"lr": 0.5}}},
        variants={
            "a": {"title": "a", "set": {"data.mixture.edit": 3}},
            "b": {"title": "b", "set": {"optim.student.lr": 0.25, "guidance": [GUIDED]}},
        },
    )
    study = load_study(path)
    cells = make_cells(study)
    assert [(c.index, c.name) for c in cells] == [
        (0, "a/seed0"),
        (1, "b/seed0"),
        (2, "a/seed7"),
        (3, "b/seed7"),
    ]
    a, b = cells[0].recipe, cells[3].recipe
    assert a.data.mixture == {"t2i": 1, "edit": 3} and b.data.mixture == {"t2i": 1, "edit": 1}
    assert (a.optim.student.lr, b.optim.student.lr) == (0.5, 0.25)
    assert a.optim.fake.lr == 1e-4, "a nested override leaves its neighbours"
    assert (a.seed, b.seed, b.name) == (0, 7, "small-b")
    assert len(a.guidance) == 1 and b.guidance[0].when.task is None
    for cell in cells:
        evaluation = cell.recipe.evaluation
        assert (evaluation.models, evaluation.per_category, evaluation.seed) == (
            ("student",),
            2,
            50,
        )
        assert cell.recipe.log.save_every == 2 and cell.plan.updates == 6
    reference = make_reference(study, cells)
    assert reference is not None and reference.recipe.evaluation.models == ("teacher",)
    assert reference.recipe.evaluation.seed == 50
    assert reference.recipe.log.save_every == 2, "what is set for all cells is set for it"


GUIDED = {"weights": [{"base": 1.0}] * 4}


def test_a_layer_of_another_kind_replaces_and_mistakes_name_their_layer(write: Write):
    write()
    base = Path(load_study(write()).base)
    layers = [("variants.x.set", {"student.grid": {"kind": "explicit", "t": [1.0, 0.5]}})]
    assert load_layered(base, layers).student.grid.model_dump() == {
        "kind": "explicit",
        "t": (1.0, 0.5),
    }
    with pytest.raises(RecipeError, match=r"variants\.x\.set: budget\.updats: unknown key"):
        load_layered(base, [("variants.x.set", {"budget.updats": 3})])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [1, 1]}, "seeds: names a seed twice"),
        ({"roles": {"e1": "slo"}}, r"roles\.e1: no variant is called 'slo'; did you mean 'slow'"),
        ({"reference": ["student"]}, "reference: 'student' is judged in every cell"),
        ({"evaluation": {"models": ["teacher"]}}, r"evaluation\.models: is decided by the study"),
        ({"budget": {"updates": 6}}, r"budget\.batch: is missing"),
    ],
)
def test_mistakes_in_the_study_file(write: Write, changes: dict[str, Any], message: str):
    with pytest.raises(RecipeError, match=message):
        load_study(write(**changes))


POOLS = {"scene": {"task": "edit", "category": "scene", "size": 4}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"budget.updates": 7}, "makes 7 updates of 14 samples in all, the study's budget is 6 of"),
        ({"budget.batch": 4}, "makes 6 updates of 24 samples"),
        ({"budget": {"updates": 3, "batch": 4}}, "makes 3 updates of 12 samples"),
        ({"evaluation.seed": 50}, "is the same recipe as slow"),
        ({"evaluation.seeds_per_case": 2}, "is judged on other cases than slow"),
        ({"log.probe": {"per_category": 3}}, "is measured otherwise during training than slow"),
        ({"data.pools": POOLS}, "has other categories than slow"),
        ({"name": "else"}, "is the same recipe as slow"),
        ({"budget.batch": 3}, "3 does not divide over micro_batch 2"),
    ],
)
def test_variants_that_cannot_be_compared_are_refused(
    write: Write, override: dict[str, Any], message: str
):
    variants = {"slow": {"title": "a"}, "odd": {"title": "b", "set": override}}
    with pytest.raises(RecipeError, match=message) as raised:
        cells_of(write(variants=variants))
    assert "variants.odd" in str(raised.value)


def test_equal_compute_lets_updates_differ_and_operations_not(write: Write):
    """Three fake updates instead of one: 2.5 + 2 + 1.5 + 1 + 3 x 5.5 = 23.5 for 12.5."""

    def variants(updates: int) -> dict[str, Any]:
        override = {"objective.fake_updates": 3, "budget.updates": updates}
        return {"slow": {"title": "a"}, "fast": {"title": "b", "set": override}}

    budget = {"updates": 100, "batch": 2, "equal": "compute"}
    cells = cells_of(write(budget=budget, variants=variants(53)))
    assert [cell.plan.updates for cell in cells] == [100, 53]
    flops = [cell.plan.cost.flop for cell in cells]
    assert flops[1] / flops[0] == pytest.approx(1, abs=0.03)
    with pytest.raises(RecipeError, match=r"spends 1\.13 times .* use budget\.updates: 53"):
        cells_of(write(budget=budget, variants=variants(60)))
    with pytest.raises(RecipeError, match=r"spends 0\.85 times .* use budget\.updates: 53"):
        cells_of(write(budget=budget, variants=variants(45)))
    larger = {"slow": {"title": "a"}, "odd": {"title": "b", "set": {"budget.batch": 4}}}
    with pytest.raises(RecipeError, match=r"odd: has batches of 4, the study of 2"):
        cells_of(write(budget=budget, variants=larger))
    with pytest.raises(RecipeError, match="makes 53 updates"):
        cells_of(write(budget=budget | {"equal": "updates"}, variants=variants(53)))


def test_the_shipped_studies_ask_what_the_papers_tables_ask():
    composition = cells_of(STUDIES / "composition.yaml")
    sizes = {c.variant: sum(q.size for q in c.plan.pools) for c in composition}
    assert sizes == {"e1": 1000, "e2": 1000, "e3": 1000, "e4": 2000, "e5": 3000}
    assert all(c.plan.teachers == ("base",) for c in composition)
    mixture = cells_of(STUDIES / "mixture.yaml")
    share = {
        c.variant: sum(q.share for q in c.plan.tasks if q.task == "edit")
        for c in mixture
        if c.seed == 0
    }
    expected = {"zero_shot": 0, "r9to1": 0.1, "r7to3": 0.3, "r5to5": 0.5, "r3to7": 0.7}
    assert share == pytest.approx(expected)
    guidance = {c.variant: c.plan for c in cells_of(STUDIES / "guidance.yaml")}
    assert guidance["base_only"].teachers == ("base",)
    assert guidance["specialised_only"].teachers == ("t2i", "edit")
    conditions: list[tuple[Task, str]] = [("t2i", "text"), ("edit", "style")]
    for task, category in conditions:
        shares = {
            name: sum(row.get(task, 0.0) for row in guidance[name].weights(task, category))
            for name in ("constant", "stepwise")
        }
        assert shares["constant"] == shares["stepwise"] == 1.5
        assert guidance["stepwise"].weights(task, category)[0] == {"base": 1.0}
    assert guidance["adaptive"].condition("edit", "style").adaptive is not None


def test_the_reference_is_judged_on_the_cases_of_the_cells_or_refused(write: Write):
    more = {"data.pools": POOLS}
    study = load_study(
        write(
            variants={
                "a": {"title": "a", "set": more},
                "b": {"title": "b", "set": more | {"objective.fake_updates": 3}},
            }
        )
    )
    with pytest.raises(RecipeError, match="base: has other categories than the variants"):
        make_reference(study, make_cells(study))


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_study_judges_all_categories_on_the_same_cases(path: Path):
    study = load_study(path)
    cells = make_cells(study)
    reference = make_reference(study, cells)
    assert reference is not None and study.takeaways is not None
    assert len(cells[0].recipe.data.conditions()) == 9
    for cell in cells:
        judged = cell.recipe.evaluation.model_dump(exclude={"models"})
        assert judged == reference.recipe.evaluation.model_dump(exclude={"models"})
    assert set(study.roles.values()) <= set(study.variants)


# --- never mixed ----------------------------------------------------------------------------------


def test_the_code_hash_knows_code_and_weights_but_not_the_rooms_beside(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    package = tmp_path / "package"
    beside = ("sweep/queue.py", "study_report/tables.py", "prompts/cli.py", "export/card.py")
    for name in ("train/step.py", *beside):
        (package / name).parent.mkdir(parents=True)
        (package / name).write_text("a = 1\n")
    monkeypatch.setattr(layout, "PACKAGE", package)
    recipe = cells_of(write())[0].recipe
    first = code_hash(recipe)
    for name in beside:
        (package / name).write_text("a = 22\n")
    assert code_hash(recipe) == first
    (package / "train/step.py").write_text("a = 22\n")
    second = code_hash(recipe)
    assert second != first
    write_teacher(tmp_path / "base.safetensors", seed=1)
    assert code_hash(recipe) not in (first, second)


def test_the_code_hash_knows_torch_and_the_weights_that_no_recipe_names(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = cells_of(write())[0].recipe
    for name in layout.LAB_INSTRUMENTS:
        (tmp_path / f"{name}.safetensors").write_text("a")
    monkeypatch.setattr(layout, "BUNDLED_WEIGHTS", tmp_path)
    found = [code_hash(recipe)]
    for name in layout.LAB_INSTRUMENTS:
        (tmp_path / f"{name}.safetensors").write_text("bb")
        found.append(code_hash(recipe))
    monkeypatch.setattr(layout, "version", lambda package: f"another {package}")
    assert len({*found, code_hash(recipe)}) == 4


def test_what_is_measured_during_training_is_a_part_of_the_identity(write: Write):
    probed = {"every": 2, "per_category": 1, "seeds": 2}
    one, two = (identity_of(cells_of(write(probe=probe))[0]) for probe in ({}, probed))
    assert one.code_hash == two.code_hash and one.evaluation_hash != two.evaluation_hash


def test_how_many_images_are_drawn_at_once_is_no_part_of_the_identity(write: Write):
    cell = cells_of(write())[0]
    drawn = cell.recipe.evaluation.model_copy(update={"batch": 3})
    other = replace(cell, recipe=cell.recipe.model_copy(update={"evaluation": drawn}))
    assert identity_of(other) == identity_of(cell)


def test_a_reader_never_sees_half_of_a_state(tmp_path: Path):
    path = tmp_path / "cell.json"
    layout.write_atomically(path, "the state before")
    with path.open() as reader:
        layout.write_atomically(path, "after")
        assert reader.read() == "the state before"
    assert path.read_text() == "after" and list(tmp_path.iterdir()) == [path]


def finished(cell: Cell, **changes: Any) -> CellState:
    state = {"status": "done", "device": CPU, "threads": 2, "seconds": 10.0, "starts": 1}
    return CellState(**(identity_of(cell)._asdict() | state | changes))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"code_hash": "old"}, "other code or weights"),
        ({"recipe_hash": "old"}, "another recipe"),
        ({"evaluation_hash": "old"}, "another evaluation"),
    ],
)
def test_cells_made_differently_are_refused_by_name_and_redone_when_asked(
    write: Write, tmp_path: Path, changes: dict[str, str], named: str
):
    cells, out = cells_of(write()), tmp_path / "out"
    folders = [cell_folder(out, cell) for cell in cells]
    write_state(folders[0], finished(cells[0]))
    write_state(folders[1], finished(cells[1], **changes))
    with pytest.raises(RunError, match=rf"1 of 2 .* fast/seed0 \({named}\); .*--redo"):
        check_identities(out, cells, redo=False)
    write_study(out, load_study(write()), cells, {cell.name: 1.0 for cell in cells})
    with pytest.raises(RunError, match=f"{named} than the study's other cells"):
        open_study(out)
    check_identities(out, cells, redo=True)
    assert read_state(folders[0]) == finished(cells[0]) and not folders[1].exists()


def test_an_unfinished_cell_is_stale_from_its_first_checkpoint_on(write: Write, tmp_path: Path):
    cells = cells_of(write())
    folder = cell_folder(tmp_path / "out", cells[0])
    write_state(folder, finished(cells[0], status="running", code_hash="old"))
    check_identities(tmp_path / "out", cells, redo=False)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "previous.pt").touch()
    with pytest.raises(RunError, match="slow/seed0"):
        check_identities(tmp_path / "out", cells, redo=False)


def test_redo_runs_cells_again_that_were_given_up_and_leaves_those_at_work(
    write: Write, tmp_path: Path
):
    cells, out = cells_of(write()), tmp_path / "out"
    folders = [cell_folder(out, cell) for cell in cells]
    for cell, folder, attempts in zip(cells, folders, (MAX_ATTEMPTS, MAX_ATTEMPTS - 1)):
        write_state(folder, finished(cell, status="failed", attempts=attempts))
    check_identities(out, cells, redo=False)
    claim = lock(folders[0])
    assert claim is not None
    with claim, pytest.raises(RunError, match="another sweep is at work on slow/seed0"):
        check_identities(out, cells, redo=True)
    assert read_state(folders[0]) is not None
    check_identities(out, cells, redo=True)
    assert not folders[0].exists() and read_state(folders[1]) is not None


def test_a_claim_lives_as_long_as_the_run_that_inherited_it(tmp_path: Path):
    claim = lock(tmp_path)
    assert claim is not None and lock(tmp_path) is None
    run = subprocess.Popen(["sleep", "60"], pass_fds=[claim.fileno()])
    claim.close()
    assert lock(tmp_path) is None, "the sweep is gone, its run is not"
    run.kill()
    run.wait()
    again = lock(tmp_path)
    assert again is not None
    again.close()


# --- cost -----------------------------------------------------------------------------------------

COSTS = Costs(
    start=3.0,
    load=2.0,
    prompt={"edit": 0.5},
    operation=1e-9,
    image=0.25,
    evaluation=0.125,
    once=4.0,
)


def measured() -> Measurement:
    return Measurement(device=CPU, threads=2, code="x", costs={"dmd": COSTS})


def test_a_cells_seconds_are_the_sum_of_its_parts(write: Write):
    def beside_training(**changes: Any) -> float:
        cell = cells_of(write(**changes))[0]
        return predict(cell, measured()) - cell.plan.cost.flop * 1e-9

    # 4 edit prompts; 2 categories of 2 cases
    parts = 3.0 + 2.0 + 4 * 0.5 + 4 * 0.25
    assert beside_training() == pytest.approx(parts + 4.0)
    # 2 categories x 3 cases x 5 seeds by the teacher once, by the student after 4 and 6 updates
    probe = {"every": 4, "per_category": 3, "seeds": 5}
    assert beside_training(probe=probe) == pytest.approx(parts + 30 * 4.0 + 2 * 30 * 0.25)
    probe = {"steps": [1, 2, 6], "per_category": 3, "seeds": 5}
    assert beside_training(probe=probe) == pytest.approx(parts + 30 * 4.0 + 3 * 30 * 0.25)
    # An untrained task has no prompts and is not probed, but it is judged.
    changes = {"probe": probe, "set": {"data.mixture.edit": 0}}
    expected = parts - 4 * 0.5 + 15 * 4.0 + 3 * 15 * 0.25
    assert beside_training(**changes) == pytest.approx(expected)
    # Of several kinds of objective that were measured, the cell's own counts.
    cell, other = cells_of(write())[0], COSTS.model_copy(update={"start": 99.0})
    both = measured().model_copy(update={"costs": {"tdm": other, "dmd": COSTS}})
    assert predict(cell, both) == predict(cell, measured())


JUDGE = {"kind": "endpoint", "url": "http://localhost:9/v1", "model": "seer", "repeats": 3}
"""Of the judge of a study; nobody answers there."""


def judged(**changes: Any) -> dict[str, Any]:
    return changes | {"evaluation": {"per_category": 2, "seed": 50, "judge": JUDGE}}


def test_a_dry_run_adds_up_what_the_judge_is_asked(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """2 categories of 2 cases, 3 judgements each and 2 requests to begin with; the reference has
    the same cases of the teacher. 2 variants with 2 seeds, of which one cell is done."""
    path, out = write(**judged(seeds=[0, 1])), tmp_path / "out"
    cells = cells_of(path)
    write_study(out, load_study(path), cells, {cell.name: 1.0 for cell in cells})
    write_state(cell_folder(out, cells[1]), finished(cells[1]))

    def dry(**changes: Any) -> str:
        capsys.readouterr()
        options = {"overrides": {}, "environment": {}, "dry_run": True, "measure_first": False}
        run_sweep(write(seeds=[0, 1], **changes), out=out, **options)
        return capsys.readouterr().out

    told = dry(**judged())
    assert "requests" in told and told.count(" 14 ") == 3, "each variant and the reference"
    assert "Up to 56 requests to seer for 16 images; its price is the endpoint's." in told
    assert "judge" not in dry() and "requests" not in dry()


def test_the_seconds_of_judging_are_part_of_a_cell(write: Write):
    slow = COSTS.model_copy(update={"judge": 10.0})
    slowly = measured().model_copy(update={"costs": {"dmd": slow}})
    own = cells_of(write())[0]
    assert predict(own, slowly) == predict(own, measured()), "its own judge, in `image`"
    path = write(**judged())
    for cell in (cells_of(path)[0], make_reference(load_study(path), cells_of(path))):
        assert cell and predict(cell, slowly) - predict(cell, measured()) == 4 * 10.0


def test_a_measurement_says_what_it_asks_of_the_judge(write: Write):
    """One short run by kind of objective: 2 categories, 2 models, 2 cases, and 2 to begin with."""
    variants = {
        "dmd": {"title": "dmd"},
        "more": {"title": "more of it", "set": {"objective": {"fake_updates": 3}}},
        "tdm": {"title": "tdm", "set": {"objective": {"kind": "tdm"}}},
    }
    cells = cells_of(write(**judged(variants=variants)))
    assert requests_to_measure(cells) == 2 * (2 * 2 * 2 * 3 + 2)
    assert requests_to_measure(cells_of(write(variants=variants))) == 0


def test_the_reference_models_cost_by_their_evaluations(write: Write):
    """Two images of each task: 3 steps with CFG of T2I, 3 without of editing, and the cut to 4."""
    study = load_study(write(reference=["teacher", "teacher_cut"]))
    reference = make_reference(study, make_cells(study))
    assert reference is not None
    nfe = 2 * 6 + 2 * 3 + 4 * 4
    assert predict(reference, measured()) == pytest.approx(3.0 + 2 * 4 * 0.25 + nfe * 0.125)
    # Unmeasured, by the plan alone: it trains nothing.
    assert nominal(reference) == reference.plan.cost.evaluation_seconds > 0
    cell = make_cells(study)[0]
    assert nominal(cell) == cell.plan.cost.seconds + cell.plan.cost.evaluation_seconds


def test_finished_cells_correct_the_prediction(write: Write, tmp_path: Path):
    cells, out, slot = cells_of(write(seeds=[0, 1])), tmp_path / "out", Slot(0, CPU, 2)
    raw = predict_all(cells, out, measured(), slot)
    assert raw == {cell.name: pytest.approx(predict(cell, measured())) for cell in cells}
    unmeasured = predict_all(cells, out, None, slot)
    assert unmeasured == {cell.name: pytest.approx(nominal(cell)) for cell in cells}
    took = 3 * raw["slow/seed0"]
    write_state(cell_folder(out, cells[0]), finished(cells[0], seconds=took))
    corrected = predict_all(cells, out, measured(), slot)
    assert corrected["slow/seed0"] == corrected["slow/seed1"] == pytest.approx(took)
    assert corrected["fast/seed1"] == pytest.approx(3 * raw["fast/seed1"])
    # What another device, or an interrupted start, took says nothing.
    for changes in ({"threads": 1}, {"starts": 2}, {"status": "failed"}):
        write_state(cell_folder(out, cells[0]), finished(cells[0], seconds=took, **changes))
        assert predict_all(cells, out, measured(), slot) == raw


def test_a_finished_cell_keeps_what_was_predicted_before_it_ran(write: Write, tmp_path: Path):
    study, out = load_study(write()), tmp_path / "out"
    cells = make_cells(study)
    write_study(out, study, cells, {"slow/seed0": 5.0, "fast/seed0": 6.0})
    write_state(cell_folder(out, cells[0]), finished(cells[0]))
    write_study(out, study, cells, {"slow/seed0": 10.0, "fast/seed0": 12.0})
    assert [cell.predicted_seconds for cell in open_study(out).cells] == [5.0, 12.0]


def test_the_wall_clock_of_parallel_jobs():
    assert wall_clock([3, 3, 3], 1) == 9
    assert wall_clock([3, 1, 1, 1], 2) == 3
    assert wall_clock([1, 1, 3], 2) == 4, "in the order of the queue"


def test_time_left_follows_the_pace_of_the_cells_so_far(write: Write):
    cells = cells_of(write(seeds=[0, 1]))
    with open(os.devnull, "w") as nowhere:
        display = Display(
            cells, dict.fromkeys(["slow/seed0"], 1.0) | PREDICTED, 1, Console(file=nowhere)
        )
        assert display.seconds_left() == 40
        display.ended(cells[0], finished(cells[0], seconds=15.0))
        assert display.seconds_left() == 45
        assert display.seconds_left({"fast/seed0": 5.0}) == 40
        display.ended(cells[1], finished(cells[1], seconds=99.0, starts=2))
        assert display.seconds_left() == 30, "an interrupted cell's time teaches nothing"
        assert display.seconds_left({"slow/seed1": 99.0}) == 15, "late, and not less than nothing"
        display.ended(cells[2], finished(cells[2], status="failed", error="why"))
        assert display.seconds_left() == 15
        display.found(cells[3])
        assert display.seconds_left() == 0


PREDICTED = {f"{variant}/seed{seed}": 10.0 for variant in ("slow", "fast") for seed in (0, 1)}


def test_durations_are_readable():
    said = [duration(seconds) for seconds in (0.4, 59.6, 61, 3599, 3600, 7384, 100 * 3600)]
    assert said == [
        "0 s", "1 min 00 s", "1 min 01 s", "59 min 59 s",
        "1 h 00 min", "2 h 03 min", "100 h 00 min",
    ]  # fmt: skip


def test_the_last_update_is_read_off_a_file_that_is_being_written(tmp_path: Path):
    metrics = tmp_path / "metrics.jsonl"
    assert last_update(metrics) == 0
    metrics.write_text('{"step": 1, "loss": 2}\n{"step": 2, "lo')
    assert last_update(metrics) == 1


# --- devices and scripts --------------------------------------------------------------------------


def test_jobs_share_the_devices_and_the_cores():
    assert make_slots(None, [], 2) == (Slot(0, CPU, 2),)
    assert make_slots(2, [], 4) == (Slot(0, CPU, 2), Slot(1, CPU, 2))
    assert [slot.device for slot in make_slots(None, ["2", "5"], 8)] == ["2", "5"]
    assert [slot.device for slot in make_slots(3, ["2", "5"], 8)] == ["2", "5", "2"]
    with pytest.raises(RecipeError, match="3 jobs on 2 cores"):
        make_slots(3, [], 2)
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "3, GPU-ab"}) == ["3", "GPU-ab"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == []


def test_omp_num_threads_asks_for_fewer_cores_and_never_for_more(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    for asked, cores in (("3", 3), ("12", 8), ("0", 8), ("many", 8), ("", 8)):
        assert cores_here({"OMP_NUM_THREADS": asked}) == cores
    assert cores_here({}) == 8


def test_the_last_words_are_those_of_the_last_start(tmp_path: Path):
    log = tmp_path / "sweep.log"
    log.write_text("before\n")
    assert last_words(log, since=7) == "it printed nothing"
    with log.open("a") as file:
        file.write("one\n\n two \nthree\nfour\n")
    assert last_words(log, since=7) == "two | three | four"
    assert last_words(log, since=7, lines=9) == "one | two | three | four"


def test_a_slot_gives_its_run_a_device_and_threads():
    outer = {"HOME": "/h", "OMP_NUM_THREADS": "9", "CUDA_VISIBLE_DEVICES": "0,1"}
    inner = Slot(1, "1", 3).environment(outer)
    assert inner == outer | {
        "OMP_NUM_THREADS": "3",
        "MKL_NUM_THREADS": "3",
        "CUDA_VISIBLE_DEVICES": "1",
    }
    assert Slot(0, CPU, 3).environment(outer, threads=2)["OMP_NUM_THREADS"] == "2"


def script(target: Target, python: str, tmp_path: Path) -> Path:
    path = tmp_path / f"{target}.sh"
    path.write_text(
        emit(
            target,
            name="small",
            python=python,
            arguments=["sweep", "a study.yaml", "--out", "out"],
            cells=["a/seed0", "b/seed0"],
            longest=700.0,
            gpu=True,
            cwd=str(tmp_path),
            logs="logs",
        )
    )
    return path


def test_emitted_scripts_run_one_cell_a_line_or_a_task(tmp_path: Path):
    def run(target: Target, python: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(script(target, python, tmp_path))],
            capture_output=True,
            text=True,
            check=False,
            env=dict(os.environ) | environment,
        )

    common = "-m fewstep.cli sweep a study.yaml --out out --cell"
    slurm = run("slurm", "echo", SLURM_ARRAY_TASK_ID="1")
    assert (slurm.returncode, slurm.stdout) == (0, f"{common} 1\n")
    shell = run("shell", "echo")
    assert shell.stdout == f"{common} 0\n{common} 1\n" and shell.returncode == 0
    torchrun = run("torchrun", "echo").stdout.splitlines()[1]
    assert torchrun == f"-m torch.distributed.run --standalone --nproc-per-node 1 {common} 1"
    assert run("shell", "false").returncode == 1, "a failed cell is told, after all have run"
    text = script("slurm", "echo", tmp_path).read_text()
    assert "#SBATCH --array=0-1\n" in text and "#SBATCH --time=24\n" in text
    assert "#SBATCH --gpus-per-task=1\n" in text
    short = emit(
        "slurm", name="s", python="p", arguments=[], cells=["a"],
        longest=1.0, gpu=False, cwd="/", logs="logs",
    )  # fmt: skip
    assert "#SBATCH --time=10\n" in short and "gpu" not in short
    with pytest.raises(RecipeError, match="use slurm, torchrun or shell"):
        check_target("pbs")


def test_an_emitted_array_runs_in_the_folder_that_was_prepared_for_it(write: Write, tmp_path: Path):
    study, out = write(), tmp_path / "out"
    emitted = sweep(study, out, "--emit", "slurm", "--set", "seeds=[3]")
    assert emitted.returncode == 0, emitted.stderr
    assert "#SBATCH --array=0-2\n" in emitted.stdout and (out / "logs").is_dir()
    assert "--set 'seeds=[3]' --cell" in emitted.stdout
    assert [cell.seed for cell in open_study(out).cells] == [3, 3]
    last = emitted.stdout.splitlines()[-1].removeprefix("exec ")
    task = last.replace('"$SLURM_ARRAY_TASK_ID"', "9")
    refused = subprocess.run(shlex.split(task), capture_output=True, text=True, env=ONE_THREAD)
    assert (refused.returncode, refused.stderr) == (
        2,
        "error: --cell: there is no cell 9; use 0 to 2\n",
    ), "the folder and the arguments are accepted; the index is not"


# --- the queue, with an interpreter that stands in for `fewstep distill` --------------------------


@pytest.fixture
def interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Lets every run be a line of shell: $3 is its command, $4 the recipe, $6 its folder."""

    def behave(line: str) -> None:
        script = tmp_path / "python"
        script.write_text(f"#!/bin/sh\n{line}\n")
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))

    return behave


def queue(cells: Sequence[Work], out: Path) -> list[str]:
    with open(os.devnull, "w") as nowhere:
        names = [cell.name for cell in cells]
        display = Display(cells, dict.fromkeys(names, 1.0), 1, Console(file=nowhere))
        return run_queue(cells, out, [Slot(0, CPU, 2)], dict(os.environ), display)


def test_a_failure_is_counted_with_its_own_words_and_the_time_of_all_starts(
    write: Write, tmp_path: Path, interpreter: Callable[[str], None]
):
    interpreter('echo "$3 on $OMP_NUM_THREADS $7"; exit 3')
    cells, out = cells_of(write()), tmp_path / "out"
    folder = cell_folder(out, cells[0])
    before = finished(cells[0], status="failed", attempts=1, seconds=100.0, threads=3)
    write_state(folder, before)
    (folder / "sweep.log").write_text("words of the start before\n")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "last.pt").touch()
    assert queue(cells, out) == [
        "slow/seed0: exit code 3: distill on 3 --resume",
        "fast/seed0: exit code 3: distill on 2",
    ]
    state = read_state(folder)
    assert state is not None and state.seconds > 100
    assert (state.status, state.attempts, state.starts) == ("failed", 2, 2)
    assert state.identity == identity_of(cells[0]), "it can be gone on with"


def test_a_cell_during_which_the_weights_changed_is_no_result(
    write: Write, tmp_path: Path, interpreter: Callable[[str], None]
):
    interpreter(f"echo more >> {tmp_path / 'base.safetensors'}")
    cells, out = cells_of(write()), tmp_path / "out"
    with pytest.raises(RunError, match=r"other code or weights since .* fast/seed0 would not be"):
        queue(cells, out)
    state = read_state(cell_folder(out, cells[0]))
    assert state is not None and state.status == "failed" and "changed while" in state.error
    assert read_state(cell_folder(out, cells[1])) is None


def test_a_stopped_cell_keeps_its_time_and_waits_for_the_next_sweep(
    write: Write, tmp_path: Path, interpreter: Callable[[str], None]
):
    interpreter("exec sleep 60")
    cells, out = cells_of(write()), tmp_path / "out"
    folder = cell_folder(out, cells[0])
    write_state(folder, finished(cells[0], status="queued", seconds=50.0))
    stop = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    stop.start()
    with pytest.raises(KeyboardInterrupt):
        queue(cells, out)
    state = read_state(folder)
    assert state is not None and (state.status, state.attempts) == ("queued", 0)
    assert 50.3 < state.seconds < 60


def test_the_reference_is_an_evaluation_of_a_folder_with_recipe_and_plan(
    write: Write, tmp_path: Path, interpreter: Callable[[str], None]
):
    interpreter('test "$3" = eval && test -f "$4/recipe.yaml" && test -f "$4/plan.json"')
    study = load_study(write())
    reference = make_reference(study, make_cells(study))
    assert reference is not None and queue([reference], tmp_path) == []
    state = read_state(tmp_path / "reference")
    assert state is not None and state.status == "done" and state.finished


def prepared(folder: Path, *, judge: float | None = None) -> Path:
    """What a run leaves that took known seconds; `interpreter` copies it. With `judge`, those of an
    endpoint, which leaves a second row of each image."""
    rows = [
        {"model": model, "case": case, "seed": 0, "nfe": nfe, "seconds": seconds}
        for model, nfe, seconds in (("teacher-6nfe", 6, 1.5), ("student-4nfe", 4, 0.1))
        for case in "ab"
    ] * (1 if judge is None else 2)
    phases = {"prepare data and teachers": 10.0, "distil": 60.0, "evaluate": 20.0}
    summary = {
        "seconds": phases if judge is None else phases | {"judge": judge},
        "pools": {"portrait": 2.0, "style": 4.0},
    }
    seconds = (9.0, 2.0, 2.0, 4.0, 2.0, 2.0)
    (folder / "eval").mkdir(parents=True)
    (folder / "eval" / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.jsonl").write_text(
        "".join(f"{json.dumps({'step': i, 'seconds': s})}\n" for i, s in enumerate(seconds, 1))
    )
    return folder


def test_what_an_endpoint_takes_is_told_from_drawing(
    write: Write, tmp_path: Path, interpreter: Callable[[str], None]
):
    costs = []
    for name, judge in (("own", None), ("asked", 6.0)):
        interpreter(f'cp -r {prepared(tmp_path / name, judge=judge)}/. "$6"')
        costs.append(measure(cells_of(write()), Slot(0, CPU, 2), dict(os.environ)).costs["dmd"])
    own, asked = costs
    assert (own.judge, asked.judge) == (0.0, 6.0 / 4)
    assert (asked.image, asked.evaluation) == (own.image, own.evaluation)


def test_costs_are_read_off_a_short_run_of_the_dearest_cell(
    write: Write, tmp_path: Path, interpreter: Callable[[str], None]
):
    made, asked = prepared(tmp_path / "made"), tmp_path / "asked.yaml"
    interpreter(f'cp "$4" {asked}; cp -r {made}/. "$6"')
    changes = {"log.save_every": 2, "data.pools.portrait.size": 500, "data.pools.style.size": 40}
    probe = {"every": 4, "per_category": 3, "seeds": 5}
    budget = {"updates": 50, "batch": 2}
    cells = cells_of(write(set=changes, probe=probe, budget=budget))
    found = measure(cells, Slot(0, CPU, 2), dict(os.environ))
    assert (found.device, found.threads) == (CPU, 2)
    assert found.code == code_hash(cells[0].recipe) and list(found.costs) == ["dmd"]
    short = load_recipe(asked)
    assert short.objective.model_dump()["fake_updates"] == 3, "the dearest"
    assert (short.budget.updates, short.evaluation.models) == (6, ("student", "teacher"))
    assert {name: pool.size for name, pool in short.data.pools.items()} == {
        "portrait": 96,
        "style": 40,
    }
    flop = make_plan(short, local_machine()).cost.flop
    costs = found.costs["dmd"]
    assert costs.prompt == {"t2i": 2.0 / 96, "edit": 4.0 / 40}
    assert costs.operation == pytest.approx(2.0 * 6 / flop), "the median without the first update"
    assert costs.load == 10 - 6
    assert costs.image == pytest.approx((20 - 3) / 4)
    assert costs.evaluation == pytest.approx(3 / 12)
    # One probe of 1 case and 2 seeds of 2 tasks; 60 - 21 s of training went into no update.
    assert costs.once == pytest.approx((39 - 4 * costs.image) / 4)
    assert -90 <= costs.start < -30, "what is not in a phase; here the phases are invented"
    interpreter("echo boom; exit 1")
    with pytest.raises(RunError, match="measuring fast/seed0: its first updates failed; boom"):
        measure(cells, Slot(0, CPU, 2), dict(os.environ))


def test_a_sweep_measures_once_and_runs_what_is_not_done(
    write: Write, tmp_path: Path, interpreter: Callable[[str], None]
):
    made, calls, out = prepared(tmp_path / "made"), tmp_path / "calls", tmp_path / "out"
    note = f'echo "$3 $6" >> {calls}; test "$3" = eval || cp -r {made}/. "$6"'
    interpreter(f'{note}; case "$6" in *fast*) exit 1;; esac')

    def again(**options: Any) -> list[str]:
        calls.write_text("")
        with suppress(CellsFailed):
            run_sweep(write(), out=out, overrides={}, environment=dict(os.environ), **options)
        return [Path(line.split()[-1]).parent.name for line in calls.read_text().splitlines()]

    with pytest.raises(CellsFailed, match="1 of 3 cells failed"):
        run_sweep(write(), out=out, overrides={}, environment=dict(os.environ))
    assert len(calls.read_text().splitlines()) == 1 + 3, "a measurement, two cells, the reference"
    assert (out / "costs.json").exists()
    assert again() == ["fast"], "what was measured is known, what is done is done"
    interpreter(note)
    assert again() == ["fast"] and again() == []


def test_a_measurement_holds_for_its_machine_and_code_alone(write: Write, tmp_path: Path):
    cells, slot = cells_of(write()), Slot(0, CPU, 2)
    assert known_measurement(tmp_path, cells, slot) is None
    here = measured().model_copy(update={"code": code_hash(cells[0].recipe)})
    (tmp_path / "costs.json").write_text(here.model_dump_json())
    assert known_measurement(tmp_path, cells, slot) == here
    assert known_measurement(tmp_path, cells, Slot(0, CPU, 1)) is None
    assert known_measurement(tmp_path, cells, Slot(0, "0", 2)) is None
    (tmp_path / "costs.json").write_text(measured().model_dump_json())
    assert known_measurement(tmp_path, cells, slot) is None
    (tmp_path / "costs.json").write_text("{")
    assert known_measurement(tmp_path, cells, slot) is None


def test_a_folder_of_something_else_is_refused(write: Write, tmp_path: Path):
    study, out = load_study(write()), tmp_path / "out"
    check_folder(out, study)
    out.mkdir()
    check_folder(out, study)
    (out / "notes.txt").touch()
    with pytest.raises(RunError, match="holds other files and no study"):
        check_folder(out, study)
    (out / "study.json").write_text('{"study": "small"}')
    check_folder(out, study)
    for text, problem in (
        ('{"study": "large"}', "holds the study 'large', not 'small'"),
        ("{", ""),
    ):
        (out / "study.json").write_text(text)
        with pytest.raises(RunError, match=problem or "damaged"):
            check_folder(out, study)
    with pytest.raises(RunError, match="is a file"):
        check_folder(out / "notes.txt", study)


def test_one_cell_is_picked_by_its_index_and_only_it_is_redone(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path, out = write(), tmp_path / "out"
    cells = cells_of(path)
    folders = [cell_folder(out, cell) for cell in cells]
    write_study(out, load_study(path), cells, {cell.name: 1.0 for cell in cells})
    for cell, folder in zip(cells, folders):
        write_state(folder, finished(cell, code_hash="old"))

    def prepare(**options: Any) -> str:
        capsys.readouterr()
        run_sweep(path, out=out, overrides={}, environment={}, measure_first=False, **options)
        return capsys.readouterr().out

    with pytest.raises(RunError, match="2 of 3 cells were made differently"):
        prepare(only=0, target="shell")
    prepare(only=0, redo=True, target="shell")
    assert not folders[0].exists() and folders[1].exists()
    write_state(folders[1], finished(cells[1]))
    told = prepare(dry_run=True)
    assert "2 cells to run" in told and "1 are done." in told
    assert pick(cells, 1) is cells[1]
    with pytest.raises(RecipeError, match="there is no cell 2; use 0 to 1"):
        pick(cells, 2)


def test_a_job_asks_for_twice_the_time_of_the_longest_cell(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path, out = write(), tmp_path / "out"
    cell = cells_of(path)[0]
    cores = cores_here({})
    slow = COSTS.model_copy(update={"load": 6000.0})
    known = Measurement(device=CPU, threads=cores, code=code_hash(cell.recipe), costs={"dmd": slow})
    write_study(out, load_study(path), cells_of(path), {c.name: 1.0 for c in cells_of(path)})
    (out / "costs.json").write_text(known.model_dump_json())
    environment = {"CUDA_VISIBLE_DEVICES": ""}
    run_sweep(path, out=out, overrides={}, environment=environment, target="slurm")
    minutes = int(capsys.readouterr().out.split("--time=")[1].split()[0])
    assert minutes == -(-int(2 * max(predict(c, known) for c in cells_of(path))) // 60) > 200


# --- whole sweeps ---------------------------------------------------------------------------------


def command(study: Path, out: Path, *options: str) -> list[str]:
    base = [sys.executable, "-m", "fewstep.cli", "sweep", str(study), "--out", str(out)]
    return [*base, "--no-measure", *options]


def sweep(study: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(study, out, *options), capture_output=True, text=True, check=False, env=ONE_THREAD
    )


ONE_THREAD = {key: v for key, v in os.environ.items() if key != "FEWSTEP_DEBUG"} | {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


def wait_for(condition: Callable[[], bool], seconds: float = 300.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.05)


@pytest.mark.slow
def test_failed_cells_do_not_stop_the_others_and_finished_ones_are_skipped(
    write: Write, tmp_path: Path
):
    variants = {
        "good": {"title": "good"},
        "bad": {"title": "diverges", "set": {"optim": {"student": {"lr": 1e30}, "warmup": 0}}},
        "fast": {"title": "three", "set": {"objective.fake_updates": 3}},
    }
    study, out = write(variants=variants), tmp_path / "out"
    first = sweep(study, out)
    assert first.returncode == 11, first.stdout + first.stderr
    assert "1 of 4 cells failed" in first.stderr and "bad/seed0: exit code 5" in first.stderr
    assert "good/seed0: done" in first.stdout
    done = open_study(out)
    assert [c.variant for c in done.finished()] == ["good", "fast"]
    bad = done.cells[1].state
    assert (bad.status, bad.attempts) == ("failed", 1) and "not finite" in bad.error
    models = {row.model for row in read_rows(done.cells[0].folder / "eval" / "rows.jsonl").rows}
    assert models == {"student-4nfe"}
    judged = [
        {(row.case, row.seed) for row in read_rows(folder / "eval" / "rows.jsonl").rows}
        for folder in (done.cells[0].folder, done.cells[2].folder, done.reference)
    ]
    assert judged[0] == judged[1] == judged[2] and len(judged[0]) == 4

    log = done.cells[0].folder / "sweep.log"
    size = log.stat().st_size
    assert sweep(study, out).returncode == 11
    assert log.stat().st_size == size, "a finished cell is not started again"
    tried = read_state(done.cells[1].folder)
    assert tried is not None and tried.attempts == 2
    write_state(done.cells[1].folder, tried.model_copy(update={"attempts": MAX_ATTEMPTS}))
    third = sweep(study, out)
    assert third.returncode == 11 and "given up after 3 attempts" in third.stderr
    # Other code: nothing is run and nothing lost.
    state = read_state(done.cells[0].folder)
    assert state is not None
    write_state(done.cells[0].folder, state.model_copy(update={"code_hash": "old"}))
    refused = sweep(study, out)
    assert refused.returncode == 5 and "good/seed0 (other code or weights)" in refused.stderr


UPDATES = 240


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a study, `small.yaml`, and what a sweep made of it, `whole`."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    study = study_in(folder)(
        budget={"updates": UPDATES, "batch": 2},
        set={"log.save_every": 20, "log.probe": None},
        reference=[],
    )
    ended = sweep(study, folder / "whole")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("orphan", [False, True], ids=["with its run", "alone"])
def test_a_killed_sweep_goes_on_and_makes_the_same_student(
    uninterrupted: Path, tmp_path: Path, orphan: bool
):
    """SIGKILL of the sweep and its run, as by a machine that stops, or of the sweep alone."""
    study, whole, out = uninterrupted / "small.yaml", uninterrupted / "whole", tmp_path / "out"
    killed = subprocess.Popen(
        command(study, out), env=ONE_THREAD, start_new_session=True, stdout=subprocess.DEVNULL
    )
    first = out / "cells" / "slow" / "seed0"
    second = out / "cells" / "fast" / "seed0"
    wait_for(lambda: (second / "checkpoints" / "previous.pt").exists())
    if orphan:
        killed.kill()
    else:
        os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    left = read_state(second)
    assert left is not None and left.status == "running"
    assert not (second / "student.safetensors").exists(), "killed too late to test anything"
    log = (first / "sweep.log").stat().st_size

    again = sweep(study, out)
    assert again.returncode == 0, again.stdout + again.stderr
    assert (first / "sweep.log").stat().st_size == log, "the finished cell is not run again"
    printed = (second / "sweep.log").read_text()
    assert ("another sweep, or the run of a killed one" in again.stdout) is orphan
    if not orphan:
        resumed = int(printed.split("resumed at update ")[1].split()[0])
        assert resumed >= 40, "two checkpoints were there"
    for name in ("slow", "fast"):
        here, there = (place / "cells" / name / "seed0" for place in (out, whole))
        assert same_student(here, there)
        assert steps_logged(here) == list(range(1, UPDATES + 1))


@pytest.mark.slow
def test_stopping_a_sweep_stops_its_runs_and_says_how_to_go_on(write: Write, tmp_path: Path):
    study, out = write(budget={"updates": 2000, "batch": 2}, reference=[]), tmp_path / "out"
    stopped = subprocess.Popen(
        command(study, out, "--jobs", "1"), env=ONE_THREAD, stderr=subprocess.PIPE, text=True
    )
    folder = out / "cells" / "slow" / "seed0"
    wait_for(lambda: (folder / "checkpoints" / "last.pt").exists())
    stopped.send_signal(signal.SIGTERM)
    _, said = stopped.communicate(timeout=60)
    assert stopped.returncode == 130
    assert f"`fewstep sweep {study} --out {out}` goes on" in said
    state = read_state(folder)
    assert state is not None and state.status == "queued" and state.attempts == 0
    claim = lock(folder)
    assert claim is not None, "its run was stopped with it"
    claim.close()
    # The cell alone, as a cluster's job runs it, keeps the threads that it began with.
    write_state(folder, state.model_copy(update={"threads": 2}))
    options = ("--set", "budget.updates=2000", "--cell", "0")
    ended = subprocess.Popen(command(study, out, *options), env=ONE_THREAD)
    wait_for(lambda: "resumed at update" in (folder / "sweep.log").read_text())
    ended.terminate()
    ended.wait()
    state = read_state(folder)
    assert state is not None and (state.threads, state.starts) == (2, 2)


@pytest.mark.slow
def test_a_measurement_with_a_judge_takes_its_time_and_asks_as_often_as_it_says(write: Write):
    asked = [0]

    def look(seen: Seen, _number: int) -> None:
        asked[0] += 1
        time.sleep(0.3)
        brightness(seen)

    with eyes(look) as url:
        judge = JUDGE | {"url": url, "parallel": 1, "repeats": 2}
        cells = cells_of(write(evaluation={"per_category": 2, "seed": 50, "judge": judge}))
        measured = measure(cells, make_slots(1, [], 1)[0], ONE_THREAD)
    assert asked[0] + GREETING == requests_to_measure(cells) == 2 * 2 * 2 * 2 + 2
    assert 0.6 < measured.costs["dmd"].judge < 3, "two judgements an image, one after the other"


@pytest.mark.slow
def test_a_dry_run_measures_and_writes_nothing(write: Write, tmp_path: Path):
    study, out = write(reference=[]), tmp_path / "out"
    dry = subprocess.run(
        [*shlex.split(f"{sys.executable} -m fewstep.cli sweep {study} --out {out} --dry-run")],
        capture_output=True,
        text=True,
        check=True,
        env=ONE_THREAD,
    )
    assert not out.exists() and "2 cells to run" in dry.stdout
    predicted = float(dry.stdout.split("2 cells to run, ")[1].split()[0])
    begun = time.monotonic()
    assert sweep(study, out).returncode == 0
    took = time.monotonic() - begun
    assert 0.5 < predicted / took < 2, "loose: this machine may be busy"
