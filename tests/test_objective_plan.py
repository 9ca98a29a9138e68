"""What the plan says of each objective: its cost by hand, equal compute in the lab, refusals."""

from dataclasses import replace

import pytest

from fewstep.recipe.cost import estimate_cost, estimate_memory
from fewstep.recipe.facts import Machine, Passes
from fewstep.recipe.load import load_recipe
from fewstep.recipe.schema import Objective, Recipe

from .test_plan import FACTS, LAB, plan_of, refusal

EVEN = {"budget": "{updates: 300, batch: 30, micro_batch: 30}"}
ANY = {"guidance": "[{weights: [{base: 1.0}]}]"}  # one guided teacher, two evaluations


def cost_of(objective: str, **overrides: str):
    return plan_of(EVEN | ANY | overrides | {"objective": objective}).cost


def test_dmd2_adds_the_discriminator() -> None:
    """24 of dmd with n = 3, and 0.5 (1 + 1) + 3 x 2 x 0.5 (1 + 2) evaluations of half a network."""
    cost = cost_of("{kind: dmd2, fake_updates: 3}")
    assert cost.nfe_gan == pytest.approx(1 + 9)
    assert cost.nfe_per_sample == pytest.approx(2.5 + 2 + 2 + 1 + 3 * 5.5 + 10)


def test_decoupled_asks_each_guided_teacher_three_times() -> None:
    cost = cost_of("{kind: decoupled_dmd, fake_updates: 3}")
    assert cost.nfe_real == 3 and cost.nfe_per_sample == pytest.approx(2.5 + 2 + 3 + 1 + 16.5)
    bare = {"teachers.base.cfg": "{t2i: 1, edit: 1}"}
    assert cost_of("{kind: decoupled_dmd}", **bare).nfe_real == 1


def test_tdm_costs_what_dmd_costs() -> None:
    assert cost_of("{kind: tdm, fake_updates: 3}") == cost_of("{kind: dmd, fake_updates: 3}")


def test_consistency_has_no_rollout_and_no_fake_score() -> None:
    """Forward 1, backward 2, one guided teacher step 2, the target's own answer 1."""
    cost = cost_of("{kind: consistency}")
    assert cost.nfe_per_sample == pytest.approx(6)
    assert cost.nfe_fake_score == cost.nfe_fake_updates == 0


def test_regression_spreads_its_walks_over_the_updates() -> None:
    """900 walks of 4 x 10 guided steps over 9000 samples; more walks than samples are not made."""
    cost = cost_of("{kind: trajectory_regression, trajectories: 900}")
    assert cost.nfe_real == pytest.approx(80 * 900 / 9000)
    assert cost.nfe_per_sample == pytest.approx(8 + 3)
    many = cost_of("{kind: trajectory_regression, trajectories: 90000, substeps: 5}")
    assert many.nfe_real == pytest.approx(40)


def test_memory_without_a_fake_score_and_with_a_discriminator() -> None:
    dmd, dmd2, alone = (
        plan_of(EVEN | {"objective": f"{{kind: {kind}}}"}).memory.fake
        for kind in ("dmd", "dmd2", "consistency")
    )
    assert dmd == 16 * FACTS.model.params and alone == 4 * FACTS.model.params
    assert dmd2 - dmd == 16 * (8 * 8 + 8 + 2 * 8 + 8 + 1)  # token, its bias, norm, out


@pytest.mark.parametrize("path", sorted(LAB.glob("objective_*.yaml")), ids=lambda path: path.stem)
def test_the_labs_objectives_are_compared_at_equal_compute(path) -> None:
    """Within one per cent of unified.yaml, and otherwise the same recipe."""
    wanted = plan_of()
    found = plan_of(file=path.stem)
    assert 0.99 < found.cost.flop / wanted.cost.flop <= 1
    recipe, unified = (load_recipe(p) for p in (path, LAB / "unified.yaml"))
    same = set(Recipe.model_fields) - {"name", "objective", "budget"}
    assert all(getattr(recipe, field) == getattr(unified, field) for field in same)
    assert (recipe.budget.batch, recipe.budget.micro_batch) == (32, 16)


def test_dmd_recipes_keep_their_hash_form() -> None:
    """What is new for other kinds must not get into a dmd recipe's content."""
    content = load_recipe(LAB / "unified.yaml").model_dump(mode="json")["objective"]
    assert set(content) == {"kind", "renoise", "normaliser", "fake_updates", "anchor"}


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ("{kind: sds}", "objective.kind"),
        ("{kind: dmd2, gan: {renoise: {low: 0.5, high: 0.5}}}", "objective.gan.renoise: low=0.5"),
        ("{kind: dmd2, renoise: {low: 0.9, high: 0.1}}", "objective.renoise: low=0.9"),
        ("{kind: dmd2, anchor: {weight: 1}}", "objective.anchor: unknown key"),
        (
            "{kind: decoupled_dmd, augmentation_renoise: {low: 0.9, high: 0.1}}",
            "objective.augmentation_renoise: low=0.9 does not lie below high=0.1",
        ),
        (
            "{kind: decoupled_dmd, matching_weight: 0, augmentation_weight: 0}",
            "both weights are 0, so that nothing would be learned",
        ),
        (
            "{kind: tdm, high: 0.9}",
            "objective.high: no time of step k=0, 0.9 to 1, lies between low=0.02 and high=0.9; "
            "use low < 0.5 and high > 0.9",
        ),
        ("{kind: tdm, low: 0.6}", "objective.low: no time of step k=3, 0 to 0.5, lies between"),
        (
            "{kind: trajectory_regression, trajectories: 100}",
            "objective.trajectories: 100 does not divide into batches of 32; use 96",
        ),
        ("{kind: trajectory_regression, trajectories: 3}", "batches of 32; use 32"),
    ],
)
def test_refusals_name_the_field_and_what_would_work(objective: str, message: str) -> None:
    assert message in refusal({"objective": objective})


def test_an_adaptive_rule_needs_a_fake_score() -> None:
    rule = "[{weights: [{t2i: 1}], adaptive: {start: [{base: 1}]}}]"
    for kind in ("consistency", "trajectory_regression"):
        message = refusal({"objective": f"{{kind: {kind}}}", "guidance": rule})
        assert "has no score of the student" in message, message


def test_objectives_are_told_apart_by_kind() -> None:
    kinds = {recipe_kind(path.stem) for path in LAB.glob("objective_*.yaml")}
    assert kinds == {"dmd", "dmd2", "decoupled_dmd", "tdm", "consistency", "trajectory_regression"}


def recipe_kind(file: str) -> str:
    objective: Objective = load_recipe(LAB / f"{file}.yaml").objective
    return objective.kind


def test_a_real_models_discriminator_is_planned_for() -> None:
    """By hand from measured passes: a backward pass of 2.5 evaluations, in LoRA roles also for the
    gradient at the sample; two halves are kept beside the fake score's own loss."""
    path = LAB.parent / "qwen_image_21" / "one_80gb.yaml"
    passes = Passes(
        tokens=100,
        teacher_flop=2e12,
        student_flop=2e12,
        training_flop=7e12,
        forward_bytes=10**9,
        kept_bytes=30 * 10**9,
        training_bytes=40 * 10**9,
        decoder_bytes=10**9,
    )
    model = replace(FACTS.model, width=64, trained=1000, passes={"t2i": passes})
    made = {}
    for kind in ("dmd", "dmd2"):
        overrides = {"objective": f"{{kind: {kind}, fake_updates: 3}}"}
        recipe = load_recipe(path, overrides)
        memory = estimate_memory(recipe, teachers=1, tasks=("t2i",), model=model)
        cost = estimate_cost(
            recipe,
            steps=4,
            nfe_real={"t2i": 2.0},
            samples={"t2i": 100},
            machine=Machine(),
            model=model,
        )
        made[kind] = memory, cost
    (plain, bare), (with_head, cost) = made["dmd"], made["dmd2"]
    assert plain.activations == 40 * 10**9 and with_head.activations == 70 * 10**9
    assert with_head.fake - plain.fake == 16 * (64 * 64 + 64 + 2 * 64 + 64 + 1)
    assert bare.nfe_gan == 0 and cost.nfe_gan == pytest.approx(0.5 * 3.5 + 3 * 2 * 0.5 * 3.5)
    assert cost.nfe_student_backward == pytest.approx(2.5)
