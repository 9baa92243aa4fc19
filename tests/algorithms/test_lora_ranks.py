"""Adapters of unequal ranks: who keeps what, what trains, what is sent and saved."""

import json
import shutil

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

from prefmesh.algorithms.rounds import Learner
from prefmesh.algorithms.state import copies
from prefmesh.config import ExperimentConfig
from prefmesh.errors import InputError
from prefmesh.evaluation.scores import log_probs
from prefmesh.experiment import prepare
from prefmesh.flower.remote import refuse_elsewhere
from prefmesh.mesh import FactoredMesh, Mesh, Ranks, cut, factor_pairs
from prefmesh.policies.base import Params
from prefmesh.policies.export import load_row, save_policy
from prefmesh.policies.lora import LoraSettings
from prefmesh.run import resume, run
from tests import models, problems
from tests.algorithms.test_lora_mixing import FED, RING, kept, learner, products
from tests.runs import TINY, config, contents

R = 3
UNEQUAL = (1, 3, 2, 3, 1)
DECAYING = {"name": "adamw", "lr": 0.02, "batch_size": 2, "weight_decay": 0.1}
ALONE = {"name": "local_only", "rounds": 4, "local_steps": 2}


def unequal(mixing: str, method: dict, ranks=UNEQUAL, optimizer: dict = DECAYING) -> Learner:
    made = learner(mixing, method, optimizer, r=R)
    made.method.mesh.ranks = Ranks(of=np.array(ranks), most=R)
    return made


def beyond(rows: Params) -> float:
    """The largest number beyond agents' ranks."""
    within = cut(rows, np.array(UNEQUAL))
    return max(float((t - within[name]).abs().max()) for name, t in rows.items())


def factors(agents: int, rank: int = R, seed: int = 0) -> Params:
    random = torch.Generator().manual_seed(seed)
    a, b = torch.randn(agents, rank, 6, generator=random), torch.randn(agents, 5, rank, generator=random)
    return {"x.lora_A": a.double(), "x.lora_B": b.double()}


def best(dense: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, v = torch.linalg.svd(dense)
    return u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank]


def test_zeros_beyond_a_rank() -> None:
    rows = {"x.lora_A": torch.ones(2, 3, 2), "x.lora_B": torch.ones(2, 1, 3), "bias": torch.ones(2, 4)}
    found = cut(rows, np.array([1, 3]))
    assert found["x.lora_A"].tolist() == [[[1, 1], [0, 0], [0, 0]], [[1, 1]] * 3]
    assert found["x.lora_B"].tolist() == [[[1, 0, 0]], [[1, 1, 1]]]
    assert found["bias"] is rows["bias"]


def test_neighbours_mix_padded_factors() -> None:
    mesh = Mesh.of(2)
    mesh.ranks = Ranks(of=np.array([1, 3]), most=3)
    theta = {"x.lora_A": torch.tensor([[[4.0], [0], [0]], [[8.0], [2], [6]]])}
    w = csr_array(np.array([[0.5, 0.5], [0.25, 0.75]]))
    assert mesh.mix(w, theta)["x.lora_A"].tolist() == [[[6], [0], [0]], [[7], [1.5], [4.5]]]


def test_what_agents_keep_of_a_servers_product() -> None:
    """The best approximation of their rank; nothing of it is lost on those who have more."""
    mesh = FactoredMesh.of(5)
    mesh.ranks = Ranks(of=np.array(UNEQUAL), most=R)
    row = factors(1)
    dense = (row["x.lora_B"] @ row["x.lora_A"])[0]
    agents = np.array([0, 1, 2, 4])
    shared = {name: t.expand(4, -1, -1) for name, t in row.items()}
    found = mesh.kept(shared, agents)
    for i, rank in enumerate((1, 3, 2, 1)):
        wanted = best(dense, rank) if rank < R else dense
        torch.testing.assert_close(found["x.lora_B"][i] @ found["x.lora_A"][i], wanted, rtol=0, atol=1e-12)
    for name, tensor in found.items():
        assert torch.equal(tensor[1], row[name][0])
    # What has no more than they use stays as it is, to the bit.
    assert problems.apart(mesh.kept(found, agents), found) == 0
    untrained = row | {"x.lora_B": torch.zeros_like(row["x.lora_B"])}
    assert torch.equal(mesh.kept(untrained, np.array([0]))["x.lora_A"][0, 0], row["x.lora_A"][0, 0])


def test_neighbours_keep_the_best_of_their_rank() -> None:
    mesh, ranks = FactoredMesh.of(5), np.array(UNEQUAL)
    mesh.ranks = Ranks(of=ranks, most=R)
    theta = cut(factors(5), ranks)
    dense = theta["x.lora_B"] @ theta["x.lora_A"]
    ring = np.eye(5) / 2 + np.roll(np.eye(5), 1, axis=1) / 4 + np.roll(np.eye(5), -1, axis=1) / 4
    ring[2] = np.eye(5)[2]  # of another degree
    mixed = mesh.mix(csr_array(ring), dict(theta))
    for i, rank in enumerate(UNEQUAL):
        wanted = best(torch.einsum("k,koi->oi", torch.from_numpy(ring[i]), dense), rank)
        torch.testing.assert_close(mixed["x.lora_B"][i] @ mixed["x.lora_A"][i], wanted, rtol=0, atol=1e-12)
    assert beyond(mixed) == 0


def test_the_mean_is_of_the_highest_rank() -> None:
    """Where the products have no more than a rank together, their mean is exact; the first agent's own A does not matter."""
    mesh = FactoredMesh.of(2)
    mesh.ranks = Ranks(of=np.array([1, 2]), most=3)
    theta = cut(factors(2), np.array([1, 2]))
    found = mesh.mean(theta, 2)
    wanted = (theta["x.lora_B"] @ theta["x.lora_A"]).mean(0)
    torch.testing.assert_close((found["x.lora_B"] @ found["x.lora_A"])[0], wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", [FED, RING, ALONE], ids=["server", "ring", "alone"])
@pytest.mark.parametrize("mixing", ["factors", "freeze_a", "alternate", "product"])
def test_equal_ranks_are_none(mixing, method) -> None:
    """To the bit."""
    plain = problems.go(learner(mixing, method, DECAYING, r=R), rounds=3)
    same = problems.go(unequal(mixing, method, [R] * 5), rounds=3)
    assert problems.apart(plain[0].theta, same[0].theta) == 0
    assert plain[2] == same[2]


@pytest.mark.parametrize(
    "optimizer", [DECAYING, {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}]
)
def test_two_zero_factors_do_not_move(optimizer) -> None:
    """By themselves, no rank being known to the learner: neither by Adam, nor by decay."""
    on = learner("factors", ALONE, optimizer, r=R)
    state = on.begin(on.problem.policy.initial(0))
    state.theta = cut(state.theta, np.array(UNEQUAL))
    for round_ in (1, 2, 3):
        state, _ = on.round(state, round_)
    assert beyond(state.theta) == 0
    moments = {n.partition("/")[2]: t for n, t in state.optimizer.items() if not n.startswith("steps")}
    assert beyond(moments) == 0
    assert min(float(t.abs().max()) for t in moments.values()) > 0


@pytest.mark.parametrize("method", [RING, ALONE], ids=["ring", "alone"])
@pytest.mark.parametrize("mixing", ["factors", "freeze_a", "alternate", "product"])
def test_nobody_leaves_its_rank(mixing, method) -> None:
    on = unequal(mixing, method)
    state, _, _ = problems.go(on)
    assert beyond(state.theta) == 0
    assert beyond({n.partition("/")[2]: t for n, t in state.optimizer.items() if "lora" in n}) == 0
    b = {name: t for name, t in state.theta.items() if name.endswith("lora_B")}
    assert min(float(t[i, :, : UNEQUAL[i]].abs().max()) for t in b.values() for i in range(5)) > 1e-4


def test_alone_a_small_adapter_is_one_of_that_rank() -> None:
    """Agent 0 as in a run of rank 1 and the same scaling."""
    on = unequal("factors", ALONE)
    row = on.problem.policy.initial(0)
    small = problems.causal_lm(
        "lora", lora_settings=LoraSettings(r=R, lora_alpha=4).of_rank(1), dtype="float64"
    )
    first = {n: t[:, :1] if n.endswith("A") else t[:, :, :1] for n, t in row.items()}
    assert {n: t.shape for n, t in first.items()} == {n: t.shape for n, t in small.initial(0).items()}
    other = learner("factors", ALONE, DECAYING, r=1)
    object.__setattr__(other.problem, "policy", small)
    large, _, _ = problems.go(on, row)
    alone, _, _ = problems.go(other, first)
    mine = {n: t[:1, :1] if n.endswith("A") else t[:1, :, :1] for n, t in large.theta.items()}
    assert problems.apart(mine, {n: t[:1] for n, t in alone.theta.items()}) < 1e-12


@pytest.mark.parametrize("mixing", ["factors", "freeze_a", "alternate", "product"])
def test_a_server_averages_what_agents_of_their_rank_reach(mixing) -> None:
    """Round by round, from the model that the server has: its first components or its best approximations, trained, padded, averaged."""
    on = unequal(mixing, FED)
    policy, everybody = on.problem.policy, np.arange(5)
    state = on.begin(policy.initial(0))
    for round_ in (1, 2, 3):
        row = {name: t[:1].clone() for name, t in state.theta.items()}
        start = cut(copies(row, 5), np.array(UNEQUAL))
        if mixing == "product":
            for a, b in factor_pairs(list(row)):
                for i, rank in enumerate(UNEQUAL):
                    approximated = best((row[b] @ row[a])[0], rank)
                    given = on.method.mesh.kept({a: row[a], b: row[b]}, np.array([i]))
                    torch.testing.assert_close((given[b] @ given[a])[0], approximated, rtol=0, atol=1e-12)
                    start[a][i], start[b][i] = given[a][0], given[b][0]
        again = on.begin(policy.initial(0))
        again.batches_drawn = state.batches_drawn.copy()
        again.optimizer = kept(state.optimizer)
        end = dict(policy.trained(start, round_))
        resting = {name: t for name, t in start.items() if name not in end}
        on.local(again, round_, everybody, end, resting)
        state, measures = on.round(state, round_)
        if mixing == "product":
            dense = products(end)
            for name, found in products({n: t[:1] for n, t in state.theta.items()}).items():
                torch.testing.assert_close(found[0], best(dense[name].mean(0), R), rtol=0, atol=1e-12)
        else:
            mean = {name: t.mean(0, keepdim=True) for name, t in end.items()}
            assert problems.apart({n: state.theta[n][:1] for n in mean}, mean) < 1e-12
        if mixing in ("freeze_a", "alternate"):
            # An agent's zeros in one factor make the other's there of no matter.
            assert measures["lora/mixing_error"] < 1e-12


def test_bytes_are_of_senders_ranks() -> None:
    """A model of rank 3 in 30 bytes: 10 a component."""
    server = unequal("factors", {**FED, "participation": 2})
    for round_ in (1, 2, 3):
        who = server.method.participants(round_)
        wanted = 2 * 10 * sum(UNEQUAL[i] for i in who)
        assert server.method.bytes_sent(round_, model_bytes=30, data_bytes=0) == wanted
    for graph, edges in (("ring", [2] * 5), ("star", [4, 1, 1, 1, 1])):
        on = unequal("factors", {**RING, "graph": graph})
        wanted = 10 * sum(rank * out for rank, out in zip(UNEQUAL, edges, strict=True))
        assert on.method.bytes_sent(1, model_bytes=30, data_bytes=0) == wanted


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "settings",
    [
        LoraSettings(r=3, lora_alpha=5, ranks=[2, 3]),
        LoraSettings(r=3, lora_alpha=5, ranks=[2, 3], use_rslora=True),
        LoraSettings(r=3, lora_alpha=5, ranks=[2, 3], mixing="freeze_a"),
    ],
    ids=["lora", "rslora", "freeze_a"],
)
def test_peft_loads_an_adapter_of_its_own_rank(settings, tmp_path) -> None:
    from peft import PeftModel

    policy = problems.causal_lm("lora", lora_settings=settings, dtype="float64")
    torch.manual_seed(0)
    row = {n: t + 0.05 * torch.randn_like(t) for n, t in policy.initial(0).items()}
    row = cut(row, np.array([2]))
    save_policy(policy, row, tmp_path / "agent", base="unused", rank=2)
    said = json.loads((tmp_path / "agent" / "adapter_config.json").read_text())
    assert said["r"] == 2
    assert said["lora_alpha"] / (2**0.5 if settings.use_rslora else 2) == pytest.approx(settings.scaling)
    adapted = PeftModel.from_pretrained(models.model("gpt2", dtype="float64"), tmp_path / "agent").eval()
    pairs = models.pairs(3)
    data = policy.encode(pairs)
    with torch.no_grad():
        mine = policy.log_probs(row, data, np.arange(3)[None])[0][0]
        for i in range(3):
            ids = torch.tensor([data.prompt[i] + data.chosen[i]])
            logits = adapted(input_ids=ids).logits[0, len(data.prompt[i]) - 1 : -1].log_softmax(-1)
            theirs = logits.gather(1, torch.tensor(data.chosen[i])[:, None]).sum()
            torch.testing.assert_close(theirs, mine[i], rtol=1e-9, atol=0)
    reference = log_probs(policy, None, data, np.arange(3))[:, 0]
    assert float((reference - mine).abs().max()) > 1e-3
    assert problems.apart(load_row(policy, tmp_path / "agent"), row) == 0


def ranked(
    ranks: list[int], method: dict, mixing: str = "product", r: int = 2, **changes
) -> ExperimentConfig:
    lora = {"r": r, "target_modules": ["c_attn"], "mixing": mixing, "ranks": ranks}
    return config(TINY, **{"policy": {**TINY["policy"], "lora": lora}, "method": method, **changes})


@pytest.mark.parametrize("method", [RING, {**FED, "name": "fine_tuning", "personal_rounds": 1}])
def test_a_run_saves_each_rank_and_resumes(method, tmp_path) -> None:
    wanted = ranked([1, 2, 1], method, evaluation={"samples": 0})
    run(wanted, tmp_path / "run")
    for name, rank in {"policy": 2, "adapters/agent_0000": 1, "adapters/agent_0001": 2}.items():
        assert json.loads((tmp_path / "run" / name / "adapter_config.json").read_text())["r"] == rank
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    (tmp_path / "again" / "summary.json").unlink()
    newest = max((tmp_path / "again" / "checkpoints").iterdir(), key=lambda path: path.name)
    for path in (tmp_path / "again" / "checkpoints").glob(f"{newest.stem}*"):
        path.unlink()
    resume(tmp_path / "again")
    for place in ("policy", "adapters"):
        assert contents(tmp_path / "run" / place) == contents(tmp_path / "again" / place)


@pytest.mark.parametrize(
    ("ranks", "method", "changes", "line"),
    [
        ([1, 2], RING, {}, "policy.lora.ranks: found 2; allowed: 3, one for each agent of dec_dpo"),
        ([1, 2, 2], {"name": "centralized"}, {}, "found 3; allowed: 1, one for each agent of centralized"),
        ([1, 3, 2], RING, {}, "policy.lora: ranks holds 3; allowed: 1 to 2"),
        ([1, 0, 2], RING, {}, "policy.lora: ranks holds 0; allowed: 1 to 2"),
        ([1, 2, 2], {**FED, "name": "scaffold"}, {}, "ranks: found some, but scaffold does more"),
        ([1, 2, 2], {**FED, "staleness": 1}, {}, "ranks: found some, but fed_dpo does more"),
        ([1, 2, 2], {**RING, "compression": ["int8"]}, {}, "ranks: found some, but dec_dpo does more"),
        ([1, 2, 2], RING, {"evaluation": {"neighbour_mixes": 2}}, "ranks: found some, but neighbours"),
    ],
)
def test_refused(ranks, method, changes, line) -> None:
    with pytest.raises(InputError, match=line):
        prepare(ranked(ranks, method, "factors", **changes))


def test_refused_elsewhere() -> None:
    wanted = ranked([1, 2, 2], FED, evaluation={"samples": 0})
    with pytest.raises(InputError, match=r"policy\.lora\.ranks: sites train adapters of one rank"):
        refuse_elsewhere(wanted, prepare(wanted).method)
    with pytest.raises(InputError, match="lora has no meaning with train full"):
        config(TINY, policy={"train": "full", "lora": {"ranks": [1, 1, 1]}})
