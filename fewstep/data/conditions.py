"""Conditions of a family of real models, encoded once and kept: prompts, instructions, sources.

A condition is stored in parts that are shared where they are equal: the text of a prompt, the
negative branch, the latents of the sources; beside it lie the latents of a real image, where an
objective learns from one. The key of a part is a hash of all that it depends on, so it is either
right or not found. The files are the business of `tensorstore.py`.
"""

import gc
import json
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from fewstep.data.memo import Memo
from fewstep.data.targets import target_pixels
from fewstep.data.tensorstore import SHARD_BYTES, Entry, Stored, TensorStore
from fewstep.errors import DataError
from fewstep.models.families.contract import FamilyCondition, Images, Size, Text, stack
from fewstep.models.families.encoders import (
    TOKENS_PER_SOURCE,
    PartSizes,
    code_identity,
    weights_identity,
)
from fewstep.models.families.open import read_kind

ENCODING_VERSION = 1
"""Of the code in this module; raise it when the parts of a condition change."""

SHOWN = 80
"""Letters of a prompt in messages and in lists of unused entries."""

LATENT_SIDE = {"StableDiffusion3Pipeline": 8, "ZImagePipeline": 8, "SanaPipeline": 32}
"""Pixels along a side of one latent, in families whose latents are not patched to tokens of 16."""

Progress = Callable[[int, int], None]
"""Called with (prompts done, in all)."""


@runtime_checkable
class Source(Protocol):
    """A source image; `promptfiles.SourceImage` is one."""

    @property
    def digest(self) -> str:
        """A hash of the file's bytes."""
        ...

    @property
    def name(self) -> str: ...

    def open(self) -> Image.Image:
        """Upright, RGB."""
        ...


@runtime_checkable
class Sample(Protocol):
    """What one condition is made of; `promptfiles.PromptRecord` is one."""

    @property
    def prompt(self) -> str:
        """Or the instruction of an edit."""
        ...

    @property
    def sources(self) -> Sequence[Source]: ...

    @property
    def target(self) -> Source | None:
        """The real image, where it is wanted."""
        ...


@runtime_checkable
class Encoder(Protocol):
    """The part of `Family` that is used here."""

    @property
    def pipe(self) -> Any: ...

    def encode(
        self, prompts: Sequence[str], images: Images = (), *, size: Size, negative: str | None = " "
    ) -> FamilyCondition: ...

    def encode_image(self, pixels: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Encoding:
    """All that decides a condition besides its prompt and its sources."""

    family: str
    """Name of the pipeline class."""
    weights: str
    """Hash of the encoders' files."""
    code: str
    """Hash of the code that encodes."""
    size: Size
    """Of the target, in pixels."""
    dtype: str
    negative: str | None
    """The negative prompt; None for conditions without one."""

    @classmethod
    def of(
        cls, folder: Path, *, size: Size, dtype: torch.dtype, negative: str | None, memo: Memo
    ) -> "Encoding":
        """Of the pipeline in `folder`, from its files alone: nothing is loaded."""
        kind = read_kind(folder)
        weights = weights_identity(folder, memo.get)
        memo.save()
        return cls(
            family=kind,
            weights=weights,
            code=code_identity(kind),
            size=size,
            dtype=str(dtype).removeprefix("torch."),
            negative=negative,
        )


class Filled(NamedTuple):
    """What `fill` did: samples that went through the encoders, all others, bytes added."""

    encoded: int
    reused: int
    nbytes: int


class ConditionStore:
    """Conditions of one encoding, found by prompt and sources.

    Several encodings (teachers of different families, other sizes) may share one `TensorStore`.

        store = ConditionStore(TensorStore(cache / "conditions"), encoding)
        store.fill(samples, lambda: open_encoders(folder, device="cuda", dtype=torch.bfloat16))
        cond = store.take([samples[i] for i in indices])
    """

    def __init__(self, tensors: TensorStore, encoding: Encoding) -> None:
        self.tensors, self.encoding = tensors, encoding

    def keys(self, sample: Sample) -> tuple[str, ...]:
        """Of all parts of the sample's condition."""
        return tuple(key for key in self._parts(sample) if key is not None)

    def missing(self, samples: Sequence[Sample]) -> list[Sample]:
        """Those that lack a part; of equal samples the first."""
        distinct: dict[tuple[str, ...], Sample] = {}
        for sample in samples:
            distinct.setdefault(self.keys(sample), sample)
        return [
            sample
            for keys, sample in distinct.items()
            if any(key not in self.tensors for key in keys)
        ]

    def fill(
        self,
        samples: Sequence[Sample],
        open_encoders: Callable[[], Encoder],
        *,
        progress: Progress | None = None,
        shard_bytes: int = SHARD_BYTES,
    ) -> Filled:
        """Encode what is missing; the family is opened only if something is, and let go after.

        Prompts are encoded one at a time, so that a condition depends on nothing but its own
        prompt. What was encoded before an interruption or an error is kept.
        """
        self.tensors.remove_damaged()
        missing = self.missing(samples)
        if not missing:
            return Filled(0, len(samples), 0)
        family = open_encoders()
        assert type(family.pipe).__name__ == self.encoding.family
        encoded, nbytes = 0, 0
        with self.tensors.writing(shard_bytes) as writer:
            for done, sample in enumerate(missing, start=1):
                absent = {key for key in self.keys(sample) if key not in writer}
                encoded += bool(absent)
                for key, entry in self._encode(family, sample, absent):
                    _refuse_broken(entry, sample)
                    writer.put(key, entry)
                    nbytes += entry.nbytes
                if progress is not None:
                    progress(done, len(missing))
        del family
        release_memory()
        return Filled(encoded, len(samples) - encoded, nbytes)

    def estimate(self, samples: Sequence[Sample], sizes: PartSizes) -> dict[str, int]:
        """By key of the parts that `fill` would add, about how many bytes they take."""
        added: dict[str, int] = {}
        for sample in samples:
            parts, n = self._parts(sample), len(sample.sources)
            added[parts.text] = sizes.text(sample.prompt, n)
            if parts.negative is not None:
                added[parts.negative] = sizes.text(self.encoding.negative or "", n)
            if parts.source is not None:
                added[parts.source] = n * sizes.source
            if parts.target is not None:
                added[parts.target] = self._target_bytes(sizes)
        return {key: nbytes for key, nbytes in added.items() if key not in self.tensors}

    def _target_bytes(self, sizes: PartSizes) -> int:
        """A source has a megapixel in patches of 16 x 16 pixels, and a target the recipe's size."""
        height, width = self.encoding.size
        side = LATENT_SIDE.get(self.encoding.family, 16)
        return sizes.source * height * width // side**2 // TOKENS_PER_SOURCE

    def take(self, samples: Sequence[Sample]) -> FamilyCondition:
        """One batch, as `stack` makes it of the family's own conditions; a copy in memory.

        DataError for a sample that was not encoded, or for samples of different `layout`.
        """
        return stack([self._read(sample) for sample in samples])

    def targets(self, samples: Sequence[Sample]) -> Float[Tensor, "b *s"]:
        """x_0 of their real images in float32; all have one."""
        rows = []
        for sample in samples:
            key = self._parts(sample).target
            assert key is not None, sample.prompt
            rows.append(self._entry(sample, key).tensors["target"].float())
        return torch.stack(rows)

    def layout(self, sample: Sample) -> Hashable:
        """`FamilyCondition.layout` of the sample, from the index: samples with equal layouts can
        share a batch."""
        parts = self._parts(sample)
        text, negative = (self._text_layout(sample, key) for key in (parts.text, parts.negative))
        sizes = _sizes(self._stored(sample, parts.source).info) if parts.source else ()
        return self.encoding.size, sizes, text, None if parts.negative is None else (negative,)

    def _parts(self, sample: Sample) -> "_Parts":
        sources = tuple(source.digest for source in sample.sources)
        negative = self.encoding.negative
        return _Parts(
            text=self._key("text", sample.prompt, sources),
            negative=None if negative is None else self._key("negative", negative, sources),
            source=self._key("source", None, sources) if sources else None,
            target=self._key("target", None, (sample.target.digest,)) if sample.target else None,
        )

    def _key(self, kind: str, prompt: str | None, sources: tuple[str, ...]) -> str:
        encoding = {k: v for k, v in asdict(self.encoding).items() if k != "negative"}
        content = [ENCODING_VERSION, kind, prompt, sources, encoding]
        return blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()

    def _encode(
        self, family: Encoder, sample: Sample, absent: set[str]
    ) -> Iterator[tuple[str, Entry]]:
        """The parts in `absent`; the negative prompt is only encoded where it is among them."""
        if not absent:  # an earlier sample had the same negative branch, and no more was missing
            return
        parts, negative = self._parts(sample), self.encoding.negative
        if parts.target in absent:
            assert parts.target is not None and sample.target is not None
            x_0 = family.encode_image(target_pixels(sample.target.open(), self.encoding.size))[0]
            info = {"about": f"target {sample.target.name}"}
            yield parts.target, Entry({"target": x_0.to(_dtype(self.encoding))}, info)
        if absent <= {parts.target}:
            return
        cond = family.encode(
            [sample.prompt],
            [source.open() for source in sample.sources],
            size=self.encoding.size,
            negative=negative if parts.negative in absent else None,
        )
        dtype = str(cond.text.states.dtype).removeprefix("torch.")
        assert dtype == self.encoding.dtype, (dtype, self.encoding.dtype)
        about = sample.prompt[:SHOWN]
        if parts.text in absent:
            yield parts.text, _pack(cond.text, about)
        if parts.negative in absent:
            assert parts.negative is not None and cond.negative is not None
            yield parts.negative, _pack(cond.negative, f"negative {negative!r}")
        if parts.source in absent:
            assert parts.source is not None and cond.source is not None
            names = ", ".join(source.name for source in sample.sources)
            info = {"about": f"source {names}", "sizes": cond.source_sizes}
            yield parts.source, Entry({"source": cond.source[0]}, info)

    def _read(self, sample: Sample) -> FamilyCondition:
        parts = self._parts(sample)
        text = self._entry(sample, parts.text)
        negative = None if parts.negative is None else self._entry(sample, parts.negative)
        source = None if parts.source is None else self._entry(sample, parts.source)
        return FamilyCondition(
            text=_unpack(text),
            negative=None if negative is None else _unpack(negative),
            size=self.encoding.size,
            source=None if source is None else source.tensors["source"][None],
            source_sizes=() if source is None else _sizes(source.info),
        )

    def _text_layout(self, sample: Sample, key: str | None) -> Hashable:
        if key is None:
            return None
        stored = self._stored(sample, key)
        return stored.info["length"] if "slots" in stored.names else None

    def _stored(self, sample: Sample, key: str) -> Stored:
        if key not in self.tensors:
            raise DataError(
                f"{sample.prompt[:SHOWN]!r} is not in the condition cache {self.tensors.folder}; "
                f"encode it with `fewstep cache`"
            )
        return self.tensors.index[key]

    def _entry(self, sample: Sample, key: str) -> Entry:
        self._stored(sample, key)
        return self.tensors.read(key)


class _Parts(NamedTuple):
    text: str
    negative: str | None
    source: str | None
    target: str | None


def _pack(text: Text, about: str) -> Entry:
    """The text of one prompt without its padding, which comes back as zeros.

    Where an encoder fills the padding with something else, the mask keeps the network from it.
    """
    assert len(text.states) == 1 and text.prefix is None
    length = text.states.shape[1]
    real = length
    if text.mask is not None:
        real = int(text.mask.sum())
        assert text.mask[0, :real].all(), "text is padded on the right"
    tensors = {"states": text.states[0, :real], "pooled": text.pooled, "slots": text.slots}
    held = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return Entry(held, {"about": about, "length": length})


def _unpack(entry: Entry) -> Text:
    states, length = entry.tensors["states"], entry.info["length"]
    mask = None
    if len(states) < length:
        mask = (torch.arange(length) < len(states))[None]
        states = torch.cat([states, states.new_zeros(length - len(states), states.shape[1])])
    return Text(states[None], mask, entry.tensors.get("pooled"), entry.tensors.get("slots"))


def _dtype(encoding: Encoding) -> torch.dtype:
    return getattr(torch, encoding.dtype)


def _sizes(info: Mapping[str, Any]) -> tuple[Size, ...]:
    return tuple((height, width) for height, width in info["sizes"])


def _refuse_broken(entry: Entry, sample: Sample) -> None:
    if not all(tensor.isfinite().all() for tensor in entry.tensors.values()):
        raise DataError(
            f"the encoders give values that are not finite for {sample.prompt[:SHOWN]!r}; "
            f"encode in float32 or bfloat16, or remove it"
        )


def release_memory() -> None:
    """After the last reference to a network is gone."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
