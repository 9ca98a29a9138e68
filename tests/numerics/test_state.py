"""What is carried on: the average of weights, and the files of states and of weights."""

import math
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fewstep.errors import CheckpointError, DiskError
from fewstep.models.lab import MMDiT, MMDiTConfig, load_mmdit, load_weights, save_weights
from fewstep.train.checkpoint import load_state, save_state
from fewstep.train.ema import Ema

from .exact import generator


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes: writes fail as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def weights_over_time(count: int) -> list[Tensor]:
    return list(torch.randn(count, 6, generator=generator(0)))


def averaged(weights: list[Tensor], decay: float) -> Tensor:
    """The average by `Ema`, of a module that takes each of `weights` in turn."""
    module = nn.Linear(6, 1, bias=False)
    module.weight.data.copy_(weights[0])
    ema = Ema(module, decay)
    for value in weights[1:]:
        module.weight.data.copy_(value)
        ema.update(module)
    ema.copy_to(module)
    return module.weight.detach()[0]


@pytest.mark.parametrize("decay", (0.0, 0.15, 0.5, 0.999))
def test_ema_closed_form(decay: float) -> None:
    """sum_j (1 - d_j) w_j prod_{i>j} d_i + w_0 prod_i d_i, d_n = min(decay, (1 + n) / (10 + n))."""
    weights = weights_over_time(31)
    rates = [min(decay, (1 + n) / (10 + n)) for n in range(1, 31)]
    share = [math.prod(rates)]
    share += [(1 - d) * math.prod(rates[j + 1 :]) for j, d in enumerate(rates)]
    assert sum(share) == pytest.approx(1)
    wanted = sum(s * w.double() for s, w in zip(share, weights, strict=True))
    found = averaged(weights, decay).double()
    torch.testing.assert_close(found, torch.as_tensor(wanted), rtol=1e-6, atol=1e-6)


def test_ema_warm_up_forgets_the_first_weights() -> None:
    """Decay 0.999 alone would leave them a share of 97% after 30 updates; warm-up < 1e-6."""
    weights = [torch.full((6,), 1.0)] + [torch.zeros(6)] * 30
    assert averaged(weights, 0.999).abs().max() < 1e-6
    # the first update alone: d_1 = 2 / 11
    assert averaged(weights[:2], 0.999)[0].item() == pytest.approx(2 / 11)


def test_ema_is_float32_and_independent_of_the_module() -> None:
    module = nn.Linear(3, 1, bias=False).bfloat16()
    ema = Ema(module, 0.9)
    first = module.weight.detach().float().clone()
    with torch.no_grad():
        module.weight += 1.0
    assert torch.equal(ema.average["weight"], first)
    ema.update(module)
    assert ema.average["weight"].dtype == torch.float32 and not ema.average["weight"].requires_grad


def test_ema_resumed_is_ema_uninterrupted(tmp_path: Path) -> None:
    def run(ema: Ema, module: nn.Linear, part: list[Tensor]) -> None:
        for value in part:
            module.weight.data.copy_(value)
            ema.update(module)

    weights = weights_over_time(12)
    module = nn.Linear(6, 1, bias=False)
    module.weight.data.copy_(weights[0])
    whole, cut = Ema(module, 0.9), Ema(module, 0.9)
    run(whole, module, weights)
    run(cut, module, weights[:5])
    save_state({"ema": cut.state_dict()}, tmp_path / "last.pt")
    again = Ema(nn.Linear(6, 1, bias=False), 0.9)
    again.load_state_dict(load_state(tmp_path / "last.pt")["ema"])
    run(again, module, weights[5:])
    assert torch.equal(whole.average["weight"], again.average["weight"])


def state(seed: int) -> dict[str, object]:
    draw = generator(seed)
    return {
        "step": seed,
        "weight": torch.randn(5000, generator=draw),
        "generator": draw.get_state(),
    }


def test_state_round_trip(tmp_path: Path) -> None:
    saved = state(3)
    save_state(saved, tmp_path / "new folder" / "last.pt")
    found = load_state(tmp_path / "new folder" / "last.pt")
    assert found.keys() == saved.keys() and found["step"] == 3
    for name in ("weight", "generator"):
        assert torch.equal(found[name], torch.as_tensor(saved[name]))
    assert [p.name for p in (tmp_path / "new folder").iterdir()] == ["last.pt"]


def test_truncated_state_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_state(state(1), path)
    whole = path.read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"last\.pt: truncated or damaged"):
            load_state(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    with pytest.raises(CheckpointError, match="no such file"):
        load_state(path)
    path.write_text("not a state")
    with pytest.raises(CheckpointError, match="damaged"):
        load_state(path)


def test_a_file_that_holds_no_state_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    torch.save(torch.zeros(3), path)
    with pytest.raises(CheckpointError):
        load_state(path)


def test_failed_write_keeps_the_previous_state(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_state(state(1), path)
    before = path.read_bytes()
    with full_disk(8192), pytest.raises(DiskError, match="could not be written"):
        save_state(state(2), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"], "no .part is left behind"
    save_state(state(2), path)
    assert load_state(path)["step"] == 2


def small_model(**changes: int) -> MMDiT:
    torch.manual_seed(0)
    sizes = {"channels": 2, "grid": 4, "width": 16, "depth": 1, "heads": 2, "vocabulary": 7}
    model = MMDiT(MMDiTConfig(**{**sizes, **changes}))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def save_model(model: MMDiT, path: Path, *, half: bool = False) -> None:
    save_weights(model, path, config=model.config, about={"seed": 0}, half=half)


def test_weights_round_trip(tmp_path: Path) -> None:
    model, path = small_model(), tmp_path / "teacher.safetensors"
    save_model(model, path)
    found = load_mmdit(path)
    assert found.config == model.config and not found.training
    for name, value in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


def test_half_weights_are_rounded_once_and_loaded_as_float32(tmp_path: Path) -> None:
    model, path = small_model(), tmp_path / "teacher.safetensors"
    save_model(model, path, half=True)
    for name, value in load_mmdit(path).state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, model.state_dict()[name].half().float()), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 32}, r"tensor image_place is \(4, 16\), this model needs \(4, 32\)"),
        ({"vocabulary": 9}, r"tensor text_in\.weight is \(7, 16\), this model needs \(9, 16\)"),
        ({"depth": 2}, r"tensor blocks\.1\.q_scale is missing"),
    ],
)
def test_wrong_size_names_the_tensor(tmp_path: Path, changes: dict[str, int], message: str) -> None:
    path = tmp_path / "teacher.safetensors"
    save_model(small_model(), path)
    with pytest.raises(CheckpointError, match=message):
        load_weights(small_model(**changes), path)


def test_surplus_tensors_are_named_and_nothing_is_loaded(tmp_path: Path) -> None:
    path, model = tmp_path / "teacher.safetensors", small_model()
    save_model(small_model(depth=2), path)
    nn.init.zeros_(model.image_in.weight)
    with pytest.raises(CheckpointError, match=r"lacks, first blocks\.1\."):
        load_weights(model, path)
    assert not model.image_in.weight.any()


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "teacher.safetensors"
    save_model(small_model(), path)
    whole = path.read_bytes()
    for size in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="damaged"):
            load_mmdit(path)
        with pytest.raises(CheckpointError, match="damaged"):
            load_weights(small_model(), path)


def test_failed_write_of_weights_is_a_clear_error(tmp_path: Path) -> None:
    with full_disk(8192), pytest.raises(DiskError, match="could not be written"):
        save_model(small_model(), tmp_path / "teacher.safetensors")


def test_failed_write_keeps_the_previous_weights(tmp_path: Path) -> None:
    path = tmp_path / "teacher.safetensors"
    save_model(small_model(), path)
    before = path.read_bytes()
    with full_disk(4096), pytest.raises(DiskError):
        save_model(small_model(depth=2), path)
    assert path.read_bytes() == before


def test_weights_of_another_kind_of_model_are_refused(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class OtherConfig:
        latent_channels: int = 4

    path = tmp_path / "autoencoder.safetensors"
    save_weights(nn.Linear(2, 2), path, config=OtherConfig(), about={})
    with pytest.raises(CheckpointError):
        load_mmdit(path)
