"""R folded into the frozen layers: every way that a model is read has it, but the reference's."""

import numpy as np
import pytest
import torch

from prefmesh.algorithms.gradients import Problem, global_loss_and_gradient
from prefmesh.errors import InputError
from prefmesh.evaluation.scores import log_probs
from prefmesh.objectives import ObjectiveSettings
from prefmesh.policies.base import Params
from prefmesh.policies.causal_lm import CausalLMPolicy
from prefmesh.policies.lora import LoraSettings
from prefmesh.policies.residual import merged
from tests import models, problems

PAIRS = 6
LORA = LoraSettings(r=2, lora_alpha=4, mixing="residual", target_modules="all-linear")


def moved(policy: CausalLMPolicy, agents: int = 1) -> Params:
    """Each agent's own factors and one R, away from the start in every number."""
    torch.manual_seed(0)
    row = policy.initial(0)
    still = policy.residuals(row)
    return {
        name: (t + 0.05 * torch.randn_like(t)).expand(agents, -1, -1)
        if name in still
        else t + 0.1 * torch.randn(agents, *t.shape[1:], dtype=t.dtype)
        for name, t in row.items()
    }


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_texts_are_the_merged_model_s(family) -> None:
    """A model trained in full that has the merged weights writes the same texts, with the same log-probabilities."""
    policy = problems.causal_lm("lora", family, dtype="float64", lora_settings=LORA)
    row = moved(policy)
    full = problems.causal_lm("full", family, dtype="float64")
    weights = merged(policy.model, row)
    given = {name: weights[name].unsqueeze(0) for name in full.initial(0)}
    uniform = np.random.default_rng(0).random((3, 6))
    mine, theirs = (p.sample(r, ["w1 w2", "w3", "w4 w5"], uniform) for p, r in ((policy, row), (full, given)))
    assert mine.texts == theirs.texts
    torch.testing.assert_close(mine.log_probs, theirs.log_probs, rtol=1e-10, atol=0)
    torch.testing.assert_close(mine.ref_log_probs, theirs.ref_log_probs, rtol=1e-10, atol=0)
    assert float((mine.log_probs - mine.ref_log_probs).abs().max()) > 0.1


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_agents_in_a_pass_are_agents_alone(family) -> None:
    policy = problems.causal_lm("lora", family, dtype="float64", lora_settings=LORA)
    theta = moved(policy, agents=3)
    data, rows = policy.encode(models.pairs(PAIRS)), np.arange(PAIRS).reshape(3, 2)
    together = policy.log_probs(theta, data, rows)
    for i in range(3):
        alone = policy.log_probs({name: t[i : i + 1] for name, t in theta.items()}, data, rows[i : i + 1])
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(a[0], b[i], rtol=1e-12, atol=0)


def test_layers_that_are_computed_again_have_it_too() -> None:
    found = []
    for checkpointing in (False, True):
        policy = problems.causal_lm(
            "lora", "llama", dtype="float64", lora_settings=LORA, checkpointing=checkpointing
        )
        data = policy.encode(models.pairs(PAIRS))
        reference = log_probs(policy, None, data, np.arange(PAIRS))
        on = Problem(policy=policy, data=data, reference=reference, objective=ObjectiveSettings())
        row = moved(policy)
        found.append(global_loss_and_gradient(on, row, np.arange(PAIRS), np.full(PAIRS, 1 / PAIRS)))
    (loss, gradient), (again, same) = found
    assert again == pytest.approx(loss, rel=1e-12)
    assert problems.apart(gradient, same) < 1e-12
    assert not policy.residuals(gradient)


def test_a_pass_takes_the_folded_layers_beside_the_frozen_ones() -> None:
    plain, folds = (
        problems.causal_lm("lora", lora_settings=settings)
        for settings in (LORA.model_copy(update={"mixing": "factors"}), LORA)
    )
    again = sum(t.nbytes for t in folds.residuals(folds.initial(0)).values())
    assert folds.frozen_bytes - plain.frozen_bytes == again > 0


def test_a_base_that_rounds_is_refused() -> None:
    with pytest.raises(InputError, match=r"residual, but the frozen weight of .* is of bfloat16"):
        problems.causal_lm("lora", dtype="bfloat16", lora_settings=LORA)
