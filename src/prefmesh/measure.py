"""What is measured at an evaluation round: of the average model, of each agent's own, per user."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefmesh.algorithms.gradients import Problem, contributions, inner, norm_sq
from prefmesh.algorithms.methods import Method
from prefmesh.algorithms.state import take
from prefmesh.evaluation.generation import Utility, Writer, kl_estimate, wins, write
from prefmesh.evaluation.scores import log_probs
from prefmesh.evaluation.settings import EvaluationSettings
from prefmesh.evaluation.statistics import group_means, worst_tenth
from prefmesh.objectives import PairLogProbs, pair_loss, rounding
from prefmesh.policies.base import Params, average
from prefmesh.preferences.census import Census
from prefmesh.preferences.division import Division
from prefmesh.preferences.pairs import Pair
from prefmesh.randomness import generator

EXACT_GRADIENT_PAIRS = 2000
"""Up to so many training pairs, `gradient_pairs: auto` takes the gradient over all of them."""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Held-out pairs under one model: rows, margins h (nats), accuracy (1, 1/2 or 0) and loss of each."""

    rows: Int[np.ndarray, " pairs"]
    margin: Float[np.ndarray, " pairs"]
    accuracy: Float[np.ndarray, " pairs"]
    loss: Float[np.ndarray, " pairs"]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One evaluation: metrics for `metrics.jsonl`, one record per user for `agents.jsonl`, and the pairs themselves."""

    metrics: dict[str, float]
    users: list[dict[str, Any]]
    average: HeldOut
    own: HeldOut


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Everything that evaluations of one run share. A process scores the pairs that it holds; what was found goes to all.

    `pairs`, `division`: what is held here. `census`: of everybody's. `training`: all training rows held here. `weights`: of
    everybody's training pairs, agent by agent, adding up to 1 (w_i / n_i for a pair of agent i). `held_before`: held-out pairs that
    come before those held here in the census. `utility`: of simulated users.
    """

    problem: Problem
    method: Method
    pairs: Sequence[Pair]
    division: Division
    census: Census
    settings: EvaluationSettings
    training: Int[np.ndarray, " pairs"]
    weights: Float[np.ndarray, " all"]
    seed: int
    held_before: int = 0
    utility: Utility | None = None
    _reference_texts: dict[tuple[int, ...], list[str]] = field(default_factory=dict)

    @property
    def gradient_sample(self) -> int | None:
        """Pairs per draw of the gradient's estimate; none: all pairs, exactly."""
        wanted = self.settings.gradient_pairs
        if wanted == "all" or (wanted == "auto" and len(self.weights) <= EXACT_GRADIENT_PAIRS):
            return None
        return EXACT_GRADIENT_PAIRS // 4 if wanted == "auto" else wanted

    def evaluate(self, theta: Params, round_: int) -> Evaluation:
        """Measure the parameters of the agents hosted here, (agents, ...), together with all processes."""
        if self._by_neighbours:
            middle = self.method.gossip(theta, round_)
            norm, loss = self._gossiped_gradient(middle, round_)
            here = self._each(middle)
        else:
            middle = self.mean(theta)
            norm, loss = norm_sq(self._added(self.contributions(middle, round_)))
            here = self.score(middle, self.held)
        own = here if self._one_row(theta) else self._each(theta, here)
        shared, own = self._everybodys(here, own)
        found = summarized(
            self.census,
            shared,
            own,
            loss=loss,
            norm=norm,
            beta=self.problem.objective.beta,
            one_policy=self.method.one_policy,
        )
        if not len(self.census.held_out.row):
            return found
        # A diverged policy has no distribution to sample; its loss says so.
        if self.settings.samples > 0 and bool(np.isfinite(loss)) and isinstance(self.problem.policy, Writer):
            one = self.method.one_policy and not self._by_neighbours
            row = middle if self.method.one_policy else theta
            found.metrics.update(
                self._written_by_one(row, found.users) if one else self._written_by_each(row, found.users)
            )
        return found

    def contributions(self, mean: Params, round_: int) -> list[tuple[float, Params]]:
        """What the pairs held here add to the global objective and its gradient (see `gradients.contributions`)."""
        return contributions(
            self.problem,
            mean,
            self.training,
            self.weights,
            sample=self.gradient_sample,
            random=generator(self.seed, "gradient", round_),
            before=int(self.census.sizes[: self._first].sum()),
        )

    def _added(self, own: list[tuple[float, Params]]) -> list[tuple[float, Params]]:
        """Everybody's."""
        mesh = self.method.mesh
        return [(float(mesh.group.total(np.array([loss]))[0]), mesh.add(gradient)) for loss, gradient in own]

    @property
    def _by_neighbours(self) -> bool:
        return self.method.neighbour_mixes is not None

    def _gossiped_gradient(self, middle: Params, round_: int) -> tuple[float, float]:
        """||grad f||^2 and f without an average over all: every agent hosted here takes its part N w_i grad f_i at its own
        `middle` (hosted, ...), neighbours mix those parts, and the squared norms of what each has then are averaged.

        As `norm_sq` for two draws. Unlike a sum over all, mixes that end too early leave parts of users in the norm.
        """
        agents, group = self.method.agents, self.method.mesh.group
        first = np.cumsum([0, *self.census.sizes])[self._first :]
        found = [
            contributions(
                self.problem,
                take(middle, np.array([i])),
                agent.train,
                self.weights,
                sample=self.gradient_sample,
                random=generator(self.seed, "gradient", round_),
                before=int(first[i]),
            )
            for i, agent in enumerate(self.division.agents)
        ]
        mixed = []
        for draw in zip(*found, strict=True):
            rows = {name: agents * torch.cat([part[name] for _, part in draw]) for name in middle}
            mixed.append(self.method.gossip(rows, round_))
        total = sum(loss for one in found for loss, _ in one) / len(mixed)
        norm, loss = group.total(np.array([inner(mixed[0], mixed[-1]) / agents, total]))
        return float(norm), float(loss)

    def mean(self, theta: Params) -> Params:
        """The average model (1, ...) of all agents, here or elsewhere."""
        if self._one_row(theta):
            return average(theta)
        return self.method.mesh.mean(theta, self.method.agents)

    def score(self, row: Params, rows: Int[np.ndarray, " pairs"]) -> HeldOut:
        """Held-out pairs under one model."""
        nothing = np.zeros(0)
        if not len(rows):
            return HeldOut(rows=rows, margin=nothing, accuracy=nothing, loss=nothing)
        return score(self.problem, row, rows)

    @property
    def _first(self) -> int:
        """The first agent whose pairs are held here."""
        return self.method.mesh.first if self.method.mesh.group.size > 1 else 0

    @property
    def held(self) -> Int[np.ndarray, " pairs"]:
        """Held-out rows that are held here; they follow each other in the census."""
        return np.concatenate(
            [*(a.held_out for a in self.division.agents), self.division.unassigned_held_out]
        )

    def differ(self, theta: Params) -> bool:
        """Whether agents have parameters of their own."""
        return not self._one_row(theta)

    def _one_row(self, theta: Params) -> bool:
        if self.method.one_row or self.method.agents == 1:
            return True
        return self.method.mesh.group.size == 1 and all(tensor.stride(0) == 0 for tensor in theta.values())

    def _each(self, theta: Params, shared: HeldOut | None = None) -> HeldOut:
        """Each agent's row on its own held-out pairs; pairs of no agent keep the figures in `shared`, or have those under the last
        agent's row."""
        pairs = [agent.held_out for agent in self.division.agents]
        parts = [self.score(take(theta, np.array([i])), own) for i, own in enumerate(pairs)]
        nobodys, place = self.division.unassigned_held_out, sum(map(len, pairs))
        if shared is None:
            parts.append(self.score(take(theta, np.array([len(pairs) - 1])), nobodys))
        else:
            parts.append(HeldOut(**{name: values[place:] for name, values in vars(shared).items()}))
        return HeldOut(**{name: np.concatenate([getattr(p, name) for p in parts]) for name in vars(parts[0])})

    def _everybodys(self, *found: HeldOut) -> list[HeldOut]:
        """The same of all processes' pairs, in the census' order; rows are then those of the pool."""
        names = ("margin", "accuracy", "loss")
        columns = np.stack([getattr(one, name) for one in found for name in names], axis=1)
        columns = self.method.mesh.group.gather(columns)
        return [
            HeldOut(
                rows=self.census.held_out.row, **{name: columns[:, 3 * k + j] for j, name in enumerate(names)}
            )
            for k in range(len(found))
        ]

    def _written_by_one(self, row: Params, users: list[dict[str, Any]]) -> dict[str, float]:
        """KL to the reference on own samples, and the true win rate, of the one policy."""
        chosen, judged = self._prompts(np.arange(len(self.census.held_out.row))), np.zeros((len(users), 2))
        log_ratio = self._write(row, chosen, judged, users)
        kl, error = kl_estimate(self.method.mesh.group.gather(log_ratio[:, None])[:, 0])
        return {"eval/kl": kl, "eval/kl_stderr": error} | self._judged(judged, users)

    def _written_by_each(self, theta: Params, users: list[dict[str, Any]]) -> dict[str, float]:
        """The same averaged over agents' rows, each on its own prompts."""
        held, found, judged = self.census.held_out, [], np.zeros((len(users), 2))
        for i in range(len(self.division.agents)):
            agent = self._first + i
            chosen = self._prompts(np.flatnonzero(held.agent == agent), share=self.method.agents)
            if len(chosen):
                own = [record if record["agent"] == agent else None for record in users]
                row = take(theta, np.array([i]))
                found.append(kl_estimate(self._write(row, chosen, judged, own, agent)))
        every = self.method.mesh.group.gather(np.array(found).reshape(-1, 2))
        if not len(every):  # whole users are held out: what is held out is no agent's own
            return {}
        # Agents wrote independently: the error of the mean of their means.
        kl, error = float(every[:, 0].mean()), float(np.sqrt(np.nansum(every[:, 1] ** 2)) / len(every))
        return {"eval/kl": kl, "eval/kl_stderr": error} | self._judged(judged, users)

    def _judged(
        self, judged: Float[np.ndarray, "records 2"], users: list[dict[str, Any]]
    ) -> dict[str, float]:
        """Everybody's prompts that were won, and prompts, into the users' records; the mean win rate."""
        won, of = self.method.mesh.group.total(judged.reshape(-1)).reshape(-1, 2).T
        for record, w, n in zip(users, won, of, strict=True):
            if n:
                record["win_rate"] = float(w / n)
        rates = [record["win_rate"] for record in users if "win_rate" in record]
        return {"eval/win_rate": float(np.mean(rates))} if rates else {}

    def _prompts(self, pool: Int[np.ndarray, " pool"], share: int = 1) -> Int[np.ndarray, " prompts"]:
        """Held-out pairs (places in the census) of up to `samples` distinct prompts, the same at every round; at least 8 for
        one of many agents."""
        _, first = np.unique(self.census.held_out.prompt[pool], return_index=True)
        pool = pool[np.sort(first)]
        count = min(len(pool), max(8, self.settings.samples // share) if share > 1 else self.settings.samples)
        return np.sort(generator(self.seed, "prompts").permutation(pool)[:count])

    def _write(
        self,
        row: Params,
        chosen: Int[np.ndarray, " prompts"],
        judged: Float[np.ndarray, "records 2"],
        records: Sequence[dict[str, Any] | None],
        *index: int,
    ) -> Float[np.ndarray, " own"]:
        """Write for those of the chosen prompts that are held here, and let users judge; the log ratios of what was written."""
        policy: Writer = self.problem.policy  # type: ignore[assignment]
        before = self.held_before
        own = (chosen >= before) & (chosen < before + len(self.held))
        prompts = [self.pairs[i].prompt for i in self.held[chosen[own] - before]]
        shape = (len(chosen), self.settings.max_new_tokens)
        # One generator draws for all prompts, whichever process holds them.
        written = write(policy, row, prompts, generator(self.seed, "write", *index).random(shape)[own])
        if self.utility is not None:
            key = tuple(chosen.tolist())
            if key not in self._reference_texts:
                # Other numbers than the policy's: the two answers to a prompt are independent draws.
                uniform = generator(self.seed, "write reference").random(shape)[own]
                self._reference_texts[key] = write(policy, {}, prompts, uniform).texts
            for place, record in enumerate(records):
                if record is not None and prompts:
                    won = wins(self.utility, record["user"], written.texts, self._reference_texts[key])
                    judged[place] += won, len(prompts)
        return written.log_ratio


def summarized(
    census: Census, shared: HeldOut, own: HeldOut, *, loss: float, norm: float, beta: float, one_policy: bool
) -> Evaluation:
    """An evaluation from everybody's held-out pairs under the average model and under agents' own."""
    metrics = {"train_loss": loss, "grad_norm_sq": norm}
    if not len(census.held_out.row):
        return Evaluation(metrics=metrics, users=[], average=shared, own=own)
    users = _users(census, shared, own, beta)
    own_ = "" if one_policy else "own_"
    losses = [user[f"{own_}loss"] for user in users]
    metrics |= {
        "eval/loss": float(shared.loss.mean()),
        "eval/rewards/accuracies": float(shared.accuracy.mean()),
        "eval/rewards/margins": beta * float(shared.margin.mean()),
        "eval/accuracy_worst_tenth": worst_tenth([user[f"{own_}accuracy"] for user in users]),
        "eval/users/loss_gap": max(losses) - float(np.mean(losses)),
        "eval/own/rewards/accuracies": float(own.accuracy.mean()),
        "eval/own/loss": float(own.loss.mean()),
        "eval/own/rewards/margins": beta * float(own.margin.mean()),
    }
    return Evaluation(metrics=metrics, users=users, average=shared, own=own)


def _users(census: Census, shared: HeldOut, own: HeldOut, beta: float) -> list[dict[str, Any]]:
    """One record per user with held-out pairs, and per agent where a user's pairs lie with several."""
    held = census.held_out
    keys = np.array([f"{i:06d}\t{census.users[user]}" for i, user in zip(held.agent, held.user, strict=True)])
    accuracy, own_accuracy = group_means(shared.accuracy, keys), group_means(own.accuracy, keys)
    margin = group_means(shared.margin, keys)
    loss, own_loss = group_means(shared.loss, keys), group_means(own.loss, keys)
    records = []
    for key, (mean, count) in accuracy.items():
        number, _, user = key.partition("\t")
        i = int(number)
        records.append(
            {
                "agent": i if i >= 0 else None,
                "agent_name": census.names[i] if i >= 0 else None,
                "user": user,
                "pairs": count,
                "accuracy": mean,
                "margin": beta * margin[key][0],
                "own_accuracy": own_accuracy[key][0],
                "loss": loss[key][0],
                "own_loss": own_loss[key][0],
            }
        )
    return records


def score(problem: Problem, row: Params, rows: Int[np.ndarray, " pairs"]) -> HeldOut:
    """Pairs under one model `row` (1, ...): margins, accuracy and loss, in float64; each pair is a batch of its own (see `pair_loss`)."""
    both = log_probs(problem.policy, row, problem.data, rows).double()
    index = torch.as_tensor(rows, device=problem.reference.device)
    reference = problem.reference[index].double()
    tokens = torch.as_tensor(problem.data.completion_tokens[rows], device=both.device)
    found = PairLogProbs(
        chosen=both[None, :, 0],
        rejected=both[None, :, 1],
        ref_chosen=reference[None, :, 0],
        ref_rejected=reference[None, :, 1],
        chosen_tokens=tokens[None, :, 0],
        rejected_tokens=tokens[None, :, 1],
    )

    def flat(values: Tensor) -> Float[np.ndarray, " pairs"]:
        return values[0].cpu().numpy()

    return HeldOut(
        rows=rows,
        margin=flat(found.margin),
        accuracy=flat(found.accuracy(rounding(problem.policy.dtype))),
        loss=flat(pair_loss(found, problem.objective, alone=True)),
    )
