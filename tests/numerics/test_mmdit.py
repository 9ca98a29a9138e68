"""The lab model: what may and what may not change its answer."""

import math

import pytest
import torch
from torch import Tensor, nn

from fewstep.core.process import v_from_x0
from fewstep.data.pools import Pool, gather, pad_tokens
from fewstep.models.lab import LabCondition, MMDiT, MMDiTConfig, time_features

from .exact import generator

CAPTIONS = [[3, 1, 4, 1, 5], [2, 7], [6, 1, 8]]


@pytest.fixture(scope="module")
def model() -> MMDiT:
    """Random weights everywhere: the zero initialisation of the output would hide all else."""
    torch.manual_seed(0)
    made = MMDiT(MMDiTConfig(channels=3, grid=6, patch=2, width=32, depth=3, heads=4, vocabulary=9))
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made.eval().requires_grad_(False)


def batch(*, source: bool = False) -> tuple[Tensor, Tensor, LabCondition]:
    draw = generator(0)
    x_t, images = torch.randn(2, 3, 3, 6, 6, generator=draw)
    text, lengths = pad_tokens(CAPTIONS)
    mask = torch.arange(text.shape[1]) < lengths[:, None]
    return x_t, torch.tensor([0.9, 0.5, 0.1]), LabCondition(text, mask, images if source else None)


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def far(found: Tensor, wanted: Tensor) -> None:
    """Every sample differs."""
    assert ((found - wanted).abs().flatten(1).amax(1) > 1e-3).all()


def test_patches_and_back_is_the_identity(model: MMDiT) -> None:
    x = torch.randn(2, 3, 6, 6, generator=generator(1))
    tokens = model._patches(x)
    assert tokens.shape == (2, 9, 12)
    assert torch.equal(model._unpatch(tokens), x)
    # token 0 is the top left patch, token 1 the one to its right
    assert sorted(tokens[0, 1].tolist()) == sorted(x[0, :, :2, 2:4].flatten().tolist())


def test_denoised_and_velocity_belong_together(model: MMDiT) -> None:
    """The module answers x_0 = x_t - t v; at t = 0 that is x_t, at t = 1 x_t - v."""
    x_t, t, cond = batch()
    v = model.predict_v(x_t, t, cond)
    x_0 = model(x_t, t, cond)
    assert torch.equal(x_0, x_t - t.view(-1, 1, 1, 1) * v)
    close(v_from_x0(x_t, x_0, t), v)
    assert torch.equal(model(x_t, torch.zeros(3), cond), x_t)
    assert x_0.dtype == v.dtype == torch.float32


@pytest.mark.parametrize("source", (False, True))
def test_padding_of_text_changes_nothing(model: MMDiT, source: bool) -> None:
    x_t, t, cond = batch(source=source)
    together = model(x_t, t, cond)
    for i, caption in enumerate(CAPTIONS):
        one = slice(i, i + 1)
        text = torch.tensor([caption])
        mask = torch.ones_like(text, dtype=torch.bool)
        alone = model(x_t[one], t[one], LabCondition(text, mask, cond[one].source))
        close(together[one], alone)


def test_content_of_the_padding_is_never_read(model: MMDiT) -> None:
    x_t, t, cond = batch()
    other = torch.where(cond.text_mask, cond.text, torch.full_like(cond.text, 8))
    assert not torch.equal(other, cond.text)
    found = model(x_t, t, LabCondition(other, cond.text_mask))
    assert torch.equal(found, model(x_t, t, cond))


def test_dropped_text_is_text_that_no_one_sees(model: MMDiT) -> None:
    """Classifier-free guidance drops the text tokens; masking all of them is the same to the image.

    Only in a batch of its own kind does the cheaper form apply, so both must agree: with a source,
    without one, and for one empty caption in a batch of full ones.
    """
    for source in (False, True):
        x_t, t, cond = batch(source=source)
        dropped = model(x_t, t, cond.without_text())
        masked = model(
            x_t, t, LabCondition(cond.text, torch.zeros_like(cond.text_mask), cond.source)
        )
        close(masked, dropped)
        far(dropped, model(x_t, t, cond))

        mask = cond.text_mask.clone()
        mask[1] = False
        mixed = model(x_t, t, LabCondition(cond.text, mask, cond.source))
        close(mixed[1], dropped[1])


def test_each_word_and_its_place_matter(model: MMDiT) -> None:
    x_t, t, cond = batch()
    before = model(x_t, t, cond)
    swapped = cond.text.clone()
    swapped[:, [0, 1]] = swapped[:, [1, 0]]
    far(model(x_t, t, LabCondition(swapped, cond.text_mask)), before)


def test_source_matters_and_is_not_the_state(model: MMDiT) -> None:
    x_t, t, cond = batch(source=True)
    before = model(x_t, t, cond)
    assert cond.source is not None
    far(model(x_t, t, LabCondition(cond.text, cond.text_mask)), before)
    far(model(x_t, t, LabCondition(cond.text, cond.text_mask, cond.source.roll(1, 0))), before)
    far(model(cond.source, t, LabCondition(cond.text, cond.text_mask, x_t)), before)


def test_batched_is_single(model: MMDiT) -> None:
    x_t, t, cond = batch(source=True)
    together = model(x_t, t, cond)
    for i in range(3):
        one = slice(i, i + 1)
        close(together[one], model(x_t[one], t[one], cond[one]))


def test_encoder_states_serve_as_text() -> None:
    """text_width instead of vocabulary: states that are the embedding's rows give its answer."""
    torch.manual_seed(1)
    ids = MMDiT(MMDiTConfig(channels=3, grid=6, width=32, depth=2, heads=4, vocabulary=9))
    states = MMDiT(MMDiTConfig(channels=3, grid=6, width=32, depth=2, heads=4, text_width=32))
    for parameter in ids.parameters():
        nn.init.normal_(parameter, std=0.2)
    shared = {k: v for k, v in ids.state_dict().items() if not k.startswith("text_in")}
    shared |= {"text_in.weight": torch.eye(32), "text_in.bias": torch.zeros(32)}
    states.load_state_dict(shared)
    x_t, t, cond = batch()
    encoded = ids.text_in(cond.text)
    close(states(x_t, t, LabCondition(encoded, cond.text_mask)), ids(x_t, t, cond))


def test_pools_make_the_same_condition_as_by_hand() -> None:
    """gather: rows of several pools, trimmed to the longest; the mask is true on real text."""
    text, lengths = pad_tokens(CAPTIONS)
    images = torch.randn(3, 3, 6, 6, generator=generator(2)).half()
    pool = Pool("edit", "style", ("a", "b", "c"), text, lengths, source=images, target=-images)
    text, lengths = pad_tokens([[8, 8, 8, 8, 8, 8, 8], [5]])
    other = Pool("edit", "scene", ("d", "e"), text, lengths, source=images[:2], target=images[:2])
    cond, target = gather([pool, other, pool], [1, 1, 2])
    assert cond.text.tolist() == [[2, 7, 0], [5, 0, 0], [6, 1, 8]]
    assert cond.text_mask.tolist() == [[True, True, False], [True, False, False], [True] * 3]
    assert cond.source is not None and target is not None
    assert torch.equal(cond.source, torch.stack([images[1], images[1], images[2]]).float())
    assert torch.equal(target, torch.stack([-images[1], images[1], -images[2]]).float())


def test_time_features_tell_the_whole_path_apart() -> None:
    """cos and sin of 1000 t w_j, w_j falling geometrically from 1 towards 1/10000 (float32)."""
    t = torch.tensor([0.0, 0.25, 1.0])
    features = time_features(t, 8)
    for j in range(4):
        angle = 1000 * t * 10_000 ** (-j / 4)
        close(features[:, j], angle.cos(), 1e-4)
        close(features[:, 4 + j], angle.sin(), 1e-4)
    nearby = time_features(torch.tensor([0.5, 0.501]), 64)
    assert (nearby[0] - nearby[1]).norm() > 0.1 * math.sqrt(32)
