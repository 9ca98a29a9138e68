"""Break one line at a time and see a test fail: `python tools/breakages.py [--only NAME ...]`.

Works on a copy of the package and the tests in a temporary folder. Each breakage names the one test
that must fail under it and pass without it. A new one is one more row in BREAKAGES, then
`--document` to put it into the table of docs/numerics.md.

Exit code 1 if a breakage survives, its line is no longer found exactly once, its test does not pass
on the unbroken code, or that table is out of date. --only with one NAME also shows how the test
fails.
"""

import argparse
import gc
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from multiprocessing.context import ForkServerContext
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TESTS = "tests/numerics/"
DOCUMENT = ROOT / "docs" / "numerics.md"
HEADER = "| breakage | file | line | becomes | caught by |\n|---|---|---|---|---|\n"
SECONDS = 60  # a broken loop must not hold up the rest


class Breakage(NamedTuple):
    name: str
    file: str
    """Below `fewstep/`."""
    line: str
    """A fragment of one line that occurs once in the file."""
    broken: str
    """What stands there instead."""
    test: str
    """The id of the test that must fail, below `tests/numerics/` unless it starts with `tests/`."""

    @property
    def test_id(self) -> str:
        return self.test if self.test.startswith("tests/") else TESTS + self.test


BREAKAGES = [
    # the path and its conversions
    Breakage(
        "path-t-swapped",
        "core/process.py",
        "return (1 - t_) * x_0 + t_ * eps",
        "return t_ * x_0 + (1 - t_) * eps",
        "test_process.py::test_path_runs_from_data_to_noise",
    ),
    Breakage(
        "teacher-times-unshifted",
        "train/teach.py",
        "generator=generator)), shift).to(x_0.device)",
        "generator=generator)), 1.0).to(x_0.device)",
        "test_flow_matching.py::test_times_are_logit_normal_and_shifted",
    ),
    Breakage(
        "teacher-time-not-told",
        "train/teach.py",
        "model.predict_v(add_noise(x_0, eps, t), t, cond)",
        "model.predict_v(add_noise(x_0, eps, t), 0.5 * t, cond)",
        "test_flow_matching.py::test_noise_is_standard_and_mixed_at_the_time_the_model_is_told",
    ),
    Breakage(
        "velocity-sign",
        "core/process.py",
        "return eps - x_0",
        "return x_0 - eps",
        "test_process.py::test_velocity_is_the_slope_of_the_path",
    ),
    Breakage(
        "x0-from-v-sign",
        "core/process.py",
        "return x_t - expand(t, x_t) * v",
        "return x_t + expand(t, x_t) * v",
        "test_process.py::test_conversions_return_what_made_the_state",
    ),
    Breakage(
        "score-sign",
        "core/process.py",
        "return -(x_t - (1 - t_) * x_0) / t_.square()",
        "return (x_t - (1 - t_) * x_0) / t_.square()",
        "test_process.py::test_score_of_the_posterior_mean_is_grad_log_density",
    ),
    Breakage(
        "score-over-t",
        "core/process.py",
        "/ t_.square()",
        "/ t_",
        "test_process.py::test_score_of_the_posterior_mean_is_grad_log_density",
    ),
    Breakage(
        "euler-ratio-inverted",
        "core/process.py",
        "expand(t_next / t, x_t)",
        "expand(t / t_next, x_t)",
        "test_process.py::test_euler_step_moves_along_the_line_through_x_0",
    ),
    Breakage(
        "shift-inverse",
        "core/process.py",
        "return shift * t / (1 + (shift - 1) * t)",
        "return t / (shift - (shift - 1) * t)",
        "test_process.py::test_shift_keeps_the_ends_and_its_inverse_is_the_reciprocal",
    ),
    # the grid and playback
    Breakage(
        "grid-without-shift",
        "samplers.py",
        "tuple(shift * t / (1 + (shift - 1) * t) for t in uniform)",
        "tuple(uniform)",
        "test_samplers.py::test_grid_of_four_steps_with_shift_three",
    ),
    Breakage(
        "playback-stops-early",
        "samplers.py",
        "(*grid[1:], 0.0)",
        "(*grid[1:], grid[-1])",
        "test_samplers.py::test_one_point_of_data_is_reached_exactly",
    ),
    Breakage(
        "asked-at-next-time",
        "samplers.py",
        "torch.full((len(x),), t,",
        "torch.full((len(x),), t_next,",
        "test_samplers.py::test_sampler_asks_at_the_grid_times_and_returns_the_last_answer",
    ),
    Breakage(
        "euler-with-half-the-step",
        "samplers.py",
        "torch.full_like(now, t_next)",
        "torch.full_like(now, (t + t_next) / 2)",
        "test_samplers.py::test_sampler_converges_to_the_mixture_at_first_order",
    ),
    # rollout
    Breakage(
        "gradient-through-all-steps",
        "rollout.py",
        "with torch.no_grad():",
        "with torch.enable_grad():",
        "test_samplers.py::test_gradient_only_through_step_k",
    ),
    Breakage(
        "one-step-short",
        "rollout.py",
        "pairwise(grid[: k + 1])",
        "pairwise(grid[:k])",
        "test_samplers.py::test_rollout_visits_the_states_of_sampling",
    ),
    Breakage(
        "answer-at-time-before",
        "rollout.py",
        "torch.full((len(x),), grid[k],",
        "torch.full((len(x),), grid[max(k - 1, 0)],",
        "test_samplers.py::test_last_rollout_is_the_sample",
    ),
    # guidance and teachers
    Breakage(
        "cfg-swapped",
        "guidance.py",
        "unconditional + scale * (conditional - unconditional)",
        "conditional + scale * (unconditional - conditional)",
        "test_guidance.py::test_guidance_by_hand",
    ),
    Breakage(
        "cfg-scale-minus-one",
        "guidance.py",
        "unconditional + scale *",
        "unconditional + (scale - 1) *",
        "test_guidance.py::test_guidance_by_hand",
    ),
    Breakage(
        "cfg-always-two-evaluations",
        "guidance.py",
        "if scale == 1.0:",
        "if scale is None:",
        "test_guidance.py::test_scale_one_costs_one_evaluation",
    ),
    Breakage(
        "source-dropped-in-unconditional",
        "models/lab.py",
        "text_mask=self.text_mask[:, :0])",
        "text_mask=self.text_mask[:, :0], source=None)",
        "test_guidance.py::test_unconditional_branch_drops_text_and_keeps_the_source",
    ),
    Breakage(
        "weights-of-another-sample",
        "guidance.py",
        "row.get(name, 0.0) for row in weights]",
        "row.get(name, 0.0) for row in weights[::-1]]",
        "test_guidance.py::test_real_score_by_hand_with_weights_per_sample",
    ),
    Breakage(
        "last-teacher-wins",
        "guidance.py",
        "real[seen] += share[seen]",
        "real[seen] = share[seen]",
        "test_guidance.py::test_real_score_by_hand_with_weights_per_sample",
    ),
    Breakage(
        "one-scale-for-all-teachers",
        "guidance.py",
        "cond[seen], scales[name]).float()",
        "cond[seen], max(scales.values())).float()",
        "test_guidance.py::test_one_hot_is_the_single_teacher_bit_for_bit",
    ),
    Breakage(
        "conditions-of-the-first-rows",
        "guidance.py",
        "cond[seen]",
        "cond[: len(seen)]",
        "test_guidance.py::test_teachers_see_their_own_samples_only",
    ),
    Breakage(
        "unseen-rows-zero",
        "guidance.py",
        'float("nan")',
        "0.0",
        "test_guidance.py::test_teachers_see_their_own_samples_only",
    ),
    Breakage(
        "idle-teachers-called",
        "guidance.py",
        "for row in rows for name, share in row.items() if share > 0}",
        "for row in rows for name, share in row.items()}",
        "test_guidance.py::test_teachers_without_weight_are_never_called",
    ),
    # DMD
    Breakage(
        "dmd-sign",
        "objectives/dmd.py",
        "difference = fake.float() - real.float()",
        "difference = real.float() - fake.float()",
        "test_dmd.py::test_expected_gradient_of_a_gaussian_student_is_that_of_the_kl",
    ),
    Breakage(
        "dmd-ascends",
        "objectives/dmd.py",
        "target = (x - direction).detach()",
        "target = (x + direction).detach()",
        "test_dmd.py::test_descent_with_exact_scores_reaches_the_teacher",
    ),
    Breakage(
        "dmd-detach-missing",
        "objectives/dmd.py",
        "target = (x - direction).detach()",
        "target = x - direction",
        "test_dmd.py::test_gradient_of_the_loss_is_the_direction_over_numel",
    ),
    Breakage(
        "dmd-half-missing",
        "objectives/dmd.py",
        "return 0.5 * F.mse_loss",
        "return F.mse_loss",
        "test_dmd.py::test_expected_gradient_towards_a_mixture_is_that_of_the_kl",
    ),
    Breakage(
        "normaliser-of-the-batch",
        "objectives/dmd.py",
        ".abs().flatten(1).mean(1).clamp_min",
        ".abs().mean().expand(len(x)).clamp_min",
        "test_dmd.py::test_normaliser_belongs_to_one_sample",
    ),
    Breakage(
        "normaliser-from-fake",
        "objectives/dmd.py",
        "(x.float() - real.float()).abs()",
        "(x.float() - fake.float()).abs()",
        "test_dmd.py::test_normaliser_by_hand",
    ),
    Breakage(
        "fake-loss-moves-the-student",
        "objectives/dmd.py",
        "velocity(x.detach().float(), eps.float())",
        "velocity(x.float(), eps.float())",
        "test_dmd.py::test_the_fake_loss_sends_no_gradient_into_the_student",
    ),
    Breakage(
        "fake-velocity-reversed",
        "objectives/dmd.py",
        "velocity(x.detach().float(), eps.float())",
        "velocity(eps.float(), x.detach().float())",
        "test_dmd.py::test_minimiser_of_the_fake_loss_is_the_posterior_mean",
    ),
    Breakage(
        "renoise-beyond-high",
        "objectives/dmd.py",
        "low + (high - low) * u",
        "low + high * u",
        "test_dmd.py::test_renoise_time_closed_form",
    ),
    # what is carried on
    Breakage(
        "ema-decay-reversed",
        "train/ema.py",
        "lerp_(p.float(), 1 - decay)",
        "lerp_(p.float(), decay)",
        "test_state.py::test_ema_closed_form",
    ),
    Breakage(
        "ema-without-warm-up",
        "train/ema.py",
        "min(self.decay, (1 + self.updates) / (10 + self.updates))",
        "self.decay",
        "test_state.py::test_ema_warm_up_forgets_the_first_weights",
    ),
    Breakage(
        "ema-shares-memory",
        "train/ema.py",
        "p.detach().float().clone()",
        "p.detach().float()",
        "test_state.py::test_ema_closed_form",
    ),
    Breakage(
        "ema-forgets-its-count",
        "train/ema.py",
        'self.updates = state["updates"]',
        "self.updates = 0",
        "test_state.py::test_ema_resumed_is_ema_uninterrupted",
    ),
    Breakage(
        "state-written-in-place",
        "train/checkpoint.py",
        'path.with_name(path.name + ".part")',
        "path",
        "test_state.py::test_failed_write_keeps_the_previous_state",
    ),
    Breakage(
        "truncated-state-not-refused",
        "train/checkpoint.py",
        "except (RuntimeError, OSError, EOFError,",
        "except (OSError, EOFError,",
        "test_state.py::test_truncated_state_is_refused",
    ),
    Breakage(
        "wrong-size-not-named",
        "models/lab.py",
        "if found[name].shape != value.shape:",
        "if found[name].ndim != value.ndim:",
        "test_state.py::test_wrong_size_names_the_tensor",
    ),
    # the lab model
    Breakage(
        "text-mask-dropped",
        "models/lab.py",
        "mask = seen[:, None, None, :]",
        "mask = None",
        "test_mmdit.py::test_padding_of_text_changes_nothing",
    ),
    Breakage(
        "image-masked-with-the-text",
        "models/lab.py",
        "(n * (len(tokens) - 1), 0), value=True)",
        "(n * (len(tokens) - 1), 0), value=False)",
        "test_mmdit.py::test_padding_of_text_changes_nothing",
    ),
    Breakage(
        "words-without-place",
        "models/lab.py",
        "self.text_in(cond.text) + self.text_place[:length]",
        "self.text_in(cond.text)",
        "test_mmdit.py::test_each_word_and_its_place_matter",
    ),
    Breakage(
        "source-ignored",
        "models/lab.py",
        "if cond.source is not None:",
        "if cond.source is True:",
        "test_mmdit.py::test_source_matters_and_is_not_the_state",
    ),
    Breakage(
        "patches-transposed",
        "models/lab.py",
        "unflatten(2, (side, side))",
        "unflatten(2, (side, side)).transpose(2, 3)",
        "test_mmdit.py::test_patches_and_back_is_the_identity",
    ),
    Breakage(
        "padding-counts-as-text",
        "data/pools.py",
        "torch.arange(longest) < lengths[:, None]",
        "torch.arange(longest) <= lengths[:, None]",
        "test_mmdit.py::test_pools_make_the_same_condition_as_by_hand",
    ),
    Breakage(
        "lambda-of-step-0",
        "train/step.py",
        "return Mix([c.weights[k] for c in own]",
        "return Mix([c.weights[0] for c in own]",
        "tests/test_loop.py::test_the_student_gradient_is_equation_7_by_hand",
    ),
    Breakage(
        "lambda-of-one-category",
        "train/step.py",
        "return Mix([c.weights[k] for c in own]",
        "return Mix([own[0].weights[k] for _ in own]",
        "tests/test_loop.py::test_the_student_gradient_is_equation_7_by_hand",
    ),
    Breakage(
        "fake-score-of-the-student",
        "train/step.py",
        "return Score(x_t, t, cast.fake(x_t, t, batch.cond).float(), real, answers)",
        "return Score(x_t, t, cast.student(x_t, t, batch.cond).float(), real, answers)",
        "tests/test_loop.py::test_the_student_gradient_is_equation_7_by_hand",
    ),
    Breakage(
        "fake-sees-clean-samples",
        "train/step.py",
        "predicted = cast.fake.predict_v(add_noise(x, eps, t), t, batch.cond)",
        "predicted = cast.fake.predict_v(x, t, batch.cond)",
        "tests/test_loop.py::test_the_fake_score_is_trained_on_re_noised_samples_of_the_student",
    ),
    Breakage(
        "fake-re-noised-backwards",
        "train/step.py",
        "predicted = cast.fake.predict_v(add_noise(x, eps, t), t, batch.cond)",
        "predicted = cast.fake.predict_v(add_noise(eps, x, t), t, batch.cond)",
        "tests/test_loop.py::test_the_fake_score_is_trained_on_re_noised_samples_of_the_student",
    ),
    Breakage(
        "finite-check-missing",
        "train/step.py",
        '    check_finite(direction, "score difference", batch)',
        "    pass",
        "tests/test_loop.py::test_a_value_that_is_not_finite_stops_before_anything_is_updated",
    ),
    Breakage(
        "noise-generator-not-resumed",
        "train/loop.py",
        'self.noise.set_state(state["noise"])',
        "pass",
        "tests/test_loop.py::test_resume_needs_every_part_of_the_state",
    ),
    Breakage(
        "anchor-velocity-sign",
        "objectives/anchor.py",
        "return (noise.float() - anchor.float()) / (1 - t_anchor)",
        "return (anchor.float() - noise.float()) / (1 - t_anchor)",
        "tests/test_loop.py::test_the_anchor_is_the_velocity_to_where_the_teacher_has_walked",
    ),
    Breakage(
        "anchor-one-step-short",
        "train/step.py",
        "[: anchor.steps + 1]",
        "[: anchor.steps]",
        "tests/test_loop.py::test_the_anchor_is_the_velocity_to_where_the_teacher_has_walked",
    ),
    # the other objectives
    Breakage(
        "augmentation-added",
        "objectives/decoupled.py",
        "- augmentation_weight * pull",
        "+ augmentation_weight * pull",
        "test_objectives_matching.py::test_both_terms_at_one_state_are_dmd_with_the_guided_teacher",
    ),
    Breakage(
        "decoupled-normaliser-unguided",
        "objectives/decoupled.py",
        "distance_to(real.float() + pull, x)",
        "distance_to(real.float(), x)",
        "test_objectives_matching.py::test_both_terms_at_one_state_are_dmd_with_the_guided_teacher",
    ),
    Breakage(
        "augmentation-bound-not-unshifted",
        "objectives/decoupled.py",
        "shift_time(torch.tensor(below), 1 / shift)",
        "shift_time(torch.tensor(below), shift)",
        "test_objectives_matching.py::test_augmentation_is_never_noisier_than_the_student",
    ),
    Breakage(
        "augmentation-scale-s",
        "train/methods.py",
        "return (scale - 1) * (conditional",
        "return scale * (conditional",
        "tests/test_methods.py::test_decoupled_scores_at_one_state_are_the_guided_ones",
    ),
    Breakage(
        "augmentation-without-lambda",
        "train/methods.py",
        "added[seen] += share[seen].view(-1, *[1] * (x_t.ndim - 1)) * own.float()",
        "added[seen] += own.float()",
        "tests/test_methods.py::test_decoupled_scores_at_one_state_are_the_guided_ones",
    ),
    Breakage(
        "augmentation-at-the-matching-state",
        "train/methods.py",
        "augment(cast, batch, k, plan, add_noise(x, eps_ca, t_ca), t_ca)",
        "augment(cast, batch, k, plan, add_noise(x, eps, t), t)",
        "tests/test_methods.py::test_decoupled_update_by_hand",
    ),
    Breakage(
        "augmentation-unbounded",
        "train/methods.py",
        "below=plan.grid[k] if objective.below_step else 1.0",
        "below=1.0",
        "tests/test_methods.py::test_decoupled_update_by_hand",
    ),
    Breakage(
        "tdm-noise-as-if-from-data",
        "objectives/tdm.py",
        "(tau.square() - a.square() * s**2)",
        "tau.square()",
        "test_objectives_matching.py::test_diffusing_a_noised_sample_gives_the_path_at_the_later_time",
    ),
    Breakage(
        "tdm-fake-target-sign",
        "objectives/tdm.py",
        "(xi.float() - b / t * x_tau) / (1 - t)",
        "(xi.float() + b / t * x_tau) / (1 - t)",
        "test_objectives_matching.py::test_minimiser_of_the_fake_loss_has_the_score_of_the_diffused_state",
    ),
    Breakage(
        "tdm-fake-loss-unweighted",
        "objectives/tdm.py",
        "error = b / t * predicted_v.float()",
        "error = predicted_v.float()",
        "test_objectives_matching.py::test_minimiser_of_the_fake_loss_has_the_score_of_the_diffused_state",
    ),
    Breakage(
        "tdm-interval-of-the-next-step",
        "train/methods.py",
        "low + (high - low) * u, draw_noise",
        "high - (high - low) * u / 2, draw_noise",
        "tests/test_methods.py::test_tdm_update_by_hand",
    ),
    Breakage(
        "tdm-renoises-x0",
        "train/methods.py",
        "return x, euler_step(state, x, t, torch.full_like(t, then)), then",
        "return x, x, then",
        "tests/test_methods.py::test_tdm_update_by_hand",
    ),
    Breakage(
        "huber-per-batch",
        "objectives/tdm.py",
        "squared = difference.square().flatten(1).mean(1)",
        "squared = difference.square().mean().expand(len(fake))",
        "test_objectives_matching.py::test_huber_direction_is_the_gradient_of_the_pseudo_huber_distance",
    ),
    Breakage(
        "discriminator-labels-swapped",
        "objectives/gan.py",
        "F.softplus(-real).mean() + F.softplus(fake).mean()",
        "F.softplus(real).mean() + F.softplus(-fake).mean()",
        "test_objectives_matching.py::test_the_head_learns_to_tell_two_laws_of_tokens_apart",
    ),
    Breakage(
        "generator-loss-saturates",
        "objectives/gan.py",
        "return F.softplus(-fake).mean()",
        "return -F.softplus(fake).mean()",
        "test_objectives_matching.py::test_generator_loss_pushes_to_where_the_discriminator_says_real",
    ),
    Breakage(
        "gan-slope-reversed",
        "train/methods.py",
        "(slope * (x - x.detach())).sum()",
        "(slope * (x.detach() - x)).sum()",
        "tests/test_methods.py::test_dmd2_adds_the_slope_of_minus_log_d",
    ),
    Breakage(
        "gan-trains-the-fake-from-the-student",
        "train/methods.py",
        "(slope,) = torch.autograd.grad(gan, sample)",
        "gan.backward(); slope = sample.grad",
        "tests/test_methods.py::test_the_students_loss_reaches_the_student_alone",
    ),
    Breakage(
        "gan-real-images-forgotten",
        "train/methods.py",
        "for image in (batch.target, x)",
        "for image in (x, x)",
        "tests/test_methods.py::test_dmd2_trains_head_and_fake_on_the_pools_own_images",
    ),
    Breakage(
        "features-of-the-whole-network",
        "models/lab.py",
        "self._trunk(x_t, t, cond, len(self.blocks) // 2)[0]",
        "self._trunk(x_t, t, cond, len(self.blocks))[0]",
        "tests/test_methods.py::test_dmd2_features_are_half_of_the_network",
    ),
    Breakage(
        "consistency-target-not-detached",
        "objectives/consistency.py",
        "target.detach().float()",
        "target.float()",
        "test_objectives_trajectory.py::test_consistency_gradient_is_of_the_first_landing_alone",
    ),
    Breakage(
        "consistency-lands-at-0",
        "objectives/consistency.py",
        "torch.full_like(t, edge)",
        "torch.zeros_like(t)",
        "test_objectives_trajectory.py::test_landing_by_hand_and_at_the_edge",
    ),
    Breakage(
        "consistency-no-boundary-condition",
        "objectives/consistency.py",
        "return torch.where(expand(t, x_t) > edge, landed, x_t)",
        "return landed",
        "test_objectives_trajectory.py::test_landing_by_hand_and_at_the_edge",
    ),
    Breakage(
        "consistency-neighbour-noisier",
        "train/methods.py",
        "t, t_next = times[n], times[n + 1]",
        "t, t_next = times[n + 1], times[n]",
        "tests/test_methods.py::test_consistency_update_by_hand",
    ),
    Breakage(
        "consistency-target-at-the-same-time",
        "train/methods.py",
        "cast.student(x_next, t_next, batch.cond).float(), t_next, edge)",
        "cast.student(x_next, t, batch.cond).float(), t_next, edge)",
        "tests/test_methods.py::test_consistency_update_by_hand",
    ),
    Breakage(
        "phase-not-shifted",
        "objectives/consistency.py",
        "*(shift * u / (1 + (shift - 1) * u) for u in uniform)",
        "*uniform",
        "test_objectives_trajectory.py::test_phases_together_are_the_teachers_own_grid",
    ),
    Breakage(
        "regression-chord-from-0",
        "objectives/trajectory.py",
        "/ (t - end).view",
        "/ t.view",
        "test_objectives_trajectory.py::test_a_student_that_regresses_the_walk_plays_the_teachers_sample",
    ),
    Breakage(
        "regression-of-the-wrong-state",
        "train/methods.py",
        "state, target = batch.states[k], batch.states[k + 1]",
        "state, target = batch.states[k], batch.states[-1]",
        "tests/test_methods.py::test_regression_update_by_hand",
    ),
    Breakage(
        "walk-with-the-first-mix",
        "train/methods.py",
        "state, mix = states[-1], partial(guided_mix, cast, batch, k, plan)",
        "state, mix = states[-1], partial(guided_mix, cast, batch, 0, plan)",
        "tests/test_methods.py::test_the_walk_follows_the_mix_of_the_step_it_is_in",
    ),
    Breakage(
        "walks-never-repeat",
        "train/walks.py",
        "if self.position < self.count:",
        "if True:",
        "tests/test_methods.py::test_trajectories_are_walked_once_and_gone_over_again",
    ),
    Breakage(
        "walks-forgotten-on-resume",
        "train/walks.py",
        'self.made = [Walk(*walk) for walk in state["made"]]',
        "self.position = 0",
        "tests/test_methods.py::test_a_killed_and_resumed_run_equals_the_uninterrupted_one",
    ),
    Breakage(
        "discriminator-forgotten-on-resume",
        "train/loop.py",
        'self.head_optimiser.load_state_dict(state["head_optimiser"])',
        "pass",
        "tests/test_methods.py::test_a_killed_and_resumed_run_equals_the_uninterrupted_one",
    ),
    # stability: instruments, probe, adaptive lambda
    Breakage(
        "mismatch-of-the-teachers-size",
        "train/instruments.py",
        "return (other - own).norm(dim=1) / own.norm(dim=1)",
        "return (other - own).norm(dim=1) / other.norm(dim=1)",
        "tests/test_instruments.py::test_the_mismatch_is_that_of_the_scores",
    ),
    Breakage(
        "mismatch-in-x0",
        "train/instruments.py",
        "other = eps_from_x0(x_t, answer, t).flatten(1)",
        "other = own + (answer - fake).flatten(1)",
        "tests/test_instruments.py::test_the_mismatch_is_that_of_the_scores",
    ),
    Breakage(
        "share-without-lambda",
        "train/instruments.py",
        "pulls = {name: weight * mismatch[name] for",
        "pulls = {name: mismatch[name] for",
        "tests/test_instruments.py::test_shares_follow_lambda_and_sum_to_one",
    ),
    Breakage(
        "mismatch-over-all-groups",
        "train/instruments.py",
        "rows = [i for i, other in enumerate(groups) if other == group]",
        "rows = list(range(len(groups)))",
        "tests/test_instruments.py::test_mismatch_and_shares_by_hand",
    ),
    Breakage(
        "adaptive-speed-sign",
        "train/adaptive.py",
        "speed = (rule.limit - ratio) /",
        "speed = (ratio - rule.limit) /",
        "tests/test_adaptive.py::test_a_constant_mismatch_gives_a_straight_line_up_to_one",
    ),
    Breakage(
        "adaptive-falls-without-bound",
        "train/adaptive.py",
        "min(1.0, max(-1.0, speed))",
        "min(1.0, speed)",
        "tests/test_adaptive.py::test_above_the_limit_it_falls_back_to_the_anchor",
    ),
    Breakage(
        "adaptive-rises-without-bound",
        "train/adaptive.py",
        "min(1.0, max(-1.0, speed))",
        "max(-1.0, speed)",
        "tests/test_adaptive.py::test_a_constant_mismatch_gives_a_straight_line_up_to_one",
    ),
    Breakage(
        "adaptive-per-measurement",
        "train/adaptive.py",
        "step = rule.rate * (update - state.measured_at) *",
        "step = rule.rate *",
        "tests/test_adaptive.py::test_the_way_does_not_depend_on_how_often_it_is_measured",
    ),
    Breakage(
        "adaptive-average-swapped",
        "train/adaptive.py",
        "rule.decay * before + (1 - rule.decay) * value",
        "rule.decay * value + (1 - rule.decay) * before",
        "tests/test_adaptive.py::test_it_takes_the_running_average_of_each_teacher",
    ),
    Breakage(
        "adaptive-ratio-inverted",
        "train/adaptive.py",
        "ratio = gaining / max(losing, 1e-12)",
        "ratio = losing / max(gaining, 1e-12)",
        "tests/test_adaptive.py::test_it_takes_the_running_average_of_each_teacher",
    ),
    Breakage(
        "adaptive-mix-swapped",
        "train/adaptive.py",
        "(1 - a) * start.get(m, 0.0) + a * end.get(m, 0.0)",
        "a * start.get(m, 0.0) + (1 - a) * end.get(m, 0.0)",
        "tests/test_adaptive.py::test_lambda_is_a_mixture_at_every_moment_and_exact_at_both_ends",
    ),
    Breakage(
        "adaptive-forgotten-on-resume",
        "train/adaptive.py",
        'self.progress[group, k] = Progress(**state[f"{group}/k{k}"])',
        "pass",
        "tests/test_adaptive.py::test_lambda_moves_in_training_and_resumes_bit_for_bit",
    ),
    Breakage(
        "adaptive-hears-every-update",
        "train/adaptive.py",
        "due = update % entry.adaptive.every == 0",
        "due = True",
        "tests/test_adaptive.py::test_a_teacher_without_weight_is_heard_only_every_so_many_updates",
    ),
    Breakage(
        "adaptive-moves-on-half-a-measurement",
        "train/adaptive.py",
        "if len(found) == len(gains) + len(losses):",
        "if found:",
        "tests/test_adaptive.py::test_one_teacher_alone_is_no_measurement",
    ),
    Breakage(
        "adaptive-never-observes",
        "train/loop.py",
        "metrics |= d.schedule.observe(d.step, metrics)",
        "pass",
        "tests/test_adaptive.py::test_lambda_moves_in_training_and_resumes_bit_for_bit",
    ),
    Breakage(
        "adaptive-plan-of-the-start",
        "train/loop.py",
        "plan = d.schedule.at(d.step)",
        "plan = d.plan",
        "tests/test_adaptive.py::test_lambda_moves_in_training_and_resumes_bit_for_bit",
    ),
    Breakage(
        "unweighted-teacher-pulls",
        "train/adaptive.py",
        "return {name: weight for name, weight in row.items() if weight > 0}",
        "return {name: max(weight, 1e-3) for name, weight in row.items()}",
        "tests/test_adaptive.py::test_both_ends_give_the_loss_of_the_fixed_schedule_bit_for_bit",
    ),
    Breakage(
        "start-table-unplanned",
        "recipe/guidance.py",
        "tables += adaptive.start",
        "pass",
        "tests/test_adaptive.py::test_the_plan_counts_and_loads_the_teachers_of_both_tables",
    ),
    Breakage(
        "probe-on-the-evaluation-split",
        "evals/probe.py",
        "settings.per_category, seed, evaluation=False)",
        "settings.per_category, seed, evaluation=True)",
        "tests/test_instruments.py::test_probe_cases_are_of_the_training_split",
    ),
    Breakage(
        "probe-noise-of-the-student-alone",
        "evals/probe.py",
        "excess = flat_noise(np.concatenate(own)) - flat_noise(np.concatenate(base))",
        "excess = flat_noise(np.concatenate(own))",
        "tests/test_instruments.py::test_noise_is_told_against_the_teacher",
    ),
    Breakage(
        "probe-noise-by-case",
        "evals/probe.py",
        "noise = self.noise.repeat(len(cases), *[1] * (self.noise.ndim - 1))",
        "noise = self.noise.repeat_interleave(len(cases), 0)",
        "tests/test_instruments.py::test_the_same_picture_for_every_prompt_is_an_alarm",
    ),
    Breakage(
        "variety-of-seeds",
        "evals/probe.py",
        "own.swapaxes(0, 1), base.swapaxes(0, 1))",
        "own, base)",
        "tests/test_instruments.py::test_the_same_picture_for_every_prompt_is_an_alarm",
    ),
    Breakage(
        "collapse-only-when-all-do",
        "evals/probe.py",
        '"probe/collapsed": float(bool(collapsed(metrics)))',
        '"probe/collapsed": float(len(collapsed(metrics)) > 2)',
        "tests/test_instruments.py::test_one_task_that_collapses_is_enough",
    ),
    Breakage(
        "alarm-every-time",
        "evals/probe.py",
        "self.alarmed = True",
        "pass",
        "tests/test_instruments.py::test_the_same_picture_for_every_seed_is_an_alarm_told_once",
    ),
    Breakage(
        "noise-without-calm",
        "evals/probe.py",
        "/ 6 / CALM",
        "/ 6",
        "tests/test_instruments.py::test_flat_noise_is_sigma_of_white_noise_whatever_the_edges",
    ),
    Breakage(
        "noise-first-differences",
        "evals/probe.py",
        "rows = x[:, :-2] - 2 * x[:, 1:-1] + x[:, 2:]",
        "rows = x[:, :-2] - x[:, 1:-1]",
        "tests/test_instruments.py::test_flat_noise_is_sigma_of_white_noise_whatever_the_edges",
    ),
    Breakage(
        "batches-of-twice-the-size",
        "evals/runner.py",
        "same[i : i + batch] for i in range(0, len(same), batch)",
        "same[i : i + 2 * batch] for i in range(0, len(same), 2 * batch)",
        "tests/test_instruments.py::test_the_batch_decides_memory_and_not_the_picture",
    ),
    Breakage(
        "grid-out-of-order",
        "evals/preview.py",
        "np.concatenate(drawn)",
        "np.concatenate(drawn[::-1])",
        "tests/test_instruments.py::test_the_batch_decides_memory_and_not_the_picture",
    ),
    Breakage(
        "teacher-pictures-of-other-cases",
        "evals/probe.py",
        "if marker.is_file() and marker.read_text() == asked:",
        "if marker.is_file():",
        "tests/test_instruments.py::test_the_teacher_draws_once_for_a_run_folder",
    ),
    Breakage(
        "probe-without-a-row",
        "train/loop.py",
        "if log_due(d.step) or probed:",
        "if log_due(d.step):",
        "tests/test_instruments.py::test_a_probe_writes_a_row_of_its_own_where_nothing_else_is_logged",
    ),
    Breakage(
        "turn-at-the-best",
        "evals/stability.py",
        "if value > best - DROP:",
        "if value > best:",
        "tests/test_instruments.py::test_a_score_that_falls_for_good_is_told_with_its_best_and_its_turn",
    ),
    # several ranks
    Breakage(
        "ranks-see-one-noise",
        "train/step.py",
        "return batch.share.take(draw(len(batch) * batch.share.of))",
        "return draw(len(batch))",
        "tests/test_ranks.py::test_the_mean_gradient_of_the_ranks_is_that_of_one_large_device",
    ),
    Breakage(
        "ranks-draw-a-small-batch",
        "train/loop.py",
        "self.mixtures[role].next(micro_batch_of_all(self.plan))",
        "self.mixtures[role].next(self.plan.batch.micro_batch)",
        "tests/test_ranks.py::test_the_mean_gradient_of_the_ranks_is_that_of_one_large_device",
    ),
    Breakage(
        "ranks-see-one-batch",
        "train/loop.py",
        "names, indices = share.take(names), share.take(indices)",
        "names, indices = names[: len(names) // share.of], indices[: len(names) // share.of]",
        "tests/test_ranks.py::test_the_mean_gradient_of_the_ranks_is_that_of_one_large_device",
    ),
    Breakage(
        "ranks-gradients-summed",
        "train/ranks.py",
        "p.grad = (mean / self.world).view_as(p)",
        "p.grad = mean.view_as(p)",
        "tests/test_ranks.py::test_gradients_become_their_mean_and_what_has_none_keeps_none",
    ),
    Breakage(
        "ranks-gradients-apart",
        "train/ranks.py",
        "dist.all_reduce(flat)",
        "pass",
        "tests/test_ranks.py::test_gradients_become_their_mean_and_what_has_none_keeps_none",
    ),
    Breakage(
        "ranks-metrics-apart",
        "train/ranks.py",
        "return [row for rows, _, _ in told for row in rows]",
        "return own",
        "tests/test_ranks.py::test_every_rank_hears_all_in_order_and_gathers_all_rows",
    ),
    Breakage(
        "ranks-weights-not-compared",
        "train/ranks.py",
        "if any(other != found[0] for other in found):",
        "if False:",
        "tests/test_ranks.py::test_ranks_that_have_parted_are_found",
    ),
    Breakage(
        "ranks-all-draw",
        "train/loop.py",
        "if sample_due(d.step) and draws:",
        "if sample_due(d.step):",
        "tests/test_ranks.py::test_the_lead_goes_first_and_alone_draws_and_saves",
    ),
    Breakage(
        "ranks-encode-at-once",
        "train/ranks.py",
        "self.collect(lambda: turn(self.is_lead))",
        "self.collect(lambda: turn(True))",
        "tests/test_ranks.py::test_the_lead_goes_first_and_alone_draws_and_saves",
    ),
    # a cast in parts
    Breakage(
        "parts-averaged-again",
        "train/ranks.py",
        "own = [p for p in module.parameters() if not isinstance(p, DTensor)]",
        "own = list(module.parameters())",
        "tests/test_sharding.py::test_a_step_in_parts_is_that_of_the_whole",
    ),
    Breakage(
        "parts-clipped-each-by-its-own-norm",
        "train/sharding.py",
        "norm = whole(nn.utils.get_total_norm(gradients))",
        "norm = nn.utils.get_total_norm([g.to_local() for g in gradients])",
        "tests/test_sharding.py::test_gradients_in_parts_are_clipped_by_the_norm_of_all_of_them[0.5]",
    ),
    Breakage(
        "parts-saved-for-the-whole",
        "train/sharding.py",
        "tensor = whole(parameter.detach())",
        "tensor = parameter.detach().to_local()",
        "tests/families/test_sharding.py::test_the_lead_alone_keeps_the_gathered_student",
    ),
    Breakage(
        "parts-checked-each-by-itself",
        "train/step.py",
        "not whole(p.grad).isfinite().all()",
        "not p.grad.to_local().isfinite().all()",
        "tests/test_sharding.py::test_a_part_that_is_not_finite_stops_all_ranks_before_the_weights_move",
    ),
    Breakage(
        "parts-previous-state-lost",
        "train/sharding.py",
        "folder.replace(before)",
        "rmtree(folder)",
        "tests/test_sharding.py::test_a_damaged_state_gives_way_to_the_one_before[truncated]",
    ),
    Breakage(
        "parts-moments-not-loaded",
        "train/sharding.py",
        "{place: tensors[_key(place)] for place in places}",
        "split(own).parts",
        "tests/test_sharding.py::test_a_state_comes_back_on_any_number_of_ranks[3]",
    ),
    Breakage(
        "parts-root-stays-gathered",
        "models/sharding.py",
        '"reshard_after_forward": True',
        '"reshard_after_forward": None',
        "tests/families/test_sharding.py::test_what_plays_is_what_the_weights_are_now",
    ),
    Breakage(
        "parts-first-gathered-by-a-sampler",
        "models/sharding.py",
        "sharded.unshard()",
        "pass",
        "tests/families/test_sharding.py::test_what_plays_is_what_the_weights_are_now",
    ),
    Breakage(
        "parts-called-unequally-often",
        "models/readings.py",
        "groups += [groups[0]] * (calls(len(groups)) - len(groups))",
        "pass",
        "tests/families/test_sharding.py::test_calls_beyond_the_layouts_change_neither_answer_nor_gradient",
    ),
    Breakage(
        "parts-of-unequal-calls",
        "models/roles.py",
        "self.calls, self.is_sharded = shards.most, True",
        "self.is_sharded = True",
        "tests/families/test_sharding.py::test_what_plays_is_what_the_weights_are_now",
    ),
    Breakage(
        "parts-of-unequal-company",
        "train/loop.py",
        'about["company"] = tuple(self.pools[name].category for name in names)',
        'about["company"] = ()',
        "tests/test_sharding.py::test_a_batch_knows_the_categories_and_troubles_of_all_ranks",
    ),
    Breakage(
        "parts-teachers-asked-alone",
        "guidance.py",
        "rows = (*weights, *company)",
        "rows = weights",
        "tests/test_shard_plan.py::test_teachers_of_the_company_are_asked_and_not_heard[scores]",
    ),
    Breakage(
        "parts-augmentation-asked-alone",
        "train/methods.py",
        "if not len(seen) and any(row.get(name) for row in company):",
        "if False:",
        "tests/test_shard_plan.py::test_teachers_of_the_company_are_asked_and_not_heard[augmentation]",
    ),
    Breakage(
        "parts-not-finite-known-here-alone",
        "train/step.py",
        "if batch.anywhere(not torch.isfinite(x).all()):",
        "if not torch.isfinite(x).all():",
        "tests/test_shard_plan.py::test_a_value_that_is_not_finite_elsewhere_stops_this_device_too",
    ),
    Breakage(
        "plan-of-parts-as-of-the-whole",
        "recipe/cost.py",
        "parts = devices if splits_cast(recipe, devices) else 1",
        "parts = 1",
        "tests/test_shard_plan.py::test_a_split_full_cast_by_hand",
    ),
    Breakage(
        "plan-without-what-is-gathered",
        "recipe/cost.py",
        'return 2 * weights if recipe.model.roles.kind == "full" else weights',
        "return weights",
        "tests/test_shard_plan.py::test_a_split_full_cast_by_hand",
    ),
    Breakage(
        "hash-of-how-the-cast-lies",
        "recipe/schema.py",
        'del content["model"]["cast"]["shard"]',
        "pass",
        "tests/test_shard_plan.py::test_how_the_cast_lies_is_no_part_of_a_recipes_hash",
    ),
    # roles of real models
    Breakage(
        "role-switch",
        "models/roles.py",
        "layer._active_adapter = [] if role is None else [role]",
        'layer._active_adapter = ["student"]',
        "tests/families/test_roles.py::test_each_role_hears_its_own_weights_alone[qwen_image_21]",
    ),
    Breakage(
        "role-recomputed-as-another",
        "models/roles.py",
        "with self.playing(role):",
        "with self.playing(self._playing):",
        "tests/families/test_roles.py::test_trap_plain_checkpointing_recomputes_in_the_wrong_role",
    ),
    Breakage(
        "role-not-given-back",
        "models/roles.py",
        "self._switch(before)",
        "self._switch(role)",
        "tests/families/test_roles.py::test_the_role_comes_back_after_a_nested_one_and_after_an_error",
    ),
    Breakage(
        "role-lora-b-not-zero",
        "models/roles.py",
        "LoraConfig(target_modules=modules, **settings)",
        "LoraConfig(target_modules=modules, init_lora_weights=False, **settings)",
        "tests/families/test_roles.py::test_roles_begin_as_the_base_and_alike[qwen_image_21]",
    ),
    Breakage(
        "role-not-trainable-again",
        "models/roles.py",
        "                parameter.requires_grad_(True)",
        "                parameter.requires_grad_(False)",
        "tests/families/test_roles.py::test_the_order_in_which_roles_are_added_does_not_matter",
    ),
    Breakage(
        "role-guidance-scale",
        "models/roles.py",
        "guided_velocity(self.family, x, now, part, scale, network)",
        "guided_velocity(self.family, x, now, part, 1.0, network)",
        "tests/families/test_roles.py::test_guidance_is_the_familys_own_away_from_the_readers_negative",
    ),
    Breakage(
        "layouts-out-of-order",
        "models/readings.py",
        "return torch.cat(parts)[back]",
        "return torch.cat(parts)",
        "tests/families/test_roles.py::test_a_batch_of_mixed_layouts_is_answered_as_each_alone",
    ),
    # features and real images of real models
    Breakage(
        "features-of-all-blocks",
        "models/families/features.py",
        "sum(map(len, whole.values())) // 2",
        "sum(map(len, whole.values()))",
        "tests/families/test_features.py::test_features_are_what_the_pipelines_network_has_half_way[qwen_image]",
    ),
    Breakage(
        "features-half-of-the-first-list-alone",
        "models/families/features.py",
        "left -= min(left, len(blocks))",
        "left = 0",
        "tests/families/test_features.py::test_half_of_a_network_with_two_kinds_of_blocks",
    ),
    Breakage(
        "features-of-the-sources",
        "models/families/qwen_image.py",
        "lambda h, x_t: h[:, : x_t.shape[1]]",
        "lambda h, x_t: h[:, -x_t.shape[1] :]",
        "tests/families/test_features.py::test_features_are_what_the_pipelines_network_has_half_way[qwen_image_edit]",
    ),
    Breakage(
        "features-of-the-text",
        "models/families/qwen_image_21.py",
        "lambda h, x_t: h[:, -x_t.shape[1] :]",
        "lambda h, x_t: h[:, : x_t.shape[1]]",
        "tests/families/test_features.py::test_features_are_what_the_pipelines_network_has_half_way[qwen_image_21]",
    ),
    Breakage(
        "features-of-the-base",
        "models/roles.py",
        "hidden = features(self.family, x, now, part, network)",
        "hidden = features(self.family, x, now, part)",
        "tests/families/test_features.py::test_a_full_copy_shows_its_own_features",
    ),
    Breakage(
        "target-not-in-minus-one-to-one",
        "data/targets.py",
        "[None].float() / 127.5 - 1",
        "[None].float() / 255",
        "tests/test_targets.py::test_a_target_is_the_middle_of_the_image_in_minus_one_to_one",
    ),
    Breakage(
        "target-turned",
        "data/targets.py",
        "ImageOps.fit(image, (width, height),",
        "ImageOps.fit(image, (height, width),",
        "tests/test_targets.py::test_a_target_is_the_middle_of_the_image_in_minus_one_to_one",
    ),
    Breakage(
        "target-named-by-its-prompt",
        "data/conditions.py",
        'self._key("target", None, (sample.target.digest,))',
        'self._key("target", sample.prompt, ())',
        "tests/test_targets.py::test_targets_are_encoded_once_and_come_back_in_order",
    ),
    Breakage(
        "targets-of-other-rows",
        "real/domain.py",
        "return readings, self.domain.targets(self.task, chosen)",
        "return readings, self.domain.targets(self.task, chosen[::-1])",
        "tests/families/test_real_images.py::test_a_batch_has_the_real_image_of_each_row[t2i]",
    ),
    # pools of prompts
    Breakage(
        "pool-repeats-for-an-image",
        "prompts/write.py",
        "if self.near.find(text, scope):",
        "if self.near.find(text):",
        "tests/test_prompts.py::test_an_instruction_is_not_repeated_for_the_same_source",
    ),
    Breakage(
        "pool-cell-given-up-for-good",
        "prompts/write.py",
        "barren = 0 if rows else job.barren + 1",
        "barren = job.barren + 1",
        "tests/test_prompts.py::test_a_slow_cell_is_asked_for_what_it_lacks_and_shown_its_latest",
    ),
    Breakage(
        "pool-cells-of-other-sources",
        "prompts/spec.py",
        "self._values, self._sources]",
        "self._values]",
        "tests/test_prompts.py::test_a_source_of_the_captions_is_a_part_of_the_grid",
    ),
    Breakage(
        "near-first-of-a-bucket",
        "prompts/near.py",
        "self._others[key].append(number)",
        "pass",
        "tests/test_prompts.py::test_a_near_duplicate_is_found_in_buckets_that_others_opened",
    ),
    Breakage(
        "classified-for-another-list",
        "prompts/classify.py",
        'or row.get("prompt") != entry.text or',
        "or",
        "tests/test_prompts.py::test_rows_of_another_list_are_not_gone_on_with",
    ),
    Breakage(
        "classified-beyond-the-budget",
        "prompts/classify.py",
        "        budget.watch(spent)",
        "        pass",
        "tests/test_prompts.py::test_classifying_stops_beyond_its_allowance",
    ),
    Breakage(
        "kappa-chance-of-one-list",
        "prompts/classify.py",
        "first[name] * second[name] for name in first",
        "first[name] * first[name] for name in first",
        "tests/test_prompts.py::test_agreement_is_cohens_kappa",
    ),
    Breakage(
        "endpoint-stopped-is-wrong",
        "endpoint.py",
        "if passing.unreachable and not self._reached:",
        "if passing.unreachable:",
        "tests/test_prompts.py::test_a_server_that_stops_is_no_wrong_address",
    ),
    # sweeps
    Breakage(
        "sweep-code-changed-meanwhile",
        "sweep/engine.py",
        "elif identity_of(run.cell) != self.planned[run.cell.name]:",
        "elif False:",
        "tests/test_sweep.py::test_a_cell_during_which_the_weights_changed_is_no_result",
    ),
    Breakage(
        "sweep-redo-of-a-cell-at-work",
        "sweep/engine.py",
        'raise RunError(f"{out}: another sweep is at work on {name}; stop that one first")',
        "continue",
        "tests/test_sweep.py::test_redo_runs_cells_again_that_were_given_up_and_leaves_those_at_work",
    ),
    Breakage(
        "sweep-redo-of-everything",
        "sweep/command.py",
        "check_identities(out, work if redo else everything, redo=redo)",
        "check_identities(out, everything, redo=redo)",
        "tests/test_sweep.py::test_one_cell_is_picked_by_its_index_and_only_it_is_redone",
    ),
    Breakage(
        "sweep-hash-without-torch",
        "sweep/layout.py",
        '_digest([code, version("torch"),',
        "_digest([code,",
        "tests/test_sweep.py::test_the_code_hash_knows_torch_and_the_weights_that_no_recipe_names",
    ),
    Breakage(
        "sweep-hash-without-instruments",
        "sweep/layout.py",
        'if recipe.data.source.kind == "lab":',
        "if False:",
        "tests/test_sweep.py::test_the_code_hash_knows_torch_and_the_weights_that_no_recipe_names",
    ),
    Breakage(
        "sweep-compute-one-sided",
        "sweep/study.py",
        "if abs(spends - 1) > COMPUTE_TOLERANCE:",
        "if spends - 1 > COMPUTE_TOLERANCE:",
        "tests/test_sweep.py::test_equal_compute_lets_updates_differ_and_operations_not",
    ),
    Breakage(
        "sweep-other-cases",
        "sweep/study.py",
        "if cell.recipe.evaluation != first.recipe.evaluation:",
        "if False:",
        "tests/test_sweep.py::test_variants_that_cannot_be_compared_are_refused",
    ),
    Breakage(
        "sweep-costs-of-other-code",
        "sweep/command.py",
        "return found if (found.device, found.threads, found.code) == here else None",
        "return found",
        "tests/test_sweep.py::test_a_measurement_holds_for_its_machine_and_code_alone",
    ),
    Breakage(
        "sweep-cost-of-six-updates",
        "sweep/predict.py",
        "operation=median(updates[1:]) * plan.updates / plan.cost.flop",
        "operation=median(updates[1:]) / plan.cost.flop",
        "tests/test_sweep.py::test_costs_are_read_off_a_short_run_of_the_dearest_cell",
    ),
    # reports of studies
    Breakage(
        "wobble-unpooled",
        "study_report/intervals.py",
        "pooled = sum(counts[variant] * square for variant, square in squares.items()) / df",
        "pooled = sum(squares.values()) / len(squares)",
        "tests/test_study_report.py::test_seeds_pool_by_their_number_and_an_unstable_variant_keeps_its_own",
    ),
    Breakage(
        "wobble-of-the-unstable-shared",
        "study_report/intervals.py",
        "return max(self.variance, self.own.get(variant, 0.0))",
        "return self.variance",
        "tests/test_study_report.py::test_seeds_pool_by_their_number_and_an_unstable_variant_keeps_its_own",
    ),
    Breakage(
        "seed-share-not-squared",
        "study_report/intervals.py",
        "spread[variant] = weight**2 / len(seeds)",
        "spread[variant] = abs(weight) / len(seeds)",
        "tests/test_study_report.py::test_a_share_of_a_variant_brings_the_square_of_it_in_seed_spread",
    ),
    Breakage(
        "prompts-counted-twice",
        "study_report/intervals.py",
        "generator.chisquare(df, len(drawn)) - explained)",
        "generator.chisquare(df, len(drawn)))",
        "tests/test_study_report.py::test_what_prompts_explain_of_the_seeds_is_not_counted_twice",
    ),
    Breakage(
        "falls-of-other-seeds",
        "study_report/verdicts.py",
        "set.intersection(*(set(own) for own in falls.values()))",
        "next(iter(falls.values()))",
        "tests/test_study_report.py::test_falls_are_paired_by_training_seed",
    ),
    Breakage(
        "ranks-one-pair-at-a-time",
        "study_report/tables.py",
        "level = 1 - ERROR / max(1, len(pairs))",
        "level = 1 - ERROR",
        "tests/test_study_report.py::test_all_pairs_of_a_table_are_held_at_once",
    ),
    Breakage(
        "bold-the-last",
        "study_report/tables.py",
        "places[model].best == 1 and len(models) > 1",
        "places[model].worst == 1 and len(models) > 1",
        "tests/test_study_report.py::test_the_score_table_says_what_its_numbers_rest_on",
    ),
    Breakage(
        "two-students-in-a-cell",
        "study_report/read.py",
        "        if len(students) > 1:",
        "        if False:",
        "tests/test_study_report.py::test_two_students_in_a_cell_are_refused",
    ),
    Breakage(
        "gap-by-luck",
        "evals/stats.py",
        "gap.value <= 0 or not gap.excludes_zero",
        "gap.value <= 0",
        "tests/test_stats.py::test_gap_closed_is_the_share_won_back",
    ),
    Breakage(
        "interval-without-a-category",
        "evals/stats.py",
        "if any(len(cases) < 2 for cases in filled):",
        "if all(len(cases) < 2 for cases in filled):",
        "tests/test_stats.py::test_a_task_with_a_category_of_a_single_case_has_no_interval",
    ),
    Breakage(
        "probe-marker-of-before",
        "evals/probe.py",
        "        marker.unlink(missing_ok=True)",
        "        pass",
        "tests/test_instruments.py::test_a_teacher_that_was_stopped_while_it_wrote_is_drawn_again",
    ),
    # what is kept of files
    Breakage(
        "memo-by-age-alone",
        "data/memo.py",
        "found.st_mtime_ns, found.st_ctime_ns]",
        "found.st_mtime_ns, 0]",
        "tests/test_promptfiles.py::test_a_memo_answers_for_a_file_as_it_was",
    ),
    Breakage(
        "image-known-by-its-shard",
        "data/promptfiles.py",
        'f"image and size {found.part}"',
        '"image and size"',
        "tests/test_promptfiles.py::test_images_of_one_shard_are_told_apart",
    ),
    Breakage(
        "bad-shard-left-lying",
        "data/tensorstore.py",
        "        self.damaged += sorted(bad)",
        "        pass",
        "tests/test_conditions.py::test_what_verify_sets_aside_never_comes_back",
    ),
    # the judge of real images
    Breakage(
        "judge-score-out-of-range-taken",
        "judges/answer.py",
        "if not math.isfinite(value) or not LOWEST <= value <= HIGHEST:",
        "if not math.isfinite(value):",
        "tests/test_judge.py::test_what_cannot_be_read_is_asked_again_and_then_unscored",
    ),
    Breakage(
        "judge-source-after-result",
        "judges/endpoint.py",
        "[question.source, question.image]",
        "[question.image, question.source]",
        "tests/test_judge.py::test_the_judge_sees_the_very_pixels_and_the_prompt",
    ),
    Breakage(
        "judge-name-without-rubric",
        "judges/endpoint.py",
        '"rubric": version(),',
        '"rubric": "",',
        "tests/test_judge.py::test_the_name_changes_with_whatever_changes_the_scores",
    ),
    Breakage(
        "judge-one-bad-picture-stops-all",
        "evals/judging.py",
        "failures = failures + 1 if told.outage else 0",
        "failures += 9 * bool(told.outage)",
        "tests/test_judge.py::test_one_picture_that_breaks_the_server_does_not_stop_the_others",
    ),
    Breakage(
        "judge-drawn-images-drawn-again",
        "evals/runner.py",
        "left = [c for c in group if _item(contestant, c) not in rows.drawn]",
        "left = group",
        "tests/test_judge.py::test_what_is_evaluated_must_be_what_was_judged",
    ),
    Breakage(
        "judge-rows-of-another-case",
        "evals/runner.py",
        "return row.content == _content(case, image)",
        "return True",
        "tests/test_judge.py::test_what_is_evaluated_must_be_what_was_judged",
    ),
    Breakage(
        "judge-old-rows-trusted",
        "evals/runner.py",
        "return judged_later is not None and row.prompt == case.prompt",
        "return row.prompt == case.prompt",
        "tests/test_judge.py::test_rows_that_do_not_say_what_was_judged_are_judged_again",
    ),
    Breakage(
        "judge-scores-of-what-was-there",
        "evals/judging.py",
        "if now is not None and now != scored.content:",
        "if False:",
        "tests/test_judge.py::test_a_judgement_is_of_the_pictures_and_the_prompt_that_it_was_given",
    ),
    Breakage(
        "judge-content-of-the-image-alone",
        "evals/pictures.py",
        "for picture in (image, source, target):",
        "for picture in (image,):",
        "tests/test_judge.py::test_a_judgement_is_of_the_pictures_and_the_prompt_that_it_was_given",
    ),
    Breakage(
        "judge-content-without-prompt",
        "evals/pictures.py",
        'f"{task}\\0{category}\\0{prompt}"',
        'f"{task}"',
        "tests/test_judge.py::test_a_judgement_is_of_the_pictures_and_the_prompt_that_it_was_given",
    ),
    Breakage(
        "judge-check-ties-win",
        "judges/controls.py",
        "sum(a > b for a, b in pairs)",
        "sum(a >= b for a, b in pairs)",
        "tests/test_judge.py::test_a_judge_that_knows_the_pictures_has_every_order_right_and_a_blind_one_none",
    ),
    # the lab's open edits and how they are judged
    Breakage(
        "lab-sign-keeps-its-lettering",
        "lab/edits.py",
        "after = replace(after, sign=other.nuisance)",
        "after = replace(after, sign=None)",
        "tests/test_lab_world.py::test_another_sign_stands_in_the_same_street",
    ),
    Breakage(
        "lab-sign-moves-the-street",
        "lab/world.py",
        "image = _draw_street(u)",
        "image = _draw_street(Open(scene.sign or scene.nuisance))",
        "tests/test_lab_world.py::test_another_sign_stands_in_the_same_street",
    ),
    Breakage(
        "lab-elsewhere-in-the-same-place",
        "lab/edits.py",
        "after = replace(before.with_(changed), nuisance=int(rng.integers(2**31)))",
        "after = before.with_(changed)",
        "tests/test_lab_world.py::test_elsewhere_the_landmarks_stay_and_two_surroundings_change",
    ),
    Breakage(
        "lab-evaluation-source-leaks-into-training",
        "lab/edits.py",
        "sides = (edit.after,) if evaluation else (edit.before, edit.after)",
        "sides = (edit.after,)",
        "tests/test_lab_world.py::test_edits_of_training_show_nothing_held_out_and_those_of_evaluation_ask_for_it",
    ),
    Breakage(
        "oracle-repair-by-target",
        "lab/oracle.py",
        "done = gain(image, source, target) if before is None else repaired(look, before)",
        "done = gain(image, source, target)",
        "tests/test_lab_world.py::test_a_lossy_repair_is_judged_by_what_is_damaged_and_not_by_closeness_to_one_target",
    ),
    Breakage(
        "oracle-repair-sign",
        "lab/oracle.py",
        "np.clip((damage - look.distance) / whole, 0, 1)",
        "np.clip((look.distance - damage) / whole, 0, 1)",
        "tests/test_lab_world.py::test_a_lossy_repair_is_judged_by_what_is_damaged_and_not_by_closeness_to_one_target",
    ),
    Breakage(
        "oracle-sign-keeps-the-sign",
        "lab/oracle.py",
        "values = np.sort(change[fixed])",
        "values = np.sort(change[~fixed])",
        "tests/test_lab_world.py::test_the_right_sign_in_another_street_is_not_kept",
    ),
    Breakage(
        "oracle-sign-may-not-move",
        "lab/oracle.py",
        "free = min(0.5 * (~fixed).sum(), 0.5 * len(values))",
        "free = 0",
        "tests/test_lab_world.py::test_another_lettering_of_the_sign_is_as_right_as_the_true_one",
    ),
    Breakage(
        "oracle-sign-spelling-uncapped",
        "lab/oracle.py",
        'score = capped(score, score_of(credit(look, edit.after, "word")), CAP_WORD)',
        "score = min(score, 5.0)",
        "tests/test_lab_world.py::test_a_sign_with_another_word_or_board_is_not_what_was_asked",
    ),
    # means over micro-batches and ranks
    Breakage(
        "metrics-mean-of-means",
        "train/instruments.py",
        "told.setdefault(key, []).extend(value if isinstance(value, list) else [value])",
        "told.setdefault(key, []).append(fmean(value) if isinstance(value, list) else value)",
        "tests/test_instruments.py::test_metrics_do_not_depend_on_how_the_samples_are_cut",
    ),
    Breakage(
        "gap-mean-of-roots",
        "train/instruments.py",
        'told[f"gap/{category}"] = own',
        'told[f"gap/{category}"] = [sqrt(g) for g in own]',
        "tests/test_instruments.py::test_metrics_do_not_depend_on_how_the_samples_are_cut",
    ),
    Breakage(
        "gap-without-its-root",
        "train/instruments.py",
        'sqrt(mean) if key.startswith("gap/") else mean for',
        "mean for",
        "tests/test_instruments.py::test_metrics_do_not_depend_on_how_the_samples_are_cut",
    ),
    # what probes, prompts and caches hold on to
    Breakage(
        "probe-score-unscored",
        "evals/probe.py",
        "scores = [verdict.score for verdict in verdicts if verdict.score is not None]",
        "scores = [verdict.score or 1.0 for verdict in verdicts]",
        "tests/test_instruments.py::test_what_the_judge_could_not_score_is_in_no_mean",
    ),
    Breakage(
        "probe-judge-order",
        "evals/probe.py",
        "cases = [case for case in drawn.cases for _ in range(seeds)]",
        "cases = [case for _ in range(seeds) for case in drawn.cases]",
        "tests/test_instruments.py::test_what_the_judge_could_not_score_is_in_no_mean",
    ),
    Breakage(
        "probe-collapsed-categories",
        "evals/probe.py",
        'and key.count("/") == 2',
        'and key.count("/") >= 2',
        "tests/test_instruments.py::test_a_category_alone_is_no_collapse",
    ),
    Breakage(
        "pool-short-write",
        "prompts/pool.py",
        "        while line:",
        "        if line:",
        "tests/test_prompts.py::test_a_row_is_whole_however_little_the_system_takes_at_once",
    ),
    Breakage(
        "verify-only-tells",
        "data/tensorstore.py",
        "self._forget(bad)",
        "pass",
        "tests/test_conditions.py::test_verify_finds_a_flipped_bit_that_a_header_does_not_show",
    ),
    Breakage(
        "repeated-without-source",
        "data/promptfiles.py",
        "prompt = (record.task, record.prompt, *(image.digest for image in record.sources))",
        "prompt = (record.task, record.prompt)",
        "tests/test_promptfiles.py::test_one_instruction_may_be_given_for_several_images",
    ),
    Breakage(
        "repeated-with-another-image",
        "data/promptfiles.py",
        'if shown and (not record.shows or "" in shown or record.shows in shown):',
        "if shown:",
        "tests/test_targets.py::test_one_prompt_may_have_several_images",
    ),
    Breakage(
        "repeated-in-the-evaluation",
        "data/promptfiles.py",
        'if shown and (not record.shows or "" in shown or record.shows in shown):',
        "if record.shows in shown:",
        "tests/test_targets.py::test_a_prompt_is_not_repeated_otherwise",
    ),
    Breakage(
        "image-not-looked-for",
        "recipe/available.py",
        "return file.name in folders[folder] or file.is_file()",
        "return True",
        "tests/test_promptfiles.py::test_a_plan_sees_which_images_are_not_there",
    ),
    Breakage(
        "real-image-not-asked-for",
        "recipe/available.py",
        "if asked and not named and (row.task, row.category) in trained:",
        "if False:",
        "tests/test_promptfiles.py::test_a_plan_sees_which_images_are_not_there",
    ),
    Breakage(
        "full-disk-with-a-code-of-its-own",
        "errors.py",
        "kind = DiskError if error.errno in FULL else FewstepError",
        "kind = FewstepError",
        "tests/test_rows.py::test_a_full_disk_loses_nothing_that_was_logged",
    ),
    # messages
    Breakage(
        "claim-whatever-it-began-with",
        "session.py",
        "if before.get(name, value) != value:",
        "if False:",
        "tests/test_run.py::test_another_recipe_or_retrained_teachers_are_not_resumed",
    ),
    Breakage(
        "claim-over-a-run",
        "session.py",
        "if has_state(out / LAST) or any((out / name).exists() for name in results):",
        "if False:",
        "tests/test_run.py::test_a_run_is_never_overwritten",
    ),
    Breakage(
        "note-takes-the-line",
        "session.py",
        'table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),',
        "table_column=Column(no_wrap=True),",
        "tests/test_run.py::test_a_long_note_leaves_count_and_time_left_on_a_narrow_terminal",
    ),
    Breakage(
        "note-on-a-second-line",
        "session.py",
        'table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),',
        "table_column=Column(ratio=1),",
        "tests/test_run.py::test_a_long_note_leaves_count_and_time_left_on_a_narrow_terminal",
    ),
    Breakage(
        "line-wraps",
        "session.py",
        "markup=False, highlight=False, soft_wrap=True)",
        "markup=False, highlight=False)",
        "tests/test_run.py::test_without_a_terminal_progress_is_a_whole_line_with_the_time_left",
    ),
    Breakage(
        "eta-from-the-first-start",
        "session.py",
        "rate = (now - first) / elapsed if elapsed else 0.0",
        "rate = now / elapsed if elapsed else 0.0",
        "tests/test_run.py::test_without_a_terminal_progress_is_a_whole_line_with_the_time_left",
    ),
    Breakage(
        "out-folder-refused-after-drawing",
        "inputs.py",
        "out.parent.mkdir(parents=True, exist_ok=True)",
        "pass",
        "tests/test_run.py::test_a_picture_that_cannot_be_placed_is_refused_before_anything_is_drawn",
    ),
    Breakage(
        "crop-not-told",
        "inputs.py",
        "if image.width != image.height:",
        "if False:",
        "tests/test_run.py::test_source_images_of_every_kind_are_taken_and_changes_are_told",
    ),
    # studies and what they support
    Breakage(
        "study-images-counted-twice",
        "sweep/predict.py",
        'rows = {(row["model"], row["case"], row["seed"]): row for row in logged}.values()',
        "rows = logged",
        "tests/test_sweep.py::test_what_an_endpoint_takes_is_told_from_drawing",
    ),
    Breakage(
        "study-seconds-without-judging",
        "sweep/predict.py",
        "judging = plan.judge.images * costs.judge if plan.judge else 0.0",
        "judging = 0.0",
        "tests/test_sweep.py::test_the_seconds_of_judging_are_part_of_a_cell",
    ),
    Breakage(
        "study-requests-of-finished-cells",
        "sweep/command.py",
        "if judges := [cell.plan.judge for cell in to_run if cell.plan.judge]:",
        "if judges := [cell.plan.judge for cell in everything if cell.plan.judge]:",
        "tests/test_sweep.py::test_a_dry_run_adds_up_what_the_judge_is_asked",
    ),
    Breakage(
        "base-winner-by-mean",
        "study_report/tables.py",
        "if e.interval.low is not None and e.interval.low > 0]",
        "if e.interval.value > 0]",
        "tests/test_study_report.py::test_why_no_student_beats_the_base_teacher",
    ),
    Breakage(
        "recommend-winner-by-mean",
        "study_report/recommend.py",
        "for role, duel in found.items() if duel.better}",
        "for role, duel in found.items() if duel.total > 0}",
        "tests/test_recommend.py::test_a_trade_between_tasks_is_no_improvement",
    ),
    Breakage(
        "recommend-best-of-equals-by-mean",
        "study_report/recommend.py",
        "        if not duel.better:",
        "        if duel.total <= 0:",
        "tests/test_recommend.py::test_the_simplest_of_equals_is_chosen",
    ),
    Breakage(
        "recommend-better-on-one-task",
        "study_report/recommend.py",
        "return _Duel(1 in signs and -1 not in signs,",
        "return _Duel(1 in signs,",
        "tests/test_recommend.py::test_a_trade_between_tasks_is_no_improvement",
    ),
    Breakage(
        "recommend-what-destabilises",
        "study_report/recommend.py",
        'if "specialised_only" in better and _destabilises(study):',
        "if False:",
        "tests/test_recommend.py::test_an_unstable_teacher_is_not_recommended",
    ),
    Breakage(
        "recommend-undecided-contradicts",
        "study_report/recommend.py",
        "settled = [choice for choice in found if choice.settled] or list(found)",
        "settled = list(found)",
        "tests/test_recommend.py::test_conflicts_are_refused_by_name",
    ),
    Breakage(
        "recommend-of-other-teachers",
        "study_report/recommend.py",
        "if choice.recipe.teachers != first.recipe.teachers:",
        "if False:",
        "tests/test_recommend.py::test_other_teachers_and_nothing_to_choose_are_refused",
    ),
    Breakage(
        "recommend-every-default",
        "recipe/load.py",
        'return _as_yaml(model.model_dump(mode="json", exclude_defaults=True))',
        'return _as_yaml(model.model_dump(mode="json", exclude_none=True))',
        "tests/test_recommend.py::test_a_brief_recipe_of_the_lab_does_not_speak_of_real_models",
    ),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--only",
        metavar="NAME",
        nargs="+",
        help="just these breakages; of a single one, how its test fails",
    )
    parser.add_argument("--document", action="store_true", help="write the table and stop")
    arguments = parser.parse_args()
    only: list[str] | None = arguments.only
    if arguments.document:
        DOCUMENT.write_text(documented())
        return 0
    if DOCUMENT.read_text() != documented():
        print("the table in docs/numerics.md is out of date: python tools/breakages.py --document")
        return 1
    names = [b.name for b in BREAKAGES]
    if unknown := [name for name in only or () if name not in names]:
        parser.error(f"no breakage {unknown[0]!r}; there are {', '.join(names)}")
    chosen = [b for b in BREAKAGES if only is None or b.name in only]

    # Processes forked from one that has imported the slow libraries, and nothing of ours.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["torch", "pytest", "beartype", "numpy", "safetensors"])
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="breakages-") as folder:
        copy = Path(folder)
        for part in ("fewstep", "tests", "recipes"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)

        tests = sorted({b.test_id for b in chosen})
        code, output = run_tests(processes, copy, tests, seconds=5 * SECONDS)
        if code != 0:
            print(f"{output}\nthe tests do not pass on the unbroken code")
            return 1
        print(f"{len(tests)} tests pass unbroken; {len(chosen)} breakages\n")
        caught = []
        for breakage in chosen:
            result, output = verdict(processes, copy, breakage)
            caught.append(result == "caught")
            line = f"{breakage.name:34} {breakage.file:22} {result:9} {breakage.test}"
            print(line if caught[-1] and len(chosen) > 1 else f"{line}\n{output}", flush=True)
    print(f"\n{sum(caught)} of {len(caught)} caught in {time.monotonic() - begun:.0f} s")
    return 0 if all(caught) else 1


def documented() -> str:
    """docs/numerics.md with the table of breakages, which ends it, as it should be."""
    rows = [
        f"| {b.name} | `{b.file}` | `{b.line}` | `{b.broken}` | `{b.test.replace('::', '` `')}` |\n"
        for b in BREAKAGES
    ]
    return DOCUMENT.read_text().split(HEADER)[0] + HEADER + "".join(rows)


def verdict(processes: ForkServerContext, copy: Path, breakage: Breakage) -> tuple[str, str]:
    """'caught', or what went wrong instead; and the test's output."""
    file = copy / "fewstep" / breakage.file
    whole = file.read_text()
    if (times := whole.count(breakage.line)) != 1:
        return "NOT FOUND", f"the line occurs {times} times: {breakage.line}"
    file.write_text(whole.replace(breakage.line, breakage.broken))
    code, output = run_tests(processes, copy, [breakage.test_id], seconds=SECONDS)
    file.write_text(whole)
    # Only a failed test counts: not one that is missing, does not import or never ends.
    return {0: "SURVIVED", 1: "caught"}.get(code, "NO RESULT"), output


def run_tests(
    processes: ForkServerContext, copy: Path, tests: list[str], *, seconds: int
) -> tuple[int, str]:
    """pytest's exit code (-1: it crashed or took too long) and what it printed."""
    log = copy / "output.txt"
    result = processes.Value("i", -1)
    child = processes.Process(target=run_pytest, args=(copy, tests, log, result))
    child.start()
    child.join(seconds)
    if child.is_alive():
        child.kill()
        child.join()
    return result.value, log.read_text()


def run_pytest(copy: Path, tests: list[str], log: Path, result: "Synchronized[int]") -> None:
    """In its own process: pytest in the copy, whose `fewstep` comes before the installed one."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(copy)
    sys.path.insert(0, str(copy))
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # this line and the next: half of the time
    gc.freeze()
    sys.dont_write_bytecode = True  # a file broken and mended within a second has one time stamp

    import pytest

    code = pytest.main(["-x", "-q", "--tb=short", "-p", "no:cacheprovider", *tests])
    ours = sys.modules.get("fewstep")
    assert ours is None or str(ours.__file__).startswith(str(copy)), ours
    result.value = int(code)


if __name__ == "__main__":
    sys.exit(main())
