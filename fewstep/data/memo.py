"""What was once found out about a file's content, remembered until the file changes."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fewstep.data.pixels import write_atomically


class Memo:
    """Answers by file and question, in one JSON file; `save` keeps them for the next run.

    A file counts as unchanged while its size, modification and change time are as they were.
    """

    def __init__(self, file: Path | None = None) -> None:
        """Without a file nothing outlives the process."""
        self._file = file
        self._answers: dict[str, list[Any]] = {}
        self._fresh = False
        if file is not None and file.is_file():
            try:
                self._answers = json.loads(file.read_bytes())
            except ValueError:
                self._answers = {}  # a damaged memory is an empty one

    def get(self, file: Path, question: str, find_out: Callable[[], Any]) -> Any:
        """The JSON-able answer; what `find_out` raises is not remembered."""
        found = os.stat(file)
        stamp = [found.st_size, found.st_mtime_ns, found.st_ctime_ns]
        key = f"{question}:{file.resolve()}"
        known = self._answers.get(key)
        if known is not None and known[:3] == stamp:
            return known[3]
        answer = find_out()
        self._answers[key] = [*stamp, answer]
        self._fresh = True
        return answer

    def save(self) -> None:
        if self._fresh and self._file is not None:
            write_atomically(self._file, json.dumps(self._answers).encode())
            self._fresh = False
