"""Where agents live: which of them this process hosts, and how rows of Theta travel between processes."""

from prefmesh.mesh.factored import FactoredMesh, factor_pairs
from prefmesh.mesh.group import ALONE, Group
from prefmesh.mesh.mesh import Mesh
from prefmesh.mesh.ranks import Ranks, cut
from prefmesh.mesh.residual import ResidualMesh, residual_bytes, residual_of

__all__ = [
    "ALONE",
    "FactoredMesh",
    "Group",
    "Mesh",
    "Ranks",
    "ResidualMesh",
    "cut",
    "factor_pairs",
    "residual_bytes",
    "residual_of",
]
