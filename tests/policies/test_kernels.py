"""Faster operations give what torch's own give."""

import copy

import pytest
import torch
from transformers.activations import GELUTanh, NewGELUActivation
from transformers.pytorch_utils import Conv1D

from prefmesh.policies import kernels
from tests import models


def both(build):
    """A module and its quickened copy, with equal parameters."""
    plain = torch.nn.Sequential(build())
    fast = copy.deepcopy(plain)
    kernels.quicken(fast)
    return plain, fast


@pytest.fixture(params=[True, False], ids=["oneDNN", "torch"])
def preferred(request, monkeypatch):
    """With oneDNN's product and with torch's own, whatever this machine prefers."""
    if request.param and not kernels.ONEDNN:
        pytest.skip("torch was built without oneDNN")
    monkeypatch.setattr(kernels, "PREFERRED", request.param)
    monkeypatch.setattr(kernels, "LEAST_PRODUCT", 0)


@pytest.mark.usefixtures("preferred")
@pytest.mark.skipif(not kernels.ONEDNN, reason="torch was built without oneDNN")
@pytest.mark.parametrize(
    "build",
    [
        lambda: torch.nn.Linear(24, 40),
        lambda: torch.nn.Linear(24, 40, bias=False),
        lambda: Conv1D(40, 24),
        NewGELUActivation,
        GELUTanh,
    ],
)
def test_values_and_gradients_are_torchs(build):
    """Three-dimensional inputs; the derivative with respect to inputs, weight and bias."""
    torch.manual_seed(0)
    plain, fast = both(build)
    assert type(plain[0]) is not type(fast[0])
    x = torch.randn(3, 5, 24)
    towards = torch.randn_like(plain(x))
    found = []
    for module in (plain, fast):
        leaf = x.clone().requires_grad_()
        value = module(leaf)
        gradients = torch.autograd.grad((value * towards).sum(), [leaf, *module.parameters()])
        found.append([value, *gradients])
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not kernels.ONEDNN, reason="torch was built without oneDNN")
@pytest.mark.parametrize(("rows", "by_onednn"), [(5, False), (50, True)])
def test_small_products_are_torchs_own(rows, by_onednn, monkeypatch):
    """So many multiplications that oneDNN would compile for longer than they take."""
    monkeypatch.setattr(kernels, "PREFERRED", True)
    monkeypatch.setattr(kernels, "LEAST_PRODUCT", 10 * 24 * 40)
    taken = []
    monkeypatch.setattr(kernels, "product", lambda x, w, b: taken.append(len(x)) or x @ w.t() + b)
    _, fast = both(lambda: torch.nn.Linear(24, 40))
    with torch.no_grad():
        fast(torch.randn(rows, 24))
    assert taken == [rows] * by_onednn


@pytest.mark.parametrize("build", [lambda: torch.nn.Linear(24, 40), lambda: Conv1D(40, 24)])
def test_other_precisions_are_left_to_torch(build):
    """float64 is bit for bit torch's own."""
    plain, fast = both(build)
    x = torch.randn(3, 24, dtype=torch.float64)
    assert torch.equal(plain.double()(x), fast.double()(x))


@pytest.mark.usefixtures("preferred")
def test_a_frozen_weight_keeps_no_inputs():
    """What LoRA's memory rests on: the backward pass of a frozen layer needs its weight alone."""
    _, fast = both(lambda: torch.nn.Linear(24, 40))
    fast.requires_grad_(False)
    x = torch.randn(3, 24, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fast(x)
    assert all(tensor.shape != x.shape for tensor in kept)


def test_names_and_values_of_parameters_stay():
    """A quickened model saves as before."""
    plain = models.model("gpt2")
    fast = copy.deepcopy(plain)
    kernels.quicken(fast)
    assert {k: v.tolist() for k, v in plain.state_dict().items()} == {
        k: v.tolist() for k, v in fast.state_dict().items()
    }


@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, 50)])
@pytest.mark.parametrize(("positions", "tokens"), [(1, 1), (3, 16), (7, 17), (4096, 4096)])
def test_frozen_head_gives_cross_entropys_values_and_slopes(bias, positions, tokens, monkeypatch):
    """Against torch's own, in float64, whatever the blocks, with a different weight on each position."""
    monkeypatch.setattr(kernels, "HEAD_POSITIONS", positions)
    monkeypatch.setattr(kernels, "HEAD_TOKENS", tokens)
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 12, dtype=torch.float64), torch.randn(50, 12, dtype=torch.float64)
    targets, towards = torch.randint(50, (7,)), torch.randn(7, dtype=torch.float64)
    bias = None if bias is None else bias.double()
    ours, torchs = (hidden.clone().requires_grad_() for _ in range(2))
    found = kernels.frozen_head_log_probs(ours, weight, bias, targets)
    logits = torch.nn.functional.linear(torchs, weight, bias)
    expected = -torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad((found * towards).sum(), ours),
        torch.autograd.grad((expected * towards).sum(), torchs),
        rtol=1e-12,
        atol=1e-12,
    )
    assert torch.autograd.gradgradcheck(
        lambda h: kernels.frozen_head_log_probs(h, weight, bias, targets), ours, towards
    )


def test_an_impossible_token_keeps_its_log_probability():
    """A probability below the smallest float32 is still a finite log-probability."""
    hidden = torch.tensor([[300.0]])
    found = kernels.frozen_head_log_probs(hidden, torch.tensor([[1.0], [-1.0]]), None, torch.tensor([1]))
    assert found.item() == pytest.approx(-600)


@pytest.mark.parametrize("likely", [0, 5])
def test_blocks_of_the_vocabulary_that_weigh_nothing_change_nothing(likely, monkeypatch):
    """One block holds all of the probability, before or after the others; exp(1000) is no float."""
    monkeypatch.setattr(kernels, "HEAD_TOKENS", 2)
    weight = torch.zeros(6, 1)
    weight[likely] = 1
    hidden = torch.tensor([[1000.0]], requires_grad=True)
    found = kernels.frozen_head_log_probs(hidden, weight, None, torch.tensor([likely]))
    assert found.item() == 0
    assert torch.autograd.grad(found.sum(), hidden)[0].item() == 0


def test_gelus_derivatives_are_its_own() -> None:
    """The first and the second, against finite differences."""
    x = torch.linspace(-4, 4, 33, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(kernels.GELU(), x)
    assert torch.autograd.gradgradcheck(kernels.GELU(), x)


def test_gelu_far_from_zero_and_in_half_precision() -> None:
    far = torch.tensor([-1e4, -30.0, 30.0, 1e4])
    assert kernels.GELU()(far).tolist() == [0.0, 0.0, 30.0, 1e4]
    half = torch.linspace(-4, 4, 33, dtype=torch.bfloat16)
    expected = torch.nn.functional.gelu(half, approximate="tanh")
    assert torch.equal(kernels.GELU()(half), expected)


@pytest.mark.parametrize("scale", ["a number", "row by row"])
@pytest.mark.parametrize("onto", [True, False])
def test_low_rank_is_its_formula_with_its_derivatives(onto: bool, scale: str) -> None:
    """The first and the second derivative against finite differences, where A or x may be frozen, too."""
    torch.manual_seed(0)
    x, a, b, y = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 3, 4), (2, 2, 4), (2, 5, 2), (2, 3, 5))
    )
    by = torch.tensor([[[1.0, 0.0, 2.0]], [[0.5, 1.0, 0.0]]]).double() if scale == "row by row" else 1.5
    under = y if onto else None
    rows = by.mT if isinstance(by, torch.Tensor) else by
    expected = rows * (x @ a.mT @ b.mT) + (y if onto else 0)
    torch.testing.assert_close(kernels.low_rank(x, a, b, by, under), expected)

    def of(*tensors: torch.Tensor) -> torch.Tensor:
        return kernels.low_rank(*tensors[:3], by, tensors[3] if onto else None)

    leaves = (x, a, b, y) if onto else (x, a, b)
    assert torch.autograd.gradcheck(of, leaves)
    assert torch.autograd.gradgradcheck(of, leaves)
    frozen = (x.detach(), a.detach(), b)
    assert torch.autograd.gradcheck(lambda b: kernels.low_rank(*frozen[:2], b, by), (b,))
