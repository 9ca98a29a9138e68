"""Trains the oracle's reader: `python -m fewstep.lab.train_reader`.

The data are fresh renders of the training split and corruptions of them. The attribute heads are
trained first, then the error map; they share no weights.
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from fewstep.lab.corrupt import Corruption, add_noise, corruptions
from fewstep.lab.glyphs import LETTERS
from fewstep.lab.pools import load_autoencoder, to_pixels
from fewstep.lab.reader import (
    NO_LETTER,
    PLACES,
    READER_WEIGHTS,
    TARGETS,
    UNKNOWN,
    AttentionBlock,
    ConvBlock,
    LocalBlock,
    Reader,
    ReaderConfig,
    load_reader,
    log_errors,
    reading_loss,
)
from fewstep.lab.world import CANVAS, STYLES, Open, Scene, apply_style, render, sample_scene
from fewstep.models.lab import read_header, save_weights

# signs need the most: five places of 26 classes
SHARES: Final = {"landscape": 0.3, "portrait": 0.2, "text": 0.5}
STYLED: Final = (
    0.08  # share of pictures in one of the styles: read only for the style and drawing errors
)
UNTOUCHED: Final = 0.3  # share of pictures left as rendered
KINDS: Final = {  # how often each corruption is drawn among the others
    "round_trip": 0.16, "generate": 0.3, "noise": 0.1, "blur": 0.08, "jpeg": 0.07, "resample": 0.05,
    "warp": 0.08, "melt": 0.07, "ghost": 0.04, "patch": 0.05,
}  # fmt: skip
ALSO_NOISE: Final = 0.2  # share of the corrupted that get mild noise on top


@dataclass(frozen=True)
class Example:
    """A batch: what is seen, what was drawn, labels (UNKNOWN where none) and how far they count."""

    seen: np.ndarray
    clean: np.ndarray
    labels: Tensor
    weight: Tensor
    letters: Tensor


def letter_map(scene: Scene, style: str = "photo") -> np.ndarray:
    """Class and place of the letter at each 8x8 cell's centre, [2, 64]; the last class for none.

    The layout is that of `world.draw_text`. Knowing where letters are makes reading them many times
    faster to learn; the reader is not given this, and is never judged by it.
    """
    classes = np.full((8, 8), len(LETTERS))
    places = np.full((8, 8), len(PLACES))
    if scene.category == "text" and style == "photo":
        u, word = Open(scene.nuisance), scene["word"]
        height = u("lh", 30, 38)
        width = {3: 84.0, 4: 104.0, 5: 116.0}[len(word)] * u("spread", 0.94, 1.0)
        left = (CANVAS - width) / 2 + u("tx", -1, 1) * max((CANVAS - width) / 2 - 6, 0.0)
        centres = (np.arange(8) + 0.5) * CANVAS / 8
        rows = np.abs(centres - u("ty", 22, 62) - height / 2) <= height / 2 + 2
        place = np.floor((centres - left) / (width / len(word))).astype(int)
        for x in np.flatnonzero((place >= 0) & (place < len(word))):
            classes[rows, x] = LETTERS.index(word[place[x]])
            places[rows, x] = place[x]
    return np.stack([classes.ravel(), places.ravel()])


class LetterFinder(nn.Module):
    """Training's own loss on the reader's cells: which letter is here, at which place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.letter = nn.Linear(width, len(LETTERS) + 1)
        self.place = nn.Linear(width, len(PLACES) + 1)

    def forward(self, cells: Tensor, wanted: Tensor, weight: Tensor) -> Tensor:
        """Cross-entropy of letters and places, averaged over cells with a letter and without."""
        h = self.norm(cells.float())
        losses = torch.zeros(())
        for head, truth in ((self.letter, wanted[:, 0]), (self.place, wanted[:, 1])):
            nothing = head.out_features - 1
            each = (
                F.cross_entropy(head(h).transpose(1, 2), truth, reduction="none") * weight[:, None]
            )
            filled = truth != nothing
            losses = losses + each[filled].mean() + 0.3 * each[~filled].mean()
        return losses


def labels_of(scene: Scene, style: str = "photo") -> list[int]:
    """Class index of each of `TARGETS`; UNKNOWN for what is not there or a style may hide."""
    truth = {"category": scene.category, "style": style}
    if style == "photo":
        truth |= dict(scene.attributes)
        if scene.category == "text":
            truth |= dict(zip(PLACES, scene["word"].ljust(len(PLACES), NO_LETTER), strict=True))
        elif truth.get("count") == "no":
            del truth["landmark"], truth["colour"]
    return [
        classes.index(truth[name]) if name in truth else UNKNOWN
        for name, classes in TARGETS.items()
    ]


def draw_batch(size: int, rng: np.random.Generator, kinds: dict[str, Corruption]) -> Example:
    """Fresh training-split renders, corrupted with mixed kinds and strengths."""
    categories = rng.choice(list(SHARES), size, p=list(SHARES.values()))
    styles = [STYLES[rng.integers(4)] if rng.random() < STYLED else "photo" for _ in range(size)]
    scenes = [sample_scene(str(c), rng) for c in categories]
    clean = np.stack([render(s) for s in scenes])
    for i, style in enumerate(styles):
        if style != "photo":
            clean[i] = apply_style(clean[i], style)
    seen, strength = clean.copy(), rng.random(size)
    names = np.array(["none", *KINDS])
    odds = [UNTOUCHED, *((1 - UNTOUCHED) * p for p in KINDS.values())]
    drawn = rng.choice(names, size, p=odds)
    for name in KINDS:
        rows = np.flatnonzero(drawn == name)
        if len(rows):
            seen[rows] = kinds[name](clean[rows], strength[rows], rng)
    rows = np.flatnonzero((drawn != "none") & (rng.random(size) < ALSO_NOISE))
    seen[rows] = add_noise(seen[rows], rng.uniform(1, 10, (len(rows), 1, 1, 1)), rng)
    mild = np.isin(drawn, ("none", "round_trip"))
    weight = np.where(mild, 1.0, 1.0 - 0.8 * strength)
    labels = torch.tensor([labels_of(s, style) for s, style in zip(scenes, styles, strict=True)])
    letters = np.stack([letter_map(s, style) for s, style in zip(scenes, styles, strict=True)])
    return Example(seen, clean, labels, torch.from_numpy(weight).float(), torch.from_numpy(letters))


def muon_and_adamw(module: nn.Module) -> tuple[dict[nn.Parameter, Tensor], list[Optimizer]]:
    """Muon for the large weights inside blocks, convolutions seen as matrices; AdamW for the rest.

    Muon wants matrices, so it gets views of the weights; `train` hands it their gradients.
    """
    blocks = [m for m in module.modules() if isinstance(m, ConvBlock | AttentionBlock | LocalBlock)]
    inner = [p for block in blocks for p in block.parameters() if p.ndim > 1 and p.requires_grad]
    views = {p: p.detach().view(len(p), -1) for p in inner}
    rest = [p for p in module.parameters() if p not in views and p.requires_grad]
    return views, [
        torch.optim.Muon(views.values(), weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, weight_decay=0.02, betas=(0.9, 0.98)),
    ]


def train(
    name: str,
    module: nn.Module,
    loss: Callable[[Example], Tensor],
    *,
    minutes: float,
    rate: float,
    seed: int,
    batch: int = 32,
) -> dict[str, object]:
    """Train a module in place for so many minutes; it ends as its moving average."""
    rng = np.random.default_rng([seed, 0x0EAD])
    kinds = corruptions(load_autoencoder())
    views, optimisers = muon_and_adamw(module)
    average = {n: p.detach().clone() for n, p in module.named_parameters()}
    start, step, share = time.perf_counter(), 0, 0.0
    while share < 1:
        share = min((time.perf_counter() - start) / (60 * minutes), 1.0)
        cosine = 0.5 + 0.5 * math.cos(math.pi * share)
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate * min(step / 100, 1.0) * (0.01 + 0.99 * cosine)
        module.zero_grad()
        error = loss(draw_batch(batch, rng, kinds))
        error.backward()
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), 20.0)
        assert torch.isfinite(norm), f"{name}, step {step}: gradient is not finite"
        for p, view in views.items():
            assert p.grad is not None
            view.grad = p.grad.reshape(view.shape)
        for optimiser in optimisers:
            optimiser.step()
        decay = min(0.996, (step + 1) / (step + 10))
        with torch.no_grad():
            for n, p in module.named_parameters():
                average[n].lerp_(p, 1 - decay)
        step += 1
        if step % 200 == 0 or share == 1:
            seconds = time.perf_counter() - start
            print(
                f"{name}  {seconds:5.0f} s  {step * batch / 1000:6.1f}k images  "
                f"loss {error.item():.3f}  {step * batch / seconds:.0f} images/s",
                flush=True,
            )
    module.load_state_dict(average)
    return {"images": step * batch, "seconds": round(time.perf_counter() - start)}


def train_reading(reader: Reader, *, minutes: float, rate: float, seed: int) -> dict[str, object]:
    """Train everything but the error map to read attributes."""
    finder = LetterFinder(reader.config.tokens)

    def loss(example: Example) -> Tensor:
        seen = to_pixels(example.seen).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            reading = reader(seen)
        read = reading_loss(reading, example.labels, example.weight)
        return read + finder(reading.cells, example.letters, example.weight)

    both = nn.ModuleDict({"finder": finder, "reader": reader})
    reader.errors.requires_grad_(False)
    return train("reading", both, loss, minutes=minutes, rate=rate, seed=seed)


def train_errors(reader: Reader, *, minutes: float, seed: int) -> dict[str, object]:
    """Train the error map alone."""
    reader.errors.requires_grad_(True)

    def loss(example: Example) -> Tensor:
        seen = to_pixels(example.seen).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            mapped = reader.errors(seen)
        return F.smooth_l1_loss(mapped, log_errors(seen, to_pixels(example.clean)), beta=0.3)

    return train("errors", reader.errors, loss, minutes=minutes, rate=2e-3, seed=seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=READER_WEIGHTS)
    parser.add_argument("--start", type=Path, help="go on from these weights")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak rate of the attribute heads")
    parser.add_argument("--minutes", type=float, default=11, help="for the attribute heads")
    parser.add_argument(
        "--error-minutes", type=float, default=4, help="for the error map; 0: keep it"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    reader, before = Reader(ReaderConfig()), None
    command = f"python -m fewstep.lab.train_reader --minutes {args.minutes:g} "
    command += f"--error-minutes {args.error_minutes:g} --rate {args.rate:g} --seed {args.seed}"
    if args.start:
        reader, before = load_reader(args.start).train(), read_header(args.start)[1]
        command += " --start BEFORE"
    read = train_reading(reader, minutes=args.minutes, rate=args.rate, seed=args.seed)
    mapped = None
    if args.error_minutes:
        mapped = train_errors(reader, minutes=args.error_minutes, seed=args.seed)
    about = {
        "what": "reader of the lab oracle, moving averages",
        "command": command,
        "reading": read,
        "errors": mapped or "kept",
        "device": "cpu, 1 thread, bf16 autocast",
        "data": "fresh renders of the training split and their corruptions",
        "before": before,
    }
    save_weights(reader, args.out, config=reader.config, about=about, half=True)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
