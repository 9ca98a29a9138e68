"""What a study asks: a base recipe, named variants of it, seeds and one budget for all of them.

A cell is one variant with one seed, an ordinary distillation. Where cells lie and what became of
them is in `layout`; how they run in `engine`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from fewstep.errors import RecipeError, did_you_mean
from fewstep.recipe.facts import Machine, local_machine
from fewstep.recipe.load import load_layered, load_yaml
from fewstep.recipe.plan import Plan, make_plan
from fewstep.recipe.schema import Count, Recipe, Strict, Word

Overrides = dict[str, Any]
"""Fields of a recipe, nested as in its file or with dotted keys; lists are replaced whole."""


class StudyBudget(Strict):
    updates: Count
    """Student updates of every cell."""
    batch: Count
    """Samples per student update of every cell."""
    equal: Literal["updates", "compute"] = "updates"
    """What all variants must spend alike: updates and samples, or the plan's operations. With
    `compute` a variant sets its own `budget.updates`; the first variant is the measure."""


class Variant(Strict):
    title: str
    """As tables and plots call it."""
    recipe: str | None = None
    """A recipe to use instead of the study's base, relative to the study's file."""
    set: Overrides = Field(default_factory=dict)
    note: str = ""


class Study(Strict):
    name: Word
    question: str
    """What the study is to answer, one sentence."""
    base: str
    """The recipe that all variants start from, relative to the study's file."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)
    budget: StudyBudget
    set: Overrides = Field(default_factory=dict)
    """For all cells."""
    variants: Annotated[dict[Word, Variant], Field(min_length=1)]
    reference: tuple[str, ...] = ("teacher", "teacher_cut")
    """Models that are no variant, judged once on the cells' cases; as in `evaluation.models`."""
    evaluation: Overrides = Field(default_factory=dict)
    """The recipe's `evaluation`, the same for every cell; its `models` are decided here."""
    probe: Overrides = Field(default_factory=dict)
    """The recipe's `log.probe`, the same for every cell."""
    takeaways: tuple[int, ...] = ()
    """Numbers of the paper's takeaways (arXiv 2606.03746) that the study speaks to."""
    roles: dict[Word, Word] = Field(default_factory=dict)
    """Which variant stands for which row of the paper's tables, such as e1 or stepwise."""


@dataclass(frozen=True)
class Cell:
    index: int
    variant: str
    seed: int
    recipe: Recipe
    plan: Plan

    @property
    def name(self) -> str:
        return f"{self.variant}/seed{self.seed}"


@dataclass(frozen=True)
class Reference:
    """The models that are judged once: an evaluation without a student."""

    recipe: Recipe
    plan: Plan
    name = "reference"


def load_study(path: str | Path, overrides: Mapping[str, str] | None = None) -> Study:
    """Read and check a study; its recipes come back as absolute paths.

    Raises RecipeError, which names the field, for what one study file alone shows to be wrong.
    """
    study = load_yaml(path, Study, overrides)
    where = str(path)
    if len(set(study.seeds)) < len(study.seeds):
        raise RecipeError("names a seed twice", field="seeds", where=where, hint="keep one")
    for role, variant in study.roles.items():
        if variant not in study.variants:
            raise RecipeError(
                f"no variant is called {variant!r}",
                field=f"roles.{role}",
                where=where,
                hint=did_you_mean(variant, study.variants),
            )
    if "models" in study.evaluation:
        raise RecipeError(
            "is decided by the study: a cell judges its student, `reference` the rest",
            field="evaluation.models",
            where=where,
            hint="list them in `reference`",
        )
    if wrong := [model for model in study.reference if model.partition(":")[0] == "student"]:
        raise RecipeError(
            f"{wrong[0]!r} is judged in every cell",
            field="reference",
            where=where,
            hint="list teachers, such as teacher, teacher_cut, teacher:t2i",
        )
    folder = Path(path).expanduser().resolve().parent
    variants = {
        name: v.model_copy(update={"recipe": str(folder / v.recipe)}) if v.recipe else v
        for name, v in study.variants.items()
    }
    return study.model_copy(update={"base": str(folder / study.base), "variants": variants})


def make_cells(study: Study, machine: Machine | None = None) -> tuple[Cell, ...]:
    """Every variant with every seed, resolved, planned and found comparable.

    Seeds change slowest, so that the whole table is there once after as many cells as variants.
    Raises RecipeError where a variant has another budget, other cases or no difference.
    """
    machine = machine or local_machine()
    cells: list[Cell] = []
    for seed in study.seeds:
        for variant in study.variants:
            recipe = _resolve(study, variant, seed)
            try:
                plan = make_plan(recipe, machine)
            except RecipeError as error:
                raise _of_variant(variant, str(error)) from None
            cells.append(Cell(len(cells), variant, seed, recipe, plan))
    _check_budget(study, cells)
    _check_comparable(cells)
    return tuple(cells)


def make_reference(
    study: Study, cells: Sequence[Cell], machine: Machine | None = None
) -> Reference | None:
    """The evaluation of `study.reference` on the cells' cases; None where there are none."""
    if not study.reference:
        return None
    layers = [
        ("set", study.set),
        ("budget", {"budget": study.budget.model_dump(exclude={"equal"})}),
        ("evaluation", {"evaluation": study.evaluation | {"models": list(study.reference)}}),
        ("reference", {"name": f"{study.name}-reference", "seed": study.seeds[0]}),
    ]
    recipe = load_layered(study.base, layers)
    if recipe.data.conditions() != cells[0].recipe.data.conditions():
        raise RecipeError(
            "has other categories than the variants, so the reference models have other cases",
            field="base",
            hint="keep the same pools in all recipes of a study",
        )
    return Reference(recipe, make_plan(recipe, machine or local_machine()))


def _resolve(study: Study, name: str, seed: int) -> Recipe:
    variant = study.variants[name]
    layers: list[tuple[str, Overrides]] = [
        ("set", study.set),
        ("budget", {"budget": study.budget.model_dump(exclude={"equal"})}),
        (f"variants.{name}.set", variant.set),
        ("evaluation", {"evaluation": study.evaluation | {"models": ["student"]}}),
        ("seeds", {"name": f"{study.name}-{name}", "seed": seed}),
    ]
    if study.probe:
        layers.append(("probe", {"log": {"probe": study.probe}}))
    return load_layered(variant.recipe or study.base, layers)


COMPUTE_TOLERANCE = 0.03


def _check_budget(study: Study, cells: list[Cell]) -> None:
    """The same number of student updates and of samples, by what the plans will do."""
    if study.budget.equal == "compute":
        _check_compute(study, cells)
        return
    wanted = (study.budget.updates, study.budget.updates * study.budget.batch)
    for cell in cells:
        found = (cell.plan.updates, sum(quota.samples for quota in cell.plan.tasks))
        if found != wanted:
            raise _of_variant(
                cell.variant,
                f"makes {found[0]} updates of {found[1]} samples in all, the study's budget is "
                f"{wanted[0]} of {wanted[1]}",
                hint="leave budget.updates and budget.batch to the study",
            )


def _check_compute(study: Study, cells: list[Cell]) -> None:
    """The same number of operations as the first variant, as the plans count them."""
    first = cells[0]
    for cell in cells:
        if cell.recipe.budget.batch != study.budget.batch:
            raise _of_variant(
                cell.variant,
                f"has batches of {cell.recipe.budget.batch}, the study of {study.budget.batch}",
                hint="leave budget.batch to the study",
            )
        spends = cell.plan.cost.flop / first.plan.cost.flop
        if abs(spends - 1) > COMPUTE_TOLERANCE:
            raise _of_variant(
                cell.variant,
                f"spends {spends:.2f} times the operations of {first.variant}",
                hint=f"use budget.updates: {round(cell.plan.updates / spends)}, or near it",
            )


def _check_comparable(cells: list[Cell]) -> None:
    first = cells[0]
    seen: dict[str, Cell] = {}
    for cell in cells:
        if cell.recipe.evaluation != first.recipe.evaluation:
            raise _of_variant(
                cell.variant,
                f"is judged on other cases than {first.variant}",
                hint="leave `evaluation` to the study",
            )
        if cell.recipe.data.conditions() != first.recipe.data.conditions():
            raise _of_variant(
                cell.variant,
                f"has other categories than {first.variant}, so the two cannot be compared",
                hint="keep its pools and give those it shall not see the weight 0",
            )
        if cell.recipe.log.probe != first.recipe.log.probe:
            raise _of_variant(
                cell.variant,
                f"is measured otherwise during training than {first.variant}",
                hint="leave `log.probe` to the study's `probe`",
            )
        same = seen.setdefault(cell.recipe.content_hash(), cell)
        if same is not cell:
            raise _of_variant(
                cell.variant,
                f"is the same recipe as {same.variant}",
                hint="remove one of them, or look for a misspelt override",
            )


def _of_variant(variant: str, problem: str, *, hint: str = "") -> RecipeError:
    return RecipeError(problem, field=f"variants.{variant}", hint=hint)
