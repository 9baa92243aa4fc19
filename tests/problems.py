"""Small problems of every kind of policy, and learners on them."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from prefmesh.algorithms.gradients import Problem
from prefmesh.algorithms.methods import METHODS, Population
from prefmesh.algorithms.optimizers import OptimizerSettings
from prefmesh.algorithms.rounds import Learner
from prefmesh.algorithms.sampling import Sampler
from prefmesh.algorithms.state import State
from prefmesh.evaluation.scores import log_probs
from prefmesh.objectives import ObjectiveSettings
from prefmesh.policies.base import Params, average
from prefmesh.policies.causal_lm import CausalLMPolicy
from prefmesh.policies.log_linear import FeaturePairs, LogLinearPolicy
from prefmesh.policies.lora import LoraSettings
from prefmesh.randomness import generator
from tests import models

LORA = LoraSettings(r=2, lora_alpha=4)
DIM = 5


def causal_lm(
    train: str, family: str = "gpt2", *, dtype: str = "float32", seed: int = 0, **settings: Any
) -> CausalLMPolicy:
    """A policy on a tiny random model."""
    return CausalLMPolicy(
        models.model(family, dtype=dtype, seed=seed),
        models.tokenizer(),
        train=train,  # type: ignore[arg-type]
        **({"lora_settings": LORA} | settings if train == "lora" else settings),
    )


@lru_cache(maxsize=16)
def problem(kind: str, pairs: int, dtype: str = "float64", **objective: Any) -> Problem:
    """`kind`: log_linear (random features), lora or full (a tiny GPT-2), or lora/llama and the like."""
    settings = ObjectiveSettings(**objective)
    if kind == "log_linear":
        random = generator(0, "test features")
        precision = getattr(torch, dtype)
        policy = LogLinearPolicy(lambda texts: np.zeros((len(texts), DIM)), dtype=precision)
        # A taste that the answers follow, noisily: the optimum of DPO is finite and not zero.
        chosen, rejected = random.normal(size=(2, pairs, DIM))
        swap = (chosen - rejected) @ np.arange(1.0, DIM + 1) + random.logistic(size=pairs) * 4 < 0
        chosen[swap], rejected[swap] = rejected[swap], chosen[swap].copy()
        data = FeaturePairs.of(
            torch.as_tensor(chosen, dtype=precision), torch.as_tensor(rejected, dtype=precision)
        )
        reference = torch.zeros(pairs, 2, dtype=precision)
        return Problem(policy=policy, data=data, reference=reference, objective=settings)
    train, _, family = kind.partition("/")
    lm = causal_lm(train, family or "gpt2", dtype=dtype)
    tokens = lm.encode(models.pairs(pairs))
    reference = log_probs(lm, None, tokens, np.arange(pairs))
    return Problem(policy=lm, data=tokens, reference=reference, objective=settings)


def shards(sizes: Sequence[int]) -> list[np.ndarray]:
    """Rows 0 .. sum(sizes) - 1, dealt in order."""
    return np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])


def learner(
    on: Problem,
    sizes: Sequence[int],
    method: Mapping[str, Any],
    optimizer: Mapping[str, Any],
    *,
    weights: str = "uniform",
    agents_per_pass: int | None = None,
    seed: int = 0,
) -> Learner:
    """A learner of N = len(sizes) shards; all agents in one pass unless said otherwise."""
    made = METHODS[method["name"]]
    share = np.array(sizes) / sum(sizes) if weights == "by_size" else np.full(len(sizes), 1 / len(sizes))
    settings = OptimizerSettings(**optimizer)
    chosen = made.Settings(**method).suited(
        beta=on.objective.beta, language=isinstance(on.policy, CausalLMPolicy)
    )
    return Learner(
        problem=on,
        method=made(chosen, Population(weights=share, seed=seed)),
        optimizer=settings,
        sampler=Sampler(shards(sizes), settings, seed),
        agents_per_pass=agents_per_pass or len(sizes),
    )


def go(
    learner: Learner, start: Params | None = None, rounds: int | None = None
) -> tuple[State, list[Params], list[dict[str, float]]]:
    """All rounds: the last state, and after each round the average model and the measures."""
    state = learner.begin(learner.problem.policy.initial(0) if start is None else start)
    models_, measures = [], []
    for round_ in range(1, (learner.method.settings.rounds if rounds is None else rounds) + 1):
        state, found = learner.round(state, round_)
        models_.append({name: tensor.clone() for name, tensor in average(state.theta).items()})
        measures.append(found)
    return state, models_, measures


def apart(a: Params, b: Params) -> float:
    """The largest difference between any two numbers of two models."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)
