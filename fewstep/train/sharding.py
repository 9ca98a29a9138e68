"""Training with a cast that is split over the ranks: gradient norm, states in parts, result.

`models.sharding` splits the networks. Gradients need nothing here: the backward pass leaves each
rank its part of their mean over the ranks. A state is a folder: every rank writes its parts
(`torch.distributed.checkpoint`), the lead what is not split, with a list of the files, last.
"""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from shutil import rmtree
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, zeros

from fewstep.errors import CheckpointError, DiskError
from fewstep.models.cast import Role, Trainable
from fewstep.models.roles import FamilyRole
from fewstep.models.sharding import Shards
from fewstep.recipe.cost import splits_cast
from fewstep.recipe.schema import Recipe
from fewstep.train.checkpoint import Resumed, load_state, previous_of, save_state, sharded
from fewstep.train.ranks import Agreed, Ranks

REST = "rest.pt"
"""What is not split, and what the folder holds."""


def open_shards(recipe: Recipe, ranks: Ranks) -> Shards | None:
    """The devices over which the recipe splits its cast; None where it does not, or has one."""
    if not splits_cast(recipe, ranks.world):
        return None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Shards(init_device_mesh(device, (ranks.world,)), ranks.most)


def is_sharded(module: Trainable) -> bool:
    return isinstance(next(module.parameters()), DTensor)


def whole(tensor: Tensor) -> Tensor:
    """Gathered, by all ranks at the same time, if it is split."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def clip(module: Trainable, limit: float) -> Tensor:
    """Scale the gradients to a norm of at most `limit`. Returns the norm before, over all parts."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    norm = whole(nn.utils.get_total_norm(gradients))
    nn.utils.clip_grads_with_norm_(module.parameters(), limit, norm)
    return norm


def gathered(role: Role, *, keep: bool) -> FamilyRole:
    """The role with its weights whole, in the memory of the host, as `Ensemble.save` takes it.

    All ranks take part, tensor by tensor; one that does not `keep` them ends up with none.
    """
    assert isinstance(role, FamilyRole)
    found = {}
    for name, parameter in role.named_parameters():
        tensor = whole(parameter.detach())
        if keep:
            found[name] = nn.Parameter(tensor.cpu(), requires_grad=False)
    return FamilyRole(
        role.family, role.shared, reader=role.reader, adapter=role.adapter, trained=found
    )


# --- states ---------------------------------------------------------------------------------------

Place = tuple[str | int, ...]
"""The keys that lead to a tensor of a state."""


class Split(NamedTuple):
    """A state without the tensors that are split over the ranks, and these."""

    rest: dict[Any, Any]
    parts: dict[Place, DTensor]


def split(state: Mapping[Any, Any]) -> Split:
    parts: dict[Place, DTensor] = {}

    def walk(branch: Mapping[Any, Any], above: Place) -> dict[Any, Any]:
        rest: dict[Any, Any] = {}
        for key, value in branch.items():
            if isinstance(value, DTensor):
                parts[*above, key] = value
            else:
                rest[key] = walk(value, (*above, key)) if isinstance(value, dict) else value
        return rest

    return Split(walk(state, ()), parts)


def join(rest: dict[Any, Any], parts: Mapping[Place, Tensor]) -> dict[Any, Any]:
    """What `split` took apart; `rest` is changed."""
    for (*above, key), value in parts.items():
        branch = rest
        for step in above:
            branch = branch[step]
        branch[key] = value
    return rest


def save_parts(state: Mapping[str, Any], path: Path, ranks: Ranks) -> None:
    """Write a split state by all ranks, and keep the one that was there as the previous one.

    `path` is that of whole states, and the lead's counts. A crash leaves both as they were.
    """
    folder = sharded(ranks.collect(lambda: [path])[0])
    scratch = folder.with_name(folder.name + ".part")
    rest, parts = split(state)

    def clear() -> list[None]:
        if ranks.is_lead:
            rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
        return []

    def finish() -> list[None]:
        if ranks.is_lead:
            files = {file.name: file.stat().st_size for file in scratch.iterdir()}
            held = {"rest": rest, "places": list(parts), "files": files}
            save_state(held, scratch / REST)
            if folder.exists():
                before = sharded(previous_of(path))
                rmtree(before, ignore_errors=True)
                folder.replace(before)
            scratch.replace(folder)
        return []

    ranks.collect(clear)
    try:
        tensors = {_key(place): tensor for place, tensor in parts.items()}
        state_dict_saver.save(tensors, checkpoint_id=scratch, process_group=ranks.words)
    except CheckpointException as error:
        raise _told(error, folder) from None
    ranks.collect(finish)


def _key(place: Place) -> str:
    return "/".join(map(str, place))


def _told(error: CheckpointException, folder: Path) -> Agreed:
    """Every rank has it; what went wrong on the first of those where something did."""
    rank, (cause, _) = next(iter(error.failures.items()))
    if not isinstance(cause, OSError):
        return Agreed(f"checkpoint {folder}: rank {rank}: {cause}", CheckpointError.exit_code)
    return Agreed(
        f"checkpoint {folder}: rank {rank} could not write its part ({cause.strerror}), the one "
        "before it is untouched; make room, then go on with --resume",
        DiskError.exit_code,
    )


def load_parts(own: Mapping[str, Any], path: Path, ranks: Ranks) -> Resumed:
    """The split state at `path`, or the one before it where that is damaged or missing.

    Whatever number of ranks wrote it. Parts are read into the tensors of `own`, the state as it
    stands, where it has them.
    """
    last, previous = sharded(path), sharded(previous_of(path))
    if path.exists():
        raise CheckpointError(
            f"checkpoint {path}: was written without model.cast.shard; resume with shard: false"
        )
    try:
        return Resumed(_read(own, last, ranks), "")
    except Agreed as first:
        try:
            state = _read(own, previous, ranks)
        except Agreed as second:
            raise Agreed(
                f"{first}; {second}; there is nothing to go on from, start anew with another --out",
                CheckpointError.exit_code,
            ) from None
        return Resumed(state, f"{first}; going on from the one before it, {previous}")


def _read(own: Mapping[str, Any], folder: Path, ranks: Ranks) -> dict[str, Any]:
    held = ranks.each(lambda: _check_files(folder))
    places: list[Place] = held["places"]
    tensors = ranks.each(lambda: _room_for(places, own, folder))
    try:
        state_dict_loader.load(tensors, checkpoint_id=folder, process_group=ranks.words)
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise Agreed(f"checkpoint {folder}: damaged (rank {rank}: {cause})") from None
    return join(held["rest"], {place: tensors[_key(place)] for place in places})


def _room_for(places: Sequence[Place], own: Mapping[str, Any], folder: Path) -> dict[str, DTensor]:
    """Tensors to read into: this state's own, and new ones for moments that it does not have."""
    try:
        found = FileSystemReader(folder).read_metadata().state_dict_metadata
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"checkpoint {folder}: .metadata is damaged ({error})") from None
    there = split(own).parts
    mesh = next(iter(there.values())).device_mesh
    room = {}
    for place in places:
        about = found[_key(place)]
        assert isinstance(about, TensorStorageMetadata)
        room[_key(place)] = there.get(place)
        if place not in there:
            size, dtype = about.size, about.properties.dtype
            room[_key(place)] = zeros(size, dtype=dtype, device_mesh=mesh, placements=[Shard(0)])
    return room


def _check_files(folder: Path) -> dict[str, Any]:
    """What the lead wrote last. CheckpointError where files are missing or truncated."""
    held = load_state(folder / REST)
    for name, size in held["files"].items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            raise CheckpointError(f"checkpoint {folder}: {name} is missing or truncated")
    return held
