"""First-step anchor: flow matching on the student's first step, after DP-DMD (arXiv 2602.03139).

The authors of arXiv 2606.03746 tried it and left it out: steadier structure, slightly worse visual
quality. It is kept as an option.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fewstep.core.process import v_from_x0

State = Float[Tensor, "b *s"]


def anchor_velocity(noise: State, anchor: State, t_anchor: float) -> State:
    """The constant velocity that leads from noise at t = 1 to the teacher's state at t_anchor.

    x(t_anchor) = noise - (1 - t_anchor) v, so v = (noise - anchor) / (1 - t_anchor).
    """
    assert 0 <= t_anchor < 1, t_anchor
    return (noise.float() - anchor.float()) / (1 - t_anchor)


def anchor_loss(
    x: State, noise: State, t: Float[Tensor, " b"], target_v: State
) -> Float[Tensor, ""]:
    """|| v_student - v_anchor ||^2 for the student's answer x at (noise, t), t = t_0."""
    return F.mse_loss(v_from_x0(noise.float(), x.float(), t), target_v.detach())
