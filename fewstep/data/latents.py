"""Latents of images and states of prompts: encoded once, kept on disk in content-keyed files.

A file's name is the hash of all that its content depends on (encoder identity, precision, the
images or prompts themselves), so it is either right or not found. The encoder comes from outside.
"""

import json
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fewstep.data.pixels import Progress, write_atomically
from fewstep.errors import DataError

CACHE_VERSION = 1


@runtime_checkable
class Pixels(Protocol):
    """Images with a content hash each; `ImageFolder` is one."""

    @property
    def pixel_digests(self) -> tuple[str, ...]: ...

    def pixels(self, indices: np.ndarray, /) -> np.ndarray: ...


@runtime_checkable
class ImageEncoder(Protocol):
    @property
    def name(self) -> str: ...

    def encode(self, pixels: Tensor, /) -> Tensor: ...


@runtime_checkable
class PromptEncoder(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def max_tokens(self) -> int: ...

    def lengths(self, prompts: Sequence[str], /) -> list[int]: ...

    def encode(self, prompts: Sequence[str], /) -> tuple[Tensor, Tensor]: ...


def to_float(pixels: UInt8[np.ndarray, "n h w 3"]) -> Float[Tensor, "n 3 h w"]:
    """0 .. 255 to [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(pixels: Float[Tensor, "n 3 h w"]) -> UInt8[np.ndarray, "n h w 3"]:
    """The inverse of `to_float`, clamped and rounded."""
    scaled = ((pixels.float() + 1) * 127.5).round().clamp(0, 255)
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


class LatentCache:
    """Latents of all images of a folder, in its order; files are mapped, not copied to memory."""

    def __init__(self, shards: list[Tensor], shard_size: int, notices: list[str]) -> None:
        self._shards, self._shard_size = shards, shard_size
        self.notices = tuple(notices)

    def __len__(self) -> int:
        return sum(map(len, self._shards))

    def take(self, indices: np.ndarray | Sequence[int]) -> Float[Tensor, "n c h w"]:
        rows = np.asarray(indices, np.int64).tolist()
        assert rows and min(rows) >= 0
        size = self._shard_size
        return torch.stack([self._shards[i // size][i % size] for i in rows]).float()


class TextRows(NamedTuple):
    """What a `Pool` holds: states padded with 0 on the right, and the real lengths."""

    text: Float[Tensor, "n l d"]
    lengths: Int[Tensor, " n"]


class TextCache:
    """States of distinct prompts, found by the prompt itself."""

    def __init__(self, states: dict[str, Tensor], notices: list[str]) -> None:
        self._states = states
        self.notices = tuple(notices)

    def __len__(self) -> int:
        return len(self._states)

    def take(self, prompts: Sequence[str]) -> TextRows:
        rows = [self._states[prompt].float() for prompt in prompts]
        lengths = torch.tensor([len(row) for row in rows])
        return TextRows(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths)


@torch.no_grad()
def cache_latents(
    codec: ImageEncoder,
    images: Pixels,
    *,
    cache_dir: Path | str,
    batch_size: int = 32,
    shard_size: int = 1024,
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> LatentCache:
    """Encode what is not yet on disk; a stopped run goes on at the first missing file.

    `dtype` is that of the files; `take` gives float32.
    """
    digests = images.pixel_digests
    assert len(digests) > 0

    def encode(rows: range) -> dict[str, Tensor]:
        parts = []
        for start in range(rows.start, rows.stop, batch_size):
            batch = np.arange(start, min(start + batch_size, rows.stop))
            parts.append(codec.encode(to_float(images.pixels(batch))).to("cpu", dtype))
            if progress is not None:
                progress(int(batch[-1]) + 1, len(digests))
        latents = torch.cat(parts).contiguous()  # convolutions may leave channels last
        broken = (~latents.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
        if broken:
            raise DataError(
                f"{codec.name} gives values that are not finite for image {rows.start + broken[0]} "
                f"and {len(broken) - 1} more; encode in float32 or remove these images"
            )
        return {"latents": latents}

    keys = [f"{digest}-{dtype}" for digest in digests]
    shards, notices = _shards("latents", codec.name, keys, Path(cache_dir), shard_size, encode)
    return LatentCache([shard["latents"] for shard in shards], shard_size, notices)


@torch.no_grad()
def cache_text(
    encoder: PromptEncoder,
    prompts: Sequence[str],
    *,
    cache_dir: Path | str,
    batch_size: int = 32,
    shard_size: int = 1024,
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> TextCache:
    """Encode each distinct prompt that is not yet on disk; a stopped run goes on where it was."""
    distinct = list(dict.fromkeys(prompts))
    assert distinct

    def encode(rows: range) -> dict[str, Tensor]:
        own = distinct[rows.start : rows.stop]
        order = sorted(range(len(own)), key=lambda i: len(own[i]))  # little padding in a batch
        states: list[Tensor] = [torch.empty(0)] * len(own)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            padded, mask = encoder.encode([own[i] for i in batch])
            for i, row, real in zip(batch, padded, mask, strict=True):
                states[i] = row[real].to("cpu", dtype)
            if progress is not None:
                progress(rows.start + start + len(batch), len(distinct))
        broken = [i for i, row in enumerate(states) if not row.isfinite().all()]
        if broken:
            raise DataError(
                f"{encoder.name} gives values that are not finite for {own[broken[0]]!r}; "
                f"encode in float32"
            )
        return {
            "states": torch.cat(states),
            "lengths": torch.tensor([len(row) for row in states]),
        }

    keys = [f"{prompt}-{dtype}" for prompt in distinct]
    shards, notices = _shards("text", encoder.name, keys, Path(cache_dir), shard_size, encode)
    states = [row for s in shards for row in s["states"].split(s["lengths"].tolist())]
    cut = sum(length > encoder.max_tokens for length in encoder.lengths(distinct))
    if cut:
        notices.append(
            f"{cut} of {len(distinct)} prompts have more than {encoder.max_tokens} tokens and "
            f"were cut"
        )
    return TextCache(dict(zip(distinct, states, strict=True)), notices)


def _shards(
    kind: str,
    name: str,
    keys: list[str],
    cache_dir: Path,
    shard_size: int,
    encode: Callable[[range], dict[str, Tensor]],
) -> tuple[list[dict[str, Tensor]], list[str]]:
    """Every run of `shard_size` items from its file, or encoded and written as a whole."""
    shards, notices = [], []
    for start in range(0, len(keys), shard_size):
        rows = range(start, min(start + shard_size, len(keys)))
        content = json.dumps([CACHE_VERSION, kind, name, keys[rows.start : rows.stop]])
        digest = blake2b(content.encode(), digest_size=16).hexdigest()
        file = cache_dir / f"{kind}-{digest}.safetensors"
        shard = None
        if file.exists():
            shard = _load(file, digest)
            if shard is None:
                notices.append(f"the cache file {file.name} was damaged and has been built again")
        if shard is None:
            write_atomically(file, save(encode(rows), {"key": digest}))
            shard = _load(file, digest)
            assert shard is not None, file
        shards.append(shard)
    return shards, notices


def _load(file: Path, digest: str) -> dict[str, Tensor] | None:
    try:
        with safe_open(file, "pt") as stored:
            if (stored.metadata() or {}).get("key") != digest:
                return None
            return {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
    except SafetensorError:
        return None
