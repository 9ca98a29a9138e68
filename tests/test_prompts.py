"""Prompt pools against a local server that answers, fails, repeats itself and breaks off."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer

from fewstep.endpoint import Endpoint, Usage, _seconds, json_in
from fewstep.errors import DataError, RecipeError, RunError
from fewstep.prompts.budget import Budget, tokens
from fewstep.prompts.check import check, overlaps, spread
from fewstep.prompts.classify import (
    BATCH,
    DESCRIPTIONS,
    agreement,
    batches,
    classify_by_model,
    still_open,
)
from fewstep.prompts.cli import app
from fewstep.prompts.near import NearIndex, jaccard, shingles
from fewstep.prompts.pool import Entry, PoolFile, read_entries, read_rows
from fewstep.prompts.rules import BUILTIN, category_by_rule
from fewstep.prompts.spec import load_spec, open_grid, rules_for
from fewstep.prompts.text import fingerprint, language, quotations, words
from fewstep.prompts.write import TRIES, Writer, write

from .endpoint_server import Handled, serving

ROOT = Path(__file__).parent.parent
ASK = [{"role": "user", "content": "hello"}]
SPEC = """
category: landscape
description: wide views of nature
count: 12
templates: ["A view of {place} at {time}.", "{time}, {place}."]
grid:
  place: [a valley, a coast, a lake]
  time: [dawn, dusk]
length: {min: 8, max: 40}
request: {prompts: 3}
"""
INSTRUCTIONS = """
kind: instruction
category: scene
description: the background changes
count: 4
templates: ["Image: {source}. New place: {place}."]
grid: {place: [a beach, a forest]}
sources: {file: captions.jsonl}
length: {min: 3, max: 20}
near_duplicate: 0.8
"""


def client(url: str, **options: Any) -> Endpoint:
    defaults: dict[str, Any] = {"pause": 0.01, "timeout": 5.0}
    return Endpoint(url, "fake", **(defaults | options))


LETTERS = "bcdfghjklmnprstvw"


def fresh(number: int) -> str:
    """A landscape prompt that shares few three-word runs with any other number's."""
    generator = random.Random(number)
    coined = ["".join(generator.choices(LETTERS, k=6)) for _ in range(10)]
    return f"A wide mountain valley with {' '.join(coined)} under the sky"


def spec_at(folder: Path, text: str = SPEC, name: str = "spec.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def run(
    spec: Path, out: Path, url: str, workers: int = 3, budget: Budget | None = None, **more: Any
):
    """`fewstep prompts write` without its command line."""
    loaded = load_spec(spec)
    kept = read_rows(out)
    writer = Writer(loaded, open_grid(loaded, spec), kept, where=out.name, **more)
    pool = PoolFile(out, len(kept))
    try:
        return write(
            writer,
            pool,
            client(url),
            workers=workers,
            budget=budget or Budget(),
            tell=lambda written: None,
        )
    finally:
        pool.close()


def fewstep(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fewstep.cli", "prompts", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "OPENAI_API_KEY"} | environment,
        timeout=60,
    )


# Facts about a text.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A red fox in the snow", "en"),
        ("fox", "en"),
        ("一只红色的狐狸站在雪地里", "zh"),
        ("一个咖啡店的招牌写着“Open every single day of the week”", "zh"),
        ('A sign that says "欢迎光临我们的小店请进" above the door', "en"),
        ("雪の中に立っている赤いキツネ", "other"),
        ("눈 속에 서 있는 붉은 여우", "other"),
        ("Рыжая лиса на снегу", "other"),
        ("Un zorro rojo con una cola larga en la nieve", "other"),
        ("Ein roter Fuchs mit einem langen Schwanz im Schnee", "other"),
        ("Un renard roux dans la neige avec des arbres", "other"),
        ("Uma raposa vermelha sobre a neve em um campo", "other"),
        ("A van parked on grass", "en"),
        ("42", "other"),
    ],
)
def test_language(text: str, expected: str):
    assert language(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('a sign "OPEN" and a "closed" one', ["OPEN", "closed"]),
        ("the title 'ROSIE'S DINER' in red", ["ROSIE'S DINER"]),
        ("a boy's hat and the dogs' bowl", []),
        ("“晚安” 和「早上好」", ["晚安", "早上好"]),
        ("‘It’s late’ in neon", ["It’s late"]),
        ('an empty "" and a "!"', []),
    ],
)
def test_quotations(text: str, expected: list[str]):
    assert quotations(text) == expected


def test_words_are_characters_in_chinese_and_repetition_ignores_case_and_marks():
    assert words("两只猫, don't RUN") == ["两", "只", "猫", "don't", "run"]
    assert fingerprint("A  red Fox!") == fingerprint("a red, fox") != fingerprint("a red foxes")
    assert fingerprint("ＦＯＸ") == fingerprint("fox")


# Near-duplicates, against every pair compared.


def varied(number: int, generator: random.Random) -> list[str]:
    """Texts of which many are others with some words replaced."""
    vocabulary = [f"w{i}" for i in range(300)]
    texts: list[str] = []
    for _ in range(number):
        if texts and generator.random() < 0.5:
            found = generator.choice(texts).split()
            for _ in range(generator.randrange(1, 5)):
                found[generator.randrange(len(found))] = generator.choice(vocabulary)
            texts.append(" ".join(found))
        else:
            texts.append(" ".join(generator.choices(vocabulary, k=generator.randrange(12, 40))))
    return texts


def test_near_duplicates_are_those_of_brute_force():
    texts = varied(400, random.Random(3))
    runs = [{tuple(t.split()[i : i + 3]) for i in range(len(t.split()) - 2)} for t in texts]
    index, found, expected = NearIndex(0.6), set(), set()
    for i, text in enumerate(texts):
        if index.add(str(i), text):
            found.add(i)
        if any(len(runs[i] & runs[j]) >= 0.6 * len(runs[i] | runs[j]) for j in range(i)):
            expected.add(i)
    assert 60 < len(expected) < 340
    assert found == expected


def test_the_nearest_is_named_with_its_jaccard_index():
    index = NearIndex(0.5)
    index.add("far", "one two three four five six x y z")
    index.add("near", "one two three four five six seven eight z")
    match = index.find("one two three four five six seven eight nine")
    assert match is not None
    assert (match.name, match.jaccard) == ("near", pytest.approx(6 / 8))
    assert jaccard(shingles("a b c d"), shingles("b c d e")) == pytest.approx(1 / 3)
    assert index.find("one two three four five six seven eight nine", scope="elsewhere") is None


def test_a_near_duplicate_is_found_in_buckets_that_others_opened():
    """Each band of the last one is that of some earlier one, which is no near-duplicate of it."""
    said, index = [f"w{i}" for i in range(30)], NearIndex(0.95)
    for i in range(30):
        assert index.add(str(i), " ".join([*said[:i], "other", *said[i + 1 :]])) is None
    assert index.add("whole", " ".join(said)) is None
    assert index.find(" ".join([*said, "again"])) == ("whole", pytest.approx(28 / 29))


def test_twenty_thousand_short_prompts_take_less_than_twenty_seconds():
    """Processor time: this machine may be busy."""
    index = NearIndex(0.6)
    texts = [fresh(number) for number in range(1000)]
    begun = time.process_time()
    for number, text in enumerate(texts):
        index.add(str(number), text)
    assert (time.process_time() - begun) * 20 < 20


# Categories by rule, on sentences written for this test.

HAND = {
    "landscape": (
        "Morning mist lifts from a long alpine lake, with pines on the far shore.",
        "Sand dunes run to the horizon below a violet evening sky.",
        "A fishing village clings to the cliffs, seen from the sea at dawn.",
        "Rolling green hills with a single oak tree under fast clouds.",
        "Waves break over black rocks on a stormy coast.",
        "清晨的雪山倒映在平静的湖泊中，天空泛着粉色。",
        "夕阳下的草原，远处是连绵的山脉。",
    ),
    "portrait": (
        "A studio portrait of a retired sailor with a white beard and a blue cap.",
        "A young woman with braided hair smiles at someone outside the frame.",
        "Close-up of a man's weathered face, deep wrinkles and grey eyes.",
        "Two girls in yellow raincoats laugh, faces close together.",
        "Half-length painting of a king in an ermine cloak with a stern expression.",
        "一位白发老人的肖像，眼神温和，面带微笑。",
        "身穿红裙的少女站在窗边，黑色长发。",
    ),
    "text": (
        'A bakery window with the words "FRESH BREAD" painted in gold.',
        "A concert poster with bold lettering and the headline Summer Nights.",
        'A mountain trail sign that reads "Summit 2 km" beside a lake.',
        "A birthday cake with the text Happy 40th in pink icing.",
        'A man holds a cardboard sign saying "WILL CODE FOR TEA".',
        "咖啡馆门口的黑板上写着“今日特价”。",
        "一张电影海报，标题是“远方”，字体粗大。",
    ),
    "other": (
        "A bowl of ramen on a marble counter.",
        "A robot assembling a bicycle in a workshop.",
        "A blue vase next to three lemons.",
        "A steam engine, cut open to show its boiler.",
    ),
}
EDITS = {
    "scene": ("Change the background to a beach.", "Make it winter.", "把背景换成夜晚的城市"),
    "enhance": ("Remove the noise and sharpen it.", "Brighten the picture.", "去雾，让画面更清晰"),
    "object": ("Add a red kite.", "Replace the cup by a glass.", "移除左边的椅子"),
    "text_edit": (
        'Replace "SALE" by "SOLD OUT".',
        "Correct the typo on the label.",
        "把招牌上的文字改成“晚安”",
    ),
    "identity": ("Give her a shorter haircut.", "Let the man smile.", "让这个女子微笑，换个发型"),
    "style": ("Turn it into a watercolour.", "Make it an anime drawing.", "改成油画风格"),
}


@pytest.mark.parametrize("category", HAND)
def test_prompts_by_rule(category: str):
    found = [category_by_rule(text, BUILTIN["prompt"]) for text in HAND[category]]
    assert found == [category] * len(found)


@pytest.mark.parametrize("category", EDITS)
def test_instructions_by_rule(category: str):
    found = [category_by_rule(text, BUILTIN["instruction"]) for text in EDITS[category]]
    assert found == [category] * len(found)


def test_what_a_prompt_begins_with_counts_twice():
    valley = "A mountain valley at dawn, painted in many thin layers of colour,"
    people = "a woman, a man, a girl, a boy and a child"
    assert category_by_rule(f"{valley} where {people} rest", BUILTIN["prompt"]) == "landscape"
    assert category_by_rule(f"{people} rest; {valley}", BUILTIN["prompt"]) == "portrait"


def test_a_word_in_passing_makes_no_category():
    still = "Three lemons, a knife and a loaf of bread on a linen cloth beside a blue jug"
    assert category_by_rule(f"{still} with a cloud", BUILTIN["prompt"]) == "other"
    assert category_by_rule(f"{still} with a cloud and a hill", BUILTIN["prompt"]) == "landscape"


# The grid.


@pytest.mark.parametrize("name", ["landscape", "portrait", "text"])
def test_bundled_specs_cover_each_cell_once_and_keep_values_level(name: str):
    path = ROOT / "recipes" / "prompts" / f"{name}.yaml"
    spec = load_spec(path)
    grid = open_grid(spec, path)
    cells = [grid.cell(number).attributes for number in range(grid.cells)]
    assert len({tuple(sorted(cell.items())) for cell in cells}) == grid.cells
    quotas = grid.quotas(20_000)
    assert sum(quotas.values()) == 20_000
    assert max(quotas.values()) - min(quotas.values()) <= 1
    for part in (200, 3000):
        for axis, values in spec.grid.items():
            used = Counter(cell[axis] for cell in cells[:part])
            share = part / len(values)
            assert all(abs(used[value] - share) <= 0.2 * share + 1 for value in values), axis


def test_the_order_of_the_grid_is_the_seeds(tmp_path: Path):
    def order(text: str) -> list[dict[str, str]]:
        path = spec_at(tmp_path, text)
        grid = open_grid(load_spec(path), path)
        return [grid.cell(number).attributes for number in range(6)]

    assert order(SPEC) == order(SPEC)
    assert order(SPEC) != order(SPEC + "seed: 5\n")
    swapped = SPEC.replace(
        "  place: [a valley, a coast, a lake]\n  time: [dawn, dusk]",
        "  time: [dawn, dusk]\n  place: [a valley, a coast, a lake]",
    )
    assert order(swapped) == order(SPEC)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("{place} at", "{plaec} at", "templates: {plaec} is no attribute of the grid; did you"),
        ("  time: [dawn", "  hue: [red]\n  time: [dawn", "grid.hue: no template uses it"),
        ("[dawn, dusk]", "[dawn, dawn]", "grid.time: a value is given twice"),
        ("{min: 8, max: 40}", "{min: 50, max: 40}", "length: min 50 > max 40"),
        ("category: landscape", "category: birds", "there is no built-in rule for 'birds'"),
        ("count: 12", "kind: instruction", "sources: is missing"),
        ("count: 12", "language: other", "rule: the built-in rules know English and Chinese"),
        ("count: 12", "cuont: 12", "cuont: unknown key; did you mean 'count'?"),
    ],
)
def test_specs_that_cannot_work_are_refused(tmp_path: Path, old: str, new: str, expected: str):
    assert old in SPEC
    with pytest.raises(RecipeError, match=re.escape(expected)):
        load_spec(spec_at(tmp_path, SPEC.replace(old, new)))


def test_a_source_of_the_captions_is_a_part_of_the_grid(tmp_path: Path):
    """Rows name cells by number, so a pool must not go on when the numbers mean something else."""
    captions = tmp_path / "captions.txt"

    def stamp(text: str, listed: str = "a dog\na cup\n") -> str:
        captions.write_text(listed)
        path = spec_at(tmp_path, text)
        return open_grid(load_spec(path), path).stamp

    edits = INSTRUCTIONS.replace("captions.jsonl", "captions.txt")
    assert stamp(edits) == stamp(edits.replace("count: 4", "count: 9")) != stamp(SPEC)
    assert stamp(edits) != stamp(edits, "a dog\na car\n")
    assert stamp(SPEC) != stamp(SPEC.replace("count: 12", "language: zh"))
    assert stamp(SPEC) != stamp(SPEC.replace("category: landscape", "category: portrait"))


def test_an_own_rule_takes_the_place_of_the_built_in_one(tmp_path: Path):
    spec = load_spec(spec_at(tmp_path, SPEC + "rule: {strong: [hawk]}\n"))
    rules = rules_for("prompt", [spec])
    assert category_by_rule("a hawk above its nest", rules) == "landscape"
    assert category_by_rule("a mountain valley", rules) == "other"


# Writing.


def offering(number_of_prompts: int = 3) -> Callable[[Handled, int], None]:
    """A server that always has something new to say."""

    def answer(request: Handled, number: int) -> None:
        request.prompts([fresh(100 * number + i) for i in range(number_of_prompts)])

    return answer


def test_quotas_are_exact_and_rows_say_where_they_come_from(tmp_path: Path):
    out = tmp_path / "pool.jsonl"
    with serving(offering(5)) as url:  # more than was asked for
        outcome = run(spec_at(tmp_path), out, url)
    rows = read_rows(out)
    assert (outcome.written, outcome.missing, outcome.refused) == (12, 0, Counter())
    assert set(Counter(row["cell"] for row in rows).values()) == {2}
    assert Counter(row["attributes"]["place"] for row in rows) == {
        "a valley": 4, "a coast": 4, "a lake": 4,
    }  # fmt: skip
    assert all(row["hash"] == fingerprint(row["prompt"]) for row in rows)
    assert {(row["category"], row["language"], row["model"]) for row in rows} == {
        ("landscape", "en", "fake")
    }
    assert outcome.usage == Usage(6, 600, 300, 0)


def test_every_request_asks_for_its_own_cell(tmp_path: Path):
    asked: list[str] = []

    def answer(request: Handled, number: int) -> None:
        asked.append(request.asked)
        assert request.path == "/v1/chat/completions"
        assert (request.body["model"], request.body["temperature"]) == ("fake", 0.9)
        assert "wide views of nature" in request.body["messages"][0]["content"]
        offering()(request, number)

    out = tmp_path / "pool.jsonl"
    with serving(answer) as url:
        run(spec_at(tmp_path), out, url)
    wanted = Counter(
        (row["attributes"]["place"], row["attributes"]["time"]) for row in read_rows(out)
    )
    assert len(wanted) == len(asked) == 6
    for place, moment in wanted:
        assert sum(place in text and moment in text for text in asked) == 1
    assert all("2 clearly different prompts in English, each of 8 to 40 words" in t for t in asked)


REFUSED = {
    "too short": "A mountain lake",
    "too long": "mountain " * 41,
    "another language": "一片宁静的湖泊倒映着远处的雪山和森林",
    "another category": "A bowl of ramen with two eggs stands on the kitchen counter",
    "not a text": 7,
    "duplicate": fresh(0).upper() + "!",
    "near-duplicate": fresh(0).replace("wide", "broad"),
    "overlaps --against": fresh(999),
}


def test_every_refusal_has_its_reason_and_the_cell_is_asked_again(tmp_path: Path):
    def answer(request: Handled, number: int) -> None:
        bad = list(REFUSED.values()) if number == 1 else []
        request.prompts([*bad, fresh(2 * number), fresh(2 * number + 1)])

    out = tmp_path / "pool.jsonl"
    with serving(answer) as url:
        outcome = run(spec_at(tmp_path), out, url, workers=1, against=[fresh(999)])
    assert outcome.refused == Counter(REFUSED.keys())
    assert (outcome.written, outcome.missing) == (12, 0)
    assert not {row["prompt"] for row in read_rows(out)} & {str(t) for t in REFUSED.values()}


def test_quotations_of_a_text_centric_prompt_are_checked(tmp_path: Path):
    text = SPEC.replace("landscape", "text") + "quotes: {number: {min: 1, max: 2}}\n"
    path = spec_at(tmp_path, text)
    spec = load_spec(path)
    grid = open_grid(spec, path)
    writer, cell = Writer(spec, grid), grid.cell(0)
    frame = "A wooden sign by the old road that reads {} in white paint"
    assert writer.objection(frame.format('"Open"'), cell) == ""
    assert writer.objection(frame.format("Open"), cell) == "number of quotations"
    assert writer.objection(frame.format('"a" "b" "c"'), cell) == "number of quotations"
    long = '"' + "word " * 13 + '"'
    assert writer.objection(frame.format(long), cell) == "length of a quotation"
    assert "quotes 1 to 2 texts" in writer.messages(writer.jobs()[0])[1]["content"]


@pytest.mark.parametrize(
    "text",
    [
        '<think>maybe {"prompts": ["no"]}</think>{"prompts": ["a", "b"]}',
        'Sure!\n```json\n{"prompts": ["a", "b"]}\n```',
        '{oops} ["a", "b"] and more',
    ],
)
def test_a_reply_is_found_behind_thoughts_fences_and_talk(text: str):
    found = json_in(text)
    assert (found["prompts"] if isinstance(found, dict) else found) == ["a", "b"]


def test_malformed_and_cut_replies_are_counted_and_cured(tmp_path: Path):
    def answer(request: Handled, number: int) -> None:
        if number == 0:
            request.reply('{"prompts": ["A wide mountain valley under')
        elif number == 1:
            request.reply(json.dumps({"prompts": [fresh(1)]}), finish="length")
        else:
            offering()(request, number)

    out = tmp_path / "pool.jsonl"
    with serving(answer) as url:
        outcome = run(spec_at(tmp_path), out, url, workers=1)
    assert outcome.refused == {"no list of prompts in the reply": 2, "cut off at max_tokens": 2}
    assert (outcome.written, outcome.usage.requests) == (12, 8)


def test_a_cell_that_brings_nothing_is_given_up(tmp_path: Path):
    def answer(request: Handled, number: int) -> None:
        if "a lake" in request.asked and "dusk" in request.asked:
            request.prompts(["I cannot help with that request, I am sorry to say."])
        else:
            offering()(request, number)

    out = tmp_path / "pool.jsonl"
    with serving(answer) as url:
        outcome = run(spec_at(tmp_path), out, url)
    assert (outcome.written, outcome.missing) == (10, 2)
    assert outcome.refused == {"another category": TRIES}


def test_prompts_of_the_cell_are_shown_to_the_model(tmp_path: Path):
    asked: list[str] = []

    def answer(request: Handled, number: int) -> None:
        asked.append(request.asked)
        request.prompts([fresh(number)])

    text = SPEC.replace("[a valley, a coast, a lake]", "[a lake]").replace("[dawn, dusk]", "[dusk]")
    with serving(answer) as url:
        run(spec_at(tmp_path, text.replace("count: 12", "count: 3")), tmp_path / "p.jsonl", url)
    assert len(asked) == 3
    assert "do not repeat" not in asked[0]
    assert fresh(0) in asked[1]
    assert fresh(0) in asked[2] and fresh(1) in asked[2]


def test_instructions_are_written_per_source_and_may_recur_for_another(tmp_path: Path):
    captions = tmp_path / "captions.jsonl"
    lines = [{"file": f"{i}.png", "caption": f"a {what}"} for i, what in enumerate(("dog", "cup"))]
    captions.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    spec = spec_at(tmp_path, INSTRUCTIONS)

    def answer(request: Handled, number: int) -> None:
        place = "beach" if "a beach" in request.asked else "forest"
        request.prompts([f"Change the background to a {place}."])

    out = tmp_path / "edits.jsonl"
    with serving(answer) as url:
        outcome = run(spec, out, url)
    rows = read_rows(out)
    assert outcome.written == 4
    assert {(row["source"], row["source_caption"], row["attributes"]["place"]) for row in rows} == {
        (f"{i}.png", f"a {what}", place)
        for i, what in enumerate(("dog", "cup"))
        for place in ("a beach", "a forest")
    }
    assert all(row["instruction"] == row["prompt"] for row in rows)


def test_an_instruction_is_not_repeated_for_the_same_source(tmp_path: Path):
    (tmp_path / "captions.jsonl").write_text('{"caption": "a dog"}\n{"caption": "a cup"}\n')
    path = spec_at(tmp_path, INSTRUCTIONS)
    spec = load_spec(path)
    grid = open_grid(spec, path)
    cells = [grid.cell(number) for number in range(grid.cells)]
    first = cells[0]
    (same,) = [c for c in cells[1:] if c.source == first.source]
    (other, *_) = [c for c in cells if c.source != first.source]
    long = "Change the background of it to a wide and empty beach at night"
    rows = [{"grid": grid.stamp, "cell": first.number, "prompt": long}]
    writer = Writer(spec, grid, rows)
    assert writer.objection(long.upper(), same) == "duplicate"
    assert writer.objection(f"{long} please", same) == "near-duplicate"
    assert writer.objection(long, other) == writer.objection(f"{long} please", other) == ""


def test_a_request_carries_the_fields_of_the_spec(tmp_path: Path):
    bodies: list[dict[str, Any]] = []

    def answer(request: Handled, number: int) -> None:
        bodies.append(request.body)
        offering()(request, number)

    extra = "request: {prompts: 3, temperature: 0.25, max_tokens: 77, extra: {top_k: 5}}"
    with serving(answer) as url:
        run(
            spec_at(tmp_path, SPEC.replace("request: {prompts: 3}", extra)),
            tmp_path / "pool.jsonl",
            url,
        )
    for body in bodies:
        assert (body["temperature"], body["max_tokens"], body["top_k"]) == (0.25, 77, 5)


ONE_CELL = SPEC.replace("[a valley, a coast, a lake]", "[a lake]").replace("[dawn, dusk]", "[dusk]")


def test_a_slow_cell_is_asked_for_what_it_lacks_and_shown_its_latest(tmp_path: Path):
    """More requests than TRIES, of which every second one brings a prompt."""
    asked: list[str] = []

    def answer(request: Handled, number: int) -> None:
        asked.append(request.asked)
        request.prompts([fresh(number)] if number % 2 else [])

    with serving(answer) as url:
        outcome = run(
            spec_at(tmp_path, ONE_CELL.replace("count: 12", "count: 8")),
            tmp_path / "p.jsonl",
            url,
            workers=1,
        )
    assert (outcome.written, outcome.missing, len(asked)) == (8, 0, 16)
    assert len(asked) > 2 * TRIES
    wanted = [re.findall(r"Write (\d+) ", text)[0] for text in asked[::2]]
    assert wanted == ["3"] * 6 + ["2", "1"]
    shown = re.findall(r"^- (.*)$", asked[-1], re.MULTILINE)
    assert shown == [fresh(number) for number in (5, 7, 9, 11, 13)]


# Resuming.


def test_a_stopped_pool_goes_on_where_it_was(tmp_path: Path):
    whole, parts, spec = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl", spec_at(tmp_path)
    with serving(offering()) as url:
        run(spec, whole, url, workers=1)
    lines = whole.read_bytes().splitlines(keepends=True)
    parts.write_bytes(b"".join(lines[:5]) + lines[5][:-20])
    with serving(lambda request, number: offering()(request, 50 + number)) as url:
        outcome = run(spec, parts, url, workers=1)
        again = run(spec, parts, url, workers=1)
    rows = read_rows(parts)
    assert parts.read_bytes().startswith(b"".join(lines[:5]))
    assert (outcome.written, again.written, again.usage.requests) == (7, 0, 0)
    # The same cells in the same order as without the stop: the quotas of the grid.
    assert [row["cell"] for row in rows] == [row["cell"] for row in read_rows(whole)]


def test_a_larger_count_goes_on_and_another_grid_is_refused(tmp_path: Path):
    out = tmp_path / "pool.jsonl"
    with serving(
        lambda request, number: offering()(request, number + 7 * out.stat().st_size)
    ) as url:
        run(spec_at(tmp_path), out, url)
        run(spec_at(tmp_path, SPEC.replace("count: 12", "count: 20")), out, url)
        assert sorted(Counter(row["cell"] for row in read_rows(out)).values()) == [3, 3, 3, 3, 4, 4]
        with pytest.raises(RunError, match=r"pool.jsonl:1: not written from this grid"):
            run(spec_at(tmp_path, SPEC.replace("a lake", "a bay")), out, url)
        before = out.read_bytes()
        fewer = run(spec_at(tmp_path, SPEC.replace("count: 12", "count: 7")), out, url)
        assert (fewer.written, fewer.missing, out.read_bytes()) == (0, 0, before)


def test_rows_written_before_are_not_repeated_by_later_ones(tmp_path: Path):
    out, spec = tmp_path / "pool.jsonl", spec_at(tmp_path)
    with serving(lambda request, number: request.prompts([fresh(number)])) as url:
        run(spec, out, url, workers=1)
    out.write_bytes(b"".join(out.read_bytes().splitlines(keepends=True)[:6]))
    with serving(lambda request, number: request.prompts([fresh(number)])) as url:
        outcome = run(spec, out, url, workers=1)
    assert outcome.refused["duplicate"] == 6
    assert len({row["hash"] for row in read_rows(out)}) == 12


@pytest.mark.slow
def test_kill_loses_only_requests_in_flight(tmp_path: Path):
    """SIGKILL of the command in the middle; what had been answered before is in the file."""
    answered: list[int] = []

    def answer(request: Handled, number: int) -> None:
        time.sleep(0.05)
        request.prompts([fresh(number)])
        answered.append(number)

    out, spec = tmp_path / "pool.jsonl", spec_at(tmp_path, SPEC.replace("count: 12", "count: 200"))
    command = [sys.executable, "-m", "fewstep.cli", "prompts", "write", str(spec), "-o", str(out)]
    with serving(answer) as url:
        for stop in (signal.SIGKILL, signal.SIGINT):
            before = len(answered)
            process = subprocess.Popen(
                [*command, "--endpoint", url, "--model", "fake", "--workers", "2"],
                cwd=ROOT, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            while len(answered) < before + 20:
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(stop)
            _, said = process.communicate(timeout=20)
            kept = len(read_rows(out))
            assert len(answered) - 4 - 2 * (stop == signal.SIGINT) <= kept <= len(answered)
        assert process.returncode == 130
        assert "the same command goes on" in said


def write_command(spec: Path, out: Path, url: str) -> subprocess.Popen[str]:
    command = ["prompts", "write", str(spec), "-o", str(out), "--endpoint", url, "--model", "fake"]
    return subprocess.Popen(
        [sys.executable, "-m", "fewstep.cli", *command, "--workers", "1"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_one_command_at_a_time_writes_a_pool(tmp_path: Path):
    """The second is refused while the first waits for an answer, and the pool is the first's."""
    asked, may_answer = threading.Event(), threading.Event()

    def answer(request: Handled, number: int) -> None:
        asked.set()
        may_answer.wait(30)
        request.prompts([fresh(number)])

    out, spec = tmp_path / "pool.jsonl", spec_at(tmp_path)
    with serving(answer) as url:
        first = write_command(spec, out, url)
        assert asked.wait(30)
        second = write_command(spec, out, url)
        _, said = second.communicate(timeout=30)
        may_answer.set()
        first.communicate(timeout=30)
    assert second.returncode == RunError.exit_code
    assert f"{out}: another command is writing it" in said
    assert first.returncode == 0
    assert len({row["hash"] for row in read_rows(out)}) == len(read_rows(out)) == 12


def test_a_row_is_whole_however_little_the_system_takes_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As on a full disk or after a signal, `os.write` may take a part of what it is given."""
    rows = [{"prompt": f"number {i}", "hash": str(i)} for i in range(3)]
    pool, write = PoolFile(tmp_path / "pool.jsonl", 0), os.write
    with monkeypatch.context() as little:
        little.setattr("fewstep.prompts.pool.os.write", lambda file, line: write(file, line[:7]))
        for row in rows:
            pool.append(row)
    pool.close()
    lines = (tmp_path / "pool.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows


def test_a_pool_that_grew_since_it_was_read_is_refused(tmp_path: Path):
    """What was read decides what is asked for: here another command has come and gone since."""
    out, spec = tmp_path / "pool.jsonl", spec_at(tmp_path)
    before = len(read_rows(out))
    with serving(lambda request, number: request.prompts([fresh(number)])) as url:
        run(spec, out, url)
    content = out.read_bytes()
    with pytest.raises(RunError, match="another command has written to it"):
        PoolFile(out, before)
    assert out.read_bytes() == content
    PoolFile(out, 12).close()


# The endpoint at its worst.


def test_what_passes_is_tried_again(tmp_path: Path):
    """Rate limits, server errors, dropped and cut connections, no JSON, no answer in time."""
    seen: list[int] = []

    def answer(request: Handled, number: int) -> None:
        seen.append(number)
        if number == 1:
            request.raw(429, '{"error": {"message": "slow down"}}', Retry_After="0.2")
        elif number == 2:
            request.raw(500, "oops")
        elif number == 3:
            request.handler.connection.close()
        elif number == 4:
            request.handler.send_response(200)
            request.handler.send_header("Content-Length", "1000")
            request.handler.end_headers()
            request.handler.wfile.write(b'{"choices": [')
            request.handler.connection.close()
        elif number == 5:
            request.raw(200, "<html>please log in</html>")
        elif number == 6:
            time.sleep(1.0)
        else:
            request.reply("fine")

    with serving(answer) as url:
        endpoint = client(url, timeout=0.4, tries=7)
        assert endpoint.ask(ASK).text == "fine"
        begun = time.monotonic()
        assert endpoint.ask(ASK).text == "fine"
    assert seen == list(range(8))
    assert time.monotonic() - begun > 0.2 + 0.4


def test_the_pause_grows_and_retry_after_is_kept():
    moments: list[float] = []

    def answer(request: Handled, number: int) -> None:
        moments.append(time.monotonic())
        if number < 4:
            request.raw(503, "", **({"Retry_After": "0.5"} if number == 0 else {}))
        else:
            request.reply("fine")

    with serving(answer) as url:
        client(url, pause=0.1).ask(ASK)
    gaps = [later - earlier for earlier, later in pairwise(moments)]
    assert gaps[0] >= 0.5
    assert gaps[1] >= 0.1 and gaps[2] >= 0.2 and gaps[3] >= 0.4  # half of 0.1 * 2^k at least


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 504, 529])
def test_statuses_that_another_try_may_cure(status: int):
    def answer(request: Handled, number: int) -> None:
        request.raw(status, "") if number == 0 else request.reply("fine")

    with serving(answer) as url:
        assert client(url, tries=2).ask(ASK).text == "fine"


def test_the_pause_doubles_up_to_a_minute(monkeypatch: pytest.MonkeyPatch):
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    with (
        serving(lambda request, number: request.raw(503, "")) as url,
        pytest.raises(RunError, match="failed 7 times"),
    ):
        client(url, pause=8.0, tries=7).ask(ASK)
    most = [8, 16, 32, 60, 60, 60]
    assert all(longest / 2 <= p <= longest for p, longest in zip(pauses, most, strict=True))


def test_an_answer_that_does_not_come_in_time_is_not_waited_for():
    def answer(request: Handled, number: int) -> None:
        time.sleep(0.6)
        request.reply("late")

    with (
        serving(answer) as url,
        pytest.raises(RunError, match=r"failed 1 times \(no answer within 0.1 s\)"),
    ):
        client(url, timeout=0.1, tries=1).ask(ASK)


def test_a_server_that_stops_is_no_wrong_address():
    """It may come back, and what was written is kept; an address that never answered is wrong."""
    with serving(lambda request, number: request.reply("fine")) as url:
        endpoint = client(url, tries=2)
        endpoint.ask(ASK)
    with pytest.raises(RunError, match="failed 2 times"):
        endpoint.ask(ASK)
    with pytest.raises(RecipeError, match="cannot be reached"):
        client(url, tries=2).ask(ASK)


def test_replies_without_counts_are_told_from_free_ones():
    with serving(lambda request, number: request.reply("fine", usage=None)) as url:
        assert client(url).ask(ASK).usage == Usage(1, 0, 0, unreported=1)


@pytest.mark.parametrize("key", ["sk-1\n", " sk-1", "sk-\u00e9"])
def test_keys_that_cannot_be_are_refused_unseen(key: str):
    with pytest.raises(RecipeError, match="MY_KEY: holds blanks") as caught:
        Endpoint("http://h/v1", "fake", key=key, key_name="MY_KEY")
    assert "sk-" not in str(caught.value)


def test_retry_after_is_seconds_or_a_date():
    from email.utils import formatdate

    assert _seconds("7") == 7.0
    assert _seconds(formatdate(time.time() + 100, usegmt=True)) == pytest.approx(100, abs=2)
    assert _seconds(None) == _seconds("soon") == _seconds("-3") == 0.0


@pytest.mark.parametrize(
    ("status", "headers", "error", "expected"),
    [
        (401, {}, RecipeError, "MY_KEY: was refused (401 Unauthorized: bad key ***)"),
        (404, {}, RecipeError, "no model 'fake'"),
        (400, {}, RecipeError, "the first request was refused (400 Bad Request: bad key ***)"),
        (503, {}, RunError, "failed 3 times (503 Service Unavailable: bad key ***)"),
        (429, {"Retry_After": "3600"}, RunError, "asks for a pause of 3600 s"),
        (302, {"Location": "http://evil.example/v1?k=1"}, RecipeError, "http://evil.example/v1;"),
    ],
)
def test_what_does_not_pass_is_told(
    status: int, headers: dict[str, str], error: Any, expected: str
):
    def answer(request: Handled, number: int) -> None:
        assert request.headers["Authorization"] == "Bearer sk-secret"
        request.raw(status, '{"error": {"message": "bad key sk-secret"}}', **headers)

    with serving(answer) as url, pytest.raises(error, match=re.escape(expected)) as caught:
        client(url, key="sk-secret", key_name="MY_KEY", tries=3).ask(ASK)
    assert "sk-secret" not in str(caught.value)


def test_a_single_refused_request_does_not_stop_the_others(tmp_path: Path):
    def answer(request: Handled, number: int) -> None:
        if number in (1, 2):
            request.raw(400, '{"error": {"message": "content policy"}}')
        else:
            offering()(request, number)

    with serving(answer) as url:
        outcome = run(spec_at(tmp_path), tmp_path / "pool.jsonl", url, workers=1)
    assert (outcome.written, outcome.refused) == (12, {"refused (400)": 4})
    assert outcome.usage == Usage(8, 600, 300, unreported=2)


def test_an_error_in_the_middle_keeps_what_was_written(tmp_path: Path):
    def answer(request: Handled, number: int) -> None:
        if number < 3:
            offering()(request, number)
        else:
            request.raw(401, "")

    out = tmp_path / "pool.jsonl"
    with serving(answer) as url, pytest.raises(RecipeError, match="is not set"):
        run(spec_at(tmp_path), out, url, workers=1)
    assert len(read_rows(out)) == 6


@pytest.mark.parametrize(
    "url", ["localhost:8000/v1", "ftp://host/v1", "http://me:secret@host/v1", "http://h/v1?key=1"]
)
def test_addresses_that_cannot_be_are_refused(url: str):
    with pytest.raises(RecipeError, match="--endpoint"):
        Endpoint(url, "fake")


def test_workers_ask_at_the_same_time_and_no_more_than_allowed(tmp_path: Path):
    lock, flying, most = threading.Lock(), [0], [0]

    def answer(request: Handled, number: int) -> None:
        with lock:
            flying[0] += 1
            most[0] = max(most[0], flying[0])
        time.sleep(0.1)
        with lock:
            flying[0] -= 1
        offering()(request, number)

    with serving(answer) as url:
        run(spec_at(tmp_path), tmp_path / "pool.jsonl", url, workers=3)
    assert most[0] == 3


# Costs.


def test_the_estimate_counts_requests_and_what_is_left_to_write(tmp_path: Path):
    path = spec_at(tmp_path, SPEC.replace("count: 12", "count: 24"))  # 4 a cell, 3 a request
    spec = load_spec(path)
    grid = open_grid(spec, path)
    empty = Writer(spec, grid)
    assert empty.estimate().requests == 12
    sent = sum(tokens(m["content"]) + 4 for m in empty.messages(empty.jobs()[0]))
    assert empty.estimate().tokens_in == pytest.approx(12 * sent, rel=0.1)
    assert empty.estimate().tokens_out == pytest.approx(24 * (24 * 1.35 + 6) + 12 * 6, abs=1)
    rows = [{"grid": grid.stamp, "cell": 0, "prompt": fresh(i)} for i in range(4)]
    assert Writer(spec, grid, rows).estimate().requests == 10
    assert tokens("两只猫 run fast") == pytest.approx(3 + 2 * 1.35)
    chinese = spec.model_copy(update={"language": "zh"})
    assert Writer(chinese, grid).estimate().tokens_out == pytest.approx(24 * (24 + 6) + 12 * 6)


def test_budget():
    budget = Budget(price_in=2.0, price_out=10.0, most=1.0)
    assert budget.cost(Usage(1, 250_000, 40_000)) == pytest.approx(0.5 + 0.4)
    budget.check(Usage(1, 250_000, 50_000))
    with pytest.raises(RecipeError, match=r"the estimate is 1.01, more than 1.00"):
        budget.check(Usage(1, 250_000, 51_000))
    with pytest.raises(RecipeError, match="--max-cost: needs --price-in"):
        Budget(most=1.0).check(Usage())
    with pytest.raises(RecipeError, match="together"):
        Budget(price_in=1.0).check(Usage())


def test_measured_cost_beyond_the_allowance_stops_and_keeps(tmp_path: Path):
    out = tmp_path / "pool.jsonl"
    allowance = Budget(price_in=1e4, price_out=0.0, most=2.5)  # each reply costs 1
    with serving(offering()) as url, pytest.raises(RunError, match=r"measured cost 3.00 is beyond"):
        run(spec_at(tmp_path), out, url, workers=1, budget=allowance)
    assert len(read_rows(out)) == 6


# Checking and classifying.


def entries(*texts: str) -> list[Entry]:
    return [Entry(number, text, {}) for number, text in enumerate(texts, start=1)]


def test_check_counts_what_is_there():
    near = fresh(1).replace("wide", "broad")
    found = check(
        entries(fresh(1), near, fresh(1).upper(), 'A poster "Big Sale" and "Now"', "雪山和湖泊"),
        BUILTIN["prompt"],
        near=0.6,
    )
    assert (found.prompts, found.repeated, found.nearly_repeated) == (5, 1, 1)
    assert found.languages == {"en": 4, "zh": 1}
    assert found.categories == {"landscape": 4, "text": 1}
    assert (found.quoting, found.quotations, found.quoted_words.most) == (1, 2, 2)
    assert (found.words.least, found.words.most) == (5, 18)
    assert [(one.line, one.other_line) for one in found.examples] == [(2, 1), (3, 1)]


def test_the_same_instruction_for_another_image_is_no_repetition():
    text = "Change the background to a wide and empty beach"
    asked = ((text, "a dog"), (text, "a cup"), (f"{text} now", "a cup"), (text, "a dog"))
    listed = [
        Entry(number, instruction, {"source_caption": source})
        for number, (instruction, source) in enumerate(asked, start=1)
    ]
    found = check(listed, BUILTIN["instruction"], near=0.6, scope="source_caption")
    assert (found.repeated, found.nearly_repeated) == (1, 1)
    assert [(one.line, one.other_line) for one in found.examples] == [(3, 2), (4, 1)]
    anywhere = check(listed, BUILTIN["instruction"], near=0.6)
    assert (anywhere.repeated, anywhere.nearly_repeated) == (2, 1)


def test_spread():
    found = spread([1, 2, 3, 4, 100])
    assert found == (1, 3, 22, pytest.approx(80.8), 100)
    assert spread([]) == (0, 0, 0, 0, 0)


def test_overlap_with_an_evaluation_set_is_found_in_any_dress():
    ours = entries(fresh(1), fresh(2).upper(), fresh(3).replace("wide", "broad"), fresh(4))
    theirs = entries(fresh(9), fresh(3), fresh(2))
    assert [(one.line, one.other_line) for one in overlaps(ours, theirs, near=0.6)] == [
        (2, 3),
        (3, 2),
    ]


def test_agreement_is_cohens_kappa():
    """The textbook case: 20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no: kappa 0.4."""
    pairs = [("y", "y")] * 20 + [("y", "n")] * 5 + [("n", "y")] * 10 + [("n", "n")] * 15
    found = agreement(pairs)
    assert found.share == pytest.approx(0.7)
    assert found.kappa == pytest.approx(0.4)
    # Chance is what both name: 0.3 * 0.6 + 0.7 * 0.4 = 0.46.
    lopsided = agreement([("y", "y")] * 3 + [("n", "y")] * 3 + [("n", "n")] * 4)
    assert lopsided.kappa == pytest.approx((0.7 - 0.46) / 0.54)


def test_lists_are_read_from_lines_tables_and_objects(tmp_path: Path):
    (tmp_path / "a.txt").write_text("\ufeffone fox\n\n two foxes \n", encoding="utf-8")
    (tmp_path / "a.tsv").write_text('Prompt\tCategory\none "fox"\tx\n', encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"prompt": "one\u2028fox"}\n\n', encoding="utf-8")
    assert [e[:2] for e in read_entries(tmp_path / "a.txt")] == [(1, "one fox"), (3, "two foxes")]
    assert read_entries(tmp_path / "a.tsv", "Prompt")[0].text == 'one "fox"'
    assert len(read_entries(tmp_path / "a.jsonl")) == 1
    with pytest.raises(DataError, match=r"a.tsv:1: no column 'prompt'.*did you mean 'Prompt'"):
        read_entries(tmp_path / "a.tsv")
    (tmp_path / "b.jsonl").write_text('{"prompt": "fox"}\n{"prompt": \n', encoding="utf-8")
    with pytest.raises(DataError, match=r"b.jsonl:2: is no JSON object"):
        read_entries(tmp_path / "b.jsonl")


def sorting(request: Handled, number: int) -> None:
    """A model that calls whatever speaks of a lake a landscape, and leaves the third open once."""
    numbered = dict(re.findall(r"^(\d+)\. (.*)$", request.asked, re.MULTILINE))
    said = {key: "Landscape" if "lake" in text else "other" for key, text in numbered.items()}
    if number == 0:
        said["3"] = "I do not know"
    request.reply(json.dumps({"categories": said}))


def test_classify_by_model_reports_agreement_and_goes_on(tmp_path: Path):
    listed, out = tmp_path / "list.txt", tmp_path / "sorted.jsonl"
    texts = ["a mountain lake at dawn", "a bowl of soup", "a lake", "portrait of a girl", "a cup"]
    listed.write_text("\n".join(texts), encoding="utf-8")
    with serving(sorting) as url:
        result = fewstep("classify", listed, "-o", out, "--endpoint", url, "--model", "m")
        assert result.returncode == 0, result.stderr
        assert "category_rule and category_model agree on 80.0 % of 5" in result.stdout
        assert "2 requests, 200 + 100 tokens" in result.stdout
        again = fewstep("classify", listed, "-o", out, "--endpoint", url, "--model", "m")
        assert "measured: 0 requests" in again.stdout
    rows = sorted(read_rows(out), key=lambda row: row["line"])
    assert [row["category"] for row in rows] == [
        "landscape",
        "other",
        "landscape",
        "other",
        "other",
    ]
    assert [row["category_rule"] for row in rows] == [
        "landscape", "other", "landscape", "portrait", "other",
    ]  # fmt: skip


def classified(url: str, out: Path, listed: list[Entry], budget: Budget | None = None) -> Usage:
    pool = PoolFile(out, len(read_rows(out)))
    try:
        return classify_by_model(
            batches(still_open(listed, read_rows(out), out.name)),
            pool,
            client(url),
            kind="prompt",
            rules=BUILTIN["prompt"],
            descriptions=DESCRIPTIONS["prompt"],
            workers=1,
            budget=budget or Budget(),
            tell=lambda written: None,
        )
    finally:
        pool.close()


def test_a_prompt_that_gets_no_category_is_given_up_and_asked_for_next_time(tmp_path: Path):
    asked: list[str] = []

    def answer(request: Handled, number: int) -> None:
        asked.append(request.asked)
        numbered = dict(re.findall(r"^(\d+)\. (.*)$", request.asked, re.MULTILINE))
        said = {key: "other" for key, text in numbered.items() if text != "a riddle"}
        request.reply(json.dumps({"categories": said}))

    out, listed = tmp_path / "sorted.jsonl", entries("a cup", "a riddle", "a bowl")
    with serving(answer) as url:
        with pytest.raises(RunError, match="1 prompts got no known category in 3 requests each"):
            classified(url, out, listed)
        assert ["a cup" in text for text in asked] == [True, False, False]
        assert {row["line"] for row in read_rows(out)} == {1, 3}
        with pytest.raises(RunError, match="1 prompts"):
            classified(url, out, listed)
        assert len(asked) == 6 and not any("a cup" in text for text in asked[3:])
        assert len(read_rows(out)) == 2


def test_classifying_stops_beyond_its_allowance(tmp_path: Path):
    out, listed = tmp_path / "sorted.jsonl", entries(*(f"cup {n}" for n in range(3 * BATCH)))
    allowance = Budget(price_in=1e4, price_out=0.0, most=1.5)  # each reply costs 1

    def answer(request: Handled, number: int) -> None:
        said = dict.fromkeys(re.findall(r"^(\d+)\. ", request.asked, re.MULTILINE), "other")
        request.reply(json.dumps({"categories": said}))

    with serving(answer) as url, pytest.raises(RunError, match=r"measured cost 2.00 is beyond"):
        classified(url, out, listed, allowance)
    assert len(read_rows(out)) == 2 * BATCH


def test_rows_of_another_list_are_not_gone_on_with():
    row = {"line": 1, "prompt": "a cup", "category_model": "other"}
    listed = entries("a cup", "a bowl")
    assert [entry.text for entry in still_open(listed, [row], "out")] == ["a bowl"]
    by_rule = {key: value for key, value in row.items() if key != "category_model"}
    for wrong in (row | {"prompt": "a jug"}, row | {"line": 3}, by_rule):
        with pytest.raises(RunError, match="out:2: not classified by a model from this file"):
            still_open(listed, [row | {"line": 2, "prompt": "a bowl"}, wrong], "out")
    with pytest.raises(RunError, match="out:2"):
        still_open(listed, [row, row], "out")


# The commands.


def test_the_command_writes_without_leaving_the_key_anywhere(tmp_path: Path):
    keys: list[str | None] = []

    def answer(request: Handled, number: int) -> None:
        keys.append(request.headers["Authorization"])
        offering()(request, number)

    out, spec = tmp_path / "pool.jsonl", spec_at(tmp_path)
    with serving(answer) as url:
        common = ("write", spec, "-o", out, "--endpoint", url, "--model", "m", "--key-env", "K")
        dry = fewstep(*common, "--dry-run", K="sk-very-secret")
        assert dry.returncode == 0 and "6 requests" in dry.stdout and "[user]" in dry.stdout
        assert not out.exists() and not keys
        result = fewstep(*common, K="sk-very-secret")
    assert result.returncode == 0, result.stderr
    assert "12 written; measured: 6 requests, 600 + 300 tokens" in result.stdout
    assert keys == ["Bearer sk-very-secret"] * 6
    left = [file.read_text() for file in tmp_path.rglob("*") if file.is_file()]
    assert not any("sk-very-secret" in text for text in [*left, result.stdout, result.stderr])


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (("--dry-run", "--max-cost", "1"), 2, "--max-cost: needs --price-in and --price-out"),
        (("--price-in", "1e6", "--price-out", "1", "--max-cost", "1"), 2, "more than 1.00"),
        ((), 2, "--endpoint: is missing; or look at it first with --dry-run"),
        (("--endpoint", "http://127.0.0.1:9/v1", "--model", "m"), 2, "cannot be reached"),
        (("--against", "nowhere.txt"), 3, "nowhere.txt: cannot be read"),
    ],
)
def test_mistakes_end_with_one_message(
    tmp_path: Path, arguments: tuple[str, ...], code: int, expected: str
):
    result = fewstep("write", spec_at(tmp_path), "-o", tmp_path / "pool.jsonl", *arguments)
    assert (result.returncode, result.stderr.count("\n")) == (code, 1)
    assert expected in result.stderr


def test_check_fails_on_contamination(tmp_path: Path):
    pool, clean, dirty = (tmp_path / name for name in ("pool.txt", "clean.txt", "dirty.txt"))
    pool.write_text(f"{fresh(1)}\n{fresh(2)}\n", encoding="utf-8")
    clean.write_text(fresh(3), encoding="utf-8")
    dirty.write_text(fresh(2).upper(), encoding="utf-8")
    result = fewstep("check", pool, "--against", clean)
    assert result.returncode == 0 and "overlap with" in result.stdout
    result = fewstep("check", pool, "--against", clean, "--against", dirty, "--json")
    assert result.returncode == 3
    assert "1 prompts repeat the evaluation set" in result.stderr
    assert [one["line"] for one in json.loads(result.stdout)["overlap"][str(dirty)]] == [2]


def test_classify_by_rule_with_an_own_category_and_known_ones(tmp_path: Path):
    listed, out = tmp_path / "list.jsonl", tmp_path / "sorted.jsonl"
    texts = [
        ("a hawk above its nest", "birds"),
        ("a mountain lake", "landscape"),
        ("soup", "other"),
    ]
    listed.write_text(
        "\n".join(json.dumps({"text": text, "known": known}) for text, known in texts)
    )
    own = SPEC.replace("landscape", "birds") + "rule: {strong: [hawk, nest]}\n"
    result = fewstep(
        "classify", listed, "-o", out, "--column", "text", "--truth", "known",
        "--spec", spec_at(tmp_path, own),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert [row["category"] for row in read_rows(out)] == ["birds", "landscape", "other"]
    assert "known and category_rule agree on 100.0 % of 3, kappa 1.00" in result.stdout


def command(*arguments: str | Path) -> None:
    """`fewstep prompts` in this process; its errors come as they are."""
    typer.main.get_command(app).main([*map(str, arguments)], standalone_mode=False)


def test_the_command_fails_where_prompts_are_missing_and_takes_another_count(tmp_path: Path):
    def answer(request: Handled, number: int) -> None:
        listed = [] if "a lake" in request.asked else [fresh(2 * number), fresh(2 * number + 1)]
        request.prompts(listed)

    out, spec = tmp_path / "pool.jsonl", spec_at(tmp_path)
    with serving(answer) as url:
        common = ("write", spec, "-o", out, "--endpoint", url, "--model", "m", "--workers", "1")
        with pytest.raises(RunError, match="2 prompts are missing, in cells where nothing"):
            command(*common, "--count", "6")
    assert len(read_rows(out)) == 4


def test_classify_refuses_before_it_asks_or_overwrites(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    listed, out = tmp_path / "list.txt", tmp_path / "sorted.jsonl"
    listed.write_text("a cup\na lake\n")
    asked: list[int] = []
    with serving(lambda request, number: asked.append(number)) as url:
        common = ("classify", listed, "-o", out, "--endpoint", url, "--model", "m")
        with pytest.raises(RecipeError, match=r"--max-cost: the estimate is"):
            command(*common, "--price-in", "1e6", "--price-out", "1", "--max-cost", "1")
        command(*common, "--dry-run")
        assert not asked and not out.exists() and "estimate: 1 requests" in capsys.readouterr().out
    with pytest.raises(RecipeError, match="is of kind prompt"):
        command("classify", listed, "-o", out, "--instructions", "--spec", spec_at(tmp_path))
    command("classify", listed, "-o", out)
    before = out.read_bytes()
    with pytest.raises(RunError, match="is there already; choose another --out"):
        command("classify", listed, "-o", out)
    assert out.read_bytes() == before


def test_the_model_is_compared_with_what_is_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The rule takes both for what they are; the model calls the lake a landscape alone."""
    listed, out = tmp_path / "list.jsonl", tmp_path / "sorted.jsonl"
    known = {"a mountain lake": "landscape", "portrait of a girl": "portrait"}
    rows = [{"prompt": text, "known": category} for text, category in known.items()]
    listed.write_text("\n".join(map(json.dumps, rows)))
    with serving(sorting) as url:
        more = ("--truth", "known", "--endpoint", url, "--model", "m")
        command("classify", listed, "-o", out, *more)
    told = capsys.readouterr().out
    assert "known and category_rule agree on 100.0 % of 2, kappa 1.00" in told
    assert "known and category_model agree on 50.0 % of 2" in told


def test_the_command_checks_instructions_by_their_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    listed = tmp_path / "edits.jsonl"
    rows = [{"prompt": "Make it winter.", "source_caption": what} for what in ("a dog", "a cup")]
    listed.write_text("\n".join(map(json.dumps, rows)))
    for options, repeated in ((("--instructions",), 0), ((), 1)):
        command("check", listed, "--json", *options)
        assert json.loads(capsys.readouterr().out)["repeated"] == repeated
