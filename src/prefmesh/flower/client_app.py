"""Flower's ClientApp: a site. Its SuperNode starts it anew for every message.

Node config: `data`, the site's own file, and `site`, its name (agents are numbered by it); in a simulation `partition-id` instead.
`memory`: where it keeps what lasts; none: the cache directory.
"""

import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Message, RecordDict  # type: ignore[import-not-found]
from flwr.clientapp import ClientApp  # type: ignore[import-not-found]

from prefmesh.config import ExperimentConfig
from prefmesh.environment import versions
from prefmesh.errors import InputError
from prefmesh.experiment import encoded, training_bytes
from prefmesh.flower import messages
from prefmesh.flower.site import Site, own_place, share_of, told
from prefmesh.policies.cache import cache_directory


def _replied(act: Callable[[Any, dict[str, Any]], RecordDict]) -> Callable[[Message, Context], Message]:
    def handle(message: Message, context: Context) -> Message:
        node = dict(context.node_config)
        try:
            content = act(message.content, node)
        except InputError as error:
            _say(str(error))
            content = messages.refusal()
        return Message(content, reply_to=message)

    return handle


def _hello(content: RecordDict, node: dict[str, Any]) -> RecordDict:
    yaml = content["order"]["yaml"]
    config = ExperimentConfig.from_yaml(yaml)
    share = _share(yaml, node.get("partition-id"), node.get("data"))
    # Reference log-probabilities are made now: the first round does not wait for them.
    policy, _, _ = encoded(config, share, _say)
    found = versions() | {"the config": config.hash(), "policy.model": policy.fingerprint()}
    data_bytes = training_bytes(share.pairs, share.division)
    return messages.hello(
        messages.Hello(name=_name(node), found=found, told=told(share), data_bytes=data_bytes)
    )


def _train(content: RecordDict, node: dict[str, Any]) -> RecordDict:
    order = content["order"]
    row, measures = _site(order, node).train(order["round"], order["after"], messages.row_of(content))
    return messages.answer(row, measures, order["round"])


def _evaluate(content: RecordDict, node: dict[str, Any]) -> RecordDict:
    order = content["order"]
    return messages.part(
        _site(order, node).evaluate(order["round"], messages.row_of(content)), order["round"]
    )


def _say(text: str) -> None:
    sys.stderr.write(f"prefmesh: {text}\n")


def _name(node: dict[str, Any]) -> str:
    if "site" in node:
        return str(node["site"])
    if "data" in node:
        raise InputError("node config: site is missing; allowed: a name of its own for every site")
    return f"{node['partition-id']:06d}"


def _site(order: Any, node: dict[str, Any]) -> Site:
    memory = node.get("memory")
    return _opened(
        order["yaml"],
        node.get("partition-id"),
        node.get("data"),
        order["agent"],
        tuple(order["sizes"]),
        own_place(Path(memory) if memory else cache_directory(), order["run"], order["agent"]),
    )


@lru_cache(maxsize=1)
def _share(yaml: str, partition: int | None, data: str | None) -> Any:
    return share_of(ExperimentConfig.from_yaml(yaml), partition, data)


@lru_cache(maxsize=64)
def _opened(
    yaml: str, partition: int | None, data: str | None, agent: int, sizes: tuple[int, ...], memory: Path
) -> Site:
    """Kept where one process serves several messages, as in a simulation."""
    config = ExperimentConfig.from_yaml(yaml)
    return Site.open(config, _share(yaml, partition, data), agent, np.array(sizes), memory)


def client_app(mods: list[Any] | None = None) -> ClientApp:
    """The app, with Flower's mods such as `LocalDpMod` around what it trains (not around its part of an evaluation)."""
    made = ClientApp()
    made.query()(_replied(_hello))
    made.train(mods=mods)(_replied(_train))
    made.evaluate()(_replied(_evaluate))
    return made


app = client_app()
