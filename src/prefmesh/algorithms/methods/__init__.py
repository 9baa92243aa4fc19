"""How agents learn together: one file per method, registered by name."""

from prefmesh.algorithms.methods import (
    async_gossip,
    centralized,
    dec_dpo,
    exact_diffusion,
    extra,
    fed_buff,
    fed_dpo,
    fed_nova,
    fed_opt,
    fed_prox,
    gradient_tracking,
    local_only,
    momentum_tracking,
    push_sum,
    scaffold,
)
from prefmesh.algorithms.methods.base import METHODS, Method, MethodSettings, Population, method

__all__ = [
    "METHODS",
    "Method",
    "MethodSettings",
    "Population",
    "async_gossip",
    "centralized",
    "dec_dpo",
    "exact_diffusion",
    "extra",
    "fed_buff",
    "fed_dpo",
    "fed_nova",
    "fed_opt",
    "fed_prox",
    "gradient_tracking",
    "local_only",
    "method",
    "momentum_tracking",
    "push_sum",
    "scaffold",
]
