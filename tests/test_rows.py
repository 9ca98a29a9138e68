"""The evaluation's log survives a kill at any byte, and refuses what it cannot vouch for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from fewstep.errors import DataError, DiskError, FewstepError
from fewstep.evals.rows import Row, RowKey, RowWriter, read_rows


def make_row(**changes) -> Row:
    fields = {
        "model": "teacher-80nfe",
        "nfe": 80,
        "task": "t2i",
        "category": "portrait",
        "case": "t2i-portrait-0007",
        "prompt": 'a face, "sad"\nred hair – ü',
        "seed": 7,
        "image": "images/teacher-80nfe/t2i-portrait-0007.png",
        "score": 4.31,
        "subscores": {"compliance": 4.5},
        "reasons": ["hair: wanted red, read brown"],
        "status": "ok",
        "seconds": 0.21,
        "judge": "lab-oracle-1",
    }
    return Row(**(fields | changes))


def write(path: Path, *rows: Row) -> None:
    with RowWriter(path) as log:
        for row in rows:
            log.write(row)


def test_rows_come_back_equal_and_in_order(tmp_path):
    path = tmp_path / "eval" / "rows.jsonl"
    rows = [make_row(seed=seed, score=1 + seed / 3) for seed in (2, 0, 1)]
    write(path, *rows[:1])
    write(path, *rows[1:])
    assert read_rows(path) == (tuple(rows), 0, None)
    assert path.read_bytes().count(b"\n") == 3


def test_the_documented_row_is_accepted(tmp_path):
    line = {
        "model": "teacher-80nfe", "nfe": 80, "task": "t2i", "category": "portrait",
        "case": "t2i-portrait-0007", "prompt": "a face", "seed": 7, "image": "images/a.png",
        "source": None, "target": None, "score": 4.31, "subscores": {"quality": 4.1},
        "reasons": [], "status": "ok", "seconds": 0.21, "judge": "lab-oracle-1",
        "content": "0123456789abcdef",
    }  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(line) + "\n")
    (row,) = read_rows(path).rows
    assert row.model_dump(mode="json") == line | {"judgements": []}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"score": None}, "no score"),
        ({"status": "unscored: refused"}, "there is a score"),
        ({"score": None, "status": "unscored"}, "unscored: why"),
        ({"score": None, "status": "unscored:  "}, "unscored: why"),
        ({"score": 5.01}, "less than or equal to 5"),
        ({"score": 0.0}, "greater than or equal to 1"),
        ({"score": float("nan")}, "finite"),
        ({"subscores": {"quality": float("inf")}}, "finite"),
        ({"task": "video"}, "'t2i' or 'edit'"),
        ({"model": ""}, "at least 1"),
        ({"nfe": -1}, "greater than or equal to 0"),
        ({"mood": "happy"}, "Extra inputs"),
    ],
)
def test_a_row_that_contradicts_itself_is_refused(changes, why):
    with pytest.raises(ValidationError, match=why):
        make_row(**changes)


def test_a_last_line_cut_at_any_byte_loses_only_itself_and_is_reported(tmp_path):
    path = tmp_path / "rows.jsonl"
    first, second, third = (make_row(seed=seed) for seed in range(3))
    write(path, first)
    whole = len(path.read_bytes())
    write(path, second)
    data = path.read_bytes()
    for end in [whole + 1, *range(whole + 2, len(data) - 1, 23), len(data) - 2]:
        path.write_bytes(data[:end])
        rows, _, truncated = read_rows(path)
        assert rows == (first,)
        assert truncated is not None and f"cut off after {end - whole} bytes" in truncated
        write(path, third)
        assert read_rows(path) == ((first, third), 0, None), f"append after a cut at byte {end}"


def test_a_row_that_only_lost_its_newline_is_kept(tmp_path):
    path = tmp_path / "rows.jsonl"
    first, second = make_row(seed=0), make_row(seed=1)
    write(path, first)
    path.write_bytes(path.read_bytes()[:-1])
    assert read_rows(path) == ((first,), 0, None)
    write(path, second)
    assert read_rows(path) == ((first, second), 0, None)


@pytest.mark.parametrize("bad", [b'{"model": "a", "n', b"\xff\xfe", b"[]", b'{"model": "a"}'])
def test_damage_before_the_last_line_is_an_error_with_its_line_number(tmp_path, bad):
    path = tmp_path / "rows.jsonl"
    write(path, make_row(seed=0), make_row(seed=1), make_row(seed=2))
    lines = path.read_bytes().split(b"\n")
    lines[1] = bad
    path.write_bytes(b"\n".join(lines))
    for attempt in (lambda: read_rows(path), lambda: RowWriter(path)):
        with pytest.raises(DataError, match=r"rows\.jsonl, line 2: "):
            attempt()


def test_a_whole_last_line_that_is_no_row_is_damage_not_truncation(tmp_path):
    path = tmp_path / "rows.jsonl"
    write(path, make_row())
    path.write_bytes(path.read_bytes() + b'{"model": "a"}')
    with pytest.raises(DataError, match="line 2: nfe"):
        read_rows(path)


def test_an_interrupted_evaluation_skips_what_is_scored_and_retries_what_is_not(tmp_path):
    path = tmp_path / "rows.jsonl"
    scored = make_row(seed=0)
    failed = make_row(seed=1, score=None, status="unscored: timeout")
    write(path, scored, failed)
    with RowWriter(path) as log:
        assert log.scored(scored.key)
        assert not log.scored(failed.key)
        assert not log.scored(scored.key._replace(judge="another"))
        assert not log.scored(RowKey("teacher-80nfe", "t2i-portrait-0008", 0, "lab-oracle-1"))
        retried = make_row(seed=1, score=2.5)
        log.write(retried)
        assert log.scored(retried.key)
    assert read_rows(path) == ((scored, retried), 1, None)


def test_a_missing_file_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        read_rows(tmp_path / "rows.jsonl")


def test_a_rows_path_that_is_a_folder_is_a_message(tmp_path):
    with pytest.raises(FewstepError, match="cannot"):
        RowWriter(tmp_path)


FILL_THE_DISK = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_rows import make_row
from fewstep.errors import FewstepError
from fewstep.evals.rows import RowWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
with RowWriter(Path(sys.argv[1])) as log:
    for seed in range(100):
        try:
            log.write(make_row(seed=seed))
        except FewstepError as error:
            print(seed, error)
            sys.exit(error.exit_code)
"""


def test_a_full_disk_loses_nothing_that_was_logged(tmp_path):
    path = tmp_path / "rows.jsonl"
    command = [sys.executable, "-c", FILL_THE_DISK, str(path), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == DiskError.exit_code, done.stderr
    count, _, message = done.stdout.partition(" ")
    rows, _, truncated = read_rows(path)
    assert len(rows) == int(count) > 0
    assert truncated is None
    assert f"the {count} images logged so far are safe" in message
    write(path, make_row(seed=50))
    assert len(read_rows(path).rows) == int(count) + 1
