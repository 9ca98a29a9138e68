"""Plain trajectory regression: the student's few steps against the states of the teacher's many.

The reference without any matching of distributions (knowledge distillation of the sampler, as in
arXiv 2101.02388): from the teacher's state at t_k, one student step must land on the teacher's
state at t_{k+1}.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fewstep.core.process import Time, v_from_x0

State = Float[Tensor, "b *s"]


def regression_loss(
    x: State, state: State, t: Time, target: State, end: float
) -> Float[Tensor, ""]:
    """|| v_student - v ||^2 for the student's answer x at (state, t).

    v = (state - target) / (t - end) is the constant velocity from the teacher's state at t to its
    state at `end`; where they agree, the student's Euler step lands on `target`. Compared in v,
    every step of the grid counts alike, whatever its length.
    """
    chord = (state.float() - target.float()) / (t - end).view(-1, *[1] * (x.ndim - 1))
    return F.mse_loss(v_from_x0(state.float(), x.float(), t), chord.detach())
