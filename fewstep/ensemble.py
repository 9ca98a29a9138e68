"""The networks of a run, whatever they are: loaded, cast in roles, saved, told apart by a stamp.

Here are the project's own (`MMDiT`); those of real models are in `real.ensemble`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from fewstep.core.types import Denoiser
from fewstep.domain import Domain, TeachableDomain
from fewstep.errors import RecipeError
from fewstep.models.cast import Cast, Role, make_cast
from fewstep.models.lab import MMDiT, load_mmdit, save_weights
from fewstep.recipe.facts import weights_path
from fewstep.recipe.schema import Recipe
from fewstep.samplers import shifted_grid
from fewstep.session import compute_device, stamp_of


@runtime_checkable
class Ensemble(Protocol):
    """The networks of one recipe."""

    @property
    def device(self) -> torch.device: ...

    def open_domain(self) -> Domain:
        """The world that they are made for; the same one every time."""
        ...

    def cast(self, teachers: Sequence[str]) -> Cast:
        """Student and fake score at their beginning, and these teachers."""
        ...

    def teacher(self, name: str) -> Denoiser: ...

    def teacher_grid(self, name: str, steps: int) -> tuple[float, ...]:
        """t_0 .. t_{n-1} of the teacher's own sampling."""
        ...

    def teacher_identity(self, name: str) -> str:
        """A hash of all weights that make the teacher."""
        ...

    def student(self, weights: Path) -> Denoiser:
        """A finished student."""
        ...

    def save(self, student: Role, path: Path, about: dict[str, object]) -> None: ...


class LabEnsemble:
    """Networks made by `fewstep teach`, each with weights of its own."""

    def __init__(self, recipe: Recipe, open_domain: Callable[[], TeachableDomain]) -> None:
        self.recipe, self._open = recipe, open_domain
        self._domain: TeachableDomain | None = None
        self.device = compute_device()
        self._teachers: dict[str, MMDiT] = {}

    def open_domain(self) -> TeachableDomain:
        if self._domain is None:
            self._domain = self._open()
        return self._domain

    def teacher(self, name: str) -> MMDiT:
        if name not in self._teachers:
            weights = weights_path(self.recipe.teachers[name].weights)
            field = f"teachers.{name}.weights"
            self._teachers[name] = load_fitting(weights, self.open_domain(), field=field)
        return self._teachers[name]

    def cast(self, teachers: Sequence[str]) -> Cast:
        start = self.teacher(self.recipe.student.init)
        return make_cast(start, {name: self.teacher(name) for name in teachers})

    def teacher_grid(self, name: str, steps: int) -> tuple[float, ...]:
        return shifted_grid(steps, self.recipe.teachers[name].shift)

    def teacher_identity(self, name: str) -> str:
        return stamp_of(weights_path(self.recipe.teachers[name].weights))

    def student(self, weights: Path) -> MMDiT:
        return load_fitting(weights, self.open_domain(), field="student")

    def save(self, student: Role, path: Path, about: dict[str, object]) -> None:
        assert isinstance(student, MMDiT)
        save_weights(student, path, config=student.config, about=about)


def load_fitting(weights: Path, domain: TeachableDomain, *, field: str) -> MMDiT:
    """A model whose latents and text are those of the domain, on this machine's device.

    RecipeError for a model of another family.
    """
    model = load_mmdit(weights)
    channels, side, _ = domain.sample_shape
    needed = {"channels": channels, "grid": side, "vocabulary": 0, "text_width": 0}
    needed |= domain.text_sizes()
    found = {name: getattr(model.config, name) for name in needed}
    if wrong := [name for name in needed if found[name] != needed[name]]:
        told = ", ".join(f"{name} {found[name]} instead of {needed[name]}" for name in wrong)
        raise RecipeError(
            f"{weights} is of another family than the data: {told}",
            field=field,
            hint="use weights that `fewstep teach` made with the same source",
        )
    return model.to(compute_device())
