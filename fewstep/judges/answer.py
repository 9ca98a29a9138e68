"""A judge's reply as scores, or why it cannot be read. No score is ever guessed or clamped."""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from fewstep.endpoint import every_json_in
from fewstep.judges.rubric import HIGHEST, LOWEST

Score = float
LONGEST_REASON = 400
"""Letters of a reason that are kept."""


class Answer(NamedTuple):
    score: Score
    subscores: dict[str, Score]
    reasons: tuple[str, ...]
    """The sentence of reasoning, then the failure modes."""


class Unreadable(Exception):
    """What is wrong with a reply, in words that the judge may be told."""


def read_answer(text: str, names: Sequence[str]) -> Answer:
    """`names` are the sub-scores that must be there. Raises Unreadable."""
    found = [one for one in every_json_in(text) if isinstance(one, dict) and "score" in one]
    if not found:
        raise Unreadable("it holds no complete JSON object with a score")
    if len(found) > 1:
        raise Unreadable(f"it holds {len(found)} JSON objects with a score instead of one")
    (answer,) = found
    parts = answer.get("subscores")
    if not isinstance(parts, dict):
        raise Unreadable("it has no subscores")
    subscores = {name: _score(parts.get(name), name) for name in names}
    return Answer(_score(answer["score"], "score"), subscores, _reasons(answer))


def _score(value: Any, name: str) -> Score:
    """Numbers, and numbers in quotation marks, from 1 to 5."""
    if value is None:
        raise Unreadable(f"{name} is missing")
    if isinstance(value, str) and re.fullmatch(r"\s*\d+(\.\d+)?\s*", value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Unreadable(f"{name} is {value!r:.40}, no number")
    if not math.isfinite(value) or not LOWEST <= value <= HIGHEST:
        raise Unreadable(f"{name} is {value:.6g}, outside {LOWEST:g} to {HIGHEST:g}")
    return float(value)


def _reasons(answer: dict[str, Any]) -> tuple[str, ...]:
    modes = answer.get("failure_modes")
    said = [answer.get("reasoning"), *(modes if isinstance(modes, list) else [])]
    lines = (" ".join(one.split()) for one in said if isinstance(one, str))
    return tuple(line[:LONGEST_REASON] for line in lines if line)
