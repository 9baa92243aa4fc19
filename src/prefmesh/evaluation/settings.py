"""What a config says about evaluation."""

from typing import Literal

from pydantic import Field

from prefmesh.settings import Settings


class EvaluationSettings(Settings):
    """Before the first round, every `every` rounds, and after the last.

    `held_out`: the share of pairs kept from training, in whole groups `by` prompt, completion or user; `fold` says
    which of the folds of that share (five for 0.2; a share such as 0.4 leaves pairs that are in no fold). `gradient_pairs`: over how
    many training pairs `grad_norm_sq` is taken: all, or two independent draws of so many (unbiased); `auto` takes all up to 2,000.
    `samples`: held-out prompts that the policy continues for the KL and, with simulated users, the win rate; 0 for none.
    """

    every: int = Field(default=5, ge=1)
    """Rounds between evaluations."""
    held_out: float = Field(default=0.1, ge=0, le=0.5)
    by: Literal["prompt", "completion", "user"] = "prompt"
    """What is kept whole: all pairs of a prompt, of texts that are linked by a shared completion or prompt, or of a user."""
    fold: int = Field(default=0, ge=0)
    """Which fold is held out, from 0."""
    neighbour_mixes: int | None = Field(default=None, ge=1)
    """Under gossip: consensus error, gradient norm and held-out figures at what each agent makes of the average model by so many
    mixes with its neighbours; none: at the average of all agents, exactly."""
    gradient_pairs: int | Literal["all", "auto"] = "auto"
    samples: int = Field(default=64, ge=0)
    max_new_tokens: int = Field(default=40, ge=1)
    """Longest completion that is sampled."""
