"""What every policy offers: stacked parameters in, log-probabilities of encoded pairs out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefmesh.preferences.pairs import Pair

BYTES_PER_PASS = 2**28
"""How much a pass keeps for its backward pass where nothing else is said: enough to keep a processor busy."""

Params = dict[str, Tensor]
"""Named tensors, each with a leading agent axis: Theta of shape (agents, ...)."""

Rows = Int[np.ndarray, "agents pairs"]
"""Which encoded pairs each agent looks at."""

ChosenRejected = tuple[Float[Tensor, "agents pairs"], Float[Tensor, "agents pairs"]]


@runtime_checkable
class EncodedPairs(Protocol):
    """Pairs in the form that one kind of policy reads, indexed by row."""

    def __len__(self) -> int: ...

    @property
    def completion_tokens(self) -> Int[np.ndarray, "pairs 2"]:
        """Tokens that the log-probability sums over: of the chosen and of the rejected completion."""
        ...

    @property
    def cost(self) -> Int[np.ndarray, " pairs"]:
        """What a pair costs in one pass, in tokens: how passes are cut to a memory budget."""
        ...

    def fingerprint(self) -> str:
        """A hash of the encoded content: part of the key of cached reference log-probabilities."""
        ...


@runtime_checkable
class Policy(Protocol):
    """A trained family of distributions over completions, relative to a frozen reference."""

    pass_bytes: int
    """How much a pass may keep for its backward pass."""
    usual_pass_bytes: int
    """The same where nothing is said."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def tokens_per_pass(self) -> int:
        """How much `EncodedPairs.cost` one pass may hold: `tokens_in(pass_bytes)`."""
        ...

    def tokens_in(self, bytes_: int) -> int:
        """How much of it a pass keeps in so many bytes."""
        ...

    @property
    def frozen_bytes(self) -> int:
        """What the frozen reference takes."""
        ...

    @property
    def stacks(self) -> bool:
        """Whether several agents share one pass; if not, a pass of one agent costs least memory."""
        ...

    def initial(self, seed: int) -> Params:
        """One row (1, ...) at which the policy equals the reference."""
        ...

    @property
    def turns(self) -> int:
        """How many parts of the parameters are trained in turn, one a round; 1: all in every round."""
        ...

    def trained(self, params: Params, round_: int) -> Params:
        """Those of the parameters that round `round_` (from 1) trains and mixes."""
        ...

    def factors(self, params: Params) -> Params:
        """LoRA's factors (agents, ...), the frozen ones and residuals too; {} where there are none."""
        ...

    def residuals(self, params: Params) -> Params:
        """Those of the parameters that no round trains and all agents share, one row: what mixing folds into frozen layers; {}: none."""
        ...

    def encode(self, pairs: Sequence[Pair]) -> Any:
        """Pairs in this policy's own form, which is an `EncodedPairs`."""
        ...

    def log_probs(self, params: Params, data: Any, rows: Rows) -> ChosenRejected:
        """log pi(y|x) in nats of `rows` under each agent's own parameters; differentiable in `params`.

        A policy whose partition function cancels may leave out a constant per prompt.
        """
        ...

    def reference_log_probs(self, data: Any, rows: Rows) -> ChosenRejected:
        """The same under the frozen reference; no gradient."""
        ...

    def fingerprint(self) -> str:
        """A hash of the reference: part of the key of cached reference log-probabilities."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """Completions that a policy wrote for prompts.

    `texts` are (agents x prompts) strings, agent by agent; `log_probs` and `ref_log_probs` in nats per completion.
    """

    texts: list[str]
    log_probs: Float[Tensor, "agents prompts"]
    ref_log_probs: Float[Tensor, "agents prompts"]


def average(params: Params) -> Params:
    """The average model (1, ...); a row that all agents share (an expanded view) is returned as it is."""
    return {
        name: tensor[:1] if tensor.stride(0) == 0 or tensor.shape[0] == 1 else tensor.mean(0, keepdim=True)
        for name, tensor in params.items()
    }


def row_bytes(params: Params) -> int:
    """Bytes of one agent's parameters: what one message carries."""
    return sum(tensor[0].numel() * tensor.element_size() for tensor in params.values())


def passes(
    data: EncodedPairs, rows: Int[np.ndarray, " pairs"], budget: int
) -> list[Int[np.ndarray, " part"]]:
    """Cut `rows` into parts that cost at most `budget` tokens each (a pair above it stands alone).

    Pairs of similar length share a part: where rows are padded, little is. The parts are positions *into* `rows`.
    """
    cost = data.cost[rows]
    order = np.argsort(-cost, kind="stable")
    parts, start = [], 0
    while start < len(order):
        # Sorted by falling cost: the first of a part is its widest, and others may be padded to it.
        size = max(1, int(budget // max(1, cost[order[start]])))
        parts.append(order[start : start + size])
        start += size
    return parts
