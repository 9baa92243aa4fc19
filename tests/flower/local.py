"""Sites in this process: what a server and its sites say to each other, without Flower in between."""

from collections.abc import Callable
from pathlib import Path

from prefmesh.config import ExperimentConfig
from prefmesh.flower.remote import Aggregate, Answer, Order, RemoteExperiment
from prefmesh.flower.site import Part, Site, share_of, told
from prefmesh.policies.base import Params

Fault = Callable[[int, int], str | None]
"""What becomes of an agent's answer in a round: `lost`, `late` (it comes with the next round), or nothing."""


class LocalSites:
    """Each answers from a `Site` that is opened anew for every message, as under Flower."""

    def __init__(self, config: ExperimentConfig, memory: Path, fault: Fault = lambda agent, round_: None):
        self.config, self.memory, self.fault = config, memory, fault
        agents = config.known_agents
        assert agents is not None
        self.shares = [share_of(config, agent, None) for agent in range(agents)]
        self.told = [told(share) for share in self.shares]
        self.sizes = RemoteExperiment.of(config, self.told, 0, self, 1).census.sizes
        self.waiting: list[Answer] = []
        self.said: list[str] = []

    def experiment(self, least: int = 1, aggregate: Aggregate | None = None) -> RemoteExperiment:
        return RemoteExperiment.of(self.config, self.told, 0, self, least, aggregate)

    def site(self, agent: int) -> Site:
        return Site.open(self.config, self.shares[agent], agent, self.sizes, self.memory / str(agent))

    def train(self, round_: int, orders: dict[int, Order]) -> list[Answer]:
        answers, self.waiting = self.waiting, []
        for agent, order in orders.items():
            fault = self.fault(agent, round_)
            if fault == "lost":
                continue
            row, measures = self.site(agent).train(round_, order.after, order.row)
            answer = Answer(agent=agent, round=round_, row=row, measures=measures)
            (self.waiting if fault == "late" else answers).append(answer)
        return answers

    def evaluate(self, round_: int, row: Params) -> dict[int, Part]:
        asked = [agent for agent in range(len(self.shares)) if self.fault(agent, -round_) != "lost"]
        return {agent: self.site(agent).evaluate(round_, row) for agent in asked}

    def say(self, text: str) -> None:
        self.said.append(text)
