"""The list of deliberate breakages stays true: what it breaks is there, and who catches it, too.

Running it takes many minutes and is done by hand: `python tools/breakages.py`.
"""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOL = ROOT / "tools" / "breakages.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("breakages", TOOL)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_breakage_finds_its_line_once_and_changes_it(tool) -> None:
    source = {b.file: (ROOT / "fewstep" / b.file).read_text() for b in tool.BREAKAGES}
    assert not [b.name for b in tool.BREAKAGES if source[b.file].count(b.line) != 1]
    assert not [b.name for b in tool.BREAKAGES if b.line == b.broken]
    names = [b.name for b in tool.BREAKAGES]
    assert len(names) == len(set(names))


def test_each_breakage_names_a_test_that_exists(tool) -> None:
    for breakage in tool.BREAKAGES:
        file, _, name = breakage.test_id.partition("::")
        bare = re.sub(r"\[.*", "", name)
        assert f"def {bare}(" in (ROOT / file).read_text(), breakage.name


def test_the_table_in_the_documentation_is_up_to_date(tool) -> None:
    assert tool.documented() == tool.DOCUMENT.read_text()
