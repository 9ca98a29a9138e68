"""What a user hands to `fewstep sample`: a file of prompts, an image to edit, a file to write."""

from pathlib import Path

import numpy as np
from PIL import UnidentifiedImageError

from fewstep.data import promptfiles
from fewstep.data.pixels import IMAGE_FORMATS, UNREADABLE, crop_and_resize, read_rgb
from fewstep.errors import DataError, RecipeError
from fewstep.session import PICTURES, say

POOLS = (".jsonl", ".csv", ".parquet")


def read_prompts(path: Path | None) -> list[str]:
    """One prompt a line, empty lines left out; or the prompts of a .jsonl, .csv or .parquet pool.

    Instructions that come with a source image are left out.
    """
    if path is None:
        return []
    if path.suffix.lower() in POOLS:
        records = promptfiles.read_prompts(path)
        return [record.prompt for record in records if record.task == "t2i"]
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise DataError(
            f"prompt file {path}: is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from None
    except OSError as error:
        raise DataError(f"prompt file {path}: cannot be read ({error.strerror})") from None
    found = [line for line in lines if line]
    if not found:
        raise DataError(f"prompt file {path}: no prompt in it; write one a line")
    return found


def open_source(path: Path, size: int | None) -> np.ndarray:
    """An image to edit as uint8 [size, size, 3], its largest centred square, or as it is where
    `size` is None. Tells what changed."""
    try:
        image, converted = read_rgb(path.read_bytes())
    except UnidentifiedImageError:
        raise DataError(
            f"source image {path}: no image, or damaged; {', '.join(IMAGE_FORMATS)} can be read"
        ) from None
    except UNREADABLE as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise DataError(f"source image {path}: cannot be read ({reason})") from None
    if converted:
        say(f"source image {path}: {converted}")
    if size is None:
        return np.asarray(image)
    if image.width != image.height:
        side = min(image.size)
        say(
            f"source image {path}: {image.width} x {image.height} pixels, of which the centred "
            f"{side} x {side} are taken"
        )
    if min(image.size) < size:
        say(
            f"source image {path}: {image.width} x {image.height} pixels, enlarged to {size} x "
            f"{size}; expect a blurred result"
        )
    return np.asarray(crop_and_resize(image, size))


def check_picture(out: Path) -> None:
    """Make the picture's folder; refuse, before anything is drawn, what cannot be written."""
    if out.suffix.lower() not in PICTURES:
        raise RecipeError(
            f"{out} is no picture", field="--out", hint=f"end it in one of {', '.join(PICTURES)}"
        )
    if out.is_dir():
        raise RecipeError(f"{out} is a folder", field="--out", hint="give the name of a picture")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(
            f"no folder {out.parent} can be made ({error.strerror})",
            field="--out",
            hint="choose another place",
        ) from None
