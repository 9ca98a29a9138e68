"""What a plan costs: evaluations, floating-point operations, seconds, bytes. All estimates.

One unit of cost is one forward evaluation of the network on one sample (NFE); a backward pass
counts as two.
"""

import math
from collections import Counter
from collections.abc import Mapping

from fewstep.recipe.facts import Machine, ModelSize
from fewstep.recipe.schema import (
    Consistency,
    DecoupledDmd,
    Dmd,
    Dmd2,
    Objective,
    Recipe,
    Strict,
    Task,
    Tdm,
    Teacher,
    TrajectoryRegression,
)

BACKWARD = 2.0
FEATURES = 0.5
"""A discriminator's forward pass: half of the network, and a head of no account."""

# Bytes of activations kept for the backward pass, per token and unit of width in one transformer
# layer in 16 bit: arXiv 2205.05198, without the attention matrix (fused attention keeps none).
ACTIVATION_BYTES = 34


class Cost(Strict):
    nfe_rollout: float
    """Per sample and student update: the student's own steps, of which one carries gradient."""
    nfe_student_backward: float
    nfe_real: float
    """All teachers of the condition with their CFG, mean over steps and conditions; for trajectory
    regression their walks, spread over the updates that use them."""
    nfe_fake_score: float
    nfe_fake_updates: float
    """n times: a rollout without gradient, and the fake score's forward and backward."""
    nfe_anchor: float
    """The teacher's walk to the target; only the first of the K steps needs it."""
    nfe_gan: float = 0.0
    """A discriminator's training with the fake score, and its gradient to the student's sample."""
    nfe_target: float = 0.0
    """Consistency: the student's own answer at the neighbour, without gradient."""
    nfe_per_sample: float
    nfe_per_update: float
    flop: float
    seconds: float
    evaluation_nfe: float
    evaluation_seconds: float


class Memory(Strict):
    """Bytes on one device."""

    student: int
    """Weights, gradients, two Adam moments and the EMA, in float32."""
    fake: int
    """Weights, gradients and two Adam moments, and those of a discriminator's head."""
    teachers: int
    activations: int
    """Largest of an update, of the optimiser's step and of sampling, which never meet."""
    autoencoder: int = 0
    margin: int = 0
    """What cannot be computed: the device's context, libraries, holes between tensors."""
    gathered: int = 0
    """Of a sharded cast: blocks that are whole for their use, with their gradients."""
    total: int
    evaluation: int = 0
    """All that the lead needs when it plays a sharded cast's student and teachers whole, at the end
    and by itself; 0 where that is no more than training."""


def estimate_cost(
    recipe: Recipe,
    *,
    steps: int,
    nfe_real: Mapping[Task, float],
    samples: Mapping[Task, int],
    machine: Machine,
    model: ModelSize,
) -> Cost:
    """`nfe_real`, of one real score, and `samples` (over the budget) are per task."""
    total = sum(samples.values())
    parts = {
        task: _parts(recipe, task, steps, nfe_real[task], samples=total, back=backward(model, task))
        for task in samples
    }
    mean = {
        part: sum(parts[task][part] * number for task, number in samples.items()) / total
        for part in next(iter(parts.values()))
    }
    per_sample = sum(mean.values())
    flop = sum(
        number * sum(n * flop_of(part, model, task) for part, n in parts[task].items())
        for task, number in samples.items()
    )
    evaluation_nfe, evaluation_flop = _evaluation(recipe, steps, model)
    flops = machine.flops * machine.devices
    return Cost(
        **mean,
        nfe_per_sample=per_sample,
        nfe_per_update=per_sample * recipe.budget.batch,
        flop=flop,
        seconds=flop / flops,
        evaluation_nfe=evaluation_nfe,
        evaluation_seconds=evaluation_flop / flops,
    )


def flop_of(part: str, model: ModelSize, task: str) -> float:
    """FLOPs of one evaluation counted in this field of `Cost`; a real model's are measured."""
    if task not in model.passes:
        return forward_flop(model, task)
    passes = model.passes[task]
    if part in ("nfe_real", "nfe_anchor"):
        return passes.teacher_flop
    return passes.student_flop


def backward(model: ModelSize, task: str) -> float:
    """A backward pass in evaluations. Frozen weights take none of it, checkpointing adds one."""
    if task not in model.passes:
        return BACKWARD
    passes = model.passes[task]
    return passes.training_flop / passes.student_flop - 1


def _parts(
    recipe: Recipe, task: Task, steps: int, real: float, *, samples: int, back: float
) -> dict[str, float]:
    """Evaluations per sample and student update, by the field of `Cost` that they go to."""
    objective = recipe.objective
    # Step k is drawn uniformly from 0 .. K-1 and the student runs up to it: (K + 1) / 2 on average.
    rollout = (steps + 1) / 2
    fake_updates = gan = anchor = target = 0.0
    fake_score = 1.0
    match objective:
        case Dmd() | Dmd2() | DecoupledDmd() | Tdm():
            fake_updates = objective.fake_updates * (rollout + 1 + back)
        case Consistency():
            rollout, fake_score, target = 1.0, 0.0, 1.0
        case TrajectoryRegression():
            walks = min(objective.trajectories, samples)
            rollout, fake_score = 1.0, 0.0
            real *= steps * objective.substeps * walks / samples
    if isinstance(objective, Dmd):
        anchor = _anchor_nfe(recipe, objective, task, steps)
    if isinstance(objective, Dmd2):
        # The student needs the gradient at the sample alone: half of a backward pass, or all of it
        # where the weights are frozen. The fake score trains on a real and a student's image.
        slope = back if recipe.model.is_real and recipe.model.roles.kind == "lora" else back / 2
        gan = FEATURES * (1 + slope) + objective.fake_updates * 2 * FEATURES * (1 + back)
    return {
        "nfe_rollout": rollout,
        "nfe_student_backward": back,
        "nfe_real": real,
        "nfe_fake_score": fake_score,
        "nfe_fake_updates": fake_updates,
        "nfe_anchor": anchor,
        "nfe_gan": gan,
        "nfe_target": target,
    }


def evaluations_per_step(teacher: Teacher, task: Task) -> int:
    """Guidance costs a second evaluation."""
    return 2 if teacher.cfg.get(task, 1.0) != 1 else 1


def evaluations_per_score(objective: Objective, teacher: Teacher, task: Task) -> int:
    """What one teacher is asked for one real score."""
    own = evaluations_per_step(teacher, task)
    if isinstance(objective, DecoupledDmd):  # bare at one time; both branches at another
        return 3 if own == 2 else 1
    return own


def _anchor_nfe(recipe: Recipe, objective: Dmd, task: Task, steps: int) -> float:
    anchor = objective.anchor
    if anchor.weight == 0:
        return 0.0
    return anchor.steps * evaluations_per_step(recipe.teachers[recipe.student.init], task) / steps


def tokens(model: ModelSize, task: str) -> int:
    """Length of the joint sequence."""
    if task in model.passes:
        return model.passes[task].tokens
    source = model.source_tokens if task == "edit" else 0
    return model.image_tokens + model.text_tokens + source


def forward_flop(model: ModelSize, task: str) -> float:
    """One evaluation on one sample: 2 per weight and token, and the attention matrix."""
    n = tokens(model, task)
    return 2.0 * model.params * n + 4.0 * model.depth * model.width * n**2


def _evaluation(recipe: Recipe, steps: int, model: ModelSize) -> tuple[float, float]:
    nfe = flop = 0.0
    cases = recipe.evaluation.per_category * recipe.evaluation.seeds_per_case
    for task, _ in recipe.data.conditions():
        for name in recipe.evaluation.models:
            kind, _, asked = name.partition(":")
            teacher = recipe.teachers[asked or recipe.student.init]
            if kind == "teacher":
                evaluations = teacher.steps * evaluations_per_step(teacher, task)
            else:
                evaluations = steps
            part = "nfe_real" if kind != "student" else "nfe_rollout"
            nfe += cases * evaluations
            flop += cases * evaluations * flop_of(part, model, task)
    return nfe, flop


def estimate_memory(
    recipe: Recipe, *, teachers: int, tasks: tuple[str, ...], model: ModelSize, devices: int = 1
) -> Memory:
    """What is trained is held in float32; `precision` decides the activations, and the weights of
    frozen networks of real models."""
    if model.passes:
        return _measured_memory(recipe, model, devices)
    weights = 4 * (model.params if model.trained is None else model.trained)
    student = weights * (5 if recipe.ema else 4)
    # Without a fake score its copy of the weights lies idle.
    fake = weights * (1 if isinstance(recipe.objective, Consistency | TrajectoryRegression) else 4)
    fake += _head_bytes(recipe.objective, model.width)
    width = 1 if recipe.precision == "bf16" else 2
    longest = max(tokens(model, task) for task in tasks)
    per_sample = ACTIVATION_BYTES * width * longest * model.width * model.depth
    if recipe.model.is_real and recipe.model.roles.checkpointing:  # the input of each block
        per_sample = 2 * width * longest * model.width * model.depth
    activations = per_sample * recipe.budget.micro_batch
    frozen = 4 * model.params * teachers
    if model.networks is not None:
        frozen = (2 if recipe.precision == "bf16" else 4) * model.params * model.networks
    return Memory(
        student=student,
        fake=fake,
        teachers=frozen,
        activations=activations,
        total=student + fake + frozen + activations,
    )


def _head_bytes(objective: Objective, width: int) -> int:
    """Of a discriminator's head (`objectives.gan.Head`): weights, gradients and two moments."""
    return 16 * (width**2 + 4 * width + 1) if isinstance(objective, Dmd2) else 0


CONTEXT = 2**30
"""Of a CUDA context with its libraries and their workspaces; not measured here."""
HOLES = 0.1
"""Part of what comes and goes that the allocator cannot use again; assumed."""


def _measured_memory(recipe: Recipe, model: ModelSize, devices: int) -> Memory:
    """Trained weights, their gradients, moments and average are float32, the rest is as loaded.

    Student and fake score never have gradients at the same time, and sampling, which sets the
    student's own weights aside, has none: there is room for one such copy. The optimiser works on
    all tensors at once and needs another for its roots. A sharded cast has of all that only parts.
    """
    parts = devices if splits_cast(recipe, devices) else 1
    wide = 4 * (model.params if model.trained is None else model.trained)
    narrow = 2 if recipe.precision == "bf16" else 4
    trains_fake = not isinstance(recipe.objective, Consistency | TrajectoryRegression)
    student = wide * (5 if recipe.ema else 4)
    fake, head = wide * (3 if trains_fake else 1), _head_bytes(recipe.objective, model.width)
    frozen = narrow * (model.params * (model.networks or 1) + model.loras)
    autoencoder = narrow * model.autoencoder
    used = model.passes.values()
    # Two halves of the network, for a discriminator, are kept beside the fake score's own loss.
    halves = 1 if isinstance(recipe.objective, Dmd2) else 0
    update = max(
        max(p.training_bytes + halves * p.kept_bytes, p.kept_bytes + p.forward_bytes) for p in used
    )
    update += _autocast_bytes(recipe, model)
    per_image = max(p.forward_bytes for p in used) / recipe.budget.micro_batch
    sampling = max(
        largest_batch(recipe) * per_image,
        max(p.decoder_bytes for p in used),
    )
    student, fake, teachers = (math.ceil(all_of / parts) for all_of in (student, fake, frozen))
    fake += head
    gathered = 0 if parts == 1 else _gathered_bytes(recipe, model)
    coming = round(max(update, sampling, wide / parts))
    margin = CONTEXT + round(HOLES * (coming + gathered))
    alone = frozen + wide + round((1 + HOLES) * sampling) + autoencoder + CONTEXT
    total = student + fake + teachers + gathered + coming + autoencoder + margin
    return Memory(
        student=student,
        fake=fake,
        teachers=teachers,
        activations=coming,
        autoencoder=autoencoder,
        margin=margin,
        gathered=gathered,
        total=total,
        evaluation=alone if parts > 1 and alone > total else 0,
    )


def splits_cast(recipe: Recipe, devices: int) -> bool:
    """Whether the networks are split over the devices."""
    return devices > 1 and recipe.model.is_real and recipe.model.roles.shard


def _autocast_bytes(recipe: Recipe, model: ModelSize) -> int:
    """16-bit copies of a full cast's float32 weights, which are kept until the backward pass."""
    if recipe.model.roles.kind == "lora" or recipe.precision == "fp32":
        return 0
    return model.block // 2 if recipe.model.roles.checkpointing else 2 * model.params


def _gathered_bytes(recipe: Recipe, model: ModelSize) -> int:
    """What lies outside the blocks, the block that plays, and the next one on its way.

    In a backward pass a full copy also has the gradients of as much, and those of a block on their
    way to the other devices. An adapter's are of no account.
    """
    weights = model.outside + 2 * model.block
    return 2 * weights if recipe.model.roles.kind == "full" else weights


def largest_batch(recipe: Recipe) -> int:
    """The most images that sample grids, probes and the evaluation draw in one batch.

    Grids and probes draw a category at a time, the evaluation a task.
    """
    probe, spec = recipe.log.probe, recipe.evaluation
    categories = Counter(task for task, _ in recipe.data.conditions())
    asked = max(
        recipe.log.sample_seeds,
        probe.per_category * probe.seeds if probe else 0,
        spec.per_category * spec.seeds_per_case * max(categories.values()),
    )
    return min(recipe.images_at_once, asked)
