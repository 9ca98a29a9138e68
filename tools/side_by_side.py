"""The README's picture: teacher, teacher cut and student on the same cases of an evaluated run.

python tools/side_by_side.py runs/lab-unified docs/images/lab_side_by_side.png [--per-category 2]

Cases are the first ones of each category, not chosen ones.
"""

import argparse
from collections import defaultdict
from pathlib import Path

from PIL import Image

from fewstep.evals.grid import grid
from fewstep.evals.rows import Row, read_rows

NAMES = {"t2i": "T2I", "edit": "edit"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--per-category", type=int, default=2)
    parser.add_argument("--scale", type=int, default=3)
    arguments = parser.parse_args()
    rows = read_rows(arguments.run / "eval" / "rows.jsonl").rows
    models = sorted({row.model for row in rows if "x2nfe" not in row.model}, key=_order(rows))
    lines, labels = [], []
    for (task, category), cases in _cases(rows).items():
        cells: list[Image.Image | None] = []
        for case in cases[: arguments.per_category]:
            first = case[models[0]]
            cells.append(_open(arguments.run, first.source) if first.source else None)
            cells += [_open(arguments.run, case[model].image) for model in models]
        lines.append(cells)
        labels.append(f"{NAMES[task]}: {category.replace('_', ' ')}")
    heads = ["source", *(model.replace("-", " ").replace("nfe", " NFE") for model in models)]
    picture = grid(
        lines,
        row_labels=labels,
        column_labels=heads * arguments.per_category,
        scale=arguments.scale,
        font_size=13,
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    picture.save(arguments.out, optimize=True)


def _order(rows: tuple[Row, ...]):
    nfe = {row.model: row.nfe for row in rows}
    return lambda model: (model.startswith("student"), -nfe[model], model)


def _cases(rows: tuple[Row, ...]) -> dict[tuple[str, str], list[dict[str, Row]]]:
    """Task and category to cases to rows by model, T2I first."""
    found: dict[tuple[str, str], dict[tuple[str, int], dict[str, Row]]]
    found = defaultdict(lambda: defaultdict(dict))
    for row in sorted(rows, key=lambda row: row.task != "t2i"):
        found[row.task, row.category][row.case, row.seed][row.model] = row
    return {key: list(cases.values()) for key, cases in found.items()}


def _open(run: Path, path: str) -> Image.Image:
    return Image.open(run / "eval" / path).convert("RGB")


if __name__ == "__main__":
    main()
