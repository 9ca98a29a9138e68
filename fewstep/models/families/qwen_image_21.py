"""Qwen-Image 2.1: text-to-image and editing in one; sources lie inside the prompt.

Text and images share one line of positions, so prompts of unequal length cannot be padded into one
batch: `FamilyCondition.layout` is the bucket, and `encode` and `stack` refuse to mix.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fewstep.errors import DataError, RecipeError
from fewstep.models.families.contract import (
    FamilyCondition,
    Grid,
    Images,
    Prefix,
    Size,
    Text,
    Trunk,
    check_size,
)
from fewstep.models.families.playback import (
    check_scheduler,
    denoised,
    dynamic_mu,
    evenly_spaced,
    rounded_time,
    scheduler_grid,
)
from fewstep.models.families.qwen_image import latent_statistics
from fewstep.models.families.spatial import draw_noise

TOKEN = 16
"""Pixels along a side of one token."""
SLOT = 32
"""Pixels along a side of one slot of the language model, which stands for 2x2 tokens."""


class QwenImage21:
    """The components of a Qwen-Image 2.1 pipeline behind the contract of `Family`.

    `resolution` is the side of a square with the area that sources are resized to, the pipeline's
    `output_resolution`.
    """

    tasks = ("t2i", "edit")
    lora_targets = r"transformer_blocks\.\d+\.(attn|img_mlp)\..*"
    trunk = Trunk(("transformer_blocks",), "norm_out", lambda h, x_t: h[:, -x_t.shape[1] :])

    def __init__(self, pipe: Any, *, resolution: int = 1024) -> None:
        check_scheduler(pipe.scheduler)
        self.pipe, self.resolution = pipe, resolution
        self.dtype: torch.dtype = pipe.transformer.dtype

    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[str],
        images: Images = (),
        *,
        size: Size,
        negative: str | None = None,
    ) -> FamilyCondition:
        """Unlike its siblings, 2.1 is made to be used without guidance, so `negative` is None."""
        check_size(size, SLOT)
        read, latents, sizes = self._read(images)

        def encode(texts: Sequence[str]) -> Text:
            states, mask, slots = self.pipe.encode_prompt(list(texts), image=read or None)
            if mask is not None:
                lengths = mask.sum(dim=1).tolist()
                raise DataError(
                    f"prompts of {min(lengths)} to {max(lengths)} tokens cannot share a batch in "
                    f"Qwen-Image 2.1, where padding moves the image; encode them one at a time "
                    f"and make batches of equal `layout`"
                )
            return Text(states, slots=slots.bool())

        source = torch.cat(latents, dim=1).to(self.pipe.text_encoder.dtype) if latents else None
        return FamilyCondition(
            text=encode(prompts),
            negative=None if negative is None else encode([negative] * len(prompts)),
            size=size,
            source=None if source is None else source.expand(len(prompts), -1, -1),
            source_sizes=tuple(sizes),
        )

    def _read(self, images: Images) -> tuple[list[Any], list[Tensor], list[Size]]:
        """Each image resized once, for the language model and the autoencoder alike."""
        from diffusers.pipelines.qwenimage21 import pipeline_qwenimage21 as module

        read, latents, sizes = [], [], []
        for image in images:
            image = image if image.mode == "RGBA" else image.convert("RGBA")
            width, height, _ = module.calculate_dimensions(
                self.resolution**2, image.width / image.height
            )
            processor = self.pipe.image_processor
            read.append(processor.resize(image, width=width, height=height))
            pixels = processor.preprocess(image, width=width, height=height)
            latents.append(self._encode_pixels(pixels))
            sizes.append((height // TOKEN, width // TOKEN))
        return read, latents, sizes

    def _encode_pixels(self, pixels: Float[Tensor, "b 4 h w"]) -> Float[Tensor, "b n c"]:
        vae = self.pipe.vae
        z = vae.encode(pixels.to(vae.device, vae.dtype)[:, :, None]).latent_dist.mode()
        mean, std = latent_statistics(vae, z)
        return ((z - mean) / std).flatten(2).transpose(1, 2)

    @torch.no_grad()
    def encode_image(self, pixels: Float[Tensor, "b c h w"], /) -> Float[Tensor, "b n d"]:
        """RGB, which is made opaque, or RGBA."""
        check_size((pixels.shape[2], pixels.shape[3]), SLOT)
        if pixels.shape[1] == 3:
            pixels = torch.cat([pixels, torch.ones_like(pixels[:, :1])], dim=1)
        return self._encode_pixels(pixels)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b n c"], size: Size, /) -> Float[Tensor, "b 4 h w"]:
        """RGBA."""
        vae = self.pipe.vae
        h, w = size[0] // TOKEN, size[1] // TOKEN
        z = latents.transpose(1, 2).unflatten(2, (1, h, w)).to(vae.dtype)
        mean, std = latent_statistics(vae, z)
        return vae.decode(z * std + mean, return_dict=False)[0][:, :, 0].float()

    def noise_shape(self, batch: int, size: Size, /) -> tuple[int, int, int]:
        check_size(size, SLOT)
        return batch, self._tokens(size), self.pipe.transformer.config.in_channels

    def noise(self, batch: int, size: Size, generator: torch.Generator, /) -> Tensor:
        _, _, channels = self.noise_shape(batch, size)
        shape = (batch, 1, channels, size[0] // TOKEN, size[1] // TOKEN)
        drawn = draw_noise(shape, generator, like=self.pipe.transformer, dtype=self.dtype)
        return drawn[:, 0].flatten(2).transpose(1, 2)

    def sigmas(self, n: int, size: Size, /, custom: Sequence[float] | None = None) -> Grid:
        """The pipeline's own `sample_sigmas`, where it has them, fix the number of steps."""
        stored = self.pipe.config.sample_sigmas
        if custom is None and stored is not None:
            if n != len(stored):
                raise RecipeError(
                    f"{n} steps were asked for, but the pipeline's sample_sigmas fix {len(stored)}",
                    hint=f"use {len(stored)} steps, or give the sigmas",
                )
            custom = stored
        scheduler = self.pipe.scheduler
        mu = dynamic_mu(scheduler, self._tokens(size))
        return scheduler_grid(scheduler, evenly_spaced(n, custom), mu=mu)

    def velocity(
        self,
        x_t: Float[Tensor, "b n c"],
        t: Float[Tensor, " b"],
        cond: FamilyCondition,
        /,
        model: Any = None,
    ) -> Float[Tensor, "b n c"]:
        """The network takes t itself and answers with v, for the sources first, then the target."""
        model = self.pipe.transformer if model is None else model
        prefix = cond.text.prefix
        if prefix is None:
            return self._forward(model, x_t, t, cond)
        assert prefix.model is model, "a prefix of another model"
        return self._forward(model, x_t, t, cond, cache=_as_cache(prefix), mode="cached")

    @torch.no_grad()
    def with_prefix(self, cond: FamilyCondition, model: Any = None) -> FamilyCondition:
        """`cond` with the keys and values of its text and sources computed, once for all x_t and t.

        They are exact as long as `model` is frozen: its text and sources are modulated with t = 0
        and do not see the target. No gradient goes through them.
        """
        from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

        model = self.pipe.transformer if model is None else model
        if not model.config.causal_condition:
            raise RecipeError(
                "a prefix can only be computed once in a network with causal_condition=true",
                hint="leave the prefix out",
            )

        def computed(branch: FamilyCondition) -> Text:
            cache = QwenImage21KVCache(len(model.transformer_blocks))
            shape = self.noise_shape(len(branch), branch.size)
            x = torch.zeros(shape, device=branch.text.states.device)
            self._forward(model, x, x.new_ones(len(x)), branch, cache=cache, mode="extract")
            layers = tuple(layer.get() for layer in cache.layer_caches)
            return replace(branch.text, prefix=Prefix(layers, model))

        negative = None if cond.negative is None else computed(cond.without_text())
        return replace(cond, text=computed(cond), negative=negative)

    def _forward(
        self,
        model: Any,
        x_t: Tensor,
        t: Tensor,
        cond: FamilyCondition,
        *,
        cache: Any = None,
        mode: str | None = None,
    ) -> Tensor:
        text, x = cond.text, x_t.to(cond.text.states.dtype)
        assert text.slots is not None and text.mask is None
        target = (cond.size[0] // TOKEN, cond.size[1] // TOKEN)
        layout = [(1, h, w) for h, w in (*cond.source_sizes, target)]
        target_slots = text.slots.new_ones(len(x), x.shape[1] // 4)
        out = model(
            hidden_states=x if cond.source is None else torch.cat([cond.source, x], dim=1),
            timestep=rounded_time(t, x.dtype),
            encoder_hidden_states=text.states,
            encoder_hidden_states_mask=None,
            img_shapes=[layout] * len(x),
            img_mask=torch.cat([text.slots, target_slots], dim=1),
            kv_cache=cache,
            kv_cache_mode=mode,
            return_dict=False,
        )[0]
        return out[:, -x.shape[1] :]

    def cfg(self, cond_v: Tensor, uncond_v: Tensor, scale: float, /) -> Tensor:
        """uncond + s (cond - uncond)."""
        return uncond_v + scale * (cond_v - uncond_v)

    def __call__(
        self, x_t: Tensor, t: Tensor, cond: FamilyCondition, /, model: Any = None
    ) -> Tensor:
        return denoised(self, x_t, t, cond, model)

    def _tokens(self, size: Size) -> int:
        return (size[0] // TOKEN) * (size[1] // TOKEN)


def _as_cache(prefix: Prefix) -> Any:
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

    cache = QwenImage21KVCache(len(prefix.layers))
    for layer, (k, v) in zip(cache.layer_caches, prefix.layers):
        layer.store(k, v)
    return cache
