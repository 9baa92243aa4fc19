"""How far apart agents' models are, and how far mixing moved their average.

Where the mesh averages products B A of LoRA's factors, so do both: factors that differ may have one product.
"""

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from prefmesh.mesh import FactoredMesh, Mesh, factor_pairs, residual_of
from prefmesh.policies.base import Params

BLOCK = 2**20
"""Numbers that the consensus error is taken over at a time."""

Weighted = tuple[Float[Tensor, " _"], Params]
"""Models (models, ...) hosted here, and what each counts."""


def consensus_error(
    theta: Params, mesh: Mesh | None = None, of: int | None = None, middle: Params | None = None
) -> float:
    """e = (1/N) sum_i ||theta_i - mean||^2, over all tensors; 0 where all agents share one row.

    `mesh`, `of`: where the rows of `of` agents live, those of this process being `theta`; none: all are here. `middle`: what each
    of these takes for the mean, (agents, ...).
    """
    total = 0.0
    if isinstance(mesh, FactoredMesh):
        theta = dict(theta)
        for a, b in factor_pairs(list(theta)):
            total += _of_products(theta.pop(a), theta.pop(b), mesh, of or mesh.agents)
    if not theta:
        return total
    elsewhere = mesh if mesh is not None and mesh.group.size > 1 else None
    if elsewhere and middle is None:
        middle = elsewhere.mean(theta, of or 0)
    own = 0.0
    for name, tensor in theta.items():
        agents = tensor.shape[0]
        if not elsewhere and (agents == 1 or tensor.stride(0) == 0):
            continue
        flat = tensor.reshape(agents, math.prod(tensor.shape[1:]))
        centre = None if middle is None else middle[name].reshape(-1, flat.shape[1])
        # Some columns at a time: what is taken on the way stays small.
        width = max(1, BLOCK // max(1, agents))
        for i, part in enumerate(flat.split(width, dim=1)):
            at = part.mean(0) if centre is None else centre[:, i * width : (i + 1) * width]
            own += float((part - at).square().sum(dtype=torch.float64))
    if elsewhere:
        own = float(elsewhere.group.total(np.array([own]))[0])
    return total + own / (of or next(iter(theta.values())).shape[0])


def mixing_error(meant: Weighted, left: Weighted) -> float:
    """||sum B A - sum B' A'|| / ||sum B A||, over all layers: from the models whose weighted sum mixing is to leave as the network's
    mean, to those that it left; with their residual R in both sums where they have one. 0 where the first sum is. All models are
    hosted here.
    """
    moved, length = 0.0, 0.0
    for a, b in factor_pairs(list(meant[1])):
        wanted, found = (_update(weights, models, a, b) for weights, models in (meant, left))
        moved += float((wanted - found).square().sum(dtype=torch.float64))
        length += float(wanted.square().sum(dtype=torch.float64))
    return math.sqrt(moved / length) if length else 0.0


def _update(weights: Float[Tensor, " models"], models: Params, a: str, b: str) -> Float[Tensor, "out in"]:
    """R + sum_k weights_k b_k a_k of a layer, R being all models' alike; none: 0."""
    products, residual = _sum(weights, models[a], models[b]), models.get(residual_of(a))
    return products if residual is None else products + residual[0]


def _sum(
    weights: Float[Tensor, " models"],
    a: Float[Tensor, "models rank in"],
    b: Float[Tensor, "models out rank"],
) -> Float[Tensor, "out in"]:
    """sum_k weights_k b_k a_k, one layer at a time: the only place where it is formed."""
    terms = a.shape[0] * a.shape[1]
    left = (b * weights.to(b)[:, None, None]).transpose(0, 1).reshape(b.shape[1], terms)
    return left @ a.reshape(terms, a.shape[2])


def _of_products(
    a: Float[Tensor, "agents rank in"], b: Float[Tensor, "agents out rank"], mesh: FactoredMesh, of: int
) -> float:
    """Factors travel between processes, products do not."""
    if mesh.group.size == 1 and (len(a) == 1 or a.stride(0) == 0):
        return 0.0
    every = mesh.everybodys({"a": a, "b": b})
    mean = _sum(torch.full((of,), 1 / of, dtype=torch.float64), every["a"], every["b"])
    own = sum(float((y @ x - mean).square().sum(dtype=torch.float64)) for x, y in zip(a, b, strict=True))
    return float(mesh.group.total(np.array([own]))[0]) / of
