"""Products across the rows of one process."""

import numpy as np
import torch
from jaxtyping import Float
from scipy import sparse
from torch import Tensor


def mix(matrix: sparse.csr_array, rows: Float[Tensor, "agents *shape"]) -> Float[Tensor, "mixed *shape"]:
    """W Theta: each of the mixed agents takes the weighted rows of its neighbours. `matrix` is (mixed, agents)."""
    flat = rows.reshape(rows.shape[0], -1)
    if matrix.nnz == matrix.shape[0] * matrix.shape[1]:
        w = torch.as_tensor(matrix.toarray(), dtype=rows.dtype, device=rows.device)
        return (w @ flat).view(-1, *rows.shape[1:])
    # scipy's product adds up a row's neighbours in a fixed order, whatever the number of threads.
    if rows.device.type == "cpu" and rows.dtype in (torch.float32, torch.float64):
        data = flat.numpy()
        return torch.from_numpy(matrix.astype(data.dtype, copy=False) @ data).view(-1, *rows.shape[1:])
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
    return (w @ flat).view(-1, *rows.shape[1:])


def weighted_sum(
    weights: Float[Tensor, " agents"], rows: Float[Tensor, "agents *shape"]
) -> Float[Tensor, "1 *shape"]:
    """sum_i weights_i rows_i: what a server forms from what its participants sent."""
    return torch.tensordot(weights.to(rows), rows, dims=1).unsqueeze(0)
