"""Encoded pairs: tokenised once per tokenizer and data, then mapped from disk."""

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import tokenizers
import torch
import transformers

from prefmesh.policies.cache import Tensors, cached
from prefmesh.preferences.encoding import encode_pairs
from prefmesh.preferences.pairs import Pair
from prefmesh.preferences.tokens import Ragged, TokenPairs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = "1"
"""Raise when the same tokenizer and texts would be encoded otherwise than before."""
SIDES = ("prompt", "chosen", "rejected")
CUT = ("prompts_cut", "completions_cut", "same_after_cut")
FEW = 64
"""Up to so many pairs are encoded anew: that is as fast as looking."""


def encoded_pairs(pairs: Sequence[Pair], tokenizer: "PreTrainedTokenizerBase", max_length: int) -> TokenPairs:
    """`encode_pairs`, from the cache where it was done before. Tokenizers written in Python have no fingerprint: anew."""
    own = fingerprint(tokenizer)
    if own is None or len(pairs) <= FEW:
        return encode_pairs(pairs, tokenizer, max_length)
    digest = hashlib.blake2b(digest_size=16)
    for pair in pairs:
        digest.update(
            json.dumps([_plain(side) for side in (pair.prompt, pair.chosen, pair.rejected)]).encode()
        )
    found = cached(
        "encoded",
        [VERSION, own, str(max_length), digest.hexdigest()],
        lambda: _tensors(encode_pairs(pairs, tokenizer, max_length)),
        lambda tensors: all(len(tensors[f"{side}/ends"]) == len(pairs) for side in SIDES),
    )
    prompt, chosen, rejected = (
        Ragged(found[f"{side}/ids"].numpy(), found[f"{side}/ends"].numpy()) for side in SIDES
    )
    return TokenPairs(prompt, chosen, rejected, **dict(zip(CUT, found["cut"].tolist(), strict=True)))


def fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """Hash of all that ids depend on: the tokenizer as its library writes it, its templates and special tokens; none where it has no such form."""
    inner = getattr(tokenizer, "backend_tokenizer", None)
    if inner is None:
        return None
    parts = [
        inner.to_str(),
        json.dumps(tokenizer.chat_template, sort_keys=True),
        json.dumps(
            {name: str(token) for name, token in tokenizer.special_tokens_map.items()}, sort_keys=True
        ),
        transformers.__version__,
        tokenizers.__version__,
    ]
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()


def _plain(text: object) -> object:
    return text if isinstance(text, str) else [dict(message) for message in text]  # type: ignore[attr-defined]


def _tensors(data: TokenPairs) -> Tensors:
    arrays = {
        f"{side}/{part}": getattr(getattr(data, side), part) for side in SIDES for part in ("ids", "ends")
    }
    cut = [getattr(data, name) for name in CUT]
    return {name: torch.from_numpy(array) for name, array in arrays.items()} | {"cut": torch.tensor(cut)}
