"""Contrasts of a study's variants with intervals over prompts and training seeds.

The model is the two-way one with crossed random effects: variant v, trained with seed s, scores
y = mu_v + prompt_p + (v, p) + seed_vs + (v, s, p) on case p; every case is seen by every trained
student. A contrast theta = sum_v c_v mu_v has two sources of error.

Prompts: cases are resampled within their category, all variants and training seeds of a case
together (a case is paired across variants). This covers prompt_p, (v, p) and (v, s, p).

Training seeds: three of them cannot be resampled; a bootstrap of n = 3 has 2/3 of the variance and
no tails, and its 95% interval covers about 75%. Their variance sigma^2 is estimated from the
spread of seed means within the variants, pooled over all variants of the study (df = sum of
S_v - 1), less the part of that spread which (v, s, p) explains and the prompts have already
covered. Each draw takes sigma^2 from df s^2 / chi^2_df - interaction, not below 0, and moves theta
by N(0, sigma^2 sum_v c_v^2 / S_v): a generalised confidence interval, as for other random-effects
models. Without the subtraction and without prompts it is the t interval with df degrees of freedom.

A variant whose own seeds spread more than the pooled s^2 keeps its own, because an unstable recipe
is one of the questions; the price is intervals that are a little too wide when all are alike.
What all this covers is measured in tests/test_study_report.py. A variant with one seed borrows the
wobble of the others; where no variant has two seeds there is no interval, because a recipe cannot
be told from its seed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from fewstep.evals.stats import Interval

DRAWS = 20_000
"""At most; a 95% interval takes fewer, so that about as many lie beyond the bounds of each."""
SEED = 0
LEVEL = 0.95

Array = NDArray[np.float64]
Column = tuple[str, int | None]
"""(variant, training seed), or (reference model, None)."""


@dataclass(frozen=True)
class Scores:
    """One task: the mean score of each case over its image seeds, by who made the images."""

    task: str
    cases: dict[str, tuple[str, ...]]
    """By category, every case that anybody was asked for."""
    values: dict[Column, dict[str, float]]
    """Only cases of which every image seed is scored."""

    def seeds(self, variant: str, category: str | None) -> list[int | None]:
        """Those of its training seeds with a score in every category of the scope."""
        return [
            seed
            for (name, seed), scored in self.values.items()
            if name == variant
            and all(any(case in scored for case in self.cases[c]) for c in self.scope(category))
        ]

    def scope(self, category: str | None) -> list[str]:
        return [category] if category is not None else list(self.cases)


@dataclass(frozen=True)
class Wobble:
    """How far means of a scope move between training seeds of one variant."""

    variance: float
    """Mean square of the seed means, which includes `interaction`."""
    interaction: float
    """The part of `variance` that comes from each prompt answering otherwise to each seed."""
    df: int
    own: dict[str, float]
    """The mean square of each variant with at least two seeds."""

    def of(self, variant: str) -> float:
        return max(self.variance, self.own.get(variant, 0.0))


@dataclass(frozen=True)
class Estimate:
    """A contrast, its interval and what it rests on."""

    interval: Interval
    """No bounds where a category has a single case or nothing is known about training seeds."""
    level: float
    cases: int
    dropped: int
    """Cases left out because one of the students or references has no score for them."""
    seeds: int
    """The fewest training seeds of any variant in the contrast; 0 if only references are."""
    prompt_variance: float
    """Of the estimate, by the choice of prompts; shrinks with their number."""
    seed_variance: float
    """Of the estimate, by the training seeds; shrinks with their number."""

    def needed(self, distance: float) -> str:
        """What would make the interval about `distance` wide to either side, in words.

        From the measured variances and the normal quantile, so a little optimistic for few seeds.
        """
        z = NormalDist().inv_cdf(0.5 + self.level / 2)
        allowed = (distance / z) ** 2
        if allowed <= 0:
            return "no number of prompts and seeds settles a difference of exactly nil"
        factor = (self.prompt_variance + self.seed_variance) / allowed
        if factor <= 1:
            return "a few more training seeds (the estimate's spread is small enough already)"
        seeds, prompts = max(1, self.seeds), self.cases
        left = allowed - self.prompt_variance
        if left > 0 and self.seed_variance > 0:
            return f"about {_ceil(seeds * self.seed_variance / left)} training seeds each"
        left = allowed - self.seed_variance
        if left > 0:
            return f"about {_ceil(prompts * self.prompt_variance / left)} prompts"
        return (
            f"about {_ceil(factor * seeds)} training seeds each and {_ceil(factor * prompts)} "
            "prompts"
        )


def wobble(scores: Scores, variants: Sequence[str], category: str | None) -> Wobble | None:
    """Pooled over the variants that have at least two training seeds; None if none has."""
    interactions, df = 0.0, 0
    squares: dict[str, float] = {}
    counts: dict[str, int] = {}
    for variant in variants:
        seeds = scores.seeds(variant, category)
        tables = _complete(scores, [(variant, seed) for seed in seeds], category)
        if len(seeds) < 2 or any(len(table) < 2 for table in tables):
            continue
        means = np.mean([table.mean(axis=0) for table in tables], axis=0)
        squares[variant] = float(np.var(means, ddof=1))
        explained = sum(_residual(table) / len(table) for table in tables) / len(tables) ** 2
        interactions += (len(seeds) - 1) * explained
        df += len(seeds) - 1
        counts[variant] = len(seeds) - 1
    if not df:
        return None
    pooled = sum(counts[variant] * square for variant, square in squares.items()) / df
    return Wobble(pooled, interactions / df, df, squares)


def contrast(
    scores: Scores,
    weights: Mapping[str, float],
    category: str | None,
    seeds_wobble: Wobble | None,
    *,
    level: float = LEVEL,
    seed: int = SEED,
) -> Estimate | None:
    """sum_v weights[v] mean(v), each category of the scope weighing the same.

    None where a variant has no seed that is scored in the whole scope, or no case is scored for
    all of them.
    """
    columns: list[Column] = []
    shares: list[float] = []
    spread: dict[str, float] = {}
    fewest = 0
    for variant, weight in weights.items():
        seeds = scores.seeds(variant, category)
        if not seeds:
            return None
        columns += [(variant, s) for s in seeds]
        shares += [weight / len(seeds)] * len(seeds)
        if None not in seeds:
            spread[variant] = weight**2 / len(seeds)
            fewest = min(fewest or len(seeds), len(seeds))
    tables = _complete(scores, columns, category)
    if any(not len(table) for table in tables):
        return None
    sums = [table @ np.array(shares) for table in tables]
    value = float(np.mean([column.mean() for column in sums]))
    drawn = _with_prompts(sums, draws=min(DRAWS, round(200 / (1 - level))), seed=seed)
    asked = sum(len(scores.cases[name]) for name in scores.scope(category))
    used = sum(len(table) for table in tables)
    interval = Interval(value, None, None)
    prompt_variance = 0.0
    if drawn is not None:
        prompt_variance = float(sum(np.var(s, ddof=1) / len(s) for s in sums) / len(sums) ** 2)
        if spread:
            drawn = _with_seeds(drawn, spread, seeds_wobble, seed=seed)
    if drawn is not None:
        low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
        interval = Interval(value, float(low), float(high))
    return Estimate(
        interval=interval,
        level=level,
        cases=used,
        dropped=asked - used,
        seeds=fewest,
        prompt_variance=prompt_variance,
        seed_variance=_seed_variance(spread, seeds_wobble),
    )


def seed_interval(values: Sequence[float], *, level: float = LEVEL) -> Interval:
    """The t interval of numbers that come one a training seed, such as a fall in a curve."""
    found = np.asarray(values, dtype=np.float64)
    value = float(found.mean())
    if len(found) < 2:
        return Interval(value, None, None)
    scale = float(found.std(ddof=1)) / len(found) ** 0.5
    half = scale * t_quantile(0.5 + level / 2, len(found) - 1)
    return Interval(value, value - half, value + half)


def t_quantile(probability: float, df: int) -> float:
    """Of Student's t, by bisection of its distribution function (integrated numerically)."""
    assert 0.5 < probability < 1 and df >= 1
    # t = sqrt(df) tan(a) turns the density into one proportional to cos(a)^(df - 1) on
    # (-pi/2, pi/2).
    angles = np.linspace(0, np.pi / 2, 20_001)
    density = np.cos(angles) ** (df - 1)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    angle = np.interp(2 * probability - 1, below / below[-1], angles)
    return float(df**0.5 * np.tan(angle))


def _with_prompts(categories: Sequence[Array], *, draws: int, seed: int) -> Array | None:
    """Means of the means of resampled cases; None where a category has a single case.

    n - 1 of n are drawn, so that a mean gets the variance s^2 / n with the unbiased s^2, as in
    `evals.stats`.
    """
    if any(len(cases) < 2 for cases in categories):
        return None
    generator = np.random.default_rng(seed)
    total = np.zeros(draws)
    for cases in categories:
        n = len(cases)
        total += cases[generator.integers(n, size=(draws, n - 1))].mean(axis=1)
    return total / len(categories)


def _with_seeds(
    drawn: Array, spread: Mapping[str, float], seeds_wobble: Wobble | None, *, seed: int
) -> Array | None:
    """`spread` is c_v^2 / S_v by variant."""
    if seeds_wobble is None:
        return None
    generator = np.random.default_rng([seed, 1])
    df = seeds_wobble.df
    seen = sum(share * seeds_wobble.of(variant) for variant, share in spread.items())
    explained = sum(spread.values()) * seeds_wobble.interaction
    variance = np.maximum(0.0, df * seen / generator.chisquare(df, len(drawn)) - explained)
    return drawn + np.sqrt(variance) * generator.standard_normal(len(drawn))


def _seed_variance(spread: Mapping[str, float], seeds_wobble: Wobble | None) -> float:
    if seeds_wobble is None:
        return 0.0
    return sum(
        share * max(0.0, seeds_wobble.of(variant) - seeds_wobble.interaction)
        for variant, share in spread.items()
    )


def _complete(scores: Scores, columns: Sequence[Column], category: str | None) -> list[Array]:
    """A table [cases, columns] a category, of the cases that all the columns have."""
    tables = []
    for name in scores.scope(category):
        cases = [
            case
            for case in scores.cases[name]
            if all(case in scores.values[column] for column in columns)
        ]
        lines = [[scores.values[column][case] for column in columns] for case in cases]
        tables.append(np.array(lines, dtype=np.float64).reshape(len(cases), len(columns)))
    return tables


def _residual(table: Array) -> float:
    """Mean square of what is left of [cases, seeds] without the means of rows and columns."""
    left = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    n, s = table.shape
    return float((left**2).sum() / ((n - 1) * (s - 1)))


def _ceil(number: float) -> int:
    return int(np.ceil(number - 1e-9))
