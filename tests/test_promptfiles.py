"""Prompt files of every format: the same rows from each, and every mistake with its line."""

import csv
import io
import json
import os
import tarfile
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.data.domain import FolderDomain
from fewstep.data.folder import ImageFolder
from fewstep.data.memo import Memo
from fewstep.data.pixels import read_rgb
from fewstep.data.promptfiles import PromptRecord, conversions, read_prompts
from fewstep.errors import DataError, RecipeError
from fewstep.models.text import TextEncoder
from fewstep.models.vaes import PixelCodec
from fewstep.recipe.available import count_available, find_image_problems
from fewstep.recipe.checks import check_source
from fewstep.recipe.facts import Facts, gather_facts
from fewstep.recipe.load import load_recipe, load_yaml
from fewstep.recipe.teach import TeachRecipe

COLOURS = {"red": (200, 10, 10), "blue": (10, 10, 200), "green": (10, 200, 10)}


def picture(colour: str, size: tuple[int, int] = (12, 8), mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, COLOURS[colour]).convert(mode).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for colour in COLOURS:
        (tmp_path / f"{colour}.png").write_bytes(picture(colour))
    return tmp_path


def write_lines(file: Path, *rows: dict[str, Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def write_tar(file: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(file, "w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return file


def told(records: list[PromptRecord]) -> list[tuple[Any, ...]]:
    """What a record says, with the colours of its sources."""
    return [
        (r.task, r.prompt, r.category, r.split, tuple(map(colour_of, r.sources))) for r in records
    ]


def colour_of(source: Any) -> str:
    pixel = np.asarray(source.open())[0, 0].tolist()
    return next(name for name, value in COLOURS.items() if list(value) == pixel)


PROMPTS = [
    ("t2i", "a red kite, high up", "sky", "train", ()),
    ("t2i", "ein Baum, groß", "general", "eval", ()),
]
EDITS = [
    ("edit", "make it red", "object", "train", ("blue",)),
    ("edit", "put the first into the second", "general", "train", ("red", "green")),
]


def test_text_is_a_prompt_a_line(tmp_path) -> None:
    """A line separator of Unicode is part of a prompt."""
    (tmp_path / "p.txt").write_bytes(
        b"\xef\xbb\xbfa red\xe2\x80\xa8kite, high up\r\n\n  ein Baum, gro\xc3\x9f\n"
    )
    records = read_prompts(tmp_path / "p.txt")
    assert [(r.prompt, r.where, r.id) for r in records] == [
        ("a red\u2028kite, high up", "p.txt line 1", "p.txt line 1"),
        ("ein Baum, groß", "p.txt line 3", "p.txt line 3"),
    ]
    assert {(r.category, r.split, r.task) for r in records} == {("general", "train", "t2i")}


@pytest.mark.parametrize("name", ["prompt", "caption", "text"])
def test_json_lines_of_prompts(tmp_path, name) -> None:
    file = write_lines(
        tmp_path / "p.jsonl",
        {name: "a red kite, high up", "category": "sky", "id": "k1"},
        {name: " ein Baum, groß ", "split": "validation"},
    )
    records = read_prompts(file)
    assert told(records) == PROMPTS and records[0].id == "k1"


def test_json_lines_of_edits_with_one_source_and_with_two(images) -> None:
    file = write_lines(
        images / "e.jsonl",
        {"instruction": "make it red", "source": "blue.png", "category": "object"},
        {
            "instruction": "put the first into the second",
            "sources": ["red.png", str(images / "green.png")],
        },
    )
    assert told(read_prompts(file)) == EDITS


def test_csv(images) -> None:
    with open(images / "p.csv", "w", newline="", encoding="utf-8-sig") as out:
        table = csv.writer(out)
        table.writerow(["caption", "category", "split"])
        table.writerows([["a red kite, high up", "sky", ""], ["ein Baum, groß", "", "eval"]])
    assert told(read_prompts(images / "p.csv")) == PROMPTS
    with open(images / "e.csv", "w", newline="", encoding="utf-8") as out:
        table = csv.writer(out)
        table.writerow(["instruction", "source", "sources", "category"])
        table.writerow(["make it red", "blue.png", "", "object"])
        table.writerow(["put the first into the second", "", "red.png; green.png", ""])
    assert told(read_prompts(images / "e.csv")) == EDITS


def test_text_beside_a_caption_is_what_the_image_says(tmp_path) -> None:
    file = write_lines(tmp_path / "captions.jsonl", {"caption": "a sign", "text": "OPEN"})
    assert read_prompts(file)[0].prompt == "a sign"


def test_a_folder_of_images_as_in_folder_recipes(images) -> None:
    """captions.jsonl and edits.jsonl of docs/data.md; the targets are not asked for."""
    write_lines(images / "captions.jsonl", {"file": "red.png", "caption": "a red field"})
    write_lines(
        images / "edits.jsonl",
        {"source": "red.png", "target": "none.png", "instruction": "blue", "split": "eval"},
    )
    assert told(read_prompts(images)) == [
        ("t2i", "a red field", "general", "train", ()),
        ("edit", "blue", "general", "eval", ("red",)),
    ]


def test_shards(tmp_path) -> None:
    first = {
        "a/000.json": json.dumps({"prompt": "a red kite, high up", "category": "sky"}).encode(),
        "a/000.jpg": b"the image that belongs to the prompt is not read",
        "a/001.txt": "ein Baum, groß".encode(),
        "a/001.json": b'{"split": "test"}',
    }
    with pytest.raises(DataError, match=r"calls its prompt 'caption', and .*000 calls it 'prompt'"):
        read_prompts(write_tar(tmp_path / "x.tar", first))
    first["a/000.json"] = first["a/000.json"].replace(b"prompt", b"caption")
    write_tar(tmp_path / "x.tar", first)
    second = {
        "v1.0/002.source.png": picture("blue"),
        "v1.0/002.target.png": b"not read",
        "v1.0/002.json": b'{"instruction": "make it red", "category": "object"}',
        "003.source1.png": picture("green"),
        "003.source0.png": picture("red"),
        "003.json": b'{"instruction": "put the first into the second"}',
    }
    write_tar(tmp_path / "y.tar", second)
    assert told(read_prompts(tmp_path)) == PROMPTS + EDITS
    records = read_prompts(tmp_path / "y.tar")
    assert records[1].where == "y.tar sample 003"
    assert records[1].sources[0].name == "y.tar/003.source0.png"


def test_a_shard_may_name_the_sample_that_is_the_source(tmp_path) -> None:
    write_tar(tmp_path / "x.tar", {"000.png": picture("blue"), "9.png": picture("green")})
    rows = {
        "001.json": b'{"instruction": "make it red", "source": "000", "category": "object"}',
        "002.json": b'{"instruction": "make it red", "source": "00"}',
    }
    write_tar(tmp_path / "y.tar", rows)
    with pytest.raises(DataError, match=r"002: no sample '00' with an image; did you mean 000\?"):
        read_prompts(tmp_path)
    del rows["002.json"]
    write_tar(tmp_path / "y.tar", rows)
    assert told(read_prompts(tmp_path)) == EDITS[:1]


def test_parquet_with_names_and_with_images(images) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pa.table(
        {
            "prompt": ["a red kite, high up", "ein Baum, groß"],
            "category": ["sky", None],
            "split": [None, "eval"],
        }
    )
    parquet.write_table(table, images / "p.parquet")
    assert told(read_prompts(images / "p.parquet")) == PROMPTS
    rows = {
        "instruction": ["make it red", "put the first into the second"],
        "category": ["object", None],
        "unread": [1, 2],
    }
    named = pa.table(rows | {"sources": [["blue.png"], ["red.png", "green.png"]]})
    parquet.write_table(named, images / "n.parquet")
    assert told(read_prompts(images / "n.parquet")) == EDITS
    held = pa.table(rows | {"sources": [[picture("blue")], [picture("red"), picture("green")]]})
    parquet.write_table(held, images / "h.parquet", row_group_size=1)
    assert told(read_prompts(images / "h.parquet")) == EDITS
    folder = images / "parts"
    folder.mkdir()
    parquet.write_table(held.slice(0, 1), folder / "0.parquet")
    parquet.write_table(held.slice(1, 1), folder / "1.parquet")
    assert told(read_prompts(folder)) == EDITS


def save_dataset(folder: Path, parts: list[Any]) -> Path:
    """What `datasets.Dataset.save_to_disk` writes, as far as it is read."""
    pa = pytest.importorskip("pyarrow")
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{len(parts):05d}.arrow" for i in range(len(parts))]
    for name, part in zip(names, parts):
        with (
            pa.OSFile(str(folder / name), "wb") as out,
            pa.ipc.new_stream(out, part.schema) as stream,
        ):
            stream.write_table(part, max_chunksize=1)
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": name} for name in names], "_split": "train"})
    )
    (folder / "dataset_info.json").write_text("{}")
    return folder


def test_a_datasets_folder(images) -> None:
    pa = pytest.importorskip("pyarrow")
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    cells = [{"bytes": picture("blue"), "path": None}, {"bytes": None, "path": "red.png"}]
    table = pa.table(
        {
            "instruction": ["make it red", "make it green"],
            "source": pa.array(cells, kind),
            "category": ["object", "object"],
        }
    )
    folder = save_dataset(images / "d" / "train", [table.slice(0, 1), table.slice(1, 1)])
    (folder / "red.png").write_bytes(picture("red"))
    expected = [EDITS[0], ("edit", "make it green", "object", "train", ("red",))]
    assert told(read_prompts(folder)) == expected
    (images / "d" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(DataError, match="holds the splits train; give the folder of one"):
        read_prompts(images / "d")


def test_equal_images_have_equal_digests_wherever_they_lie(images) -> None:
    write_lines(images / "e.jsonl", {"instruction": "x", "sources": ["blue.png", "red.png"]})
    members = {"0.source.png": picture("blue"), "0.json": b'{"instruction": "x"}'}
    blue, red = read_prompts(images / "e.jsonl")[0].sources
    (shard,) = read_prompts(write_tar(images / "s.tar", members))[0].sources
    assert blue.digest == shard.digest != red.digest


def test_images_of_one_shard_are_told_apart(tmp_path) -> None:
    """By content, and in the order of their numbers and not of their names."""
    sources = {f"0.source{i}.png": picture("blue", (12, 8 + i)) for i in range(12)}
    members = {"0.json": b'{"instruction": "x"}'} | dict(reversed(sources.items()))
    (record,) = read_prompts(write_tar(tmp_path / "s.tar", members))
    assert [source.open().height for source in record.sources] == list(range(8, 20))
    assert len({source.digest for source in record.sources}) == 12


def test_one_instruction_may_be_given_for_several_images(images) -> None:
    rows = [{"instruction": "make it red", "source": f"{name}.png"} for name in ("blue", "green")]
    assert len(read_prompts(write_lines(images / "e.jsonl", *rows))) == 2


def test_conversions_are_told(images) -> None:
    (images / "grey.png").write_bytes(picture("red", mode="L"))
    (images / "clear.png").write_bytes(picture("red", mode="RGBA"))
    file = write_lines(
        images / "e.jsonl",
        {"instruction": "a", "source": "grey.png"},
        {"instruction": "b", "sources": ["clear.png", "grey.png", "red.png"]},
    )
    records = read_prompts(file)
    assert conversions(records) == [
        "1 of 3 source images were L and converted to RGB",
        "1 of 3 source images were transparent and laid on white",
    ]
    assert {image.open().mode for record in records for image in record.sources} == {"RGB"}


def test_a_memo_spares_reading_an_image_until_it_changes(images, monkeypatch) -> None:
    file = write_lines(images / "e.jsonl", {"instruction": "x", "source": "blue.png"})
    before = read_prompts(file, Memo(images / "memo.json"))
    decoded: list[bytes] = []
    from fewstep.data import promptfiles

    monkeypatch.setattr(
        promptfiles, "read_rgb", lambda content: (decoded.append(content), read_rgb(content))[1]
    )
    assert read_prompts(file, Memo(images / "memo.json")) == before and not decoded
    (images / "blue.png").write_bytes(picture("green"))
    after = read_prompts(file, Memo(images / "memo.json"))
    assert decoded == [picture("green")]
    assert after[0].sources[0].digest != before[0].sources[0].digest


def test_a_memo_answers_for_a_file_as_it_was(tmp_path) -> None:
    """Neither for its next content, be that as long and as old, nor for another question."""
    file, memory = tmp_path / "a.bin", tmp_path / "memo.json"

    def ask(question: str = "what", memo: Memo | None = None) -> str:
        memo = Memo(memory) if memo is None else memo
        answer = memo.get(file, question, lambda: f"{question} {file.read_text()}")
        memo.save()
        return answer

    file.write_text("one")
    before = file.stat()
    assert ask() == "what one" and ask("other") == "other one"
    file.write_text("two")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert ask() == "what two"
    memory.write_text(memory.read_text().replace("what two", "remembered"))
    assert ask() == "remembered"
    memory.write_text("{")
    assert ask() == "what two"

    def fail() -> str:
        raise DataError("no")

    memo = Memo()
    for _ in range(2):
        with pytest.raises(DataError):
            memo.get(file, "why", fail)
    assert ask("why", memo) == "why two"


MISTAKES = {
    "nothing": ([], "no prompt in it"),
    "no prompt": ([{"category": "x"}], "line 1: no prompt; give it as 'prompt'"),
    "empty": ([{"prompt": " "}], "line 1: 'prompt' is empty; write one or remove the row"),
    "number": ([{"prompt": 3}], "line 1: 'prompt' is 3; give a string"),
    "misspelt": ([{"prompt": "a", "categroy": "b"}], "'categroy'; did you mean 'category'"),
    "twice": ([{"prompt": "a"}, {"prompt": "a "}], "line 2: same prompt as .* line 1; remove one"),
    "same id": ([{"prompt": "a", "id": "1"}, {"prompt": "b", "id": "1"}], "line 2: same id '1'"),
    "two names": ([{"prompt": "a", "caption": "b"}], "has both 'prompt' and 'caption'; keep one"),
    "mixed columns": ([{"prompt": "a"}, {"text": "b"}], "line 2: calls its prompt 'text', and "),
    "split": ([{"prompt": "a", "split": "trian"}], "split 'trian' is unknown; use one of train"),
    "no source": ([{"instruction": "a"}], "an instruction without 'source'; name the image"),
    "no instruction": ([{"prompt": "a", "source": "red.png"}], "'prompt' is no instruction"),
    "missing": ([{"instruction": "a", "source": "rad.png"}], "rad.png does not exist; .*red.png"),
    "no name": ([{"instruction": "a", "sources": [3]}], "an image is '3'; give the name"),
    "broken": ([{"instruction": "a", "source": "cut.png"}], "line 1: cut.png cannot be read"),
    "no image": ([{"instruction": "a", "source": "e.jsonl"}], "e.jsonl is no image, or damaged"),
    "float": ([{"instruction": "a", "source": "f.tiff"}], "floating-point pixels; save it with 8"),
    "edit twice": (
        [{"instruction": "a", "source": "red.png"}, {"instruction": "a", "source": "again.png"}],
        "line 2: same instruction and source as e.jsonl line 1",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_with_its_line(images, name) -> None:
    (images / "cut.png").write_bytes(picture("red", (200, 100))[:120])
    (images / "again.png").write_bytes(picture("red"))
    Image.fromarray(np.zeros((4, 4), np.float32)).save(images / "f.tiff")
    rows, message = MISTAKES[name]
    with pytest.raises(DataError, match=message):
        read_prompts(write_lines(images / "e.jsonl", *rows))


def test_all_mistakes_are_listed_at_once(tmp_path) -> None:
    (tmp_path / "p.jsonl").write_bytes(
        b'{"prompt": ""}\n{"prompt\n["a"]\n\xff\n{"prompt": "fine"}\n'
    )
    with pytest.raises(DataError) as caught:
        read_prompts(tmp_path / "p.jsonl")
    message = str(caught.value)
    assert "4 problems" in message
    for line in (1, 2, 3, 4):
        assert f"p.jsonl line {line}:" in message


def test_csv_mistakes(tmp_path) -> None:
    (tmp_path / "p.csv").write_text("prompt,category\na kite, red,sky\nfine,\nshort\n")
    with pytest.raises(DataError, match=r"2 problems\n.*line 2: not 2 cells") as caught:
        read_prompts(tmp_path / "p.csv")
    assert "line 4: not 2 cells" in str(caught.value)
    (tmp_path / "q.csv").write_text("a red kite\na blue kite\n")
    with pytest.raises(DataError, match=r"line 1: names no column prompt, .*found: a red kite"):
        read_prompts(tmp_path / "q.csv")


def test_files_that_cannot_be_prompts(tmp_path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "prompts.txt").write_text("a")
    with pytest.raises(DataError, match=r"did you mean .*prompts\.txt"):
        read_prompts(tmp_path / "prompt.txt")
    (tmp_path / "p.xlsx").write_text("a")
    with pytest.raises(DataError, match=r"is no \.txt, \.jsonl, \.csv"):
        read_prompts(tmp_path / "p.xlsx")
    with pytest.raises(DataError, match=r"holds no captions\.jsonl, edits\.jsonl, \*\.tar"):
        read_prompts(tmp_path)
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"is not UTF-8 text \(byte 0\)"):
        read_prompts(tmp_path / "p.txt")
    whole = write_tar(tmp_path / "a.tar", {"0.txt": b"a"}).read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:1024])
    with pytest.raises(DataError, match="truncated"):
        read_prompts(tmp_path / "a.tar")
    pytest.importorskip("pyarrow")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"b\.parquet cannot be read"):
        read_prompts(tmp_path / "b.parquet")
    with pytest.raises(DataError, match="webdataset shards and Parquet files; keep one kind"):
        read_prompts(tmp_path)


# --- what a plan knows of them --------------------------------------------------------------------


def folder_recipe(path: Path, **more: str) -> Any:
    """A lab recipe that draws 3 prompts of `sky` and 2 edits of `object` from `path`."""
    pools = (
        "{a: {task: t2i, category: sky, size: 3}, b: {task: edit, category: object, size: 2},"
        " c: {task: t2i, category: general, size: 1}}"
    )
    changes = {
        "model": "{family: folder}",
        "data.source": f"{{kind: folder, path: {path}}}",
        "data.pools": pools,
        "data.composition": "{t2i: {a: 1, c: 1}, edit: {b: 1}}",
        "guidance": "[{weights: [{base: 1}]}]",
    }
    return load_recipe(Path("recipes/lab/unified.yaml"), changes | more)


def test_a_plan_knows_how_many_rows_a_pool_can_draw_from(tmp_path) -> None:
    sky = [{"file": f"{i}.png", "caption": f"sky {i}", "category": "sky"} for i in range(4)]
    rows = [*sky[:2], sky[2] | {"split": "train"}, sky[3] | {"split": "eval"}]
    write_lines(tmp_path / "captions.jsonl", *rows, {"file": "x.png", "caption": "x"})
    edit = {"source": "1.png", "target": "2.png", "instruction": "x", "category": "object"}
    write_lines(tmp_path / "edits.jsonl", edit, {**edit, "category": "style"})
    recipe = folder_recipe(tmp_path)
    assert count_available(recipe) == gather_facts(recipe).available == {"a": 3, "b": 1, "c": 1}
    with pytest.raises(
        RecipeError, match=r"pools\.b\.size: 2 prompts are asked .* there are 1 of edit/object"
    ):
        check_source(recipe, Facts(available=count_available(recipe)))
    check_source(
        folder_recipe(tmp_path, **{"data.pools.b.size": "1"}),
        Facts(available=count_available(recipe)),
    )


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_plan_counts_the_rows_of_prompt_files_as_they_will_be_read(images, suffix) -> None:
    rows = [
        {"prompt": "a", "category": "sky", "split": "train"},
        {"prompt": "b", "category": "sky", "split": "test"},
        {"prompt": "c", "category": "", "split": ""},
    ]
    file = images / f"p.{suffix}"
    if suffix == "jsonl":
        write_lines(file, *rows)
    else:
        with open(file, "w", newline="") as out:
            table = csv.DictWriter(out, [*rows[0]])
            table.writeheader()
            table.writerows(rows)
    source = {"data.source": f"{{kind: prompts, path: {file}}}"}
    assert count_available(folder_recipe(images, **source)) == {"a": 1, "b": 0, "c": 1}
    read = [(r.task, r.category) for r in read_prompts(file) if r.split == "train"]
    assert (read.count(("t2i", "sky")), read.count(("t2i", "general"))) == (1, 1)


def real_recipe(path: Path, objective: str) -> Any:
    """A recipe for a real model that trains on `sky` and on edits of `object` from `path`."""
    pools = "{a: {task: t2i, category: sky, size: 1}, b: {task: edit, category: object, size: 1}}"
    changes = {
        "model": "{family: qwen_image, path: nowhere}",
        "data.source": f"{{kind: prompts, path: {path}}}",
        "data.pools": pools,
        "data.composition": "{t2i: {a: 1}, edit: {b: 1}}",
        "guidance": "[{weights: [{base: 1}]}]",
        "objective": f"{{kind: {objective}}}",
    }
    return load_recipe(Path("recipes/lab/unified.yaml"), changes)


SKY = {"prompt": "a", "category": "sky", "image": "red.png"}
OBJECT = {"instruction": "b", "source": "red.png", "target": "blue.png", "category": "object"}


def test_a_plan_sees_which_images_are_not_there(images) -> None:
    """File, line and field of each; those of the evaluation are not learned from."""
    file = write_lines(
        images / "p.jsonl",
        SKY,
        {**SKY, "prompt": "b", "image": "lost.png"},
        {**SKY, "prompt": "c", "image": "lost.png", "split": "eval"},
        {**SKY, "prompt": "d", "image": None},
        {**SKY, "prompt": "e", "image": None, "category": "of no pool"},
        OBJECT,
        {**OBJECT, "instruction": "c", "source": "gone.png", "target": str(images / "no/x.png")},
        {**OBJECT, "instruction": "d", "target": "", "sources": ["red.png", "s.png"], "source": ""},
    )
    without = (
        "p.jsonl line 7: source gone.png does not exist",
        "p.jsonl line 8: sources s.png does not exist",
    )
    assert find_image_problems(real_recipe(file, "dmd")) == without
    found = find_image_problems(real_recipe(file, "dmd2"))
    assert found == (
        "p.jsonl line 2: image lost.png does not exist",
        "p.jsonl line 4: dmd2 learns from real images; name one as 'image' or 'file'",
        without[0],
        f"p.jsonl line 7: target {images}/no/x.png does not exist",
        without[1],
        "p.jsonl line 8: dmd2 learns from real images; name one as 'target'",
    )
    recipe = real_recipe(file, "dmd2")
    assert gather_facts(recipe).image_problems == found
    with pytest.raises(DataError, match=r"(?s)6 problems.*p\.jsonl line 2: image lost\.png does"):
        check_source(recipe, Facts(image_problems=found))
    check_source(recipe, Facts())


def test_a_plan_reads_tables_and_lists_of_text_alike(images) -> None:
    file = images / "e.csv"
    file.write_text(
        "instruction,sources,target,category\nx,red.png; lost.png,blue.png,object\n"
        'y,"red.png;green.png",,object\n'
    )
    assert find_image_problems(real_recipe(file, "consistency")) == (
        "e.csv line 2: sources lost.png does not exist",
        "e.csv line 3: consistency learns from real images; name one as 'target'",
    )
    (images / "p.txt").write_text("one\n\ntwo\n")
    recipe = real_recipe(images / "p.txt", "dmd2")
    assert find_image_problems(recipe) == () and count_available(recipe) == {"a": 0, "b": 0}
    write_lines(images / "captions.jsonl", {"file": "red.png", "caption": "a", "category": "sky"})
    write_lines(images / "edits.jsonl", {**OBJECT, "target": "lost.png"})
    assert find_image_problems(real_recipe(images, "dmd2")) == (
        "edits.jsonl line 1: target lost.png does not exist",
    )


@pytest.mark.parametrize("content", [b'{"prompt', b"\xff\n", b"3\n"])
def test_a_damaged_list_is_left_to_its_reader(tmp_path, content) -> None:
    (tmp_path / "captions.jsonl").write_bytes(content)
    assert count_available(folder_recipe(tmp_path)) == {}
    assert find_image_problems(real_recipe(tmp_path, "dmd2")) == ()


def test_the_place_of_the_cache_is_not_part_of_the_hash(tmp_path) -> None:
    usual, other = folder_recipe(tmp_path), folder_recipe(tmp_path, **{"data.source.cache": "/x"})
    assert usual.content_hash() == other.content_hash() and usual != other
    assert folder_recipe(tmp_path / "elsewhere").content_hash() != usual.content_hash()
    teach = Path("recipes/folder/teach_emoji.yaml")
    plain = load_yaml(teach, TeachRecipe)
    assert load_yaml(teach, TeachRecipe, {"source.cache": "/x"}).content_hash() == (
        plain.content_hash()
    )
    with_cache = plain.model_dump(mode="json", exclude={"name", "log"})
    text = json.dumps(with_cache, sort_keys=True, separators=(",", ":"))
    assert plain.content_hash() == sha256(text.encode()).hexdigest()[:16], "older runs resume"


class Letters(torch.nn.Module):
    """A text encoder with a state for each letter, and its own tokenizer."""

    device = torch.device("cpu")
    config = SimpleNamespace(hidden_size=3)
    pad_token = " "

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        scale = torch.tensor([1.0, 2.0, 3.0])
        return SimpleNamespace(last_hidden_state=input_ids[..., None] * scale)

    def tokens(self, prompts: list[str], **options: Any) -> Any:
        ids = [[*prompt.encode()] for prompt in prompts]
        if not options.get("return_tensors"):
            return {"input_ids": ids}
        rows = [torch.tensor(row) for row in ids]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return Tokens(input_ids=padded, attention_mask=(padded > 0).long())


class Tokens(dict[str, torch.Tensor]):
    def to(self, device: torch.device) -> "Tokens":
        return self


def test_a_drawn_condition_leaves_nothing_in_the_cache(images) -> None:
    """Previews and evaluations encode a few prompts at a time; pools are what the cache is for."""
    rows = [{"file": f"{c}.png", "caption": "a", "split": "train"} for c in COLOURS]
    write_lines(images / "captions.jsonl", *rows)
    folder = ImageFolder.open(images, 8, cache_dir=images.parent / f"{images.name}-cache")
    cache = images.parent / f"{images.name}-cache"
    letters = Letters()
    text = TextEncoder(letters, letters.tokens, name="letters", max_tokens=8)
    domain = FolderDomain(folder, PixelCodec(), text, cache)
    before = sorted(cache.iterdir())
    cond = domain.condition(["ab", "abcd"], None)
    assert sorted(cache.iterdir()) == before
    pool = domain.pool("general", 1, 0, task="t2i", targets=False)
    assert sorted(cache.iterdir()) != before
    one = domain.condition(["a"], None)
    assert torch.equal(one.text[0], pool.text[0]) and cond.text_mask.sum(1).tolist() == [2, 4]
