"""The shape of a teacher recipe: what `fewstep teach` trains, on what, for how long."""

from typing import Annotated, Literal

from pydantic import Field

from fewstep.recipe.schema import Count, Fraction, Positive, Share, Source, Strict, Task, Word


class Network(Strict):
    width: Count = 256
    depth: Count = 6
    heads: Count = 4
    patch: Count = 2
    """Latent pixels per token side."""


class TeachOptim(Strict):
    lr: Positive = 2e-3
    """Peak learning rate of Muon (matrices of the blocks) and AdamW (everything else)."""
    warmup: Annotated[int, Field(ge=0)] = 100
    decay: Fraction = 0.4
    """Final share of the run over which the learning rate falls linearly to zero."""
    weight_decay: Share = 0.01
    clip: Positive = 1.0


class TeachBudget(Strict):
    updates: Count
    batch: Count = 128


class TeachLog(Strict):
    every: Count = 20
    sample_every: Count = 500
    save_every: Count = 500


class TeachRecipe(Strict):
    name: Word
    seed: Annotated[int, Field(ge=0)] = 0
    source: Source
    init: str | None = None
    """Weights to start from: `bundled:<name>` or a path; null trains from scratch."""
    network: Network = Network()
    """Ignored where `init` is given: its own sizes are kept."""
    pool_size: Count = 20_000
    """Examples drawn per category (lab); a folder gives what it has."""
    composition: dict[Task, dict[Word, Share]]
    """Weights of the categories within each task."""
    mixture: dict[Task, Share]
    drop_text: Fraction = 0.1
    """Share of micro-batches trained without text, for classifier-free guidance."""
    optim: TeachOptim = TeachOptim()
    budget: TeachBudget
    ema: Fraction = 0.998
    precision: Literal["bf16", "fp32"] = "bf16"
    log: TeachLog = TeachLog()
