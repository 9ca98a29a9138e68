"""`fewstep sample`: a user's prompts, or edits of a user's image, drawn by a model of a run."""

from pathlib import Path

import torch
from PIL import Image

from fewstep.commands.opening import open_ensemble, read_run
from fewstep.contestants import play_student, play_teacher, student_weights
from fewstep.core.types import Task
from fewstep.ensemble import Ensemble
from fewstep.errors import RecipeError, RunError
from fewstep.evals.grid import grid
from fewstep.evals.runner import Contestant
from fewstep.inputs import check_picture, open_source, read_prompts
from fewstep.recipe.plan import Plan
from fewstep.recipe.schema import Recipe
from fewstep.session import save_image, say

MOST_PICTURES = 1024
"""In one grid, which is one file and is held in memory as a whole."""


def sample(
    run_or_weights: Path,
    *,
    prompts: list[str],
    prompt_file: Path | None,
    source: Path | None,
    instruction: str | None,
    seeds: list[int],
    out: Path,
    model: str,
    steps: int | None,
) -> None:
    """A grid of images: one row a prompt, one column a seed."""
    check_picture(out)
    if not run_or_weights.exists():
        raise RunError(f"{run_or_weights}: there is no such run folder or weight file")
    recipe, plan = read_run(run_or_weights if run_or_weights.is_dir() else run_or_weights.parent)
    texts = [instruction] if instruction is not None else prompts + read_prompts(prompt_file)
    if len(texts) * len(seeds) > MOST_PICTURES:
        raise RecipeError(
            f"{len(texts)} prompts x {len(seeds)} seeds are more pictures than one grid can show",
            field="--seeds",
            hint=f"ask for at most {MOST_PICTURES} at a time",
        )
    ensemble = open_ensemble(recipe)
    domain = ensemble.open_domain()
    pixels = open_source(source, domain.image_size) if source else None
    player = choose_player(run_or_weights, recipe, plan, ensemble, model=model, steps=steps)
    task: Task = "t2i" if pixels is None else "edit"
    if task not in player.nfe:
        raise RecipeError(f"{player.name} was not trained for {task}", field="--model")
    parts = torch.stack([domain.noise(seed) for seed in seeds]).split(recipe.images_at_once)
    conditions = [
        [
            domain.condition([text] * len(part), None if pixels is None else [pixels] * len(part))
            for part in parts
        ]
        for text in texts
    ]
    shown = [] if pixels is None else [Image.fromarray(pixels)]
    rows = []
    for conds in conditions:
        drawn = [domain.decode(player.draw(*part, task)) for part in zip(parts, conds, strict=True)]
        rows.append([*shown, *(Image.fromarray(image) for images in drawn for image in images)])
    columns = [*(["source"] if shown else []), *(f"seed {seed}" for seed in seeds)]
    scale = max(1, 128 // rows[0][0].width)
    save_image(grid(rows, row_labels=texts, column_labels=columns, scale=scale), out)
    say(f"{len(texts) * len(seeds)} images by {player.name}: {out}")


def choose_player(
    run_or_weights: Path,
    recipe: Recipe,
    plan: Plan,
    ensemble: Ensemble,
    *,
    model: str,
    steps: int | None,
) -> Contestant:
    """What `--model` and `--steps` ask for."""
    kind, _, name = model.partition(":")
    if kind == "teacher":
        if not run_or_weights.is_dir():
            raise RecipeError(
                f"{run_or_weights} is a weight file, which is taken for the student's",
                field="--model",
                hint=f"give the run folder {run_or_weights.parent} for a teacher",
            )
        return play_teacher(name or recipe.student.init, recipe, ensemble, steps=steps)
    if model != "student":
        raise RecipeError(
            f"{model!r} is no model", field="--model", hint="use student, teacher or teacher:<name>"
        )
    if steps not in (None, len(plan.grid)):
        raise RecipeError(
            f"{steps} steps of a student trained for {len(plan.grid)}",
            field="--steps",
            hint="leave it out, or use --model teacher",
        )
    path = student_weights(run_or_weights) if run_or_weights.is_dir() else run_or_weights
    return play_student(path, recipe, plan, ensemble)
