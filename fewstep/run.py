"""What each command does, top to bottom. The only module that knows every name."""

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import torch
from PIL import Image
from pydantic import ValidationError
from rich.table import Table

from fewstep.contestants import (
    NO_GUIDANCE,
    make_contestants,
    play_student,
    play_teacher,
    sampler,
    student_weights,
)
from fewstep.core.types import Task
from fewstep.data.pools import AnyPool, Pool
from fewstep.domain import Domain, TeachableDomain
from fewstep.ensemble import Ensemble, LabEnsemble, load_fitting
from fewstep.errors import RecipeError, RunError
from fewstep.evals.grid import grid
from fewstep.evals.preview import Preview
from fewstep.evals.probe import Probe
from fewstep.evals.report import write_report
from fewstep.evals.runner import Contestant, forget_changed, noise_of, sources_of
from fewstep.evals.runner import evaluate as run_evaluation
from fewstep.export import write as exporting
from fewstep.export.run_folder import read_history, read_student
from fewstep.export.schedule import SCHEDULER
from fewstep.inputs import check_picture, open_source, read_prompts
from fewstep.models.lab import MMDiT, MMDiTConfig, save_weights
from fewstep.real.pipelines import Pipelines
from fewstep.recipe.facts import local_machine, weights_path
from fewstep.recipe.load import dump_yaml, load_recipe, load_yaml
from fewstep.recipe.plan import Plan, make_plan
from fewstep.recipe.render import render_plan
from fewstep.recipe.schema import (
    LAB_CATEGORIES,
    WITH_REAL_IMAGES,
    FolderSource,
    ImageSource,
    PromptSource,
    Recipe,
)
from fewstep.recipe.teach import TeachRecipe, check_teach
from fewstep.samplers import shifted_grid
from fewstep.session import (
    Clock,
    claim,
    compute_device,
    console,
    device_name,
    progress,
    save_image,
    say,
    stamp_of,
    write_text,
)
from fewstep.train import loop
from fewstep.train import teach as teaching

# --- distill --------------------------------------------------------------------------------------


def distill(
    recipe_path: Path,
    *,
    out: Path,
    overrides: Mapping[str, str],
    resume: bool = False,
    dry_run: bool = False,
) -> None:
    """Recipe -> student, evaluation and report in `out`."""
    recipe = load_recipe(recipe_path, overrides)
    plan = plan_of(recipe)
    console.print(render_plan(plan))
    if dry_run:
        return
    ensemble = open_ensemble(recipe)
    claim(out, identity_of(recipe, plan, ensemble), resume=resume)
    write_text(out / "recipe.yaml", dump_yaml(recipe))
    write_text(out / "plan.json", plan.model_dump_json(indent=2))
    clock = Clock(out)
    torch.manual_seed(recipe.seed)

    with clock("prepare data and teachers"):
        domain = ensemble.open_domain()
        pools = make_pools(recipe, domain, clock)
        cast = ensemble.cast(needed(recipe, plan))
        state = loop.Distillation(cast, pools, recipe, plan, domain.sample_shape)
        preview = Preview(
            domain, recipe.data.conditions(), recipe.log.sample_seeds, seed=recipe.seed + 77
        )
        probe = make_probe(recipe, ensemble, domain, out)
    if resume:
        say(loop.resume(state, out))
        say(f"resumed at update {state.step} of {plan.updates}")
    with clock("distil"), progress("distil", plan.updates, state.step) as advance:

        def on_step(step: int, metrics: Mapping[str, float]) -> None:
            advance(step, " ".join(f"{k} {metrics[k]:.3f}" for k in SHOWN if k in metrics))

        def on_sample(step: int) -> None:
            with loop.averaged_student(state) as student:
                draw = sampler(student, NO_GUIDANCE, plan.grid, recipe.precision, ensemble.device)
                save_image(preview.draw(draw), out / "images" / f"step_{step:06d}.png")

        def on_probe(step: int) -> dict[str, float]:
            if probe is None:
                return {}
            with loop.averaged_student(state) as student:
                draw = sampler(student, NO_GUIDANCE, plan.grid, recipe.precision, ensemble.device)
                found = probe.measure(step, draw)
            say(probe.alarm(step, found))
            return found

        loop.distil(state, out, on_step=on_step, on_sample=on_sample, on_probe=on_probe)
    about = {
        "recipe": recipe.name,
        "recipe_hash": plan.recipe_hash,
        "updates": plan.updates,
        "grid": plan.grid,
    }
    with loop.averaged_student(state) as student:
        ensemble.save(student, out / "student.safetensors", about)
    samples = plan.updates * plan.batch.batch
    clock.note(updates=plan.updates, recipe_hash=plan.recipe_hash, samples=samples)
    evaluate(out, ensemble)


def plan_of(recipe: Recipe) -> Plan:
    """With measured sizes where networks are too large to find out by trying."""
    if not recipe.model.is_real:
        return make_plan(recipe, local_machine())
    from fewstep.real.size import plan_real

    return plan_real(recipe)


SHOWN = ("loss/fake", "grad_norm/student", "grad_norm/fake")


def make_probe(recipe: Recipe, ensemble: Ensemble, domain: Domain, out: Path) -> Probe | None:
    """What `log.probe` asks for, of the tasks that are trained and that the base teacher knows."""
    if recipe.log.probe is None:
        return None
    teacher = recipe.teachers[recipe.student.init]
    trained = {task for task, share in recipe.data.mixture.items() if share > 0}
    conditions = [c for c in recipe.data.conditions() if c[0] in trained & set(teacher.tasks)]
    name = recipe.student.init
    base, grid = ensemble.teacher(name), ensemble.teacher_grid(name, teacher.steps)
    draw = sampler(base, teacher.cfg, grid, recipe.precision, ensemble.device)
    return Probe(
        domain, conditions, recipe.log.probe, draw, seed=recipe.seed + 78, out=out / "probe"
    )


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
        for task, composition in recipe.data.composition.items()
        if recipe.data.mixture.get(task, 0) > 0
        for name, weight in composition.items()
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


# --- teach ----------------------------------------------------------------------------------------


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
        pools: dict[tuple[Task, str], Pool] = {}
        conditions = recipe.conditions()
        with progress("render and encode", len(conditions)) as advance:
            for task, category in conditions:
                pools[task, category] = domain.pool(
                    category, recipe.pool_size, recipe.seed, task=task, targets=True
                )
                advance(len(pools), category)
        state = teaching.Teaching(model, pools, recipe)
        preview = Preview(domain, conditions, 8, seed=recipe.seed + 77)
    if resume:
        say(teaching.resume(state, out))
        say(f"resumed at update {state.step} of {recipe.budget.updates}")
    with clock("teach"), progress("teach", recipe.budget.updates, state.step) as advance:

        def on_step(step: int, metrics: Mapping[str, float]) -> None:
            advance(step, " ".join(f"{k} {v:.3g}" for k, v in metrics.items()))

        def on_sample(step: int, averaged: MMDiT) -> None:
            cfg: dict[Task, float] = {"t2i": 2.5, "edit": 2.0}
            draw = sampler(averaged, cfg, shifted_grid(20, 2.0), recipe.precision, compute_device())
            save_image(preview.draw(draw), out / "images" / f"step_{step:06d}.png")

        teaching.teach(state, out, on_step=on_step, on_sample=on_sample)
    save_weights(
        teaching.averaged(state),
        out / "teacher.safetensors",
        config=model.config,
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


# --- evaluate and report --------------------------------------------------------------------------

SEED_STRIDE = 1_000_003
"""Between the seeds of one case, so that no two cases share one."""


def evaluate(run_dir: Path, ensemble: Ensemble | None = None) -> None:
    """Judge student and teachers on the evaluation split and write the report."""
    recipe, plan = read_run(run_dir)
    make_plan(recipe, local_machine())  # for its refusals: `evaluation` may have been edited
    clock = Clock(run_dir)
    ensemble = ensemble or open_ensemble(recipe)
    domain, spec = ensemble.open_domain(), recipe.evaluation
    cases = [
        replace(case, seed=case.seed + SEED_STRIDE * again)
        for task, category in recipe.data.conditions()
        for case in domain.cases(task, category, spec.per_category, spec.seed)
        for again in range(spec.seeds_per_case)
    ]
    contestants = make_contestants(run_dir, recipe, plan, ensemble)
    for name, rows in forget_changed(contestants, run_dir / "eval").items():
        say(f"{name} is not what was scored here before: its {rows} images are drawn again")
    images = sum(case.task in player.nfe for player in contestants for case in cases)
    with clock("evaluate"), progress("evaluate", images) as advance:
        run_evaluation(
            cases,
            contestants,
            domain,
            run_dir / "eval",
            on_progress=lambda done, _total, name: advance(done, name),
        )
    report(run_dir)


def report(run_dir: Path) -> None:
    """report.html, results.md and results.csv of an evaluated run."""
    if not run_dir.is_dir():
        raise RunError(
            f"run folder {run_dir}: there is none; `fewstep distill RECIPE --out {run_dir}` makes "
            "it"
        )
    if not any((run_dir / name).exists() for name in ("recipe.yaml", "metrics.jsonl", "eval")):
        raise RunError(
            f"run folder {run_dir}: nothing to report in it; give a folder that `fewstep distill` "
            "wrote"
        )
    paths = write_report(run_dir)
    console.print(paths.markdown.read_text(), markup=False, highlight=False)
    say(f"report: {paths.html}")


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


# --- export ---------------------------------------------------------------------------------------


def export(
    run_dir: Path, *, to: str, out: Path | None, dtype: str | None, base: Path | None
) -> None:
    """The finished student as files that stock tools read."""
    out = run_dir / "export" / to if out is None else out
    exporting.check_request(to, dtype, out)
    recipe, plan = read_run(run_dir)
    student = read_student(student_weights(run_dir), recipe, base=base)
    history = read_history(run_dir, recipe, plan)
    playback = exporting.export(student, history, out, to=to, dtype=dtype)
    if playback.sigmas is not None:
        say(f"{SCHEDULER} cannot hold this grid: every call needs sigmas={list(playback.sigmas)}")
    say(f"exported for {to}: {out}, README.md says how to use it")


# --- sample ---------------------------------------------------------------------------------------


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
    ensemble = open_ensemble(recipe)
    domain = ensemble.open_domain()
    pixels = open_source(source, domain.image_size) if source else None
    player = choose_player(run_or_weights, recipe, plan, ensemble, model=model, steps=steps)
    task: Task = "t2i" if pixels is None else "edit"
    if task not in player.nfe:
        raise RecipeError(f"{player.name} was not trained for {task}", field="--model")
    conditions = [
        domain.condition([text] * len(seeds), None if pixels is None else [pixels] * len(seeds))
        for text in texts
    ]
    noise = torch.stack([domain.noise(seed) for seed in seeds])
    shown = [] if pixels is None else [Image.fromarray(pixels)]
    rows = []
    for cond in conditions:
        images = domain.decode(player.draw(noise, cond, task))
        rows.append([*shown, *(Image.fromarray(image) for image in images)])
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


# --- the lab --------------------------------------------------------------------------------------


def lab_words() -> None:
    """Every word that a prompt of the lab may use, and what signs can say."""
    from fewstep.lab.glyphs import LETTERS
    from fewstep.lab.grammar import vocabulary

    say(" ".join(word for word in vocabulary() if ":" not in word))
    say(f'signs: 1 to 5 letters of {LETTERS} in double quotes, such as " COFFE "')


def lab_score(weights: Path, *, per_category: int, seed: int, steps: int, train: bool) -> None:
    """Judge a lab teacher category by category, with the guidance of `recipes/lab/unified.yaml`."""
    from fewstep.lab.domain import LabDomain

    domain = LabDomain()
    model = load_fitting(weights, domain, field="weights")
    cfg: dict[Task, float] = {"t2i": 3.0, "edit": 2.0}
    draw = sampler(model, cfg, shifted_grid(steps, 3.0), "bf16", compute_device())
    split = "training" if train else "evaluation"
    table = Table("task", "category", "score (1-5)", "95 %", title=f"{weights.name}, {split} split")
    means: dict[str, list[float]] = {"t2i": [], "edit": []}
    for task, categories in LAB_CATEGORIES.items():
        for category in categories:
            cases = domain.cases(task, category, per_category, seed, evaluation=not train)
            cond = domain.condition([case.prompt for case in cases], sources_of(cases))
            images = domain.decode(draw(noise_of(cases, domain), cond, task))
            scores = [v.score for v in domain.judge(images, cases) if v.score is not None]
            means[task].append(fmean(scores))
            half = 1.96 * stdev(scores) / len(scores) ** 0.5
            table.add_row(task, category, f"{fmean(scores):.2f}", f"+- {half:.2f}")
    for task, values in means.items():
        table.add_row(task, "mean", f"{fmean(values):.2f}", "")
    console.print(table)


def cache(
    recipe_path: Path,
    *,
    overrides: Mapping[str, str],
    verify: bool,
    prune: bool,
    dry_run: bool,
) -> None:
    """Encode the prompts and sources of a recipe for real models."""
    recipe = load_recipe(recipe_path, overrides)
    make_plan(recipe, local_machine())  # for its refusals
    if not recipe.model.is_real:
        raise RecipeError(
            f"there is nothing to encode beforehand for {recipe.model.family!r}",
            field="model.family",
            hint="`fewstep distill` keeps what it encodes by itself",
        )
    from fewstep.caching import cache_conditions
    from fewstep.real.domain import RealDomain

    domain = RealDomain(recipe, open_pipelines(recipe), prepare=False)
    cache_conditions(domain, verify=verify, prune=prune, dry_run=dry_run)


def open_ensemble(recipe: Recipe) -> Ensemble:
    """The networks of a recipe, and through them its domain; nothing is loaded yet."""
    if recipe.model.is_real:
        from fewstep.real.ensemble import RealEnsemble

        return RealEnsemble(recipe, open_pipelines(recipe))
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
