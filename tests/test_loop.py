"""The distillation loop: exact resume, gradients where they belong, stops on non-finite values."""

import contextlib
import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from fewstep.core.types import Batch, Task
from fewstep.data.pools import Pool
from fewstep.errors import CheckpointError, RunError
from fewstep.models.cast import Role, make_cast
from fewstep.models.lab import MMDiT, MMDiTConfig
from fewstep.recipe.facts import Facts, Machine
from fewstep.recipe.plan import make_plan
from fewstep.recipe.schema import Dmd, Recipe
from fewstep.train import checkpoint, loop, step

TINY = MMDiTConfig(
    channels=4, grid=4, patch=2, width=32, depth=2, heads=2, vocabulary=20, max_text=6
)
SHAPE = (4, 4, 4)


def tiny_model(seed: int) -> MMDiT:
    torch.manual_seed(seed)
    model = MMDiT(TINY)
    for p in model.parameters():  # zero-initialised outputs would make every teacher the same
        torch.nn.init.normal_(p, std=0.15)
    return model


def tiny_pool(task: Task, category: str, seed: int, size: int = 24) -> Pool:
    g = torch.Generator().manual_seed(seed)
    return Pool(
        task,
        category,
        tuple(f"{category} {i}" for i in range(size)),
        torch.randint(1, 20, (size, 6), generator=g),
        torch.randint(2, 7, (size,), generator=g),
        torch.randn(size, *SHAPE, generator=g).half() if task == "edit" else None,
    )


def tiny_recipe(**changes: object) -> Recipe:
    values = {
        "name": "tiny",
        "seed": 3,
        "model": {"family": "lab"},
        "teachers": {
            name: {
                "weights": f"bundled:{name}",
                "tasks": ["t2i", "edit"],
                "cfg": {"t2i": 3.0, "edit": 2.0},
            }
            for name in ("base", "text")
        },
        "student": {"init": "base"},
        "data": {
            "source": {"kind": "lab"},
            "pools": {
                "text": {"task": "t2i", "category": "text", "size": 24},
                "portrait": {"task": "t2i", "category": "portrait", "size": 24},
                "object": {"task": "edit", "category": "object", "size": 24},
            },
            "composition": {"t2i": {"text": 1, "portrait": 1}, "edit": {"object": 1}},
            "mixture": {"t2i": 1, "edit": 1},
        },
        "guidance": [
            {
                "when": {"category": "text"},
                "weights": [
                    {"base": 1.0},
                    {"base": 1.0},
                    {"base": 0.5, "text": 0.5},
                    {"text": 1.0},
                ],
            },
            {"weights": [{"base": 1.0}]},
        ],
        "objective": {"kind": "dmd", "fake_updates": 2},
        "optim": {"warmup": 2},
        "budget": {"updates": 6, "batch": 8, "micro_batch": 4},
        "log": {"save_every": 3},
    }
    return Recipe.model_validate(values | changes)


def start(recipe: Recipe) -> loop.Distillation:
    plan = make_plan(recipe, Machine(), Facts(bundled=frozenset({"base", "text"})))
    cast = make_cast(tiny_model(0), {"base": tiny_model(0), "text": tiny_model(1)})
    pools = {
        name: tiny_pool(pool.task, pool.category, seed)
        for seed, (name, pool) in enumerate(recipe.data.pools.items())
    }
    return loop.Distillation(cast, pools, recipe, plan, SHAPE)


def run(d: loop.Distillation, out: Path, *, stop_after: int | None = None) -> None:
    class Killed(Exception):
        pass

    def on_step(at: int, _metrics: loop.Metrics) -> None:
        if at == stop_after:
            raise Killed

    with contextlib.suppress(Killed):
        loop.distil(d, out, on_step=on_step, on_sample=lambda at: None)


def metrics_of(folder: Path) -> list[dict]:
    """Without the seconds, which no two runs share."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def network(role: object) -> MMDiT:
    assert isinstance(role, MMDiT)
    return role


def same_weights(a: Role, b: Role) -> bool:
    return all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_killed_and_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    tmp_path: Path, precision: str
) -> None:
    recipe = tiny_recipe(precision=precision)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    first = start(recipe)
    run(first, whole)

    run(start(recipe), killed, stop_after=5)  # the state of update 3 is the last one saved
    second = start(recipe)
    loop.resume(second, killed)
    assert second.step == 3
    run(second, killed)

    assert same_weights(first.cast.student, second.cast.student)
    assert same_weights(first.cast.fake, second.cast.fake)
    own = {name: value.clone() for name, value in first.cast.student.state_dict().items()}
    with loop.averaged_student(first) as a, loop.averaged_student(second) as b:
        assert same_weights(a, b)
        assert any(not torch.equal(value, own[name]) for name, value in a.state_dict().items())
    assert all(torch.equal(v, own[n]) for n, v in first.cast.student.state_dict().items())
    logs = [metrics_of(whole), metrics_of(killed)]
    assert logs[0] == logs[1]
    assert [row["step"] for row in logs[1]] == [1, 2, 3, 4, 5, 6]


def test_resume_needs_every_part_of_the_state(tmp_path: Path) -> None:
    """Each part matters: leaving any one as it was at the start changes the outcome."""
    recipe = tiny_recipe(precision="fp32")
    d = start(recipe)
    for _ in range(3):
        loop.train_step(d)
    path = _saved(d.state_dict(), tmp_path)
    # read again each time: an optimiser that loads a state goes on to change its tensors
    want = start(recipe)
    want.load_state_dict(torch.load(path, weights_only=True))
    loop.train_step(want)
    again = start(recipe)
    again.load_state_dict(torch.load(path, weights_only=True))
    loop.train_step(again)
    assert same_weights(want.cast.student, again.cast.student)
    for part in (
        "student",
        "fake",
        "student_optimiser",
        "fake_optimiser",
        "mixtures",
        "control",
        "noise",
    ):
        other = start(recipe)
        state = torch.load(path, weights_only=True)
        other.load_state_dict(state | {part: start(recipe).state_dict()[part]})
        loop.train_step(other)
        assert not same_weights(want.cast.student, other.cast.student), part


def _saved(state: dict, tmp_path: Path) -> Path:
    torch.save(state, tmp_path / "state.pt")
    return tmp_path / "state.pt"


def test_a_state_of_other_proportions_is_refused() -> None:
    d, other = start(tiny_recipe()), start(tiny_recipe())
    state = d.state_dict()
    state["mixtures"]["student"]["tasks"]["weights"] = {"t2i": 9, "edit": 1}
    with pytest.raises(CheckpointError, match="resume with the old ones"):
        other.load_state_dict(state)


def test_a_state_of_another_recipe_is_refused_and_nothing_is_loaded() -> None:
    d, other = start(tiny_recipe()), start(tiny_recipe(seed=4))
    loop.train_step(d)
    with pytest.raises(CheckpointError, match="made by another recipe"):
        other.load_state_dict(d.state_dict())
    assert other.step == 0 and not same_weights(d.cast.student, other.cast.student)


@pytest.mark.parametrize("lost", ["cut", "missing"])
def test_the_state_before_the_last_one_takes_its_place(tmp_path: Path, lost: str) -> None:
    run(start(tiny_recipe()), tmp_path)  # saves the updates 3 and 6
    last = tmp_path / checkpoint.LAST
    if lost == "cut":
        last.write_bytes(last.read_bytes()[:1000])
    else:
        last.unlink()
    d = start(tiny_recipe())
    notice = loop.resume(d, tmp_path)
    assert d.step == 3 and "going on from the one before it" in notice
    assert [row["step"] for row in metrics_of(tmp_path)] == [1, 2, 3]
    run(d, tmp_path)
    assert loop.resume(start(tiny_recipe()), tmp_path) == ""


def test_only_the_trained_roles_move_and_teachers_never_do() -> None:
    d = start(tiny_recipe())
    before = {
        name: [p.clone() for p in network(t).parameters()] for name, t in d.cast.teachers.items()
    }
    student, fake = (
        [p.clone() for p in d.cast.student.parameters()],
        [p.clone() for p in d.cast.fake.parameters()],
    )
    loop.train_step(d)
    for name, teacher in d.cast.teachers.items():
        assert all(
            torch.equal(a, b)
            for a, b in zip(before[name], network(teacher).parameters(), strict=True)
        )
        assert all(p.grad is None for p in network(teacher).parameters())
    for old, module in ((student, d.cast.student), (fake, d.cast.fake)):
        moved = [not torch.equal(a, b) for a, b in zip(old, module.parameters(), strict=True)]
        assert sum(moved) > 0.9 * len(moved)


def test_student_and_fake_losses_reach_only_their_own_network() -> None:
    d = start(tiny_recipe())
    batch, k = d.draw("fake")
    step.update_fake(d.cast, batch, k, d.plan, d.recipe, d.noise)[0].backward()
    assert all(p.grad is None for p in d.cast.student.parameters())
    assert any(p.grad is not None for p in d.cast.fake.parameters())
    network(d.cast.fake).zero_grad(set_to_none=True)
    batch, k = d.draw("student")
    loss, _ = step.update_student(d.cast, batch, k, d.plan, d.recipe, d.noise)
    loss.backward()
    assert all(p.grad is None for p in d.cast.fake.parameters())
    assert any(p.grad is not None for p in d.cast.student.parameters())


def test_the_student_gradient_is_independent_of_autocast_history() -> None:
    """A bf16 weight cast made without gradient must not be reused where the gradient is needed."""
    grads = []
    for k in (0, 3):
        d = start(tiny_recipe())
        batch, _ = d.draw("student")
        with loop.mixed_precision(d):
            loss, _ = step.update_student(d.cast, batch, k, d.plan, d.recipe, d.noise)
        loss.backward()
        grads.append(
            [
                p.grad is not None and bool(p.grad.any())
                for p in network(d.cast.student).blocks.parameters()
            ]
        )
    assert all(grads[0]) and all(grads[1])


def test_shares_of_the_teachers_follow_lambda() -> None:
    """Where two equal teachers guide with 1/2 each, each pulls half; a lone teacher pulls all."""
    recipe = tiny_recipe()
    plan = make_plan(recipe, Machine(), Facts(bundled=frozenset({"base", "text"})))
    cast = make_cast(tiny_model(0), {"base": tiny_model(5), "text": tiny_model(5)})
    pools = {n: tiny_pool(p.task, p.category, 1) for n, p in recipe.data.pools.items()}
    d = loop.Distillation(cast, pools, recipe, plan, SHAPE)
    while (batch := d.draw("student")[0]).task != "t2i":
        pass
    only_text = type(batch)(batch.task, ("text",) * len(batch), batch.cond, batch.shape)
    _, told = step.update_student(cast, only_text, 2, plan, recipe, d.noise)
    assert told["share/t2i/text/base"] == pytest.approx([0.5] * len(batch))
    assert told["share/t2i/text/text"] == pytest.approx([0.5] * len(batch))
    _, told = step.update_student(cast, only_text, 3, plan, recipe, d.noise)
    assert told["share/t2i/text/text"] == [1.0] * len(batch)
    assert told["share/t2i/text/base"] == [0.0] * len(batch)


def test_drawn_samples_meet_the_planned_quotas_exactly() -> None:
    d = start(tiny_recipe())
    tasks: dict[str, int] = {}
    categories: dict[str, int] = {}
    for _ in range(d.plan.updates * d.plan.batch.accumulation):
        batch, _ = d.draw("student")
        tasks[batch.task] = tasks.get(batch.task, 0) + len(batch)
        for category in batch.categories:
            categories[category] = categories.get(category, 0) + 1
    assert tasks == {quota.task: quota.samples for quota in d.plan.tasks}
    assert categories == {quota.category: quota.samples for quota in d.plan.pools}


def test_a_value_that_is_not_finite_stops_before_anything_is_updated(tmp_path: Path) -> None:
    d = start(tiny_recipe())
    with torch.no_grad():
        network(d.cast.teachers["base"]).image_out.bias.fill_(float("nan"))
    before = [p.clone() for p in d.cast.student.parameters()]
    with pytest.raises(RunError, match=r"score difference is not finite.*last checkpoint is kept"):
        run(d, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before, d.cast.student.parameters(), strict=True))


def test_a_gradient_that_is_not_finite_names_the_tensor() -> None:
    d = start(tiny_recipe())
    loss, _ = step.update_student(d.cast, d.draw("student")[0], 0, d.plan, d.recipe, d.noise)
    loss.backward()
    grad = dict(d.cast.student.named_parameters())["blocks.1.up.weight"].grad
    assert grad is not None
    grad[0, 0] = float("inf")
    with pytest.raises(RunError, match=r"student\.blocks\.1\.up\.weight is not finite"):
        step.apply_gradients(
            d.cast.student, d.student_optimiser, d.recipe.optim.student, 1e-4, "student"
        )


def test_accumulation_averages_the_micro_batches() -> None:
    """Twice the same micro-batch gives the gradient of one."""
    d = start(tiny_recipe(precision="fp32"))
    batch, k = d.draw("student")
    grads = []
    for parts in (1, 2):
        network(d.cast.student).zero_grad(set_to_none=True)
        for _ in range(parts):
            noise = torch.Generator().manual_seed(9)
            loss, _ = step.update_student(d.cast, batch, k, d.plan, d.recipe, noise)
            (loss / parts).backward()
        grads.append([p.grad.clone() for p in d.cast.student.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_the_anchor_pulls_the_first_step_alone() -> None:
    objective = {"kind": "dmd", "fake_updates": 1, "anchor": {"weight": 1.0, "steps": 2, "of": 8}}
    d = start(tiny_recipe(objective=objective))
    batch, _ = d.draw("student")
    logged = [
        "loss/anchor" in step.update_student(d.cast, batch, k, d.plan, d.recipe, d.noise)[1]
        for k in range(4)
    ]
    assert logged == [True, False, False, False]


def replay(d: loop.Distillation, batch: Batch, k: int, seed: int) -> tuple[torch.Tensor, ...]:
    """x, t, eps and x_t of one update, drawn and computed by hand in the documented order."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(len(batch), *SHAPE, generator=g)
    times = d.plan.grid
    for now, then in pairwise(times[: k + 1]):
        clean = d.cast.student(x, torch.full((len(batch),), now), batch.cond).detach()
        x = x + (then - now) * (x - clean) / now
    answer = d.cast.student(x, torch.full((len(batch),), times[k]), batch.cond)
    assert isinstance(d.recipe.objective, Dmd)
    r = d.recipe.objective.renoise
    u = torch.rand(len(batch), generator=g)
    t = r.low + (r.high - r.low) * u
    t = r.shift * t / (1 + (r.shift - 1) * t)
    eps = torch.randn(len(batch), *SHAPE, generator=g)
    t_ = t[:, None, None, None]
    return answer, t, eps, (1 - t_) * answer.detach() + t_ * eps


RENOISE = {"kind": "dmd", "renoise": {"low": 0.1, "high": 0.9, "shift": 2.0}}


@pytest.mark.parametrize("k", [0, 2])
def test_the_fake_score_is_trained_on_re_noised_samples_of_the_student(k: int) -> None:
    d = start(tiny_recipe(precision="fp32", objective=RENOISE))
    batch, _ = d.draw("fake")
    x, t, eps, x_t = replay(d, batch, k, seed=5)
    noise = torch.Generator().manual_seed(5)
    loss, _ = step.update_fake(d.cast, batch, k, d.plan, d.recipe, noise)
    v = (x_t - d.cast.fake(x_t, t, batch.cond)) / t[:, None, None, None]
    torch.testing.assert_close(loss, (v - (eps - x.detach())).square().mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("k", [1, 3])
def test_the_student_gradient_is_equation_7_by_hand(k: int) -> None:
    """sum_i <dx_i, fake_i - real_i> / (n mean|x_i - real_i|), with CFG and lambda written out."""
    d = start(tiny_recipe(precision="fp32", objective=RENOISE))
    with torch.no_grad():  # student and fake start alike; here they must differ
        for p in d.cast.fake.parameters():
            p.mul_(1.1)
    while (batch := d.draw("student")[0]).task != "t2i":
        pass
    x, t, _, x_t = replay(d, batch, k, seed=6)
    with torch.no_grad():
        guided = {}
        for name, teacher in d.cast.teachers.items():
            bare = teacher(x_t, t, batch.cond.without_text())
            guided[name] = bare + 3.0 * (teacher(x_t, t, batch.cond) - bare)
        late = {1: 0.0, 3: 1.0}[k]  # lambda of the text teacher for text; the base has the rest
        share = torch.tensor([late * (c == "text") for c in batch.categories])[:, None, None, None]
        real = (1 - share) * guided["base"] + share * guided["text"]
        distance = (x - real).abs().mean((1, 2, 3), keepdim=True)
        direction = (d.cast.fake(x_t, t, batch.cond) - real) / distance
    (x * direction).sum().div(x.numel()).backward()
    want = [p.grad.clone() for p in d.cast.student.parameters() if p.grad is not None]
    network(d.cast.student).zero_grad(set_to_none=True)
    loss, _ = step.update_student(
        d.cast, batch, k, d.plan, d.recipe, torch.Generator().manual_seed(6)
    )
    loss.backward()
    got = [p.grad for p in d.cast.student.parameters() if p.grad is not None]
    assert len(want) == len(got)
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_the_anchor_is_the_velocity_to_where_the_teacher_has_walked() -> None:
    """By hand: two of eight guided Euler steps from the same noise; the student's slope there."""
    objective = {"kind": "dmd", "anchor": {"weight": 1.0, "steps": 2, "of": 8}}
    d = start(tiny_recipe(precision="fp32", objective=objective))
    while (batch := d.draw("student")[0]).task != "t2i":
        pass
    noise = torch.randn(len(batch), *SHAPE, generator=torch.Generator().manual_seed(4))
    ones = torch.ones(len(batch))
    base, state = d.cast.teachers["base"], noise
    with torch.no_grad():
        for now, then in pairwise((1.0, 7 / 8, 6 / 8)):
            bare = base(state, now * ones, batch.cond.without_text())
            clean = bare + 3.0 * (base(state, now * ones, batch.cond) - bare)
            state = state + (then - now) * (state - clean) / now
    x = d.cast.student(noise, ones, batch.cond)
    got = step.first_step_loss(d.cast, batch, noise, x, d.plan, d.recipe)
    slope, wanted = noise - x, (noise - state) / (1 - 6 / 8)
    torch.testing.assert_close(got, (slope - wanted).square().mean(), rtol=1e-4, atol=1e-5)
    (grad,) = torch.autograd.grad(got, x)
    torch.testing.assert_close(grad, -2 * (slope - wanted) / x.numel(), rtol=1e-4, atol=1e-6)
