"""The lab's own flow-matching transformer: joint attention over image, source and text, adaLN.

Small, but of the same kind as the models it stands for; CFG by dropping text. One stream (all
token kinds share weights, as in Z-Image), one shared modulation with a learned offset per block
(PixArt-alpha, arXiv 2310.00426). The network predicts v; the module itself is a `Denoiser` and
returns x_0.
"""

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fewstep.core.process import x0_from_v
from fewstep.errors import CheckpointError, DiskError


@dataclass(frozen=True)
class LabCondition:
    """Text, and for editing a source image, for an `MMDiT`.

    `text` is token ids [b, l] (lab) or encoder states [b, l, d]; `text_mask` [b, l] is true where
    text is real; `source` [b, c, h, w] lies in the model's own space, or is None for text-to-image.
    """

    text: Tensor
    text_mask: Bool[Tensor, "b l"]
    source: Float[Tensor, "b c h w"] | None = None

    @property
    def device(self) -> torch.device:
        return self.text.device

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, index: slice | Tensor) -> "LabCondition":
        source = None if self.source is None else self.source[index]
        return LabCondition(self.text[index], self.text_mask[index], source)

    def without_text(self) -> "LabCondition":
        return replace(self, text=self.text[:, :0], text_mask=self.text_mask[:, :0])

    def to(self, device: torch.device) -> "LabCondition":
        source = None if self.source is None else self.source.to(device)
        return LabCondition(self.text.to(device), self.text_mask.to(device), source)


@dataclass(frozen=True)
class MMDiTConfig:
    """Sizes of an `MMDiT`; either `vocabulary` (token ids) or `text_width` (states) is set."""

    channels: int = 16
    grid: int = 8
    patch: int = 2
    width: int = 256
    depth: int = 6
    heads: int = 4
    vocabulary: int = 0
    text_width: int = 0
    max_text: int = 24

    @property
    def image_tokens(self) -> int:
        return (self.grid // self.patch) ** 2


def time_features(t: Float[Tensor, " b"], width: int) -> Float[Tensor, "b d"]:
    """Sinusoidal features of t in [0, 1], over periods from 1/1000 to 10 (float32)."""
    half = width // 2
    scale = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / half)
    angles = 1000.0 * t.float()[:, None] * scale
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention written out: with these few dozen tokens, training on a CPU is a quarter faster
    than with the fused kernel, whose backward is made for long sequences."""
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1).to(v.dtype) @ v


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_scale = nn.Parameter(torch.ones(width // heads))
        self.k_scale = nn.Parameter(torch.ones(width // heads))
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.modulation = nn.Parameter(torch.zeros(6, width))

    def forward(self, x: Tensor, modulation: Tensor, mask: Tensor | None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            (modulation + self.modulation).unsqueeze(2).unbind(1)
        )
        h = F.layer_norm(x, x.shape[-1:]) * (1 + scale1) + shift1
        b, n, _ = h.shape
        q, k, v = self.qkv(h).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q = (F.rms_norm(q, q.shape[-1:]) * self.q_scale).to(v.dtype)
        k = (F.rms_norm(k, k.shape[-1:]) * self.k_scale).to(v.dtype)
        h = attention(q, k, v, mask)
        x = x + gate1 * self.out(h.transpose(1, 2).reshape(b, n, -1))
        h = F.layer_norm(x, x.shape[-1:]) * (1 + scale2) + shift2
        return x + gate2 * self.down(F.silu(self.up(h)))


class MMDiT(nn.Module):
    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        assert bool(config.vocabulary) != bool(config.text_width), "set vocabulary or text_width"
        self.config = config
        w, n = config.width, config.image_tokens
        values = config.channels * config.patch**2
        self.image_in = nn.Linear(values, w)
        self.source_in = nn.Linear(values, w)
        self.text_in: nn.Module = (
            nn.Embedding(config.vocabulary, w)
            if config.vocabulary
            else nn.Linear(config.text_width, w)
        )
        self.image_place = nn.Parameter(torch.randn(n, w) * 0.02)
        self.source_place = nn.Parameter(torch.randn(n, w) * 0.02)
        self.text_place = nn.Parameter(torch.randn(config.max_text, w) * 0.02)
        self.time = nn.Sequential(nn.Linear(w, w), nn.SiLU(), nn.Linear(w, w), nn.SiLU())
        self.modulation = nn.Linear(w, 6 * w)
        self.blocks = nn.ModuleList(Block(w, config.heads) for _ in range(config.depth))
        self.out_modulation = nn.Linear(w, 2 * w)
        self.image_out = nn.Linear(w, values)
        for layer in (self.modulation, self.out_modulation, self.image_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return (self.config.channels, self.config.grid, self.config.grid)

    def forward(
        self, x_t: Float[Tensor, "b c h w"], t: Float[Tensor, " b"], cond: LabCondition
    ) -> Float[Tensor, "b c h w"]:
        """The denoised x_0, in float32."""
        return x0_from_v(x_t.float(), self.predict_v(x_t, t, cond), t.float())

    def predict_v(
        self, x_t: Float[Tensor, "b c h w"], t: Float[Tensor, " b"], cond: LabCondition
    ) -> Float[Tensor, "b c h w"]:
        """v = eps - x_0 in float32."""
        x, features = self._trunk(x_t, t, cond, len(self.blocks))
        shift, scale = self.out_modulation(features).unsqueeze(1).chunk(2, dim=2)
        x = F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
        return self._unpatch(self.image_out(x)).float()

    @property
    def feature_width(self) -> int:
        return self.config.width

    def features(
        self, x_t: Float[Tensor, "b c h w"], t: Float[Tensor, " b"], cond: LabCondition
    ) -> Float[Tensor, "b n d"]:
        """Image tokens after the first half of the blocks, for a discriminator."""
        return self._trunk(x_t, t, cond, len(self.blocks) // 2)[0]

    def _trunk(
        self, x_t: Tensor, t: Tensor, cond: LabCondition, depth: int
    ) -> tuple[Tensor, Tensor]:
        """The image tokens after `depth` blocks, and the features of the time."""
        n = self.config.image_tokens
        tokens = [self.image_in(self._patches(x_t)) + self.image_place]
        if cond.source is not None:
            tokens.append(self.source_in(self._patches(cond.source)) + self.source_place)
        mask = None
        length = cond.text.shape[1]
        if length:
            tokens.append(self.text_in(cond.text) + self.text_place[:length])
            if not bool(cond.text_mask.all()):
                seen = F.pad(cond.text_mask, (n * (len(tokens) - 1), 0), value=True)
                mask = seen[:, None, None, :]
        x = torch.cat(tokens, dim=1)
        features = self.time(time_features(t, self.config.width))
        modulation = self.modulation(features).view(len(x), 6, -1)
        for block in self.blocks[:depth]:
            x = block(x, modulation, mask)
        return x[:, :n], features

    def _patches(self, x: Tensor) -> Tensor:
        return F.pixel_unshuffle(x, self.config.patch).flatten(2).transpose(1, 2)

    def _unpatch(self, tokens: Tensor) -> Tensor:
        side = self.config.grid // self.config.patch
        return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (side, side)), self.config.patch)


def save_weights(
    module: nn.Module, path: Path, *, config: Any, about: dict[str, object], half: bool = False
) -> None:
    """Write a module as safetensors with its config (a dataclass) and provenance; atomic.

    `half` stores float16, which shipped weights use: half the size, and far below its limits.
    """
    tensors = {
        name: (value.half() if half and value.is_floating_point() else value).contiguous().cpu()
        for name, value in module.state_dict().items()
    }
    header = {"config": json.dumps(asdict(config)), "about": json.dumps(about)}
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".part")
    try:
        save_file(tensors, scratch, metadata=header)
        scratch.replace(path)
    except (SafetensorError, OSError) as error:
        scratch.unlink(missing_ok=True)
        raise DiskError(
            f"weights {path}: could not be written ({error}); is the disk full? Any earlier file "
            "is untouched"
        ) from None


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Config and provenance of a weight file. CheckpointError if it is missing or damaged."""
    if not path.is_file():
        raise CheckpointError(f"weights {path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"weights {path}: damaged or not safetensors ({error}); copy or train it again"
        ) from None
    if "config" not in header:
        raise CheckpointError(f"weights {path}: not written by fewstep (no config in its header)")
    return json.loads(header["config"]), json.loads(header.get("about", "{}"))


def load_weights(module: nn.Module, path: Path) -> None:
    """Fill a module from a weight file. CheckpointError names a tensor that does not fit."""
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"weights {path}: damaged ({error}); copy or train it again"
        ) from None
    wanted = module.state_dict()
    for name, value in wanted.items():
        if name not in found:
            raise CheckpointError(
                f"weights {path}: tensor {name} is missing; is it a file of another model?"
            )
        if found[name].shape != value.shape:
            raise CheckpointError(
                f"weights {path}: tensor {name} is {tuple(found[name].shape)}, this model needs "
                f"{tuple(value.shape)}"
            )
    if extra := sorted(set(found) - set(wanted)):
        raise CheckpointError(
            f"weights {path}: has {len(extra)} tensors this model lacks, first {extra[0]}"
        )
    module.load_state_dict(found)


def load_mmdit(path: Path) -> MMDiT:
    """The model of a weight file, in float32 and evaluation mode."""
    config, _ = read_header(path)
    if unknown := sorted(set(config) ^ {field.name for field in fields(MMDiTConfig)}):
        raise CheckpointError(
            f"weights {path}: of another kind of model (its config differs in "
            f"{', '.join(unknown)}); give a teacher or student written by fewstep"
        )
    model = MMDiT(MMDiTConfig(**config))
    load_weights(model, path)
    return model.eval()
