"""KL and win rate, on a writer whose distribution is known."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from jaxtyping import Float

from prefmesh.evaluation.generation import Writer, kl_estimate, wins, write
from prefmesh.policies.base import Params, Samples
from prefmesh.preferences.pairs import Text

REF = np.array([0.5, 0.3, 0.2])


class Dice:
    """Writes one of three words, with log-probabilities `params["logits"]` (agents, 3); the reference is REF."""

    def sample(
        self, params: Params, prompts: Sequence[Text], uniform: Float[np.ndarray, "prompts tokens"]
    ) -> Samples:
        log_pi = params["logits"][0].log_softmax(0).double().numpy()
        drawn = np.searchsorted(np.exp(log_pi).cumsum(), uniform[:, 0])
        return Samples(
            texts=["abc"[i] for i in drawn],
            log_probs=torch.tensor(log_pi[drawn][None]),
            ref_log_probs=torch.tensor(np.log(REF)[drawn][None]),
        )


def written(row: Params, prompts: int, seed: int) -> tuple[float, float]:
    """The estimate and its error, from so many samples."""
    uniform = np.random.default_rng(seed).random((prompts, 1))
    found = write(Dice(), row, ["x"] * prompts, uniform)
    assert len(found.texts) == prompts
    return kl_estimate(found.log_ratio)


ROW = {"logits": torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64)}


def test_the_kl_estimate_is_unbiased_and_knows_its_error() -> None:
    """sum pi log(pi / ref), by hand; 300 estimates of 50 samples each."""
    pi = np.exp([0, 1, 2]) / np.exp([0, 1, 2]).sum()
    kl = float((pi * np.log(pi / REF)).sum())
    found = [written(ROW, 50, seed) for seed in range(300)]
    means = np.array([mean for mean, _ in found])
    assert abs(means.mean() - kl) < 4 * means.std() / np.sqrt(300)
    assert np.mean([error for _, error in found]) == pytest.approx(means.std(), rel=0.15)
    assert isinstance(Dice(), Writer)


def test_at_the_reference_it_is_zero() -> None:
    row = {"logits": torch.tensor(np.log(REF))[None]}
    assert written(row, 20, 0) == pytest.approx((0, 0), abs=1e-12)


def test_one_sample_has_no_error() -> None:
    assert np.isnan(written(ROW, 1, 0)[1])


def test_no_prompts_are_no_samples() -> None:
    found = write(Dice(), ROW, [], np.zeros((0, 1)))
    assert (found.texts, len(found.log_ratio)) == ([], 0)


def test_wins_by_hand() -> None:
    def longer(user: str, texts: Sequence[str]) -> Float[np.ndarray, " texts"]:
        sign = 1.0 if user == "likes long" else -1.0
        return sign * np.array([len(text) for text in texts], dtype=float)

    policy, reference = ["aaa", "b", "cc", "d"], ["a", "bb", "dd", "e"]
    assert wins(longer, "likes long", policy, reference) == 1 + 0 + 0.5 + 0.5
    assert wins(longer, "likes short", policy, reference) == 0 + 1 + 0.5 + 0.5
    assert wins(longer, "likes long", policy, policy) == 2
