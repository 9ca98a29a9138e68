"""What each command does, top to bottom. The only module that knows every name."""

import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from fewstep.core.types import Condition, Task
from fewstep.domain import Domain
from fewstep.errors import CheckpointError, DataError, RecipeError, RunError, did_you_mean
from fewstep.evals.grid import grid
from fewstep.evals.preview import Preview
from fewstep.evals.report import write_report
from fewstep.evals.runner import Contestant
from fewstep.evals.runner import evaluate as run_evaluation
from fewstep.guidance import classifier_free
from fewstep.models.cast import make_cast
from fewstep.models.lab import MMDiT, MMDiTConfig, load_mmdit, save_weights
from fewstep.recipe.facts import local_machine, weights_path
from fewstep.recipe.load import dump_yaml, load_recipe, load_yaml
from fewstep.recipe.plan import Plan, make_plan
from fewstep.recipe.render import render_plan
from fewstep.recipe.schema import FolderSource, Recipe, Source, Teacher
from fewstep.recipe.teach import TeachRecipe
from fewstep.samplers import sample as integrate
from fewstep.samplers import shifted_grid
from fewstep.train import loop
from fewstep.train import teach as teaching

console = Console()
Sampler = Callable[[Tensor, Condition, Task], Tensor]
"""(noise, condition, task) -> latents"""


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
    plan = make_plan(recipe, local_machine())
    console.print(render_plan(plan))
    if dry_run:
        return
    claim(out, resume, plan.recipe_hash)
    write_text(out / "recipe.yaml", dump_yaml(recipe))
    write_text(out / "plan.json", plan.model_dump_json(indent=2))
    clock = Clock(out)
    torch.manual_seed(recipe.seed)

    with clock("prepare data and teachers"):
        domain = open_domain(recipe.data.source)
        init, teachers = load_teachers(recipe, plan)
        pools = make_pools(recipe, domain)
        state = loop.Distillation(
            make_cast(init, teachers), pools, recipe, plan, domain.sample_shape
        )
        preview = Preview(
            domain, categories_of(recipe), recipe.log.sample_seeds, seed=recipe.seed + 77
        )
    if resume:
        loop.resume(state, out)
        console.print(f"resumed at update {state.step} of {plan.updates}")
    with clock("distil"), progress("distil", plan.updates, state.step) as advance:

        def on_sample(step: int) -> None:
            student = student_sampler(loop.result_of(state), plan.grid, recipe.precision)
            save_image(preview.draw(student), out / "images" / f"step_{step:06d}.png")

        loop.distil(
            state,
            out,
            on_step=lambda step, m: advance(
                step, " ".join(f"{k} {m[k]:.3f}" for k in SHOWN if k in m)
            ),
            on_sample=on_sample,
        )
    about = {
        "recipe": recipe.name,
        "recipe_hash": plan.recipe_hash,
        "updates": plan.updates,
        "grid": plan.grid,
    }
    save_weights(
        loop.result_of(state), out / "student.safetensors", config=init.config, about=about
    )
    clock.note(updates=plan.updates, recipe_hash=plan.recipe_hash,
               samples=plan.updates * plan.batch.batch)  # fmt: skip
    evaluate(out)


SHOWN = ("loss/fake", "grad_norm/student", "grad_norm/fake")


def load_teachers(recipe: Recipe, plan: Plan) -> tuple[MMDiT, dict[str, MMDiT]]:
    """The student's initial network, and every teacher that a condition uses."""
    needed = set(plan.teachers)
    if recipe.objective.anchor.weight:
        needed.add(recipe.student.init)
    teachers = {
        name: load_mmdit(weights_path(recipe.teachers[name].weights)) for name in sorted(needed)
    }
    init = load_mmdit(weights_path(recipe.teachers[recipe.student.init].weights))
    for name, teacher in teachers.items():
        if teacher.sample_shape != init.sample_shape:
            raise RecipeError(
                f"works on {teacher.sample_shape} latents, student.init {recipe.student.init!r} on {init.sample_shape}",
                field=f"teachers.{name}.weights",
                hint="use teachers of one family",
            )
    return init, teachers


def make_pools(recipe: Recipe, domain: Domain) -> dict:
    """Every pool that has a share of the mixture."""
    used = {
        name
        for task, composition in recipe.data.composition.items()
        if recipe.data.mixture.get(task, 0) > 0
        for name, weight in composition.items()
        if weight > 0
    }
    pools = {n: p for n, p in recipe.data.pools.items() if n in used}
    made = {}
    with progress("encode prompts and sources", sum(p.size for p in pools.values())) as advance:
        done = 0
        for name, pool in pools.items():
            made[name] = domain.pool(
                pool.category, pool.size, recipe.seed, task=pool.task, targets=False
            )
            done += pool.size
            advance(done, name)
    return made


# --- teach ----------------------------------------------------------------------------------------


def teach(config: Path, *, out: Path, overrides: Mapping[str, str], resume: bool = False) -> None:
    """Train a multi-step teacher by flow matching; its weights are `out/teacher.safetensors`."""
    recipe = load_yaml(config, TeachRecipe, overrides)
    claim(out, resume, recipe.name)
    write_text(out / "recipe.yaml", dump_yaml(recipe))
    clock = Clock(out)
    torch.manual_seed(recipe.seed)
    with clock("prepare data"):
        domain = open_domain(recipe.source)
        model = make_teacher(recipe, domain)
        pools = {}
        named = [(t, c) for t, cs in recipe.composition.items() for c, w in cs.items() if w > 0 and recipe.mixture.get(t, 0) > 0]  # fmt: skip
        with progress("render and encode", len(named)) as advance:
            for i, (task, category) in enumerate(named):
                pools[category] = domain.pool(
                    category, recipe.pool_size, recipe.seed, task=task, targets=True
                )
                advance(i + 1, category)
        state = teaching.Teaching(model, pools, recipe)
        preview = Preview(domain, {c: t for t, c in named}, 8, seed=recipe.seed + 77)
    if resume:
        teaching.resume(state, out)
        console.print(f"resumed at update {state.step} of {recipe.budget.updates}")
    with clock("teach"), progress("teach", recipe.budget.updates, state.step) as advance:

        def on_sample(step: int, averaged: MMDiT) -> None:
            sampler = teacher_sampler(
                averaged, {"t2i": 2.5, "edit": 2.0}, shifted_grid(20, 2.0), recipe.precision
            )
            save_image(preview.draw(sampler), out / "images" / f"step_{step:06d}.png")

        teaching.teach(
            state,
            out,
            on_step=lambda step, m: advance(step, " ".join(f"{k} {v:.3g}" for k, v in m.items())),
            on_sample=on_sample,
        )
    about = {"recipe": recipe.name, "updates": recipe.budget.updates, "images": recipe.budget.updates * recipe.budget.batch,
             "seed": recipe.seed, "init": recipe.init, "device": device_name(), "seconds": clock.seconds}  # fmt: skip
    save_weights(
        teaching.averaged(state),
        out / "teacher.safetensors",
        config=model.config,
        about=about,
        half=True,
    )
    clock.note(updates=recipe.budget.updates)
    console.print(f"teacher written to {out / 'teacher.safetensors'}")


def make_teacher(recipe: TeachRecipe, domain: Domain) -> MMDiT:
    if recipe.init:
        path = weights_path(recipe.init)
        if not path.is_file():
            raise RecipeError(
                f"there is no file {path}", field="init", hint="use bundled:base, a path or null"
            )
        return load_mmdit(path).train()
    channels, side, _ = domain.sample_shape
    n = recipe.network
    if side % n.patch or n.width % n.heads:
        raise RecipeError(
            f"width {n.width}, heads {n.heads}, patch {n.patch} do not fit latents of {side} x {side}",
            field="network",
            hint=f"heads must divide width and patch must divide {side}",
        )
    return MMDiT(
        MMDiTConfig(
            channels=channels,
            grid=side,
            patch=n.patch,
            width=n.width,
            depth=n.depth,
            heads=n.heads,
            **domain.text_sizes(),
        )  # fmt: skip
    )


# --- samplers -------------------------------------------------------------------------------------


def student_sampler(model: MMDiT, grid: tuple[float, ...], precision: str) -> Sampler:
    """The student as it is played back: its grid, no guidance."""
    return teacher_sampler(model, {"t2i": 1.0, "edit": 1.0}, grid, precision)


def teacher_sampler(
    model: MMDiT, cfg: Mapping[Task, float], grid: tuple[float, ...], precision: str
) -> Sampler:
    @torch.inference_mode()
    def draw(noise: Tensor, cond: Condition, task: Task) -> Tensor:
        def guided(x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
            return classifier_free(model, x_t, t, c, cfg[task])

        device = noise.device.type
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            return integrate(guided, noise, cond, grid)

    return draw


def evaluations(teacher: Teacher, steps: int) -> dict[Task, int]:
    return {task: steps * (1 if teacher.cfg[task] == 1 else 2) for task in teacher.cfg}


# --- evaluate and report --------------------------------------------------------------------------


def evaluate(run_dir: Path) -> None:
    """Judge student and teachers on the evaluation split and write the report."""
    recipe, plan = read_run(run_dir)
    clock = Clock(run_dir)
    domain = open_domain(recipe.data.source)
    spec = recipe.evaluation
    cases = [
        case
        for category, task in categories_of(recipe).items()
        for case in domain.cases(task, category, spec.per_category * spec.seeds_per_case, spec.seed)
    ]
    contestants = make_contestants(run_dir, recipe, plan)
    with clock("evaluate"), progress("evaluate", len(cases) * len(contestants)) as advance:
        run_evaluation(
            cases, contestants, domain, run_dir / "eval",
            on_progress=lambda done, _total, name: advance(done, name),
        )  # fmt: skip
    clock.note()
    report(run_dir)


def make_contestants(run_dir: Path, recipe: Recipe, plan: Plan) -> list[Contestant]:
    """The models that `evaluation.models` names, each with its way of sampling and its NFE."""
    found: list[Contestant] = []
    for wanted in recipe.evaluation.models:
        kind, _, name = wanted.partition(":")
        name = name or recipe.student.init
        if kind == "student":
            model = load_mmdit(run_dir / "student.safetensors")
            k = len(plan.grid)
            found.append(Contestant(f"student-{k}nfe", {"t2i": k, "edit": k},
                                    student_sampler(model, plan.grid, recipe.precision)))  # fmt: skip
            continue
        if name not in recipe.teachers:
            raise RecipeError(f"{wanted!r} names no teacher", field="evaluation.models",
                              hint=did_you_mean(name, recipe.teachers))  # fmt: skip
        teacher = recipe.teachers[name]
        model = load_mmdit(weights_path(teacher.weights))
        label = "teacher" if name == recipe.student.init else f"teacher-{name}"
        if kind == "teacher":
            nfe = evaluations(teacher, teacher.steps)
            full = teacher_sampler(
                model, teacher.cfg, shifted_grid(teacher.steps, teacher.shift), recipe.precision
            )
            found.append(Contestant(f"{label}-{max(nfe.values())}nfe", nfe, full))
        else:
            found += cut_teachers(model, teacher, label, plan, recipe.precision)
    return found


def cut_teachers(
    model: MMDiT, teacher: Teacher, label: str, plan: Plan, precision: str
) -> list[Contestant]:
    """The teacher at the student's evaluations: all its steps without guidance, or half of them with it."""
    k = len(plan.grid)
    plain = student_sampler(model, plan.grid, precision)
    found = [Contestant(f"{label}-{k}nfe", {"t2i": k, "edit": k}, plain)]
    if k % 2 == 0:
        half = shifted_grid(k // 2, 3.0)
        guided = teacher_sampler(model, teacher.cfg, half, precision)
        found.append(Contestant(f"{label}-{k // 2}x2nfe", evaluations(teacher, k // 2), guided))
    return found


def report(run_dir: Path) -> None:
    """report.html, results.md and results.csv of an evaluated run."""
    if not run_dir.is_dir():
        raise RunError(
            f"run folder {run_dir}: there is none; `fewstep distill RECIPE --out {run_dir}` makes it"
        )
    paths = write_report(run_dir)
    console.print((run_dir / "results.md").read_text())
    console.print(f"report: {paths.html}")


def read_run(run_dir: Path) -> tuple[Recipe, Plan]:
    """Recipe and plan of a run folder. Raises RunError when it holds none."""
    path = run_dir / "recipe.yaml"
    if not path.is_file():
        raise RunError(
            f"run folder {run_dir}: no recipe.yaml in it; give a folder that `fewstep distill` wrote"
        )
    recipe = load_recipe(path)
    return recipe, make_plan(recipe, local_machine())


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
    recipe, plan = read_run(run_or_weights if run_or_weights.is_dir() else run_or_weights.parent)
    domain = open_domain(recipe.data.source)
    texts = [instruction] if instruction else prompts + read_prompts(prompt_file)
    task = "edit" if instruction else "t2i"
    pixels = open_image(source, domain) if source else None
    sampler, name = choose_sampler(run_or_weights, recipe, plan, model, steps)
    rows = []
    shape = domain.sample_shape
    for text in texts:
        sources = None if pixels is None else np.stack([pixels] * len(seeds))
        cond = domain.condition([text] * len(seeds), sources)
        noise = torch.stack(
            [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
        )
        images = [Image.fromarray(x) for x in domain.decode(sampler(noise, cond, task))]
        rows.append([Image.fromarray(pixels), *images] if pixels is not None else images)
    columns = [f"seed {s}" for s in seeds]
    scale = max(1, 128 // rows[0][0].width)
    picture = grid(
        rows,
        row_labels=texts,
        column_labels=["source", *columns] if source else columns,
        scale=scale,
    )
    save_image(picture, out)
    console.print(f"{len(texts) * len(seeds)} images by {name}: {out}")


def choose_sampler(
    run_or_weights: Path, recipe: Recipe, plan: Plan, model: str, steps: int | None
) -> tuple[Sampler, str]:
    kind, _, name = model.partition(":")
    if kind == "student":
        if steps not in (None, len(plan.grid)):
            raise RecipeError(f"{steps} steps of a student trained for {len(plan.grid)}", field="--steps",
                              hint="leave it out, or use --model teacher")  # fmt: skip
        path = run_or_weights / "student.safetensors" if run_or_weights.is_dir() else run_or_weights
        return student_sampler(
            load_mmdit(path), plan.grid, recipe.precision
        ), f"the student, {len(plan.grid)} NFE"
    if kind != "teacher":
        raise RecipeError(
            f"{model!r} is no model", field="--model", hint="use student, teacher or teacher:<name>"
        )
    name = name or recipe.student.init
    if name not in recipe.teachers:
        raise RecipeError(
            f"there is no teacher {name!r}",
            field="--model",
            hint=did_you_mean(name, recipe.teachers),
        )
    teacher = recipe.teachers[name]
    count = steps or teacher.steps
    network = load_mmdit(weights_path(teacher.weights))
    times = shifted_grid(count, teacher.shift)
    return teacher_sampler(
        network, teacher.cfg, times, recipe.precision
    ), f"teacher {name}, {count} steps"


def read_prompts(path: Path | None) -> list[str]:
    """One prompt a line; empty lines are left out."""
    if path is None:
        return []
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"prompt file {path}: cannot be read as UTF-8 text ({error})") from None
    found = [line for line in lines if line]
    if not found:
        raise DataError(f"prompt file {path}: no prompt in it; write one a line")
    return found


def open_image(path: Path, domain: Domain) -> np.ndarray:
    """An image as uint8 [h, w, 3] of the domain's size; any mode, transparent parts on white."""
    try:
        with Image.open(path) as image:
            image.load()
            rgba = image.convert("RGBA")
    except FileNotFoundError:
        raise DataError(f"source image {path}: no such file") from None
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(
            f"source image {path}: cannot be read ({error}); use PNG, JPEG or WebP"
        ) from None
    flat = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    side = min(flat.size)
    left, top = (flat.width - side) // 2, (flat.height - side) // 2
    square = flat.crop((left, top, left + side, top + side))
    size = domain.image_size
    return np.asarray(square.resize((size, size), Image.Resampling.LANCZOS))


# --- the run folder -------------------------------------------------------------------------------


def claim(out: Path, resume: bool, recipe_hash: str) -> None:
    """Make sure that a run never mixes with another one."""
    if resume and not (out / "checkpoints" / "last.pt").exists():
        raise CheckpointError(
            f"{out}: nothing to resume, there is no checkpoint; start it without --resume"
        )
    if not resume and (out / "metrics.jsonl").exists():
        raise RunError(f"{out} already holds a run; go on with --resume, or choose another --out")
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file; choose a folder for --out")
    out.mkdir(parents=True, exist_ok=True)
    marker = out / "identity.json"
    if resume and marker.exists() and json.loads(marker.read_text())["recipe"] != recipe_hash:
        raise CheckpointError(
            f"{out} was made by another recipe; resume with the recipe in {out / 'recipe.yaml'}"
        )
    write_text(marker, json.dumps({"recipe": recipe_hash}))


def open_domain(source: Source) -> Domain:
    if isinstance(source, FolderSource):
        from fewstep.data.domain import FolderDomain

        return FolderDomain.open(source)
    from fewstep.lab.domain import LabDomain

    return LabDomain()


def categories_of(recipe: Recipe) -> dict[str, Task]:
    """Category to task, for evaluation: every category of the recipe's pools, in their order."""
    return {pool.category: pool.task for pool in recipe.data.pools.values()}


def write_text(path: Path, text: str) -> None:
    scratch = path.with_name(path.name + ".part")
    scratch.write_text(text)
    scratch.replace(path)


def save_image(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@dataclass
class Clock:
    """Seconds per phase, kept in summary.json across resumes."""

    out: Path

    def __post_init__(self) -> None:
        path = self.out / "summary.json"
        self.summary: dict = json.loads(path.read_text()) if path.exists() else {}
        self.summary.setdefault("seconds", {})

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        begun = time.monotonic()
        try:
            yield
        finally:
            spent = self.summary["seconds"].get(phase, 0.0) + time.monotonic() - begun
            self.summary["seconds"][phase] = round(spent, 2)
            self.note()

    @property
    def seconds(self) -> float:
        return sum(self.summary["seconds"].values())

    def note(self, **facts: object) -> None:
        self.summary |= facts | {"device": device_name(), "torch": torch.__version__}
        write_text(self.out / "summary.json", json.dumps(self.summary, indent=2))


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads, {platform.machine()}"


@contextmanager
def progress(title: str, total: int, done: int = 0) -> Iterator[Callable[[int, str], None]]:
    """A bar with rate and time left; on a terminal that is no terminal, a line now and then."""
    begun, first = time.monotonic(), done
    last = [begun]
    bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                   TextColumn("{task.fields[rate]}"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
                   console=console, disable=not console.is_terminal)  # fmt: skip
    with bar:
        task = bar.add_task(title, total=total, completed=done, rate="", note="")

        def advance(now: int, note: str) -> None:
            elapsed = time.monotonic() - begun
            rate = (now - first) / elapsed if elapsed else 0.0
            bar.update(task, completed=now, rate=f"{rate:.2f}/s", note=note)
            if not console.is_terminal and (time.monotonic() - last[0] > 10 or now == total):
                left = (total - now) / rate if rate else 0.0
                console.print(
                    f"{title}: {now}/{total}, {rate:.2f}/s, {left:.0f} s left. {note}",
                    highlight=False,
                )
                last[0] = time.monotonic()

        yield advance
