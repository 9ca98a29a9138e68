"""A LoRA under ComfyUI's names changes the original checkpoint as it changes diffusers' network.

diffusers' single-file converters, which nothing of ours has written, turn the original layout back
into its own: first the bare weights, so that names, order and halves are proved right, then the
merged ones.
"""

import re
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.errors import RecipeError
from fewstep.export.comfyui import PREFIX, check_supported, place_of, rename, unread
from fewstep.export.lora import DOWN, UP, delta, fold, modules_of

from .fixtures import CASES, apart, diffusers
from .test_export import ALPHA, random_lora

convert: Any = import_module("diffusers.loaders.single_file_utils")

CONVERTERS = {
    "qwen_image": lambda checkpoint: checkpoint,  # the original is diffusers' own layout
    "qwen_image_21": convert.convert_qwen_image21_transformer_checkpoint_to_diffusers,
    "flux2_klein": convert.convert_flux2_transformer_checkpoint_to_diffusers,
    "sd3": convert.convert_sd3_transformer_checkpoint_to_diffusers,
    "z_image": convert.convert_z_image_transformer_checkpoint_to_diffusers,
}
SD3_TEXT, SD3_IMAGE = r"joint_blocks.\1.context_block.attn", r"joint_blocks.\1.x_block.attn"
FLUX2_TEXT, FLUX2_IMAGE = r"double_blocks.\1.txt_attn.norm", r"double_blocks.\1.img_attn.norm"
# What is no linear layer and so no business of a LoRA, but part of a checkpoint.
OTHERS: dict[str, list[tuple[str, str]]] = {
    "sd3": [
        (r"pos_embed\.pos_embed", "pos_embed"),
        (r"pos_embed\.proj\.(.*)", r"x_embedder.proj.\1"),
        (
            r"transformer_blocks\.(\d+)\.attn\.norm_added_([qk])\.weight",
            SD3_TEXT + r".ln_\2.weight",
        ),
        (r"transformer_blocks\.(\d+)\.attn\.norm_([qk])\.weight", SD3_IMAGE + r".ln_\2.weight"),
        (r"transformer_blocks\.(\d+)\.attn2\.norm_([qk])\.weight", SD3_IMAGE + r"2.ln_\2.weight"),
    ],
    "flux2_klein": [
        (
            r"transformer_blocks\.(\d+)\.attn\.norm_added_q\.weight",
            FLUX2_TEXT + ".query_norm.scale",
        ),
        (r"transformer_blocks\.(\d+)\.attn\.norm_added_k\.weight", FLUX2_TEXT + ".key_norm.scale"),
        (r"transformer_blocks\.(\d+)\.attn\.norm_q\.weight", FLUX2_IMAGE + ".query_norm.scale"),
        (r"transformer_blocks\.(\d+)\.attn\.norm_k\.weight", FLUX2_IMAGE + ".key_norm.scale"),
        (r"single_(.+)\.attn\.norm_q\.weight", r"single_\1.norm.query_norm.scale"),
        (r"single_(.+)\.attn\.norm_k\.weight", r"single_\1.norm.key_norm.scale"),
        (r"single_transformer_blocks(.*)", r"single_blocks\1"),
    ],
    "z_image": [(r"(.+)\.attention\.norm_([qk])\.weight", r"\1.attention.\2_norm.weight")],
}


def original_of(name: str, network: Any, pipeline: str) -> dict[str, Tensor]:
    """The network's weights in the layout of its original checkpoint."""
    state, original = dict(network.state_dict()), {}
    fused: dict[str, dict[int, Tensor]] = {}
    linear = {n for n, m in network.named_modules() if isinstance(m, torch.nn.Linear)}
    for key, value in state.items():
        module, _, kind = key.rpartition(".")
        if module in linear:
            place = place_of(pipeline, module, network.config)
            value = torch.cat(value.chunk(2)[::-1]) if place.swapped else value
            fused.setdefault(f"{place.module}.{kind}", {})[place.part] = value
        else:
            for pattern, replacement in OTHERS.get(name, []):
                key = re.sub(f"^{pattern}$", replacement, key)
            original[key] = value
    for key, parts in fused.items():
        original[key] = torch.cat([parts[i] for i in range(len(parts))])
    return original


def merged_as_comfyui_does(original: Mapping[str, Tensor], lora: Mapping[str, Tensor]) -> Any:
    """W + B A for every module under the generic prefix; each must be a weight of the original."""
    out = dict(original)
    for module in modules_of(lora):
        key = f"{module.removeprefix(PREFIX)}.weight"
        out[key] = out[key] + lora[module + UP] @ lora[module + DOWN]
    return out


def dual_attention() -> Any:
    """SD3.5 medium's first layers attend to the image twice."""
    tiny = dict(CASES["sd3"].make().transformer.config)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return diffusers.SD3Transformer2DModel.from_config({**tiny, "dual_attention_layers": (0,)})


@pytest.mark.parametrize("name", [*CONVERTERS, "sd3_dual"])
def test_the_update_of_the_original_is_that_of_diffusers(name) -> None:
    dual, name = name == "sd3_dual", name.removesuffix("_dual")
    pipe = CASES[name].make()
    pipeline = type(pipe).__name__
    network = dual_attention() if dual else pipe.transformer
    lora = fold(random_lora(network), alpha=ALPHA, where="test")
    original = original_of(name, network, pipeline)

    def convertible(checkpoint: Mapping[str, Tensor]) -> dict[str, Tensor]:
        copy = {key: value.clone() for key, value in checkpoint.items()}
        return CONVERTERS[name](copy)

    state = network.state_dict()
    back = convertible(original)
    assert back.keys() == state.keys()
    assert all(apart(back[key], state[key]) == 0 for key in state)

    renamed = rename(pipeline, lora, network.config)
    tensors = {PREFIX + m + DOWN: f.down for m, f in renamed.items()}
    tensors |= {PREFIX + m + UP: f.up for m, f in renamed.items()}
    back = convertible(merged_as_comfyui_does(original, tensors))
    for key, value in state.items():
        module = key.removesuffix(".weight")
        if module in lora and key.endswith(".weight"):
            value = value + delta(lora[module])
            assert apart(value, state[key]) > 1e-2
        assert apart(back[key], value) <= 1e-6, key


def test_parts_that_the_lora_leaves_alone_stay_as_they_are() -> None:
    """to_k alone is the second third of qkv, whatever else the LoRA changes."""
    pipe = CASES["z_image"].make()
    module = "layers.1.attention.to_k"
    tensors = {k: v for k, v in random_lora(pipe.transformer).items() if k.startswith(module)}
    lora = fold(tensors, alpha=ALPHA, where="test")
    (renamed,) = rename("ZImagePipeline", lora, pipe.transformer.config).values()
    first, second, third = delta(renamed).chunk(3)
    assert apart(second, delta(lora[module])) == 0
    assert not first.any() and not third.any()


def test_modules_that_comfyuis_table_lacks_are_known() -> None:
    modules = ["transformer_blocks.0.attn.to_q", "double_stream_modulation_img.linear"]
    assert unread("Flux2KleinPipeline", modules) == modules[1:]
    assert unread("QwenImagePipeline", modules) == []


def test_what_comfyui_does_not_run_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"SanaPipeline.*--to lora.*QwenImagePipeline"):
        check_supported("SanaPipeline")


def test_an_unknown_module_is_refused_by_name() -> None:
    with pytest.raises(RecipeError, match=r"context_refiner\.0\.new_layer.*ZImagePipeline"):
        place_of("ZImagePipeline", "context_refiner.0.new_layer", {})
