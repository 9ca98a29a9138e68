"""What a recipe for real models will need: its networks run on the meta device before they exist.

Sizes come from the configuration files of the pipelines in the recipe; where a pipeline is not
here, and is called as a released model, from that model's published configuration.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fewstep.core.types import Task
from fewstep.models.families.contract import Family
from fewstep.models.families.released import RELEASED, Released
from fewstep.models.families.size import (
    META,
    TEXT_TOKENS,
    Pass,
    at_full_depth,
    build,
    example,
    forward_pass,
    hollow_family,
    joint_tokens,
    training_pass,
)
from fewstep.models.roles import FamilyRole, LoraSpec, SharedNetwork, lora_roles
from fewstep.recipe.facts import Facts, Machine, Passes, gather_facts, local_machine
from fewstep.recipe.families import BASE, EDIT, PIPELINES, PipelineFacts
from fewstep.recipe.plan import Plan, make_plan
from fewstep.recipe.schema import FullCast, LoraCast, Recipe

ASSUMED = Machine(name="80 GB GPU, assumed to sustain 400 TFLOP/s", flops=400e12, memory=80 * 10**9)
"""An H100 multiplies bf16 matrices at up to 989 TFLOP/s (NVIDIA's data sheet, dense)."""


def plan_real(recipe: Recipe, *, devices: int = 1, on_paper: bool = False) -> Plan:
    """The plan with measured sizes. `on_paper`: what lies on the disk is not required, if it has
    the name of a released model; what is assumed is then among the plan's notes."""
    facts = gather_facts(recipe)
    if on_paper:
        facts = assume_missing(recipe, facts)
    machine = replace(gpu_at_hand() or (ASSUMED if on_paper else local_machine()), devices=devices)
    made = make_plan(recipe, machine, facts)  # for its refusals, before anything is built
    used: tuple[Task, ...] = tuple(quota.task for quota in made.tasks)
    made = make_plan(recipe, machine, measure(recipe, facts, used))
    notes = list(made.notes)
    have = f"{machine.memory / 1e9:.0f} GB on {machine.name}"
    if made.memory.total > machine.memory:
        notes.append(f"does not fit: {made.memory.total / 1e9:.0f} GB of {have}")
    evaluates = made.memory.evaluation <= machine.memory
    if not evaluates:
        notes.append(
            f"no evaluation at the end, which one device does by itself: it takes "
            f"{made.memory.evaluation / 1e9:.0f} GB of {have}; use `fewstep eval` on a larger one"
        )
    return made.model_copy(update={"notes": tuple(notes), "evaluates": evaluates})


def gpu_at_hand() -> Machine | None:
    if not torch.cuda.is_available():
        return None
    about = torch.cuda.get_device_properties(0)
    name = f"{about.name}, assumed to sustain {ASSUMED.flops / 1e12:.0f} TFLOP/s"
    return replace(ASSUMED, name=name, memory=about.total_memory)


# --- what is not here -----------------------------------------------------------------------------


def assume_missing(recipe: Recipe, facts: Facts) -> Facts:
    """Released models in place of pipelines that are not here. Where the base is not, neither are
    prompts, teachers and LoRAs asked for."""
    model, pipelines, notes = recipe.model, dict(facts.pipelines), list(facts.notes)
    for name, path in ((BASE, model.path), (EDIT, model.edit_path)):
        known = _released(path)
        if path is None or known is None or Path(path).expanduser().exists():
            continue
        if known.pipeline not in PIPELINES[model.family]:
            continue
        pipelines[name] = _facts_of(known)
        notes.append(f"{path} is not here: sizes are those of the released {Path(path).name}")
    if model.path is None or Path(model.path).expanduser().exists() or BASE not in pipelines:
        return replace(facts, pipelines=pipelines, notes=tuple(notes))
    for name, teacher in recipe.teachers.items():
        if teacher.weights not in (BASE, EDIT) and pipelines[teacher.weights].problem:
            pipelines[teacher.weights] = pipelines[BASE]
            notes.append(f"teacher {name}: {teacher.weights} is not here, taken to be as the base")
        if teacher.lora and not Path(teacher.lora).expanduser().is_file():
            notes.append(f"teacher {name}: {teacher.lora} is not here, taken to be as the student")
    if facts.source_missing:
        notes.append(f"{recipe.data.source.path} is not here: prompts are not counted")  # type: ignore[union-attr]
    return replace(facts, pipelines=pipelines, source_missing=False, notes=tuple(notes))


def _released(path: str | None) -> Released | None:
    return None if path is None else RELEASED.get(Path(path).name)


def _facts_of(known: Released) -> PipelineFacts:
    network = build(known.network, known.config, torch.float32)
    return PipelineFacts(
        kind=known.pipeline,
        network=known.network,
        shapes={name: tuple(value.shape) for name, value in network.state_dict().items()},
        width=1,
        depth=1,
    )


# --- measuring ------------------------------------------------------------------------------------


def measure(
    recipe: Recipe, facts: Facts, tasks: tuple[Task, ...], *, text_tokens: int = TEXT_TOKENS
) -> Facts:
    """`facts` with the sizes of the networks that they speak of."""
    model = recipe.model
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    start = recipe.teachers[recipe.student.init].weights
    path = Path((model.path if start == BASE else model.edit_path) or "").expanduser()
    kind = facts.pipelines[start].kind
    network = build(*config_of(path, "transformer"), dtype)
    vae = build(*config_of(path, "vae"), dtype)
    params = sum(p.numel() for p in network.parameters())
    autoencoder = sum(p.numel() for p in vae.parameters())
    family = hollow_family(kind, network, vae, source_resolution=model.source_resolution)
    student, teacher = hollow_roles(recipe, family)
    trained = sum(p.numel() for p in student.parameters())
    loras = sum(1 for t in recipe.teachers.values() if t.lora)
    passes = {}
    for task in tasks:
        reads = _pipeline_of(task, facts)
        own = hollow_family(reads, network, vae, source_resolution=model.source_resolution)
        passes[task] = measure_task(recipe, own, student, teacher, task, dtype, text_tokens)
    blocks = [bytes_of(b) for n in family.trunk.blocks for b in network.get_submodule(n).children()]
    width = 4 // dtype.itemsize if isinstance(model.roles, FullCast) else 1  # copies are float32
    networks = {BASE} | {t.weights for t in recipe.teachers.values()}
    size = replace(
        facts.model,
        params=params,
        trained=trained,
        networks=len(networks),
        autoencoder=autoencoder,
        loras=loras * trained if isinstance(model.roles, LoraCast) else 0,
        block=width * max(blocks),
        outside=width * (bytes_of(network) - sum(blocks)),
        passes=passes,
    )
    return replace(facts, model=size)


def bytes_of(module: torch.nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())


def _pipeline_of(task: Task, facts: Facts) -> str:
    """Whose encoders read the prompts of a task: as `Pipelines.places` has it."""
    for name in (EDIT, BASE):
        kind = facts.pipelines[name].kind if name in facts.pipelines else ""
        if any(task in kinds.get(kind, ()) for kinds in PIPELINES.values()):
            return kind
    raise AssertionError("refused by the plan")


def config_of(folder: Path, part: str) -> tuple[str, Mapping[str, Any]]:
    """The class and the configuration of a pipeline's transformer or autoencoder."""
    file = folder / part / "config.json"
    if file.is_file():
        config = json.loads(file.read_bytes())
        return config["_class_name"], config
    known = RELEASED[folder.name]
    if part == "vae":
        return known.vae, known.vae_config
    return known.network, known.config


def hollow_roles(recipe: Recipe, family: Family) -> tuple[FamilyRole, FamilyRole]:
    """The student, and a teacher that is the frozen network itself, as `RealEnsemble` casts
    them."""
    network, spec = family.pipe.transformer, recipe.model.roles
    shared = SharedNetwork(network)
    teacher = FamilyRole(family, shared, reader="teacher")
    if isinstance(spec, LoraCast):
        alpha = float(spec.rank) if spec.alpha is None else spec.alpha
        with META:
            lora = LoraSpec(spec.rank, alpha, spec.targets)
            student, _ = lora_roles(family, shared, lora, seed=0)
    else:
        network.requires_grad_(True)
        own = dict(network.named_parameters())
        student = FamilyRole(family, shared, reader="student", trained=own)
    if spec.checkpointing:
        shared.checkpoint_blocks()
    return student, teacher


def measure_task(
    recipe: Recipe,
    family: Family,
    student: FamilyRole,
    teacher: FamilyRole,
    task: Task,
    dtype: torch.dtype,
    text_tokens: int,
) -> Passes:
    model, batch = recipe.model, recipe.budget.micro_batch
    source = model.source_resolution or 1024
    given = example(
        family, batch, model.size, dtype, task=task, text_tokens=text_tokens, source=source
    )
    network = family.pipe.transformer

    def run(role: FamilyRole, *, training: bool = False) -> Pass:
        def answer() -> torch.Tensor:
            with role.shared.playing(role.adapter):
                return family.velocity(*given, network)

        def once() -> Pass:
            return training_pass(answer, student.parameters()) if training else forward_pass(answer)

        return at_full_depth(network, once)

    bare, adapted, trained = run(teacher), run(student), run(student, training=True)
    latents = torch.empty(family.noise_shape(1, model.size), dtype=dtype, device=META)
    decoded = forward_pass(lambda: family.decode(latents, model.size))
    return Passes(
        tokens=joint_tokens(family, given[2], model.size),
        teacher_flop=bare.flop / batch,
        student_flop=adapted.flop / batch,
        training_flop=trained.flop / batch,
        forward_bytes=adapted.peak,
        kept_bytes=trained.kept,
        training_bytes=trained.peak,
        decoder_bytes=decoded.peak,
    )
