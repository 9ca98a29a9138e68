"""Latents before any packing: their noise, and autoencoders that only scale and shift them."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fewstep.models.families.contract import Size


def encode_pixels(vae: Any, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c i j"]:
    z = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
    return (z - vae.config.shift_factor) * vae.config.scaling_factor


def decode_latents(vae: Any, latents: Float[Tensor, "b c i j"]) -> Float[Tensor, "b 3 h w"]:
    z = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
    return vae.decode(z, return_dict=False)[0].float()


def draw_noise(
    shape: tuple[int, ...], generator: torch.Generator, *, like: Any, dtype: torch.dtype
) -> Tensor:
    """As pipelines draw it: on the generator's device, in `dtype`, then moved to the network."""
    from diffusers.utils.torch_utils import randn_tensor

    return randn_tensor(shape, generator=generator, device=like.device, dtype=dtype)


def latent_shape(
    batch: int, channels: int, size: Size, reduction: int
) -> tuple[int, int, int, int]:
    return batch, channels, size[0] // reduction, size[1] // reduction
