"""The shape of a recipe: every choice of the paper (arXiv 2606.03746) as data.

Only what can be said about one field alone is checked here. What depends on other fields, on the
machine or on the disk is refused by `recipe.plan.make_plan`.
"""

import hashlib
import json
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Task = Literal["t2i", "edit"]
TASKS: tuple[Task, ...] = ("t2i", "edit")

LAB_CATEGORIES: dict[Task, tuple[str, ...]] = {
    "t2i": ("landscape", "portrait", "text"),
    "edit": ("scene", "enhance", "object", "text_edit", "identity", "style"),
}

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0)]
Positive = Annotated[float, Field(gt=0.0)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class Strict(BaseModel):
    """Frozen, no unknown keys, no infinities."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        coerce_numbers_to_str=True,
    )


class Model(Strict):
    family: Literal["lab", "folder"]
    """lab: the network of the bundled world; folder: one trained by `fewstep teach` on a folder."""


class Teacher(Strict):
    weights: Annotated[str, Field(min_length=1)]
    """`bundled:<name>`, or the path of a .safetensors file written by `fewstep teach`."""
    tasks: Annotated[tuple[Task, ...], Field(min_length=1)]
    """What this teacher was trained for."""
    cfg: dict[Task, Positive]
    """Guidance scale s per task, uncond + s (cond - uncond); 1 is none and costs one evaluation."""
    steps: Count = 40
    """Sampling steps of this teacher as the multi-step reference (40 with CFG = 80 NFE)."""
    shift: Positive = 1.0
    """s in t -> s t / (1 + (s - 1) t) of this teacher's own time grid."""


class ShiftGrid(Strict):
    kind: Literal["shift"]
    steps: Count = 4
    """K, the student's number of evaluations."""
    shift: Positive = 3.0
    """s in t -> s t / (1 + (s - 1) t), applied to the uniform times 1, (K-1)/K, ..., 1/K."""


class ExplicitGrid(Strict):
    kind: Literal["explicit"]
    t: Annotated[tuple[float, ...], Field(min_length=1)]
    """t_0 = 1 > t_1 > ... > t_{K-1} > 0; the final 0 is implied."""


Grid = Annotated[ShiftGrid | ExplicitGrid, Field(discriminator="kind")]


class Student(Strict):
    init: str
    """Name of the teacher whose weights the student and the fake score start from."""
    grid: Grid = ShiftGrid(kind="shift")
    """The times at which the student is evaluated."""


class LabSource(Strict):
    kind: Literal["lab"]


class FolderSource(Strict):
    kind: Literal["folder"]
    path: Annotated[str, Field(min_length=1)]
    """A folder with captions.jsonl and/or edits.jsonl, or webdataset shards."""
    image_size: Count = 64
    """Side in pixels to which images are resized and cropped."""
    autoencoder: str | None = None
    """Folder of a diffusers AutoencoderTiny or AutoencoderKL; null = pixel space."""
    text_encoder: str | None = None
    """Folder of a transformers text encoder, or `package:NAME/FOLDER` inside an installed Python
    package; null = hashed words, learned with the teacher."""
    cache: str = ".fewstep-cache"
    """Folder for decoded pixels, latents and text states; outside `path`."""


Source = Annotated[LabSource | FolderSource, Field(discriminator="kind")]


class Pool(Strict):
    task: Task
    category: Word
    """The condition that guidance rules and result tables speak of."""
    size: Count
    """Number of distinct prompts (T2I) or source-instruction pairs (edit)."""


class Data(Strict):
    source: Source
    pools: Annotated[dict[Word, Pool], Field(min_length=1)]
    """Prompt pools by name."""
    composition: dict[Task, dict[Word, Share]]
    """Weights of the pools within each task; relative, 0 leaves a pool out."""
    mixture: dict[Task, Share]
    """Weights of the tasks, T2I:Edit; relative."""

    def conditions(self) -> tuple[tuple[Task, str], ...]:
        """Every (task, category) that has a pool, T2I first."""
        declared: list[tuple[Task, str]] = [
            (pool.task, pool.category) for pool in self.pools.values()
        ]
        return tuple(sorted(dict.fromkeys(declared), key=lambda entry: TASKS.index(entry[0])))


class When(Strict):
    task: Task | None = None
    category: str | None = None


class GuidanceRule(Strict):
    when: When = When()
    """The conditions this rule is for; what is left out matches everything."""
    weights: Annotated[tuple[dict[str, float], ...], Field(min_length=1)]
    """lambda[k][m]: teacher weights, one row per student step k, or a single row for all steps."""


class Renoise(Strict):
    kind: Literal["uniform"] = "uniform"
    low: Annotated[float, Field(ge=0.0, le=1.0)] = 0.02
    high: Annotated[float, Field(ge=0.0, le=1.0)] = 0.98
    shift: Positive = 1.0
    """Warps the uniform draw, t -> s t / (1 + (s - 1) t)."""


class Anchor(Strict):
    weight: Share = 0.0
    """Weight of the flow-matching loss on the first student step (arXiv 2602.03139); 0 = off."""
    steps: Count = 5
    """Teacher steps from noise to the state that the first student step is anchored to."""
    of: Count = 30
    """Steps of the whole teacher trajectory that these are the first of."""


class Dmd(Strict):
    kind: Literal["dmd"]
    renoise: Renoise = Renoise()
    """p_t, the distribution of the times at which scores are compared."""
    normaliser: Literal["teacher", "none"] = "teacher"
    """teacher: divide by the per-sample mean |x - real|; none: leave the difference as it is."""
    fake_updates: Count = 5
    """Fake-score updates per student update (two time scales)."""
    anchor: Anchor = Anchor()


class Adam(Strict):
    lr: Positive = 1e-4
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    weight_decay: Share = 0.0
    clip: Positive | None = 1.0
    """Largest global gradient norm; null = no clipping."""


class Optim(Strict):
    student: Adam = Adam()
    fake: Adam = Adam()
    warmup: Annotated[int, Field(ge=0)] = 10
    """Updates over which both learning rates rise linearly."""


class Ema(Strict):
    decay: Fraction = 0.98


class Budget(Strict):
    updates: Count
    """Student updates."""
    batch: Count
    """Samples per student update, over all devices."""
    micro_batch: Count
    """Samples per forward pass on one device; a micro-batch holds one task."""


class Log(Strict):
    every: Count = 1
    sample_every: Count = 50
    save_every: Count = 50
    sample_seeds: Count = 8
    """Number of images in the sample grid."""


class Evaluation(Strict):
    per_category: Count = 24
    """Cases per category, from the evaluation split."""
    seed: int = 1000
    seeds_per_case: Count = 1
    models: Annotated[tuple[str, ...], Field(min_length=1)] = ("teacher", "teacher_cut", "student")
    """`student`, `teacher`, `teacher_cut` (at the student's NFE); `teacher:<name>` for another."""


class Recipe(Strict):
    name: Word
    seed: Annotated[int, Field(ge=0)] = 0
    model: Model
    teachers: Annotated[dict[Word, Teacher], Field(min_length=1)]
    student: Student
    data: Data
    guidance: Annotated[tuple[GuidanceRule, ...], Field(min_length=1)]
    """First matching rule wins; every condition needs one."""
    objective: Dmd
    optim: Optim = Optim()
    ema: Ema | None = Ema()
    """Averaged student weights, which are the result; null = off."""
    budget: Budget
    precision: Literal["bf16", "fp32"] = "bf16"
    log: Log = Log()
    evaluation: Evaluation = Evaluation()

    def content_hash(self) -> str:
        """16 hex digits over every field that decides the student: not name, log or evaluation."""
        content = self.model_dump(mode="json", exclude={"name", "log", "evaluation"})
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]
