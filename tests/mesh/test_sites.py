"""Processes that read files of their own: the same training as from one file, made-up names, and nothing sent but what is named."""

import inspect
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from prefmesh import run as running
from prefmesh.config import ExperimentConfig
from prefmesh.mesh import Group
from prefmesh.preferences.census import Census
from prefmesh.preferences.division import divide
from prefmesh.preferences.pairs import Pair
from prefmesh.preferences.settings import PreferencesSettings
from prefmesh.preferences.splits import SplitBy
from tests.mesh.processes import together
from tests.runs import TINY, write_jsonl

SRC = Path(running.__file__).parent
USERS = (3, 3, 2)
"""Of each of three sites: as three processes share eight agents."""


def rows(site: int) -> list[dict[str, Any]]:
    """Eight to ten pairs of each user of a site."""
    return [
        {
            "prompt": f"secret question {i % 4} ",
            "chosen": f"private yes {site} {user} {i}",
            "rejected": f"private no {i}",
            "user": f"Anna {site}.{user}",
        }
        for user in range(USERS[site])
        for i in range(8 + user)
    ]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("files")
    for site in range(3):
        write_jsonl(place / f"site_{site}.jsonl", rows(site))
    write_jsonl(place / "all.jsonl", [row for site in range(3) for row in rows(site)])
    return place


METHODS: dict[str, dict[str, Any]] = {
    "gossip": {"name": "dec_dpo", "rounds": 4, "local_steps": 2, "graph": "ring"},
    "server": {"name": "fed_dpo", "rounds": 4, "local_steps": 2, "participation": 2, "staleness": 1},
}


def settings(
    files: Path, *, shared: bool, held_out: float, method: str = "gossip", **evaluation: int
) -> ExperimentConfig:
    source = files / ("all.jsonl" if shared else "site_{rank}.jsonl")
    return ExperimentConfig.parse(
        TINY
        | {"preferences": {"source": str(source), "shared": shared}, "method": METHODS[method]}
        | {"evaluation": TINY["evaluation"] | {"held_out": held_out} | evaluation}
        | {"runtime": TINY["runtime"] | {"processes": 3, "timeout": 60}}
    )


def _both(group: Group, files: Path, out: Path) -> None:
    for method in METHODS:
        for shared in (True, False):
            of = settings(files, shared=shared, held_out=0, method=method)
            running.run(of, out / f"{method} {shared}", group=group)
    running.run(settings(files, shared=False, held_out=0.25), out / "tested", group=group)


@pytest.fixture(scope="module")
def runs(files: Path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    together(_both, 3, files, out)
    return out


@pytest.mark.parametrize("method", METHODS)
def test_own_files_train_as_one_file_does(method: str, runs: Path) -> None:
    for path in (runs / f"{method} True").rglob("*.safetensors"):
        other = runs / f"{method} False" / path.relative_to(runs / f"{method} True")
        mine, theirs = load_file(path), load_file(other)
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in mine.items()), path.name


def test_names_stay_at_home(runs: Path) -> None:
    out = runs / "tested"
    users = [json.loads(line)["user"] for line in (out / "agents.jsonl").read_text().splitlines()]
    assert set(users) == {f"user {k} of site {p}" for p, count in enumerate(USERS) for k in range(count)}
    summary = json.loads((out / "summary.json").read_text())
    pairs = sum(len(rows(site)) for site in range(3))
    assert (summary["agents"], summary["users"], summary["read"]) == (8, 8, None)
    assert summary["training_pairs"] + summary["held_out_pairs"] == pairs
    assert list(json.loads((out / "adapters" / "users.json").read_text()).values()) == list(range(8))
    for path in out.rglob("*"):
        if path.is_file():
            found = path.read_bytes()
            assert not re.search(rb"Anna|secret|private", found), path


def _joined(group: Group, by: SplitBy) -> None:
    """Everybody's census is what one finds who sees all pools."""
    pools = [[Pair(**row) for row in rows(site)] for site in range(3)]
    own = {"source": "x.jsonl", "shared": False}
    if by == "user":  # whole users are held out, who are nobody's
        own |= {"partition": "iid", "agents": 2}
        pools = [[Pair(**{**row, "user": f"u{i % 5}"}) for i, row in enumerate(rows(s))] for s in range(3)]
    of = PreferencesSettings.model_validate(own)
    divisions = [divide(pool, of, held_out=0.25, by=by, seed=0) for pool in pools]
    alone = [Census.of(pool, division) for pool, division in zip(pools, divisions, strict=True)]
    found = alone[group.rank].joined(group.gather)
    assert found.sizes.tolist() == [n for census in alone for n in census.sizes]
    assert found.pairs == sum(map(len, pools))
    assert len(found.names) == len(found.sizes)
    place = 0
    for p, (pool, census) in enumerate(zip(pools, alone, strict=True)):
        part = slice(place, place := place + len(census.held_out.row))
        held = found.held_out
        assert (held.row[part] - sum(map(len, pools[:p])) == census.held_out.row).all()
        agents = sum(len(c.sizes) for c in alone[:p])
        nobody = census.held_out.agent < 0
        assert ((held.agent[part] < 0) == nobody).all()
        assert (held.agent[part][~nobody] - agents == census.held_out.agent[~nobody]).all()
        names = [pool[i].user for i in census.held_out.row]
        assert [found.users[i] for i in held.user[part]] == [
            f"user {census.users.index(name)} of site {p}" for name in names
        ]
        texts = [pool[i].prompt for i in census.held_out.row]
        same = np.array([[a == b for a in texts] for b in texts]).reshape(len(texts), -1)
        numbers = held.prompt[part]
        assert ((numbers[:, None] == numbers) == same).all()
        assert not set(numbers) & set(np.delete(held.prompt, np.arange(len(held.prompt))[part]))
        for user, agent in census.agent_of_user.items():
            assert found.agent_of_user[f"user {census.users.index(user)} of site {p}"] == agent + agents
    assert place == len(found.held_out.row)
    for name, share in found.leakage.items():
        expected = sum(c.leakage[name] * len(c.held_out.row) for c in alone) / place
        assert share == pytest.approx(expected)


def _joined_both(group: Group) -> None:
    _joined(group, "prompt")
    _joined(group, "user")


def test_a_census_of_all_sites() -> None:
    together(_joined_both, 3)


# ---- what is sent


class Post:
    """Everything that this process hands to torch.distributed, with who in prefmesh asked for it."""

    def __init__(self):
        self.sent: list[tuple[str, str, torch.Tensor]] = []
        real = {name: getattr(dist, name) for name in ("all_reduce", "all_gather", "batch_isend_irecv")}

        def all_reduce(tensor, **rest):
            self.note("all_reduce", tensor)
            return real["all_reduce"](tensor, **rest)

        def all_gather(tensors, tensor, **rest):
            self.note("all_gather", tensor)
            return real["all_gather"](tensors, tensor, **rest)

        def batch_isend_irecv(steps):
            for step in steps:
                if step.op is dist.isend:
                    self.note("isend", step.tensor)
            return real["batch_isend_irecv"](steps)

        dist.all_reduce, dist.all_gather, dist.batch_isend_irecv = all_reduce, all_gather, batch_isend_irecv

    def note(self, how: str, tensor: torch.Tensor) -> None:
        names = [
            f.function
            for f in inspect.stack()
            if "/prefmesh/" in f.filename and "/mesh/" not in f.filename and f.function[0] != "<"
        ]
        together_ = any(f.function in ("together", "agree") for f in inspect.stack()[:6])
        self.sent.append((how, "agreeing" if together_ else names[0], tensor.clone()))


NUMBERS = {
    "agreeing": "whether it refused; hashes of versions, config and model",
    "_of_process_0": "how the run goes on",
    "prepare": "agents, held-out pairs, agents a pass",
    "joined": "how many agents, users, pairs, prompts, held-out pairs; leakage",
    "everybodys": "of each held-out pair its place, agent, user and prompt as numbers; sizes of agents",
    "__init__": "bytes of the training pairs",
    "_restore": "newest checkpoint",
    "_meet": "means of losses and log-probabilities over a round's pairs; bytes sent",
    "_anyone": "whether it was asked to stop",
    "consensus_error": "a squared distance",
    "_added": "a loss",
    "_everybodys": "margin, accuracy, loss of each held-out pair",
    "_written_by_one": "log ratios of written texts",
    "_written_by_each": "means of log ratios of written texts",
    "_judged": "won comparisons",
    "_gossiped_gradient": "an inner product, and a loss",
    "_ceiling": "what simulated users agree on",
}
"""Who sends float64 numbers, and what they are: docs/processes.md, section "What leaves a site"."""


def _inspected(group: Group, files: Path, out: Path) -> None:
    post = Post()
    running.run(settings(files, shared=False, held_out=0.25), out / "run", group=group)
    one = load_file(out / "run" / "adapters" / "agent_0000" / "adapter_model.safetensors")
    width = sum(math.prod(tensor.shape) for tensor in one.values())
    pairs = sum(len(rows(site)) for site in range(3))
    assert {how for how, _, _ in post.sent} == {"all_reduce", "all_gather", "isend"}
    for how, who, tensor in post.sent:
        if tensor.dtype == torch.float32:  # adapters: rows to neighbours, and sums of them
            assert tensor.shape[-1] == width, (how, who)
            assert tensor.ndim == (2 if how == "isend" else 1)
        else:
            assert tensor.dtype == torch.float64
            assert who in NUMBERS, who
            assert tensor.numel() <= 6 * pairs, (who, tensor.shape)


def test_what_is_sent(files: Path, tmp_path: Path) -> None:
    together(_inspected, 3, files, tmp_path)


def _inspected_neighbours(group: Group, files: Path, out: Path) -> None:
    """Adapters go to neighbours alone; what is summed over all of them is the policy of the end."""
    post = Post()
    running.run(settings(files, shared=False, held_out=0.25, neighbour_mixes=1), out / "run", group=group)
    models = [(how, who) for how, who, tensor in post.sent if tensor.dtype == torch.float32]
    assert [who for how, who in models if how != "isend"] == ["mean"]
    assert all(who in NUMBERS for _, who, tensor in post.sent if tensor.dtype == torch.float64)


def test_neighbours_stand_in_for_all(files: Path, tmp_path: Path) -> None:
    together(_inspected_neighbours, 3, files, tmp_path)


def test_only_the_mesh_speaks_to_others() -> None:
    """And it sends tensors, not pickled objects."""
    for path in SRC.rglob("*.py"):
        text = path.read_text()
        if path.parent.name != "mesh" and path.name != "launch.py":
            assert "torch.distributed" not in text, path
        assert not re.search(r"dist\.\w*object", text), path


# ---- refused


def test_settings() -> None:
    with pytest.raises(ValueError, match="every process would build the same town"):
        PreferencesSettings(source="builtin:town", shared=False)
    with pytest.raises(ValueError, match="all processes share it"):
        PreferencesSettings(source="site_{rank}.jsonl")
    assert (
        PreferencesSettings(source="site_{rank}.jsonl", shared=False).of_process(2).source == "site_2.jsonl"
    )
