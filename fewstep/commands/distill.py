"""`fewstep distill`: recipe -> plan -> networks and prompts -> student -> evaluation and report."""

import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from fewstep.commands.evaluate import evaluate
from fewstep.commands.opening import open_ensemble
from fewstep.contestants import NO_GUIDANCE, sampler
from fewstep.data.conditions import release_memory
from fewstep.data.pools import AnyPool
from fewstep.domain import Domain
from fewstep.ensemble import Ensemble
from fewstep.evals.preview import Preview
from fewstep.evals.probe import Probe
from fewstep.evals.runner import Draw
from fewstep.judges.endpoint import open_judge
from fewstep.recipe.facts import local_machine
from fewstep.recipe.load import dump_yaml, load_recipe
from fewstep.recipe.plan import Plan, make_plan
from fewstep.recipe.render import render_plan
from fewstep.recipe.schema import WITH_REAL_IMAGES, Recipe
from fewstep.session import Clock, claim, console, progress, save_image, say, write_text
from fewstep.train import loop
from fewstep.train.ranks import Ranks, joined
from fewstep.train.sharding import gathered, is_sharded, open_shards

SHOWN = ("loss/fake", "grad_norm/student", "grad_norm/fake")
"""Metrics that are told with the progress."""


def distill(
    recipe_path: Path,
    *,
    out: Path,
    overrides: Mapping[str, str],
    resume: bool = False,
    dry_run: bool = False,
) -> None:
    """Recipe -> student, evaluation and report in `out`; one of several ranks under torchrun."""
    with joined(os.environ) as ranks, ranks.folder(out) as own:
        console.quiet = not ranks.is_lead
        recipe, plan = ranks.collect(lambda: [read_and_plan(recipe_path, overrides, ranks)])[0]
        console.print(render_plan(plan))
        if not dry_run:
            ensemble = train(recipe, plan, ranks, out, own, resume=resume)
            if ranks.is_lead and plan.evaluates:
                release_memory()  # of a cast in parts
                evaluate(out, ensemble)


def train(
    recipe: Recipe, plan: Plan, ranks: Ranks, out: Path, own: Path, *, resume: bool
) -> Ensemble | None:
    """From the plan to the student's file. `own` is where this rank writes: `out` for the lead.

    Returns the networks, to be evaluated with; none where they lie in parts on all ranks.
    """
    shards = open_shards(recipe, ranks)
    ensemble = open_ensemble(recipe, shards)

    def begin() -> list[None]:
        if ranks.is_lead:
            open_judge(recipe.evaluation.judge, os.environ)  # for its refusals
            claim(out, identity_of(recipe, plan, ensemble), resume=resume)
        return []

    ranks.collect(begin)
    write_text(own / "recipe.yaml", dump_yaml(recipe))
    write_text(own / "plan.json", plan.model_dump_json(indent=2))
    clock = Clock(own)
    torch.manual_seed(recipe.seed)
    if shards and not ranks.is_lead and (out / "probe/teacher").is_dir():
        shutil.copytree(out / "probe/teacher", own / "probe/teacher")  # all draw it again, or none

    with clock("prepare data and teachers"):
        domain = ensemble.open_domain()
        pools = ranks.lead_first(lambda: make_pools(recipe, domain, clock))
        cast = ensemble.cast(needed(recipe, plan))
        state = loop.Distillation(cast, pools, recipe, plan, domain.sample_shape, ranks)
        preview = ranks.lead_first(lambda: make_preview(recipe, domain))
        probe = make_probe(recipe, ensemble, domain, own)
    if resume:
        say(loop.resume(state, out))
        say(f"resumed at update {state.step} of {plan.updates}")
    with clock("distil"), progress("distil", plan.updates, state.step) as advance:

        def on_step(step: int, metrics: Mapping[str, float]) -> None:
            advance(step, " ".join(f"{k} {metrics[k]:.3f}" for k in SHOWN if k in metrics))

        def on_sample(step: int) -> None:
            with playing(state, ensemble) as draw:
                save_image(preview.draw(draw), own / "images" / f"step_{step:06d}.png")

        def on_probe(step: int) -> dict[str, float]:
            if probe is None:
                return {}
            with playing(state, ensemble) as draw:
                found = probe.measure(step, draw)
            say(probe.alarm(step, found))
            return found

        loop.distil(state, own, on_step=on_step, on_sample=on_sample, on_probe=on_probe)
    if not (ranks.is_lead or shards):
        return None
    save_student(state, ensemble, out)
    samples = plan.updates * plan.batch.batch
    clock.note(updates=plan.updates, recipe_hash=plan.recipe_hash, samples=samples)
    return None if shards else ensemble


def read_and_plan(
    recipe_path: Path, overrides: Mapping[str, str], ranks: Ranks
) -> tuple[Recipe, Plan]:
    """With measured sizes where networks are too large to find out by trying."""
    recipe = load_recipe(recipe_path, overrides)
    if not recipe.model.is_real:
        return recipe, make_plan(recipe, local_machine(ranks.world))
    from fewstep.real.size import plan_real

    return recipe, plan_real(recipe, devices=ranks.world)


def identity_of(recipe: Recipe, plan: Plan, ensemble: Ensemble) -> dict[str, str]:
    """What decides the student: the recipe, and the weights that it names."""
    stamps = {f"teachers.{n}.weights": ensemble.teacher_identity(n) for n in needed(recipe, plan)}
    return {"recipe": plan.recipe_hash} | stamps


def needed(recipe: Recipe, plan: Plan) -> list[str]:
    """The teachers to load: those that a condition or the anchor uses, and the student's start."""
    return sorted({*plan.teachers, recipe.student.init})


def make_pools(recipe: Recipe, domain: Domain, clock: Clock) -> dict[str, AnyPool]:
    """Every pool that has a share of the mixture; the summary says how long each took."""
    used = {
        name
        for task in recipe.data.trained()
        for name, weight in recipe.data.composition[task].items()
        if weight > 0
    }
    pools = {n: p for n, p in recipe.data.pools.items() if n in used}
    images = isinstance(recipe.objective, WITH_REAL_IMAGES)
    made, seconds = {}, {}
    with progress("encode prompts and sources", sum(p.size for p in pools.values())) as advance:
        done = 0
        for name, pool in pools.items():
            begun = time.monotonic()
            made[name] = domain.pool(
                pool.category, pool.size, recipe.seed, task=pool.task, targets=images
            )
            seconds[name] = round(time.monotonic() - begun, 4)
            done += pool.size
            advance(done, name)
    clock.note(pools=seconds)
    return made


def make_preview(recipe: Recipe, domain: Domain) -> Preview:
    return Preview(
        domain,
        recipe.data.conditions(),
        recipe.log.sample_seeds,
        seed=recipe.seed + 77,
        batch=recipe.images_at_once,
    )


def make_probe(recipe: Recipe, ensemble: Ensemble, domain: Domain, out: Path) -> Probe | None:
    """What `log.probe` asks for, of the tasks that are trained and that the base teacher knows."""
    if recipe.log.probe is None:
        return None
    teacher = recipe.teachers[recipe.student.init]
    tasks = recipe.data.trained().keys() & set(teacher.tasks)
    conditions = [c for c in recipe.data.conditions() if c[0] in tasks]
    name = recipe.student.init
    base, grid = ensemble.teacher(name), ensemble.teacher_grid(name, teacher.steps)
    draw = sampler(base, teacher.cfg, grid, recipe.precision, ensemble.device)
    return Probe(
        domain,
        conditions,
        recipe.log.probe,
        draw,
        seed=recipe.seed + 78,
        batch=recipe.images_at_once,
        out=out / "probe",
    )


@contextmanager
def playing(state: loop.Distillation, ensemble: Ensemble) -> Iterator[Draw]:
    """The averaged student on its grid, as the finished one will be played."""
    grid, precision = state.plan.grid, state.recipe.precision
    with loop.averaged_student(state) as student:
        yield sampler(student, NO_GUIDANCE, grid, precision, ensemble.device)


def save_student(state: loop.Distillation, ensemble: Ensemble, out: Path) -> None:
    about = {
        "recipe": state.recipe.name,
        "recipe_hash": state.plan.recipe_hash,
        "updates": state.plan.updates,
        "grid": state.plan.grid,
    }
    lead = state.ranks.is_lead
    with loop.averaged_student(state) as student:
        whole = gathered(student, keep=lead) if is_sharded(student) else student
        if lead:
            ensemble.save(whole, out / "student.safetensors", about)
