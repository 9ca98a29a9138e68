"""What an update tells about its own stability: mismatch of the score fields, shares of the pull.

Pure functions of what the update computed anyway. What has to be drawn for it (diversity, residual
noise, collapse) is `evals.probe`'s.
"""

from collections.abc import Mapping
from math import isnan
from statistics import fmean

from jaxtyping import Float
from torch import Tensor

from fewstep.core.process import eps_from_x0
from fewstep.core.types import Batch
from fewstep.recipe.plan import Plan

Metrics = dict[str, float]


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
) -> Metrics:
    """What to log about one comparison of scores at step k, by the conditions' groups.

    `fake`, `real` and `answers` are denoised x_0 at (x_t, t) in float32; the answer of a teacher is
    NaN in the rows that it did not see. All rows of a group have the same lambda.

    - `mismatch/<group>/<teacher>/k<k>`: mean of ||s_m - s_stu|| / ||s_stu|| over the rows it saw
    - `share/<group>/<teacher>`: mean over the rows of its part of sum_m lambda_m ||s_m - s_stu||;
      the shares of a group sum to 1
    - `gap/<category>`: root mean square of real - fake, in x_0
    """
    metrics: Metrics = {}
    away = {m: relative_mismatch(x_t, t, answer, fake).tolist() for m, answer in answers.items()}
    groups = [plan.group(batch.task, category) for category in batch.categories]
    for group in dict.fromkeys(groups):
        rows = [i for i, other in enumerate(groups) if other == group]
        entry = plan.condition(batch.task, batch.categories[rows[0]])
        for name in entry.cfg:
            seen = [away[name][i] for i in rows if not isnan(away[name][i])] if name in away else []
            if seen:
                metrics[f"mismatch/{group}/{name}/k{k}"] = fmean(seen)
        shares = [
            shares_of_pull(entry.weights[k], {m: away[m][i] for m in entry.weights[k]})
            for i in rows
        ]
        for name in entry.cfg:
            metrics[f"share/{group}/{name}"] = fmean(s.get(name, 0.0) for s in shares)
    gap = (real - fake).flatten(1).square().mean(1).tolist()
    for category in sorted(set(batch.categories)):
        own = [g for g, c in zip(gap, batch.categories, strict=True) if c == category]
        metrics[f"gap/{category}"] = fmean(own) ** 0.5
    return metrics


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
