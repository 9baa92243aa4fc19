"""Bytes: what is stated before a run is what a coder writes, and what it writes is all that a receiver needs."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefmesh.compression import (
    Int4,
    Int8,
    LowRank,
    RandomK,
    Sign,
    TopK,
    compress,
    decode,
    encode,
    layout_of,
    message_bytes,
    message_seeds,
)
from prefmesh.compression.base import Digits
from prefmesh.compression.coding import pack, unpack
from prefmesh.compression.layout import Spec
from tests.compression.examples import CHAINS, SHAPES, rows


@given(
    st.sampled_from(sorted(CHAINS)),
    SHAPES,
    st.integers(0, 3),
    st.integers(0, 99),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_coded_bytes_are_those_stated_and_carry_the_message(chain, shapes, agents, seed, ties, dtype):
    x = rows(shapes, agents, seed, dtype, ties=ties)
    seeds = message_seeds(seed, "test", 1, np.arange(agents))
    coded = encode(x, CHAINS[chain], seeds)
    assert coded.shape == (agents, message_bytes(layout_of(x), CHAINS[chain]))
    expected = compress(x, CHAINS[chain], seeds)
    found = decode(coded, CHAINS[chain], layout_of(x))
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor)


LAYOUT = {"w": Spec((30, 40), torch.float32), "b": Spec((9,), torch.float32)}
"""1,200 and 9 entries of 4 bytes."""


@pytest.mark.parametrize(
    ("chain", "bytes_"),
    [
        # 13 of 1,209 values, at positions of 11 bits (2^10 < 1,209 <= 2^11): 143 bits.
        ([TopK(share=0.01)], 13 * 4 + 18),
        # 605 values; 605 * 11 bits are more than a bitmap's 1,209.
        ([TopK(share=0.5)], 605 * 4 + 152),
        ([RandomK(share=0.01)], 13 * 4 + 8),
        ([Int8()], 1209 + 2 * 4),
        ([Int4()], 600 + 5 + 2 * 4),
        ([Sign()], 150 + 2 + 2 * 4),
        ([LowRank(rank=2)], (30 + 40) * 2 * 4 + 9 * 4),
        # (30 + 40) * 18 = 1,260 numbers instead of 1,200: whole.
        ([LowRank(rank=18)], 1209 * 4),
        ([TopK(share=0.01), Int8()], 18 + 13 + 4),
        # 2 scales for the factors, one for the rest.
        ([LowRank(rank=2), Int8()], 60 + 80 + 9 + 3 * 4),
        ([], 1209 * 4),
    ],
)
def test_bytes_by_hand(chain, bytes_):
    assert message_bytes(LAYOUT, tuple(chain)) == bytes_


def test_half_precision_costs_half():
    half = {name: Spec(spec.shape, torch.bfloat16) for name, spec in LAYOUT.items()}
    assert message_bytes(half, (RandomK(share=0.01),)) == 13 * 2 + 8
    assert message_bytes(half, (Int8(),)) == message_bytes(LAYOUT, (Int8(),))


@given(st.integers(0, 64), st.integers(0, 9), st.integers(1, 3), st.data())
def test_numbers_packed_come_back(bits, count, agents, data):
    most = 2 ** min(bits, 63) - 1
    drawn = data.draw(
        st.lists(st.integers(0, most), min_size=agents * count, max_size=agents * count).map(
            lambda numbers: np.array(numbers, dtype=np.int64).reshape(agents, count)
        )
    )
    packed = pack(torch.from_numpy(drawn), bits)
    assert packed.shape == (agents, -(-count * bits // 8))
    assert (unpack(packed, Digits(count, bits)).numpy() == drawn).all()


def test_bits_by_hand():
    """5, 0, 3 in three bits each, lowest first: 101 000 110 -> 10100011 0 -> 1 + 4 + 64 + 128, 0."""
    assert pack(torch.tensor([[5, 0, 3]]), 3).tolist() == [[1 + 4 + 64 + 128, 0]]
