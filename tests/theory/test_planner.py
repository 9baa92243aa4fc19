"""The planner: prices by hand, brute force over a small space, neighbours, guarantees, the command."""

import dataclasses
import json

import numpy as np
import pytest
import yaml

from prefmesh.config import load_config
from prefmesh.theory import rates
from prefmesh.theory.clock import Devices, Links
from prefmesh.theory.forecast import Forecast, Setting
from prefmesh.theory.plan_constants import Constants, Extrapolation, guaranteed
from prefmesh.theory.planner import Costs, Simulator, Space, price, ranked, refine, step_sizes
from tests.runs import TINY, TOWN, prefmesh, write_yaml
from tests.theory.test_forecast import near, problem


def costs(bandwidth: float = 500.0, **links) -> Costs:
    return Costs(
        devices=Devices(seconds_per_step=0.5),
        links=Links(bandwidth=bandwidth, **links),
        model_bytes=1000,
        pairs_per_step=8,
    )


class Ten:
    """Every setting needs ten rounds."""

    def rounds(self, setting: Setting) -> int | None:
        return 10


def test_prices_by_hand() -> None:
    shards, given = np.full(6, 40), costs(latency=0.1, server_bandwidth=2000.0)
    fed = price(
        Setting(method="fed_dpo", local_steps=3, lr=1.0, batch_size=16, participation=2), Ten(), given, shards
    )
    # 3 steps of twice the pairs; two messages of 0.1 + 2 s; two models down and two up at the server
    assert fed.round_seconds == pytest.approx(3 * 1.0 + 2 * 2.1 + 4 * 0.5)
    assert fed.seconds == pytest.approx(10 * fed.round_seconds)
    assert fed.round_bytes == 2 * 2 * 1000
    ring = price(Setting(method="dec_dpo", local_steps=1, lr=1.0, graph="ring"), Ten(), given, shards)
    assert ring.round_seconds == pytest.approx(0.5 * 40 / 8 + 0.1 + 2 * 2)  # the full shard of 40 pairs
    assert ring.round_bytes == 12 * 1000


def test_the_space_and_its_neighbours() -> None:
    space = Space(agents=8, lrs=(0.5, 1.0, 2.0), local_steps=(1, 2), batch_sizes=(4, None))
    assert list(space.places()) == [
        (2, None), (4, None), (None, None),
        *((None, graph) for graph in ("ring", "torus", "hypercube", "star", "complete")),
    ]  # fmt: skip
    assert [graph for _, graph in Space(agents=7, lrs=(1.0,)).places() if graph] == [
        "ring",
        "star",
        "complete",
    ]
    everything = space.all()
    assert len(everything) == len(set(everything)) == 3 * 2 * 2 * 8
    here = Setting(method="fed_dpo", local_steps=1, lr=0.5, batch_size=4)
    around = space.neighbours(here)
    assert here not in around
    assert set(around) <= set(everything)
    # E, lr and batch have one neighbour each, E and lr together one, and there are seven other places
    assert len(around) == 4 + 7


def test_it_finds_the_best_of_a_small_space_by_brute_force() -> None:
    on = problem()
    target = near(on, 0.05)
    forecast = Forecast(on, target)
    space = Space(
        agents=6, lrs=step_sizes(forecast.largest_curvature, count=4), local_steps=(1, 4),
        batch_sizes=(4, 16), graphs=("ring", "complete"),
    )  # fmt: skip
    shards = np.full(6, 60)
    plan = refine(ranked(space, forecast, costs(), shards), space, Simulator(on, target, costs()))[0]
    brute = Simulator(on, target, costs(), seeds=4, seed=50)
    seconds = [found.seconds for found in brute.run(space.all(), 1.2 * plan.seconds)]
    again = Simulator(on, target, costs(), seeds=16, seed=90).run([plan.setting], 3 * plan.seconds)[0]
    assert again.seconds <= 1.15 * min(seconds)


def test_slow_links_ask_for_more_work_a_round() -> None:
    on = problem()
    forecast = Forecast(on, near(on, 0.05))
    space = Space(agents=6, lrs=step_sizes(forecast.largest_curvature))
    chosen = [
        ranked(space, forecast, costs(bandwidth), np.full(6, 60))[0].setting for bandwidth in (1e9, 20.0)
    ]
    work = [setting.local_steps * setting.batch_size for setting in chosen]
    assert work[0] < work[1]
    assert forecast.rounds(chosen[0]) > forecast.rounds(chosen[1])


def test_what_was_cut_short_is_simulated_again_when_there_is_more_time() -> None:
    on = problem()
    simulator = Simulator(on, near(on, 0.1), costs())
    setting = Setting(method="fed_dpo", local_steps=1, lr=0.3, batch_size=16)
    assert simulator.run([setting], 5.0)[0].rounds is None
    reached = simulator.run([setting], 1e4)[0]
    assert reached.rounds is not None
    assert reached.seconds == pytest.approx(reached.rounds * (1.0 + 2 * 2.0))
    assert simulator.run([setting], 5.0) == [reached]


CONSTANTS = Constants(
    smoothness=2.0, noise=8.0, heterogeneity=0.5, delta=0.3, strong_convexity=None, gradient_norm_sq=0.4,
    loss=0.69, exact=True,
)  # fmt: skip


def test_guarantees_are_the_bounds_with_the_batch_s_noise() -> None:
    known = {
        "smoothness": CONSTANTS.smoothness,
        "delta": CONSTANTS.delta,
        "noise": CONSTANTS.noise / 4,
        "heterogeneity": CONSTANTS.heterogeneity,
    }
    lr = 1 / (40 * CONSTANTS.smoothness * 3)
    fed = Setting(method="fed_dpo", local_steps=3, lr=lr, batch_size=4, participation=2)
    expected = rates.fed_dpo(**known, lr=lr, rounds=50, agents=6, local_steps=3, participation=2)
    assert expected.holds
    assert guaranteed(CONSTANTS, fed, 50, 6).bound == pytest.approx(expected.total)
    dec = Setting(method="dec_dpo", local_steps=2, lr=1e-3, batch_size=4, graph="star")
    # A star's Metropolis weights: a leaf keeps all but 1/6.
    expected = rates.dec_dpo(**known, lr=1e-3, rounds=50, agents=6, local_steps=2, rho=1 - 1 / 6)
    assert expected.holds
    assert guaranteed(CONSTANTS, dec, 50, 6).bound == pytest.approx(expected.total)
    above = guaranteed(CONSTANTS, Setting(method="fed_dpo", local_steps=3, lr=10.0), 50, 6)
    assert above.bound is None
    assert above.why.startswith("nothing is guaranteed: ")
    sampled = dataclasses.replace(CONSTANTS, exact=False)
    assert guaranteed(sampled, fed, 50, 6).bound is None


def test_the_extrapolation_is_gradient_descent_on_a_parabola() -> None:
    """f = theta^2, from theta = 1: ||grad f||^2 = 4 f, smoothness 2. Its rate is the descent lemma's, eta (1 - eta) 4 a step."""
    parabola = Constants(
        smoothness=2.0, noise=0.0, heterogeneity=0.0, delta=1.0, strong_convexity=None, gradient_norm_sq=4.0,
        loss=1.0, exact=False,
    )  # fmt: skip
    foreseen = Extrapolation(parabola, 0.01, agents=4).rounds(
        Setting(method="fed_dpo", local_steps=1, lr=0.1)
    )
    theta, steps = 1.0, 0
    while theta**2 > 0.01:
        theta, steps = theta - 0.1 * 2 * theta, steps + 1
    assert foreseen == steps  # 1 - 0.1 * 0.9 * 4 = 0.64 = 0.8^2
    noisy = Extrapolation(CONSTANTS, 0.01, agents=4)
    assert noisy.rounds(Setting(method="fed_dpo", local_steps=1, lr=0.3, batch_size=1)) is None
    with pytest.raises(ValueError, match=r"target_loss: found 0\.8"):
        Extrapolation(CONSTANTS, 0.8, 4)


# ---- the command

SPEEDS = ("--bandwidth", "200", "--latency", "0.1", "--step-seconds", "0.2")
PLANNED = {**TOWN, "optimizer": {"name": "sgd", "lr": 1.0, "batch_size": 4}}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # A plan that is a little worse is soon made.
    monkeypatch.setattr("prefmesh.theory.planner.RUN_OFF", ((8, 16, 1.0), (4, 24, 1.0)))
    write_yaml(tmp_path / "town.yaml", PLANNED)
    return tmp_path


def test_a_plan_runs(here) -> None:
    found = prefmesh(
        "plan", "town.yaml", "--target-loss", "0.55", *SPEEDS, "--check", "--out", "plan.yaml", "--json"
    )
    assert (found.code, found.err) == (0, "")
    plan = json.loads(found.out)
    assert plan["source"] == "simulated"
    assert plan["constants"]["exact"]
    assert plan["rounds"] >= 1
    assert plan["seconds"] == pytest.approx(plan["rounds"] * plan["seconds_per_round"], rel=0.05)
    assert plan["check"]["excess"] is not None
    assert plan["check"]["neighbours"]
    written = load_config(here / "plan.yaml")
    assert written.plain() == yaml.safe_load((here / "plan.yaml").read_text()) == plan["config"]
    assert written.optimizer.name == "sgd"
    assert written.method.rounds >= plan["rounds"]
    ran = prefmesh("run", "plan.yaml", "--out", "out", "--json", "-o", "evaluation.every=1")
    assert ran.code == 0
    losses = [
        json.loads(line)["train_loss"] for line in (here / "out" / "metrics.jsonl").read_text().splitlines()
    ]
    assert min(losses) < 0.6


def test_in_words(here) -> None:
    found = prefmesh("plan", "town.yaml", "--target-loss", "0.6", *SPEEDS)
    assert found.code == 0
    for word in ("settings", "rounds", "seconds", "bytes sent", "guaranteed", "because"):
        assert word in found.out


def test_other_policies_get_a_guide_that_says_so(here) -> None:
    write_yaml(here / "tiny.yaml", TINY)
    found = prefmesh("plan", "tiny.yaml", "--target-loss", "0.68", *SPEEDS, "--check", "--json")
    assert (found.code, found.err) == (0, "")
    plan = json.loads(found.out)
    assert plan["source"] == "extrapolated"
    assert plan["check"] is None
    assert plan["guaranteed"]["bound"] is None
    assert any(reason.startswith("Heuristic") and "AdamW" in reason for reason in plan["reasons"])
    assert plan["config"]["optimizer"]["name"] == "adamw"
    assert plan["config"]["optimizer"]["lr"] == TINY["optimizer"]["lr"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--target-loss", "0.9"), "target_loss: found 0.9; allowed: below 0.693147"),
        (("--target-loss", "nan"), "target_loss: found nan"),
        (("--target-loss", "0.01"), "target_loss: found 0.01;"),
        (("--target-loss", "0.5", "--bandwidth", "0"), "bandwidth: found 0.0"),
        (("--target-loss", "0.5", "--latency", "-1"), "latency: found -1.0"),
        (("--target-loss", "0.5", "--step-seconds", "inf"), "seconds_per_step: found inf"),
        (("--target-loss", "0.5", "--compute", "normal"), "distribution: found 'normal'"),
        (("--target-loss", "0.5", "--out", "town.yaml"), "town.yaml: exists already"),
        (
            ("--target-loss", "0.5", "-o", "objective.weights=by_size"),
            "objective: agents do not weigh the same",
        ),
        (("--target-loss", "0.5", "-o", "preferences.agents=1"), "preferences.agents: found 1"),
    ],
)
def test_refusals_are_one_line(here, words, said, monkeypatch) -> None:
    monkeypatch.setattr("prefmesh.theory.forecast.MAX_STEPS", 300)
    found = prefmesh("plan", "town.yaml", *SPEEDS, *words)
    assert found.code == 2
    assert found.out == ""
    assert found.err.count("\n") == 1
    assert said in found.err
