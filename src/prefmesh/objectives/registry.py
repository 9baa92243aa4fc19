"""Losses by name, and what each asks of settings and policy."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from prefmesh.errors import InputError
from prefmesh.objectives.log_probs import PairLogProbs, PairLoss

Loss = Callable[[PairLogProbs, Any], PairLoss]
"""Of log-probabilities and `ObjectiveSettings`."""

Option = Literal["label_smoothing", "discopop_tau", "f_divergence_type"]
Need = Literal["lengths", "likelihoods"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Traits:
    """`uses`: which settings it reads besides beta. `needs`: what it takes of log-probabilities besides margins h."""

    uses: frozenset[str] = frozenset()
    needs: frozenset[str] = frozenset()


LOSSES: dict[str, Loss] = {}
TRAITS: dict[str, Traits] = {}


def loss(name: str, *, uses: Iterable[Option] = (), needs: Iterable[Need] = ()) -> Callable[[Loss], Loss]:
    """Register a loss under TRL's name for it; `uses`, `needs`: see `Traits`. Raises `InputError` for a name that is taken."""

    def register(function: Loss) -> Loss:
        if name in LOSSES:
            raise InputError(f"loss: the name {name!r} is taken")
        LOSSES[name] = function
        TRAITS[name] = Traits(uses=frozenset(uses), needs=frozenset(needs))
        return function

    return register


def traits(name: str) -> Traits:
    """Of a registered loss."""
    return TRAITS.get(name, Traits())


def using(option: Option) -> list[str]:
    """The losses that read this setting, in alphabetical order."""
    return sorted(name for name in LOSSES if option in traits(name).uses)
