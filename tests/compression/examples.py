"""Chains of every kind, and rows to reduce."""

import numpy as np
import torch
from hypothesis import strategies as st

from prefmesh.compression import Chain, Params, parse_chain

CHAINS: dict[str, Chain] = {
    name: parse_chain(stages)
    for name, stages in {
        "nothing": [],
        "few largest": [{"name": "top_k", "share": 0.05}],
        "many largest": [{"name": "top_k", "share": 0.6}],
        "random": [{"name": "random_k", "share": 0.2}],
        "random, unbiased": [{"name": "random_k", "share": 0.2, "unbiased": True}],
        "int8": ["int8"],
        "int4": ["int4"],
        "sign": ["sign"],
        "low rank": [{"name": "low_rank", "rank": 2}],
        "largest in int8": [{"name": "top_k", "share": 0.1}, "int8"],
        "random in int4": [{"name": "random_k", "share": 0.3}, "int4"],
        "random of the largest by sign": [
            {"name": "top_k", "share": 0.4},
            {"name": "random_k", "share": 0.5},
            "sign",
        ],
        "factors in int8": [{"name": "low_rank", "rank": 1}, "int8"],
        "largest of factors in int4": [
            {"name": "low_rank", "rank": 2},
            {"name": "top_k", "share": 0.5},
            "int4",
        ],
    }.items()
}

SHAPES = st.lists(
    st.sampled_from([(), (1,), (7,), (9, 8), (1, 5), (12, 3), (4, 6, 5), (40,)]), min_size=1, max_size=4
)


def rows(
    shapes: list[tuple[int, ...]],
    agents: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    *,
    ties: bool = False,
) -> Params:
    """Normal entries; `ties`: whole numbers, of which many are zero or equal."""
    random = np.random.default_rng(seed)
    drawn = [random.standard_normal((agents, *shape)) for shape in shapes]
    return {f"layer.{i}": torch.from_numpy(np.round(x) if ties else x).to(dtype) for i, x in enumerate(drawn)}


def flat(params: Params) -> torch.Tensor:
    """Each agent's entries as one vector (agents, d), in float64."""
    return torch.cat([tensor.double().flatten(1) for tensor in (t[..., None] for t in params.values())], 1)


def error(params: Params, other: Params) -> torch.Tensor:
    """||x - y||^2 of each agent."""
    return (flat(params) - flat(other)).square().sum(1)


def lone(row: torch.Tensor, agents: int) -> Params:
    """The same row for many agents, each of whom draws its own."""
    return {"x": row.expand(agents, *row.shape)}
