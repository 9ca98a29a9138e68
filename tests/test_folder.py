"""Image folders and shards: bad input is named, nothing leaks, nothing is decoded twice."""

import io
import json
import os
import random
import resource
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fewstep.data.folder import ImageFolder
from fewstep.data.pixels import UNREADABLE, crop_and_resize, read_rgb
from fewstep.errors import DataError

EMOJI = Path(os.environ.get("FEWSTEP_TEST_EMOJI", "/nonexistent"))


def photo(seed: int, size: tuple[int, int] = (24, 24), mode: str = "RGB") -> Image.Image:
    """Smooth and different for each seed."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def lines(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    for i, name in enumerate("abcd"):
        photo(i).save(folder / "images" / f"{name}.png")
    captions = [{"file": f"images/{name}.png", "caption": f"photo {name}"} for name in "abcd"]
    (folder / "captions.jsonl").write_text(lines(*captions))
    return folder


@pytest.fixture
def load(data: Path, tmp_path: Path) -> Callable[..., ImageFolder]:
    def load(size: int = 16, **options: Any) -> ImageFolder:
        return ImageFolder.open(data, size, cache_dir=tmp_path / "cache", **options)

    return load


def caption(name: str, **more: Any) -> dict[str, Any]:
    return {"file": f"images/{name}.png", "caption": f"photo {name}", **more}


def edit(source: str, target: str, **more: Any) -> dict[str, Any]:
    files = {"source": f"images/{source}.png", "target": f"images/{target}.png"}
    return {**files, "instruction": f"make {target}", **more}


# --- what is read -------------------------------------------------------------------------------


def test_records_and_pixels(data: Path, load) -> None:
    rows = [
        caption("a", category="sign", text="OPEN", split="train"),
        caption("b", split="val", subject="bee"),
    ]
    (data / "captions.jsonl").write_text("\ufeff" + lines(*rows).replace("\n", "\r\n") + "\n\n")
    edits = [
        edit("c", "a", category="object", source_caption="photo c", split="train"),
        edit("b", "d", instruction="  add a hat ", split="test", other=[1]),
        edit("a", "c", split="val_pair"),
    ]
    (data / "edits.jsonl").write_text(lines(*edits))
    folder = load()
    first, second = folder.captions
    assert (first.caption, first.category, first.text, first.split) == (
        "photo a",
        "sign",
        "OPEN",
        "train",
    )
    assert (second.category, second.text, second.subject, second.split) == (
        "general",
        None,
        "bee",
        "eval",
    )
    assert [e.instruction for e in folder.edits] == ["make a", "add a hat", "make c"]
    assert [e.split for e in folder.edits] == ["train", "eval", "eval_pair"]
    assert folder.edits[0].source_caption == "photo c"
    for name in "abcd":
        index = folder.files.index(f"images/{name}.png")
        want = crop_and_resize(Image.open(data / "images" / f"{name}.png"), 16)
        assert np.array_equal(folder.pixels([index])[0], np.asarray(want))
    assert folder.edits[1].source_image == folder.files.index("images/b.png")
    assert folder.edits[1].target_image == folder.files.index("images/d.png")
    assert folder.categories("t2i", "train") == {"sign": 1}
    assert folder.categories("edit", "train") == {"object": 1}
    assert folder.categories("edit", "eval_pair") == {"general": 1}
    assert folder.rows("edit", "eval").tolist() == [1]
    assert folder.rows("edit", "eval", "object").tolist() == []


def test_crop_is_centred_and_resize_is_lanczos() -> None:
    wide = Image.fromarray(np.concatenate([np.full((8, 4, 3), v, np.uint8) for v in range(4)], 1))
    assert np.asarray(crop_and_resize(wide, 8))[0, :, 0].tolist() == [1] * 4 + [2] * 4
    tall = wide.rotate(90, expand=True)
    assert np.asarray(crop_and_resize(tall, 8))[:, 0, 0].tolist() == [2] * 4 + [1] * 4
    square = photo(1, (40, 40))
    want = square.resize((16, 16), Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(crop_and_resize(square, 16)), np.asarray(want))


def conversions() -> dict[str, tuple[bytes, np.ndarray, int]]:
    """File content, expected RGB, tolerance."""
    rgb = photo(5, (20, 20))
    array = np.asarray(rgb)
    alpha = np.tile(np.linspace(0, 255, 20).astype(np.uint8), (20, 1))
    rgba = np.dstack([array, alpha])
    share = alpha[..., None] / 255
    on_white = np.rint(array * share + 255 * (1 - share)).astype(np.uint8)
    grey = np.asarray(rgb.convert("L"))
    grey3 = np.repeat(grey[..., None], 3, 2)
    two = Image.fromarray(np.where(array[..., 0] > 127, 1, 0).astype(np.uint8), "P")
    two.putpalette([10, 20, 30, 200, 100, 50])
    flat = np.array([[10, 20, 30], [200, 100, 50]], np.uint8)[np.asarray(two)]
    clear = np.where(np.asarray(two)[..., None] == 1, 255, flat).astype(np.uint8)
    keyed = np.where((array == array[0, 0]).all(-1, keepdims=True), 255, array).astype(np.uint8)
    wide = Image.fromarray(grey.astype(np.uint16) * 257)
    inverted = (255 - np.dstack([array, np.zeros((20, 20), np.uint8)])).astype(np.uint8)
    inverted[..., 3] = 0
    cmyk = Image.fromarray(inverted, "CMYK")
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held sideways: rotate by 90 degrees clockwise
    key = tuple(int(v) for v in array[0, 0])
    grey_alpha = Image.fromarray(np.dstack([grey, alpha]), "LA")
    grey_on_white = np.rint(grey3 * share + 255 * (1 - share)).astype(np.uint8)
    return {
        "RGB": (encoded(rgb), array, 0),
        "RGBA": (encoded(Image.fromarray(rgba)), on_white, 1),
        "RGBA webp": (
            encoded(Image.fromarray(rgba), "WEBP", lossless=True, exact=True),
            on_white,
            1,
        ),
        "LA": (encoded(grey_alpha), grey_on_white, 1),
        "L": (encoded(rgb.convert("L")), grey3, 0),
        "1 bit": (encoded(rgb.convert("1")), np.asarray(rgb.convert("1").convert("RGB")), 0),
        "palette": (encoded(two), flat, 0),
        "palette with transparency": (encoded(two, transparency=1), clear, 0),
        "gif with transparency": (encoded(two, "GIF", transparency=1), clear, 0),
        "RGB with a transparent colour": (encoded(rgb, transparency=key), keyed, 0),
        "16 bit png": (encoded(wide), grey3, 0),
        "16 bit tiff": (encoded(wide, "TIFF"), grey3, 0),
        "CMYK jpeg": (encoded(cmyk, "JPEG", quality=98, subsampling=0), array, 12),
        "CMYK tiff": (encoded(cmyk, "TIFF"), array, 0),
        "jpeg turned by exif": (
            encoded(rgb, "JPEG", quality=98, subsampling=0, exif=turned),
            np.rot90(array, -1),
            12,
        ),
    }


@pytest.mark.parametrize("kind", list(conversions()))
def test_every_kind_of_image_becomes_the_right_rgb(kind: str) -> None:
    content, want, tolerance = conversions()[kind]
    image, what = read_rgb(content)
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image).astype(int) - want).max() <= tolerance
    assert bool(what) == (kind not in ("RGB", "jpeg turned by exif"))


def test_conversions_and_enlargements_are_counted(data: Path, load) -> None:
    photo(0, (24, 24), "L").save(data / "images" / "a.png")
    photo(1, (24, 24), "RGBA").save(data / "images" / "b.png")
    photo(2, (15, 40)).save(data / "images" / "c.png")
    notices = load(16).notices
    assert "1 of 4 images are smaller than 16x16 and were enlarged" in notices
    assert "1 of 4 images were L and converted to RGB" in notices
    assert "1 of 4 images were transparent and laid on white" in notices
    assert load(16).notices == notices  # also when the cache is reused


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row,message",
    [
        ('{"file": "images/a.png", ', r"captions\.jsonl line 2: not valid JSON"),
        ("[1, 2]", r"line 2: not a JSON object"),
        ('{"caption": "x"}', r"line 2: no 'file'; a caption row needs file, caption"),
        ('{"file": "images/a.png"}', r"line 2: no 'caption'"),
        ('{"file": "images/a.png", "caption": ""}', r"line 2: 'caption' is empty"),
        ('{"file": "images/a.png", "caption": " \\n"}', r"line 2: 'caption' is empty"),
        ('{"file": "images/a.png", "caption": null}', r"line 2: 'caption' is null; give a string"),
        ('{"file": 7, "caption": "x"}', r"line 2: 'file' is 7; give a string"),
        ('{"file": "images/a.png", "caption": "photo a"}', r"same file and caption as .* line 1"),
        ('{"file": "images/a.png", "caption": "photo a "}', r"same file and caption"),
        (
            '{"file": "images/e.png", "caption": "x"}',
            r"e\.png does not exist; did you mean images/",
        ),
        ('{"file": "pics/a.png", "caption": "x"}', r"nor does the folder pics"),
        ('{"file": "images", "caption": "x"}', r"line 2: images does not exist"),
        ('{"file": "/etc/passwd", "caption": "x"}', r"give a path relative to the folder"),
        ('{"file": "../data/images/a.png", "caption": "x"}', r"without '\.\.'"),
        ('{"file": "images/a.png", "caption": "x", "catgory": "y"}', r"did you mean 'category'"),
        ('{"file": "images/a.png", "caption": "x", "text": 5}', r"'text' is 5"),
        ('{"file": "images/a.png", "caption": "x", "split": "trian"}', r"split 'trian' is unknown"),
        (
            '{"file": "images/a.png", "caption": "x", "split": "val_pair"}',
            r"is unknown; use one of",
        ),
        ('{"file": "images/a.png", "caption": "x", "split": "val"}', r"1 of 2 rows have no split"),
        ('{"file": "images/a.png", "caption": "\udcff"}', r"line 2: not UTF-8"),
    ],
)
def test_bad_caption_rows(data: Path, load, row: str, message: str) -> None:
    content = lines(caption("a")) + row + "\n"
    (data / "captions.jsonl").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=message) as caught:
        load()
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    "row,message",
    [
        ({"target": "images/b.png", "instruction": "x"}, r"edits\.jsonl line 1: no 'source'"),
        ({"source": "images/b.png", "instruction": "x"}, r"line 1: no 'target'; an edit needs"),
        ({"source": "images/a.png", "target": "images/b.png"}, r"line 1: no 'instruction'"),
        (edit("a", "b", instruction=""), r"'instruction' is empty"),
        (edit("a", "a"), r"source and target are the same image"),
        (
            edit("a", "zebra"),
            r"edits\.jsonl line 1: images/zebra\.png does not exist; add the file",
        ),
        (edit("a", "b", familly="x"), r"did you mean 'family'"),
    ],
)
def test_bad_edit_rows(data: Path, load, row: dict[str, Any], message: str) -> None:
    (data / "edits.jsonl").write_text(lines(row))
    with pytest.raises(DataError, match=message):
        load()


def test_duplicate_edits_are_refused_and_other_instructions_are_not(data: Path, load) -> None:
    (data / "edits.jsonl").write_text(lines(edit("a", "b"), edit("a", "b", instruction="other")))
    assert len(load().edits) == 2
    (data / "edits.jsonl").write_text(lines(edit("a", "b"), edit("a", "b")))
    with pytest.raises(DataError, match=r"line 2: same source, target and instruction as .*line 1"):
        load()


def test_all_problems_are_told_at_once(data: Path, load) -> None:
    rows = [caption(name, caption="") for name in "abcdefghijkl"]
    (data / "captions.jsonl").write_text(lines(*rows))
    with pytest.raises(DataError, match="12 problems") as caught:
        load()
    told = str(caught.value).splitlines()
    assert len(told) == 10 and told[8].endswith(
        "line 8: 'caption' is empty; write one or remove the row"
    )
    assert told[9] == "  and 4 more"


def test_wrong_places(tmp_path: Path, data: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(DataError, match="does not exist"):
        ImageFolder.open(tmp_path / "no", 16, cache_dir=cache)
    with pytest.raises(DataError, match="is a file"):
        ImageFolder.open(data / "captions.jsonl", 16, cache_dir=cache)
    with pytest.raises(DataError, match=r"has no captions\.jsonl.*found: a\.png"):
        ImageFolder.open(data / "images", 16, cache_dir=cache)
    with pytest.raises(DataError, match="inside the data folder"):
        ImageFolder.open(data, 16, cache_dir=data / "cache")
    (tmp_path / "plain").write_text("")
    with pytest.raises(DataError, match="cannot write the cache in"):
        ImageFolder.open(data, 16, cache_dir=tmp_path / "plain" / "cache")
    (data / "captions.jsonl").write_text("\n")
    with pytest.raises(DataError, match="hold no rows"):
        ImageFolder.open(data, 16, cache_dir=cache)
    assert not (data / "cache").exists()


def broken_images() -> dict[str, tuple[bytes, str]]:
    real = photo(3, (64, 64))
    floating = Image.fromarray(np.ones((8, 8), np.float32))
    deep = Image.fromarray(np.full((8, 8), 1 << 20, np.int32))
    return {
        "truncated png": (encoded(real)[:-60], "truncated"),
        "truncated jpeg": (encoded(real, "JPEG")[:-200], "truncated"),
        "truncated webp": (encoded(real, "WEBP")[:-40], "cannot be read"),
        "truncated gif": (encoded(real, "GIF")[:-200], "truncated"),
        "truncated bmp": (encoded(real, "BMP")[:-40], "truncated"),
        "empty": (b"", "no image, or damaged"),
        "text": (b"<html>404</html>", "no image, or damaged; PNG, JPEG"),
        "float tiff": (encoded(floating, "TIFF"), "save it with 8 or 16 bits"),
        "32 bit tiff": (encoded(deep, "TIFF"), "save it with 8 or 16 bits"),
    }


@pytest.mark.parametrize("kind", list(broken_images()))
def test_unreadable_images_are_named_with_their_row(data: Path, load, kind: str, tmp_path) -> None:
    content, message = broken_images()[kind]
    (data / "images" / "c.png").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load()
    assert "1 problem\n  captions.jsonl line 3: images/c.png cannot be read" in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []  # nothing half-built stays behind
    photo(9).save(data / "images" / "c.png")
    assert len(load().files) == 4


@pytest.mark.filterwarnings("ignore:::PIL")  # on odd metadata and enormous sizes
def test_fuzzed_images_raise_only_what_is_caught() -> None:
    rng = random.Random(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    seeds = [encoded(photo(1), kind) for kind in ("PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")]
    seeds += [encoded(photo(1), "JPEG", exif=exif), encoded(photo(1, mode="P"))]
    refused = 0
    for content in seeds:
        for _ in range(150):
            damaged = bytearray(content)
            if rng.random() < 0.4:
                damaged = damaged[: rng.randrange(len(damaged))]
            for _ in range(rng.randrange(1, 20)):
                if damaged:
                    damaged[rng.randrange(min(len(damaged), 400))] = rng.randrange(256)
            try:
                read_rgb(bytes(damaged))
            except UNREADABLE:
                refused += 1
    assert refused > 600


# --- splits -------------------------------------------------------------------------------------


def used(folder: ImageFolder, split: str) -> set[bytes]:
    """Pixels of every image that a split touches."""
    files = {c.image for c in folder.captions if c.split == split}
    files |= {i for e in folder.edits if e.split == split for i in (e.source_image, e.target_image)}
    return {folder.pixels([i]).tobytes() for i in files}


def big_folder(data: Path, seed: int, *, families: int = 30) -> None:
    """Subjects with several views, edits between them, and some across subjects."""
    rng = random.Random(seed)
    captions, edits, names = [], [], []
    for family in range(families):
        views = [f"f{family}v{v}" for v in range(rng.randint(1, 4))]
        for view in views:
            photo(rng.randrange(10**6)).save(data / "images" / f"{view}.png")
            if rng.random() < 0.8:
                captions.append(caption(view, subject=f"subject {family}"))
        names.append(views)
        edits += [edit(a, b) for a in views for b in views if a != b and rng.random() < 0.6]
        if family and rng.random() < 0.2:
            other = rng.choice(names[rng.randrange(family)])
            edits.append(edit(views[0], other, instruction="swap"))
    rng.shuffle(captions)
    (data / "captions.jsonl").write_text(lines(*captions))
    (data / "edits.jsonl").write_text(lines(*edits))


@pytest.mark.parametrize("seed", range(4))
def test_derived_splits_share_no_image_and_no_subject(data: Path, load, seed: int) -> None:
    big_folder(data, seed)
    folder = load(8, eval_fraction=0.3)
    train, held = used(folder, "train"), used(folder, "eval")
    assert train and held and not train & held
    subjects = {
        split: {c.subject for c in folder.captions if c.split == split}
        for split in ("train", "eval")
    }
    assert not subjects["train"] & subjects["eval"]
    for e in folder.edits:  # an edit and the captions of its images are on one side
        for c in folder.captions:
            assert c.file not in (e.source, e.target) or c.split == e.split
    assert len(held) < len(train)


def test_derived_splits_do_not_depend_on_row_order_or_image_size(data: Path, load) -> None:
    big_folder(data, 7)
    before = {c.file: c.split for c in load(8, eval_fraction=0.5).captions}
    for name in ("captions.jsonl", "edits.jsonl"):
        rows = (data / name).read_text().splitlines(keepends=True)
        (data / name).write_text("".join(reversed(rows)))
    assert {c.file: c.split for c in load(8, eval_fraction=0.5).captions} == before
    assert {c.file: c.split for c in load(12, eval_fraction=0.5).captions} == before
    assert set(before.values()) == {"train", "eval"}


def test_a_copy_under_another_name_stays_on_one_side(data: Path, load) -> None:
    copies = [f"copy{i}" for i in range(12)]
    for name in copies:
        photo(0).save(data / "images" / f"{name}.png")
    rows = [caption(name) for name in (*copies, "a", "b", "c", "d")]
    (data / "captions.jsonl").write_text(lines(*rows))
    folder = load(eval_fraction=0.5)
    assert {c.split for c in folder.captions if c.file != "images/b.png"} >= {"train"}
    assert len({c.split for c in folder.captions[:13]}) == 1
    assert any(c.split == "eval" for c in folder.captions)


def test_small_folders_hold_out_one_group_and_say_when_they_cannot(data: Path, load) -> None:
    folder = load(eval_fraction=0.01)
    assert sorted(c.split for c in folder.captions) == ["eval", "train", "train", "train"]
    (data / "captions.jsonl").write_text(lines(*(caption(n, subject="one") for n in "abcd")))
    folder = load()
    assert {c.split for c in folder.captions} == {"train"}
    assert any("nothing is held out" in notice for notice in folder.notices)


@pytest.mark.parametrize(
    "captions,edits,message",
    [
        (
            [caption("a", split="train"), {**caption("a", split="val"), "caption": "again"}],
            [],
            r"jsonl line 2 is evaluation, captions\.jsonl line 1 is training.*images/a\.png",
        ),
        (
            [caption("a", split="train")],
            [edit("b", "a", split="val")],
            r"edits\.jsonl line 1 is evaluation, captions\.jsonl line 1 is training.*images/a\.png",
        ),
        (
            [caption("a", split="eval")],
            [edit("a", "b", split="train")],
            r"captions\.jsonl line 1 is evaluation, edits\.jsonl line 1 is training",
        ),
        (
            [caption("a", split="train", subject="cat"), caption("b", split="test", subject="cat")],
            [],
            r"both have the subject cat; give both one split",
        ),
        (
            [caption("a", split="train", subject="cat")],
            [edit("c", "d", split="val", family="cat")],
            r"both have the subject cat",
        ),
        (
            [caption("a", split="train"), {**caption("twin"), "split": "val"}],
            [],
            r"both have the image images/a\.png = images/twin\.png",
        ),
        (
            [],
            [edit("a", "b", split="train"), edit("a", "b", split="val_pair", instruction="same")],
            r"line 2: this pair is also trained on \(edits\.jsonl line 1\)",
        ),
    ],
)
def test_declared_splits_that_leak_are_refused(data: Path, load, captions, edits, message) -> None:
    photo(0).save(data / "images" / "twin.png")
    (data / "captions.jsonl").write_text(lines(*captions))
    (data / "edits.jsonl").write_text(lines(*edits))
    with pytest.raises(DataError, match=message):
        load()


def test_shared_captions_are_reported(data: Path, load) -> None:
    rows = [
        caption("a", caption="a dog", split="train"),
        caption("b", caption="a dog", split="val"),
        caption("c", split="val"),
    ]
    (data / "captions.jsonl").write_text(lines(*rows))
    assert load().notices == ("1 of 2 evaluation captions are also training captions",)


# --- the pixel cache ----------------------------------------------------------------------------


def counted(load, **options: Any) -> tuple[ImageFolder, int]:
    calls: list[tuple[int, int | None]] = []
    folder = load(progress=lambda done, total: calls.append((done, total)), **options)
    assert calls == [(i + 1, len(folder.files)) for i in range(len(calls))]
    return folder, len(calls)


def test_each_image_is_decoded_once_and_then_never(data: Path, load) -> None:
    (data / "edits.jsonl").write_text(lines(edit("a", "b"), edit("b", "a"), edit("a", "c")))
    first, decoded = counted(load)
    assert decoded == 4
    second, decoded = counted(load)
    assert decoded == 0
    assert np.array_equal(first.pixels(range(4)), second.pixels(range(4)))
    assert first.pixel_digests == second.pixel_digests and len(set(first.pixel_digests)) == 4
    assert counted(load, size=8)[1] == 4


def test_pixels_are_a_copy(load) -> None:
    folder = load()
    folder.pixels([0])[:] = 0
    assert folder.pixels([0]).max() > 0


@pytest.mark.parametrize("keep_times", [False, True])
def test_a_replaced_image_of_equal_size_is_seen(data: Path, load, keep_times: bool) -> None:
    file = data / "images" / "b.png"
    red, blue = (Image.new("RGB", (24, 24), c) for c in ("#ff0000", "#0000ff"))
    red.save(file, "BMP")
    before = file.stat()
    assert load().pixels([1])[0, 0, 0].tolist() == [255, 0, 0]
    blue.save(file, "BMP")
    if keep_times:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert file.stat().st_size == before.st_size
    assert load().pixels([1])[0, 0, 0].tolist() == [0, 0, 255]


def test_folders_with_equal_listings_have_caches_of_their_own(data: Path, load, tmp_path) -> None:
    load()
    other = tmp_path / "other"
    data.rename(other)
    folder = ImageFolder.open(other, 16, cache_dir=tmp_path / "cache")
    assert folder.path == other and len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("damage", ["truncate", "empty index", "no index", "no pixels"])
def test_a_damaged_cache_is_rebuilt_with_a_notice(load, tmp_path, damage: str) -> None:
    want = load().pixels(range(4))
    (cache,) = (tmp_path / "cache").iterdir()
    if damage == "truncate":
        os.truncate(cache / "pixels.u8", 100)
    elif damage == "empty index":
        (cache / "index.json").write_text("")
    else:
        (cache / ("index.json" if damage == "no index" else "pixels.u8")).unlink()
    folder, decoded = counted(load)
    assert decoded == 4 and np.array_equal(folder.pixels(range(4)), want)
    assert any("was damaged and has been built again" in notice for notice in folder.notices)
    assert load().notices == ()


def test_interrupted_build_leaves_nothing(load, tmp_path) -> None:
    def stop(done: int, total: int | None) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(progress=stop)
    assert list((tmp_path / "cache").iterdir()) == []
    assert counted(load)[1] == 4


def test_full_disk_is_a_message_and_leaves_nothing(data: Path, tmp_path) -> None:
    """A limit on file size stands in for the full disk: the same OSError at the same write."""
    code = (
        "import resource, sys; from fewstep.data.folder import ImageFolder\n"
        "from fewstep.errors import DiskError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "try: ImageFolder.open(sys.argv[1], 64, cache_dir=sys.argv[2])\n"
        "except DiskError as error: print(error); sys.exit(error.exit_code)\n"
    )
    assert resource.RLIMIT_FSIZE is not None
    done = subprocess.run(
        [sys.executable, "-c", code, str(data), str(tmp_path / "cache")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 6, done.stderr
    assert (
        "no room for the cache in" in done.stdout and "choose another cache folder" in done.stdout
    )
    assert list((tmp_path / "cache").iterdir()) == []


# --- shards -------------------------------------------------------------------------------------


def write_shard(file: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(file, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def meta(**values: Any) -> bytes:
    return json.dumps(values).encode()


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    pytest.importorskip("webdataset")
    folder = tmp_path / "shards"
    folder.mkdir()
    return folder


def open_shards(shards: Path, tmp_path: Path, **options: Any) -> ImageFolder:
    return ImageFolder.open(shards, 16, cache_dir=tmp_path / "cache", **options)


def test_shards_give_the_same_records_as_a_folder(data: Path, load, shards: Path, tmp_path) -> None:
    (data / "captions.jsonl").write_text(
        lines(
            caption("a", category="x", split="train"),
            caption("b", split="val"),
            caption("c", split="train", text="HI"),
        )
    )
    (data / "edits.jsonl").write_text(lines(edit("a", "c", category="y", split="train")))
    png = {name: (data / "images" / f"{name}.png").read_bytes() for name in "abcd"}
    pair = meta(instruction="pair", split="val", family="f")
    write_shard(
        shards / "s0.tar",
        [
            ("a.png", png["a"]),
            ("a.json", meta(caption="photo a", category="x", split="train")),
            ("b.PNG", png["b"]),
            ("b.json", meta(split="val")),
            ("b.txt", b"photo b"),
        ],
    )
    write_shard(
        shards / "s1.tar",
        [
            ("c.json", meta(caption="photo c", text="HI", split="train", source="a",
                            instruction="make c", category="y")),
            ("c.png", png["c"]),
            ("p.source.webp", encoded(photo(8), "WEBP", lossless=True)),
            ("p.target.jpg", encoded(photo(9), "JPEG", quality=95)),
            ("p.json", pair),
        ],
    )  # fmt: skip
    want, got = load(), open_shards(shards, tmp_path)
    assert [c.caption for c in got.captions] == [c.caption for c in want.captions]
    assert [c.split for c in got.captions] == ["train", "eval", "train"]
    assert [c.text for c in got.captions] == [None, None, "HI"]
    assert np.array_equal(
        got.pixels([c.image for c in got.captions]), want.pixels([c.image for c in want.captions])
    )
    paired, keyed = got.edits
    assert (paired.instruction, paired.split) == ("pair", "eval")
    exact = np.asarray(crop_and_resize(photo(8), 16))
    assert np.array_equal(got.pixels([paired.source_image])[0], exact)
    assert (keyed.source, keyed.target, keyed.instruction, keyed.category) == (
        "s0.tar/a.png", "s1.tar/c.png", "make c", "y",
    )  # fmt: skip
    again = open_shards(shards, tmp_path, progress=lambda *_: pytest.fail("decoded twice"))
    assert again.captions == got.captions and again.edits == got.edits


@pytest.mark.parametrize(
    "members,message",
    [
        (
            [("a.png", b"no"), ("a.json", meta(caption="x"))],
            r"s\.tar sample a: s\.tar/a\.png cannot",
        ),
        ([("a.png", None), ("a.json", meta(caption=" "))], r"sample a: 'caption' is empty"),
        ([("a.png", None)], r"sample a: no 'caption'"),
        ([("a.json", meta(caption="x"))], r"sample a: holds json; a sample is one image"),
        (
            [("a.png", None), ("a.jpg", None), ("a.json", meta(caption="x"))],
            r"holds jpg, json, png",
        ),
        ([("a.source.png", None), ("a.json", meta(instruction="x"))], r"holds json, source\.png"),
        ([("a.png", None), ("a.json", b"{")], r"its json or txt is unreadable"),
        ([("a.png", None), ("a.json", b"[]")], r"its json is not an object"),
        (
            [("a.png", None), ("a.json", meta(instruction="x", source="z"))],
            r"'source' is 'z'; give",
        ),
        ([("a.png", None), ("a.json", meta(instruction="x"))], r"'source' is None; give the key"),
        ([("a.png", None), ("a.json", meta(caption="x")), ("a.cls", b"3")], r"'\.cls' is not read"),
        ([("a.source.png", None), ("a.target.png", None), ("a.json", meta())], r"no 'instruction'"),
        (
            [
                ("a.png", None),
                ("a.json", meta(caption="x")),
                ("b.png", None),
                ("b.json", meta(caption="x")),
                ("a.png", None),
            ],
            r"sample a: the key occurs twice",
        ),
        ([], r"hold no samples"),
    ],
)
def test_bad_shards(shards: Path, tmp_path, members, message: str) -> None:
    content = [(n, encoded(photo(i)) if c is None else c) for i, (n, c) in enumerate(members)]
    write_shard(shards / "s.tar", content)
    with pytest.raises(DataError, match=message):
        open_shards(shards, tmp_path)


def test_truncated_shards_are_refused_wherever_they_are_cut(shards: Path, tmp_path) -> None:
    members = []
    for i in range(3):
        members += [(f"{i}.png", encoded(photo(i))), (f"{i}.json", meta(caption=f"photo {i}"))]
    file = shards / "s.tar"
    write_shard(file, members)
    whole = file.read_bytes()
    assert len(open_shards(shards, tmp_path).captions) == 3
    with tarfile.open(file) as tar:
        boundaries = [member.offset for member in tar.getmembers()]
    for cut in (*boundaries[1:], boundaries[3] + 100, boundaries[3] + 600, 10):
        file.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"s\.tar is truncated"):
            open_shards(shards, tmp_path)
    file.write_bytes(whole[: boundaries[2] + 700] + bytes(1024))
    with pytest.raises(DataError, match=r"s\.tar cannot be read|sample 1"):
        open_shards(shards, tmp_path)


def test_shards_beside_lists_are_refused(data: Path, load) -> None:
    write_shard(data / "s.tar", [])
    with pytest.raises(DataError, match=r"both captions\.jsonl and s\.tar"):
        load()


def test_missing_webdataset_names_the_extra(shards: Path, tmp_path, monkeypatch) -> None:
    write_shard(shards / "s.tar", [])
    monkeypatch.setitem(sys.modules, "webdataset", None)
    monkeypatch.delitem(sys.modules, "webdataset.tariterators", raising=False)
    with pytest.raises(DataError, match=r"pip install 'fewstep\[data\]'"):
        open_shards(shards, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not EMOJI.exists(), reason="set FEWSTEP_TEST_EMOJI")
def test_the_emoji_set_opens_without_leaks(tmp_path: Path) -> None:
    folder = ImageFolder.open(EMOJI, 32, cache_dir=tmp_path)
    assert (len(folder.captions), len(folder.edits), folder.notices) == (3145, 16530, ())
    assert sum(folder.categories("edit", "eval_pair").values()) == 453
    assert not used(folder, "train") & used(folder, "eval")
