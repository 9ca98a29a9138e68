"""SANA: an autoencoder of high reduction, time in thousandths, plain guidance, a float32 state.

Released pipelines come with a multistep solver; give `open_family` a flow-matching Euler scheduler
among its components. The pipeline also moves sizes to its own bins unless it is called with
use_resolution_binning=False; here a size means what it says.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fewstep.errors import DataError
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
    scheduler_grid,
)
from fewstep.models.families.spatial import draw_noise, latent_shape

MULTIPLE = 32
"""What the pipeline demands of height and width."""


class Sana:
    """A SANA pipeline's components behind the contract of `Family`."""

    tasks = ("t2i",)
    lora_targets = r"transformer_blocks\.\d+\.(attn1|attn2)\..*"
    trunk = Trunk(("transformer_blocks",), "norm_out", lambda h, x_t: h)

    def __init__(self, pipe: Any) -> None:
        check_scheduler(pipe.scheduler)
        if pipe.scheduler.config.use_dynamic_shifting:
            raise DataError(
                "the scheduler has use_dynamic_shifting=true, which SanaPipeline cannot run; "
                "use a static shift"
            )
        call = inspect.signature(type(pipe).__call__).parameters
        self._instruction = call["complex_human_instruction"].default
        self._max_text = call["max_sequence_length"].default
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
        """The pipeline's instruction precedes a prompt, but not the negative one."""
        check_size(size, MULTIPLE)
        check_task(self.tasks, images, type(self.pipe).__name__)

        def encode(texts: Sequence[str], instruction: list[str] | None) -> Text:
            states, mask, _, _ = self.pipe.encode_prompt(
                list(texts),
                do_classifier_free_guidance=False,
                max_sequence_length=self._max_text,
                complex_human_instruction=instruction,
            )
            return Text(states, mask.bool())

        avoid = None if negative is None else encode([negative] * len(prompts), None)
        return FamilyCondition(encode(prompts, self._instruction), avoid, size)

    @torch.no_grad()
    def encode_image(self, pixels: Float[Tensor, "b 3 h w"], /) -> Float[Tensor, "b c i j"]:
        check_size((pixels.shape[2], pixels.shape[3]), MULTIPLE)
        vae = self.pipe.vae
        z = vae.encode(pixels.to(vae.device, vae.dtype)).latent
        return z * vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b c i j"], size: Size, /) -> Float[Tensor, "b 3 h w"]:
        vae = self.pipe.vae
        z = latents.to(vae.dtype) / vae.config.scaling_factor
        return vae.decode(z, return_dict=False)[0].float()

    def noise_shape(self, batch: int, size: Size, /) -> tuple[int, int, int, int]:
        check_size(size, MULTIPLE)
        channels = self.pipe.transformer.config.in_channels
        return latent_shape(batch, channels, size, self.pipe.vae_scale_factor)

    def noise(self, batch: int, size: Size, generator: torch.Generator, /) -> Tensor:
        shape = self.noise_shape(batch, size)
        return draw_noise(shape, generator, like=self.pipe.transformer, dtype=torch.float32)

    def sigmas(self, n: int, size: Size, /, custom: Sequence[float] | None = None) -> Grid:
        """Without `custom` the scheduler places its own steps, down to its smallest sigma."""
        check_steps(n, custom)
        return scheduler_grid(self.pipe.scheduler, custom, n=n)

    def velocity(
        self,
        x_t: Float[Tensor, "b c i j"],
        t: Float[Tensor, " b"],
        cond: FamilyCondition,
        /,
        model: Any = None,
    ) -> Float[Tensor, "b c i j"]:
        """The network takes 1000 t, scaled by its config, and answers with v (and a variance)."""
        config = self.pipe.transformer.config
        model = self.pipe.transformer if model is None else model
        text = cond.text
        out = model(
            x_t.to(text.states.dtype),
            encoder_hidden_states=text.states,
            encoder_attention_mask=None if text.mask is None else text.mask.long(),
            timestep=1000 * t * config.timestep_scale,
            return_dict=False,
        )[0].float()
        return out[:, : config.in_channels]

    def cfg(self, cond_v: Tensor, uncond_v: Tensor, scale: float, /) -> Tensor:
        """uncond + s (cond - uncond)."""
        return uncond_v + scale * (cond_v - uncond_v)

    def __call__(
        self, x_t: Tensor, t: Tensor, cond: FamilyCondition, /, model: Any = None
    ) -> Tensor:
        return denoised(self, x_t, t, cond, model)
