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


WHOLE = 16
"""Attention's rows are as many times so many tokens long: on CPUs it takes up to a third less time than at 75, say, of whose numbers some
fill no vector register; on GPUs masks need it."""


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

    `take` (places,): the token of every padded place, row by row, the row's first where nothing is; `back` (tokens,): the
    inverse. `held` (places,): where something is.
    """

    take: Int[Tensor, " places"]
    back: Int[Tensor, " tokens"]
    held: Bool[Tensor, " places"]

    @classmethod
    def of(cls, parts: Sequence[tuple[Int[np.ndarray, " _"], Int[np.ndarray, " _"], int]]) -> "Places":
        """`parts`: lengths and starts of stretches of the row, a padded row each, and the width that they are padded to."""
        take, held = [], []
        for lengths, starts, width in parts:
            column = np.arange(width)
            inside = column < lengths[:, None]
            take.append((starts[:, None] + np.where(inside, column, 0)).reshape(-1))
            held.append(inside.reshape(-1))
        index, inside = np.concatenate(take), np.concatenate(held)
        back = np.empty(int(inside.sum()), dtype=np.int64)
        back[index[inside]] = np.flatnonzero(inside)
        return cls(torch.from_numpy(index), torch.from_numpy(back), torch.from_numpy(inside))

    def pad(self, x: Tensor) -> Tensor:
        """(tokens, ...) to (places, ...). Gradients at padding are left out."""
        return _Take.apply(x, self.take, self.back)

    def unpad(self, x: Tensor) -> Tensor:
        """(places, ...) to (tokens, ...). What comes back at padding is the gradient of the row's first token: to be left out."""
        return _Take.apply(x, self.back, self.take)

    def to(self, device: torch.device) -> "Places":
        """On a device."""
        return Places(*(tensor.to(device) for tensor in self))


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
    """Trees of like length, which attention sees side by side: padded to the longest, and on to a whole number of `WHOLE`."""

    position: Int[Tensor, "trees width"]
    branch: Int[Tensor, "trees width"]
    """0: prompt; k: the k-th completion; -1: padding."""

    def sees(self, window: int | None) -> Bool[Tensor, "trees 1 width width"]:
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
    places: Places
    """Of the groups' trees, group by group."""
    agents: Places | None
    _masks: dict[tuple[int, int | None, torch.dtype], Tensor] = field(default_factory=dict)

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
        alike = like_lengths(lengths, group_tokens)
        parts = [(lengths[part], starts[part], _rounded(int(lengths[part].max()))) for part in alike]
        places = Places.of(parts)
        kinds = np.full(len(places.take), -1)
        kinds[places.back.numpy()] = branches
        shapes = [(len(long), width) for long, _, width in parts]
        ends = np.cumsum([trees * width for trees, width in shapes])[:-1]
        groups = [
            Group(*(torch.from_numpy(x.reshape(shape)) for x in pair))
            for shape, *pair in zip(
                shapes, np.split(positions[places.take.numpy()], ends), np.split(kinds, ends), strict=True
            )
        ]
        each = lengths.reshape(agents, -1).sum(1)
        uneven = bool((each != each[0]).any())
        completions = [completion for tree in trees for completion in tree.completions]
        return cls(
            ids=torch.tensor([ids], device=device),
            position=torch.from_numpy(positions)[None].to(device),
            read=torch.from_numpy(np.concatenate(read)).to(device),
            targets=torch.tensor([token for c in completions for token in c], device=device),
            counts=np.array([len(c) for c in completions]),
            groups=tuple(Group(*(tensor.to(device) for tensor in group)) for group in groups),
            places=places.to(device),
            agents=Places.of([(each, np.cumsum(each) - each, int(each.max()))]).to(device)
            if uneven
            else None,
        )

    def mask(self, group: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """What is added to a group's scores: nothing, or the least number there is. Made once for all layers."""
        key = (group, window, dtype)
        if key not in self._masks:
            sees = self.groups[group].sees(window)
            mask = torch.zeros(sees.shape, dtype=dtype, device=sees.device)
            self._masks[key] = mask.masked_fill_(~sees, torch.finfo(dtype).min)
        return self._masks[key]


def _rounded(longest: int) -> int:
    return -(-longest // WHOLE) * WHOLE


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
    padded = [packed.places.pad(x.squeeze(0).transpose(0, 1)) for x in (query, key, value)]
    shapes = [group.branch.shape for group in packed.groups]
    parts = [x.split([trees * width for trees, width in shapes]) for x in padded]
    found = []
    for k, (shape, *qkv) in enumerate(zip(shapes, *parts, strict=True)):
        qkv = [x.unflatten(0, shape).transpose(1, 2) for x in qkv]
        out, _ = attend(module, *qkv, packed.mask(k, window, query.dtype), **options)
        found.append(out.flatten(0, 1))
    return packed.places.unpad(found[0] if len(found) == 1 else torch.cat(found))[None].to(own), None
