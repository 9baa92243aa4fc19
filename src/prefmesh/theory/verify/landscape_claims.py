"""Claims about the loss that all agents share (docs/theory, section 1)."""

import numpy as np
from scipy.special import expit, logit

from prefmesh.randomness import generator
from prefmesh.theory.problem import LogLinearProblem
from prefmesh.theory.verify.claim import Effort, Finding, Plot, Series, claim


def same_pairs(
    agents: int, items: int, dim: int, answers: int, seed: int
) -> tuple[LogLinearProblem, np.ndarray, np.ndarray]:
    """All users judge the same items, each `answers` times; the problem, x (items, d), and pr (agents, items)."""
    random = generator(seed, "verify/same pairs")
    x = random.normal(size=(items, dim))
    taste = random.normal(size=(agents, dim)) + 1.0
    # At least one answer each way, so that no user's pairs are separable.
    yes = np.clip(random.binomial(answers, expit(taste @ x.T)), 1, answers - 1)
    shards = [
        np.concatenate([np.repeat(x, yes[i], axis=0), -np.repeat(x, answers - yes[i], axis=0)])
        for i in range(agents)
    ]
    return LogLinearProblem(shards, beta=0.7), x, yes / answers


@claim(
    "Heterogeneity comes from preferences alone",
    "Where users judge the same pairs, grad f_i - grad f = -beta E[(pr_i - pr_mean) grad h]: it does not depend on the policy, "
    "so zeta^2 is the same at every theta.",
    of="log-linear, shared pairs",
    where="docs/theory, section 1",
)
def heterogeneity(effort: Effort) -> Finding:
    """zeta^2 from answers alone against zeta^2 of the gradients, along a line far beyond the optimum."""
    problem, x, pr = same_pairs(6, 20, 5, 8, effort.seed)
    differences = -problem.beta * ((pr - pr.mean(0)) @ x) / len(x)
    expected = float(np.square(differences).sum(1).mean())
    scale = np.linspace(-2, 4, 13)
    found = [problem.heterogeneity(s * problem.optimum()) for s in scale]
    worst = max(found, key=lambda value: abs(value - expected))
    return Finding(
        kind="equal",
        predicted=expected,
        measured=worst,
        tolerance=1e-9,
        note="Measured: the value furthest off among 13 points on the line through 0 and the optimum.",
        plot=Plot(
            x_label="theta, in units of the optimum",
            y_label="zeta squared",
            series=[
                Series(label="from the answers", x=scale.tolist(), y=[expected] * len(scale)),
                Series(label="of the gradients", x=scale.tolist(), y=found, kind="points"),
            ],
        ),
    )


@claim(
    "The consensus optimum averages probabilities",
    "With one pair per prompt and an unrestricted policy, sigmoid(beta h*) is the mean of the users' probabilities, "
    "not the one that their mean reward gives.",
    of="log-linear, one free direction per prompt",
    where="docs/theory, section 1",
)
def probabilities(effort: Effort) -> Finding:
    """Free policies of disagreeing users: the optimum against the mean probability, worst prompt."""
    random = generator(effort.seed, "verify/free")
    agents, prompts, answers, beta = 5, 8, 20, 0.3
    yes = random.integers(1, answers, size=(agents, prompts))
    eye = np.eye(prompts)
    shards = [
        np.concatenate([np.repeat(eye, yes[i], axis=0), -np.repeat(eye, answers - yes[i], axis=0)])
        for i in range(agents)
    ]
    h = LogLinearProblem(shards, beta).optimum()
    found, mean = expit(beta * h), yes.mean(0) / answers
    of_rewards = expit(logit(yes / answers).mean(0))
    order = np.argsort(mean)
    worst = int(np.abs(found - mean).argmax())
    return Finding(
        kind="equal",
        predicted=float(mean[worst]),
        measured=float(found[worst]),
        tolerance=1e-9,
        note=f"The policy that averages rewards differs from it by up to {np.abs(of_rewards - mean).max():.3f}.",
        plot=Plot(
            x_label="mean probability of the users",
            y_label="sigmoid(beta h*)",
            series=[
                Series(label="mean of probabilities", x=mean[order].tolist(), y=mean[order].tolist()),
                Series(
                    label="at the optimum", x=mean[order].tolist(), y=found[order].tolist(), kind="points"
                ),
                Series(
                    label="mean of rewards",
                    x=mean[order].tolist(),
                    y=of_rewards[order].tolist(),
                    kind="points",
                ),
            ],
        ),
    )


@claim(
    "Lam bounds the curvature",
    "No agent's Hessian exceeds Lam = max_i (beta^2/4) lambda_max(E_i[x x^T]) anywhere.",
    of="log-linear",
    where="docs/theory, section 2",
)
def smoothness(effort: Effort) -> Finding:
    """The largest eigenvalue of any agent's Hessian over many points, the origin (where it is met) among them."""
    problem, _, _ = same_pairs(6, 20, 5, 8, effort.seed)
    random = generator(effort.seed, "verify/points")
    points = [np.zeros(5), *(random.normal(size=(effort.pick(50, 500), 5)) * 3)]
    largest = max(float(np.linalg.eigvalsh(problem.agent_hessians(p))[:, -1].max()) for p in points)
    return Finding(kind="at most", predicted=problem.smoothness() * (1 + 1e-12), measured=largest)
