"""Reference log-probabilities are computed once per model, data and encoding; what is cached is never trusted blindly."""

import numpy as np
import pytest
import torch

from prefmesh.evaluation.scores import log_probs
from prefmesh.policies.cache import cache_directory
from prefmesh.policies.reference import reference_log_probs
from tests import models, problems


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFMESH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "reference"


class Counting:
    """The computation, and how often it was asked for."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, policy, data) -> torch.Tensor:
        self.calls += 1
        return log_probs(policy, None, data, np.arange(len(data)))


def test_the_second_time_it_is_read(cache) -> None:
    policy = problems.causal_lm("lora")
    data = policy.encode(models.pairs(4))
    compute = Counting()
    first = reference_log_probs(policy, data, compute)
    again = reference_log_probs(policy, data, compute)
    assert compute.calls == 1
    assert torch.equal(first, again)
    assert [path.suffix for path in cache.iterdir()] == [".safetensors"]
    # LoRA or full, the reference is the same.
    assert torch.equal(reference_log_probs(problems.causal_lm("full"), data, compute), first)
    assert compute.calls == 1


def test_another_model_precision_or_data_is_another_key() -> None:
    compute = Counting()
    policy = problems.causal_lm("lora")
    for other, count in (
        (policy, 4),
        (problems.causal_lm("lora", seed=1), 4),
        (problems.causal_lm("lora", dtype="float64"), 4),
        (problems.causal_lm("lora", max_length=8), 4),
        (policy, 3),
    ):
        before = compute.calls
        found = reference_log_probs(other, other.encode(models.pairs(count)), compute)
        assert compute.calls == before + 1
        assert found.shape == (count, 2)


@pytest.mark.parametrize("damage", [b"", b"no tensors here", None])
def test_an_unreadable_file_is_computed_anew(cache, damage) -> None:
    policy = problems.causal_lm("lora")
    data = policy.encode(models.pairs(4))
    compute = Counting()
    first = reference_log_probs(policy, data, compute)
    (path,) = cache.iterdir()
    path.write_bytes(path.read_bytes()[:-3] if damage is None else damage)
    assert torch.equal(reference_log_probs(policy, data, compute), first)
    assert compute.calls == 2
    assert torch.equal(reference_log_probs(policy, data, compute), first)
    assert compute.calls == 2


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("PREFMESH_CACHE", str(tmp_path / "file"))
    policy = problems.causal_lm("lora")
    data = policy.encode(models.pairs(4))
    compute = Counting()
    assert reference_log_probs(policy, data, compute).shape == (4, 2)


def test_where_it_is(monkeypatch, tmp_path) -> None:
    assert cache_directory() == tmp_path / "cache"
    monkeypatch.delenv("PREFMESH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "prefmesh"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory().parts[-2:] == (".cache", "prefmesh")
