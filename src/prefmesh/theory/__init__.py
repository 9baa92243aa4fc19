"""What can be proved and predicted: the theory of docs/theory, executable."""

from prefmesh.theory import laws, rates, simulate
from prefmesh.theory.problem import LogLinearProblem, NoOptimum

__all__ = ["LogLinearProblem", "NoOptimum", "laws", "rates", "simulate"]
