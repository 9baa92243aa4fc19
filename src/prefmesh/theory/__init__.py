"""What can be proved and predicted: the theory of docs/theory, executable."""

from prefmesh.theory import rates, simulate
from prefmesh.theory.problem import LogLinearProblem

__all__ = ["LogLinearProblem", "rates", "simulate"]
