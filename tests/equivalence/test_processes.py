"""Two and four processes leave the run that one leaves: parameters, metrics, users, adapters, held-out figures.

The tolerance is that of the parameters' largest difference in any kept checkpoint; measures may differ by a hundred times that.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from prefmesh import run as running
from prefmesh.config import ExperimentConfig
from prefmesh.mesh import Group
from tests.mesh.processes import together
from tests.runs import TINY, TOWN, config, without_seconds

FLOAT64 = 1e-9
LORA_FLOAT32 = 1e-6

AGENTS = 6
"""Which four processes share unequally."""

FED = {"name": "fed_dpo", "rounds": 5, "local_steps": 2}
DEC = {"name": "dec_dpo", "rounds": 5, "local_steps": 2}
ADAMW = {"name": "adamw", "lr": 0.05}

METHODS: dict[str, dict[str, Any]] = {
    "FedDPO": {"method": FED, "optimizer": {"momentum": 0.9}},
    "FedDPO, some by size": {
        "method": {**FED, "participation": 2},
        "optimizer": ADAMW,
        "objective": {"weights": "by_size"},
    },
    "FedDPO, stale": {"method": {**FED, "participation": 3, "staleness": 2}, "optimizer": ADAMW},
    "FedDPO, stale, reset": {
        "method": {**FED, "participation": 2, "staleness": 3, "staleness_schedule": "max"},
        "optimizer": {**ADAMW, "state": "reset"},
    },
    "ring": {"method": {**DEC, "graph": "ring"}, "optimizer": {**ADAMW, "max_grad_norm": 0.5}},
    "star": {"method": {**DEC, "graph": "star"}, "optimizer": {"momentum": 0.9, "state": "reset"}},
    "exponential": {"method": {**DEC, "graph": "exponential", "weights": "uniform"}, "optimizer": ADAMW},
    "complete": {"method": {**DEC, "graph": "complete"}, "optimizer": {"batch_size": "full"}},
    "ring, by neighbours": {
        "method": {**DEC, "graph": "ring"},
        "optimizer": ADAMW,
        "objective": {"weights": "by_size"},
        "evaluation": {"every": 2, "neighbour_mixes": 2, "gradient_pairs": 16},
    },
    "FedProx": {"method": {**FED, "name": "fed_prox", "mu": 0.5}},
    "FedAdam": {"method": {**FED, "name": "fed_opt", "server_lr": 0.1, "participation": 4}},
    "SCAFFOLD": {
        "method": {**FED, "name": "scaffold", "participation": 3},
        "optimizer": ADAMW,
        "objective": {"weights": "by_size"},
    },
    "FedNova": {"method": {**FED, "name": "fed_nova", "local_steps": 4}, "optimizer": ADAMW},
    "FedBuff": {"method": {**FED, "name": "fed_buff", "buffer": 2}, "optimizer": ADAMW},
    "group robust, some by size": {
        "method": {**FED, "name": "group_robust", "participation": 4, "robust_step_size": 2.0},
        "optimizer": ADAMW,
        "objective": {"weights": "by_size"},
    },
    "group robust, compressed": {
        "method": {**FED, "name": "group_robust", "robust_step_size": 2.0, "compression": ["int8"]},
    },
    "q-FedAvg": {"method": {**FED, "name": "q_fed_avg", "participation": 3, "q": 2.0}},
    "one peer": {"method": {**DEC, "graph": "exponential", "schedule": "one_peer"}, "optimizer": ADAMW},
    "lossy": {"method": {**DEC, "link_dropout": 0.3, "node_dropout": 0.3}, "optimizer": ADAMW},
    "gradient tracking": {
        "method": {**DEC, "name": "gradient_tracking", "schedule": "matching", "node_dropout": 0.3},
        "optimizer": ADAMW,
        "objective": {"weights": "by_size"},
    },
    "momentum tracking": {
        "method": {**DEC, "name": "momentum_tracking", "local_steps": 1},
        "optimizer": {"momentum": 0.9},
    },
    "exact diffusion": {"method": {**DEC, "name": "exact_diffusion"}},
    "EXTRA": {"method": {**DEC, "name": "extra"}, "objective": {"weights": "by_size"}},
    "push-sum": {
        "method": {**DEC, "name": "push_sum", "graph": {"name": "erdos_renyi", "p": 0.5, "directed": True}},
        "optimizer": ADAMW,
    },
    "pairs, asynchronous": {
        "method": {**DEC, "name": "async_gossip", "rounds": 12, "wakes": 2},
        "optimizer": ADAMW,
    },
    "FedDPO, compressed": {
        "method": {**FED, "participation": 4, "compression": [{"name": "top_k", "share": 0.2}, "int8"]},
    },
    "SCAFFOLD, compressed": {
        "method": {**FED, "name": "scaffold", "participation": 4, "compression": ["sign"]},
        "objective": {"weights": "by_size"},
    },
    "ring, compressed": {
        "method": {**DEC, "compression": [{"name": "random_k", "share": 0.3}], "consensus_step": 0.5},
        "optimizer": ADAMW,
    },
    "fine-tuning": {"method": {**FED, "name": "fine_tuning", "personal_rounds": 2}, "optimizer": ADAMW},
    "collaboration graph": {
        "method": {**DEC, "name": "collaboration_graph", "graph": "exponential", "weights": "uniform"},
        "optimizer": ADAMW,
    },
    "clustered": {
        "method": {**FED, "name": "clustered", "clusters": 2, "warm_rounds": 3},
        "optimizer": ADAMW,
    },
    "IFCA": {
        "method": {**FED, "name": "ifca", "participation": 4},
        "optimizer": ADAMW,
        "objective": {"weights": "by_size"},
    },
    "FedSoft": {
        "method": {**FED, "name": "fed_soft", "participation": 4, "estimate_every": 2},
        "optimizer": ADAMW,
        "objective": {"weights": "by_size"},
    },
    "FedSoft, likelihood": {
        "method": {**FED, "name": "fed_soft", "participation": 2, "mixtures": "likelihood"},
        "optimizer": {"momentum": 0.9},
    },
    "Ditto": {
        "method": {**FED, "name": "ditto", "participation": 2, "proximity": 0.3},
        "optimizer": ADAMW,
        "objective": {"weights": "by_size"},
    },
    "APFL": {"method": {**FED, "name": "apfl", "participation": 2, "alpha_lr": 1.0}, "optimizer": ADAMW},
    "APFL, compressed": {
        "method": {**FED, "name": "apfl", "compression": [{"name": "top_k", "share": 0.3}]},
        "optimizer": {"momentum": 0.9},
    },
    "Ditto on a ring": {
        "method": {**DEC, "name": "dec_ditto", "proximity": 0.3, "node_dropout": 0.3},
        "optimizer": ADAMW,
        "objective": {"weights": "by_size"},
    },
    "APFL on a ring": {"method": {**DEC, "name": "dec_apfl", "alpha_lr": 1.0}, "optimizer": ADAMW},
    "alone": {"method": {"name": "local_only", "rounds": 5}, "optimizer": ADAMW},
}
LORA = (
    "FedDPO, some by size",
    "FedDPO, stale",
    "ring",
    "ring, by neighbours",
    "star",
    "exponential",
    "SCAFFOLD",
    "group robust, some by size",
    "q-FedAvg",
    "gradient tracking",
    "IFCA",
    "Ditto",
    "APFL",
)
"""Those that are run on adapters too."""
ADAPTERS: dict[str, dict[str, Any]] = {
    "FedSA-LoRA": {
        "method": {**FED, "name": "fed_per", "participation": 4},
        "objective": {"weights": "by_size"},
    },
    "FedPer, compressed": {
        "method": {
            **FED,
            "name": "fed_per",
            "personal": ["*.3.*"],
            "compression": [{"name": "random_k", "share": 0.3}],
        },
    },
    "FedRep": {"method": {**FED, "name": "fed_per", "personal": ["*.3.*"], "personal_steps": 1}},
    "FedSA-LoRA on a ring": {"method": {**DEC, "name": "dec_per", "node_dropout": 0.3}},
}
"""Those that need tensors to tell apart."""
SINGLE = ("FedDPO, some by size", "ring", "SCAFFOLD", "gradient tracking")
"""Those that are run in float32 too, by plain steps: passes of other sizes round products differently, of which AdamW makes whole steps where
the parts of a gradient cancel (1.5e-6 to 6e-6 in single entries, on some machines)."""
RANKS = [2, 4, 1, 4, 3, 2]
MIXED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "FedDPO, A frozen": ({**FED, "participation": 4}, {"mixing": "freeze_a"}),
    "FedDPO, products": ({**FED, "participation": 4}, {"mixing": "product"}),
    "FedDPO, residuals": ({**FED, "participation": 4}, {"mixing": "residual"}),
    "FedSoft": (
        {**FED, "name": "fed_soft", "participation": 4, "estimate_every": 2},
        {"mixing": "factors"},
    ),
    "ring, products": (DEC, {"mixing": "product"}),
    "ring, alternating": (DEC, {"mixing": "alternate"}),
    "FedDPO, products of unequal ranks": (
        {**FED, "participation": 4},
        {"mixing": "product", "ranks": RANKS},
    ),
    "ring, products of unequal ranks": (DEC, {"mixing": "product", "ranks": RANKS}),
    "ring, unequal ranks": (DEC, {"ranks": RANKS}),
}
"""What of the adapters is averaged, and how large they are."""


def rows() -> dict[str, tuple[dict[str, Any], float]]:
    """Raw configs and tolerances, by name."""
    found = {}
    town = {"source": "builtin:town", "agents": AGENTS}
    for name, changes in METHODS.items():
        raw = {
            **TOWN,
            "preferences": {**town, "town": {"users": AGENTS, "pairs_per_user": 20}},
            "runtime": {**TOWN["runtime"], "dtype": "float64"},
            "objective": {},
        }
        found[f"log-linear, {name}"] = (config(raw, **changes).plain(), FLOAT64)
    for name, wanted in ({name: METHODS[name] for name in LORA} | ADAPTERS).items():
        small = {key: value for key, value in wanted.items() if key != "optimizer"}
        raw = {
            **TINY,
            "preferences": {**town, "town": {"users": AGENTS, "pairs_per_user": 8}},
            "objective": {},
        }
        small["method"] = {**small["method"], "rounds": 2}
        plain = {"name": "sgd", "lr": 5.0}  # so far that few margins stay where rounding makes them ties
        optimizer = plain if name == "q-FedAvg" else {"lr": 5e-3}  # q-FedAvg takes sgd alone
        changes = small | {"optimizer": optimizer, "runtime": {"dtype": "float64"}}
        found[f"LoRA, {name}"] = (config(raw, **changes).plain(), FLOAT64)
        if name in SINGLE:
            found[f"LoRA, {name}, in float32"] = (config(raw, **small, optimizer=plain).plain(), LORA_FLOAT32)
    for name, (method, lora) in MIXED.items():
        small = {"source": "builtin:town", "agents": AGENTS, "town": {"users": AGENTS, "pairs_per_user": 8}}
        policy = {**TINY["policy"], "lora": {"r": 4, "target_modules": ["c_attn"], **lora}}
        raw = {**TINY, "preferences": small, "objective": {}, "policy": policy}
        raw["runtime"] = {**TINY["runtime"], "dtype": "float64"}
        changes = {"method": {**method, "rounds": 3}, "optimizer": {"lr": 5e-3}}
        found[f"LoRA, {name}"] = (config(raw, **changes).plain(), FLOAT64)
    # Whole users are held out: pairs of nobody.
    raw = {**TOWN, "preferences": {**town, "town": {"users": 8, "pairs_per_user": 20}, "partition": "iid"}}
    raw |= {"evaluation": {"by": "user", "held_out": 0.25, "every": 5}, "runtime": {"dtype": "float64"}}
    found["log-linear, users held out"] = (config(raw, method=DEC | {"graph": "ring"}).plain(), FLOAT64)
    return found


def in_processes(raw: dict[str, Any], size: int) -> ExperimentConfig:
    return ExperimentConfig.parse(raw | {"runtime": raw["runtime"] | {"processes": size}})


def run_all(group: Group, size: int, where: Path) -> None:
    for name, (raw, _) in rows().items():
        running.run(in_processes(raw, size), where / name, group=group)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[int, Path]:
    """Directories of all rows' runs, by the number of processes."""
    where = {size: tmp_path_factory.mktemp(f"{size}_processes") for size in (1, 2, 4)}
    run_all(Group(), 1, where[1])
    for size in (2, 4):
        together(run_all, size, size, where[size])
    return where


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", rows())
def test_processes_are_one(name: str, size: int, runs: dict[int, Path]) -> None:
    tolerance = rows()[name][1]
    one, many = runs[1] / name, runs[size] / name
    kept = sorted(path.name for path in (one / "checkpoints").glob("*.safetensors"))
    assert kept
    for file in kept:
        parts = [load_file(many / "checkpoints" / file)]
        parts += [load_file(many / "checkpoints" / f"process_{p:04d}" / file) for p in range(1, size)]
        assert_equal_states(load_file(one / "checkpoints" / file), parts, tolerance)
    moved = max(
        float((a - b).abs().max())
        for a, b in zip(
            *(load_file(one / "checkpoints" / f).values() for f in (kept[0], kept[-1])), strict=True
        )
        if a.is_floating_point()
    )
    assert moved > 1000 * tolerance, "equal by standing still"
    assert_equal_logs(one, many, 100 * tolerance)
    for path in (p for p in one.rglob("*.safetensors") if p.parent.name != "checkpoints"):
        mine, theirs = load_file(path), load_file(many / path.relative_to(one))
        assert set(mine) == set(theirs)
        for key, tensor in mine.items():
            torch.testing.assert_close(tensor, theirs[key], rtol=0, atol=100 * tolerance)
    assert_equal_rest(one, many)


def test_residuals_do_not_travel(runs: dict[int, Path]) -> None:
    """Whole layers stay where they are: processes send each other what they send for products, factors and no more."""
    sent = []
    for mixing in ("residuals", "products"):
        lines = without_seconds((runs[2] / f"LoRA, FedDPO, {mixing}" / "metrics.jsonl").read_text())
        # Before round 1, the group counts what earlier runs sent.
        sent.append([line["wire_bytes"] for line in lines if line["round"] and "wire_bytes" in line])
    assert sum(sent[0]) > 0
    assert sent[0] == sent[1]


def assert_equal_states(
    whole: dict[str, torch.Tensor], parts: list[dict[str, torch.Tensor]], tolerance: float
) -> None:
    """What agents keep stands in blocks, what the server keeps in every process."""
    assert all(set(part) == set(whole) for part in parts)
    for key, tensor in whole.items():
        pieces = [part[key] for part in parts]
        together_ = pieces[0] if pieces[0].shape == tensor.shape else torch.cat(pieces)
        torch.testing.assert_close(
            together_, tensor, rtol=0, atol=tolerance, msg=lambda m, key=key: f"{key}: {m}"
        )


def assert_equal_logs(one: Path, many: Path, tolerance: float) -> None:
    for file in ("metrics.jsonl", "agents.jsonl"):
        mine, theirs = (without_seconds((d / file).read_text()) for d in (one, many))
        assert len(mine) == len(theirs)
        for a, b in zip(mine, theirs, strict=True):
            b.pop("wire_bytes", None)
            # In between evaluations, several processes do not ask each other how far they are apart.
            a.pop("lora/mixing_error", None)  # of whole layers, which no process sends
            asked = {key for key in a if key.startswith("consensus_error") and key not in b}
            assert not asked or "train_loss" not in a
            assert set(a) - asked == set(b)
            for key in b:
                if isinstance(a[key], float):
                    np.testing.assert_allclose(b[key], a[key], rtol=tolerance, atol=tolerance, err_msg=key)
                else:
                    assert a[key] == b[key], key


def assert_equal_rest(one: Path, many: Path) -> None:
    """The same files but for checkpoints, and the same summary but for numbers that were compared already."""
    files = [
        {str(p.relative_to(d)) for p in d.rglob("*") if p.is_file() and "checkpoints" not in p.parts}
        for d in (one, many)
    ]
    assert files[0] == files[1]
    summaries = [json.loads((d / "summary.json").read_text()) for d in (one, many)]
    for summary in summaries:
        for key in ("seconds", "final", "agents_per_pass"):
            del summary[key]
    intervals = [summary.pop("accuracy_interval") for summary in summaries]
    ceilings = [summary.pop("ceiling") for summary in summaries]
    assert summaries[0] == summaries[1]
    assert intervals[0] == intervals[1] or np.allclose(*intervals)
    assert ceilings[0] == ceilings[1] or all(np.isclose(ceilings[0][k], ceilings[1][k]) for k in ceilings[0])
