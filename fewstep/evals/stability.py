"""The report's section on stability: probes and score mismatch over training, and where it turns.

What the numbers are is in `evals.probe` and `train.instruments`; docs/stability.md explains them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fewstep.evals.curves import Panel, draw, panels
from fewstep.evals.findings import TASK_TITLES, Run, Series
from fewstep.evals.markup import Html, h

GROUPS = ("probe", "mismatch", "share", "lambda", "adaptive", "adaptive_ratio")
"""First parts of the keys that this section shows, so that the other curves leave them out."""
DROP = 0.15
"""Points of the 1-5 scale below its best at which a probe's score counts as worse. One probe's
score over few images is uncertain; it must stay there until the last probe."""


@dataclass(frozen=True)
class Turn:
    """A task whose probe got better and then worse for good."""

    task: str
    best: float
    best_step: float
    since: float
    """The first probe from which all are at least DROP below the best."""
    last: float


def is_stability(key: str) -> bool:
    return key.split("/")[0] in GROUPS


def section(run: Run) -> Html | None:
    """Nothing for a run that measured nothing of it."""
    metrics = {key: points for key, points in run.metrics.items() if is_stability(key)}
    if not metrics:
        return None
    probes = probe_panels(metrics)
    shown = {id(points) for panel in probes for points in panel.curves.values()}
    others = panels({key: points for key, points in metrics.items() if id(points) not in shown})
    first = [panel for panel in others if not panel.title.startswith("probe")]
    rest = [panel for panel in others if panel.title.startswith("probe")]
    folded = h(
        "details",
        h("summary", f"{len(rest)} more"),
        h("div", [draw(panel) for panel in rest], class_="curves"),
    )
    return h(
        "section",
        h("h2", "Stability"),
        [h("p", sentence) for sentence in verdicts(metrics)],
        h(
            "p",
            "Probes draw fixed training-split cases. Mismatch is the distance of a teacher's score "
            "from the student's, in sizes of the student's; a share is a teacher's part of the "
            "pull.",
            class_="hint",
        ),
        h("div", [draw(panel) for panel in [*probes, *first]], class_="curves"),
        folded if rest else None,
        id="stability",
    )


def probe_panels(metrics: Series) -> list[Panel]:
    """By task: the score, diversity and variety over the teacher's, noise minus the teacher's."""

    def by_task(name: str, label: str = "") -> Series:
        keys = {task: f"probe/{name}/{task}" for task in TASK_TITLES}
        return {f"{t}{label}": metrics[key] for t, key in keys.items() if key in metrics}

    ratios = by_task("diversity_ratio", ", seeds") | by_task("variety_ratio", ", prompts")
    found = [
        Panel("score of the probe, 1-5", by_task("score")),
        Panel("distance between seeds, between prompts; the teacher's is 1", ratios),
        Panel("residual noise minus the teacher's, of 255", by_task("noise")),
    ]
    return [panel for panel in found if panel.curves]


def verdicts(metrics: Series) -> list[str]:
    """What the probes say, in words: a collapse, and tasks that turned worse."""
    alarms = [step for step, value in metrics.get("probe/collapsed", []) if value]
    told = []
    if alarms:
        steps = ", ".join(f"{step:g}" for step in alarms)
        told.append(f"Mode collapse was found at update {steps}.")
    elif "probe/collapsed" in metrics:
        told.append("No probe found a mode collapse.")
    for turn in turns(metrics):
        told.append(
            f"{TASK_TITLES[turn.task]} got worse: the probe's score was best at update "
            f"{turn.best_step:g} ({turn.best:.2f}) and from update {turn.since:g} on at least "
            f"{DROP:g} below it (last {turn.last:.2f})."
        )
    return told


def turns(metrics: Series) -> list[Turn]:
    """Tasks whose probe's score fell by DROP from its best and did not come back."""
    curves = {task: metrics.get(f"probe/score/{task}", []) for task in TASK_TITLES}
    found = [_turn(task, points) for task, points in curves.items() if points]
    return [turn for turn in found if turn is not None]


def _turn(task: str, points: Sequence[tuple[float, float]]) -> Turn | None:
    best_step, best = max(points, key=lambda point: point[1])
    since = None
    for step, value in reversed(points):
        if value > best - DROP:
            break
        since = step
    return None if since is None else Turn(task, best, best_step, since, points[-1][1])
