"""The mixture is exact at every prefix, resumable bit for bit, and refuses what cannot be."""

import itertools
import json
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from fewstep.data.mixture import Mixture, PoolCursor, Quota
from fewstep.errors import CheckpointError, RecipeError
from fewstep.recipe.schema import Task


def worst_deviation(weights: tuple[float, ...], draws: int) -> Fraction:
    exact = [Fraction(str(w)) for w in weights]
    quota = Quota({str(i): w for i, w in enumerate(weights)})
    counts = [0] * len(weights)
    worst = Fraction(0)
    for n in range(1, draws + 1):
        counts[int(quota.next())] += 1
        shares = [n * w / sum(exact) for w in exact]
        worst = max(worst, *(abs(s - c) for s, c in zip(shares, counts, strict=True)))
    return worst


@pytest.mark.parametrize("m,top", [(2, 12), (3, 8), (4, 6), (5, 5)])
def test_every_prefix_is_within_one_of_its_share_for_all_small_weights(m: int, top: int) -> None:
    for weights in itertools.combinations_with_replacement(range(top + 1), m):
        if sum(weights):
            assert worst_deviation(weights, 2 * sum(weights)) < 1, weights


@pytest.mark.parametrize(
    "weights",
    [
        (1, 1, 1, 5, 5, 5),  # largest-deficit scheduling is off by 1.06 here
        (30, 1, 30, 30, 30, 1, 100, 100, 1, 1, 7, 100, 30, 1, 3, 1, 7, 7, 1, 7, 100, 1, 2, 3),
        (0.1, 0.2, 0.7),
        (1e-3, 1.0),
        (0.333, 0.333, 0.334),
    ],
)
def test_every_prefix_is_within_one_of_its_share_where_greedy_fails(weights) -> None:
    assert worst_deviation(weights, 700) < 1


def test_random_weights_stay_within_one() -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        weights = tuple(rng.integers(0, 60, rng.integers(1, 14)).tolist())
        if sum(weights):
            assert worst_deviation(weights, 200) < 1, weights


@pytest.mark.parametrize("a,b", [(9, 1), (7, 3), (5, 5), (0.9, 0.1), (0.7, 0.3)])
def test_the_papers_ratios_are_exact_in_every_ten(a: float, b: float) -> None:
    names = Quota({"t2i": a, "edit": b}).take(100)
    for start in range(0, 100, 10):
        assert names[start : start + 10].count("t2i") == round(10 * a / (a + b))


def test_order_is_spread_and_ties_go_to_the_first() -> None:
    assert Quota({"a": 1, "b": 1}).take(4) == ("a", "b", "a", "b")
    assert Quota({"b": 1, "a": 1}).take(2) == ("b", "a")
    assert Quota({"a": 2, "b": 1}).take(6) == ("a", "b", "a", "a", "b", "a")


def test_zero_weight_is_never_drawn_and_floats_mean_their_decimals() -> None:
    quota = Quota({"a": 0.3, "never": 0, "b": 0.1})
    assert quota.weights == {"a": 3, "b": 1}
    assert "never" not in quota.take(1000)
    assert quota.counts == {"a": 750, "b": 250}


@pytest.mark.parametrize("weights", [{}, {"a": 0}, {"a": -1, "b": 2}, {"a": float("nan")}])
def test_impossible_weights_are_refused(weights) -> None:
    with pytest.raises(RecipeError, match="weight"):
        Quota(weights)


def test_cursor_gives_each_index_once_an_epoch_in_an_order_of_its_own() -> None:
    cursor = PoolCursor(37, seed=5)
    epochs = [cursor.take(37) for _ in range(3)]
    for order in epochs:
        assert sorted(order) == list(range(37))
    assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[1], epochs[2])
    assert not np.array_equal(epochs[0], np.arange(37))
    assert not np.array_equal(epochs[0], PoolCursor(37, seed=6).take(37))
    again = PoolCursor(37, seed=5)
    pieces = np.concatenate([again.take(n) for n in (1, 5, 36, 37, 0, 32)])
    assert np.array_equal(pieces, np.concatenate(epochs))


def test_the_shuffle_is_pinned() -> None:
    """A change here changes what every resumed run sees."""
    assert PoolCursor(8, seed=1).take(16).tolist() == PINNED


PINNED = [2, 0, 1, 4, 5, 6, 7, 3, 7, 1, 6, 3, 5, 0, 2, 4]


def small_mixture(seed: int = 3) -> Mixture:
    return Mixture(
        {"t2i": 7, "edit": 3},
        {"t2i": {"landscape": 1, "portrait": 2, "text": 0}, "edit": {"portrait": 1, "style": 1}},
        {"t2i": {"landscape": 5, "portrait": 11}, "edit": {"portrait": 4, "style": 7}},
        seed=seed,
    )


def test_mixture_is_exact_by_task_and_pool_and_visits_pools_evenly() -> None:
    mixture = small_mixture()
    draws = [mixture.next(4) for _ in range(200)]
    tasks = Counter(draw.task for draw in draws)
    assert tasks == {"t2i": 140, "edit": 60}
    for i in range(0, 200, 10):
        assert sum(draw.task == "edit" for draw in draws[i : i + 10]) == 3
    pools = Counter((draw.task, pool) for draw in draws for pool in draw.pools)
    assert abs(pools["t2i", "portrait"] - 2 * 560 / 3) < 1
    assert pools["edit", "portrait"] == pools["edit", "style"] == 120
    assert ("t2i", "text") not in pools
    for (task, pool), size in {("t2i", "landscape"): 5, ("edit", "style"): 7}.items():
        seen = [
            int(i)
            for draw in draws
            for p, i in zip(draw.pools, draw.indices, strict=True)
            if (draw.task, p) == (task, pool)
        ]
        for start in range(0, len(seen) - size, size):
            assert sorted(seen[start : start + size]) == list(range(size))


def test_pools_of_one_name_in_two_tasks_have_their_own_order_and_seeds_matter() -> None:
    weights: dict[Task, dict[str, int | float]] = {"t2i": {"portrait": 1}, "edit": {"portrait": 1}}
    sizes: dict[Task, dict[str, int]] = {"t2i": {"portrait": 50}, "edit": {"portrait": 50}}
    mixture = Mixture({"t2i": 1, "edit": 1}, weights, sizes, seed=0)
    first, second = mixture.next(50), mixture.next(50)
    assert {first.task, second.task} == {"t2i", "edit"}
    assert not np.array_equal(first.indices, second.indices)
    other = Mixture({"t2i": 1, "edit": 1}, weights, sizes, seed=1).next(50)
    assert not np.array_equal(first.indices, other.indices)


@pytest.mark.parametrize("stop", [0, 1, 7, 53])
def test_resumed_equals_uninterrupted(stop: int) -> None:
    whole = small_mixture()
    expected = [whole.next(3) for _ in range(120)]
    first = small_mixture()
    for _ in range(stop):
        first.next(3)
    state = json.loads(json.dumps(first.state_dict(), sort_keys=True))
    first.next(3)  # the state is a copy: what happens after it was taken does not matter
    second = small_mixture()
    second.next(5)
    second.load_state_dict(state)
    for want in expected[stop:]:
        got = second.next(3)
        assert (got.task, got.pools) == (want.task, want.pools)
        assert np.array_equal(got.indices, want.indices)
    assert second.state_dict() == whole.state_dict()


def test_a_state_of_another_recipe_is_refused_and_changes_nothing() -> None:
    mixture = small_mixture()
    mixture.next(3)
    before = mixture.state_dict()
    with pytest.raises(CheckpointError, match="seed"):
        mixture.load_state_dict(small_mixture(seed=4).state_dict())
    other = Mixture({"t2i": 1}, {"t2i": {"a": 1}}, {"t2i": {"a": 3}}, seed=3)
    with pytest.raises(CheckpointError, match="weights"):
        mixture.load_state_dict(other.state_dict())
    assert mixture.state_dict() == before


def test_empty_pools_and_tasks_without_pools_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"pool 'text'.*pools with samples: portrait \(4\)"):
        Mixture({"t2i": 1}, {"t2i": {"text": 1}}, {"t2i": {"portrait": 4, "text": 0}}, seed=0)
    with pytest.raises(RecipeError, match="'edit' has a share"):
        Mixture({"t2i": 1, "edit": 1}, {"t2i": {"a": 1}}, {"t2i": {"a": 1}}, seed=0)
