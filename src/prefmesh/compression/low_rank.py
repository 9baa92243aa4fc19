"""Matrices as products of thin ones: PowerSGD's compression, without its memory."""

from typing import ClassVar

import torch
from pydantic import Field

from prefmesh.compression.base import Compressor, Form, Sent, compressor
from prefmesh.compression.layout import Layout, Params, Spec, working
from prefmesh.compression.seeds import Seeds, normal


@compressor("low_rank")
class LowRank(Compressor):
    """Each matrix M (m, n) projected on r directions found by one power iteration. Vogels et al. 2019, Algorithm 1.

        P = orthonormal columns of M Q_0,    Q = M^T P,    C(M) = P Q^T

    with a normal start Q_0 (n, r), drawn anew (theirs is warm). Tensors of more dimensions are read as (m, rest), as there.
    Those of less than two, and those where (m + n) r numbers are no less than m n, go whole. Both factors are sent, each
    column's length shared evenly between them, so that whatever follows treats them alike.

    Exact where M has rank r or less. Else E||C(M) - M||^2 <= (1 - delta) ||M||^2 with delta = r / min(m, n): let S hold the
    squares of the rho positive singular values, and W the orthonormal columns that span Q_0's part on their side, evenly
    distributed. Then ||P^T M||^2 = tr((W^T S W)^-1 W^T S^2 W) >= tr(W^T S W), as W^T S^2 W >= (W^T S W)^2, and
    E tr(W^T S W) = (r / rho) tr S. What is left out is orthogonal to the rest. Biased.
    """

    takes: ClassVar[Form] = Form.TENSORS
    sends: ClassVar[Form] = Form.TENSORS

    rank: int = Field(ge=1)
    """r."""

    def sent(self, layout: Layout) -> Sent:
        """Two factors of each matrix, and other tensors."""
        values: Layout = {}
        for name, spec in layout.items():
            if (shape := self._matrix(spec)) is None:
                values[name] = spec
            else:
                values[f"{name}/left"] = Spec((shape[0], self.rank), spec.dtype)
                values[f"{name}/right"] = Spec((shape[1], self.rank), spec.dtype)
        return Sent(values, {})

    def reduce(self, values: Params, seeds: Seeds) -> tuple[Params, Params]:
        """A matrix that is not finite has factors that are not."""
        shapes = {
            name: self._matrix(Spec(tuple(tensor.shape[1:]), tensor.dtype)) for name, tensor in values.items()
        }
        drawn = torch.from_numpy(normal(seeds, sum(n * self.rank for _, n in filter(None, shapes.values()))))
        sent, place = {}, 0
        for name, tensor in values.items():
            if (shape := shapes[name]) is None:
                sent[name] = tensor
                continue
            m, n = shape
            matrix = tensor.reshape(-1, m, n).to(working(tensor.dtype))
            start = drawn[:, place : place + n * self.rank].to(matrix).reshape(-1, n, self.rank)
            place += n * self.rank
            left = torch.linalg.qr(matrix @ start).Q
            right = matrix.mT @ left
            length = right.norm(dim=1, keepdim=True).sqrt()
            sent[f"{name}/left"] = (left * length).to(tensor.dtype)
            sent[f"{name}/right"] = (right / torch.where(length == 0, 1, length)).to(tensor.dtype)
        return sent, {}

    def restore(self, values: Params, aside: Params, layout: Layout) -> Params:
        """Products of the factors."""
        restored = {}
        for name, spec in layout.items():
            if self._matrix(spec) is None:
                restored[name] = values[name]
            else:
                dtype = working(spec.dtype)
                product = values[f"{name}/left"].to(dtype) @ values[f"{name}/right"].to(dtype).mT
                restored[name] = product.to(spec.dtype).reshape(-1, *spec.shape)
        return restored

    def contraction(self, layout: Layout) -> float:
        """The least r / min(m, n) of any matrix; 1 where all goes whole."""
        matrices = filter(None, map(self._matrix, layout.values()))
        return min((self.rank / min(shape) for shape in matrices), default=1.0)

    def _matrix(self, spec: Spec) -> tuple[int, int] | None:
        """(m, n) as which a tensor is read; none: it goes whole."""
        if len(spec.shape) < 2 or not spec.numbers:
            return None
        m = spec.shape[0]
        n = spec.numbers // m
        return (m, n) if (m + n) * self.rank < m * n else None
