"""What a loss sees: log-probabilities of pairs under policy and reference."""

from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

PairLoss = Float[Tensor, "agents pairs"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PairLogProbs:
    """What a loss sees: one row per agent, so a loss that sorts or averages over a batch stays within its agent.

    Log-probabilities in nats; `*_tokens` count the completion tokens that they sum over. `weights`: what each pair counts in
    its agent's batch, 0 for those that only fill it up; none: all count alike. The sum over a batch is taken outside of a loss.
    """

    chosen: Float[Tensor, "agents pairs"]
    rejected: Float[Tensor, "agents pairs"]
    ref_chosen: Float[Tensor, "agents pairs"]
    ref_rejected: Float[Tensor, "agents pairs"]
    chosen_tokens: Int[Tensor, "agents pairs"]
    rejected_tokens: Int[Tensor, "agents pairs"]
    weights: Float[Tensor, "agents pairs"] | None = None

    @property
    def shares(self) -> Float[Tensor, "agents pairs"]:
        """`weights`, scaled so that those of a batch add up to 1."""
        weights = torch.ones_like(self.chosen) if self.weights is None else self.weights.to(self.chosen)
        return weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)

    def apart(self) -> "PairLogProbs":
        """Every pair as the one pair of an agent of its own, (agents x pairs, 1)."""
        found = {f.name: getattr(self, f.name).reshape(-1, 1) for f in fields(self) if f.name != "weights"}
        return PairLogProbs(**found)

    def detached(self) -> "PairLogProbs":
        """The same numbers, without what they were made of."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: t.detach() for name, t in tensors.items() if t is not None})

    @property
    def chosen_logratio(self) -> Float[Tensor, "agents pairs"]:
        """log pi(y_w|x) - log pi_ref(y_w|x)."""
        return self.chosen - self.ref_chosen

    @property
    def rejected_logratio(self) -> Float[Tensor, "agents pairs"]:
        """log pi(y_l|x) - log pi_ref(y_l|x)."""
        return self.rejected - self.ref_rejected

    @property
    def margin(self) -> Float[Tensor, "agents pairs"]:
        """h, before beta."""
        return self.chosen_logratio - self.rejected_logratio

    def accuracy(self, eps: float) -> Float[Tensor, "agents pairs"]:
        """1 where the chosen completion is ranked higher, 0 where the rejected one is, 1/2 for a tie; NaN stays NaN.

        `eps`: the policy's `rounding`. At initialisation h is 0 but for rounding, which differs between
        passes of different shapes: a margin within 8 eps of the log-probabilities that it is made of decides nothing.
        """
        h = self.margin
        size = (self.chosen.abs() + self.rejected.abs()).maximum(
            self.ref_chosen.abs() + self.ref_rejected.abs()
        )
        ranked = torch.where(h.abs() <= 8 * eps * size, 0.5, (h > 0).to(h.dtype))
        return torch.where(h.isnan(), h, ranked)


def rounding(dtype: torch.dtype) -> float:
    """Machine precision of the log-probabilities of a policy of this precision: they are added up in float32 at least.

    (With bfloat16's own, 2^-7, every margin below 6 % of the log-probabilities, so nearly every one, would be a tie.)
    """
    return torch.finfo(torch.promote_types(dtype, torch.float32)).eps
