"""Real images as the x_0 of a real model: the part of them that has the recipe's size.

Sources keep their shape, for the pipelines take any; a target is what the network draws and has one
size for all.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

from fewstep.data.promptfiles import PromptRecord
from fewstep.errors import refuse

Size = tuple[int, int]
"""(height, width) in pixels."""

MOST_CUT = 0.1
"""The largest part of an edit's target that may be cut off. Its source is taken whole, so that what
was cut would be taught as part of the edit."""


def target_pixels(image: Image.Image, size: Size) -> Float[Tensor, "1 3 h w"]:
    """The largest centred part with the shape of `size`, scaled with Lanczos, in [-1, 1]."""
    height, width = size
    fitted = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.asarray(fitted).copy())
    return pixels.permute(2, 0, 1)[None].float() / 127.5 - 1


def cut_off(image: Size, size: Size) -> float:
    """The part of an image's area that `target_pixels` leaves out."""
    (height, width), (wanted_height, wanted_width) = image, size
    scale = max(wanted_height / height, wanted_width / width)
    return 1 - wanted_height * wanted_width / (scale**2 * height * width)


def refuse_other_shapes(path: Path, records: Sequence[PromptRecord], size: Size) -> None:
    """DataError that lists the edits whose target would lose more than `MOST_CUT`."""
    problems = []
    for record in records:
        if record.task == "edit" and record.target is not None:
            lost = cut_off(record.target.size, size)
            if lost > MOST_CUT:
                shape, wanted = ("x".join(map(str, s)) for s in (record.target.size, size))
                problems.append(
                    f"{record.where}: the target {record.target.name} is {shape}, of which "
                    f"{lost:.0%} would be cut off for model.size {wanted}, but not of its source; "
                    f"crop both alike, or remove the row"
                )
    refuse(path, problems)


def changes(records: Sequence[PromptRecord], size: Size) -> list[str]:
    """How many real images are enlarged or cropped, for the user to know."""
    sizes = {r.target.digest: r.target.size for r in records if r.target is not None}
    small = sum(1 for h, w in sizes.values() if h < size[0] or w < size[1])
    cropped = sum(1 for found in sizes.values() if cut_off(found, size) > MOST_CUT)
    shape = "x".join(map(str, size))
    told = {
        f"are smaller than {shape} and are enlarged": small,
        f"lose more than {MOST_CUT:.0%} to the shape of {shape}": cropped,
    }
    return [f"{n} of {len(sizes)} target images {what}" for what, n in told.items() if n]
