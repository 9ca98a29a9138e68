"""Small groups of tensors on disk, found by a key: safetensors shards, mapped and not loaded.

A shard appears whole or not at all, and its header is the index, so there is no second file that
could disagree with it. What a key stands for is the business of the caller (`conditions.py`).
"""

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fewstep.data.pixels import write_atomically
from fewstep.errors import DataError

STORE_VERSION = 1
SHARD_BYTES = 256 * 2**20
"""A shard is written when it would grow beyond this; a killed run loses at most so much."""


@dataclass(frozen=True)
class Entry:
    """Tensors by name, and what else is to be remembered of them, as JSON."""

    tensors: Mapping[str, Tensor]
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


class Stored(NamedTuple):
    """Where an entry lies, and what the header of its shard says of it."""

    shard: Path
    names: tuple[str, ...]
    nbytes: int
    digest: str
    info: dict[str, Any]


class TensorStore:
    """Entries by key in `folder`/shard-*.safetensors; several processes may add at once."""

    def __init__(self, folder: Path | str) -> None:
        """Reads the headers. Shards that are truncated or no such files count as absent, and are
        listed in `damaged`."""
        self.folder = Path(folder)
        self.index: dict[str, Stored] = {}
        self.damaged: list[Path] = []
        self._open: dict[Path, Any] = {}
        self._found = sorted(self.folder.glob("shard-*.safetensors"))
        for shard in self._found:
            found = _read_header(shard)
            if found is None:
                self.damaged.append(shard)
            else:
                self.index |= found

    def __contains__(self, key: str) -> bool:
        return key in self.index

    def __len__(self) -> int:
        return len(self.index)

    def read(self, key: str) -> Entry:
        """The tensors are views of the mapped file: copy what is to be kept or changed."""
        stored = self.index[key]
        if stored.shard not in self._open:
            try:
                self._open[stored.shard] = safe_open(stored.shard, "pt")
            except (OSError, SafetensorError) as error:
                raise DataError(
                    f"{stored.shard} can no longer be read ({error}); encode again"
                ) from None
        shard = self._open[stored.shard]
        return Entry({n: shard.get_tensor(f"{key}/{n}") for n in stored.names}, stored.info)

    @contextmanager
    def writing(self, shard_bytes: int = SHARD_BYTES) -> Iterator["Writer"]:
        """Adds entries. What was put is kept also when the block ends with an error or Ctrl-C."""
        writer = Writer(self, shard_bytes)
        try:
            yield writer
        finally:
            writer.flush()

    def verify(self) -> list[Path]:
        """Read every tensor, and set aside the shards whose content is not what was written."""
        bad = {s.shard for key, s in self.index.items() if _digest(self.read(key)) != s.digest}
        self._forget(bad)
        self.damaged += sorted(bad)
        return sorted(bad)

    def remove_damaged(self) -> list[Path]:
        """Delete what `damaged` lists; its entries are absent already."""
        removed, self.damaged = self.damaged, []
        for shard in removed:
            shard.unlink(missing_ok=True)
        return removed

    def unused(self, keep: Collection[str]) -> dict[str, Stored]:
        return {key: stored for key, stored in self.index.items() if key not in keep}

    def prune(self, keep: Collection[str], shard_bytes: int = SHARD_BYTES) -> int:
        """Delete every other entry; the number of bytes set free.

        Shards that hold both kinds are written anew before the old ones go. Those that another
        process has added since this store was opened stay.
        """
        unused = self.unused(keep)
        old = {stored.shard for stored in unused.values()}
        rescued = [k for k, stored in self.index.items() if stored.shard in old and k not in unused]
        with self.writing(shard_bytes) as writer:
            for key in rescued:
                writer.put(key, self.read(key))
        self._forget(old)
        used = {stored.shard for stored in self.index.values()}
        for shard in (old | set(self._found)) - used:
            shard.unlink(missing_ok=True)
        self.damaged = []
        return sum(stored.nbytes for stored in unused.values())

    def _forget(self, shards: Collection[Path]) -> None:
        self.index = {key: s for key, s in self.index.items() if s.shard not in shards}
        for shard in shards:
            self._open.pop(shard, None)


class Writer:
    """Gathers entries into shards."""

    def __init__(self, store: TensorStore, shard_bytes: int) -> None:
        self._store, self._limit = store, shard_bytes
        self._waiting: dict[str, Entry] = {}
        self._bytes = 0

    def __contains__(self, key: str) -> bool:
        return key in self._waiting or key in self._store

    def put(self, key: str, entry: Entry) -> None:
        if self._waiting and self._bytes + entry.nbytes > self._limit:
            self.flush()
        self._waiting[key] = entry
        self._bytes += entry.nbytes

    def flush(self) -> None:
        """Write what waits as one shard. DiskError when the disk is full; it then still waits."""
        if not self._waiting:
            return
        tensors, about = {}, {}
        for key, entry in self._waiting.items():
            about[key] = {"digest": _digest(entry), "info": entry.info}
            for name, tensor in entry.tensors.items():
                # A clone: safetensors refuses tensors that share memory with each other.
                tensors[f"{key}/{name}"] = tensor.detach().cpu().clone().contiguous()
        name = blake2b("\n".join(about).encode(), digest_size=12).hexdigest()
        shard = self._store.folder / f"shard-{name}.safetensors"
        metadata = {"store": str(STORE_VERSION), "entries": json.dumps(about)}
        write_atomically(shard, save(tensors, metadata))
        self._store._open.pop(shard, None)
        found = _read_header(shard)
        assert found is not None, shard
        self._store.index |= found
        self._waiting, self._bytes = {}, 0


def _read_header(shard: Path) -> dict[str, Stored] | None:
    """What a shard holds; None where it is truncated, damaged or of another version."""
    size = shard.stat().st_size
    with shard.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            return None
        try:
            header = json.loads(file.read(length))
            about = header.pop("__metadata__")
            if about["store"] != str(STORE_VERSION):
                return None
            ends = [entry["data_offsets"][1] for entry in header.values()]
            if size != 8 + length + max(ends, default=0):
                return None
            names: dict[str, list[str]] = {}
            nbytes: dict[str, int] = {}
            for tensor, entry in header.items():
                key, _, name = tensor.partition("/")
                begin, end = entry["data_offsets"]
                names.setdefault(key, []).append(name)
                nbytes[key] = nbytes.get(key, 0) + end - begin
            return {
                key: Stored(shard, tuple(names[key]), nbytes[key], one["digest"], one["info"])
                for key, one in json.loads(about["entries"]).items()
            }
        except (ValueError, KeyError, TypeError, AttributeError):
            return None


def _digest(entry: Entry) -> str:
    digest = blake2b(digest_size=8)
    for name in sorted(entry.tensors):
        tensor = entry.tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        # bfloat16 has no numpy twin, its bytes have.
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
