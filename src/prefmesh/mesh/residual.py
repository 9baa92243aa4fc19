"""Averages of LoRA's factors that keep what these leave of the average of products (FedEx-LoRA: Singhal et al. 2024, arXiv 2410.09432):

    A <- sum_k w_k A_k,      B <- sum_k w_k B_k,      R <- R + sum_k w_k B_k A_k - B A

Agent k's layer is W + scaling (R + B_k A_k), with one R for all, so that the server's is the average of the agents', at any rank.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from prefmesh.mesh.factored import FactoredMesh, factor_pairs
from prefmesh.mesh.mesh import Rows


def residual_of(a: str) -> str:
    """The name of R (1, out, in), by that of its layer's A."""
    return f"{a.removesuffix('lora_A')}residual"


def left_over(
    weights: Float[Tensor, " terms"],
    a: Float[Tensor, "terms rank in"],
    b: Float[Tensor, "terms out rank"],
    mean_a: Float[Tensor, "1 rank in"],
    mean_b: Float[Tensor, "1 out rank"],
) -> Float[Tensor, "1 out in"]:
    """sum_k weights_k b_k a_k - mean_b mean_a, in float64: so much of it cancels."""
    right = torch.cat([a, mean_a]).double().flatten(0, 1)
    left = torch.cat([b.double() * weights.double()[:, None, None], -mean_b.double()])
    return (left.transpose(0, 1).flatten(1) @ right)[None]


class ResidualMesh(FactoredMesh):
    """A server's mesh on which factors are averaged, and R takes what that leaves. Only factors travel: every process forms R."""

    def moved(self, weights: Float[Tensor, " own"], row: Rows, rows: Rows) -> Rows:
        """The server's model (1, ...), R with it, after its participants' `rows`, which have no R. `row` has weight 1 - sum_i weights_i."""
        every, models = self.terms(weights, row, rows)
        every = every.to(next(iter(models.values())).device)
        found = {name: torch.tensordot(every.to(t), t, dims=1)[None] for name, t in models.items()}
        for a, b in factor_pairs(list(models)):
            # Of the means as they are kept: R takes their rounding, too.
            change = left_over(every, models[a], models[b], found[a], found[b])
            residual = row[residual_of(a)]
            found[residual_of(a)] = (residual.double() + change).to(residual.dtype)
        return found


def residual_bytes(theta: Rows, participants: int) -> int:
    """What an agent hears of a round's change of R; 0 where there is none.

    Of each layer the matrix, or factors of it, whichever is smaller. These are (S + 1) r wide: with the S participants' factors those of
    the server's models before and after, of which one is a sum of the others.
    """
    bytes_ = 0
    for a, _ in factor_pairs(list(theta)):
        if (residual := theta.get(residual_of(a))) is not None:
            _, out, in_ = residual.shape
            factored = (participants + 1) * theta[a].shape[1] * (out + in_)
            bytes_ += min(out * in_, factored) * residual.element_size()
    return bytes_
