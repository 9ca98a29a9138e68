"""Classifier-free guidance and the step-wise multi-teacher real score against hand computation."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewstep.core.process import score_from_x0
from fewstep.guidance import classifier_free, real_denoised
from fewstep.models.lab import LabCondition

from .exact import generator


@dataclass
class Linear:
    """D = a x_t + b t + sum(text) + mean(source): every argument leaves its own mark."""

    a: float = 1.0
    b: float = 0.0
    asked: list[tuple[Tensor, Tensor, LabCondition]] = field(default_factory=list)

    def __call__(self, x_t: Tensor, t: Tensor, cond: LabCondition, /) -> Tensor:
        self.asked.append((x_t, t, cond))
        return self.answer(x_t, t, cond)

    def answer(self, x_t: Tensor, t: Tensor, cond: LabCondition) -> Tensor:
        text = (cond.text * cond.text_mask).sum(1).float()
        source = torch.zeros(len(x_t)) if cond.source is None else cond.source.mean((1, 2, 3))
        return self.a * x_t + (self.b * t + text + source).view(-1, 1, 1, 1)


def batch(count: int) -> tuple[Tensor, Tensor, LabCondition]:
    """States, times and conditions of which no two samples agree."""
    draw = generator(0)
    x_t = torch.randn(count, 2, 3, 3, generator=draw)
    t = torch.linspace(0.1, 0.9, count)
    text = torch.arange(1, 2 * count + 1).view(count, 2)
    source = torch.randn(count, 2, 3, 3, generator=draw)
    return x_t, t, LabCondition(text, torch.ones(count, 2, dtype=torch.bool), source)


def test_guidance_by_hand() -> None:
    """uncond + s (cond - uncond): here cond - uncond is the sum of the text's ids."""
    x_t, t, cond = batch(3)
    for scale in (0.0, 0.5, 4.0):
        guided = classifier_free(Linear(0.5, 2.0), x_t, t, cond, scale)
        assert cond.source is not None
        free = 0.5 * x_t + (2 * t + cond.source.mean((1, 2, 3))).view(-1, 1, 1, 1)
        text = torch.tensor([3.0, 7.0, 11.0]).view(-1, 1, 1, 1)
        torch.testing.assert_close(guided, free + scale * text, rtol=1e-6, atol=1e-6)


def test_unconditional_branch_drops_text_and_keeps_the_source() -> None:
    x_t, t, cond = batch(3)
    denoiser = Linear()
    classifier_free(denoiser, x_t, t, cond, 4.0)
    (x_1, t_1, with_text), (x_2, t_2, without) = denoiser.asked
    assert with_text is cond
    assert without.text.shape == without.text_mask.shape == (3, 0)
    assert without.source is cond.source
    assert x_1 is x_2 is x_t and t_1 is t_2 is t


def test_scale_one_costs_one_evaluation() -> None:
    x_t, t, cond = batch(3)
    denoiser = Linear()
    assert torch.equal(classifier_free(denoiser, x_t, t, cond, 1.0), denoiser.answer(x_t, t, cond))
    assert len(denoiser.asked) == 1


def test_guidance_in_x_0_is_guidance_of_the_score() -> None:
    x_t, t, cond = batch(3)
    x_t, t = x_t.double(), t.double()
    denoiser, s = Linear(0.5, 2.0), 3.5
    guided = score_from_x0(x_t, classifier_free(denoiser, x_t, t, cond, s), t)
    with_text = score_from_x0(x_t, denoiser.answer(x_t, t, cond), t)
    without = score_from_x0(x_t, denoiser.answer(x_t, t, cond.without_text()), t)
    torch.testing.assert_close(guided, without + s * (with_text - without), rtol=1e-12, atol=1e-12)


def test_real_score_by_hand_with_weights_per_sample() -> None:
    """Eq. 5 written out sample by sample, with a guidance scale for each teacher."""
    x_t, t, cond = batch(5)
    teachers = {"base": Linear(0.5, 1.0), "text": Linear(-1.0, 3.0), "edit": Linear(2.0, -2.0)}
    scales = {"base": 4.0, "text": 1.0, "edit": 2.5}
    weights = [
        {"base": 1.0},
        {"base": 0.7, "text": 0.3},
        {"base": 0.2, "text": 0.3, "edit": 0.5},
        {"base": 0.0, "edit": 1.0},
        {"base": 0.6, "text": 0.4, "edit": 0.0},
    ]
    real, answers = real_denoised(teachers, weights, scales, x_t, t, cond)

    for i, row in enumerate(weights):
        one = slice(i, i + 1)
        wanted = torch.zeros_like(x_t[one])
        for name, share in row.items():
            with_text = teachers[name].answer(x_t[one], t[one], cond[one])
            without = teachers[name].answer(x_t[one], t[one], cond[one].without_text())
            guided = without + scales[name] * (with_text - without)
            wanted += share * guided
            if share:
                torch.testing.assert_close(answers[name][one], guided, rtol=1e-5, atol=1e-5)
            else:
                assert answers[name][one].isnan().all()
        torch.testing.assert_close(real[one], wanted, rtol=1e-5, atol=1e-5)
    assert real.dtype == torch.float32


def test_teachers_see_their_own_samples_only() -> None:
    """Sub-batches: the right rows of state, time, text and source; the rest is NaN, not zero."""
    x_t, t, cond = batch(4)
    teachers = {"base": Linear(0.5), "text": Linear(2.0)}
    weights = [{"base": 1.0}, {"text": 1.0}, {"base": 0.5, "text": 0.5}, {"base": 1.0}]
    _, answers = real_denoised(teachers, weights, {"base": 1.0, "text": 1.0}, x_t, t, cond)
    for name, rows in {"base": [0, 2, 3], "text": [1, 2]}.items():
        ((x_seen, t_seen, cond_seen),) = teachers[name].asked
        assert torch.equal(x_seen, x_t[rows]) and torch.equal(t_seen, t[rows])
        assert torch.equal(cond_seen.text, cond.text[rows])
        assert torch.equal(cond_seen.text_mask, cond.text_mask[rows])
        assert cond_seen.source is not None and cond.source is not None
        assert torch.equal(cond_seen.source, cond.source[rows])
        unseen = answers[name].isnan().flatten(1)
        assert unseen.all(1).tolist() == [i not in rows for i in range(4)]
        assert not unseen[rows].any()


def test_one_hot_is_the_single_teacher_bit_for_bit() -> None:
    x_t, t, cond = batch(6)
    teachers = {"base": Linear(0.3, 1.7), "text": Linear(-1.1, 0.9)}
    for name in teachers:
        weights = [{other: float(other == name) for other in teachers}] * 6
        real, answers = real_denoised(teachers, weights, {"base": 4.0, "text": 2.0}, x_t, t, cond)
        alone = classifier_free(teachers[name], x_t, t, cond, 4.0 if name == "base" else 2.0)
        assert torch.equal(real, alone) and torch.equal(answers[name], alone)
        assert set(answers) == {name}


def test_teachers_without_weight_are_never_called() -> None:
    """No weight, whether zero or absent: no evaluation, and no need to be loaded."""
    x_t, t, cond = batch(4)
    base, idle = Linear(), Linear()
    weights = [{"base": 1.0, "idle": 0.0, "not loaded": 0.0}, {"base": 1.0}] * 2
    real_denoised({"base": base, "idle": idle}, weights, {"base": 4.0}, x_t, t, cond)
    assert len(base.asked) == 2 and not idle.asked


def test_mixture_of_x_0_is_the_mixture_of_scores() -> None:
    """Eq. 5 is written in scores: with weights that sum to 1 (eq. 6) both mixtures agree."""
    x_t, t, cond = batch(4)
    teachers = {"base": Linear(0.5, 1.0), "text": Linear(-1.0, 3.0)}
    share = 0.3
    weights = [{"base": 1 - share, "text": share}] * 4
    real, answers = real_denoised(teachers, weights, {"base": 2.0, "text": 1.0}, x_t, t, cond)
    scores = {name: score_from_x0(x_t, answer, t) for name, answer in answers.items()}
    mixed = (1 - share) * scores["base"] + share * scores["text"]
    found = score_from_x0(x_t, real, t)
    torch.testing.assert_close(found, mixed, rtol=1e-4, atol=1e-3)
    assert math.isfinite(found.abs().max().item())
