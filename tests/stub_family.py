"""A family without networks, for tests of what is kept of its conditions, and where."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fewstep.data.conditions import ConditionStore, Encoding
from fewstep.data.tensorstore import TensorStore
from fewstep.models.families.contract import FamilyCondition, Text


@dataclass(frozen=True)
class Picture:
    name: str
    image: Image.Image

    @property
    def digest(self) -> str:
        return blake2b(self.image.tobytes(), digest_size=16).hexdigest()

    def open(self) -> Image.Image:
        return self.image


@dataclass(frozen=True)
class Ask:
    prompt: str
    sources: tuple[Picture, ...] = ()
    target: Picture | None = None


class Counting:
    """A family whose text is made of the prompt's letters: as many tokens as letters."""

    def __init__(self, width: int = 8, dtype: torch.dtype = torch.float32) -> None:
        self.pipe = type("QwenImagePipeline", (), {})()
        self.width, self.dtype = width, dtype
        self.encoded: list[str] = []
        self.negatives = 0
        self.images = 0

    def text(self, prompt: str, images: Sequence[Any]) -> Text:
        codes = torch.tensor([*prompt.encode()], dtype=self.dtype) + 1000 * len(images)
        return Text((codes[:, None] * torch.arange(1, self.width + 1))[None].to(self.dtype))

    def encode(
        self,
        prompts: Sequence[str],
        images: Sequence[Any] = (),
        *,
        size: tuple[int, int],
        negative: str | None = " ",
    ) -> FamilyCondition:
        (prompt,) = prompts
        self.encoded.append(prompt)
        self.negatives += negative is not None
        source = [torch.full((3, 2), float(image.width)) for image in images]
        return FamilyCondition(
            text=self.text(prompt, images),
            negative=None if negative is None else self.text(negative, images),
            size=size,
            source=torch.cat(source)[None] if source else None,
            source_sizes=tuple((3, 1) for _ in images),
        )

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """The mean colour of each image, and its height and width."""
        self.images += len(pixels)
        height, width = pixels.shape[2:]
        size = pixels.new_tensor([height, width]).expand(len(pixels), 2)
        return torch.cat([pixels.mean((2, 3)), size], dim=1).to(self.dtype)


ENCODING = Encoding("QwenImagePipeline", "weights-1", "code-1", (64, 96), "float32", " ")
PROMPTS = [Ask(f"prompt number {i}" + "!" * i) for i in range(12)]


def store_in(folder: Path, encoding: Encoding = ENCODING) -> ConditionStore:
    return ConditionStore(TensorStore(folder), encoding)


def fill(folder: Path, asked: Sequence[Ask], encoding: Encoding = ENCODING, **more: Any) -> Any:
    """The prompts that had to be encoded, by a store that is opened anew."""
    family = Counting()
    store_in(folder, encoding).fill(asked, lambda: family, **more)
    return family.encoded
