"""Exponential moving average of weights, in float32."""

import torch

from fewstep.models.cast import Trainable


class Ema:
    """Keeps `decay * average + (1 - decay) * weights`; after n updates decay <= (1 + n) / (10 + n).

    That warm-up keeps early averages from being ruled by the initial weights.
    """

    def __init__(self, module: Trainable, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.average = {name: p.detach().float().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: Trainable) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, p in module.named_parameters():
            self.average[name].lerp_(p.float(), 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: Trainable) -> None:
        for name, p in module.named_parameters():
            p.copy_(self.average[name])

    def state_dict(self) -> dict[str, object]:
        return {"updates": self.updates, "average": self.average}

    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"]
        for name, value in state["average"].items():
            self.average[name].copy_(value)
