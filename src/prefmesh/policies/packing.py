"""Pairs in one row of tokens, each prompt once, nothing padded: what a call of the model reads.

    [prompt | chosen | rejected] [prompt | chosen | rejected] ...

Positions restart at every completion where its prompt ended. The model's own layers see one long row; its attention, which
alone mixes tokens, is led through `attention`: there every prompt with its completions is a row of its own, in which a
completion sees the prompt and itself. A completion's last token predicts nothing and is left out.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from prefmesh.preferences.tokens import TokenIds

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "prefmesh_packed"
"""Under which transformers knows `attention`. It is no name of a mask, so the model makes none."""


class Tree(NamedTuple):
    """A prompt and the completions that hang on it."""

    prompt: TokenIds
    completions: tuple[TokenIds, ...]

    @property
    def tokens(self) -> int:
        """How many the model reads."""
        return len(self.prompt) + sum(len(c) - 1 for c in self.completions)


class Places(NamedTuple):
    """From a row of tokens to padded rows and back.

    `take` (rows, width): the place in the row of every padded place, 0 where nothing is; `back` (tokens,): the inverse.
    """

    take: Int[Tensor, "rows width"]
    back: Int[Tensor, " tokens"]

    @classmethod
    def of(cls, lengths: Int[np.ndarray, " rows"], starts: Int[np.ndarray, " rows"]) -> "Places":
        """Of stretches of the row that begin at `starts`, in this order."""
        width = int(lengths.max())
        column = np.arange(width)
        inside = column < lengths[:, None]
        index = np.where(inside, starts[:, None] + column, 0)
        return cls(torch.from_numpy(index), torch.from_numpy(np.flatnonzero(inside)))

    def pad(self, x: Tensor) -> Tensor:
        """(tokens, ...) to (rows, width, ...). The gradient at padding is taken to be zero."""
        return _Take.apply(x, self.take.flatten(), self.back).unflatten(0, self.take.shape)

    def to(self, device: torch.device) -> "Places":
        """On a device."""
        return Places(self.take.to(device), self.back.to(device))


class _Take(torch.autograd.Function):
    """x[index], whose derivative is g[back] since `back` undoes `index`: no sums over indices."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(index, back)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        index, back = ctx.saved_tensors
        return _Take.apply(gradients[0], back, index), None, None


class Group(NamedTuple):
    """Trees of like length, which attention sees side by side: padded to the longest."""

    places: Places
    position: Int[Tensor, "trees width"]
    branch: Int[Tensor, "trees width"]
    """0: prompt; k: the k-th completion; -1: padding."""

    def mask(self, window: int | None) -> Bool[Tensor, "trees 1 width width"]:
        """Who sees whom: the prompt and one's own completion, up to oneself, at most `window` positions back."""
        query, key = self.branch[:, :, None], self.branch[:, None, :]
        order = torch.arange(self.branch.shape[1], device=self.branch.device)
        back = order[:, None] - order
        sees = ((key == 0) | (key == query)) & (back >= 0) & (query >= 0)
        if window is not None:
            sees &= self.position[:, :, None] - self.position[:, None, :] < window
        return (sees | (back == 0))[:, None]  # padding sees itself: softmax over nothing would be no number


@dataclass
class Packed:
    """A row of all trees, agent by agent.

    `read`: where the tokens in `targets` are predicted, completion by completion; `counts`: their numbers.
    `agents`: places of the agents' own stretches, none where all are equally long.
    """

    ids: Int[Tensor, "1 tokens"]
    position: Int[Tensor, "1 tokens"]
    read: Int[Tensor, " positions"]
    targets: Int[Tensor, " positions"]
    counts: Int[np.ndarray, " completions"]
    groups: tuple[Group, ...]
    order: tuple[Int[Tensor, " tokens"], Int[Tensor, " tokens"]] | None
    """The row's tokens in the order of the groups, and the inverse; none: the same order."""
    agents: Places | None
    _masks: dict[tuple[int, int | None, torch.dtype | None], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, trees: Sequence[Tree], agents: int, *, group_tokens: int, device: torch.device) -> "Packed":
        """`trees` come agent by agent, equally many each. Groups hold at least `group_tokens` tokens, padding included."""
        lengths = np.array([tree.tokens for tree in trees])
        starts = np.cumsum(lengths) - lengths
        ids, position, branch, read = [], [], [], []
        for tree, start in zip(trees, starts, strict=True):
            prompt, place = len(tree.prompt), int(start) + len(tree.prompt)
            ids += tree.prompt
            position.append(np.arange(prompt))
            branch.append(np.zeros(prompt, dtype=np.int64))
            for k, completion in enumerate(tree.completions, start=1):
                kept = len(completion) - 1
                ids += completion[:-1]
                position.append(np.arange(prompt, prompt + kept))
                branch.append(np.full(kept, k))
                read += [np.array([start + prompt - 1]), np.arange(place, place + kept)]
                place += kept
        positions, branches = np.concatenate(position), np.concatenate(branch)
        tokens_of = np.split(np.arange(len(positions)), starts[1:])
        groups, listed = [], []
        for part in like_lengths(lengths, group_tokens):
            here = lengths[part]
            places = Places.of(here, np.cumsum(here) - here)
            listed.append(np.concatenate([tokens_of[i] for i in part]))
            kind = np.full(places.take.shape, -1)
            kind.reshape(-1)[places.back.numpy()] = branches[listed[-1]]
            groups.append(
                Group(places, torch.from_numpy(positions[listed[-1]])[places.take], torch.from_numpy(kind))
            )
        order = np.concatenate(listed)
        each = lengths.reshape(agents, -1).sum(1)
        uneven = bool((each != each[0]).any())
        completions = [completion for tree in trees for completion in tree.completions]
        return cls(
            ids=torch.tensor([ids], device=device),
            position=torch.from_numpy(positions)[None].to(device),
            read=torch.from_numpy(np.concatenate(read)).to(device),
            targets=torch.tensor([token for c in completions for token in c], device=device),
            counts=np.array([len(c) for c in completions]),
            groups=tuple(Group(g.places.to(device), *(t.to(device) for t in g[1:])) for g in groups),
            order=None
            if len(groups) == 1
            else (torch.from_numpy(order).to(device), torch.from_numpy(np.argsort(order)).to(device)),
            agents=Places.of(each, np.cumsum(each) - each).to(device) if uneven else None,
        )

    def mask(self, group: int, window: int | None, additive: torch.dtype | None) -> Tensor:
        """Made once for all layers. `additive`: as a number to add to the scores, in this precision."""
        key = (group, window, additive)
        if key not in self._masks:
            sees = self.groups[group].mask(window)
            if additive is not None:
                hidden = torch.finfo(additive).min
                sees = torch.zeros(sees.shape, dtype=additive, device=sees.device).masked_fill_(~sees, hidden)
            self._masks[key] = sees
        return self._masks[key]


def like_lengths(lengths: Int[np.ndarray, " rows"], tokens: int) -> list[Int[np.ndarray, " part"]]:
    """Rows in parts of like length that hold at least so many tokens, padded to a part's longest; longest first.

    One part keeps the order of the rows.
    """
    order = np.argsort(-lengths, kind="stable")
    parts, start = [], 0
    for end in range(1, len(order)):
        if (end - start) * lengths[order[start]] >= tokens:
            parts.append(order[start:end])
            start = end
    parts.append(order[start:])
    return [np.arange(len(order))] if len(parts) == 1 else parts


class Reading(NamedTuple):
    """What the model reads, and how it attends otherwise."""

    packed: Packed
    eager: bool


CURRENT: ContextVar[Reading | None] = ContextVar("CURRENT", default=None)
"""None while models run as usual."""


class Reader:
    """Leads a model's attention through `attention` while it reads what is packed."""

    def __init__(self, model: "PreTrainedModel"):
        from transformers import AttentionInterface

        AttentionInterface.register(NAME, attention)  # type: ignore[arg-type]
        found = [model.config, *(module.config for module in model.modules() if hasattr(module, "config"))]
        self._configs = list({id(config): config for config in found}.values())
        self._eager = model.config._attn_implementation == "eager"

    @contextmanager
    def __call__(self, packed: Packed) -> Iterator[None]:
        """Within it, the model may be called with `packed.ids` and `packed.position`."""
        before = [config._attn_implementation_internal for config in self._configs]
        token = CURRENT.set(Reading(packed, self._eager))
        try:
            for config in self._configs:
                config._attn_implementation_internal = NAME
            yield
        finally:
            for config, own in zip(self._configs, before, strict=True):
                config._attn_implementation_internal = own
            CURRENT.reset(token)


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **options: Any
) -> tuple[Tensor, None]:
    """The model's own attention (transformers' interface) on every tree by itself; (1, heads, tokens, width) each."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    reading = CURRENT.get()
    assert reading is not None
    packed = reading.packed
    if reading.eager:
        attend = sys.modules[type(module).__module__].eager_attention_forward
    else:
        attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    window = options.get("sliding_window") or getattr(module, "sliding_window", None)
    own = query.dtype
    if query.device.type == "cpu" and own.itemsize < 4:
        # torch's attention on CPUs is several times slower in half precision than in float32, backward most of all.
        query, key, value = query.float(), key.float(), value.float()
    rows = [x[0].transpose(0, 1) for x in (query, key, value)]
    if packed.order is not None:
        rows = [_Take.apply(x, *packed.order) for x in rows]
    parts = [x.split([len(group.places.back) for group in packed.groups]) for x in rows]
    found = []
    for k, (group, *qkv) in enumerate(zip(packed.groups, *parts, strict=True)):
        padded = [group.places.pad(x).transpose(1, 2) for x in qkv]
        mask = packed.mask(k, window, query.dtype if reading.eager else None)
        out, _ = attend(module, *padded, mask, **options)
        found.append(_Take.apply(out.flatten(0, 1), group.places.back, group.places.take.flatten()))
    if packed.order is None:
        return found[0][None].to(own), None
    order, back = packed.order
    return _Take.apply(torch.cat(found), back, order)[None].to(own), None
