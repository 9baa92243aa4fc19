"""Averages of factors, and what they leave of the average of products."""

import pytest
import torch

from prefmesh.mesh import ResidualMesh, residual_bytes

IN, OUT, R, AGENTS = 9, 7, 2, 3


def model(rows: int, seed: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    shapes = {"layer.lora_A": (rows, R, IN), "layer.lora_B": (rows, OUT, R)}
    return {name: torch.randn(*shape, generator=random, dtype=dtype) for name, shape in shapes.items()}


def update(theta: dict[str, torch.Tensor]) -> torch.Tensor:
    """R + B A, in float64, of each row."""
    return theta["layer.residual"].double() + theta["layer.lora_B"].double() @ theta["layer.lora_A"].double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "weights", [[0.5, 0.3, 0.2], [0.3, 0.3, 0.2], [0.9, 0.4, 0.2]], ids=["all", "some", "beyond"]
)
def test_the_server_has_the_average(weights, dtype) -> None:
    """Also where weights do not add up to 1, and the server's own model has the rest."""
    mesh = ResidualMesh.of(AGENTS)
    residual = {"layer.residual": torch.randn(1, OUT, IN, dtype=dtype)}
    row, rows = model(1, 0, dtype) | residual, model(AGENTS, 1, dtype)
    w = torch.tensor(weights, dtype=torch.float64)
    agents = update(rows | residual)
    wanted = (1 - w.sum()) * update(row) + torch.einsum("k,koi->oi", w, agents)
    found = mesh.moved(w, dict(row), rows)
    assert found.keys() == row.keys()
    assert all(tensor.dtype == dtype and tensor.shape == row[name].shape for name, tensor in found.items())
    torch.testing.assert_close(update(found), wanted, rtol=0, atol=1e-12 if dtype == torch.float64 else 2e-6)
    # Factors are what averaging factors gives, and that alone is another model.
    for name, tensor in rows.items():
        mean = (1 - w.sum()) * row[name].double() + torch.tensordot(w, tensor.double(), dims=1)
        torch.testing.assert_close(
            found[name].double(), mean, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12
        )
    assert float((update(found | residual) - wanted).norm() / wanted.norm()) > 0.1


def test_agents_who_agree_leave_nothing() -> None:
    one = model(1, 0)
    rows = {name: tensor.expand(AGENTS, -1, -1) for name, tensor in one.items()}
    row = model(1, 1) | {"layer.residual": torch.zeros(1, OUT, IN, dtype=torch.float64)}
    w = torch.full((AGENTS,), 1 / AGENTS, dtype=torch.float64)
    assert float(ResidualMesh.of(AGENTS).moved(w, row, rows)["layer.residual"].abs().max()) < 1e-14


def test_what_is_smaller_is_sent() -> None:
    """(S + 1) r (in + out) numbers, or in x out: of 9 x 7 with r = 2 always the matrix; of 90 x 70 factors of up to 18 agents."""
    theta = model(1, 0) | {"layer.residual": torch.zeros(1, OUT, IN, dtype=torch.float64)}
    assert residual_bytes(theta, 1) == 8 * IN * OUT
    wide = {
        "layer.lora_A": torch.zeros(1, R, 90),
        "layer.lora_B": torch.zeros(1, 70, R),
        "layer.residual": torch.zeros(1, 70, 90),
    }
    assert residual_bytes(wide, 3) == 4 * (3 + 1) * R * (90 + 70)
    assert residual_bytes(wide, 18) == 4 * 19 * R * (90 + 70) < 4 * 90 * 70
    assert residual_bytes(wide, 19) == 4 * 90 * 70
    assert residual_bytes(theta | wide, 3) == residual_bytes(wide, 3)
    assert residual_bytes(model(1, 0), 3) == 0
