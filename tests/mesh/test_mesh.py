"""Agents in several processes: what crosses them gives the numbers of one process, and only what is needed is sent."""

import numpy as np
import torch

from prefmesh.mesh import ALONE, Group, Mesh
from prefmesh.mesh.products import mix
from prefmesh.topology.build import build_mixing_matrix
from tests.mesh.processes import together

AGENTS = 10
GRAPHS = {
    "ring": "metropolis",
    "star": "metropolis",
    "path": "lazy_metropolis",
    "exponential": "uniform",
    "complete": "metropolis",
}


def matrix(graph: str):
    return build_mixing_matrix(graph, GRAPHS[graph], agents=AGENTS, seed=0).matrix


def theta(dtype=torch.float64) -> dict[str, torch.Tensor]:
    random = np.random.default_rng(0)
    return {
        "a": torch.from_numpy(random.normal(size=(AGENTS, 3, 4))).to(dtype),
        "b": torch.from_numpy(random.normal(size=(AGENTS, 5))).to(dtype),
    }


WIDTH = 17
"""Numbers in a row of `theta`."""


def test_one_process_hosts_everyone() -> None:
    mesh = Mesh.of(AGENTS)
    assert (mesh.group, mesh.hosted, mesh.first) == (ALONE, AGENTS, 0)
    assert mesh.here(np.array([3, 7])).tolist() == mesh.rows(np.array([3, 7])).tolist() == [3, 7]
    mixed = mesh.mix(matrix("ring"), theta())
    assert all(torch.equal(mixed[name], mix(matrix("ring"), tensor)) for name, tensor in theta().items())
    assert mesh.group.bytes_sent == 0


def test_blocks_follow_each_other() -> None:
    class Third(Group):
        rank, size = 2, 4

    mesh = Mesh.of(AGENTS, Third())
    assert (mesh.first, mesh.last, mesh.hosted) == (6, 8, 2)
    assert mesh.here(np.array([0, 6, 7, 9])).tolist() == [6, 7]
    assert mesh.rows(np.array([6, 7])).tolist() == [0, 1]
    assert Mesh([3, 0, 5, 2], Third()).here(np.arange(10)).tolist() == [3, 4, 5, 6, 7]


def test_three_processes_are_one() -> None:
    together(_three_processes, 3)


def _three_processes(group: Group) -> None:
    assert group.total(np.array([1.0, group.rank])).tolist() == [3, 3]
    rows = np.full((group.rank, 2), float(group.rank))
    assert group.gather(rows).tolist() == [[1, 1], [2, 2], [2, 2]]
    assert group.gather(np.zeros((0, 2))).shape == (0, 2)
    mesh = Mesh.of(AGENTS, group)
    own = {name: tensor[mesh.first : mesh.last] for name, tensor in theta().items()}
    for graph in GRAPHS:
        w, before = matrix(graph), group.bytes_sent
        for _ in range(2):  # the second time, it knows the way
            mixed = mesh.mix(w, dict(own))
        for name, tensor in theta().items():
            assert torch.allclose(mixed[name], mix(w, tensor)[mesh.first : mesh.last], rtol=0, atol=1e-15)
        # The least there is to send: each own row once to each process with an agent that takes of it.
        takes = w.toarray() != 0
        needed = sum(
            takes[a:b, i].any()
            for i in range(mesh.first, mesh.last)
            for rank, (a, b) in enumerate(zip(mesh.bounds, mesh.bounds[1:], strict=False))
            if rank != group.rank
        )
        assert group.bytes_sent - before == 2 * needed * WIDTH * 8
    # A server's sum over agents 0, 4 and 5: nobody of the last process.
    active = np.array([0, 4, 5])
    here = mesh.here(active)
    weights = torch.tensor([0.5, 2.0, -1.0], dtype=torch.float64)[torch.from_numpy(np.isin(active, here))]
    sums = mesh.weighted_sum(weights, {name: t[torch.from_numpy(here)] for name, t in theta().items()})
    means = mesh.mean(own, AGENTS)
    for name, tensor in theta().items():
        expected = 0.5 * tensor[0] + 2 * tensor[4] - tensor[5]
        assert torch.allclose(sums[name], expected[None], rtol=0, atol=1e-15)
        assert torch.allclose(means[name], tensor.mean(0, keepdim=True), rtol=0, atol=1e-15)
    # Half precision on the way: half the bytes; what a process has itself stays exact, and so does the mean.
    half = Mesh.of(AGENTS, group, wire=torch.bfloat16)
    w, before = matrix("path"), group.bytes_sent
    mixed = half.mix(w, {name: tensor.float() for name, tensor in own.items()})
    assert group.bytes_sent - before == (1 + (group.rank == 1)) * WIDTH * 2
    for name, tensor in theta(torch.float32).items():
        expected = mix(w, tensor)[mesh.first : mesh.last]
        inner = [i for i in range(mesh.first, mesh.last) if i not in (3, 4, 6, 7)]
        at = [i - mesh.first for i in inner]
        assert torch.allclose(mixed[name][at], expected[at], rtol=0, atol=1e-6)
        assert 1e-5 < (mixed[name] - expected).abs().max() < 1e-2
    found = half.weighted_sum(
        weights.float(), {name: t[torch.from_numpy(here)].float() for name, t in theta().items()}
    )
    assert all(torch.allclose(found[name], sums[name].float(), atol=5e-2) for name in sums)
    assert all(torch.equal(half.mean(own, AGENTS)[name], means[name]) for name in means)
