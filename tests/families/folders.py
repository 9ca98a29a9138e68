"""Tiny pipelines, prompts and LoRA files on disk, as a user of `fewstep distill` has them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .fixtures import sources


def save_pipeline(pipe: Any, path: Path) -> Path:
    """With the parts of a processor, which cannot be saved as a whole without torchvision."""
    processor = pipe.components.get("processor")
    if processor is None:
        pipe.save_pretrained(path)
        return path
    pipe.register_modules(processor=None)
    pipe.save_pretrained(path)
    pipe.register_modules(processor=processor)
    processor.tokenizer.save_pretrained(path / "processor")
    processor.image_processor.save_pretrained(path / "processor")
    (path / "processor/chat_template.jinja").write_text(processor.chat_template)
    index = json.loads((path / "model_index.json").read_text())
    index["processor"] = ["transformers", type(processor).__name__]
    (path / "model_index.json").write_text(json.dumps(index))
    return path


PROMPTS = ["A cat", "a red ball", "a rather longer text about the blue objects", "the moon"]
EDITS = ["make it blue", "remove the objects in the background", "add a cat", "in winter"]


def write_prompts(path: Path, *, edits: bool = True) -> Path:
    """Two categories of prompts and one of edits, with sources of two shapes."""
    path.mkdir()
    rows = [
        {"prompt": f"{prompt} {part}", "category": category, "split": split}
        for category, part in (("scene", "outside"), ("text", "that says hello"))
        for prompt, split in zip(PROMPTS, ("train", "train", "train", "eval"), strict=True)
    ]
    _write_rows(path / "captions.jsonl", rows)
    if edits:
        for name, image in zip("ab", sources(), strict=True):
            image.save(path / f"{name}.png")
        rows = [
            {"instruction": text, "source": f"{name}.png", "category": "object", "split": split}
            for text, name, split in zip(
                EDITS, "abab", ("train", "train", "train", "eval"), strict=True
            )
        ]
        _write_rows(path / "edits.jsonl", rows)
    return path


def _write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_lora(network: torch.nn.Module, path: Path, *, rank: int = 2, gain: float = 0.3) -> Path:
    """A LoRA as diffusers saves it, on the attention's projections."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith((".to_q", ".to_v")):
            rows, columns = module.weight.shape
            down = gain * torch.randn(rank, columns, generator=generator)
            tensors[f"transformer.{name}.lora_A.weight"] = down
            up = gain * torch.randn(rows, rank, generator=generator)
            tensors[f"transformer.{name}.lora_B.weight"] = up
    save_file(tensors, path, {"format": "pt"})
    return path
