"""Features for the log-linear policy on any text: signed feature hashing of words and word pairs."""

import re
import zlib
from array import array
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Float

WORD = re.compile(r"\w+|[^\w\s]")


def hashed_ngrams(texts: Sequence[str], dim: int) -> Float[np.ndarray, "texts dim"]:
    """Counts of words and word pairs, hashed to `dim` signed buckets (Weinberger et al. 2009), damped by a square root.

    Rows have norm 1, or 0 for a text without words.
    """
    counts, codes = np.zeros(len(texts), dtype=np.int64), array("L")
    for row, text in enumerate(texts):
        words = WORD.findall(text.lower())
        codes.extend(map(_code, words))
        codes.extend(map(_code, words, words[1:]))
        counts[row] = max(0, 2 * len(words) - 1)
    code = np.array(codes, dtype=np.int64)
    place = np.repeat(np.arange(len(texts)), counts) * dim + (code >> 1) % dim
    features = np.bincount(place, np.where(code & 1, 1.0, -1.0), minlength=len(texts) * dim)
    features = features.reshape(len(texts), dim)
    features = np.sign(features) * np.sqrt(np.abs(features))
    norm = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.where(norm == 0, 1, norm)


@lru_cache(maxsize=2**18)
def _code(*words: str) -> int:
    """Of a word, or of two that stand together: in many texts they recur."""
    return zlib.crc32(" ".join(words).encode())
