"""Flower's own aggregation instead of the mean: rules that a minority of sites cannot pull where it wants.

They see what the current model plus each answer's update would be, so stale and late updates are held against the others as such.
"""

from collections.abc import Callable
from typing import Any

from flwr.app import ArrayRecord, Message, MessageType, MetricRecord, RecordDict  # type: ignore[import-not-found]
from flwr.serverapp.strategy import (  # type: ignore[import-not-found]
    Bulyan,
    FedMedian,
    FedTrimmedAvg,
    Krum,
    MultiKrum,
)

from prefmesh.errors import InputError, PeerLost, unknown_name
from prefmesh.flower.remote import Aggregate
from prefmesh.policies.base import Params

Rule = Callable[[int, int], Any]
"""A strategy of Flower's, for so many answers of which so many are malicious."""

RULES: dict[str, tuple[Rule, Callable[[int], int]]] = {
    "median": (lambda answers, bad: FedMedian(), lambda bad: 2 * bad + 1),
    # A little more than the share, so that its product with the answers is not cut to one fewer.
    "trimmed-mean": (
        lambda answers, bad: FedTrimmedAvg(beta=(bad + 0.1) / answers),
        lambda bad: 2 * bad + 1,
    ),
    "krum": (lambda answers, bad: Krum(num_malicious_nodes=bad), lambda bad: bad + 3),
    "multi-krum": (
        lambda answers, bad: MultiKrum(num_malicious_nodes=bad, num_nodes_to_select=answers - bad),
        lambda bad: bad + 3,
    ),
    "bulyan": (lambda answers, bad: Bulyan(num_malicious_nodes=bad), lambda bad: 4 * bad + 3),
}
"""By name, with the fewest answers that they need."""


def aggregation(name: str, malicious: int) -> Aggregate | None:
    """The rule of that name against up to `malicious` sites in a round; none for `mean`. Raises `InputError` for another name."""
    if name == "mean":
        return None
    if name not in RULES:
        raise unknown_name("aggregation", name, ["mean", *RULES])
    if malicious < 1:
        raise InputError(f"malicious: found {malicious}; allowed with aggregation {name}: at least 1")
    rule, fewest = RULES[name]

    def aggregate(ends: Params) -> Params:
        answers = len(next(iter(ends.values())))
        if answers < fewest(malicious):
            raise PeerLost(
                f"aggregation: {name} got {answers} answers; allowed with malicious {malicious}: at least {fewest(malicious)}"
            )
        messages = []
        for i in range(answers):
            row = ArrayRecord({key: tensor[i : i + 1].cpu().contiguous() for key, tensor in ends.items()})
            content = RecordDict({"row": row, "metrics": MetricRecord({"num-examples": 1})})
            messages.append(Message(content, dst_node_id=0, message_type=MessageType.TRAIN))
        strategy = rule(answers, malicious)
        strategy.train_metrics_aggr_fn = lambda contents, key: MetricRecord()
        found, _ = strategy.aggregate_train(0, messages)
        rows = found.to_torch_state_dict()
        return {key: rows[key].to(tensor).reshape(1, *tensor.shape[1:]) for key, tensor in ends.items()}

    return aggregate
