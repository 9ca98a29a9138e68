"""Classifier-free guidance, and the real score of several teachers (arXiv 2606.03746 eq. 5-6)."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fewstep.core.types import Condition, Denoiser, GuidedDenoiser

Weights = Mapping[str, float]
"""lambda_m by teacher name, for one condition and one step."""


def classifier_free(
    denoiser: Denoiser, x_t: Tensor, t: Float[Tensor, " b"], cond: Condition, scale: float
) -> Tensor:
    """uncond + s (cond - uncond), in x_0. s = 1 is no guidance and costs one evaluation.

    On the linear path x_0 is affine in v and in the score at fixed (x_t, t), so it does not matter
    in which of the three the combination is taken. A denoiser with a rule of its own is asked for
    it: some rules (such as the renormalised one of Qwen-Image) act on v and mean nothing in x_0.
    """
    if isinstance(denoiser, GuidedDenoiser):
        return denoiser.guided(x_t, t, cond, scale)
    conditional = denoiser(x_t, t, cond)
    if scale == 1.0:
        return conditional
    unconditional = denoiser(x_t, t, cond.without_text())
    return unconditional + scale * (conditional - unconditional)


def real_denoised(
    teachers: Mapping[str, Denoiser],
    weights: Sequence[Weights],
    scales: Mapping[str, float],
    x_t: Tensor,
    t: Float[Tensor, " b"],
    cond: Condition,
    company: Sequence[Weights] = (),
) -> tuple[Tensor, dict[str, Tensor]]:
    """The guided x_0 of all teachers, mixed per sample, and each teacher's own answer.

        s_real^(k)(x_t, t, c) = sum_m lambda_{k,m}(c) s_m^(k)(x_t, t, c)          (eq. 5)

    mixed here in x_0, of which the score is an affine function at fixed (x_t, t); the weights of a
    sample sum to 1 (eq. 6), so the mixture of the one is the mixture of the other. `weights[i]`
    belongs to sample i. A teacher sees only the samples that give it weight; rows it did not see
    are NaN in its own answer, so that nobody averages over them by mistake. A teacher that gets
    weight in `company` alone (`core.types.Batch`) is asked about one sample, for company's sake.
    """
    real = torch.zeros_like(x_t, dtype=torch.float32)
    answers: dict[str, Tensor] = {}
    rows = (*weights, *company)
    for name in sorted({name for row in rows for name, share in row.items() if share > 0}):
        share = torch.tensor([row.get(name, 0.0) for row in weights], device=x_t.device)
        seen = share.nonzero().squeeze(1)
        if not len(seen):
            classifier_free(teachers[name], x_t[:1], t[:1], cond[:1], scales[name])
            continue
        part = classifier_free(teachers[name], x_t[seen], t[seen], cond[seen], scales[name]).float()
        real[seen] += share[seen].view(-1, *[1] * (x_t.ndim - 1)) * part
        answers[name] = torch.full_like(real, float("nan")).index_copy(0, seen, part)
    return real, answers
