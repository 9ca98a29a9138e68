"""Student, fake score and teachers as LoRA adapters on one frozen network, or as copies of it.

peft's own switches (`set_adapter`, `disable_adapters`) change `requires_grad` on the way, and a
backward pass that comes after a switch then loses its gradients without a word; and a network with
gradient checkpointing recomputes under whatever adapter is active during the backward pass. Here a
role is switched by the layers' flag alone, and what is recomputed is recomputed in its role.
"""

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fewstep.core.process import x0_from_v
from fewstep.errors import CheckpointError, DataError, RecipeError, did_you_mean
from fewstep.models.families.contract import Family, FamilyCondition
from fewstep.models.families.features import feature_width, features
from fewstep.models.families.playback import guided_velocity
from fewstep.models.readings import Answer, Readings, answer_all
from fewstep.models.sharding import Shards, gather_for_backward, shard


@dataclass(frozen=True)
class LoraSpec:
    """W + alpha / rank B A on the linear layers whose names end in one of `targets`."""

    rank: int
    alpha: float
    targets: Sequence[str] | None = None
    """None: all that the family names."""


class SharedNetwork:
    """A transformer of diffusers on which several roles play; its own weights are frozen."""

    def __init__(self, network: Any) -> None:
        self.network = network.eval().requires_grad_(False)
        self.matrices = {
            name: module
            for name, module in network.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d)
        }
        self._layers: list[Any] = []
        self._trained: set[str] = set()
        self._playing: str | None = None
        self.is_sharded = False
        self.calls: Callable[[int], int] = int
        """How often it is called where this device needs so many calls (`readings.answer_all`)."""

    def add_lora(self, name: str, spec: LoraSpec, pattern: str, *, seed: int) -> None:
        """A trainable adapter that changes nothing yet (B = 0); equal seeds make equal ones.

        `pattern` is the family's `lora_targets`. The weights are at least float32, whatever the
        network is. RecipeError for targets that name no linear layer of it.
        """
        from peft import LoraConfig

        modules = self.select(pattern, spec.targets)
        settings: dict[str, Any] = {"r": spec.rank, "lora_alpha": spec.alpha}  # typed int there
        config = LoraConfig(target_modules=modules, **settings)
        with torch.random.fork_rng(devices=[]), _several_adapters():
            torch.manual_seed(seed)
            self.network.add_adapter(config, adapter_name=name)
        for parameter in self.parameters_of(name).values():
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        self._trained.add(name)
        self._settle()

    def load_lora(self, name: str, file: Path, pipe: Any) -> None:
        """A frozen adapter from a file in any format that the pipeline reads.

        DataError for a file that is no LoRA, or one of another base.
        """
        tensors, about = read_lora(file, pipe)
        self.check(tensors, file)
        with _several_adapters():
            self.network.load_lora_adapter(tensors, adapter_name=name, metadata=about)
        self._settle()

    def select(self, pattern: str, targets: Sequence[str] | None) -> list[str]:
        """Names of the linear layers that match the family's pattern, or that end in a target."""
        linear = [name for name, module in self.matrices.items() if isinstance(module, nn.Linear)]
        if targets is None:
            return [name for name in linear if re.fullmatch(pattern, name)]
        for target in targets:
            if not any(_ends_in(name, target) for name in linear):
                inner = {re.sub(r"^.*\.\d+\.", "", name) for name in linear}
                endings = sorted(inner | {name.rpartition(".")[2] for name in inner})
                raise RecipeError(
                    f"no linear layer of {type(self.network).__name__} is called {target!r}",
                    field="model.cast.targets",
                    hint=did_you_mean(target, endings),
                )
        return [name for name in linear if any(_ends_in(name, target) for target in targets)]

    def check(self, tensors: Mapping[str, Tensor], file: Path) -> None:
        """DataError where a LoRA changes what the network does not have."""
        kind, hint = type(self.network).__name__, "give a LoRA that was trained on this base"
        factors = [key for key in tensors if key.endswith((DOWN, UP))]
        if not factors:
            raise DataError(f"LoRA {file}: holds no LoRA of a transformer; {hint}")
        for key in factors:
            name = key.removeprefix("transformer.").removesuffix(DOWN).removesuffix(UP)
            if name not in self.matrices:
                raise DataError(f"LoRA {file}: changes {name}, which {kind} does not have; {hint}")
            side = 1 if key.endswith(DOWN) else 0
            found, own = tensors[key].shape[side], self.matrices[name].weight.shape[side]
            if found != own:
                raise DataError(
                    f"LoRA {file}: is made for a {name} with {found} "
                    f"{('outputs', 'inputs')[side]}, and this {kind} has {own}; {hint}"
                )

    def _settle(self) -> None:
        """peft makes its newest adapter the active and the only trainable one; undo both."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        self._layers = [m for m in self.network.modules() if isinstance(m, BaseTunerLayer)]
        self.network.requires_grad_(False)
        for name in self._trained:
            for parameter in self.parameters_of(name).values():
                parameter.requires_grad_(True)
        self._switch(None)

    @property
    def has_adapters(self) -> bool:
        return bool(self._layers)

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        """By `<module>.lora_A.weight` and `<module>.lora_B.weight`, as they are stored."""
        return {
            key.replace(f".{name}.weight", ".weight"): parameter
            for key, parameter in self.network.named_parameters()
            if key.endswith((f".lora_A.{name}.weight", f".lora_B.{name}.weight"))
        }

    @contextmanager
    def playing(self, role: str | None) -> Iterator[None]:
        """The network with one adapter, or with none, for as long as the block lasts."""
        before = self._playing
        self._switch(role)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, role: str | None) -> None:
        """By the flag that `forward` reads. `requires_grad` stays as it is."""
        self._playing = role
        for layer in self._layers:
            layer._active_adapter = [] if role is None else [role]

    def checkpoint_blocks(self) -> None:
        """Keep each block's input alone for the backward pass, and compute the rest again."""

        def in_its_role(block: Any, *args: Any) -> Any:
            role = self._playing

            def run(*args: Any) -> Any:
                with self.playing(role):
                    return block(*args)

            return checkpoint(run, *args, use_reentrant=False)

        self.network.enable_gradient_checkpointing(in_its_role)

    def compile_blocks(self, **options: Any) -> None:
        """torch.compile for every repeated block, which has one graph for each role."""
        self.network.compile_repeated_blocks(**options)

    def shard(self, blocks: Sequence[str], shards: Shards) -> None:
        """Over several devices, which from now on all call it equally often. Its parameters are new
        ones, which roles have to `take_parameters` of; adapters cannot be added any more."""
        shard(self.network, blocks, shards.mesh)
        self.calls, self.is_sharded = shards.most, True


class FamilyRole:
    """A role of a real model: a `Denoiser` with its family's rule of guidance.

    `trained` are the parameters that belong to it, by the names under which they are stored;
    teachers have none. `reader` is its name in `Readings`.
    """

    def __init__(
        self,
        family: Family,
        shared: SharedNetwork,
        *,
        reader: str,
        adapter: str | None = None,
        trained: Mapping[str, nn.Parameter] | None = None,
        autocast: bool = False,
    ) -> None:
        self.family, self.shared, self.reader, self.adapter = family, shared, reader, adapter
        self.trained, self.autocast = dict(trained or {}), autocast

    def predict_v(self, x_t: Tensor, t: Tensor, cond: Readings) -> Tensor:
        """v = eps - x_0 in float32, without guidance."""
        return self.velocity(x_t, t, cond, 1.0)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Readings) -> Tensor:
        return self.guided(x_t, t, cond, 1.0)

    def guided(self, x_t: Tensor, t: Tensor, cond: Readings, scale: float) -> Tensor:
        """x_0 in float32 under the family's own rule, away from the reader's negative prompt."""
        return x0_from_v(x_t.float(), self.velocity(x_t, t, cond, scale), t)

    def velocity(self, x_t: Tensor, t: Tensor, cond: Readings, scale: float) -> Tensor:
        network = self.shared.network

        def answer(x: Tensor, now: Tensor, part: FamilyCondition) -> Tensor:
            return guided_velocity(self.family, x, now, part, scale, network)

        return self._play(answer, x_t, t, cond)

    @property
    def feature_width(self) -> int:
        return feature_width(self.shared.network)

    def features(self, x_t: Tensor, t: Tensor, cond: Readings) -> Tensor:
        """Hidden image tokens half-way in float32, as `objectives.gan.Features` has them."""
        network = self.shared.network

        def answer(x: Tensor, now: Tensor, part: FamilyCondition) -> Tensor:
            hidden = features(self.family, x, now, part, network)
            if self.shared.is_sharded:
                gather_for_backward(network, hidden)
            return hidden

        return self._play(answer, x_t, t, cond)

    def _play(self, answer: Answer, x_t: Tensor, t: Tensor, cond: Readings) -> Tensor:
        # Pipelines know no autocast; only master weights in float32 need it. What it casts is not
        # kept: it would outlive the block of a sharded network, and hide what that becomes.
        kind = x_t.device.type
        own = torch.autocast(
            kind,
            torch.get_autocast_dtype(kind),
            enabled=self.autocast and torch.is_autocast_enabled(kind),
            cache_enabled=False,
        )
        with self.shared.playing(self.adapter), own:
            return answer_all(answer, x_t, t, cond, self.reader, calls=self.shared.calls)

    def take_parameters(self) -> None:
        """Those that the network has now, after it was sharded."""
        if self.trained:
            own = self.shared.network.named_parameters()
            self.trained = self.shared.parameters_of(self.adapter) if self.adapter else dict(own)

    def parameters(self) -> Iterator[nn.Parameter]:
        return iter(self.trained.values())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(self.trained.items())

    def state_dict(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.trained.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """CheckpointError for other names or shapes than its own."""
        if odd := sorted(state.keys() ^ self.trained.keys()):
            held = "is of no use" if odd[0] in state else "is missing"
            raise CheckpointError(f"{self.reader}: tensor {odd[0]} {held}; is it of another model?")
        for name, parameter in self.trained.items():
            if parameter.shape != state[name].shape:
                raise CheckpointError(
                    f"{self.reader}: tensor {name} is {tuple(state[name].shape)}, not "
                    f"{tuple(parameter.shape)}; is it of another rank?"
                )
            parameter.copy_(state[name])


def lora_roles(
    family: Family, shared: SharedNetwork, spec: LoraSpec, *, seed: int
) -> tuple[FamilyRole, FamilyRole]:
    """Student and fake score: two adapters on one network that begin as the network itself."""
    roles = []
    for name in ("student", "fake"):
        shared.add_lora(name, spec, family.lora_targets, seed=seed)
        own = shared.parameters_of(name)
        roles.append(FamilyRole(family, shared, reader=STUDENT, adapter=name, trained=own))
    return roles[0], roles[1]


def full_copy(family: Family, base: SharedNetwork) -> FamilyRole:
    """Student or fake score as a copy in float32, of which every parameter is trained.

    Of the network alone: adapters that teachers have on it stay behind.
    """
    network = deepcopy(base.network)
    if base.has_adapters:
        network.unload_lora()
    own = SharedNetwork(network.float())
    own.network.requires_grad_(True)
    trained = dict(own.network.named_parameters())
    return FamilyRole(family, own, reader=STUDENT, trained=trained, autocast=True)


STUDENT = "student"
"""The reader that student and fake score are."""


@contextmanager
def _several_adapters() -> Iterator[None]:
    """peft warns of a second adapter on one network, which is what this module is for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        yield


def _ends_in(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def read_lora(file: Path, pipe: Any) -> tuple[dict[str, Tensor], Any]:
    """Factors by `transformer.<module>.lora_{A,B}.weight`, and peft's settings if it has them.

    What formats there are is known to the pipeline of the family.
    """
    if not file.is_file():
        raise DataError(f"LoRA {file}: there is no such file")
    try:
        tensors, about = pipe.lora_state_dict(file, return_lora_metadata=True)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise DataError(f"LoRA {file}: cannot be read ({error}); copy it again") from None
    return tensors, about


DOWN, UP = ".lora_A.weight", ".lora_B.weight"
