"""Prompts and edit instructions from files as a domain of real models. It has no judge of its own.

Every prompt is encoded once by the pipeline's own encoders and kept (`data.conditions`); a teacher
with a template or a negative prompt of its own has readings of its own.
"""

import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewstep.core.types import Task
from fewstep.data.conditions import ConditionStore, Encoding, Source, release_memory
from fewstep.data.latents import to_uint8
from fewstep.data.memo import Memo
from fewstep.data.promptfiles import PromptRecord, conversions, read_prompts
from fewstep.data.rows import Split
from fewstep.data.targets import changes, refuse_other_shapes
from fewstep.data.tensorstore import TensorStore
from fewstep.domain import Case, Images, Verdict
from fewstep.errors import DataError, RecipeError
from fewstep.models.families.contract import Family
from fewstep.models.readings import Readings, readings_of
from fewstep.models.roles import STUDENT
from fewstep.real.pipelines import Pipelines, Place
from fewstep.recipe.available import TARGET_KEYS
from fewstep.recipe.schema import WITH_REAL_IMAGES, PromptSource, Recipe

UNSCORED = "the recipe names no evaluation.judge"
DEFAULT_NEGATIVE = {"qwen_image": " ", "qwen_image_21": " "}
"""What a family's guidance moves away from; the empty prompt in the others."""


@dataclass(frozen=True)
class Pixels:
    """A source image that is in memory."""

    image: np.ndarray
    name: str = "source"

    @property
    def digest(self) -> str:
        header = repr(self.image.shape).encode()
        return blake2b(header + self.image.tobytes(), digest_size=16).hexdigest()

    def open(self) -> Image.Image:
        return Image.fromarray(self.image)


@dataclass(frozen=True)
class Prompt:
    """What a condition is made of, as `data.conditions.Sample` has it."""

    prompt: str
    sources: tuple[Source, ...] = ()
    target: Source | None = None


class Reading(NamedTuple):
    """How a prompt is read; readers with equal readings share conditions."""

    template: str
    negative: str | None


class Job(NamedTuple):
    """One reading of some prompts, to be encoded."""

    store: ConditionStore
    samples: list[Prompt]
    open_encoders: Callable[[], Family]
    folder: Path
    """Of the pipeline."""


@dataclass(frozen=True)
class RealPool:
    """Training prompts of one task and category; conditions come from the cache as they are asked
    for."""

    task: Task
    category: str
    prompts: tuple[Prompt, ...]
    domain: "RealDomain" = field(repr=False)

    def __len__(self) -> int:
        return len(self.prompts)

    def gather(
        self, pools: "Sequence[RealPool]", indices: Sequence[int], /
    ) -> tuple[Readings, Tensor | None]:
        chosen = [pool.prompts[i] for pool, i in zip(pools, indices, strict=True)]
        readings = self.domain.take(self.task, chosen)
        if chosen[0].target is None:
            return readings, None
        return readings, self.domain.targets(self.task, chosen)


class RealDomain:
    """The prompts of a recipe. Whatever it will ask for is encoded at once, when this is made, so
    that text encoders and networks are not in memory together."""

    def __init__(self, recipe: Recipe, pipelines: Pipelines, *, prepare: bool = True) -> None:
        source = recipe.data.source
        assert isinstance(source, PromptSource)
        cache = Path(source.cache).expanduser()
        self.recipe, self.pipelines, self.path = recipe, pipelines, source.path
        self.memo = Memo(cache / "seen.json")
        self.with_images = isinstance(recipe.objective, WITH_REAL_IMAGES)
        self.records = read_prompts(source.path, self.memo, targets=self.with_images)
        self.tensors = TensorStore(cache / "conditions")
        self._stores: dict[tuple[Task, str | None], ConditionStore] = {}
        self._shown: dict[tuple[str, str], Prompt] = {}
        if prepare:
            self.prepare()

    # --- what is asked of a domain ---

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return tuple(self._family.noise_shape(1, self.pipelines.model.size)[1:])

    @property
    def image_size(self) -> None:
        return None

    @property
    def judge_name(self) -> str:
        return "none"

    def pool(self, category: str, size: int, seed: int, *, task: Task, targets: bool) -> RealPool:
        """`size` training prompts in a seeded order; `targets` adds their real images.

        DataError where there are fewer, where one has no image, or an edit's has another shape.
        """
        chosen = self._chosen(task, "train", category, size, seed)
        if size > len(chosen):
            raise DataError(
                f"data.pools: {size} prompts of {task}/{category} asked for, {self.path} has "
                f"{len(chosen)}; use size: {len(chosen)} or less"
            )
        if targets:
            self._check_targets(task, category, chosen)
        prompts = tuple(_prompt_of(record, targets=targets) for record in chosen)
        return RealPool(task, category, prompts, self)

    def _check_targets(self, task: Task, category: str, chosen: Sequence[PromptRecord]) -> None:
        bare = [record for record in chosen if record.target is None]
        if bare:
            names = " or ".join(f"'{name}'" for name in TARGET_KEYS[task])
            raise DataError(
                f"{self.path}: {len(bare)} of {len(chosen)} rows of {task}/{category} have no real "
                f"image, which the objective {self.recipe.objective.kind} learns from (the first: "
                f"{bare[0].where}); name it as {names}, or use dmd, decoupled_dmd, tdm or "
                f"trajectory_regression"
            )
        refuse_other_shapes(Path(self.path), chosen, self.pipelines.model.size)

    def cases(
        self, task: Task, category: str, count: int, seed: int, *, evaluation: bool = True
    ) -> list[Case]:
        """Up to `count` held-out prompts; or the first of the training pool, which are encoded
        anyway. An edit of several images shows the first of them."""
        split: Split = "eval" if evaluation else "train"
        own = seed if evaluation else self.recipe.seed
        found = []
        for i, record in enumerate(self._chosen(task, split, category, count, own)):
            prompt, image = _prompt_of(record), None
            if prompt.sources:
                image = np.asarray(prompt.sources[0].open())
                self._shown[prompt.prompt, Pixels(image).digest] = prompt
            name = f"{task}-{category}-{i:04d}"
            found.append(Case(name, task, category, prompt.prompt, seed + i, None, image))
        return found

    def condition(self, prompts: Sequence[str], sources: Sequence[np.ndarray] | None) -> Readings:
        task: Task = "t2i" if sources is None else "edit"
        if task not in self.pipelines.places:
            able = " and ".join(self.pipelines.places)
            raise RecipeError(
                f"the family {self.pipelines.model.family!r} with these folders does {able} only",
                hint=f"ask for {able}, or give a model.edit_path that edits",
            )
        if sources is None:
            return self.take(task, [Prompt(prompt) for prompt in prompts])
        given = [(prompt, Pixels(image)) for prompt, image in zip(prompts, sources, strict=True)]
        known = [self._shown.get((text, pixels.digest)) for text, pixels in given]
        return self.take(task, [k or Prompt(t, (p,)) for k, (t, p) in zip(known, given)])

    def noise(self, seed: int) -> Tensor:
        """As the pipeline draws it from a generator of the CPU with this seed, in float32."""
        generator = torch.Generator().manual_seed(seed)
        return self._family.noise(1, self.pipelines.model.size, generator)[0].float().cpu()

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Images:
        """Opaque: what a pipeline makes of transparency is left out."""
        family, size = self._family, self.pipelines.model.size
        parts = latents.to(self.pipelines.device).split(1)
        return np.concatenate([to_uint8(family.decode(part, size)[:, :3]) for part in parts])

    def judge(self, images: Images, cases: Sequence[Case]) -> list[Verdict]:
        return [Verdict(None, {}, (), unscored=UNSCORED) for _ in cases]

    # --- encoding ---

    def prepare(self) -> None:
        """Encode what is wanted, as far as that has not been done before."""
        self.encode(self.wanted())

    def wanted(self) -> dict[Task, list[Prompt]]:
        """The prompts of the pools and of the evaluation's cases."""
        data, evaluation = self.recipe.data, self.recipe.evaluation
        wanted: dict[Task, list[Prompt]] = {}
        for pool in data.pools.values():
            made = self.pool(
                pool.category, pool.size, self.recipe.seed, task=pool.task, targets=self.with_images
            )
            wanted.setdefault(pool.task, []).extend(made.prompts)
        count, seed = evaluation.per_category, evaluation.seed
        for task, category in data.conditions():
            wanted[task] += map(_prompt_of, self._chosen(task, "eval", category, count, seed))
        return wanted

    def notices(self) -> list[str]:
        """What is done to the images of the files, for the user to know."""
        return conversions(self.records) + changes(self.records, self.pipelines.model.size)

    def encode(self, wanted: Mapping[Task, Sequence[Prompt]]) -> None:
        """Every reading of these prompts into the cache; encoders are opened only if needed."""
        for job in self.jobs(wanted):
            job.store.fill(job.samples, job.open_encoders)

    def jobs(self, wanted: Mapping[Task, Sequence[Prompt]]) -> Iterator[Job]:
        """Every reading of these prompts, those of one pipeline after the other. The encoders of a
        pipeline are opened once, and have left memory when the next job is of another."""
        for place in dict.fromkeys(self.pipelines.places.values()):
            opened: list[Family] = []

            def open_once(place: Place = place, opened: list[Family] = opened) -> Family:
                if not opened:
                    opened.append(self.pipelines.encoders(place))
                return opened[0]

            for task, prompts in wanted.items():
                if self.pipelines.places[task] == place:
                    for reading in dict.fromkeys(self._readers(task).values()):
                        samples = [_as_read(prompt, reading) for prompt in prompts]
                        store = self._store(task, reading.negative)
                        yield Job(store, samples, open_once, self.pipelines.folder(place))
            opened.clear()
            release_memory()

    def take(self, task: Task, prompts: Sequence[Prompt]) -> Readings:
        """Conditions for every reader of the task; what is new is encoded first."""
        readers = self._readers(task)
        for reading in set(readers.values()):
            samples = [_as_read(prompt, reading) for prompt in prompts]
            if self._store(task, reading.negative).missing(samples):
                self.encode({task: prompts})
        rows = []
        for prompt in prompts:
            read = {
                reading: self._store(task, reading.negative).take([_as_read(prompt, reading)])
                for reading in set(readers.values())
            }
            rows.append({reader: read[reading] for reader, reading in readers.items()})
        return readings_of(rows)

    def targets(self, task: Task, prompts: Sequence[Prompt]) -> Tensor:
        """x_0 of the real images in float32; `take` has encoded what was new."""
        return self._store(task, None).targets(prompts)

    def _readers(self, task: Task) -> dict[str, Reading]:
        """The student reads a prompt as it is; a teacher without guidance needs no negative."""
        readers = {STUDENT: Reading("{prompt}", None)}
        usual = DEFAULT_NEGATIVE.get(self.recipe.model.family, "")
        for name, teacher in self.recipe.teachers.items():
            if task in teacher.tasks:
                avoided = usual if teacher.negative is None else teacher.negative
                guided = teacher.cfg[task] != 1
                template = teacher.template or "{prompt}"
                readers[name] = Reading(template, avoided if guided else None)
        return readers

    def _store(self, task: Task, negative: str | None) -> ConditionStore:
        if (task, negative) not in self._stores:
            model, folder = self.pipelines.model, self.pipelines.folder(self.pipelines.places[task])
            encoding = Encoding.of(
                folder,
                size=model.size,
                dtype=self.pipelines.dtype,
                negative=negative,
                memo=self.memo,
            )
            if model.source_resolution is not None:
                encoding = replace(encoding, code=f"{encoding.code}-{model.source_resolution}")
            self._stores[task, negative] = ConditionStore(self.tensors, encoding)
        return self._stores[task, negative]

    @property
    def _family(self) -> Family:
        return self.pipelines.family("base")

    def _chosen(
        self, task: Task, split: Split, category: str, count: int, seed: int
    ) -> list[PromptRecord]:
        """Up to `count`, in an order that depends on the seed alone."""
        records = self._records(task, split, category)
        rng = np.random.default_rng([seed, zlib.crc32(f"{task}/{category}".encode())])
        order = rng.permutation(len(records))[:count]
        return [records[i] for i in order]

    def _records(self, task: Task, split: Split, category: str) -> list[PromptRecord]:
        same = [r for r in self.records if (r.task, r.split) == (task, split)]
        found = [record for record in same if record.category == category]
        if not found:
            known = Counter(record.category for record in same)
            listed = ", ".join(f"{name} ({n})" for name, n in known.items()) or "none"
            raise DataError(
                f"{self.path}: no {split} prompts of {task}/{category}; there are {listed}; a "
                f"row's `category` and `split` say where it belongs"
            )
        return found


def _prompt_of(record: PromptRecord, *, targets: bool = False) -> Prompt:
    return Prompt(record.prompt, record.sources, record.target if targets else None)


def _as_read(prompt: Prompt, reading: Reading) -> Prompt:
    return replace(prompt, prompt=reading.template.replace("{prompt}", prompt.prompt))
