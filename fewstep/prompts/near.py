"""Near-duplicates: prompts that share most of their three-word runs.

Candidates come from MinHash signatures cut into bands (Broder 1997; Leskovec, Rajaraman and
Ullman, Mining of Massive Datasets, section 3.4); each candidate is then compared in full, so a
reported pair always reaches the threshold and only recall is a matter of chance.
"""

from collections import defaultdict
from hashlib import blake2b
from typing import NamedTuple
from zlib import crc32

import numpy as np

from fewstep.prompts.text import words

RUN = 3
"""Words in a shingle; a shorter prompt is one shingle as a whole."""
BANDS, ROWS = 40, 3
"""A pair of Jaccard index J is a candidate with probability 1 - (1 - J^3)^40: 0.99994 at 0.6."""


class Match(NamedTuple):
    name: str
    """What the earlier prompt was called when it was added."""
    jaccard: float


class NearIndex:
    """Prompts seen so far; `find` answers which of them a new one nearly repeats.

    `threshold` is a Jaccard index of shingles, in (0, 1]. Shingles are compared by 32-bit hashes.
    Prompts of different scopes are never compared.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        draws = np.random.default_rng(0).integers(0, 2**64, size=(4, BANDS, ROWS), dtype=np.uint64)
        self._multiply, self._add, self._mix, self._band = draws
        self._multiply |= np.uint64(1)  # odd, as multiplicative hashing wants it
        self._mix |= np.uint64(1)
        self._names: list[str] = []
        self._shingles: list[frozenset[int]] = []
        # Nearly all buckets hold one prompt: it is kept bare, the others of a bucket beside it.
        self._first: dict[int, int] = {}
        self._others: defaultdict[int, list[int]] = defaultdict(list)

    def find(self, text: str, scope: str = "") -> Match | None:
        """The most similar earlier prompt at or above the threshold; of equals the first."""
        own = shingles(text)
        return self._find(own, self._keys(own, scope))

    def add(self, name: str, text: str, scope: str = "") -> Match | None:
        """As `find`, and the prompt is known by `name` from now on."""
        own = shingles(text)
        keys = self._keys(own, scope)
        match, number = self._find(own, keys), len(self._names)
        for key in keys:
            if self._first.setdefault(key, number) != number:
                self._others[key].append(number)
        self._names.append(name)
        self._shingles.append(own)
        return match

    def _find(self, own: frozenset[int], keys: list[int]) -> Match | None:
        filled = [key for key in keys if key in self._first]
        candidates = {self._first[key] for key in filled}
        candidates.update(*(self._others[key] for key in filled if key in self._others))
        best: Match | None = None
        for known in sorted(candidates):
            similarity = jaccard(own, self._shingles[known])
            if similarity >= self.threshold and (best is None or similarity > best.jaccard):
                best = Match(self._names[known], similarity)
        return best

    def _keys(self, own: frozenset[int], scope: str) -> list[int]:
        """A 64-bit name per band: of the band, its rows of the signature, and the scope."""
        hashed = np.fromiter(own, np.uint64, len(own))[:, None, None] * self._multiply + self._add
        signature = (hashed >> np.uint64(32)).min(axis=0)  # the high half of a product mixes well
        mixed = ((signature + self._band) * self._mix).sum(axis=1, dtype=np.uint64)
        if scope:
            mixed ^= np.frombuffer(blake2b(scope.encode(), digest_size=8).digest(), np.uint64)
        return mixed.tolist()


def shingles(text: str) -> frozenset[int]:
    """32-bit hashes of all runs of three words."""
    found = words(text)
    runs = zip(*(found[start:] for start in range(RUN))) if len(found) >= RUN else [found]
    return frozenset(crc32(" ".join(run).encode()) for run in runs)


def jaccard(one: frozenset[int], other: frozenset[int]) -> float:
    """Shared / all; both hold at least one."""
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)
