"""Looking at data, and at a run's policy on other data."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from prefmesh import inspection
from prefmesh import run as running
from prefmesh.config import load_config
from prefmesh.errors import InputError
from prefmesh.experiment import load_pairs, prepare
from prefmesh.policies.features import hashed_ngrams
from tests.runs import FILE, ROWS, TOWN, write_jsonl, write_yaml


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    write_jsonl(tmp_path / "answers.jsonl", ROWS)
    write_yaml(tmp_path / "file.yaml", FILE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def ran(here) -> Path:
    """A local-only run: three users, three policies. Whose is whose is known though nothing is held out."""
    changes = ["optimizer.lr=5.0", "optimizer.batch_size=full"]
    running.run(load_config(here / "file.yaml", changes), here / "out")
    return here / "out"


def silent(text: str) -> None:
    pass


def test_a_file_alone_becomes_an_experiment(here):
    config = inspection.data_config("answers.jsonl", ["preferences.limit=5"])
    assert (config.preferences.source, config.preferences.limit, config.method.name) == (
        "answers.jsonl",
        5,
        "centralized",
    )
    assert config.preferences.on_bad_row == "refuse"
    assert inspection.data_config("answers.jsonl", [], skip_bad_rows=True).preferences.on_bad_row == "skip"
    assert inspection.data_config("builtin:town", [], skip_bad_rows=True).preferences.simulated
    assert inspection.data_config("file.yaml", [], skip_bad_rows=True) == load_config("file.yaml")


def test_of_an_experiment_only_training_pairs_are_read(here):
    write_yaml(here / "held.yaml", {**FILE, "evaluation": {"held_out": 0.25, "by": "prompt"}})
    pairs = inspection.read_data("held.yaml", [])
    everything = inspection.read_data("answers.jsonl", [])
    assert len(everything) == len(ROWS)
    assert len(pairs) == 0.75 * len(ROWS)
    training = prepare(load_config("held.yaml")).division
    held_out = {everything[i].prompt for agent in training.agents for i in agent.held_out}
    assert len(held_out) == 0.25 * len(ROWS)
    assert not held_out & {pair.prompt for pair in pairs}


def test_bad_rows_are_counted_not_refused(here):
    (here / "answers.jsonl").write_text((here / "answers.jsonl").read_text() + "not json\n")
    shown = inspection.inspect_data("answers.jsonl", [], None).to_json()
    assert shown["pairs"] == len(ROWS)
    assert "not JSON" in json.dumps(shown)


def test_tokens_are_counted_with_a_model_s_own_tokenizer(here):
    shown = inspection.inspect_data("answers.jsonl", [], "builtin:tiny").to_json()
    assert json.dumps(shown) != json.dumps(inspection.inspect_data("answers.jsonl", [], None).to_json())


def test_accuracy_is_that_of_the_saved_parameters(here, ran):
    """By hand: the sign of (phi_w - phi_l) theta, for the average policy and for each user's own."""
    found = inspection.evaluate_run(ran, "answers.jsonl", [], silent)
    difference = hashed_ngrams([row["chosen"] for row in ROWS], 16) - hashed_ngrams(
        [row["rejected"] for row in ROWS], 16
    )

    def margins(directory: Path) -> np.ndarray:
        return difference @ load_file(directory / "policy.safetensors")["theta"].astype(float)

    average = margins(ran / "policy")
    assert found["accuracy"] == pytest.approx((average > 0).mean())
    assert found["margin"] == pytest.approx(0.1 * average.mean(), rel=1e-5)
    assert found["loss"] == pytest.approx(np.log1p(np.exp(-0.1 * average)).mean(), rel=1e-5)
    assert found["pairs"] == len(ROWS)
    for user in found["users"]:
        agent = int(user["user"].split()[1])
        own = np.arange(len(ROWS)) % 3 == agent
        assert user["pairs"] == own.sum()
        assert user["accuracy"] == pytest.approx((average[own] > 0).mean())
        assert user["own_accuracy"] == pytest.approx(
            (margins(ran / "adapters" / f"agent_{agent:04d}")[own] > 0).mean()
        )
    assert found["accuracy_worst_tenth"] == min(user["accuracy"] for user in found["users"])
    low, high = found["accuracy_interval"]
    assert low <= found["accuracy"] <= high


def test_a_user_of_several_agents_has_no_own_one(here):
    running.run(
        load_config(here / "file.yaml", ["preferences.partition=iid", "preferences.agents=2"]), here / "out"
    )
    assert json.loads((here / "out" / "adapters" / "users.json").read_text()) == {}
    assert not any(
        "own_accuracy" in user
        for user in inspection.evaluate_run(here / "out", "answers.jsonl", [], silent)["users"]
    )


def test_users_of_other_data_have_no_adapter_of_their_own(here, ran):
    write_jsonl(here / "others.jsonl", [row | {"user": "somebody else"} for row in ROWS])
    [user] = inspection.evaluate_run(ran, "others.jsonl", [], silent)["users"]
    assert "own_accuracy" not in user
    assert user["user"] == "somebody else"


def test_tables(here, ran):
    whole, users = inspection.evaluation_tables(inspection.evaluate_run(ran, "answers.jsonl", [], silent))
    assert whole.row_count == 1
    assert users.row_count == 3
    assert users.columns[-1].header == "own adapter"
    many = {"run": "r", "data": "d", "pairs": 40, "accuracy": 0.5, "accuracy_interval": [0.4, 0.6], "accuracy_worst_tenth": 0.1,
            "margin": 0.0, "loss": 0.7, "users": [{"user": f"[{i}]", "pairs": 1, "accuracy": i / 40, "margin": 0.0} for i in range(40)]}  # fmt: skip
    _, users = inspection.evaluation_tables(many)
    assert users.row_count == 30
    assert users.title == "the 30 lowest of 40 users (all with --json)"


def test_what_is_no_finished_run(here):
    with pytest.raises(InputError, match="no finished run"):
        inspection.evaluate_run(here, "answers.jsonl", [], silent)


def test_a_changed_file_is_read_again(here):
    """Data and models are kept between runs of one process, but not beyond a change of the file."""
    settings = load_config("file.yaml").preferences
    assert len(load_pairs(settings, 0)[0]) == len(ROWS)
    write_jsonl(here / "answers.jsonl", ROWS[:5])
    assert len(load_pairs(settings, 0)[0]) == 5
    assert load_pairs(settings, 0)[0] is load_pairs(settings, 0)[0]


def test_the_town_s_pairs_can_be_judged_too(here):
    write_yaml(here / "town.yaml", TOWN)
    running.run(load_config("town.yaml"), here / "town")
    found = inspection.evaluate_run(here / "town", "town.yaml", [], silent)
    # What the config holds out is judged (a fifth of 80), as in the run itself.
    assert found["pairs"] == 16
    last = json.loads((here / "town" / "summary.json").read_text())
    assert found["accuracy"] == pytest.approx(last["final"]["eval/rewards/accuracies"], rel=1e-9)
    assert len(found["users"]) == 4
