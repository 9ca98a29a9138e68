"""Real images beside prompts: found in every format, cut to one size, encoded and kept once."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.data.promptfiles import PromptRecord, read_prompts
from fewstep.data.targets import changes, cut_off, refuse_other_shapes, target_pixels
from fewstep.errors import DataError
from fewstep.models.families.encoders import PartSizes
from tests.stub_family import ENCODING, Ask, Counting, Picture, store_in

from .test_promptfiles import colour_of, images, picture, write_lines, write_tar  # noqa: F401

# --- rows -----------------------------------------------------------------------------------------

CAPTION = {"caption": "a kite", "file": "red.png"}
EDIT = {"instruction": "make it green", "source": "blue.png", "target": "green.png"}
WANTED = [("t2i", "a kite", "red"), ("edit", "make it green", "green")]


def goals(records: list[PromptRecord]) -> list[tuple[str, str, str | None]]:
    return [(r.task, r.prompt, r.target and colour_of(r.target)) for r in records]


def test_a_folder_of_lists_as_in_data_md(images: Path) -> None:  # noqa: F811
    write_lines(images / "captions.jsonl", CAPTION)
    write_lines(images / "edits.jsonl", EDIT)
    assert goals(read_prompts(images, targets=True)) == WANTED
    assert [goal for *_, goal in goals(read_prompts(images))] == [None, None]


def test_csv_and_a_prompt_with_an_image(images: Path) -> None:  # noqa: F811
    (images / "p.csv").write_text("prompt,image\na kite,red.png\nno image,\n")
    found = goals(read_prompts(images / "p.csv", targets=True))
    assert found == [WANTED[0], ("t2i", "no image", None)]


def test_shards_take_the_images_roles(tmp_path: Path) -> None:
    """`key.png` beside a caption; `key.target.png`, or `key.png` of an edit of another sample."""
    members = {
        "0.png": picture("red"),
        "0.txt": b"a kite",
        "1.source.png": picture("blue"),
        "1.target.png": picture("green"),
        "1.json": json.dumps({"instruction": "make it green"}).encode(),
        "2.png": picture("green"),
        "2.json": json.dumps({"instruction": "and now green", "source": "0"}).encode(),
        "3.json": json.dumps({"caption": "no image"}).encode(),
    }
    file = write_tar(tmp_path / "x.tar", members)
    assert goals(read_prompts(file, targets=True)) == [
        *WANTED,
        ("edit", "and now green", "green"),
        ("t2i", "no image", None),
    ]
    red = read_prompts(file, targets=True)[2].sources
    assert [colour_of(source) for source in red] == ["red"]


def test_tables_and_datasets_folders(images: Path, tmp_path: Path) -> None:  # noqa: F811
    pyarrow: Any = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    cell = {"bytes": picture("red"), "path": None}
    table = pyarrow.table({"caption": ["a kite", "bare"], "image": [cell, None]})
    pyarrow.parquet.write_table(table, images / "p.parquet")
    edit = {key: [value] for key, value in EDIT.items()}
    pyarrow.parquet.write_table(pyarrow.table(edit), images / "e.parquet")
    folder = tmp_path / "saved"
    folder.mkdir()
    with pyarrow.ipc.new_stream(str(folder / "data.arrow"), table.schema) as writer:
        writer.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    for path in (images / "p.parquet", folder):
        assert goals(read_prompts(path, targets=True)) == [WANTED[0], ("t2i", "bare", None)]
        assert goals(read_prompts(path))[0][2] is None
    assert goals(read_prompts(images / "e.parquet", targets=True)) == [WANTED[1]]


def test_only_what_is_asked_for_and_trained_on_is_looked_at(images: Path) -> None:  # noqa: F811
    (images / "broken.png").write_bytes(b"no image")
    file = write_lines(images / "p.jsonl", {"prompt": "a", "image": "broken.png"})
    assert read_prompts(file)[0].target is None
    with pytest.raises(DataError, match=r"p.jsonl line 1: broken.png is no image"):
        read_prompts(file, targets=True)
    held_out = {"prompt": "a", "image": "broken.png", "split": "eval"}
    assert read_prompts(write_lines(file, held_out), targets=True)[0].target is None


READ_OR_NOT = pytest.mark.parametrize("targets", [True, False])
"""A file is right for objectives that learn from real images and for the others alike."""


@READ_OR_NOT
def test_one_prompt_may_have_several_images(images: Path, targets: bool) -> None:  # noqa: F811
    rows = [{"prompt": "a", "image": f"{colour}.png"} for colour in ("red", "blue")]
    edits = [
        {"instruction": "b", "source": "green.png", "target": f"{colour}.png"}
        for colour in ("red", "blue")
    ]
    file = write_lines(images / "p.jsonl", *rows)
    found = goals(read_prompts(file, targets=targets))
    assert [goal for *_, goal in found] == (["red", "blue"] if targets else [None, None])
    found = goals(read_prompts(write_lines(images / "e.jsonl", *edits), targets=targets))
    assert [goal for *_, goal in found] == (["red", "blue"] if targets else [None, None])


@READ_OR_NOT
@pytest.mark.parametrize(
    "change",
    [
        {},  # the same image
        {"image": None},  # none beside one
        {"image": "blue.png", "split": "eval"},  # trained on and evaluated with
    ],
)
def test_a_prompt_is_not_repeated_otherwise(
    images: Path,  # noqa: F811
    change: dict[str, Any],
    targets: bool,
) -> None:
    row = {"prompt": "a", "image": "red.png"}
    for rows in ([row, row | change], [row | change, row]):
        file = write_lines(images / "p.jsonl", *rows)
        with pytest.raises(DataError, match=r"line 2: same prompt as p\.jsonl line 1; remove one"):
            read_prompts(file, targets=targets)


@READ_OR_NOT
def test_images_of_one_prompt_in_tables_and_shards(
    images: Path,  # noqa: F811
    tmp_path: Path,
    targets: bool,
) -> None:
    pyarrow: Any = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    cells = [{"bytes": picture(colour), "path": None} for colour in ("red", "blue")]
    table = pyarrow.table({"caption": ["a", "a"], "image": cells})
    pyarrow.parquet.write_table(table, images / "p.parquet")
    pairs = {"0.txt": b"a", "0.png": picture("red"), "1.txt": b"a", "1.png": picture("blue")}
    for path in (images / "p.parquet", write_tar(tmp_path / "s.tar", pairs)):
        found = [goal for *_, goal in goals(read_prompts(path, targets=targets))]
        assert found == (["red", "blue"] if targets else [None, None])
    bare = pyarrow.table({"caption": ["a", "a"]})
    pyarrow.parquet.write_table(bare, images / "p.parquet")
    with pytest.raises(DataError, match=r"row 2: same prompt as p\.parquet row 1"):
        read_prompts(images / "p.parquet", targets=targets)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "a", "image": "none.png"}, "none.png does not exist"),
        ({"prompt": "a", "image": 3}, "an image is '3'; give the name of a file"),
        ({"prompt": "a", "image": ["red.png"]}, "several real images in 'image'; keep one"),
        ({"prompt": "a", "image": "red.png", "file": "red.png"}, "in 'image' and 'file'; keep one"),
    ],
)
def test_mistakes_are_named(images: Path, row: dict[str, Any], told: str) -> None:  # noqa: F811
    with pytest.raises(DataError, match=told):
        read_prompts(write_lines(images / "p.jsonl", row), targets=True)


# --- size -----------------------------------------------------------------------------------------


def test_a_target_is_the_middle_of_the_image_in_minus_one_to_one() -> None:
    """Where no scaling is needed: the very pixels, of the centre, with 0 -> -1 and 255 -> 1."""
    rng = np.random.default_rng(0)
    wide = rng.integers(0, 256, (8, 24, 3), dtype=np.uint8)
    wide[0, 4:6] = [[0, 0, 0], [255, 255, 255]]
    found = target_pixels(Image.fromarray(wide), (8, 16))
    assert found.shape == (1, 3, 8, 16)
    middle = torch.from_numpy(wide[:, 4:20].astype(np.float32)) / 255 * 2 - 1
    assert (found[0].permute(1, 2, 0) - middle).abs().max() < 1e-6
    assert found[0, :, 0, 0].tolist() == [-1] * 3 and found[0, :, 0, 1].tolist() == [1] * 3
    tall = np.ascontiguousarray(wide.transpose(1, 0, 2))
    turned = target_pixels(Image.fromarray(tall), (16, 8))
    assert torch.equal(turned, found.transpose(2, 3))


def test_a_target_is_scaled_as_a_whole() -> None:
    """A wedge of brightness keeps its ends and its slope at half the size."""
    wedge = np.tile(np.arange(128, dtype=np.uint8)[None, :, None], (64, 1, 3))
    found = (target_pixels(Image.fromarray(wedge), (32, 64))[0, 0] + 1) * 127.5
    wanted = torch.arange(64.0) * 2 + 0.5
    assert (found[:, 4:-4] - wanted[4:-4]).abs().max() <= 1


def test_what_is_cut_off() -> None:
    assert cut_off((100, 150), (64, 96)) == pytest.approx(0)
    assert cut_off((100, 150), (64, 64)) == pytest.approx(1 / 3)
    assert cut_off((150, 100), (64, 64)) == pytest.approx(1 / 3)
    assert cut_off((96, 96), (64, 96)) == pytest.approx(1 / 3)


def records_of(folder: Path, **sizes: tuple[int, int]) -> list[PromptRecord]:
    """An edit for each size; and one caption, of the first."""
    rows = []
    for name, (height, width) in sizes.items():
        Image.fromarray(np.full((height, width, 3), len(rows), np.uint8)).save(
            folder / f"{name}.png"
        )
        rows.append({"instruction": name, "source": f"{name}.png", "target": f"{name}.png"})
    write_lines(folder / "edits.jsonl", *rows)
    write_lines(folder / "captions.jsonl", {"caption": "c", "file": rows[0]["target"]})
    return read_prompts(folder, targets=True)


def test_edits_of_another_shape_are_refused_and_captions_are_cropped(tmp_path: Path) -> None:
    records = records_of(tmp_path, square=(90, 90), near=(64, 100), small=(32, 48))
    with pytest.raises(DataError) as caught:
        refuse_other_shapes(tmp_path, records, (64, 96))
    told = str(caught.value)
    assert "1 problem" in told and "edits.jsonl line 1: the target square.png is 90x90" in told
    assert "33% would be cut off for model.size 64x96" in told
    refuse_other_shapes(tmp_path, [r for r in records if r.prompt != "square"], (64, 96))
    assert changes(records, (64, 96)) == [
        "2 of 3 target images are smaller than 64x96 and are enlarged",
        "1 of 3 target images lose more than 10% to the shape of 64x96",
    ]
    assert changes(read_prompts(tmp_path), (64, 96)) == []


# --- the cache ------------------------------------------------------------------------------------

RED, BLUE = (Picture(c, Image.new("RGB", (96, 64), c)) for c in ("red", "blue"))


def test_targets_are_encoded_once_and_come_back_in_order(tmp_path: Path) -> None:
    """The stub answers with the mean colour and the size that it saw."""
    asked = [Ask("a", target=RED), Ask("b", target=BLUE), Ask("c", target=RED)]
    store, family = store_in(tmp_path), Counting()
    store.fill(asked, lambda: family)
    assert family.images == 2 and len(store.tensors) == 3 + 1 + 2
    again = store_in(tmp_path)
    assert not again.missing(asked)
    found = again.targets([asked[1], asked[0], asked[2]])
    wanted = [[-1, -1, 1, 64, 96], [1, -1, -1, 64, 96], [1, -1, -1, 64, 96]]
    assert found.tolist() == wanted and found.dtype == torch.float32


def test_a_target_is_added_without_encoding_its_prompt_again(tmp_path: Path) -> None:
    store_in(tmp_path).fill([Ask("a"), Ask("b")], Counting)
    store, family = store_in(tmp_path), Counting()
    asked = [Ask("a", target=RED), Ask("b", target=BLUE)]
    assert len(store.missing(asked)) == 2
    store.fill(asked, lambda: family)
    assert (family.encoded, family.images) == ([], 2)
    assert torch.equal(store.take(asked).text.states, store.take([Ask("a"), Ask("b")]).text.states)


@pytest.mark.parametrize(
    ("field", "value"),
    [("weights", "other"), ("code", "other"), ("size", (64, 64)), ("dtype", "bfloat16")],
)
def test_another_encoding_encodes_targets_again(tmp_path: Path, field: str, value: Any) -> None:
    store_in(tmp_path).fill([Ask("a", target=RED)], Counting)
    other = store_in(tmp_path, replace(ENCODING, **{field: value}))
    assert other.keys(Ask("a", target=RED))[-1] not in other.tensors
    assert store_in(tmp_path, replace(ENCODING, negative="blue")).missing([Ask("a", target=RED)])
    same = store_in(tmp_path, replace(ENCODING, negative=None))
    assert not same.missing([Ask("a", target=RED)]), "a target has no negative prompt"


def test_a_broken_target_is_refused_by_name(tmp_path: Path) -> None:
    class Broken(Counting):
        def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
            return super().encode_image(pixels) / 0

    with pytest.raises(DataError, match="not finite for 'a kite'"):
        store_in(tmp_path).fill([Ask("a kite", target=RED)], Broken)


@pytest.mark.parametrize(
    ("family", "shape"),
    [
        ("QwenImagePipeline", (4 * 6, 16)),
        ("StableDiffusion3Pipeline", (16, 8, 12)),
        ("ZImagePipeline", (16, 8, 12)),
        ("SanaPipeline", (16, 2, 3)),
    ],
)
def test_the_estimate_is_the_size_of_the_latents(tmp_path: Path, family: str, shape: tuple) -> None:
    """For 16 channels in float32 at 64 x 96 pixels; `shape` is that of each family's `noise`."""
    sizes = PartSizes(token=64, length=None, source_tokens=0, source=1024**2 // 16**2 * 16 * 4)
    store = store_in(tmp_path, replace(ENCODING, family=family, negative=None))
    ask = Ask("a", target=RED)
    found = store.estimate([ask], sizes)
    assert found[store.keys(ask)[-1]] == 4 * np.prod(shape)


def test_pixels_are_those_of_the_file() -> None:
    """From bytes to the autoencoder's input, with an upright turn and transparency on white."""
    out = io.BytesIO()
    image = Image.new("RGBA", (16, 8), (255, 0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    image.save(out, "PNG", exif=exif)
    from fewstep.data.pixels import read_rgb

    found = target_pixels(read_rgb(out.getvalue())[0], (16, 8))
    assert found.shape == (1, 3, 16, 8) and torch.equal(found, torch.ones_like(found))
