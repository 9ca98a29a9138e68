"""Qwen-Image and Qwen-Image-Edit-Plus: 2x2 latents packed to tokens, sources after the target.

The two differ in how a prompt is encoded and in nothing else, so one network can serve both.
"""

from collections.abc import Callable, Sequence
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
    stack,
)
from fewstep.models.families.playback import (
    check_scheduler,
    denoised,
    dynamic_mu,
    evenly_spaced,
    rounded_time,
    scheduler_grid,
)
from fewstep.models.families.spatial import draw_noise

TOKEN = 16
"""Pixels along a side of one token: 8 of the autoencoder times a 2x2 patch."""
MAX_TEXT = 512
"""What QwenImagePipeline's call cuts prompts to (its encode_prompt alone would allow 1024)."""

Encode = Callable[[Any, Sequence[str], Images, Size, str | None], FamilyCondition]


def text_to_image(pipe: Any) -> "QwenImage":
    """Qwen-Image."""
    return QwenImage(pipe, tasks=("t2i",), encode=_encode_prompts)


def edit_plus(pipe: Any) -> "QwenImage":
    """Qwen-Image-Edit-Plus (2509, 2511)."""
    if pipe.text_encoder is not None:
        forward_image_positions(pipe.text_encoder)
    return QwenImage(pipe, tasks=("edit",), encode=_encode_edits)


class QwenImage:
    """A Qwen-Image pipeline's components behind the contract of `Family`."""

    lora_targets = r"transformer_blocks\.\d+\.(attn|img_mlp|txt_mlp)\..*"
    trunk = Trunk(("transformer_blocks",), "norm_out", lambda h, x_t: h[:, : x_t.shape[1]])

    def __init__(self, pipe: Any, *, tasks: tuple[str, ...], encode: Encode) -> None:
        check_scheduler(pipe.scheduler)
        if pipe.transformer.config.guidance_embeds:
            raise DataError(
                "the transformer has guidance_embeds=true, which diffusers cannot run; "
                "use a checkpoint with guidance_embeds=false"
            )
        self.pipe, self.tasks, self._encode = pipe, tasks, encode
        self.dtype: torch.dtype = pipe.transformer.dtype

    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[str],
        images: Images = (),
        *,
        size: Size,
        negative: str | None = " ",
    ) -> FamilyCondition:
        check_size(size, TOKEN)
        check_task(self.tasks, images, type(self.pipe).__name__)
        return self._encode(self.pipe, prompts, images, size, negative)

    @torch.no_grad()
    def encode_image(self, pixels: Float[Tensor, "b 3 h w"], /) -> Float[Tensor, "b n c"]:
        check_size((pixels.shape[2], pixels.shape[3]), TOKEN)
        return _encode_pixels(self.pipe.vae, pixels)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b n c"], size: Size, /) -> Float[Tensor, "b 3 h w"]:
        vae = self.pipe.vae
        z = unpack(latents, size).to(vae.dtype)
        mean, std = latent_statistics(vae, z)
        return vae.decode(z / (1.0 / std) + mean, return_dict=False)[0][:, :, 0].float()

    def noise_shape(self, batch: int, size: Size, /) -> tuple[int, int, int]:
        check_size(size, TOKEN)
        return batch, tokens(size), self.pipe.transformer.config.in_channels

    def noise(self, batch: int, size: Size, generator: torch.Generator, /) -> Tensor:
        check_size(size, TOKEN)
        channels = self.pipe.transformer.config.in_channels // 4
        shape = (batch, 1, channels, size[0] // 8, size[1] // 8)
        return pack(
            draw_noise(shape, generator, like=self.pipe.transformer, dtype=self.dtype)[:, 0]
        )

    def sigmas(self, n: int, size: Size, /, custom: Sequence[float] | None = None) -> Grid:
        scheduler = self.pipe.scheduler
        mu = dynamic_mu(scheduler, tokens(size))
        return scheduler_grid(scheduler, evenly_spaced(n, custom), mu=mu)

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
        x = x_t.to(cond.text.states.dtype)
        layout = [(1, h, w) for h, w in (_grid(cond.size), *cond.source_sizes)]
        out = model(
            hidden_states=x if cond.source is None else torch.cat([x, cond.source], dim=1),
            timestep=rounded_time(t, x.dtype),
            guidance=None,
            encoder_hidden_states=cond.text.states,
            encoder_hidden_states_mask=cond.text.mask,
            img_shapes=[layout] * len(x),
            return_dict=False,
        )[0]
        return out[:, : x.shape[1]]

    def cfg(self, cond_v: Tensor, uncond_v: Tensor, scale: float, /) -> Tensor:
        """uncond + s (cond - uncond), every token then scaled back to the norm of cond."""
        guided = uncond_v + scale * (cond_v - uncond_v)
        norm = torch.norm(cond_v, dim=-1, keepdim=True)
        return guided * (norm / torch.norm(guided, dim=-1, keepdim=True))

    def __call__(
        self, x_t: Tensor, t: Tensor, cond: FamilyCondition, /, model: Any = None
    ) -> Tensor:
        return denoised(self, x_t, t, cond, model)


def _grid(size: Size) -> Size:
    return size[0] // TOKEN, size[1] // TOKEN


def tokens(size: Size) -> int:
    return (size[0] // TOKEN) * (size[1] // TOKEN)


def pack(z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
    """2x2 latents become one token, channel first."""
    b, c, h, w = z.shape
    patches = z.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(b, (h // 2) * (w // 2), c * 4)


def unpack(x: Float[Tensor, "b n d"], size: Size) -> Float[Tensor, "b c 1 h w"]:
    h, w = _grid(size)
    b, _, d = x.shape
    patches = x.view(b, h, w, d // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(b, d // 4, 1, 2 * h, 2 * w)


def latent_statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation that the pipelines normalise latents with."""
    config = vae.config
    mean, std = (
        torch.tensor(values).view(1, config.z_dim, 1, 1, 1).to(like.device, like.dtype)
        for values in (config.latents_mean, config.latents_std)
    )
    return mean, std


def _encode_pixels(vae: Any, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n c"]:
    z = vae.encode(pixels.to(vae.device, vae.dtype)[:, :, None]).latent_dist.mode()
    mean, std = latent_statistics(vae, z)
    return pack(((z - mean) / std)[:, :, 0])


def _encode_prompts(
    pipe: Any, prompts: Sequence[str], images: Images, size: Size, negative: str | None
) -> FamilyCondition:
    def encode(texts: Sequence[str]) -> Text:
        states, mask = pipe.encode_prompt(list(texts), max_sequence_length=MAX_TEXT)
        return Text(states, None if mask is None else mask.bool())

    avoid = None if negative is None else encode([negative] * len(prompts))
    return FamilyCondition(encode(prompts), avoid, size)


def _encode_edits(
    pipe: Any, prompts: Sequence[str], images: Images, size: Size, negative: str | None
) -> FamilyCondition:
    """Each image twice: small beside the prompt, for the language model, and large as latents."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as edit_plus_module

    read, latents, sizes = [], [], []
    for image in images:
        ratio = image.width / image.height
        width, height = edit_plus_module.calculate_dimensions(
            edit_plus_module.CONDITION_IMAGE_SIZE, ratio
        )
        read.append(pipe.image_processor.resize(image, height, width))
        width, height = edit_plus_module.calculate_dimensions(
            edit_plus_module.VAE_IMAGE_SIZE, ratio
        )
        pixels = pipe.image_processor.preprocess(image, height, width)
        latents.append(_encode_pixels(pipe.vae, pixels))
        sizes.append(_grid((height, width)))

    def encode(text: str) -> Text:
        states, mask = pipe.encode_prompt([text], image=read)
        return Text(states, None if mask is None else mask.bool())

    source = torch.cat(latents, dim=1).to(pipe.text_encoder.dtype)
    avoid = None if negative is None else encode(negative)
    return stack([FamilyCondition(encode(p), avoid, size, source, tuple(sizes)) for p in prompts])


def forward_image_positions(text_encoder: Any) -> Any:
    """Tells Qwen2.5-VL which tokens are image tokens; returns the hook's handle.

    diffusers 0.42 does not pass mm_token_type_ids on (its issue 14194), and transformers >= 5 then
    gives the image tokens 1-D positions without a word. Needed wherever the pipeline is played.
    """
    import transformers

    if int(transformers.__version__.split(".")[0]) < 5:
        return None  # older versions find the image tokens themselves

    def add(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("pixel_values") is None or "mm_token_type_ids" in kwargs:
            return None
        is_image = kwargs["input_ids"] == module.config.image_token_id
        return args, {**kwargs, "mm_token_type_ids": is_image.int()}

    return text_encoder.register_forward_pre_hook(add, with_kwargs=True)
