"""Our log-probabilities and losses, against TRL's `DPOTrainer` on the same texts: tokenised, padded and scored by TRL."""

import copy
import inspect
import re
import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from prefmesh.algorithms.gradients import loss_and_gradient
from prefmesh.measure import score
from prefmesh.objectives import LOSSES, ObjectiveSettings, PairLogProbs, pair_loss
from prefmesh.policies.base import Params
from prefmesh.policies.causal_lm import CausalLMPolicy
from tests import models, problems

PAIRS = 7
BETA = 0.2
OBJECTIVES: list[dict[str, Any]] = [
    {"loss_type": "sigmoid"},
    {"loss_type": "hinge"},
    {"loss_type": "ipo"},
    {"loss_type": "robust", "label_smoothing": 0.1},
    {"loss_type": "robust"},
    {"loss_type": "sigmoid_norm"},
    {"loss_type": "exo_pair", "label_smoothing": 0.01},
    {"loss_type": "discopop"},
    {"loss_type": "discopop", "discopop_tau": 0.5},
    {"loss_type": "nca_pair"},
    {"loss_type": "bco_pair"},
    {"loss_type": "sppo_hard"},
    {"loss_type": "apo_zero"},
    {"loss_type": "apo_down"},
    {"loss_type": "aot"},
    {"loss_type": "aot", "label_smoothing": 0.1},
    {"loss_type": "aot_unpaired"},
    {"loss_type": "aot_unpaired", "label_smoothing": 0.1},
    {"loss_type": "sft"},
    {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},  # MPO (Wang et al. 2024)
    {"loss_type": ["sigmoid", "hinge"]},
    {"loss_type": ["sigmoid", "sft"], "f_divergence_type": "js_divergence"},
    {"loss_type": "ipo", "f_divergence_type": "forward_kl"},
    {"loss_type": "sigmoid_norm", "f_divergence_type": "js_divergence"},
]
ALPHA: list[dict[str, Any]] = [
    {"loss_type": "sigmoid", "f_divergence_type": "alpha_divergence"},
    {"loss_type": "hinge", "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.5},
]
"""In float32 alone: TRL's alpha divergence knows no float64."""


def trainer(family: str, dtype: str, objective: dict[str, Any], directory) -> object:
    """A `DPOTrainer` whose policy is the model of seed 1 and whose reference is that of seed 0."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's and transformers' deprecations among themselves
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        rows = [
            {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
            for pair in models.pairs(PAIRS)
        ]
        args = DPOConfig(
            output_dir=str(directory), beta=BETA, **objective,
            use_cpu=True, report_to="none", bf16=False, gradient_checkpointing=False, max_length=None,
        )  # fmt: skip
        return DPOTrainer(
            model=models.model(family, dtype=dtype, seed=1),
            ref_model=models.model(family, dtype=dtype, seed=0),
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=copy.deepcopy(models.tokenizer()),
        )


class Unfused(torch.nn.Module):
    """TRL's fused head scores in float32 whatever the model's precision: here the plain head, at the model's own."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.inner = model

    def forward(self, labels: torch.Tensor, fused_lm_head: bool, **inputs: torch.Tensor) -> SimpleNamespace:
        assert fused_lm_head
        logits = self.inner(**inputs).logits[:, :-1]
        scored = labels[:, 1:] != -100
        picked = logits.log_softmax(-1).gather(2, labels[:, 1:, None].clamp(min=0))[..., 0]
        nothing = torch.zeros_like(picked)  # what TRL only logs
        return SimpleNamespace(
            log_probs=torch.where(scored, picked, nothing),
            entropy=nothing,
            mean_logits=nothing,
            is_top1=nothing.bool(),
        )


def trl_losses(made) -> tuple[list[float], float, dict[str, float]]:
    """The loss of each pair alone, that of all as one padded batch, and what TRL logs about these."""
    examples = [made.train_dataset[i] for i in range(PAIRS)]
    made.model.eval()
    model = made.model
    if model.dtype == torch.float64:
        model, made.ref_model = Unfused(model), Unfused(made.ref_model)
    with torch.no_grad():
        alone = [float(made._compute_loss(model, made.data_collator([one]), False)) for one in examples]
        made._metrics["eval"].clear()
        together = float(made._compute_loss(model, made.data_collator(examples), False))
    return alone, together, {key: values[-1] for key, values in made._metrics["eval"].items()}


def ours(family: str, dtype: str) -> tuple[CausalLMPolicy, Params]:
    """The policy on the model of seed 0, and the model of seed 1 as its parameters."""
    policy = problems.causal_lm("full", family, dtype=dtype)
    moved = models.model(family, dtype=dtype, seed=1)
    return policy, {name: p.detach()[None] for name, p in moved.named_parameters()}


def cases() -> list[Any]:
    """Family, objective, precision and relative tolerance."""
    double = [
        # TRL holds its label smoothing of `exo_pair` in float32.
        ("gpt2", one, "float64", 1e-6 if one["loss_type"] == "exo_pair" else 1e-9) for one in OBJECTIVES
    ]  # fmt: skip
    single = [("gpt2", one, "float32", 1e-5) for one in [*OBJECTIVES, *ALPHA]]
    others = [
        (family, {"loss_type": loss_type}, dtype, tolerance)
        for family, loss_type in (("llama", "sigmoid"), ("qwen2", "ipo"))
        for dtype, tolerance in (("float32", 1e-5), ("float64", 1e-9))
    ]
    return [
        pytest.param(*case, id=f"{case[0]}-{case[2]}-{'-'.join(map(str, case[1].values()))}")
        for case in [*double, *single, *others]
    ]


@pytest.mark.parametrize(("family", "objective", "dtype", "tolerance"), cases())
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_losses_and_log_probabilities_are_trls(family, objective, dtype, tolerance, tmp_path) -> None:
    alone, together, logged = trl_losses(trainer(family, dtype, objective, tmp_path))

    policy, row = ours(family, dtype)
    on = replace(
        problems.problem(f"full/{family}", PAIRS, dtype),
        objective=ObjectiveSettings(beta=BETA, **objective),
    )
    found = score(on, row, np.arange(PAIRS))
    # IPO's least loss is the square of a small difference of log-probabilities, whose rounding it has: on the batch's scale.
    squared = dtype == "float32" and objective["loss_type"] == "ipo"
    scale = float(np.mean(np.abs(alone))) if squared else 0.0
    assert found.loss == pytest.approx(alone, rel=tolerance, abs=tolerance * scale)
    mean = torch.full((1, PAIRS), 1 / PAIRS, dtype=getattr(torch, dtype))
    loss, _, _ = loss_and_gradient(on, row, np.arange(PAIRS)[None], mean)
    assert float(loss) == pytest.approx(together, rel=tolerance)

    chosen, rejected = policy.log_probs(row, on.data, np.arange(PAIRS)[None])
    assert float(chosen.mean()) == pytest.approx(logged["logps/chosen"], rel=tolerance)
    assert float(rejected.mean()) == pytest.approx(logged["logps/rejected"], rel=tolerance)
    assert BETA * found.margin.mean() == pytest.approx(logged["rewards/margins"], rel=10 * tolerance)
    assert found.accuracy.mean() == pytest.approx(logged["rewards/accuracies"])


def test_every_loss_is_compared_and_trl_has_no_other() -> None:
    """A new version of TRL with another loss is noticed here."""
    from trl import DPOTrainer

    names = re.findall(r'loss_type == "(\w+)"', inspect.getsource(DPOTrainer._compute_loss))
    compared = {name for one in OBJECTIVES for name in np.atleast_1d(one["loss_type"])}
    assert compared == set(names)
    assert compared <= set(LOSSES)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_tokens_are_trls(tmp_path) -> None:
    made = trainer("gpt2", "float32", {"loss_type": "sigmoid"}, tmp_path)
    data = problems.problem("full/gpt2", PAIRS, "float32").data
    for i in range(PAIRS):
        example = made.train_dataset[i]  # type: ignore[attr-defined]
        assert data.prompt[i] == example["prompt_ids"]
        assert data.chosen[i] == example["chosen_ids"]
        assert data.rejected[i] == example["rejected_ids"]


def test_a_smoothed_sigmoid_is_the_mean_over_flips() -> None:
    """TRL 1.16 smooths `sigmoid` no more; conservative DPO is the expected loss under flips (Mitchell 2023)."""
    h = torch.linspace(-5, 5, 11, dtype=torch.float64)[None]
    zero, one = torch.zeros_like(h), torch.ones_like(h, dtype=torch.int64)

    def loss(margin: torch.Tensor, smoothing: float) -> torch.Tensor:
        seen = PairLogProbs(
            chosen=margin, rejected=zero, ref_chosen=zero, ref_rejected=zero, chosen_tokens=one, rejected_tokens=one
        )  # fmt: skip
        return pair_loss(seen, ObjectiveSettings(beta=BETA, label_smoothing=smoothing))

    assert torch.allclose(loss(h, 0.2), 0.8 * loss(h, 0) + 0.2 * loss(-h, 0), rtol=1e-12)
