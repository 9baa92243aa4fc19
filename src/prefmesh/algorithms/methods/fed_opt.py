"""Server optimisers (FedOpt: Reddi et al. 2021, arXiv 2003.00295, algorithm 2; FedAvgM: Hsu et al. 2019, arXiv 1909.06335).

With Delta the participants' weighted mean update (see server.py), the server's step is

    momentum:  m <- beta1 m + Delta,                      theta <- theta + lr m
    adagrad:   m <- beta1 m + (1 - beta1) Delta,          v <- v + Delta^2
    adam:      m as adagrad's,                            v <- beta2 v + (1 - beta2) Delta^2
    yogi:      m as adagrad's,                            v <- v - (1 - beta2) Delta^2 sign(v - Delta^2)
               and for these three                        theta <- theta + lr m / (sqrt(v) + tau)

with m = 0 and v = tau^2 before the first round.
"""

from typing import Literal

import torch
from pydantic import Field, model_validator

from prefmesh.algorithms.methods.base import method
from prefmesh.algorithms.methods.server import Server, ServerSettings
from prefmesh.algorithms.state import State
from prefmesh.policies.base import Params


class FedOptSettings(ServerSettings):
    """`server`: the server's optimiser; `momentum` is FedAvgM, `adam` FedAdam, `yogi` FedYogi, `adagrad` FedAdagrad."""

    server: Literal["momentum", "adam", "yogi", "adagrad"] = "adam"
    server_lr: float = Field(default=1e-3, gt=0)
    """The server's step size; with `momentum` 1.0 is usual."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """How much of m stays."""
    beta2: float = Field(default=0.99, ge=0, lt=1)
    """Of `adam` and `yogi`."""
    tau: float = Field(default=1e-3, gt=0)
    """How adaptive `adam`, `yogi` and `adagrad` are: the smaller, the more."""

    @model_validator(mode="after")
    def _used(self) -> "FedOptSettings":
        for name, of in (("beta2", ("adam", "yogi")), ("tau", ("adam", "yogi", "adagrad"))):
            if self.server not in of and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} belongs to {', '.join(of)}; server is {self.server}")
        return self


@method("fed_opt")
class FedOpt(Server):
    """A server with moments of its own, kept in `memory`."""

    Settings = FedOptSettings
    settings: FedOptSettings

    def begin(self, row: Params) -> State:
        """m = 0, v = tau^2."""
        state = super().begin(row)
        for name, tensor in row.items():
            state.memory[f"m/{name}"] = torch.zeros_like(tensor)
            if self.settings.server != "momentum":
                state.memory[f"v/{name}"] = torch.full_like(tensor, self.settings.tau**2)
        return state

    def step(self, state: State, update: Params) -> Params:
        """The server's optimiser on -Delta as a gradient."""
        of, found = self.settings, {}
        for name, delta in update.items():
            m = state.memory[f"m/{name}"]
            if of.server == "momentum":
                m = of.beta1 * m + delta
                change = m
            else:
                m = of.beta1 * m + (1 - of.beta1) * delta
                square, v = delta.square(), state.memory[f"v/{name}"]
                if of.server == "adagrad":
                    v = v + square
                elif of.server == "adam":
                    v = of.beta2 * v + (1 - of.beta2) * square
                else:
                    v = v - (1 - of.beta2) * square * torch.sign(v - square)
                state.memory[f"v/{name}"] = v
                change = m / (v.sqrt() + of.tau)
            state.memory[f"m/{name}"] = m
            found[name] = state.theta[name][:1] + of.server_lr * change
        return found
