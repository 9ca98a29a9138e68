"""A study's intervals cover, its verdicts follow their rule, and its report hides nothing."""

import csv
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fewstep.errors import DataError, RunError
from fewstep.evals.stats import Interval
from fewstep.study_report.curves import growth, mean_curve, mismatch_curve, onset, stability
from fewstep.study_report.intervals import (
    Estimate,
    Scores,
    contrast,
    seed_interval,
    t_quantile,
    wobble,
)
from fewstep.study_report.read import DONE, Cell, Study, read_study
from fewstep.study_report.strips import strips
from fewstep.study_report.tables import (
    against_base,
    cost_table,
    ranks,
    score_tables,
    stability_table,
)
from fewstep.study_report.verdicts import (
    MARGIN,
    Claim,
    Contrast,
    Takeaway,
    fall_estimate,
    judge,
)
from fewstep.study_report.write import write_study_report
from tests.studies import REFERENCES, write_study

# --- intervals ------------------------------------------------------------------------------------


def simulate(
    generator: np.random.Generator,
    *,
    means: Mapping[str, float],
    seeds: int = 3,
    cases: int = 24,
    prompt: float = 0.8,
    by_prompt: float = 0.3,
    seed: float = 0.05,
    both: float = 0.5,
    unstable: float = 1.0,
) -> Scores:
    """The model of `intervals` with standard deviations as seen between lab students.

    The first variant's seeds spread `unstable` times as much as the others'.
    """
    categories = {f"c{i}": tuple(f"c{i}-{j}" for j in range(cases)) for i in range(3)}
    shape = (len(categories), cases)
    hardness = generator.normal(0, prompt, shape)
    values: dict = {}
    for v, (name, mean) in enumerate(means.items()):
        own = generator.normal(0, by_prompt, shape)
        for s in range(seeds):
            moved = generator.normal(0, seed * (unstable if v == 0 else 1))
            scores = mean + hardness + own + moved + generator.normal(0, both, shape)
            flat = scores.ravel().tolist()
            names = [case for cs in categories.values() for case in cs]
            values[name, s] = dict(zip(names, flat, strict=True))
    return Scores("t2i", categories, values)


def coverage(times: int, weights: Mapping[str, float], **model) -> float:
    generator = np.random.default_rng(0)
    means = {"a": 3.2, "b": 3.0, "c": 3.0, "d": 2.8, "e": 3.1}
    truth = sum(weight * means[name] for name, weight in weights.items())
    hits = 0
    for _ in range(times):
        scores = simulate(generator, means=means, **model)
        found = contrast(scores, weights, None, wobble(scores, list(means), None))
        assert found is not None
        _, low, high = found.interval
        assert low is not None and high is not None
        hits += low <= truth <= high
    return hits / times


DIFFERENCE = {"a": 1.0, "b": -1.0}


@pytest.mark.parametrize("seed", [0.05, 0.2])
def test_interval_covers(seed: float) -> None:
    assert 0.92 <= coverage(150, DIFFERENCE, seed=seed) <= 0.98


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weights", "model"),
    [
        (DIFFERENCE, {}),
        (DIFFERENCE, {"seed": 0.0}),
        (DIFFERENCE, {"seed": 0.2}),
        (DIFFERENCE, {"seed": 0.1, "unstable": 3.0}),
        (DIFFERENCE, {"seed": 0.2, "unstable": 3.0, "seeds": 4}),
        (DIFFERENCE, {"both": 1.0, "by_prompt": 0.1}),
        ({"a": 1.0}, {"seed": 0.2}),
        ({"b": 1 / 3, "c": 1 / 3, "d": 1 / 3, "e": -1.0}, {"seed": 0.1}),
    ],
)
def test_interval_covers_widely(weights: Mapping[str, float], model: dict) -> None:
    assert 0.92 <= coverage(600, weights, **model) <= 0.98


def test_resampling_three_seeds_would_not_cover() -> None:
    """Why training seeds are not bootstrapped: the docstring's 75%."""
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        values = generator.normal(0, 1, 3)
        drawn = values[generator.integers(3, size=(300, 3))].mean(axis=1)
        low, high = np.quantile(drawn, [0.025, 0.975])
        hits += low <= 0 <= high
    assert 0.70 <= hits / 1000 <= 0.80


def test_t_quantile_and_seed_interval() -> None:
    assert t_quantile(0.975, 1) == pytest.approx(12.7062, abs=2e-3)
    assert t_quantile(0.975, 2) == pytest.approx(4.30265, abs=1e-4)
    assert t_quantile(0.975, 10) == pytest.approx(2.22814, abs=1e-4)
    assert t_quantile(0.995, 4) == pytest.approx(4.60409, abs=1e-4)
    found = seed_interval([1.0, 2.0, 3.0])
    assert found.value == 2 and found.low == pytest.approx(2 - 4.30265 / 3**0.5, abs=1e-4)
    assert seed_interval([1.0]) == Interval(1.0, None, None)


def test_contrast_by_hand() -> None:
    """Categories weigh the same; a case that one student lacks is dropped and counted."""
    scores = Scores(
        "t2i",
        {"x": ("x1", "x2", "x3"), "y": ("y1", "y2")},
        {
            ("a", 0): {"x1": 4.0, "x2": 2.0, "x3": 5.0, "y1": 1.0, "y2": 2.0},
            ("a", 1): {"x1": 4.2, "x2": 2.2, "y1": 1.2, "y2": 2.2},
            ("ref", None): {"x1": 3.0, "x2": 2.0, "x3": 1.0, "y1": 1.0, "y2": 1.0},
        },
    )
    found = contrast(scores, {"a": 1, "ref": -1}, None, wobble(scores, ["a"], None))
    assert found is not None
    x = ((4.1 - 3) + (2.1 - 2)) / 2
    y = ((1.1 - 1) + (2.1 - 1)) / 2
    assert found.interval.value == pytest.approx((x + y) / 2)
    assert (found.cases, found.dropped, found.seeds) == (4, 1, 2)
    spread = wobble(scores, ["a"], None)
    assert spread is not None and spread.df == 1
    assert spread.variance == pytest.approx(0.02)  # of 0 and 0.2
    assert spread.interaction == pytest.approx(0)
    assert found.seed_variance == pytest.approx(0.02 / 2)
    # a and the reference differ by 1.1, 0.1 and by 0.1, 1.1: variance 0.5 each, of two cases
    assert found.prompt_variance == pytest.approx(0.5 / 2 / 4 * 2)


def test_categories_weigh_the_same_however_many_cases_they_have() -> None:
    scores = Scores(
        "t2i",
        {"x": ("x1", "x2", "x3"), "y": ("y1", "y2")},
        {("a", 0): {"x1": 4.0, "x2": 4.0, "x3": 4.0, "y1": 1.0, "y2": 1.0}},
    )
    found = contrast(scores, {"a": 1}, None, None)
    assert found is not None
    assert found.interval.value == pytest.approx(2.5)  # not 2.8


def test_wobble_does_not_count_what_prompts_explain() -> None:
    """Without any seed effect the means of seeds still differ; `interaction` is all of that."""
    generator = np.random.default_rng(3)
    left, explained = [], []
    for _ in range(100):
        scores = simulate(generator, means={"a": 3.0, "b": 3.0}, seed=0.0, both=1.0, cases=8)
        found = wobble(scores, ["a", "b"], None)
        assert found is not None and found.df == 4
        left.append(found.variance - found.interaction)
        explained.append(found.interaction)
    assert np.mean(explained) == pytest.approx(1 / 24, rel=0.1)
    assert abs(np.mean(left)) < 0.2 / 24


def test_more_seeds_narrow_and_one_seed_has_no_interval() -> None:
    generator = np.random.default_rng(1)
    means = {"a": 3.0, "b": 3.0}
    widths = []
    for seeds in (2, 6):
        own = []
        for _ in range(10):
            scores = simulate(generator, means=means, seeds=seeds, seed=0.3, cases=8)
            found = contrast(scores, DIFFERENCE, None, wobble(scores, list(means), None))
            assert found is not None and found.interval.low is not None
            own.append(found.interval.value - found.interval.low)
        widths.append(np.mean(own))
    assert widths[1] < 0.6 * widths[0]
    scores = simulate(generator, means=means, seeds=1)
    found = contrast(scores, DIFFERENCE, None, wobble(scores, list(means), None))
    assert found is not None and found.interval.low is None


def test_without_students_the_interval_is_that_of_the_prompts() -> None:
    """Normal, of variance s^2 / n with the unbiased s^2, also for few cases."""
    values = {f"x{i}": float(score) for i, score in enumerate((2.0, 3.0, 3.5, 4.5))}
    scores = Scores("t2i", {"x": tuple(values)}, {("ref", None): values})
    found = contrast(scores, {"ref": 1}, None, None, level=0.6827)
    assert found is not None and found.interval.low is not None and found.interval.high is not None
    expected = (np.var(list(values.values()), ddof=1) / 4) ** 0.5
    assert found.prompt_variance == pytest.approx(expected**2)
    half = (found.interval.high - found.interval.low) / 2
    assert half == pytest.approx(expected, rel=0.1)


def test_seed_spread_enters_by_its_share() -> None:
    """Prompts alike and no interaction: the t interval over all seeds of all variants."""
    cases = {"x": ("x1", "x2")}
    moved = {"a": (-0.1, 0.0, 0.1), "b": (0.9, 1.0, 1.1)}
    values: dict = {
        (name, s): dict.fromkeys(cases["x"], 3 + m)
        for name in moved
        for s, m in enumerate(moved[name])
    }
    scores = Scores("t2i", cases, values)
    found = contrast(scores, DIFFERENCE, None, wobble(scores, list(moved), None))
    assert found is not None and found.interval.low is not None and found.interval.high is not None
    half = t_quantile(0.975, 4) * (2 * 0.01 / 3) ** 0.5  # df: two variants of three seeds
    assert found.interval.value == pytest.approx(-1.0)
    assert (found.interval.high - found.interval.low) / 2 == pytest.approx(half, rel=0.05)


def constant(means: Mapping[str, tuple[float, ...]], cases: int = 2) -> Scores:
    """Every case of a training seed has the same score: all spread is that of the seeds."""
    names = tuple(f"x{i}" for i in range(cases))
    values: dict = {
        (name, seed): dict.fromkeys(names, mean)
        for name, own in means.items()
        for seed, mean in enumerate(own)
    }
    return Scores("t2i", {"x": names}, values)


def test_seeds_pool_by_their_number_and_an_unstable_variant_keeps_its_own() -> None:
    scores = constant({"a": (3.0, 3.2), "b": (3.0, 3.0, 3.0, 3.0), "lone": (3.0,)})
    found = wobble(scores, ["a", "b", "lone"], None)
    assert found is not None and found.df == 1 + 3
    assert found.variance == pytest.approx(0.02 / 4)  # 0.02 with one degree, 0 with three
    assert found.of("a") == pytest.approx(0.02)
    assert found.of("b") == found.of("lone") == found.variance


def test_a_share_of_a_variant_brings_the_square_of_it_in_seed_spread() -> None:
    moved = (-0.1, 0.0, 0.1)
    scores = constant({"a": moved, "b": moved, "c": (3.0,)})
    weights = {"a": 0.5, "b": 0.5}
    found = contrast(scores, weights, None, wobble(scores, ["a", "b"], None))
    assert found is not None and found.interval.low is not None and found.interval.high is not None
    assert found.seed_variance == pytest.approx(2 * 0.25 * 0.01 / 3)
    half = t_quantile(0.975, 4) * found.seed_variance**0.5
    assert (found.interval.high - found.interval.low) / 2 == pytest.approx(half, rel=0.05)
    few = contrast(scores, {"a": 1, "c": -1}, None, wobble(scores, ["a", "b"], None))
    assert few is not None and few.seeds == 1, "the fewest of them"
    assert few.seed_variance == pytest.approx(0.01 / 3 + 0.01), "it borrows the others' wobble"


def test_what_prompts_explain_of_the_seeds_is_not_counted_twice() -> None:
    """No seed effect: the interval is that of the prompts, though seed means differ."""
    generator = np.random.default_rng(11)
    wide = []
    for _ in range(40):
        means = dict.fromkeys("abcdefgh", 3.0)
        scores = simulate(generator, means=means, seed=0.0, both=1.0, by_prompt=0.0, cases=8)
        found = contrast(scores, DIFFERENCE, None, wobble(scores, list(means), None))
        assert found is not None and found.interval.low is not None
        half = found.interval.value - found.interval.low
        wide.append(half / (1.96 * found.prompt_variance**0.5))
    assert np.mean(wide) == pytest.approx(1.0, abs=0.2)  # 1.4 were it added once more


def test_a_training_seed_without_a_whole_category_is_left_out() -> None:
    scores = constant({"a": (3.0, 4.0)})
    cases = scores.cases | {"y": ("y1", "y2")}
    values = dict(scores.values)
    values["a", 0] = {**values["a", 0], "y1": 3.0, "y2": 3.0}
    both = Scores("t2i", cases, values)
    assert both.seeds("a", None) == [0] and both.seeds("a", "x") == [0, 1]
    found = contrast(both, {"a": 1}, None, None)
    assert found is not None and found.interval.value == 3.0 and found.dropped == 0


def test_needed_sample() -> None:
    """Half the distance takes four times as many seeds once prompts do not matter."""
    estimate = Estimate(Interval(0.1, -0.1, 0.3), 0.95, 100, 0, 3, 0.0, 0.01)
    assert estimate.needed(0.1) == "about 12 training seeds each"  # (1.96^2 * .01 / .1^2) * 3
    assert estimate.needed(0.05) == "about 47 training seeds each"
    assert estimate.needed(0.3).startswith("a few more training seeds")
    prompts = Estimate(Interval(0.1, -0.1, 0.3), 0.95, 100, 0, 3, 0.01, 0.0)
    assert prompts.needed(0.1) == "about 385 prompts"
    # What the other source of error leaves of the allowed variance: (0.1 / 1.96)^2 = 0.002603.
    both = Estimate(Interval(0.1, -0.1, 0.3), 0.95, 100, 0, 3, 0.002, 0.001)
    assert both.needed(0.1) == "about 5 training seeds each"  # 3 x .001 / .000603
    both = Estimate(Interval(0.1, -0.1, 0.3), 0.95, 100, 0, 3, 0.004, 0.001)
    assert both.needed(0.1) == "about 250 prompts"  # 100 x .004 / .001603
    both = Estimate(Interval(0.1, -0.1, 0.3), 0.95, 100, 0, 3, 0.004, 0.004)
    assert both.needed(0.1) == "about 10 training seeds each and 308 prompts"  # x .008 / .002603


# --- verdicts -------------------------------------------------------------------------------------


def at(low: float, high: float, **rule) -> Contrast:
    value = (low + high) / 2
    estimate = Estimate(Interval(value, low, high), 0.95, 10, 0, 3, 0.01, 0.01)
    return Contrast("a − b", "", estimate, **rule)


@pytest.mark.parametrize(
    ("contrast_", "verdict"),
    [
        (at(0.1, 0.5), "reproduced"),
        (at(0.01, 0.03), "reproduced"),  # small, but on the paper's side
        (at(-0.5, -0.1), "not reproduced"),
        (at(-0.04, 0.04), "not reproduced"),  # inside the margin
        (at(-0.04, 0.06), "undecided"),
        (at(-0.5, 0.5), "undecided"),
        (at(-0.03, 0.5, above=-MARGIN, below=-MARGIN), "reproduced"),  # does no harm
        (at(-0.07, 0.5, above=-MARGIN, below=-MARGIN), "undecided"),
        (at(-0.5, -0.06, above=-MARGIN, below=-MARGIN), "not reproduced"),
        (at(-0.5, -0.1, two_sided=True), "reproduced"),
        (at(-0.04, 0.04, two_sided=True), "not reproduced"),
        (at(-0.06, 0.04, two_sided=True), "undecided"),
    ],
)
def test_rule(contrast_: Contrast, verdict: str) -> None:
    assert contrast_.verdict == verdict
    assert bool(contrast_.needs) == (verdict == "undecided")


def test_what_is_needed_settles_the_nearer_to_the_farther_side() -> None:
    """True at its value, it is settled as soon as the interval clears one of the two bounds."""
    for low, high, rule, distance in (
        (-0.1, 0.5, {}, 0.2),  # 0.2 above 0; 0.15 above MARGIN is on the wrong side of `below`
        (-0.5, 0.1, {}, 0.25),  # 0.25 below MARGIN
        (-0.6, 0.3, {"two_sided": True}, 0.15),
        (-0.1, 0.2, {"above": -MARGIN, "below": -MARGIN}, 0.1),
    ):
        asked = at(low, high, **rule)
        assert asked.verdict == "undecided" and asked.estimate is not None
        assert asked.needs == asked.estimate.needed(distance), rule


def test_claims_need_one_contrast_and_takeaways_all_claims() -> None:
    yes, no, unknown = at(0.1, 0.5), at(-0.5, -0.1), at(-0.5, 0.5)
    assert Claim("", (no, yes, unknown)).verdict == "reproduced"
    assert Claim("", (no, no)).verdict == "not reproduced"
    assert Claim("", (no, unknown)).verdict == "undecided"
    assert Claim("", ()).verdict == "undecided"

    def takeaway(*contrasts: Contrast, lacks: str = "") -> str:
        return Takeaway(1, "", "", tuple(Claim("", (c,)) for c in contrasts), lacks).verdict

    assert takeaway(yes, yes) == "reproduced"
    assert takeaway(yes, unknown) == "undecided"
    assert takeaway(yes, unknown, no) == "not reproduced"
    assert takeaway(yes, lacks="no cell") == "undecided"


def study_of(scores: Scores, names: list[str], seeds: int) -> Study:
    cells = tuple(
        Cell(n, s, Path(), DONE, "", "", 1.0, 1.0, {}, 1, 0, 0) for n in names for s in range(seeds)
    )
    titles = {name: name for name in names}
    return Study(
        Path(), Path(), "s", "", titles, titles, (2,), cells, {}, {"t2i": scores}, (), "j", ()
    )


@pytest.mark.slow
def test_best_of_two_is_no_winner_by_luck() -> None:
    """Where e1, e2 and e4 are equal, "the best one beats the merger" is rarely found."""
    generator = np.random.default_rng(5)
    names, found = ["e1", "e2", "e4"], 0
    times = 200
    for _ in range(times):
        scores = simulate(generator, means=dict.fromkeys(names, 3.0))
        scores = Scores("t2i", {"landscape": scores.cases["c0"]} | scores.cases, scores.values)
        merging = judge(study_of(scores, names, 3))[0].claims[1]
        assert merging.words == "merging costs"
        found += merging.verdict == "reproduced"
    assert found / times <= 0.05


PAPER = {
    "e1": {"else": 3.3, "text": 3.0},
    "e2": {"else": 3.6, "text": 3.1},
    "e3": {"else": 2.6, "text": 2.0},
    "e4": {"else": 3.4, "text": 3.0},
    "e5": {"else": 3.4, "text": 2.1},
    "base_only": 3.2,
    "specialised_only": 2.9,
    "stepwise": 3.5,
    "zero_shot": {"else": 3.2, "scene": 2.7, "style": 2.7},
    "r9to1": {"else": 3.5, "scene": 2.4, "style": 2.4},
    "r7to3": {"else": 3.5, "scene": 2.9, "style": 2.9},
    "r5to5": {"else": 3.5, "scene": 3.3, "style": 3.3},
    "teacher-80nfe": 3.3,
    "teacher-t2i-80nfe": 3.7,
    "teacher-4nfe": 2.8,
}
OPPOSITE = {
    **PAPER,
    **dict.fromkeys(("e1", "e2", "e3", "e4"), 3.0),
    "e5": {"else": 3.0, "text": 3.4},
    "base_only": 3.7,
    "r9to1": 3.0,
    "r7to3": 3.0,
    "r5to5": 3.0,
}


def rises(seed: int, step: int) -> float:
    return 3 + step / 200 + seed / 100


def falls(seed: int, step: int) -> float:
    return 3.5 + seed / 20 if step == 50 else 2.5


def test_verdicts_of_the_papers_own_pattern(tmp_path: Path) -> None:
    curves = dict.fromkeys(PAPER, rises) | {"specialised_only": falls}
    study = read_study(write_study(tmp_path / "s", PAPER, curves=curves, pictures=False))
    takeaways = judge(study)
    assert [t.verdict for t in takeaways] == ["reproduced"] * 6
    for takeaway in takeaways:  # all contrasts of a takeaway hold at once
        levels = [c.estimate.level for c in takeaway.contrasts if c.estimate is not None]
        assert levels == [pytest.approx(1 - 0.05 / len(takeaway.contrasts))] * len(levels)


def test_verdicts_of_the_opposite_pattern(tmp_path: Path) -> None:
    curves = dict.fromkeys(PAPER, rises) | {"stepwise": falls}
    study = read_study(write_study(tmp_path / "s", OPPOSITE, curves=curves, pictures=False))
    assert [t.verdict for t in judge(study)] == ["not reproduced"] * 6


def test_verdicts_without_evidence(tmp_path: Path) -> None:
    """Loud noise, no probes, a role without a finished cell: undecided, and what would help."""
    status = {("r5to5", seed): "queued" for seed in range(3)}
    made = write_study(tmp_path / "s", PAPER, noise=2.0, wobble=0.6, status=status, cases=4)
    one, two, three, four, five, six = judge(read_study(made))
    assert two.verdict == three.verdict == four.verdict == five.verdict == "undecided"
    assert five.lacks == six.lacks == "no finished cell plays r5to5"
    assert "probe/score" in three.lacks
    open_ = [c for c in (*one.contrasts, *two.contrasts) if c.verdict == "undecided"]
    assert open_ and all(re.search(r"about \d+ |few more", c.needs) for c in open_)


def test_takeaway_3_compares_falls(tmp_path: Path) -> None:
    """Equal falls of noisy curves are no instability, however large they are."""
    curves = {"specialised_only": falls, "stepwise": falls}
    means = {"specialised_only": 3.0, "stepwise": 3.0}
    made = write_study(tmp_path / "s", means, curves=curves, takeaways=(3,), pictures=False)
    (three,) = judge(read_study(made))
    assert three.verdict == "not reproduced"
    assert three.contrasts[0].estimate is not None and three.contrasts[0].estimate.seeds == 3


def probed(variant: str, seed: int, *scores: float, **more: list[tuple[float, float]]) -> Cell:
    curve = [(10.0 * (i + 1), score) for i, score in enumerate(scores)]
    curves = {"probe/score/t2i": curve} | {k.replace("__", "/"): v for k, v in more.items()}
    return Cell(variant, seed, Path(), DONE, "", "", 1.0, 1.0, curves, 1, 0, 0)


def of_cells(*cells: Cell) -> Study:
    names = {cell.variant: cell.variant for cell in cells}
    return Study(Path(), Path(), "s", "", names, names, (), cells, {}, {}, (), "j", ())


def test_falls_are_paired_by_training_seed() -> None:
    """Seed 9 of a has no partner; a falls 0.4, 0.6, 0.8 further than b."""
    study = of_cells(
        probed("a", 0, 3.0, 2.5), probed("a", 1, 4.0, 3.0), probed("a", 2, 3.0, 1.9),
        probed("a", 9, 5.0, 1.0),
        probed("b", 2, 3.0, 2.7), probed("b", 1, 3.0, 2.6), probed("b", 0, 3.0, 2.9),
    )  # fmt: skip
    found = fall_estimate(study, {"a": 1, "b": -1}, "t2i")
    assert found is not None and found.seeds == 3
    assert found.interval.value == pytest.approx(0.6)
    assert found.seed_variance == pytest.approx(0.04 / 3)
    half = t_quantile(0.975, 2) * (0.04 / 3) ** 0.5
    assert found.interval.low == pytest.approx(0.6 - half)


def test_the_curves_of_a_training_in_numbers() -> None:
    alarms = [(10.0, 0.0), (20.0, 1.0), (30.0, 0.0), (40.0, 1.0)]
    cell = probed("a", 0, 3.0, 3.5, 3.5, 3.2, probe__collapsed=alarms)
    found = stability(cell, "t2i")
    assert found is not None
    assert (found.peak, found.peak_step, found.final) == (3.5, 20, 3.2)
    assert found.fall == pytest.approx(0.3) and (found.onset, found.collapsed) == (40, 20)
    assert stability(cell, "edit") is None and stability(probed("a", 0, 3.0), "t2i") is None
    study = of_cells(
        probed("a", 0, 3.0, 3.5, 3.4, mismatch__x=[(1.0, 1.0), (2.0, 2.0)]),
        probed("a", 1, 2.0, 2.5, mismatch__x=[(1.0, 3.0)], mismatch__y=[(1.0, 8.0)]),
    )
    assert mean_curve(study, "a", "probe/score/t2i") == [(10, 2.5), (20, 3.0)]
    assert mismatch_curve(study, "a") == [(1, 4.0), (2, 2.0)]
    table = stability_table(study)
    assert table is not None
    told = [[cell.text for cell in row] for row in table.rows]
    assert told[0][2:5] == ["3.50", "3.40", "0.10"] and told[1][2:5] == ["2.50", "2.50", "0.00"]


def test_all_pairs_of_a_table_are_held_at_once(tmp_path: Path) -> None:
    """A pair that is separable alone, at 95%, is not among the ten pairs of five models."""
    means = {"a": 3.02, "b": 3.0, "c": 2.0, "d": 2.0, "e": 2.0}
    study = read_study(write_study(tmp_path / "s", means, roles={}, pictures=False))
    for rival in np.arange(2.9, 3.02, 0.01):
        moved = {
            (name, seed): {c: s + rival - 3 if name == "b" else s for c, s in own.items()}
            for (name, seed), own in study.scores["t2i"].values.items()
        }
        near = replace(study, scores={"t2i": replace(study.scores["t2i"], values=moved)})
        alone = near.estimate({"a": 1, "b": -1}, "t2i")
        held = near.estimate({"a": 1, "b": -1}, "t2i", level=1 - 0.05 / 10)
        assert alone is not None and held is not None
        if alone.interval.excludes_zero and not held.interval.excludes_zero:
            break
    else:
        pytest.fail("no such pair among those tried")
    assert ranks(near, list(means), "t2i")["a"].not_separable == ("b",)
    assert ranks(near, ["a", "b"], "t2i")["a"] == (1, 1, ())


def test_the_score_table_says_what_its_numbers_rest_on(tmp_path: Path) -> None:
    def change(who: str, seed: int | None, fields: dict) -> dict | None:
        return None if (who, fields["case"]) == ("e1", "t2i-text-0003") else fields

    means = {"e1": 3.0, "e2": 3.0, "e3": 2.0} | dict.fromkeys(REFERENCES, 3.3)
    made = write_study(tmp_path / "s", means, change=change, pictures=False, cases=6)
    study = read_study(made)
    assert study.base_teacher == "teacher-80nfe"
    assert study.specialised_teacher("t2i") == "teacher-t2i-80nfe"
    assert study.specialised_teacher("edit") is None
    (table, *_) = score_tables(study)
    rows = {row[0].text: row[1:] for row in table.rows}
    average, rank = table.head.index("Average") - 1, table.head.index("Rank") - 1
    assert [name for name, row in rows.items() if row[average].best] == [
        "teacher-80nfe", "teacher-t2i-80nfe", "teacher-4nfe",
    ]  # fmt: skip
    assert not any(cell.best for row in rows.values() for cell in row[:average])
    assert rows["the e1"][average].small.endswith("17 of 18")
    assert rows["the e3"][rank].text == "6" and rows["the e1"][rank].text == "4–5"
    paper = {name: row[-1].text for name, row in rows.items()}
    assert paper["teacher-80nfe"] == "3.41/4.09" and paper["teacher-t2i-80nfe"] == "3.74/4.26"
    assert paper["teacher-4nfe"] == "–" and paper["the e2"] == "3.42/4.15"


def test_cost_counts_what_is_done_and_all_that_was_spent() -> None:
    table = cost_table(
        of_cells(
            replace(probed("a", 0, 3.0), seconds=100.0),
            replace(probed("a", 1, 3.0), status="failed", seconds=20.0),
            replace(probed("b", 0, 3.0), status="queued", seconds=None),
        )
    )
    assert table.caption == "1 of 3 cells finished; 2 min 00 s spent in all."
    assert [row[3].text for row in table.rows][1:] == ["–", "–"]


def test_ranks_mark_what_is_not_separable(tmp_path: Path) -> None:
    means = {"a": 3.5, "b": 3.5, "c": 2.0}
    study = read_study(write_study(tmp_path / "s", means, roles={}, pictures=False))
    found = ranks(study, ["c", "a", "b"], "t2i")
    assert found["a"][:2] == found["b"][:2] == (1, 2)
    assert found["a"].not_separable == ("b",)
    assert found["c"] == (3, 3, ())


def test_why_no_student_beats_the_base_teacher(tmp_path: Path) -> None:
    means = {"stepwise": 3.0, "teacher-80nfe": 3.4, "teacher-t2i-80nfe": 3.4}
    study = read_study(write_study(tmp_path / "no", means, pictures=False))
    found = against_base(study, "t2i")
    assert found is not None
    told = " ".join(found[1])
    assert "No multi-teacher student is separably above" in told
    assert "hardly anything is there to inherit" in told and "landscape −0." in told
    assert "of this headroom" not in told
    room = {**means, "stepwise": 3.5, "teacher-t2i-80nfe": 3.9}
    study = read_study(write_study(tmp_path / "room", room, pictures=False, noise=0.5))
    found = against_base(study, "t2i")
    assert found is not None
    told = " ".join(found[1])
    best = study.estimate({"stepwise": 1, "teacher-80nfe": -1}, "t2i")
    head = study.estimate({"teacher-t2i-80nfe": 1, "teacher-80nfe": -1}, "t2i")
    assert best is not None and head is not None
    lost = head.interval.value - best.interval.value
    assert best.interval.value > 0 and not best.interval.excludes_zero, "above it, by luck"
    assert "is separably above" in told and "To separate that would take" in told
    assert f"of this headroom {lost:.2f} is lost" in told and lost > 0.2
    better = {**means, "stepwise": 3.8}
    study = read_study(write_study(tmp_path / "yes", better, pictures=False))
    found = against_base(study, "t2i")
    assert found is not None and found[1][0].startswith("Above the base teacher")


# --- curves ---------------------------------------------------------------------------------------


def test_onset_is_the_fall_without_recovery() -> None:
    assert onset([(1, 3.0), (2, 3.5), (3, 3.3), (4, 3.2)]) == 3
    assert onset([(1, 3.0), (2, 2.5), (3, 3.2), (4, 3.15)]) is None  # recovered
    assert onset([(1, 3.0), (2, 2.5), (3, 3.2), (4, 3.0), (5, 2.0)]) == 4
    assert onset([(1, 3.0), (2, 3.1), (3, 3.2)]) is None


def test_growth_of_mismatch() -> None:
    points = [(float(s), 1.0 if s <= 25 else 3.0) for s in range(1, 101)]
    assert growth({"mismatch/t2i/base/k0": points, "loss/fake": points}) == pytest.approx(3)
    assert growth({"loss/fake": points}) is None


# --- the report -----------------------------------------------------------------------------------


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_report_of_a_half_finished_study(tmp_path: Path) -> None:
    """Every missing, failed or unscored thing is named, and none is in a number."""

    def change(who: str, seed: int | None, fields: dict) -> dict | None:
        if (who, seed, fields["case"]) == ("e1", 0, "t2i-text-0003"):
            return None
        if (who, fields["case"]) == ("teacher-4nfe", "edit-style-0002"):
            return None
        if (who, seed, fields["case"]) == ("e2", 1, "t2i-portrait-0001"):
            return {**fields, "score": None, "status": "unscored: judge <b>asleep</b>"}
        return fields

    made = write_study(
        tmp_path / "s",
        PAPER,
        status={("e5", 2): "failed", ("e3", 0): "queued", ("stepwise", 1): "running"},
        curves=dict.fromkeys(PAPER, rises) | {"specialised_only": falls},
        change=change,
        cases=6,
    )
    paths = write_study_report(made)
    page = paths.html.read_text()
    markdown = paths.markdown.read_text()
    for text in (page, markdown):
        for note in ("e5@2: failed", "e3@0: queued", "stepwise@1: running"):
            assert note in text
        assert "e1@0: 1 of 30 images have no row" in text
        assert "e2@1: 1 images not scored" in text
        assert "teacher-4nfe: 1 of 30 images have no row" in text
        assert "What this study does not show" in text
        assert "33 of 36 cells" in text
    assert "<b>asleep</b>" not in page and "&lt;b&gt;asleep" in page
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page), "nothing is fetched"
    assert "url(" not in page and "@import" not in page
    assert page.count("data:image/png;base64,") == 3 * 2  # two categories, three training seeds

    lines = read_csv(paths.csv)
    keys = [(x["variant"], x["seed"], x["task"], x["category"]) for x in lines]
    assert len(keys) == len(set(keys)) == 3 + (33 + 3) * 7
    failed = [x for x in lines if (x["variant"], x["seed"]) == ("e5", "2")]
    assert len(failed) == 1 and failed[0]["mean"] == "" and failed[0]["recipe_hash"] == "e5-2"
    line = next(x for x in lines if keys[lines.index(x)] == ("e1", "0", "t2i", "text"))
    assert (line["scored"], line["unscored"], line["missing"]) == ("5", "0", "1")
    line = next(x for x in lines if keys[lines.index(x)] == ("e2", "1", "t2i", "portrait"))
    assert (line["scored"], line["unscored"], line["missing"]) == ("5", "1", "0")

    told = json.loads(paths.verdicts.read_text())
    assert told["cells"] == {"asked": 36, "finished": 33}
    assert [t["number"] for t in told["takeaways"]] == [1, 2, 3, 4, 5, 6]
    pair = told["takeaways"][0]["claims"][0]["contrasts"][0]
    assert pair["words"].startswith("e1 − e2") and pair["dropped"] == 2
    assert pair["low"] < pair["value"] < pair["high"]


def test_means_of_the_csv_are_those_of_the_rows(tmp_path: Path) -> None:
    made = write_study(tmp_path / "s", {"e1": 3.0, "e2": 3.3}, seeds=2, pictures=False)
    lines = read_csv(write_study_report(made).csv)
    rows = [
        json.loads(line)
        for line in (made / "cells/e2/seed1/eval/rows.jsonl").read_text().splitlines()
    ]
    by_category = {
        name: np.mean([r["score"] for r in rows if r["category"] == name])
        for name in ("landscape", "portrait", "text")
    }
    own = {
        x["category"]: float(x["mean"])
        for x in lines
        if (x["variant"], x["seed"], x["task"]) == ("e2", "1", "t2i")
    }
    assert own.pop("all") == pytest.approx(np.mean(list(by_category.values())), abs=1e-4)
    assert own == pytest.approx(by_category, abs=1e-4)


def test_seeds_of_a_study_never_run(tmp_path: Path) -> None:
    status = {("e1", seed): "queued" for seed in range(3)}
    paths = write_study_report(write_study(tmp_path / "s", {"e1": 3.0}, status=status))
    assert "nothing is evaluated yet" in paths.html.read_text()
    assert "No cell is finished" in paths.markdown.read_text()
    with pytest.raises(RunError, match="holds no study"):
        write_study_report(tmp_path)


def test_a_study_without_roles_of_the_paper_is_asked_for_no_takeaway(tmp_path: Path) -> None:
    made = write_study(tmp_path / "s", {"dmd": 3.0, "tdm": 3.2}, roles={}, pictures=False, cases=4)
    assert judge(read_study(made)) == []
    paths = write_study_report(made)
    assert "Takeaway and its contrast" not in paths.markdown.read_text() + paths.html.read_text()
    assert 'href="#verdicts"' not in paths.html.read_text()


def test_one_training_seed_gives_no_verdict(tmp_path: Path) -> None:
    means = {name: PAPER[name] for name in ("e4", "e5", "zero_shot", "r9to1", "r7to3", "r5to5")}
    made = write_study(tmp_path / "s", means, seeds=1, takeaways=(1, 5), pictures=False, cases=4)
    study = read_study(made)
    assert {t.verdict for t in judge(study)} == {"undecided"}
    text = write_study_report(made).markdown.read_text()
    assert "With one seed nothing tells a recipe from its seed" in text


def test_rows_of_another_judge_are_not_mixed_in(tmp_path: Path) -> None:
    def change(who: str, seed: int | None, fields: dict) -> dict:
        return {**fields, "judge": "old", "score": 1.0} if who == "teacher-80nfe" else fields

    means = {"e1": 3.0, "e2": 3.3, "teacher-80nfe": 3.0}
    study = read_study(write_study(tmp_path / "s", means, change=change, pictures=False))
    assert study.judge == "oracle-1" and study.base_teacher is None
    assert any("by another judge" in note for note in study.notes)


def test_a_case_counts_with_all_its_image_seeds_or_not_at_all(tmp_path: Path) -> None:
    made = write_study(tmp_path / "s", {"e1": 3.0, "e2": 3.0}, cases=4, pictures=False)
    path = made / "cells/e1/seed0/eval/rows.jsonl"
    first = json.loads(path.read_text().splitlines()[0])
    with path.open("a") as file:
        file.write(json.dumps({**first, "seed": 6, "score": 5.0}) + "\n")
    study = read_study(made)
    scores = study.scores["t2i"].values
    assert scores["e1", 0][first["case"]] == pytest.approx((first["score"] + 5) / 2)
    assert first["case"] not in scores["e2", 0]
    found = study.estimate({"e1": 1, "e2": -1}, "t2i")
    assert found is not None and (found.cases, found.dropped) == (11, 1)
    assert any("e2@0: 1 of 21 images have no row" in note for note in study.notes)


def test_two_students_in_a_cell_are_refused(tmp_path: Path) -> None:
    made = write_study(tmp_path / "s", {"e1": 3.0, "e2": 3.0}, cases=2, pictures=False)
    path = made / "cells/e1/seed0/eval/rows.jsonl"
    first = json.loads(path.read_text().splitlines()[0])
    with path.open("a") as file:
        file.write(json.dumps({**first, "model": "student-2nfe"}) + "\n")
    with pytest.raises(DataError, match="rows of two students, student-2nfe and student-4nfe"):
        read_study(made)


def test_strips_put_each_picture_in_its_place(tmp_path: Path) -> None:
    means = {"base_only": 3.0, "stepwise": 3.0}
    curves = dict.fromkeys(means, rises)
    made = write_study(tmp_path / "s", means, seeds=1, curves=curves)
    colours = {}
    for i, variant in enumerate(means):
        for j, place in enumerate(("step_000010", "step_000050", "step_000100", "teacher")):
            colour = colours[i, j] = (40 * i + 10, 40 * j + 10, 200)
            file = made / f"cells/{variant}/seed0/probe/{place}/t2i-portrait-0000-s0.png"
            Image.new("RGB", (32, 32), colour).save(file)
    (made / "cells/stepwise/seed0/probe/step_000050/t2i-portrait-0000-s0.png").unlink()
    strip = strips(read_study(made))[0]
    assert (strip.case, strip.prompt) == ("t2i-portrait-0000", "a person , smiling")
    assert strip.missing == 1
    pixels = np.asarray(strip.image)
    places = {}
    for place, colour in colours.items():
        where = np.argwhere((pixels == colour).all(axis=-1))
        if place == (1, 1):
            assert not len(where)
        else:
            assert len(where) == 96 * 96
            places[place] = where.mean(axis=0)
    for (i, j), (y, x) in places.items():
        assert all(y < v for (k, _), (v, _) in places.items() if k > i)
        assert all(x < w for (_, k), (_, w) in places.items() if k > j)
