"""From a config's words to a mixing matrix."""

from prefmesh.errors import InputError
from prefmesh.randomness import generator
from prefmesh.topology.mixing import MixingMatrix
from prefmesh.topology.registry import build_graph
from prefmesh.topology.settings import GraphSettings
from prefmesh.topology.weights import build_weights


def build_mixing_matrix(
    graph: GraphSettings | str, weights: str, agents: int, seed: int, *, key_prefix: str = "method."
) -> MixingMatrix:
    """The mixing matrix that a config asks for, checked; the same for the same arguments.

    Raises `InputError` that begins with the config's key, `method.graph` or `method.weights`; `key_prefix` is what
    stands before `graph` and `weights` there.

    >>> mixing = build_mixing_matrix("star", "metropolis", agents=8, seed=0)
    >>> round(mixing.rho, 12), mixing.messages_per_round
    (0.875, 14)
    >>> build_mixing_matrix("star", "metropolsi", agents=8, seed=0)
    Traceback (most recent call last):
    prefmesh.errors.InputError: method.weights: unknown name 'metropolsi'; did you mean 'metropolis'? Allowed: best_constant, fastest, lazy_metropolis, max_degree, metropolis, uniform
    """
    settings = GraphSettings.model_validate(graph)
    rng = generator(seed, "topology")
    network = build_graph(settings.name, agents, settings.options, rng, where=f"{key_prefix}graph")
    where = f"{key_prefix}weights"
    matrix = build_weights(weights, network, where=where)
    try:
        return MixingMatrix(matrix=matrix, graph=network, settings=settings, weights=weights)
    except InputError as error:
        raise InputError(f"{where}: {weights}: {error}") from None
