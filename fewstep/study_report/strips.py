"""Strips like the paper's figure 3: one prompt and noise, a row a variant, a column a probe."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from fewstep.evals.grid import grid, on_white
from fewstep.study_report.read import Cell, Study

SIDE = 96
"""Pixels that a tile is enlarged to, if it is smaller."""
GUIDANCE = ("base_only", "specialised_only", "constant", "stepwise", "adaptive")


@dataclass(frozen=True)
class Strip:
    """One prompt and one noise over the training of several variants."""

    case: str
    prompt: str
    seed: int
    """The training seed of every row."""
    image: Image.Image
    missing: int
    """Tiles left grey because the picture is not there or cannot be read."""


def strips(study: Study, *, limit: int = 6) -> list[Strip]:
    """A strip for the first noise of the first case of each category, by training seed.

    Rows are the guidance strategies if the study has them, else all variants. `limit` is per
    training seed.
    """
    chosen = [name for role in GUIDANCE if (name := study.roles.get(role)) is not None]
    variants = list(dict.fromkeys(chosen)) or list(study.titles)
    made = []
    for seed in sorted({cell.seed for cell in study.cells}):
        cells = [
            cell
            for name in variants
            for cell in study.cells
            if (cell.variant, cell.seed) == (name, seed) and probe_steps(cell)
        ]
        for picture in _pictures(cells)[:limit] if cells else []:
            strip = _strip(study, cells, picture, seed)
            made += [strip] if strip is not None else []
    return made


def probe_steps(cell: Cell) -> list[int]:
    """The iterations of which a cell kept pictures."""
    found = [re.fullmatch(r"step_(\d+)", path.name) for path in cell.folder.glob("probe/step_*")]
    return sorted(int(match[1]) for match in found if match)


def _pictures(cells: Sequence[Cell]) -> list[str]:
    """The file of one picture a category, of those that any cell has."""
    names: set[str] = set()
    for cell in cells:
        last = cell.folder / "probe" / f"step_{probe_steps(cell)[-1]:06d}"
        names |= {path.name for path in last.glob("*-s0.png")}
    first: dict[str, str] = {}
    for name in sorted(names):
        first.setdefault(re.sub(r"-?\d+-s0\.png$", "", name), name)
    order = sorted(first, key=lambda kind: (not kind.startswith("t2i"), kind))
    return [first[kind] for kind in order]


def _strip(study: Study, cells: Sequence[Cell], name: str, seed: int) -> Strip | None:
    """None if not one of the pictures can be read."""
    steps = sorted({step for cell in cells for step in probe_steps(cell)})
    rows, missing = [], 0
    for cell in cells:
        folders = [*(f"step_{step:06d}" for step in steps), "teacher"]
        tiles = [_open(cell.folder / "probe" / folder / name) for folder in folders]
        missing += tiles.count(None)
        rows.append(tiles)
    widest = max((tile.width for row in rows for tile in row if tile is not None), default=0)
    if not widest:
        return None
    case = re.sub(r"-s0\.png$", "", name)
    return Strip(
        case=case,
        prompt=_prompt(cells[0].folder / "probe" / "teacher" / "cases.json", case),
        seed=seed,
        image=grid(
            rows,
            row_labels=[study.titles[cell.variant] for cell in cells],
            column_labels=[*(str(step) for step in steps), "base teacher"],
            scale=max(1, SIDE // widest),
        ),
        missing=missing,
    )


def _open(path: Path) -> Image.Image | None:
    try:
        with Image.open(path) as file:
            return on_white(file)
    except (OSError, ValueError, SyntaxError):
        return None


def _prompt(path: Path, case: str) -> str:
    """As the probe noted it; empty where it did not."""
    try:
        cases = json.loads(path.read_text())["cases"]
        return next((str(prompt) for name, prompt, *_ in cases if name == case), "")
    except (OSError, ValueError, KeyError, TypeError):
        return ""
