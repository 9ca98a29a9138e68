"""A judge for real images without a network: closeness to the held-out image, clean flat areas.

What it can say: whether an edit moved the source towards the true target, whether a generated
image is nearer to the real image of its own caption than to those of others, and whether flat
backgrounds are as quiet as real ones. What it cannot say: whether an image is good. Its scores
compare models on the same cases and mean nothing beyond that.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageFilter

from fewstep.domain import Case, Images, Verdict

BLOCK = 8
SIDE = 12  # of the thumbnail in the descriptor


class ReferenceJudge:
    """Descriptors of all real images, as the crowd that a generated image is ranked against."""

    name = "reference-colour-edge-1"

    def __init__(self, real: Images) -> None:
        self.crowd = descriptors(real)
        levels = np.array([flat_noise(image) for image in real])
        self.quiet = float(np.quantile(levels, 0.9))
        """Flat-area noise that nine in ten real images stay below, in grey levels of 255."""

    def judge(self, images: Images, cases: Sequence[Case]) -> list[Verdict]:
        found = descriptors(images)
        return [
            self._edit(image, case) if case.task == "edit" else self._t2i(image, vector, case)
            for image, vector, case in zip(images, found, cases, strict=True)
        ]

    def _t2i(self, image: np.ndarray, vector: np.ndarray, case: Case) -> Verdict:
        """Share of the other real images that are farther away than the caption's own."""
        assert isinstance(case.truth, int)
        distance = np.linalg.norm(self.crowd - vector, axis=1)
        share = float((distance > distance[case.truth]).sum() / (len(distance) - 1))
        return self._verdict(
            {"retrieval": 1 + 4 * share},
            image,
            f"nearer to its own image than to {share:.0%} of all",
        )

    def _edit(self, image: np.ndarray, case: Case) -> Verdict:
        """Share of the way from source to target: 1 - |out - target| / |source - target|."""
        assert case.source is not None and case.target is not None
        out, source, target = (x.astype(np.float32) for x in (image, case.source, case.target))
        way = np.abs(source - target).mean()
        left = np.abs(out - target).mean() / max(way, 1e-6)
        return self._verdict({"target": 1 + 4 * float(np.clip(1 - left, 0, 1))}, image,
                             f"error to the target is {left:.2f} of the source's")  # fmt: skip

    def _verdict(self, likeness: dict[str, float], image: np.ndarray, reason: str) -> Verdict:
        excess = max(flat_noise(image) - self.quiet, 0.0)
        quality = 5 - 4 * min(excess / 8, 1.0)
        scores = likeness | {"flat_noise": quality}
        return Verdict(
            float(np.mean([*scores.values()])),
            scores,
            (reason, f"flat-area noise {excess:.1f}/255 above real"),
        )


def descriptors(images: Images) -> np.ndarray:
    """A thumbnail of colours and a thumbnail of edge strength per image, float32 [n, d]."""
    rows = []
    for image in images:
        picture = Image.fromarray(image)
        colour = np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BOX), np.float32) / 255
        grey = np.asarray(picture.convert("L"), np.float32) / 255
        down, across = np.gradient(grey)
        edges = np.hypot(down, across)
        strength = np.asarray(Image.fromarray(edges).resize((SIDE, SIDE), Image.Resampling.BOX))
        rows.append(np.concatenate([colour.ravel(), 3 * strength.ravel()]))
    return np.stack(rows).astype(np.float32)


def flat_noise(image: np.ndarray) -> float:
    """Spread of the high-pass image in its flattest tenth of 8x8 blocks, grey levels of 255."""
    grey = Image.fromarray(image).convert("L")
    smooth = np.asarray(grey.filter(ImageFilter.GaussianBlur(2)), np.float32)
    rest = np.asarray(grey, np.float32) - smooth
    h, w = (side // BLOCK * BLOCK for side in rest.shape)
    blocks = rest[:h, :w].reshape(h // BLOCK, BLOCK, w // BLOCK, BLOCK).swapaxes(1, 2)
    spread = np.sort(blocks.reshape(-1, BLOCK * BLOCK).std(1))
    return float(spread[: max(1, len(spread) // 10)].mean())
