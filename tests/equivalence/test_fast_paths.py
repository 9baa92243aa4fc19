"""Every fast path on, off and mixed: rounds end at the same parameters."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefmesh.algorithms.gradients import Problem
from prefmesh.policies import kernels
from prefmesh.policies.causal_lm import CausalLMPolicy
from tests import problems

METHODS = [{"name": "dec_dpo", "graph": "path"}, {"name": "fed_dpo"}, {"name": "local_only"}]
OPTIMIZERS = {
    "sgd": {"name": "sgd", "lr": 0.5},
    # eps above rounding: a gradient that is zero but for rounding would else become a step of its own size.
    "adamw": {"name": "adamw", "lr": 0.05, "eps": 1e-3},
    "reset, clipped": {"name": "adamw", "lr": 0.05, "eps": 1e-3, "state": "reset", "max_grad_norm": 0.1},
}


def ended(train, family, dtype, sizes, method, optimizer, paths):
    """The parameters after two rounds of two steps."""
    policy = problems.causal_lm(train, family, dtype=dtype, checkpointing=paths["checkpointing"])
    policy.packs, policy._head_is_plain = paths["packs"], paths["fused head"]
    given_ = problems.problem(f"{train}/{family}", 24, dtype)
    on = Problem(policy=policy, data=given_.data, reference=given_.reference, objective=given_.objective)
    learner = problems.learner(
        on, sizes, method | {"rounds": 2, "local_steps": 2}, OPTIMIZERS[optimizer] | {"batch_size": 2},
        agents_per_pass=paths["chunk"],
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "PREFERRED", paths["oneDNN"] and kernels.ONEDNN)
        patch.setattr(kernels, "LEAST_PRODUCT", 0)
        patch.setattr(kernels, "HEAD_TOKENS", paths["block"])
        patch.setattr(CausalLMPolicy, "tokens_per_call", paths["group"])
        return problems.go(learner)[0].theta


SLOW = {
    "packs": False, "fused head": False, "checkpointing": False, "oneDNN": False, "chunk": 1, "block": 4096, "group": 10**6,
}  # fmt: skip


@pytest.mark.parametrize(
    ("train", "family", "dtype", "tolerance"),
    [
        ("lora", "gpt2", "float64", 1e-9),
        ("lora", "qwen2", "float64", 1e-6),  # norms in float32
        ("lora", "gpt2", "float32", 2e-4),
        ("full", "gpt2", "float64", 1e-9),
        ("full", "llama", "float64", 1e-5),  # norms in float32
    ],
)
@settings(max_examples=12, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=2, max_size=4),
    method=st.sampled_from(METHODS),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    paths=st.fixed_dictionaries(
        {name: st.booleans() for name in ("packs", "fused head", "checkpointing", "oneDNN")}
        | {
            "chunk": st.integers(1, 4),
            "block": st.sampled_from([7, 4096]),
            "group": st.sampled_from([1, 40, 10**6]),
        }
    ),
)
def test_mixed_paths_end_where_the_slow_one_does(
    train, family, dtype, tolerance, sizes, method, optimizer, paths
) -> None:
    slow, fast = (ended(train, family, dtype, sizes, method, optimizer, chosen) for chosen in (SLOW, paths))
    for name, expected in slow.items():
        np.testing.assert_allclose(fast[name].numpy(), expected.numpy(), rtol=0, atol=tolerance)
