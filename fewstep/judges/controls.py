"""How far a judge can be trusted, without human labels: a picture must stand above its spoilt copy.

Every control is a picture that is worse than its original by construction. The share of pairs in
the right order is the judge's; an equal score is no right order.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from statistics import fmean
from typing import Final, NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from fewstep.domain import Case, Verdict

Pictures = Sequence[np.ndarray]
"""uint8 [h, w, 3] each."""
Ask = Callable[[Pictures, Sequence[Case]], list[Verdict]]

BLUR: Final = 0.02
"""Radius over the shorter side."""
NOISES: Final = (3, 8, 25)
"""Sigma of 255."""
JPEG: Final = 10
"""Quality."""
ORIGINAL: Final = "original"


@dataclass(frozen=True)
class Control:
    """Spoilt copies of some originals; `at` are the originals' indices."""

    name: str
    at: tuple[int, ...]
    pictures: Pictures
    cases: tuple[Case, ...]


@dataclass(frozen=True)
class Standing:
    name: str
    score: float | None
    """Mean of what could be scored; of the original's where it is one."""
    pairs: int
    """Originals and controls that both have a score."""
    wins: int
    """Pairs whose original has the higher score."""
    ties: int
    unscored: int

    @property
    def accuracy(self) -> float | None:
        return self.wins / self.pairs if self.pairs else None

    @property
    def interval(self) -> tuple[float, float] | None:
        return wilson(self.wins, self.pairs) if self.pairs else None


class Checked(NamedTuple):
    task: str
    category: str
    standings: tuple[Standing, ...]
    """The original first."""


def spoil(pictures: Pictures, cases: Sequence[Case], rng: np.random.Generator) -> list[Control]:
    """The controls that need nothing but the pictures and prompts of one task and category."""
    everywhere = tuple(range(len(cases)))

    def of(name: str, spoilt: Pictures) -> Control:
        return Control(name, everywhere, spoilt, tuple(cases))

    found = [_another_picture(pictures, cases)]
    if all(case.source is not None for case in cases):
        sources = [case.source for case in cases if case.source is not None]
        found.append(of("untouched source", sources))
    found.append(_misspelt(pictures, cases, rng))
    found.append(of("blur", [blur(image) for image in pictures]))
    found += [of(f"noise {s}", [add_noise(x, s, rng) for x in pictures]) for s in NOISES]
    found.append(of(f"JPEG {JPEG}", [jpeg(image) for image in pictures]))
    return [control for control in found if control.at]


def check(
    pictures: Pictures, cases: Sequence[Case], controls: Sequence[Control], ask: Ask
) -> Checked:
    """Judge originals and controls of one task and category."""
    original = ask(pictures, cases)
    scores = [verdict.score for verdict in original]
    standings = [_standing(ORIGINAL, scores, [])]
    for control in controls:
        judged = [verdict.score for verdict in ask(control.pictures, control.cases)]
        standings.append(_standing(control.name, judged, [scores[i] for i in control.at]))
    return Checked(cases[0].task, cases[0].category, tuple(standings))


def pooled(checked: Sequence[Checked], name: str) -> Standing:
    """One control over all categories; every control but the original for an empty name."""
    found = [
        one
        for group in checked
        for one in group.standings
        if one.name == name or (not name and one.name != ORIGINAL)
    ]
    return Standing(
        name,
        None,
        sum(one.pairs for one in found),
        sum(one.wins for one in found),
        sum(one.ties for one in found),
        sum(one.unscored for one in found),
    )


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95% interval of a share (Wilson 1927); sound near 0 and 1, where the usual one is not."""
    z2 = 1.959964**2
    centre = (hits + z2 / 2) / (n + z2)
    half = math.sqrt(z2) * math.sqrt(hits * (n - hits) / n + z2 / 4) / (n + z2)
    return max(0.0, centre - half), min(1.0, centre + half)


def blur(image: np.ndarray) -> np.ndarray:
    radius = BLUR * min(image.shape[:2])
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


def add_noise(image: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    noisy = image + sigma * rng.standard_normal(image.shape)
    return np.clip(np.round(noisy), 0, 255).astype(np.uint8)


def jpeg(image: np.ndarray) -> np.ndarray:
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=JPEG)
    return np.asarray(Image.open(buffer))


def _standing(
    name: str, judged: Sequence[float | None], original: Sequence[float | None]
) -> Standing:
    scored = [score for score in judged if score is not None]
    pairs = [(a, b) for a, b in zip(original, judged) if a is not None and b is not None]
    return Standing(
        name,
        fmean(scored) if scored else None,
        len(pairs),
        sum(a > b for a, b in pairs),
        sum(a == b for a, b in pairs),
        len(judged) - len(scored),
    )


def _another_picture(pictures: Pictures, cases: Sequence[Case]) -> Control:
    """The picture of the next case whose prompt is another: a wrong prompt, seen from the judge."""
    at, shown = [], []
    for i, case in enumerate(cases):
        others = [(i + step) % len(cases) for step in range(1, len(cases))]
        other = next((j for j in others if cases[j].prompt != case.prompt), None)
        if other is not None:
            at.append(i)
            shown.append(pictures[other])
    return Control("another picture", tuple(at), shown, tuple(cases[i] for i in at))


_QUOTED = re.compile(r"[\"\u201c]([^\"\u201c\u201d]*)[\"\u201d]")


def _misspelt(pictures: Pictures, cases: Sequence[Case], rng: np.random.Generator) -> Control:
    """The prompt quotes the text with two unequal letters exchanged, so the picture's is wrong.

    Not for cases with a truth: a judge that knows it does not read the prompt.
    """
    at, changed = [], []
    for i, case in enumerate(cases):
        prompt = None if case.truth is not None else swap_letters(case.prompt, rng)
        if prompt is not None:
            at.append(i)
            changed.append(replace(case, prompt=prompt))
    return Control("misspelt prompt", tuple(at), [pictures[i] for i in at], tuple(changed))


def swap_letters(prompt: str, rng: np.random.Generator) -> str | None:
    """Two neighbouring, unequal letters of the first quotation exchanged; None without one."""
    quoted = _QUOTED.search(prompt)
    if quoted is None:
        return None
    text, start = quoted[1], quoted.start(1)
    places = [
        i
        for i in range(len(text) - 1)
        if text[i].isalnum() and text[i + 1].isalnum() and text[i].lower() != text[i + 1].lower()
    ]
    if not places:
        return None
    i = start + places[rng.integers(len(places))]
    return prompt[:i] + prompt[i + 1] + prompt[i] + prompt[i + 2 :]
