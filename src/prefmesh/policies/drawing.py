"""Sampling tokens as a function of given uniform numbers, in the middle of transformers' `generate`."""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


class Inverse:
    """A logits processor that draws each sequence's next token by inverting the cumulative distribution at its own number.

    `uniform`: numbers in [0, 1) of each sequence's tokens, the first of which is written at place `start`.
    """

    def __init__(self, uniform: Float[np.ndarray, "sequences tokens"], start: int):
        self.uniform, self.start = torch.from_numpy(uniform), start

    def __call__(
        self, input_ids: Int[Tensor, "sequences length"], scores: Float[Tensor, "sequences vocabulary"]
    ) -> Float[Tensor, "sequences vocabulary"]:
        """Minus infinity everywhere but at the token that was drawn."""
        at = self.uniform[:, input_ids.shape[1] - self.start, None].to(scores.device)
        # In double precision: of a large vocabulary many tokens are rarer than float32's steps near 1.
        cumulative = scores.double().softmax(-1).cumsum(-1)
        drawn = torch.searchsorted(cumulative, at * cumulative[:, -1:], right=True)
        drawn = drawn.clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)
