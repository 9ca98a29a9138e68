"""The student's grid as the configuration of a stock scheduler, proved by playing it.

`FlowMatchEulerDiscreteScheduler` has no field for a list of times. What it can hold is found here;
what it cannot is said, with the `sigmas=` that every call then needs. Qwen-Image 2.1 is the one
pipeline whose own configuration (`sample_sigmas`) takes any grid.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fewstep.models.families.playback import evenly_spaced, scheduler_grid

SCHEDULER = "FlowMatchEulerDiscreteScheduler"
OWN_STEPS = ("StableDiffusion3Pipeline", "SanaPipeline")
"""Pipelines that let the scheduler place n steps, from its largest to its smallest sigma; the
others hand it 1, (n-1)/n, ..., 1/n."""
SAMPLE_SIGMAS = "QwenImage21Pipeline"
TOLERANCE = 1e-6
SMALLEST = 1e-3
"""The scheduler's smallest sigma before any shift: 1 / num_train_timesteps."""

Times = tuple[float, ...]
"""t_0 = 1 > ... > t_{K-1} > 0; the final 0 is implied."""


@dataclass(frozen=True)
class Playback:
    """What makes a stock pipeline evaluate the network at exactly the student's times."""

    scheduler: Mapping[str, Any]
    """The fields of `FlowMatchEulerDiscreteScheduler` that differ from its defaults."""
    sigmas: Times | None = None
    """The `sigmas=` of every call; None where num_inference_steps is enough."""
    sample_sigmas: Times | None = None
    """The field of Qwen-Image 2.1's pipeline."""


def playback_of(pipeline: str, times: Times) -> Playback:
    """How a pipeline of this class plays the grid with num_inference_steps = K.

    Every answer has gone through the scheduler's own `set_timesteps` and agrees to 1e-6.
    """
    if pipeline == SAMPLE_SIGMAS:
        given = Playback({"shift": 1.0}, sample_sigmas=times)
    else:
        held = (_shift if pipeline not in OWN_STEPS else _own_shift)(times)
        if held is not None and _apart(pipeline, Playback(held), times) <= TOLERANCE:
            return Playback(held)
        given = Playback({"shift": 1.0}, sigmas=times)
    assert _apart(pipeline, given, times) <= TOLERANCE, f"{pipeline} cannot play {times}"
    return given


def grid_of(pipeline: str, playback: Playback, steps: int) -> Times:
    """The times that the scheduler hands the network when the pipeline asks it for `steps`."""
    import diffusers

    scheduler = getattr(diffusers, SCHEDULER)(**playback.scheduler)
    sigmas = playback.sigmas or playback.sample_sigmas
    if sigmas is None and pipeline not in OWN_STEPS:
        sigmas = evenly_spaced(steps)
    return scheduler_grid(scheduler, sigmas, n=steps)[:-1]


def _apart(pipeline: str, playback: Playback, times: Times) -> float:
    played = grid_of(pipeline, playback, len(times))
    return max(abs(a - b) for a, b in zip(played, times, strict=True))


# With w = 1 - u for the scheduler's unshifted sigma u, a static shift s gives
# 1 - sigma = w / (s - (s - 1) w), and `shift_terminal` then scales all of these by one factor,
# so that the last sigma is the terminal. Two numbers, s and the terminal, can so meet t_1 and
# t_{K-1}; whether they also meet the rest is for `playback_of` to see.


def _shift(times: Times) -> dict[str, Any] | None:
    """The one shift that meets t_1, alone if it meets the last time too, else with a terminal."""
    k = len(times)
    if k == 1:
        return {"shift": 1.0}
    u = 1 - 1 / k
    shift = times[1] * (1 - u) / (u * (1 - times[1]))
    last = shift / k / (1 + (shift - 1) / k)
    if abs(last - times[-1]) <= TOLERANCE:
        return {"shift": _tidy(shift)}
    return _with_terminal(times, w_1=1 / k, w_last=1 - 1 / k)


def _own_shift(times: Times) -> dict[str, Any] | None:
    """Steps from 1 to the smallest sigma, which itself depends (weakly) on the shift."""
    k = len(times)
    if k == 1:
        return {"shift": 1.0}
    if k == 2:
        return {"shift": 1.0, "shift_terminal": times[-1]}
    found: dict[str, Any] | None = {"shift": 1.0}
    for _ in range(20):
        if found is None:
            return None
        shift = found["shift"]
        w_last = 1 - shift * SMALLEST / (1 + (shift - 1) * SMALLEST)
        found = _with_terminal(times, w_1=w_last / (k - 1), w_last=w_last)
    return found


def _with_terminal(times: Times, *, w_1: float, w_last: float) -> dict[str, Any] | None:
    """p = (s - 1) / s from (1 - t_1) / (1 - t_last) = (w_1 / w_last)(1 - p w_last) / (1 - p w_1).

    None where no positive shift does it.
    """
    ratio = (1 - times[1]) / (1 - times[-1])
    if not 0 < ratio < 1:
        return None
    p = (w_1 / w_last - ratio) / (w_1 * (1 - ratio))
    return None if p >= 1 else {"shift": 1 / (1 - p), "shift_terminal": times[-1]}


def _tidy(shift: float) -> float:
    """3.0000000000000004 is meant as 3."""
    return round(shift, 9)
