"""What an update tells about its own stability: mismatch of the score fields, shares of the pull.

Pure functions of what the update computed anyway. What has to be drawn for it (diversity, residual
noise, collapse) is `evals.probe`'s.
"""

from collections.abc import Iterable, Mapping
from math import isnan, sqrt
from statistics import fmean

from jaxtyping import Float
from torch import Tensor

from fewstep.core.process import eps_from_x0
from fewstep.core.types import Batch
from fewstep.recipe.plan import Plan

Metrics = dict[str, float]
Told = dict[str, float | list[float]]
"""What a micro-batch tells: of itself, or of each of its samples that a key is about."""


def describe(
    batch: Batch,
    k: int,
    plan: Plan,
    *,
    x_t: Float[Tensor, "b *chw"],
    t: Float[Tensor, " b"],
    fake: Float[Tensor, "b *chw"],
    real: Float[Tensor, "b *chw"],
    answers: Mapping[str, Float[Tensor, "b *chw"]],
) -> Told:
    """What to log about one comparison of scores at step k, by the conditions' groups.

    `fake`, `real` and `answers` are denoised x_0 at (x_t, t) in float32; the answer of a teacher is
    NaN in the rows that it did not see. All rows of a group have the same lambda. Every key has a
    value of each row that it is about, for `mean_of` all micro-batches:

    - `mismatch/<group>/<teacher>/k<k>`: ||s_m - s_stu|| / ||s_stu||, of the rows it saw
    - `share/<group>/<teacher>`: its part of sum_m lambda_m ||s_m - s_stu||; the shares of a group
      sum to 1
    - `gap/<category>`: mean square of real - fake, in x_0
    """
    told: Told = {}
    away = {m: relative_mismatch(x_t, t, answer, fake).tolist() for m, answer in answers.items()}
    groups = [plan.group(batch.task, category) for category in batch.categories]
    for group in dict.fromkeys(groups):
        rows = [i for i, other in enumerate(groups) if other == group]
        entry = plan.condition(batch.task, batch.categories[rows[0]])
        for name in entry.cfg:
            seen = [away[name][i] for i in rows if not isnan(away[name][i])] if name in away else []
            if seen:
                told[f"mismatch/{group}/{name}/k{k}"] = seen
        shares = [
            shares_of_pull(entry.weights[k], {m: away[m][i] for m in entry.weights[k]})
            for i in rows
        ]
        for name in entry.cfg:
            told[f"share/{group}/{name}"] = [s.get(name, 0.0) for s in shares]
    gap = (real - fake).flatten(1).square().mean(1).tolist()
    for category in sorted(set(batch.categories)):
        own = [g for g, c in zip(gap, batch.categories, strict=True) if c == category]
        told[f"gap/{category}"] = own
    return told


def mean_of(rows: Iterable[Told]) -> Metrics:
    """The mean of each key over the micro-batches that told it, or over all samples where each has
    a value of its own; for `gap/` its root, taken last.

    So it does not matter how the samples of an update are cut into micro-batches and ranks.
    """
    told: dict[str, list[float]] = {}
    for row in rows:
        for key, value in row.items():
            told.setdefault(key, []).extend(value if isinstance(value, list) else [value])
    means = {key: fmean(values) for key, values in sorted(told.items())}
    return {key: sqrt(mean) if key.startswith("gap/") else mean for key, mean in means.items()}


def relative_mismatch(
    x_t: Float[Tensor, "b *chw"],
    t: Float[Tensor, " b"],
    answer: Float[Tensor, "b *chw"],
    fake: Float[Tensor, "b *chw"],
) -> Float[Tensor, " b"]:
    """||s_m - s_stu|| / ||s_stu|| of each row, from two denoised x_0 at the same (x_t, t).

    Taken in eps = -t s, whose common factor cancels. It is (1 - t) ||v_m - v_stu|| / ||eps_stu||,
    so that it stays finite as t goes to 0.
    """
    own = eps_from_x0(x_t, fake, t).flatten(1)
    other = eps_from_x0(x_t, answer, t).flatten(1)
    return (other - own).norm(dim=1) / own.norm(dim=1)


def shares_of_pull(weights: Mapping[str, float], mismatch: Mapping[str, float]) -> Metrics:
    """lambda_m d_m / sum_n lambda_n d_n of one row; lambda itself where nobody pulls."""
    pulls = {name: weight * mismatch[name] for name, weight in weights.items()}
    total = sum(pulls.values())
    return {name: pull / total for name, pull in pulls.items()} if total else dict(weights)
