"""Seconds: when each round of FedDPO or DecDPO ends, on devices and links of given speeds (docs/theory, section 7).

The clock runs beside the training algorithm and takes from it who takes part in a round, how old the model is that each
starts from, and who sends to whom. The algorithm's numbers do not depend on it: rounds are synchronous, so that seconds to
a target are the clock's time at the first round that reaches it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int
from scipy.integrate import quad
from scipy.sparse import csr_array
from scipy.stats import expon, lognorm

from prefmesh.algorithms.methods import Method
from prefmesh.algorithms.methods.dec_dpo import DecDPO
from prefmesh.algorithms.methods.fed_dpo import FedDPO
from prefmesh.randomness import generator

Ends = Float[np.ndarray, " rounds_and_start"]
PerAgent = Float[np.ndarray, " agents"]
Speed = float | PerAgent

DISTRIBUTIONS = ("constant", "exponential", "lognormal")


@dataclass(frozen=True, kw_only=True)
class Devices:
    """How fast agents compute.

    `seconds_per_step`: mean seconds of a local step, one number or one per agent (slow devices). `distribution`: of the
    seconds of a round's E steps together, drawn per agent and round: what slows a device down lasts longer than one step.
    `spread`: of `lognormal`, standard deviation over mean.
    """

    seconds_per_step: Speed
    distribution: str = "constant"
    spread: float = 0.5

    def __post_init__(self) -> None:
        _refuse_negative("seconds_per_step", self.seconds_per_step)
        if self.distribution not in DISTRIBUTIONS:
            raise ValueError(
                f"distribution: found {self.distribution!r}; allowed: {', '.join(DISTRIBUTIONS)}"
            )
        if not (np.isfinite(self.spread) and self.spread > 0):
            raise ValueError(f"spread: found {self.spread}; allowed: a finite number above 0")

    def mean_seconds(self, agents: int, local_steps: int) -> PerAgent:
        """E times the mean seconds of a step, for every agent."""
        return local_steps * _per_agent("seconds_per_step", self.seconds_per_step, agents)

    def draw(
        self, agents: int, local_steps: int, rounds: int, seed: int
    ) -> Float[np.ndarray, "rounds agents"]:
        """Seconds that each agent computes in each round."""
        mean, shape = self.mean_seconds(agents, local_steps), (rounds, agents)
        if self.distribution == "constant":
            return np.broadcast_to(mean, shape)
        return mean * self._unit().rvs(size=shape, random_state=generator(seed, "compute time"))

    def expected_slowest(self, after: PerAgent, participants: int, local_steps: int) -> float:
        """E max_i (after_i + compute_i) over a uniformly drawn set of `participants` agents, in seconds (eq. 7.3).

        `after` (N,): constant seconds that come on top of each agent's own.
        """
        mean = self.mean_seconds(len(after), local_steps)
        if self.distribution == "constant" or not mean.any():
            times = np.sort(after + mean)
            at_least = 1 - _all_below(np.tri(len(after), k=-1), participants)  # the k-th's time, by one of S
            return float(times @ (at_least - np.append(at_least[1:], 0)))
        unit = self._unit()
        scale = np.maximum(mean, np.finfo(float).tiny)

        def survives(t: float) -> float:
            return 1 - float(_all_below(unit.cdf((t - after) / scale)[None], participants)[0])

        tail = float((after + mean * unit.ppf(1 - 1e-12)).max())
        least = float(np.sort(after)[participants - 1])  # no set of S is done sooner
        inner = np.unique(after[(after > least) & (after < tail)])
        return least + quad(survives, least, tail, limit=200, points=inner if len(inner) else None)[0]

    def _unit(self):  # type: ignore[no-untyped-def]
        """The distribution of mean one."""
        if self.distribution == "exponential":
            return expon()
        variance = np.log1p(self.spread**2)
        return lognorm(s=np.sqrt(variance), scale=np.exp(-variance / 2))


@dataclass(frozen=True, kw_only=True)
class Links:
    """How fast models travel, in bytes per second (each way) and seconds; one number, or one per agent.

    An agent's link is shared by all its messages of a round. A message between two agents goes at the speed of the slower
    end. `server_bandwidth`: of the server's own link, shared by all participants. `slow`: what the seconds of messages
    between two agents are multiplied by, whichever sends: {(0, 3): 10.0}.
    """

    bandwidth: Speed
    latency: Speed = 0.0
    server_bandwidth: float = np.inf
    slow: Mapping[tuple[int, int], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("bandwidth", "server_bandwidth"):
            if not (np.asarray(getattr(self, name)) > 0).all():
                raise ValueError(
                    f"{name}: found {getattr(self, name)}; allowed: bytes per second, more than 0"
                )
        _refuse_negative("latency", self.latency)
        for pair, factor in self.slow.items():
            if not (np.isfinite(factor) and factor > 0):
                raise ValueError(f"slow: found {factor} for {pair}; allowed: a finite factor above 0")

    def to_server(self, agents: int, model_bytes: float | int) -> PerAgent:
        """Seconds of one model between each agent and the server, on the agent's own link."""
        bandwidth = _per_agent("bandwidth", self.bandwidth, agents)
        return _per_agent("latency", self.latency, agents) + model_bytes / bandwidth

    def between(
        self, agents: int, senders: Int[np.ndarray, " links"], receivers: Int[np.ndarray, " links"],
        model_bytes: float | int,
    ) -> Float[np.ndarray, " links"]:  # fmt: skip
        """Seconds of the message over each link, all of a round's being sent at a time (eq. 7.4)."""
        bandwidth = _per_agent("bandwidth", self.bandwidth, agents)
        latency = _per_agent("latency", self.latency, agents)
        sending = np.bincount(senders, minlength=agents) / bandwidth
        receiving = np.bincount(receivers, minlength=agents) / bandwidth
        seconds = np.maximum(latency[senders], latency[receivers])
        seconds = seconds + model_bytes * np.maximum(sending[senders], receiving[receivers])
        for (i, j), factor in self.slow.items():
            here = ((senders == i) & (receivers == j)) | ((senders == j) & (receivers == i))
            seconds[here] *= factor
        return seconds


def round_ends(
    method: Method, devices: Devices, links: Links, model_bytes: float | int, seed: int = 0
) -> Ends:
    """Seconds at which the start and every round's mixed model are there: (rounds + 1,), from 0.

    DecDPO's average model is there when the last agent has ended the round. Raises `ValueError` for methods without rounds of
    communication.
    """
    if isinstance(method, FedDPO):
        return _federated(method, devices, links, model_bytes, seed)
    if not isinstance(method, DecDPO):
        raise ValueError(
            f"method: found {type(method).__name__}; allowed: FedDPO or DecDPO, the methods that communicate in rounds"
        )
    return agent_ends(method, devices, links, model_bytes, seed).max(axis=1)


def agent_ends(
    method: DecDPO, devices: Devices, links: Links, model_bytes: float | int, seed: int = 0
) -> Float[np.ndarray, "rounds_and_start agents"]:
    """Seconds at which each agent has every model that it mixes in each round (eq. 7.4).

    An agent waits for its neighbours and for its own sending alone, so parts of the graph run ahead of others, by no more
    rounds than there are links between them.
    """
    rounds, agents = method.settings.rounds, method.agents
    compute = devices.draw(agents, method.settings.local_steps, rounds, seed)
    ends = np.zeros((rounds + 1, agents))
    matrix, messages = None, None
    for r in range(rounds):
        if messages is None or method.matrix(r + 1) is not matrix:
            matrix = method.matrix(r + 1)
            messages = _messages(matrix, links, model_bytes)
        senders, receivers, seconds = messages
        np.maximum.at(ends[r + 1], receivers, (ends[r] + compute[r])[senders] + seconds)
    return ends


def first_at_or_below(values: Float[np.ndarray, " points"], target: float) -> int | None:
    """The first round (from 0) at which `values` is at most `target`; None where it never is."""
    reached = values <= target
    return int(reached.argmax()) if reached.any() else None


def seconds_to(values: Float[np.ndarray, " points"], target: float, ends: Ends) -> float:
    """Seconds until `values` (loss, squared gradient norm, ...) is first at most `target`; infinite where it never is."""
    first = first_at_or_below(values, target)
    return np.inf if first is None else float(ends[first])


# ---- closed forms


def federated_seconds(method: FedDPO, devices: Devices, links: Links, model_bytes: float | int) -> float:
    """Expected seconds of a round without staleness: the slowest participant, then the server's link (eq. 7.2).

    Exact where all participants are done at a time; else a little long, since early updates arrive while others compute.
    """
    if method.settings.staleness:
        raise ValueError(
            f"staleness: found {method.settings.staleness}; allowed: 0, or stale_seconds for equal agents"
        )
    s = method.settings.participation or method.agents
    own = 2 * links.to_server(method.agents, model_bytes)
    server = 2 * s * model_bytes / links.server_bandwidth
    return devices.expected_slowest(own, s, method.settings.local_steps) + server


def stale_seconds(method: FedDPO, devices: Devices, links: Links, model_bytes: float | int) -> float:
    """Seconds of a round where all of N equal agents take part, always q_max rounds late, in constant time (eq. 7.8)."""
    compute = devices.mean_seconds(method.agents, method.settings.local_steps)
    own = links.to_server(method.agents, model_bytes)
    s = method.settings.participation or method.agents
    if (
        s < method.agents
        or devices.distribution != "constant"
        or np.ptp(compute) > 0
        or np.ptp(own) > 0
        or (method.settings.staleness and method.settings.staleness_schedule != "max")
    ):
        raise ValueError(
            "method, devices: found partial participation, a uniform schedule, random or unequal times; allowed: S = N, "
            "schedule max, equal constant times"
        )
    server = s * model_bytes / links.server_bandwidth
    whole = compute[0] + 2 * own[0] + 2 * server
    return float(max(compute[0], server, whole / (method.settings.staleness + 1)))


def gossip_seconds(
    method: DecDPO, devices: Devices, links: Links, model_bytes: float | int
) -> tuple[float, float]:
    """Least and most expected seconds of a round in the long run (eqs. 7.5 to 7.7); equal in constant time with equal links.

    Least: the largest mean over the graph's cycles, at mean times; for constant times that is exact. Most: as if all waited
    for the slowest agent and link. Raises `ValueError` for a time-varying graph.
    """
    matrix = method.matrix(1)
    if method.matrix(2) is not matrix:
        raise ValueError("method: found a graph that changes over rounds; allowed: the same in every round")
    senders, receivers, seconds = _messages(matrix, links, model_bytes)
    mean = devices.mean_seconds(method.agents, method.settings.local_steps)
    weight = np.full((method.agents, method.agents), -np.inf)
    weight[senders, receivers] = mean[senders] + seconds
    slowest = devices.expected_slowest(
        np.zeros(method.agents), method.agents, method.settings.local_steps
    ) + float(seconds.max())
    return maximum_cycle_mean(weight), slowest


def maximum_cycle_mean(weight: Float[np.ndarray, "nodes nodes"]) -> float:
    """The largest mean weight of a cycle of a strongly connected graph; -inf where there is no link. Karp 1978.

    The growth rate of x(r + 1)_j = max_i (x(r)_i + weight_ij).
    """
    n = len(weight)
    longest = np.full((n + 1, n), -np.inf)
    longest[0, 0] = 0
    for k in range(n):
        longest[k + 1] = (longest[k][:, None] + weight).max(axis=0)
    ends = np.isfinite(longest[n])
    lengths = n - np.arange(n)[:, None]
    return float(((longest[n, ends] - longest[:n, ends]) / lengths).min(axis=0).max())


# ---- inside


def _federated(method: FedDPO, devices: Devices, links: Links, model_bytes: float | int, seed: int) -> Ends:
    """Eq. (7.1). Updates that wait for the server's link are taken one after the other, in the order of rounds."""
    rounds, agents = method.settings.rounds, method.agents
    compute = devices.draw(agents, method.settings.local_steps, rounds, seed)
    own = links.to_server(agents, model_bytes)
    receive = model_bytes / links.server_bandwidth
    ends, free, server_free = np.zeros(rounds + 1), np.zeros(agents), 0.0
    for r in range(rounds):
        active = method.participants(r + 1)
        there = ends[r - method.ages(r + 1)[active]] + own[active] + len(active) * receive
        done = np.maximum(there, free[active]) + compute[r, active]
        free[active] = done
        for arrival in np.sort(done + own[active]):
            server_free = max(server_free, arrival) + receive
        ends[r + 1] = max(ends[r], server_free)
    return ends


def _messages(
    mixing: csr_array, links: Links, model_bytes: float | int
) -> tuple[Int[np.ndarray, " messages"], Int[np.ndarray, " messages"], Float[np.ndarray, " messages"]]:
    """Senders, receivers and seconds of a round; an agent's own model counts as there when its messages have left it."""
    agents, entries = mixing.shape[0], mixing.tocoo()
    receivers, senders = (index.astype(np.int64) for index in entries.coords)
    sent = (receivers != senders) & (entries.data != 0)
    receivers, senders = receivers[sent], senders[sent]
    seconds = links.between(agents, senders, receivers, model_bytes)
    leaving = (
        np.bincount(senders, minlength=agents)
        * model_bytes
        / _per_agent("bandwidth", links.bandwidth, agents)
    )
    own = np.arange(agents)
    return (
        np.concatenate([senders, own]),
        np.concatenate([receivers, own]),
        np.concatenate([seconds, leaving]),
    )


def _all_below(below: Float[np.ndarray, "times agents"], participants: int) -> Float[np.ndarray, " times"]:
    """P(all of S agents, drawn uniformly, are done), agent i being done with probability below[:, i]: e_S(below) / C(N, S).

    Agents are looked at one by one; `done[:, s]`: the probability that those drawn so far are s, and all are done.
    """
    n = below.shape[1]
    done = np.zeros((len(below), participants + 1))
    done[:, 0] = 1
    for i in range(n):
        left = participants - np.arange(participants + 1)
        drawn = np.clip(left / (n - i), 0, 1)  # sampling without replacement, one agent after the other
        next_ = done * (1 - drawn)
        next_[:, 1:] += done[:, :-1] * drawn[:-1] * below[:, i, None]
        done = next_
    return done[:, participants]


def _per_agent(name: str, value: Speed, agents: int) -> PerAgent:
    found = np.asarray(value, dtype=np.float64)
    if found.shape not in ((), (agents,)):
        raise ValueError(
            f"{name}: found shape {found.shape}; allowed: one number, or {agents}, one per agent"
        )
    return np.broadcast_to(found, agents)


def _refuse_negative(name: str, value: Speed) -> None:
    found = np.asarray(value)
    if not (np.isfinite(found).all() and (found >= 0).all()):
        raise ValueError(f"{name}: found {value}; allowed: finite seconds, at least 0")
