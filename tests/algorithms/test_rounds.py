"""One round: what its measures mean, and how many agents share a pass."""

import numpy as np
import pytest
import torch

from tests import problems

SIZES = (4, 3, 5)


def test_the_loss_is_that_before_each_step() -> None:
    """Two steps of SGD on full batches: the mean of the losses at theta_0 and theta_1, over agents."""
    on = problems.problem("log_linear", sum(SIZES), beta=0.5)
    learner = problems.learner(
        on, SIZES, {"name": "local_only", "local_steps": 2}, {"name": "sgd", "lr": 0.5, "batch_size": "full"}
    )
    _, measures = learner.round(learner.begin(on.policy.initial(0)), 1)
    x = (on.data.chosen - on.data.rejected).numpy()
    losses, margins = [], []
    for shard in problems.shards(SIZES):
        theta = np.zeros(problems.DIM)
        for _ in range(2):
            h = x[shard] @ theta
            losses.append(np.log1p(np.exp(-0.5 * h)).mean())
            margins.append(0.5 * h.mean())
            theta += 0.5 * (0.5 / (1 + np.exp(0.5 * h))) @ x[shard] / len(shard)
    assert measures["loss"] == pytest.approx(np.mean(losses), rel=1e-10)
    assert measures["rewards/margins"] == pytest.approx(np.mean(margins), rel=1e-10)
    assert measures["rewards/margins"] == pytest.approx(
        measures["rewards/chosen"] - measures["rewards/rejected"], rel=1e-9
    )
    assert measures["parameters_finite"]


def test_a_broken_agent_is_seen_before_it_is_mixed() -> None:
    on = problems.problem("log_linear", sum(SIZES))
    learner = problems.learner(on, SIZES, {"name": "dec_dpo", "graph": "path"}, {"name": "sgd", "lr": 0.5})
    state = learner.begin(on.policy.initial(0))
    state.theta["theta"][2, 1] = torch.inf
    _, measures = learner.round(state, 1)
    assert not measures["parameters_finite"]


def test_clipping_bounds_the_step_but_not_what_is_measured() -> None:
    on = problems.problem("log_linear", sum(SIZES))
    ends = []
    for limit in (None, 1e-3):
        learner = problems.learner(
            on, SIZES, {"name": "local_only"}, {"name": "sgd", "lr": 1.0, "max_grad_norm": limit}
        )
        ends.append(problems.go(learner, rounds=1)[0].theta["theta"])
    assert ends[1].norm(dim=1).tolist() == pytest.approx([1e-3] * 3)
    assert ends[0].norm(dim=1).min() > 1e-2
    cosine = torch.nn.functional.cosine_similarity(ends[0], ends[1])
    assert cosine.tolist() == pytest.approx([1] * 3)


@pytest.mark.parametrize("state", ["keep", "reset"])
def test_moments_are_kept_or_start_anew(state) -> None:
    """SGD with momentum 0.5 and a gradient that hardly changes: kept, steps grow as 1, 1.5, 1.75."""
    on = problems.problem("log_linear", sum(SIZES))
    optimizer = {"name": "sgd", "lr": 1e-6, "momentum": 0.5, "batch_size": "full", "state": state}
    learner = problems.learner(on, SIZES, {"name": "fed_dpo"}, optimizer)
    last, models, _ = problems.go(learner, rounds=3)
    steps = np.diff([0, *(float(model["theta"].norm()) for model in models)])
    assert steps / steps[0] == pytest.approx([1, 1.5, 1.75] if state == "keep" else [1, 1, 1], rel=1e-4)
    assert ("momentum/theta" in last.optimizer) == (state == "keep")


@pytest.mark.parametrize(
    ("method", "optimizer"),
    [
        (
            {"name": "fed_dpo", "staleness": 2, "local_steps": 2},
            {"name": "adamw", "lr": 0.01, "batch_size": 2},
        ),
        ({"name": "fed_dpo", "local_steps": 2}, {"name": "sgd", "lr": 0.5, "sampling": "with_replacement"}),
    ],
    ids=["shuffled", "with replacement"],
)
@pytest.mark.parametrize("order", [[2, 0, 1], [2, 1, 0]])
def test_agents_may_act_in_any_order(method, optimizer, order) -> None:
    """Who is hosted where decides on no draw, no moment and no start."""
    on = problems.problem("log_linear", sum(SIZES))
    plain, other = (
        problems.learner(on, SIZES, method | {"rounds": 4}, optimizer, weights="by_size", agents_per_pass=2)
        for _ in range(2)
    )
    other.method.participants = lambda round_: np.array(order)  # type: ignore[method-assign]
    one, two = problems.go(plain)[0], problems.go(other)[0]
    assert problems.apart(one.theta, two.theta) < 1e-12
    assert (one.batches_drawn == two.batches_drawn).all()
    for name, tensor in one.optimizer.items():
        assert torch.allclose(tensor.double(), two.optimizer[name].double(), atol=1e-12)
