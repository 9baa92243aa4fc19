"""Encoded pairs: token ids in flat arrays, which may lie in a file that is mapped into memory."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
from jaxtyping import Int

TokenIds = list[int]


@dataclass(frozen=True, eq=False)
class Ragged:
    """Texts of unequal lengths, one after the other: text i is ids[ends[i - 1] : ends[i]]."""

    ids: Int[np.ndarray, " tokens"]
    ends: Int[np.ndarray, " texts"]

    @classmethod
    def of(cls, texts: Iterable[TokenIds]) -> "Ragged":
        """From lists of ids.

        >>> list(Ragged.of([[5, 6], [], [7]]))
        [[5, 6], [], [7]]
        """
        kept = list(texts)
        ids = np.fromiter(chain.from_iterable(kept), dtype=np.int32)
        return cls(ids, np.cumsum([len(text) for text in kept], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, text: int) -> TokenIds:
        return self.ids[self.ends[text - 1] if text else 0 : self.ends[text]].tolist()

    def __iter__(self) -> Iterator[TokenIds]:
        return (self[text] for text in range(len(self)))

    @property
    def lengths(self) -> Int[np.ndarray, " texts"]:
        """Tokens of each."""
        return np.diff(self.ends, prepend=0)


@dataclass(frozen=True, eq=False)
class TokenPairs:
    """Token ids of all pairs, and what was cut to fit."""

    prompt: Ragged
    chosen: Ragged
    rejected: Ragged
    prompts_cut: int = 0
    completions_cut: int = 0
    same_after_cut: int = 0

    completion_tokens: Int[np.ndarray, "pairs 2"] = field(init=False)
    """Tokens of the chosen and of the rejected completion, the end-of-text token included."""
    cost: Int[np.ndarray, " pairs"] = field(init=False)
    """Tokens of a prompt and its completions, each once."""

    def __post_init__(self) -> None:
        completions = np.stack([self.chosen.lengths, self.rejected.lengths], axis=1)
        object.__setattr__(self, "completion_tokens", completions)
        object.__setattr__(self, "cost", self.prompt.lengths + completions.sum(axis=1))

    def __len__(self) -> int:
        return len(self.prompt)

    def fingerprint(self) -> str:
        """Hash of all token ids."""
        digest = hashlib.blake2b(digest_size=16)
        for side in (self.prompt, self.chosen, self.rejected):
            for array in (side.ends.astype(np.int64), side.ids.astype(np.int64)):
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()
