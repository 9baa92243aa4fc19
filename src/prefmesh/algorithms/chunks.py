"""How many agents share a pass: as many as memory holds, and of these numbers the one that was measured to be fastest.

Results do not depend on it beyond rounding. What is measured is chance, so callers keep the answer where a run must be repeated
bit for bit.
"""

import time

import numpy as np
import psutil
import torch

from prefmesh.algorithms.gradients import Problem
from prefmesh.algorithms.local_rule import local_steps
from prefmesh.algorithms.methods.base import Method
from prefmesh.algorithms.optimizers import initial_state
from prefmesh.algorithms.rounds import Learner
from prefmesh.algorithms.state import copies, share, without
from prefmesh.errors import InputError
from prefmesh.policies.base import Params, row_bytes

REPEATS = 3
"""Passes of each size, of which the fastest counts: what disturbs a pass makes it slower."""
WORTH = 0.01
"""Larger passes must be so much faster, per token, to be taken: they cost memory."""
WORSE = 0.05
"""Trying ends at two sizes in a row that are so much slower than the best: one may have been disturbed."""
EFFORT = 0.05
"""How much of a run's work measuring may take."""
LIBRARIES = 0.6 * 2**30
"""Bytes that Python and the libraries hold before any data is read (torch's CPU build; seen 0.4 to 0.5)."""
LEAST = 2**26
"""Bytes below which passes would be of single sequences."""
TEMPORARY = 1.5
"""What a pass holds at most, in units of what it keeps for its backward pass."""


def machine_bytes(device: torch.device) -> int:
    """Memory of the device that passes run on."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


def pass_bytes(learner: Learner, row: Params, frozen: int, memory_gb: float | int | None) -> int:
    """Bytes that a pass may keep: what the libraries, the `frozen` model (bytes) and the agents' state leave of `memory_gb`.

    None: a sixteenth of the machine's memory. Raises `InputError` where nothing is left, or the method cannot train such a model.
    """
    device = learner.problem.policy.device
    # Where the method does not fit the model, it is refused here, before anything is written.
    state = learner.begin({name: tensor.to("meta") for name, tensor in row.items()})
    if memory_gb is None:
        return machine_bytes(device) // 16
    parts = [*state.theta.values(), *state.optimizer.values(), *state.memory.values()]
    agents = sum(t[0].nbytes if t.dim() and t.stride(0) == 0 else t.nbytes for t in parts)
    # A round writes where its participants end, and mixes tensor by tensor.
    agents += len(learner.method.participants(1)) * row_bytes(
        without(row, learner.problem.policy.residuals(row))
    )
    libraries = LIBRARIES if device.type == "cpu" else 0
    left = memory_gb * 2**30 - libraries - frozen - agents
    if left < LEAST:
        needed = (libraries + frozen + agents + LEAST) / 2**30
        raise InputError(
            f"runtime.memory_gb: found {memory_gb:g}; the model takes {frozen / 2**30:.2f}, {learner.method.agents} agents' "
            f"parameters and moments {agents / 2**30:.2f}, libraries {libraries / 2**30:.2f}; allowed: {needed:.2f} or more"
        )
    return int(left / TEMPORARY)


def fitting(problem: Problem, method: Method, batch: int, tokens: int) -> int:
    """How many agents' batches of pairs hold at most `tokens` together; one where nothing is shared."""
    if not problem.policy.stacks:
        return 1
    pair = float(problem.data.cost.mean())
    return max(1, int(tokens // (pair * batch * method.shards.shape[1])))


def fastest(learner: Learner, row: Params, most: int) -> int:
    """The smallest number of agents, of 1, 2, 4, ... and `most`, whose pass is about as fast per token as the fastest.

    Sizes are tried upwards until two in a row do not pay. Where that would take more than `EFFORT` of the run's work before an answer is
    found, it is `learner.agents_per_pass`.
    """
    mesh, active = learner.method.mesh, learner.method.participants(1)
    here = mesh.here(active)
    # A process may host nobody who takes part in the first round: any agents' pairs are alike.
    active = here if len(here) else mesh.first + np.arange(min(mesh.hosted, len(active)))
    most = min(most, len(active))
    settings = learner.method.settings
    effort = EFFORT * settings.rounds * settings.local_steps * len(active)
    found: dict[int, float] = {}
    slower = 0
    for size in [*(2**k for k in range((most - 1).bit_length())), most]:
        effort -= size * (REPEATS + 1)
        if effort < 0:
            return learner.agents_per_pass
        found[size] = _seconds_per_token(learner, row, active[:size])
        slower = slower + 1 if found[size] > min(found.values()) * (1 + WORSE) else 0
        if slower == 2:
            break
    good = min(found.values()) * (1 + WORTH)
    return min(size for size, seconds in found.items() if seconds <= good)


def _seconds_per_token(learner: Learner, row: Params, agents: np.ndarray) -> float:
    """Of one local step as a round takes it: batches drawn, parameters and moments in hand."""
    problem, optimizer = learner.problem, learner.optimizer
    drawn = np.zeros(learner.method.population.shards, dtype=np.int64)
    tokens = problem.data.cost[learner.batches(1, agents, drawn, 1)[0]].sum()
    seconds, residuals = [], problem.policy.residuals(row)
    still = {name: share(tensor, len(agents)) for name, tensor in residuals.items()}
    row = without(row, residuals)
    for _ in range(REPEATS + 1):  # the first touches its memory, too
        started = time.perf_counter()
        rows, weights = learner.batches(1, agents, drawn, 1)
        theta, moments = copies(row, len(agents)), initial_state(optimizer, row, len(agents))
        local_steps(problem, optimizer, optimizer.lr, theta, moments, rows, weights, resting=still)
        if problem.policy.device.type == "cuda":
            torch.cuda.synchronize(problem.policy.device)
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:]) / float(tokens)
