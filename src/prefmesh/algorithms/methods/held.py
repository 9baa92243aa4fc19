"""What holds agents' own policies to the models that they share: `held_to`'s strength."""

from pydantic import Field

from prefmesh.algorithms.methods.base import MethodSettings


class HeldSettings(MethodSettings):
    """How strongly own policies are held."""

    proximity: float | None = Field(default=None, ge=0)
    """lambda, how strongly own policies are held to what is shared; 0 is everybody alone. None: 2 beta^2 for language models, 0.2 beta^2
    for log-linear policies, since it acts against the curvature of f_i, which grows as beta^2."""

    def suited(self, *, beta: float, language: bool) -> MethodSettings:
        """The factors were found on towns, of which one has opposed groups and one a single taste (docs/log.md)."""
        if self.proximity is not None:
            return self
        return self.model_copy(update={"proximity": (2 if language else 0.2) * beta**2})

    @property
    def strength(self) -> float:
        """lambda; known once it is `suited`."""
        assert self.proximity is not None
        return self.proximity
