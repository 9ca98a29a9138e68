"""What can be wrong with a picture: corruptions by kind and strength, to train and test the judge.

Every corruption maps uint8 images [n, h, w, 3] and strengths in [0, 1], one an image, to images
of the same shape. Strength 0 is hardly visible, 1 is ruin. The wrong-content controls (another
caption, swapped letters) are at the end.
"""

from collections.abc import Callable, Mapping
from io import BytesIO
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter

from fewstep.lab.pools import encode_images, to_images
from fewstep.lab.world import Scene, render, sample_scene
from fewstep.models.autoencoder import Autoencoder

Corruption = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]


def _finish(x: np.ndarray) -> np.ndarray:
    return np.clip(np.round(x), 0, 255).astype(np.uint8)


def _scaled(strength: np.ndarray, low: float, high: float) -> np.ndarray:
    """Strengths as a physical quantity [n, 1, 1, 1], evenly spaced in its logarithm."""
    return (low * (high / low) ** strength)[:, None, None, None]


def noise(images: np.ndarray, strength: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise, sigma 2 to 40 of 255."""
    return add_noise(images, _scaled(strength, 2, 40), rng)


def add_noise(
    images: np.ndarray, sigma: np.ndarray | float, rng: np.random.Generator
) -> np.ndarray:
    """Gaussian noise of the given sigma (of 255)."""
    return _finish(images + sigma * rng.standard_normal(images.shape))


def blur(images: np.ndarray, strength: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Gaussian blur, radius 0.35 to 2.2 pixels."""
    radii = _scaled(strength, 0.35, 2.2).ravel()
    return np.stack([
        np.asarray(Image.fromarray(x).filter(ImageFilter.GaussianBlur(float(r))))
        for x, r in zip(images, radii, strict=True)
    ])  # fmt: skip


def jpeg(images: np.ndarray, strength: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """JPEG, quality 75 down to 3."""
    out = np.empty_like(images)
    for i, quality in enumerate(_scaled(strength, 75, 3).ravel()):
        buffer = BytesIO()
        Image.fromarray(images[i]).save(buffer, "JPEG", quality=int(quality))
        out[i] = np.asarray(Image.open(buffer))
    return out


def resample(images: np.ndarray, strength: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Down to 26 .. 8 pixels and up again."""
    size, box, bicubic = images.shape[1], Image.Resampling.BOX, Image.Resampling.BICUBIC
    sides = _scaled(strength, 26, 8).ravel().astype(int)
    return np.stack([
        np.asarray(
            Image.fromarray(x).resize((s, s), box).resize((size, size), bicubic)
        )
        for x, s in zip(images, sides, strict=True)
    ])  # fmt: skip


def _blobs(
    count: int, size: int, cells: int, rng: np.random.Generator, channels: int = 1
) -> torch.Tensor:
    """Smooth random fields [n, channels, size, size], of variance 1 at `cells` x `cells` knots."""
    knots = torch.from_numpy(
        rng.standard_normal((count, channels, cells, cells)).astype(np.float32)
    )
    return F.interpolate(knots, size=(size, size), mode="bicubic", align_corners=True)


def warp(images: np.ndarray, strength: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An elastic warp: shifts of 0.25 to 2.5 pixels (one sigma), as by an unsteady hand."""
    n, size = len(images), images.shape[1]
    shift = (
        _blobs(n, size, 6, rng, 2)
        * torch.from_numpy(_scaled(strength, 0.25, 2.5)).float()
        * 2
        / size
    )
    eye = torch.eye(2, 3).expand(n, 2, 3)
    grid = F.affine_grid(eye, [n, 3, size, size], align_corners=False) + shift.permute(0, 2, 3, 1)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    out = F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return _finish(out.permute(0, 2, 3, 1).numpy())


def ghost(images: np.ndarray, strength: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Another picture of the batch shines through, by 6 to 48 percent."""
    share = _scaled(strength, 0.06, 0.48)
    return _finish(images * (1 - share) + share * images[rng.permutation(len(images))])


def melt(images: np.ndarray, strength: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blobs of the picture are smeared sideways or blurred away; the rest stays sharp."""
    mask = _blobs(len(images), images.shape[1], 5, rng).permute(0, 2, 3, 1).numpy()
    mask = 1 / (1 + np.exp(-4 * (mask + 2.2 * strength[:, None, None, None] - 1.2)))
    shift = rng.integers(1, 4, len(images))
    smeared = np.stack(
        [np.roll(x, s, axis=rng.integers(2)) for x, s in zip(images, shift, strict=True)]
    )
    half = blur(images, np.full(len(images), 0.75), rng) * 0.5 + smeared * 0.5
    return _finish(images * (1 - mask) + mask * half)


def patch(images: np.ndarray, strength: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A rectangle of another picture (same place) or a shifted one of this, 4 to 15 pixels wide."""
    out, size = images.copy(), images.shape[1]
    other = images[rng.permutation(len(images))]
    for i, s in enumerate(strength):
        h, w = (int(4 + 11 * s * rng.uniform(0.5, 1)) for _ in range(2))
        y, x = rng.integers(size - h), rng.integers(size - w)
        if rng.random() < 0.5:
            out[i, y : y + h, x : x + w] = other[i, y : y + h, x : x + w]
        else:
            y2, x2 = rng.integers(size - h), rng.integers(size - w)
            out[i, y : y + h, x : x + w] = images[i, y2 : y2 + h, x2 : x2 + w]
    return out


@torch.inference_mode()
def redraw(
    images: np.ndarray, strength: np.ndarray, rng: np.random.Generator, *, autoencoder: Autoencoder
) -> np.ndarray:
    """Through the autoencoder's latents, with the errors of a generator: noise, mixing in blobs.

    Strength 0 is the plain round trip; 1 is latent noise of sigma 0.8 or much of another picture.
    """
    latents = encode_images(autoencoder, images).float()
    n, _, h, _ = latents.shape
    s = torch.from_numpy(strength).float()[:, None, None, None]
    fine = torch.from_numpy(rng.standard_normal(latents.shape).astype(np.float32))
    wide = _blobs(n, h, 3, rng, latents.shape[1])
    where = torch.sigmoid(3 * _blobs(n, h, 4, rng))
    other = latents[torch.from_numpy(rng.permutation(n))]
    kind = torch.from_numpy(rng.dirichlet((0.6, 0.6, 0.6), n).astype(np.float32)).T[
        :, :, None, None, None
    ]
    latents = latents + s * 0.8 * (kind[0] * fine + kind[1] * wide)
    latents = latents + s * 0.7 * kind[2] * where * (other - latents)
    with torch.autocast("cpu", torch.bfloat16):
        return to_images(autoencoder.decode(latents))


PICTURE_CORRUPTIONS: Final[Mapping[str, Corruption]] = {
    "noise": noise,
    "blur": blur,
    "jpeg": jpeg,
    "resample": resample,
    "warp": warp,
    "ghost": ghost,
    "melt": melt,
    "patch": patch,
}


def corruptions(autoencoder: Autoencoder) -> dict[str, Corruption]:
    """Every kind by name, with those that need the autoencoder."""

    def generate(images: np.ndarray, strength: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return redraw(images, strength, rng, autoencoder=autoencoder)

    def round_trip(
        images: np.ndarray, strength: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        return redraw(images, 0 * strength, rng, autoencoder=autoencoder)

    return {**PICTURE_CORRUPTIONS, "generate": generate, "round_trip": round_trip}


def wrong_scene(scene: Scene, rng: np.random.Generator, *, evaluation: bool) -> Scene:
    """Another scene of the same category: what a picture with the wrong caption shows."""
    while True:
        other = sample_scene(scene.category, rng, evaluation=evaluation)
        if other.attributes != scene.attributes:
            return other


def swapped_letters(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same sign with two different letters of its word exchanged."""
    word = list(scene["word"])
    pairs = [(i, j) for i in range(len(word)) for j in range(i) if word[i] != word[j]]
    i, j = pairs[rng.integers(len(pairs))]
    word[i], word[j] = word[j], word[i]
    return scene.with_({"word": "".join(word)})


def mean_image(category: str, rng: np.random.Generator, *, count: int = 64) -> np.ndarray:
    """The average render of a category, what a model that ignores its prompt converges to."""
    return _finish(np.mean([render(sample_scene(category, rng)) for _ in range(count)], 0))
