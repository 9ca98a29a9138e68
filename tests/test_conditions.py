"""The condition cache: what comes out is what the encoders gave, and nothing stale is ever used."""

import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from fewstep.commands.cache import cache as run_cache
from fewstep.commands.cache import size
from fewstep.data import conditions, tensorstore
from fewstep.data.conditions import Encoding, Filled
from fewstep.data.memo import Memo
from fewstep.data.tensorstore import Entry, TensorStore
from fewstep.errors import DataError, DiskError, RecipeError
from fewstep.models.families import encoders
from fewstep.models.families.contract import FamilyCondition, Text, stack
from fewstep.models.families.encoders import (
    code_identity,
    open_encoders,
    part_sizes,
    weights_identity,
)
from fewstep.models.families.open import FAMILIES
from tests.families import fixtures
from tests.families.conftest import small_sources  # noqa: F401  an autouse fixture
from tests.families.fixtures import CASES, LONG, SHORT, SIZE
from tests.families.folders import write_prompts
from tests.stub_family import ENCODING, PROMPTS, Ask, Counting, Picture, fill, store_in

# --- what comes out is what went in ---------------------------------------------------------------


def asked_of(name: str) -> list[Ask]:
    """Unequal prompts; edits with two sources of different shape, and with the second alone."""
    pictures = tuple(Picture(f"{i}.png", image) for i, image in enumerate(CASES[name].images()))
    if not pictures:
        return [Ask(SHORT), Ask(LONG)]
    return [Ask(LONG, pictures), Ask(SHORT, pictures), Ask(SHORT, pictures[1:])]


def direct(family: Any, ask: Ask) -> FamilyCondition:
    images = [picture.image for picture in ask.sources]
    return family.encode([ask.prompt], images, size=SIZE, negative="blue")


def tensors_of(cond: FamilyCondition) -> dict[str, Tensor | None]:
    found: dict[str, Tensor | None] = {"source": cond.source}
    for branch in ("text", "negative"):
        text = getattr(cond, branch)
        found |= {f"{branch}.{f.name}": getattr(text, f.name) for f in fields(Text)}
    return found


def same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("sana", "qwen_image_edit_2509")])
def test_conditions_come_back_bit_for_bit(tmp_path, name) -> None:
    family, asked = fixtures.family(name), asked_of(name)
    encoding = replace(ENCODING, family=type(family.pipe).__name__, size=SIZE, negative="blue")
    filled = store_in(tmp_path, encoding).fill(asked, lambda: family)
    assert filled[:2] == (len(asked), 0)
    store = store_in(tmp_path, encoding)
    for ask in asked:
        expected, got = direct(family, ask), store.take([ask])
        assert (got.size, got.source_sizes) == (expected.size, expected.source_sizes)
        assert got.layout == expected.layout == store.layout(ask)
        for part, tensor in tensors_of(stack([expected])).items():
            assert same(tensors_of(got)[part], tensor), part


@pytest.mark.parametrize("name", ["qwen_image", "qwen_image_edit", "z_image", "flux2_klein_edit"])
def test_a_batch_is_what_stack_makes_of_direct_conditions(tmp_path, name) -> None:
    """Unequal prompts, in another order than they were encoded in, and one of them twice."""
    family, asked = fixtures.family(name), asked_of(name)[:2]
    encoding = replace(ENCODING, family=type(family.pipe).__name__, size=SIZE, negative="blue")
    store_in(tmp_path, encoding).fill(asked, lambda: family)
    batch = [asked[1], asked[0], asked[1]]
    got = store_in(tmp_path, encoding).take(batch)
    expected = stack([direct(family, ask) for ask in batch])
    assert got.layout == expected.layout and len(got) == 3
    for part, tensor in tensors_of(expected).items():
        assert same(tensors_of(got)[part], tensor), part
    together = family.encode(
        [ask.prompt for ask in batch],
        [picture.image for picture in batch[0].sources],
        size=SIZE,
        negative="blue",
    )
    assert fixtures.apart(got.text.states, together.text.states) <= 2e-6


def test_bfloat16_comes_back_as_it_was(tmp_path) -> None:
    family = fixtures.family("qwen_image", torch.bfloat16)
    encoding = replace(ENCODING, dtype="bfloat16", size=SIZE, negative=None)
    store_in(tmp_path, encoding).fill([Ask(LONG)], lambda: family)
    got = store_in(tmp_path, encoding).take([Ask(LONG)])
    assert got.negative is None
    assert same(got.text.states, family.encode([LONG], size=SIZE, negative=None).text.states)


def test_sana_reads_nothing_of_the_padding_that_is_not_stored(tmp_path) -> None:
    """Its encoder fills 300 positions; what the mask hides is stored as nothing, read as zeros."""
    family, ask = fixtures.family("sana"), Ask(LONG)
    encoding = replace(ENCODING, family="SanaPipeline", size=SIZE, negative="blue")
    store = store_in(tmp_path, encoding)
    store.fill([ask], lambda: family)
    got, expected = store.take([ask]), direct(family, ask)
    assert same(got.text.mask, expected.text.mask)
    mask = expected.text.mask
    assert (
        mask is not None and expected.text.states[~mask].any() and not got.text.states[~mask].any()
    )
    stored = store.tensors.index[store.keys(ask)[0]]
    assert stored.nbytes == mask.sum() * 16 * 4
    x, t = fixtures.noise("sana")[:1], torch.tensor([0.7])
    for a, b in ((got, expected), (got.without_text(), expected.without_text())):
        with torch.no_grad():
            assert torch.equal(family.velocity(x, t, a), family.velocity(x, t, b))


def test_every_part_of_a_condition_is_known_to_the_store() -> None:
    """A new field of the contract has to be stored, or it would be lost without a word."""
    assert {f.name for f in fields(Text)} == {"states", "mask", "pooled", "slots", "prefix"}
    named = {"text", "negative", "size", "source", "source_sizes"}
    assert {f.name for f in fields(FamilyCondition)} == named


def test_a_batch_is_a_copy(tmp_path) -> None:
    fill(tmp_path, PROMPTS[:1])
    store = store_in(tmp_path)
    store.take(PROMPTS[:1]).text.states.zero_()
    assert store.take(PROMPTS[:1]).text.states.all()


# --- equal parts are stored once ------------------------------------------------------------------


def test_the_negative_branch_is_encoded_and_stored_once(tmp_path) -> None:
    store, family = store_in(tmp_path), Counting()
    store.fill(PROMPTS, lambda: family)
    assert family.negatives == 1 and len(store.tensors) == len(PROMPTS) + 1
    assert not store_in(tmp_path, replace(ENCODING, negative=None)).missing(PROMPTS)


def test_edits_share_sources_and_each_source_has_its_negative(tmp_path) -> None:
    red, blue = (Picture(c, Image.new("RGB", (8, 8), c)) for c in ("red", "blue"))
    asked = [Ask("a", (red,)), Ask("b", (red,)), Ask("a", (blue,)), Ask("a", (red, blue))]
    store, family = store_in(tmp_path), Counting()
    assert store.fill([*asked, asked[0]], lambda: family)[:2] == (4, 1)
    assert family.encoded == ["a", "b", "a", "a"] and family.negatives == 3
    assert len(store.tensors) == 4 + 3 + 3
    assert not store.missing([Ask("a", (Picture("another name", red.image),))])
    assert len(store.missing([Ask("a", (blue, red))])) == 1


# --- nothing stale is used ------------------------------------------------------------------------


def test_a_changed_prompt_is_the_only_one_encoded_again(tmp_path) -> None:
    assert len(fill(tmp_path, PROMPTS)) == 12
    changed = [*PROMPTS[:5], Ask("another"), *PROMPTS[6:]]
    assert fill(tmp_path, changed) == ["another"]
    assert fill(tmp_path, changed) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("family", "ZImagePipeline"),
        ("weights", "weights-2"),
        ("code", "code-2"),
        ("size", (96, 64)),
        ("dtype", "bfloat16"),
    ],
)
def test_another_encoding_is_encoded_again(tmp_path, field, value) -> None:
    fill(tmp_path, PROMPTS)
    assert len(store_in(tmp_path, replace(ENCODING, **{field: value})).missing(PROMPTS)) == 12


def test_other_code_of_ours_encodes_again(tmp_path, monkeypatch) -> None:
    """The parts of a condition, and the layout of a shard."""
    fill(tmp_path, PROMPTS)
    with monkeypatch.context() as later:
        later.setattr(conditions, "ENCODING_VERSION", conditions.ENCODING_VERSION + 1)
        assert len(store_in(tmp_path).missing(PROMPTS)) == 12
    assert not store_in(tmp_path).missing(PROMPTS)
    monkeypatch.setattr(tensorstore, "STORE_VERSION", tensorstore.STORE_VERSION + 1)
    store = store_in(tmp_path)
    assert len(store.missing(PROMPTS)) == 12 and store.tensors.damaged == shards(tmp_path)


def test_parts_of_different_kinds_never_share_a_key(tmp_path) -> None:
    """The same words as prompt and as negative prompt, the same image as source and as target."""
    red = Picture("red.png", Image.new("RGB", (8, 8), "red"))
    store = store_in(tmp_path, replace(ENCODING, negative="x"))
    keys = store.keys(Ask("x", (red,), red))
    assert len(keys) == len(set(keys)) == 4


def test_another_negative_prompt_is_added_and_the_prompts_stay(tmp_path) -> None:
    fill(tmp_path, PROMPTS)
    other = replace(ENCODING, negative="blurred")
    store, family = store_in(tmp_path, other), Counting()
    before = set(store.tensors.index)
    store.fill(PROMPTS, lambda: family)
    assert len(set(store.tensors.index) - before) == 1
    assert family.encoded == ["prompt number 0"] and family.negatives == 1
    expected = Counting().text("blurred", ())
    assert torch.equal(store.take(PROMPTS[:1]).without_text().text.states, expected.states)


def tiny_folder(folder: Path) -> Path:
    """The files of a pipeline, as far as an identity goes."""
    index = {"_class_name": "QwenImagePipeline"}
    for part in ("scheduler", "text_encoder", "tokenizer", "transformer", "vae"):
        index |= {part: ["diffusers", part]}
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(part)
    (folder / "text_encoder" / "model.safetensors").write_bytes(b"1" * 100)
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_the_identity_of_the_weights_is_that_of_all_encoder_files(tmp_path) -> None:
    folder, memo = tiny_folder(tmp_path / "m"), Memo(tmp_path / "memo.json")
    first = weights_identity(folder, memo.get)
    memo.save()
    read: list[Path] = []

    def watched(file: Path, question: str, find_out: Any) -> Any:
        return Memo(tmp_path / "memo.json").get(file, question, lambda: read.append(file))

    weights_identity(folder, watched)
    assert not read, "remembered hashes were computed again"
    changes = ["text_encoder/model.safetensors", "tokenizer/config.json", "vae/config.json"]
    for name in changes:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1] + b"2")
        assert weights_identity(folder, memo.get) != first, name
        (folder / name).write_bytes(content)
        assert weights_identity(folder, memo.get) == first, name
    (folder / "vae" / "more.json").write_text("{}")
    assert weights_identity(folder, memo.get) != first
    (folder / "vae" / "more.json").unlink()
    (folder / "transformer" / "config.json").write_text("another network")
    (folder / "scheduler" / "config.json").write_text("another grid")
    assert weights_identity(folder, memo.get) == first
    (folder / "model_index.json").write_text(
        (folder / "model_index.json").read_text().replace('"diffusers", "vae"', '"own", "vae"')
    )
    assert weights_identity(folder, memo.get) != first


def test_the_identity_of_the_code_follows_the_code(tmp_path, monkeypatch) -> None:
    """Comments, docstrings and layout may change; code and packages may not."""
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "some_family.py"

    def identity(source: str) -> str:
        file.write_text(source)
        return code_identity("SomePipeline")

    code = 'def make(pipe):\n    """Doc."""\n    return pipe, 1\n'
    file.write_text(code)
    import some_family  # pyright: ignore[reportMissingImports]

    monkeypatch.setitem(FAMILIES, "SomePipeline", some_family.make)
    first = identity(code)
    assert identity("# a remark\n" + code.replace("Doc", "Other").replace(", 1", ",  1")) == first
    assert identity(code.replace("1", "2")) != first
    helper = "from fewstep.models.families.spatial import latent_shape\n"
    assert identity(helper + code) != first
    assert identity(code) == first
    monkeypatch.setattr(encoders, "PACKAGES", ("diffusers", "transformers"))
    assert identity(code) != first


def test_the_helpers_that_a_family_imports_count_as_its_code() -> None:
    """Qwen-Image 2.1 takes its latent statistics from qwen_image.py."""
    assert code_identity("QwenImagePipeline") == code_identity("QwenImageEditPlusPipeline")
    names = {name: code_identity(name) for name in FAMILIES}
    assert len(set(names.values())) == len(FAMILIES) - 1


# --- interruptions and damage ---------------------------------------------------------------------

KILLED = """
import os, signal, sys
from tests.stub_family import Counting, PROMPTS, store_in
from pathlib import Path

def progress(done, total):
    if done == 9:
        os.kill(os.getpid(), signal.SIGKILL)

store_in(Path(sys.argv[1])).fill(PROMPTS, Counting, progress=progress, shard_bytes=2000)
"""


def test_a_killed_run_goes_on_where_it_was(tmp_path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    kept = 12 - len(store_in(tmp_path).missing(PROMPTS))
    assert 4 <= kept < 9, "whole shards are kept, and the one in the making is not"
    assert fill(tmp_path, PROMPTS) == [ask.prompt for ask in PROMPTS[kept:]]
    assert store_in(tmp_path).take(PROMPTS[:1]).text.states.shape[1] == len(PROMPTS[0].prompt)


@pytest.mark.parametrize("error", [KeyboardInterrupt, DataError])
def test_what_was_encoded_before_an_error_is_kept(tmp_path, error) -> None:
    def progress(done: int, total: int) -> None:
        if done == 7:
            raise error("stop")

    with pytest.raises(error):
        fill(tmp_path, PROMPTS, progress=progress, shard_bytes=2000)
    assert fill(tmp_path, PROMPTS) == [ask.prompt for ask in PROMPTS[7:]]


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*"))


@pytest.mark.parametrize("cut", [3, 300, -1])
def test_only_the_prompts_of_a_truncated_shard_are_encoded_again(tmp_path, cut) -> None:
    fill(tmp_path, PROMPTS, shard_bytes=2000)
    assert len(shards(tmp_path)) >= 4
    broken = shards(tmp_path)[1]
    inside = {stored.info["about"] for stored in TensorStore(tmp_path).index.values()}
    broken.write_bytes(broken.read_bytes()[:cut])
    store = store_in(tmp_path)
    assert store.tensors.damaged == [broken]
    rest = {stored.info["about"] for stored in store.tensors.index.values()}
    lost = [ask.prompt for ask in PROMPTS if ask.prompt in inside - rest]
    assert lost and fill(tmp_path, PROMPTS) == lost
    assert not TensorStore(tmp_path).damaged and not store_in(tmp_path).missing(PROMPTS)


def test_verify_finds_a_flipped_bit_that_a_header_does_not_show(tmp_path) -> None:
    fill(tmp_path, PROMPTS, shard_bytes=2000)
    broken = shards(tmp_path)[2]
    content = bytearray(broken.read_bytes())
    content[-5] ^= 64
    broken.write_bytes(content)
    store, family = store_in(tmp_path), Counting()
    assert not store.missing(PROMPTS) and not store.tensors.damaged
    assert store.tensors.verify() == [broken]
    rest = {stored.info["about"] for stored in store.tensors.index.values()}
    lost = [ask.prompt for ask in PROMPTS if ask.prompt not in rest]
    store.fill(PROMPTS, lambda: family)
    assert lost and family.encoded == lost
    assert store_in(tmp_path).tensors.verify() == []


def test_what_verify_sets_aside_never_comes_back(tmp_path) -> None:
    """Though what is encoded again is cut into other shards, and the bad one may sort last."""
    fill(tmp_path, PROMPTS, shard_bytes=2000)
    for broken in shards(tmp_path):
        content = bytearray(broken.read_bytes())
        content[-5] ^= 64
        broken.write_bytes(content)
    store = store_in(tmp_path)
    bad = store.tensors.verify()
    assert bad == shards(tmp_path)
    store.fill(PROMPTS, Counting)
    assert not set(bad) & set(shards(tmp_path)) and store_in(tmp_path).tensors.verify() == []
    assert not store_in(tmp_path).missing(PROMPTS)


def test_a_full_disk_is_a_message_and_leaves_nothing_half_written(tmp_path) -> None:
    """A limit on file size stands in for the full disk: the same OSError at the same write."""
    fill(tmp_path, PROMPTS[:3])
    before = sorted(tmp_path.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        with pytest.raises(DiskError, match=r"no room for the cache in .*File too large"):
            fill(tmp_path, PROMPTS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert sorted(tmp_path.iterdir()) == before
    assert fill(tmp_path, PROMPTS) == [ask.prompt for ask in PROMPTS[3:]]


def test_values_that_are_not_finite_are_refused(tmp_path) -> None:
    family = Counting()
    family.text = lambda prompt, images: Text(torch.full((1, 2, 8), torch.inf))
    with pytest.raises(DataError, match="not finite for 'prompt number 0'"):
        store_in(tmp_path).fill(PROMPTS, lambda: family)
    assert not shards(tmp_path)


# --- reading --------------------------------------------------------------------------------------


def test_what_is_not_there_is_named(tmp_path) -> None:
    fill(tmp_path, PROMPTS[:1])
    with pytest.raises(DataError, match="'prompt number 1!' is not in the condition cache"):
        store_in(tmp_path).take(PROMPTS[:2])
    with pytest.raises(DataError, match="is not in the condition cache"):
        store_in(tmp_path).layout(PROMPTS[1])


def test_different_layouts_do_not_share_a_batch(tmp_path) -> None:
    """Prompts of Qwen-Image 2.1 with unequal numbers of tokens."""
    family, asked = fixtures.family("qwen_image_21"), [Ask(SHORT), Ask(LONG)]
    encoding = replace(ENCODING, family="QwenImage21Pipeline", size=SIZE)
    store = store_in(tmp_path, encoding)
    store.fill(asked, lambda: family)
    assert store.layout(asked[0]) != store.layout(asked[1])
    with pytest.raises(DataError, match="different layout cannot share a batch"):
        store.take(asked)


def resident() -> int:
    """Bytes of this process in memory, pages of mapped files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_reading_a_few_entries_does_not_load_the_rest(tmp_path) -> None:
    """16 shards of 4 MiB with 16 entries each; eight entries of two shards are read."""
    store = TensorStore(tmp_path)
    with store.writing(shard_bytes=4 * 2**20) as writer:
        for i in range(256):
            writer.put(f"k{i}", Entry({"states": torch.full((65536,), float(i))}))
    assert len(shards(tmp_path)) == 16
    del store, writer
    before = resident()
    store = TensorStore(tmp_path)
    got = [store.read(f"k{i}").tensors["states"].sum().item() for i in range(0, 32, 4)]
    assert got == [65536.0 * i for i in range(0, 32, 4)]
    assert resident() - before < 12 * 2**20, "64 MiB are on disk"


# --- unused entries -------------------------------------------------------------------------------


def test_prune_deletes_what_is_unused_and_keeps_the_rest_as_it_was(tmp_path) -> None:
    fill(tmp_path, PROMPTS, shard_bytes=2000)
    (tmp_path / "shard-cut.safetensors").write_bytes(b"1")
    store = store_in(tmp_path)
    kept, gone = PROMPTS[::3], [ask for i, ask in enumerate(PROMPTS) if i % 3]
    expected = store.take(kept).text.states
    keep = {key for ask in kept for key in store.keys(ask)}
    unused = store.tensors.unused(keep)
    assert {stored.info["about"] for stored in unused.values()} == {ask.prompt for ask in gone}
    before = sum(shard.stat().st_size for shard in shards(tmp_path))
    freed = store.tensors.prune(keep, shard_bytes=2000)
    assert freed == sum(len(ask.prompt) * 8 * 4 for ask in gone)
    assert sum(shard.stat().st_size for shard in shards(tmp_path)) < before - freed
    for reader in (store, store_in(tmp_path)):
        assert set(reader.tensors.index) == keep and not reader.tensors.damaged
        assert torch.equal(reader.take(kept).text.states, expected)
    assert fill(tmp_path, PROMPTS) == [ask.prompt for ask in gone]


def test_prune_leaves_alone_what_another_process_has_added_since(tmp_path) -> None:
    parts = PROMPTS[:4], PROMPTS[4:]
    fill(tmp_path, parts[0])
    store = store_in(tmp_path)
    fill(tmp_path, parts[1])
    first, second = ({k for ask in part for k in store.keys(ask)} for part in parts)
    assert store.tensors.prune(set()) > 0
    assert set(store_in(tmp_path).tensors.index) == second - first


def test_prune_leaves_shards_alone_that_are_used_throughout(tmp_path) -> None:
    fill(tmp_path, PROMPTS, shard_bytes=2000)
    before = {shard: shard.stat().st_mtime_ns for shard in shards(tmp_path)}
    store = store_in(tmp_path)
    assert store.tensors.prune({key for ask in PROMPTS for key in store.keys(ask)}) == 0
    assert {shard: shard.stat().st_mtime_ns for shard in shards(tmp_path)} == before


# --- the encoders without their network -----------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines") / "qwen_image"
    fixtures.pipeline("qwen_image").save_pretrained(folder)
    return folder


def test_encoders_open_without_the_weights_of_the_network(saved, tmp_path) -> None:
    for file in (saved / "transformer").glob("*.safetensors"):
        file.rename(tmp_path / file.name)
    try:
        family = open_encoders(saved)
    finally:
        for file in tmp_path.iterdir():
            file.rename(saved / "transformer" / file.name)
    assert sum(p.numel() for p in family.pipe.transformer.parameters()) == 1
    expected = fixtures.family("qwen_image").encode([LONG], size=SIZE)
    assert torch.equal(family.encode([LONG], size=SIZE).text.states, expected.text.states)


def test_a_saved_pipeline_is_cached_from_its_folder(saved, tmp_path) -> None:
    memo = Memo()
    encoding = Encoding.of(saved, size=SIZE, dtype=torch.float32, negative=" ", memo=memo)
    store = store_in(tmp_path, encoding)
    asked = [Ask(SHORT), Ask(LONG), Ask("the blue objects")]
    sizes = part_sizes(saved, torch.float32)
    expected = sum(store.estimate(asked, sizes).values())
    filled = store.fill(asked, lambda: open_encoders(saved))
    assert filled == Filled(3, 0, sum(s.nbytes for s in store.tensors.index.values()))
    assert 0.5 < expected / filled.nbytes < 2
    assert not store.estimate(asked, sizes)
    again = Encoding.of(saved, size=SIZE, dtype=torch.float32, negative=" ", memo=memo)
    assert not store_in(tmp_path, again).missing(asked)


def test_the_estimate_counts_texts_negatives_and_sources(tmp_path) -> None:
    """By hand, for an edit of two sources with two instructions, in the sizes of the real model."""
    sizes = encoders.PartSizes(token=3584 * 2, length=None, source_tokens=188, source=4096 * 64 * 2)
    a, b = (Picture(c, Image.new("RGB", (8, 8), c)) for c in ("red", "blue"))
    store = store_in(tmp_path, replace(ENCODING, negative=""))
    asked = [Ask("x" * 40, (a, b)), Ask("y" * 80, (a, b)), Ask("x" * 40, (a, b))]
    text = 3584 * 2 * ((10 + 6) + (20 + 6) + 6 + 3 * 2 * 188)
    assert sum(store.estimate(asked, sizes).values()) == text + 2 * 4096 * 64 * 2


# --- the command ----------------------------------------------------------------------------------

RECIPE = """
name: cached
precision: fp32
model: {{family: qwen_image, path: {model}, size: [64, 96]}}
teachers:
  base: {{weights: base, tasks: [t2i], cfg: {{t2i: 4}}, steps: 4}}
student: {{init: base}}
data:
  source: {{kind: prompts, path: {prompts}, cache: {cache}}}
  pools:
    scene: {{task: t2i, category: scene, size: 3}}
    text: {{task: t2i, category: text, size: 3}}
  composition: {{t2i: {{scene: 1, text: 1}}}}
  mixture: {{t2i: 1}}
guidance: [{{weights: [{{base: 1}}]}}]
objective: {{kind: dmd}}
budget: {{updates: 2, batch: 2, micro_batch: 2}}
evaluation: {{per_category: 1, models: [student]}}
"""


def cache_command(recipe: Path, capsys: Any, **asked: bool) -> str:
    flags = {"verify": False, "prune": False, "dry_run": False} | asked
    capsys.readouterr()
    run_cache(recipe, overrides={}, **flags)
    return capsys.readouterr().out


@pytest.mark.slow
def test_the_command_encodes_reuses_prunes_and_tells(saved, tmp_path, capsys) -> None:
    prompts = write_prompts(tmp_path / "prompts", edits=False)
    cache, recipe = tmp_path / "cache", tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=saved, prompts=prompts, cache=cache))
    told = cache_command(recipe, capsys, dry_run=True)
    assert "9 texts and images are wanted, 0 are in" in told
    assert "QwenImagePipeline: 64 bytes a text token" in told and "9 would be encoded" in told
    assert not shards(cache / "conditions")
    told = cache_command(recipe, capsys)
    store = TensorStore(cache / "conditions")
    written = size(sum(stored.nbytes for stored in store.index.values()))
    assert f"9 encoded, 0 reused, {written} written" in told and len(store) == 9
    lists = (prompts / "captions.jsonl").read_text()
    (prompts / "captions.jsonl").write_text(lists.replace("the moon outside", "the sun outside"))
    assert "1 encoded, 8 reused" in cache_command(recipe, capsys)
    index = TensorStore(cache / "conditions").index
    (broken,) = (s.shard for s in index.values() if s.info["about"] == "the sun outside")
    content = bytearray(broken.read_bytes())
    content[-1] ^= 1
    broken.write_bytes(content)
    told = cache_command(recipe, capsys, verify=True)
    assert f"{broken} is damaged" in told and "1 encoded, 8 reused" in told
    told = cache_command(recipe, capsys, prune=True, dry_run=True)
    assert "1 entries" in told and "the moon outside" in told
    assert len(TensorStore(cache / "conditions")) == 10
    assert "set free" in cache_command(recipe, capsys, prune=True)
    assert len(TensorStore(cache / "conditions")) == 9
    assert "9 texts and images are wanted, 9 are in" in cache_command(recipe, capsys)


def test_the_command_is_for_real_models() -> None:
    with pytest.raises(RecipeError, match=r"model\.family: there is nothing to encode beforehand"):
        run_cache(
            Path("recipes/lab/unified.yaml"), overrides={}, verify=False, prune=False, dry_run=False
        )


def test_sizes_are_readable() -> None:
    assert [size(n) for n in (0, 999, 1000, 12_345_678, 5e15)] == [
        "0 bytes",
        "999 bytes",
        "1 kB",
        "12.3 MB",
        "5e+03 TB",
    ]
