"""Duplicates: which texts of one set stand, exactly or nearly, in another."""

from __future__ import annotations

import hashlib
import re
import unicodedata
import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from localmoe.errors import ConfigError

SHINGLE_WORDS = 5
"""Words of one shingle; a shorter text is one shingle."""

NEAR = 0.7
"""Jaccard similarity from which two texts are near duplicates."""

PERMUTATIONS = 128
"""MinHash values of one text."""

_MISS = 1e-3  # chance, at most, that two texts just at the threshold are never compared
_LEAST = 0.1  # below about 0.05, 128 values cannot keep to that
_BLOCK = 4096  # shingles of one text that are hashed at a time
# A character of a script that puts no spaces between words counts as a word.
_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


@dataclass(frozen=True)
class Duplicate:
    """Text `place` of the one set and text `other` of the other one, and their Jaccard similarity."""

    place: int
    other: int
    similarity: float


def exact_duplicates(texts: Sequence[str], others: Iterable[str]) -> list[Duplicate]:
    """Pairs of equal `normalised` content, by `other`, then `place`; memory: 16 bytes and a list for every text."""
    places = defaultdict(list)
    for place, text in enumerate(texts):
        places[_digest(text)].append(place)
    return [
        Duplicate(place, other, 1.0) for other, text in enumerate(others) for place in places.get(_digest(text), ())
    ]


def near_duplicates(texts: Sequence[str], others: Iterable[str], threshold: float = NEAR) -> list[Duplicate]:
    """Pairs with Jaccard similarity J = |S ∩ S'| / |S ∪ S'| ≥ `threshold` of their `shingles`, by `other`, `place`.

    Candidates are found by MinHash LSH and then compared exactly, so no pair is wrong, and one that lies just at the
    threshold is missed with probability 10⁻³ at most (a nearer one less often). Exact duplicates are among them.
    `others` are read once, one at a time; memory grows with `texts` alone (12 kB each): give the smaller set.
    Not found: a short text that stands within a much longer one. Raises ConfigError for a threshold outside [0.1, 1].
    """
    from datasketch import MinHashLSH

    index = MinHashLSH(num_perm=PERMUTATIONS, params=_bands(threshold))
    empty = _empty_sketch()
    for place, text in enumerate(texts):
        index.insert(place, _sketch(shingles(text), empty))
    found = []
    for other, text in enumerate(others):
        theirs = shingles(text)
        for place in sorted(index.query(_sketch(theirs, empty))):
            similarity = jaccard(shingles(texts[place]), theirs)
            if similarity >= threshold:
                found.append(Duplicate(place, other, similarity))
    return found


def normalised(text: str) -> str:
    """The text in NFKC, folded to one case, every run of white space one space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def shingles(text: str) -> set[str]:
    """Every `SHINGLE_WORDS` words in a row of the normalised text, without what is between words.

    A word is a run of letters, digits and _; in scripts without spaces, one character. A text without a word is
    its own only shingle.
    """
    content = normalised(text)
    words = _WORD.findall(content)
    if not words:
        return {content}
    last = max(1, len(words) - SHINGLE_WORDS + 1)
    return {" ".join(words[start : start + SHINGLE_WORDS]) for start in range(last)}


def jaccard(ours: set[str], theirs: set[str]) -> float:
    """|S ∩ S'| / |S ∪ S'| of two sets that are not both empty."""
    shared = len(ours & theirs)
    return shared / (len(ours) + len(theirs) - shared)


def _bands(threshold: float) -> tuple[int, int]:
    """Bands b and values r of each: the largest r with (1 − Jʳ)ᵇ ≤ `_MISS` at the threshold J, b = ⌊128 / r⌋."""
    if not _LEAST <= threshold <= 1:
        raise ConfigError(
            f"near duplicates cannot be looked for from a Jaccard similarity of {threshold}",
            f"choose one between {_LEAST} and 1, e.g. {NEAR}",
        )
    rows = range(1, PERMUTATIONS // 2 + 1)
    most = max(r for r in rows if (1 - threshold**r) ** (PERMUTATIONS // r) <= _MISS)
    return PERMUTATIONS // most, most


def _empty_sketch() -> Any:
    from datasketch import MinHash

    return MinHash(num_perm=PERMUTATIONS, seed=1, hashfunc=zlib.crc32, scheme="affine32")


def _sketch(parts: set[str], empty: Any) -> Any:
    sketch = empty.copy()
    encoded = (part.encode("utf-8", "surrogatepass") for part in parts)
    while block := list(islice(encoded, _BLOCK)):
        sketch.update_batch(block)
    return sketch


def _digest(text: str) -> bytes:
    return hashlib.blake2b(normalised(text).encode("utf-8", "surrogatepass"), digest_size=16).digest()
