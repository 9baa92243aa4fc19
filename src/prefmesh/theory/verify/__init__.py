"""`prefmesh theory verify`: every claim of the theory as a row, with the experiment that decides it."""

import time
from collections.abc import Callable, Sequence

from prefmesh.theory.verify.claim import (
    CLAIMS,
    Claim,
    Effort,
    Finding,
    Plot,
    Row,
    Series,
    Verification,
    chosen,
)

__all__ = ["CLAIMS", "Claim", "Effort", "Finding", "Plot", "Row", "Series", "Verification", "verify"]


def verify(
    effort: Effort,
    only: Sequence[str] | None = None,
    *,
    say: Callable[[int, int, str], None] = lambda *_: None,
) -> Verification:
    """Check all claims, or those whose names contain a word of `only`. Raises `InputError` where none does.

    An experiment that breaks is a row that says so; the others go on.
    """
    # Importing registers the claims.
    from prefmesh.theory.verify import landscape_claims, law_claims, rate_claims  # noqa: F401

    claims = chosen(only)
    rows = []
    for i, one in enumerate(claims):
        say(i, len(claims), one.name)
        started = time.perf_counter()
        try:
            finding, trouble = one.experiment(effort), ""
        except (ValueError, ArithmeticError) as error:
            finding, trouble = None, f"{type(error).__name__}: {error}"
        rows.append(Row(claim=one, finding=finding, seconds=time.perf_counter() - started, problem=trouble))
    say(len(claims), len(claims), "")
    return Verification(rows=rows, effort=effort)
