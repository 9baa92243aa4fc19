"""An estimate that both ends hold, and that follows what the sender has by compressed differences."""

from prefmesh.compression.layout import Params
from prefmesh.compression.message import compress
from prefmesh.compression.seeds import Seeds
from prefmesh.compression.settings import Chain


def follow(estimate: Params, target: Params, chain: Chain, seeds: Seeds) -> tuple[Params, Params]:
    """The message m = C(target - estimate), and the new estimate, estimate + m, which the receiver forms as well.

    EF21 (Richtárik et al. 2021, Algorithm 2): g_i <- g_i + C(grad f_i(x) - g_i). CHOCO-Gossip (Koloskova et al. 2019,
    Algorithm 1): xhat_i <- xhat_i + C(x_i - xhat_i). With a C that contracts by delta, and a target that stays,

        E||target - estimate_t||^2 <= (1 - delta)^t ||target - estimate_0||^2

    so what compression leaves out is made up for. Nothing is written to.
    """
    message = compress({name: target[name] - estimate[name] for name in target}, chain, seeds)
    return message, {name: estimate[name] + message[name] for name in target}
