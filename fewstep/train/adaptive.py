"""lambda as it stands now: the plan's tables, some of which move with the measured mismatch.

For step k of a group of conditions with an adaptive rule, let g_m and l_m be what teacher m gains
and loses between the table it starts with and the one it goes to, and d_m the running average of
`mismatch/<group>/<m>/k<k>` as `train.instruments` logs it. Then

    r = sum_m g_m d_m / sum_m l_m d_m
    speed = clip((limit - r) / (limit - tolerance), -1, 1)
    a <- clip(a + rate * (updates since the last measurement) * speed, 0, 1)
    lambda = (1 - a) start + a weights

This rule is ours, not the paper's (arXiv 2606.03746 has fixed tables only); docs/stability.md
explains it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fewstep.recipe.plan import Guidance, Plan
from fewstep.train.instruments import Metrics

Row = Mapping[str, float]


@dataclass
class Progress:
    """Of one step k of one group."""

    a: float
    """From `start` (0) to `weights` (1)."""
    mismatch: dict[str, float]
    """Running average by teacher; empty before the first measurement."""
    measured_at: int
    """The update of the last measurement."""


class Schedule:
    """Gives every update its plan, and learns from what the update measured."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.moving: dict[str, Guidance] = {}
        trained = {quota.task for quota in plan.tasks}
        for entry in plan.guidance:
            if entry.adaptive and entry.task in trained:
                self.moving[plan.group(entry.task, entry.category)] = entry
        self.progress = {
            (group, k): Progress(0.0, {}, 0)
            for group, entry in self.moving.items()
            for k in range(len(entry.weights))
            if entry.adaptive and entry.adaptive.start[k] != entry.weights[k]
        }

    def at(self, update: int) -> Plan:
        """The plan with lambda as it stands; `update` counts from 0 and says who is heard."""
        if not self.moving:
            return self.plan
        return self.plan.model_copy(
            update={"guidance": tuple(self._now(entry, update) for entry in self.plan.guidance)}
        )

    def _now(self, entry: Guidance, update: int) -> Guidance:
        group = self.plan.group(entry.task, entry.category)
        if group not in self.moving or entry.adaptive is None:
            return entry
        due = update % entry.adaptive.every == 0
        rows = list(entry.weights)
        heard: list[tuple[str, ...]] = [()] * len(rows)
        for k in range(len(rows)):
            if (group, k) in self.progress:
                rows[k] = mix(entry, k, self.progress[group, k].a)
                heard[k] = entry.at_step(k) if due else ()
        return entry.model_copy(update={"weights": tuple(rows), "heard": tuple(heard)})

    def observe(self, update: int, metrics: Metrics) -> Metrics:
        """Move lambda after update number `update` (from 1) by its `mismatch/...`; what to log.

        The lambda that is logged is the one of this update, before it moves. Every rank must see
        the same metrics.
        """
        told: Metrics = {}
        for (group, k), state in self.progress.items():
            entry = self.moving[group]
            now = mix(entry, k, state.a)
            told |= {f"lambda/{group}/{name}/k{k}": now.get(name, 0.0) for name in entry.cfg}
            told[f"adaptive/{group}/k{k}"] = state.a
            gains, losses = changes(entry, k)
            found = {
                name: metrics[key]
                for name in (*gains, *losses)
                if (key := f"mismatch/{group}/{name}/k{k}") in metrics
            }
            if len(found) == len(gains) + len(losses):
                told[f"adaptive_ratio/{group}/k{k}"] = advance(state, entry, k, update, found)
        return told

    def state_dict(self) -> dict[str, Any]:
        return {f"{group}/k{k}": asdict(state) for (group, k), state in self.progress.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for group, k in self.progress:
            self.progress[group, k] = Progress(**state[f"{group}/k{k}"])


def changes(entry: Guidance, k: int) -> tuple[dict[str, float], dict[str, float]]:
    """What teachers gain and what they lose at step k over the whole way, by name."""
    assert entry.adaptive is not None
    start, end = entry.adaptive.start[k], entry.weights[k]
    by = {name: end.get(name, 0.0) - start.get(name, 0.0) for name in entry.cfg}
    gains = {name: change for name, change in by.items() if change > 0}
    losses = {name: -change for name, change in by.items() if change < 0}
    return gains, losses


def mix(entry: Guidance, k: int, a: float) -> dict[str, float]:
    """lambda at step k, the part `a` of the way; exactly the one table at 0 and the other at 1."""
    assert entry.adaptive is not None
    start, end = entry.adaptive.start[k], entry.weights[k]
    row = {m: (1 - a) * start.get(m, 0.0) + a * end.get(m, 0.0) for m in entry.cfg}
    return {name: weight for name, weight in row.items() if weight > 0}


def advance(
    state: Progress, entry: Guidance, k: int, update: int, measured: Mapping[str, float]
) -> float:
    """Take one measurement of every teacher that gains or loses at step k; returns the ratio r."""
    rule = entry.adaptive
    assert rule is not None
    for name, value in measured.items():
        before = state.mismatch.get(name, value)
        state.mismatch[name] = rule.decay * before + (1 - rule.decay) * value
    gains, losses = changes(entry, k)
    gaining = sum(change * state.mismatch[name] for name, change in gains.items())
    losing = sum(change * state.mismatch[name] for name, change in losses.items())
    ratio = gaining / max(losing, 1e-12)
    speed = (rule.limit - ratio) / (rule.limit - rule.tolerance)
    step = rule.rate * (update - state.measured_at) * min(1.0, max(-1.0, speed))
    state.a = min(1.0, max(0.0, state.a + step))
    state.measured_at = update
    return ratio
