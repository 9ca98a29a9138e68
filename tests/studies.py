"""Makes the folder of a study as `fewstep sweep` leaves it, with scores drawn from known means."""

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from fewstep.evals.rows import Row, RowWriter
from fewstep.recipe.load import dump_yaml, load_recipe
from fewstep.sweep.study import Study, StudyBudget, Variant

LAB = Path(__file__).parent.parent / "recipes" / "lab"
T2I = ("landscape", "portrait", "text")
EDIT = ("scene", "style")
CODE, EVALUATION = "c0de" * 4, "eva1" * 4
REFERENCES = {"teacher-80nfe": 80, "teacher-t2i-80nfe": 80, "teacher-4nfe": 4}
RECIPES = {
    "e1": "e1_landscape.yaml",
    "e2": "e2_portrait.yaml",
    "e3": "e3_text.yaml",
    "e4": "e4_landscape_portrait.yaml",
    "e5": "e5_all.yaml",
    "base_only": "guidance_base.yaml",
    "specialised_only": "guidance_specialised.yaml",
    "constant": "guidance_constant.yaml",
    "stepwise": "guidance_stepwise.yaml",
    "zero_shot": "zero_shot.yaml",
    "r9to1": "mixture_9to1.yaml",
    "r7to3": "mixture_7to3.yaml",
    "r5to5": "mixture_5to5.yaml",
}

Means = Mapping[str, float | Mapping[str, float]]
"""The true mean of a variant or reference, for all categories or by category."""


def write_study(
    folder: Path,
    means: Means,
    *,
    roles: Mapping[str, str] | None = None,
    takeaways: tuple[int, ...] = (),
    seeds: int = 3,
    cases: int = 12,
    noise: float = 0.1,
    wobble: float = 0.01,
    curves: Mapping[str, Callable[[int, int], float]] | None = None,
    status: Mapping[tuple[str, int], str] | None = None,
    change: Callable[[str, int | None, dict], dict | None] | None = None,
    variants: Mapping[str, Variant] | None = None,
    base: Path = LAB / "unified.yaml",
    pictures: bool = True,
    recipes: bool = False,
) -> Path:
    """`curves` are probe scores by variant, of (seed, step); `change` edits or drops (None) rows.

    Every variant plays the role of its own name unless `roles` says otherwise.
    """
    generator = np.random.default_rng(7)
    status = status or {}
    names = [name for name in means if name not in REFERENCES]
    roles = {name: name for name in names} if roles is None else roles
    known = variants or {}
    study = Study(
        name="test-study",
        question="Does the recipe matter?",
        base=str(base),
        seeds=tuple(range(seeds)),
        budget=StudyBudget(updates=100, batch=32),
        variants={n: known.get(n, Variant(title=f"the {n}")) for n in names},
        takeaways=takeaways,
        roles=dict(roles),
    )
    folder.mkdir(parents=True)
    (folder / "study.yaml").write_text(dump_yaml(study))
    entries = []
    asked = [
        (task, category, f"{task}-{category}-{i:04d}")
        for task, categories in (("t2i", T2I), ("edit", EDIT))
        for category in categories
        for i in range(cases)
    ]
    hardness = {case: generator.normal(0, 0.3) for _, _, case in asked}

    def rows(path: Path, who: str, seed: int | None, model: str, nfe: int) -> None:
        moved = generator.normal(0, wobble) if seed is not None else 0.0
        with RowWriter(path) as log:
            for task, category, case in asked:
                mean = means[who]
                true = mean.get(category, mean["else"]) if isinstance(mean, Mapping) else mean
                score = true + moved + hardness[case] + generator.normal(0, noise)
                fields = {
                    "model": model,
                    "nfe": nfe,
                    "task": task,
                    "category": category,
                    "case": case,
                    "prompt": f"prompt of {case}",
                    "seed": 5,
                    "image": f"images/{model}/{case}.png",
                    "score": float(np.clip(score, 1, 5)),
                    "status": "ok",
                    "judge": "oracle-1",
                }
                changed = fields if change is None else change(who, seed, fields)
                if changed is not None:
                    log.write(Row(**changed))

    for reference in [name for name in means if name in REFERENCES]:
        path = folder / "reference" / "eval" / "rows.jsonl"
        rows(path, reference, None, reference, REFERENCES[reference])
    for seed in range(seeds):
        for name in names:
            own = Path("cells") / name / f"seed{seed}"
            state = status.get((name, seed), "done")
            identity = {
                "recipe_hash": f"{name}-{seed}",
                "evaluation_hash": EVALUATION,
                "code_hash": CODE,
            }
            entries.append(
                {"index": len(entries), "variant": name, "seed": seed, "folder": str(own)}
                | identity
                | {"predicted_seconds": 60.0}
            )
            (folder / own).mkdir(parents=True)
            (folder / own / "cell.json").write_text(
                json.dumps(
                    {"status": state, "seconds": 42.0 if state == "done" else 0.0} | identity
                )
            )
            if recipes:
                text = _recipe(RECIPES.get(name, "unified.yaml"))
                (folder / own / "cell.yaml").write_text(text)
            if state == "queued":
                continue
            _training(folder / own, name, seed, curves or {}, generator, pictures=pictures)
            if state == "done":
                rows(folder / own / "eval" / "rows.jsonl", name, seed, "student-4nfe", 4)
    (folder / "study.json").write_text(json.dumps({"study": study.name, "cells": entries}))
    return folder


@cache
def _recipe(name: str) -> str:
    return dump_yaml(load_recipe(LAB / name))


def _training(
    folder: Path,
    name: str,
    seed: int,
    curves: Mapping[str, Callable[[int, int], float]],
    generator: np.random.Generator,
    *,
    pictures: bool,
) -> None:
    steps = (10, 50, 100)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, 101):
            record: dict[str, float] = {"step": step, "loss/fake": 1 / step}
            record["mismatch/t2i/base/k0"] = 0.1 + (step / 500 if name == "specialised_only" else 0)
            if step in steps and name in curves:
                record["probe/score/t2i"] = curves[name](seed, step)
                record["probe/collapsed"] = float(record["probe/score/t2i"] < 2)
                record["probe/diversity_ratio"] = 0.9
            file.write(json.dumps(record) + "\n")
    if not pictures:
        return
    for place in (*(f"step_{step:06d}" for step in steps), "teacher"):
        for case in ("t2i-portrait-0000", "t2i-text-0000"):
            pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            file = folder / "probe" / place / f"{case}-s0.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).resize((32, 32), Image.Resampling.NEAREST).save(file)
    (folder / "probe" / "teacher" / "cases.json").write_text(
        json.dumps({"seeds": 1, "cases": [["t2i-portrait-0000", "a person , smiling", 1]]})
    )
