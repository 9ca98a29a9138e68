"""What a plan says of a cast that is split over devices, and what a batch does for its company."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.core.types import Batch
from fewstep.errors import RecipeError, RunError
from fewstep.models.cast import make_cast
from fewstep.recipe.cost import Memory, estimate_memory
from fewstep.recipe.facts import Facts, Machine, ModelSize, Passes
from fewstep.recipe.families import PipelineFacts
from fewstep.recipe.load import load_recipe
from fewstep.recipe.plan import make_plan
from fewstep.train.adaptive import Schedule
from fewstep.train.methods import augment
from fewstep.train.step import check_finite, compare_scores

from .ranked import ROOT
from .test_loop import SHAPE, tiny_model, tiny_pool, tiny_recipe

RECIPE = ROOT / "recipes/qwen_image_21/one_80gb.yaml"
GB = 10**9
PASSES = Passes(
    tokens=100,
    teacher_flop=2e12,
    student_flop=2e12,
    training_flop=7e12,
    forward_bytes=GB,
    kept_bytes=3 * GB,
    training_bytes=4 * GB,
    decoder_bytes=GB,
)


def size(kind: str) -> ModelSize:
    """7 G parameters in blocks of 0.2 G, 1 G outside; LoRAs of 0.1 G."""
    wide = 4 if kind == "full" else 2
    return ModelSize(
        params=7 * GB,
        image_tokens=1,
        text_tokens=1,
        source_tokens=1,
        trained=7 * GB if kind == "full" else GB // 10,
        networks=1,
        autoencoder=GB // 2,
        block=wide * GB // 5,
        outside=wide * GB,
        passes={"t2i": PASSES},
    )


def memory(kind: str, devices: int, **cast: Any) -> Memory:
    cast = {"kind": kind, "checkpointing": True, "shard": True} | cast
    recipe = load_recipe(RECIPE, {"model.cast": str(cast).replace("True", "true")})
    return estimate_memory(recipe, teachers=1, tasks=("t2i",), model=size(kind), devices=devices)


def test_a_split_full_cast_by_hand() -> None:
    """Float32: weights, gradient, two moments, average are 5 x 28 GB, the fake score's 3 x 28."""
    found, whole = memory("full", 8), memory("full", 1)
    assert (whole.student, whole.fake, whole.teachers) == (140 * GB, 84 * GB, 14 * GB)
    assert found.student == whole.student // 8 and found.fake == whole.fake // 8
    assert found.teachers == whole.teachers // 8 and found.autoencoder == GB
    assert found.gathered == 2 * (4 + 2 * 0.8) * GB and whole.gathered == 0
    copies = 0.4 * GB  # of a block in 16 bit, for autocast
    assert found.activations == 4 * GB + copies and whole.activations == 28 * GB
    rest = found.gathered + found.activations
    assert found.margin == 2**30 + round(0.1 * rest)
    assert found.total == (140 + 84 + 14) * GB // 8 + GB + rest + found.margin
    assert found.evaluation == whole.evaluation == 0
    alone = (14 + 28 + 1.1 + 1) * GB + 2**30  # a student and the frozen network, whole
    assert memory("full", 16).evaluation == pytest.approx(alone) and alone < found.total


def test_without_checkpointing_autocast_keeps_all_weights_in_16_bit() -> None:
    kept = memory("full", 8, checkpointing=False).activations - memory("full", 8).activations
    assert kept == (14 - 0.4) * GB


def test_a_split_lora_cast_by_hand() -> None:
    found, whole = memory("lora", 4), memory("lora", 1)
    assert found.student == whole.student // 4 == GB // 2
    assert found.teachers == whole.teachers // 4 == 14 * GB // 4
    assert found.gathered == (2 + 2 * 0.4) * GB
    assert found.evaluation > found.total, "the whole network does not fit where its parts do"


def planned(devices: int, **cast: Any) -> Any:
    own = PipelineFacts(kind="QwenImage21Pipeline", network="QwenImage21Transformer2DModel")
    facts = Facts(model=replace(size("lora"), passes={}), pipelines={"base": own})
    changes = {"model.cast": str({"kind": "lora"} | cast).replace("True", "true")}
    return make_plan(load_recipe(RECIPE, changes), Machine(devices=devices), facts)


def test_plans_say_how_the_cast_lies() -> None:
    assert "8 devices, over which the cast is split, when" in planned(8, shard=True).notes[-1]
    assert "8 devices, each with the whole cast, when" in planned(8).notes[-1]
    assert planned(1, shard=True).notes[-1] == "model.cast.shard changes nothing on one device"
    assert planned(1).notes == ()


def test_compiled_blocks_are_not_split() -> None:
    with pytest.raises(
        RecipeError, match=r"model\.cast\.compile.*sharded network were never tried"
    ):
        planned(8, shard=True, compile=True)


def test_how_the_cast_lies_is_no_part_of_a_recipes_hash() -> None:
    hashes = {planned(8, **cast).recipe_hash for cast in ({}, {"shard": True})}
    assert len(hashes) == 1 and planned(8, rank=8).recipe_hash not in hashes


# --- company --------------------------------------------------------------------------------------

ADAPTIVE = [
    {
        "when": {"category": "text"},
        "weights": [{"text": 1.0}],
        "adaptive": {"start": [{"base": 1.0}], "every": 1},
    },
    {"weights": [{"base": 1.0}]},
]


class Counted:
    """A teacher that counts how often it is asked."""

    def __init__(self, value: float) -> None:
        self.value, self.asked = value, 0

    def __call__(self, x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        self.asked += 1
        return self.value * x_t


def batch(company: tuple[str, ...] = (), **about: Any) -> Batch:
    """Two portraits."""
    pool = tiny_pool("t2i", "portrait", 0)
    cond, _ = pool.gather([pool, pool], [0, 1])
    return Batch("t2i", ("portrait", "portrait"), cond, SHAPE, company=company, **about)


@pytest.mark.parametrize("what", ["scores", "augmentation", "adaptive"])
def test_teachers_of_the_company_are_asked_and_not_heard(what: str) -> None:
    """The teacher of texts, which another device asks at the last step, or measures."""
    changes: dict[str, Any] = {"guidance": ADAPTIVE} if what == "adaptive" else {}
    recipe = tiny_recipe(**changes)
    plan = make_plan(recipe, Machine(), Facts(bundled=frozenset({"base", "text"})))
    k = 0 if what == "adaptive" else 3
    x_t = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.7, 0.3])
    found = []
    for company in ((), ("portrait", "portrait", "text", "text")):
        teachers = {"base": Counted(0.5), "text": Counted(2.0)}
        cast = replace(make_cast(tiny_model(0), {}), teachers=teachers)
        plan_now = Schedule(plan).at(0)
        if what == "augmentation":
            found.append({"": augment(cast, batch(company), k, plan_now, x_t, t)})
        else:
            score = compare_scores(cast, batch(company), k, plan_now, x_t, t)
            found.append({"real": score.real, **score.answers})
        assert (teachers["text"].asked > 0) == bool(company)
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_a_value_that_is_not_finite_elsewhere_stops_this_device_too() -> None:
    fine = torch.zeros(2)
    check_finite(fine, "loss", batch(anywhere=lambda here: here))
    with pytest.raises(RunError, match="the loss is not finite"):
        check_finite(fine, "loss", batch(anywhere=lambda here: True))
