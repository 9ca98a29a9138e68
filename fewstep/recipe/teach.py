"""The shape of a teacher recipe: what `fewstep teach` trains, on what, for how long."""

from typing import Annotated, Literal

from pydantic import Field

from fewstep.errors import RecipeError, did_you_mean
from fewstep.recipe.facts import weights_path
from fewstep.recipe.schema import (
    LAB_CATEGORIES,
    Count,
    Fraction,
    ImageSource,
    Positive,
    Seed,
    Share,
    Strict,
    Task,
    Word,
    hash_of,
)


class Network(Strict):
    width: Count = 256
    depth: Count = 6
    heads: Count = 4
    patch: Count = 2
    """Latent pixels per token side."""


class TeachOptim(Strict):
    lr: Positive = 2e-3
    """Peak learning rate of Muon (matrices of the blocks) and AdamW (everything else)."""
    warmup: Annotated[int, Field(ge=0)] = 100
    decay: Fraction = 0.4
    """Final share of the run over which the learning rate falls linearly to zero."""
    weight_decay: Share = 0.01
    clip: Positive = 1.0


class TeachBudget(Strict):
    updates: Count
    batch: Count = 128


class TeachLog(Strict):
    every: Count = 20
    sample_every: Count = 500
    save_every: Count = 500


class TeachRecipe(Strict):
    name: Word
    seed: Seed = 0
    source: ImageSource
    init: str | None = None
    """Weights to start from: `bundled:<name>` or a path; null trains from scratch."""
    network: Network = Network()
    """Ignored where `init` is given: its own sizes are kept."""
    pool_size: Count = 20_000
    """Examples drawn per category (lab); a folder gives what it has."""
    composition: dict[Task, dict[Word, Share]]
    """Weights of the categories within each task."""
    mixture: dict[Task, Share]
    drop_text: Fraction = 0.1
    """Share of micro-batches trained without text, for classifier-free guidance."""
    time_shift: Positive = 1.0
    """Static shift of the logit-normal training times; above 1 more of them are noisy, where the
    prompt decides what is drawn (letters most of all)."""
    optim: TeachOptim = TeachOptim()
    budget: TeachBudget
    ema: Fraction = 0.998
    precision: Literal["bf16", "fp32"] = "bf16"
    log: TeachLog = TeachLog()

    def conditions(self) -> tuple[tuple[Task, str], ...]:
        """Every (task, category) with a share of the training, in the order of the file."""
        trained: list[tuple[Task, str]] = [
            (task, category)
            for task, weights in self.composition.items()
            for category, weight in weights.items()
            if weight > 0 and self.mixture.get(task, 0) > 0
        ]
        return tuple(trained)

    def content_hash(self) -> str:
        """16 hex digits over every field that decides the teacher: not name or log."""
        content = self.model_dump(mode="json", exclude={"name", "log"})
        return hash_of(content, content["source"])


def check_teach(recipe: TeachRecipe) -> None:
    """Refusals that need no data: tasks without categories, unknown categories, no `init`."""
    for task, share in recipe.mixture.items():
        if share > 0 and not any(recipe.composition.get(task, {}).values()):
            raise RecipeError(
                f"{task} has a share of the mixture, but no category has a weight",
                field=f"composition.{task}",
                hint=f"give one a weight, or set mixture.{task}: 0",
            )
    if not recipe.conditions():
        raise RecipeError("no task has a share", field="mixture", hint="such as {t2i: 1, edit: 1}")
    for task, category in recipe.conditions():
        if recipe.source.kind == "lab" and category not in LAB_CATEGORIES[task]:
            raise RecipeError(
                f"the lab has no {task} category {category!r}",
                field=f"composition.{task}",
                hint=did_you_mean(category, LAB_CATEGORIES[task]),
            )
    if recipe.init and not weights_path(recipe.init).is_file():
        raise RecipeError(
            f"there is no file {weights_path(recipe.init)}",
            field="init",
            hint="use bundled:base, a path or null",
        )
