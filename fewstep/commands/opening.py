"""What a recipe or a run folder names: its networks, its domain, its plan; no weight is loaded."""

from pathlib import Path

import torch
from pydantic import ValidationError

from fewstep.domain import TeachableDomain
from fewstep.ensemble import Ensemble, LabEnsemble
from fewstep.errors import RunError
from fewstep.models.sharding import Shards
from fewstep.real.pipelines import Pipelines
from fewstep.recipe.load import load_recipe
from fewstep.recipe.plan import Plan
from fewstep.recipe.schema import FolderSource, ImageSource, PromptSource, Recipe
from fewstep.session import compute_device


def open_ensemble(recipe: Recipe, shards: Shards | None = None) -> Ensemble:
    """The networks of a recipe, and through them its domain; `shards` splits those of a cast."""
    if recipe.model.is_real:
        from fewstep.real.ensemble import RealEnsemble

        pipelines = open_pipelines(recipe)
        if shards:
            pipelines.load_on = torch.device("cpu")
        return RealEnsemble(recipe, pipelines, shards)
    source = recipe.data.source
    assert not isinstance(source, PromptSource), "refused by the plan"
    return LabEnsemble(recipe, lambda: open_domain(source))


def open_pipelines(recipe: Recipe) -> Pipelines:
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    return Pipelines(recipe.model, dtype, compute_device())


def open_domain(source: ImageSource) -> TeachableDomain:
    if isinstance(source, FolderSource):
        from fewstep.data.domain import FolderDomain

        return FolderDomain.open(source)
    from fewstep.lab.domain import LabDomain

    return LabDomain()


def read_run(run_dir: Path) -> tuple[Recipe, Plan]:
    """Recipe and plan of a distillation's folder. Raises RunError when it holds none."""
    if not run_dir.is_dir():
        raise RunError(f"run folder {run_dir}: there is none")
    if not (run_dir / "plan.json").is_file():
        hint = "give a folder that `fewstep distill` wrote"
        if (run_dir / "teacher.safetensors").is_file():
            hint = "it holds a teacher; distil it first, its pictures are in images/"
        raise RunError(f"run folder {run_dir}: no plan.json in it; {hint}")
    try:
        plan = Plan.model_validate_json((run_dir / "plan.json").read_bytes())
    except ValidationError as error:
        raise RunError(
            f"run folder {run_dir}: its plan.json is damaged ({error.errors()[0]['msg']}); "
            "`fewstep distill` with --resume writes it again"
        ) from None
    return load_recipe(run_dir / "recipe.yaml"), plan
