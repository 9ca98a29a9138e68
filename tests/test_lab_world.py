"""The lab's world: splits, what an edit changes and what stays, and how both are said."""

from collections import Counter
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from fewstep.errors import DataError
from fewstep.lab.edits import DEGRADATIONS, EDIT_CATEGORIES, LOSSY, Edit, sample_edit
from fewstep.lab.grammar import caption, encode, instruction, vocabulary
from fewstep.lab.oracle import Judgement, Oracle, load_oracle
from fewstep.lab.words import EVALUATION_WORDS, training_words
from fewstep.lab.world import (
    ATTRIBUTES,
    CATEGORIES,
    SIZE,
    STYLES,
    apply_style,
    is_evaluation,
    render,
    sample_scene,
)

COUNT = 60


@cache
def edits_of(category: str, *, evaluation: bool = False, count: int = COUNT) -> list[Edit]:
    rng = np.random.default_rng(3)
    return [sample_edit(category, rng, evaluation=evaluation) for _ in range(count)]


def edits_by(operation: str, category: str, count: int = 20) -> list[Edit]:
    found = [e for e in edits_of(category, count=200) if e.operation == operation][:count]
    assert len(found) == count
    return found


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    torch.set_num_threads(1)
    return load_oracle()


# --- splits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("category", CATEGORIES)
def test_no_combination_or_word_is_in_both_splits(category: str) -> None:
    rng = np.random.default_rng(0)

    def keys(*, evaluation: bool) -> set[object]:
        scenes = [sample_scene(category, rng, evaluation=evaluation) for _ in range(400)]
        return {s["word"] if category == "text" else s.attributes for s in scenes}

    trained, held_out = keys(evaluation=False), keys(evaluation=True)
    assert trained and held_out
    assert not trained & held_out
    assert not set(training_words()) & set(EVALUATION_WORDS)


@pytest.mark.parametrize("category", EDIT_CATEGORIES)
def test_edits_of_training_show_nothing_held_out_and_those_of_evaluation_ask_for_it(
    category: str,
) -> None:
    for edit in edits_of(category, count=200):
        for side in (edit.before, edit.after):
            assert not is_evaluation(side.category, dict(side.attributes))
    for edit in edits_of(category, evaluation=True):
        assert is_evaluation(edit.after.category, dict(edit.after.attributes))


@pytest.mark.parametrize("category", CATEGORIES)
def test_the_nuisance_draws_everything_that_attributes_leave_open(category: str) -> None:
    scene = sample_scene(category, np.random.default_rng(1))
    assert np.array_equal(render(scene), render(scene))
    other = render(replace(scene, nuisance=scene.nuisance + 1)).astype(int)
    assert np.abs(other - render(scene)).mean() > 8


# --- edits ----------------------------------------------------------------------------------------


def test_every_kind_of_edit_is_drawn() -> None:
    drawn = Counter(e.operation for c in EDIT_CATEGORIES for e in edits_of(c, count=200))
    assert set(drawn) == {
        "sky", "weather", "terrain", "elsewhere", "enhance", "colour", "replace", "remove", "add",
        "shirt", "ink", "word", "sign", "mood", "wear", "hair", "hair_colour", "style",
    }  # fmt: skip
    assert min(drawn.values()) >= 8


@pytest.mark.parametrize(
    ("category", "operation"),
    [("object", "colour"), ("text_edit", "ink"), ("identity", "mood"), ("identity", "wear")],
)
def test_an_exact_edit_leaves_most_of_the_picture_as_it_is(category: str, operation: str) -> None:
    for edit in edits_by(operation, category, 10):
        source, target = edit.images()
        assert edit.exact
        assert not np.array_equal(source, target)
        assert edit.keep().mean() > 0.5
        kept = np.abs(source.astype(int) - target)[edit.keep()]
        assert kept.max() <= 8


def test_another_sign_stands_in_the_same_street() -> None:
    edits = edits_by("sign", "text_edit")
    for edit in edits:
        source, target = edit.images()
        assert not edit.exact
        assert edit.after["board"] != edit.before["board"]
        assert edit.argument == edit.after["word"] in training_words()
        rows = np.abs(source.astype(int) - target).max(-1) <= 8
        # the street is the same where neither sign is, and the sign is not the old one repainted
        assert rows[[0, -1]].mean() > 0.5
        assert edit.keep().mean() > 0.2
        same_lettering = replace(edit.after, sign=None)
        assert np.abs(render(same_lettering).astype(int) - target).mean() > 2


def test_elsewhere_the_landmarks_stay_and_two_surroundings_change() -> None:
    edits = edits_by("elsewhere", "scene")
    for edit in edits:
        before, after = dict(edit.before.attributes), dict(edit.after.attributes)
        changed = {name for name in before if before[name] != after[name]}
        assert changed == set(edit.argument.split()) < {"sky", "weather", "terrain"}
        assert len(changed) == 2
        assert before["count"] != "no"
        assert edit.after.nuisance != edit.before.nuisance
        assert not edit.keep().any()


@pytest.mark.parametrize("kind", DEGRADATIONS)
def test_a_degradation_damages_its_clean_target(kind: str) -> None:
    edits = [e for e in edits_of("enhance", count=200) if e.argument == kind]
    for edit in edits[:10]:
        source, target = edit.images()
        assert np.array_equal(target, render(edit.before))
        assert np.abs(source.astype(int) - target).mean() > 1
        assert np.array_equal(source, edit.images()[0])


def test_a_style_is_a_function_of_the_picture() -> None:
    for edit in edits_of("style")[:12]:
        source, target = edit.images()
        assert edit.argument in STYLES
        assert np.array_equal(target, apply_style(source, edit.argument))


# --- language -------------------------------------------------------------------------------------


@pytest.mark.parametrize("category", EDIT_CATEGORIES)
def test_instructions_use_words_that_teachers_know_and_name_what_changes(category: str) -> None:
    rng = np.random.default_rng(5)
    for edit in edits_of(category, evaluation=True):
        said = instruction(edit, rng)
        ids = encode(said.text)
        assert 0 < len(ids) <= 24
        assert all(0 < i <= len(vocabulary()) for i in ids)
        if edit.operation in ("word", "sign"):
            assert f'" {edit.after["word"]} "' in said.text
        if edit.operation == "sign":
            assert said.text.endswith(f"in {edit.after['ink']}")


def test_instructions_of_different_operations_are_never_the_same() -> None:
    rng = np.random.default_rng(6)
    meaning: dict[str, set[str]] = {}
    for category in EDIT_CATEGORIES:
        for edit in edits_of(category, count=200):
            meaning.setdefault(instruction(edit, rng).text, set()).add(edit.operation)
    assert not {text: ops for text, ops in meaning.items() if len(ops) > 1}


def test_the_ids_of_words_are_those_that_the_bundled_teachers_were_trained_with() -> None:
    # a new word in the middle would move all others: append instead, and train again
    known = vocabulary()
    assert len(known) == 271
    assert [known[w] for w in (",", "house", "sign", "yellow", "0:A", "4:Z")] == [
        1,
        58,
        117,
        146,
        147,
        271,
    ]


def test_a_caption_mentions_what_it_says_and_nothing_else() -> None:
    rng = np.random.default_rng(7)
    for _ in range(COUNT):
        scene = sample_scene("portrait", rng)
        said = caption(scene, rng)
        for name in ("shirt", "hair_colour"):
            assert (f"{scene[name]} {name.split('_')[0]}" in said.text) == (name in said.says)
        assert ("shirt" in said.text) == ("shirt" in said.says)


def test_unknown_words_are_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(DataError, match="do not know the word 'housse'; did you mean 'house"):
        encode("two red housse")


# --- the judge on open edits ----------------------------------------------------------------------


def mean(judged: list[Judgement], name: str) -> float:
    return float(np.mean([j.subscores[name] for j in judged]))


def test_another_lettering_of_the_sign_is_as_right_as_the_true_one(oracle: Oracle) -> None:
    edits = edits_by("sign", "text_edit")
    others = np.stack([render(replace(e.after, sign=(e.after.sign or 0) + 1)) for e in edits])
    judged = oracle.judge_edit(others, edits)
    assert mean(judged, "instruction") > 4.8
    assert mean(judged, "preservation") > 4.6
    assert np.mean([j.score for j in judged]) > 4.7


def test_the_right_sign_in_another_street_is_not_kept(oracle: Oracle) -> None:
    edits = edits_by("sign", "text_edit")
    moved = np.stack([render(replace(e.after, nuisance=e.after.nuisance + 1)) for e in edits])
    judged = oracle.judge_edit(moved, edits)
    assert mean(judged, "instruction") > 4.8
    assert mean(judged, "preservation") < 2


@pytest.mark.parametrize("name", ["word", "board"])
def test_a_sign_with_another_word_or_board_is_not_what_was_asked(oracle: Oracle, name: str) -> None:
    edits = edits_by("sign", "text_edit")
    wrong = []
    for edit, other in zip(edits, [*edits[1:], edits[0]], strict=True):
        ink = {"ink": other.after["ink"]} if name == "board" else {}
        wrong.append(edit.after.with_({name: other.after[name]} | ink))
    differs = [w[name] != e.after[name] for w, e in zip(wrong, edits, strict=True)]
    right = oracle.judge_edit(np.stack([e.images()[1] for e in edits]), edits)
    judged = oracle.judge_edit(np.stack([render(s) for s in wrong]), edits)
    drops = [a.score - b.score for a, b, d in zip(right, judged, differs, strict=True) if d]
    assert len(drops) >= 8
    assert min(drops) > (1.8 if name == "word" else 0.2)


def test_elsewhere_any_place_of_that_kind_is_right_and_another_landmark_is_not(
    oracle: Oracle,
) -> None:
    edits = edits_by("elsewhere", "scene")
    anywhere = [replace(e.after, nuisance=e.after.nuisance + 1) for e in edits]
    judged = oracle.judge_edit(np.stack([render(s) for s in anywhere]), edits)
    assert np.mean([j.score for j in judged]) > 4.8
    kinds = ATTRIBUTES["landscape"]["landmark"]
    others = [s.with_({"landmark": kinds[kinds.index(s["landmark"]) - 1]}) for s in anywhere]
    wrong = oracle.judge_edit(np.stack([render(s) for s in others]), edits)
    assert all(
        a.subscores["preservation"] - b.subscores["preservation"] > 0.4
        for a, b in zip(judged, wrong, strict=True)
    )
    untouched = oracle.judge_edit(np.stack([e.images()[0] for e in edits]), edits)
    assert max(j.score for j in untouched) < 2.5


@pytest.mark.parametrize("kind", LOSSY)
def test_a_lossy_repair_is_judged_by_what_is_damaged_and_not_by_closeness_to_one_target(
    oracle: Oracle, kind: str
) -> None:
    edits = [e for e in edits_of("enhance", count=200) if e.argument == kind][:20]
    sources, targets = (np.stack(side) for side in zip(*(e.images() for e in edits), strict=True))
    clean = oracle.judge_edit(targets, edits)
    assert mean(clean, "instruction") > 4.9
    assert mean(oracle.judge_edit(sources, edits), "instruction") < 1.1
    # half of the damage gone by averaging: closer to the target than the source, and still blurred
    halfway = np.round((sources.astype(float) + targets) / 2).astype(np.uint8)
    assert 1.5 < mean(oracle.judge_edit(halfway, edits), "instruction") < 4.5
    # a clean picture of something else is repaired, but is another picture
    others = np.roll(targets, 1, axis=0)
    judged = oracle.judge_edit(others, edits)
    assert mean(judged, "instruction") > 4.9
    assert mean(judged, "preservation") < 2


def test_images_have_the_size_of_the_world() -> None:
    edit = edits_of("object", count=1)[0]
    assert all(x.shape == (SIZE, SIZE, 3) and x.dtype == np.uint8 for x in edit.images())
