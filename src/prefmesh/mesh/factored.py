"""Mixing where a layer's update is a product B A of two factors (LoRA): what is averaged is the product.

    sum_k w_k B_k A_k  =  [w_1 B_1 .. w_K B_K] [A_1; ..; A_K]  =  Q_B (R_B R_A^T) Q_A^T,      R_B R_A^T = U S V^T

of which the r largest singular values are kept: the best approximation of rank r (Eckart and Young 1936; for LoRA FlexLoRA: Bai et al.
2024, arXiv 2402.11505). No matrix with more than K r rows or columns beside a layer's own width is ever formed.

A product does not tell its factors apart. Here

    A <- c O V_r^T Q_A^T,      B <- Q_B U_r S_r O^T / c,      c = 1 / sqrt(3)

where c is the norm at which PEFT draws the rows of A, so that B learns as fast as it did at first, and O is the rotation that brings A
nearest to what the agent had (orthogonal Procrustes), so that its optimiser's moments go on in about the directions they were of.
Where the product has less than rank r (at the start it is zero), directions of the agent's own A fill up, with B zero: they can learn.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import csr_array
from torch import Tensor

from prefmesh.mesh.mesh import Mesh, Rows
from prefmesh.mesh.products import mix
from prefmesh.mesh.ranks import cut

ROW_NORM = 3**-0.5
"""Of A's rows as PEFT draws them: entries of variance 1 / (3 in)."""

Factor = Float[Tensor, "agents rank in"]


def factor_pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Names of A and B of every layer among these."""
    layers = [name.removesuffix("lora_A") for name in names if name.endswith(".lora_A")]
    return [(f"{layer}lora_A", f"{layer}lora_B") for layer in layers if f"{layer}lora_B" in names]


def average(
    weights: Float[Tensor, "mixed terms"],
    a: Float[Tensor, "mixed terms some_rank in"],
    b: Float[Tensor, "mixed terms out some_rank"],
    own: Float[Tensor, "mixed rank in"],
) -> tuple[Float[Tensor, "mixed rank in"], Float[Tensor, "mixed out rank"]]:
    """A and B whose product is nearest to sum_k weights_k b_k a_k, for each of the mixed; `own`: the A that each has.

    In float64 on the way. The rank is at most a layer's width.
    """
    precision, rank = own.dtype, own.shape[1]
    mixed, out = len(own), b.shape[2]
    right = a.double().reshape(mixed, -1, a.shape[-1]).mT
    left = (b.double() * weights.double()[:, :, None, None]).transpose(1, 2).reshape(mixed, out, -1)
    if not (bool(torch.isfinite(left).all()) and bool(torch.isfinite(right).all())):
        # What diverged has no decomposition: it stays seen, and the run reports it.
        return torch.full_like(own, torch.nan), own.new_full((mixed, out, rank), torch.nan)
    (q_b, r_b), (q_a, r_a) = torch.linalg.qr(left), torch.linalg.qr(right)
    u, s, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    kept = min(rank, s.shape[1])
    there = s[:, :kept] > torch.finfo(precision).eps * s[:, :1]
    basis = own.new_zeros(mixed, own.shape[2], rank, dtype=torch.float64)
    values = own.new_zeros(mixed, out, rank, dtype=torch.float64)
    basis[..., :kept] = (q_a @ vh.mT)[..., :kept] * there[:, None]
    values[..., :kept] = (q_b @ u)[..., :kept] * (s[:, :kept] * there)[:, None]
    for i in torch.nonzero(there.sum(1) < rank)[:, 0].tolist():
        n = int(there[i].sum())
        found = basis[i, :, :n]
        beyond = own[i].double().mT
        beyond = beyond - found @ (found.mT @ beyond)
        basis[i, :, n:] = torch.linalg.svd(beyond, full_matrices=False).U[:, : rank - n]
    uu, _, ww = torch.linalg.svd(own.double() @ basis)
    rotation = uu @ ww
    return (
        (ROW_NORM * rotation @ basis.mT).to(precision),
        (values @ rotation.mT / ROW_NORM).to(precision),
    )


class FactoredMesh(Mesh):
    """A mesh on which layers' products are averaged; tensors that are no factors are averaged as they are."""

    def kept(self, rows: Rows, agents: Int[np.ndarray, " own"]) -> Rows:
        """The best approximations of agents' own ranks, where what they are given has more."""
        if self.ranks is None:
            return rows
        ranks = self.ranks.of[agents]
        found = cut(rows, ranks)
        for rank in np.unique(ranks).tolist():
            of = torch.from_numpy(np.flatnonzero(ranks == rank))
            for a, b in factor_pairs(list(rows)):
                # A row that all share is approximated once. Where B has nothing beyond, the cut has lost nothing.
                index = (of[:1] if rows[b].stride(0) == 0 else of).to(rows[b].device)
                own_a, own_b = rows[a][index], rows[b][index]
                if bool(own_b[:, :, rank:].any()):
                    one = torch.ones(len(index), 1, dtype=torch.float64, device=own_a.device)
                    found[a][of, :rank], found[b][of, :, :rank] = average(
                        one, own_a[:, None], own_b[:, None], own_a[:, :rank]
                    )
        return found

    def mix(self, matrix: csr_array, theta: Rows) -> Rows:
        """Every agent takes the weighted products of its neighbours, and keeps factors of its rank. `theta` is used up."""
        columns, needed = self.needed(matrix, theta)
        block = matrix[self.first : self.last][:, columns]
        pairs = factor_pairs(list(theta))
        factors = {name for pair in pairs for name in pair}
        mixed = {
            name: torch.zeros_like(tensor) if name in factors else mix(block, needed[name])
            for name, tensor in theta.items()
        }
        degrees = np.diff(block.indptr)
        ranks = np.full(self.agents, -1) if self.ranks is None else self.ranks.of
        kinds = np.stack([degrees, ranks[self.first : self.last]], axis=1)
        for degree, rank in np.unique(kinds, axis=0).tolist():
            agents = np.flatnonzero((kinds == (degree, rank)).all(axis=1))
            rank = rank if rank >= 0 else None
            entries = block.indptr[agents][:, None] + np.arange(degree)
            device = next(iter(theta.values())).device
            place = torch.from_numpy(block.indices[entries].astype(np.int64)).to(device)
            weights = torch.from_numpy(block.data[entries]).to(device)
            rows = torch.from_numpy(agents).to(device)
            for a, b in pairs:
                mixed[a][rows, :rank], mixed[b][rows, :, :rank] = average(
                    weights, needed[a][place], needed[b][place], theta[a][rows, :rank]
                )
        theta.clear()
        return mixed

    def moved(self, weights: Float[Tensor, " own"], row: Rows, rows: Rows) -> Rows:
        """(1 - sum_i weights_i) row + sum_i weights_i rows_i (1, ...): a server's model after its participants' `rows`, of all processes."""
        return self._one(*self.terms(weights, row, rows), row)

    def terms(
        self, weights: Float[Tensor, " own"], row: Rows, rows: Rows
    ) -> tuple[Float[Tensor, " terms"], Rows]:
        """The models of that sum (terms, ...) and what each counts, the same in every process; those tensors that `rows` have."""
        every = torch.from_numpy(self.group.gather(weights.cpu().double().numpy()[:, None])[:, 0])
        rest = 1 - float(every.sum())
        models = self.everybodys(rows)
        if abs(rest) > 1e-12:
            every = torch.cat([torch.tensor([rest], dtype=torch.float64), every])
            models = {name: torch.cat([row[name], tensor]) for name, tensor in models.items()}
        return every, models

    def mean(self, rows: Rows, of: int) -> Rows:
        """The model (1, ...) nearest to the mean of `of` agents' products."""
        models = self.everybodys(rows)
        # Nobody's A has more directions than that of the agent of the highest rank.
        most = 0 if self.ranks is None else int(self.ranks.of.argmax())
        own = {name: tensor[most : most + 1] for name, tensor in models.items()}
        return self._one(torch.full((of,), 1 / of, dtype=torch.float64), models, own)

    def _one(self, weights: Float[Tensor, " terms"], models: Rows, own: Rows) -> Rows:
        weights = weights.to(next(iter(models.values())).device)
        found = {name: torch.tensordot(weights.to(t), t, dims=1)[None] for name, t in models.items()}
        for a, b in factor_pairs(list(models)):
            found[a], found[b] = average(weights[None], models[a][None], models[b][None], own[a][:1])
        return {name: found[name] for name in models}

    def everybodys(self, rows: Rows) -> Rows:
        """All processes' rows, in the agents' order."""
        if self.group.size == 1:
            return rows
        flat = torch.cat([tensor.flatten(1) for tensor in rows.values()], dim=1)
        all_ = torch.from_numpy(self.group.gather(flat.cpu().double().numpy())).to(flat)
        parts = all_.split([math.prod(tensor.shape[1:]) for tensor in rows.values()], dim=1)
        return {
            name: part.reshape(-1, *tensor.shape[1:])
            for (name, tensor), part in zip(rows.items(), parts, strict=True)
        }
