"""The forecast against simulation, and its first-order parts against exact maps and closed forms."""

import numpy as np
import pytest

from prefmesh.theory import LogLinearProblem, simulate
from prefmesh.theory.forecast import Forecast, Setting, _geometric


def problem(
    agents: int = 6, pairs: int = 60, dim: int = 4, own: float = 1.0, seed: int = 0
) -> LogLinearProblem:
    rng = np.random.default_rng(seed)
    common, shards = rng.normal(size=dim), []
    for _ in range(agents):
        x = rng.normal(size=(pairs, dim)) * np.exp(rng.normal(0, 0.4, dim))
        likes = x @ (common + own * rng.normal(size=dim)) + rng.logistic(size=pairs) > 0
        shards.append(np.where(likes[:, None], x, -x))
    return LogLinearProblem(shards, 1.0)


def near(on: LogLinearProblem, part: float) -> float:
    """A target that leaves `part` of the gap between the start and the optimum."""
    least = on.loss(on.optimum())
    return least + part * (on.loss(np.zeros(on.dim)) - least)


def test_without_noise_and_drift_it_is_gradient_descent() -> None:
    on = problem()
    forecast = Forecast(on, near(on, 0.02))
    setting = Setting(method="fed_dpo", local_steps=1, lr=0.7 / forecast.largest_curvature)
    run = simulate.fed_dpo(on, setting.lr, rounds=40)
    losses = [on.loss(theta) for theta in run.average]
    np.testing.assert_allclose(forecast.expected_loss(setting)[:41], losses, rtol=1e-10)
    reached = next(r for r, loss in enumerate(losses) if loss <= forecast.target)
    assert forecast.rounds(setting) == reached


@pytest.mark.parametrize(
    "place", [{"method": "fed_dpo"}, {"method": "dec_dpo", "graph": "path"}], ids=["server", "path"]
)
def test_drift_is_first_order(place) -> None:
    """Halving the step halves what is missing of the shift that drift causes: the forecast has its first order right."""
    on = problem(own=2.0)
    star, errors = on.optimum(), []
    for scale in (0.08, 0.04):
        forecast = Forecast(on, near(on, 1e-2))
        setting = Setting(local_steps=4, lr=scale / forecast.largest_curvature, **place)
        rounds = int(40 / (scale * 4))
        if place["method"] == "fed_dpo":
            run = simulate.fed_dpo(on, setting.lr, rounds, 4, theta0=star)
        else:
            run = simulate.dec_dpo(on, setting.mixing(6).matrix, setting.lr, rounds, 4, theta0=star)
        forecast.at_target = star  # the same point for both
        h, basis = forecast._spectrum
        c = (1 - setting.lr * h) ** 4
        drift = basis @ (_geometric(c, rounds) * (basis.T @ forecast._push(setting)))
        errors.append(np.linalg.norm(run.average[-1] - star - drift) / np.linalg.norm(drift))
    assert errors[0] < 0.4
    assert errors[1] == pytest.approx(errors[0] / 2, rel=0.35)


def test_noise_of_one_round_by_sampling() -> None:
    """Participants and minibatches are drawn by the algorithm itself, many times from one point."""
    on = problem()
    forecast = Forecast(on, near(on, 0.1))
    theta, rounds = forecast.at_target, 1
    setting = Setting(
        method="fed_dpo", local_steps=3, lr=0.1 / forecast.largest_curvature, batch_size=5, participation=2
    )
    members = [simulate.Member(on, "fed_dpo", {"participation": 2}, seed=k) for k in range(600)]
    ensemble = simulate.Ensemble(members, setting.lr, rounds=rounds, local_steps=3, batch_size=5, seed=7)
    *_, last = ensemble.run(theta)
    moved = last.reshape(600, 6, -1)[:, 0]
    _, basis = forecast._spectrum
    assert (moved @ basis).var(axis=0) == pytest.approx(forecast._noise(setting, 2), rel=0.25)
    # without sampling: minibatches alone, and S = N
    alone = Setting(method="fed_dpo", local_steps=1, lr=setting.lr, batch_size=5)
    by_hand = setting.lr**2 * np.trace(on.gradient_covariances(theta).mean(0)) / (6 * 5)
    assert forecast._noise(alone, 6).sum() == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize(
    "setting",
    [
        {"method": "fed_dpo", "local_steps": 1, "batch_size": 8},
        {"method": "fed_dpo", "local_steps": 4, "batch_size": 16, "participation": 3},
        {"method": "dec_dpo", "graph": "ring", "local_steps": 2, "batch_size": 8},
    ],
    ids=["noise", "sampling", "ring"],
)
def test_rounds_to_a_target_are_those_of_simulation(setting) -> None:
    on = problem(own=0.3)
    forecast = Forecast(on, near(on, 0.15))
    chosen = Setting(lr=0.25 / forecast.largest_curvature, **setting)
    foreseen = forecast.rounds(chosen)
    assert foreseen is not None
    seeds = 24
    if chosen.method == "fed_dpo":
        each = {"name": "fed_dpo", "settings": {"participation": chosen.participation}}
    else:
        each = {"name": "dec_dpo", "mixing": (chosen.mixing(6).matrix,)}
    ensemble = simulate.Ensemble(
        [simulate.Member(on, seed=k, **each) for k in range(seeds)],
        chosen.lr, rounds=2 * foreseen + 10, local_steps=chosen.local_steps, batch_size=chosen.batch_size,
    )  # fmt: skip
    means = (theta.reshape(seeds, 6, -1).mean(1) for theta in ensemble.run())
    losses = (np.mean([on.loss(mean) for mean in each]) for each in means)
    r = next(r for r, loss in enumerate(losses) if loss <= forecast.target)
    assert abs(r - foreseen) <= max(1, 0.2 * r)


def test_a_target_below_the_noise_is_not_foreseen() -> None:
    on = problem()
    forecast = Forecast(on, near(on, 1e-3))
    coarse = Setting(method="fed_dpo", local_steps=1, lr=1 / forecast.largest_curvature, batch_size=1)
    assert forecast.rounds(coarse) is None
    assert forecast.rounds(Setting(method="fed_dpo", local_steps=1, lr=coarse.lr)) is not None
    wild = Setting(method="fed_dpo", local_steps=1, lr=20 / forecast.largest_curvature)
    assert forecast.rounds(wild) is None


def test_separable_pairs_have_a_forecast_too() -> None:
    on = LogLinearProblem([np.array([[1.0, 0.2]]), np.array([[0.7, -0.1]])], 1.0)
    forecast = Forecast(on, 0.3)
    assert forecast.rounds(Setting(method="fed_dpo", local_steps=2, lr=1.0)) is not None


@pytest.mark.parametrize(("target", "said"), [(0.7, "allowed: below 0.693147"), (1e-9, "do not reach it")])
def test_bad_targets(target, said, monkeypatch) -> None:
    monkeypatch.setattr("prefmesh.theory.forecast.MAX_STEPS", 200)
    with pytest.raises(ValueError, match=f"target_loss: found .*{said}"):
        Forecast(problem(), target)
