"""A folder of real images as a domain: its records, a foreign autoencoder, a reference judge.

There is no oracle for real images. The judge here compares with the held-out real image itself and
says so in its name; a VLM judge can take its place later.
"""

import importlib.util
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from fewstep.core.types import Task
from fewstep.data.folder import CaptionRecord, EditRecord, ImageFolder
from fewstep.data.latents import cache_latents, cache_text, to_float, to_uint8
from fewstep.data.pools import Pool, pad_tokens
from fewstep.data.reference import ReferenceJudge
from fewstep.domain import Case, Images, Verdict
from fewstep.errors import DataError
from fewstep.models.lab import LabCondition
from fewstep.models.text import TextEncoder
from fewstep.models.vaes import ChannelStats, Codec, DiffusersCodec, PixelCodec, StandardisedCodec
from fewstep.recipe.schema import FolderSource

HASHED_WORDS: Final = 4096
"""Buckets of the learned vocabulary where no text encoder is given."""
MAX_TEXT: Final = 32


class FolderDomain:
    def __init__(
        self, folder: ImageFolder, codec: Codec, text: TextEncoder | None, cache: Path
    ) -> None:
        self.folder, self.text, self.cache = folder, text, cache
        raw = cache_latents(codec, folder, cache_dir=cache)
        everything = raw.take(np.arange(len(folder.files)))
        used = {r.image for r in folder.captions if r.split == "train"}
        used |= {
            i for r in folder.edits if r.split == "train" for i in (r.source_image, r.target_image)
        }
        if not used:
            raise DataError(
                f"{folder.path}: no row of the training split; mark rows with split: train"
            )
        self.codec = StandardisedCodec(codec, ChannelStats.measure(everything[sorted(used)]))
        self.latents = self.codec.standardise(everything).half()
        self.reference = ReferenceJudge(folder.pixels(np.arange(len(folder.files))))

    @classmethod
    def open(cls, source: FolderSource) -> "FolderDomain":
        """Check the folder, open the encoders and encode every image once (cached)."""
        cache = Path(source.cache)
        folder = ImageFolder.open(source.path, source.image_size, cache_dir=cache)
        codec = DiffusersCodec.open(source.autoencoder) if source.autoencoder else PixelCodec()
        text = (
            TextEncoder.open(model_folder(source.text_encoder), max_tokens=MAX_TEXT)
            if source.text_encoder
            else None
        )
        return cls(folder, codec, text, cache)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return self.codec.latent_shape(self.folder.image_size)

    @property
    def image_size(self) -> int:
        return self.folder.image_size

    @property
    def judge_name(self) -> str:
        return self.reference.name

    def text_sizes(self) -> dict[str, int]:
        if self.text is None:
            return {"vocabulary": HASHED_WORDS + 1, "max_text": MAX_TEXT}
        return {"text_width": self.text.width, "max_text": MAX_TEXT}

    def records(
        self, task: Task, split: str, category: str
    ) -> list[CaptionRecord] | list[EditRecord]:
        """All records of a condition, in the folder's order."""
        rows = self.folder.rows(task, "train" if split == "train" else "eval", category)
        if not len(rows):
            known = self.folder.categories(task, "train" if split == "train" else "eval")
            listed = ", ".join(f"{name} ({n})" for name, n in known.items()) or "none"
            raise DataError(
                f"{self.folder.path}: no {split} rows of {task}/{category}; there are {listed}"
            )
        if task == "t2i":
            return [self.folder.captions[i] for i in rows]
        return [self.folder.edits[i] for i in rows]

    def pool(self, category: str, size: int, seed: int, *, task: Task, targets: bool) -> Pool:
        """`size` training records in a seeded order; for teachers as many as there are."""
        records = self.records(task, "train", category)
        if size > len(records) and not targets:
            raise DataError(
                f"data.pools: {size} records of {task}/{category} asked for, the folder has "
                f"{len(records)}; use size: {len(records)} or less"
            )
        order = np.random.default_rng(
            [seed, zlib.crc32(f"{task}/{category}".encode())]
        ).permutation(len(records))
        chosen = [records[i] for i in order[:size]]
        prompts = tuple(_prompt(r) for r in chosen)
        text, lengths = self._encode(prompts)
        source = self.latents[[r.source_image for r in chosen if isinstance(r, EditRecord)]]
        target = self.latents[[_goal(r) for r in chosen]]
        return Pool(
            task,
            category,
            prompts,
            text,
            lengths,
            source if task == "edit" else None,
            target if targets else None,
        )

    def _encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        if self.text is None:
            return pad_tokens([hashed_words(prompt) for prompt in prompts])
        rows = cache_text(self.text, prompts, cache_dir=self.cache).take(prompts)
        return rows.text, rows.lengths

    @torch.inference_mode()
    def condition(
        self, prompts: Sequence[str], sources: Sequence[np.ndarray] | None
    ) -> LabCondition:
        """Encoded anew: what is drawn now and then is not worth a file in the cache."""
        if self.text is None:
            text, lengths = self._encode(prompts)
            mask = torch.arange(text.shape[1]) < lengths[:, None]
        else:
            text, mask = self.text.encode(prompts)
        source = None if sources is None else self.codec.encode(to_float(np.stack(sources))).float()
        return LabCondition(text, mask, source)

    def noise(self, seed: int) -> Tensor:
        return torch.randn(self.sample_shape, generator=torch.Generator().manual_seed(seed))

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Images:
        return np.concatenate(
            [to_uint8(self.codec.decode(part.float().cpu())) for part in latents.split(16)]
        )

    def cases(
        self, task: Task, category: str, count: int, seed: int, *, evaluation: bool = True
    ) -> list[Case]:
        """Up to `count` held-out records, spread over the split; fewer where it is smaller."""
        records = self.records(task, "eval" if evaluation else "train", category)
        key = [seed, zlib.crc32(f"{task}/{category}".encode())]
        order = np.random.default_rng(key).permutation(len(records))[:count]
        found = []
        for i, at in enumerate(sorted(order.tolist())):
            record = records[at]
            goal = self.folder.pixels([_goal(record)])[0]
            source = (
                self.folder.pixels([record.source_image])[0]
                if isinstance(record, EditRecord)
                else None
            )
            found.append(
                Case(
                    f"{task}-{category}-{i:04d}",
                    task,
                    category,
                    _prompt(record),
                    seed + i,
                    _goal(record),
                    source,
                    goal if task == "edit" else None,
                )
            )
        return found

    def judge(self, images: Images, cases: Sequence[Case]) -> list[Verdict]:
        return self.reference.judge(images, cases)


def model_folder(path: str) -> Path:
    """A path as it is, or `package:NAME/FOLDER`: a folder inside an installed Python package."""
    if not path.startswith("package:"):
        return Path(path).expanduser()
    name, _, inner = path.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise DataError(
            f"source.text_encoder {path}: package {name!r} is not installed; pip install it or "
            "give a path"
        )
    return Path(spec.origin).parent / inner


def hashed_words(prompt: str) -> list[int]:
    """Token ids 1 .. HASHED_WORDS of the words; equal words, equal ids."""
    words = prompt.lower().split()[:MAX_TEXT]
    return [1 + zlib.crc32(word.encode()) % HASHED_WORDS for word in words] or [1]


def _prompt(record: CaptionRecord | EditRecord) -> str:
    return record.instruction if isinstance(record, EditRecord) else record.caption


def _goal(record: CaptionRecord | EditRecord) -> int:
    return record.target_image if isinstance(record, EditRecord) else record.image
