"""A run whose agents live at sites: the same numbers as in one process, and what happens when sites are slow, gone or forgetful."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from prefmesh import run as running
from prefmesh.config import ExperimentConfig
from prefmesh.errors import InputError, PeerLost
from prefmesh.flower.remote import RemoteExperiment
from tests.flower.local import LocalSites
from tests.runs import TINY, TOWN, config, without_seconds

FED = {"name": "fed_dpo", "rounds": 3, "local_steps": 2}
ADAMW = {"name": "adamw", "lr": 0.05}

ROWS: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "all": (TOWN, {"method": FED, "optimizer": {"momentum": 0.9}}, 1e-9),
    "some, by size": (
        TOWN,
        {"method": {**FED, "participation": 2}, "optimizer": ADAMW, "objective": {"weights": "by_size"}},
        1e-9,
    ),
    "stale": (TOWN, {"method": {**FED, "participation": 3, "staleness": 2}, "optimizer": ADAMW}, 1e-9),
    "reset, two draws of the gradient": (
        TOWN,
        {"method": FED, "optimizer": {**ADAMW, "state": "reset"}, "evaluation": {"gradient_pairs": 10}},
        1e-9,
    ),
    "LoRA, stale": (
        TINY,
        {
            "method": {**FED, "participation": 2, "staleness": 1},
            "optimizer": {"name": "sgd", "lr": 5.0},  # AdamW's first steps make of rounding what they will
            "evaluation": {"samples": 0},
        },
        1e-6,
    ),
    "LoRA, stale, AdamW": (
        TINY,
        {"method": {**FED, "participation": 2, "staleness": 1}, "evaluation": {"samples": 0}},
        1e-9,
    ),
    "LoRA, factors": (TINY, {"method": FED, "evaluation": {"samples": 0}}, 1e-9),
    "LoRA, products": (
        TINY
        | {"policy": {**TINY["policy"], "lora": {"r": 4, "target_modules": ["c_attn"], "mixing": "product"}}},
        {"method": FED, "evaluation": {"samples": 0}},
        1e-9,
    ),
}


def row(name: str) -> ExperimentConfig:
    raw, changes, tolerance = ROWS[name]
    raw = raw | {"objective": {}, "runtime": raw["runtime"] | {"checkpoint_every": 1}}
    if tolerance < 1e-6:
        raw["runtime"] |= {"dtype": "float64"}
    return config(raw, **changes)


def go(
    sites: LocalSites, out: Path, least: int = 1, experiment: RemoteExperiment | None = None
) -> dict[str, Any]:
    experiment = experiment or sites.experiment(least)
    if not out.exists():
        out.mkdir()
        running.described(experiment, out)
    return running.Rounds(experiment, out, running.Silent(), "flower").go()


@pytest.mark.parametrize("name", ROWS)
def test_sites_are_one_process(name: str, tmp_path: Path) -> None:
    settings, tolerance = row(name), ROWS[name][2]
    running.run(settings, one := tmp_path / "one")
    go(LocalSites(settings, tmp_path / "memory"), many := tmp_path / "many")
    for path in (one / "policy").glob("*.safetensors"):
        mine, theirs = load_file(path), load_file(many / "policy" / path.name)
        for key, tensor in mine.items():
            torch.testing.assert_close(theirs[key], tensor, rtol=0, atol=tolerance)
    logs = [without_seconds((d / "metrics.jsonl").read_text()) for d in (one, many)]
    for a, b in zip(*logs, strict=True):
        assert set(b) - set(a) == ({"sites", "late"} if a["round"] else set())
        assert set(a) <= set(b)
        for key, value in a.items():
            if key != "bytes_sent_total" and isinstance(value, float):
                np.testing.assert_allclose(
                    b[key], value, rtol=100 * tolerance, atol=100 * tolerance, err_msg=key
                )
    users = [without_seconds((d / "agents.jsonl").read_text()) for d in (one, many)]
    for a, b in zip(*users, strict=True):
        assert (a["agent"], a["pairs"], a["accuracy"]) == (b["agent"], b["pairs"], b["accuracy"])
        assert b["user"].endswith(f"of site {b['agent']}")
    summaries = [json.loads((d / "summary.json").read_text()) for d in (one, many)]
    for key in (
        "agents",
        "users",
        "training_pairs",
        "held_out_pairs",
        "accuracy_interval",
        "bytes_sent_total",
    ):
        assert summaries[0][key] == summaries[1][key], key


class Killed(BaseException):
    pass


class KilledAfter(running.Silent):
    def __init__(self, round_: int):
        self.at = round_

    def round(self, round_: int, rounds: int, metrics: Any) -> None:
        if round_ == self.at:
            raise Killed


def test_the_server_goes_on(tmp_path: Path) -> None:
    """Sites are then ahead of it: they are asked for a round again."""
    settings = config(TOWN, method={**FED, "rounds": 6, "participation": 3, "staleness": 1}, optimizer=ADAMW)
    go(LocalSites(settings, tmp_path / "memory"), whole := tmp_path / "whole")
    sites, out = LocalSites(settings, tmp_path / "again"), tmp_path / "run"
    experiment = sites.experiment()
    out.mkdir()
    running.described(experiment, out)
    with pytest.raises(Killed):
        running.Rounds(experiment, out, KilledAfter(5), "flower").go()
    assert go(LocalSites(settings, tmp_path / "again"), out)["status"] == "done"
    a, b = (load_file(d / "policy" / "policy.safetensors") for d in (whole, out))
    assert all(torch.equal(tensor, b[key]) for key, tensor in a.items())
    assert not sites.said


def test_a_round_goes_on_without_a_site(tmp_path: Path) -> None:
    settings = config(TOWN, method=FED, optimizer={"momentum": 0.9})
    sites = LocalSites(
        settings, tmp_path / "memory", lambda agent, r: "lost" if (agent, r) == (1, 2) else None
    )
    go(sites, tmp_path / "run")
    lines = without_seconds((tmp_path / "run" / "metrics.jsonl").read_text())
    assert [line.get("sites") for line in lines] == [None, 4, 3, 4]
    # By hand: round 2 is the mean of three, and agent 1 goes on in round 3 from what it kept of round 1.
    alone = LocalSites(settings, tmp_path / "hand")
    theta = alone.experiment().start
    last = [0] * 4
    for round_, there in ((1, (0, 1, 2, 3)), (2, (0, 2, 3)), (3, (0, 1, 2, 3))):
        ends = [alone.site(agent).train(round_, last[agent], theta)[0] for agent in there]
        theta = {name: torch.stack([end[name] for end in ends]).mean(0) for name in theta}
        for agent in there:
            last[agent] = round_
    found = load_file(tmp_path / "run" / "policy" / "policy.safetensors")
    for name, tensor in theta.items():
        torch.testing.assert_close(found[name], tensor[0], rtol=0, atol=1e-6)


def test_too_few_answers_end_it_and_it_goes_on(tmp_path: Path) -> None:
    settings = config(TOWN, method=FED, runtime={"checkpoint_every": 1})
    gone = LocalSites(settings, tmp_path / "m", lambda agent, r: "lost" if agent < 2 and r == 2 else None)
    with pytest.raises(PeerLost, match=r"^round 2: 2 of 4 sites answered in time; allowed: at least 3"):
        go(gone, tmp_path / "run", least=3)
    assert go(LocalSites(settings, tmp_path / "m"), tmp_path / "run", least=3)["status"] == "done"
    go(LocalSites(settings, tmp_path / "other"), tmp_path / "whole")
    a, b = (load_file(tmp_path / d / "policy" / "policy.safetensors") for d in ("whole", "run"))
    assert all(torch.equal(tensor, b[key]) for key, tensor in a.items())


def late(agent: int, round_: int) -> str | None:
    return "late" if (agent, round_) == (3, 1) else None


def test_a_late_update_is_taken_where_staleness_allows_it(tmp_path: Path) -> None:
    settings = config(TOWN, method={**FED, "rounds": 2, "staleness": 1, "staleness_schedule": "max"})
    sites = LocalSites(settings, tmp_path / "memory", late)
    go(sites, tmp_path / "run")
    assert sites.said == ["round 2: agent 3's update of round 1 is taken now"]
    lines = without_seconds((tmp_path / "run" / "metrics.jsonl").read_text())
    assert [(line.get("sites"), line.get("late")) for line in lines] == [(None, None), (3, 0), (5, 1)]
    # By hand: in both rounds all begin at the first model, so five updates of it are averaged in round 2.
    alone = LocalSites(settings, tmp_path / "hand")
    theta = alone.experiment().start
    first = [alone.site(agent).train(1, 0, theta)[0] for agent in range(4)]
    after = (1, 1, 1, 0)
    second = [alone.site(agent).train(2, after[agent], theta)[0] for agent in range(4)]
    found = load_file(tmp_path / "run" / "policy" / "policy.safetensors")
    for name, start in theta.items():
        one = start + torch.stack([end[name] - start for end in first[:3]]).mean(0)
        two = one + torch.stack([end[name] - start for end in [*second, first[3]]]).mean(0)
        torch.testing.assert_close(found[name], two[0], rtol=0, atol=1e-6)


def test_a_late_update_is_dropped_where_it_does_not(tmp_path: Path) -> None:
    settings = config(TOWN, method={**FED, "rounds": 2})
    sites = LocalSites(settings, tmp_path / "memory", late)
    go(sites, tmp_path / "run")
    assert sites.said == [
        "round 2: agent 3 answered round 1 too late; dropped (method.staleness allows 0 rounds)"
    ]


def test_a_site_that_lost_what_it_kept_is_named(tmp_path: Path) -> None:
    settings = config(TOWN, method=FED, optimizer=ADAMW)

    def forgets(agent: int, round_: int) -> str | None:
        if (agent, round_) == (2, 3):
            shutil.rmtree(tmp_path / "memory" / "2")
        return None

    sites = LocalSites(settings, tmp_path / "memory", forgets)
    go(sites, tmp_path / "run")
    assert sites.said == ["round 3: agent 2 had lost what it kept, and began with fresh moments"]


def test_an_evaluation_goes_on_without_a_site(tmp_path: Path) -> None:
    settings = config(TOWN, method={**FED, "rounds": 2})
    whole = LocalSites(settings, tmp_path / "memory")
    go(whole, tmp_path / "whole")
    sites = LocalSites(
        settings, tmp_path / "other", lambda agent, r: "lost" if (agent, r) == (1, -2) else None
    )
    go(sites, tmp_path / "run")
    assert sites.said == ["evaluation of round 2: agent 1 did not answer, and is left out"]
    mine, theirs = (without_seconds((tmp_path / d / "agents.jsonl").read_text()) for d in ("run", "whole"))
    assert mine == [record for record in theirs if (record["round"], record["agent"]) != (2, 1)]
    held = load_file(tmp_path / "run" / "held_out.safetensors")
    assert len(held["rows"]) == len(held["prompt"]) == sum(r["pairs"] for r in mine if r["round"] == 2)


def test_data_that_changed_are_refused(tmp_path: Path) -> None:
    settings = config(TOWN, method=FED)
    sites = LocalSites(settings, tmp_path / "memory")
    sites.sizes = sites.sizes + 1
    with pytest.raises(InputError, match=r"this site: found \d+ training pairs, but it told of \d+"):
        sites.site(0)


@pytest.mark.parametrize(
    ("raw", "changes", "said"),
    [
        (TOWN, {"method": {"name": "dec_dpo", "rounds": 2, "local_steps": 1}}, r"^method.name: dec_dpo"),
        (
            TOWN,
            {"method": {**FED, "name": "group_robust"}},
            r"^method.name: group_robust, whose server needs",
        ),
        (TOWN, {"method": FED, "runtime": {"processes": 2}}, r"^runtime.processes: 2"),
        (TINY, {"method": FED}, r"^evaluation.samples: 3"),
        (
            TINY,
            {"method": FED, "policy": {"lora": {"r": 2, "mixing": "residual"}}},
            r"^policy.lora.mixing: residual, but whole layers do not travel",
        ),
    ],
)
def test_what_a_server_does_not_do(raw, changes, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        LocalSites(config(raw, **changes), tmp_path)
