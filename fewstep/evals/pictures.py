"""Pictures of an evaluation as they lie on the disk, and what tells that one is still the same."""

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from fewstep.evals.rows import Row


def read_picture(path: Path) -> np.ndarray:
    """uint8 [h, w, 3]; OSError where there is none."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def content_of(
    task: str,
    category: str,
    prompt: str,
    image: np.ndarray,
    source: np.ndarray | None,
    target: np.ndarray | None,
) -> str:
    """16 hex digits of all that a judge may look at; of pixels, so that a copy is the same."""
    digest = hashlib.sha256(f"{task}\0{category}\0{prompt}".encode())
    for picture in (image, source, target):
        shape = None if picture is None else picture.shape
        digest.update(f"\0{shape}\0".encode() + (b"" if picture is None else picture.tobytes()))
    return digest.hexdigest()[:16]


def content_on_disk(row: Row, out: Path) -> str | None:
    """What the files of a row say now; None where one of them cannot be read."""
    try:
        image, source, target = (
            None if name is None else read_picture(out / name)
            for name in (row.image, row.source, row.target)
        )
    except OSError:
        return None
    assert image is not None
    return content_of(row.task, row.category, row.prompt, image, source, target)
