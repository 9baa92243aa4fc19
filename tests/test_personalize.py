"""New users: adapters from k pairs of each."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from prefmesh.config import ExperimentConfig
from prefmesh.errors import Diverged
from prefmesh.inspection import finished_run, other_pairs, problem_of
from prefmesh.measure import score
from prefmesh.personalize import _alone, learned, newcomers, personal_tables, personalize, policies_of
from prefmesh.policies.export import load_row
from prefmesh.policies.features import hashed_ngrams
from prefmesh.preferences.pairs import Pair
from prefmesh.preferences.town import Town, TownSettings
from prefmesh.run import run
from tests.runs import FILE, ROWS, TINY, TOWN, contents, prefmesh, write_jsonl, write_yaml

RESIDENTS = {"users": 12, "pairs_per_user": 150, "heterogeneity": 3.0, "groups": 2, "temperature": 0.4}


def residents(path: Path, first: int, last: int, seed: int, settings: dict[str, Any]) -> Path:
    """A file of what residents `first` to `last` - 1 answered, of the town of that seed. Their groups' tastes do not depend on how
    many residents there are."""
    pairs = Town.build(TownSettings(**settings | {"users": last}), seed).pairs()
    rows = [
        {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected, "user": pair.user}
        for pair in pairs
        if int(pair.user.split("_")[1]) >= first
    ]
    return write_jsonl(path, rows)


def town(out: Path, **method: Any) -> Path:
    """A run among opposed groups, g and -g."""
    config = ExperimentConfig.parse(
        {
            "preferences": {"source": "builtin:town", "agents": 12, "town": RESIDENTS},
            "policy": {"model": "log_linear", "features": "attributes"},
            "objective": {"beta": 0.5},
            "method": {"rounds": 20, "local_steps": 3, **method},
            "optimizer": {"name": "adamw", "lr": 0.1, "batch_size": 16},
            "evaluation": {"every": 20, "held_out": 0.2},
        }
    )
    run(config, out)
    return out


class TestTown:
    def test_accuracy_grows_with_k(self, tmp_path) -> None:
        """One policy is at the consensus' level for either group; a user's own pairs lead away from it."""
        new = residents(tmp_path / "new.jsonl", 12, 20, 0, RESIDENTS)
        trained = town(tmp_path / "run", name="fed_dpo")
        found = personalize(trained, str(new), [], tmp_path / "out", pairs=[1, 8, 64], steps=20)
        k0, k1, k8, k64 = found["figures"]
        assert [line["pairs"] for line in found["figures"]] == [0, 1, 8, 64]
        assert k0["accuracy"] < k1["accuracy"] < k8["accuracy"] < k64["accuracy"]
        assert k64["gain_interval"][0] > 0.1
        assert k0["gain"] == 0
        assert k64["gain"] == pytest.approx(k64["accuracy"] - k0["accuracy"])
        assert found["policies"] == ["average"]
        assert found["known"] == []
        assert {user["held_out"] for user in found["users"]} <= set(range(60, 87))  # of 150, prompts recur

    def test_few_pairs_find_the_group(self, tmp_path) -> None:
        """The least loss on 4 pairs: policies are opposed, so that most new users start from their own group's."""
        new = residents(tmp_path / "new.jsonl", 12, 20, 0, RESIDENTS)
        trained = town(tmp_path / "run", name="clustered", warm_rounds=4)
        found = personalize(trained, str(new), [], tmp_path / "out", pairs=[4], steps=1)
        groups = list(json.loads((trained / "groups.json").read_text()).values())
        assert found["policies"] == ["average", "group 0", "group 1"]
        assert policies_of(trained)[f"group {groups[1]}"] == trained / "adapters" / "agent_0001"
        # Residents are dealt to groups in turn: resident 12 shares agent 0's, 13 agent 1's.
        starts = [user["figures"][1]["start"] for user in found["users"]]
        right = [start == f"group {groups[i % 2]}" for i, start in enumerate(starts)]
        assert np.mean(right) >= 0.75
        before, after = found["figures"]
        assert after["start_accuracy"] > before["accuracy"] + 0.1
        assert "start" in str(personal_tables(found)[0].columns[-1].header)

    def test_every_agent_s_own_is_a_start_where_there_are_no_groups(self, tmp_path) -> None:
        trained = town(tmp_path / "run", name="local_only", rounds=2)
        assert list(policies_of(trained)) == ["average", *(f"agent_{i:04d}" for i in range(12))]
        new = residents(tmp_path / "new.jsonl", 0, 2, 0, RESIDENTS)
        found = personalize(trained, str(new), [], tmp_path / "out", pairs=[2])
        assert found["known"] == ["resident_000", "resident_001"]
        assert "2 of them" in str(personal_tables(found)[0].caption)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A run on hashed words of `answers.jsonl`, and `new.jsonl` of two users who were no part of it."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "answers.jsonl", ROWS)
    write_jsonl(tmp_path / "new.jsonl", [row | {"user": f"new {i % 2}"} for i, row in enumerate(ROWS)])
    changes = {"method": {"name": "fed_dpo", "rounds": 3}, "optimizer": {"name": "adamw", "lr": 0.05, "batch_size": 4, "schedule": "linear"}}  # fmt: skip
    run(ExperimentConfig.parse(FILE | changes), tmp_path / "run")
    return tmp_path


def test_it_is_a_plain_loop(here) -> None:
    """AdamW of torch on the mean DPO loss of all k pairs, which fit a batch, from the run's parameters."""
    k, steps, beta = 3, 5, 0.1
    found = personalize(Path("run"), "new.jsonl", [], Path("out"), pairs=[1, k], steps=steps)
    rows = [json.loads(line) for line in Path("new.jsonl").read_text().splitlines()]
    pairs = other_pairs("new.jsonl", [])
    for person, user in zip(newcomers(pairs, k, finished_run(Path("run")).seed), found["users"], strict=True):
        assert {rows[i]["user"] for i in [*person.drawn, *person.held_out]} == {person.user} == {user["user"]}
        assert (len(person.drawn), len(person.held_out)) == (k, user["held_out"]) == (k, 3)

        def difference(which: np.ndarray) -> torch.Tensor:
            sides = (hashed_ngrams([rows[i][side] for i in which], 16) for side in ("chosen", "rejected"))
            chosen, rejected = sides
            return torch.as_tensor(chosen - rejected, dtype=torch.float32)

        theta = torch.tensor(load_file("run/policy/policy.safetensors")["theta"], requires_grad=True)
        optimizer = torch.optim.AdamW([theta], lr=0.05, weight_decay=0.0)
        for _ in range(steps):
            optimizer.zero_grad()
            torch.nn.functional.softplus(-beta * difference(person.drawn) @ theta).mean().backward()
            optimizer.step()
        saved = load_file(Path("out") / user["adapter"] / "policy.safetensors")["theta"]
        np.testing.assert_allclose(saved, theta.detach().numpy(), rtol=1e-5, atol=1e-6)
        margins = (difference(person.held_out) @ theta).detach().numpy()
        assert user["figures"][-1]["accuracy"] == pytest.approx((margins > 0).mean())
    assert json.loads(Path("out/personalize.json").read_text()) == found


def test_who_else_is_there_changes_no_draw() -> None:
    pairs = [Pair(prompt=str(i), chosen="a", rejected="b", user=f"u{i % 3}") for i in range(30)]
    everybody = newcomers(pairs, 4, 0)
    alone = newcomers([pair for pair in pairs if pair.user == "u1"], 2, 0)[0]
    assert [pairs[i].prompt for i in everybody[1].drawn[:2]] == [str(3 * i + 1) for i in alone.drawn]
    assert set(everybody[1].held_out) == set(range(1, 30, 3)) - set(everybody[1].drawn)


def test_no_prompt_is_on_both_sides() -> None:
    pairs = [Pair(prompt=str(i % 7), chosen=f"a{i}", rejected="b", user="u") for i in range(28)]
    [one] = newcomers(pairs, 3, 0)
    drawn = {pairs[i].prompt for i in one.drawn}
    assert not drawn & set(one.prompts)
    assert len(one.held_out) == 4 * (7 - len(drawn))


def test_of_several_users_each_has_a_lone_user_s_parameters(here) -> None:
    """Where a batch holds all k pairs: to rounding."""
    both = personalize(Path("run"), "new.jsonl", [], Path("both"), pairs=[3])
    one = personalize(Path("run"), "new.jsonl", ["preferences.where={user: new 1}"], Path("one"), pairs=[3])
    assert both["users"][1] == one["users"][0] | {"adapter": "adapters/user_0001"}
    stacked, alone = (
        load_file(f"{place}/policy.safetensors")["theta"]
        for place in ("both/adapters/user_0001", "one/adapters/user_0000")
    )
    np.testing.assert_allclose(stacked, alone, rtol=1e-6, atol=1e-7)
    assert one["figures"][0]["accuracy_interval"][1] <= 1
    assert "new user new 1" in str(personal_tables(one)[0].title)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's use of transformers
@pytest.mark.parametrize("mixing", ["factors", "alternate", "residual"])
def test_lora(tmp_path, monkeypatch, mixing) -> None:
    """End to end: what is saved is the model that was judged, loaded by plain peft, or merged by transformers."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    from tests.equivalence import naive

    monkeypatch.chdir(tmp_path)
    policy = TINY["policy"] | {"lora": {"r": 2, "mixing": mixing}}
    method = {"name": "fed_dpo", "rounds": 2}
    evaluation = {"every": 2, "held_out": 0.2, "samples": 0}
    run(ExperimentConfig.parse(TINY | {"policy": policy, "method": method, "evaluation": evaluation}), Path("run"))  # fmt: skip
    residents(Path("new.jsonl"), 3, 5, TINY["seed"], TINY["preferences"]["town"])
    said = prefmesh("personalize", "run", "--data", "new.jsonl", "--pairs", "1,2", "--steps", "3", "--lr", "5e-3",
                    "--out", "out", "--json")  # fmt: skip
    assert (said.code, said.err) == (0, "")
    found = json.loads(said.out)
    trained = _alone(finished_run(Path("run")))
    pairs = other_pairs("new.jsonl", [])
    problem = problem_of(trained, pairs, lambda _: None)
    person = newcomers(pairs, 2, trained.seed)[1]
    plain = AutoModelForCausalLM if mixing == "residual" else AutoPeftModelForCausalLM
    model = plain.from_pretrained(Path("out") / found["users"][1]["adapter"]).eval()
    row = int(person.held_out[0])
    data, reference = problem.data, problem.reference[row]
    with torch.no_grad():
        chosen, rejected = (
            float(naive.sequence_log_prob(model, data.prompt[row], side[row]))
            for side in (data.chosen, data.rejected)
        )
    row_of = load_row(problem.policy, Path("out/adapters/user_0001"))
    ours = score(problem, row_of, np.array([row])).margin[0]
    assert ours == pytest.approx(chosen - rejected - float(reference[0] - reference[1]), abs=1e-3)
    # Away from where it started, in both factors; or merged, in the weights.
    start = load_row(problem.policy, Path("run/policy"))
    learned = problem.policy.residuals(row_of) or row_of
    assert all((tensor != start[name]).any() for name, tensor in learned.items())


def test_a_table_for_people(here) -> None:
    found = prefmesh("personalize", "run", "--data", "new.jsonl", "--pairs", "2,1", "--out", "out")
    assert (found.code, found.err) == (0, "")
    assert found.out.splitlines()[-1] == "out"
    assert [line.split()[1] for line in found.out.splitlines() if line.startswith("│")] == ["0", "1", "2"]
    assert sorted(path.name for path in Path("out").iterdir()) == ["adapters", "personalize.json"]


def test_of_a_config_the_users_that_it_holds_out(tmp_path, monkeypatch) -> None:
    """A run that held out users is asked for adapters of exactly these."""
    monkeypatch.chdir(tmp_path)
    config = TOWN | {
        "evaluation": {"every": 2, "held_out": 0.25, "by": "user"},
        "preferences": {**TOWN["preferences"], "agents": None},
    }
    write_yaml(tmp_path / "town.yaml", config)
    run(ExperimentConfig.parse(config), Path("run"))
    found = personalize(Path("run"), "run/config.yaml", [], Path("out"), pairs=[3])
    assert len(found["users"]) == 1
    assert found["known"] == []


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["nowhere", "--data", "new.jsonl"], "nowhere: no finished run"),
        (["run", "--data", "new.jsonl", "--pairs", "0,1"], "--pairs: found 0, 1; allowed: numbers from 1 up"),
        (["run", "--data", "new.jsonl", "--pairs", ","], "--pairs: found none; allowed: numbers from 1 up"),
        (["run", "--data", "new.jsonl", "--pairs", "two"], "--pairs: found 'two'; allowed: whole numbers"),
        (["run", "--data", "new.jsonl", "--pairs", "6"], "--pairs: found 6, but of the 6 pairs of user new 0 none"),
        (["run", "--data", "new.jsonl", "--steps", "0"], "--steps"),
        (["run", "--data", "new.jsonl", "--lr", "0"], "optimizer.lr: found 0.0"),
        (["run", "--data", "none.jsonl"], "none.jsonl"),
        (["run", "--data", "new.jsonl", "--out", "run"], "run: exists already; allowed: a new directory"),
    ],
)  # fmt: skip
def test_refused(here, argv: list[str], said: str) -> None:
    before = contents(here)
    found = prefmesh("personalize", *argv, *([] if "--out" in argv else ["--out", "out"]))
    assert (found.code, found.out, found.err.count("\n")) == (2, "", 1), found
    assert said in found.err
    assert contents(here) == before


def test_diverged(here) -> None:
    """Decay of more than 1 per step: the parameters grow a million times in each."""
    trained = finished_run(Path("run"))
    problem = problem_of(trained, other_pairs("new.jsonl", []), lambda _: None)
    optimizer = trained.optimizer.model_copy(update={"lr": 1e6, "weight_decay": 1.0})
    start = {"theta": torch.ones(2, 16)}
    with pytest.raises(Diverged, match="--pairs 2: a parameter stopped being finite within 10 steps"):
        learned(problem, optimizer, start, np.array([[0, 2], [1, 3]]), steps=10, seed=0)
