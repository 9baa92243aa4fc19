"""From a config to the parts of an experiment: preferences, policy, problem, method, evaluator."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from prefmesh.algorithms import chunks
from prefmesh.algorithms.gradients import Problem
from prefmesh.algorithms.methods import METHODS, Method, Population
from prefmesh.algorithms.rounds import Learner
from prefmesh.algorithms.sampling import Sampler
from prefmesh.config import ExperimentConfig
from prefmesh.environment import cpu_name
from prefmesh.errors import InputError
from prefmesh.evaluation.scores import log_probs
from prefmesh.measure import Evaluator
from prefmesh.mesh import ALONE, FactoredMesh, Group, Mesh, ResidualMesh
from prefmesh.policies.base import EncodedPairs, Params, Policy
from prefmesh.policies.cache import Tensors, cached
from prefmesh.policies.causal_lm import CausalLMPolicy
from prefmesh.policies.loading import load_policy
from prefmesh.policies.reference import reference_log_probs
from prefmesh.policies.settings import LogLinearSettings, PolicySettings
from prefmesh.preferences.census import Census
from prefmesh.preferences.division import Division, divide
from prefmesh.preferences.pairs import Pair
from prefmesh.preferences.reading import ReadReport, read, select
from prefmesh.preferences.settings import PreferencesSettings
from prefmesh.preferences.texts import spoken
from prefmesh.preferences.tokens import TokenPairs
from prefmesh.preferences.town import Town
from prefmesh.threads import use_threads

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """The parts, ready for rounds. `start` is the row (1, ...) that all agents begin with.

    `pairs` and `division` are what this process keeps: all, where it hosts all agents. `census`: numbers of everybody's.
    """

    config: ExperimentConfig
    pairs: list[Pair]
    report: ReadReport | None
    division: Division
    census: Census
    policy: Policy
    method: Method
    learner: Learner
    evaluator: Evaluator
    start: Params
    town: Town | None

    @property
    def data_bytes(self) -> int:
        """UTF-8 bytes of all training pairs kept here: what centralizing them would send."""
        return training_bytes(self.pairs, self.division)


def training_bytes(pairs: list[Pair], division: Division) -> int:
    """UTF-8 bytes of the agents' training pairs."""
    training = np.concatenate([agent.train for agent in division.agents])
    texts = (text for i in training for text in (pairs[i].prompt, pairs[i].chosen, pairs[i].rejected))
    return sum(len(part.encode()) for text in texts for part in spoken(text))


def prepare(
    config: ExperimentConfig,
    say: Say = lambda _: None,
    *,
    agents_per_pass: int | None = None,
    group: Group = ALONE,
) -> Experiment:
    """Read, split, load, encode and score with the reference. Raises `InputError`; writes nothing but the cache.

    Data and model are kept for the next call that asks for the same: a sweep prepares them once. `agents_per_pass`: as it was
    where a run goes on; none: as the config says, or chosen. `group`: the processes that agents live in; each keeps its own
    agents' pairs, and where one refuses, all do. torch has the config's threads from here on.
    """
    if config.runtime.threads is not None:
        use_threads(config.runtime.threads)
    share = group.together(lambda: read_share(config, group.rank, say))
    counts = None
    if group.size > 1 and not config.preferences.shared:
        counts = group.gather(np.array([[float(len(share.division.agents))]]))[:, 0].astype(int).tolist()
        share = replace(share, census=share.census.joined(group.gather), report=None)
    method = group.together(lambda: method_of(config, share.census, counts, group))
    if group.size > 1 and config.preferences.shared:
        share = share.part(method.mesh.first, method.mesh.last)
        _load_pairs.cache_clear()  # which holds everybody's
    held = sum(len(a.held_out) for a in share.division.agents) + len(share.division.unassigned_held_out)
    before = int(group.gather(np.array([[float(held)]]))[: group.rank].sum())
    experiment = group.together(lambda: assembled(config, share, method, before, say, agents_per_pass))
    group.agree({"policy.model": experiment.policy.fingerprint()})
    fewest = int(group.gather(np.array([[float(experiment.learner.agents_per_pass)]])).min())
    return replace(experiment, learner=replace(experiment.learner, agents_per_pass=fewest))


@dataclass(frozen=True, kw_only=True)
class Share:
    """What a process has of the preferences, and the numbers of everybody's. `source`: where it read them."""

    source: PreferencesSettings
    pairs: list[Pair]
    report: ReadReport | None
    division: Division
    census: Census
    town: Town | None
    agents: tuple[int, int] | None = None
    """The first agent that is kept, and the one after the last; none: all that were read."""

    def part(self, first: int, last: int) -> "Share":
        """What is kept where agents `first` to `last` - 1 live."""
        division, kept = self.division.part(first, last)
        pairs = [self.pairs[i] for i in kept]
        return replace(self, division=division, pairs=pairs, agents=(first, last))


def read_share(config: ExperimentConfig, rank: int, say: Say) -> Share:
    """Everything that process `rank` can read, split and dealt."""
    say("reading preferences")
    source, wanted = config.preferences.of_process(rank), config.evaluation
    pairs, report, town = load_pairs(source, config.seed)
    division = divide(
        pairs, source, held_out=wanted.held_out, by=wanted.by, fold=wanted.fold, seed=config.seed
    )
    census = Census.of(pairs, division)
    return Share(source=source, pairs=pairs, report=report, division=division, census=census, town=town)


def method_of(config: ExperimentConfig, census: Census, counts: list[int] | None, group: Group) -> Method:
    """The method on its mesh. `counts`: agents of each process; none: they share them equally."""
    sizes, agents = census.sizes, len(census.sizes)
    config.method.check(agents)
    by_size = config.objective.weights == "by_size"
    weights = sizes / sizes.sum() if by_size else np.full(agents, 1 / agents)
    settings = config.method.suited(
        beta=config.objective.beta, language=not isinstance(config.policy, LogLinearSettings)
    )
    method = METHODS[settings.name](settings, Population(weights=weights, seed=config.seed))
    if config.evaluation.neighbour_mixes is not None:
        if method.matrix(1) is None:
            raise InputError(
                f"evaluation.neighbour_mixes: {config.evaluation.neighbour_mixes}, but agents of {config.method.name} have no "
                "neighbours; allowed: none, or a method of gossip such as dec_dpo"
            )
        method.neighbour_mixes = config.evaluation.neighbour_mixes
    method.mesh = _mesh_of(config, method, None if group.size == 1 else counts, group)
    if group.size > 1 and (method.agents != agents or agents < group.size):
        raise InputError(
            f"runtime.processes: {group.size}, which cannot share {config.method.name}'s {method.agents} agent(s) of "
            f"{agents} shards; allowed: 1{f' to {agents}' if method.agents == agents else ''}"
        )
    return method


def _mesh_of(config: ExperimentConfig, method: Method, counts: list[int] | None, group: Group) -> Mesh:
    """Where the method's agents live, and what is averaged there."""
    ranks = config.policy.lora_ranks
    if config.policy.lora_mixing == "alternate" and not method.in_turn:
        raise InputError(
            f"policy.lora.mixing: alternate, but {config.method.name} trains all factors in every round; allowed: factors, freeze_a"
        )
    if config.policy.lora_mixing == "product":
        _refuse_more_than_averages(method, "policy.lora.mixing: product", "factors, freeze_a, alternate")
    if config.policy.lora_mixing == "residual" and not (method.averages and method.one_row):
        raise InputError(
            f"policy.lora.mixing: residual, but {config.method.name} is no server that only averages models for all, as it is set here; "
            "allowed: factors, freeze_a, or fed_dpo or fed_prox without compression and staleness"
        )
    if ranks is not None:
        _refuse_more_than_averages(method, "policy.lora.ranks: found some", "none")
        if len(ranks.of) != method.agents:
            raise InputError(
                f"policy.lora.ranks: found {len(ranks.of)}; allowed: {method.agents}, one for each agent of {method.settings.name}"
            )
    kinds = {"product": FactoredMesh, "residual": ResidualMesh}
    kind = kinds.get(config.policy.lora_mixing or "", Mesh)
    wire = config.runtime.wire_dtype()
    mesh = kind(counts, group, wire) if counts else kind.of(method.agents, group, wire)
    mesh.ranks = ranks
    return mesh


def refuse_residuals(config: ExperimentConfig, what: str) -> None:
    """Raise `InputError` where `what` takes every tensor of Theta for one that is trained."""
    if config.policy.lora_mixing == "residual":
        raise InputError(
            f"policy.lora.mixing: residual, but {what} takes all of a model for trained; allowed: factors, freeze_a, alternate, product"
        )


def _refuse_more_than_averages(method: Method, what: str, without: str) -> None:
    """Raise `InputError` where `what` is asked of a method that does not only average models; `without`: what else is allowed."""
    if not method.averages:
        raise InputError(
            f"{what}, but {method.settings.name} does more with models than to average them, as it is set here; allowed: "
            f"{without}, or fed_dpo, fed_prox, fine_tuning, dec_dpo, local_only or centralized without compression, staleness and, "
            "without a server, weights by_size"
        )
    if method.neighbour_mixes is not None:
        raise InputError(
            f"{what}, but neighbours do not mix gradients so (evaluation.neighbour_mixes: {method.neighbour_mixes}); allowed: {without}, "
            "or no neighbour_mixes"
        )


def assembled(
    config: ExperimentConfig,
    share: Share,
    method: Method,
    held_before: int,
    say: Say,
    agents_per_pass: int | None,
) -> Experiment:
    """The parts of an experiment, with the pairs of `share`. `held_before`: see `Evaluator`."""
    pairs, division, census, first = share.pairs, share.division, share.census, method.mesh.first
    sizes, weights = census.sizes, method.population.weights
    say("loading the policy")
    policy, data, reference = encoded(config, share, say)
    problem = Problem(policy=policy, data=data, reference=reference, objective=config.objective)
    training = [agent.train for agent in division.agents]
    sampler = Sampler(training, config.optimizer, config.seed, sizes=sizes, first=first)
    learner = Learner(
        problem=problem,
        method=method,
        optimizer=config.optimizer,
        sampler=sampler,
        agents_per_pass=1,
    )
    start = policy.initial(config.seed)
    bytes_ = chunks.pass_bytes(learner, start, policy.frozen_bytes, config.runtime.memory_gb)
    # The policy may have been another config's before: what it was told then does not count.
    policy.pass_bytes = bytes_ if policy.device.type == "cuda" else min(bytes_, policy.usual_pass_bytes)
    learner = replace(
        learner, agents_per_pass=agents_per_pass or _agents_per_pass(config, learner, start, bytes_, say)
    )
    evaluator = Evaluator(
        problem=problem,
        method=method,
        pairs=pairs,
        division=division,
        census=census,
        settings=config.evaluation,
        training=np.concatenate(training),
        weights=np.repeat(weights / sizes, sizes),
        seed=config.seed,
        held_before=held_before,
        utility=share.town.utility if share.town else None,
    )
    return Experiment(
        config=config,
        pairs=pairs,
        report=share.report,
        division=division,
        census=census,
        policy=policy,
        method=method,
        learner=learner,
        evaluator=evaluator,
        start=start,
        town=share.town,
    )


def _agents_per_pass(config: ExperimentConfig, learner: Learner, start: Params, bytes_: int, say: Say) -> int:
    """As the config says, or the fastest that keeps `bytes_`; measured once per machine and kind of pass, then remembered."""
    problem, method = learner.problem, learner.method
    policy, batch = problem.policy, learner.sampler.pairs_per_batch
    if config.runtime.agents_per_pass is not None:
        return config.runtime.agents_per_pass
    learner = replace(learner, agents_per_pass=chunks.fitting(problem, method, batch, policy.tokens_per_pass))
    if not policy.stacks or not isinstance(policy, CausalLMPolicy):
        return learner.agents_per_pass
    most = chunks.fitting(problem, method, batch, policy.tokens_in(bytes_))
    key = [
        cpu_name(), str(torch.get_num_threads()), str(policy.device), policy.fingerprint(), problem.data.fingerprint(),
        config.policy.model_dump_json(), config.method.model_dump_json(), config.optimizer.model_dump_json(),
        str(policy.checkpointing), str(batch), str(most),
    ]  # fmt: skip

    def measure() -> Tensors:
        say("trying how many agents to take in a pass")
        return {"agents": torch.tensor([chunks.fastest(learner, start, most)])}

    return int(cached("passes", key, measure, lambda found: len(found["agents"]) == 1)["agents"])


def load_pairs(settings: PreferencesSettings, seed: int) -> tuple[list[Pair], ReadReport | None, Town | None]:
    """The pairs of the built-in town or of any source."""
    return _load_pairs(settings.model_dump_json(), seed, _stamp(settings.source))


@lru_cache(maxsize=2)
def _load_pairs(
    settings_json: str, seed: int, stamp: str
) -> tuple[list[Pair], ReadReport | None, Town | None]:
    settings = PreferencesSettings.model_validate_json(settings_json)
    if not settings.simulated:
        found = read(settings)
        return found.pairs, found.report, None
    town = Town.build(settings.town_settings, seed)
    found = select(town.pairs(), settings)
    return found.pairs, found.report, town


@lru_cache(maxsize=1)
def _load_policy(
    kind: type[PolicySettings],
    settings_json: str,
    stamp: str,
    device: str,
    dtype: str,
    checkpointing: bool,
    seed: int,
) -> Policy:
    settings = kind.model_validate_json(settings_json)
    return load_policy(settings, device=device, dtype=dtype, checkpointing=checkpointing, seed=seed)


def policy_of(config: ExperimentConfig) -> Policy:
    """The config's policy on its device; kept until another one is asked for."""
    return _load_policy(
        type(config.policy),
        config.policy.model_dump_json(),
        _stamp(config.policy.model),
        config.runtime.torch_device(),
        config.runtime.dtype,
        config.runtime.gradient_checkpointing,
        # Another seed is another policy where factors are frozen, and only there.
        config.seed if config.policy.lora_mixing == "freeze_a" else 0,
    )


def _stamp(place: str) -> str:
    """What changes when the file, or a file of the directory, does: what was read before is then not taken again."""
    path = Path(place).expanduser()
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    marks = [(file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files]
    return json.dumps([str(path.resolve()), marks]) if files else ""


_ENCODED: dict[str, tuple[Policy, EncodedPairs, Float[torch.Tensor, "pairs 2"]]] = {}


def encoded(
    config: ExperimentConfig, share: Share, say: Say
) -> tuple[Policy, EncodedPairs, Float[torch.Tensor, "pairs 2"]]:
    """The policy, the encoded pairs of `share` and their reference log-probabilities; the last ones made are kept.

    Raises `InputError` where a log-probability is not finite.
    """
    key = json.dumps(
        [
            share.source.source_key(),
            _stamp(share.source.source),
            _stamp(config.policy.model),
            config.policy.model_dump(),
            config.runtime.model_dump(),
            config.seed,
            share.agents,
        ]
    )
    if key not in _ENCODED:
        policy = policy_of(config)
        say("encoding pairs")
        data = policy.encode(share.pairs)
        if isinstance(data, TokenPairs) and data.same_after_cut:
            say(
                f"{data.same_after_cut} of {len(data)} pairs have equal completions after cutting to policy.max_length: they teach nothing"
            )
        if not getattr(policy, "packs", True):
            say("this model attends by code of its own: pairs are padded, and every prompt is read twice")
        say("reference log-probabilities")
        reference = reference_log_probs(policy, data, lambda p, d: log_probs(p, None, d, np.arange(len(d))))
        if not bool(torch.isfinite(reference).all()):
            bad = int((~torch.isfinite(reference)).any(dim=1).nonzero()[0])
            raise InputError(
                f"policy.model: the reference's log-probability of pair {bad} (user {share.pairs[bad].user}) is not finite; "
                "allowed: a model and a runtime.dtype under which all pairs have finite log-probabilities"
            )
        _ENCODED.clear()
        _ENCODED[key] = (policy, data, reference)
    return _ENCODED[key]
