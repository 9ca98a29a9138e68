"""Z-Image: time runs from 0 (noise) to 1 (data), the sign is reversed, and the state is float32."""

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
    stack_texts,
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


class ZImage:
    """A Z-Image pipeline's components behind the contract of `Family`.

    The pipeline counts guidance differently: its guidance_scale is s - 1.
    """

    tasks = ("t2i",)
    lora_targets = r"(noise_refiner|context_refiner|layers)\.\d+\.(attention|feed_forward)\..*"
    trunk = Trunk(
        ("layers",),  # the refiners before them are not counted
        "all_final_layer.2-1",  # of patches of 2x2 latents of one frame
        lambda h, x_t: h[:, : x_t.shape[2] * x_t.shape[3] // 4],
    )

    def __init__(self, pipe: Any) -> None:
        check_scheduler(pipe.scheduler)
        self.pipe = pipe

    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[str],
        images: Images = (),
        *,
        size: Size,
        negative: str | None = "",
    ) -> FamilyCondition:
        check_size(size, TOKEN)
        check_task(self.tasks, images, type(self.pipe).__name__)

        def encode(texts: Sequence[str]) -> Text:
            states, _ = self.pipe.encode_prompt(list(texts), do_classifier_free_guidance=False)
            return stack_texts([Text(each[None]) for each in states])

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
        return latent_shape(batch, self.pipe.transformer.in_channels, size, TOKEN // 2)

    def noise(self, batch: int, size: Size, generator: torch.Generator, /) -> Tensor:
        shape = self.noise_shape(batch, size)
        return draw_noise(shape, generator, like=self.pipe.transformer, dtype=torch.float32)

    def sigmas(self, n: int, size: Size, /, custom: Sequence[float] | None = None) -> Grid:
        check_steps(n, custom)
        tokens = (size[0] // TOKEN) * (size[1] // TOKEN)
        given = torch.linspace(1.0, 1 / n, n).tolist() if custom is None else custom
        scheduler = self.pipe.scheduler
        return scheduler_grid(scheduler, given, mu=dynamic_mu(scheduler, tokens))

    def velocity(
        self,
        x_t: Float[Tensor, "b c i j"],
        t: Float[Tensor, " b"],
        cond: FamilyCondition,
        /,
        model: Any = None,
    ) -> Float[Tensor, "b c i j"]:
        """The network takes lists of single samples, 1 - t, and answers with -v."""
        model = self.pipe.transformer if model is None else model
        text = cond.text
        states = list(text.states)
        if text.mask is not None:
            states = [each[real] for each, real in zip(text.states, text.mask)]
        x = x_t.to(text.states.dtype)[:, :, None]
        out = model(list(x), (1000 - 1000 * t) / 1000, states, return_dict=False)[0]
        return -torch.stack([each.float() for each in out]).squeeze(2)

    def cfg(self, cond_v: Tensor, uncond_v: Tensor, scale: float, /) -> Tensor:
        """cond + (s - 1) (cond - uncond): the pipeline's g (cond - uncond) on top of cond."""
        return cond_v + (scale - 1) * (cond_v - uncond_v)

    def __call__(
        self, x_t: Tensor, t: Tensor, cond: FamilyCondition, /, model: Any = None
    ) -> Tensor:
        return denoised(self, x_t, t, cond, model)
