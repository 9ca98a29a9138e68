"""The lab's judge: scores an image against its caption, or against a source and its instruction.

It needs no internet: it knows the truth of every case and reads images with `reader.py`. Scores are
on the paper's 1 to 5 scale (arXiv 2606.03746, appendix A): prompt compliance and technical quality
weigh equally, edits have sub-scores, and a severe failure caps the overall score. How far to trust
it is in `docs/oracle.md`.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch

from fewstep.lab.edits import LOSSY, Edit
from fewstep.lab.pools import to_pixels
from fewstep.lab.reader import (
    NO_LETTER,
    PLACES,
    READER_WEIGHTS,
    TARGETS,
    Reader,
    errors_of,
    load_reader,
)
from fewstep.lab.world import ATTRIBUTES, Scene

# --- calibration ------------------------------------------------------------------------------
# A scale maps a measurement to a score by straight lines over the logarithm of the measurement,
# between (measurement, score) anchors; beyond the ends it is flat. Anchors are set by hand beside
# training-split measurements (`python -m fewstep.lab.oracle_validation --calibrate`); caps were set
# last, with the tables of docs/oracle.md in view.
Scale = tuple[tuple[float, float], ...]

# distance to the nearest render: root mean square (of 1)
MANIFOLD: Final[Scale] = (
    (0.010, 5.0),
    (0.022, 4.75),  # the autoencoder's round trip of a render
    (0.028, 4.55),
    (0.034, 3.9),  # `corrupt.redraw` of strength 0.6
    (0.040, 3.0),
    (0.050, 2.2),
    (0.070, 1.5),
    (0.100, 1.0),
)
# noise sigma on the flattest blocks (of 255)
NOISE: Final[Scale] = ((1.0, 5.0), (2.0, 4.6), (4.0, 3.6), (8.0, 2.2), (16.0, 1.1))
# mean absolute change of what had to stay (of 1)
KEPT: Final[Scale] = ((0.006, 5.0), (0.014, 4.7), (0.025, 4.0), (0.045, 2.5), (0.075, 1.0))
# the same where a landmark is added or replaced, without the most changed pixels
KEPT_OPEN: Final[Scale] = ((0.005, 5.0), (0.0105, 4.7), (0.018, 4.0), (0.026, 2.8), (0.045, 1.0))
# the same for the landmarks of scene edits, whose outlines cost every autoencoder more
KEPT_LANDMARKS: Final[Scale] = ((0.03, 5.0), (0.06, 4.7), (0.10, 4.0), (0.16, 2.5), (0.25, 1.0))
# one minus the correlation with the content of the source or target, for style and enhancement
CONTENT: Final[Scale] = ((0.002, 5.0), (0.01, 4.7), (0.03, 4.0), (0.1, 2.5), (0.3, 1.0))
# error of a perfect answer after the autoencoder's round trip: an error this small counts as none
ROUND_TRIP: Final = 0.03
ROUND_TRIP_DISTANCE: Final = 0.022  # the same for the distance to the nearest render

CALM: Final = 0.81  # measured on white noise; see `flat_noise`
WORD_WEIGHT: Final = 0.5  # of the word in the compliance of a sign
OFF_BY_ONE: Final = 0.5  # credit for three where two were asked for
# (score of the failed part, highest overall score then possible), with straight lines between
# compliance, instruction: 2.5 is what a picture of another caption reaches by chance
CAP: Final[Scale] = ((1.0, 1.2), (2.5, 2.5), (4.0, 5.0))
CAP_WORD: Final[Scale] = ((1.0, 1.2), (5.0, 5.0))  # a misspelt sign
CAP_KEPT: Final[Scale] = ((1.0, 2.8), (3.5, 5.0))  # preservation


@dataclass(frozen=True)
class Judgement:
    """A score from 1 to 5, what it is made of, and why it is not 5."""

    score: float
    subscores: Mapping[str, float]
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Look:
    """What the oracle sees in one image before it knows what was asked for."""

    probabilities: Mapping[str, np.ndarray]
    distance: float
    """To the nearest render, as the reader maps it: root mean square, of 1."""
    noise: float
    """Sigma on flat areas, of 255."""

    def read(self, name: str) -> str:
        """The most probable class of a target, or the word."""
        if name == "word":
            return "".join(self.read(place) for place in PLACES).rstrip(NO_LETTER)
        return TARGETS[name][int(self.probabilities[name].argmax())]

    def probability(self, name: str, value: str) -> float:
        return float(self.probabilities[name][TARGETS[name].index(value)])


def on_scale(value: float, scale: Scale) -> float:
    points, scores = zip(*scale, strict=True)
    return float(np.interp(np.log(max(value, 1e-9)), np.log(points), scores))


def score_of(credit: float) -> float:
    """A share of what was asked, in [0, 1], on the 1 to 5 scale."""
    return 1 + 4 * credit


def capped(score: float, part: float, cap: Scale) -> float:
    parts, limits = zip(*cap, strict=True)
    return min(score, float(np.interp(part, parts, limits)))


# --- attributes ---------------------------------------------------------------------------------


def credit(look: Look, scene: Scene, name: str) -> float:
    """How far an attribute of the scene is there, in [0, 1]: its probability, or partial credit."""
    seen = look.probability("category", scene.category)
    if name == "word":
        return seen * word_credit(look, scene["word"])
    if name == "count":
        return seen * count_credit(look, scene["count"])
    if name in ("landmark", "colour"):  # nothing there has no colour
        seen *= 1 - look.probability("count", "no")
    return seen * look.probability(name, scene[name])


def word_credit(look: Look, word: str) -> float:
    """The share of right letters; letters too many count as wrong ones."""
    length = max(len(word), len(look.read("word")))
    return (
        sum(look.probability(p, letter) for p, letter in zip(PLACES, word, strict=False)) / length
    )


def count_credit(look: Look, count: str) -> float:
    values = ATTRIBUTES["landscape"]["count"]
    wanted = values.index(count)
    near = [v for v in values[1:] if wanted and abs(values.index(v) - wanted) == 1]
    return look.probability("count", count) + OFF_BY_ONE * sum(
        look.probability("count", v) for v in near
    )


def explain(look: Look, scene: Scene, names: Sequence[str]) -> list[str]:
    """What was wanted and what is read instead, for each attribute that is wrong."""
    if (category := look.read("category")) != scene.category:
        return [f"category: wanted {scene.category}, read {category}"]
    reasons = []
    for name in names:
        read = look.read(name)
        if name in ("landmark", "colour") and look.read("count") == "no":
            reasons.append(f"{name}: wanted {scene[name]}, nothing there")
        elif read == scene[name]:
            continue
        elif name == "word":
            longest = max(len(read), len(scene["word"]))
            letters = zip(
                scene["word"].ljust(longest, NO_LETTER), read.ljust(longest, NO_LETTER), strict=True
            )
            reasons += [
                f"letter {i}: wanted {a}, read {b}" for i, (a, b) in enumerate(letters, 1) if a != b
            ]
        else:
            reasons.append(f"{name}: wanted {scene[name]}, read {read}")
    return reasons


# --- technical quality --------------------------------------------------------------------------


def flat_noise(images: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Sigma of the noise [n], of 255, on the flattest tenth of the cells of each image.

    `errors` [n, 64], of 1, is the reader's error map. Where a picture has no flat part (a brick
    wall, a striped one) its detail must not pass for noise, so noise is at most the mapped error.
    A pixel minus the mean of its 3x3 neighbourhood has 8/9 of the variance of white noise, and
    the calmest tenth of the cells has `CALM` of the sigma of all.
    """
    x = images.astype(np.float64)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    n, h, w, c = x.shape
    mean = sum(padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)) / 9
    cells = ((x - mean) ** 2).reshape(n, 8, h // 8, 8, w // 8, c).mean((2, 4, 5)).reshape(n, -1)
    flattest = np.argsort(cells, 1, kind="stable")[:, : cells.shape[1] // 10]
    sigma = np.sqrt(np.take_along_axis(cells, flattest, 1).mean(1) * 9 / 8) / CALM
    mapped = np.sqrt((np.take_along_axis(errors, flattest, 1) ** 2).mean(1)) * 255
    return np.minimum(sigma, mapped)


def quality(look: Look) -> float:
    """Technical quality: the worse of distance to the renders and noise on flat areas."""
    return min(on_scale(look.distance, MANIFOLD), on_scale(look.noise, NOISE))


def explain_quality(look: Look) -> list[str]:
    reasons = []
    if on_scale(look.noise, NOISE) < 4:
        reasons.append(f"noise on flat areas: {look.noise:.1f}/255")
    if on_scale(look.distance, MANIFOLD) < 4:
        reasons.append(f"drawing: differs from the nearest clean one by {look.distance:.3f}")
    return reasons


# --- pixels of edits ------------------------------------------------------------------------------


def pixel_error(image: np.ndarray, target: np.ndarray) -> float:
    """Mean absolute error plus half that of the differences of neighbours, of 1."""
    error = (image.astype(np.float64) - target) / 255
    edges = np.abs(np.diff(error, axis=0)).mean() + np.abs(np.diff(error, axis=1)).mean()
    return float(np.abs(error).mean() + 0.5 * edges)


def gain(image: np.ndarray, source: np.ndarray, target: np.ndarray) -> float:
    """How much of the way from source to target is done, in [0, 1]; `ROUND_TRIP` is not counted."""
    before, after = pixel_error(source, target), pixel_error(image, target)
    whole = max(before - ROUND_TRIP, before / 2, 1e-6)
    return float(np.clip((before - after) / whole, 0, 1))


def repaired(look: Look, before: Look) -> float:
    """The share of the source's distance to the nearest render that is gone, in [0, 1]."""
    damage = before.distance
    whole = max(damage - ROUND_TRIP_DISTANCE, damage / 2, 1e-6)
    return float(np.clip((damage - look.distance) / whole, 0, 1))


def kept_change(image: np.ndarray, edit: Edit, source: np.ndarray, target: np.ndarray) -> float:
    """Mean absolute change, of 1, of the pixels that a right answer leaves alone.

    Exact edits: where source and target agree. Scene edits: the landmarks. Where a landmark is
    added or replaced its place is open, so as many pixels as the true target changes, and half as
    many again, may change anywhere. Another sign may cover some of the street that neither true
    sign covers: half as many pixels as those two do, and at most half of that street. Open edits
    may match source or target, pixel by pixel.
    """
    fixed = edit.keep()
    change = np.abs(image.astype(np.float64) - source).mean(-1) / 255
    if not edit.exact:
        change = np.minimum(change, np.abs(image.astype(np.float64) - target).mean(-1) / 255)
    if edit.exact or edit.category == "scene":
        values = change[fixed]
    elif edit.operation == "sign":
        values = np.sort(change[fixed])
        free = min(0.5 * (~fixed).sum(), 0.5 * len(values))
        values = values[: len(values) - int(free)]
    else:
        free = int(1.5 * (~fixed).sum())
        values = np.sort(change, axis=None)[: max(change.size - free, 1)]
    return float(values.mean()) if len(values) else 0.0


def content_change(image: np.ndarray, references: Sequence[np.ndarray]) -> float:
    """One minus the correlation of 2x2 block means with the nearest of the references."""

    def blocks(x: np.ndarray) -> np.ndarray:
        h, w, c = x.shape
        values = x.astype(np.float64).reshape(h // 2, 2, w // 2, 2, c).mean((1, 3)).ravel()
        values -= values.mean()
        return values / max(float(np.linalg.norm(values)), 1e-6)

    return max(1 - max(float(blocks(image) @ blocks(r)) for r in references), 0.0)


# --- the judge ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Oracle:
    """The judge; `name` carries the hash of the reader's weights, so scores say who gave them."""

    name: str
    reader: Reader

    @torch.inference_mode()
    def look(self, images: np.ndarray, *, batch: int = 64) -> list[Look]:
        """What is seen in uint8 images [n, h, w, 3]."""
        looks: list[Look] = []
        for start in range(0, len(images), batch):
            part = np.array(images[start : start + batch])  # torch wants what it may write to
            pixels = to_pixels(part).to(memory_format=torch.channels_last)
            reading = self.reader(pixels)
            probabilities = {n: p.exp().numpy() for n, p in reading.log_probs.items()}
            errors = errors_of(reading.log_errors).numpy()
            distances = np.sqrt((errors**2).mean(1))
            measured = zip(distances.tolist(), flat_noise(part, errors).tolist(), strict=True)
            looks += [
                Look({n: p[i] for n, p in probabilities.items()}, distance, noise)
                for i, (distance, noise) in enumerate(measured)
            ]
        return looks

    def read(self, images: np.ndarray) -> list[dict[str, str]]:
        """What is read off each image: the attributes of its category, each with its confidence."""
        answers = []
        for look in self.look(images):
            category = look.read("category")
            names = [n for n in ATTRIBUTES[category] if n != "word"]
            if look.read("count") == "no":
                names = [n for n in names if n not in ("landmark", "colour")]
            answer = {
                n: f"{look.read(n)} {look.probabilities[n].max():.0%}" for n in ("category", *names)
            }
            if category == "text":
                sure = min(look.probabilities[p].max() for p in PLACES)
                answer["word"] = f"{look.read('word')} {sure:.0%}"
            answers.append(answer)
        return answers

    def judge_t2i(
        self, images: np.ndarray, scenes: Sequence[Scene], says: Sequence[Sequence[str]]
    ) -> list[Judgement]:
        """Images against the attributes their captions say."""
        looks = self.look(images)
        return [judge_picture(k, s, n) for k, s, n in zip(looks, scenes, says, strict=True)]

    def judge_edit(self, images: np.ndarray, edits: Sequence[Edit]) -> list[Judgement]:
        """Edited images against what had to change and what had to stay."""
        looks = self.look(images)
        lossy = [e for e in edits if e.argument in LOSSY]
        before = iter(self.look(np.stack([e.images()[0] for e in lossy])) if lossy else ())
        return [
            judge_change(k, i, e, next(before) if e.argument in LOSSY else None)
            for k, i, e in zip(looks, images, edits, strict=True)
        ]


def load_oracle(path: Path = READER_WEIGHTS) -> Oracle:
    """The bundled judge. Raises CheckpointError when its weights are missing or damaged."""
    reader = load_reader(path)
    return Oracle(f"lab-oracle-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}", reader)


def judge_picture(look: Look, scene: Scene, says: Sequence[str]) -> Judgement:
    """T2I: the mean of compliance and quality, capped where compliance or spelling fails."""
    credits = {name: credit(look, scene, name) for name in says}
    rest = [c for name, c in credits.items() if name != "word"]
    if "word" not in credits:
        compliance = float(np.mean(rest)) if rest else look.probability("category", scene.category)
    elif rest:
        compliance = WORD_WEIGHT * credits["word"] + (1 - WORD_WEIGHT) * float(np.mean(rest))
    else:
        compliance = credits["word"]
    subscores = {"compliance": score_of(compliance), "quality": quality(look)}
    score = capped(
        (subscores["compliance"] + subscores["quality"]) / 2, subscores["compliance"], CAP
    )
    if "word" in credits:
        score = capped(score, score_of(credits["word"]), CAP_WORD)
    return Judgement(score, subscores, (*explain(look, scene, says), *explain_quality(look)))


def judge_change(look: Look, image: np.ndarray, edit: Edit, before: Look | None) -> Judgement:
    """Edit: the mean of instruction, preservation and quality, capped where the first two fail.

    `before` is the look of the source, needed for `LOSSY` repairs.
    """
    source, target = edit.images()
    if edit.category in ("style", "enhance"):
        instruction, preservation, reasons = judge_whole(look, image, edit, source, target, before)
    else:
        instruction, preservation, reasons = judge_parts(look, image, edit, source, target)
    subscores = {"instruction": instruction, "preservation": preservation, "quality": quality(look)}
    score = capped(sum(subscores.values()) / 3, instruction, CAP)
    if edit.operation == "word":
        score = capped(score, instruction, CAP_WORD)
    elif edit.operation == "sign":
        score = capped(score, score_of(credit(look, edit.after, "word")), CAP_WORD)
    score = capped(score, preservation, CAP_KEPT)
    return Judgement(score, subscores, (*reasons, *explain_quality(look)))


def judge_whole(
    look: Look,
    image: np.ndarray,
    edit: Edit,
    source: np.ndarray,
    target: np.ndarray,
    before: Look | None,
) -> tuple[float, float, list[str]]:
    """Instruction, preservation and reasons where every pixel may change: style and enhancement.

    Where detail is lost, many clean pictures fit the source, and closeness to the one that it was
    made from would favour their mean, a blurred picture. So such a repair is judged by how far the
    picture has become one that the world could have drawn; that it still agrees with the source is
    the preservation's business.
    """
    done = gain(image, source, target) if before is None else repaired(look, before)
    reasons = []
    if edit.category == "style":
        read = look.read("style")
        done = (done + look.probability("style", edit.argument)) / 2
        if read != edit.argument:
            reasons.append(f"style: wanted {edit.argument}, read {read}")
    elif done < 0.75:
        reasons.append(f"{edit.argument}: {done:.0%} repaired")
    changed = content_change(image, (source, target))
    preservation = on_scale(changed, CONTENT)
    if preservation < 4:
        reasons.append(f"content changed by {changed:.2f}")
    return score_of(done), preservation, reasons


def judge_parts(
    look: Look, image: np.ndarray, edit: Edit, source: np.ndarray, target: np.ndarray
) -> tuple[float, float, list[str]]:
    """Instruction, preservation and reasons where some attributes change and the others stay."""
    before, after = edit.before, edit.after
    asked = [n for n in ATTRIBUTES[after.category] if before[n] != after[n]]
    stay = [n for n in ATTRIBUTES[after.category] if before[n] == after[n]]
    if edit.operation == "add":
        asked, stay = (
            ["count", "landmark", "colour"],
            [n for n in stay if n not in ("landmark", "colour")],
        )
    if after.category == "landscape" and after["count"] == "no":
        asked = [n for n in asked if n not in ("landmark", "colour")]
        stay = [n for n in stay if n not in ("landmark", "colour")]
    if edit.operation == "sign":
        asked, stay = ["board", "ink", "word"], []
        rest = float(np.mean([credit(look, after, n) for n in ("board", "ink")]))
        done = WORD_WEIGHT * credit(look, after, "word") + (1 - WORD_WEIGHT) * rest
        kept_letters = 1.0
    elif asked == ["word"]:
        done, kept_letters = changed_letters(look, before["word"], after["word"])
    else:
        done, kept_letters = float(np.mean([credit(look, after, n) for n in asked])), 1.0
    kept = [credit(look, after, n) for n in stay] + ([kept_letters] if asked == ["word"] else [])
    change = kept_change(image, edit, source, target)
    kept_scale = KEPT_LANDMARKS if edit.category == "scene" else KEPT if edit.exact else KEPT_OPEN
    unchanged = on_scale(change, kept_scale)
    preservation = min(unchanged, score_of(float(np.mean(kept)) if kept else 1.0))
    reasons = explain(look, after, [*asked, *stay])
    if unchanged < 4:
        reasons.append(f"kept parts changed by {change:.2f}")
    return score_of(done), preservation, reasons


def changed_letters(look: Look, before: str, after: str) -> tuple[float, float]:
    """Share of right letters among those that had to change, and among those that had to stay."""
    right = {
        p: look.probability(p, a)
        for p, a in zip(PLACES, after.ljust(len(PLACES), NO_LETTER), strict=True)
    }
    places = zip(PLACES, before.ljust(len(after), NO_LETTER), after, strict=False)
    changed = {p for p, b, a in places if a != b}
    stayed = set(PLACES) - changed
    seen = look.probability("category", "text")
    return (
        seen * float(np.mean([right[p] for p in changed])),
        seen * float(np.mean([right[p] for p in stayed])) if stayed else 1.0,
    )
