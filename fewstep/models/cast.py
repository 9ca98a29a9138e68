"""The cast of a distillation: student, fake score and teachers as roles.

Roles may be networks of their own (here, and for the lab) or adapters that share one frozen base
(`models.roles`). Nothing outside `models/` may rely on either.
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from fewstep.core.types import Denoiser
from fewstep.models.lab import MMDiT


@runtime_checkable
class Trainable(Protocol):
    """What optimisers and averages work on."""

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


@runtime_checkable
class Role(Trainable, Protocol):
    """A role that is trained. Its parameters and its state are its own, whatever else it shares.

    Calls of several roles may be mixed freely between a forward pass and its backward pass.
    """

    def __call__(self, x_t: Tensor, t: Tensor, cond: Any, /) -> Tensor:
        """The denoised x_0, as `core.types.Denoiser` has it."""
        ...

    def predict_v(self, x_t: Tensor, t: Tensor, cond: Any, /) -> Tensor:
        """v = eps - x_0 in float32."""
        ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: Mapping[str, Tensor], /) -> Any: ...


@dataclass(frozen=True)
class Cast:
    """Student and fake are trainable and start from the same weights; teachers are frozen."""

    student: Role
    fake: Role
    teachers: Mapping[str, Denoiser]


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
