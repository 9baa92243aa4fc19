"""An estimate follows a target that stays, at the contraction's rate."""

import numpy as np
import pytest
import torch

from prefmesh.compression import Int8, LowRank, RandomK, Sign, TopK, follow, layout_of, message_seeds
from prefmesh.compression.message import contraction
from tests.compression.examples import error, flat, rows


@pytest.mark.parametrize(
    "chain",
    [
        (TopK(share=0.1),),
        (TopK(share=0.1), Int8()),
        (RandomK(share=0.2),),
        (Sign(),),
        (LowRank(rank=1),),
        (Int8(),),
    ],
    ids=lambda chain: "+".join(stage.name for stage in chain),
)
def test_converges_geometrically(chain):
    """E||e_t||^2 <= (1 - delta)^t ||e_0||^2 over 300 agents, who have one target and draw their own."""
    agents, rounds = 300, 12
    row = rows([(6, 9), (10,)], 1, 0, torch.float64)
    target = {name: tensor.expand(agents, *tensor.shape[1:]) for name, tensor in row.items()}
    estimate = {name: torch.zeros_like(tensor) for name, tensor in target.items()}
    delta = contraction(layout_of(target), chain)
    assert delta is not None
    first = error(target, estimate)[0]
    for t in range(1, rounds + 1):
        message, estimate = follow(estimate, target, chain, message_seeds(0, "test", t, np.arange(agents)))
        errors = error(target, estimate)
        spread = 5 * errors.std() / agents**0.5
        assert errors.mean() <= (1 - delta) ** t * first + spread + 1e-12 * first
    assert set(message) == set(target)


def test_random_k_at_exactly_that_rate():
    """Each entry is there after t rounds but with probability (1 - k/d)^t."""
    agents, rounds, share = 2000, 6, 0.25
    target = {"x": torch.linspace(1, 2, 20, dtype=torch.float64).expand(agents, 20)}
    estimate = {"x": torch.zeros(agents, 20, dtype=torch.float64)}
    for t in range(1, rounds + 1):
        _, estimate = follow(
            estimate, target, (RandomK(share=share),), message_seeds(0, "test", t, np.arange(agents))
        )
    errors = error(target, estimate)
    expected = (1 - share) ** rounds * float(flat(target)[0].square().sum())
    assert errors.mean() == pytest.approx(expected, abs=float(5 * errors.std() / agents**0.5))


def test_by_hand_and_nothing_is_written_to():
    estimate, target = {"x": torch.tensor([[1.0, 1.0, 1.0]])}, {"x": torch.tensor([[2.0, -2.0, 0.5]])}
    message, new = follow(estimate, target, (TopK(share=0.3),), [0])
    assert message["x"].tolist() == [[0, -3, 0]]
    assert new["x"].tolist() == [[1, -2, 1]]
    assert estimate["x"].tolist() == [[1, 1, 1]]
