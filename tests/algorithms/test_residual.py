"""`policy.lora.mixing: residual`: the server's model is the average of the agents', by weights and by what it says."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from prefmesh.algorithms import chunks
from prefmesh.algorithms.gradients import Problem, global_loss_and_gradient
from prefmesh.algorithms.rounds import Learner
from prefmesh.algorithms.state import State
from prefmesh.bench.benchmark import bench
from prefmesh.bench.contest import Schedule
from prefmesh.errors import InputError
from prefmesh.evaluation.scores import log_probs
from prefmesh.experiment import prepare
from prefmesh.inspection import evaluate_run
from prefmesh.mesh import ResidualMesh, factor_pairs, residual_of
from prefmesh.metrics import read_lines
from prefmesh.objectives import ObjectiveSettings
from prefmesh.policies.base import Params
from prefmesh.policies.causal_lm import CausalLMPolicy
from prefmesh.policies.loading import model_source
from prefmesh.policies.lora import LoraSettings
from prefmesh.run import run
from prefmesh.theory.landscape import measure
from tests import models, problems
from tests.equivalence import naive
from tests.runs import TINY, config, write_jsonl

SIZES = (4, 6, 2, 4, 8)
FED = {"name": "fed_dpo", "rounds": 4, "local_steps": 2}
ADAMW = {"name": "adamw", "lr": 0.02, "batch_size": 2}
SGD = {"name": "sgd", "lr": 0.5, "batch_size": "full"}
SCALING = 2.0
RESIDUAL = {
    "policy": {**TINY["policy"], "lora": {"r": 2, "mixing": "residual"}},
    "method": {**FED, "participation": 2},
    "optimizer": {"lr": 0.02},
}


def learner(
    method: dict,
    optimizer: dict = ADAMW,
    *,
    family: str = "gpt2",
    dtype: str = "float64",
    weights: str = "uniform",
) -> Learner:
    settings = LoraSettings(r=2, lora_alpha=4, mixing="residual")
    policy = problems.causal_lm("lora", family, lora_settings=settings, dtype=dtype)
    data = policy.encode(models.pairs(sum(SIZES)))
    reference = log_probs(policy, None, data, np.arange(sum(SIZES)))
    on = Problem(policy=policy, data=data, reference=reference, objective=ObjectiveSettings())
    made = problems.learner(on, SIZES, method, optimizer, weights=weights)
    made.method.mesh = ResidualMesh.of(len(SIZES))
    return made


def weights_of(theta: Params) -> Params:
    """R + B A of each row, in float64, by the name of R."""
    return {
        residual_of(a): theta[residual_of(a)].double() + theta[b].double() @ theta[a].double()
        for a, b in factor_pairs(list(theta))
    }


def ends(on: Learner, state: State, round_: int) -> Params:
    """Where this round's participants will get to, beside the residuals that all have."""
    again = State(
        theta=dict(state.theta),
        optimizer={name: tensor.clone() for name, tensor in state.optimizer.items()},
        batches_drawn=state.batches_drawn.copy(),
    )
    agents = on.method.participants(round_)
    start = on.method.start(again, round_, agents)
    still = on.problem.policy.residuals(start)
    theta = {name: tensor.clone() for name, tensor in start.items() if name not in still}
    on.local(again, round_, agents, theta, still)
    return theta | still


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float64", 1e-12)])
@pytest.mark.parametrize(
    ("method", "weights"),
    [
        (FED, "uniform"),
        ({**FED, "participation": 3}, "by_size"),
        ({**FED, "name": "fed_prox", "mu": 0.1}, "by_size"),
    ],
    ids=["all", "some by size", "prox"],
)
def test_the_average_of_models_round_after_round(method, weights, dtype, tolerance, family) -> None:
    on = learner(method, dtype=dtype, family=family, weights=weights)
    state = on.begin(on.problem.policy.initial(0))
    left = 0.0
    for round_ in range(1, 5):
        server, agents = (
            weights_of({n: t[:1] for n, t in state.theta.items()}),
            weights_of(ends(on, state, round_)),
        )
        active = on.method.participants(round_)
        shares = torch.from_numpy(on.method.update_scale[active] / len(active))
        before = on.problem.policy.residuals(state.theta)
        state, measures = on.round(state, round_)
        found = weights_of({n: t[:1] for n, t in state.theta.items()})
        for name, tensor in found.items():
            wanted = (1 - shares.sum()) * server[name] + torch.einsum("k,koi->oi", shares, agents[name])
            torch.testing.assert_close(tensor, wanted, rtol=0, atol=tolerance)
        assert measures["lora/mixing_error"] < (1e-5 if dtype == "float32" else 1e-12)
        assert measures["consensus_error_before_mixing"] > 0
        left = problems.apart(on.problem.policy.residuals(state.theta), before)
        # Stored once, whoever shares it.
        assert all(t.stride(0) == 0 for t in state.theta.values())
    assert left > 100 * tolerance, "averages of factors alone would have passed"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_step_of_sgd_is_a_step_of_the_merged_model(family) -> None:
    """The server's gradient by hand: of factors on a base into which R was folded, from a copy of the model with those weights."""
    on = learner({**FED, "rounds": 2, "local_steps": 1}, SGD, family=family, weights="by_size")
    state = on.begin(on.problem.policy.initial(0))
    for round_ in (1, 2):
        state, _ = on.round(state, round_)
    row = {name: tensor[:1].clone() for name, tensor in state.theta.items()}
    residuals = on.problem.policy.residuals(row)
    assert max(float(t.abs().max()) for t in residuals.values()) > 1e-6
    plain = models.model(family, dtype="float64")
    with torch.no_grad():
        for name, tensor in residuals.items():
            weight = plain.get_parameter(name.replace(".residual", ".weight"))
            matrix = tensor[0].T if family == "gpt2" else tensor[0]
            weight += SCALING * matrix
    merged = CausalLMPolicy(
        plain, models.tokenizer(), train="lora", lora_settings=LoraSettings(r=2, lora_alpha=4)
    )
    # The reference is the base as it was loaded: its numbers are those of before.
    given = Problem(
        policy=merged, data=on.problem.data, reference=on.problem.reference, objective=on.problem.objective
    )
    pairs, share = np.arange(sum(SIZES)), np.full(sum(SIZES), 1 / sum(SIZES))
    factors = {name: tensor for name, tensor in row.items() if name not in residuals}
    loss, gradient = global_loss_and_gradient(given, factors, pairs, share)
    mine, own = global_loss_and_gradient(on.problem, row, pairs, share)
    assert mine == pytest.approx(loss, rel=1e-12)
    assert problems.apart(own, gradient) < 1e-12
    reference = log_probs(on.problem.policy, None, on.problem.data, pairs)
    torch.testing.assert_close(reference, on.problem.reference, rtol=0, atol=0)
    assert float((log_probs(merged, None, given.data, pairs) - reference).abs().max()) > 1e-6


def test_no_agent_has_a_residual_of_its_own() -> None:
    """Moments, messages and the memory that agents are taken to need are of the factors alone."""
    on = learner(FED)
    row = on.problem.policy.initial(0)
    factors = {name for name in row if not name.endswith(".residual")}
    state = on.begin(row)
    assert {name.partition("/")[2] for name in state.optimizer if "/" in name} == factors
    assert set(on.problem.policy.trained(row, 1)) == factors
    assert len([name for name in state.tensors() if name.startswith("theta/")]) == len(row)
    assert all(state.tensors()[f"theta/{name}"].shape[0] == 1 for name in row)
    residual = sum(t.nbytes for name, t in row.items() if name not in factors)
    plenty = 2.0
    left = chunks.pass_bytes(on, row, 0, plenty)
    without = {name: row[name] for name in factors}
    assert chunks.pass_bytes(on, without, 0, plenty) - left == pytest.approx(
        residual / chunks.TEMPORARY, abs=2
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("residual") / "run"
    run(config(TINY, **RESIDUAL), out)
    return out


def test_the_reference_is_the_base_as_it_was_loaded(finished) -> None:
    """Before training the loss is ln 2 whatever is cached; after it, of the exported model against the plain base."""
    lines = read_lines(finished / "metrics.jsonl")
    assert lines[0]["train_loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert abs(lines[-1]["train_loss"] - np.log(2)) > 1e-5
    experiment = prepare(config(TINY, **RESIDUAL))
    base = AutoModelForCausalLM.from_pretrained(model_source("builtin:tiny")).eval()
    saved = AutoModelForCausalLM.from_pretrained(finished / "policy").eval()
    data, rows = experiment.evaluator.problem.data, experiment.evaluator.held
    margins = []
    with torch.no_grad():
        for i in rows.tolist():
            ratio = [
                float(naive.sequence_log_prob(saved, data.prompt[i], side[i]))
                - float(naive.sequence_log_prob(base, data.prompt[i], side[i]))
                for side in (data.chosen, data.rejected)
            ]
            margins.append(ratio[0] - ratio[1])
    beta = experiment.config.objective.beta
    assert lines[-1]["eval/rewards/margins"] == pytest.approx(beta * np.mean(margins), abs=2e-5)


def test_what_is_saved_is_evaluated_as_it_was(finished, tmp_path) -> None:
    experiment = prepare(config(TINY, **RESIDUAL))
    held = [experiment.pairs[i] for i in experiment.evaluator.held]
    rows = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected, "user": p.user} for p in held]
    data = write_jsonl(tmp_path / "held.jsonl", rows)
    found = evaluate_run(finished, str(data), [], lambda _: None)
    last = read_lines(finished / "metrics.jsonl")[-1]
    assert found["margin"] == pytest.approx(last["eval/rewards/margins"], abs=1e-5)
    assert found["loss"] == pytest.approx(last["eval/loss"], abs=1e-5)


def test_all_agents_hear_of_every_residual(finished) -> None:
    """Two of three take part; c_attn alone would be 64 x 192: (2 + 1) x 2 x 256 numbers are fewer."""
    row = prepare(config(TINY, **RESIDUAL)).policy.initial(0)
    factors = sum(t.numel() for name, t in row.items() if not name.endswith(".residual"))
    residual = sum(
        min(t.numel(), (2 + 1) * 2 * sum(t.shape[1:]))
        for name, t in row.items()
        if name.endswith(".residual")
    )
    sent = [line["bytes_sent"] for line in read_lines(finished / "metrics.jsonl")]
    assert sent == [0] + 4 * [4 * (2 * 2 * factors + 3 * residual)]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"method": {"name": "dec_dpo", "graph": "ring"}}, "residual, but dec_dpo is no server"),
        ({"method": {**FED, "staleness": 1}}, "residual, but fed_dpo is no server that only averages"),
        (
            {"method": {**FED, "compression": ["int8"]}},
            "residual, but fed_dpo is no server that only averages",
        ),
        ({"method": {**FED, "name": "scaffold"}}, "residual, but scaffold"),
        ({"method": {**FED, "name": "fine_tuning", "personal_rounds": 1}}, "residual, but fine_tuning"),
        ({"method": {"name": "centralized"}}, "residual, but centralized"),
        ({"policy": {"lora": {"r": 2, "mixing": "residual", "ranks": [1, 2, 2]}}}, "ranks: found some"),
        ({"policy": {"load_in_4bit": True}}, "load_in_4bit: true"),
        ({"runtime": {"dtype": "bfloat16"}}, "runtime.dtype: bfloat16 would round away"),
    ],
)
def test_refused(changes, line) -> None:
    given = {**RESIDUAL, **changes, "policy": {**RESIDUAL["policy"], **changes.get("policy", {})}}  # type: ignore[dict-item]
    with pytest.raises(InputError, match=line) as refusal:
        prepare(config(TINY, **given))
    assert "\n" not in str(refusal.value)
    assert "allowed" in str(refusal.value)


def test_other_measures_refuse_it() -> None:
    settings = config(TINY, **RESIDUAL)
    with pytest.raises(InputError, match="residual, but landscape takes"):
        measure(prepare(settings), rounds=1)
    with pytest.raises(InputError, match="residual, but bench takes"):
        bench(settings, [], Schedule(turns=1, rounds=1))
