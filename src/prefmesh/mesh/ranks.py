"""Agents whose adapters are smaller than others': rows of Theta have room for rank r, of which agent i uses r_i components,

    A_i = [A_i[:r_i]; 0],      B_i = [B_i[:, :r_i], 0]

so that averages of rows are those of adapters padded with zeros (HetLoRA: Cho et al. 2024, arXiv 2401.06432).
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

RANK_AXIS = {"lora_A": 1, "lora_B": 2}
"""Of a factor (agents, ...), by the end of its name."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """`of`: r_i of all agents, hosted here or not; `most`: r."""

    of: Int[np.ndarray, " agents"]
    most: int


def cut(rows: dict[str, Tensor], ranks: Int[np.ndarray, " some"]) -> dict[str, Tensor]:
    """The first r_i components of each of these rows (some, ...), zeros for the others. Tensors that are no factors stay."""
    found = dict(rows)
    for name, tensor in rows.items():
        axis = RANK_AXIS.get(name.rpartition(".")[2])
        if axis is not None:
            beyond = torch.arange(tensor.shape[axis]) >= torch.from_numpy(ranks)[:, None]
            found[name] = tensor.masked_fill(beyond.unsqueeze(3 - axis).to(tensor.device), 0)
    return found
