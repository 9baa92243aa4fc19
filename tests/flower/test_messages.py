"""What travels under Flower: everything that a run sends, looked at; and what a server refuses to read."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prefmesh.config import ExperimentConfig
from prefmesh.environment import versions
from prefmesh.errors import InputError
from prefmesh.flower.remote import Answer, Order, RemoteExperiment
from prefmesh.flower.site import Part
from prefmesh.policies.base import Params
from tests.flower.test_remote import FED, go
from tests.runs import TINY, write_jsonl

pytest.importorskip("flwr", reason="flwr is not installed (extra: flower)")

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict  # type: ignore[import-not-found]

from prefmesh.flower import client_app, messages

SITES = 3


class Messengers:
    """Sites with files of their own, behind the ClientApp's handlers; keeps every message."""

    def __init__(self, place: Path, config: ExperimentConfig):
        self.config, self.post, self.said = config, [], []
        self.nodes = []
        for site in range(SITES):
            rows = [
                {"prompt": f"secret {i % 5} ", "chosen": f"private yes {site} {i}", "rejected": f"private no {i}", "user": f"Anna {site}"}
                for i in range(10 + site)
            ]  # fmt: skip
            data = write_jsonl(place / f"site_{site}.jsonl", rows)
            self.nodes.append(
                {"site": f"s{site}", "data": str(data), "memory": str(place / f"memory_{site}")}
            )
        found = [
            messages.read_hello(self.ask(client_app._hello, node, messages.question(config.to_yaml())))
            for node in self.nodes
        ]
        self.experiment = RemoteExperiment.of(config, [hello.told for hello in found], 0, self, 1)

    def ask(self, act: Any, node: dict[str, Any], content: RecordDict) -> RecordDict:
        reply = act(content, node)
        self.post += [("to a site", content), ("from a site", reply)]
        return reply

    def order(self, agent: int, round_: int, after: int, row: Params) -> RecordDict:
        sizes = self.experiment.census.sizes.tolist()
        return messages.order(
            yaml=self.config.to_yaml(), run="r", agent=agent, sizes=sizes, round_=round_, after=after, row=row
        )

    def train(self, round_: int, orders: dict[int, Order]) -> list[Answer]:
        answers = []
        for agent, order in orders.items():
            reply = self.ask(
                client_app._train, self.nodes[agent], self.order(agent, round_, order.after, order.row)
            )
            row, measures = messages.read_answer(reply, self.experiment.start, round_)
            answers.append(Answer(agent=agent, round=round_, row=row, measures=measures))
        return answers

    def evaluate(self, round_: int, row: Params) -> dict[int, Part]:
        tested = self.experiment.evaluator.tested
        return {
            agent: messages.read_part(
                self.ask(client_app._evaluate, node, self.order(agent, round_, 0, row)), self.experiment.start, int(tested[agent])
            )
            for agent, node in enumerate(self.nodes)
        }  # fmt: skip

    def say(self, text: str) -> None:
        self.said.append(text)


NUMBERS = {
    "told": {"counts", "leakage", "sizes", "held_out", "alone", "data_bytes"},
    "measures": {*messages.MEASURES, "round"},
    "part": {"f", "round", "margin", "accuracy", "loss"},
}
"""All numbers that leave a site: docs/flower.md, "What leaves a site"."""

WORDS = {
    "site": {"name", "the config", "policy.model", *versions()},
    "order": {"yaml", "run", "agent", "sizes", "round", "after"},
}


def settings() -> ExperimentConfig:
    return ExperimentConfig.parse(
        TINY
        | {
            "preferences": {"source": "elsewhere.jsonl"},
            "method": FED,
            "evaluation": {"samples": 0, "held_out": 0.2},
        }
    )


def test_a_run_sends_adapters_and_named_numbers(tmp_path: Path) -> None:
    sites = Messengers(tmp_path, settings())
    summary = go(sites, tmp_path / "run", experiment=sites.experiment)  # type: ignore[arg-type]
    assert (summary["status"], summary["agents"], summary["rounds"]) == ("done", SITES, 3)
    shapes = {name: tuple(tensor.shape) for name, tensor in sites.experiment.start.items()}
    kinds = set()
    for way, content in sites.post:
        for name, record in content.items():
            kinds.add((way, re.sub(r"\d", "", name)))
            if isinstance(record, ArrayRecord):
                found = record.to_torch_state_dict()
                assert {key: tuple(tensor.shape) for key, tensor in found.items()} == shapes
            elif isinstance(record, MetricRecord):
                assert way == "from a site"
                assert set(record) == NUMBERS[name]
            else:
                assert isinstance(record, ConfigRecord)
                assert set(record) <= WORDS[name]
                assert not re.search("secret|private|Anna", str(dict(record)))
    assert kinds == {
        ("to a site", "order"), ("to a site", "row"), ("from a site", "site"), ("from a site", "told"),
        ("from a site", "row"), ("from a site", "measures"), ("from a site", "gradient_"), ("from a site", "part"),
    }  # fmt: skip
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file():
            assert not re.search(rb"secret|private|Anna", path.read_bytes()), path


def test_a_site_that_fails_tells_no_more_than_that(tmp_path: Path, capsys) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "secret", "chosen": "a", "user": "Anna"}\n')
    node = {"site": "s", "data": str(tmp_path / "bad.jsonl")}

    asked = Message(messages.question(settings().to_yaml()), dst_node_id=1, message_type="query")
    context = Context(run_id=1, node_id=1, node_config=node, state=RecordDict(), run_config={})
    reply = client_app._replied(client_app._hello)(asked, context).content
    assert dict(reply) == dict(messages.refusal())
    assert "bad.jsonl:1" in capsys.readouterr().err
    with pytest.raises(InputError, match="the site refused"):
        messages.read_hello(reply)


LIKE = {"a": torch.zeros(1, 2, 3), "b": torch.zeros(1, 4)}


def answered(change: Any = None, **numbers: Any) -> RecordDict:
    measures = dict.fromkeys(messages.MEASURES, 0.5) | numbers
    content = messages.answer({name: tensor + 1 for name, tensor in LIKE.items()}, measures, 7)
    row = content["row"].to_torch_state_dict()
    if change:
        change(row)
        content["row"] = ArrayRecord(row)
    return content


def test_an_answer_is_read() -> None:
    row, measures = messages.read_answer(answered(loss=0.25), LIKE, 7)
    assert all(torch.equal(row[name], tensor + 1) for name, tensor in LIKE.items())
    assert measures["loss"] == 0.25


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda row: row.update(a=row["a"] * np.nan), r"^row: a is not finite"),
        (lambda row: row.update(a=row["a"] / 0), r"^row: a is not finite"),
        (lambda row: row.update(a=row["a"][:, 1:]), r"^row: a is \(1, 1, 3\) of torch.float32; allowed: \(1, 2, 3\)"),
        (lambda row: row.update(b=row["b"].double()), r"^row: b is \(1, 4\) of torch.float64; allowed: .* of torch.float32"),
        (lambda row: row.pop("b"), r"^row: tensor 'b' is missing"),
        (lambda row: row.update(c=row["b"]), r"^row: tensor 'c' is unknown"),
    ],
)  # fmt: skip
def test_tensors_that_are_refused(change, said: str) -> None:
    with pytest.raises(InputError, match=said):
        messages.read_answer(answered(change), LIKE, 7)


def test_numbers_that_are_refused() -> None:
    with pytest.raises(InputError, match=r"^measures: loss is not finite"):
        messages.read_answer(answered(loss=float("inf")), LIKE, 7)
    with pytest.raises(InputError, match=r"^it answers round 7; allowed: 6"):
        messages.read_answer(answered(), LIKE, 6)
    content = answered()
    del content["measures"]["lr" if "lr" in content["measures"] else "loss"]
    with pytest.raises(InputError, match=r"^measures: \w+ is missing"):
        messages.read_answer(content, LIKE, 7)
    content = RecordDict({})
    with pytest.raises(InputError, match=r"^measures: missing"):
        messages.read_answer(content, LIKE, 7)
