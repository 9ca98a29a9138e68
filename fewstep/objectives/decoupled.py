"""Decoupled DMD: arXiv 2511.22677 eq. 6, eq. 8 and algorithm 1.

The guided DMD gradient is a sum of distribution matching and CFG augmentation (eq. 6), and each may
have a re-noising time of its own (eq. 8); with D for x_0 predictions and alpha the CFG scale:

    (D_real(x_DM, c) - D_fake(x_DM, c)) + (alpha - 1) (D_real(x_CA, c) - D_real(x_CA))

At one and the same re-noised state this is `dmd.dmd_direction` with the guided teacher.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fewstep.core.process import expand, shift_time
from fewstep.objectives.dmd import distance_to, renoise_time

State = Float[Tensor, "b *s"]


def augmentation_time(
    u: Float[Tensor, " b"], *, low: float, high: float, shift: float, below: float
) -> Float[Tensor, " b"]:
    """t_CA from uniform u: as p_t, but never noisier than `below`, the student's own time t_k.

    The paper counts time from noise to data, so that its tau_CA > t is t_CA < t_k here. The bound
    is put on the uniform draw, before the shift, which then keeps its shape below t_k.
    """
    bound = shift_time(torch.tensor(below), 1 / shift).item()
    return renoise_time(u, low=min(low, bound), high=min(high, bound), shift=shift)


def decoupled_direction(
    x: State,
    fake: State,
    real: State,
    augmentation: State,
    *,
    matching_weight: float,
    augmentation_weight: float,
    normaliser: Literal["teacher", "none"],
) -> State:
    """The direction to step against, as `dmd_direction`'s.

    `fake` and `real` are conditional x_0 predictions at x_DM, `augmentation` is
    (alpha - 1) (cond - uncond) at x_CA. Weights of 1 are eq. 8; with one of them 0 the other term
    is alone (the paper's ablation). The normaliser is DMD's, 1 / mean |x - guided teacher|, with
    the two terms' answers put together; algorithm 1 leaves the scale to its lambda.
    """
    pull = augmentation.float()
    difference = matching_weight * (fake.float() - real.float()) - augmentation_weight * pull
    if normaliser == "none":
        return difference
    return difference / expand(distance_to(real.float() + pull, x), x)
