"""One update of each objective on tiny networks: by hand, gradients where they belong, resume."""

import contextlib
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.core.types import Batch
from fewstep.errors import RunError
from fewstep.models.cast import Cast, Trainable, make_cast
from fewstep.models.lab import MMDiT, MMDiTConfig
from fewstep.objectives.gan import Features
from fewstep.recipe.facts import Facts, Machine
from fewstep.recipe.plan import make_plan
from fewstep.recipe.schema import TrajectoryRegression
from fewstep.samplers import shifted_grid
from fewstep.train import loop, methods, step
from fewstep.train.methods import RealBatch, WalkBatch

from .test_loop import SHAPE, TINY, metrics_of, same_weights, tiny_model, tiny_pool, tiny_recipe

KINDS: dict[str, dict] = {
    "dmd": {"kind": "dmd", "fake_updates": 2},
    "dmd2": {"kind": "dmd2", "fake_updates": 2},
    "decoupled_dmd": {"kind": "decoupled_dmd", "fake_updates": 2},
    "tdm": {"kind": "tdm", "fake_updates": 2},
    "consistency": {"kind": "consistency", "substeps": 3},
    "trajectory_regression": {
        "kind": "trajectory_regression",
        "substeps": 3,
        "trajectories": 16,
    },
}
SCORED = ("dmd", "dmd2", "decoupled_dmd", "tdm")


def start(kind: str, *, precision: str = "fp32", **changes: object) -> loop.Distillation:
    recipe = tiny_recipe(objective=KINDS[kind] | changes, precision=precision)
    plan = make_plan(recipe, Machine(), Facts(bundled=frozenset({"base", "text"})))
    teachers = {"base": tiny_model(0), "text": tiny_model(1)}
    cast = make_cast(teachers["base"], teachers)
    pools = {}
    for seed, (name, pool) in enumerate(recipe.data.pools.items()):
        g = torch.Generator().manual_seed(100 + seed)
        target = torch.randn(24, *SHAPE, generator=g).half()
        pools[name] = replace(tiny_pool(pool.task, pool.category, seed), target=target)
    return loop.Distillation(cast, pools, recipe, plan, SHAPE)


def t2i_batch(d: loop.Distillation) -> Any:
    while (batch := d.draw("student")[0]).task != "t2i":
        pass
    return batch


def student_update(
    d: loop.Distillation, batch: Batch, k: int, seed: int = 6
) -> tuple[Tensor, dict]:
    noise = torch.Generator().manual_seed(seed)
    return d.method.student(d.cast, batch, k, d.plan, d.recipe, noise)


def gradients(module: Trainable, loss: Tensor) -> list[Tensor]:
    clear(module)
    loss.backward()
    return [p.grad.clone() for p in module.parameters() if p.grad is not None]


def clear(module: Trainable) -> None:
    for p in module.parameters():
        p.grad = None


def alike(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted) > 0
    assert max(w.abs().max() for w in wanted) > 1e-6, "a test of nothing"
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def shaken(d: loop.Distillation) -> loop.Distillation:
    """Student and fake start alike; here they must differ."""
    with torch.no_grad():
        for p in d.cast.fake.parameters():
            p.mul_(1.1)
    return d


# --- every objective ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_and_resumed_run_equals_the_uninterrupted_one(tmp_path: Path, kind: str) -> None:
    class Killed(Exception):
        pass

    def on_step(at: int, _metrics: dict) -> None:
        if at == 5:
            raise Killed

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    first = start(kind)
    loop.distil(first, whole, on_step=lambda at, m: None, on_sample=lambda at: None)
    with contextlib.suppress(Killed):
        loop.distil(start(kind), killed, on_step=on_step, on_sample=lambda at: None)
    second = start(kind)
    loop.resume(second, killed)
    assert second.step == 3
    loop.distil(second, killed, on_step=lambda at, m: None, on_sample=lambda at: None)
    assert same_weights(first.cast.student, second.cast.student)
    assert same_weights(first.cast.fake, second.cast.fake)
    if kind == "dmd2":
        ours, theirs = (d.method.head.state_dict() for d in (first, second) if d.method.head)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert metrics_of(whole) == metrics_of(killed)


@pytest.mark.parametrize("kind", KINDS)
def test_the_students_loss_reaches_the_student_alone(kind: str) -> None:
    d = start(kind)
    for k in range(4):
        batch, _ = d.draw("student")
        loss, metrics = d.method.student(d.cast, batch, k, d.plan, d.recipe, d.noise)
        assert f"loss/student/k{k}" in metrics
        loss.backward()
        assert sum(p.grad is not None for p in d.cast.student.parameters()) > 20
        others = [
            d.cast.fake,
            *d.cast.teachers.values(),
            *([d.method.head] if d.method.head else []),
        ]
        assert all(p.grad is None for other in others for p in other.parameters()), k
        clear(d.cast.student)


@pytest.mark.parametrize("kind", SCORED)
def test_the_fakes_loss_leaves_the_student_alone(kind: str) -> None:
    d = start(kind)
    assert d.method.fake and d.method.fake_updates == 2
    batch, k = d.draw("fake")
    loss, _ = d.method.fake(d.cast, batch, k, d.plan, d.recipe, d.noise)
    loss.backward()
    assert all(p.grad is None for p in d.cast.student.parameters())
    assert sum(p.grad is not None for p in d.cast.fake.parameters()) > 20


@pytest.mark.parametrize("kind", KINDS)
def test_training_moves_what_it_trains_and_nothing_else(kind: str) -> None:
    d = start(kind, precision="bf16")
    before = {
        name: [p.clone() for p in module.parameters()]
        for name, module in {
            "student": d.cast.student,
            "fake": d.cast.fake,
            **d.cast.teachers,
        }.items()
    }
    loop.train_step(d)

    def moved(name: str, module: Any) -> float:
        pairs = zip(before[name], module.parameters(), strict=True)
        return sum(not torch.equal(a, b) for a, b in pairs) / len(before[name])

    assert moved("student", d.cast.student) > 0.9
    assert (moved("fake", d.cast.fake) > 0.9) == (kind in SCORED)
    assert all(moved(name, teacher) == 0 for name, teacher in d.cast.teachers.items())


@pytest.mark.parametrize("kind", ("consistency", "trajectory_regression"))
def test_the_loss_falls(kind: str) -> None:
    """On one micro-batch with one draw of noise, far below where it began."""
    d = start(kind)
    batch = t2i_batch(d)
    optimiser = torch.optim.Adam(d.cast.student.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        loss = torch.stack([student_update(d, batch, k)[0] for k in range(4)]).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], (losses[0], losses[-1])


# --- DMD2 -----------------------------------------------------------------------------------------


def test_dmd2_without_gan_is_dmd() -> None:
    plain, gan = shaken(start("dmd")), shaken(start("dmd2", gan={"student_weight": 0.0}))
    batch = t2i_batch(plain)
    alike(
        gradients(gan.cast.student, student_update(gan, batch, 2)[0]),
        gradients(plain.cast.student, student_update(plain, batch, 2)[0]),
    )


def test_dmd2_adds_the_slope_of_minus_log_d() -> None:
    """The difference to weight 0 is, by autograd through everything, weight * d(-log D)/d theta."""
    weight = 0.7
    d = shaken(start("dmd2", gan={"student_weight": weight}))
    bare = shaken(start("dmd2", gan={"student_weight": 0.0}))
    batch = t2i_batch(d)
    k = 1
    found = gradients(d.cast.student, student_update(d, batch, k)[0])
    plain = gradients(bare.cast.student, student_update(bare, batch, k)[0])

    g = torch.Generator().manual_seed(6)
    x = torch.randn(len(batch), *SHAPE, generator=g)
    with torch.no_grad():
        for now, then in pairwise(d.plan.grid[: k + 1]):
            clean = d.cast.student(x, torch.full((len(batch),), now), batch.cond)
            x = x + (then - now) * (x - clean) / now
    x = d.cast.student(x, torch.full((len(batch),), d.plan.grid[k]), batch.cond)
    torch.rand(len(batch), generator=g)  # t and eps of DMD
    torch.randn(len(batch), *SHAPE, generator=g)
    t = torch.rand(len(batch), generator=g)
    eps = torch.randn(len(batch), *SHAPE, generator=g)
    t_ = t[:, None, None, None]
    fake, head = d.cast.fake, d.method.head
    assert isinstance(fake, MMDiT) and head
    logits = head(fake.features((1 - t_) * x + t_ * eps, t, batch.cond))
    added = gradients(d.cast.student, weight * -torch.sigmoid(logits).log().mean())
    alike([a - b for a, b in zip(found, plain, strict=True)], added)


def test_dmd2_trains_head_and_fake_on_the_pools_own_images() -> None:
    d = start("dmd2", gan={"fake_weight": 1.0})
    batch = t2i_batch(d)
    assert isinstance(batch, RealBatch) and d.method.fake and d.method.head
    optimiser = torch.optim.Adam([*d.method.head.parameters(), *d.cast.fake.parameters()], lr=3e-3)
    losses = []
    for i in range(40):
        g = torch.Generator().manual_seed(i % 2)
        loss, metrics = d.method.fake(d.cast, batch, 3, d.plan, d.recipe, g)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(metrics["loss/gan/head"])
    assert losses[0] > 1 and losses[-1] < 0.5 * losses[0]
    # targets are what it calls real: exchange them for the student's own and it cannot tell
    swapped = replace(batch, target=torch.zeros_like(batch.target))
    g = torch.Generator().manual_seed(0)
    _, other = d.method.fake(d.cast, swapped, 3, d.plan, d.recipe, g)
    assert other["loss/gan/head"] > losses[-1]


def test_dmd2_features_are_half_of_the_network() -> None:
    """The second half of the blocks, and what follows, gets no gradient from the features."""
    torch.manual_seed(0)
    model = MMDiT(MMDiTConfig(**{**vars(TINY), "depth": 4}))
    d = start("dmd2")
    batch = t2i_batch(d)
    x = torch.randn(len(batch), *SHAPE)
    assert isinstance(model, Features)
    tokens = model.features(x, torch.full((len(batch),), 0.5), batch.cond)
    assert tokens.shape == (len(batch), TINY.image_tokens, TINY.width)
    tokens.square().sum().backward()
    used = [any(p.grad is not None for p in block.parameters()) for block in model.blocks]
    assert used == [True, True, False, False] and model.image_out.weight.grad is None


def test_dmd2_refuses_a_network_without_features() -> None:
    class Opaque(torch.nn.Linear):
        def predict_v(self, x_t: Tensor, t: Tensor, cond: object) -> Tensor:
            return x_t

    d = start("dmd2")
    with pytest.raises(RunError, match="shows no features to a discriminator; use dmd"):
        methods.make_method(Cast(d.cast.student, Opaque(2, 2), d.cast.teachers), d.recipe)


# --- Decoupled DMD --------------------------------------------------------------------------------


@pytest.mark.parametrize("k", (2, 3))
def test_decoupled_scores_at_one_state_are_the_guided_ones(k: int) -> None:
    """On the networks, with CFG and lambda: bare + what guidance adds = the guided mix of dmd."""
    d = shaken(start("decoupled_dmd"))
    for task in ("t2i", "edit"):
        while (batch := d.draw("student")[0]).task != task:
            pass
        x_t, t = torch.randn(len(batch), *SHAPE), torch.rand(len(batch))
        with torch.no_grad():
            guided = step.compare_scores(d.cast, batch, k, d.plan, x_t, t)
            bare = step.compare_scores(d.cast, batch, k, d.plan, x_t, t, guided=False)
            added = methods.augment(d.cast, batch, k, d.plan, x_t, t)
        assert added.abs().max() > 1e-3
        assert torch.equal(guided.fake, bare.fake)
        torch.testing.assert_close(bare.real + added, guided.real, rtol=1e-4, atol=1e-5)


def test_decoupled_update_by_hand() -> None:
    """Equation 8 with both draws in the documented order; base teacher alone (k = 0 .. 1)."""
    k = 1
    d = shaken(start("decoupled_dmd", normaliser="none"))
    batch = t2i_batch(d)
    g = torch.Generator().manual_seed(6)
    x = torch.randn(len(batch), *SHAPE, generator=g)
    grid = d.plan.grid
    with torch.no_grad():
        clean = d.cast.student(x, torch.ones(len(batch)), batch.cond)
        x = x + (grid[1] - 1) * (x - clean)
    x = d.cast.student(x, torch.full((len(batch),), grid[k]), batch.cond)
    base = d.cast.teachers["base"]
    with torch.no_grad():
        t = 0.02 + 0.96 * torch.rand(len(batch), generator=g)
        eps = torch.randn(len(batch), *SHAPE, generator=g)
        t_ca = 0.02 + (min(0.98, grid[k]) - 0.02) * torch.rand(len(batch), generator=g)
        eps_ca = torch.randn(len(batch), *SHAPE, generator=g)
        x_dm = (1 - t[:, None, None, None]) * x + t[:, None, None, None] * eps
        x_ca = (1 - t_ca[:, None, None, None]) * x + t_ca[:, None, None, None] * eps_ca
        direction = d.cast.fake(x_dm, t, batch.cond) - base(x_dm, t, batch.cond)
        push = base(x_ca, t_ca, batch.cond) - base(x_ca, t_ca, batch.cond.without_text())
        direction = direction - (3.0 - 1) * push
    wanted = gradients(d.cast.student, (x * direction).sum() / x.numel())
    alike(gradients(d.cast.student, student_update(d, batch, k)[0]), wanted)


# --- TDM ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", (0, 3))
def test_tdm_update_by_hand(k: int) -> None:
    d = shaken(start("tdm", normaliser="none"))
    batch = t2i_batch(d)
    only_base = replace(batch, categories=("portrait",) * len(batch))
    g = torch.Generator().manual_seed(6)
    x = torch.randn(len(batch), *SHAPE, generator=g)
    grid = (*d.plan.grid, 0.0)
    ones = torch.ones(len(batch))
    with torch.no_grad():
        for now, then in pairwise(grid[: k + 1]):
            x = x + (then - now) * (x - d.cast.student(x, now * ones, batch.cond)) / now
    answer = d.cast.student(x, grid[k] * ones, batch.cond)
    s = grid[k + 1]
    with torch.no_grad():
        x_s = x + (s - grid[k]) * (x - answer) / grid[k]
        low, high = max(s, 0.02), min(grid[k], 0.98)
        tau = low + (high - low) * torch.rand(len(batch), generator=g)
        xi = torch.randn(len(batch), *SHAPE, generator=g)
        a = (1 - tau) / (1 - s)
        b = (tau**2 - a**2 * s**2).sqrt()
        x_tau = a[:, None, None, None] * x_s + b[:, None, None, None] * xi
        base = d.cast.teachers["base"]
        bare = base(x_tau, tau, batch.cond.without_text())
        real = bare + 3.0 * (base(x_tau, tau, batch.cond) - bare)
        direction = d.cast.fake(x_tau, tau, batch.cond) - real
    wanted = gradients(d.cast.student, (answer * direction).sum() / answer.numel())
    alike(gradients(d.cast.student, student_update(d, only_base, k)[0]), wanted)


# --- without a fake score -------------------------------------------------------------------------


def test_consistency_update_by_hand() -> None:
    """k = 3, the phase down to data: its last substep lands on the teacher's own answer."""
    d = start("consistency", substeps=3)
    batch = replace(t2i_batch(d), categories=("portrait",) * 4)
    assert isinstance(batch, RealBatch)
    g = torch.Generator().manual_seed(6)
    n = torch.randint(3, (4,), generator=g)
    eps = torch.randn(4, *SHAPE, generator=g)
    times = torch.tensor([0.5, 1 / 3, 1 / 6, 0.0])  # uniform: the teachers here have shift 1
    t, t_next = (times[i][:, None, None, None] for i in (n, n + 1))
    x_t = (1 - t) * batch.target + t * eps
    base, student = d.cast.teachers["base"], d.cast.student
    landing = student(x_t, t.flatten(), batch.cond)  # the edge is 0, where x_0 itself is
    with torch.no_grad():
        bare = base(x_t, t.flatten(), batch.cond.without_text())
        guided = bare + 3.0 * (base(x_t, t.flatten(), batch.cond) - bare)
        x_next = x_t + (t_next - t) * (x_t - guided) / t
        target = torch.where(t_next > 0, student(x_next, t_next.flatten(), batch.cond), x_next)
    loss, _ = student_update(d, batch, 3)
    torch.testing.assert_close(loss, (landing - target).square().mean(), rtol=1e-4, atol=1e-6)
    wanted = gradients(student, (landing - target).square().mean())
    alike(gradients(student, student_update(d, batch, 3)[0]), wanted)


def test_the_walk_follows_the_mix_of_the_step_it_is_in() -> None:
    """Text has base, base, half and half, the text teacher: each phase by hand, 3 substeps each."""
    d = start("trajectory_regression")
    batch = t2i_batch(d)
    assert isinstance(batch, WalkBatch)
    batch = replace(batch, categories=("text",) * 4)
    noise = torch.Generator().manual_seed(9)
    states = methods.teacher_states(d.cast, batch, d.plan, d.recipe, noise)
    assert torch.equal(
        states[0], torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(9))
    )
    rows = [{"base": 1.0}, {"base": 1.0}, {"base": 0.5, "text": 0.5}, {"text": 1.0}]
    assert list(d.plan.weights("t2i", "text")) == rows
    edges = (*d.plan.grid, 0.0)
    with torch.no_grad():
        for k, (begin, end) in enumerate(pairwise(edges)):
            x = states[k]
            times = [begin + (end - begin) * i / 3 for i in range(4)]
            for now, then in pairwise(times):
                t = torch.full((4,), now)
                mixed = torch.zeros_like(x)
                for name, share in rows[k].items():
                    teacher = d.cast.teachers[name]
                    bare = teacher(x, t, batch.cond.without_text())
                    mixed += share * (bare + 3.0 * (teacher(x, t, batch.cond) - bare))
                x = x + (then - now) * (x - mixed) / now
            torch.testing.assert_close(states[k + 1], x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("k", (1, 3))
def test_regression_update_by_hand(k: int) -> None:
    """From the cached state at t_k, the student's slope against the one to the state at t_{k+1}."""
    d = start("trajectory_regression")
    batch, student = t2i_batch(d), d.cast.student
    assert isinstance(batch, WalkBatch)
    now, then = (*d.plan.grid, 0.0)[k : k + 2]
    state, target = batch.states[k], batch.states[k + 1]
    slope = (state - student(state, torch.full((4,), now), batch.cond)) / now
    wanted = (slope - (state - target) / (now - then)).square().mean()
    loss, _ = student_update(d, batch, k)
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-6)
    alike(gradients(student, loss), gradients(student, wanted))


def test_trajectories_are_walked_once_and_gone_over_again() -> None:
    """16 trajectories are 4 micro-batches of 4; the fifth draw is the first again, bit for bit."""
    d = start("trajectory_regression")
    assert isinstance(d.recipe.objective, TrajectoryRegression) and d.walks
    batches = [d.draw("student")[0] for _ in range(9)]
    for i in range(4):
        first, again = batches[i], batches[i + 4]
        assert isinstance(first, WalkBatch) and isinstance(again, WalkBatch)
        assert torch.equal(first.states, again.states)
        assert torch.equal(first.cond.text, again.cond.text)  # type: ignore[attr-defined]
        assert first.categories == again.categories
    assert isinstance(batches[0], WalkBatch) and isinstance(batches[1], WalkBatch)
    assert not torch.equal(batches[0].states, batches[1].states)
    assert len(d.walks.made) == 4


def test_a_walk_that_is_not_finite_stops_the_run() -> None:
    d = start("trajectory_regression")
    base = d.cast.teachers["base"]
    assert isinstance(base, MMDiT)
    with torch.no_grad():
        base.image_out.bias.fill_(float("nan"))
    with pytest.raises(RunError, match="teacher's trajectory is not finite"):
        loop.train_step(d)


def test_the_tiny_grid_is_the_one_the_tests_by_hand_assume() -> None:
    d = start("consistency")
    assert d.plan.grid == shifted_grid(4, 3.0)
    assert {d.recipe.teachers[n].shift for n in d.recipe.teachers} == {1.0}
    assert json.dumps(d.plan.weights("t2i", "portrait")) == json.dumps([{"base": 1.0}] * 4)
