"""Flower's ServerApp: the run's rounds, its directory, and messages to sites over the Grid.

Run config: `experiment`, a YAML file of the app's directory; `sites`, how many there are; `min-sites`, how many must answer a round
in time; `round-timeout` and `start-timeout`, seconds; `out`, a new run directory, or `resume`, one to go on with; `aggregation`, a
rule of Flower's instead of the mean, against up to `malicious` sites in a round.
"""

import secrets
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from flwr.app import Context, Message, RecordDict  # type: ignore[import-not-found]
from flwr.serverapp import Grid, ServerApp  # type: ignore[import-not-found]

from prefmesh import run as running
from prefmesh.config import ExperimentConfig, load_config
from prefmesh.environment import versions
from prefmesh.errors import Diverged, InputError, PeerLost
from prefmesh.experiment import policy_of
from prefmesh.flower import messages
from prefmesh.flower.aggregation import aggregation
from prefmesh.flower.remote import Aggregate, Answer, Order, RemoteExperiment
from prefmesh.flower.site import Part
from prefmesh.metrics import new_directory, refuse_taken, write_text
from prefmesh.policies.base import Params
from prefmesh.reports import write_report

Found = TypeVar("Found")

KEY = "flower_run.txt"
"""In the run directory: under which name sites keep what lasts of this run."""


def server_app(place: Path) -> ServerApp:
    """The app. `place`: the directory that the experiment's YAML file is in. What the user did wrong is a line before Flower's
    traceback."""
    made = ServerApp()

    @made.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            serve(grid, Settings.of(context.run_config, place))
        except (InputError, Diverged, PeerLost) as error:
            say(str(error))
            raise

    return made


def say(text: str) -> None:
    """A line for the server's log."""
    sys.stderr.write(f"prefmesh: {text}\n")
    sys.stderr.flush()


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a run is served. `config` is none where a run goes on with its own."""

    config: ExperimentConfig | None
    out: Path
    resume: bool
    sites: int
    least: int
    round_timeout: float
    start_timeout: float
    aggregate: Aggregate | None = None

    @classmethod
    def of(cls, told: Mapping[str, Any], place: Path = Path()) -> "Settings":
        """From the app's run config; files are looked for in `place`. Raises `InputError`."""
        resume, out = str(told.get("resume", "")), str(told.get("out", ""))
        if bool(resume) == bool(out):
            raise InputError(
                "run config: needs out, a new directory, or resume, one to go on with; one of the two"
            )
        numbers = {}
        for name, usual in (
            ("sites", None),
            ("min-sites", 1),
            ("round-timeout", 600),
            ("start-timeout", 300),
        ):
            value = told.get(name, usual)
            if not isinstance(value, int | float) or value <= 0:
                raise InputError(f"run config: {name} is {value}; allowed: a number above 0")
            numbers[name] = value
        config = None
        if not resume:
            config = load_config(place / str(told.get("experiment", "")))
        return cls(
            config=config,
            out=Path(resume or out),
            resume=bool(resume),
            sites=int(numbers["sites"]),
            least=int(numbers["min-sites"]),
            round_timeout=float(numbers["round-timeout"]),
            start_timeout=float(numbers["start-timeout"]),
            aggregate=aggregation(str(told.get("aggregation", "mean")), int(told.get("malicious", 0))),
        )


def serve(grid: Grid, settings: Settings) -> dict[str, Any]:
    """A whole run; its summary. Raises `InputError`, `Diverged`, `PeerLost`; what there is stays."""
    out = settings.out
    if settings.resume:
        config = running.config_of(out)
        if (done := running.finished(out)) is not None:
            return done
        key = (out / KEY).read_text(encoding="utf-8")
    else:
        refuse_taken(out, otherwise="resume to go on with a run")
        assert settings.config is not None
        config, key = settings.config, secrets.token_hex(8)
    sites = FlowerSites(grid=grid, config=config, run=key, settings=settings)
    told = sites.meet()
    experiment = RemoteExperiment.of(
        config,
        [one.told for one in told],
        sum(one.data_bytes for one in told),
        sites,
        settings.least,
        settings.aggregate,
    )
    sites.like, sites.sizes = experiment.start, experiment.census.sizes.tolist()
    sites.tested = experiment.evaluator.tested.tolist()

    def begin(directory: Path) -> None:
        running.described(experiment, directory)
        write_text(directory / KEY, key)

    if not settings.resume:
        new_directory(out, begin)
    summary = running.Rounds(experiment, out, _Log(), config.method.name).go()
    write_report(out)
    return summary


class _Log:
    """Progress, a line a round."""

    def stage(self, text: str) -> None:
        say(text)

    def round(self, round_: int, rounds: int, metrics: Mapping[str, Any]) -> None:
        told = [f"{name} {metrics[key]:.4f}" for name, key in
                (("loss", "loss"), ("accuracy", "eval/rewards/accuracies")) if key in metrics]  # fmt: skip
        if "sites" in metrics:
            told.append(f"{metrics['sites']:.0f} sites")
        say(", ".join([f"round {round_} of {rounds}", *told]))


@dataclass(kw_only=True)
class FlowerSites:
    """Sites behind a Grid. `names`: of the agents' sites, in order; `node`: where each is now."""

    grid: Grid
    config: ExperimentConfig
    run: str
    settings: Settings
    names: list[str] = field(default_factory=list)
    node: dict[str, int] = field(default_factory=dict)
    refused: set[int] = field(default_factory=set)
    """Nodes that are not this run's."""
    gone: set[int] = field(default_factory=set)
    """Nodes that were not connected when they were asked last."""
    told: dict[str, list[Any]] = field(default_factory=dict)
    like: Params = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)
    tested: list[int] = field(default_factory=list)
    open: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Messages to train that nobody has answered yet: agent and round."""

    def __post_init__(self) -> None:
        self.yaml = self.config.to_yaml()

    def say(self, text: str) -> None:
        """A line for the server's log; agents by their sites' names."""
        say(text)

    # ---- who is there

    def meet(self) -> list[messages.Hello]:
        """Wait for all sites, and what each says of itself, in the order of their names.

        Raises `InputError` where they do not all appear in time, or two have one name.
        """
        deadline = time.monotonic() + self.settings.start_timeout
        found: dict[str, messages.Hello] = {}
        while len(found) < self.settings.sites:
            for node, hello in self._introduced(deadline - time.monotonic()).items():
                if hello.name in found:
                    raise InputError(
                        f"two sites are named {hello.name!r}; allowed: a name of its own for each"
                    )
                found[hello.name], self.node[hello.name] = hello, node
                say(f"site {hello.name} is here, {len(found)} of {self.settings.sites}")
            if len(found) < self.settings.sites and time.monotonic() > deadline:
                raise InputError(
                    f"run config: {len(found)} of {self.settings.sites} sites appeared within {self.settings.start_timeout:g} s "
                    f"({', '.join(sorted(found)) or 'none'}); allowed: all of them, or another number of sites"
                )
        self.names = sorted(found)
        self.told = {name: _numbers(hello) for name, hello in found.items()}
        return [found[name] for name in self.names]

    def _introduced(self, patience: float) -> dict[int, messages.Hello]:
        """Nodes that have come since, and are this run's."""
        strangers = set(self.grid.get_node_ids()) - set(self.node.values()) - self.refused
        if not strangers:
            time.sleep(min(0.5, max(0.0, patience)))
            return {}
        asked = {node: messages.question(self.yaml) for node in strangers}
        ids = self._push("query", asked, 0)
        found = {}
        wanted = versions() | {
            "the config": self.config.hash(), "policy.model": policy_of(self.config).fingerprint()
        }  # fmt: skip
        for id_, reply in self._pull(set(ids), max(patience, 1.0)).items():
            node = ids[id_]
            try:
                if reply.has_error():
                    raise InputError(_error(reply))
                hello = messages.read_hello(reply.content)
                for what, value in wanted.items():
                    if hello.found.get(what) != value:
                        raise InputError(f"{what} is {hello.found.get(what)}; allowed: {value}, as here")
            except InputError as error:
                self.refused.add(node)
                say(f"node {node} is refused: {error}")
                continue
            found[node] = hello
        return found

    def _rejoined(self) -> None:
        """Sites that come back as another node."""
        there = set(self.grid.get_node_ids())
        if there <= set(self.node.values()) | self.refused:
            return
        for node, hello in self._introduced(self.settings.round_timeout).items():
            if self.told.get(hello.name) != _numbers(hello):
                self.refused.add(node)
                say(
                    f"node {node} is refused: site {hello.name} is unknown, or has other data than when the run began"
                )
            elif self.node[hello.name] not in there:
                self.node[hello.name] = node
                say(f"site {hello.name} is back")

    # ---- what a run asks

    def train(self, round_: int, orders: dict[int, Order]) -> list[Answer]:
        """See `Sites`."""
        what = f"round {round_}"
        content = {
            agent: self._order(agent, round_, order.after, order.row) for agent, order in orders.items()
        }
        ids = self._ask("train", content, what, round_)
        self.open |= {id_: (agent, round_) for id_, agent in ids.items()}
        answers = []
        for id_, reply in self._pull(set(ids), self.settings.round_timeout, also=set(self.open)).items():
            agent, asked = self.open.pop(id_)
            found = self._read(
                agent, f"round {asked}", reply, partial(messages.read_answer, like=self.like, asked=asked)
            )
            if found is not None:
                row, measures = found
                answers.append(Answer(agent=agent, round=asked, row=row, measures=measures))
        for id_, agent in ids.items():
            if id_ in self.open:
                say(
                    f"{what}: site {self.names[agent]} did not answer within {self.settings.round_timeout:g} s"
                )
        return answers

    def evaluate(self, round_: int, row: Params) -> dict[int, Part]:
        """See `Sites`."""
        what = f"evaluation of round {round_}"
        content = {agent: self._order(agent, round_, 0, row) for agent in range(len(self.names))}
        ids = self._ask("evaluate", content, what, round_)
        parts = {}
        for id_, reply in self._pull(set(ids), self.settings.round_timeout).items():
            agent = ids[id_]
            read = partial(messages.read_part, like=self.like, tested=self.tested[agent])
            found = self._read(agent, what, reply, read)
            if found is not None:
                parts[agent] = found
        return parts

    def _order(self, agent: int, round_: int, after: int, row: Params) -> RecordDict:
        return messages.order(
            yaml=self.yaml, run=self.run, agent=agent, sizes=self.sizes, round_=round_, after=after, row=row
        )

    def _ask(self, kind: str, content: dict[int, RecordDict], what: str, round_: int) -> dict[str, int]:
        """Send to agents' sites; the messages' ids, and whose each is. Sites that are not connected are not asked."""
        self._rejoined()
        there = set(self.grid.get_node_ids())
        agents = {self.node[self.names[agent]]: agent for agent in content}
        for node, agent in agents.items():
            if node not in there:
                say(f"{what}: site {self.names[agent]} is not connected")
                self.gone.add(node)
            elif node in self.gone:
                say(f"site {self.names[agent]} is back")
                self.gone.remove(node)
        asked = {node: content[agent] for node, agent in agents.items() if node in there}
        return {id_: agents[node] for id_, node in self._push(kind, asked, round_).items()}

    def _read(
        self, agent: int, what: str, reply: Message, read: Callable[[RecordDict], Found]
    ) -> Found | None:
        """What a site answers. Where it failed, or says what it was not asked for, a line tells so: none, and the run goes on."""
        if reply.has_error():
            say(f"{what}: site {self.names[agent]} failed: {_error(reply)}")
            return None
        try:
            return read(reply.content)
        except InputError as error:
            say(f"{what}: the answer of site {self.names[agent]} is refused: {error}")
            return None

    # ---- the grid

    def _push(self, kind: str, content: dict[int, RecordDict], round_: int) -> dict[str, int]:
        """Send to nodes; the messages' ids, and whom each is for."""
        posted = [
            Message(record, dst_node_id=node, message_type=kind, group_id=str(round_))
            for node, record in content.items()
        ]
        ids = list(self.grid.push_messages(posted)) if posted else []
        return {id_: node for id_, node in zip(ids, content, strict=True) if id_ is not None}

    def _pull(self, wanted: set[str], patience: float, also: set[str] | None = None) -> dict[str, Message]:
        """Replies to the messages `wanted`, until all or none in time; and those to `also` that are there by then."""
        deadline, found, pause = time.monotonic() + patience, {}, 0.02
        missing = set(wanted)
        while missing:
            for reply in self.grid.pull_messages(missing):
                found[reply.metadata.reply_to_message_id] = reply
            missing -= set(found)
            if time.monotonic() > deadline:
                break
            if missing:
                time.sleep(pause)
                pause = min(1.0, 1.5 * pause)
        if rest := (also or set()) - set(found) - missing:
            for reply in self.grid.pull_messages(rest):
                found[reply.metadata.reply_to_message_id] = reply
        return found


def _error(reply: Message) -> str:
    """What Flower says."""
    return f"error {reply.error.code} ({' '.join(str(reply.error.reason).split())[:200]})"


def _numbers(hello: messages.Hello) -> list[Any]:
    return [numbers.tolist() for numbers in vars(hello.told).values()]
