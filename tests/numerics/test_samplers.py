"""Time grids, the Euler sampler against exact flow maps, and parity of rollout with playback."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from fewstep.core.process import add_noise, shift_time
from fewstep.core.types import Condition
from fewstep.models.lab import LabCondition, MMDiT, MMDiTConfig
from fewstep.rollout import rollout
from fewstep.samplers import sample, shifted_grid

from .exact import every, generator, no_condition, on_the_line

GRID = shifted_grid(4, 3.0)


class StepwiseStudent(nn.Module):
    """D(x_t, t_k) = tanh(a_k x_t): one parameter a step. Keeps each (x_t, t) it was asked."""

    def __init__(self, grid: tuple[float, ...]) -> None:
        super().__init__()
        self.grid = torch.tensor(grid)
        self.a = nn.ParameterList(nn.Parameter(torch.tensor(0.5 + 0.2 * k)) for k in range(4))
        self.asked: list[tuple[Tensor, Tensor]] = []

    def forward(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        self.asked.append((x_t.detach().clone(), t))
        (k,) = (self.grid == t[0]).nonzero().flatten().tolist()
        return torch.tanh(self.a[k] * x_t)


def noise(count: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, generator=generator(seed))


def test_grid_of_four_steps_with_shift_three() -> None:
    assert shifted_grid(4, 3.0) == (1, 0.9, 0.75, 0.5)
    assert shifted_grid(4, 1.0) == (1, 0.75, 0.5, 0.25)
    assert shifted_grid(1, 3.0) == (1,)


@pytest.mark.parametrize("steps", (1, 4, 40))
def test_grid_is_the_shifted_uniform_grid(steps: int) -> None:
    """Equal steps of shift_time's inverse, and the same static shift as the process."""
    grid = torch.tensor(shifted_grid(steps, 3.0), dtype=torch.float64)
    uniform = 1 - torch.arange(steps, dtype=torch.float64) / steps
    torch.testing.assert_close(grid, shift_time(uniform, 3.0), rtol=1e-15, atol=0)
    assert grid[0] == 1 and (grid.diff() < 0).all() and grid[-1] > 0


def test_sampler_asks_at_the_grid_times_and_returns_the_last_answer() -> None:
    student = StepwiseStudent(GRID)
    result = sample(student, noise(), no_condition(5), GRID)
    assert [t.tolist() for _, t in student.asked] == [[float(t)] * 5 for t in torch.tensor(GRID)]
    last, _ = student.asked[-1]
    assert torch.equal(result, torch.tanh(student.a[3] * last))


def test_one_point_of_data_is_reached_exactly() -> None:
    """D = x_0 whatever the state: the path is straight, so one step is exact, and so are four."""
    x_0 = noise(seed=1)
    assert torch.equal(sample(lambda *_: x_0, noise(), no_condition(5), (1.0,)), x_0)
    assert torch.equal(sample(lambda *_: x_0, noise(), no_condition(5), GRID), x_0)


def test_states_of_the_sampler_lie_on_the_straight_path() -> None:
    x_0, eps, visited = noise(seed=1), noise(), []

    def answer(x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        torch.testing.assert_close(x_t, add_noise(x_0, eps, t), rtol=1e-6, atol=1e-6)
        visited.append(t[0].item())
        return x_0

    sample(answer, eps, no_condition(5), GRID)
    assert len(visited) == 4


@pytest.mark.parametrize("shift", (1.0, 3.0))
def test_sampler_converges_to_the_mixture_at_first_order(shift: float) -> None:
    """In one dimension the exact flow keeps quantiles, F(x_0) = Phi(noise); the error halves."""
    mixture = on_the_line()
    start = torch.linspace(-2.5, 2.5, 41).unsqueeze(1)
    wanted = torch.special.ndtr(start.double()).squeeze(1)

    def error(steps: int) -> float:
        x_0 = sample(mixture, start, no_condition(41), shifted_grid(steps, shift))
        return (mixture.cdf(x_0.double()) - wanted).abs().mean().item()

    errors = [error(steps) for steps in (64, 128, 256)]
    ratios = [a / b for a, b in pairwise(errors)]
    assert errors[-1] < 3e-3, errors
    assert all(1.8 < ratio < 2.2 for ratio in ratios), (errors, ratios)


def test_sampler_computes_in_float32() -> None:
    result = sample(lambda x, t, c: x.bfloat16(), noise().bfloat16(), no_condition(5), GRID)
    assert result.dtype == torch.float32


@pytest.mark.parametrize("k", range(4))
def test_rollout_visits_the_states_of_sampling(k: int) -> None:
    """Training meets the states of inference bit for bit, and answers at t_k."""
    played, trained = StepwiseStudent(GRID), StepwiseStudent(GRID)
    sample(played, noise(), no_condition(5), GRID)
    result = rollout(trained, noise(), no_condition(5), GRID, k)
    assert len(trained.asked) == k + 1
    for (x_played, t_played), (x_trained, t_trained) in zip(
        played.asked, trained.asked, strict=False
    ):
        assert torch.equal(x_played, x_trained) and torch.equal(t_played, t_trained)
    assert torch.equal(result, torch.tanh(played.a[k] * played.asked[k][0]))


def test_last_rollout_is_the_sample() -> None:
    student = StepwiseStudent(GRID)
    played = sample(student, noise(), no_condition(5), GRID)
    assert torch.equal(rollout(student, noise(), no_condition(5), GRID, 3), played)


@pytest.mark.parametrize("k", range(4))
def test_gradient_only_through_step_k(k: int) -> None:
    student = StepwiseStudent(GRID)
    start = noise().requires_grad_()
    rollout(student, start, no_condition(5), GRID, k).sum().backward()
    assert [a.grad is not None for a in student.a] == [i == k for i in range(4)]
    x_k = student.asked[k][0]
    by_hand = (x_k * (1 - torch.tanh(student.a[k].detach() * x_k) ** 2)).sum()
    torch.testing.assert_close(student.a[k].grad, by_hand, rtol=1e-6, atol=1e-6)
    assert (start.grad is None) == (k > 0), "the graph reaches back into the steps before k"


def test_gradient_of_shared_weights_is_that_of_the_last_evaluation() -> None:
    """D = a x with one a for all steps: d/da = x_k, nothing from the steps that led to x_k."""
    a = torch.tensor(0.7, requires_grad=True)
    states = []

    def student(x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        states.append(x_t.detach())
        return a * x_t

    rollout(student, noise(), no_condition(5), GRID, 2).sum().backward()
    torch.testing.assert_close(a.grad, states[2].sum(), rtol=1e-6, atol=1e-6)


def test_rollout_under_autocast_keeps_the_gradient_of_every_weight() -> None:
    """autocast caches half-precision weights: a copy cached by the steps without gradient must not
    be the one that step k uses."""
    torch.manual_seed(0)
    student = MMDiT(MMDiTConfig(channels=2, grid=4, width=16, depth=1, heads=2, vocabulary=7))
    for parameter in student.parameters():
        nn.init.normal_(parameter, std=0.3)
    cond = LabCondition(torch.randint(0, 7, (2, 3)), torch.ones(2, 3, dtype=torch.bool))
    start = torch.randn(2, 2, 4, 4)
    used = [p for name, p in student.named_parameters() if not name.startswith("source")]
    with torch.autocast("cpu", torch.bfloat16):
        back = torch.autograd.grad(rollout(student, start, cond, GRID, 2).sum(), used)
        with torch.no_grad():
            x = start
            for t, t_next in pairwise(GRID[:3]):
                ratio = torch.tensor(t_next) / torch.tensor(t)
                x = ratio * x + (1 - ratio) * student(x, every(t, x).float(), cond)
    with torch.autocast("cpu", torch.bfloat16):
        direct = torch.autograd.grad(student(x, every(GRID[2], x).float(), cond).sum(), used)
    for found, wanted in zip(back, direct, strict=True):
        assert torch.equal(found, wanted)
