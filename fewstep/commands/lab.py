"""`fewstep lab`: the words of the bundled lab, and a teacher judged by itself."""

from pathlib import Path
from statistics import fmean, stdev

from rich.table import Table

from fewstep.contestants import sampler
from fewstep.core.types import Task
from fewstep.ensemble import load_fitting
from fewstep.evals.runner import noise_of, sources_of
from fewstep.lab.domain import LabDomain
from fewstep.lab.glyphs import LETTERS
from fewstep.lab.grammar import vocabulary
from fewstep.recipe.schema import LAB_CATEGORIES
from fewstep.samplers import shifted_grid
from fewstep.session import compute_device, console, say


def lab_words() -> None:
    """Every word that a prompt of the lab may use, and what signs can say."""

    say(" ".join(word for word in vocabulary() if ":" not in word))
    say(f'signs: 1 to 5 letters of {LETTERS} in double quotes, such as " COFFE "')


def lab_score(weights: Path, *, per_category: int, seed: int, steps: int, train: bool) -> None:
    """Judge a lab teacher category by category, with the guidance of `recipes/lab/unified.yaml`."""

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
