"""All that a run carries from round to round, as plain named tensors."""

from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefmesh.policies.base import Params


@dataclass(slots=True)
class State:
    """`theta`: parameters of each agent hosted here (agents, ...). `optimizer`: its moments and step counts, likewise stacked.
    `memory`: what the mixing rule remembers (such as past server models). `batches_drawn`: per shard, hosted here or not.
    `gradients`: while a round lasts, for methods that use them, the participants' mean gradients; in no checkpoint.
    """

    theta: Params
    optimizer: dict[str, Tensor]
    batches_drawn: Int[np.ndarray, " shards"]
    memory: dict[str, Tensor] = field(default_factory=dict)
    gradients: Params = field(default_factory=dict)

    @classmethod
    def of(cls, theta: Params, *, shards: int) -> "State":
        """Before the first batch."""
        return cls(theta=theta, optimizer={}, batches_drawn=np.zeros(shards, dtype=np.int64))

    def tensors(self) -> dict[str, Tensor]:
        """Everything under flat names, for a checkpoint. A row shared by all agents is stored once."""
        flat = {"batches_drawn": torch.from_numpy(self.batches_drawn)}
        for part in ("theta", "optimizer", "memory"):
            for name, tensor in getattr(self, part).items():
                shared = part == "theta" and tensor.shape[0] > 1 and tensor.stride(0) == 0
                flat[f"{part}/{name}"] = tensor[:1] if shared else tensor
        return flat

    @classmethod
    def from_tensors(cls, flat: dict[str, Tensor], agents: int, *, like: Params) -> "State":
        """The inverse of `tensors`: a lone row of theta is shared by all `agents` that are hosted here.

        Theta's names come in the order of `like`: sums over all tensors (norms, clipping) round by it, and a file has its own.
        """
        parts: dict[str, dict[str, Tensor]] = {"theta": {}, "optimizer": {}, "memory": {}}
        for key, tensor in flat.items():
            part, _, name = key.partition("/")
            if part in parts:
                parts[part][name] = tensor
        rows = {name: parts["theta"][name] for name in like}
        theta = {name: share(t, agents) if t.shape[0] == 1 else t for name, t in rows.items()}
        drawn = flat["batches_drawn"].numpy().copy()
        return cls(theta=theta, optimizer=parts["optimizer"], batches_drawn=drawn, memory=parts["memory"])


def without(params: Params, some: Params) -> Params:
    """Those of the parameters that are not among some."""
    return {name: tensor for name, tensor in params.items() if name not in some}


def share(row: Tensor, agents: int) -> Tensor:
    """One row (1, ...) seen by all agents without copies: (agents, ...) with stride 0. Not to be written to."""
    return row.expand(agents, *row.shape[1:])


def copies(row: Params, agents: int) -> Params:
    """Every agent's own copy of a row (1, ...): (agents, ...)."""
    return {name: share(tensor, agents).clone() for name, tensor in row.items()}


def take(params: dict[str, Tensor], agents: Int[np.ndarray, " chosen"]) -> dict[str, Tensor]:
    """Copies of the rows of `agents`."""
    index = torch.from_numpy(agents)
    return {name: tensor.index_select(0, index.to(tensor.device)) for name, tensor in params.items()}


def rows(params: dict[str, Tensor], agents: Int[np.ndarray, " chosen"]) -> dict[str, Tensor]:
    """The rows of `agents`: views where these are neighbours or all share one row, else copies."""
    first, last = (int(agents[0]), int(agents[-1]) + 1) if len(agents) else (0, 0)
    neighbours = len(agents) == last - first and bool((np.diff(agents) == 1).all())
    found = {}
    for name, tensor in params.items():
        if tensor.stride(0) == 0:
            found[name] = share(tensor[:1], len(agents))
        elif neighbours:
            found[name] = tensor[first:last]
        else:
            found[name] = tensor.index_select(0, torch.from_numpy(agents).to(tensor.device))
    return found


def joined(parts: list[Params], like: Params) -> Params:
    """Rows of several passes, one after the other; of none, no rows that look like those of `like`."""
    return {
        name: torch.cat([part[name] for part in parts]) if parts else tensor[:0]
        for name, tensor in like.items()
    }


def put(params: dict[str, Tensor], agents: Int[np.ndarray, " chosen"], rows: dict[str, Tensor]) -> None:
    """Write the rows of `agents` back, in place; those that are views of `params` are there already."""
    index = torch.from_numpy(agents)
    for name, tensor in params.items():
        if rows[name].untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
            tensor.index_copy_(0, index.to(tensor.device), rows[name].to(tensor.dtype))


def spread(values: Float[Tensor, " agents"] | Int[Tensor, " agents"], like: Tensor) -> Tensor:
    """A number for each agent, shaped to multiply a tensor (agents, ...)."""
    return values.to(like).view(-1, *[1] * (like.dim() - 1))


def is_finite(params: dict[str, Tensor]) -> bool:
    """Whether every number is finite (a lone row is looked at once, however many agents share it)."""
    # The extremes are not finite where any number is not; looking for them needs no room.
    lone = (t[:1] if t.stride(0) == 0 else t for t in params.values() if t.numel())
    return all(bool(torch.isfinite(torch.stack(torch.aminmax(t))).all()) for t in lone)
