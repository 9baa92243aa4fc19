"""The Hessian of a loss at a model, known by its products with vectors alone: its two ends, for any policy.

(docs/theory, landscape.md, eq. (L.1).) Log-linear policies have it in closed form: `LogLinearProblem.hessian`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.linalg import eigh_tridiagonal
from torch.nn.attention import SDPBackend, sdpa_kernel

from prefmesh.algorithms.gradients import Problem
from prefmesh.objectives import pair_loss
from prefmesh.policies.base import Params, passes

Vector = Float[np.ndarray, " dim"]

TWICE = 4
"""How much more a pass keeps when it is differentiated twice."""
BASIS_BYTES = 2**32
"""How much the basis of a Lanczos run may hold."""


def to_vector(row: Params) -> Vector:
    """A model or gradient (1, ...) as one float64 vector, tensors in their order."""
    return np.concatenate([tensor.detach().double().cpu().numpy().reshape(-1) for tensor in row.values()])


def from_vector(vector: Vector, like: Params) -> Params:
    """The inverse of `to_vector`: shapes, precision and device of `like`."""
    found, place = {}, 0
    for name, tensor in like.items():
        part = torch.from_numpy(vector[place : place + tensor.numel()])
        found[name] = part.to(tensor.device, tensor.dtype).reshape(tensor.shape)
        place += tensor.numel()
    return found


def hessian_vector_product(
    problem: Problem,
    row: Params,
    rows: Int[np.ndarray, " pairs"],
    weights: Float[np.ndarray, " pairs"],
    vector: Vector,
) -> Vector:
    """hess f(row) v of f = sum_j weights_j loss_j: the gradient of <grad f, v>, cut into passes.

    Attention runs in its plain form: fused kernels have no second derivative.
    """
    direction = from_vector(vector, row)
    total = np.zeros_like(vector)
    for part in passes(problem.data, rows, max(1, problem.policy.tokens_per_pass // TWICE)):
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in row.items()}
        weight = torch.as_tensor(
            weights[part], dtype=problem.reference.dtype, device=problem.reference.device
        )
        with sdpa_kernel([SDPBackend.MATH]):
            log_probs = problem.log_probs(leaves, rows[part][None])
            loss = (pair_loss(log_probs, problem.objective, alone=True) * weight).sum()
            gradient = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
            slope = torch.stack(
                [(g * v).sum() for g, v in zip(gradient, direction.values(), strict=True)]
            ).sum()
            if not slope.requires_grad:  # a piecewise linear loss of a log-linear policy
                continue
            product = torch.autograd.grad(slope, list(leaves.values()), materialize_grads=True)
        total += to_vector(dict(zip(leaves, product, strict=True)))
    return total


@dataclass(frozen=True, kw_only=True)
class Ends:
    """The ends of a symmetric matrix's spectrum, as Lanczos saw them.

    The true ones lie outside: `largest` is at most the largest eigenvalue, `smallest` at least the smallest. Within `error`
    of each there is an eigenvalue. `vector`: the unit eigenvector of the end that is larger in size.
    """

    largest: float
    smallest: float
    error: float
    vector: Vector
    products: int

    @property
    def size(self) -> float:
        """The largest |eigenvalue|: the matrix's norm."""
        return max(abs(self.largest), abs(self.smallest))


def ends_of_spectrum(
    product: Callable[[Vector], Vector], start: Vector, *, tolerance: float, most_products: int
) -> Ends:
    """Lanczos with full reorthogonalisation from `start`, until both ends are within `tolerance` of the larger |end|.

    (scipy's ARPACK judges each end by that end's own size, so one at 0, as of every singular Hessian, takes for ever; and
    it keeps nothing of a run that it stops. A product costs a second derivative of a language model: each one must count.)
    """
    dim = len(start)
    steps = max(1, min(most_products, dim, BASIS_BYTES // (8 * dim)))
    basis = np.empty((steps, dim))
    diagonal, beside = np.empty(steps), np.empty(steps)
    q = start / np.linalg.norm(start)
    k, error, values, vectors = 0, 0.0, np.zeros(1), np.ones((1, 1))
    for k in range(steps):
        basis[k] = q
        w = product(q)
        diagonal[k] = q @ w
        for _ in range(2):
            w = w - basis[: k + 1].T @ (basis[: k + 1] @ w)
        beside[k] = np.linalg.norm(w)
        values, vectors = eigh_tridiagonal(diagonal[: k + 1], beside[:k])
        error = beside[k] * max(abs(vectors[-1, 0]), abs(vectors[-1, -1]))
        size = max(abs(values[0]), abs(values[-1]))
        if error <= tolerance * size or beside[k] <= 1e-12 * size:
            break
        q = w / beside[k]
    end = 0 if abs(values[0]) > abs(values[-1]) else -1
    vector = vectors[:, end] @ basis[: k + 1]
    return Ends(
        largest=float(values[-1]),
        smallest=float(values[0]),
        error=float(error),
        vector=vector,
        products=k + 1,
    )


def hessian_ends(
    problem: Problem,
    row: Params,
    rows: Int[np.ndarray, " pairs"],
    weights: Float[np.ndarray, " pairs"],
    *,
    random: np.random.Generator,
    tolerance: float,
    most_products: int,
    near: Vector | None = None,
) -> Ends:
    """The ends of hess f at a model `row` (1, ...), f = sum_j weights_j loss_j.

    `near`: a unit vector that the search begins close to, such as another agent's `Ends.vector`. A bit of chance is always
    mixed in: an eigenvector of one end alone would never show the other.
    """
    dim = sum(tensor.numel() for tensor in row.values())
    start = random.standard_normal(dim) / np.sqrt(dim)
    if near is not None:
        start = near + 0.1 * start
    return ends_of_spectrum(
        lambda v: hessian_vector_product(problem, row, rows, weights, v),
        start,
        tolerance=tolerance,
        most_products=most_products,
    )
