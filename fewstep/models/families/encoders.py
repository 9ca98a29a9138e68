"""What decides how a family encodes a prompt, and the family without the weights of its network.

Encoding needs the text encoders and the autoencoder; the network that they serve, which is larger
than both, stays on the disk.
"""

import ast
import importlib
import json
from collections.abc import Callable
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fewstep.models.families.contract import Family
from fewstep.models.families.open import FAMILIES, open_family, read_index, read_kind
from fewstep.models.foreign import loading

NOT_ENCODERS = ("transformer", "scheduler")
PACKAGES = ("diffusers", "transformers", "tokenizers", "pillow")
"""Whose code turns prompts and images into tensors; torch only rounds them differently."""

Remember = Callable[[Path, str, Callable[[], Any]], Any]
"""(file, question, how to find out) -> the answer; `data.memo.Memo.get` is one."""


def weights_identity(folder: Path, remember: Remember) -> str:
    """A hash of all files of the encoders: configurations, tokenizers and weights.

    Hashing reads gigabytes, once: `remember` keeps the hash of a file while it is unchanged.
    """
    digest = blake2b(digest_size=16)
    index = read_index(folder)
    names = sorted(name for name in index if name not in NOT_ENCODERS)
    for name in names:
        entry = index[name]
        digest.update(json.dumps([name, entry]).encode())
        if not isinstance(entry, list) or not (folder / name).is_dir():
            continue
        files = sorted(p for p in (folder / name).rglob("*") if p.is_file())
        for file in files:
            inner = file.relative_to(folder / name)
            if any(part.startswith(".") for part in inner.parts):
                continue  # what download tools leave behind
            content = remember(file, "content", lambda file=file: _hash_file(file))
            digest.update(f"{inner}\0{content}\0".encode())
    return digest.hexdigest()


def code_identity(kind: str) -> str:
    """A hash of the adapter's code, without comments, and of the packages that it calls."""
    found = [f"{package} {_version(package)}" for package in PACKAGES]
    pending, seen = [FAMILIES[kind].__module__], set[str]()
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        tree = ast.parse(Path(str(importlib.import_module(name).__file__)).read_text())
        found.append(f"{name} {_code(tree)}")
        pending += [
            node.module
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            and node.module is not None
            and node.module.startswith("fewstep.models.families.")
        ]
    return blake2b("\n".join(sorted(found)).encode(), digest_size=16).hexdigest()


def open_encoders(
    folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Family:
    """`open_family` for `encode`, `encode_image` and `decode` alone: its network is hollow."""
    library, name = read_index(folder)["transformer"]
    with loading(folder / "transformer", what="model"):
        network = getattr(importlib.import_module(library), name)
        with torch.device("meta"):
            hollow = network.from_config(network.load_config(folder / "transformer"))
    for module in list(hollow.modules()):
        for held in (module._parameters, module._buffers, module._modules):
            held.clear()
    # Pipelines ask the network for its device and precision, which it takes from a parameter.
    hollow.register_parameter("hollow", torch.nn.Parameter(torch.zeros((), dtype=dtype)))
    return open_family(folder, device=device, dtype=dtype, components={"transformer": hollow})


class PartSizes(NamedTuple):
    """About what the parts of a condition take in memory and on disk, in bytes."""

    token: int
    """The states of a text token."""
    length: int | None
    """Text tokens of every prompt; None where it depends on the prompt."""
    source_tokens: int
    """Text tokens that a source adds."""
    source: int
    """The latents of a source."""

    def text(self, prompt: str, sources: int) -> int:
        """A token is taken for every four bytes of the prompt, and a few for the template."""
        length = len(prompt.encode()) // 4 + TEMPLATE_TOKENS
        length = length if self.length is None else self.length
        return self.token * (length + sources * self.source_tokens)


TEMPLATE_TOKENS = 6
TEXT_LENGTHS = {"Flux2KleinPipeline": 512, "StableDiffusion3Pipeline": 77 + 256}
"""Families whose text has one length, whatever the prompt."""
TEXT_PER_SOURCE = {"QwenImageEditPlusPipeline": 384**2 // 28**2, "QwenImage21Pipeline": 1024}
"""Families whose language model sees the sources: at 384 x 384 pixels, and at 1024 x 1024."""
TOKENS_PER_SOURCE = 1024**2 // 16**2
"""All families bring sources to about a megapixel; FLUX.2 leaves smaller ones as they are."""
WIDTHS = ("joint_attention_dim", "context_in_dim", "cap_feat_dim", "caption_channels")
"""What the networks call the width of the text that they take."""


def part_sizes(folder: Path, dtype: torch.dtype) -> PartSizes:
    """From the configuration of the network alone."""
    kind = read_kind(folder)
    config = json.loads((folder / "transformer" / "config.json").read_bytes())
    width = next(config[name] for name in WIDTHS if name in config)
    return PartSizes(
        token=width * dtype.itemsize,
        length=TEXT_LENGTHS.get(kind),
        source_tokens=TEXT_PER_SOURCE.get(kind, 0),
        source=TOKENS_PER_SOURCE * config["in_channels"] * dtype.itemsize,
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _code(tree: ast.Module) -> str:
    """The source without comments, docstrings and layout."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            node.body = [n for n in node.body if not _is_text(n)] or [ast.Pass()]
    return ast.unparse(tree)


def _is_text(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _hash_file(file: Path) -> str:
    digest = blake2b(digest_size=16)
    with open(file, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
