"""The rivals that people write themselves: one model object per agent, one agent after the other.

`Naive`: one sequence per forward pass, the reference scored anew at every step (arXiv 2605.20696's script does so).
`Peft`: a padded batch per agent, the reference scored once. Both take the logits of all positions, `torch.optim` per agent,
and mix state dicts tensor by tensor. With `policy.train: lora` each agent's model carries PEFT's own adapter.
"""

import copy
from abc import abstractmethod
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from prefmesh.algorithms.methods.dec_dpo import DecDPO
from prefmesh.algorithms.methods.fed_dpo import FedDPO
from prefmesh.algorithms.optimizers import OptimizerSettings, learning_rate
from prefmesh.bench.contest import RoundByRound
from prefmesh.bench.ours import batches
from prefmesh.bench.plain import language_model, plain_model, sits_out
from prefmesh.errors import InputError
from prefmesh.experiment import Experiment
from prefmesh.objectives import PairLogProbs, pair_loss


class Loop(RoundByRound):
    """N agents, each with a model and an optimiser of its own."""

    def __init__(self, experiment: Experiment):
        self.experiment = experiment
        self.problem = experiment.learner.problem
        self.device = self.problem.policy.device
        self.reference = plain_model(experiment, adapter=False).requires_grad_(False)
        start = plain_model(experiment, adapter=experiment.config.policy.train == "lora")  # type: ignore[union-attr]
        self.models = [copy.deepcopy(start) for _ in range(experiment.method.agents)]
        self.optimizers = [self._optimizer(model) for model in self.models]

    @staticmethod
    def check(experiment: Experiment) -> None:
        """Raise `InputError` for an experiment that no such loop does."""
        language_model(experiment)
        method = experiment.method
        partial = sits_out(method)
        if partial or method.settings.name not in ("fed_dpo", "dec_dpo", "local_only", "centralized"):
            raise InputError(
                f"--against: {method.settings.name}{' with participation or staleness' * bool(partial)} found; "
                "allowed: fed_dpo with all agents and no staleness, dec_dpo, local_only, centralized"
            )
        if not bool((method.update_scale == 1).all()):
            raise InputError("--against: objective.weights by_size found; allowed: uniform")

    @abstractmethod
    def log_probs(self, model: nn.Module, rows: np.ndarray) -> PairLogProbs:
        """Of the pairs `rows` (pairs,), each field (1, pairs), in nats."""

    def round(self, round_: int) -> float:
        """Every agent's local steps, then mixing."""
        learner = self.experiment.learner
        rows, weights = batches(learner, round_, np.arange(len(self.models)))
        lr = learning_rate(learner.optimizer, round_, learner.method.settings.rounds)
        if learner.optimizer.state == "reset":
            self.optimizers = [self._optimizer(model) for model in self.models]
        losses = [
            self._step(agent, lr, rows[agent, step], torch.as_tensor(weights[agent, step]))
            for agent in range(len(self.models))
            for step in range(rows.shape[1])
        ]
        if (matrix := self._matrix(round_)) is not None:
            self._mix(matrix)
        return sum(losses) / len(losses)

    def _step(self, agent: int, lr: float, rows: np.ndarray, weights: Tensor) -> float:
        model, optimizer = self.models[agent], self.optimizers[agent]
        weights = weights.to(self.problem.reference)
        log_probs = replace(self.log_probs(model, rows), weights=weights[None])
        loss = pair_loss(log_probs, self.problem.objective)[0] @ weights
        optimizer.zero_grad()
        loss.backward()
        if (limit := self.experiment.learner.optimizer.max_grad_norm) is not None:
            nn.utils.clip_grad_norm_(_trained(model).values(), limit)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        return float(loss.detach())

    def _optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        settings: OptimizerSettings = self.experiment.learner.optimizer
        parameters = list(_trained(model).values())
        decay = settings.weight_decay
        if settings.name == "sgd":
            return torch.optim.SGD(parameters, settings.lr, momentum=settings.momentum, weight_decay=decay)
        beta1, beta2 = settings.betas
        return torch.optim.AdamW(
            parameters, settings.lr, betas=(beta1, beta2), eps=settings.eps, weight_decay=decay
        )

    def _matrix(self, round_: int) -> Float[np.ndarray, "agents agents"] | None:
        """Who takes how much of whom; none where nothing is mixed."""
        method = self.experiment.method
        if isinstance(method, FedDPO):
            return np.full((method.agents, method.agents), 1 / method.agents)
        return method.matrix(round_).toarray() if isinstance(method, DecDPO) else None

    @torch.no_grad()
    def _mix(self, matrix: Float[np.ndarray, "agents agents"]) -> None:
        states = [{name: p.clone() for name, p in _trained(model).items()} for model in self.models]
        for weights, model in zip(matrix, self.models, strict=True):
            taken = [(float(w), states[j]) for j, w in enumerate(weights) if w]
            for name, parameter in _trained(model).items():
                parameter.copy_(sum(w * state[name] for w, state in taken))  # type: ignore[arg-type]

    def _gathered(
        self, chosen: Tensor, rejected: Tensor, reference: Tensor, rows: np.ndarray
    ) -> PairLogProbs:
        tokens = torch.as_tensor(self.problem.data.completion_tokens[rows], device=chosen.device)
        fields = (chosen, rejected, reference[:, 0], reference[:, 1], tokens[:, 0], tokens[:, 1])
        names = ("chosen", "rejected", "ref_chosen", "ref_rejected", "chosen_tokens", "rejected_tokens")
        return PairLogProbs(**{name: field[None] for name, field in zip(names, fields, strict=True)})


class Naive(Loop):
    """One sequence per forward pass: four a pair."""

    def log_probs(self, model: nn.Module, rows: np.ndarray) -> PairLogProbs:
        """Policy and reference, pair by pair."""
        own, frozen = [], []
        for prompt, *completions in _token_ids(self.problem.data, rows):
            own.append(torch.stack([_log_probs(model, [prompt], [c])[0] for c in completions]))
            with torch.no_grad():
                frozen.append(
                    torch.stack([_log_probs(self.reference, [prompt], [c])[0] for c in completions])
                )
        both = torch.stack(own)
        return self._gathered(both[:, 0], both[:, 1], torch.stack(frozen), rows)


class Peft(Loop):
    """One padded batch per agent: its chosen and its rejected completions behind their prompts."""

    def log_probs(self, model: nn.Module, rows: np.ndarray) -> PairLogProbs:
        """The policy's; the reference's are known."""
        triples = _token_ids(self.problem.data, rows)
        prompts = [t[0] for t in triples]
        found = _log_probs(model, prompts * 2, [t[1] for t in triples] + [t[2] for t in triples])
        chosen, rejected = found.chunk(2)
        return self._gathered(chosen, rejected, self.problem.reference[torch.as_tensor(rows)], rows)


def _token_ids(data: Any, rows: np.ndarray) -> list[tuple[list[int], list[int], list[int]]]:
    return [(data.prompt[i], data.chosen[i], data.rejected[i]) for i in rows.tolist()]


def _log_probs(model: nn.Module, prompts: list[list[int]], completions: list[list[int]]) -> Tensor:
    """log pi(completion | prompt) in nats, from the logits of whole sequences padded at the right."""
    device = next(model.parameters()).device
    sequences = [torch.tensor(p + c) for p, c in zip(prompts, completions, strict=True)]
    ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True).to(device)
    lengths = torch.tensor([len(s) for s in sequences])[:, None]
    place = torch.arange(ids.shape[1])
    mask = (place < lengths).to(device)
    scored = mask & (place >= torch.tensor([len(p) for p in prompts])[:, None]).to(device)
    logits = model(input_ids=ids, attention_mask=mask.long()).logits[:, :-1]
    each = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return (each * scored[:, 1:]).sum(1)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
