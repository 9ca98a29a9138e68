"""What a plan costs: evaluations, floating-point operations, seconds, bytes. All estimates.

One unit of cost is one forward evaluation of the network on one sample (NFE); a backward pass
counts as two.
"""

from collections.abc import Mapping

from fewstep.recipe.facts import Machine, ModelSize
from fewstep.recipe.schema import Recipe, Strict, Task, Teacher

BACKWARD = 2.0

# Bytes of activations kept for the backward pass, per token and unit of width in one transformer
# layer in 16 bit: arXiv 2205.05198, without the attention matrix (fused attention keeps none).
ACTIVATION_BYTES = 34


class Cost(Strict):
    nfe_rollout: float
    """Per sample and student update: the student's own steps, of which one carries gradient."""
    nfe_student_backward: float
    nfe_real: float
    """All teachers of the condition with their CFG, mean over steps and conditions."""
    nfe_fake_score: float
    nfe_fake_updates: float
    """n times: a rollout without gradient, and the fake score's forward and backward."""
    nfe_anchor: float
    """The teacher's walk to the target; only the first of the K steps needs it."""
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
    teachers: int
    activations: int
    total: int


def estimate_cost(
    recipe: Recipe,
    *,
    steps: int,
    nfe_real: Mapping[Task, float],
    samples: Mapping[Task, int],
    machine: Machine,
    model: ModelSize,
) -> Cost:
    """`nfe_real` and `samples` (over the budget) are per task."""
    total = sum(samples.values())
    real = sum(nfe_real[task] * number for task, number in samples.items()) / total
    # Step k is drawn uniformly from 0 .. K-1 and the student runs up to it: (K + 1) / 2 on average.
    rollout = (steps + 1) / 2
    fake_updates = recipe.objective.fake_updates * (rollout + 1 + BACKWARD)
    anchors = {task: _anchor_nfe(recipe, task, steps) for task in samples}
    anchor = sum(anchors[task] * number for task, number in samples.items()) / total
    fixed = rollout + BACKWARD + 1 + fake_updates
    flop = sum(
        number * (fixed + anchors[task] + nfe_real[task]) * forward_flop(model, task)
        for task, number in samples.items()
    )
    evaluation_nfe, evaluation_flop = _evaluation(recipe, steps, model)
    flops = machine.flops * machine.devices
    return Cost(
        nfe_rollout=rollout,
        nfe_student_backward=BACKWARD,
        nfe_real=real,
        nfe_fake_score=1.0,
        nfe_fake_updates=fake_updates,
        nfe_anchor=anchor,
        nfe_per_sample=fixed + anchor + real,
        nfe_per_update=(fixed + anchor + real) * recipe.budget.batch,
        flop=flop,
        seconds=flop / flops,
        evaluation_nfe=evaluation_nfe,
        evaluation_seconds=evaluation_flop / flops,
    )


def evaluations_per_step(teacher: Teacher, task: Task) -> int:
    """Guidance costs a second evaluation."""
    return 2 if teacher.cfg.get(task, 1.0) != 1 else 1


def _anchor_nfe(recipe: Recipe, task: Task, steps: int) -> float:
    anchor = recipe.objective.anchor
    if anchor.weight == 0:
        return 0.0
    return anchor.steps * evaluations_per_step(recipe.teachers[recipe.student.init], task) / steps


def tokens(model: ModelSize, task: str) -> int:
    """Length of the joint sequence."""
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
            nfe += cases * evaluations
            flop += cases * evaluations * forward_flop(model, task)
    return nfe, flop


def estimate_memory(
    recipe: Recipe, *, teachers: int, tasks: tuple[str, ...], model: ModelSize
) -> Memory:
    """Weights are held in float32; `precision` decides the activations."""
    weights = 4 * model.params
    student = weights * (5 if recipe.ema else 4)
    fake = weights * 4
    width = 1 if recipe.precision == "bf16" else 2
    longest = max(tokens(model, task) for task in tasks)
    per_sample = ACTIVATION_BYTES * width * longest * model.width * model.depth
    activations = per_sample * recipe.budget.micro_batch
    return Memory(
        student=student,
        fake=fake,
        teachers=teachers * weights,
        activations=activations,
        total=student + fake + teachers * weights + activations,
    )
