"""What a run tells about its own stability, against closed forms and pictures made to fail."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep import contestants, samplers
from fewstep.commands.distill import distill
from fewstep.commands.sample import sample
from fewstep.core.process import add_noise, score_from_x0
from fewstep.core.types import Batch, Condition, Task
from fewstep.domain import Case, Domain, Verdict
from fewstep.errors import RecipeError
from fewstep.evals import findings, probe, report_html, stability
from fewstep.evals.preview import Preview
from fewstep.evals.runner import Contestant, evaluate
from fewstep.lab.domain import LabDomain
from fewstep.models.lab import LabCondition
from fewstep.recipe.facts import Facts, Machine
from fewstep.recipe.plan import Plan, make_plan
from fewstep.recipe.schema import Probe as Settings
from fewstep.samplers import Guided
from fewstep.train import instruments, loop
from tests.test_loop import metrics_of, same_weights, start, tiny_recipe
from tests.test_run import write_recipe, write_teacher

# --- mismatch and shares --------------------------------------------------------------------------


def tiny_plan(**changes: object) -> Plan:
    recipe = tiny_recipe(**changes)
    return make_plan(recipe, Machine(), Facts(bundled=frozenset({"base", "text"})))


def batch_of(task: Task, *categories: str) -> Batch:
    n = len(categories)
    text, mask = torch.ones(n, 2, dtype=torch.long), torch.ones(n, 2, dtype=torch.bool)
    return Batch(task, categories, LabCondition(text, mask), (1, 1, 2))


def test_the_mismatch_is_that_of_the_scores() -> None:
    g = torch.Generator().manual_seed(0)
    x_0, eps, answer, fake = (torch.randn(5, 3, 4, 4, generator=g) for _ in range(4))
    t = torch.tensor([0.02, 0.3, 0.5, 0.7, 0.98])
    x_t = add_noise(x_0, eps, t)
    own, other = score_from_x0(x_t, fake, t), score_from_x0(x_t, answer, t)
    expected = [float((o - s).norm() / s.norm()) for o, s in zip(other, own, strict=True)]
    found = instruments.relative_mismatch(x_t, t, answer, fake)
    assert found.tolist() == pytest.approx(expected, rel=1e-4)
    assert instruments.relative_mismatch(x_t, t, fake, fake).tolist() == [0.0] * 5


def test_mismatch_and_shares_by_hand() -> None:
    """At t = 0.5 with fake = 0: s = -4 x_t + 2 x_0, so the mismatch is ||D_m|| / (2 ||x_t||)."""
    plan = tiny_plan()
    batch = batch_of("t2i", "text", "portrait", "text")  # two groups: text has a rule of its own
    x_t = torch.tensor([1.0, 0.0]).expand(3, 1, 1, 2)
    fake, real = torch.zeros(3, 1, 1, 2), torch.ones(3, 1, 1, 2)
    base = torch.tensor([[3.0, 4.0], [0.0, 2.0], [0.0, 1.0]]).view(3, 1, 1, 2)
    text = torch.tensor([[5.0, 0.0], [float("nan")] * 2, [0.0, 3.0]]).view(3, 1, 1, 2)
    t = torch.full((3,), 0.5)
    told = instruments.describe(
        batch, 2, plan, x_t=x_t, t=t, fake=fake, real=real, answers={"base": base, "text": text}
    )
    assert instruments.mean_of([told]) == pytest.approx(
        {
            "mismatch/t2i/text/base/k2": (5 / 2 + 1 / 2) / 2,
            "mismatch/t2i/text/text/k2": (5 / 2 + 3 / 2) / 2,
            "mismatch/t2i/portrait/base/k2": 1.0,
            "share/t2i/text/base": (1 / 2 + 1 / 4) / 2,  # lambda is 1/2 each at k = 2
            "share/t2i/text/text": (1 / 2 + 3 / 4) / 2,
            "share/t2i/portrait/base": 1.0,
            "gap/text": 1.0,
            "gap/portrait": 1.0,
        }
    )


def test_metrics_do_not_depend_on_how_the_samples_are_cut() -> None:
    """Three samples of one group and one of the other in the first part, the reverse in the rest:
    a mean of means, and a mean of roots, would be another number."""
    plan, g = tiny_plan(), torch.Generator().manual_seed(0)
    categories = ("text", "text", "text", "portrait", "portrait", "portrait", "portrait", "text")
    x_t, fake, real, base, text = (torch.randn(8, 1, 1, 2, generator=g) for _ in range(5))
    text[torch.tensor([c == "portrait" for c in categories])] = torch.nan

    def told(rows: slice) -> instruments.Told:
        return instruments.describe(
            batch_of("t2i", *categories[rows]),
            2,
            plan,
            x_t=x_t[rows],
            t=torch.full((len(x_t[rows]),), 0.5),
            fake=fake[rows],
            real=real[rows],
            answers={"base": base[rows], "text": text[rows]},
        ) | {"loss/student": float(len(x_t[rows]))}

    whole = instruments.mean_of([told(slice(0, 8))])
    parts = instruments.mean_of([told(slice(0, 4)), told(slice(4, 8))])
    assert parts == pytest.approx(whole | {"loss/student": 4.0})
    square = (real - fake).square().mean((1, 2, 3))[[0, 1, 2, 7]].mean()
    assert whole["gap/text"] == pytest.approx(float(square.sqrt()))


def test_shares_follow_lambda_and_sum_to_one() -> None:
    weights = {"a": 0.2, "b": 0.3, "c": 0.5}
    found = instruments.shares_of_pull(weights, {"a": 1.0, "b": 2.0, "c": 0.0})
    assert found == pytest.approx({"a": 0.25, "b": 0.75, "c": 0.0})
    assert instruments.shares_of_pull(weights, dict.fromkeys(weights, 0.0)) == weights


# --- noise and diversity --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def renders() -> np.ndarray:
    """Clean pictures of the lab of several kinds, training split."""
    domain = LabDomain()
    cases = [
        case
        for category in ("object", "identity", "scene")
        for case in domain.cases("edit", category, 8, 5, evaluation=False)
    ]
    return np.stack([case.target for case in cases if case.target is not None])


def with_noise(images: np.ndarray, sigma: float) -> np.ndarray:
    noise = np.random.default_rng(1).standard_normal(images.shape)
    return np.clip(np.round(images + sigma * noise), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("sigma", [2.0, 5.0, 12.0])
def test_flat_noise_is_sigma_of_white_noise_whatever_the_edges(sigma: float) -> None:
    """On grey, on a ramp, and beside edges along rows and columns, which answer nothing."""
    ramp = np.add.outer(np.arange(64), np.arange(64))[..., None].repeat(3, 2)
    grey = np.full((64, 64, 3), 128)
    halves = grey.copy()
    halves[:, 20:50] = 60
    halves[30:45] += 90
    images = with_noise(np.stack([grey, 60 + ramp, halves]), sigma)
    assert probe.flat_noise(images) == pytest.approx([sigma] * 3, rel=0.15)
    assert not probe.flat_noise(np.stack([grey, 60 + ramp, halves]).astype(np.uint8)).any()


def test_flat_noise_of_clean_pictures_is_small_and_rises_with_what_is_added(
    renders: np.ndarray,
) -> None:
    means = [probe.flat_noise(with_noise(renders, s)).mean() for s in (0, 1, 2, 4, 8, 16)]
    assert means == sorted(means)
    assert means[0] < 1.0  # edges of the drawing hardly count
    assert means[3] == pytest.approx(4, rel=0.25) and means[5] == pytest.approx(16, rel=0.25)


def test_diversity_is_the_mean_distance_of_pairs_and_ignores_residual_noise() -> None:
    black, white = np.zeros((32, 32, 3), np.uint8), np.full((32, 32, 3), 255, np.uint8)
    grey = np.full((32, 32, 3), 51, np.uint8)  # a fifth of white
    assert probe.diversity(np.stack([np.stack([black, white, grey])])) == pytest.approx(
        (1 + 0.2 + 0.8) / 3
    )
    assert probe.diversity(np.stack([np.stack([black, white]), np.stack([grey, grey])])) == 0.5
    assert probe.diversity(black[None, None]) == 0.0
    flat = np.full((1, 4, 64, 64, 3), 128)
    assert probe.diversity(with_noise(flat, 12.0)) < 12 / 255 / 2


# --- the probe ------------------------------------------------------------------------------------

CONDITIONS: list[tuple[Task, str]] = [("t2i", "landscape"), ("t2i", "portrait"), ("edit", "object")]
SETTINGS = Settings(per_category=2, seeds=3)


class Painter:
    """Draws latents straight from noise and condition: a model whose diversity is known."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, noise: Tensor, cond: object, task: Task) -> Tensor:
        self.calls += 1
        assert isinstance(cond, LabCondition)
        prompt = (cond.text * torch.arange(1, cond.text.shape[1] + 1)).sum(1)
        own = torch.stack(
            [
                torch.randn(noise.shape[1:], generator=torch.Generator().manual_seed(int(p)))
                for p in prompt
            ]
        )
        return own + noise


@pytest.fixture(scope="module")
def domain() -> Domain:
    return LabDomain()


@pytest.fixture
def made(domain: Domain, tmp_path: Path) -> Iterator[probe.Probe]:
    yield probe.Probe(
        domain, CONDITIONS, SETTINGS, Painter(), seed=7, batch=32, out=tmp_path / "probe"
    )


def test_a_student_like_its_teacher_has_ratio_one_no_excess_noise_and_no_alarm(
    made: probe.Probe, tmp_path: Path
) -> None:
    found = made.measure(50, Painter())
    for key, value in found.items():
        if "_ratio/" in key:
            assert value == 1.0, key
    assert {k.removeprefix("probe/") for k in found if "variety" in k} == {
        "variety_ratio/t2i",
        "variety_ratio/edit",
    }
    assert found["probe/noise"] == found["probe/noise/t2i"] == found["probe/noise/edit"] == 0.0
    assert found["probe/collapsed"] == 0.0 and made.alarm(50, found) == ""
    score = {key: value for key, value in found.items() if key.startswith("probe/score/t2i")}
    assert set(score) == {
        "probe/score/t2i",
        "probe/score/t2i/landscape",
        "probe/score/t2i/portrait",
    }
    categories = [score["probe/score/t2i/landscape"], score["probe/score/t2i/portrait"]]
    assert score["probe/score/t2i"] == pytest.approx(sum(categories) / 2)
    drawn = sorted(path.name for path in (tmp_path / "probe" / "step_000050").iterdir())
    assert len(drawn) == 3 * 2 * 3 and drawn[0] == "edit-object-0000-s0.png"


def test_the_same_picture_for_every_seed_is_an_alarm_told_once(made: probe.Probe) -> None:
    paint = Painter()
    found = made.measure(50, lambda noise, cond, task: paint(torch.zeros_like(noise), cond, task))
    assert found["probe/diversity/t2i"] == found["probe/diversity_ratio/edit"] == 0.0
    assert found["probe/collapsed"] == 1.0
    told = made.alarm(50, found)
    assert "update 50: mode collapse" in told and "diversity_ratio/t2i 0.00" in told
    assert made.alarm(100, found) == ""


def test_the_same_picture_for_every_prompt_is_an_alarm(made: probe.Probe) -> None:
    found = made.measure(50, lambda noise, cond, task: noise)
    assert found["probe/variety_ratio/t2i"] == found["probe/variety_ratio/edit"] == 0.0
    assert found["probe/diversity_ratio/t2i"] > probe.COLLAPSED
    assert found["probe/collapsed"] == 1.0
    assert "variety_ratio/edit 0.00" in made.alarm(50, found)


def test_one_task_that_collapses_is_enough(made: probe.Probe) -> None:
    paint = Painter()

    def half(noise: Tensor, cond: object, task: Task) -> Tensor:
        return paint(noise if task == "t2i" else torch.zeros_like(noise), cond, task)

    found = made.measure(50, half)
    assert found["probe/diversity_ratio/t2i"] == 1.0 and found["probe/collapsed"] == 1.0


def test_noise_is_told_against_the_teacher(domain: Domain, tmp_path: Path) -> None:
    calm = probe.Probe(
        domain,
        CONDITIONS,
        SETTINGS,
        lambda n, c, t: torch.zeros_like(n),
        seed=7,
        batch=32,
        out=tmp_path,
    )
    rough = calm.measure(1, lambda noise, cond, task: 0.5 * noise)
    assert rough["probe/noise"] > 1.0
    loud = probe.Probe(
        domain,
        CONDITIONS,
        SETTINGS,
        lambda n, c, t: 0.5 * n,
        seed=7,
        batch=32,
        out=tmp_path / "loud",
    )
    assert loud.measure(1, lambda noise, cond, task: torch.zeros_like(noise))[
        "probe/noise"
    ] == pytest.approx(-rough["probe/noise"])


class Sizes(Painter):
    """Also keeps how many images it was asked for at once."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __call__(self, noise: Tensor, cond: object, task: Task) -> Tensor:
        self.seen.append(len(noise))
        return super().__call__(noise, cond, task)


def test_the_batch_decides_memory_and_not_the_picture(domain: Domain, tmp_path: Path) -> None:
    """Each image of a probe, a sample grid and an evaluation has its prompt and its noise."""

    def pictures(batch: int) -> tuple[list[bytes], list[int]]:
        out, painter = tmp_path / str(batch), Sizes()
        settings, seed = Settings(per_category=3, seeds=2), 7
        probe.Probe(
            domain, CONDITIONS, settings, painter, seed=seed, batch=batch, out=out / "probe"
        ).measure(1, painter)
        preview = Preview(domain, CONDITIONS, 6, seed=seed, batch=batch)
        preview.draw(painter).save(out / "grid.png")
        cases = [case for condition in CONDITIONS for case in domain.cases(*condition, 3, seed)]
        player = Contestant("painter", {"t2i": 1, "edit": 1}, painter, "stamp")
        evaluate(cases, [player], domain, out / "eval", batch=batch)
        names = sorted(out.rglob("*.png"))
        return [file.read_bytes() for file in names], painter.seen

    whole, at_once = pictures(32)
    split, seen = pictures(4)
    assert split == whole and len(whole) > 40
    # Student and teacher of three probes of 6, three rows of 6; 6 cases of a task and 3.
    assert at_once == [6] * 9 + [6, 3]
    assert seen == [4, 2] * 9 + [4, 2, 3]


def test_the_recipe_says_how_many_are_drawn_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In all that a run draws: sample grids, probes of both, the evaluation, `fewstep sample`."""
    seen: list[int] = []

    def counting(denoise: Guided, noise: Tensor, cond: Condition, grid: Sequence[float]) -> Tensor:
        seen.append(len(noise))
        return samplers.sample(denoise, noise, cond, grid)

    monkeypatch.setattr(contestants, "sample", counting)
    out = tmp_path / "run"
    recipe = write_recipe(tmp_path / "tiny.yaml", write_teacher(tmp_path / "base.safetensors"))
    changes = {
        "budget.updates": "2",
        "log.sample_seeds": "7",
        "log.probe": "{every: 2, per_category: 1, seeds: 8}",
        "evaluation": "{batch: 5, per_category: 9, models: [student]}",
    }
    distill(recipe, out=out, overrides=changes)
    grids, probes, evaluation = [5, 2] * 2, [5, 3] * 4, [5, 4] * 2  # t2i and edit each
    assert sorted(seen) == sorted(grids + probes + evaluation)
    seen.clear()
    ask = {"prompts": ["a red house"], "prompt_file": None, "source": None, "instruction": None}
    options = {"out": tmp_path / "seen.png", "model": "student", "steps": None}
    sample(out, seeds=list(range(6)), **ask, **options)
    assert seen == [5, 1]


@pytest.mark.parametrize(
    ("changes", "images"),
    [
        ({}, 32),
        ({"evaluation": {"batch": 3}}, 3),
        ({"model": {"family": "sana", "path": "models/sana"}}, 4),
        ({"model": {"family": "sana", "path": "models/sana"}, "evaluation": {"batch": 3}}, 3),
    ],
)
def test_real_models_draw_as_many_as_they_train_on_at_once(changes, images) -> None:
    assert tiny_recipe(**changes).images_at_once == images


def test_the_teacher_draws_once_for_a_run_folder(domain: Domain, tmp_path: Path) -> None:
    out = tmp_path / "probe"

    def probing(seeds: int = 3) -> tuple[list[np.ndarray], int]:
        teacher, settings = Painter(), Settings(per_category=1, seeds=seeds)
        made = probe.Probe(domain, CONDITIONS, settings, teacher, seed=7, batch=32, out=out)
        assert made.teacher is made.teacher
        return [group.images for group in made.teacher], teacher.calls

    first, calls = probing()
    again, calls_again = probing()  # as after a resume
    assert (calls, calls_again) == (3, 0)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    (out / "teacher" / "cases.json").unlink()  # killed while it drew
    assert probing()[1] == 3
    assert probing(seeds=2)[1] == 3  # other cases: drawn again


def test_a_teacher_that_was_stopped_while_it_wrote_is_drawn_again(
    domain: Domain, tmp_path: Path
) -> None:
    """Also when the run goes on with the settings from before: its pictures are of both."""
    out, condition = tmp_path / "probe", CONDITIONS[:1]

    def probing(seeds: int) -> int:
        teacher, settings = Painter(), Settings(per_category=1, seeds=seeds)
        made = probe.Probe(domain, condition, settings, teacher, seed=7, batch=8, out=out)
        assert len(made.teacher) == 1
        return teacher.calls

    assert (probing(2), probing(2)) == (1, 0)
    in_the_way = out / "teacher" / "t2i-landscape-0000-s2.png"
    in_the_way.mkdir()
    with pytest.raises(OSError, match=r"s2\.png"):
        probing(3)
    assert probing(2) == 1


def test_what_the_judge_could_not_score_is_in_no_mean(tmp_path: Path) -> None:
    asked: list[list[str]] = []

    class Unsure(LabDomain):
        def judge(self, images: np.ndarray, cases: Sequence[Case]) -> list[Verdict]:
            asked.append([case.id for case in cases])
            known = 2 if cases[0].category == "landscape" else 0
            return [Verdict(4.0 if i < known else None, {}, ()) for i in range(len(cases))]

    settings = Settings(per_category=2, seeds=3)
    made = probe.Probe(Unsure(), CONDITIONS[:2], settings, Painter(), seed=7, batch=8, out=tmp_path)
    found = made.measure(1, Painter())
    assert found["probe/score/t2i"] == found["probe/score/t2i/landscape"] == 4.0
    assert "probe/score/t2i/portrait" not in found
    assert asked[0] == ["t2i-landscape-0000"] * 3 + ["t2i-landscape-0001"] * 3


def test_a_category_alone_is_no_collapse() -> None:
    """Few pictures: it is shown, and the alarm is for a whole task."""
    metrics = {"probe/diversity_ratio/t2i": 0.9, "probe/diversity_ratio/t2i/landscape": 0.1}
    assert probe.collapsed(metrics) == []
    assert probe.collapsed(metrics | {"probe/variety_ratio/t2i": 0.3}) == [
        "probe/variety_ratio/t2i"
    ]


def test_the_noise_is_that_of_the_seed(domain: Domain, tmp_path: Path) -> None:
    def noise(seed: int) -> Tensor:
        settings = Settings(per_category=1, seeds=2)
        return probe.Probe(domain, [], settings, Painter(), seed=seed, batch=8, out=tmp_path).noise

    assert torch.equal(noise(7), noise(7)) and not torch.equal(noise(7), noise(8))


def test_probe_cases_are_of_the_training_split(made: probe.Probe, domain: Domain) -> None:
    held_out: set[str] = set()
    for task, category in CONDITIONS:
        held_out |= {c.prompt for c in domain.cases(task, category, 2, 7, evaluation=True)}
    asked = {case.prompt for cases in made.cases for case in cases}
    fresh = {
        case.prompt
        for task, category in CONDITIONS
        for case in domain.cases(task, category, 2, 7, evaluation=False)
    }
    assert asked == fresh and not asked & held_out


# --- in the loop ----------------------------------------------------------------------------------


class Killed(Exception):
    pass


def distil(
    d: loop.Distillation, out: Path, *, stop_after: int | None = None, probing: bool = True
) -> list[int]:
    """Run with a probe that uses the student as the real one does; the steps it was asked at."""
    asked: list[int] = []
    out.mkdir(exist_ok=True)

    def on_step(at: int, _metrics: instruments.Metrics) -> None:
        if at == stop_after:
            raise Killed

    def on_probe(at: int) -> instruments.Metrics:
        asked.append(at)
        with loop.averaged_student(d) as student, torch.inference_mode():
            x = torch.randn(2, *d.shape, generator=torch.Generator().manual_seed(1))
            words = torch.ones(2, 3, dtype=torch.long)
            answer = student(x, torch.ones(2), LabCondition(words, words.bool()))
        return {"probe/score/t2i": float(answer.mean())}

    with contextlib.suppress(Killed):
        loop.distil(
            d,
            out,
            on_step=on_step,
            on_sample=lambda at: None,
            on_probe=on_probe if probing else lambda at: {},
        )
    return asked


def rows_with_a_probe(folder: Path) -> dict[int, float]:
    return {
        row["step"]: row["probe/score/t2i"]
        for row in metrics_of(folder)
        if "probe/score/t2i" in row
    }


def test_when_it_probes() -> None:
    def steps(every: int, given: tuple[int, ...] | None = None) -> list[int]:
        due = loop.Due(every, 10, given)
        return [step for step in range(1, 11) if due(step)]

    assert steps(4) == [4, 8, 10] and steps(50) == [10]
    assert steps(4, (1, 5)) == [1, 5]


def test_a_probe_writes_a_row_of_its_own_where_nothing_else_is_logged(tmp_path: Path) -> None:
    d = start(tiny_recipe(log={"every": 3, "save_every": 6, "probe": {"steps": [1, 5]}}))
    assert distil(d, tmp_path) == [1, 5] == list(rows_with_a_probe(tmp_path))
    assert [row["step"] for row in metrics_of(tmp_path)] == [1, 3, 5, 6]


def test_a_probe_changes_nothing_in_the_training(tmp_path: Path) -> None:
    runs = []
    for probing in (True, False):
        d = start(tiny_recipe(log={"probe": {"every": 2} if probing else None}))
        distil(d, tmp_path / str(probing), probing=probing)
        rows = [
            {key: value for key, value in row.items() if not key.startswith("probe/")}
            for row in metrics_of(tmp_path / str(probing))
        ]
        runs.append((d, rows))
    (one, rows), (other, bare) = runs
    assert rows == bare
    assert same_weights(one.cast.student, other.cast.student)
    assert same_weights(one.cast.fake, other.cast.fake)
    for stream in ("control", "noise"):
        assert torch.equal(one.state_dict()[stream], other.state_dict()[stream])
    assert one.plan.recipe_hash == other.plan.recipe_hash


def test_rows_of_probes_appear_once_and_alike_after_a_resume(tmp_path: Path) -> None:
    recipe = tiny_recipe(log={"save_every": 3, "probe": {"every": 2}})
    distil(start(recipe), tmp_path / "whole")
    distil(start(recipe), tmp_path / "killed", stop_after=5)  # step 4 is probed but not saved
    second = start(recipe)
    loop.resume(second, tmp_path / "killed")
    assert distil(second, tmp_path / "killed") == [4, 6]
    assert metrics_of(tmp_path / "killed") == metrics_of(tmp_path / "whole")
    assert list(rows_with_a_probe(tmp_path / "killed")) == [2, 4, 6]


def test_a_probe_after_the_last_update_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"log\.probe\.steps: 7 lies after the last of 6"):
        tiny_plan(log={"probe": {"steps": [1, 7]}})


# --- in the report --------------------------------------------------------------------------------


def scores(*values: float) -> list[tuple[float, float]]:
    return [(50.0 * (i + 1), value) for i, value in enumerate(values)]


def test_a_score_that_falls_for_good_is_told_with_its_best_and_its_turn() -> None:
    """As the specialised teacher alone in the paper's figure 3: early gain, then worse."""
    metrics = {
        "probe/score/t2i": scores(3.0, 3.4, 3.3, 3.2, 3.28, 3.2, 3.1),  # 3.28 is not DROP below
        "probe/score/edit": scores(2.0, 2.9, 2.0, 2.8),  # it came back
        "probe/score/edit/style": scores(5.0, 1.0, 1.0, 1.0),
        "probe/collapsed": scores(0.0, 0.0, 1.0, 0.0),
    }
    assert stability.turns(metrics) == [stability.Turn("t2i", 3.4, 100.0, 300.0, 3.1)]
    told = stability.verdicts(metrics)
    assert told[0] == "Mode collapse was found at update 150."
    assert "best at update 100 (3.40) and from update 300 on" in told[1] and len(told) == 2
    assert stability.verdicts({"probe/collapsed": scores(0.0)}) == [
        "No probe found a mode collapse."
    ]


def test_the_section_shows_every_instrument_once_and_curves_leave_them_out(tmp_path: Path) -> None:
    row = {
        "step": 50,
        "loss/fake": 0.5,
        "mismatch/t2i/base/k0": 0.321,
        "share/t2i/base": 0.62,
        "lambda/t2i/base/k0": 0.63,
        "probe/score/t2i": 3.11,
        "probe/diversity/t2i": 0.2,
        "probe/diversity_ratio/t2i": 0.91,
        "probe/variety_ratio/t2i": 0.92,
        "probe/noise": 0.5,
        "probe/noise/t2i": 0.55,
        "probe/collapsed": 0.0,
    }
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    shown = findings.read_run(tmp_path)
    html = str(stability.section(shown))
    for value in ("0.321", "0.62", "0.63", "3.11", "0.91", "0.92", "0.55"):
        assert html.count(f"<b>{value}</b>") == 1, value
    page = report_html.render(shown)
    assert page.count("<b>0.321</b>") == 1 and page.count('href="#stability"') == 1
    bare = replace(shown, metrics={"loss/fake": [(1.0, 0.5)]})
    assert stability.section(bare) is None and "#stability" not in report_html.render(bare)


@pytest.mark.slow
def test_a_run_of_the_command_probes_and_reports(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "tiny.yaml", write_teacher(tmp_path / "base.safetensors"))
    out = tmp_path / "run"
    asked = "{steps: [2], per_category: 1, seeds: 2}"
    distill(recipe, out=out, overrides={"log.probe": asked, "budget.updates": "3"})
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    keys = {"probe/score/t2i/portrait", "probe/diversity_ratio/edit", "probe/collapsed"}
    assert [row["step"] for row in rows if keys <= set(row)] == [2]
    for folder in ("teacher", "step_000002"):
        found = {path.name for path in (out / "probe" / folder).glob("*.png")}
        assert found == {
            f"{c}-0000-s{i}.png" for c in ("t2i-portrait", "edit-style") for i in (0, 1)
        }
    assert 'id="stability"' in (out / "report.html").read_text()
