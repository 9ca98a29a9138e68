"""How many images an evaluation has and what its judge is asked, before anything is drawn."""

from fewstep.endpoint import check_address
from fewstep.recipe.schema import Recipe, Strict

GREETING = 2
"""Requests that find out whether the judge answers and sees."""


class JudgePlan(Strict):
    model: str
    images: int
    """To be judged, if the evaluation split has as many cases as are asked for."""
    requests: int
    """Without those that are sent again."""
    parallel: int


def plan_judge(recipe: Recipe, *, steps: int) -> JudgePlan | None:
    """None where no endpoint is asked; RecipeError for an address that is none. `steps` is K."""
    judge = recipe.evaluation.judge
    if judge is None:
        return None
    check_address(judge.url, field="evaluation.judge.url", key_name="the variable of key_env")
    images = count_images(recipe, steps=steps)
    return JudgePlan(
        model=judge.model,
        images=images,
        requests=images * judge.repeats + GREETING,
        parallel=judge.parallel,
    )


def count_images(recipe: Recipe, *, steps: int) -> int:
    """Images of the evaluation, as `contestants.make_contestants` plays `evaluation.models`."""
    spec = recipe.evaluation
    cases = spec.per_category * spec.seeds_per_case
    players = 0
    for task, _ in recipe.data.conditions():
        for model in spec.models:
            kind, _, name = model.partition(":")
            if kind == "student":
                players += 1
            elif task in recipe.teachers[name or recipe.student.init].tasks:
                # At the student's NFE a teacher is cut in two ways where K is even.
                players += 2 if kind == "teacher_cut" and steps % 2 == 0 else 1
    return players * cases
