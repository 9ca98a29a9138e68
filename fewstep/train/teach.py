"""Training of a multi-step teacher by flow matching (arXiv 2606.03746 eq. 2).

The loop reads downwards: draw a micro-batch, noise it, regress v, step, and now and then log,
sample and save. A killed run resumes bit for bit.
"""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.core.process import add_noise, shift_time, velocity
from fewstep.core.types import Task
from fewstep.data.mixture import Mixture
from fewstep.data.pools import Pool, gather
from fewstep.errors import RunError
from fewstep.models.lab import LabCondition, MMDiT
from fewstep.recipe.teach import TeachRecipe
from fewstep.train.checkpoint import LAST, forget_after, load_last, save_state
from fewstep.train.ema import Ema

Draw = tuple[Task, LabCondition, Tensor]


class Teaching:
    """The state of a teacher's training: model, average, optimisers, mixture, generator, step."""

    def __init__(
        self, model: MMDiT, pools: Mapping[tuple[Task, str], Pool], recipe: TeachRecipe
    ) -> None:
        self.model, self.pools, self.recipe = model, pools, recipe
        self.ema = Ema(model, recipe.ema)
        self.optimisers = make_optimisers(model, recipe)
        sizes: dict[Task, dict[str, int]] = {"t2i": {}, "edit": {}}
        for (task, category), pool in pools.items():
            sizes[task][category] = len(pool)
        self.mixture = Mixture(recipe.mixture, recipe.composition, sizes, seed=recipe.seed)
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimisers": [o.state_dict() for o in self.optimisers],
            "mixture": self.mixture.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.mixture.load_state_dict(state["mixture"])
        self.generator.set_state(state["generator"])


def make_optimisers(model: MMDiT, recipe: TeachRecipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for everything else."""
    matrices = [
        p
        for name, p in model.named_parameters()
        if name.startswith("blocks.") and p.ndim == 2 and not name.endswith("modulation")
    ]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    o = recipe.optim
    return [
        torch.optim.Muon(
            matrices, lr=o.lr, weight_decay=o.weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(rest, lr=o.lr, betas=(0.9, 0.98), weight_decay=o.weight_decay),
    ]


def learning_rate(recipe: TeachRecipe, step: int) -> float:
    """Linear warm-up, constant, then linear to zero over the last `decay` share."""
    o, total = recipe.optim, recipe.budget.updates
    up = (step + 1) / o.warmup if o.warmup else 1.0
    down = (total - step) / (o.decay * total) if o.decay else 1.0
    return o.lr * min(up, down, 1.0)


def draw_batch(teaching: Teaching) -> Draw:
    """One micro-batch of one task: condition (sometimes without text) and target latents."""
    draw = teaching.mixture.next(teaching.recipe.budget.batch)
    pools = [teaching.pools[draw.task, name] for name in draw.pools]
    condition, target = gather(pools, draw.indices.tolist())
    assert target is not None, "teachers train on pools with targets"
    return draw.task, condition, target


def flow_matching_loss(
    model: MMDiT, x_0: Tensor, cond: LabCondition, generator: torch.Generator, *, shift: float = 1.0
) -> Tensor:
    """E || v_theta(x_t, t, c) - (eps - x_0) ||^2 at logit-normal t (arXiv 2403.03206)."""
    eps = torch.randn(x_0.shape, generator=generator).to(x_0.device)
    t = shift_time(torch.sigmoid(torch.randn(len(x_0), generator=generator)), shift).to(x_0.device)
    v = model.predict_v(add_noise(x_0, eps, t), t, cond)
    return F.mse_loss(v, velocity(x_0, eps))


def teach(
    teaching: Teaching,
    out: Path,
    *,
    on_step: Callable[[int, dict[str, float]], None],
    on_sample: Callable[[int, MMDiT], None],
) -> None:
    """Run to the end of the budget, writing metrics.jsonl and checkpoints into `out`."""
    recipe, model = teaching.recipe, teaching.model
    device = next(model.parameters()).device
    begun, first = time.monotonic(), teaching.step
    recent: dict[str, list[float]] = {}
    with (out / "metrics.jsonl").open("a") as log:
        while teaching.step < recipe.budget.updates:
            task, cond, x_0 = draw_batch(teaching)
            if torch.rand((), generator=teaching.generator).item() < recipe.drop_text:
                cond = cond.without_text()
            lr = learning_rate(recipe, teaching.step)
            x_0, cond = x_0.to(device), cond.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
                loss = flow_matching_loss(
                    model, x_0, cond, teaching.generator, shift=recipe.time_shift
                )
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.optim.clip)
            if not torch.isfinite(norm):
                raise RunError(
                    f"step {teaching.step}: the gradient is not finite (loss {loss.item()}); "
                    "the last checkpoint is kept; lower optim.lr"
                )
            for optimiser in teaching.optimisers:
                for group in optimiser.param_groups:
                    group["lr"] = lr
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
            teaching.ema.update(model)
            teaching.step += 1
            recent.setdefault(f"loss/{task}", []).append(loss.item())

            if due(teaching.step, recipe.log.every, recipe.budget.updates):
                rate = (teaching.step - first) * recipe.budget.batch / (time.monotonic() - begun)
                losses = {name: fmean(values) for name, values in recent.items()}
                row = losses | {"grad_norm": norm.item(), "lr": lr, "images_per_second": rate}
                recent.clear()
                log.write(json.dumps({"step": teaching.step, **row}) + "\n")
                log.flush()
                on_step(teaching.step, row)
            if due(teaching.step, recipe.log.sample_every, recipe.budget.updates):
                on_sample(teaching.step, averaged(teaching))
            if due(teaching.step, recipe.log.save_every, recipe.budget.updates):
                save_state(teaching.state_dict(), out / LAST)


def averaged(teaching: Teaching) -> MMDiT:
    """A copy of the model with the averaged weights, in evaluation mode."""
    copy = MMDiT(teaching.model.config)
    copy.load_state_dict(teaching.model.state_dict())
    teaching.ema.copy_to(copy)
    return copy.eval().to(next(teaching.model.parameters()).device)


def due(step: int, every: int, last: int) -> bool:
    return step % every == 0 or step == last


def resume(teaching: Teaching, out: Path) -> str:
    """Go on from the last whole state in `out` and forget metrics written after it.

    Returns what the user should know about that state; empty when all is well.
    """
    state, notice = load_last(out / LAST)
    teaching.load_state_dict(state)
    forget_after(out / "metrics.jsonl", teaching.step)
    return notice
