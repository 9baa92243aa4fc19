"""FedBuff (Nguyen et al. 2022, arXiv 2106.06639, algorithm 1): agents never wait; the server steps when K updates have come.

    theta^{r+1} = theta^r + (1/K) sum over the K that came first of  N w_i Delta_i / sqrt(1 + q_i)

Delta_i leads away from the model of q_i rounds ago, which was the newest when i began. Who comes when is a simulation of devices:
an agent's mean time, and each of its jobs, are lognormal. One that has handed in begins anew when the server has stepped. Fast
agents take part more often: this minimises f only so far as users who are fast and users who are slow agree.
"""

import heapq
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int
from pydantic import Field

from prefmesh.algorithms.methods.base import MethodSettings, method
from prefmesh.algorithms.methods.fed_dpo import Stale
from prefmesh.compression import ChainSettings
from prefmesh.errors import InputError
from prefmesh.randomness import generator


class FedBuffSettings(MethodSettings):
    """`buffer`: K. `spread`: of agents' mean times and of the times of their jobs, standard deviation over mean."""

    buffer: int = Field(default=1, ge=1)
    spread: float = Field(default=0.5, ge=0)
    compression: ChainSettings = ()
    """As of `fed_dpo`."""

    def check(self, agents: int) -> None:
        """K <= N."""
        if self.buffer > agents:
            raise InputError(
                f"method.buffer: found {self.buffer} updates; allowed: 1 to {agents}, the number of agents"
            )


@method("fed_buff")
class FedBuff(Stale):
    """A server with a buffer, and agents that come when they are done."""

    Settings = FedBuffSettings
    settings: FedBuffSettings
    agents_remember = True

    @cached_property
    def _arrivals(self) -> list[tuple[Int[np.ndarray, " buffer"], Int[np.ndarray, " buffer"]]]:
        """Of every round: who came, in the order of the agents, and how old what they started from was."""
        random, n = generator(self.population.seed, "arrivals"), self.agents
        sigma = float(np.sqrt(np.log1p(self.settings.spread**2)))
        speed = random.lognormal(-(sigma**2) / 2, sigma, n)
        due = [(float(speed[i] * random.lognormal(-(sigma**2) / 2, sigma)), i) for i in range(n)]
        heapq.heapify(due)
        began, found = np.zeros(n, dtype=np.int64), []
        for round_ in range(1, self.settings.rounds + 1):
            came, now = [], 0.0
            for _ in range(self.settings.buffer):
                now, i = heapq.heappop(due)
                came.append(i)
            who = np.sort(np.array(came))
            found.append((who, round_ - 1 - began[who]))
            began[who] = round_
            for i in who.tolist():
                heapq.heappush(due, (now + float(speed[i] * random.lognormal(-(sigma**2) / 2, sigma)), i))
        return found

    @property
    def depth(self) -> int:
        """As many as the oldest start needs."""
        return 1 + max(int(ages.max()) for _, ages in self._arrivals)

    def participants(self, round_: int) -> Int[np.ndarray, " active"]:
        """The K that came first."""
        return self._arrivals[round_ - 1][0]

    def ages(self, round_: int) -> Int[np.ndarray, " agents"]:
        """Of those who came; 0 for the others."""
        who, ages = self._arrivals[round_ - 1]
        found = np.zeros(self.agents, dtype=np.int64)
        found[who] = ages
        return found

    def shares(
        self, round_: int, agents: Int[np.ndarray, " own"], acting: Int[np.ndarray, " active"]
    ) -> Float[np.ndarray, " own"]:
        """N w_i / (K sqrt(1 + q_i))."""
        return super().shares(round_, agents, acting) / np.sqrt(1 + self.ages(round_)[agents])
