"""What every family of real models offers, and the condition that its pipeline's encoders make.

What differs between families (t scale and rounding, sign, packing, order of the sources, rule of
guidance) lives in the families and is not a parameter here.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fewstep.errors import DataError, RecipeError

Size = tuple[int, int]
"""(height, width): of an image in pixels, of latents in tokens."""

Images = Sequence[Any]
"""PIL images, in the order in which the prompt counts them; they may differ in size."""

Grid = tuple[float, ...]
"""n + 1 values t_0 = 1 > ... > t_{n-1} > 0 and the final 0, each exactly a float32 of playback."""


@dataclass(frozen=True)
class Prefix:
    """Keys and values of the tokens that see neither x_t nor t, for each layer of one model."""

    layers: tuple[tuple[Float[Tensor, "b p h d"], Float[Tensor, "b p h d"]], ...]
    model: object
    """Whose keys and values these are; another model's answer from them would be wrong."""

    def __getitem__(self, index: slice | Tensor) -> "Prefix":
        return replace(self, layers=tuple((k[index], v[index]) for k, v in self.layers))


@dataclass(frozen=True)
class Text:
    """What a text encoder made of a prompt (and of the images that it read with it)."""

    states: Float[Tensor, "b l d"]
    mask: Bool[Tensor, "b l"] | None = None
    """True where a token is real; None where all are, as pipelines tell it to the network."""
    pooled: Float[Tensor, "b e"] | None = None
    slots: Bool[Tensor, "b l"] | None = None
    """True where latents of a source take the token's place. Text that has slots (even none of
    them true) shares its positions with the images, so that padding would move them."""
    prefix: Prefix | None = None

    def __getitem__(self, index: slice | Tensor) -> "Text":
        return Text(
            states=self.states[index],
            mask=None if self.mask is None else self.mask[index],
            pooled=None if self.pooled is None else self.pooled[index],
            slots=None if self.slots is None else self.slots[index],
            prefix=None if self.prefix is None else self.prefix[index],
        )

    def to(self, device: torch.device) -> "Text":
        """On another device; a prefix stays behind, for its model does."""
        return Text(
            states=self.states.to(device),
            mask=None if self.mask is None else self.mask.to(device),
            pooled=None if self.pooled is None else self.pooled.to(device),
            slots=None if self.slots is None else self.slots.to(device),
        )

    @property
    def layout(self) -> Hashable:
        return self.states.shape[1] if self.slots is not None else None


@dataclass(frozen=True)
class FamilyCondition:
    """Prompts, and for editing the sources, ready for the network; tensors, so it can be cached.

    All samples have one target size and sources of the same sizes, because the networks take one
    layout for a batch.
    """

    text: Text
    negative: Text | None
    """What guidance moves away from; None where the condition was made without it."""
    size: Size
    """Of the target, in pixels."""
    source: Float[Tensor, "b n c"] | None = None
    """Tokens of all sources of a sample, one after the other."""
    source_sizes: tuple[Size, ...] = ()
    """Of each source, in tokens."""

    @property
    def device(self) -> torch.device:
        return self.text.states.device

    def __len__(self) -> int:
        return len(self.text.states)

    def __getitem__(self, index: slice | Tensor) -> "FamilyCondition":
        return replace(
            self,
            text=self.text[index],
            negative=None if self.negative is None else self.negative[index],
            source=None if self.source is None else self.source[index],
        )

    def without_text(self) -> "FamilyCondition":
        """The unconditional branch of guidance: the negative prompt, with the same sources."""
        if self.negative is None:
            raise RecipeError(
                "guidance needs a negative prompt, and this condition was encoded without one",
                hint='encode with negative=" ", or use a guidance scale of 1',
            )
        return replace(self, text=self.negative, negative=None)

    def to(self, device: torch.device) -> "FamilyCondition":
        return replace(
            self,
            text=self.text.to(device),
            negative=None if self.negative is None else self.negative.to(device),
            source=None if self.source is None else self.source.to(device),
        )

    @property
    def layout(self) -> Hashable:
        """Conditions with equal layouts can share a batch; use it as the key of a bucket."""
        negative = None if self.negative is None else (self.negative.layout,)
        return self.size, self.source_sizes, self.text.layout, negative


@dataclass(frozen=True)
class Trunk:
    """Where the blocks of a family's network are, for what looks at it half-way."""

    blocks: tuple[str, ...]
    """Names of its lists of blocks, in the order in which they play."""
    last: str
    """Name of the layer after them, whose first argument is what they made."""
    target: Callable[[Float[Tensor, "b l w"], Float[Tensor, "b *s"]], Float[Tensor, "b n w"]]
    """(what they made, x_t) -> the tokens of the target, without those of text and sources."""


@runtime_checkable
class Family(Protocol):
    """One pipeline's components as a denoiser D(x_t, t, cond) -> x_0, plus what playback needs.

    `model` takes the place of the pipeline's own network (another role, a sharded or compiled one).
    """

    @property
    def pipe(self) -> Any: ...

    @property
    def lora_targets(self) -> str:
        """A pattern of the full names of the linear layers that a LoRA changes by default: those
        of attention and MLP in every block, without the modulation."""
        ...

    @property
    def trunk(self) -> Trunk: ...

    @property
    def tasks(self) -> tuple[str, ...]:
        """Of "t2i" and "edit", those that the pipeline can do."""
        ...

    def encode(
        self,
        prompts: Sequence[str],
        images: Images = (),
        *,
        size: Size,
        negative: str | None = " ",
    ) -> FamilyCondition:
        """One condition for each prompt; `images` are sources that all of them share."""
        ...

    def encode_image(self, pixels: Float[Tensor, "b c h w"], /) -> Float[Tensor, "b *s"]:
        """Pixels in [-1, 1] to x_0, with the mean of the posterior."""
        ...

    def decode(self, latents: Float[Tensor, "b *s"], size: Size, /) -> Float[Tensor, "b c h w"]:
        """x_0 to pixels, nominally in [-1, 1], as many channels as the pipeline gives."""
        ...

    def noise_shape(self, batch: int, size: Size, /) -> tuple[int, ...]: ...

    def noise(self, batch: int, size: Size, generator: torch.Generator, /) -> Float[Tensor, "b *s"]:
        """The noise that the pipeline draws from this generator."""
        ...

    def sigmas(self, n: int, size: Size, /, custom: Sequence[float] | None = None) -> Grid:
        """The pipeline's own times; `custom` is what its `sigmas=` takes, before any shift."""
        ...

    def velocity(
        self,
        x_t: Float[Tensor, "b *s"],
        t: Float[Tensor, " b"],
        cond: FamilyCondition,
        /,
        model: Any = None,
    ) -> Float[Tensor, "b *s"]:
        """v = eps - x_0 in the network's precision, from t in [0, 1] with 1 = noise."""
        ...

    def cfg(self, cond_v: Tensor, uncond_v: Tensor, scale: float, /) -> Tensor:
        """The pipeline's rule of guidance, which is part of what the teacher says."""
        ...

    def __call__(
        self, x_t: Tensor, t: Tensor, cond: FamilyCondition, /, model: Any = None
    ) -> Tensor: ...


def stack(conditions: Sequence[FamilyCondition]) -> FamilyCondition:
    """One batch of conditions of equal layout; shorter prompts are padded where that is exact."""
    first = conditions[0]
    for other in conditions[1:]:
        if other.layout != first.layout:
            raise DataError(
                f"conditions of different layout cannot share a batch: {_describe(first)} and "
                f"{_describe(other)}; make batches of equal `layout`"
            )
    sources = [c.source for c in conditions if c.source is not None]
    negatives = [c.negative for c in conditions if c.negative is not None]
    return FamilyCondition(
        text=stack_texts([c.text for c in conditions]),
        negative=stack_texts(negatives) if negatives else None,
        size=first.size,
        source=torch.cat(sources) if sources else None,
        source_sizes=first.source_sizes,
    )


def stack_texts(texts: Sequence[Text]) -> Text:
    """Padded on the right to the longest, and masked."""
    longest = max(t.states.shape[1] for t in texts)
    mask = torch.cat([_pad(_full_mask(t), longest) for t in texts])
    pooled = [t.pooled for t in texts if t.pooled is not None]
    slots = [t.slots for t in texts if t.slots is not None]
    return Text(
        states=torch.cat([_pad(t.states, longest) for t in texts]),
        mask=None if mask.all() else mask,
        pooled=torch.cat(pooled) if pooled else None,
        slots=torch.cat(slots) if slots else None,
    )


def _full_mask(text: Text) -> Bool[Tensor, "b l"]:
    if text.mask is not None:
        return text.mask
    return torch.ones(text.states.shape[:2], dtype=torch.bool, device=text.states.device)


def _pad(values: Tensor, length: int) -> Tensor:
    missing = length - values.shape[1]
    return torch.cat([values, values.new_zeros(len(values), missing, *values.shape[2:])], dim=1)


def _describe(cond: FamilyCondition) -> str:
    sources = ", ".join(f"{h}x{w}" for h, w in cond.source_sizes) or "none"
    height, width = cond.size
    guided = "without" if cond.negative is None else "with"
    return (
        f"(target {height}x{width}, sources {sources}, {cond.text.states.shape[1]} tokens, "
        f"{guided} negative prompt)"
    )


def check_size(size: Size, multiple: int) -> None:
    """Pipelines round a size down with a warning; here it is an error."""
    for name, value in zip(("height", "width"), size):
        if value < multiple or value % multiple:
            lower = max(value // multiple, 1) * multiple
            raise RecipeError(
                f"{name} is {value}, which is no multiple of {multiple}",
                hint=f"use {lower} or {lower + multiple}",
            )


def check_task(tasks: Sequence[str], images: Images, pipeline: str) -> None:
    """Refuse sources where the pipeline takes none, and their absence where it needs them."""
    task = "edit" if len(images) else "t2i"
    if task in tasks:
        return
    if task == "edit":
        raise RecipeError(
            f"{pipeline} makes images from text only, and {len(images)} source images were given",
            hint="for editing use Qwen-Image-Edit-Plus or Qwen-Image 2.1",
        )
    raise RecipeError(
        f"{pipeline} edits, and no source image was given",
        hint="for text-to-image use the text-to-image pipeline of the same family",
    )
