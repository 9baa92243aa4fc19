"""What is compared: the variants of the paper's comparison, of its ablations, and of our other studies."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from prefmesh.algorithms.methods import METHODS, Population
from prefmesh.algorithms.methods.dec_dpo import DecDPOSettings
from prefmesh.config import ExperimentConfig
from prefmesh.errors import InputError, unknown_name
from prefmesh.preferences.splits import folds_of


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One line of the comparison: what is changed in the config. `x`: its place on a study's axis; `series`: its curve."""

    name: str
    label: str
    changes: Mapping[str, Any]
    x: float | None = None
    series: str | None = None


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What is run: every variant with every seed, the first variant being the baseline of paired differences."""

    title: str
    kind: str
    variants: Sequence[Variant]
    x_label: str | None = None
    seeds: Sequence[int] = field(default_factory=lambda: [0])
    values: Sequence[str] | None = None
    """Those that were asked for in place of the study's own."""


def comparison(config: ExperimentConfig, seeds: Sequence[int]) -> Sweep:
    """The paper's comparison: centralized, FedDPO with all and with 3 of 5 agents, DecDPO on a ring, and local-only.

    A config whose method is one of these keeps its settings (graph, participation) in its variant.
    """
    agents = _agents(config)
    few = getattr(config.method, "participation", None) or max(1, round(0.6 * agents))
    gossip = {"graph": "ring"}
    if isinstance(config.method, DecDPOSettings):
        gossip = {"graph": config.method.graph.model_dump(), "weights": config.method.weights}
    graph = str(DecDPOSettings.model_validate({"name": "dec_dpo", **gossip}).graph)
    steps = _steps(config)
    methods = {
        "centralized": ("Centralized", {"name": "centralized"}),
        "fed_dpo_full": ("FedDPO, all agents", {"name": "fed_dpo"}),
        "fed_dpo_partial": (f"FedDPO, {few} of {agents}", {"name": "fed_dpo", "participation": few}),
        f"dec_dpo_{graph.split(' ')[0]}": (f"DecDPO, {graph}", {"name": "dec_dpo", **gossip}),
        "local_only": ("Local only", {"name": "local_only"}),
    }
    variants = [
        Variant(name=name, label=label, changes={"method": settings | steps})
        for name, (label, settings) in methods.items()
        if not (name == "fed_dpo_partial" and few == agents)
    ]
    return Sweep(
        title=f"Centralized, federated and decentralized DPO, {agents} agents",
        kind="compare",
        variants=variants,
        seeds=seeds,
    )


def study(
    name: str, config: ExperimentConfig, seeds: Sequence[int], values: Sequence[str] | None = None
) -> Sweep:
    """One of the paper's ablations, or `heterogeneity`, `methods`, `lora-mixing` or `folds`. `values` replace the study's own.

    Raises `InputError` for an unknown study or a value that it cannot take.
    """
    if name not in STUDIES:
        raise unknown_name("study", name, STUDIES)
    return replace(STUDIES[name](config, values), seeds=seeds, values=values)


def _local_steps(config: ExperimentConfig, values: Sequence[str] | None) -> Sweep:
    method = _method(config, "fed_dpo", "dec_dpo")
    steps = _integers("local-steps", values or ["1", "3", "6"])
    variants = [
        Variant(name=f"E{e}", label=f"E = {e}", x=float(e), changes={"method": method | {"local_steps": e}})
        for e in steps
    ]
    return Sweep(
        title=f"Local steps E, {method['name']}",
        kind="study",
        variants=variants,
        x_label="local steps E",
    )


def _participation(config: ExperimentConfig, values: Sequence[str] | None) -> Sweep:
    method = _method(config, "fed_dpo")
    agents = _agents(config)
    default = sorted({1, max(1, round(0.6 * agents)), agents})
    counts = _integers("participation", values or [str(s) for s in default])
    variants = [
        Variant(
            name=f"S{s}",
            label=f"S = {s} of {agents}",
            x=float(s),
            changes={"method": method | {"participation": s}},
        )
        for s in counts
    ]
    return Sweep(
        title="Participation S, FedDPO",
        kind="study",
        variants=variants,
        x_label="participants S",
    )


def _staleness(config: ExperimentConfig, values: Sequence[str] | None) -> Sweep:
    method = _method(config, "fed_dpo")
    ages = _integers("staleness", values or ["0", "2", "5"])
    variants = [
        Variant(name=f"q{q}", label=f"q_max = {q}", x=float(q), changes={"method": method | {"staleness": q}})
        for q in ages
    ]
    return Sweep(
        title="Staleness q_max, FedDPO",
        kind="study",
        variants=variants,
        x_label="staleness q_max (rounds)",
    )


def _topology(config: ExperimentConfig, values: Sequence[str] | None) -> Sweep:
    method = _method(config, "dec_dpo")
    agents = _agents(config)
    wanted = values or [
        "path", "ring", "star", "tree", "grid", "torus", "hypercube", "exponential", "complete"
    ]  # fmt: skip
    variants = []
    for graph in wanted:
        settings = method | {"graph": graph}
        if graph == "exponential":
            settings["weights"] = "uniform"  # directed: the rules for undirected graphs do not apply
        try:
            mixing = DecDPOSettings.model_validate(settings).mixing_matrix(agents, config.seed)
        except InputError:
            if values:
                raise
            continue  # a default graph that does not exist for this many agents
        variants.append(
            Variant(
                name=graph,
                label=f"{graph} (gap {mixing.spectral_gap:.3f})",
                x=mixing.spectral_gap,
                changes={"method": settings},
            )
        )
    variants.sort(key=lambda variant: variant.x or 0)
    return Sweep(
        title=f"Graphs of {agents} agents, DecDPO",
        kind="study",
        variants=variants,
        x_label="spectral gap 1 - rho",
    )


def _heterogeneity(config: ExperimentConfig, values: Sequence[str] | None) -> Sweep:
    """Simulated users: how much of their taste is their own. Real ones: Dirichlet shards over the user, alpha falling."""
    town = config.preferences.simulated
    levels = _numbers(
        "heterogeneity", values or (["0", "0.5", "1", "2", "4"] if town else ["100", "1", "0.1"])
    )
    methods = {
        "fed_dpo": ("FedDPO", {"name": "fed_dpo"}),
        "dec_dpo": ("DecDPO", _method(config, "dec_dpo")),
        "local_only": ("Local only", {"name": "local_only"}),
    }
    variants = []
    for key, (label, settings) in methods.items():
        for level in levels:
            if town:
                users = config.preferences.town_settings.model_dump() | {"heterogeneity": level}
                changes: dict[str, Any] = {"preferences.town": users}
            else:
                changes = {
                    "preferences.partition": "dirichlet",
                    "preferences.alpha": level,
                    "preferences.agents": _agents(config),
                }
            variants.append(
                Variant(
                    name=f"{key}_{level:g}",
                    label=f"{label}, {'h' if town else 'alpha'} = {level:g}",
                    x=level,
                    series=label,
                    changes={"method": settings | _steps(config), **changes},
                )
            )
    x_label = "heterogeneity h of tastes" if town else "Dirichlet alpha (small: agents differ)"
    return Sweep(title="Heterogeneity of users", kind="study", variants=variants, x_label=x_label)


def _methods(config: ExperimentConfig, values: Sequence[str] | None) -> Sweep:
    """Every kind of method on the same data, none with more bytes or more local steps than FedDPO has in the config's rounds (steps of
    models that never leave their agents are not counted: they cost seconds, which the table has too)."""
    agents, steps = _agents(config), _steps(config)
    known = _method_settings(agents, steps["rounds"])
    if config.policy.lora_mixing == "factors":
        known["fed_per"] = ("FedSA-LoRA", {"name": "fed_per"})
    for name in values or []:
        if name not in known:
            raise unknown_name("--values", name, known)
    variants = []
    for name in values or known:
        label, settings = known[name]
        try:
            rounds = _affordable({**steps, **settings}, agents)
            changes = {"method": steps | settings | {"rounds": rounds}}
            config.replace(changes)
        except InputError:
            if values:
                raise
            continue  # a default one that does not fit so many agents, or the objective
        variants.append(Variant(name=name, label=label, changes=changes))
    return Sweep(title=f"Methods on one budget, {agents} agents", kind="compare", variants=variants)


def _method_settings(agents: int, rounds: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Labels and settings, by name."""
    few = [{"name": "top_k", "share": 0.05}, "int8"]
    ring: dict[str, Any] = {"name": "dec_dpo", "graph": "ring"}
    return {
        "fed_dpo": ("FedDPO", {"name": "fed_dpo"}),
        "fed_prox": ("FedProx", {"name": "fed_prox"}),
        "fed_adam": ("FedAdam", {"name": "fed_opt", "server_lr": 0.01}),
        "scaffold": ("SCAFFOLD", {"name": "scaffold"}),
        "fed_buff": ("FedBuff", {"name": "fed_buff", "buffer": -(-agents // 2)}),
        "group_robust": ("Group DRO", {"name": "group_robust"}),
        "q_fed_avg": ("q-FedAvg", {"name": "q_fed_avg", "lipschitz": 0.0}),
        "fed_dpo_compressed": ("FedDPO, top-k and int8", {"name": "fed_dpo", "compression": few}),
        "dec_dpo": ("DecDPO, ring", ring),
        "one_peer": ("DecDPO, one peer", {"name": "dec_dpo", "graph": "exponential", "schedule": "one_peer"}),
        "dec_dpo_compressed": (
            "DecDPO, ring, top-k and int8",
            ring | {"compression": few, "consensus_step": 0.3},
        ),
        "gradient_tracking": ("Gradient tracking", {"name": "gradient_tracking", "graph": "ring"}),
        "exact_diffusion": ("Exact diffusion", {"name": "exact_diffusion", "graph": "ring"}),
        "push_sum": ("Push-sum", {"name": "push_sum"}),
        "clustered": ("Clustered", {"name": "clustered", "warm_rounds": max(2, rounds // 5)}),
        "fine_tuning": (
            "FedDPO, then alone",
            {"name": "fine_tuning", "personal_rounds": max(1, rounds // 4)},
        ),
        "ifca": ("IFCA", {"name": "ifca"}),
        "fed_soft": ("FedSoft", {"name": "fed_soft"}),
        "ditto": ("Ditto", {"name": "ditto"}),
        "apfl": ("APFL", {"name": "apfl"}),
        "dec_ditto": ("Ditto, ring", ring | {"name": "dec_ditto"}),
        "dec_apfl": ("APFL, ring", ring | {"name": "dec_apfl"}),
        "collaboration_graph": (
            "Collaboration graph",
            {"name": "collaboration_graph", "graph": "exponential", "weights": "uniform"},
        ),
        "local_only": ("Local only", {"name": "local_only"}),
    }


def _affordable(settings: dict[str, Any], agents: int) -> int:
    """Rounds of a method that send no more models and take no more local steps towards them than FedDPO's would. Compressed messages
    count as whole ones."""
    cls = METHODS[settings["name"]]
    made = cls.Settings(**settings)
    made.check(agents)
    method = cls(made, Population(weights=np.full(agents, 1 / agents), seed=0))
    rounds = made.rounds
    each = range(1, rounds + 1)
    sent = sum(method.bytes_sent(r, model_bytes=1, data_bytes=0) for r in each)
    steps = sum(len(method.participants(r)) for r in each)
    if not sent:
        return rounds
    return min(rounds * (rounds * 2 * agents) // sent, rounds * (rounds * agents) // steps)


def _lora_mixing(config: ExperimentConfig, values: Sequence[str] | None) -> Sweep:
    """What of LoRA is averaged, by a server and on a ring."""
    if config.policy.lora_mixing is None:
        raise InputError(
            f"policy: {config.policy.model}; allowed for study lora-mixing: a language model with train lora"
        )
    labels = {
        "factors": "factors",
        "freeze_a": "B, A frozen",
        "alternate": "factors in turn",
        "product": "products",
        "residual": "factors and residual",
    }
    for name in values or []:
        if name not in labels:
            raise unknown_name("--values", name, labels)
    methods = {"fed_dpo": ("FedDPO", {"name": "fed_dpo"}), "dec_dpo": ("DecDPO", _method(config, "dec_dpo"))}
    variants = [
        Variant(
            name=f"{key}_{mixing}",
            label=f"{label}, {labels[mixing]}",
            changes={"method": settings | _steps(config), "policy.lora.mixing": mixing},
        )
        for key, (label, settings) in methods.items()
        for mixing in values or labels
        # Residuals take a server, and a base that bears them.
        if mixing != "residual" or (key == "fed_dpo" and (values or _fits(config, mixing)))
    ]
    return Sweep(title="What of LoRA is averaged", kind="compare", variants=variants)


def _fits(config: ExperimentConfig, mixing: str) -> bool:
    try:
        config.replace({"policy.lora.mixing": mixing})
    except InputError:
        return False
    return True


def _folds(config: ExperimentConfig, values: Sequence[str] | None) -> Sweep:
    if not config.evaluation.held_out:
        raise InputError(
            "evaluation.held_out: found 0; allowed for this study: a share above 0, 0.2 for five folds"
        )
    count, rest = folds_of(config.evaluation.held_out)
    if rest:
        raise InputError(
            f"evaluation.held_out: found {config.evaluation.held_out}; allowed for this study: one part of a whole number, "
            "such as 0.5, 0.25, 0.2 or 0.1, so that each pair is held out once"
        )
    folds = _integers("folds", values or [str(k) for k in range(count)])
    variants = [
        Variant(name=f"fold_{k}", label=f"fold {k}", x=float(k), changes={"evaluation.fold": k})
        for k in folds
    ]
    return Sweep(title="Folds: each pair held out once", kind="study", variants=variants, x_label="fold")


STUDIES: dict[str, Callable[[ExperimentConfig, Sequence[str] | None], Sweep]] = {
    "local-steps": _local_steps,
    "participation": _participation,
    "topology": _topology,
    "staleness": _staleness,
    "heterogeneity": _heterogeneity,
    "folds": _folds,
    "methods": _methods,
    "lora-mixing": _lora_mixing,
}


def _agents(config: ExperimentConfig) -> int:
    """How many agents there will be; reads the data where the config alone does not say."""
    if config.known_agents is not None:
        return config.known_agents
    from prefmesh.experiment import load_pairs
    from prefmesh.preferences.shards import agent_count

    return agent_count(load_pairs(config.preferences, config.seed)[0], config.preferences)


def _steps(config: ExperimentConfig) -> dict[str, int]:
    return {"rounds": config.method.rounds, "local_steps": config.method.local_steps}


def _method(config: ExperimentConfig, *allowed: str) -> dict[str, Any]:
    """The config's own method where the study fits it, else the first that it fits, with the same rounds and steps."""
    if config.method.name in allowed:
        return config.method.model_dump(mode="json")
    return {"name": allowed[0], **_steps(config)}


def _integers(study: str, values: Sequence[str]) -> list[int]:
    try:
        return [int(value) for value in values]
    except ValueError:
        raise InputError(f"--values: found {', '.join(values)}; allowed for {study}: whole numbers") from None


def _numbers(study: str, values: Sequence[str]) -> list[float]:
    try:
        return [float(value) for value in values]
    except ValueError:
        raise InputError(f"--values: found {', '.join(values)}; allowed for {study}: numbers") from None
