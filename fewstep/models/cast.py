"""The cast of a distillation: student, fake score and teachers as roles.

Here every role is a network of its own. Nothing outside `models/` may rely on that: roles that
share one frozen base are met through the same three names.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass

from torch import nn

from fewstep.models.lab import MMDiT


@dataclass(frozen=True)
class Cast:
    """Student and fake are trainable and start from the same weights; teachers are frozen."""

    student: MMDiT
    fake: MMDiT
    teachers: Mapping[str, MMDiT]


def make_cast(init: MMDiT, teachers: Mapping[str, MMDiT]) -> Cast:
    """Student and fake as copies of `init`. Starting the fake score anywhere else makes the first
    score differences meaningless."""
    for teacher in teachers.values():
        teacher.requires_grad_(False).eval()
    return Cast(_trainable(init), _trainable(init), teachers)


def _trainable(model: MMDiT) -> MMDiT:
    copy: nn.Module = deepcopy(model)
    assert isinstance(copy, MMDiT)
    return copy.requires_grad_(True).train()
