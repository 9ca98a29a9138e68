"""lambda that moves with the measured mismatch: its documented trajectory, its ends, refusals."""

import io
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fewstep.core.types import Batch
from fewstep.errors import RecipeError
from fewstep.recipe.facts import Facts, Machine
from fewstep.recipe.load import load_recipe
from fewstep.recipe.plan import Plan, make_plan
from fewstep.recipe.render import render_plan
from fewstep.recipe.schema import Recipe
from fewstep.train import loop, step
from fewstep.train.adaptive import Schedule
from tests.test_instruments import distil
from tests.test_loop import metrics_of, same_weights, start, tiny_recipe

LAB = Path(__file__).parent.parent / "recipes" / "lab"
BASE, HANDED = {"base": 1.0}, {"text": 1.0}
RULE: dict[str, Any] = {"start": [BASE], "rate": 0.1, "tolerance": 1.0, "limit": 2.0}


def adaptive_recipe(weights: object = (HANDED,), **rule: object) -> Recipe:
    """T2I moves from `start` to `weights`; edits stay with the base teacher."""
    moving = {"when": {"task": "t2i"}, "weights": list(weights), "adaptive": RULE | rule}  # type: ignore[call-overload]
    return tiny_recipe(guidance=[moving, {"weights": [BASE]}])


def plan_of(recipe: Recipe) -> Plan:
    return make_plan(recipe, Machine(), Facts(bundled=frozenset({"base", "text"})))


def schedule_of(**rule: object) -> Schedule:
    return Schedule(plan_of(adaptive_recipe(**rule)))


def measured(ratio: float, k: int = 0, base: float = 0.5) -> dict[str, float]:
    return {
        f"mismatch/t2i/base/k{k}": base,
        f"mismatch/t2i/text/k{k}": ratio * base,
        "mismatch/edit/base/k0": 0.3,
    }


def a_of(schedule: Schedule, k: int = 0) -> float:
    return schedule.progress["t2i", k].a


# --- the rule -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "speed"),
    [(0.2, 1.0), (1.0, 1.0), (1.25, 0.75), (1.5, 0.5), (1.9, 0.1), (2.0, 0.0)],
)
def test_a_constant_mismatch_gives_a_straight_line_up_to_one(ratio: float, speed: float) -> None:
    """speed = (limit - r) / (limit - tolerance) = 2 - r here, at most 1; a(n) = 0.1 n speed."""
    schedule = schedule_of()
    for update in range(1, 31):
        schedule.observe(update, measured(ratio))
        assert a_of(schedule) == pytest.approx(min(1.0, 0.1 * update * speed), abs=1e-9)
    assert a_of(schedule, 1) == 0.0  # never measured, never moved


@pytest.mark.parametrize(("ratio", "speed"), [(2.5, -0.5), (3.0, -1.0), (40.0, -1.0)])
def test_above_the_limit_it_falls_back_to_the_anchor(ratio: float, speed: float) -> None:
    schedule = schedule_of(decay=0.0)
    for update in range(1, 9):
        schedule.observe(update, measured(0.5))
    for update in range(9, 30):
        schedule.observe(update, measured(ratio))
        assert a_of(schedule) == pytest.approx(max(0.0, 0.8 + 0.1 * (update - 8) * speed), abs=1e-9)


def test_a_rising_mismatch_slows_stalls_and_turns_it() -> None:
    schedule = schedule_of(rate=0.02, decay=0.0)
    path = []
    for update in range(1, 41):
        schedule.observe(update, measured(1.0 + 0.05 * update))  # the limit is met at update 20
        path.append(a_of(schedule))
    steps = [b - a for a, b in pairwise(path)]
    assert all(later < earlier for earlier, later in pairwise(steps[:-1]))
    assert max(path) == path[18] == pytest.approx(path[19])
    assert path[38] == pytest.approx(0.0, abs=1e-9)


def test_the_way_does_not_depend_on_how_often_it_is_measured() -> None:
    often, seldom = schedule_of(), schedule_of()
    for update in range(1, 9):
        often.observe(update, measured(1.5))
        seldom.observe(update, measured(1.5) if update % 4 == 0 else {})
    assert a_of(often) == pytest.approx(a_of(seldom)) == pytest.approx(0.4)


def test_it_takes_the_running_average_of_each_teacher() -> None:
    schedule = schedule_of(decay=0.75)
    first = schedule.observe(1, measured(3.0, base=1.0))  # the first measurement stands alone
    assert first["adaptive_ratio/t2i/k0"] == 3.0 and a_of(schedule) == 0.0
    second = schedule.observe(2, measured(1.0, base=1.0))
    assert second["adaptive_ratio/t2i/k0"] == pytest.approx(0.75 * 3 + 0.25 * 1)
    third = schedule.observe(3, measured(1.0, base=3.0))
    text, base = 0.75 * 2.5 + 0.25 * 3, 0.75 * 1 + 0.25 * 3
    assert third["adaptive_ratio/t2i/k0"] == pytest.approx(text / base)


def test_one_teacher_alone_is_no_measurement() -> None:
    schedule = schedule_of()
    found = schedule.observe(1, {"mismatch/t2i/base/k0": 0.5})
    assert a_of(schedule) == 0.0 and "adaptive_ratio/t2i/k0" not in found
    schedule.observe(2, {"mismatch/t2i/text/k0": 0.1})
    assert a_of(schedule) == 0.0


def test_lambda_is_a_mixture_at_every_moment_and_exact_at_both_ends() -> None:
    table = [BASE, {"base": 0.3, "text": 0.7}, {"base": 0.1, "text": 0.9}, HANDED]
    schedule = schedule_of(weights=table, rate=0.07)
    seen = set()
    for update in range(1, 40):
        rows = schedule.at(update).weights("t2i", "portrait")
        for k, row in enumerate(rows):
            assert sum(row.values()) == pytest.approx(1, abs=1e-12)
            assert all(0 < weight <= 1 for weight in row.values())
            if k:
                schedule.observe(update, measured(0.5, k))
        seen.add(rows[2]["base"])
        assert rows[0] == BASE  # this row is the same in both tables
    assert schedule.at(0).weights("t2i", "portrait") == tuple(table)
    assert len(seen) > 10
    assert schedule_of(weights=table).at(0).weights("t2i", "portrait") == (BASE,) * 4
    assert schedule.at(0).weights("edit", "object") == (BASE,) * 4


def test_what_is_logged_is_the_lambda_of_the_update_before_it_moves() -> None:
    schedule = schedule_of()
    first = schedule.observe(1, measured(1.0))
    assert (first["lambda/t2i/base/k0"], first["lambda/t2i/text/k0"]) == (1.0, 0.0)
    second = schedule.observe(2, measured(1.0))
    assert second["lambda/t2i/base/k0"] == pytest.approx(0.9)
    assert second["lambda/t2i/text/k0"] == second["adaptive/t2i/k0"] == pytest.approx(0.1)
    assert not any("edit" in key for key in first)


def test_categories_with_rules_of_their_own_move_on_their_own() -> None:
    rules = [
        {"when": {"category": "text"}, "weights": [HANDED], "adaptive": RULE},
        {"when": {"category": "portrait"}, "weights": [HANDED], "adaptive": RULE},
        {"weights": [BASE]},
    ]
    schedule = Schedule(plan_of(tiny_recipe(guidance=rules)))
    schedule.observe(1, {"mismatch/t2i/text/base/k0": 1.0, "mismatch/t2i/text/text/k0": 0.5})
    now = schedule.at(1)
    assert now.weights("t2i", "text")[0] == pytest.approx({"base": 0.9, "text": 0.1})
    assert now.weights("t2i", "portrait")[0] == BASE


# --- in training ----------------------------------------------------------------------------------


def only(d: loop.Distillation, task: str) -> Batch:
    while (batch := d.draw("student")[0]).task != task:
        pass
    return batch


@pytest.mark.parametrize(("a", "table"), [(0.0, BASE), (1.0, HANDED)])
def test_both_ends_give_the_loss_of_the_fixed_schedule_bit_for_bit(a: float, table: dict) -> None:
    fixed = tiny_recipe(
        guidance=[{"when": {"task": "t2i"}, "weights": [table]}, {"weights": [BASE]}]
    )
    moving = adaptive_recipe()
    losses, gradients = [], []
    for recipe in (fixed, moving):
        d = start(recipe)
        for state in d.schedule.progress.values():
            state.a = a
        batch = only(d, "t2i")
        plan = d.schedule.at(0)  # update 0 also hears the teacher without weight
        loss, told = step.update_student(d.cast, batch, 2, plan, recipe, d.noise)
        loss.backward()
        losses.append(loss)
        gradients.append([p.grad for p in d.cast.student.parameters()])
        heard = {key for key in told if key.startswith("mismatch/t2i")}
        both = {"mismatch/t2i/base/k2", "mismatch/t2i/text/k2"}
        assert heard == ({f"mismatch/t2i/{next(iter(table))}/k2"} if recipe is fixed else both)
    assert torch.equal(*losses)
    assert all(torch.equal(x, y) for x, y in zip(*gradients, strict=True) if x is not None)


def test_a_teacher_without_weight_is_heard_only_every_so_many_updates() -> None:
    d = start(adaptive_recipe(every=3))
    calls = []
    d.cast.teachers["text"].register_forward_pre_hook(lambda *_: calls.append(1))  # type: ignore[union-attr]
    batch = only(d, "t2i")
    for update, expected in ((0, True), (1, False), (2, False), (3, True)):
        calls.clear()
        step.update_student(d.cast, batch, 1, d.schedule.at(update), d.recipe, d.noise)
        assert bool(calls) is expected, update


def test_the_measured_mismatch_is_that_of_a_weighted_teacher() -> None:
    """What is measured without weight equals what the same teacher shows when it guides."""
    found = []
    for weights in ([BASE], [HANDED]):
        recipe = (
            adaptive_recipe() if weights == [BASE] else tiny_recipe(guidance=[{"weights": weights}])
        )
        d = start(recipe)
        batch = only(d, "t2i")
        _, told = step.update_student(d.cast, batch, 1, d.schedule.at(0), recipe, d.noise)
        found.append(told["mismatch/t2i/text/k1"])
    assert found[0] == found[1]


def test_lambda_moves_in_training_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    recipe = adaptive_recipe(limit=100.0, tolerance=50.0, every=2, rate=0.05)
    whole = start(recipe)
    distil(whole, tmp_path / "whole")
    distil(start(recipe), tmp_path / "killed", stop_after=5)
    second = start(recipe)
    loop.resume(second, tmp_path / "killed")
    assert any(state.a > 0 for state in second.schedule.progress.values())
    distil(second, tmp_path / "killed")
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "killed")
    assert whole.schedule.state_dict() == second.schedule.state_dict()
    assert same_weights(whole.cast.student, second.cast.student)
    last = metrics_of(tmp_path / "whole")[-1]
    assert any(0 < last[f"lambda/t2i/text/k{k}"] < 1 for k in range(4))
    assert not any(key.startswith(("lambda/edit", "adaptive/edit")) for key in last)


# --- recipe and plan ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"tolerance": 2.0}, r"adaptive: tolerance=2 does not lie below limit=2"),
        ({"start": [HANDED]}, r"adaptive: start is the same as weights"),
        ({"start": [{"base": 0.5}]}, r"adaptive\.start: row k=0: lambda sums to 0.5, not 1"),
        ({"start": [BASE, BASE]}, r"adaptive\.start: has 2 rows of weights for 4 student steps"),
        ({"start": [{"bose": 1.0}]}, r"adaptive\.start: row k=0: no teacher is called 'bose'"),
    ],
)
def test_impossible_settings_are_refused(changes: dict, complaint: str) -> None:
    with pytest.raises(RecipeError, match=r"guidance\[0\] \(task=t2i\)\." + complaint):
        plan_of(adaptive_recipe(**changes))


def test_an_objective_without_scores_is_refused() -> None:
    recipe = adaptive_recipe().model_copy(
        update={"objective": tiny_recipe(objective={"kind": "consistency"}).objective}
    )
    with pytest.raises(RecipeError, match="'consistency' has no score of the student"):
        plan_of(recipe)


def test_the_plan_counts_and_loads_the_teachers_of_both_tables() -> None:
    plan = plan_of(adaptive_recipe())
    assert plan.teachers == ("base", "text")
    assert plan.condition("t2i", "portrait").cfg == {"base": 3.0, "text": 3.0}
    fixed = plan_of(tiny_recipe(guidance=[{"weights": [BASE]}]))
    both = plan_of(
        tiny_recipe(
            guidance=[
                {"when": {"task": "t2i"}, "weights": [{"base": 0.5, "text": 0.5}]},
                {"weights": [BASE]},
            ]
        )
    )
    assert fixed.cost.nfe_real < plan.cost.nfe_real == both.cost.nfe_real
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_the_plan_prints_both_tables_and_the_rule() -> None:
    out = io.StringIO()
    recipe = load_recipe(LAB / "guidance_adaptive.yaml")
    plan = make_plan(recipe, Machine(), Facts(bundled=frozenset({"base", "t2i", "edit"})))
    Console(file=out, width=200).print(render_plan(plan))
    text = out.getvalue()
    rows = [line for line in text.splitlines() if "landscape" in line or "moving towards" in line]
    assert rows[0].count("base") == 5 and rows[1].count("t2i") == 4  # with the CFG column
    assert "a speed of 0.01 an update" in text and "at least 100 of 300 updates" in text
    assert "measured every 4 updates" in text


def test_the_guidance_recipes_differ_in_nothing_but_guidance() -> None:
    names = ("base", "stepwise", "constant", "specialised", "handover", "adaptive")
    recipes = [load_recipe(LAB / f"guidance_{name}.yaml") for name in names]
    bare = {recipe.model_dump_json(exclude={"name", "guidance"}) for recipe in recipes}
    assert len(bare) == 1
    assert len({recipe.model_dump_json(include={"guidance"}) for recipe in recipes}) == len(names)
