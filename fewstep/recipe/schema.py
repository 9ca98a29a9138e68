"""The shape of a recipe: every choice of the paper (arXiv 2606.03746) as data.

Only what can be said about one field alone is checked here. What depends on other fields, on the
machine or on the disk is refused by `recipe.plan.make_plan`.
"""

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

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
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""Room is left for the seeds that are counted up from it: generators end at 2**64."""
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


class LoraCast(Strict):
    kind: Literal["lora"]
    rank: Count = 64
    alpha: Positive | None = None
    """Scale of the update is alpha / rank; null = rank."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Endings of the names of linear layers, such as to_q; null = attention and MLP."""
    checkpointing: bool = False
    """Compute each block again in the backward pass instead of keeping what is inside it."""
    compile: bool = False
    """torch.compile for the repeated blocks."""
    shard: bool = False
    """Split every network over the devices that torchrun starts (FSDP2): weights, gradients,
    moments, average. On one device it changes nothing."""


class FullCast(Strict):
    kind: Literal["full"]
    checkpointing: bool = False
    compile: bool = False
    shard: bool = False


RealFamily = Literal[
    "qwen_image", "qwen_image_21", "flux2_klein", "stable_diffusion_3", "z_image", "sana"
]


class Model(Strict):
    family: Literal["lab", "folder", RealFamily]
    """lab: the network of the bundled world; folder: one trained by `fewstep teach` on a folder;
    the others are real models, and what follows is for them."""
    path: str | None = None
    """Folder of a diffusers pipeline."""
    edit_path: str | None = None
    """Folder of a second pipeline of the family, for editing: Qwen-Image-Edit-Plus."""
    size: tuple[Count, Count] = (1024, 1024)
    """Height and width of the images in pixels."""
    source_resolution: Count | None = None
    """Qwen-Image 2.1: side of a square of the area to which sources are resized; null = 1024."""
    cast: Annotated[LoraCast | FullCast, Field(discriminator="kind")] | None = None
    """lora: student and fake score are adapters on one frozen network; full: copies of it.
    null = lora for real models; those of lab and folder are always copies."""

    @property
    def is_real(self) -> bool:
        return self.family not in ("lab", "folder")

    @property
    def roles(self) -> LoraCast | FullCast:
        """The cast of a real model."""
        return self.cast or LoraCast(kind="lora")


class Teacher(Strict):
    weights: Annotated[str, Field(min_length=1)]
    """`bundled:<name>`, or the path of a .safetensors file written by `fewstep teach`. For a real
    model `base` (the network in model.path), `edit` (that in model.edit_path), or the folder of
    another checkpoint."""
    lora: str | None = None
    """A LoRA file on top of `weights` (real models)."""
    negative: str | None = None
    """The prompt that guidance moves away from; null = what the family is used with."""
    template: str | None = None
    """How this teacher reads a prompt, such as "{prompt}, a photograph"; null = as it is."""
    tasks: Annotated[tuple[Task, ...], Field(min_length=1)]
    """What this teacher was trained for."""
    cfg: dict[Task, Positive]
    """Guidance scale s per task, uncond + s (cond - uncond); 1 is none and costs one evaluation."""
    steps: Count = 40
    """Sampling steps of this teacher as the multi-step reference (40 with CFG = 80 NFE)."""
    shift: Positive = 1.0
    """s in t -> s t / (1 + (s - 1) t) of this teacher's own time grid."""
    grid: Literal["shift", "pipeline"] = "shift"
    """Times of the multi-step reference: by `shift`, or as the pipeline's scheduler places them."""


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


CACHE = ".fewstep-cache"


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
    cache: str = CACHE
    """Folder for decoded pixels, latents and text states; outside `path`."""


class PromptSource(Strict):
    kind: Literal["prompts"]
    path: Annotated[str, Field(min_length=1)]
    """Prompts and edit instructions: a .txt, .jsonl, .csv, .parquet or .tar file, or a folder. For
    objectives that learn from real images, each training row names one (docs/cache.md)."""
    cache: str = CACHE
    """Folder for encoded prompts and images; outside `path`."""


ImageSource = Annotated[LabSource | FolderSource, Field(discriminator="kind")]
"""With target images, on which teachers can be trained."""
Source = Annotated[LabSource | FolderSource | PromptSource, Field(discriminator="kind")]


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

    def trained(self) -> dict[Task, float]:
        """The tasks that have a share of the mixture, in its order, with their weights."""
        return {task: weight for task, weight in self.mixture.items() if weight > 0}


class When(Strict):
    task: Task | None = None
    category: str | None = None


LambdaTable = Annotated[tuple[dict[str, float], ...], Field(min_length=1)]
"""lambda[k][m]: teacher weights, one row per student step k, or a single row for all steps."""


class Adaptive(Strict):
    """lambda begins at `start` and moves to the rule's `weights` as fast as the measured mismatch
    of the teachers that gain weight allows; the rule is in docs/stability.md."""

    start: LambdaTable
    """lambda at the first update: the anchor."""
    rate: Annotated[float, Field(gt=0.0, le=1.0)] = 0.01
    """Largest part of the way per update; 0.01 takes at least 100 updates."""
    tolerance: Positive = 1.0
    """Full speed up to this mismatch of the gaining teachers, in mismatches of the losing ones."""
    limit: Positive = 1.25
    """No progress at this ratio; above it lambda goes back."""
    decay: Fraction = 0.8
    """Of the running average of the mismatch, per measurement; 0 takes the last one alone."""
    every: Count = 4
    """A teacher whose lambda is 0 at a step is still measured there every so many updates."""


class GuidanceRule(Strict):
    when: When = When()
    """The conditions this rule is for; what is left out matches everything."""
    weights: LambdaTable
    """lambda; where `adaptive` is given, the table that it moves to."""
    adaptive: Adaptive | None = None
    """Move towards `weights` during training; null = `weights` from the first update on."""


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


class Gan(Strict):
    student_weight: Share = 0.005
    """Weight of -log D in the student's loss (5e-3 in DMD2's SDXL runs)."""
    fake_weight: Share = 0.01
    """Weight of the discriminator's loss in the fake score's (1e-2 there)."""
    renoise: Renoise = Renoise(low=0.0, high=1.0)
    """Times at which real images and the student's are told apart."""


class Dmd2(Strict):
    kind: Literal["dmd2"]
    renoise: Renoise = Renoise()
    """As in dmd."""
    normaliser: Literal["teacher", "none"] = "teacher"
    fake_updates: Count = 5
    gan: Gan = Gan()
    """A discriminator on features of the fake score; its real images are the data's own targets."""


class DecoupledDmd(Strict):
    kind: Literal["decoupled_dmd"]
    renoise: Renoise = Renoise()
    """Times of distribution matching, and of the fake score's training."""
    augmentation_renoise: Renoise = Renoise()
    """Times of CFG augmentation, before the bound of `below_step`."""
    below_step: bool = True
    """Augmentation never noisier than the student's own time t_k (tau_CA > t in the paper)."""
    matching_weight: Share = 1.0
    augmentation_weight: Share = 1.0
    """Both 1: their sum is the guided DMD gradient, with a time for each; 0 leaves a term out."""
    normaliser: Literal["teacher", "none"] = "teacher"
    fake_updates: Count = 5


class Tdm(Strict):
    kind: Literal["tdm"]
    low: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.02
    high: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.98
    """Step k compares scores at times uniform in the part of [t_{k+1}, t_k] inside [low, high]."""
    normaliser: Literal["huber", "teacher", "none"] = "huber"
    """huber: the paper's pseudo-Huber surrogate; the others as in dmd."""
    fake_updates: Count = 5


class Consistency(Strict):
    kind: Literal["consistency"]
    substeps: Count = 10
    """Teacher steps into which each student step is divided; 10 x 4 are the 40 of the teachers."""


class TrajectoryRegression(Strict):
    kind: Literal["trajectory_regression"]
    substeps: Count = 10
    """Teacher steps from one student time to the next."""
    trajectories: Count = 1024
    """Walks of the teacher to keep and train on; more updates than that go over them again."""


Objective = Annotated[
    Dmd | Dmd2 | DecoupledDmd | Tdm | Consistency | TrajectoryRegression,
    Field(discriminator="kind"),
]

WITH_REAL_IMAGES = (Dmd2, Consistency)
"""Objectives that learn from the data's own images (targets), not from conditions alone."""


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


class Probe(Strict):
    """Images drawn during training and measured beside the base teacher's: `evals.probe`."""

    every: Count = 50
    """Updates between two probes; the last update is always one."""
    steps: Annotated[tuple[Count, ...], Field(min_length=1)] | None = None
    """Probe after exactly these updates instead."""
    per_category: Count = 2
    """Cases per category, from the training split."""
    seeds: Annotated[int, Field(ge=2)] = 4
    """Noises per case; diversity is the distance between their images."""


class Log(Strict):
    every: Count = 1
    sample_every: Count = 50
    save_every: Count = 50
    sample_seeds: Count = 8
    """Number of images in the sample grid."""
    probe: Probe | None = Probe()
    """null = off."""


class EndpointJudge(Strict):
    """A vision-language model that scores the images: docs/judge.md."""

    kind: Literal["endpoint"]
    url: Annotated[str, Field(min_length=1)]
    """OpenAI-compatible, such as http://localhost:8000/v1."""
    model: Annotated[str, Field(min_length=1)]
    """Its name at the endpoint."""
    key_env: Annotated[str, Field(pattern=r"^[A-Z_][A-Z0-9_]*$")] | None = None
    """Environment variable with the key; null = none is needed. A key is never in a recipe."""
    answer: Literal["json_schema", "json_object", "text"] = "json_schema"
    """How the endpoint is held to the form of the answer; it is checked in any case."""
    repeats: Count = 1
    """Judgements of each image, of which the mean counts."""
    parallel: Annotated[int, Field(ge=1, le=256)] = 4
    """Requests at a time."""
    timeout: Positive = 180.0
    """Seconds without an answer until a request is sent again."""
    temperature: Share | None = 0.0
    """null = not sent, for models that take none."""
    seed: int | None = 0
    """Another one for each judgement of an image; null = not sent."""
    request: dict[str, JsonValue] = {}
    """Further fields of every request, such as max_completion_tokens or reasoning_effort."""


IMAGES_AT_ONCE = 32
"""Default of `evaluation.batch`, for images of the lab's size."""


class Evaluation(Strict):
    per_category: Count = 24
    """Cases per category, from the evaluation split."""
    seed: Seed = 1000
    seeds_per_case: Count = 1
    batch: Count | None = None
    """Images drawn at once, here, in sample grids and in probes; null = 32, for real models
    budget.micro_batch. It decides memory and not what an image shows."""
    models: Annotated[tuple[str, ...], Field(min_length=1)] = ("teacher", "teacher_cut", "student")
    """`student`, `teacher`, `teacher_cut` (at the student's NFE); `teacher:<name>` for another."""
    judge: EndpointJudge | None = None
    """null = the world's own judge: lab and folder have one, real models none."""


class Recipe(Strict):
    name: Word
    seed: Seed = 0
    model: Model
    teachers: Annotated[dict[Word, Teacher], Field(min_length=1)]
    student: Student
    data: Data
    guidance: Annotated[tuple[GuidanceRule, ...], Field(min_length=1)]
    """First matching rule wins; every condition needs one."""
    objective: Objective
    optim: Optim = Optim()
    ema: Ema | None = Ema()
    """Averaged student weights, which are the result; null = off."""
    budget: Budget
    precision: Literal["bf16", "fp32"] = "bf16"
    log: Log = Log()
    evaluation: Evaluation = Evaluation()

    @property
    def images_at_once(self) -> int:
        """`evaluation.batch`, or what it is by default."""
        if self.evaluation.batch is not None:
            return self.evaluation.batch
        return self.budget.micro_batch if self.model.is_real else IMAGES_AT_ONCE

    def content_hash(self) -> str:
        """16 hex digits over every field that decides the student: not name, log or evaluation, and
        not how the cast lies on the devices."""
        content = self.model_dump(mode="json", exclude={"name", "log", "evaluation"})
        if content["model"]["cast"]:
            del content["model"]["cast"]["shard"]
        return hash_of(content, content["data"]["source"])


def hash_of(content: dict[str, Any], source: dict[str, Any]) -> str:
    """Of everything but the place of the cache. It counts as the usual one, so that runs which
    began when it was part of the hash can be resumed."""
    if "cache" in source:
        source["cache"] = CACHE
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
