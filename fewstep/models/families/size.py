"""What a network costs in memory and arithmetic, told by running it on the meta device.

The class of the real model is built from its configuration without a byte of weights; forward and
backward passes run with the same adapters and the same checkpointing as in training, and a ledger
keeps account of every tensor that is alive. What kernels need inside is not seen.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.flop_counter import flop_registry

from fewstep.models.families.contract import Family, FamilyCondition, Size, Text
from fewstep.models.families.encoders import TEXT_LENGTHS, TEXT_PER_SOURCE, WIDTHS
from fewstep.models.families.open import FAMILIES

META = torch.device("meta")
TEXT_TOKENS = 256
"""Assumed of a prompt, in families that do not fix its length."""
FIXED_TEXT = TEXT_LENGTHS | {"SanaPipeline": 300}


class Ledger(TorchDispatchMode):
    """Counts FLOPs (2 for a multiplication with an addition) and the bytes of living tensors.

    Tensors that were there before are not counted. On the meta device, values that decide shapes
    (masks, positions) may be real and lie on the CPU; they go along wherever they meet the network.
    """

    def __init__(self, device: torch.device = META) -> None:
        super().__init__()
        self.device = device
        self.flop = 0
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        if self.device == META and {t.device.type for t in given if t.ndim} == {"meta", "cpu"}:
            follow = _selected if func.overloadpacket in INDEXING else _followed
            args, kwargs = tree_map(follow, (args, kwargs))
        for value in given:  # whatever was not made under this ledger's eyes was there before
            self._enter(value, size=0)
        out = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flop += count(*args, **kwargs, out_val=out)
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self._enter(value)
        return out

    def _enter(self, value: Tensor, size: int | None = None) -> None:
        if value.device.type != self.device.type:
            return
        storage = value.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes() if size is None else size
            self.live += self._sizes[key]
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._leave, key)

    def _leave(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def _followed(value: Any) -> Any:
    """A real tensor as a meta tensor."""
    if not isinstance(value, Tensor) or value.device.type != "cpu" or not value.ndim:
        return value
    return value.to(META)


INDEXING = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)


def _selected(value: Any) -> Any:
    """As `_followed`, with a mask as the places it selects: the meta device cannot count them."""
    if isinstance(value, Tensor) and value.dtype == torch.bool and value.device.type == "cpu":
        value = value.nonzero().squeeze(1) if value.ndim == 1 else value
    return _followed(value)


class _Fused(torch.autograd.Function):
    """Attention as fused kernels do it: the scores are never kept, and computed again backwards.

    Five products of the size of the scores backwards (arXiv 2205.14135, section 3.1), two forwards.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ledger: Ledger) -> Tensor:
        ctx.ledger, ctx.product = ledger, _product(q, k)
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        ledger.flop += 2 * ctx.product
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, _, _ = ctx.saved_tensors
        ctx.ledger.flop += 5 * ctx.product
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


def _product(q: Tensor, k: Tensor) -> int:
    batch, heads, length, width = q.shape
    return 2 * batch * heads * length * k.shape[2] * width


@contextmanager
def fused_attention(ledger: Ledger) -> Iterator[None]:
    """Without it the meta device would keep whole matrices of scores."""
    own = functional.scaled_dot_product_attention

    def fused(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return _Fused.apply(query, key, value, ledger)  # type: ignore[return-value]

    functional.scaled_dot_product_attention = fused  # type: ignore[assignment]
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = own


class Pass(NamedTuple):
    """One use of a network by one batch: FLOPs, and bytes beyond weights, inputs and gradients."""

    flop: int
    peak: int
    kept: int
    """From the forward pass to the backward pass."""
    forward_flop: int


Answer = Callable[[], Tensor]
"""One evaluation of the network."""


def forward_pass(answer: Answer, device: torch.device = META) -> Pass:
    """Without gradient."""
    with Ledger(device) as ledger, fused_attention(ledger), torch.no_grad():
        out = answer()
        kept = ledger.live
        del out
    return Pass(ledger.flop, ledger.peak, kept, ledger.flop)


def training_pass(
    answer: Answer, trained: Iterable[nn.Parameter], device: torch.device = META
) -> Pass:
    """Forwards and backwards."""
    trained = list(trained)
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    with Ledger(device) as ledger, fused_attention(ledger):
        out = answer()
        forward, kept = ledger.flop, ledger.live
        torch.autograd.backward(out, torch.empty_like(out))
        del out
    for parameter in trained:
        parameter.grad = None
    return Pass(ledger.flop, ledger.peak, kept, forward)


def at_full_depth(network: Any, measure: Callable[[], Pass]) -> Pass:
    """What `measure` would give for the whole network.

    A stack of equal blocks is run with 2 and with 3 of them, because each further one adds the
    same; a network of unequal blocks is run as it is. The first run fills caches of positions.
    """
    blocks: Any = getattr(network, "transformer_blocks", ())
    others = hasattr(network, "single_transformer_blocks")
    if others or len(blocks) < 4 or len({_shape_of(block) for block in blocks}) > 1:
        measure()
        return measure()
    found = []
    try:
        for depth in (1, 2, 3):
            network.transformer_blocks = blocks[:depth]
            found.append(measure())
    finally:
        network.transformer_blocks = blocks
    _, two, three = found
    more = len(blocks) - 2
    return Pass(*(a + more * (b - a) for a, b in zip(two, three, strict=True)))


def _shape_of(block: nn.Module) -> tuple[Any, ...]:
    return type(block), *((name, p.shape) for name, p in block.named_parameters())


def hollow_family(
    kind: str, network: Any, vae: Any, *, source_resolution: int | None = None
) -> Family:
    """The adapter of a pipeline of class `kind` that has a network, an autoencoder and no more."""
    diffusers: Any = import_module("diffusers")
    own: Any = getattr(diffusers, kind)
    pipe: Any = type(kind, (), {"__call__": own.__call__})()
    pipe.transformer, pipe.vae, pipe.text_encoder = network, vae, None
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe.config = SimpleNamespace(sample_sigmas=None, is_distilled=False)
    pipe.vae_scale_factor = 32  # asked by SANA alone
    family = FAMILIES[kind](pipe)
    if source_resolution is not None and kind == "QwenImage21Pipeline":
        family.resolution = source_resolution  # type: ignore[attr-defined]
    return family


def build(kind: str, config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """A network or autoencoder of diffusers on the meta device."""
    import diffusers

    with META:
        made = getattr(diffusers, kind).from_config(dict(config))
    # .to() would warn of modules that from_pretrained keeps in float32; these classes have none.
    for parameter in made.parameters():
        parameter.data = parameter.data.to(dtype)
    return made.eval().requires_grad_(False)


def example(
    family: Family,
    batch: int,
    size: Size,
    dtype: torch.dtype,
    *,
    task: str,
    text_tokens: int = TEXT_TOKENS,
    source: int = 1024,
    device: torch.device = META,
) -> tuple[Tensor, Tensor, FamilyCondition]:
    """x_t, t and a condition as training has them; for editing one source of source x source
    pixels."""
    kind, network = type(family.pipe).__name__, family.pipe.transformer
    config, edit = network.config, task == "edit"
    width = next(config[name] for name in WIDTHS if name in config)
    length = FIXED_TEXT.get(kind, text_tokens)
    seen = TEXT_PER_SOURCE.get(kind, 0) * source**2 // 1024**2 if edit else 0
    slots = None
    if kind == "QwenImage21Pipeline":
        slots = torch.zeros(batch, length + seen, dtype=torch.bool)
        slots[:, :seen] = True
        slots = slots if device == META else slots.to(device)
    shape = family.noise_shape(batch, size)
    side = source // 16
    text = Text(
        torch.empty(batch, length + seen, width, dtype=dtype, device=device),
        pooled=torch.empty(batch, config["pooled_projection_dim"], dtype=dtype, device=device)
        if "pooled_projection_dim" in config
        else None,
        slots=slots,
    )
    cond = FamilyCondition(
        text,
        None,
        size,
        source=torch.empty(batch, side**2, shape[2], dtype=dtype, device=device) if edit else None,
        source_sizes=((side, side),) if edit else (),
    )
    x = torch.empty(shape, device=device)
    return x, torch.full((batch,), 0.5, device=device), cond


def joint_tokens(family: Family, cond: FamilyCondition, size: Size) -> int:
    """Length of the sequence that the network attends over: text, sources and target."""
    shape = family.noise_shape(1, size)
    patch = getattr(family.pipe.transformer.config, "patch_size", 2) if len(shape) == 4 else 1
    image = shape[1] if len(shape) == 3 else shape[2] * shape[3] // patch**2
    text = cond.text.states.shape[1]
    if cond.text.slots is not None:
        text -= int(cond.text.slots[0].sum())
    return image + text + (0 if cond.source is None else cond.source.shape[1])
