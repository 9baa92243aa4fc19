"""Flower's robust aggregation in place of the mean: what the rules find is the server's next model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from prefmesh.errors import InputError, PeerLost
from tests.flower.local import LocalSites
from tests.flower.test_remote import FED, go
from tests.runs import TOWN, config

pytest.importorskip("flwr", reason="flwr is not installed (extra: flower)")

from prefmesh.flower.aggregation import aggregation

ENDS = {
    "a": torch.tensor([[[0.0, 1.0]], [[1.0, 3.0]], [[2.0, 2.0]], [[900.0, -900.0]], [[1.5, 2.5]]]),
    "b": torch.tensor([[1.0], [1.1], [1.2], [50.0], [1.15]], dtype=torch.float64),
}


def test_rules_by_hand() -> None:
    median = aggregation("median", 1)
    trimmed = aggregation("trimmed-mean", 1)
    krum = aggregation("krum", 1)
    assert median is not None
    assert trimmed is not None
    assert krum is not None
    for name, ends in ENDS.items():
        sorted_ = np.sort(ends.numpy(), axis=0)
        np.testing.assert_allclose(median(ENDS)[name], sorted_[2:3])
        np.testing.assert_allclose(trimmed(ENDS)[name], sorted_[1:4].mean(0, keepdims=True), rtol=1e-6)
        # The answer that is nearest to its two nearest ones, over all tensors: the last.
        np.testing.assert_allclose(krum(ENDS)[name], ends[4:])
        assert krum(ENDS)[name].dtype == ends.dtype


def test_a_run_whose_server_takes_the_median(tmp_path: Path) -> None:
    settings = config(TOWN, method={**FED, "rounds": 1})
    sites = LocalSites(settings, tmp_path / "memory")
    experiment = sites.experiment(aggregate=aggregation("median", 1))
    go(sites, tmp_path / "run", experiment=experiment)
    theta = experiment.start
    ends = [sites.site(agent).train(1, 0, theta)[0] for agent in range(4)]
    found = load_file(tmp_path / "run" / "policy" / "policy.safetensors")
    for name in theta:
        expected = np.median(torch.cat([end[name] for end in ends]).numpy(), axis=0)
        np.testing.assert_allclose(found[name], expected, atol=1e-6)


def test_refusals(tmp_path: Path) -> None:
    assert aggregation("mean", 0) is None
    with pytest.raises(InputError, match="aggregation: unknown name 'krumm'; did you mean 'krum'"):
        aggregation("krumm", 1)
    with pytest.raises(InputError, match="malicious: found 0; allowed with aggregation krum: at least 1"):
        aggregation("krum", 0)
    rule = aggregation("bulyan", 1)
    assert rule is not None
    with pytest.raises(PeerLost, match="bulyan got 5 answers; allowed with malicious 1: at least 7"):
        rule(ENDS)
    weighted = config(TOWN | {"objective": {"weights": "by_size"}}, method=FED)
    with pytest.raises(InputError, match=r"objective\.weights: by_size"):
        LocalSites(weighted, tmp_path).experiment(aggregate=rule)
