"""What the probes during training say about stability: falls from a peak, their onset, alarms."""

import re
from dataclasses import dataclass
from statistics import fmean

from fewstep.evals.findings import TASK_TITLES, Series
from fewstep.study_report.read import Cell, Study

ONSET = 0.1
"""A curve has fallen when it lies more than this (of 5) below its best so far, to the end."""

Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class Stability:
    """One cell's training as its probes saw it."""

    variant: str
    seed: int
    task: str
    peak: float
    peak_step: float
    final: float
    onset: float | None
    """The first probe of the fall that the curve did not recover from."""
    collapsed: float | None
    """The first probe with a collapse alarm."""
    mismatch: float | None
    """Score mismatch of the last quarter of the updates over that of the first quarter."""

    @property
    def fall(self) -> float:
        """Best probe minus last probe. Noise makes it positive: compare it, never read it alone."""
        return self.peak - self.final


def stability(cell: Cell, task: str) -> Stability | None:
    """None where the task was not probed at least twice."""
    curve = cell.curves.get(f"probe/score/{task}", [])
    if len(curve) < 2:
        return None
    step, peak = max(curve, key=lambda point: (point[1], -point[0]))
    alarms = [at for at, value in cell.curves.get("probe/collapsed", []) if value > 0]
    return Stability(
        variant=cell.variant,
        seed=cell.seed,
        task=task,
        peak=peak,
        peak_step=step,
        final=curve[-1][1],
        onset=onset(curve),
        collapsed=alarms[0] if alarms else None,
        mismatch=growth(cell.curves),
    )


def onset(curve: Curve) -> float | None:
    """The first probe from which the curve stays more than ONSET below the best before it."""
    best, began = curve[0][1], None
    for step, value in curve:
        if value < best - ONSET:
            began = step if began is None else began
        else:
            began = None
        best = max(best, value)
    return began


def growth(curves: Series) -> float | None:
    """Last quarter over first quarter of all mismatch curves: the teachers move away above 1."""
    own = [points for key, points in curves.items() if key.startswith("mismatch/")]
    if not own:
        return None
    last = max(points[-1][0] for points in own)
    early = [value for points in own for step, value in points if step <= last / 4]
    late = [value for points in own for step, value in points if step > 3 * last / 4]
    return fmean(late) / fmean(early) if early and late and fmean(early) > 0 else None


def all_stability(study: Study) -> list[Stability]:
    """Every probed cell, finished or not, by task, in the order of the study."""
    found = [stability(cell, task) for task in TASK_TITLES for cell in study.cells]
    return [entry for entry in found if entry is not None]


def mean_curve(study: Study, variant: str, key: str) -> Curve:
    """Mean over the seeds of the finished cells, at the steps that all of them have."""
    curves = [dict(cell.curves[key]) for cell in study.finished(variant) if key in cell.curves]
    if not curves:
        return []
    steps = set.intersection(*(set(curve) for curve in curves))
    return [(step, fmean(curve[step] for curve in curves)) for step in sorted(steps)]


def mismatch_curve(study: Study, variant: str) -> Curve:
    """Mean mismatch over groups, teachers and student steps, then over seeds."""
    by_step: dict[float, list[float]] = {}
    for cell in study.finished(variant):
        for key, points in cell.curves.items():
            if re.match(r"mismatch/", key):
                for step, value in points:
                    by_step.setdefault(step, []).append(value)
    return [(step, fmean(values)) for step, values in sorted(by_step.items())]
