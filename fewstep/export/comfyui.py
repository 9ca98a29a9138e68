"""A LoRA under the names of ComfyUI: those of the network's original checkpoint.

ComfyUI reads `diffusion_model.<module>.lora_{A,B}.weight` for every network that it runs itself,
where <module> is the original name (comfy/lora.py, "generic lora format"). Originals fuse what
diffusers splits: the update of a fused matrix is that of its parts, one below the other.

For some networks ComfyUI also has a table of diffusers' names under `transformer.`; `unread` says
which modules it lacks. Facts from Comfy-Org/ComfyUI, comfy/lora.py at ec93dcac and comfy/utils.py
at 09708eae. ComfyUI itself has not been run here; the tests convert merged checkpoints with
diffusers' own converters, which know the original layouts from elsewhere.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewstep.errors import RecipeError
from fewstep.export.lora import Factors, Lora

PREFIX = "diffusion_model."


class Place(NamedTuple):
    """Where a module of diffusers lies in the original."""

    module: str
    part: int = 0
    parts: int = 1
    """Of a fused matrix, counted from its first rows; all parts have equally many rows."""
    swapped: bool = False
    """The original has (shift, scale) where diffusers has (scale, shift)."""


Rule = tuple[str, Place]
"""A pattern of diffusers' name, and the place, in which \\1 is what the pattern's group matched."""


def _fused(pattern: str, names: Iterable[str], module: str) -> list[Rule]:
    parts = list(names)
    return [(rf"{pattern}\.{n}", Place(module, i, len(parts))) for i, n in enumerate(parts)]


def _renamed(pattern: str, module: str, names: Mapping[str, str]) -> list[Rule]:
    return [(rf"{pattern}\.{re.escape(a)}", Place(rf"{module}.{b}")) for a, b in names.items()]


QKV, ADDED_QKV = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
SAME: Rule = (r"(.+)", Place(r"\1"))
BLOCK, SINGLE = r"transformer_blocks\.(\d+)", r"single_transformer_blocks\.(\d+)"

SD3 = [
    *_fused(rf"{BLOCK}\.attn", QKV, r"joint_blocks.\1.x_block.attn.qkv"),
    *_fused(rf"{BLOCK}\.attn", ADDED_QKV, r"joint_blocks.\1.context_block.attn.qkv"),
    *_fused(rf"{BLOCK}\.attn2", QKV, r"joint_blocks.\1.x_block.attn2.qkv"),
    *_renamed(
        BLOCK,
        r"joint_blocks.\1",
        {
            "attn.to_out.0": "x_block.attn.proj",
            "attn2.to_out.0": "x_block.attn2.proj",
            "attn.to_add_out": "context_block.attn.proj",
            "norm1.linear": "x_block.adaLN_modulation.1",
            "norm1_context.linear": "context_block.adaLN_modulation.1",
            "ff.net.0.proj": "x_block.mlp.fc1",
            "ff.net.2": "x_block.mlp.fc2",
            "ff_context.net.0.proj": "context_block.mlp.fc1",
            "ff_context.net.2": "context_block.mlp.fc2",
        },
    ),
    ("context_embedder", Place("context_embedder")),
    (r"time_text_embed\.timestep_embedder\.linear_1", Place("t_embedder.mlp.0")),
    (r"time_text_embed\.timestep_embedder\.linear_2", Place("t_embedder.mlp.2")),
    (r"time_text_embed\.text_embedder\.linear_1", Place("y_embedder.mlp.0")),
    (r"time_text_embed\.text_embedder\.linear_2", Place("y_embedder.mlp.2")),
    (r"norm_out\.linear", Place("final_layer.adaLN_modulation.1", swapped=True)),
    ("proj_out", Place("final_layer.linear")),
]

FLUX2 = [
    *_fused(rf"{BLOCK}\.attn", QKV, r"double_blocks.\1.img_attn.qkv"),
    *_fused(rf"{BLOCK}\.attn", ADDED_QKV, r"double_blocks.\1.txt_attn.qkv"),
    *_renamed(
        BLOCK,
        r"double_blocks.\1",
        {
            "attn.to_out.0": "img_attn.proj",
            "attn.to_add_out": "txt_attn.proj",
            "ff.linear_in": "img_mlp.0",
            "ff.linear_out": "img_mlp.2",
            "ff_context.linear_in": "txt_mlp.0",
            "ff_context.linear_out": "txt_mlp.2",
        },
    ),
    (rf"{SINGLE}\.attn\.to_qkv_mlp_proj", Place(r"single_blocks.\1.linear1")),
    (rf"{SINGLE}\.attn\.to_out", Place(r"single_blocks.\1.linear2")),
    ("x_embedder", Place("img_in")),
    ("context_embedder", Place("txt_in")),
    (r"time_guidance_embed\.timestep_embedder\.linear_1", Place("time_in.in_layer")),
    (r"time_guidance_embed\.timestep_embedder\.linear_2", Place("time_in.out_layer")),
    (r"(double_stream_modulation_(?:img|txt)|single_stream_modulation)\.linear", Place(r"\1.lin")),
    (r"norm_out\.linear", Place("final_layer.adaLN_modulation.1", swapped=True)),
    ("proj_out", Place("final_layer.linear")),
]

Z_IMAGE = [
    *_fused(r"(.+)\.attention", QKV, r"\1.attention.qkv"),
    (r"(.+)\.attention\.to_out\.0", Place(r"\1.attention.out")),
    (r"all_x_embedder\.2-1", Place("x_embedder")),
    (r"all_final_layer\.2-1\.(linear|adaLN_modulation\.1)", Place(r"final_layer.\1")),
    (r"(.+\.(?:feed_forward\.w[123]|adaLN_modulation\.0))", Place(r"\1")),
    (r"(cap_embedder\.1|t_embedder\.mlp\.[02])", Place(r"\1")),
]

QWEN_IMAGE_21 = [
    *_fused(r"(.+)\.img_mlp", ("gate_layer", "proj"), r"\1.img_mlp.gate_up"),
    SAME,
]

RULES: Mapping[str, list[Rule]] = {
    "QwenImagePipeline": [SAME],
    "QwenImageEditPlusPipeline": [SAME],
    "QwenImage21Pipeline": QWEN_IMAGE_21,
    "Flux2KleinPipeline": FLUX2,
    "StableDiffusion3Pipeline": SD3,
    "ZImagePipeline": Z_IMAGE,
}

UNREAD: Mapping[str, str] = {
    "Flux2KleinPipeline": r"time_guidance_embed\..*|(double|single)_stream_modulation.*",
}
"""What ComfyUI's tables of diffusers' names leave out, of what the rules above place."""


def check_supported(pipeline: str) -> None:
    """RecipeError for a network that ComfyUI does not run itself."""
    if pipeline not in RULES:
        raise RecipeError(
            f"ComfyUI does not run the network of {pipeline} itself",
            field="--to",
            hint="use --to lora or --to diffusers, and play it in diffusers; --to comfyui is for "
            + ", ".join(RULES),
        )


def unread(pipeline: str, modules: Iterable[str]) -> list[str]:
    """Modules that ComfyUI would skip in a file with diffusers' names, with only a log line."""
    check_supported(pipeline)
    pattern = UNREAD.get(pipeline)
    return [] if pattern is None else [m for m in modules if re.fullmatch(pattern, m)]


def place_of(pipeline: str, module: str, config: Mapping[str, Any]) -> Place:
    """Where the module lies in the original; `config` is that of the base's transformer."""
    check_supported(pipeline)
    for pattern, place in RULES[pipeline]:
        if found := re.fullmatch(pattern, module):
            return _last_context(
                pipeline, place._replace(module=found.expand(place.module)), config
            )
    raise RecipeError(
        f"the LoRA changes {module}, whose name in ComfyUI is not known for {pipeline}",
        field="--to",
        hint="use --to lora, or leave this module out of the LoRA's targets",
    )


def _last_context(pipeline: str, place: Place, config: Mapping[str, Any]) -> Place:
    """The last block of SD3 only reads the text, with a norm that has (scale, shift) alone."""
    if pipeline != "StableDiffusion3Pipeline":
        return place
    last = f"joint_blocks.{config['num_layers'] - 1}.context_block.adaLN_modulation.1"
    return place._replace(swapped=place.swapped or place.module == last)


def rename(pipeline: str, lora: Lora, config: Mapping[str, Any]) -> dict[str, Factors]:
    """The same update, by module of the original checkpoint.

    The parts of a fused matrix keep their own ranks: down is stacked, up is block diagonal, and
    rows of parts that the LoRA leaves alone are zero.
    """
    groups: dict[str, list[tuple[Place, Factors]]] = {}
    for module, factors in lora.items():
        place = place_of(pipeline, module, config)
        groups.setdefault(place.module, []).append((place, factors))
    return {module: _stack(members) for module, members in groups.items()}


def _stack(members: list[tuple[Place, Factors]]) -> Factors:
    rows = members[0][1].up.shape[0]
    assert all(factors.up.shape[0] == rows for _, factors in members), "parts of unequal size"
    downs, columns = [], []
    for place, (down, up) in members:
        up = _swap_halves(up) if place.swapped else up
        column = up.new_zeros(place.parts * rows, up.shape[1])
        column[place.part * rows : (place.part + 1) * rows] = up
        downs.append(down)
        columns.append(column)
    return Factors(torch.cat(downs), torch.cat(columns, dim=1))


def _swap_halves(rows: Tensor) -> Tensor:
    return torch.cat(rows.chunk(2)[::-1])
