"""Gradients of stacked agents, and an unbiased estimate of the squared norm of the global one."""

import numpy as np
import pytest
import torch

from prefmesh.algorithms.gradients import (
    contributions,
    global_loss_and_gradient,
    inner,
    loss_and_gradient,
    norm_sq,
)
from prefmesh.randomness import generator
from tests import problems


@pytest.mark.parametrize("kind", ["log_linear", "lora", "full"])
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "robust", "aot"])
def test_finite_differences(kind, loss_type) -> None:
    """Along random directions, each agent's own; float64."""
    on = problems.problem(kind, 5, loss_type=loss_type, beta=0.2)
    made = torch.Generator().manual_seed(0)
    row = on.policy.initial(0)

    def noise(size: float) -> dict[str, torch.Tensor]:
        return {
            name: size * torch.randn(2, *t.shape[1:], generator=made, dtype=t.dtype)
            for name, t in row.items()
        }

    theta = {name: row[name] + step for name, step in noise(0.05).items()}
    rows = np.array([[0, 1, 2], [3, 4, 0]])
    weights = torch.tensor([[0.5, 0.3, 0.2], [1.0, 0.0, 2.0]], dtype=torch.float64)
    direction = noise(1.0)
    eps = 1e-6

    def losses(sign: float) -> torch.Tensor:
        moved = {name: t + sign * eps * direction[name] for name, t in theta.items()}
        return loss_and_gradient(on, moved, rows, weights)[0]

    _, gradient, log_probs = loss_and_gradient(on, theta, rows, weights)
    slope = sum((gradient[name] * direction[name]).flatten(1).sum(1) for name in theta)
    numeric = (losses(1) - losses(-1)) / (2 * eps)
    assert torch.allclose(slope, numeric, rtol=1e-5, atol=1e-7)
    assert not any(t.requires_grad for t in (*gradient.values(), log_probs.chosen))


@pytest.mark.parametrize("loss_type", ["sigmoid", "aot"])
@pytest.mark.parametrize("kind", ["log_linear", "lora"])
def test_the_global_gradient_is_cut_into_passes_and_added_up(kind, loss_type) -> None:
    on = problems.problem(kind, 9, beta=0.3, loss_type=loss_type)
    row = {name: t + 0.1 for name, t in on.policy.initial(0).items()}
    rows, weights = np.arange(9)[::-1].copy(), np.arange(1.0, 10) / 45
    whole_loss, whole, _ = loss_and_gradient(on, row, rows[None], torch.as_tensor(weights[None]), alone=True)

    class Narrow:
        """The same policy with room for few tokens."""

        tokens_per_pass = 40 if kind == "lora" else 2

        def __getattr__(self, name):
            return getattr(on.policy, name)

    import dataclasses

    loss, gradient = global_loss_and_gradient(dataclasses.replace(on, policy=Narrow()), row, rows, weights)
    assert loss == pytest.approx(float(whole_loss), rel=1e-12)
    assert problems.apart(gradient, whole) < 1e-12


@pytest.mark.parametrize("loss_type", ["sigmoid", "aot", "sft"])
def test_agents_of_one_pass_do_not_see_each_other_nor_what_fills_their_batches(loss_type) -> None:
    """Two agents with full batches of 2 and 4 pairs, side by side and each by itself."""
    on = problems.problem("lora", 6, loss_type=loss_type, beta=0.3)
    row = {name: t + 0.1 for name, t in on.policy.initial(0).items()}
    two = {name: t.expand(2, *t.shape[1:]) for name, t in row.items()}
    rows, weights = (
        np.array([[0, 1, 0, 0], [2, 3, 4, 5]]),
        torch.tensor([[0.5, 0.5, 0, 0], [0.25] * 4]).double(),
    )
    losses, gradient, _ = loss_and_gradient(on, two, rows, weights)
    for i, count in enumerate((2, 4)):
        loss, own, _ = loss_and_gradient(on, row, rows[i : i + 1, :count], weights[i : i + 1, :count])
        assert float(losses[i]) == pytest.approx(float(loss), rel=1e-12)
        assert problems.apart({name: t[i : i + 1] for name, t in gradient.items()}, own) < 1e-12


def test_exactly_over_all_pairs() -> None:
    """||grad f||^2 by numpy: logistic regression."""
    on = problems.problem("log_linear", 20, beta=0.5)
    theta = np.linspace(-1, 1, problems.DIM)
    weights = np.arange(1.0, 21) / 210
    x = (on.data.chosen - on.data.rejected).numpy()
    expected = -0.5 * (weights / (1 + np.exp(0.5 * x @ theta))) @ x
    row = {"theta": torch.as_tensor(theta[None])}
    found, loss = norm_sq(
        contributions(on, row, np.arange(20), weights, sample=None, random=generator(0, "gradient"))
    )
    assert found == pytest.approx(expected @ expected, rel=1e-12)
    assert loss == pytest.approx(weights @ np.log1p(np.exp(-0.5 * x @ theta)), rel=1e-12)


def test_the_estimate_is_unbiased_where_the_naive_one_is_not() -> None:
    """600 draws of 4 pairs, near the optimum, where the noise of one draw is many times the squared norm."""
    on = problems.problem("log_linear", 60, beta=0.5)
    weights = np.where(np.arange(60) < 20, 2.0, 1.0) / 80
    rows = np.arange(60)
    row = {"theta": torch.linspace(0.5, 1.5, problems.DIM, dtype=torch.float64)[None]}
    exact, loss = norm_sq(contributions(on, row, rows, weights, sample=None, random=generator(0, "gradient")))
    found = np.array(
        [
            norm_sq(contributions(on, row, rows, weights, sample=4, random=generator(0, "gradient", i)))
            for i in range(600)
        ]
    )
    norms, losses = found.T
    assert abs(norms.mean() - exact) < 4 * norms.std() / np.sqrt(len(norms))
    assert abs(losses.mean() - loss) < 4 * losses.std() / np.sqrt(len(losses))
    assert (norms < 0).any()  # the price of being unbiased

    # The squared norm of one draw's gradient is too large by that draw's variance.
    def naive(i: int) -> float:
        picked = generator(1, "gradient", i).choice(rows, 4, p=weights)
        _, gradient = global_loss_and_gradient(on, row, picked, np.full(4, 1 / 4))
        return inner(gradient, gradient)

    biased = np.array([naive(i) for i in range(600)])
    assert biased.mean() - exact > 10 * biased.std() / np.sqrt(len(biased))
