"""What of LoRA is averaged: B alone, factors in turn, or products; and how far that is from the average model."""

import numpy as np
import pytest
import torch

from prefmesh.algorithms.gradients import Problem
from prefmesh.config import ExperimentConfig
from prefmesh.errors import InputError
from prefmesh.evaluation.scores import log_probs
from prefmesh.experiment import prepare
from prefmesh.mesh import FactoredMesh, factor_pairs
from prefmesh.objectives import ObjectiveSettings
from prefmesh.policies.base import Params
from prefmesh.policies.lora import LoraSettings
from prefmesh.run import run
from tests import models, problems
from tests.runs import TINY, config

SIZES = (4, 4, 4, 4, 4)
FED = {"name": "fed_dpo", "rounds": 4, "local_steps": 2}
RING = {"name": "dec_dpo", "rounds": 4, "local_steps": 2, "graph": "ring"}
ADAMW = {"name": "adamw", "lr": 0.02, "batch_size": 2}


def learner(mixing: str, method: dict, optimizer: dict = ADAMW, r: int = 2):
    settings = LoraSettings(r=r, lora_alpha=4, mixing=mixing)  # type: ignore[arg-type]
    policy = problems.causal_lm("lora", lora_settings=settings, dtype="float64")
    data = policy.encode(models.pairs(sum(SIZES)))
    reference = log_probs(policy, None, data, np.arange(sum(SIZES)))
    on = Problem(policy=policy, data=data, reference=reference, objective=ObjectiveSettings())
    made = problems.learner(on, SIZES, method, optimizer)
    if mixing == "product":
        made.method.mesh = FactoredMesh.of(len(SIZES))
    return made


def products(theta: Params) -> dict[str, torch.Tensor]:
    """B A of each agent and layer."""
    return {a: theta[b] @ theta[a] for a, b in factor_pairs(list(theta))}


def kept(theta: Params) -> Params:
    return {name: tensor.clone() for name, tensor in theta.items()}


@pytest.mark.parametrize("method", [FED, RING], ids=["server", "ring"])
@pytest.mark.parametrize("mixing", ["factors", "alternate", "product"])
def test_the_error_is_what_the_average_lost(mixing, method) -> None:
    """Against products formed whole, from where local steps end."""
    on = learner(mixing, method)
    state = on.begin(on.problem.policy.initial(0))
    for round_ in range(1, 5):
        before = kept(state.theta)
        theta = kept(state.theta)
        trained = on.problem.policy.trained(theta, round_)
        resting = {name: tensor for name, tensor in theta.items() if name not in trained}
        again = on.begin(on.problem.policy.initial(0))
        again.batches_drawn = state.batches_drawn.copy()
        again.optimizer = kept(state.optimizer)
        on.local(again, round_, np.arange(len(SIZES)), trained, resting)
        ends = products(trained | resting)
        state, measures = on.round(state, round_)
        after = products({n: t[:1] if method is FED else t for n, t in state.theta.items()})
        moved = sum(float((ends[n].mean(0) - after[n].mean(0)).square().sum()) for n in ends)
        length = sum(float(ends[n].mean(0).square().sum()) for n in ends)
        assert measures["lora/mixing_error"] == pytest.approx(np.sqrt(moved / length), rel=1e-9, abs=1e-9)
        if mixing == "alternate":
            still = ".lora_A" if round_ % 2 else ".lora_B"
            unmoved = [torch.equal(state.theta[n], before[n]) for n in before if n.endswith(still)]
            assert all(unmoved)
        if (mixing, method) == ("alternate", FED):
            assert measures["lora/mixing_error"] < 1e-12
        elif round_ > 2:
            assert measures["lora/mixing_error"] > 1e-4


@pytest.mark.parametrize("method", [FED, RING], ids=["server", "ring"])
def test_where_a_is_frozen_mixing_is_exact(method) -> None:
    on = learner("freeze_a", method)
    policy = on.problem.policy
    state, _, measures = problems.go(on)
    assert max(found["lora/mixing_error"] for found in measures) < 1e-12
    assert all(name.endswith(".lora_B") for name in state.theta)
    assert max(float(t.abs().max()) for t in state.theta.values()) > 0.01
    # Training B alone is what LoRA does whose A has no gradient: the same model as with A given to all.
    both = problems.causal_lm("lora", dtype="float64")
    row = {name: tensor[:1] for name, tensor in state.theta.items()}
    given = both.initial(0) | row
    data, rows = on.problem.data, np.arange(sum(SIZES))[None]
    for mine, theirs in zip(
        policy.log_probs(row, data, rows), both.log_probs(given, data, rows), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=0)


def test_frozen_a_is_drawn_anew_for_another_seed() -> None:
    settings = LoraSettings(r=2, mixing="freeze_a")
    found = [problems.causal_lm("lora", lora_settings=settings, seed=0).frozen_factors for _ in range(2)]
    other = problems.causal_lm("lora", lora_settings=settings)
    assert problems.apart(*found) == 0
    raw = config(TINY, policy={**TINY["policy"], "lora": {"r": 2, "mixing": "freeze_a"}})
    seeds = [prepare(raw.replace({"seed": s})).policy.frozen_factors for s in (1, 2)]  # type: ignore[attr-defined]
    assert problems.apart(*seeds) > 0.01
    assert other.frozen_factors


def test_alternating_factors_count_their_own_steps() -> None:
    """Adam's bias correction is by a parameter's own steps: two rounds, each as a first round of that factor."""
    on = learner("alternate", FED)
    state = on.begin(on.problem.policy.initial(0))
    for round_ in (1, 2, 3):
        state, _ = on.round(state, round_)
    assert state.optimizer["steps"].tolist() == [4] * len(SIZES)
    assert state.optimizer["steps/1"].tolist() == [2] * len(SIZES)


def test_one_agent_alternating_is_block_descent() -> None:
    """With SGD: B by its gradient, then A by its own, as written down."""
    on = learner(
        "alternate",
        {**FED, "name": "local_only", "local_steps": 1},
        {"name": "sgd", "lr": 0.1, "batch_size": "full"},
    )
    row = on.problem.policy.initial(0)
    state = on.begin(row)
    theta = {name: t[:1].clone().requires_grad_() for name, t in state.theta.items()}
    for round_, factor in ((1, ".lora_B"), (2, ".lora_A"), (3, ".lora_B")):
        state, _ = on.round(state, round_)
        found = on.problem.log_probs(theta, np.arange(4)[None])
        margin = found.margin
        loss = -torch.nn.functional.logsigmoid(on.problem.objective.beta * margin).mean()
        names = [name for name in theta if name.endswith(factor)]
        for name, g in zip(names, torch.autograd.grad(loss, [theta[n] for n in names]), strict=True):
            theta[name] = (theta[name] - 0.1 * g).detach().requires_grad_()
        mine = {name: tensor[:1] for name, tensor in state.theta.items()}
        assert problems.apart(mine, {n: t.detach() for n, t in theta.items()}) < 1e-12


@pytest.mark.parametrize(
    ("mixing", "share"), [("factors", 1), ("product", 1), ("freeze_a", None), ("alternate", None)]
)
def test_bytes_are_of_what_is_sent(mixing, share, tmp_path) -> None:
    lora = {"r": 2, "target_modules": ["c_attn"]}
    method = {**FED, "rounds": 2}
    summary = [
        run(
            config(TINY, policy={**TINY["policy"], "lora": {**lora, "mixing": m}}, method=method),
            tmp_path / f"{k}",
        )
        for k, m in enumerate(("factors", mixing))
    ]
    whole, found = (one["bytes_sent_total"] for one in summary)
    if share:
        assert found == whole
        return
    # c_attn: from 64 to 192; A is r x in, B is out x r.
    policy = prepare(config(TINY, policy={**TINY["policy"], "lora": lora})).policy
    row = policy.initial(0)
    numbers = {f: sum(t.numel() for n, t in row.items() if n.endswith(f)) for f in (".lora_A", ".lora_B")}
    both = sum(numbers.values())
    wanted = numbers[".lora_B"] / both if mixing == "freeze_a" else 1 / 2
    assert found / whole == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"method": {**FED, "staleness": 1}}, "product, but fed_dpo does more"),
        ({"method": {**FED, "name": "scaffold"}}, "product, but scaffold does more"),
        ({"method": {**FED, "name": "group_robust"}}, "product, but group_robust does more"),
        ({"method": {**FED, "compression": ["int8"]}}, "product, but fed_dpo does more"),
        ({"method": {**RING, "rounds": 2}, "evaluation": {"neighbour_mixes": 2}}, "neighbour_mixes"),
        ({"policy": {"r": 100}}, "at most 64"),
        (
            {"policy": {"mixing": "alternate"}, "method": {**FED, "name": "ditto"}},
            "alternate, but ditto",
        ),
        (
            {"policy": {"mixing": "alternate"}, "method": {**FED, "name": "ifca"}},
            "alternate, but ifca",
        ),
    ],
)
def test_refused(changes, line) -> None:
    lora = {"r": 2, "mixing": "product", **changes.pop("policy", {})}
    raw = config(TINY, **{"policy": {**TINY["policy"], "lora": lora}, "method": FED, **changes})
    with pytest.raises(InputError, match=line):
        prepare(raw)


def test_full_training_has_no_factors() -> None:
    with pytest.raises(InputError, match="lora has no meaning with train full"):
        ExperimentConfig.parse(
            {**config(TINY).plain(), "policy": {"train": "full", "lora": {"mixing": "product"}}}
        )
