"""A chain applied: what is sent, what the receiver reads, what it costs and how much it contracts."""

from dataclasses import dataclass

from prefmesh.compression.layout import Layout, Params, layout_of
from prefmesh.compression.seeds import Seeds, stage_seeds
from prefmesh.compression.settings import Chain


@dataclass(frozen=True, slots=True)
class Message:
    """Of all agents of a pass: the `values` that the last stage sent, and what each stage put `aside`."""

    values: Params
    aside: tuple[Params, ...]


def reduce(params: Params, chain: Chain, seeds: Seeds) -> Message:
    """What agents send. `seeds`: of each agent's message."""
    aside = []
    for i, stage in enumerate(chain):
        params, beside = stage.reduce(params, stage_seeds(seeds, i))
        aside.append(beside)
    return Message(params, tuple(aside))


def restore(message: Message, chain: Chain, layout: Layout) -> Params:
    """What the receiver reads, given the layout of what the sender had."""
    values = message.values
    layouts = _layouts(chain, layout)
    for stage, before, aside in reversed(list(zip(chain, layouts[:-1], message.aside, strict=True))):
        values = stage.restore(values, aside, before)
    return values


def compress(params: Params, chain: Chain, seeds: Seeds) -> Params:
    """C(x) of each agent's row: what the receiver reads, of the same shapes and types. An empty chain is the identity."""
    return restore(reduce(params, chain, seeds), chain, layout_of(params))


def message_bytes(layout: Layout, chain: Chain) -> int:
    """What one agent's message takes as `coding.encode` codes it, every time."""
    bytes_ = 0
    for stage in chain:
        sent = stage.sent(layout)
        bytes_ += sum(digits.bytes for digits in sent.aside.values())
        layout = sent.values
    return bytes_ + sum(spec.bytes for spec in layout.values())


def contraction(layout: Layout, chain: Chain) -> float | None:
    """delta in E||C(x) - x||^2 <= (1 - delta) ||x||^2 of a whole chain; none: theory has none.

    Where the first stage selects entries, T, and the rest, Q, contracts by delta_Q, errors are orthogonal:

        E||Q(T x) - x||^2 = E||T x - x||^2 + E||Q(T x) - T x||^2 <= ||x||^2 - delta_Q E||T x||^2 <= (1 - delta_T delta_Q) ||x||^2

    Factors of a matrix are multiplied, so errors in them have no such bound: none after `low_rank`.
    """
    delta = 1.0
    for i, stage in enumerate(chain):
        own = stage.contraction(layout)
        if own is None or (i + 1 < len(chain) and not stage.selects):
            return None
        delta *= own
        layout = stage.sent(layout).values
    return delta


def _layouts(chain: Chain, layout: Layout) -> list[Layout]:
    """Of what each stage takes, and of what the last one sends."""
    layouts = [layout]
    for stage in chain:
        layouts.append(stage.sent(layouts[-1]).values)
    return layouts
