"""Where the algorithms settle with a constant step size, before they are run (docs/theory, section 5).

Fixed points are exact. Stationary covariances are those of the algorithm linearised there, with what is random about a
minibatch's Hessian. All of it is about plain SGD with a constant step size; AdamW has no such law here.
"""

from prefmesh.theory.laws.dec_dpo import DecDPOLaw, dec_dpo_gaussian, dec_dpo_stationary
from prefmesh.theory.laws.fed_dpo import FedDPOLaw, fed_dpo_gaussian, fed_dpo_stationary
from prefmesh.theory.laws.fixed_points import dec_dpo_fixed_point, fed_dpo_fixed_point
from prefmesh.theory.laws.gap import Misordered, misordered_by_gap, users_along
from prefmesh.theory.laws.modes import Modes, ModeShares, disagreement_by_mode, modes_of_gradients

__all__ = [
    "DecDPOLaw",
    "FedDPOLaw",
    "Misordered",
    "ModeShares",
    "Modes",
    "dec_dpo_fixed_point",
    "dec_dpo_gaussian",
    "dec_dpo_stationary",
    "disagreement_by_mode",
    "fed_dpo_fixed_point",
    "fed_dpo_gaussian",
    "fed_dpo_stationary",
    "misordered_by_gap",
    "modes_of_gradients",
    "users_along",
]
