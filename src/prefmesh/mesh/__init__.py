"""Where agents live: which of them this process hosts, and how rows of Theta travel between processes.

One process hosts all agents here; everything that crosses agents goes through these two functions.
"""

import numpy as np
import torch
from jaxtyping import Float
from scipy import sparse
from torch import Tensor


def mix(matrix: sparse.csr_array, rows: Float[Tensor, "agents *shape"]) -> Float[Tensor, "agents *shape"]:
    """W Theta: every agent takes the weighted rows of its neighbours. `matrix` is (agents, agents)."""
    flat = rows.reshape(rows.shape[0], -1)
    if matrix.nnz == matrix.shape[0] * matrix.shape[1]:
        w = torch.as_tensor(matrix.toarray(), dtype=rows.dtype, device=rows.device)
        return (w @ flat).view_as(rows)
    # scipy's product adds up a row's neighbours in a fixed order, whatever the number of threads.
    if rows.device.type == "cpu" and rows.dtype in (torch.float32, torch.float64):
        data = flat.numpy()
        return torch.from_numpy(matrix.astype(data.dtype, copy=False) @ data).view_as(rows)
    entries = matrix.tocoo()
    # torch's CSR format has no product in half precision on CPUs.
    w = torch.sparse_coo_tensor(
        torch.as_tensor(np.stack(entries.coords), dtype=torch.int64),
        torch.as_tensor(entries.data),
        size=matrix.shape,
        dtype=rows.dtype,
        device=rows.device,
        check_invariants=True,
    )
    return (w @ flat).view_as(rows)


def weighted_sum(
    weights: Float[Tensor, " agents"], rows: Float[Tensor, "agents *shape"]
) -> Float[Tensor, "1 *shape"]:
    """sum_i weights_i rows_i: what a server forms from what its participants sent."""
    return torch.tensordot(weights.to(rows), rows, dims=1).unsqueeze(0)
