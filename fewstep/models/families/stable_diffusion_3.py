"""Stable Diffusion 3 and 3.5: three text encoders, time in thousandths, plain guidance."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fewstep.models.families.contract import (
    FamilyCondition,
    Grid,
    Images,
    Size,
    Text,
    Trunk,
    check_size,
    check_task,
)
from fewstep.models.families.playback import (
    check_scheduler,
    check_steps,
    denoised,
    dynamic_mu,
    scheduler_grid,
)
from fewstep.models.families.spatial import (
    decode_latents,
    draw_noise,
    encode_pixels,
    latent_shape,
)

TOKEN = 16
"""Pixels along a side of one token: 8 of the autoencoder times a 2x2 patch."""


class StableDiffusion3:
    """A Stable Diffusion 3 pipeline's components behind the contract of `Family`."""

    tasks = ("t2i",)
    lora_targets = r"transformer_blocks\.\d+\.(attn2?|ff|ff_context)\..*"
    trunk = Trunk(("transformer_blocks",), "norm_out", lambda h, x_t: h)

    def __init__(self, pipe: Any) -> None:
        check_scheduler(pipe.scheduler)
        self.pipe = pipe
        self.dtype: torch.dtype = pipe.transformer.dtype

    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[str],
        images: Images = (),
        *,
        size: Size,
        negative: str | None = "",
    ) -> FamilyCondition:
        """All prompts have the full length: the encoders' padding is read by the network."""
        check_size(size, TOKEN)
        check_task(self.tasks, images, type(self.pipe).__name__)

        def encode(texts: Sequence[str]) -> Text:
            states, _, pooled, _ = self.pipe.encode_prompt(
                list(texts), None, None, do_classifier_free_guidance=False
            )
            return Text(states, pooled=pooled)

        avoid = None if negative is None else encode([negative] * len(prompts))
        return FamilyCondition(encode(prompts), avoid, size)

    @torch.no_grad()
    def encode_image(self, pixels: Float[Tensor, "b 3 h w"], /) -> Float[Tensor, "b c i j"]:
        check_size((pixels.shape[2], pixels.shape[3]), TOKEN)
        return encode_pixels(self.pipe.vae, pixels)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b c i j"], size: Size, /) -> Float[Tensor, "b 3 h w"]:
        return decode_latents(self.pipe.vae, latents)

    def noise_shape(self, batch: int, size: Size, /) -> tuple[int, int, int, int]:
        check_size(size, TOKEN)
        return latent_shape(batch, self.pipe.transformer.config.in_channels, size, TOKEN // 2)

    def noise(self, batch: int, size: Size, generator: torch.Generator, /) -> Tensor:
        shape = self.noise_shape(batch, size)
        return draw_noise(shape, generator, like=self.pipe.transformer, dtype=self.dtype)

    def sigmas(self, n: int, size: Size, /, custom: Sequence[float] | None = None) -> Grid:
        """Without `custom` the scheduler places its own steps, down to its smallest sigma."""
        check_steps(n, custom)
        tokens = (size[0] // TOKEN) * (size[1] // TOKEN)
        scheduler = self.pipe.scheduler
        return scheduler_grid(scheduler, custom, mu=dynamic_mu(scheduler, tokens), n=n)

    def velocity(
        self,
        x_t: Float[Tensor, "b c i j"],
        t: Float[Tensor, " b"],
        cond: FamilyCondition,
        /,
        model: Any = None,
    ) -> Float[Tensor, "b c i j"]:
        """The network takes 1000 t, not rounded, and answers with v."""
        model = self.pipe.transformer if model is None else model
        return model(
            hidden_states=x_t.to(cond.text.states.dtype),
            timestep=1000 * t,
            encoder_hidden_states=cond.text.states,
            pooled_projections=cond.text.pooled,
            return_dict=False,
        )[0]

    def cfg(self, cond_v: Tensor, uncond_v: Tensor, scale: float, /) -> Tensor:
        """uncond + s (cond - uncond)."""
        return uncond_v + scale * (cond_v - uncond_v)

    def __call__(
        self, x_t: Tensor, t: Tensor, cond: FamilyCondition, /, model: Any = None
    ) -> Tensor:
        return denoised(self, x_t, t, cond, model)
