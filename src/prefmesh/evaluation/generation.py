"""What a policy writes: how far it went from the reference, and whether its users like it better."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from prefmesh.policies.base import Params, Samples
from prefmesh.preferences.pairs import Text

Utility = Callable[[str, Sequence[str]], Float[np.ndarray, " texts"]]
"""A user's true utility of each text; known for simulated users only."""


@runtime_checkable
class Writer(Protocol):
    """A policy that can be sampled."""

    def sample(
        self, params: Params, prompts: Sequence[Text], uniform: Float[np.ndarray, "prompts tokens"]
    ) -> Samples: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """`log_ratio`: log pi(y|x) - log pi_ref(y|x) of the policy's own samples, in nats per completion."""

    log_ratio: Float[np.ndarray, " prompts"]
    texts: list[str]


def write(
    policy: Writer, row: Params, prompts: Sequence[Text], uniform: Float[np.ndarray, "prompts tokens"]
) -> Written:
    """Sample one model `row` (1, ...) once per prompt, as the uniform numbers say."""
    if not prompts:
        return Written(log_ratio=np.zeros(0), texts=[])
    samples = policy.sample(row, prompts, uniform)
    return Written(
        log_ratio=(samples.log_probs - samples.ref_log_probs)[0].double().cpu().numpy(), texts=samples.texts
    )


def kl_estimate(log_ratio: Float[np.ndarray, " prompts"]) -> tuple[float, float]:
    """The mean of log ratios of own samples, an unbiased estimate of the KL to the reference, and its standard error."""
    error = float(log_ratio.std(ddof=1) / np.sqrt(len(log_ratio))) if len(log_ratio) > 1 else float("nan")
    return float(log_ratio.mean()), error


def wins(utility: Utility, user: str, texts: Sequence[str], reference_texts: Sequence[str]) -> float:
    """For how many prompts this user likes the policy's completion better than the reference's; a tie is half."""
    difference = utility(user, texts) - utility(user, reference_texts)
    return float(np.sum((difference > 0) + 0.5 * (difference == 0)))
