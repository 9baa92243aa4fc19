"""Pairs are encoded once per tokenizer, length and texts, and come back from disk as they were."""

import copy

import numpy as np
import pytest

from prefmesh.policies import encoded
from prefmesh.policies.encoded import FEW, encoded_pairs, fingerprint
from prefmesh.preferences.encoding import encode_pairs
from prefmesh.preferences.tokens import TokenPairs
from tests import models, problems

PAIRS = models.pairs(FEW + 6)


@pytest.fixture(autouse=True)
def calls(tmp_path, monkeypatch) -> list[int]:
    """How many pairs were encoded, call by call; in an empty cache."""
    monkeypatch.setenv("PREFMESH_CACHE", str(tmp_path))
    made: list[int] = []

    def counting(pairs, *rest):
        made.append(len(pairs))
        return encode_pairs(pairs, *rest)

    monkeypatch.setattr(encoded, "encode_pairs", counting)
    return made


def same(a: TokenPairs, b: TokenPairs) -> bool:
    return a.fingerprint() == b.fingerprint() and (a.prompts_cut, a.completions_cut, a.same_after_cut) == (
        b.prompts_cut,
        b.completions_cut,
        b.same_after_cut,
    )


def test_the_second_time_they_are_read(calls) -> None:
    plain = encode_pairs(PAIRS, models.tokenizer(), 8)
    assert plain.prompts_cut > 0
    for _ in range(2):
        found = encoded_pairs(PAIRS, models.tokenizer(), 8)
        assert same(found, plain)
        assert [list(side) for side in (found.prompt, found.chosen, found.rejected)] == [
            list(side) for side in (plain.prompt, plain.chosen, plain.rejected)
        ]
        assert (found.cost == plain.cost).all()
    assert calls == [len(PAIRS)]


def test_what_is_read_lies_in_the_file(calls) -> None:
    """Mapped, not copied: no memory of its own."""
    encoded_pairs(PAIRS, models.tokenizer(), 8)
    found = encoded_pairs(PAIRS, models.tokenizer(), 8)
    assert not found.prompt.ids.flags.owndata
    with open("/proc/self/maps", encoding="utf-8") as file:
        places = [line.split()[0].split("-") for line in file if "/encoded/" in line]
    address = found.prompt.ids.__array_interface__["data"][0]
    assert any(int(start, 16) <= address < int(end, 16) for start, end in places)


def test_other_texts_lengths_and_tokenizers_are_encoded_anew(calls) -> None:
    other = copy.deepcopy(models.tokenizer())
    other.eos_token = "<pad>"
    swapped = [*PAIRS[:-1], models.pairs(1, seed=7)[0]]
    for pairs, tokenizer, length in (
        (PAIRS, models.tokenizer(), 8),
        (PAIRS, models.tokenizer(), 9),
        (PAIRS, other, 8),
        (swapped, models.tokenizer(), 8),
        (PAIRS[1:], models.tokenizer(), 8),
    ):
        before = len(calls)
        assert same(encoded_pairs(pairs, tokenizer, length), encode_pairs(pairs, tokenizer, length))
        assert len(calls) == before + 1


def test_a_tokenizer_without_a_written_form_is_not_looked_up(calls) -> None:
    class Python:
        """Lacks `backend_tokenizer`; the rest is the inner one's."""

        def __init__(self, inner) -> None:
            self.inner = inner

        def __getattr__(self, name):
            if name == "backend_tokenizer":
                raise AttributeError(name)
            return getattr(self.inner, name)

        def __call__(self, *args, **options):
            return self.inner(*args, **options)

    slow = Python(models.tokenizer())
    assert fingerprint(slow) is None  # type: ignore[arg-type]
    for _ in range(2):
        encoded_pairs(PAIRS, slow, 8)  # type: ignore[arg-type]
    assert calls == [len(PAIRS)] * 2


def test_a_damaged_file_is_made_anew(calls, tmp_path) -> None:
    first = encoded_pairs(PAIRS, models.tokenizer(), 8)
    (path,) = (tmp_path / "encoded").iterdir()
    path.write_bytes(path.read_bytes()[:-5])
    assert same(encoded_pairs(PAIRS, models.tokenizer(), 8), first)
    assert calls == [len(PAIRS)] * 2


def test_scores_from_mapped_pairs_are_those_from_fresh_ones() -> None:
    policy = problems.causal_lm("lora")
    rows = np.arange(len(PAIRS))[None]
    fresh = policy.reference_log_probs(encode_pairs(PAIRS, policy.tokenizer, policy.max_length), rows)
    policy.encode(PAIRS)
    mapped = policy.reference_log_probs(policy.encode(PAIRS), rows)
    assert all((a == b).all() for a, b in zip(fresh, mapped, strict=True))
