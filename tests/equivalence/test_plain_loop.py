"""The engine, against the same training written plainly (`naive.py`): PEFT or plain transformers, torch.optim, W Theta."""

import numpy as np
import pytest
import torch

from prefmesh.policies.base import Params
from tests import models, problems
from tests.equivalence import naive

# PEFT asks transformers for a name that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

BETA = 0.3
SIZES = (4, 3, 5)
STEPS = 2
BATCH = 2
RING_OF_3 = np.full((3, 3), 1 / 3)  # Metropolis: every agent has degree 2, weights 1 / (1 + 2)
PATH_OF_3 = np.array([[2, 1, 0], [1, 1, 1], [0, 1, 2]]) / 3  # degrees 1, 2, 1: all links 1 / (1 + 2)
SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.5}
ADAMW = {"name": "adamw", "lr": 2e-4, "weight_decay": 0.01}


def plain_loop(
    kind: str, dtype: str, start: Params, optimizer: dict, learner, mixing: np.ndarray | None, rounds: int
) -> Params:
    """Theta after `rounds` rounds. `mixing` none: a server averages."""
    train, _, family = kind.partition("/")
    make = naive.peft_model if train == "lora" else naive.full_model
    agents = [make(start, family, dtype) for _ in SIZES]
    optimizers = [naive.optimizer(optimizer, agent) for agent in agents]
    reference = models.model(family, dtype=dtype)
    data = learner.problem.data
    w = np.full((3, 3), 1 / 3) if mixing is None else mixing
    for round_ in range(1, rounds + 1):
        drawn = np.full(len(SIZES), (round_ - 1) * STEPS)
        rows, weights = learner.sampler.draw(round_, np.arange(len(SIZES)), drawn, STEPS)
        for i, agent in enumerate(agents):
            for step in range(STEPS):
                optimizers[i].zero_grad()
                naive.dpo_loss(agent, reference, data, rows[i, step], weights[i, step], BETA).backward()
                optimizers[i].step()
        theta = naive.stack(agents)
        mixed = {
            name: torch.einsum("ij,j...->i...", torch.as_tensor(w).to(t), t) for name, t in theta.items()
        }
        with torch.no_grad():
            for agent, row in zip(agents, naive.rows_of(mixed), strict=True):
                for name, parameter in naive.trained(agent).items():
                    parameter.copy_(row[name][0])
    return naive.stack(agents)


@pytest.mark.parametrize(
    ("kind", "dtype", "optimizer", "method", "mixing", "tolerance"),
    [
        ("lora/gpt2", "float32", ADAMW, {"name": "dec_dpo", "graph": "path"}, PATH_OF_3, 1e-6),
        ("lora/llama", "float64", ADAMW, {"name": "dec_dpo", "graph": "path"}, PATH_OF_3, 1e-9),
        ("lora/qwen2", "float64", ADAMW, {"name": "fed_dpo"}, None, 1e-9),
        ("lora/llama", "float32", SGD, {"name": "fed_dpo"}, None, 1e-6),
        ("full/llama", "float32", ADAMW, {"name": "dec_dpo", "graph": "ring"}, RING_OF_3, 1e-4),
        # GPT-2's key biases have gradients that are zero but for rounding: in float32 AdamW would make steps of them.
        ("full/gpt2", "float64", ADAMW, {"name": "dec_dpo", "graph": "ring"}, RING_OF_3, 1e-9),
        ("full/gpt2", "float64", SGD, {"name": "dec_dpo", "graph": "path"}, PATH_OF_3, 1e-9),
        # Llama's norm computes in float32 whatever the rest does, and both completions pass it together where they share a prompt.
        ("full/llama", "float64", SGD, {"name": "fed_dpo"}, None, 1e-7),
    ],
)
def test_engine_is_the_plain_loop(kind, dtype, optimizer, method, mixing, tolerance) -> None:
    on = problems.problem(kind, sum(SIZES), dtype, beta=BETA)
    learner = problems.learner(
        on, SIZES, method | {"local_steps": STEPS, "rounds": 2}, optimizer | {"batch_size": BATCH}
    )
    start = on.policy.initial(0)
    state, _, _ = problems.go(learner, start)
    plain = plain_loop(kind, dtype, start, optimizer, learner, mixing, rounds=2)
    assert problems.apart(state.theta, plain) <= tolerance
    assert problems.apart({name: t[:1] for name, t in plain.items()}, start) > 5 * tolerance


@pytest.mark.parametrize(
    ("family", "dtype", "tolerance"),
    [
        ("gpt2", "float32", 1e-6),
        ("gpt2", "float64", 1e-12),
        ("llama", "float32", 1e-6),
        ("llama", "float64", 1e-7),
    ],
)
def test_one_lora_step_is_pefts(family, dtype, tolerance) -> None:
    """Gradient and AdamW step from factors that are both non-zero."""
    from prefmesh.algorithms.gradients import loss_and_gradient
    from prefmesh.algorithms.optimizers import OptimizerSettings, apply, initial_state

    on = problems.problem(f"lora/{family}", 6, dtype, beta=BETA)
    torch.manual_seed(0)
    row = {name: t + 0.1 * torch.randn_like(t) for name, t in on.policy.initial(0).items()}
    rows, weights = np.arange(6), np.full(6, 1 / 6)

    agent = naive.peft_model(row, family, dtype)
    loss = naive.dpo_loss(agent, models.model(family, dtype=dtype), on.data, rows, weights, BETA)
    loss.backward()
    gradient = {name: p.grad[None].clone() for name, p in naive.trained(agent).items()}
    naive.optimizer(ADAMW, agent).step()

    w = torch.as_tensor(weights[None]).to(on.reference.dtype)
    our_loss, our_gradient, _ = loss_and_gradient(on, row, rows[None], w)
    settings = OptimizerSettings(**ADAMW)
    after, _ = apply(settings, settings.lr, row, our_gradient, initial_state(settings, row, 1))
    assert float(our_loss) == pytest.approx(float(loss.detach()), rel=10 * tolerance)
    scale = max(float(g.abs().max()) for g in gradient.values())
    assert problems.apart(our_gradient, gradient) <= 10 * tolerance * scale
    assert problems.apart(after, naive.stack([agent])) <= tolerance
