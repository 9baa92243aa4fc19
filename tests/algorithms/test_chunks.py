"""How many agents share a pass: within memory, by measuring, and never with an effect on results."""

from dataclasses import replace

import numpy as np
import pytest

from prefmesh.algorithms import chunks
from prefmesh.algorithms.sampling import Sampler
from prefmesh.errors import InputError
from prefmesh.mesh import Group, Mesh
from tests import problems

SIZES = [5, 4, 3]


def test_as_many_agents_as_tokens_allow() -> None:
    on = problems.problem("lora", 12, "float32")
    learner = problems.learner(on, SIZES, {"name": "fed_dpo"}, {})
    mean_cost = float(on.data.cost.mean())
    tokens = 1000
    assert chunks.fitting(on, learner.method, 4, tokens) == int(tokens // (4 * mean_cost)) > 1
    assert chunks.fitting(on, learner.method, 10**9, tokens) == 1
    # A pass of the centralized agent holds all shards' batches.
    pooled = problems.learner(on, SIZES, {"name": "centralized"}, {})
    assert chunks.fitting(on, pooled.method, 4, tokens) == int(tokens // (12 * mean_cost))
    # Full copies share nothing: one at a time costs least memory.
    full = problems.problem("full", 12, "float32")
    assert chunks.fitting(full, learner.method, 4, tokens) == 1


@pytest.mark.parametrize(
    ("method", "optimizer", "rows"),
    [
        # Rows of the size of a model: one each, where they end, two moments each.
        ({"name": "dec_dpo"}, {"state": "keep"}, 3 + 3 + 6),
        ({"name": "dec_dpo"}, {"state": "reset"}, 3 + 3),
        # The server's, two older ones and the current once more in memory, where two participants end, no moments.
        ({"name": "fed_dpo", "participation": 2, "staleness": 2}, {"state": "reset"}, 1 + 3 + 2),
    ],
)
def test_what_a_pass_may_keep_is_what_the_state_leaves(monkeypatch, method, optimizer, rows) -> None:
    monkeypatch.setattr(chunks, "LIBRARIES", 0)
    on = problems.problem("lora", 12, "float32")
    learner = problems.learner(on, SIZES, method, {"name": "adamw"} | optimizer)
    row = on.policy.initial(0)
    own = sum(tensor.nbytes for tensor in row.values())
    steps = 3 * 8 if optimizer["state"] == "keep" else 0
    left = chunks.pass_bytes(learner, row, 1000, 1) * chunks.TEMPORARY
    assert 2**30 - left == pytest.approx(1000 + rows * own + steps, abs=2)


def test_no_room_is_refused() -> None:
    on = problems.problem("lora", 12, "float32")
    learner = problems.learner(on, SIZES, {"name": "dec_dpo"}, {})
    with pytest.raises(InputError, match=r"runtime\.memory_gb: found 0\.5; the model takes 2\.00, 3 agents'"):
        chunks.pass_bytes(learner, on.policy.initial(0), 2**31, 0.5)


class Clock:
    """Seconds a token that passes of so many agents take, and which were tried."""

    def __init__(self, seconds: dict[int, float]):
        self.seconds, self.tried = seconds, []

    def __call__(self, learner, row, agents) -> float:
        self.tried.append(len(agents))
        return self.seconds[len(agents)]


@pytest.mark.parametrize(
    ("seconds", "most", "tried", "answer"),
    [
        # Larger is faster, to the end; what is as good takes less memory.
        ({1: 4.0, 2: 2.0, 4: 1.0, 6: 0.9}, 99, [1, 2, 4, 6], 6),
        ({1: 4.0, 2: 2.0, 4: 1.0, 6: 0.995}, 99, [1, 2, 4, 6], 4),
        # Memory ends it.
        ({1: 4.0, 2: 2.0, 3: 1.5}, 3, [1, 2, 3], 3),
        # It stops where two larger ones are slower; one may have been disturbed.
        ({1: 0.9, 2: 1.0, 4: 0.95}, 99, [1, 2, 4], 1),
        ({1: 1.0, 2: 1.2, 4: 0.9, 6: 0.8}, 99, [1, 2, 4, 6], 6),
        # What is hardly slower may be chance: the next is tried.
        ({1: 1.0, 2: 0.9, 4: 0.92, 6: 0.8}, 99, [1, 2, 4, 6], 6),
        ({1: 1.0, 2: 1.1, 4: 1.2}, 99, [1, 2, 4], 1),
        ({1: 1.0}, 1, [1], 1),
    ],
)
def test_the_fastest_is_found_by_trying_upwards(monkeypatch, seconds, most, tried, answer) -> None:
    on = problems.problem("lora", 24, "float32")
    learner = problems.learner(on, [4] * 6, {"name": "dec_dpo", "rounds": 10_000}, {})
    clock = Clock(seconds)
    monkeypatch.setattr(chunks, "_seconds_per_token", clock)
    assert chunks.fastest(learner, on.policy.initial(0), most) == answer
    assert clock.tried == tried


def test_a_short_run_is_not_spent_on_measuring(monkeypatch) -> None:
    on = problems.problem("lora", 24, "float32")
    learner = problems.learner(
        on, [4] * 6, {"name": "dec_dpo", "rounds": 20}, {}
    )  # 120 steps, 6 of them for trying
    clock = Clock({1: 2.0, 2: 1.0})
    monkeypatch.setattr(chunks, "_seconds_per_token", clock)
    assert chunks.fastest(replace(learner, agents_per_pass=5), on.policy.initial(0), 99) == 5
    assert clock.tried == [1]


def test_real_passes_are_timed() -> None:
    on = problems.problem("lora", 24, "float32")
    learner = problems.learner(on, [4] * 6, {"name": "dec_dpo", "rounds": 10_000}, {"batch_size": 2})
    assert chunks.fastest(learner, on.policy.initial(0), 99) in (1, 2, 4, 6)


def test_a_process_times_agents_that_it_hosts() -> None:
    """Also where none of them takes part in the first round."""

    class Half(Group):
        size = 2

        def __init__(self, rank: int):
            self.rank = rank

    on = problems.problem("lora", 24, "float32")
    learner = problems.learner(
        on, [4] * 6, {"name": "fed_dpo", "rounds": 10_000, "participation": 1}, {"batch_size": 2}
    )
    (first,) = learner.method.participants(1)
    rank = int(first < 3)  # the other one
    mesh = Mesh([3, 3], Half(rank))
    learner.method.mesh = mesh
    held = [np.arange(4) + 4 * i for i in range(mesh.first, mesh.last)]
    sampler = Sampler(held, learner.optimizer, 0, sizes=np.array([4] * 6), first=mesh.first)
    assert chunks.fastest(replace(learner, sampler=sampler), on.policy.initial(0), 99) == 1
