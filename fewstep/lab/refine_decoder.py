"""Goes on training the decoder of the lab's autoencoder on latents as generators make them.

`python -m fewstep.lab.refine_decoder --out FILE`. A decoder that has seen exact latents alone turns
the small errors of a generator into speckle. Here it learns to undo them: true latents are noised
to t in [0.1, 0.5], a bundled specialist walks back to 0 in a few guided steps, and from where it
arrives the decoder has to draw the true picture. The encoder stays as it is, so every teacher
remains valid.
"""

import argparse
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewstep.core.process import add_noise
from fewstep.core.types import Condition, Denoiser, Task
from fewstep.guidance import classifier_free
from fewstep.lab.domain import LabDomain
from fewstep.lab.edits import Edit
from fewstep.lab.pools import TASK_OF, WEIGHTS, draw_case, encode_images, to_pixels
from fewstep.lab.train_autoencoder import (
    AutoencoderConfig,
    descend,
    held_out_errors,
    set_rate,
)
from fewstep.lab.world import render
from fewstep.models.autoencoder import Autoencoder, reconstruction_loss
from fewstep.models.lab import load_mmdit, read_header, save_weights
from fewstep.samplers import step

SHARE: dict[str, int] = {"landscape": 3, "portrait": 2, "text": 3}
"""How many times as many cases as an editing category has."""
LOW, HIGH = 0.1, 0.5
"""Times to walk back from. Beyond, the walk arrives at another picture than the true one."""
STEPS = 5
GUIDANCE = 2.0
ARRIVED = 0.65
"""Share of a batch that a teacher has walked; the rest are true latents with a little noise."""
PEAK_RATE = 8e-4
DRAW, BATCH = 128, 64


@dataclass(frozen=True)
class Examples:
    """Pictures, uint8 [n, h, w, 3], with their latents in float16 [n, c, h, w]: the true ones, and
    those at which a teacher's walk arrived."""

    images: np.ndarray
    true: Tensor
    arrived: Tensor


@torch.inference_mode()
def walk_back(teacher: Denoiser, x_0: Tensor, cond: Condition, t: float, eps: Tensor) -> Tensor:
    """From x_0 noised to `t`, the teacher's own guided steps to 0."""

    def guided(x_t: Tensor, now: Tensor, cond: Condition) -> Tensor:
        return classifier_free(teacher, x_t, now, cond, GUIDANCE)

    x = add_noise(x_0, eps, torch.full((len(x_0),), t))
    with torch.autocast("cpu", torch.bfloat16):
        for now, then in pairwise(t * (1 - i / STEPS) for i in range(STEPS + 1)):
            x = step(x, guided, cond, now, then)
    return x.float().clone()


def draw_examples(domain: LabDomain, per_category: int, seed: int) -> Examples:
    """Cases of the training split, `per_category` for each of the edits."""
    teachers: dict[Task, Denoiser] = {
        "t2i": load_mmdit(WEIGHTS / "t2i.safetensors"),
        "edit": load_mmdit(WEIGHTS / "edit.safetensors"),
    }
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    images, true, arrived = [], [], []
    for category, task in TASK_OF.items():
        for _ in range(SHARE.get(category, 1) * per_category // DRAW):
            cases = [draw_case(category, rng, evaluation=False) for _ in range(DRAW)]
            pairs = [c.images() if isinstance(c, Edit) else (None, render(c)) for c, _ in cases]
            sources = [source for source, _ in pairs if source is not None] or None
            drawn = np.stack([picture for _, picture in pairs])
            cond = domain.condition([phrase.text for _, phrase in cases], sources)
            x_0 = encode_images(domain.autoencoder, drawn).float()
            eps = torch.randn(x_0.shape, generator=generator)
            t = LOW + (HIGH - LOW) * torch.rand((), generator=generator).item()
            images.append(drawn)
            true.append(x_0.half())
            arrived.append(walk_back(teachers[task], x_0, cond, t, eps).half())
        print(f"{category}: {sum(len(x) for x in images)} examples", flush=True)
    return Examples(np.concatenate(images), torch.cat(true), torch.cat(arrived))


def refine(model: Autoencoder, examples: Examples, updates: int, seed: int) -> Autoencoder:
    """AdamW with a cosine on the decoder alone, in place; returns the averaged weights' model."""
    torch.manual_seed(seed)
    optimiser = torch.optim.AdamW(model.decoder.parameters(), PEAK_RATE, betas=(0.9, 0.95))
    average = {name: value.clone() for name, value in model.state_dict().items()}
    for now in range(updates):
        set_rate(optimiser, PEAK_RATE, now, now / updates)
        chosen = torch.randint(len(examples.images), (BATCH,))
        true = examples.true[chosen].float()
        true = true + model.latent_noise * torch.randn_like(true)
        walked = torch.rand(BATCH, 1, 1, 1) < ARRIVED
        latents = torch.where(walked, examples.arrived[chosen].float(), true)
        pixels = to_pixels(examples.images[chosen.numpy()])
        with torch.autocast("cpu", torch.bfloat16):
            loss = reconstruction_loss(model.decode(latents), pixels)
        descend(model, optimiser, loss, average)
        if (now + 1) % 200 == 0:
            print(f"update {now + 1} of {updates}  loss {loss.item():.4f}", flush=True)
    model.load_state_dict(average)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--updates", type=int, default=4000)
    parser.add_argument("--per-category", type=int, default=1536)
    parser.add_argument("--seed", type=int, default=4242)
    arguments = parser.parse_args()
    domain = LabDomain()
    examples = draw_examples(domain, arguments.per_category, arguments.seed)
    model = domain.autoencoder.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    print("held-out squared error before", held_out_errors(model))
    model = refine(model, examples, arguments.updates, arguments.seed)
    print("held-out squared error after", held_out_errors(model))
    _, first = read_header(WEIGHTS / "autoencoder.safetensors")
    names = ("updates", "per_category", "seed")
    about: dict[str, object] = {"refined": {n: getattr(arguments, n) for n in names}}
    about["first"] = first
    save_weights(model, arguments.out, config=AutoencoderConfig(), about=about, half=True)


if __name__ == "__main__":
    main()
