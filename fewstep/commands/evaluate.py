"""`fewstep eval`: student and teachers on the same held-out cases and seeds."""

import os
from dataclasses import replace
from pathlib import Path

from fewstep.commands.judge import complain, judge_run
from fewstep.commands.opening import open_ensemble, read_run
from fewstep.commands.report import report
from fewstep.contestants import make_contestants
from fewstep.domain import Case, Domain
from fewstep.ensemble import Ensemble
from fewstep.evals.runner import evaluate as run_evaluation
from fewstep.evals.runner import forget_changed
from fewstep.judges.endpoint import open_judge
from fewstep.recipe.facts import local_machine
from fewstep.recipe.plan import make_plan
from fewstep.recipe.schema import Recipe
from fewstep.session import Clock, progress, say

SEED_STRIDE = 1_000_003
"""Between the seeds of one case, so that no two cases share one."""


def evaluate(run_dir: Path, ensemble: Ensemble | None = None) -> None:
    """Judge student and teachers on the evaluation split and write the report."""
    recipe, plan = read_run(run_dir)
    make_plan(recipe, local_machine())  # for its refusals: `evaluation` may have been edited
    judge = open_judge(recipe.evaluation.judge, os.environ)
    clock = Clock(run_dir)
    ensemble = ensemble or open_ensemble(recipe)
    domain = ensemble.open_domain()
    cases = evaluation_cases(recipe, domain)
    contestants = make_contestants(run_dir, recipe, plan, ensemble)
    later = judge.name if judge else None
    for told in forget_changed(contestants, cases, run_dir / "eval", judged_later=later):
        say(told)
    work = sum(player.nfe.get(case.task, 0) for player in contestants for case in cases)
    with clock("evaluate"), progress("evaluate, NFE", work) as advance:
        run_evaluation(
            cases,
            contestants,
            domain,
            run_dir / "eval",
            batch=recipe.images_at_once,
            judged_later=later,
            on_progress=lambda done, _total, name: advance(done, name),
        )
    if judge is None:
        report(run_dir)
        return
    asked = {(p.name, c.id, c.seed) for p in contestants for c in cases if c.task in p.nfe}
    stopped = judge_run(run_dir, judge, asked)
    report(run_dir, judge=judge.name)
    complain(run_dir, stopped)


def evaluation_cases(recipe: Recipe, domain: Domain) -> list[Case]:
    """Every held-out case that `evaluation` asks for, as often as it asks, each with its seed."""
    spec = recipe.evaluation
    return [
        replace(case, seed=case.seed + SEED_STRIDE * again)
        for task, category in recipe.data.conditions()
        for case in domain.cases(task, category, spec.per_category, spec.seed)
        for again in range(spec.seeds_per_case)
    ]
