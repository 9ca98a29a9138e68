"""The models of a run, each with its way of playing: the student on its grid, teachers with CFG.

What is done with them, samples or an evaluation, is the business of `commands` and `evals`.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fewstep.core.types import Condition, Denoiser, Task
from fewstep.ensemble import Ensemble
from fewstep.errors import RecipeError, RunError, did_you_mean
from fewstep.evals.runner import Contestant, Draw
from fewstep.guidance import classifier_free
from fewstep.recipe.plan import Plan
from fewstep.recipe.schema import Recipe
from fewstep.samplers import sample, shifted_grid
from fewstep.session import stamp, stamp_of


def make_contestants(
    run_dir: Path, recipe: Recipe, plan: Plan, ensemble: Ensemble
) -> list[Contestant]:
    """The models that `evaluation.models` names."""
    found: list[Contestant] = []
    for wanted in recipe.evaluation.models:
        kind, _, name = wanted.partition(":")
        name = name or recipe.student.init
        if kind == "student":
            found.append(play_student(student_weights(run_dir), recipe, plan, ensemble))
        elif kind == "teacher":
            found.append(play_teacher(name, recipe, ensemble))
        else:
            found += play_cut_teacher(name, recipe, plan, ensemble)
    names = [contestant.name for contestant in found]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise RecipeError(
            f"two of them are called {twice[0]}, by teacher and evaluations",
            field="evaluation.models",
            hint="leave one out, or give the teacher other steps",
        )
    return found


def play_student(weights: Path, recipe: Recipe, plan: Plan, ensemble: Ensemble) -> Contestant:
    """The student on the grid it was trained on, without guidance."""
    k = len(plan.grid)
    model = ensemble.student(weights)
    return Contestant(
        f"student-{k}nfe",
        {"t2i": k, "edit": k},
        sampler(model, NO_GUIDANCE, plan.grid, recipe.precision, ensemble.device),
        stamp_of(weights, plan.grid, recipe.precision),
    )


def play_teacher(
    name: str, recipe: Recipe, ensemble: Ensemble, *, steps: int | None = None
) -> Contestant:
    """A teacher with its own guidance and grid, in `steps` or in as many as the recipe says."""
    if name not in recipe.teachers:
        raise RecipeError(
            f"there is no teacher {name!r}",
            field="teachers",
            hint=did_you_mean(name, recipe.teachers),
        )
    teacher, label = recipe.teachers[name], label_of(name, recipe)
    model, own = ensemble.teacher(name), ensemble.teacher_identity(name)
    grid = ensemble.teacher_grid(name, steps or teacher.steps)
    nfe = evaluations(teacher.cfg, len(grid))
    return Contestant(
        f"{label}-{max(nfe.values())}nfe",
        nfe,
        sampler(model, teacher.cfg, grid, recipe.precision, ensemble.device),
        stamp(own, grid, teacher.cfg, recipe.precision),
    )


def play_cut_teacher(name: str, recipe: Recipe, plan: Plan, ensemble: Ensemble) -> list[Contestant]:
    """A teacher at the student's evaluations: every step without guidance, or half of them with."""
    teacher, label, k = recipe.teachers[name], label_of(name, recipe), len(plan.grid)
    model, own = ensemble.teacher(name), ensemble.teacher_identity(name)
    found = [
        Contestant(
            f"{label}-{k}nfe",
            dict.fromkeys(teacher.tasks, k),
            sampler(model, NO_GUIDANCE, plan.grid, recipe.precision, ensemble.device),
            stamp(own, plan.grid, recipe.precision),
        )
    ]
    if k % 2 == 0:
        half = shifted_grid(k // 2, 3.0)
        found.append(
            Contestant(
                f"{label}-{k // 2}x2nfe",
                evaluations(teacher.cfg, k // 2),
                sampler(model, teacher.cfg, half, recipe.precision, ensemble.device),
                stamp(own, half, teacher.cfg, recipe.precision),
            )
        )
    return found


NO_GUIDANCE: Mapping[Task, float] = {"t2i": 1.0, "edit": 1.0}


def sampler(
    model: Denoiser,
    cfg: Mapping[Task, float],
    grid: tuple[float, ...],
    precision: str,
    device: torch.device,
) -> Draw:
    @torch.inference_mode()
    def draw(noise: Tensor, cond: Condition, task: Task) -> Tensor:
        def guided(x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
            return classifier_free(model, x_t, t, c, cfg[task])

        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            return sample(guided, noise.to(device), cond.to(device), grid).cpu()

    return draw


def evaluations(cfg: Mapping[Task, float], steps: int) -> dict[Task, int]:
    return {task: steps * (1 if scale == 1 else 2) for task, scale in cfg.items()}


def label_of(name: str, recipe: Recipe) -> str:
    return "teacher" if name == recipe.student.init else f"teacher-{name}"


def student_weights(run_dir: Path) -> Path:
    """The finished student of a run folder."""
    path = run_dir / "student.safetensors"
    if not path.is_file():
        raise RunError(
            f"run folder {run_dir}: its student is not finished; `fewstep distill "
            f"{run_dir / 'recipe.yaml'} --out {run_dir} --resume` goes on"
        )
    return path
