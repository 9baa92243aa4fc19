"""Pairs in one row against pairs in padded rows: the same log-probabilities and gradients, however they are packed."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from prefmesh.policies import packing
from prefmesh.policies.causal_lm import CausalLMPolicy
from prefmesh.policies.packing import Packed, Tree
from tests import models, problems

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def policies() -> dict[str, CausalLMPolicy]:
    return {family: problems.causal_lm("lora", family, dtype="float64") for family in ("gpt2", "llama")}


def moved(policy: CausalLMPolicy, agents: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        name: (
            t.repeat(agents, 1, 1) + 0.1 * torch.randn(agents, *t.shape[1:], dtype=t.dtype)
        ).requires_grad_()
        for name, t in policy.initial(0).items()
    }


def scored(policy, agents, trees, *, packs):
    """Scores, and the gradient of a fixed combination of them."""
    theta = moved(policy, agents)
    policy.packs = packs
    try:
        found = policy.score(theta, trees)
    finally:
        policy.packs = True
    weights = torch.linspace(-1, 2, len(found), dtype=torch.float64)
    gradient = torch.autograd.grad((found * weights).sum(), list(theta.values()))
    return found.detach(), dict(zip(theta, gradient, strict=True))


TOKENS = st.integers(2, len(models.WORDS) + 1)


@st.composite
def forests(draw) -> tuple[int, list[Tree]]:
    """A number of agents and their trees, of any lengths, with one to three completions."""
    agents, each = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    text = lambda least, most: st.lists(TOKENS, min_size=least, max_size=most)  # noqa: E731
    trees = [
        Tree(draw(text(1, 12)), tuple(draw(st.lists(text(1, 9), min_size=1, max_size=3))))
        for _ in range(agents * each)
    ]
    return agents, trees


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@settings(max_examples=25, deadline=None)
@given(forest=forests(), group_tokens=st.sampled_from([1, 20, 10**6]))
def test_it_is_the_padded_batch(policies, family, forest, group_tokens) -> None:
    policy = policies[family]
    agents, trees = forest
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CausalLMPolicy, "tokens_per_call", group_tokens)
        found, gradient = scored(policy, agents, trees, packs=True)
    alone, alone_gradient = [], {name: torch.zeros_like(t) for name, t in gradient.items()}
    theta = moved(policy, agents)
    weights = torch.linspace(-1, 2, len(found), dtype=torch.float64)
    policy.packs, place = False, 0
    try:
        for i, tree in enumerate(trees):
            agent = i // (len(trees) // agents)
            for completion in tree.completions:
                row = {name: t[agent : agent + 1] for name, t in theta.items()}
                alone.append(policy.score(row, [Tree(tree.prompt, (completion,))]))
                pieces = torch.autograd.grad(alone[-1].sum() * weights[place], list(theta.values()))
                for total, piece in zip(alone_gradient.values(), pieces, strict=True):
                    total += piece
                place += 1
    finally:
        policy.packs = True
    torch.testing.assert_close(found, torch.cat(alone).detach(), rtol=1e-9, atol=0)
    for name in gradient:
        torch.testing.assert_close(
            gradient[name], alone_gradient[name], rtol=1e-5, atol=1e-6
        )  # Llama norms in float32


def test_float32_differs_by_rounding(policies) -> None:
    """1e-6 relative, as asked."""
    policy = problems.causal_lm("lora", "llama")
    data = policy.encode(models.pairs(12))
    rows = np.arange(12)[None]
    packed = torch.stack(policy.reference_log_probs(data, rows))
    policy.packs = False
    padded = torch.stack(policy.reference_log_probs(data, rows))
    torch.testing.assert_close(packed, padded, rtol=1e-6, atol=0)


def test_a_row_holds_every_prompt_once_and_nothing_else() -> None:
    trees = [Tree([5, 6, 7], ([8, 9], [10, 11, 12])), Tree([13], ([14], [15, 16]))]
    packed = Packed.of(trees, 1, group_tokens=1, device=CPU)
    assert packed.ids.tolist() == [[5, 6, 7, 8, 10, 11, 13, 15]]
    assert packed.position.tolist() == [[0, 1, 2, 3, 3, 4, 0, 1]]
    assert packed.read.tolist() == [2, 3, 2, 4, 5, 6, 6, 7]
    assert packed.targets.tolist() == [8, 9, 10, 11, 12, 14, 15, 16]
    assert packed.counts.tolist() == [2, 3, 1, 2]
    assert len(packed.groups) == 2
    sees = packed.groups[0].sees(None)[0, 0]
    assert sees.shape == (packing.WHOLE, packing.WHOLE)
    assert bool((sees[6:] == torch.eye(packing.WHOLE)[6:].bool()).all()), "padding sees itself"
    assert not bool(sees[:6, 6:].any())
    assert sees[:6, :6].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 0, 1, 0],
        [1, 1, 1, 0, 1, 1],
    ]
    windowed = packed.groups[0].sees(2)[0, 0]
    assert windowed[5, :6].int().tolist() == [0, 0, 0, 0, 1, 1]  # positions 3, 4
    assert windowed[3, :6].int().tolist() == [0, 0, 1, 1, 0, 0]


def test_the_model_attends_as_before_afterwards(policies) -> None:
    policy = policies["llama"]
    model = policy.model
    own = model.config._attn_implementation
    packed = Packed.of([Tree([2], ([3],))], 1, group_tokens=1, device=CPU)

    def interrupted() -> None:
        with policy._reader(packed):
            assert model.config._attn_implementation == packing.NAME
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        interrupted()
    assert model.config._attn_implementation == own
    assert packing.CURRENT.get() is None


def test_eager_attention_packs_too() -> None:
    config = models.model("llama", dtype="float64").config
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()
    policy = CausalLMPolicy(made, models.tokenizer(), train="lora")
    assert policy.packs
    data = policy.encode(models.pairs(5))
    rows = np.arange(5)[None]
    packed = torch.stack(policy.reference_log_probs(data, rows))
    policy.packs = False
    # The model's softmax is float32's, of rows of another width.
    torch.testing.assert_close(packed, torch.stack(policy.reference_log_probs(data, rows)), rtol=1e-6, atol=0)
