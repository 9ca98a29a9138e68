"""The networks of a recipe for real models: teachers, student and fake score, and their files."""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fewstep.errors import CheckpointError, DiskError
from fewstep.models.cast import Cast, Role
from fewstep.models.families.contract import Family
from fewstep.models.foreign import fingerprint
from fewstep.models.lab import read_header
from fewstep.models.roles import (
    STUDENT,
    FamilyRole,
    LoraSpec,
    SharedNetwork,
    full_copy,
    lora_roles,
)
from fewstep.models.sharding import Shards
from fewstep.real.domain import RealDomain
from fewstep.real.pipelines import Pipelines, Place, network_folder
from fewstep.recipe.families import BASE, EDIT
from fewstep.recipe.schema import TASKS, LoraCast, Recipe
from fewstep.samplers import shifted_grid


class RealEnsemble:
    """Teachers that name the same weights share one frozen network, with LoRA the student too.

    With `shards` the networks of a cast are split over several devices. They are built in the
    memory of the host, of full copies one at a time.
    """

    def __init__(self, recipe: Recipe, pipelines: Pipelines, shards: Shards | None = None) -> None:
        self.recipe, self.pipelines, self.shards = recipe, pipelines, shards
        self.device = pipelines.device
        self._domain: RealDomain | None = None
        self._shared: dict[str, SharedNetwork] = {}
        self._teachers: dict[str, FamilyRole] = {}
        self._identities: dict[Path, str] = {}

    def open_domain(self) -> RealDomain:
        if self._domain is None:
            self._domain = RealDomain(self.recipe, self.pipelines)
        return self._domain

    @property
    def start(self) -> Place:
        """The pipeline that the student starts from, and is played in."""
        weights = self.recipe.teachers[self.recipe.student.init].weights
        assert weights in (BASE, EDIT), "refused by the plan"
        return weights

    def shared(self, weights: str) -> SharedNetwork:
        if weights not in self._shared:
            self._shared[weights] = SharedNetwork(self.pipelines.network(weights))
        return self._shared[weights]

    def teacher(self, name: str) -> FamilyRole:
        if name not in self._teachers:
            asked = self.recipe.teachers[name]
            place: Place = EDIT if asked.weights == EDIT else BASE
            family, shared = self.pipelines.family(place), self.shared(asked.weights)
            if asked.lora:
                shared.load_lora(f"teacher-{name}", Path(asked.lora).expanduser(), family.pipe)
            adapter = f"teacher-{name}" if asked.lora else None
            self._teachers[name] = FamilyRole(family, shared, reader=name, adapter=adapter)
        return self._teachers[name]

    def cast(self, teachers: Sequence[str]) -> Cast:
        """Student and fake score, which begin as the teacher `student.init`, and the teachers."""
        frozen = {name: self.teacher(name) for name in teachers}
        family, spec = self.pipelines.family(self.start), self.recipe.model.roles
        shared = self.shared(self.start)
        if isinstance(spec, LoraCast):
            student, fake = lora_roles(family, shared, self.lora, seed=self.recipe.seed)
            self._equip(shared)
        else:
            student, fake = (self._copy(family, shared) for _ in range(2))
        for network in {id(role.shared): role.shared for role in frozen.values()}.values():
            self._split(network)
        for role in (student, fake):
            role.take_parameters()
        return Cast(student, fake, frozen)

    def _copy(self, family: Family, shared: SharedNetwork) -> FamilyRole:
        """A copy to train; if split, it has left the host's memory."""
        role = full_copy(family, shared)
        self._equip(role.shared)
        self._split(role.shared)
        return role

    def _equip(self, trained: SharedNetwork) -> None:
        if self.recipe.model.roles.checkpointing:
            trained.checkpoint_blocks()
        if self.recipe.model.roles.compile:
            trained.compile_blocks()

    def _split(self, network: SharedNetwork) -> None:
        if self.shards:
            network.shard(self.pipelines.family(self.start).trunk.blocks, self.shards)

    @cached_property
    def lora(self) -> LoraSpec:
        spec = self.recipe.model.roles
        assert isinstance(spec, LoraCast)
        alpha = float(spec.rank) if spec.alpha is None else spec.alpha
        return LoraSpec(spec.rank, alpha, spec.targets)

    def teacher_grid(self, name: str, steps: int) -> tuple[float, ...]:
        """By the recipe's shift, or as the pipeline's scheduler places the steps."""
        teacher = self.recipe.teachers[name]
        if teacher.grid == "shift":
            return shifted_grid(steps, teacher.shift)
        family = self.teacher(name).family
        *times, end = family.sigmas(steps, self.pipelines.model.size)
        assert end == 0
        return tuple(times)

    def teacher_identity(self, name: str) -> str:
        """Of its network and LoRA."""
        teacher = self.recipe.teachers[name]
        if teacher.weights in (BASE, EDIT):
            place: Place = EDIT if teacher.weights == EDIT else BASE
            folder = self.pipelines.folder(place) / "transformer"
        else:
            folder = network_folder(Path(teacher.weights).expanduser())
        if folder not in self._identities:
            self._identities[folder] = fingerprint(folder)
        if teacher.lora is None:
            return self._identities[folder]
        with Path(teacher.lora).expanduser().open("rb") as file:
            lora = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        return f"{self._identities[folder]}-{lora}"

    # --- the student as a file ---

    def save(self, student: Role, path: Path, about: dict[str, object]) -> None:
        """`student.safetensors` as docs/architecture.md describes it; whole or not at all."""
        spec, model = self.recipe.model.roles, self.recipe.model
        config: dict[str, object] = {"kind": spec.kind}
        config["pipeline"] = type(self.pipelines.family(self.start).pipe).__name__
        if isinstance(spec, LoraCast):
            targets = sorted({name.rsplit(".lora_", 1)[0] for name in student.state_dict()})
            config |= {"rank": self.lora.rank, "alpha": self.lora.alpha, "targets": targets}
        tasks = sorted(self.recipe.data.trained(), key=TASKS.index)
        about = about | {
            "base": str(self.pipelines.folder(self.start).resolve()),
            "base_stamp": self.teacher_identity(self.recipe.student.init),
            "source_resolution": model.source_resolution or 1024,
            "tasks": tasks,
            "size": list(model.size),
            "precision": self.recipe.precision,
        }
        tensors = {name: value.contiguous().cpu() for name, value in student.state_dict().items()}
        scratch = path.with_name(path.name + ".part")
        try:
            save_file(tensors, scratch, {"config": json.dumps(config), "about": json.dumps(about)})
            scratch.replace(path)
        except (SafetensorError, OSError) as error:
            scratch.unlink(missing_ok=True)
            raise DiskError(
                f"weights {path}: could not be written ({error}); is the disk full?"
            ) from None

    def student(self, weights: Path) -> FamilyRole:
        """A finished student. CheckpointError for a file of another base, rank or kind."""
        config, _ = read_header(weights)
        spec = self.recipe.model.roles
        if config.get("kind") != spec.kind:
            raise CheckpointError(
                f"weights {weights}: hold a {config.get('kind', 'lab')} student, and model.cast is "
                f"{spec.kind}; give the student of this run"
            )
        family, shared = self.pipelines.family(self.start), self.shared(self.start)
        if isinstance(spec, LoraCast):
            if not shared.parameters_of(STUDENT):
                shared.add_lora(STUDENT, self.lora, family.lora_targets, seed=0)
            own = shared.parameters_of(STUDENT)
            role = FamilyRole(family, shared, reader=STUDENT, adapter=STUDENT, trained=own)
        else:
            role = full_copy(family, shared)
        role.load_state_dict(_read(weights))
        return role


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"weights {path}: damaged ({error}); copy or train it again"
        ) from None
