"""A recommendation follows separable evidence, keeps defaults otherwise, and refuses conflicts."""

from pathlib import Path

import pytest
import yaml

from fewstep.errors import RunError
from fewstep.recipe.facts import Machine, local_machine
from fewstep.recipe.load import dump_brief_yaml, load_recipe
from fewstep.recipe.plan import make_plan
from fewstep.recipe.schema import Recipe
from fewstep.study_report.recommend import recommend
from tests.studies import write_study

MACHINE: Machine = local_machine()


def write(folder: Path, means, **options) -> Path:
    return write_study(folder, means, recipes=True, pictures=False, cases=6, **options)


def test_separable_winners_are_put_together(tmp_path: Path) -> None:
    """Composition and guidance of T2I-only studies, ratio of a third; the rest is the base's."""
    one = write(tmp_path / "one", {"e2": 3.6, "e4": 3.0, "e5": 3.0})
    two = write(tmp_path / "two", {"base_only": 3.0, "stepwise": 3.6})
    three = write(tmp_path / "three", {"r5to5": 3.0, "r7to3": 3.5})
    out = recommend([one, two, three], tmp_path / "new" / "recipe.yaml")
    recipe = load_recipe(out)
    base = load_recipe("recipes/lab/unified.yaml")
    assert recipe.data.composition["t2i"] == {"landscape": 0, "portrait": 1, "text": 0}
    assert recipe.data.composition["edit"] == base.data.composition["edit"]
    assert recipe.data.mixture == {"t2i": 7, "edit": 3}
    t2i, edit = recipe.guidance
    assert t2i.when.task == "t2i" and t2i.weights[0] == {"base": 1.0}
    assert t2i.weights[3] == {"t2i": 1.0}
    assert edit == base.guidance[1]
    assert recipe.budget == base.budget and recipe.teachers == base.teachers
    plan = make_plan(recipe, MACHINE)
    assert plan.weights("t2i", "portrait")[2] == {"base": 0.5, "t2i": 0.5}
    text = out.read_text()
    assert "chosen: e2, separably better than e5" in text
    assert "chosen: stepwise, separably better than base_only" in text
    above = text.split("\n  mixture:")[0].splitlines()[-1]
    assert above.startswith("  # - chosen: r7to3"), "the evidence stands above its field"
    assert "null" not in text and "{}" not in text, "nothing that says nothing"
    assert text.count("# test-study: takeaway") == 3 and str(tmp_path) not in text


RECIPES = [p for p in sorted(Path("recipes").glob("*/*.yaml")) if "objective:" in p.read_text()]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_brief_recipe_says_what_differs_from_the_defaults(path: Path) -> None:
    """And null where that is no default. What is left out is read back: each value that stands
    there makes a difference."""
    changes = {"ema": "null", "log.probe": "null", "optim.fake.clip": "null"}
    for overrides in ({}, changes):
        recipe = load_recipe(path, overrides)
        brief = yaml.safe_load(dump_brief_yaml(recipe))
        assert Recipe.model_validate(brief) == recipe
        fields = [key for key in brief if not Recipe.model_fields[key].is_required()]
        for key in fields:
            assert Recipe.model_validate({k: brief[k] for k in brief if k != key}) != recipe, key
    assert brief["ema"] is None and brief["log"] == {**brief["log"], "probe": None}
    assert brief["optim"]["fake"]["clip"] is None


def test_a_brief_recipe_of_the_lab_does_not_speak_of_real_models() -> None:
    brief = yaml.safe_load(dump_brief_yaml(load_recipe("recipes/lab/unified.yaml")))
    assert brief["model"] == {"family": "lab"} and brief["student"] == {"init": "base"}
    assert brief["objective"] == {"kind": "dmd", "fake_updates": 3}
    assert not {"optim", "log", "seed", "precision"} & brief.keys()


def test_defaults_are_kept_and_said(tmp_path: Path) -> None:
    means = {"e2": 3.0, "e5": 3.0, "base_only": 3.0, "stepwise": 3.0}
    text = recommend([write(tmp_path / "s", means)], tmp_path / "r.yaml").read_text()
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe.data.composition["t2i"] == {"landscape": 1, "portrait": 1, "text": 1}
    assert all(row == {"base": 1.0} for row in recipe.guidance[0].weights)
    told = " ".join(text.replace("#", " ").split())
    assert "not separable; kept the default, e5, because it leaves no category out" in told
    assert "not separable; kept the default, base_only, because one teacher" in told
    assert "data.mixture: no study of it was given" in text


def test_the_simplest_of_equals_is_chosen(tmp_path: Path) -> None:
    means = {"base_only": 2.5, "constant": 3.49, "stepwise": 3.5}
    text = recommend([write(tmp_path / "s", means)], tmp_path / "r.yaml").read_text()
    assert load_recipe(tmp_path / "r.yaml").guidance[0].weights == ({"base": 0.625, "t2i": 0.375},)
    assert "constant is simpler than stepwise, and not separable from it" in text


def test_a_trade_between_tasks_is_no_improvement(tmp_path: Path) -> None:
    """Better text-to-image for worse editing: the balanced default stays."""
    means = {"r5to5": 3.0, "r9to1": {"else": 3.6, "scene": 2.4, "style": 2.4}}
    text = recommend([write(tmp_path / "s", means)], tmp_path / "r.yaml").read_text()
    assert load_recipe(tmp_path / "r.yaml").data.mixture == {"t2i": 5, "edit": 5}
    assert "text-to-image: +0." in text and "kept the default, r5to5" in text


def test_an_unstable_teacher_is_not_recommended(tmp_path: Path) -> None:
    means = {"base_only": 3.0, "specialised_only": 3.9, "stepwise": 3.5}
    curves = {
        "specialised_only": lambda seed, step: 3.9 - (0.5 + seed / 50) * (step == 100),
        "stepwise": lambda seed, step: 3.0 + step / 200,
    }
    made = write(tmp_path / "s", means, curves=curves)
    text = recommend([made], tmp_path / "r.yaml").read_text()
    assert "specialised_only is left out: takeaway 3 was reproduced" in text
    assert "chosen: stepwise" in text


def test_conflicts_are_refused_by_name(tmp_path: Path) -> None:
    one = write(tmp_path / "one", {"e2": 3.6, "e5": 3.0})
    two = write(tmp_path / "two", {"e1": 3.6, "e5": 3.0})
    with pytest.raises(RunError, match=r"one and .*two disagree on data\.composition: e2 or e1"):
        recommend([one, two], tmp_path / "r.yaml")
    assert not (tmp_path / "r.yaml").exists()
    quiet = write(tmp_path / "quiet", {"e1": 3.0, "e5": 3.0})
    recommend([quiet, one], tmp_path / "r.yaml")  # not separable contradicts nobody
    assert load_recipe(tmp_path / "r.yaml").data.composition["t2i"]["portrait"] == 1
    assert load_recipe(tmp_path / "r.yaml").data.composition["t2i"]["text"] == 0


def test_other_teachers_and_nothing_to_choose_are_refused(tmp_path: Path) -> None:
    one = write(tmp_path / "one", {"e2": 3.6, "e5": 3.0})
    two = write(tmp_path / "two", {"base_only": 3.0, "stepwise": 3.6})
    for cell in (two / "cells").glob("*/*/cell.yaml"):
        cell.write_text(cell.read_text().replace("steps: 40", "steps: 20"))
    with pytest.raises(RunError, match="different teachers"):
        recommend([one, two], tmp_path / "r.yaml")
    alone = write(tmp_path / "alone", {"e2": 3.6, "stepwise": 3.6})
    with pytest.raises(RunError, match="nothing to choose between"):
        recommend([alone], tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_text("mine")
    with pytest.raises(RunError, match="is there already"):
        recommend([one], tmp_path / "r.yaml")
    assert (tmp_path / "r.yaml").read_text() == "mine"
