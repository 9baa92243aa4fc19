"""The log-linear policy: pi(y|x) proportional to pi_ref(y|x) exp(phi(x, y)^T theta).

The partition function cancels in every preference margin, h = (phi_w - phi_l)^T theta exactly, so DPO is logistic
regression: convex, with an optimum known to machine precision. The instrument on which claims are tested.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefmesh.errors import InputError
from prefmesh.policies.base import ChosenRejected, Params, Rows
from prefmesh.preferences.pairs import Pair

BYTES_PER_PASS = 2**23
"""Features in a pass: more fall out of the processor's cache before they are used again."""

Features = Callable[[Sequence[str]], Float[np.ndarray, "texts dim"]]
"""phi: full texts to features."""


@dataclass(frozen=True)
class FeaturePairs:
    """phi of the chosen and of the rejected completion of every pair, side by side: they are read together."""

    phi: Float[Tensor, "pairs 2 dim"]

    completion_tokens: Int[np.ndarray, "pairs 2"] = field(init=False)
    """One each: a feature vector has no length to normalise by."""
    cost: Int[np.ndarray, " pairs"] = field(init=False)
    """One each."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "completion_tokens", np.ones((len(self), 2), dtype=np.int64))
        object.__setattr__(self, "cost", np.ones(len(self), dtype=np.int64))

    @classmethod
    def of(cls, chosen: Float[Tensor, "pairs dim"], rejected: Float[Tensor, "pairs dim"]) -> "FeaturePairs":
        """From the two sides."""
        return cls(torch.stack([chosen, rejected], dim=1))

    @property
    def chosen(self) -> Float[Tensor, "pairs dim"]:
        """phi_w."""
        return self.phi[:, 0]

    @property
    def rejected(self) -> Float[Tensor, "pairs dim"]:
        """phi_l."""
        return self.phi[:, 1]

    def __len__(self) -> int:
        return len(self.phi)

    def fingerprint(self) -> str:
        """Hash of all features."""
        return hashlib.blake2b(self.phi.cpu().contiguous().numpy().data, digest_size=16).hexdigest()


class LogLinearPolicy:
    """theta of shape (agents, dim); log-probabilities up to a constant per prompt, the reference's being 0."""

    def __init__(self, features: Features, *, dtype: torch.dtype = torch.float64, device: str = "cpu"):
        self.features = features
        self.dtype = dtype
        self.device = torch.device(device)
        self.dim = features([""]).shape[1]
        self.pass_bytes = self.usual_pass_bytes

    usual_pass_bytes = BYTES_PER_PASS
    stacks = True
    frozen_bytes = 0
    turns = 1

    @property
    def tokens_per_pass(self) -> int:
        """Pairs whose features take `pass_bytes`."""
        return self.tokens_in(self.pass_bytes)

    def tokens_in(self, bytes_: int) -> int:
        """A pair costs one; it has two rows of features."""
        return max(1, bytes_ // (2 * self.dim * self.dtype.itemsize))

    def initial(self, seed: int) -> Params:
        """theta = 0, where the policy is the reference. Nothing is drawn."""
        return {"theta": torch.zeros(1, self.dim, dtype=self.dtype, device=self.device)}

    def trained(self, params: Params, round_: int) -> Params:
        """All of theta, in every round."""
        return params

    def factors(self, params: Params) -> Params:
        """None."""
        return {}

    def residuals(self, params: Params) -> Params:
        """None."""
        return {}

    def encode(self, pairs: Sequence[Pair]) -> FeaturePairs:
        """Features of both completions. Plain text only: conversations are refused."""
        for pair in pairs:
            if not isinstance(pair.chosen, str):
                raise InputError(
                    "policy.model: log_linear reads plain text, found conversations; use a causal LM"
                )

        chosen, rejected = (str(pair.chosen) for pair in pairs), (str(pair.rejected) for pair in pairs)
        texts = [*chosen, *rejected]
        number = {text: i for i, text in enumerate(dict.fromkeys(texts))}  # in crowds' answers texts recur
        phi = torch.as_tensor(self.features(list(number)), dtype=self.dtype, device=self.device)
        rows = torch.tensor([number[text] for text in texts], dtype=torch.int64, device=self.device)
        return FeaturePairs.of(*phi[rows].view(2, len(pairs), -1))

    def log_probs(self, params: Params, data: FeaturePairs, rows: Rows) -> ChosenRejected:
        """phi^T theta, agent by agent."""
        agents, pairs = rows.shape
        index = torch.as_tensor(rows.reshape(-1), device=self.device)
        phi = data.phi.index_select(0, index).view(agents, 2 * pairs, self.dim)
        both = torch.bmm(phi, params["theta"].unsqueeze(-1)).view(agents, pairs, 2)
        return both[..., 0], both[..., 1]

    def reference_log_probs(self, data: FeaturePairs, rows: Rows) -> ChosenRejected:
        """Zero: the reference is the origin."""
        zeros = torch.zeros(rows.shape, dtype=self.dtype, device=self.device)
        return zeros, zeros

    def fingerprint(self) -> str:
        """The reference has no parameters: the dimension alone."""
        return f"log_linear-{self.dim}"
