"""The very bytes of messages: each stage's numbers put aside, packed to their bits, then the last one's values as they are."""

import torch
from jaxtyping import Integer, UInt8
from torch import Tensor

from prefmesh.compression.base import Digits
from prefmesh.compression.layout import Layout, Params, agents_of, layout_of, rowwise
from prefmesh.compression.message import Message, message_bytes, reduce, restore
from prefmesh.compression.seeds import Seeds
from prefmesh.compression.settings import Chain


def encode(params: Params, chain: Chain, seeds: Seeds) -> UInt8[Tensor, "agents bytes"]:
    """Each agent's message. Its length is `message_bytes`."""
    message = reduce(params, chain, seeds)
    layout = layout_of(params)
    parts = [torch.empty(agents_of(params), 0, dtype=torch.uint8, device=next(iter(params.values())).device)]
    for stage, aside in zip(chain, message.aside, strict=True):
        sent = stage.sent(layout)
        parts += [pack(aside[name], digits.bits) for name, digits in sent.aside.items()]
        layout = sent.values
    parts += [_as_bytes(message.values[name]) for name in layout]
    return torch.cat(parts, dim=1)


def decode(coded: UInt8[Tensor, "agents bytes"], chain: Chain, layout: Layout) -> Params:
    """What `compress` gives, from the bytes and the layout that the sender and the receiver share."""
    assert coded.shape[1] == message_bytes(layout, chain)
    place = 0

    def take(bytes_: int) -> Tensor:
        nonlocal place
        place += bytes_
        # A copy: a view as another type must begin at a multiple of its size.
        return coded[:, place - bytes_ : place].clone(memory_format=torch.contiguous_format)

    aside, inner = [], layout
    for stage in chain:
        sent = stage.sent(inner)
        aside.append({name: unpack(take(digits.bytes), digits) for name, digits in sent.aside.items()})
        inner = sent.values
    values = {
        name: take(spec.bytes).flatten().view(spec.dtype).reshape(len(coded), *spec.shape)
        for name, spec in inner.items()
    }
    return restore(Message(values, tuple(aside)), chain, layout)


def _as_bytes(values: Tensor) -> UInt8[Tensor, "agents bytes"]:
    """As they lie in memory."""
    flat = rowwise(values).contiguous()
    # Seen as one vector: a matrix without rows or of one column has strides that a view as another type refuses.
    bytes_ = flat.shape[1] * flat.dtype.itemsize
    return flat.flatten().view(torch.uint8).reshape(len(flat), bytes_)


def pack(numbers: Integer[Tensor, "agents count"], bits: int) -> UInt8[Tensor, "agents bytes"]:
    """Numbers from 0 below 2^bits in so many bits each, lowest first, filled up to whole bytes."""
    agents, count = numbers.shape
    spread = torch.arange(bits, device=numbers.device)
    single = (numbers.to(torch.int64)[:, :, None] >> spread & 1).to(torch.uint8).reshape(agents, count * bits)
    whole = Digits(count, bits).bytes
    single = torch.nn.functional.pad(single, (0, 8 * whole - count * bits)).reshape(agents, whole, 8)
    return (single << torch.arange(8, dtype=torch.uint8, device=numbers.device)).sum(2, dtype=torch.uint8)


def unpack(packed: UInt8[Tensor, "agents bytes"], digits: Digits) -> Integer[Tensor, "agents count"]:
    """The inverse of `pack`."""
    agents = len(packed)
    single = (packed[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    single = single.reshape(agents, 8 * packed.shape[1])[:, : digits.count * digits.bits]
    spread = torch.arange(digits.bits, device=packed.device)
    numbers = single.reshape(agents, digits.count, digits.bits).to(torch.int64) << spread
    return numbers.sum(2)
