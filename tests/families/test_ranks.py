"""`fewstep distill` of a tiny real pipeline on two ranks; torchrun runs this module."""

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fewstep.cli import app, guarded

from ..ranked import ROOT, environment, torchrun
from . import stock
from .test_distil import distilled, folder, place, recipe_of, tiny, write

__all__ = ["folder", "place", "tiny"]


@pytest.mark.slow
def test_two_ranks_train_the_lora_of_one(place: Path, folder: Any, tmp_path: Path) -> None:
    """Both tasks, two teachers, checkpointed blocks. The cache is empty: the lead fills it."""
    lora = {"kind": "lora", "rank": 4, "alpha": 8.0, "checkpointing": True}
    short = {"evaluation__models": ["student"], "log__sample_every": 4, "model__cast": lora}
    recipe = recipe_of(place, folder, "qwen_image_21", **short, optim__warmup=0)
    recipe["optim"] |= {"student": {"lr": 1e-3}, "fake": {"lr": 1e-3}}
    recipe["budget"] |= {"batch": 4, "micro_batch": 1}
    recipe["data"]["source"]["cache"] = str(tmp_path / "cache")
    path = write(recipe, tmp_path / "two.yaml")
    command = torchrun("tests.families.test_ranks", "distill", path, "--out", tmp_path / "two")
    done = subprocess.run(
        command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr

    recipe["budget"]["micro_batch"] = 2
    one = distilled(recipe, tmp_path / "one")
    a, b = (load_file(out / "student.safetensors") for out in (tmp_path / "two", one))
    assert a.keys() == b.keys() and max(t.abs().max() for n, t in a.items() if "lora_B" in n) > 1e-4
    for name, tensor in b.items():
        torch.testing.assert_close(a[name], tensor, rtol=0, atol=5e-5)
    names = [
        sorted(str(p.relative_to(out)) for p in out.rglob("*")) for out in (tmp_path / "two", one)
    ]
    assert names[0] == names[1]


if __name__ == "__main__":
    torch.set_num_threads(1)
    with ExitStack() as stack:
        stack.enter_context(stock.tiny_sources())
        stack.enter_context(stock.processors_without_video())
        sys.exit(guarded(app))
