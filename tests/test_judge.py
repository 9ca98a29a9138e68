"""The judge of real images, against a server that decodes the pictures it is sent and looks."""

import base64
import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from fewstep.commands import judge_check
from fewstep.commands.distill import distill
from fewstep.commands.evaluate import evaluate
from fewstep.commands.judge import judge_again
from fewstep.commands.report import report
from fewstep.core.types import Task
from fewstep.domain import Case, Question, Verdict
from fewstep.endpoint import every_json_in
from fewstep.errors import RecipeError, RunError
from fewstep.evals.judging import judge_drawn
from fewstep.evals.rows import PENDING, Row, RowWriter, read_rows
from fewstep.evals.runner import Contestant, forget_changed
from fewstep.evals.runner import evaluate as run_evaluation
from fewstep.evals.stats import judge_noise
from fewstep.judges import rubric
from fewstep.judges.answer import Unreadable, read_answer
from fewstep.judges.controls import Control, check, pooled, spoil, swap_letters, wilson
from fewstep.judges.endpoint import (
    EndpointJudge,
    data_url,
    identity,
    known_picture,
    open_judge,
)
from fewstep.recipe.judging import count_images, plan_judge
from fewstep.recipe.load import load_recipe
from fewstep.recipe.schema import EndpointJudge as Settings

from .endpoint_server import Handled, serving
from .test_run import write_recipe, write_teacher

PAPER_SUBSCORES = {
    "scene": 5, "enhance": 5, "object": 5, "text_edit": 6, "identity": 6, "style": 5,
}  # fmt: skip
"""How many of them appendix A has for each kind of edit."""

# --- a server with eyes ---------------------------------------------------------------------------


class Seen:
    """One request as the server sees it."""

    def __init__(self, request: Handled) -> None:
        self.request, self.body = request, request.body
        parts = next(m for m in request.body["messages"] if isinstance(m["content"], list))
        self.text = next(part["text"] for part in parts["content"] if part["type"] == "text")
        self.images = [
            decode(part["image_url"]["url"])
            for part in parts["content"]
            if part["type"] == "image_url"
        ]
        found = re.search(r"<(prompt|instruction)>\n(.*)\n</", self.text)
        assert found
        self.prompt = found[2]
        self.names = re.findall(r'"(\w+)": 0\.00', self.text)[:-1]

    @property
    def greeting(self) -> bool:
        return self.prompt.startswith(("A red disc", "A green forest"))

    def greet(self) -> None:
        self.score(5.0 if np.array_equal(self.images[-1], known_picture()) and
                   self.prompt.startswith("A red") else 1.0)  # fmt: skip

    def score(self, score: float, **more: Any) -> None:
        self.request.reply(json.dumps(answer_of(score, self.names) | more))


def answer_of(score: float, names: Sequence[str]) -> dict[str, Any]:
    parts = {name: max(1.0, score - 0.1 * i) for i, name in enumerate(names)}
    return {"reasoning": "as seen", "subscores": parts, "score": score}


def decode(url: str) -> np.ndarray:
    assert url.startswith("data:image/png;base64,")
    return np.asarray(Image.open(BytesIO(base64.b64decode(url.partition(",")[2]))))


@contextmanager
def eyes(look: Callable[[Seen, int], None]) -> Iterator[str]:
    """`look` gets everything but the greeting, which is answered well, and its number from 0."""
    lock, count = threading.Lock(), [0]

    def answer(request: Handled, _number: int) -> None:
        seen = Seen(request)
        if seen.greeting:
            seen.greet()
            return
        with lock:
            number, count[0] = count[0], count[0] + 1
        look(seen, number)

    with serving(answer) as url:
        yield url


def judge_at(url: str, **changes: Any) -> EndpointJudge:
    return EndpointJudge(settings_at(url, **changes), None, pause=0.01)


def settings_at(url: str, **changes: Any) -> Settings:
    return Settings.model_validate({"kind": "endpoint", "url": url, "model": "eye"} | changes)


def shade(level: int, side: int = 256) -> np.ndarray:
    return np.full((side, side, 3), level, np.uint8)


def brightness(seen: Seen, _number: int = 0) -> None:
    """Scores 1 + brightness of the last picture / 100, which tells pictures apart."""
    seen.score(round(1 + float(seen.images[-1].mean()) / 100, 2))


def asked(level: int = 200, task: Task = "t2i", **more: Any) -> Question:
    return Question(task, more.pop("category", "portrait"), "A cat", shade(level), **more)


# --- one question ---------------------------------------------------------------------------------


def test_the_judge_sees_the_very_pixels_and_the_prompt():
    rng = np.random.default_rng(0)
    source, result = (rng.integers(0, 256, (300, 280, 3), dtype=np.uint8) for _ in range(2))
    taken: list[Seen] = []

    def look(seen: Seen, _number: int) -> None:
        taken.append(seen)
        seen.score(3.25, failure_modes=["wrong letter"])

    with eyes(look) as url:
        judge = judge_at(url)
        told = judge.ask(Question("edit", "text_edit", 'Write {x} "HI"', result, source))
    (seen,) = taken
    assert seen.prompt == 'Write {x} "HI"'
    assert np.array_equal(seen.images[0], source) and np.array_equal(seen.images[1], result)
    assert told.score == 3.25 and told.reasons == ("as seen", "wrong letter")
    assert list(told.subscores) == list(rubric.EDITS["text_edit"].criteria)
    assert told.subscores["text_accuracy"] == pytest.approx(3.15) and told.judgements == ()
    form = seen.body["response_format"]["json_schema"]
    assert form["strict"] and form["schema"]["properties"]["subscores"]["required"] == seen.names
    assert seen.body["temperature"] == 0 and seen.body["seed"] == 0


def test_small_pictures_are_enlarged_without_inventing_pixels():
    small = np.random.default_rng(1).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    shown = decode(data_url(small))
    assert shown.shape == (256, 384, 3)
    assert np.array_equal(shown, small.repeat(8, 0).repeat(8, 1))
    large = shade(9, 300)
    assert np.array_equal(decode(data_url(large)), large)


def test_fields_are_sent_as_the_recipe_says():
    bodies: list[dict[str, Any]] = []

    def look(seen: Seen, _number: int) -> None:
        bodies.append(seen.body)
        brightness(seen)

    with eyes(look) as url:
        plain = {"answer": "text", "temperature": None, "seed": None}
        judge_at(url, **plain, request={"reasoning_effort": "low"}).ask(asked())
        judge_at(url, answer="json_object", temperature=0.5).ask(asked())
    assert sorted(bodies[0]) == ["messages", "model", "reasoning_effort"]
    assert bodies[1]["response_format"] == {"type": "json_object"}
    assert bodies[1]["temperature"] == 0.5


def test_repeats_have_seeds_of_their_own_and_a_mean():
    scores, seeds = iter([2.0, 3.0, 4.5]), []

    def look(seen: Seen, _number: int) -> None:
        seeds.append(seen.body["seed"])
        seen.score(next(scores))

    with eyes(look) as url:
        told = judge_at(url, repeats=3).ask(asked())
    assert told.score == pytest.approx(9.5 / 3) and told.judgements == (2.0, 3.0, 4.5)
    assert told.subscores["quality"] == pytest.approx(9.5 / 3 - 0.1)
    assert len(set(seeds)) == 3


GOOD = json.dumps(answer_of(4.0, ("compliance", "quality")))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (GOOD[:-10], "no complete JSON object"),
        ("I would say 4 out of 5.", "no complete JSON object"),
        (f"{GOOD} or {GOOD}", "2 JSON objects"),
        (GOOD.replace("4.0", "7.5"), "7.5, outside 1 to 5"),
        (GOOD.replace("4.0", "0.99"), "0.99, outside"),
        (GOOD.replace("4.0", "NaN"), "nan, outside"),
        (GOOD.replace("4.0", "true"), "True, no number"),
        (GOOD.replace("4.0", '"4/5"'), "no number"),
        (GOOD.replace("4.0", "null"), "missing"),
        ('{"score": 4.0}', "no subscores"),
        ('{"score": 4.0, "subscores": {"compliance": 4}}', "quality is missing"),
    ],
)
def test_what_cannot_be_read_is_asked_again_and_then_unscored(text: str, why: str):
    """Never a default and never clamped."""
    with pytest.raises(Unreadable, match=why):
        read_answer(text, ("compliance", "quality"))
    talks: list[list[Any]] = []

    def look(seen: Seen, number: int) -> None:
        talks.append(seen.body["messages"])
        seen.request.reply(text)

    with eyes(look) as url:
        told = judge_at(url).ask(asked())
    assert told.score is None and re.search(why, told.unscored) and len(talks) == 3
    assert [len(talk) for talk in talks] == [2, 3, 3]
    assert re.search(why, talks[1][-1]["content"])


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"```json\n{GOOD}\n```",
        f'<think>{{"score": 1}} hm</think>{GOOD}',
        GOOD.replace("4.0", '"4.00"'),
        f"In the form {{}}: {GOOD}",
    ],
)
def test_answers_are_found_behind_thoughts_fences_and_quotation_marks(text: str):
    found = read_answer(text, ("compliance", "quality"))
    assert found.score == 4 and found.subscores == {"compliance": 4, "quality": 3.9}


def test_an_object_inside_another_is_no_second_one():
    assert list(every_json_in('{"a": {"score": 1}} [2] {"b": 1}')) == [
        {"a": {"score": 1}},
        [2],
        {"b": 1},
    ]


def test_a_second_try_that_can_be_read_counts():
    def look(seen: Seen, number: int) -> None:
        seen.request.reply(GOOD[:30]) if number == 0 else brightness(seen)

    with eyes(look) as url:
        assert judge_at(url).ask(asked(150)).score == 2.5


@pytest.mark.parametrize(
    ("finish", "message", "why", "requests"),
    [
        ("length", GOOD[:20], "cut off", 3),
        ("content_filter", "", "content filter", 3),
        ("stop", None, "refused: not this one", 3),
    ],
)
def test_a_judge_that_will_not_is_unscored_with_its_reason(
    finish: str, message: str | None, why: str, requests: int
):
    count = []

    def look(seen: Seen, number: int) -> None:
        count.append(number)
        said = {"content": message, "refusal": "not this one"}
        choice = {"message": said, "finish_reason": finish}
        seen.request.raw(200, json.dumps({"choices": [choice]}))

    with eyes(look) as url:
        told = judge_at(url).ask(asked())
    assert told.score is None and why in told.unscored and len(count) == requests


def test_a_request_refused_for_its_picture_is_not_sent_again():
    count = []

    def look(seen: Seen, number: int) -> None:
        count.append(number)
        seen.request.raw(400, '{"error": {"message": "unsafe"}}')

    with eyes(look) as url:
        judge = judge_at(url)
        judge.greet()
        told = judge.ask(asked())
    assert told.score is None and told.unscored == "refused (400)" and len(count) == 1


# --- the greeting ---------------------------------------------------------------------------------


def test_a_judge_that_does_not_see_is_refused():
    with (
        serving(lambda request, _: Seen(request).score(4.0)) as url,
        pytest.raises(RecipeError, match=r"evaluation.judge.model.*does not see the picture"),
    ):
        judge_at(url).greet()


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (401, "key_env.*is not set"),
        (404, "evaluation.judge.model.*no model 'eye'"),
        (400, "evaluation.judge.url.*no response_format.*answer: text"),
    ],
)
def test_what_the_user_must_mend_is_told_by_field(status: int, told: str):
    def answer(request: Handled, _number: int) -> None:
        request.raw(status, '{"error": {"message": "no response_format here"}}')

    with serving(answer) as url, pytest.raises(RecipeError, match=told):
        judge_at(url).greet()


def test_answers_of_no_form_are_refused_at_once():
    with (
        serving(lambda request, _: request.reply("fine!")) as url,
        pytest.raises(RecipeError, match=r"known picture.*no complete JSON.*answer: json_object"),
    ):
        judge_at(url).greet()


# --- who the judge is -----------------------------------------------------------------------------


def test_the_name_changes_with_whatever_changes_the_scores(monkeypatch: pytest.MonkeyPatch):
    url = "http://localhost:1/v1"
    settings = settings_at(url)
    names = {judge_at(url).name}
    for changes in (
        {"model": "other"},
        {"temperature": 0.7},
        {"answer": "text"},
        {"request": {"reasoning_effort": "low"}},
        {"repeats": 2},
    ):
        names.add(judge_at(url, **changes).name)
    assert len(names) == 6
    assert identity(settings) == identity(settings_at("http://elsewhere/v1", parallel=9))
    before = identity(settings)
    edits = rubric.EDITS | {"style": rubric.EDITS["style"]._replace(rubric="another")}
    monkeypatch.setattr(rubric, "EDITS", edits)
    assert identity(settings) != before


def test_every_kind_of_edit_has_the_paper_s_number_of_subscores_and_they_are_asked_for():
    assert {name: len(edit.criteria) for name, edit in rubric.EDITS.items()} == PAPER_SUBSCORES
    for name in (*rubric.EDITS, "an own category"):
        text = rubric.request_text("edit", name, "make it {title} {criteria}")
        assert "make it {title} {criteria}" in text and text.count("{title}") == 1
        for part in rubric.subscores("edit", name):
            assert f"- {part}: " in text and f'"{part}": 0.00' in text


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"url": "localhost:8000"}, "evaluation.judge.url.*is no address"),
        ({"url": "http://host:port/v1"}, "evaluation.judge.url.*is no address"),
        ({"url": "https://me:secret@host/v1"}, "evaluation.judge.url.*put the key into"),
        ({"key_env": "sk-abc"}, "evaluation.judge.key_env"),
        ({"key": "sk-abc"}, "evaluation.judge.key"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_loaded(
    tmp_path: Path, changes: dict[str, Any], told: str
):
    path = recipe_with(tmp_path, {"kind": "endpoint", "url": "http://h/v1", "model": "m"} | changes)
    with pytest.raises(RecipeError, match=told) as error:
        plan_judge(load_recipe(path), steps=4)
    assert "secret" not in str(error.value)


def test_a_missing_key_is_refused_and_a_given_one_is_sent():
    heard: list[str | None] = []

    def answer(request: Handled, _number: int) -> None:
        heard.append(request.headers["Authorization"])
        Seen(request).greet()

    with serving(answer) as url:
        settings = settings_at(url, key_env="JUDGE_KEY")
        with pytest.raises(RecipeError, match="JUDGE_KEY is not set"):
            open_judge(settings, {"OTHER": "x"})
        judge = open_judge(settings, {"JUDGE_KEY": "sk-1"})
        assert judge is not None
        judge.greet()
    assert heard == ["Bearer sk-1"] * 2
    assert open_judge(None, {}) is None


# --- a run's rows ---------------------------------------------------------------------------------


def drawn_run(out: Path, count: int = 6, *, edits: bool = False) -> list[Row]:
    """Rows that wait, with pictures whose brightness is 20 i."""
    rows = []
    with RowWriter(out / "rows.jsonl") as file:
        for i in range(count):
            path = out / "images" / "student" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(shade(20 * i)).save(path)
            row = Row(
                model="student", nfe=4, task="t2i", category="portrait", case=f"c{i}",
                prompt=f"prompt {i}", seed=i, image=f"images/student/{i}.png", score=None,
                status=PENDING, seconds=0.5, judge="earlier",
            )  # fmt: skip
            file.write(row)
            rows.append(row)
    return rows


def scores(out: Path, judge: str) -> dict[str, float | None]:
    return {row.case: row.score for row in read_rows(out / "rows.jsonl").rows if row.judge == judge}


EXPECTED = {f"c{i}": 1 + 0.2 * i for i in range(6)}


def test_scores_stay_with_their_pictures_however_late_they_come(tmp_path: Path):
    drawn_run(tmp_path)
    together, most, lock = [0], [0], threading.Lock()

    def look(seen: Seen, number: int) -> None:
        with lock:
            together[0] += 1
            most[0] = max(most[0], together[0])
        time.sleep(0.15 - 0.02 * number)
        with lock:
            together[0] -= 1
        brightness(seen)

    with eyes(look) as url:
        judge = judge_at(url, parallel=3)
        told = judge_drawn(tmp_path, judge)
    assert told == (6, 0, "", 0) and most[0] == 3
    assert scores(tmp_path, judge.name) == pytest.approx(EXPECTED)
    rows = [row for row in read_rows(tmp_path / "rows.jsonl").rows if row.judge == judge.name]
    assert {row.seconds for row in rows} == {0.5} and {row.nfe for row in rows} == {4}


def test_nothing_says_which_model_drew_a_picture(tmp_path: Path):
    drawn_run(tmp_path)
    said: list[str] = []

    def look(seen: Seen, _number: int) -> None:
        said.append(json.dumps(seen.body))
        brightness(seen)

    with eyes(look) as url:
        judge_drawn(tmp_path, judge_at(url))
    assert len(said) == 6 and not any("student" in text for text in said)


def test_what_is_scored_is_not_asked_again_and_what_is_not_is(tmp_path: Path):
    drawn_run(tmp_path)
    asked_for: list[str] = []

    def look(seen: Seen, _number: int) -> None:
        asked_for.append(seen.prompt)
        if seen.prompt == "prompt 3" and len(asked_for) < 12:
            seen.request.reply("no idea")
        else:
            brightness(seen)

    with eyes(look) as url:
        judge = judge_at(url, parallel=1)
        assert judge_drawn(tmp_path, judge) == (5, 1, "", 0)
        rows = {r.case: r for r in read_rows(tmp_path / "rows.jsonl").rows if r.judge == judge.name}
        assert rows["c3"].status.startswith("unscored: no answer that can be read: it holds no")
        asked_for[:] = [""] * 12
        assert judge_drawn(tmp_path, judge) == (6, 0, "", 0)
    assert asked_for[12:] == ["prompt 3"]
    assert scores(tmp_path, judge.name) == pytest.approx(EXPECTED)
    assert scores(tmp_path, "earlier") == dict.fromkeys(EXPECTED), "the other judge's rows stay"


def test_a_judgement_is_of_the_pictures_and_the_prompt_that_it_was_given(tmp_path: Path):
    """Image, source, target and prompt changed in one row each; one row is from before `content`
    was kept; the picture of one is gone, and its score stays; c6 is as it was."""
    rows = drawn_run(tmp_path, 7)
    for folder in ("source", "target"):
        (tmp_path / "images" / folder).mkdir()
        for i in range(7):
            Image.fromarray(shade(5 * i)).save(tmp_path / f"images/{folder}/{i}.png")
    with RowWriter(tmp_path / "rows.jsonl") as file:
        for i, row in enumerate(rows):
            sides = {side: f"images/{side}/{i}.png" for side in ("source", "target")}
            file.write(row.model_copy(update={"task": "edit", "category": "style"} | sides))
    asked_for: list[str] = []

    def look(seen: Seen, _number: int) -> None:
        asked_for.append(seen.prompt)
        brightness(seen)

    with eyes(look) as url:
        judge = judge_at(url, parallel=1)
        assert judge_drawn(tmp_path, judge) == (7, 0, "", 0)
        asked_for.clear()
        assert judge_drawn(tmp_path, judge) == (7, 0, "", 0) and asked_for == []
        for name in ("student/0", "source/1", "target/2"):
            Image.fromarray(shade(150)).save(tmp_path / f"images/{name}.png")
        (tmp_path / "images/student/5.png").unlink()
        own = [row for row in read_rows(tmp_path / "rows.jsonl").rows if row.judge == judge.name]
        with RowWriter(tmp_path / "rows.jsonl") as file:
            file.write(own[3].model_copy(update={"prompt": "another prompt"}))
            file.write(own[4].model_copy(update={"content": None}))
        wanted = ["prompt 0", "prompt 1", "prompt 2", "another prompt", "prompt 4"]
        assert judge_drawn(tmp_path, judge) == (7, 0, "", 5)
        assert asked_for == wanted
        assert scores(tmp_path, judge.name)["c0"] == 2.5, "of the picture that is there now"
        assert judge_drawn(tmp_path, judge) == (7, 0, "", 0) and asked_for == wanted


def test_an_outdated_score_does_not_count_while_the_judge_is_away(tmp_path: Path):
    drawn_run(tmp_path, 2)
    with eyes(brightness) as url:
        judge = judge_at(url)
        judge_drawn(tmp_path, judge)
        name = judge.name
    Image.fromarray(shade(150)).save(tmp_path / "images/student/0.png")
    told = judge_drawn(tmp_path, judge_at("http://127.0.0.1:9/v1"))
    assert (told.scored, told.left, told.outdated) == (1, 1, 1) and "127.0.0.1:9" in told.stopped
    assert scores(tmp_path, name) == pytest.approx({"c0": None, "c1": 1.2})


def test_only_the_images_asked_for_are_judged(tmp_path: Path):
    drawn_run(tmp_path)
    with eyes(brightness) as url:
        judge = judge_at(url)
        told = judge_drawn(tmp_path, judge, only={("student", "c2", 2), ("student", "c4", 4)})
    assert told == (2, 0, "", 0) and sorted(scores(tmp_path, judge.name)) == ["c2", "c4"]


def test_a_picture_that_is_gone_is_unscored(tmp_path: Path):
    drawn_run(tmp_path)
    (tmp_path / "images/student/2.png").unlink()
    with eyes(brightness) as url:
        judge = judge_at(url)
        assert judge_drawn(tmp_path, judge) == (5, 1, "", 0)
    rows = {r.case: r for r in read_rows(tmp_path / "rows.jsonl").rows if r.judge == judge.name}
    assert "its picture is missing" in rows["c2"].status


@pytest.mark.parametrize("status", [500, 429])
def test_what_passes_is_tried_again(tmp_path: Path, status: int):
    drawn_run(tmp_path, 3)

    def look(seen: Seen, number: int) -> None:
        seen.request.raw(status, "{}") if number in (0, 2) else brightness(seen)

    with eyes(look) as url:
        judge = judge_at(url)
        assert judge_drawn(tmp_path, judge) == (3, 0, "", 0)
    assert scores(tmp_path, judge.name) == pytest.approx({f"c{i}": 1 + 0.2 * i for i in range(3)})


def test_a_judge_too_slow_is_asked_again(tmp_path: Path):
    drawn_run(tmp_path, 1)

    def look(seen: Seen, number: int) -> None:
        if number == 0:
            time.sleep(0.5)
        brightness(seen)

    with eyes(look) as url:
        judge = judge_at(url, timeout=0.2)
        assert judge_drawn(tmp_path, judge) == (1, 0, "", 0)


def test_an_outage_stops_soon_keeps_everything_and_goes_on(tmp_path: Path):
    drawn_run(tmp_path)
    count, down = [0], [True]

    def look(seen: Seen, number: int) -> None:
        count[0] += 1
        brightness(seen) if number < 2 or not down[0] else seen.request.raw(503, "{}")

    with eyes(look) as url:
        judge = judge_at(url, parallel=1)
        judge.endpoint.tries = 2
        told = judge_drawn(tmp_path, judge)
        assert (told.scored, told.left) == (2, 4) and "failed 2 times (503" in told.stopped
        assert count[0] == 2 + 3 * 2, "three pictures, then it is left in peace"
        down[0] = False
        assert judge_drawn(tmp_path, judge) == (6, 0, "", 0)
    assert scores(tmp_path, judge.name) == pytest.approx(EXPECTED)


def test_an_endpoint_that_is_not_there_costs_no_row(tmp_path: Path):
    before = drawn_run(tmp_path)
    told = judge_drawn(tmp_path, judge_at("http://127.0.0.1:9/v1"))
    assert (told.scored, told.left) == (0, 6) and "cannot be reached" in told.stopped
    assert list(read_rows(tmp_path / "rows.jsonl").rows) == before


def test_one_picture_that_breaks_the_server_does_not_stop_the_others(tmp_path: Path):
    drawn_run(tmp_path)

    def look(seen: Seen, _number: int) -> None:
        seen.request.raw(500, "{}") if seen.prompt == "prompt 1" else brightness(seen)

    with eyes(look) as url:
        judge = judge_at(url, parallel=1)
        judge.endpoint.tries = 2
        told = judge_drawn(tmp_path, judge)
    assert told == (5, 1, "", 0)
    status = next(r.status for r in read_rows(tmp_path / "rows.jsonl").rows if r.score is None
                  and r.judge == judge.name)  # fmt: skip
    assert status.startswith("unscored: the endpoint failed 2 times (500") and url not in status


def test_a_kill_while_judging_loses_no_score(tmp_path: Path):
    drawn_run(tmp_path)

    class Killed(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise Killed

    prompts: list[str] = []

    def look(seen: Seen, _number: int) -> None:
        prompts.append(seen.prompt)
        brightness(seen)

    with eyes(look) as url:
        judge = judge_at(url, parallel=1)
        with pytest.raises(Killed):
            judge_drawn(tmp_path, judge, on_progress=stop)
        assert len(scores(tmp_path, judge.name)) == 3
        # In flight when it was killed: at most one a worker.
        time.sleep(0.1)
        prompts.clear()
        assert judge_drawn(tmp_path, judge) == (6, 0, "", 0)
    assert prompts == ["prompt 3", "prompt 4", "prompt 5"]
    assert scores(tmp_path, judge.name) == pytest.approx(EXPECTED)


def test_rows_that_waited_are_no_older_scores(tmp_path: Path):
    row = drawn_run(tmp_path, 1)[0]
    with RowWriter(tmp_path / "rows.jsonl") as rows:
        rows.write(row.model_copy(update={"score": 3.0, "status": "ok"}))
    assert read_rows(tmp_path / "rows.jsonl").superseded == 0
    with RowWriter(tmp_path / "rows.jsonl") as rows:
        rows.write(row.model_copy(update={"score": 4.0, "status": "ok"}))
    assert read_rows(tmp_path / "rows.jsonl").superseded == 1


def test_judge_noise_is_the_spread_within_images():
    rng = np.random.default_rng(3)
    base = make_row("c", 3.0)
    rows = [
        base.model_copy(update={"judgements": tuple(m + 0.2 * rng.standard_normal(4))})
        for m in rng.uniform(2, 4, 2000)
    ]
    assert judge_noise(rows) == pytest.approx(0.2, rel=0.03)
    assert judge_noise([base]) is None


def make_row(case: str, score: float) -> Row:
    return Row(
        model="student", nfe=4, task="t2i", category="portrait", case=case, prompt="p", seed=0,
        image="x.png", score=score, status="ok", judge="j",
    )  # fmt: skip


# --- a whole run ----------------------------------------------------------------------------------


def recipe_with(folder: Path, judge: dict[str, Any] | None, **evaluation: Any) -> Path:
    """A recipe that a second distils, with this judge."""
    path = write_recipe(folder / "tiny.yaml", write_teacher(folder / "base.safetensors"))
    recipe = yaml.safe_load(path.read_text())
    recipe["budget"]["updates"] = 2
    recipe["log"]["probe"] = None
    recipe["evaluation"] |= evaluation | ({"judge": judge} if judge else {})
    path.write_text(yaml.safe_dump(recipe))
    return path


def spec_at(url: str, **changes: Any) -> dict[str, Any]:
    return {"kind": "endpoint", "url": url, "model": "eye"} | changes


def test_the_plan_s_count_is_the_number_of_requests_and_an_outage_loses_no_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """distill with the endpoint down; then `judge run`; then eval finds nothing left to do."""
    monkeypatch.setattr("fewstep.endpoint.time.sleep", lambda _seconds: None)
    run, requests, down = tmp_path / "run", [0], [True]

    def answer(request: Handled, _number: int) -> None:
        if down[0]:
            request.raw(503, "{}")
            return
        requests[0] += 1
        seen = Seen(request)
        seen.greet() if seen.greeting else brightness(seen)

    with serving(answer) as url:
        judge = spec_at(url, repeats=2)
        models = ["teacher", "teacher_cut", "student"]
        recipe = recipe_with(tmp_path, judge, per_category=2, models=models)
        with pytest.raises(RunError, match=r"(?s)503.*images are kept.*judge run"):
            distill(recipe, out=run, overrides={})
        drawn = images_of(run)
        rows = read_rows(run / "eval/rows.jsonl").rows
        assert len(drawn) >= 16 and {row.status for row in rows} == {PENDING}
        assert "not judged yet" in (run / "report.html").read_text()

        down[0] = False
        judge_again(run, overrides={})
        plan = json.loads((run / "plan.json").read_text())["judge"]
        assert requests[0] == plan["requests"] and plan["images"] == len(rows) == 16
        evaluate(run)
        assert requests[0] == plan["requests"], "nothing is left, so nobody is greeted"
    assert images_of(run) == drawn, "nothing was drawn again"
    rows = read_rows(run / "eval/rows.jsonl").rows
    for row in rows:
        shown = np.asarray(Image.open(run / "eval" / row.image))
        assert row.score == round(1 + float(shown.mean()) / 100, 2)
        assert row.judgements == (row.score, row.score) and row.judge.startswith("eye-rubric-")
    told = (run / "results.md").read_text()
    assert rows[0].judge in told and "One judgement of an image scatters by 0.00" in told
    summary = json.loads((run / "summary.json").read_text())
    assert summary["judging"]["requests"] == plan["requests"]


def images_of(run: Path) -> dict[str, float]:
    """By path, when it was written."""
    folder = run / "eval/images"
    found = {str(p): p.stat().st_mtime_ns for p in folder.rglob("*.png")}
    return {path: when for path, when in found.items() if "/source/" not in path}


def test_another_judge_judges_the_same_images_and_stays_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = tmp_path / "run"
    with eyes(brightness) as url:
        distill(recipe_with(tmp_path, spec_at(url)), out=run, overrides={})
        drawn = images_of(run)
        with eyes(lambda seen, _: seen.score(2.0)) as other:
            changes = {"evaluation.judge.url": other, "evaluation.judge.model": "strict"}
            judge_again(run, overrides=changes)
        again = (run / "results.md").read_text()
        report(run, judge=judge_at(url).name)
        first = (run / "results.md").read_text()
        assert images_of(run) == drawn
        Image.fromarray(shade(200, 64)).save(next(path for path in drawn if "student-" in path))
        capsys.readouterr()
        judge_again(run, overrides={})
    told = capsys.readouterr().out
    assert "3 requests" in told, "the greeting and the one picture that is another now"
    assert "1 of them had a score here of another prompt, source or image" in told
    assert "2.00" in again and "strict-rubric" in again.split("Left out")[0]
    assert "eye-rubric" in first.split("Left out")[0]
    assert "rows by another judge, strict-rubric" in first
    assert "strict" not in (run / "recipe.yaml").read_text()


class Painter:
    """A world whose pictures are as bright as their prompt is long; it scores all alike."""

    judge_name = "own"
    sample_shape = (1,)
    image_size = 8

    def pool(self, *args: object, **kwargs: object) -> Any:
        raise NotImplementedError

    cases = pool

    def condition(self, prompts: Sequence[str], sources: object) -> list[str]:
        return list(prompts)

    def noise(self, seed: int) -> torch.Tensor:
        return torch.zeros(1)

    def decode(self, latents: torch.Tensor) -> np.ndarray:
        return np.stack([shade(int(level), 8) for level in latents])

    def judge(self, images: np.ndarray, cases: Sequence[Case]) -> list[Verdict]:
        return [Verdict(3.0, {}, ()) for _ in cases]


@dataclass
class Easel:
    """An evaluation in `out` whose player notes the prompts that it draws."""

    out: Path
    drawn: list[str]

    def evaluate(self, cases: Sequence[Case], judged_later: str | None = None) -> list[str]:
        """What was said; `drawn` has what was drawn."""

        def draw(noise: torch.Tensor, cond: Any, task: Task) -> torch.Tensor:
            self.drawn.extend(cond)
            return torch.tensor([len(prompt) for prompt in cond])

        self.drawn.clear()
        players = [Contestant("student-4nfe", {"t2i": 4, "edit": 4}, draw, "stamp")]
        told = forget_changed(players, cases, self.out, judged_later=judged_later)
        painter: Any = Painter()
        run_evaluation(cases, players, painter, self.out, batch=3, judged_later=judged_later)
        return told

    def rows(self) -> list[Row]:
        return list(read_rows(self.out / "rows.jsonl").rows)

    def forget_content(self) -> None:
        """As rows were before it was kept."""
        old = [row.model_dump(exclude={"content"}) for row in self.rows()]
        (self.out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in old))


def portraits(count: int = 4) -> list[Case]:
    return [Case(f"c{i}", "t2i", "portrait", "x" * (10 + i), i, None) for i in range(count)]


def test_an_image_drawn_for_another_prompt_or_deleted_is_drawn_again(tmp_path: Path):
    """Whoever judged it: a row of an earlier judge is enough for an image to be kept."""
    easel, cases = Easel(tmp_path, []), portraits()
    assert easel.evaluate(cases) == [] and len(easel.drawn) == 4
    changed = [cases[0], replace(cases[1], prompt="y" * 50), *cases[2:]]
    (tmp_path / "images/student-4nfe/c3-3.png").unlink()
    (told,) = easel.evaluate(changed, judged_later="eye")
    assert told.startswith("student-4nfe: 2 images are drawn again, because the prompt, the source")
    assert easel.drawn == ["y" * 50, "x" * 13]
    rows = {row.case: row for row in easel.rows() if row.judge == "eye"}
    assert {(case, row.status) for case, row in rows.items()} == {("c1", PENDING), ("c3", PENDING)}
    assert decode_file(tmp_path / rows["c1"].image).mean() == 50


@pytest.mark.parametrize("judged_later", [None, "eye"])
def test_what_is_evaluated_must_be_what_was_judged(tmp_path: Path, judged_later: str | None):
    """Another source, target or category of a case, or another picture in the folder."""
    easel = Easel(tmp_path, [])
    cases = [
        Case(f"e{i}", "edit", "style", "x" * (10 + i), i, None, shade(i, 8), shade(90 + i, 8))
        for i in range(5)
    ]
    easel.evaluate(cases, judged_later)
    assert easel.evaluate(cases, judged_later) == [] and easel.drawn == []
    changed = [
        cases[0],
        replace(cases[1], source=shade(77, 8)),
        replace(cases[2], target=shade(77, 8)),
        replace(cases[3], category="scene"),
        cases[4],
    ]
    Image.fromarray(shade(200, 8)).save(tmp_path / "images/student-4nfe/e4-4.png")
    (told,) = easel.evaluate(changed, judged_later)
    assert "4 images" in told and easel.drawn == ["x" * n for n in (11, 12, 13, 14)]
    assert decode_file(tmp_path / "images/student-4nfe/e4-4.png").mean() == 14
    assert easel.evaluate(changed, judged_later) == [] and easel.drawn == []
    assert len(easel.evaluate(changed[:2], judged_later)) == 0 and len(easel.rows()) == 5


def test_rows_that_do_not_say_what_was_judged_are_judged_again(tmp_path: Path):
    """By the world's own judge, which sees what it draws; an endpoint needs no new drawing."""
    easel = Easel(tmp_path, [])
    easel.evaluate(portraits())
    easel.forget_content()
    assert easel.evaluate(portraits(), "eye") == [] and easel.drawn == []
    (told,) = easel.evaluate(portraits())
    assert "4 images are drawn again" in told and len(easel.drawn) == 4
    assert easel.evaluate(portraits()) == [] and easel.drawn == []


def decode_file(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_a_missing_key_stops_distill_before_a_folder_is_made(tmp_path: Path):
    recipe = recipe_with(tmp_path, spec_at("http://h/v1", key_env="NO_SUCH_KEY"))
    with pytest.raises(RecipeError, match=r"evaluation.judge.key_env.*NO_SUCH_KEY is not set"):
        distill(recipe, out=tmp_path / "run", overrides={})
    assert not (tmp_path / "run").exists()


def test_a_run_without_a_judge_says_how_to_name_one(tmp_path: Path):
    (tmp_path / "eval").mkdir()
    recipe_with(tmp_path, None).rename(tmp_path / "recipe.yaml")
    with pytest.raises(RunError, match="fewstep eval"):
        judge_again(tmp_path, overrides={})
    drawn_run(tmp_path / "eval", 1)
    with pytest.raises(RecipeError, match=r"recipe.yaml: evaluation.judge: is missing"):
        judge_again(tmp_path, overrides={})


@pytest.mark.parametrize(("steps", "players"), [(4, 2 + 2 + 2), (3, 2 + 2 + 1)])
def test_images_are_counted_as_they_are_played(tmp_path: Path, steps: int, players: int):
    """Student and teacher on both tasks, the editor on edits alone, cut twice where K is even."""
    path = recipe_with(
        tmp_path, None, per_category=3, seeds_per_case=2,
        models=["student", "teacher", "teacher_cut:editor"],
    )  # fmt: skip
    recipe = yaml.safe_load(path.read_text())
    recipe["teachers"]["editor"] = recipe["teachers"]["base"] | {
        "tasks": ["edit"], "cfg": {"edit": 2.0},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(recipe))
    assert count_images(load_recipe(path), steps=steps) == 3 * 2 * players


# --- controls -------------------------------------------------------------------------------------


def pictures_and_cases(count: int = 12) -> tuple[list[np.ndarray], list[Case]]:
    """Coloured squares of 8 pixels with a prompt each."""
    rng = np.random.default_rng(7)
    squares = rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    pictures = [one.repeat(8, 0).repeat(8, 1) for one in squares]
    cases = [Case(f"c{i}", "t2i", "text", f'A sign "WORD{i}" {i}', i, None) for i in range(count)]
    return pictures, cases


def test_a_judge_that_knows_the_pictures_has_every_order_right_and_a_blind_one_none():
    pictures, cases = pictures_and_cases()
    known = {case.prompt: picture for case, picture in zip(cases, pictures, strict=True)}

    def knowing(shown: Sequence[np.ndarray], asked: Sequence[Case]) -> list[Verdict]:
        found = []
        for image, case in zip(shown, asked, strict=True):
            truth = known.get(case.prompt, np.zeros_like(image))
            gap = np.abs(image.astype(float) - truth).mean()
            found.append(Verdict(5 - min(float(gap) / 64, 4), {}, ()))
        return found

    controls = spoil(pictures, cases, np.random.default_rng(0))
    names = [control.name for control in controls]
    assert names == [
        "another picture", "misspelt prompt", "blur", "noise 3", "noise 8", "noise 25", "JPEG 10",
    ]  # fmt: skip
    told = check(pictures, cases, controls, knowing)
    assert [one.wins for one in told.standings[1:]] == [12] * 7
    assert told.standings[0].score == 5.0
    all_of_them = pooled([told, told], "")
    assert (all_of_them.pairs, all_of_them.wins) == (168, 168)

    blind = check(pictures, cases, controls, lambda x, _: [Verdict(3.0, {}, ())] * len(x))
    assert pooled([blind], "").wins == 0 and pooled([blind], "").ties == 84
    backwards = check(
        pictures, cases, controls,
        lambda x, c: [Verdict(6 - (v.score or 0), {}, ()) for v in knowing(x, c)],
    )  # fmt: skip
    assert pooled([backwards], "").wins == 0 and pooled([backwards], "").ties == 0


def test_what_a_judge_cannot_score_is_in_no_pair_and_counted():
    pictures, cases = pictures_and_cases(4)
    control = Control("half", (1, 3), [pictures[1], pictures[3]], (cases[1], cases[3]))
    replies = iter([
        [Verdict(4.0, {}, ()), Verdict(4.0, {}, ()), Verdict(4.0, {}, ()), Verdict(2.0, {}, ())],
        [Verdict(None, {}, (), unscored="no"), Verdict(3.0, {}, ())],
    ])  # fmt: skip
    half = check(pictures, cases, [control], lambda *_: next(replies)).standings[1]
    assert (half.pairs, half.wins, half.ties, half.unscored) == (1, 0, 0, 1)


def test_another_picture_is_never_one_of_the_same_prompt():
    pictures, cases = pictures_and_cases(6)
    cases = [replace(case, prompt=f"{i // 2}") for i, case in enumerate(cases)]
    control = spoil(pictures, cases, np.random.default_rng(0))[0]
    assert control.at == tuple(range(6))
    for i, shown in zip(control.at, control.pictures, strict=True):
        (j,) = (j for j, picture in enumerate(pictures) if picture is shown)
        assert cases[j].prompt != cases[i].prompt
    same = [replace(case, prompt="one") for case in cases]
    assert "another picture" not in [
        c.name for c in spoil(pictures, same, np.random.default_rng(0))
    ]


@pytest.mark.parametrize("prompt", ["a cat", 'a sign "A"', 'a sign "AaA!"', 'a sign ""'])
def test_nothing_is_misspelt_where_nothing_can_be(prompt: str):
    assert swap_letters(prompt, np.random.default_rng(0)) is None


def test_a_misspelling_exchanges_two_neighbours_of_the_quotation_alone():
    prompt = "Stop. A sign that says \u201cBAKERY 24\u201d over a door"
    found = {swap_letters(prompt, np.random.default_rng(seed)) for seed in range(40)}
    assert len(found) == 6 and prompt not in found
    for one in found:
        assert one is not None and sorted(one) == sorted(prompt)
        assert one[:24] == prompt[:24] and one.endswith("over a door")
        assert sum(a != b for a, b in zip(one, prompt, strict=True)) == 2


def test_wilson_is_the_published_interval():
    """Ten of ten: 0.7225 to 1; 81 of 263: 0.2553 to 0.3662 (Newcombe 1998, table I)."""
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


def test_the_lab_s_oracle_keeps_every_order_without_a_network(tmp_path: Path):
    out = tmp_path / "oracle.json"
    recipe = recipe_with(tmp_path, None)
    judge_check.check_judge(recipe, overrides={}, per_category=4, seed=1, out=out, dry_run=False)
    told = json.loads(out.read_text())
    assert told["judge"].startswith("lab-oracle-")
    by_name = {
        (group["category"], one["name"]): one for group in told["groups"]
        for one in group["standings"]
    }  # fmt: skip
    assert ("style", "untouched source") in by_name and ("portrait", "another picture") in by_name
    loud = [v for (_, n), v in by_name.items() if n not in ("original", "noise 3")]
    assert len(loud) == 2 * 5 + 1 and all(one["accuracy"] == 1.0 for one in loud)


def test_a_check_by_endpoint_asks_as_often_as_it_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """On true renders and on a run's pictures; the judge sees noise and nothing else."""
    count = [0]

    def answer(request: Handled, _number: int) -> None:
        count[0] += 1
        seen = Seen(request)
        if seen.greeting:
            seen.greet()
            return
        image = seen.images[-1].astype(float)
        if image.shape[0] == 256:
            image = image[::8, ::8]
        seen.score(round(max(1.0, 5 - np.abs(np.diff(image, axis=0)).mean() / 16), 3))

    with serving(answer) as url:
        recipe = recipe_with(tmp_path, spec_at(url))
        out = tmp_path / "told.json"
        ask = {"overrides": {}, "per_category": 3, "seed": 0, "out": out}
        judge_check.check_judge(recipe, **ask, dry_run=True)
        said = re.search(r"([\d,]+) requests", capsys.readouterr().out)
        assert said and count[0] == 0
        judge_check.check_judge(recipe, **ask, dry_run=False)
        assert count[0] == int(said[1])
        portrait = json.loads(out.read_text())["groups"][0]["standings"]
        told = {one["name"]: one["accuracy"] for one in portrait}
        assert told["noise 25"] == 1.0 and told["blur"] == 0.0, "blur has less contrast"

        run = tmp_path / "run"
        distill(recipe, out=run, overrides={"evaluation.per_category": "3"})
        judge_check.check_judge(run, **ask, dry_run=False)
        groups = json.loads(out.read_text())["groups"]
        assert [(g["task"], g["standings"][0]["unscored"]) for g in groups] == [
            ("t2i", 0),
            ("edit", 0),
        ]
        names = {one["name"] for one in groups[1]["standings"]}
        assert "untouched source" in names and "swapped letters" not in names
    with pytest.raises(RecipeError, match="no truth to be judged by"):
        shutil.copy(recipe_with(tmp_path, None), run / "recipe.yaml")
        judge_check.check_judge(run, **ask, dry_run=False)
