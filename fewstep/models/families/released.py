"""Sizes of released models, for a plan without their weights. Facts alone; nothing is fetched.

Each `config` is the transformer/config.json published with the model, as far as it differs from
the defaults of the diffusers class (0.42). Where it was read is said beside it; 2.1 and both
Qwen autoencoders are the defaults themselves.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Released:
    pipeline: str
    network: str
    vae: str
    config: Config = field(default_factory=dict)
    vae_config: Config = field(default_factory=dict)


# AutoencoderKL of SD3, which Z-Image shares in shape: vae/config.json of stable-diffusion-3-medium.
_KL16: Config = {
    "latent_channels": 16,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
}
_DEEP = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
# vae/config.json of Sana_1600M_1024px_diffusers (dc-ae-f32c32-sana-1.0).
_DC32: Config = {
    "encoder_block_types": _DEEP,
    "decoder_block_types": _DEEP,
    "upsample_block_type": "interpolate",
    "downsample_block_type": "conv",
    "scaling_factor": 0.41407,
}
_KLEIN = {"num_layers": 5, "num_single_layers": 20, "guidance_embeds": False}
_QWEN = ("QwenImageTransformer2DModel", "AutoencoderKLQwenImage")

RELEASED: dict[str, Released] = {
    # Qwen/Qwen-Image transformer/config.json: 60 layers of 24 x 128, text of 3584.
    "Qwen-Image": Released("QwenImagePipeline", *_QWEN),
    # A folder that recipes/qwen_image_edit tells how to make: Edit's network, Qwen-Image's prompts.
    "Qwen-Image-Edit-as-T2I": Released("QwenImagePipeline", *_QWEN, {"zero_cond_t": True}),
    # Of 2511; 2509 has no zero_cond_t, which changes neither weights nor sizes.
    "Qwen-Image-Edit-2511": Released("QwenImageEditPlusPipeline", *_QWEN, {"zero_cond_t": True}),
    "Qwen-Image-Edit-2509": Released("QwenImageEditPlusPipeline", *_QWEN),
    "Qwen-Image-2.1": Released(
        "QwenImage21Pipeline", "QwenImage21Transformer2DModel", "AutoencoderKLQwenImage21"
    ),
    # black-forest-labs/FLUX.2-klein-base-4B transformer/config.json (read in a public mirror of it,
    # YuCollection/FLUX.2-klein-base-4B-Diffusers).
    "FLUX.2-klein-base-4B": Released(
        "Flux2KleinPipeline",
        "Flux2Transformer2DModel",
        "AutoencoderKLFlux2",
        {**_KLEIN, "num_attention_heads": 24, "joint_attention_dim": 7680},
    ),
    # stabilityai/stable-diffusion-3.5-medium transformer/config.json (read in a fine-tune's copy).
    "stable-diffusion-3.5-medium": Released(
        "StableDiffusion3Pipeline",
        "SD3Transformer2DModel",
        "AutoencoderKL",
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "qk_norm": "rms_norm",
            "dual_attention_layers": tuple(range(13)),
        },
        _KL16,
    ),
    # Tongyi-MAI/Z-Image transformer/config.json: the class's defaults but for the longest text.
    "Z-Image": Released(
        "ZImagePipeline",
        "ZImageTransformer2DModel",
        "AutoencoderKL",
        {"axes_lens": (1536, 512, 512)},
        _KL16,
    ),
    # Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers transformer/config.json: the defaults.
    "Sana_1600M_1024px_BF16_diffusers": Released(
        "SanaPipeline", "SanaTransformer2DModel", "AutoencoderDC", {}, _DC32
    ),
}
"""By the last part of the name, as download tools call the folder."""
