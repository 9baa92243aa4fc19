"""The clock: events against closed forms, brute force, and what networkx knows of cycles."""

from itertools import combinations

import networkx as nx
import numpy as np
import pytest
from scipy.stats import lognorm

from prefmesh.algorithms.methods import METHODS, Population
from prefmesh.theory import clock
from prefmesh.theory.clock import Devices, Links
from prefmesh.theory.problem import LogLinearProblem
from prefmesh.theory.simulate import Member, period
from prefmesh.topology.build import build_mixing_matrix

BYTES = 1000.0


def method(name: str, agents: int, rounds: int, local_steps: int = 1, seed: int = 0, **settings):
    made = METHODS[name]
    return made(
        made.Settings(name=name, rounds=rounds, local_steps=local_steps, **settings),
        Population(weights=np.full(agents, 1 / agents), seed=seed),
    )


def harmonic(n: int) -> float:
    return sum(1 / k for k in range(1, n + 1))


@pytest.mark.parametrize("participation", [None, 3])
def test_a_federated_round_in_constant_time_by_hand(participation) -> None:
    devices = Devices(seconds_per_step=0.5)
    links = Links(bandwidth=100.0, latency=0.25, server_bandwidth=400.0)
    fed = method("fed_dpo", 8, rounds=5, local_steps=4, participation=participation)
    s = participation or 8
    # 4 steps of 0.5 s; two messages of 0.25 + 10 s on the agent's link; S models down and up at 400 B/s.
    by_hand = 2.0 + 2 * 10.25 + 2 * s * 2.5
    assert clock.federated_seconds(fed, devices, links, BYTES) == pytest.approx(by_hand, rel=1e-12)
    np.testing.assert_allclose(
        clock.round_ends(fed, devices, links, BYTES), by_hand * np.arange(6), rtol=1e-12
    )


def test_participants_of_unequal_constant_speed_by_brute_force() -> None:
    seconds = np.array([0.1, 2.0, 0.7, 0.7, 5.0])
    sets = list(combinations(range(5), 3))
    expected = np.mean([max(seconds[list(chosen)]) for chosen in sets])
    fed = method("fed_dpo", 5, rounds=2000, participation=3)
    devices, links = Devices(seconds_per_step=seconds), Links(bandwidth=np.inf)
    assert clock.federated_seconds(fed, devices, links, BYTES) == pytest.approx(expected, rel=1e-12)
    # and the clock waits for exactly those that the algorithm draws
    ends = clock.round_ends(fed, devices, links, BYTES)
    drawn = [seconds[fed.participants(r + 1)].max() for r in range(2000)]
    np.testing.assert_allclose(np.diff(ends), drawn, rtol=1e-9)


@pytest.mark.parametrize("s", [1, 4, 10])
def test_exponential_devices_wait_for_a_harmonic_number(s) -> None:
    fed = method("fed_dpo", 10, rounds=2500, local_steps=2, participation=s)
    devices, links = Devices(seconds_per_step=1.5, distribution="exponential"), Links(bandwidth=np.inf)
    assert clock.federated_seconds(fed, devices, links, BYTES) == pytest.approx(3 * harmonic(s), rel=1e-8)
    each = np.diff(clock.round_ends(fed, devices, links, BYTES))
    error = each.std() / np.sqrt(len(each))
    assert abs(each.mean() - 3 * harmonic(s)) < 4 * error
    assert error < 0.03 * each.mean()


def test_lognormal_devices_have_the_mean_and_spread_that_were_asked_for() -> None:
    devices = Devices(seconds_per_step=2.0, distribution="lognormal", spread=0.7)
    drawn = devices.draw(agents=5, local_steps=3, rounds=40_000, seed=1)
    assert drawn.mean() == pytest.approx(6, rel=0.01)
    assert drawn.std() / drawn.mean() == pytest.approx(0.7, rel=0.02)
    # the slowest of two, after waits of 1 and 4 s: the integral against sampling by scipy
    scale = np.sqrt(np.log1p(0.7**2))
    unit = lognorm(s=scale, scale=np.exp(-(scale**2) / 2))
    sampled = (np.array([1.0, 4.0]) + 6 * unit.rvs((400_000, 2), random_state=3)).max(axis=1).mean()
    assert devices.expected_slowest(np.array([1.0, 4.0]), 2, 3) == pytest.approx(sampled, rel=0.005)


def test_updates_queue_at_the_server_and_early_ones_save_time() -> None:
    devices = Devices(seconds_per_step=1.0, distribution="exponential")
    links = Links(bandwidth=np.inf, server_bandwidth=1000.0)
    fed = method("fed_dpo", 6, rounds=500)
    spent = clock.round_ends(fed, devices, links, BYTES)[-1] / 500
    whole = clock.federated_seconds(fed, devices, links, BYTES)
    assert whole == pytest.approx(harmonic(6) + 12, rel=1e-8)
    assert whole - 5 < spent < whole


@pytest.mark.parametrize("graph", ["ring", "star", "path", "complete"])
def test_a_gossip_round_in_equal_constant_time_by_hand(graph) -> None:
    devices, links = Devices(seconds_per_step=0.5), Links(bandwidth=100.0, latency=0.25)
    dec = method("dec_dpo", 6, rounds=40, local_steps=4, graph={"name": graph})
    most = max(degree for _, degree in dec.mixing.graph.degree)
    by_hand = 2 + 0.25 + 10 * most
    ends = clock.round_ends(dec, devices, links, BYTES)
    least, upper = clock.gossip_seconds(dec, devices, links, BYTES)
    assert least == pytest.approx(by_hand, rel=1e-12)
    assert upper == pytest.approx(by_hand, rel=1e-12)
    assert (ends[-1] - ends[20]) / 20 == pytest.approx(by_hand, rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_the_growth_of_unequal_constant_times_is_the_largest_cycle_mean(seed) -> None:
    rng = np.random.default_rng(seed)
    devices = Devices(seconds_per_step=rng.uniform(0.1, 3, 7))
    links = Links(bandwidth=rng.uniform(200, 3000, 7), latency=rng.uniform(0, 1, 7), slow={(0, 1): 2.5})
    dec = method("dec_dpo", 7, rounds=2000, graph={"name": "erdos_renyi", "p": 0.4}, seed=seed)
    ends = clock.agent_ends(dec, devices, links, BYTES)
    least, upper = clock.gossip_seconds(dec, devices, links, BYTES)
    # Cycles of a max-plus matrix: 420 rounds are a multiple of every cycle's length up to 7.
    np.testing.assert_allclose((ends[-1] - ends[-1 - 420]) / 420, least, rtol=1e-9)
    assert least <= upper
    # no agent is further ahead than links apart
    apart = dict(nx.all_pairs_shortest_path_length(dec.mixing.graph))
    for i in range(7):
        for j in range(7):
            r = 1000
            assert ends[r + apart[i][j], i] >= ends[r, j] - 1e-9


def test_cycle_means_by_listing_all_cycles() -> None:
    rng = np.random.default_rng(5)
    for _ in range(20):
        weight = np.where(rng.random((6, 6)) < 0.4, rng.normal(size=(6, 6)), -np.inf)
        weight[np.arange(6), (np.arange(6) + 1) % 6] = rng.normal(size=6)  # strongly connected
        graph = nx.DiGraph([(i, j) for i in range(6) for j in range(6) if np.isfinite(weight[i, j])])
        means = [
            np.mean([weight[a, b] for a, b in zip(cycle, cycle[1:] + cycle[:1], strict=True)])
            for cycle in nx.simple_cycles(graph)
        ]
        assert clock.maximum_cycle_mean(weight) == pytest.approx(max(means), abs=1e-12)


def test_random_times_on_a_ring_lie_between_the_neighbourhood_and_everyone() -> None:
    devices, links = Devices(seconds_per_step=1.0, distribution="exponential"), Links(bandwidth=np.inf)
    dec = method("dec_dpo", 16, rounds=3000, graph={"name": "ring"})
    rate = clock.round_ends(dec, devices, links, BYTES)[-1] / 3000
    least, most = clock.gossip_seconds(dec, devices, links, BYTES)
    assert least == pytest.approx(1)
    assert most == pytest.approx(harmonic(16), rel=1e-8)
    assert least < harmonic(3) < rate < most  # eq. (7.7): a ring looks alike from everywhere


def test_a_slow_device_is_felt_later_further_away() -> None:
    seconds = np.ones(8)
    seconds[0] = 10
    dec = method("dec_dpo", 8, rounds=12, graph={"name": "path"})
    ends = clock.agent_ends(dec, Devices(seconds_per_step=seconds), Links(bandwidth=np.inf), BYTES)
    # agent k hears of agent 0's first round in its own round k + 1 (own round 1 for k = 0 and 1)
    for k in range(1, 8):
        np.testing.assert_allclose(ends[: max(k, 1), k], np.arange(max(k, 1)))
        assert ends[k, k] > k
    assert ends[-1].max() == ends[-1, 0]


@pytest.mark.parametrize("staleness", [1, 2, 5])
@pytest.mark.parametrize("server", [np.inf, 900.0])
def test_stale_rounds_overlap(staleness, server) -> None:
    devices = Devices(seconds_per_step=3.0)
    links = Links(bandwidth=500.0, latency=1.0, server_bandwidth=server)
    fed = method("fed_dpo", 4, rounds=900, staleness=staleness, staleness_schedule="max")
    ends = clock.round_ends(fed, devices, links, BYTES)
    expected = clock.stale_seconds(fed, devices, links, BYTES)
    span = 60 * (staleness + 1)
    assert (ends[-1] - ends[-1 - span]) / span == pytest.approx(expected, rel=1e-9)
    assert expected < clock.federated_seconds(method("fed_dpo", 4, rounds=1), devices, links, BYTES)


def test_seconds_to_a_target() -> None:
    values, ends = np.array([3.0, 2.0, 2.5, 1.0]), np.array([0.0, 4.0, 9.0, 20.0])
    assert clock.seconds_to(values, 2.0, ends) == 4
    assert clock.seconds_to(values, 1.5, ends) == 20
    assert clock.seconds_to(values, 3.0, ends) == 0
    assert clock.seconds_to(values, 0.5, ends) == np.inf


def test_time_varying_graphs_are_timed_round_by_round() -> None:
    ring, star = (build_mixing_matrix(g, "metropolis", 4, 0).matrix for g in ("ring", "star"))
    problem = LogLinearProblem([np.ones((1, 1))] * 4, 1.0)
    dec = Member(problem, "dec_dpo", mixing=period([ring, star], 4)).method(rounds=2, local_steps=1)
    ends = clock.round_ends(dec, Devices(seconds_per_step=1.0), Links(bandwidth=100.0), BYTES)
    np.testing.assert_allclose(ends, [0, 21, 21 + 31])
    with pytest.raises(ValueError, match="method: found a graph that changes over rounds"):
        clock.gossip_seconds(dec, Devices(seconds_per_step=1.0), Links(bandwidth=100.0), BYTES)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Devices(seconds_per_step=-1.0), "seconds_per_step: found -1.0"),
        (lambda: Devices(seconds_per_step=1.0, distribution="normal"), "distribution: found 'normal'"),
        (lambda: Devices(seconds_per_step=1.0, spread=0.0), "spread: found 0.0"),
        (lambda: Links(bandwidth=0.0), "bandwidth: found 0.0"),
        (lambda: Links(bandwidth=1.0, latency=np.inf), "latency: found inf"),
        (lambda: Links(bandwidth=1.0, slow={(0, 1): 0.0}), "slow: found 0.0 for"),
        (
            lambda: Devices(seconds_per_step=np.ones(3)).draw(4, 1, 1, 0),
            r"seconds_per_step: found shape \(3,\); allowed: one number, or 4",
        ),
        (
            lambda: clock.round_ends(
                method("local_only", 2, 1), Devices(seconds_per_step=1.0), Links(bandwidth=1.0), 1.0
            ),
            "method: found LocalOnly; allowed: FedDPO or DecDPO",
        ),
    ],
)
def test_bad_input(make, said) -> None:
    with pytest.raises(ValueError, match=said):
        make()
