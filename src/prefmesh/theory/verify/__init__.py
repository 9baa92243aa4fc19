"""`prefmesh theory verify`: every claim of the theory as a row, with the experiment that decides it."""

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

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
    jobs: int = 1,
    say: Callable[[int, int, str], None] = lambda *_: None,
) -> Verification:
    """Check all claims, or those whose names contain a word of `only`. Raises `InputError` where none does.

    `jobs` experiments at once, each in a process and on a thread of its own (1: one after the other, in this process);
    what they find does not depend on it. An experiment that breaks is a row that says so; the others go on.
    """
    # Importing registers the claims.
    from prefmesh.theory.verify import (  # noqa: F401
        landscape_claims,
        law_claims,
        method_claims,
        network_claims,
        rate_claims,
    )

    claims = chosen(only)
    if min(jobs, len(claims)) < 2:
        rows = []
        for one in claims:
            say(len(rows), len(claims), one.name)
            rows.append(Row(claim=one, **_checked(one.experiment, effort)))
    else:
        rows = _side_by_side(claims, effort, min(jobs, len(claims)), say)
    say(len(claims), len(claims), "")
    return Verification(rows=rows, effort=effort)


def _side_by_side(
    claims: Sequence[Claim], effort: Effort, jobs: int, say: Callable[[int, int, str], None]
) -> list[Row]:
    """In processes that are started anew: a fork would inherit torch's threads without the threads."""
    say(0, len(claims), claims[0].name)
    given = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # read by torch and by numpy's BLAS when a process starts
    try:
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            waiting = {pool.submit(_checked, one.experiment, effort): one for one in claims}
            found = {}
            for future in as_completed(waiting):
                one = waiting[future]
                try:
                    found[one.name] = Row(claim=one, **future.result())
                except BrokenProcessPool as error:
                    found[one.name] = Row(
                        claim=one, finding=None, seconds=0.0, problem=f"its process died: {error}"
                    )
                say(len(found), len(claims), one.name)
    finally:
        if given is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = given
    return [found[one.name] for one in claims]


def _checked(experiment: Callable[[Effort], Finding], effort: Effort) -> dict[str, Any]:
    """`Row`'s finding, seconds and problem."""
    started = time.perf_counter()
    try:
        finding, trouble = experiment(effort), ""
    except (ValueError, ArithmeticError) as error:
        finding, trouble = None, f"{type(error).__name__}: {error}"
    return {"finding": finding, "seconds": time.perf_counter() - started, "problem": trouble}
