"""Laws against closed forms, brute force and the algorithms themselves."""

import numpy as np
import pytest
from scipy.integrate import quad

from prefmesh.theory import LogLinearProblem, laws, simulate
from prefmesh.theory.laws.smoothed import Smoothed
from prefmesh.theory.simulate import Ensemble, Member, period
from prefmesh.topology.build import build_mixing_matrix

RING4 = build_mixing_matrix("ring", "metropolis", agents=4, seed=0).matrix
DIRECTED = build_mixing_matrix("exponential", "uniform", agents=5, seed=0).matrix
# Agents 0-1, 2-3, then 1-2, 3-0: no matrix of this period connects all.
MATCHINGS = [np.kron(np.eye(2), np.full((2, 2), 0.5))]
MATCHINGS.append(np.roll(MATCHINGS[0], (1, 1), axis=(0, 1)))


def tastes(agents: int, dim: int, pairs: int = 12, seed: int = 0) -> LogLinearProblem:
    """Users who judge pairs of their own, each after a taste of their own. Smoothness 1."""
    random = np.random.default_rng(seed)
    shards = []
    for _ in range(agents):
        x = random.normal(size=(pairs, dim))
        first = x @ random.normal(size=dim) + random.logistic(size=pairs) > 0
        shards.append(np.where(first[:, None], x, -x))
    scale = LogLinearProblem(shards, 1.0).smoothness() ** -0.5
    return LogLinearProblem([scale * x for x in shards], 1.0)


def alike(agents: int, shard: np.ndarray) -> LogLinearProblem:
    """All users with the same pairs and answers."""
    return LogLinearProblem([shard] * agents, 1.0)


CONTRADICTING = np.array([[1.0, 0.5], [-1.0, 0.3], [0.2, -1.0], [-0.5, 0.8], [0.9, 1.0]])


class TestFixedPoints:
    @pytest.mark.parametrize("local_steps", [1, 4, 16])
    def test_feddpo_comes_to_rest_there(self, local_steps):
        problem = tastes(5, 3)
        found = laws.fed_dpo_fixed_point(problem, 1.0, local_steps)
        rounds = 60 + 400 // local_steps
        run = simulate.fed_dpo(problem, 1.0, rounds, local_steps, theta0=problem.optimum())
        np.testing.assert_allclose(found, run.final, rtol=0, atol=1e-10)
        if local_steps > 1:
            assert np.linalg.norm(found - problem.optimum()) > 1e-4  # client drift

    @pytest.mark.parametrize(
        ("agents", "mixing"), [(4, RING4), (5, DIRECTED), (4, MATCHINGS)], ids=["ring", "directed", "period"]
    )
    @pytest.mark.parametrize("local_steps", [1, 3])
    def test_decdpo_comes_to_rest_there(self, agents, mixing, local_steps):
        problem = tastes(agents, 2)
        found = laws.dec_dpo_fixed_point(problem, mixing, 1.0, local_steps)
        rounds = 60 + 400 // local_steps // 2 * 2
        run = simulate.dec_dpo(problem, mixing, 1.0, rounds, local_steps, theta0=problem.optimum())
        np.testing.assert_allclose(found, run.final, rtol=0, atol=1e-10)
        law = laws.dec_dpo_stationary(problem, mixing, 1.0, None, local_steps)
        last = run.consensus_error[-len(period(mixing, agents)) :].mean()
        assert law.variance == 0
        assert law.bias == pytest.approx(last, rel=1e-8)

    def test_client_drift_is_of_first_order_on_own_pairs(self):
        """docs/theory, eq. (5.4)."""
        problem, steps = tastes(4, 3), 5
        best = problem.optimum()
        pulled = np.einsum("iab,ib->ia", problem.agent_hessians(best), problem.agent_gradients(best)).mean(0)
        expected = (steps - 1) / 2 * np.linalg.solve(problem.hessian(best), pulled)
        found = (laws.fed_dpo_fixed_point(problem, 1e-4, steps) - best) / 1e-4
        np.testing.assert_allclose(found, expected, rtol=1e-2)

    def test_client_drift_is_of_second_order_on_shared_pairs(self):
        problem = laws.users_along(np.array([1.0, 0.2, -0.5]), CONTRADICTING, 1.0)
        drift = [
            np.linalg.norm(laws.fed_dpo_fixed_point(problem, lr, 5) - problem.optimum())
            for lr in (0.02, 0.01)
        ]
        assert drift[0] / drift[1] == pytest.approx(4, rel=0.05)

    def test_one_local_step_of_all_agents_has_no_bias(self):
        problem = tastes(4, 3)
        np.testing.assert_allclose(
            laws.fed_dpo_fixed_point(problem, 0.3, 1), problem.optimum(), rtol=0, atol=1e-12
        )


class TestScalar:
    """d = 1, N = 2, W of eigenvalues 1 and lam: everything by hand."""

    W, LAM = np.array([[0.8, 0.2], [0.2, 0.8]]), 0.6

    @pytest.mark.parametrize("local_steps", [1, 3])
    def test_pairs_of_one_size_have_no_hessian_noise(self, local_steps):
        p, lr, batch = 0.75, 0.9, 2
        problem = alike(2, np.array([[1.0], [1.0], [1.0], [-1.0]]))
        c = h = p * (1 - p)  # sigmoid(theta*) = p; a pair's gradient is -(1 - p) or p
        slower = (1 - lr * h) ** local_steps
        q = lr**2 * c / batch * sum((1 - lr * h) ** (2 * e) for e in range(local_steps))
        law = laws.dec_dpo_stationary(problem, self.W, lr, batch, local_steps)
        assert law.bias == pytest.approx(0, abs=1e-25)
        assert law.variance == pytest.approx(self.LAM**2 * q / (1 - self.LAM**2 * slower**2) / 2, rel=1e-10)
        assert law.average_covariance[0, 0] == pytest.approx(q / (1 - slower**2) / 2, rel=1e-10)
        assert law.excess_loss == pytest.approx(h * law.average_covariance[0, 0] / 2, rel=1e-10)

    def test_hessian_noise_feeds_back_through_every_agents_variance(self):
        # x = 1 and 2, each answered both ways alike: theta* = 0, gradients +-x / 2, Hessians x^2 / 4
        problem = alike(2, np.array([[1.0], [-1.0], [2.0], [-2.0]]))
        lr, batch = 0.8, 1
        h, c = 5 / 8, 5 / 8  # E x^2 / 4, both
        v = (1 + 16) / 2 / 16 - h**2
        slower = 1 - lr * h
        # per agent P = (P_mean + P_apart) / 2, both driven by q = lr^2 (c + v P) / batch
        gain = (1 / (1 - slower**2) + self.LAM**2 / (1 - self.LAM**2 * slower**2)) / 2
        p = gain * lr**2 * c / batch / (1 - gain * lr**2 * v / batch)
        q = lr**2 * (c + v * p) / batch
        law = laws.dec_dpo_stationary(problem, self.W, lr, batch)
        assert law.variance == pytest.approx(self.LAM**2 * q / (1 - self.LAM**2 * slower**2) / 2, rel=1e-8)
        first = laws.dec_dpo_stationary(problem, self.W, lr, batch, hessian_noise=False)
        assert first.variance == pytest.approx(law.variance * c / (c + v * p), rel=1e-8)

    def test_feddpo_with_participants(self):
        # users of the same pairs and opposite answers: +-delta around theta* = 0, Hessian 1/4 for both
        problem = LogLinearProblem([np.array([[1.0]] * 3 + [[-1.0]]), np.array([[-1.0]] * 3 + [[1.0]])], 1.0)
        lr, batch = 0.4, 2
        h, pull = 1 / 4, 1 / 4  # gradient of user 0 at 0: sigmoid(0) - 3/4
        noise = 1 / 4 - pull**2  # a pair's gradient is +-1/2
        # S = 1 of 2: gamma_S = 1
        expected = (lr**2 * pull**2 + lr**2 * noise / batch) / (1 - (1 - lr * h) ** 2)
        law = laws.fed_dpo_stationary(problem, lr, 1, 1, batch)
        assert law.covariance[0, 0] == pytest.approx(expected, rel=1e-8)
        everyone = laws.fed_dpo_stationary(problem, lr, 1, None, batch)
        expected = lr**2 * noise / batch / 2 / (1 - (1 - lr * h) ** 2)
        assert everyone.covariance[0, 0] == pytest.approx(expected, rel=1e-8)
        assert everyone.excess_loss == pytest.approx(expected * h / 2, rel=1e-8)


class TestAgainstBruteForce:
    @pytest.mark.parametrize("local_steps", [1, 2])
    @pytest.mark.parametrize(("agents", "mixing"), [(4, RING4), (5, DIRECTED)], ids=["ring", "directed"])
    def test_decdpo(self, agents, mixing, local_steps):
        problem, lr, batch = tastes(agents, 2, pairs=5, seed=3), 0.8, 2
        theta = laws.dec_dpo_fixed_point(problem, mixing, lr, local_steps)
        points = [theta]
        for _ in range(local_steps - 1):
            points.append(points[-1] - lr * problem.agent_gradients(points[-1]))
        mix = np.kron(mixing.toarray(), np.eye(2))
        size = 2 * agents

        def after_a_round(p, gradient):
            for point in points:
                contraction = np.eye(size)
                noise = np.zeros((size, size))
                for i in range(agents):
                    own = slice(2 * i, 2 * i + 2)
                    x = problem.delta_features[i]
                    s = 1 / (1 + np.exp(-x @ point[i]))
                    hessians = (s * (1 - s))[:, None, None] * x[:, :, None] * x[:, None, :]
                    gradients = (s - 1)[:, None] * x
                    contraction[own, own] -= lr * hessians.mean(0)
                    apart = hessians - hessians.mean(0)
                    noise[own, own] = np.mean([d @ p[own, own] @ d for d in apart], axis=0)
                    noise[own, own] += gradient * np.cov(gradients.T, bias=True)
                p = contraction @ p @ contraction.T + lr**2 / batch * noise
            return mix @ p @ mix.T

        basis = np.eye(size**2).reshape(-1, size, size)
        constant = after_a_round(np.zeros((size, size)), 1.0).reshape(-1)
        linear = np.array([after_a_round(e, 0.0).reshape(-1) for e in basis]).T
        p = np.linalg.solve(np.eye(size**2) - linear, constant).reshape(size, size)
        off_mean = np.kron(np.eye(agents) - 1 / agents, np.eye(2))
        law = laws.dec_dpo_stationary(problem, mixing, lr, batch, local_steps)
        assert law.variance == pytest.approx(np.trace(off_mean @ p @ off_mean) / agents, rel=1e-8)
        mean = np.kron(np.full((1, agents), 1 / agents), np.eye(2))
        np.testing.assert_allclose(law.average_covariance, mean @ p @ mean.T, rtol=1e-8)

    def test_a_period_of_one_matrix_twice_is_that_matrix(self):
        """The symmetric route and doubling, on E = 3 where the Jacobians are not symmetric."""
        problem = tastes(4, 3)
        once = laws.dec_dpo_stationary(problem, RING4, 0.6, 2, 3)
        twice = laws.dec_dpo_stationary(problem, [RING4, RING4], 0.6, 2, 3)
        assert once.consensus_error == pytest.approx(twice.consensus_error, rel=1e-8)
        largest = np.abs(once.average_covariance).max()
        np.testing.assert_allclose(
            once.average_covariance, twice.average_covariance, rtol=0, atol=1e-8 * largest
        )

    def test_feddpo_with_every_choice_of_participants(self):
        """One local step, S = 2 of 4: the mean over all six pairs of agents of what they would make of the scatter."""
        problem, lr, batch = tastes(4, 2), 0.9, 3
        law = laws.fed_dpo_stationary(problem, lr, 1, 2, batch)
        theta, p = law.fixed_point, law.covariance
        np.testing.assert_allclose(law.fixed_point, problem.optimum(), atol=1e-12)
        noise = problem.gradient_covariances(theta) + problem.hessian_noise(theta, np.tile(p, (4, 1, 1)))
        after = np.zeros((2, 2))
        for i in range(4):
            for j in range(i):
                k = np.eye(2) - lr * problem.agent_hessians(theta)[[i, j]].mean(0)
                pull = lr * problem.agent_gradients(theta)[[i, j]].mean(0)
                after += (k @ p @ k + np.outer(pull, pull) + lr**2 * (noise[i] + noise[j]) / batch / 4) / 6
        np.testing.assert_allclose(after, p, rtol=1e-8)


class TestModes:
    def test_is_the_general_law_where_all_are_alike(self):
        problem = alike(4, CONTRADICTING)
        for local_steps in (1, 3):
            modes = laws.disagreement_by_mode(problem, RING4, 0.5, 2, local_steps)
            law = laws.dec_dpo_stationary(problem, RING4, 0.5, 2, local_steps, hessian_noise=False)
            assert modes.variance.sum() == pytest.approx(law.variance, rel=1e-8)
            assert modes.bias.sum() == pytest.approx(0, abs=1e-20)

    def test_is_its_limit_for_small_steps_where_pairs_are_shared(self):
        w = build_mixing_matrix("path", "metropolis", agents=6, seed=0).matrix
        problem = laws.users_along(np.arange(6) - 2.5, CONTRADICTING, 1.0)
        modes = laws.disagreement_by_mode(problem, w, 1e-3, 2)
        law = laws.dec_dpo_stationary(problem, w, 1e-3, 2)
        assert modes.bias.sum() == pytest.approx(law.bias, rel=2e-3)
        assert modes.variance.sum() == pytest.approx(law.variance, rel=2e-3)

    def test_the_users_disagreement_lies_along_the_mode_that_they_were_made_for(self):
        w = build_mixing_matrix("path", "metropolis", agents=6, seed=0).matrix
        mode = np.linalg.eigh(w.toarray())[1][:, 2]
        problem = laws.users_along(mode, CONTRADICTING, 1.0, repeats=1000)
        modes = laws.disagreement_by_mode(problem, w, 0.1)
        assert modes.heterogeneity.max() == pytest.approx(problem.heterogeneity(problem.optimum()), rel=1e-2)
        assert np.abs(modes.vectors[:, modes.heterogeneity.argmax()] @ mode) == pytest.approx(1)
        assert modes.heterogeneity.sum() == pytest.approx(problem.heterogeneity(problem.optimum()))
        assert modes.consensus_error == pytest.approx(modes.bias.sum())

    def test_same_users_placed_differently(self):
        """Neighbours who disagree are averaged at once; two camps on either end are not. The gap is the same."""
        w = build_mixing_matrix("path", "metropolis", agents=8, seed=0).matrix
        alternating = laws.users_along(np.array([1.0, -1] * 4), CONTRADICTING, 1.0)
        camps = laws.users_along(np.array([1.0] * 4 + [-1] * 4), CONTRADICTING, 1.0)
        errors = [
            simulate.dec_dpo(problem, w, 0.05, 400).consensus_error[-1] for problem in (alternating, camps)
        ]
        laws_ = [
            laws.dec_dpo_stationary(problem, w, 0.05, None).consensus_error
            for problem in (alternating, camps)
        ]
        np.testing.assert_allclose(laws_, errors, rtol=1e-6)
        assert laws_[1] > 20 * laws_[0]

    def test_inner_products_of_gradients_are_enough_for_small_steps(self):
        w, lr = build_mixing_matrix("tree", "metropolis", agents=7, seed=0).matrix, 1e-5
        problem = tastes(7, 3)
        best = problem.optimum()
        gradients = problem.agent_gradients(best)
        found = laws.modes_of_gradients(w, gradients @ gradients.T)
        assert found.heterogeneity.sum() == pytest.approx(problem.heterogeneity(best))
        exact = laws.dec_dpo_fixed_point(problem, w, lr)
        error = np.square(exact - exact.mean(0)).sum(1).mean()
        assert lr**2 * found.consensus_error.sum() == pytest.approx(error, rel=1e-2)
        known = laws.disagreement_by_mode(problem, w, lr)
        np.testing.assert_allclose(found.heterogeneity, known.heterogeneity, rtol=1e-8)


class TestGap:
    def test_a_star_can_be_worse_than_a_path_of_a_smaller_gap(self):
        graphs = {
            name: build_mixing_matrix(name, "metropolis", agents=8, seed=0).matrix
            for name in ("path", "ring", "star", "complete")
        }
        problem = laws.users_along(np.array([0.0, 1, -1, 1, -1, 1, -1, 0]), CONTRADICTING, 1.0)
        (worst, *_) = found = laws.misordered_by_gap(problem, graphs, 0.2, None)
        assert (worst.promised, worst.better) == ("star", "path")
        assert worst.rho == pytest.approx((0.875, 1 - 2 / 3 * (1 - np.cos(np.pi / 8))))
        measured = [
            simulate.dec_dpo(problem, graphs[name], 0.2, 400).consensus_error[-1]
            for name in (worst.promised, worst.better)
        ]
        assert worst.consensus_error == pytest.approx(tuple(measured), rel=1e-6)
        assert worst.ratio > 2
        assert {pair.promised for pair in found} == {"star"}


class TestGaussian:
    def test_averages_are_integrals(self):
        problem = LogLinearProblem([np.array([[1.0, 2.0]])], 0.7)
        spread, mean = np.array([[[0.5, 0.2], [0.2, 0.9]]]), np.array([[0.3, -0.4]])
        x = np.array([1.0, 2.0])
        centre, deviation = 0.7 * x @ mean[0], 0.7 * np.sqrt(x @ spread[0] @ x)

        def average(function):
            def integrand(u):
                return function(centre + deviation * u) * np.exp(-(u**2) / 2) / np.sqrt(2 * np.pi)

            return quad(integrand, -12, 12, epsabs=1e-13)[0]

        def s(z):
            return 1 / (1 + np.exp(-z))

        at = Smoothed(problem, spread)
        gradient = -0.7 * average(lambda z: s(-z)) * x
        hessian = 0.49 * average(lambda z: s(z) * s(-z)) * np.outer(x, x)
        both = 0.49 * average(lambda z: s(-z) ** 2) * np.outer(x, x)
        covariance = both - np.outer(gradient, gradient) - hessian @ spread[0] @ hessian
        assert at.losses(mean)[0] == pytest.approx(average(lambda z: np.log1p(np.exp(-z))), rel=2e-5)
        np.testing.assert_allclose(at.agent_gradients(mean)[0], gradient, rtol=2e-5)
        np.testing.assert_allclose(at.agent_hessians(mean)[0], hessian, rtol=2e-4)
        np.testing.assert_allclose(at.gradient_covariances(mean)[0], covariance, rtol=1e-3, atol=1e-6)

    def test_is_the_linearised_law_for_small_steps(self):
        problem = tastes(4, 2)
        for lr in (1e-2, 1e-3):
            law = laws.dec_dpo_stationary(problem, RING4, lr, 2, 2)
            gaussian = laws.dec_dpo_gaussian(problem, RING4, lr, 2, 2)
            assert gaussian.consensus_error == pytest.approx(law.consensus_error, rel=lr)
            assert gaussian.excess_loss == pytest.approx(law.excess_loss, rel=10 * lr)
            law = laws.fed_dpo_stationary(problem, lr, 2, 2, 2)
            gaussian = laws.fed_dpo_gaussian(problem, lr, 2, 2, 2)
            np.testing.assert_allclose(gaussian.covariance, law.covariance, rtol=10 * lr)


def test_decdpo_in_simulation():
    """At lr Lam = 0.5 with E = 2: one symmetric matrix, and a period of two, in 12 replicas of 800 rounds."""
    problem, lr, batch, steps, burn_in, rounds = tastes(4, 2), 0.5, 2, 2, 100, 800
    members = [Member(problem, "dec_dpo", mixing=period(w, 4)) for w in (RING4, MATCHINGS) for _ in range(12)]
    ensemble = Ensemble(members, lr, rounds=burn_in + rounds, local_steps=steps, batch_size=batch, seed=1)
    total = np.zeros(24)
    for r, theta in enumerate(ensemble.run(problem.optimum())):
        if r > burn_in:
            own = theta.reshape(24, 4, 2)
            total += np.square(own - own.mean(1, keepdims=True)).sum((1, 2)) / 4
    found = (total / rounds).reshape(2, 12)
    mean, error = found.mean(1), found.std(1, ddof=1) / np.sqrt(12)
    for k, w in enumerate((RING4, MATCHINGS)):
        law = laws.dec_dpo_stationary(problem, w, lr, batch, steps).consensus_error
        gaussian = laws.dec_dpo_gaussian(problem, w, lr, batch, steps).consensus_error
        assert error[k] < 0.03 * mean[k]
        assert mean[k] == pytest.approx(law, rel=0.12)
        assert abs(mean[k] - gaussian) < 4 * error[k] + 0.01 * mean[k]


class TestBadInput:
    PROBLEM = tastes(4, 2)

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (
                lambda p: laws.fed_dpo_fixed_point(p, 0.0, 1),
                "lr: found 0.0; allowed: a finite number above 0",
            ),
            (lambda p: laws.fed_dpo_fixed_point(p, np.nan, 1), "lr: found nan"),
            (
                lambda p: laws.fed_dpo_fixed_point(p, 0.1, 0),
                "local_steps: found 0; allowed: a whole number from 1",
            ),
            (lambda p: laws.fed_dpo_stationary(p, 0.1, 1, 5, 2), "participation: found 5; allowed: 1 to 4"),
            (lambda p: laws.fed_dpo_stationary(p, 0.1, 1, 0, 2), "participation: found 0"),
            (lambda p: laws.fed_dpo_stationary(p, 0.1, 1, 2, 0), "batch_size: found 0"),
            (lambda p: laws.dec_dpo_stationary(p, np.eye(3), 0.1, 2), r"mixing_matrix: found shape \(3, 3\)"),
            (lambda p: laws.dec_dpo_fixed_point(p, 2 * np.eye(4), 0.1), "mixing_matrix: row 0 sums to 2"),
            (
                lambda p: laws.dec_dpo_gaussian(p, np.full((4, 4), np.nan), 0.1, 2),
                "mixing_matrix: found non-finite",
            ),
            (
                lambda p: laws.fed_dpo_fixed_point(p, 40.0, 1),
                "lr: a round's Jacobian .* spectral radius [1-9]",
            ),
            (
                lambda p: laws.dec_dpo_fixed_point(p, RING4, 8.0),
                "lr: a round's Jacobian .* spectral radius [1-9]",
            ),
            (lambda p: laws.dec_dpo_fixed_point(p, RING4, 40.0), "lr: Newton's method left a residual of"),
            (lambda p: laws.disagreement_by_mode(p, RING4, 40.0), "lr: a round shrinks deviations to"),
            (
                lambda p: laws.disagreement_by_mode(p, np.roll(np.eye(4), 1, axis=0), 0.1),
                "mixing_matrix: W and its transpose differ by 1; allowed: a symmetric W",
            ),
            (lambda p: laws.disagreement_by_mode(p, MATCHINGS, 0.1), "mixing_matrix: found a period of 2"),
            (
                lambda p: laws.misordered_by_gap(p, {"small": np.eye(3)}, 0.1, 2),
                r"mixing_matrices\['small'\]: found shape \(3, 3\)",
            ),
            (lambda p: laws.users_along(np.zeros(3), CONTRADICTING, 1.0), "direction: found only zeros"),
            (lambda p: laws.users_along(np.ones(3), CONTRADICTING, 1.0, 2.0), "strength: found 2.0"),
        ],
    )
    def test_is_refused(self, call, message):
        with pytest.raises(ValueError, match=message) as refused:
            call(self.PROBLEM)
        assert "\n" not in str(refused.value)

    def test_variance_that_grows_though_means_settle(self):
        # one pair in twenty has Hessian 25, the others almost none: (1 - lr h)^2 + lr^2 Var(h) > 1
        shard = np.array([[10.0], [-10.0]] + [[0.1], [-0.1]] * 19)
        problem = alike(2, shard)
        laws.dec_dpo_fixed_point(problem, np.full((2, 2), 0.5), 0.8)
        with pytest.raises(
            ValueError, match=r"lr: minibatch noise feeds on itself: .* spectral radius [1-9]"
        ):
            laws.dec_dpo_stationary(problem, np.full((2, 2), 0.5), 0.8, 1)
