"""What is drawn and measured now and then while a student trains: score, diversity, noise left.

Always the same training-split cases and noises, next to what the base teacher draws from them. The
evaluation split is never touched. Nothing here draws from the training's random streams.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Final

import numpy as np
import torch
from PIL import Image

from fewstep.core.types import Task
from fewstep.domain import Case, Domain, Images
from fewstep.evals.runner import Draw, batches, sources_of
from fewstep.recipe.schema import Probe as Settings

Metrics = dict[str, float]

THUMBNAIL: Final = 16
"""Side of the pictures whose distance is diversity: residual noise averages out in them."""
COLLAPSED: Final = 0.4
"""Alarm when diversity or variety falls below this part of the teacher's; see docs/stability.md."""
WINDOW: Final = 4
"""Side of the windows in which noise is measured, in pixels."""
CALM: Final = 0.716
"""Sigma of the calmest tenth of the windows over the true one, measured on white noise."""


@dataclass(frozen=True)
class Drawn:
    """Every case of one condition from every noise: images uint8 [cases, seeds, h, w, 3]."""

    cases: tuple[Case, ...]
    images: np.ndarray

    @property
    def task(self) -> Task:
        return self.cases[0].task

    @property
    def category(self) -> str:
        return self.cases[0].category


class Probe:
    """Fixed cases and noises of a run. Noise i is the same for every case, so that what tells two
    pictures of one noise apart is their prompt alone."""

    def __init__(
        self,
        domain: Domain,
        conditions: Sequence[tuple[Task, str]],
        settings: Settings,
        teacher: Draw,
        *,
        seed: int,
        batch: int,
        out: Path,
    ) -> None:
        self.domain, self.settings, self.batch, self.out = domain, settings, batch, out
        self.draw_teacher = teacher
        self.cases = [
            domain.cases(task, category, settings.per_category, seed, evaluation=False)
            for task, category in conditions
        ]
        self.noise = torch.stack(
            [
                torch.randn(
                    domain.sample_shape, generator=torch.Generator().manual_seed(seed + 1 + i)
                )
                for i in range(settings.seeds)
            ]
        )
        self.alarmed = False

    def measure(self, step: int, student: Draw) -> Metrics:
        """Draw, keep and measure; the teacher draws once for a run folder."""
        drawn = self._draw(student)
        save(drawn, self.out / f"step_{step:06d}")
        return summarise(drawn, self.teacher, [self._score(group) for group in drawn])

    def alarm(self, step: int, metrics: Metrics) -> str:
        """What to say about a collapse; only the first time."""
        if self.alarmed or not metrics["probe/collapsed"]:
            return ""
        self.alarmed = True
        found = [f"{key.removeprefix('probe/')} {metrics[key]:.2f}" for key in collapsed(metrics)]
        return (
            f"update {step}: mode collapse, below {COLLAPSED:g} of the teacher's: "
            f"{', '.join(found)}; see {self.out / f'step_{step:06d}'}"
        )

    def _draw(self, draw: Draw) -> list[Drawn]:
        found = []
        for cases in self.cases:
            repeated = [case for case in cases for _ in self.noise]
            noise = self.noise.repeat(len(cases), *[1] * (self.noise.ndim - 1))
            parts = zip(batches(repeated, self.batch), noise.split(self.batch), strict=True)
            images = np.concatenate([self._images(draw, *part) for part in parts])
            shape = (len(cases), len(self.noise), *images.shape[1:])
            found.append(Drawn(tuple(cases), images.reshape(shape)))
        return found

    def _images(self, draw: Draw, cases: Sequence[Case], noise: torch.Tensor) -> Images:
        cond = self.domain.condition([case.prompt for case in cases], sources_of(cases))
        return self.domain.decode(draw(noise, cond, cases[0].task))

    @cached_property
    def teacher(self) -> list[Drawn]:
        """The teacher's pictures, from the run folder if they are of these cases and noises."""
        folder = self.out / "teacher"
        asked = json.dumps(
            {
                "seeds": self.settings.seeds,
                "cases": [[c.id, c.prompt, c.seed] for cases in self.cases for c in cases],
            },
            indent=1,
        )
        marker = folder / "cases.json"
        if marker.is_file() and marker.read_text() == asked:
            return [load(cases, self.settings.seeds, folder) for cases in self.cases]
        marker.unlink(missing_ok=True)
        drawn = self._draw(self.draw_teacher)
        save(drawn, folder)
        marker.write_text(asked)  # last: a folder that a kill left half full is drawn again
        return drawn

    def _score(self, drawn: Drawn) -> float | None:
        """The mean of what the domain's judge could score."""
        seeds = drawn.images.shape[1]
        cases = [case for case in drawn.cases for _ in range(seeds)]
        verdicts = self.domain.judge(drawn.images.reshape(-1, *drawn.images.shape[2:]), cases)
        scores = [verdict.score for verdict in verdicts if verdict.score is not None]
        return fmean(scores) if scores else None


def save(drawn: Sequence[Drawn], folder: Path) -> None:
    """`<case>-s<i>.png` for every image."""
    folder.mkdir(parents=True, exist_ok=True)
    for group in drawn:
        for case, images in zip(group.cases, group.images, strict=True):
            for i, image in enumerate(images):
                Image.fromarray(image).save(folder / f"{case.id}-s{i}.png")


def load(cases: Sequence[Case], seeds: int, folder: Path) -> Drawn:
    images = [
        [np.asarray(Image.open(folder / f"{case.id}-s{i}.png")) for i in range(seeds)]
        for case in cases
    ]
    return Drawn(tuple(cases), np.array(images))


# --- what is measured -----------------------------------------------------------------------------


def summarise(
    student: Sequence[Drawn], teacher: Sequence[Drawn], scores: Sequence[float | None]
) -> Metrics:
    """The `probe/...` metrics from both's pictures, one Drawn a condition in the same order.

    - `score/<task>[/<category>]`: mean score of the judge; a task's is the mean of its categories
    - `diversity/<task>[/<category>]`: distance between the noises of a case, 0-1
    - `diversity_ratio/<task>[/<category>]`: the same over the teacher's
    - `variety_ratio/<task>`: distance between the cases of a noise, over the teacher's
    - `noise[/<task>]`: residual noise on flat parts minus the teacher's, of 255
    - `collapsed`: 1 where a task's diversity or variety is below COLLAPSED of the teacher's
    """
    found: Metrics = {}
    residual = []
    for task in dict.fromkeys(group.task for group in student):
        at = [i for i, group in enumerate(student) if group.task == task]
        for i in at:
            name = f"{task}/{student[i].category}"
            found[f"diversity/{name}"] = diversity(student[i].images)
            found |= _ratio(f"diversity_ratio/{name}", student[i].images, teacher[i].images)
        own, base = (np.concatenate([side[i].images for i in at]) for side in (student, teacher))
        found[f"diversity/{task}"] = diversity(own)
        found |= _ratio(f"diversity_ratio/{task}", own, base)
        found |= _ratio(f"variety_ratio/{task}", own.swapaxes(0, 1), base.swapaxes(0, 1))
        scored = {student[i].category: s for i in at if (s := scores[i]) is not None}
        found |= {f"score/{task}/{category}": score for category, score in scored.items()}
        if scored:
            found[f"score/{task}"] = fmean(scored.values())
        excess = flat_noise(np.concatenate(own)) - flat_noise(np.concatenate(base))
        found[f"noise/{task}"] = float(excess.mean())
        residual.append(excess)
    found["noise"] = float(np.concatenate(residual).mean())
    metrics = {f"probe/{key}": value for key, value in found.items()}
    return metrics | {"probe/collapsed": float(bool(collapsed(metrics)))}


def collapsed(metrics: Metrics) -> list[str]:
    """The keys of a task's diversity and variety that are below COLLAPSED of the teacher's."""
    return [
        key
        for key, value in metrics.items()
        if key.split("/")[1] in ("diversity_ratio", "variety_ratio")
        and key.count("/") == 2
        and value < COLLAPSED
    ]


def _ratio(key: str, own: np.ndarray, base: np.ndarray) -> Metrics:
    """Nothing where the teacher itself has no diversity, such as with one case a task."""
    reference = diversity(base)
    return {key: diversity(own) / reference} if reference > 0 else {}


def diversity(images: np.ndarray) -> float:
    """Mean distance of the pictures [n, m, h, w, 3] of a group of m, over pairs and groups; 0-1.

    Root mean square over the pixels of thumbnails, in which residual noise all but averages out: it
    must not pass for diversity. Pixels and not latents, because every domain has them and latents
    of two autoencoders do not compare. 0 for groups of one.
    """
    small = np.array([[_thumbnail(image) for image in group] for group in images])
    pairs = [
        np.sqrt(((group[i] - group[j]) ** 2).mean())
        for group in small
        for i, j in combinations(range(len(group)), 2)
    ]
    return float(np.mean(pairs)) if pairs else 0.0


def _thumbnail(image: np.ndarray) -> np.ndarray:
    small = Image.fromarray(image).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float64) / 255


def flat_noise(images: Images) -> np.ndarray:
    """Sigma [n], of 255, of the noise on the calmest tenth of the windows of each image.

    Second differences in both directions (Immerkaer 1996): a ramp and every edge along a row or a
    column answer 0, white noise of sigma s answers with 6 s. Other detail answers too, hence the
    calmest tenth of the windows; among windows of equal noise these are calmer than the mean by
    CALM. Needs no ground truth; a picture that is detail all over reads as noisy, which is why only
    the difference to the teacher's picture of the same case is logged.
    """
    x = images.astype(np.float64)
    rows = x[:, :-2] - 2 * x[:, 1:-1] + x[:, 2:]
    both = rows[:, :, :-2] - 2 * rows[:, :, 1:-1] + rows[:, :, 2:]
    n, h, w, c = both.shape
    side = min(WINDOW, h, w)
    h, w = h - h % side, w - w % side
    windows = (both[:, :h, :w] ** 2).reshape(n, h // side, side, w // side, side, c)
    energy = np.sort(windows.mean((2, 4, 5)).reshape(n, -1), axis=1)
    calmest = energy[:, : max(1, energy.shape[1] // 10)]
    return np.sqrt(calmest.mean(1)) / 6 / CALM
