"""`fewstep teach`: a multi-step teacher by flow matching."""

from collections.abc import Mapping
from pathlib import Path

import torch

from fewstep.commands.opening import open_domain
from fewstep.contestants import sampler
from fewstep.core.types import Task
from fewstep.data.pools import Pool
from fewstep.domain import TeachableDomain
from fewstep.ensemble import load_fitting
from fewstep.errors import RecipeError
from fewstep.evals.preview import Preview
from fewstep.models.lab import MMDiT, MMDiTConfig, save_weights
from fewstep.recipe.facts import weights_path
from fewstep.recipe.load import dump_yaml, load_yaml
from fewstep.recipe.schema import IMAGES_AT_ONCE
from fewstep.recipe.teach import TeachRecipe, check_teach
from fewstep.samplers import shifted_grid
from fewstep.session import (
    Clock,
    claim,
    compute_device,
    device_name,
    progress,
    save_image,
    say,
    stamp_of,
    write_text,
)
from fewstep.train import teach as teaching

PREVIEW_CFG: Mapping[Task, float] = {"t2i": 2.5, "edit": 2.0}


def teach(config: Path, *, out: Path, overrides: Mapping[str, str], resume: bool = False) -> None:
    """Train a multi-step teacher by flow matching; its weights are `out/teacher.safetensors`."""
    recipe = load_yaml(config, TeachRecipe, overrides)
    check_teach(recipe)
    init = {"init": stamp_of(weights_path(recipe.init))} if recipe.init else {}
    claim(out, {"recipe": recipe.content_hash()} | init, resume=resume)
    write_text(out / "recipe.yaml", dump_yaml(recipe))
    clock = Clock(out)
    torch.manual_seed(recipe.seed)
    with clock("prepare data"):
        domain = open_domain(recipe.source)
        model = make_teacher(recipe, domain)
        pools = make_pools(recipe, domain)
        state = teaching.Teaching(model, pools, recipe)
        conditions, seed = recipe.conditions(), recipe.seed + 77
        preview = Preview(domain, conditions, 8, seed=seed, batch=IMAGES_AT_ONCE)
    if resume:
        say(teaching.resume(state, out))
        say(f"resumed at update {state.step} of {recipe.budget.updates}")
    with clock("teach"), progress("teach", recipe.budget.updates, state.step) as advance:

        def on_step(step: int, metrics: Mapping[str, float]) -> None:
            advance(step, " ".join(f"{k} {v:.3g}" for k, v in metrics.items()))

        def on_sample(step: int, averaged: MMDiT) -> None:
            grid = shifted_grid(20, 2.0)
            draw = sampler(averaged, PREVIEW_CFG, grid, recipe.precision, compute_device())
            save_image(preview.draw(draw), out / "images" / f"step_{step:06d}.png")

        teaching.teach(state, out, on_step=on_step, on_sample=on_sample)
    save_teacher(state, clock, out / "teacher.safetensors")
    clock.note(updates=recipe.budget.updates)
    say(f"teacher written to {out / 'teacher.safetensors'}")


def make_teacher(recipe: TeachRecipe, domain: TeachableDomain) -> MMDiT:
    """A new network for the domain, or the one of `init`."""
    if recipe.init:
        return load_fitting(weights_path(recipe.init), domain, field="init").train()
    channels, side, _ = domain.sample_shape
    n = recipe.network
    if side % n.patch or n.width % n.heads:
        raise RecipeError(
            f"width {n.width}, heads {n.heads}, patch {n.patch} do not fit {side} x {side} latents",
            field="network",
            hint=f"heads must divide width and patch must divide {side}",
        )
    sizes = n.model_dump() | domain.text_sizes()
    model = MMDiT(MMDiTConfig(channels=channels, grid=side, **sizes))
    return model.to(compute_device())


def make_pools(recipe: TeachRecipe, domain: TeachableDomain) -> dict[tuple[Task, str], Pool]:
    """Prompts and images of every task and category."""
    pools: dict[tuple[Task, str], Pool] = {}
    conditions = recipe.conditions()
    with progress("render and encode", len(conditions)) as advance:
        for task, category in conditions:
            pools[task, category] = domain.pool(
                category, recipe.pool_size, recipe.seed, task=task, targets=True
            )
            advance(len(pools), category)
    return pools


def save_teacher(state: teaching.Teaching, clock: Clock, path: Path) -> None:
    """The averaged weights in half precision, and where they come from."""
    recipe = state.recipe
    save_weights(
        teaching.averaged(state),
        path,
        config=state.model.config,
        about={
            "recipe": recipe.name,
            "updates": recipe.budget.updates,
            "images": recipe.budget.updates * recipe.budget.batch,
            "seed": recipe.seed,
            "init": recipe.init,
            "device": device_name(),
            "seconds": clock.seconds,
        },
        half=True,
    )
