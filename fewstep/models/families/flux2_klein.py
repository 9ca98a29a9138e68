"""FLUX.2 Klein: patched latents normalised per channel, sources after the target."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fewstep.errors import DataError, RecipeError
from fewstep.models.families.contract import (
    FamilyCondition,
    Grid,
    Images,
    Size,
    Text,
    Trunk,
    check_size,
)
from fewstep.models.families.playback import (
    check_scheduler,
    denoised,
    evenly_spaced,
    rounded_time,
    scheduler_grid,
)
from fewstep.models.families.spatial import draw_noise

TOKEN = 16
"""Pixels along a side of one token: 8 of the autoencoder times a 2x2 patch."""
SOURCE_STEP = 10
"""Position of source i on the first axis is 10 (i + 1); the target's is 0."""
SOURCE_AREA = 1024 * 1024


class Flux2Klein:
    """A FLUX.2 Klein pipeline's components behind the contract of `Family`."""

    tasks = ("t2i", "edit")
    lora_targets = r"(single_)?transformer_blocks\.\d+\.(attn|ff|ff_context)\..*"
    trunk = Trunk(
        ("transformer_blocks", "single_transformer_blocks"),
        "norm_out",  # after the text is gone
        lambda h, x_t: h[:, : x_t.shape[1]],
    )

    def __init__(self, pipe: Any) -> None:
        check_scheduler(pipe.scheduler)
        if pipe.transformer.config.guidance_embeds:
            raise DataError("the transformer has guidance_embeds=true, which is not FLUX.2 Klein")
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
        """All prompts have the full length: the encoder's padding is read by the network.

        The pipeline itself always avoids the empty prompt.
        """
        check_size(size, TOKEN)

        def encode(texts: Sequence[str]) -> Text:
            states, _ = self.pipe.encode_prompt(list(texts))
            return Text(states)

        latents = [self._encode_pixels(self._read(image)) for image in images]
        packed = [z.flatten(2).transpose(1, 2) for z in latents]
        source = torch.cat(packed, dim=1).expand(len(prompts), -1, -1) if packed else None
        return FamilyCondition(
            text=encode(prompts),
            negative=None if negative is None else encode([negative] * len(prompts)),
            size=size,
            source=source,
            source_sizes=tuple((z.shape[2], z.shape[3]) for z in latents),
        )

    def _read(self, image: Any) -> Float[Tensor, "1 3 h w"]:
        """Shrunk to about a megapixel, then cropped to whole tokens."""
        processor = self.pipe.image_processor
        try:
            processor.check_image_input(image)
        except ValueError as error:
            raise DataError(f"source image: {error}") from None
        if image.width * image.height > SOURCE_AREA:
            image = processor._resize_to_target_area(image, SOURCE_AREA)
        height, width = (side // TOKEN * TOKEN for side in (image.height, image.width))
        return processor.preprocess(image, height=height, width=width, resize_mode="crop")

    def _encode_pixels(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c i j"]:
        vae = self.pipe.vae
        z = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
        b, c, h, w = z.shape
        patches = z.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4)
        mean, std = self._statistics(z)
        return (patches.reshape(b, 4 * c, h // 2, w // 2) - mean) / std

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Of each patched channel: what the autoencoder's batch norm has seen."""
        vae = self.pipe.vae
        mean = vae.bn.running_mean.view(1, -1, 1, 1)
        std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
        return mean.to(like.device, like.dtype), std.to(like.device, like.dtype)

    @torch.no_grad()
    def encode_image(self, pixels: Float[Tensor, "b 3 h w"], /) -> Float[Tensor, "b n c"]:
        check_size((pixels.shape[2], pixels.shape[3]), TOKEN)
        return self._encode_pixels(pixels).flatten(2).transpose(1, 2)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b n c"], size: Size, /) -> Float[Tensor, "b 3 h w"]:
        vae = self.pipe.vae
        z = self.unpack(latents, size).to(vae.dtype)
        return vae.decode(z, return_dict=False)[0].float()

    def unpack(self, latents: Float[Tensor, "b n c"], size: Size) -> Float[Tensor, "b d i j"]:
        """What the pipeline returns as latents: unpatched, with the autoencoder's statistics."""
        h, w = size[0] // TOKEN, size[1] // TOKEN
        b, _, c = latents.shape
        z = latents.transpose(1, 2).reshape(b, c, h, w)
        mean, std = self._statistics(z)
        patches = (z * std + mean).reshape(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3)
        return patches.reshape(b, c // 4, 2 * h, 2 * w)

    def noise_shape(self, batch: int, size: Size, /) -> tuple[int, int, int]:
        check_size(size, TOKEN)
        tokens = (size[0] // TOKEN) * (size[1] // TOKEN)
        return batch, tokens, self.pipe.transformer.config.in_channels

    def noise(self, batch: int, size: Size, generator: torch.Generator, /) -> Tensor:
        _, _, channels = self.noise_shape(batch, size)
        shape = (batch, channels, size[0] // TOKEN, size[1] // TOKEN)
        drawn = draw_noise(shape, generator, like=self.pipe.transformer, dtype=self.dtype)
        return drawn.flatten(2).transpose(1, 2)

    def sigmas(self, n: int, size: Size, /, custom: Sequence[float] | None = None) -> Grid:
        """The shift depends on the size and on n, by the pipeline's own fit."""
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        given = evenly_spaced(n, custom)
        tokens = (size[0] // TOKEN) * (size[1] // TOKEN)
        mu = compute_empirical_mu(image_seq_len=tokens, num_steps=n)
        return scheduler_grid(self.pipe.scheduler, given, mu=mu)

    def velocity(
        self,
        x_t: Float[Tensor, "b n c"],
        t: Float[Tensor, " b"],
        cond: FamilyCondition,
        /,
        model: Any = None,
    ) -> Float[Tensor, "b n c"]:
        """The network takes t itself and answers with v, for the target first, then the sources."""
        model = self.pipe.transformer if model is None else model
        states = cond.text.states
        x = x_t.to(states.dtype)
        target = (cond.size[0] // TOKEN, cond.size[1] // TOKEN)
        image_ids = [
            _positions(SOURCE_STEP * i, *grid)
            for i, grid in enumerate((target, *cond.source_sizes))
        ]
        text_ids = torch.cartesian_prod(*map(torch.arange, (1, 1, 1, states.shape[1])))
        out = model(
            hidden_states=x if cond.source is None else torch.cat([x, cond.source], dim=1),
            timestep=rounded_time(t, x.dtype),
            guidance=None,
            encoder_hidden_states=states,
            txt_ids=text_ids.to(x.device).expand(len(x), -1, -1),
            img_ids=torch.cat(image_ids).to(x.device).expand(len(x), -1, -1),
            return_dict=False,
        )[0]
        return out[:, : x.shape[1]]

    def cfg(self, cond_v: Tensor, uncond_v: Tensor, scale: float, /) -> Tensor:
        """uncond + s (cond - uncond); pipelines marked as distilled know no guidance."""
        if self.pipe.config.is_distilled:
            raise RecipeError(
                f"a guidance scale of {scale:g} is asked of a distilled FLUX.2 Klein",
                hint="use 1, or the base checkpoint (is_distilled=false)",
            )
        return uncond_v + scale * (cond_v - uncond_v)

    def __call__(
        self, x_t: Tensor, t: Tensor, cond: FamilyCondition, /, model: Any = None
    ) -> Tensor:
        return denoised(self, x_t, t, cond, model)


def _positions(first: int, height: int, width: int) -> Int[Tensor, "n 4"]:
    axes = torch.tensor([first]), torch.arange(height), torch.arange(width), torch.arange(1)
    return torch.cartesian_prod(*axes)
