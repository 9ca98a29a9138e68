"""Break one line at a time and see a test fail: `python tools/breakages.py [--only NAME]`.

Works on a copy of the package and the tests in a temporary folder. Each breakage names the one test
that must fail under it and pass without it. A new one is one more row in BREAKAGES, then
`--document` to put it into the table of docs/numerics.md.

Exit code 1 if a breakage survives, its line is no longer found exactly once, its test does not pass
on the unbroken code, or that table is out of date. --only also shows how the test fails.
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
        "core/types.py",
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
        "scales[name]",
        "max(scales.values())",
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
        "for row in weights for name, share in row.items() if share > 0}",
        "for row in weights for name, share in row.items()}",
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
        "F.mse_loss(fake.float(), x.detach().float())",
        "F.mse_loss(fake.float(), x.float())",
        "test_dmd.py::test_fake_losses_send_no_gradient_into_the_student",
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
        "weights = [plan.weights(batch.task, c)[k] for c in batch.categories]",
        "weights = [plan.weights(batch.task, c)[0] for c in batch.categories]",
        "tests/test_loop.py::test_the_student_gradient_is_equation_7_by_hand",
    ),
    Breakage(
        "lambda-of-one-category",
        "train/step.py",
        "weights = [plan.weights(batch.task, c)[k] for c in batch.categories]",
        "weights = [plan.weights(batch.task, batch.categories[0])[k] for _ in batch.categories]",
        "tests/test_loop.py::test_the_student_gradient_is_equation_7_by_hand",
    ),
    Breakage(
        "fake-score-of-the-student",
        "train/step.py",
        "return Score(cast.fake(x_t, t, batch.cond).float(), real, answers)",
        "return Score(cast.student(x_t, t, batch.cond).float(), real, answers)",
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
        '    check_finite(direction, "score difference")',
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
]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", metavar="NAME", help="just this breakage")
    parser.add_argument("--document", action="store_true", help="write the table and stop")
    arguments = parser.parse_args()
    only = arguments.only
    if arguments.document:
        DOCUMENT.write_text(documented())
        return 0
    if DOCUMENT.read_text() != documented():
        print("the table in docs/numerics.md is out of date: python tools/breakages.py --document")
        return 1
    chosen = [b for b in BREAKAGES if only in (None, b.name)]
    if not chosen:
        parser.error(f"no breakage {only!r}; there are {', '.join(b.name for b in BREAKAGES)}")

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
            print(line if caught[-1] and not only else f"{line}\n{output}", flush=True)
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
