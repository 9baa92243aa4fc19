"""Reference log-probabilities: computed once per model, data and encoding, then read from disk."""

from collections.abc import Callable

import torch
from jaxtyping import Float

from prefmesh.policies.base import EncodedPairs, Policy
from prefmesh.policies.cache import cached

Compute = Callable[[Policy, EncodedPairs], Float[torch.Tensor, "pairs 2"]]

VERSION = "2"
"""Raise when the same model and data would give other log-probabilities than before."""


def reference_log_probs(
    policy: Policy, data: EncodedPairs, compute: Compute
) -> Float[torch.Tensor, "pairs 2"]:
    """Nats of the chosen and rejected completion of every pair under the frozen reference."""
    found = cached(
        "reference",
        [VERSION, policy.fingerprint(), data.fingerprint()],
        lambda: {"log_probs": compute(policy, data)},
        lambda tensors: tensors["log_probs"].shape == (len(data), 2),
    )
    return found["log_probs"].to(policy.device)
