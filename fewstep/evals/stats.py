"""Means, intervals, paired comparisons and ranks of evaluation rows. Pure functions of the rows.

The unit is the case: all seeds of a case are drawn together, because they are not independent. A
mean over a task gives each category the same weight. Rows without a score never enter a mean and
are always counted. Every interval is a 95% percentile bootstrap with a fixed seed.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fewstep.errors import DataError
from fewstep.evals.rows import Row

DRAWS = 4000
SEED = 0
TIE = 0.05
"""Two scores on the 1-5 scale that differ by no more than this are a tie."""

Array = NDArray[np.float64]
Item = tuple[str, int]  # (case, seed): one image to be made by every model
Scope = tuple[str, str | None]  # (task, category), or (task, None) for the whole task


class Interval(NamedTuple):
    """A value with its 95% interval; no bounds where a category has a single case."""

    value: float
    low: float | None
    high: float | None

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


@dataclass(frozen=True)
class Group:
    """How one model did on a category, or on a task (category None)."""

    model: str
    task: str
    category: str | None
    mean: Interval | None
    """None where nothing is scored; for a task, where any of its categories has nothing scored."""
    scored: int
    unscored: int
    missing: int
    """Images that another model has a row for and this one does not."""

    @property
    def asked(self) -> int:
        return self.scored + self.unscored + self.missing

    @property
    def coverage(self) -> float:
        return self.scored / self.asked


@dataclass(frozen=True)
class Comparison:
    """`model` against `against` on the images scored for both."""

    model: str
    against: str
    task: str
    category: str | None
    difference: Interval
    ratio: Interval
    wins: int
    ties: int
    losses: int
    only_model: int
    """Images dropped because `against` has no score for them."""
    only_against: int
    neither: int
    categories_dropped: tuple[str, ...]
    """Categories without any image scored for both."""

    @property
    def pairs(self) -> int:
        return self.wins + self.ties + self.losses

    @property
    def dropped(self) -> int:
        return self.only_model + self.only_against + self.neither


@dataclass(frozen=True)
class Rank:
    model: str
    mean: float
    rank: int
    """By mean; equal means share a rank."""
    best: int
    worst: int
    """The places that the paired intervals leave open: best == worst where it is settled."""
    not_separable: tuple[str, ...]
    """Models whose paired difference from this one has an interval that includes 0."""


@dataclass(frozen=True)
class Ranking:
    """Models ordered on the images that are scored for all of them."""

    task: str
    category: str | None
    ranks: tuple[Rank, ...]
    images: int
    dropped: int


def comparable(rows: Iterable[Row], *, judge: str) -> list[Row]:
    """The rows of one judge in a fixed order, after checking that equal cases are equal questions.

    A score of one judge is never averaged with, or compared to, a score of another.
    """
    chosen = sorted((row for row in rows if row.judge == judge), key=lambda row: row.key)
    for case, same in groupby(sorted(chosen, key=lambda row: row.case), key=lambda row: row.case):
        asked = {(row.task, row.category, row.prompt): row for row in same}
        if len(asked) > 1:
            first, second, *_ = asked.values()
            raise DataError(
                f"case {case!r} is not the same question for {first.model!r} ({first.task}, "
                f"{first.category}, {first.prompt!r}) and {second.model!r} ({second.task}, "
                f"{second.category}, {second.prompt!r}): the rows come from two evaluations; "
                "delete the older rows and evaluate again"
            )
    counts: dict[tuple[str, str], set[int]] = defaultdict(set)
    for row in chosen:
        counts[row.model, row.task].add(row.nfe)
    for (model, task), nfe in counts.items():
        if len(nfe) > 1:
            raise DataError(
                f"model {model!r} has {task} rows with different nfe {sorted(nfe)}; "
                "give one of the two another name and evaluate it again"
            )
    return chosen


def scopes(rows: Iterable[Row]) -> list[Scope]:
    """Every (task, category) of the rows, then every task as a whole."""
    found = sorted({(row.task, row.category) for row in rows})
    tasks = sorted({task for task, _ in found})
    return [*found, *((task, None) for task in tasks)]


def summarise(rows: Sequence[Row], *, draws: int = DRAWS, seed: int = SEED) -> list[Group]:
    """One group per model and scope, whether or not the model has rows there."""
    models = sorted({row.model for row in rows})
    groups = []
    for task, category in scopes(rows):
        inside = _inside(rows, task, category)
        asked = {_item(row) for row in inside}
        for model in models:
            own = [row for row in inside if row.model == model]
            values = {_item(row): (row.score,) for row in own if row.score is not None}
            strata = _strata(values, inside)
            groups.append(
                Group(
                    model=model,
                    task=task,
                    category=category,
                    mean=_mean(strata, draws=draws, seed=seed) if all(strata.values()) else None,
                    scored=len(values),
                    unscored=len(own) - len(values),
                    missing=len(asked) - len(own),
                )
            )
    return groups


def compare(
    rows: Sequence[Row],
    model: str,
    against: str,
    *,
    task: str,
    category: str | None = None,
    tie: float = TIE,
    draws: int = DRAWS,
    seed: int = SEED,
) -> Comparison | None:
    """The paired comparison of two models; None where no image is scored for both."""
    inside = _inside(rows, task, category)
    values = _complete(inside, [model, against])
    strata = _strata(values, inside)
    if not values:
        return None
    means, drawn = _means(strata), _bootstrap(strata, draws=draws, seed=seed)
    gaps = [a - b for a, b in values.values()]
    wins = sum(gap > tie + 1e-9 for gap in gaps)
    losses = sum(gap < -tie - 1e-9 for gap in gaps)
    scored = {
        name: {_item(row) for row in inside if row.model == name and row.score is not None}
        for name in (model, against)
    }
    return Comparison(
        model=model,
        against=against,
        task=task,
        category=category,
        difference=_interval(means[0] - means[1], _minus(drawn, 0, 1)),
        ratio=_interval(means[0] / means[1], None if drawn is None else drawn[:, 0] / drawn[:, 1]),
        wins=wins,
        ties=len(gaps) - wins - losses,
        losses=losses,
        only_model=len(scored[model] - scored[against]),
        only_against=len(scored[against] - scored[model]),
        neither=len({_item(row) for row in inside} - scored[model] - scored[against]),
        categories_dropped=tuple(name for name, cases in strata.items() if not cases),
    )


def rank(
    rows: Sequence[Row],
    models: Sequence[str],
    *,
    task: str,
    category: str | None = None,
    draws: int = DRAWS,
    seed: int = SEED,
) -> Ranking:
    """Order `models`; two are separable if the interval of their paired difference excludes 0."""
    inside = _inside(rows, task, category)
    values = _complete(inside, models)
    asked = {_item(row) for row in inside}
    if not values:
        return Ranking(task, category, (), 0, len(asked))
    strata = _strata(values, inside)
    means, drawn = _means(strata), _bootstrap(strata, draws=draws, seed=seed)
    ranks = []
    for i, name in enumerate(models):
        gaps = {
            j: _interval(means[i] - means[j], _minus(drawn, i, j))
            for j in range(len(models))
            if j != i
        }
        below = sum(gap.value < 0 and gap.excludes_zero for gap in gaps.values())
        above = sum(gap.value > 0 and gap.excludes_zero for gap in gaps.values())
        ranks.append(
            Rank(
                model=name,
                mean=float(means[i]),
                rank=1 + int(sum(mean > means[i] + 1e-9 for mean in means)),
                best=1 + below,
                worst=len(models) - above,
                not_separable=tuple(models[j] for j, gap in gaps.items() if not gap.excludes_zero),
            )
        )
    ranks.sort(key=lambda entry: (entry.rank, entry.model))
    return Ranking(task, category, tuple(ranks), len(values), len(asked) - len(values))


def gap_closed(
    rows: Sequence[Row],
    *,
    student: str,
    cut: str,
    teacher: str,
    task: str,
    draws: int = DRAWS,
    seed: int = SEED,
) -> Interval | None:
    """(student - cut) / (teacher - cut), on images scored for all three.

    1 means that distillation won back all that cutting the teacher's evaluations lost. None where
    the teacher is not separably above its cut self: there is no gap to close.
    """
    inside = _inside(rows, task, None)
    values = _complete(inside, [student, cut, teacher])
    strata = _strata(values, inside)
    if not values:
        return None
    means, drawn = _means(strata), _bootstrap(strata, draws=draws, seed=seed)
    gap = _interval(means[2] - means[1], _minus(drawn, 2, 1))
    if drawn is None or gap.value <= 0 or not gap.excludes_zero:
        return None
    share = (drawn[:, 0] - drawn[:, 1]) / (drawn[:, 2] - drawn[:, 1])
    return _interval((means[0] - means[1]) / (means[2] - means[1]), share)


def seconds_per_image(rows: Sequence[Row], model: str) -> float | None:
    """The median over the model's images, so that a slow first image does not count."""
    seconds = [row.seconds for row in rows if row.model == model and row.seconds is not None]
    return float(np.median(seconds)) if seconds else None


def judge_noise(rows: Sequence[Row]) -> float | None:
    """Standard deviation of one judgement around its image's mean, over all images; None where the
    judge was asked once. The score of an image with n judgements has it over sqrt(n)."""
    repeated = [row.judgements for row in rows if len(row.judgements) > 1]
    if not repeated:
        return None
    squares = sum(len(scores) * float(np.var(scores)) for scores in repeated)
    return float(np.sqrt(squares / sum(len(scores) - 1 for scores in repeated)))


def unscored_reasons(rows: Iterable[Row]) -> list[tuple[str, str, int]]:
    """(model, why, count), most frequent first."""
    counts = Counter((row.model, row.status) for row in rows if row.score is None)
    ordered = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    return [(model, why.removeprefix("unscored: "), n) for (model, why), n in ordered]


class _Case(NamedTuple):
    """The scores of one case, summed over its seeds: a column per model."""

    sums: tuple[float, ...]
    seeds: int


_Strata = dict[str, list[_Case]]  # by category; an empty list where nothing can be compared


def _item(row: Row) -> Item:
    return row.case, row.seed


def _inside(rows: Iterable[Row], task: str, category: str | None) -> list[Row]:
    inside = [r for r in rows if r.task == task and (category is None or r.category == category)]
    assert len({row.judge for row in inside}) <= 1, "call comparable() first"
    return sorted(inside, key=lambda row: row.key)


def _complete(rows: Iterable[Row], models: Sequence[str]) -> dict[Item, tuple[float, ...]]:
    """The scores of `models`, in that order, for the images scored for all of them."""
    scores: dict[Item, dict[str, float]] = defaultdict(dict)
    for row in rows:
        if row.score is not None:
            scores[_item(row)][row.model] = row.score
    return {
        item: tuple(found[model] for model in models)
        for item, found in sorted(scores.items())
        if all(model in found for model in models)
    }


def _strata(values: Mapping[Item, tuple[float, ...]], rows: Iterable[Row]) -> _Strata:
    categories = {row.case: row.category for row in rows}
    strata: _Strata = {category: [] for category in sorted(set(categories.values()))}
    for case, items in groupby(sorted(values.items()), key=lambda entry: entry[0][0]):
        scores = [score for _, score in items]
        sums = tuple(float(sum(column)) for column in zip(*scores, strict=True))
        strata[categories[case]].append(_Case(sums, len(scores)))
    return strata


def _means(strata: _Strata) -> Array:
    """The mean of the categories' means, a column per model; categories without cases left out."""
    means = [
        np.sum([case.sums for case in cases], axis=0) / sum(case.seeds for case in cases)
        for cases in strata.values()
        if cases
    ]
    return np.mean(means, axis=0)


def _bootstrap(strata: _Strata, *, draws: int, seed: int) -> Array | None:
    """`_means` of resampled cases, one row a draw; None where a category has a single case.

    From n cases n - 1 are drawn: a draw of n would give the mean a variance of (n - 1)/n s^2/n
    with s^2 the unbiased sample variance, and a draw of n - 1 gives it s^2/n.
    """
    generator = np.random.default_rng(seed)
    filled = [cases for cases in strata.values() if cases]
    if any(len(cases) < 2 for cases in filled):
        return None
    total = np.zeros((draws, len(filled[0][0].sums)))
    for cases in filled:
        n = len(cases)
        times = generator.multinomial(n - 1, np.full(n, 1 / n), size=draws).astype(np.float64)
        sums = np.array([case.sums for case in cases])
        seeds = np.array([case.seeds for case in cases], dtype=np.float64)
        total += (times @ sums) / (times @ seeds)[:, None]
    return total / len(filled)


def _mean(strata: _Strata, *, draws: int, seed: int) -> Interval:
    drawn = _bootstrap(strata, draws=draws, seed=seed)
    return _interval(_means(strata)[0], None if drawn is None else drawn[:, 0])


def _minus(drawn: Array | None, i: int, j: int) -> Array | None:
    return None if drawn is None else drawn[:, i] - drawn[:, j]


def _interval(value: float, drawn: Array | None) -> Interval:
    if drawn is None:
        return Interval(float(value), None, None)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(float(value), float(low), float(high))
