"""Means, intervals, pairs and ranks against closed forms and independent enumeration."""

import itertools
import math
import random

import numpy as np
import pytest

from fewstep.errors import DataError
from fewstep.evals import stats
from fewstep.evals.rows import Row
from fewstep.evals.stats import Interval

JUDGE = "oracle"


def make_row(model: str, case: str, score: float | None, **changes) -> Row:
    fields = {
        "model": model,
        "nfe": 4,
        "task": "t2i",
        "category": "portrait",
        "case": case,
        "prompt": case,
        "seed": 0,
        "image": f"{model}/{case}.png",
        "score": score,
        "status": "unscored: refused" if score is None else "ok",
        "judge": JUDGE,
    }
    return Row(**(fields | changes))


def rows_of(model: str, scores, *, category: str = "portrait", **changes) -> list[Row]:
    return [
        make_row(model, f"{category}-{i:03d}", score, category=category, **changes)
        for i, score in enumerate(scores)
    ]


def normal_scores(n: int, *, mean: float, sd: float, seed: int) -> list[float]:
    return list(np.clip(np.random.default_rng(seed).normal(mean, sd, n), 1, 5))


def group(rows, model: str, category: str | None) -> stats.Group:
    (found,) = [
        g for g in stats.summarise(rows) if (g.model, g.category) == (model, category)
    ]  # fmt: skip
    return found


def bounds(interval: Interval | None) -> tuple[float, float]:
    assert interval is not None and interval.low is not None and interval.high is not None
    return interval.low, interval.high


def assert_quantiles(interval: Interval, outcomes, *, slack: float = 0.008) -> None:
    """The bounds are 2.5% and 97.5% quantiles of equally likely outcomes, up to the draws' error.

    With 4000 draws, a share of 2.5% has a standard error of 0.25%.
    """
    outcomes = np.array(outcomes)
    for bound, share in zip(bounds(interval), (0.025, 0.975), strict=True):
        assert np.mean(outcomes < bound - 1e-9) <= share + slack
        assert np.mean(outcomes <= bound + 1e-9) >= share - slack


def test_interval_of_a_mean_is_the_normal_one_for_many_cases():
    scores = normal_scores(400, mean=3, sd=0.5, seed=1)
    mean = group(rows_of("a", scores), "a", "portrait").mean
    half = 1.96 * np.std(scores, ddof=1) / math.sqrt(400)
    low, high = bounds(mean)
    assert mean is not None and mean.value == pytest.approx(np.mean(scores))
    assert mean.value - low == pytest.approx(half, rel=0.06)
    assert high - mean.value == pytest.approx(half, rel=0.06)


def test_interval_of_few_cases_enumerates_draws_of_n_minus_one():
    scores = [1.0, 1.7, 3.2, 5.0]
    mean = group(rows_of("a", scores), "a", "portrait").mean
    outcomes = [np.mean(draw) for draw in itertools.product(scores, repeat=3)]
    assert mean is not None
    assert_quantiles(mean, outcomes)
    assert np.var(outcomes) == pytest.approx(np.var(scores, ddof=1) / 4)  # why n - 1 is right


@pytest.mark.parametrize(("n", "least"), [(6, 0.86), (16, 0.90)])
def test_intervals_cover_the_true_mean(n, least):
    """Two categories of n normal cases. Six of each are too few for 95%: the interval is a
    percentile one, and takes no t factor."""
    hits = 0
    for trial in range(200):
        rows = [
            *rows_of("a", normal_scores(n, mean=2.5, sd=0.3, seed=2 * trial)),
            *rows_of("a", normal_scores(n, mean=3.5, sd=0.3, seed=2 * trial + 1), category="text"),
        ]
        whole = stats.summarise(rows, draws=400)[-1]
        assert whole.category is None
        low, high = bounds(whole.mean)
        hits += low <= 3.0 <= high
    assert least <= hits / 200 <= 0.985


def test_a_task_weighs_its_categories_equally():
    rows = [*rows_of("a", [2.0] * 9), *rows_of("a", [4.0, 5.0], category="text")]
    whole = group(rows, "a", None)
    assert whole.mean is not None and whole.mean.value == pytest.approx((2.0 + 4.5) / 2)
    # Only the text category varies: one draw of (4, 5), so the task is 3.0 or 3.5.
    assert bounds(whole.mean) == pytest.approx((3.0, 3.5))


def test_a_single_case_has_a_mean_but_no_interval():
    mean = group(rows_of("a", [3.0]), "a", "portrait").mean
    assert mean is not None and mean == Interval(3.0, None, None)
    assert not mean.excludes_zero


def test_a_task_with_a_category_of_a_single_case_has_no_interval():
    """Its other categories' spread would pass for that of the whole."""
    rows = [*rows_of("a", [2.0, 3.0, 4.0]), *rows_of("a", [5.0], category="text")]
    assert group(rows, "a", None).mean == Interval(4.0, None, None)
    bounds(group(rows, "a", "portrait").mean)


def test_an_interval_that_ends_at_zero_does_not_exclude_it():
    said = [Interval(0.5, low, 1.0).excludes_zero for low in (-0.1, 0.0, 0.1)]
    assert said == [False, False, True]
    assert [Interval(-0.5, -1.0, high).excludes_zero for high in (0.0, -0.1)] == [False, True]


def test_seeds_of_a_case_are_no_independent_cases():
    scores = normal_scores(12, mean=3, sd=0.6, seed=5)
    once = group(rows_of("a", scores), "a", "portrait").mean
    often = [row for seed in range(5) for row in rows_of("a", scores, seed=seed)]
    again = group(often, "a", "portrait").mean
    assert once is not None and again is not None
    assert tuple(again) == pytest.approx(tuple(once))


def test_a_mean_over_unequal_seeds_is_the_plain_mean_of_images():
    rows = [
        make_row("a", "x", 1.0),
        make_row("a", "y", 4.0),
        make_row("a", "y", 5.0, seed=1),
    ]
    mean = group(rows, "a", "portrait").mean
    assert mean is not None and mean.value == pytest.approx(10 / 3)


def test_unscored_and_missing_images_are_counted_and_in_no_mean():
    rows = [
        *rows_of("a", [2.0, 4.0, None, 3.0]),
        *rows_of("b", [5.0, None]),
        *rows_of("b", [None, None], category="text"),
    ]
    a, b = group(rows, "a", "portrait"), group(rows, "b", "portrait")
    assert a.mean is not None and a.mean.value == pytest.approx(3.0)
    assert (a.scored, a.unscored, a.missing, a.coverage) == (3, 1, 0, 0.75)
    assert b.mean is not None and b.mean.value == 5.0
    assert (b.scored, b.unscored, b.missing, b.coverage) == (1, 1, 2, 0.25)
    for model, missing in (("a", 2), ("b", 0)):
        text = group(rows, model, "text")
        assert text.mean is None and (text.scored, text.missing) == (0, missing)
        whole = group(rows, model, None)
        assert whole.mean is None, "a mean without one of its categories compares with no other"
        assert whole.asked == 6


def test_pairs_use_only_images_scored_for_both_and_say_what_was_dropped():
    rows = [
        *rows_of("a", [2.0, 3.0, None, 4.0, None]),
        *rows_of("b", [1.0, None, 5.0, 2.0, None]),
        *rows_of("a", [5.0], category="text"),
        *rows_of("b", [None], category="text"),
    ]
    found = stats.compare(rows, "a", "b", task="t2i")
    assert found is not None
    assert found.difference.value == pytest.approx((1 + 2) / 2)
    assert found.ratio.value == pytest.approx(3.0 / 1.5)
    assert bounds(found.difference) == pytest.approx((1.0, 2.0))  # one draw of (1, 2)
    assert (found.pairs, found.only_model, found.only_against, found.neither) == (2, 2, 1, 1)
    assert found.dropped == 4 and found.categories_dropped == ("text",)
    assert stats.compare(rows, "a", "b", task="t2i", category="text") is None


def test_the_same_case_with_another_seed_is_no_pair():
    rows = [make_row("a", "x", 3.0, seed=0), make_row("b", "x", 3.0, seed=1)]
    assert stats.compare(rows, "a", "b", task="t2i") is None


def test_a_paired_interval_rests_on_differences_not_on_spread():
    """Hard and easy cases spread both models alike; the difference hardly varies."""
    base = normal_scores(200, mean=3, sd=0.7, seed=2)
    gaps = np.random.default_rng(3).normal(-0.1, 0.05, 200)
    other = list(np.clip(np.array(base) + gaps, 1, 5))
    found = stats.compare([*rows_of("b", base), *rows_of("a", other)], "a", "b", task="t2i")
    assert found is not None
    low, high = bounds(found.difference)
    paired = 1.96 * np.std(np.array(other) - np.array(base), ddof=1) / math.sqrt(200)
    unpaired = 1.96 * math.sqrt((np.var(base, ddof=1) + np.var(other, ddof=1)) / 200)
    assert (high - low) / 2 == pytest.approx(paired, rel=0.08)
    assert paired < unpaired / 10
    assert found.difference.excludes_zero


def test_difference_and_ratio_of_two_categories_match_enumeration():
    a = {"portrait": [2.0, 3.5, 4.0], "text": [1.0, 1.5, 4.5]}
    b = {"portrait": [3.0, 3.0, 5.0], "text": [2.0, 1.0, 4.0]}
    rows = [
        row
        for name, scores in (("a", a), ("b", b))
        for category, values in scores.items()
        for row in rows_of(name, values, category=category)
    ]
    found = stats.compare(rows, "a", "b", task="t2i")
    differences, ratios = [], []
    draws = list(itertools.product(range(3), repeat=2))
    for first, second in itertools.product(draws, draws):
        mean_a, mean_b = (
            (
                np.mean([scores["portrait"][i] for i in first])
                + np.mean([scores["text"][i] for i in second])
            )
            / 2
            for scores in (a, b)
        )
        differences.append(mean_a - mean_b)
        ratios.append(mean_a / mean_b)
    assert found is not None
    assert found.difference.value == pytest.approx(-0.25 + 0.0)
    assert_quantiles(found.difference, differences)
    assert_quantiles(found.ratio, ratios)


def test_a_constant_ratio_has_no_width():
    base = normal_scores(30, mean=4, sd=0.3, seed=4)
    rows = [*rows_of("b", base), *rows_of("a", [0.9 * score for score in base])]
    found = stats.compare(rows, "a", "b", task="t2i")
    assert found is not None and tuple(found.ratio) == pytest.approx((0.9, 0.9, 0.9))


def test_ties_reach_exactly_to_the_limit():
    gaps = [0.05, -0.05, 0.06, -0.06, 0.0, 1.0]
    rows = [*rows_of("b", [2.0] * 6), *rows_of("a", [round(2.0 + gap, 2) for gap in gaps])]
    found = stats.compare(rows, "a", "b", task="t2i")
    assert found is not None and (found.wins, found.ties, found.losses) == (2, 3, 1)
    strict = stats.compare(rows, "a", "b", task="t2i", tie=0.0)
    assert strict is not None and (strict.wins, strict.ties, strict.losses) == (3, 1, 2)


def test_swapping_the_models_mirrors_the_comparison():
    rows = [
        *rows_of("a", normal_scores(20, mean=3.0, sd=0.5, seed=6)),
        *rows_of("b", normal_scores(20, mean=3.3, sd=0.5, seed=7)),
    ]
    one, two = stats.compare(rows, "a", "b", task="t2i"), stats.compare(rows, "b", "a", task="t2i")
    assert one is not None and two is not None
    assert (one.wins, one.losses) == (two.losses, two.wins)
    assert bounds(one.difference) == pytest.approx(
        tuple(-x for x in reversed(bounds(two.difference)))
    )


def test_ranks_separate_a_clear_winner_and_leave_noise_open():
    base = np.array(normal_scores(60, mean=3, sd=0.5, seed=8))
    noise = np.random.default_rng(9).normal(0, 0.3, 60)
    scores = {"best": base + 0.6, "b": base, "c": base + noise - noise.mean() + 0.001}
    rows = [row for name, values in scores.items() for row in rows_of(name, np.clip(values, 1, 5))]
    found = stats.rank(rows, ["b", "best", "c"], task="t2i")
    ranks = {entry.model: (entry.best, entry.worst) for entry in found.ranks}
    assert ranks == {"best": (1, 1), "b": (2, 3), "c": (2, 3)}
    assert [entry.model for entry in found.ranks] == ["best", "c", "b"]
    assert [entry.rank for entry in found.ranks] == [1, 2, 3]
    assert {e.model: e.not_separable for e in found.ranks} == {"best": (), "b": ("c",), "c": ("b",)}


def test_a_tie_of_ranks_agrees_with_pairwise_comparisons():
    rows = [
        row
        for i, mean in enumerate((3.0, 3.05, 3.1, 3.6))
        for row in rows_of(f"m{i}", normal_scores(40, mean=mean, sd=0.4, seed=20 + i))
    ]
    names = ["m0", "m1", "m2", "m3"]
    found = {entry.model: entry for entry in stats.rank(rows, names, task="t2i").ranks}
    for a in names:
        gaps = [stats.compare(rows, a, b, task="t2i") for b in names if b != a]
        below = sum(g.difference.excludes_zero and g.difference.value < 0 for g in gaps if g)
        above = sum(g.difference.excludes_zero and g.difference.value > 0 for g in gaps if g)
        assert (found[a].best, found[a].worst) == (1 + below, 4 - above)


def test_equal_models_share_a_rank_and_are_not_separable():
    rows = [*rows_of("a", [2.0, 3.0, 4.0]), *rows_of("b", [2.0, 3.0, 4.0])]
    found = stats.rank(rows, ["a", "b"], task="t2i")
    assert [(entry.rank, entry.best, entry.worst) for entry in found.ranks] == [(1, 1, 2)] * 2


def test_ranks_use_only_images_scored_for_all():
    """On its own images b has the higher mean; on the images of both it has the lower one."""
    rows = [*rows_of("a", [2.0, 2.0, None]), *rows_of("b", [1.5, 1.5, 5.0])]
    found = stats.rank(rows, ["a", "b"], task="t2i")
    assert [entry.model for entry in found.ranks] == ["a", "b"]
    assert (found.images, found.dropped) == (2, 1)


def test_the_order_of_rows_changes_nothing():
    rows = [
        row
        for name in ("a", "b", "c")
        for category in ("portrait", "text")
        for seed in (0, 1)
        for row in rows_of(
            name,
            normal_scores(9, mean=3, sd=0.5, seed=sum(map(ord, name + category)) + seed),
            category=category,
            seed=seed,
        )
    ]
    shuffled = rows.copy()
    random.Random(1).shuffle(shuffled)
    assert stats.summarise(rows) == stats.summarise(shuffled)
    assert stats.compare(rows, "a", "b", task="t2i") == stats.compare(
        shuffled, "a", "b", task="t2i"
    )
    assert stats.rank(rows, ["a", "b", "c"], task="t2i") == stats.rank(
        shuffled, ["a", "b", "c"], task="t2i"
    )
    assert stats.comparable(rows, judge=JUDGE) == stats.comparable(shuffled, judge=JUDGE)


def test_gap_closed_is_the_share_won_back():
    cut = np.array(normal_scores(25, mean=2, sd=0.3, seed=10))
    teacher = cut + np.random.default_rng(11).uniform(0.8, 1.6, 25)
    rows = [*rows_of("cut", cut), *rows_of("teacher", teacher)]
    rows += rows_of("student", cut + 0.75 * (teacher - cut))
    gap = stats.gap_closed(rows, student="student", cut="cut", teacher="teacher", task="t2i")
    assert gap is not None and tuple(gap) == pytest.approx((0.75, 0.75, 0.75))
    none = stats.gap_closed(rows, student="student", cut="teacher", teacher="cut", task="t2i")
    assert none is None, "a teacher that is not above its cut self leaves no gap to close"
    noise = np.random.default_rng(12).normal(0, 0.3, 25)
    rows += rows_of("near", np.clip(cut + noise - noise.mean() + 0.01, 1, 5))
    unclear = stats.gap_closed(rows, student="student", cut="cut", teacher="near", task="t2i")
    assert unclear is None, "nor one that is above it by luck"


def test_judges_are_never_mixed():
    rows = [make_row("a", "x", 1.0), make_row("a", "x", 5.0, judge="other")]
    (row,) = stats.comparable(rows, judge="other")
    assert row.score == 5.0
    with pytest.raises(AssertionError, match="comparable"):
        stats.summarise(rows)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"prompt": "another"}, "not the same question"),
        ({"category": "text"}, "not the same question"),
        ({"task": "edit"}, "not the same question"),
        ({"model": "a", "seed": 1, "nfe": 8}, r"different nfe \[4, 8\]"),
    ],
)
def test_rows_of_two_different_evaluations_are_refused(changes, why):
    rows = [make_row("a", "x", 1.0), make_row("b", "x", 2.0)]
    assert len(stats.comparable(rows, judge=JUDGE)) == 2
    other = make_row(changes.pop("model", "b"), "x", 2.0, **changes)
    with pytest.raises(DataError, match=why):
        stats.comparable([rows[0], other], judge=JUDGE)


def test_seconds_are_a_median_and_reasons_are_counted():
    rows = [
        *(make_row("a", f"x{i}", 3.0, seconds=s) for i, s in enumerate((9.0, 0.2, 0.1))),
        make_row("a", "y", None),
        make_row("a", "z", None, status="unscored: timeout"),
        make_row("b", "y", None),
        make_row("a", "w", None),
    ]
    assert stats.seconds_per_image(rows, "a") == 0.2
    assert stats.seconds_per_image(rows, "b") is None
    assert stats.unscored_reasons(rows) == [
        ("a", "refused", 2),
        ("a", "timeout", 1),
        ("b", "refused", 1),
    ]
