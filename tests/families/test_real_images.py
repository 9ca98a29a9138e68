"""DMD2 and consistency of real models: their real images, the discriminator, whole updates.

Tiny pipelines of the real classes, T2I and edits: Qwen-Image with Qwen-Image-Edit-Plus.
"""

import json
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fewstep.commands.opening import open_ensemble
from fewstep.core.process import add_noise
from fewstep.core.types import Task
from fewstep.errors import DataError
from fewstep.models.families.features import features
from fewstep.models.readings import Readings
from fewstep.models.roles import STUDENT, FamilyRole
from fewstep.real.domain import RealDomain
from fewstep.recipe.facts import Machine
from fewstep.recipe.load import load_recipe
from fewstep.recipe.plan import make_plan
from fewstep.train import loop
from fewstep.train.methods import RealBatch

from .fixtures import SIZE, apart, source
from .folders import write_prompts
from .test_distil import distilled, folder, recipe_of, tiny, write  # noqa: F401

DMD2 = {"kind": "dmd2", "fake_updates": 1}
CONSISTENCY = {"kind": "consistency", "substeps": 3}
TASKS = ("t2i", "edit")


def write_pairs(path: Path) -> Path:
    """`write_prompts` with a real image for every row that is trained on, each another one."""
    write_prompts(path)
    seed = 10
    for name, key in (("captions.jsonl", "file"), ("edits.jsonl", "target")):
        rows = [json.loads(line) for line in (path / name).read_text().splitlines()]
        for row in rows:
            if row["split"] == "train":
                row[key] = f"real-{seed}.png"
                source(SIZE[1] + 4, SIZE[0], seed).save(path / row[key])
                seed += 1
        (path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images")
    write_pairs(path / "prompts")
    return path


@pytest.fixture(scope="module")
def start(place: Path, folder: Any) -> Callable[..., loop.Distillation]:  # noqa: F811
    """A distillation before its first update; roles moved off their common start."""

    def make(objective: dict[str, Any], family: str = "qwen_image") -> loop.Distillation:
        described = recipe_of(place, folder, family, objective=objective)
        recipe = load_recipe(write(described, place / f"{objective['kind']}.yaml"))
        plan = make_plan(recipe, Machine())
        ensemble = open_ensemble(recipe)
        domain = ensemble.open_domain()
        pools = {
            name: domain.pool(p.category, p.size, recipe.seed, task=p.task, targets=True)
            for name, p in recipe.data.pools.items()
        }
        cast = ensemble.cast(sorted(recipe.teachers))
        state = loop.Distillation(cast, pools, recipe, plan, domain.sample_shape)
        generator = torch.Generator().manual_seed(4)
        for role in (cast.student, cast.fake):
            for parameter in role.parameters():
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        return state

    return cache(lambda key: make(json.loads(key)))  # type: ignore[return-value]


def started(start: Any, objective: dict[str, Any]) -> loop.Distillation:
    return start(json.dumps(objective))


def batch_of(d: loop.Distillation, task: str) -> RealBatch:
    while True:
        batch, _ = d.draw("student")
        if batch.task == task:
            assert isinstance(batch, RealBatch)
            return batch


def draws(seed: int = 6) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def slopes(role: Any, loss: Tensor) -> dict[str, Tensor]:
    for parameter in role.parameters():
        parameter.grad = None
    loss.backward()
    found = {n: p.grad.clone() for n, p in role.named_parameters() if p.grad is not None}
    for parameter in role.parameters():
        parameter.grad = None
    assert len(found) > 10
    return found


def alike(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    largest = max(g.abs().max().item() for g in wanted.values())
    assert largest > 0
    assert all(apart(g, wanted[key]) <= 2e-4 * largest for key, g in found.items())


def t_of(value: float, batch: Any) -> Tensor:
    return torch.full((len(batch),), value)


# --- real images ----------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_a_batch_has_the_real_image_of_each_row(start: Any, task: str) -> None:
    """The file's own middle through the pipeline's own autoencoder, in the order of the batch."""
    d = started(start, DMD2)
    pools = [pool for pool in d.pools.values() if pool.task == task]
    picked: list[Any] = [(pools[0], 2), (pools[-1], 0), (pools[0], 1)]
    cond, target = pools[0].gather([pool for pool, _ in picked], [i for _, i in picked])
    assert isinstance(cond, Readings) and target is not None and target.dtype == torch.float32
    domain = pools[0].domain  # type: ignore[attr-defined]
    assert isinstance(domain, RealDomain)
    family = domain.pipelines.family("edit" if task == "edit" else "base")
    lists = Path(domain.path)
    rows = [
        json.loads(line)
        for name in ("captions.jsonl", "edits.jsonl")
        for line in (lists / name).read_text().splitlines()
    ]
    for (pool, i), found in zip(picked, target, strict=True):
        prompt = pool.prompts[i].prompt
        (row,) = [r for r in rows if prompt in (r.get("prompt"), r.get("instruction"))]
        image = np.asarray(Image.open(lists / (row.get("file") or row["target"])))[:, 2:-2]
        pixels = torch.from_numpy(image.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
        assert apart(family.encode_image(pixels)[0], found) <= 1e-5
    assert apart(target[0], target[2]) > 0.01


def test_rows_without_an_image_are_refused_before_a_weight_is_loaded(
    place: Path,
    folder: Any,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fewstep.real.pipelines.open_family", None)
    monkeypatch.setattr("fewstep.real.pipelines.open_encoders", None)
    write_prompts(tmp_path / "bare")
    recipe = recipe_of(place, folder, "qwen_image", objective=CONSISTENCY)
    recipe["data"]["source"]["path"] = str(tmp_path / "bare")
    with pytest.raises(DataError, match=r"3 of 3 rows of edit/object have no real image.*'target'"):
        open_ensemble(load_recipe(write(recipe, tmp_path / "a.yaml"))).open_domain()
    recipe["data"]["source"]["path"] = str(write_pairs(tmp_path / "square"))
    for file in (tmp_path / "square").glob("real-*.png"):
        source(64, 64, 1).save(file)
    with pytest.raises(DataError, match=r"is 64x64, of which 33% would be cut off"):
        open_ensemble(load_recipe(write(recipe, tmp_path / "b.yaml"))).open_domain()


# --- DMD2 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_dmd2_adds_the_slope_of_minus_log_d(start: Any, task: str) -> None:
    """The difference to weight 0 is weight * d(-log D)/d theta, by autograd through everything."""
    weight, k = 0.7, 1
    d = started(start, DMD2 | {"gan": {"student_weight": weight}})
    bare = started(start, DMD2 | {"gan": {"student_weight": 0.0}})
    batch, student, head = batch_of(d, task), d.cast.student, d.method.head
    assert head is not None
    others = [*d.cast.fake.parameters(), *head.parameters()]
    found, plain = (
        slopes(
            each.cast.student,
            each.method.student(each.cast, batch, k, each.plan, each.recipe, draws())[0],
        )
        for each in (d, bare)
    )
    assert all(p.grad is None for p in others)
    g = draws()
    x = torch.randn(len(batch), *d.shape, generator=g)
    with torch.no_grad():
        for now, then in pairwise(d.plan.grid[: k + 1]):
            x = x + (then - now) * (x - student(x, t_of(now, batch), batch.cond)) / now
    x = student(x, t_of(d.plan.grid[k], batch), batch.cond)
    torch.rand(len(batch), generator=g)  # t and eps of DMD
    torch.randn(len(batch), *d.shape, generator=g)
    t = torch.rand(len(batch), generator=g)
    eps = torch.randn(len(batch), *d.shape, generator=g)
    fake = d.cast.fake
    assert isinstance(fake, FamilyRole)
    hidden = []
    for i in range(len(batch)):  # one by one, with the fake score's adapter in place
        one = slice(i, i + 1)
        cond = batch.cond.rows[i][STUDENT]  # type: ignore[attr-defined]
        with fake.shared.playing("fake"):
            x_t = (1 - t[i]) * x[one] + t[i] * eps[one]
            hidden.append(features(fake.family, x_t, t[one], cond, fake.shared.network))
    logits = head(torch.cat(hidden))
    added = slopes(student, -weight * torch.sigmoid(logits).log().mean())
    for parameter in others:  # the reference goes through them
        parameter.grad = None
    alike({key: found[key] - plain[key] for key in found}, added)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_the_discriminator_learns_the_rows_own_images(start: Any, task: str) -> None:
    """Its loss falls, on two draws of noise in turn; the student is left alone."""
    d = started(start, DMD2 | {"gan": {"fake_weight": 1.0}})
    batch, head, update = batch_of(d, task), d.method.head, d.method.fake
    assert head is not None and update is not None
    optimiser = torch.optim.Adam([*head.parameters(), *d.cast.fake.parameters()], lr=1e-2)
    losses = []
    for i in range(30):
        loss, metrics = update(d.cast, batch, 3, d.plan, d.recipe, draws(i % 2))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(metrics["loss/gan/head"])
    assert losses[0] > 1 and losses[-1] < 0.6 * losses[0], losses
    assert all(p.grad is None for p in d.cast.student.parameters())


# --- consistency ----------------------------------------------------------------------------------


def guided_by_hand(teacher: FamilyRole, x: Tensor, t: Tensor, cond: Any, scale: float) -> Tensor:
    """x_0 of the frozen network under Qwen-Image's rule: each token has the norm of cond."""
    family, network = teacher.family, teacher.shared.network
    v, u = (family.velocity(x, t, branch, network) for branch in (cond, cond.without_text()))
    guided = u + scale * (v - u)
    guided = guided * v.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
    return x - t.view(-1, 1, 1) * guided


@pytest.mark.parametrize("task", TASKS)
def test_consistency_update_by_hand(start: Any, task: Task) -> None:
    """k = 3, the phase down to data: the guided teacher's own answer is the last target."""
    d = started(start, CONSISTENCY)
    batch, student = batch_of(d, task), d.cast.student
    categories = ("object" if task == "edit" else "scene",) * len(batch)  # one teacher each
    batch = RealBatch(task, categories, batch.cond, batch.shape, batch.target)
    name = "editor" if task == "edit" else "base"
    scale = d.recipe.teachers[name].cfg[task]
    teacher = d.cast.teachers[name]
    assert isinstance(teacher, FamilyRole)
    g, b = draws(), len(batch)
    n = torch.randint(0, 3, (b,), generator=g)
    eps = torch.randn(b, *d.shape, generator=g)
    times = torch.tensor([0.5, 1 / 3, 1 / 6, 0.0])  # uniform: the teachers have shift 1
    t, t_next = times[n], times[n + 1]
    x_t = add_noise(batch.target, eps, t)
    landing = student(x_t, t, batch.cond)
    with torch.no_grad():
        guided = torch.cat(
            [
                guided_by_hand(teacher, x_t[i : i + 1], t[i : i + 1], row[name], scale)
                for i, row in enumerate(batch.cond.rows)  # type: ignore[attr-defined]
            ]
        )
        step = ((t_next - t) / t).view(-1, 1, 1)
        x_next = x_t + step * (x_t - guided)
        answer = student(x_next, t_next, batch.cond)
        target = torch.where(t_next.view(-1, 1, 1) > 0, answer, x_next)
    wanted = (landing - target).square().mean()
    loss, _ = d.method.student(d.cast, batch, 3, d.plan, d.recipe, draws())
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-6)
    alike(slopes(student, loss), slopes(student, wanted))


@pytest.mark.slow
def test_the_consistency_loss_falls(start: Any) -> None:
    d = started(start, CONSISTENCY | {"substeps": 4})
    batches = [batch_of(d, task) for task in TASKS]
    optimiser = torch.optim.Adam(d.cast.student.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        optimiser.zero_grad()
        rows = [
            d.method.student(d.cast, batch, k, d.plan, d.recipe, draws(k))[0]
            for batch in batches
            for k in (1, 3)
        ]
        torch.stack(rows).sum().backward()
        optimiser.step()
        losses.append(sum(row.item() for row in rows))
    assert losses[-1] < 0.7 * losses[0], losses


# --- end to end -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "objective", "changes"),
    [
        ("qwen_image", DMD2, {"precision": "bf16"}),
        ("qwen_image", CONSISTENCY, {}),
        ("qwen_image_21", DMD2, {"model__cast": {"kind": "full"}, "precision": "bf16"}),
        ("flux2_klein", DMD2, {"model__cast": {"kind": "lora", "rank": 2, "checkpointing": True}}),
        ("stable_diffusion_3", DMD2, {}),
        ("z_image", DMD2, {}),
        ("sana", DMD2, {}),
        ("sana", CONSISTENCY, {"precision": "bf16"}),
    ],
    ids=[
        "pair-dmd2",
        "pair-consistency",
        "21-dmd2",
        "flux2",
        "sd3",
        "z",
        "sana",
        "sana-consistency",
    ],
)
def test_it_distils_from_real_images(
    place: Path,
    folder: Any,  # noqa: F811
    family: str,
    objective: dict[str, Any],
    changes: dict[str, Any],
    tmp_path: Path,
) -> None:
    short = {"budget__updates": 2, "evaluation__models": ["student"], "log__sample_every": 2}
    recipe = recipe_of(place, folder, family, objective=objective, **short, **changes)
    out = distilled(recipe, tmp_path / "out")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(row["grad_norm/student"] > 0 for row in rows)
    if objective is DMD2:
        assert all(row["loss/gan/head"] > 0 and 0 <= row["gan/accuracy"] <= 1 for row in rows)
        assert rows[0]["loss/gan/head"] != rows[1]["loss/gan/head"]
    plan = json.loads((out / "plan.json").read_text())
    assert (plan["cost"]["nfe_gan"] > 0) == (objective is DMD2)
