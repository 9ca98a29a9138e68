"""Trains the lab's autoencoder on renders.

`python -m fewstep.lab.train_autoencoder --minutes 8 --out FILE`. The bundled
weights came from this procedure, run as a script before it lived here.
"""

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.lab.edits import DEGRADATIONS, degrade
from fewstep.lab.pools import to_pixels
from fewstep.lab.world import CATEGORIES, SIZE, STYLES, apply_style, render, sample_scene
from fewstep.models.autoencoder import Autoencoder, reconstruction_loss
from fewstep.models.lab import save_weights

PEAK_RATE = 2e-3
BATCH = 64
AVERAGING = 0.01
"""Share of the newest weights in the running average."""


@dataclass(frozen=True)
class AutoencoderConfig:
    latent_channels: int = 16
    width: int = 48
    latent_noise: float = 0.1


def training_images(count: int, seed: int) -> np.ndarray:
    """Renders of the training split, signs twice as often; a tenth styled, a tenth degraded."""
    rng = np.random.default_rng(seed)
    images = np.empty((count, SIZE, SIZE, 3), np.uint8)
    cycle = (*CATEGORIES, "text")
    for i in range(count):
        image = render(sample_scene(cycle[i % len(cycle)], rng))
        fate = rng.random()
        if fate < 0.1:
            image = apply_style(image, STYLES[rng.integers(len(STYLES))])
        elif fate < 0.2:
            image = degrade(image, DEGRADATIONS[rng.integers(len(DEGRADATIONS))], rng)
        images[i] = image
    return images


def held_out_errors(autoencoder: Autoencoder, count: int = 64) -> dict[str, float]:
    """Mean squared error per category on renders of the evaluation split, pixels in [-1, 1]."""
    rng = np.random.default_rng(0)
    errors = {}
    for category in CATEGORIES:
        scenes = [sample_scene(category, rng, evaluation=True) for _ in range(count)]
        pixels = to_pixels(np.stack([render(scene) for scene in scenes]))
        with torch.inference_mode():
            errors[category] = (autoencoder(pixels) - pixels).square().mean().item()
    return errors


def train(images: np.ndarray, minutes: float, seed: int) -> Autoencoder:
    """AdamW with a cosine over wall time, so that a budget in minutes is met on any machine."""
    torch.manual_seed(seed)
    model = Autoencoder()
    optimiser = torch.optim.AdamW(model.parameters(), PEAK_RATE, betas=(0.9, 0.95))
    average = {name: value.clone() for name, value in model.state_dict().items()}
    begun, step = time.monotonic(), 0
    while (spent := (time.monotonic() - begun) / 60 / minutes) < 1:
        set_rate(optimiser, PEAK_RATE, step, spent)
        pixels = to_pixels(images[torch.randint(len(images), (BATCH,)).numpy()])
        with torch.autocast("cpu", torch.bfloat16):
            loss = reconstruction_loss(model(pixels), pixels)
        descend(model, optimiser, loss, average)
        step += 1
        if step % 200 == 0:
            print(f"{spent:.0%}  step {step}  loss {loss.item():.4f}", flush=True)
    model.load_state_dict(average)
    return model.eval()


def set_rate(optimiser: torch.optim.Optimizer, peak: float, step: int, spent: float) -> None:
    """A warm-up over 100 steps, times a cosine to a fiftieth over the share of the budget spent."""
    cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * spent))
    for group in optimiser.param_groups:
        group["lr"] = peak * min(1.0, (step + 1) / 100) * cosine


def descend(
    model: nn.Module, optimiser: torch.optim.Optimizer, loss: Tensor, average: dict[str, Tensor]
) -> None:
    """One clipped step, after which the running average follows."""
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    update_average(average, model.state_dict())


@torch.no_grad()
def update_average(average: dict[str, Tensor], newest: dict[str, Tensor]) -> None:
    for name, value in newest.items():
        if value.is_floating_point():
            average[name].lerp_(value, AVERAGING)
        else:
            average[name].copy_(value)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    model = train(training_images(arguments.images, arguments.seed), arguments.minutes, 0)
    about = {"minutes": arguments.minutes, "images": arguments.images, "seed": arguments.seed}
    save_weights(model, arguments.out, config=AutoencoderConfig(), about=about, half=True)
    print(held_out_errors(model))


if __name__ == "__main__":
    main()
