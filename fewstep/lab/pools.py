"""Pools of the lab world: prompts as tokens, images as latents of the bundled autoencoder."""

from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from fewstep.core.types import Task
from fewstep.data.pools import Pool, pad_tokens
from fewstep.lab import grammar
from fewstep.lab.edits import EDIT_CATEGORIES, Edit, sample_edit
from fewstep.lab.world import CATEGORIES, SIZE, Scene, render, sample_scene
from fewstep.models.autoencoder import Autoencoder
from fewstep.models.lab import load_weights

WEIGHTS: Final = Path(__file__).parent / "weights"
TASK_OF: Final[dict[str, Task]] = {
    **dict.fromkeys(CATEGORIES, "t2i"),
    **dict.fromkeys(EDIT_CATEGORIES, "edit"),
}


def load_autoencoder() -> Autoencoder:
    """The bundled autoencoder in evaluation mode."""
    autoencoder = Autoencoder()
    load_weights(autoencoder, WEIGHTS / "autoencoder.safetensors")
    # torch's own stubs do not know this argument of Module.to
    return autoencoder.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def to_pixels(images: np.ndarray) -> Tensor:
    """uint8 [n, h, w, 3] to float [n, 3, h, w] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(pixels: Tensor) -> np.ndarray:
    """Float pixels [n, 3, h, w] in [-1, 1] to uint8 [n, h, w, 3], rounded and clipped."""
    values = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return values.permute(0, 2, 3, 1).contiguous().numpy()


@torch.inference_mode()
def encode_images(autoencoder: Autoencoder, images: np.ndarray, *, batch: int = 256) -> Tensor:
    """Latents in float16 of uint8 images."""
    parts = []
    for start in range(0, len(images), batch):
        pixels = to_pixels(images[start : start + batch]).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            parts.append(autoencoder.encode(pixels).half())
    return torch.cat(parts)


def draw_case(
    category: str, rng: np.random.Generator, *, evaluation: bool
) -> tuple[Scene | Edit, grammar.Phrase]:
    """One case of a T2I or editing category: its truth and how it is said."""
    if TASK_OF[category] == "t2i":
        scene = sample_scene(category, rng, evaluation=evaluation)
        return scene, grammar.caption(scene, rng)
    edit = sample_edit(category, rng, evaluation=evaluation)
    return edit, grammar.instruction(edit, rng)


def make_pool(
    category: str,
    size: int,
    seed: int,
    autoencoder: Autoencoder,
    *,
    targets: bool = False,
) -> Pool:
    """`size` training cases of a category. Targets (for teachers) are drawn only when asked for."""
    rng = np.random.default_rng([seed, list(TASK_OF).index(category)])
    edit = TASK_OF[category] == "edit"
    prompts, tokens = [], []
    sources: list[Tensor] = []
    goals: list[Tensor] = []
    for start in range(0, size, 1024):
        count = min(1024, size - start)
        before = np.empty((count if edit else 0, SIZE, SIZE, 3), np.uint8)
        after = np.empty((count if targets else 0, SIZE, SIZE, 3), np.uint8)
        for i in range(count):
            case, phrase = draw_case(category, rng, evaluation=False)
            prompts.append(phrase.text)
            tokens.append(grammar.encode(phrase.text))
            if isinstance(case, Edit):
                before[i], goal = case.images()
                if targets:
                    after[i] = goal
            elif targets:
                after[i] = render(case)
        if edit:
            sources.append(encode_images(autoencoder, before))
        if targets:
            goals.append(encode_images(autoencoder, after))
    text, lengths = pad_tokens(tokens)
    return Pool(
        TASK_OF[category],
        category,
        tuple(prompts),
        text,
        lengths,
        torch.cat(sources) if sources else None,
        torch.cat(goals) if goals else None,
    )
