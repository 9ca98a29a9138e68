"""What can go wrong by the user's doing. Each error says what was wrong and what would work.

Programmer mistakes are assertions and never one of these.
"""

import difflib
import errno
from collections.abc import Iterable, Sequence
from pathlib import Path


class FewstepError(Exception):
    """A message for the user; `cli.main` prints it, without a traceback, and exits so."""

    exit_code = 1


class RecipeError(FewstepError):
    """The recipe asks for something that does not exist or cannot work."""

    exit_code = 2

    def __init__(self, problem: str, *, field: str = "", hint: str = "", where: str = "") -> None:
        self.problem, self.field, self.hint, self.where = problem, field, hint, where
        message = ": ".join(part for part in (where, field, problem) if part)
        super().__init__(f"{message}; {hint}" if hint else message)


class DataError(FewstepError):
    """A file of the user's data is missing, unreadable or contradicts itself."""

    exit_code = 3


class CheckpointError(FewstepError):
    """Weights or a training state are truncated, of the wrong size or of another run."""

    exit_code = 4


class DiskError(FewstepError):
    """A file could not be written because the disk is full, whichever file it was."""

    exit_code = 6


FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "your disk quota is used up",
    errno.EFBIG: "a file reached the size limit (`ulimit -f`)",
}
"""What the system calls a full disk."""


def cannot_write(path: Path, error: OSError, hint: str = "") -> FewstepError:
    """To be raised for what kept a file from being written."""
    kind = DiskError if error.errno in FULL else FewstepError
    return kind(f"cannot write {path}: {error.strerror}" + (f"; {hint}" if hint else ""))


class RunError(FewstepError):
    """A run had to stop: a value that is not finite, or a run folder in the wrong state."""

    exit_code = 5


class CellsFailed(FewstepError):
    """A sweep came to its end, but some of its cells failed. Exits with 10 + their number."""

    def __init__(self, failed: int, total: int, lines: Iterable[str]) -> None:
        self.exit_code = min(10 + failed, 99)
        listed = "\n".join(f"  {line}" for line in lines)
        super().__init__(
            f"{failed} of {total} cells failed; the same command tries them again\n{listed}"
        )


class Interrupted(FewstepError):
    """The user stopped the run (Ctrl-C); the message says where the state is kept."""

    exit_code = 130


SHOWN_PROBLEMS = 8


def refuse(path: Path | str, problems: Sequence[str]) -> None:
    """Stop with everything that was found wrong in the user's data, if anything was."""
    if problems:
        shown = "".join(f"\n  {problem}" for problem in problems[:SHOWN_PROBLEMS])
        more = len(problems) - SHOWN_PROBLEMS
        rest = f"\n  and {more} more" if more > 0 else ""
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise DataError(f"{path}: {count}{shown}{rest}")


_LISTED = 12
"""More names than this bury the one that was meant."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint: the nearest known name first, then all of them unless they are many."""
    names = list(known)
    if not names:
        return "there are none to choose from"
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if near and len(names) > _LISTED:
        return f"did you mean {near[0]!r}?"
    listed = ", ".join(names)
    return f"did you mean {near[0]!r}? known: {listed}" if near else f"known: {listed}"
