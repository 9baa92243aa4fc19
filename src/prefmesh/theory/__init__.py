"""What can be proved and predicted: the theory of docs/theory.md, executable."""

from prefmesh.theory import simulate
from prefmesh.theory.problem import LogLinearProblem

__all__ = ["LogLinearProblem", "simulate"]
