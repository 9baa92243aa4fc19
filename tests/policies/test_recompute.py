"""Layers that are computed again give the same gradients, and keep little."""

import numpy as np
import pytest
import torch

from prefmesh.algorithms.gradients import Problem, loss_and_gradient
from prefmesh.config import ExperimentConfig
from prefmesh.errors import InputError
from prefmesh.experiment import policy_of
from tests import models, problems
from tests.runs import TINY, TOWN, config


def kept_and_gradient(problem: Problem) -> tuple[float, dict[str, torch.Tensor]]:
    """Bytes that are kept outside of layers that forget, and the gradient of two agents' losses."""
    kept = 0

    def note(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    torch.manual_seed(0)
    theta = {
        name: t + 0.1 * torch.randn(2, *t.shape[1:], dtype=t.dtype)
        for name, t in problem.policy.initial(0).items()
    }
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        _, gradient, _ = loss_and_gradient(
            problem, theta, np.arange(6).reshape(2, 3), torch.full((2, 3), 1 / 3, dtype=torch.float64)
        )
    return kept, gradient


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("train", ["lora", "full"])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_the_same_gradient_from_less(family, train, packs) -> None:
    found = []
    for checkpointing in (False, True):
        policy = problems.causal_lm(train, family, dtype="float64", checkpointing=checkpointing)
        assert policy.packs
        policy.packs = packs
        on = problems.problem(f"{train}/{family}", 6)
        found.append(
            kept_and_gradient(
                Problem(policy=policy, data=on.data, reference=on.reference, objective=on.objective)
            )
        )
    (all_kept, plain), (kept, again) = found
    assert kept < all_kept / 4
    for name in plain:
        torch.testing.assert_close(again[name], plain[name], rtol=1e-12, atol=0)


def test_passes_hold_more_tokens() -> None:
    """With L layers of width d: d (16 + L) numbers a token in place of 16 d L."""
    plain, forgetful = (problems.causal_lm("lora", checkpointing=c) for c in (False, True))
    assert forgetful.tokens_in(2**20) / plain.tokens_in(2**20) == pytest.approx(16 * 2 / (16 + 2), rel=1e-2)


def test_a_config_asks_for_it() -> None:
    asked = config(TINY, runtime={"gradient_checkpointing": True})
    assert policy_of(asked).checkpointing  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"runtime\.gradient_checkpointing: log_linear has no layers"):
        ExperimentConfig.parse({**TOWN, "runtime": {"gradient_checkpointing": True}})
