"""Measures the judge: errors on held-out renders, and the rank of known good and bad images.

`python -m fewstep.lab.oracle_validation` prints the tables of `docs/oracle.md`; `--calibrate`
prints the training-split measurements behind the constants of `oracle.py`.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch

from fewstep.lab.corrupt import (
    add_noise,
    blur,
    corruptions,
    jpeg,
    mean_image,
    swapped_letters,
    wrong_scene,
)
from fewstep.lab.edits import EDIT_CATEGORIES, Edit, sample_edit
from fewstep.lab.grammar import caption
from fewstep.lab.oracle import Judgement, Oracle, content_change, kept_change, load_oracle
from fewstep.lab.pools import load_autoencoder
from fewstep.lab.reader import NO_LETTER, PLACES, TARGETS
from fewstep.lab.world import ATTRIBUTES, CATEGORIES, render, sample_scene

# control -> strength of the corruptions of `corrupt.py`
MILD: Final = 0.35
STRONG: Final = 0.85
NOISE_SIGMAS: Final = (2, 4, 8, 16)


@dataclass(frozen=True)
class Standing:
    """How a kind of image is judged: mean scores, and how often the original beats it."""

    score: float
    subscores: dict[str, float]
    hits: float


def stand(judged: Sequence[Judgement], original: Sequence[Judgement]) -> Standing:
    names = judged[0].subscores
    return Standing(
        float(np.mean([j.score for j in judged])),
        {n: float(np.mean([j.subscores[n] for j in judged])) for n in names},
        float(np.mean([a.score > b.score for a, b in zip(original, judged, strict=True)])),
    )


def attribute_errors(
    oracle: Oracle, count: int, seed: int, *, round_trip: bool = False
) -> dict[str, float]:
    """Share of evaluation-split renders, `count` a category, on which each target is misread."""
    rng = np.random.default_rng(seed)
    kinds = corruptions(load_autoencoder()) if round_trip else {}
    wrong: dict[str, list[bool]] = {}
    for category in CATEGORIES:
        scenes = [sample_scene(category, rng, evaluation=True) for _ in range(count)]
        images = np.stack([render(s) for s in scenes])
        if round_trip:
            images = kinds["round_trip"](images, np.zeros(count), rng)
        for scene, look in zip(scenes, oracle.look(images), strict=True):
            truth = {"category": category, "style": "photo"} | dict(scene.attributes)
            if category == "text":
                wrong.setdefault("word", []).append(look.read("word") != scene["word"])
                truth |= dict(zip(PLACES, scene["word"].ljust(len(PLACES), NO_LETTER), strict=True))
            elif truth.get("count") == "no":
                del truth["landmark"], truth["colour"]
            for name in TARGETS:
                if name in truth:
                    wrong.setdefault(name, []).append(look.read(name) != truth[name])
    return {name: float(np.mean(values)) for name, values in wrong.items()}


def rank_t2i(oracle: Oracle, category: str, count: int, seed: int) -> dict[str, Standing]:
    """True evaluation renders and their controls, judged against captions of the true scene."""
    rng = np.random.default_rng(seed)
    kinds = corruptions(load_autoencoder())
    scenes = [sample_scene(category, rng, evaluation=True) for _ in range(count)]
    says = [caption(s, rng).says for s in scenes]
    truth = np.stack([render(s) for s in scenes])
    mild, strong = np.full(count, MILD), np.full(count, STRONG)
    images = {
        "original": truth,
        "round trip": kinds["round_trip"](truth, mild, rng),
        "generator errors, mild": kinds["generate"](truth, mild, rng),
        "generator errors, strong": kinds["generate"](truth, strong, rng),
        "blur, mild": blur(truth, mild, rng),
        "blur, strong": blur(truth, strong, rng),
        "JPEG, mild": jpeg(truth, mild, rng),
        "JPEG, strong": jpeg(truth, strong, rng),
        **{f"noise {s}": add_noise(truth, s, rng) for s in NOISE_SIGMAS},
        "wrong caption": np.stack([render(wrong_scene(s, rng, evaluation=True)) for s in scenes]),
        "mean image": np.repeat(mean_image(category, rng)[None], count, 0),
    }
    if category == "text":
        images["swapped letters"] = np.stack([render(swapped_letters(s, rng)) for s in scenes])
    judged = {name: oracle.judge_t2i(x, scenes, says) for name, x in images.items()}
    return {name: stand(j, judged["original"]) for name, j in judged.items()}


def other_nuisance(edit: Edit) -> np.ndarray:
    """A perfect image of another scene: all attributes of the target, everything else different.

    Where no pixel has to stay, that would be a right answer; there all that is said of the
    landmarks is different too.
    """
    if edit.operation == "elsewhere":
        values = {n: ATTRIBUTES["landscape"][n] for n in ("count", "landmark", "colour")}
        values["count"] = values["count"][1:]
        others = {n: v[v.index(edit.after[n]) - 1] for n, v in values.items()}
        return render(edit.after.with_(others))
    before, after = (replace(s, nuisance=s.nuisance + 1) for s in (edit.before, edit.after))
    return replace(edit, before=before, after=after).images()[1]


def rank_edit(oracle: Oracle, category: str, count: int, seed: int) -> dict[str, Standing]:
    """True targets of evaluation-split edits and their controls."""
    rng = np.random.default_rng(seed)
    kinds = corruptions(load_autoencoder())
    edits = [sample_edit(category, rng, evaluation=True) for _ in range(count)]
    sources, targets = (np.stack(side) for side in zip(*(e.images() for e in edits), strict=True))
    mild, strong = np.full(count, MILD), np.full(count, STRONG)
    images = {
        "original": targets,
        "round trip": kinds["round_trip"](targets, mild, rng),
        "generator errors, mild": kinds["generate"](targets, mild, rng),
        "generator errors, strong": kinds["generate"](targets, strong, rng),
        "blur, strong": blur(targets, strong, rng),
        "noise 8": add_noise(targets, 8, rng),
        "untouched source": sources,
        "other picture": np.stack([other_nuisance(e) for e in edits]),
    }
    if category == "text_edit":
        swapped = [replace(e, after=swapped_letters(e.after, rng)) for e in edits]
        images["swapped letters"] = np.stack([render(e.after) for e in swapped])
    judged = {name: oracle.judge_edit(x, edits) for name, x in images.items()}
    return {name: stand(j, judged["original"]) for name, j in judged.items()}


def print_standings(title: str, standings: dict[str, Standing]) -> None:
    names = list(next(iter(standings.values())).subscores)
    print(f"\n| {title} | score | {' | '.join(names)} | original wins |")
    print(f"|---|---|{'---|' * len(names)}---|")
    for name, s in standings.items():
        wins = "" if name == "original" else f"{s.hits:.0%}"
        parts = " | ".join(f"{s.subscores[n]:.2f}" for n in names)
        print(f"| {name} | {s.score:.2f} | {parts} | {wins} |")


def validate(count: int, seed: int) -> None:
    oracle = load_oracle()
    print(oracle.name)
    true, again = (attribute_errors(oracle, 10 * count, seed, round_trip=r) for r in (False, True))
    print("\n| attribute | misread, true renders | misread, round trip |\n|---|---|---|")
    for name in true:
        print(f"| {name} | {true[name]:.2%} | {again[name]:.2%} |")
    for category in CATEGORIES:
        print_standings(category, rank_t2i(oracle, category, count, seed))
    for category in EDIT_CATEGORIES:
        print_standings(f"edit: {category}", rank_edit(oracle, category, count, seed))


def calibrate(count: int, seed: int) -> None:
    """Training-split quantiles of the measurements that the scales of `oracle.py` map to scores."""
    oracle, rng = load_oracle(), np.random.default_rng([seed, 1])
    kinds = corruptions(load_autoencoder())
    scenes = [sample_scene(CATEGORIES[i % 3], rng) for i in range(count)]
    truth = np.stack([render(s) for s in scenes])

    def show(name: str, *columns: Sequence[float]) -> None:
        cells = " | ".join(
            " ".join(f"{q:.4g}" for q in np.quantile(c, (0.05, 0.5, 0.95))) for c in columns
        )
        print(f"| {name} | {cells} |")

    print("| picture | distance 5% 50% 95% | noise 5% 50% 95% |\n|---|---|---|")
    looks = oracle.look(truth)
    show("true render", [k.distance for k in looks], [k.noise for k in looks])
    for kind, apply in kinds.items():
        for strength in (0.0,) if kind == "round_trip" else (0.1, MILD, STRONG):
            looks = oracle.look(apply(truth, np.full(count, strength), rng))
            show(f"{kind} {strength}", [k.distance for k in looks], [k.noise for k in looks])
    for sigma in NOISE_SIGMAS:
        looks = oracle.look(add_noise(truth, sigma, rng))
        show(f"noise sigma {sigma}", [k.distance for k in looks], [k.noise for k in looks])
    print("\n| edit | kept or content change 5% 50% 95% |\n|---|---|")
    for category in EDIT_CATEGORIES:
        edits = [sample_edit(category, rng) for _ in range(count // 2)]
        pairs = [e.images() for e in edits]
        targets = np.stack([t for _, t in pairs])
        pictures = {
            "target": targets,
            "round trip": kinds["round_trip"](targets, np.zeros(len(edits)), rng),
            "generate mild": kinds["generate"](targets, np.full(len(edits), MILD), rng),
            "generate strong": kinds["generate"](targets, np.full(len(edits), STRONG), rng),
            "source": np.stack([s for s, _ in pairs]),
            "other picture": np.stack([other_nuisance(e) for e in edits]),
        }
        for name, images in pictures.items():
            show(
                f"{category}, {name}",
                [
                    content_change(x, pair)
                    if category in ("style", "enhance")
                    else kept_change(x, e, *pair)
                    for x, e, pair in zip(images, edits, pairs, strict=True)
                ],
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="cases a category")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--calibrate", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    (calibrate if args.calibrate else validate)(args.count, args.seed)


if __name__ == "__main__":
    main()
