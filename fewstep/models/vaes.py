"""Pixels to latents and back: a common surface, plain pixels, and diffusers autoencoders by path.

The lab's own autoencoder is in `autoencoder.py`. Nothing here trains.
"""

import json
import math
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from fewstep.errors import DataError
from fewstep.models.foreign import fingerprint, loading, read_config, refuse_missing

WHAT = "autoencoder"
# The key in config.json that has one entry for each resolution level.
LEVELS = {"AutoencoderTiny": "encoder_block_out_channels", "AutoencoderKL": "block_out_channels"}


@runtime_checkable
class Codec(Protocol):
    """Deterministic; pixels are RGB in [-1, 1], decoded ones nominally so (not clamped)."""

    @property
    def name(self) -> str:
        """Identifies kind, weights and precision: equal names give equal latents."""
        ...

    def encode(self, pixels: Tensor, /) -> Tensor: ...

    def decode(self, latents: Tensor, /) -> Tensor: ...

    def latent_shape(self, image_size: int, /) -> tuple[int, int, int]: ...


class PixelCodec:
    """The identity: the model works in pixels."""

    name = "pixels"

    def encode(self, pixels: Float[Tensor, "b 3 h w"], /) -> Float[Tensor, "b 3 h w"]:
        return pixels

    def decode(self, latents: Float[Tensor, "b 3 h w"], /) -> Float[Tensor, "b 3 h w"]:
        return latents

    def latent_shape(self, image_size: int, /) -> tuple[int, int, int]:
        return 3, image_size, image_size


class DiffusersCodec:
    """A frozen diffusers autoencoder; latents are (z - shift) * scale as its pipelines use them.

    z is the mean of the posterior where there is one: a cached latent must not depend on chance.
    """

    def __init__(self, model: Any, *, name: str) -> None:
        self.name = name
        self.model = model.eval().requires_grad_(False)
        config = model.config
        self.scale: float = config["scaling_factor"]
        self.shift: float = config["shift_factor"] or 0.0
        self.channels: int = config["latent_channels"]
        self.downsampling = 2 ** (len(config[LEVELS[type(model).__name__]]) - 1)
        self.has_posterior = type(model).__name__ == "AutoencoderKL"

    @classmethod
    def open(
        cls, path: Path | str, *, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> "DiffusersCodec":
        path = Path(path)
        config = read_config(path, what=WHAT)
        kind = config.get("_class_name")
        if kind not in LEVELS:
            raise DataError(
                f"{WHAT}: {path} holds a {kind or 'model without _class_name'}; "
                f"supported are {' and '.join(LEVELS)}"
            )
        if config.get("in_channels", 3) != 3:
            raise DataError(f"{WHAT}: {path} has {config['in_channels']} input channels, not 3")
        if config.get("latents_mean") is not None:
            raise DataError(
                f"{WHAT}: {path} has latents_mean in config.json, which is not supported; "
                f"use one with scaling_factor and shift_factor"
            )
        with loading(path, what=WHAT):
            import diffusers

            model, info = getattr(diffusers, kind).from_pretrained(
                path,
                torch_dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
        refuse_missing(path, info["missing_keys"], what=WHAT)
        name = f"{kind}-{fingerprint(path)}-{str(dtype).removeprefix('torch.')}"
        return cls(model.to(device), name=name)

    def encode(self, pixels: Float[Tensor, "b 3 h w"], /) -> Float[Tensor, "b c i j"]:
        coded = self.model.encode(pixels.to(self.model.device, self.model.dtype))
        z = coded.latent_dist.mode() if self.has_posterior else coded.latents
        return (z.float() - self.shift) * self.scale

    def decode(self, latents: Float[Tensor, "b c i j"], /) -> Float[Tensor, "b 3 h w"]:
        z = latents.float() / self.scale + self.shift
        return self.model.decode(z.to(self.model.device, self.model.dtype)).sample.float()

    def latent_shape(self, image_size: int, /) -> tuple[int, int, int]:
        if image_size < 1 or image_size % self.downsampling:
            lower = max(image_size // self.downsampling, 1) * self.downsampling
            raise DataError(
                f"image size {image_size} is no multiple of {self.downsampling}, the reduction of "
                f"{self.name.split('-')[0]}; use {lower} or {lower + self.downsampling}"
            )
        side = image_size // self.downsampling
        return self.channels, side, side


@dataclass(frozen=True)
class ChannelStats:
    """Mean and standard deviation of each latent channel over a data set."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def measure(cls, latents: Float[Tensor, "n c h w"]) -> "ChannelStats":
        values = latents.double().transpose(0, 1).flatten(1)
        mean, std = values.mean(1), values.std(1, correction=0)
        dead = [i for i, s in enumerate(std.tolist()) if not (math.isfinite(s) and s > 0)]
        if dead:
            raise DataError(
                f"latent channels {dead} are constant or not finite over {len(latents)} images; "
                f"use more varied images, or leave the latents unstandardised"
            )
        return cls(tuple(mean.tolist()), tuple(std.tolist()))

    def to_json(self) -> str:
        return json.dumps({"mean": self.mean, "std": self.std})

    @classmethod
    def from_json(cls, text: str) -> "ChannelStats":
        values = json.loads(text)
        return cls(tuple(values["mean"]), tuple(values["std"]))


class StandardisedCodec:
    """Another codec whose latents are shifted and scaled to mean 0 and variance 1 per channel."""

    def __init__(self, codec: Codec, stats: ChannelStats) -> None:
        self.codec, self.stats = codec, stats
        digest = blake2b(stats.to_json().encode(), digest_size=4).hexdigest()
        self.name = f"{codec.name}-standardised-{digest}"
        self._mean = torch.tensor(stats.mean)[:, None, None]
        self._std = torch.tensor(stats.std)[:, None, None]

    def standardise(self, latents: Float[Tensor, "b c i j"], /) -> Float[Tensor, "b c i j"]:
        """Latents of the inner codec (from a cache) to those of this one."""
        return (latents - self._mean.to(latents.device)) / self._std.to(latents.device)

    def encode(self, pixels: Float[Tensor, "b 3 h w"], /) -> Float[Tensor, "b c i j"]:
        return self.standardise(self.codec.encode(pixels))

    def decode(self, latents: Float[Tensor, "b c i j"], /) -> Float[Tensor, "b 3 h w"]:
        mean, std = self._mean.to(latents.device), self._std.to(latents.device)
        return self.codec.decode(latents * std + mean)

    def latent_shape(self, image_size: int, /) -> tuple[int, int, int]:
        shape = self.codec.latent_shape(image_size)
        assert shape[0] == len(self.stats.mean), (shape, self.stats)
        return shape
