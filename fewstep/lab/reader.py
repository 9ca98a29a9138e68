"""The network behind the oracle judge: reads attributes off an image, and maps its drawing errors.

The attribute heads say what is drawn. The error map, a network of its own, says for each 8x8 cell
how far the image is from the nearest picture the world could have drawn. How answers become scores
is in `oracle.py`, how the network is trained in `train_reader.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from fewstep.lab.glyphs import LETTERS
from fewstep.lab.words import MAX_LETTERS
from fewstep.lab.world import ATTRIBUTES, CATEGORIES, STYLES
from fewstep.models.lab import load_weights, read_header

READER_WEIGHTS: Final = Path(__file__).parent / "weights" / "reader.safetensors"
NO_LETTER: Final = "-"  # what is read at a place beyond the end of the word
PLACES: Final = tuple(f"letter {i + 1}" for i in range(MAX_LETTERS))

# Everything that is read, with its classes. `word` is read place by place.
TARGETS: Final[Mapping[str, tuple[str, ...]]] = {
    "category": CATEGORIES,
    "style": ("photo", *STYLES),
    **{n: values for c in CATEGORIES for n, values in ATTRIBUTES[c].items() if values},
    **dict.fromkeys(PLACES, (*LETTERS, NO_LETTER)),
}
ERROR_FLOOR: Final = 0.003  # of 1: less than a step of 1/255; keeps the log of no error finite
UNKNOWN: Final = -1  # label of a target that does not apply, such as the mood of a landscape


class Reading(NamedTuple):
    """What the reader makes of a batch.

    `log_probs` of the classes of each target. `log_errors` of each cell: the log of the root mean
    square difference to the clean picture, of 1, plus `ERROR_FLOOR`. `cells` are features half-way
    through the attention, where training adds a loss.
    """

    log_probs: dict[str, Float[Tensor, "b _"]]
    log_errors: Float[Tensor, "b 64"]
    cells: Float[Tensor, "b 64 d"]


@dataclass(frozen=True)
class ReaderConfig:
    """Sizes of a `Reader`."""

    width: int = 48
    tokens: int = 128
    blocks: int = 2
    heads: int = 4


class ConvBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(self.norm(x)))))


class AttentionBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        # plain products: at 83 tokens the fused kernel's backward is ten times slower on a CPU
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)
        x = x + self.out((weights.to(v.dtype) @ v).transpose(1, 2).reshape(b, n, -1))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class LocalBlock(nn.Module):
    """A `ConvBlock` without the norm, which would hide how strong a defect is."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


class ErrorMap(nn.Module):
    """Log error of each 8x8 cell. It also sees how far each pixel is from the mean around it.

    Without that extra input it takes a hundred times longer to notice noise and blur.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        d = 64
        self.layers = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(24, width, 3, padding=1),
            LocalBlock(width),
            LocalBlock(width),
            nn.Conv2d(width, d, 4, stride=2, padding=1),
            LocalBlock(d),
            LocalBlock(d),
            nn.GroupNorm(8, d),
            nn.SiLU(),
            nn.Conv2d(d, 1, 1),
        )

    def forward(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 64"]:
        """Pixels in [-1, 1]."""
        around = F.avg_pool2d(pixels, 3, stride=1, padding=1, count_include_pad=False)
        detail = 4 * (pixels - around).abs()
        return self.layers(torch.cat([pixels, detail], dim=1)).float().flatten(1)


class Reader(nn.Module):
    """Convolutions to 8x8 cells, then attention among the cells and one query for each target."""

    def __init__(self, config: ReaderConfig) -> None:
        super().__init__()
        self.config = config
        w, d = config.width, config.tokens
        self.fine = nn.Sequential(
            nn.PixelUnshuffle(2), nn.Conv2d(12, w, 3, padding=1), ConvBlock(w), ConvBlock(w)
        )
        self.coarse = nn.Sequential(
            nn.Conv2d(w, d, 4, stride=2, padding=1), ConvBlock(d), ConvBlock(d)
        )
        self.place = nn.Parameter(torch.randn(64, d) * 0.02)
        self.query = nn.Parameter(torch.randn(len(TARGETS), d) * 0.02)
        self.blocks = nn.ModuleList(AttentionBlock(d, config.heads) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(d)
        self.letter = nn.Linear(d, len(LETTERS) + 1)
        self.heads = nn.ModuleDict(
            {
                name: nn.Linear(d, len(classes))
                for name, classes in TARGETS.items()
                if name not in PLACES
            }
        )
        self.errors = ErrorMap(w)

    def forward(self, pixels: Float[Tensor, "b 3 h w"]) -> Reading:
        """Pixels in [-1, 1]."""
        cells = self.coarse(self.fine(pixels))
        tokens = cells.flatten(2).transpose(1, 2) + self.place
        x = torch.cat([tokens, self.query.expand(len(pixels), -1, -1)], dim=1)
        halfway = x
        for i, block in enumerate(self.blocks):
            x = block(x)
            halfway = x[:, :64] if i == 0 else halfway
        x = self.norm(x)
        log_probs = {
            name: F.log_softmax(
                (self.letter if name in PLACES else self.heads[name])(h).float(), dim=1
            )
            for name, h in zip(TARGETS, x[:, 64:].unbind(1), strict=True)
        }
        return Reading(log_probs, self.errors(pixels), halfway)


def reading_loss(
    reading: Reading, labels: Int[Tensor, "b targets"], weight: Float[Tensor, " b"]
) -> Float[Tensor, ""]:
    """Cross-entropy summed over the targets an image has, weighted by image; mean over images."""
    total = torch.zeros((), device=labels.device)
    for i, log_probs in enumerate(reading.log_probs.values()):
        known = (labels[:, i] != UNKNOWN) * weight
        picked = log_probs.gather(1, labels[:, i].clamp(min=0)[:, None])[:, 0]
        total = total - (known * picked).sum() / len(labels)
    return total


def log_errors(
    seen: Float[Tensor, "b 3 h w"], clean: Float[Tensor, "b 3 h w"]
) -> Float[Tensor, "b 64"]:
    """The truth of `Reading.log_errors`, from pixels in [-1, 1]."""
    squares = ((seen - clean) / 2).square().mean(dim=1, keepdim=True)
    cells = F.adaptive_avg_pool2d(squares, 8).flatten(1)
    return (cells.sqrt() + ERROR_FLOOR).log()


def errors_of(log_errors: Float[Tensor, "b 64"]) -> Float[Tensor, "b 64"]:
    """Root mean square errors of the cells, of 1, from their logs."""
    return (log_errors.exp() - ERROR_FLOOR).clamp(min=0)


def load_reader(path: Path = READER_WEIGHTS) -> Reader:
    """The reader of a weight file, in float32 and evaluation mode."""
    config, _ = read_header(path)
    reader = Reader(ReaderConfig(**config))  # type: ignore[arg-type]
    load_weights(reader, path)
    return reader.eval()
