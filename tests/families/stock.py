"""Plays exports with stock diffusers and nothing of fewstep: the code in their cards, as printed.

`python -m tests.families.stock FOLDER...` is the fresh process of `test_export`. Beside each export
lie its base and source.png; what the scheduler was told and made is written to FOLDER/played.pt.
"""

import contextlib
import functools
import os
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch

AREA = 96 * 96  # of a source image, as in fixtures.py


def code_of(readme: str) -> str:
    """Every Python block of a card, in order."""
    blocks = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    assert blocks
    return "\n".join(blocks)


def play(folder: Path) -> dict[str, Any]:
    """Runs the card's code; one entry of `sigmas` and of `latents` for every image it makes."""
    diffusers: Any = import_module("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler
    seen: dict[str, list[Any]] = {"sigmas": [], "latents": []}
    told, stepped = scheduler.set_timesteps, scheduler.step

    @functools.wraps(told)  # pipelines look at its arguments
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        told(self, *args, **kwargs)
        seen["sigmas"].append(self.sigmas.clone())
        seen["latents"].append(None)

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = stepped(self, *args, **kwargs)
        seen["latents"][-1] = out[0].clone()
        return out

    with (
        mock.patch.object(scheduler, "set_timesteps", set_timesteps),
        mock.patch.object(scheduler, "step", step),
        tiny_sources(),
        processors_without_video(),
        contextlib.chdir(folder.parent),
    ):
        exec(code_of((folder / "README.md").read_text()), {})
    return seen


@contextlib.contextmanager
def tiny_sources() -> Iterator[None]:
    module = import_module("diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus")
    with (
        mock.patch.object(module, "CONDITION_IMAGE_SIZE", AREA),
        mock.patch.object(module, "VAE_IMAGE_SIZE", AREA),
    ):
        yield


@contextlib.contextmanager
def processors_without_video() -> Iterator[None]:
    """Their video part needs torchvision even to be read from a folder."""
    transformers: Any = import_module("transformers")

    def from_pretrained(cls: Any, path: str, **kwargs: Any) -> Any:
        def check(self: Any, name: str, argument: object) -> Any:
            return cls.check_argument_for_proper_class(self, name, argument) if argument else None

        namespace = {"check_argument_for_proper_class": check, "__module__": cls.__module__}
        return type(cls.__name__, (cls,), namespace)(
            image_processor=transformers.Qwen2VLImageProcessorPil.from_pretrained(path),
            tokenizer=transformers.Qwen2Tokenizer.from_pretrained(path),
            video_processor=None,
            chat_template=Path(path, "chat_template.jinja").read_text(),
        )

    with contextlib.ExitStack() as stack:
        for name in ("Qwen2VLProcessor", "Qwen3VLProcessor"):
            kind = getattr(transformers, name)
            stack.enter_context(
                mock.patch.object(kind, "from_pretrained", classmethod(from_pretrained))
            )
        yield


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    for argument in sys.argv[1:]:
        played = play(Path(argument))
        assert not any(name.split(".")[0] == "fewstep" for name in sys.modules)
        torch.save(played, Path(argument) / "played.pt")
