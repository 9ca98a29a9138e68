"""The plan: closed values of all arithmetic, and every refusal with what would work."""

import io
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from fewstep.data.mixture import Mixture, Quota
from fewstep.errors import RecipeError
from fewstep.recipe.cost import forward_flop
from fewstep.recipe.facts import Facts, Machine, ModelSize, gather_facts, read_model_size
from fewstep.recipe.load import load_recipe
from fewstep.recipe.plan import Plan, apportion, make_plan, shift_time
from fewstep.recipe.render import render_plan
from fewstep.recipe.schema import TASKS

LAB = Path(__file__).parent.parent / "recipes" / "lab"
FACTS = Facts(
    bundled=frozenset({"base", "t2i", "edit"}),
    model=ModelSize(
        params=1000, image_tokens=16, text_tokens=4, source_tokens=16, width=8, depth=2
    ),
)
RECIPES = sorted(path.stem for path in LAB.glob("*.yaml") if not path.stem.startswith("teach"))
STEPWISE = ({"base": 1.0}, {"base": 1.0}, {"base": 0.5, "t2i": 0.5}, {"t2i": 1.0})
BASE = ({"base": 1.0},) * 4
BY_CATEGORY = {  # rules by task, by category and for everything, whatever the shipped recipe has
    "guidance": "[{when: {task: t2i, category: text}, "
    "weights: [{base: 1}, {base: 1}, {base: 0.5, t2i: 0.5}, {t2i: 1}]}, {when: {task: edit}, "
    "weights: [{base: 1}, {base: 1}, {base: 0.5, edit: 0.5}, {edit: 1}]}, {weights: [{base: 1}]}]"
}


def plan_of(
    overrides: dict[str, str] | None = None,
    *,
    file: str = "unified",
    machine: Machine | None = None,
    facts: Facts = FACTS,
) -> Plan:
    return make_plan(load_recipe(LAB / f"{file}.yaml", overrides), machine or Machine(), facts)


def refusal(overrides: dict[str, str], *, devices: int = 1, facts: Facts = FACTS) -> str:
    with pytest.raises(RecipeError) as caught:
        plan_of(overrides, machine=Machine(devices=devices), facts=facts)
    return str(caught.value)


def samples(plan: Plan) -> dict[str, int]:
    return {quota.pool: quota.samples for quota in plan.pools}


# The step grid


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        ("{kind: shift, steps: 4, shift: 3}", (1.0, 0.9, 0.75, 0.5)),
        ("{kind: shift, steps: 4, shift: 1}", (1.0, 0.75, 0.5, 0.25)),
        ("{kind: shift, steps: 2, shift: 3}", (1.0, 0.75)),
        ("{kind: shift, steps: 1, shift: 3}", (1.0,)),
        ("{kind: explicit, t: [1, 0.6, 0.2]}", (1.0, 0.6, 0.2)),
    ],
)
def test_grid(grid: str, expected: tuple[float, ...]):
    plan = plan_of({"student.grid": grid, "guidance": "[{weights: [{base: 1}]}]"})
    assert plan.grid == pytest.approx(expected, abs=1e-12)


def test_shift_moves_to_noise_for_s_above_1_and_back_with_its_inverse():
    assert shift_time(0.5, 3.0) == 0.75
    assert shift_time(shift_time(0.3, 3.0), 1 / 3.0) == pytest.approx(0.3)
    assert (shift_time(0.0, 3.0), shift_time(1.0, 3.0)) == (0.0, 1.0)


# Teacher weights


def test_the_lambda_table_of_the_main_job():
    plan = plan_of()
    for category in ("landscape", "portrait", "text"):
        assert plan.weights("t2i", category) == STEPWISE
    late = ({"base": 1.0}, {"base": 1.0}, {"base": 0.5, "edit": 0.5}, {"edit": 1.0})
    for category in ("scene", "enhance", "object", "text_edit", "identity", "style"):
        assert plan.weights("edit", category) == late
    assert plan.condition("t2i", "text").cfg == {"base": 3.0, "t2i": 3.0}
    assert plan.condition("edit", "style").cfg == {"base": 2.0, "edit": 2.0}
    assert len(plan.guidance) == 9


def test_a_rule_by_category_leaves_the_others_to_the_last_rule():
    plan = plan_of(BY_CATEGORY)
    assert plan.weights("t2i", "text") == STEPWISE
    assert plan.weights("t2i", "landscape") == plan.weights("t2i", "portrait") == BASE
    assert plan.condition("t2i", "text").cfg == {"base": 3.0, "t2i": 3.0}
    assert plan.condition("t2i", "portrait").cfg == {"base": 3.0}


def test_the_first_matching_rule_wins():
    rules = "[{when: {task: edit}, weights: [{edit: 1}]}, {when: {category: text}, weights: "
    rules += "[{t2i: 1}]}, {when: {task: t2i}, weights: [{base: 1}]}]"
    plan = plan_of({"guidance": rules})
    assert plan.weights("edit", "text_edit") == ({"edit": 1.0},) * 4
    assert plan.weights("t2i", "text") == ({"t2i": 1.0},) * 4
    assert plan.weights("t2i", "portrait") == BASE
    assert [plan.condition("t2i", c).rule for c in ("landscape", "text")] == [2, 1]


def test_zero_weights_are_left_out_and_need_no_teacher_loaded():
    plan = plan_of({"guidance": "[{weights: [{base: 1.0, t2i: 0.0, edit: 0}]}]"})
    assert plan.weights("t2i", "text") == BASE
    assert plan.teachers == ("base",)
    assert plan_of().teachers == ("base", "t2i", "edit")
    anchored = {"objective.anchor.weight": "0.1", "student.init": "edit"}
    assert plan_of(anchored, file="e5_all").teachers == ("base", "edit")


def test_weights_of_thirds_are_accepted():
    third = "[{weights: [{base: 0.3333333, t2i: 0.3333333, edit: 0.3333334}]}]"
    assert len(plan_of({"guidance": third}).weights("t2i", "text")[0]) == 3


# Quotas


def test_apportion_closed_values():
    assert apportion({"a": 9, "b": 1}, 300) == {"a": 270, "b": 30}
    assert apportion({"a": 1, "b": 1, "c": 1}, 100) == {"a": 34, "b": 33, "c": 33}
    assert apportion({"a": 0.7, "b": 0.3}, 10) == {"a": 7, "b": 3}
    assert apportion({"a": 1, "none": 0}, 5) == {"a": 5}


def test_apportion_is_what_the_data_loader_draws():
    source = random.Random(0)
    for _ in range(150):
        weights = {name: source.choice([0.3, 0.7, 1, 2, 5, 9]) for name in "abcdefg"}
        total = source.randrange(1, 200)
        quota = Quota(weights)
        quota.take(total)
        assert apportion(weights, total) == quota.counts, (weights, total)


@pytest.mark.parametrize(
    ("file", "t2i", "edit"),
    [
        ("unified", 150, 150),
        ("mixture_9to1", 270, 30),
        ("mixture_7to3", 210, 90),
        ("mixture_5to5", 150, 150),
        ("zero_shot", 300, 0),
        ("e5_all", 300, 0),
    ],
)
def test_task_quotas_of_the_papers_ratios(file: str, t2i: int, edit: int):
    budget = {"budget.updates": "300", "budget.batch": "32", "budget.micro_batch": "32"}
    plan = plan_of(budget, file=file)
    micro_batches = {quota.task: quota.micro_batches for quota in plan.tasks}
    assert (micro_batches["t2i"], micro_batches.get("edit", 0)) == (t2i, edit)
    batch = plan.batch.batch
    assert sum(quota.samples for quota in plan.tasks) == 300 * batch == sum(samples(plan).values())


def test_pool_quotas_are_exact_and_equal_what_is_drawn():
    overrides = {
        "budget": "{updates: 35, batch: 12, micro_batch: 3}",
        "data.mixture": "{t2i: 7, edit: 3}",
        "data.composition.t2i": "{landscape: 1, portrait: 2.5, text: 0}",
    }
    recipe = load_recipe(LAB / "unified.yaml", overrides)
    plan = make_plan(recipe, Machine(), FACTS)
    assert [(quota.task, quota.micro_batches, quota.samples) for quota in plan.tasks] == [
        ("t2i", 98, 294),
        ("edit", 42, 126),
    ]
    assert samples(plan) == {"landscape": 84, "portrait": 210} | dict.fromkeys(
        ("scene", "enhance", "object", "text_edit", "identity", "style"), 21
    )
    of_all_tasks = {name: pool.size for name, pool in recipe.data.pools.items()}
    sizes = dict.fromkeys(TASKS, of_all_tasks)
    mixture = Mixture(recipe.data.mixture, recipe.data.composition, sizes, seed=0)
    drawn = dict.fromkeys(samples(plan), 0)
    for _ in range(35 * 4):
        for pool in mixture.next(3).pools:
            drawn[pool] += 1
    assert drawn == samples(plan)


def test_passes_say_how_often_a_pool_is_gone_through():
    overrides = {"budget": "{updates: 100, batch: 30, micro_batch: 30}"}
    by_name = {q.pool: q for q in plan_of(overrides).pools}
    assert by_name["text"].samples == 500 and by_name["text"].passes == 0.25
    assert by_name["style"].samples == 250 and by_name["style"].passes == 0.25


def test_batch_arithmetic_over_devices():
    overrides = {"budget": "{updates: 10, batch: 96, micro_batch: 4}"}
    plan = plan_of(overrides, machine=Machine(devices=8))
    assert plan.batch.accumulation == 3 and plan.batch.devices == 8
    assert [quota.micro_batches for quota in plan.tasks] == [15, 15]
    assert [quota.samples for quota in plan.tasks] == [480, 480]


# Cost and memory


def test_cost_of_base_guidance_by_hand():
    """K = 4, n = 5, CFG: rollout 2.5, backward 2, real 2, fake 1, updates 5 (2.5 + 1 + 2)."""
    overrides = {"budget": "{updates: 7, batch: 10, micro_batch: 10}"}
    overrides["objective.fake_updates"] = "5"
    plan = plan_of(overrides, file="guidance_base")
    assert plan.cost.nfe_fake_updates == 27.5 and plan.cost.nfe_anchor == 0
    assert plan.cost.nfe_per_sample == pytest.approx(2.5 + 2 + 2 + 1 + 27.5)
    assert plan.cost.nfe_per_update == pytest.approx(350)
    # 20 tokens: 2 x 1000 x 20 + 4 x 2 x 8 x 20^2
    assert forward_flop(FACTS.model, "t2i") == 40_000 + 25_600
    assert forward_flop(FACTS.model, "edit") == 2 * 1000 * 36 + 4 * 2 * 8 * 36**2
    assert plan.cost.flop == pytest.approx(7 * 350 * 65_600)


def test_real_score_cost_counts_teachers_steps_cfg_and_shares():
    # step-wise: (2 + 2 + 4 + 2) / 4 = 2.5, here of every condition
    even = {"budget.updates": "300", "budget.batch": "30", "budget.micro_batch": "30"}
    assert plan_of(even).cost.nfe_real == pytest.approx(2.5)
    unguided = {f"teachers.{n}.cfg": "{t2i: 1, edit: 1}" for n in ("base", "t2i", "edit")}
    assert plan_of(even | unguided).cost.nfe_real == pytest.approx(1.25)
    # by category: text 2.5; t2i: (2 + 2 + 2.5) / 3; edit: 2.5
    even |= BY_CATEGORY
    assert plan_of(even).cost.nfe_real == pytest.approx(((2 + 2 + 2.5) / 3 + 2.5) / 2)
    assert plan_of(even | unguided).cost.nfe_real == pytest.approx(((1 + 1 + 1.25) / 3 + 1.25) / 2)


def test_anchor_and_fake_updates_cost_what_they_do():
    five = {"objective.fake_updates": "5"}
    plain = plan_of(five).cost.nfe_per_sample
    anchored = plan_of(five | {"objective.anchor.weight": "0.1"}).cost.nfe_per_sample
    single = plan_of({"objective.fake_updates": "1"}).cost.nfe_per_sample
    assert anchored - plain == pytest.approx(5 * 2 / 4)
    assert plain - single == pytest.approx(4 * 5.5)


def test_seconds_fall_with_speed_and_devices():
    one = plan_of(machine=Machine(flops=1e9)).cost
    two = plan_of(machine=Machine(flops=1e9, devices=2), overrides={"budget.micro_batch": "8"}).cost
    assert one.seconds == pytest.approx(one.flop / 1e9)
    assert two.seconds == pytest.approx(two.flop / 2e9)


def test_evaluation_cost_by_hand():
    overrides = {"evaluation": "{per_category: 2, models: [teacher, teacher_cut, student]}"}
    assert plan_of(overrides).cost.evaluation_nfe == 9 * 2 * (80 + 4 + 4)
    plain = {"teachers.base.cfg": "{t2i: 1.0, edit: 2.0}", "teachers.base.steps": "10"}
    assert plan_of(overrides | plain).cost.evaluation_nfe == 2 * (3 * (10 + 8) + 6 * (20 + 8))


def test_memory_by_hand():
    overrides = {"budget": "{updates: 10, batch: 6, micro_batch: 3}"}
    memory = plan_of(overrides).memory
    assert memory.student == 1000 * 4 * 5 and memory.fake == 1000 * 4 * 4
    assert memory.teachers == 3 * 4000
    assert memory.activations == 34 * 36 * 8 * 2 * 3
    assert memory.total == 20_000 + 16_000 + 12_000 + memory.activations
    without = plan_of(overrides | {"ema": "null", "precision": "fp32"}).memory
    assert without.student == 16_000 and without.activations == 2 * memory.activations


# The plan as a whole


def test_a_plan_survives_json_and_is_the_same_every_time():
    plan = plan_of()
    assert Plan.model_validate_json(plan.model_dump_json()) == plan == plan_of()
    assert json.loads(plan.model_dump_json())["grid"] == [1.0, 0.9, 0.75, 0.5]


@pytest.mark.parametrize("file", RECIPES)
def test_every_lab_recipe_has_a_plan_that_changes_nothing_it_was_asked(file: str):
    recipe = load_recipe(LAB / f"{file}.yaml")
    plan = make_plan(recipe, Machine(), FACTS)
    assert plan.updates == recipe.budget.updates and plan.batch.batch == recipe.budget.batch
    assert plan.grid == pytest.approx((1.0, 0.9, 0.75, 0.5))
    for entry in plan.guidance:
        assert all(math.fsum(row.values()) == pytest.approx(1) for row in entry.weights)


def test_the_papers_experiments_differ_where_they_should():
    pools = {
        "e1_landscape": {"landscape"},
        "e2_portrait": {"portrait"},
        "e3_text": {"text"},
        "e4_landscape_portrait": {"landscape", "portrait"},
        "e5_all": {"landscape", "portrait", "text"},
    }
    for file, expected in pools.items():
        plan = plan_of(file=file)
        assert set(samples(plan)) == expected and plan.teachers == ("base",)
        assert [quota.task for quota in plan.tasks] == ["t2i"]
    assert plan_of(file="guidance_specialised").teachers == ("t2i",)
    assert plan_of(file="guidance_base").weights("t2i", "text") == BASE
    constant = ({"base": 0.625, "t2i": 0.375},) * 4
    for category in ("landscape", "portrait", "text"):
        assert plan_of(file="guidance_stepwise").weights("t2i", category) == STEPWISE
        assert plan_of(file="guidance_constant").weights("t2i", category) == constant


def test_constant_mixing_spends_the_same_share_as_step_wise():
    """Otherwise the comparison of the two would be one of shares, not of order."""
    share = {
        name: math.fsum(row.get("t2i", 0.0) for row in plan_of(file=name).weights("t2i", "text"))
        for name in ("guidance_constant", "guidance_stepwise")
    }
    assert share["guidance_constant"] == share["guidance_stepwise"] == 1.5


def table_lines(plan: Plan) -> list[str]:
    console = Console(width=160, file=io.StringIO())
    with console.capture() as captured:
        console.print(render_plan(plan))
    return [" ".join(line.replace("│", " ").split()) for line in captured.get().splitlines()]


def test_the_tables_show_conditions_of_a_task_apart_where_their_lambda_differs():
    lines = table_lines(plan_of(BY_CATEGORY))
    assert "t2i: text base base 0.5 base + 0.5 t2i t2i base 3, t2i 3" in lines
    assert "t2i: landscape, portrait base base base base base 3" in lines


def test_the_tables_show_grid_lambda_quotas_and_cost():
    lines = table_lines(plan_of({"data.mixture": "{t2i: 9, edit: 1}"}))
    together = "t2i: landscape, portrait, text base base 0.5 base + 0.5 t2i t2i base 3, t2i 3"
    assert together in lines
    assert any("k=1 t=0.9" in line and "k=3 t=0.5" in line for line in lines)
    # 300 updates x 32 / 16 = 600 micro-batches: 540 x 16 = 8640 and 60 x 16 = 960 samples
    assert any(line.startswith("t2i 90 % 540 8,640") for line in lines)
    assert any(line.startswith("edit 10 % 60 960") for line in lines)
    assert "fake-score updates 16.50" in lines  # 3 (2.5 + 1 + 2)


def test_recipe_and_plan_load_no_torch():
    code = "import sys, fewstep.recipe.render, fewstep.recipe.load; "
    code += "sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Refusals


def rules(*rows: str, when: str = "") -> dict[str, str]:
    return {"guidance": f"[{{{when}weights: [{', '.join(rows)}]}}]"}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        # lambda
        (
            BY_CATEGORY | {"guidance.0.weights.2.base": "0.4"},
            "guidance[0] (task=t2i, category=text): row k=2: lambda sums to 0.9, not 1; "
            "in the same proportions: {base: 0.4444, t2i: 0.5556}",
        ),
        (rules("{base: 0}"), "guidance[0] (everything): row k=0: lambda sums to 0, not 1; give"),
        (
            rules("{base: 1.5, t2i: -0.5}"),
            "row k=0: lambda of 'base' is 1.5; use a number in [0, 1]",
        ),
        (rules("{t2i: -0.5, base: 1.0}"), "row k=0: lambda of 't2i' is -0.5; use a number in"),
        (
            {"guidance.1.weights.3": "{edits: 1}"},
            "guidance[1] (task=edit): row k=3: no teacher is called 'edits'; did you mean 'edit'? "
            "known: base, t2i, edit",
        ),
        (
            rules("{base: 1}", "{base: 1}", "{base: 1}"),
            "guidance[0] (everything): has 3 rows of weights for 4 student steps; use 4 rows, or 1",
        ),
        (
            {"student.grid.steps": "2"},
            "has 4 rows of weights for 2 student steps; use 2 rows, or 1",
        ),
        # rules
        (
            BY_CATEGORY | {"guidance.0.when.category": "txt"},
            "guidance[0]: never applies: no pool has task=t2i, category=txt; the pools have "
            "t2i/landscape, t2i/portrait, t2i/text, edit/scene",
        ),
        (
            BY_CATEGORY | {"guidance.0.when": "{task: t2i}"},
            "guidance[2]: never applies: every condition it matches is taken by an earlier rule",
        ),
        (
            rules("{base: 1}", when="when: {task: t2i}, "),
            "guidance: no rule matches edit/scene; let the last rule have no `when`",
        ),
        (
            BY_CATEGORY | {"teachers.t2i.tasks": "[edit]", "teachers.t2i.cfg": "{edit: 2}"},
            "guidance[0] (task=t2i, category=text): teacher 't2i' is to guide t2i/text, but lacks "
            "the task 't2i'; teachers with t2i: base, edit",
        ),
        # teachers and student
        (
            {"student.init": "bsae"},
            "student.init: no teacher is called 'bsae'; did you mean 'base'? "
            "known: base, t2i, edit",
        ),
        (
            {"teachers.t2i.weights": "bundled:t2is"},
            "teachers.t2i.weights: no bundled weights are called 't2is'; did you mean 't2i'? "
            "known: base, edit, t2i",
        ),
        (
            {"teachers.base.cfg": "{t2i: 3}"},
            "teachers.base.cfg: has no scale for 'edit', which this teacher was trained for; add "
            "edit: 1.0 for no guidance",
        ),
        (
            {"teachers.edit.tasks": "[edit]"},
            "teachers.edit.cfg: gives a scale for 't2i', which is not among the teacher's tasks",
        ),
        (
            {"evaluation.models": "[student, best]"},
            "evaluation.models: 'best' is no model to evaluate; use student, teacher,",
        ),
        (
            {"evaluation.models": "['teacher:t2is']"},
            "evaluation.models: 'teacher:t2is' names no teacher; did you mean 't2i'?",
        ),
        (
            {"evaluation.models": "['student:base']"},
            "'student:base' is no model to evaluate",
        ),
        # grid
        (
            {"student.grid": "{kind: explicit, t: [1, 0.5, 0.75, 0.25]}"},
            "student.grid.t: t_2 = 0.75 does not lie below t_1 = 0.5; use strictly descending "
            "times, such as [1.0, 0.75, 0.5, 0.25]",
        ),
        (
            {"student.grid": "{kind: explicit, t: [1, 0.5, 0.5]}"},
            "student.grid.t: t_2 = 0.5 does not lie below t_1 = 0.5",
        ),
        (
            {"student.grid": "{kind: explicit, t: [1, 0.5, 0]}"},
            "student.grid.t: t_2 = 0 lies outside (0, 1]; the final 0 is implied",
        ),
        (
            {"student.grid": "{kind: explicit, t: [1.5, 0.5]}"},
            "student.grid.t: t_0 = 1.5 lies outside (0, 1]",
        ),
        (
            {"student.grid": "{kind: explicit, t: [0.9, 0.75, 0.5]}"},
            "student.grid.t: t_0 = 0.9, but an image starts from pure noise; use 1.0",
        ),
        # data
        (
            {"data.composition.t2i.portraits": "1"},
            "data.composition.t2i.portraits: there is no such pool; did you mean 'portrait'?",
        ),
        (
            {"data.composition.t2i.scene": "1"},
            "data.composition.t2i.scene: the pool is of task 'edit'; pools of 't2i': landscape, "
            "portrait, text",
        ),
        (
            {"data.composition": "{t2i: {landscape: 1}}"},
            "data.composition.edit: no pool has a weight, but data.mixture gives 'edit' 5; pools "
            "with this task: scene, enhance, object, text_edit, identity, style; or use mixture "
            "edit: 0",
        ),
        (
            {"data.composition.t2i": "{landscape: 0}"},
            "data.composition.t2i: no pool has a weight, but data.mixture gives 't2i' 5",
        ),
        (
            {"data.mixture": "{t2i: 0, edit: 0}"},
            "data.mixture: every weight is 0; use t2i: 1, edit: 1",
        ),
        (
            {
                "data.mixture": "{t2i: 9, edit: 1}",
                "budget": "{updates: 3, batch: 32, micro_batch: 32}",
            },
            "data.mixture: leaves 'edit' without a micro-batch: its share is 0.1 of 3; use "
            "budget.updates >= 10, or edit: 0",
        ),
        (  # 3 updates x 32 / 16 = 6 micro-batches; 10 of them are 5 updates
            {
                "data.mixture": "{t2i: 9, edit: 1}",
                "budget": "{updates: 3, batch: 32, micro_batch: 16}",
            },
            "data.mixture: leaves 'edit' without a micro-batch: its share is 0.1 of 6; use "
            "budget.updates >= 5, or edit: 0",
        ),
        (
            {"data.pools.text.category": "texts"},
            "data.pools.text.category: the lab has no t2i category 'texts'; did you mean 'text'?",
        ),
        (
            {"data.source": "{kind: folder, path: /}"},
            "data.source.kind: 'folder' data for a model of family 'lab'; use 'lab'",
        ),
        (
            {"model.family": "folder"},
            "teachers.base.weights: 'bundled:base' belongs to the lab, but model.family is "
            "'folder'",
        ),
        # batch and objective
        (
            {"objective.anchor": "{weight: 0, steps: 30, of: 30}"},
            "objective.anchor: steps=30 does not lie below of=30; the target is a state on the way",
        ),
        (
            {
                "objective.anchor.weight": "0.1",
                "student.init": "t2i",
                "teachers.t2i.tasks": "[t2i]",
                "teachers.t2i.cfg": "{t2i: 3}",
            },
            "objective.anchor: the teacher 't2i' is to make the target, but lacks the task 'edit'",
        ),
        (
            {"budget.batch": "100", "budget.micro_batch": "32"},
            "budget.batch: 100 does not divide over micro_batch 32 x 1 device; use 96 or 128",
        ),
        (
            {"budget.batch": "16", "budget.micro_batch": "32"},
            "budget.batch: 16 does not divide over micro_batch 32 x 1 device; use 32, or "
            "budget.micro_batch 16",
        ),
        (
            {"objective.renoise": "{low: 0.9, high: 0.9}"},
            "objective.renoise: low=0.9 does not lie below high=0.9; use 0 <= low < high <= 1",
        ),
    ],
)
def test_refusals_name_field_value_and_what_would_work(overrides: dict[str, str], expected: str):
    assert expected in refusal(overrides)


def test_a_batch_over_devices_is_refused_with_its_neighbours():
    message = refusal({"budget.batch": "100", "budget.micro_batch": "1"}, devices=8)
    assert message == (
        "budget.batch: 100 does not divide over micro_batch 1 x 8 devices; use 96 or 104"
    )


def test_what_refused_batches_are_told_to_use_works():
    for batch in ("96", "104"):
        overrides = {"budget.batch": batch, "budget.micro_batch": "1"}
        assert plan_of(overrides, machine=Machine(devices=8)).batch.batch == int(batch)


def test_a_pool_larger_than_what_is_there_is_refused():
    facts = Facts(bundled=FACTS.bundled, available={"text": 113, "style": 0})
    expected = "data.pools.text.size: 2000 prompts are asked for, but there are 113 of t2i/text"
    assert expected in refusal({}, facts=facts)
    message = refusal({"data.pools.text.size": "113"}, facts=facts)
    assert "data.pools.style.size: 1000 prompts are asked for, but there are 0" in message
    assert "remove the pool" in message


def test_bundled_weights_are_offered_to_the_lab_alone():
    lab = Facts(bundled=FACTS.bundled, weights_problems={"t2i": "there is no file x"})
    told = "weights: there is no file x; train it with `fewstep teach`"
    assert refusal({}, facts=lab).endswith(f"{told}, or use bundled:<name>")
    folder = Facts(weights_problems={"base": "there is no file x"})
    overrides = {"model.family": "folder", "teachers.base.weights": "x"}
    assert refusal(overrides, facts=folder).endswith(told)


# What lies on disk

CONFIG = {"grid": 8, "patch": 2, "width": 32, "depth": 3, "max_text": 11}


def write_weights(path: Path, config: dict[str, int]) -> str:
    tensors = {"a": torch.zeros(3, 5), "b": torch.zeros(7, dtype=torch.float16)}
    save_file(tensors, path, metadata={"config": json.dumps(config)})
    return str(path)


def test_the_size_of_a_model_is_read_from_its_header(tmp_path: Path):
    weights = write_weights(tmp_path / "w.safetensors", CONFIG)
    expected = ModelSize(
        params=22, image_tokens=16, text_tokens=11, source_tokens=16, width=32, depth=3
    )
    assert read_model_size(Path(weights)).model == expected
    teachers = f"{{base: {{weights: {weights}, tasks: [t2i, edit], cfg: {{t2i: 3, edit: 2}}}}}}"
    overrides = {"teachers": teachers, "guidance": "[{weights: [{base: 1}]}]"}
    recipe = load_recipe(LAB / "unified.yaml", overrides)
    assert gather_facts(recipe).model == expected
    assert make_plan(recipe, Machine()).memory.fake == 22 * 16


def test_damaged_weights_are_refused_before_they_are_loaded(tmp_path: Path):
    whole = Path(write_weights(tmp_path / "whole.safetensors", CONFIG)).read_bytes()
    no_teacher = write_weights(tmp_path / "no_teacher.safetensors", {})
    (tmp_path / "cut.safetensors").write_bytes(whole[:-10])
    (tmp_path / "start.safetensors").write_bytes(whole[:5])
    (tmp_path / "page.safetensors").write_bytes(b"<html>" + b" " * 400)
    (tmp_path / "list.safetensors").write_bytes((2).to_bytes(8, "little") + b"[]")
    size = len(whole)
    for file, expected in {
        "missing": "there is no file",
        "cut": f"is truncated: {size - 10} bytes of {size}",
        "start": "is no .safetensors file, or truncated",
        "page": "is no .safetensors file, or truncated",
        "list": "its header is damaged",
        Path(no_teacher).stem: "holds no teacher written by `fewstep teach`",
    }.items():
        path = tmp_path / f"{file}.safetensors"
        recipe = load_recipe(LAB / "unified.yaml", {"teachers.t2i.weights": str(path)})
        assert expected in gather_facts(recipe).weights_problems["t2i"]
        with pytest.raises(RecipeError) as caught:
            make_plan(
                recipe,
                Machine(),
                Facts(
                    bundled=FACTS.bundled, weights_problems=gather_facts(recipe).weights_problems
                ),
            )
        assert str(caught.value).startswith("teachers.t2i.weights: ")
        assert expected in str(caught.value)


def test_a_missing_data_folder_is_refused(tmp_path: Path):
    weights = write_weights(tmp_path / "w.safetensors", CONFIG)
    emoji = LAB.parent / "folder" / "emoji.yaml"
    missing = {"teachers.base.weights": weights, "data.source.path": str(tmp_path / "nowhere")}
    with pytest.raises(RecipeError, match=r"data\.source\.path: there is no .*nowhere; give a"):
        make_plan(load_recipe(emoji, missing), Machine())
    there = make_plan(load_recipe(emoji, missing | {"data.source.path": str(tmp_path)}), Machine())
    assert there.weights("edit", "portrait") == BASE
