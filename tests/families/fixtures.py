"""Tiny random pipelines of the real diffusers classes: built in a second, no file, no network.

Everything is non-square, every 1-D parameter is perturbed and the latent statistics are far from
0 and 1, because unit norms, zero biases and squares hide mistakes.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
from PIL import Image

from fewstep.models.families.open import adapt

# Their lazy modules hide every name from a type checker.
diffusers: Any = import_module("diffusers")
transformers: Any = import_module("transformers")
tokenizers: Any = import_module("tokenizers")
diffusers.utils.logging.set_verbosity_error()

STEPS = 4
SIZE = (64, 96)  # height, width
AREA = 96 * 96  # of a source image; 128x64 and 64x160 give two different non-square shapes

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The templates of the pipelines; each word becomes one token, so that the prefixes which the
# pipelines cut off (34 and 64 tokens) have their real length.
TEMPLATES = [
    "system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:",
    "system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. "
    "Generate a new image that meets the user's requirements while maintaining consistency with "
    "the original input where appropriate.",
    "system\nComprehend and analyze the provided prompt.",
    "\nuser\nPicture 1: Picture 2: \nassistant\n",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SCHEDULERS: dict[str, dict[str, Any]] = {
    "dynamic": {
        "use_dynamic_shifting": True,
        "base_shift": 0.5,
        "max_shift": 0.9,
        "max_image_seq_len": 8192,
        "shift_terminal": 0.02,
    },
    "static": {"shift": 3.0},
    "lightning": {
        "use_dynamic_shifting": True,
        "base_shift": 1.0986122886681098,
        "max_shift": 1.0986122886681098,
        "max_image_seq_len": 8192,
    },
}


def scheduler(kind: str) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULERS[kind])


def source(width: int, height: int, seed: int) -> Image.Image:
    """Random, smooth enough to survive a resize."""
    noise = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    pixels = torch.nn.functional.interpolate(noise, (height, width), mode="bilinear")[0]
    return Image.fromarray((pixels * 255).byte().permute(1, 2, 0).numpy())


def sources() -> list[Image.Image]:
    return [source(128, 64, 1), source(64, 160, 2)]


@cache
def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    before, byte_level = tokenizers.pre_tokenizers, tokenizers.pre_tokenizers.ByteLevel
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = before.Sequence(
        [
            before.Split(tokenizers.Regex(WORDS), behavior="isolated"),
            byte_level(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=4000,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=byte_level.alphabet(),
    )
    trained.train_from_iterator(TEMPLATES, trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    vocab = dict(model["vocab"])
    for token in SPECIAL:
        vocab[token] = len(vocab)
    return vocab, merges


def qwen_tokenizer() -> Any:
    vocab, merges = _vocabulary()
    return transformers.Qwen2Tokenizer(
        vocab=dict(vocab),
        merges=list(merges),
        extra_special_tokens=SPECIAL[1:],
    )


def without_video(processor: Any) -> Any:
    """The processor class without its video part, which needs torchvision even to exist."""

    def check(self: Any, name: str, argument: object) -> Any:
        if argument is None:
            return None
        return processor.check_argument_for_proper_class(self, name, argument)

    return type(
        processor.__name__,
        (processor,),
        {"check_argument_for_proper_class": check, "__module__": processor.__module__},
    )


def _image_processor(patch: int) -> Any:
    return transformers.Qwen2VLImageProcessorPil(
        patch_size=patch,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": (2 * patch) ** 2, "longest_edge": 1 << 20},
    )


def _seeded(make: Callable[[], Any], seed: int, *, gain: float = 1.0) -> Any:
    """A frozen model with norms and biases moved off 1 and 0.

    `gain` widens the matrices until attention is sharp enough to tell one source from another.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1 or not parameter.any():
                    parameter.add_(0.1 * torch.randn(parameter.shape))
                else:
                    parameter.mul_(gain)
    return model.eval().requires_grad_(False)


def _vae(kind: Any, z: int, **config: Any) -> Any:
    return _seeded(
        lambda: kind(
            z_dim=z,
            num_res_blocks=1,
            latents_mean=[0.1 * i for i in range(z)],
            latents_std=[1 + 0.1 * i for i in range(z)],
            **config,
        ),
        seed=3,
    )


def _token_ids(tokenizer: Any) -> dict[str, int]:
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()}


def _qwen25_vl(tokenizer: Any) -> Any:
    text = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [1, 1, 2],
        },
        "bos_token_id": None,
        "eos_token_id": None,
    }
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 16,
        "fullatt_block_indexes": [1],
        "window_size": 56,
    }
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, **_token_ids(tokenizer)
    )
    return _seeded(lambda: transformers.Qwen2_5_VLForConditionalGeneration(config), seed=4)


def _qwen3_vl(tokenizer: Any) -> Any:
    text = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": len(tokenizer),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
        },
    }
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 16,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    config = transformers.Qwen3VLConfig(
        text_config=text, vision_config=vision, **_token_ids(tokenizer)
    )
    return _seeded(lambda: transformers.Qwen3VLForConditionalGeneration(config), seed=5)


def _qwen_transformer(**config: Any) -> Any:
    return _seeded(
        lambda: diffusers.QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 6, 6),
            **config,
        ),
        seed=6,
        gain=2.0,
    )


def _qwen_parts(**config: Any) -> dict[str, Any]:
    tokenizer = qwen_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": _qwen25_vl(tokenizer),
        "vae": _vae(
            diffusers.AutoencoderKLQwenImage,
            4,
            base_dim=8,
            dim_mult=[1, 1, 1, 1],
            temperal_downsample=[False, True, True],
        ),
        "transformer": _qwen_transformer(**config),
    }


def qwen_image(kind: str = "dynamic") -> Any:
    return diffusers.QwenImagePipeline(scheduler=scheduler(kind), **_qwen_parts())


def qwen_image_edit(kind: str = "dynamic", *, zero_cond_t: bool = True) -> Any:
    parts = _qwen_parts(zero_cond_t=zero_cond_t)
    processor = without_video(transformers.Qwen2VLProcessor)(
        image_processor=_image_processor(14),
        tokenizer=parts["tokenizer"],
        video_processor=None,
        chat_template=CHAT_TEMPLATE,
    )
    return diffusers.QwenImageEditPlusPipeline(
        scheduler=scheduler(kind), processor=processor, **parts
    )


def qwen_image_21(kind: str = "dynamic", *, sample_sigmas: list[float] | None = None) -> Any:
    tokenizer = qwen_tokenizer()
    processor = without_video(transformers.Qwen3VLProcessor)(
        image_processor=_image_processor(16),
        tokenizer=tokenizer,
        video_processor=None,
        chat_template=CHAT_TEMPLATE,
    )
    transformer = _seeded(
        lambda: diffusers.QwenImage21Transformer2DModel(
            in_channels=8,
            out_channels=8,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            context_in_dim=16,
            mlp_ratio=2,
            axes_dims_rope=(4, 6, 6),
        ),
        seed=7,
        gain=2.0,
    )
    vae = _vae(
        diffusers.AutoencoderKLQwenImage21,
        8,
        base_dim=4,
        decoder_base_dim=4,
        dim_mult=[1, 1, 1, 1, 1],
        temperal_downsample=[False, True, True, True],
    )
    return diffusers.QwenImage21Pipeline(
        scheduler=scheduler(kind),
        vae=vae,
        text_encoder=_qwen3_vl(tokenizer),
        processor=processor,
        transformer=transformer,
        sample_sigmas=sample_sigmas,
    )


def _image_vae() -> Any:
    return _seeded(
        lambda: diffusers.AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=[8, 8, 8, 8],
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=4,
            scaling_factor=0.36,
            shift_factor=0.11,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        seed=8,
    )


def z_image(kind: str = "static") -> Any:
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    config = transformers.Qwen3Config(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=len(tokenizer),
    )
    transformer = _seeded(
        lambda: diffusers.ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[4, 6, 6],
            axes_lens=[1024, 64, 64],
        ),
        seed=9,
        gain=2.0,
    )
    return diffusers.ZImagePipeline(
        scheduler=scheduler(kind),
        vae=_image_vae(),
        text_encoder=_seeded(lambda: transformers.Qwen3Model(config), seed=10),
        tokenizer=tokenizer,
        transformer=transformer,
    )


def _clip(tokenizer: Any, width: int, act: str, seed: int) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        projection_dim=width,
        hidden_act=act,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _seeded(lambda: transformers.CLIPTextModelWithProjection(config), seed=seed)


def stable_diffusion_3(kind: str = "static") -> Any:
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocab = {c: i for i, c in enumerate([*letters, *(c + "</w>" for c in letters)])}
    vocab |= {"<|startoftext|>": len(vocab), "<|endoftext|>": len(vocab) + 1}
    clip = transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    t5_tokenizer = transformers.T5Tokenizer(
        vocab=[*pieces, *((c, -3.0) for c in letters)], extra_ids=0
    )
    t5 = transformers.T5Config(
        vocab_size=len(t5_tokenizer), d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3
    )
    transformer = _seeded(
        lambda: diffusers.SD3Transformer2DModel(
            sample_size=32,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            caption_projection_dim=32,
            pooled_projection_dim=20,
            out_channels=4,
            pos_embed_max_size=32,
            qk_norm="rms_norm",
        ),
        seed=11,
        gain=2.0,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=scheduler(kind),
        vae=_image_vae(),
        text_encoder=_clip(clip, 8, "quick_gelu", 12),
        tokenizer=clip,
        text_encoder_2=_clip(clip, 12, "gelu", 13),
        tokenizer_2=clip,
        text_encoder_3=_seeded(lambda: transformers.T5EncoderModel(t5), seed=14),
        tokenizer_3=t5_tokenizer,
    )


def _flux2_vae() -> Any:
    vae = _seeded(
        lambda: diffusers.AutoencoderKLFlux2(
            block_out_channels=[8, 8, 8, 8],
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=4,
        ),
        seed=15,
    )
    vae.bn.running_mean.copy_(torch.linspace(-0.5, 0.7, 16))
    vae.bn.running_var.copy_(torch.linspace(0.3, 2.0, 16))
    return vae


def flux2_klein(kind: str = "dynamic", *, is_distilled: bool = False) -> Any:
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    config = transformers.Qwen3Config(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=28,  # the pipeline reads layers 9, 18 and 27
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=len(tokenizer),
    )
    transformer = _seeded(
        lambda: diffusers.Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=48,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ),
        seed=16,
        gain=2.0,
    )
    return diffusers.Flux2KleinPipeline(
        scheduler=scheduler(kind),
        vae=_flux2_vae(),
        text_encoder=_seeded(lambda: transformers.Qwen3ForCausalLM(config), seed=17),
        tokenizer=tokenizer,
        transformer=transformer,
        is_distilled=is_distilled,
    )


def sana(kind: str = "static") -> Any:
    tokenizer = qwen_tokenizer()
    text = transformers.Gemma2Config(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    vae = _seeded(
        lambda: diffusers.AutoencoderDC(
            latent_channels=4,
            attention_head_dim=8,
            encoder_block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            encoder_layers_per_block=(1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1),
            encoder_qkv_multiscales=((), (), (), ()),
            decoder_qkv_multiscales=((), (), (), ()),
            scaling_factor=0.41,
        ),
        seed=18,
    )
    transformer = _seeded(
        lambda: diffusers.SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=16,
            timestep_scale=0.5,
        ),
        seed=19,
        gain=2.0,
    )
    return diffusers.SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=_seeded(lambda: transformers.Gemma2Model(text), seed=20),
        vae=vae,
        transformer=transformer,
        scheduler=scheduler(kind),
    )


@dataclass(frozen=True)
class Case:
    """One way to use a pipeline, and how exactly the adapter must reproduce it."""

    make: Callable[[], Any]
    prompts: tuple[str, ...]
    sources: bool = False
    cfg_argument: str = "true_cfg_scale"
    cfg_offset: float = 0.0
    """What the pipeline's scale is more than s of uncond + s (cond - uncond)."""
    call: Mapping[str, Any] = field(default_factory=dict)
    adapter: Mapping[str, Any] = field(default_factory=dict)
    """Attributes of the adapter that stand for arguments of the pipeline's call."""
    negative: bool = True
    """Whether the call takes a negative prompt; without, the pipeline avoids the empty one."""
    tolerance: float = 0.0
    schedulers: tuple[str, ...] = tuple(SCHEDULERS)
    frames: bool = True
    """Whether the autoencoder takes a frame axis."""

    def images(self) -> list[Image.Image]:
        return sources() if self.sources else []


SHORT, LONG = "A cat", "a rather longer text about the blue objects"
EQUAL = "a rather longer text about the blue shape"  # as many tokens as LONG
RESOLUTION: dict[str, Any] = {"call": {"output_resolution": 96}, "adapter": {"resolution": 96}}
FLUX2: dict[str, Any] = {
    "cfg_argument": "guidance_scale",
    "negative": False,
    "tolerance": 3e-6,
    "frames": False,
}

CASES = {
    "qwen_image": Case(qwen_image, (SHORT, LONG)),
    "qwen_image_edit": Case(qwen_image_edit, (LONG,), sources=True),
    "qwen_image_edit_2509": Case(
        partial(qwen_image_edit, zero_cond_t=False), (LONG,), sources=True
    ),
    "qwen_image_21": Case(qwen_image_21, (LONG, EQUAL), **RESOLUTION),
    "qwen_image_21_edit": Case(qwen_image_21, (LONG, EQUAL), sources=True, **RESOLUTION),
    "z_image": Case(
        z_image,
        (SHORT, LONG),
        cfg_argument="guidance_scale",
        cfg_offset=-1.0,
        tolerance=3e-6,
        frames=False,
    ),
    "sd3": Case(
        stable_diffusion_3,
        (SHORT, LONG),
        cfg_argument="guidance_scale",
        tolerance=3e-6,
        frames=False,
    ),
    "flux2_klein": Case(flux2_klein, (SHORT, LONG), **FLUX2),
    "flux2_klein_edit": Case(flux2_klein, (SHORT, LONG), sources=True, **FLUX2),
    "sana": Case(
        sana,
        (SHORT, LONG),
        cfg_argument="guidance_scale",
        call={"use_resolution_binning": False},
        tolerance=3e-6,
        schedulers=("static",),
        frames=False,
    ),
}


@cache
def pipeline(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Built once a session; tests set its scheduler and leave the rest alone."""
    pipe = CASES[name].make()
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(dtype)


@cache
def family(name: str, dtype: torch.dtype = torch.float32) -> Any:
    adapter = adapt(pipeline(name, dtype))
    for key, value in CASES[name].adapter.items():
        setattr(adapter, key, value)
    return adapter


@cache
def condition(name: str, dtype: torch.dtype = torch.float32) -> Any:
    case = CASES[name]
    negative = " " if case.negative else ""
    return family(name, dtype).encode(case.prompts, case.images(), size=SIZE, negative=negative)


@cache
def reference(name: str, kind: str, scale: float, dtype: torch.dtype = torch.float32) -> Any:
    """What the diffusers pipeline itself makes of the case: its state after the last step."""
    seen: list[torch.Tensor] = []

    def keep(pipe: Any, step: int, t: Any, state: dict[str, Any]) -> dict[str, Any]:
        seen.append(state["latents"].clone())
        return {}

    call(name, kind, scale, dtype, output_type="latent", callback_on_step_end=keep)
    assert len(seen) == STEPS
    return seen[-1]


def call(
    name: str, kind: str, scale: float, dtype: torch.dtype = torch.float32, **extra: Any
) -> Any:
    case, pipe = CASES[name], pipeline(name, dtype)
    family(name, dtype)  # its hooks belong to playback too
    pipe.scheduler = scheduler(kind)
    arguments: dict[str, Any] = {
        "prompt": list(case.prompts),
        "height": SIZE[0],
        "width": SIZE[1],
        "num_inference_steps": STEPS,
        "generator": torch.Generator().manual_seed(0),
        case.cfg_argument: scale + case.cfg_offset,
        **case.call,
        **extra,
    }
    if scale > 1 and case.negative:
        arguments["negative_prompt"] = [" "] * len(case.prompts)
    if case.sources:
        arguments["image"] = case.images()
    return pipe(**arguments).images


def noise(name: str, dtype: torch.dtype = torch.float32) -> Any:
    generator = torch.Generator().manual_seed(0)
    return family(name, dtype).noise(len(CASES[name].prompts), SIZE, generator)


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference; infinite where a value is not finite."""
    assert a.shape == b.shape, (a.shape, b.shape)
    difference = (a.float() - b.float()).abs().max().item()
    return difference if math.isfinite(difference) else math.inf
