"""Each loss against its closed form and finite differences; batches, divergences and sums; ties; what the settings refuse."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from prefmesh.errors import InputError
from prefmesh.objectives import LOSSES, ObjectiveSettings, PairLogProbs, pair_loss, rounding
from prefmesh.objectives.divergences import score

logps = st.floats(-50, 0)
betas = st.floats(0.01, 5)


def seen(chosen: float | Tensor, rejected: float | Tensor, ref: tuple[float, float] = (0.0, 0.0), tokens=(1, 1)) -> PairLogProbs:  # fmt: skip
    def table(value: float | Tensor) -> Tensor:
        return torch.as_tensor(value, dtype=torch.float64).reshape(1, -1)

    return PairLogProbs(
        chosen=table(chosen),
        rejected=table(rejected),
        ref_chosen=table(ref[0]),
        ref_rejected=table(ref[1]),
        chosen_tokens=torch.tensor([[tokens[0]]]),
        rejected_tokens=torch.tensor([[tokens[1]]]),
    )


def log1p_exp(x: float) -> float:
    """log(1 + e^x) without overflow."""
    return max(x, 0) + math.log1p(math.exp(-abs(x)))


def sigmoid(x: float) -> float:
    """1 / (1 + e^-x) without overflow."""
    return math.exp(-log1p_exp(-x))


def closed(
    loss_type: str, w: float, l: float, beta: float, eps: float, tokens=(1, 1), chosen: float = math.nan  # noqa: E741
) -> float:  # fmt: skip
    """The papers' formulas in the standard library, of log u_w and log u_l."""
    h, per_token = w - l, w / tokens[0] - l / tokens[1]
    plain, flipped = log1p_exp(-beta * h), log1p_exp(beta * h)
    smoothed = (1 - eps) * plain + eps * flipped
    p, m = sigmoid(beta * h), sigmoid(beta * h / 0.05)
    return {
        "sigmoid": lambda: smoothed,
        "robust": lambda: ((1 - eps) * plain - eps * flipped) / (1 - 2 * eps),
        "hinge": lambda: max(0.0, 1 - beta * h),
        "ipo": lambda: (per_token - 1 / (2 * beta)) ** 2,
        "sigmoid_norm": lambda: log1p_exp(-beta * per_token),
        "exo_pair": lambda: (
            p * (-plain - math.log(1 - eps)) + sigmoid(-beta * h) * (-flipped - math.log(eps))
        ),
        "discopop": lambda: (1 - m) * plain + m * math.exp(-beta * h),
        "nca_pair": lambda: log1p_exp(-beta * w) + (log1p_exp(beta * w) + log1p_exp(beta * l)) / 2,
        "bco_pair": lambda: log1p_exp(-beta * w) + log1p_exp(beta * l),
        "sppo_hard": lambda: (w - 1 / (2 * beta)) ** 2 + (l + 1 / (2 * beta)) ** 2,
        "apo_zero": lambda: 1 - sigmoid(beta * w) + sigmoid(beta * l),
        "apo_down": lambda: sigmoid(beta * w) + 1 - p,
        "aot": lambda: smoothed,  # a batch of one
        "aot_unpaired": lambda: smoothed,
        "sft": lambda: -chosen / tokens[0],
    }[loss_type]()


CASES = [
    ("sigmoid", 0.0), ("sigmoid", 0.2), ("robust", 0.0), ("robust", 0.3), ("hinge", 0.0), ("ipo", 0.0), ("sigmoid_norm", 0.0),
    ("exo_pair", 0.001), ("exo_pair", 0.2), ("discopop", 0.0), ("nca_pair", 0.0), ("bco_pair", 0.0), ("sppo_hard", 0.0),
    ("apo_zero", 0.0), ("apo_down", 0.0), ("aot", 0.0), ("aot", 0.2), ("aot_unpaired", 0.0), ("aot_unpaired", 0.2), ("sft", 0.0),
]  # fmt: skip
lengths = st.tuples(st.integers(1, 9), st.integers(1, 9))


def least_smoothing(loss_type: str) -> float:
    return 0.001 if loss_type == "exo_pair" else 0.0


@pytest.mark.parametrize("case", CASES, ids=str)
@given(logps, logps, logps, logps, betas, lengths)
def test_closed_forms(case, chosen, rejected, ref_chosen, ref_rejected, beta, tokens) -> None:
    loss_type, eps = case
    settings = ObjectiveSettings(loss_type=loss_type, beta=beta, label_smoothing=eps)
    expected = closed(loss_type, chosen - ref_chosen, rejected - ref_rejected, beta, eps, tokens, chosen)
    found = float(pair_loss(seen(chosen, rejected, (ref_chosen, ref_rejected), tokens), settings))
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_every_loss_has_a_case() -> None:
    assert {name for name, _ in CASES} == set(LOSSES)


@pytest.mark.parametrize(("loss_type", "eps"), CASES)
@pytest.mark.parametrize("h", [-3.0, -0.1, 0.0, 0.7, 3.0])  # the hinge has its corner at 2
def test_gradients_are_finite_differences(loss_type, eps, h) -> None:
    settings = ObjectiveSettings(loss_type=loss_type, beta=0.5, label_smoothing=eps)

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        return pair_loss(seen(chosen, rejected, (-2.0, -3.0), tokens=(3, 2)), settings).sum()

    chosen = torch.tensor(h - 2.0, dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (chosen, rejected), eps=1e-6, atol=1e-8)


def test_sigmoid_by_hand() -> None:
    """h = log 3 / beta: the chosen one wins with probability 3/4."""
    settings = ObjectiveSettings(beta=0.2)
    found = pair_loss(seen(-1.0, -1.0 - math.log(3) / 0.2), settings)
    assert float(found) == pytest.approx(math.log(4 / 3))


def test_at_the_reference() -> None:
    for name, expected in {"sigmoid": math.log(2), "robust": math.log(2), "hinge": 1.0, "ipo": 25.0}.items():
        found = pair_loss(seen(-7.0, -4.0, (-7.0, -4.0)), ObjectiveSettings(loss_type=name, beta=0.1))
        assert float(found) == pytest.approx(expected, rel=1e-12), name


def test_ipo_divides_by_lengths() -> None:
    """(6/3 - (-4)/2 - 1/(2 beta))^2 = (4 - 5)^2."""
    found = pair_loss(seen(6.0, -4.0, tokens=(3, 2)), ObjectiveSettings(loss_type="ipo", beta=0.1))
    assert float(found) == pytest.approx(1.0)


@given(logps, logps, betas, st.floats(0, 0.45))
def test_robust_undoes_flips(chosen, rejected, beta, eps) -> None:
    """The expectation of the robust loss over answers flipped with probability eps is the loss without flips."""

    def loss(a: float, b: float, loss_type: str, smoothing: float) -> float:
        settings = ObjectiveSettings(loss_type=loss_type, beta=beta, label_smoothing=smoothing)
        return float(pair_loss(seen(a, b), settings))

    expected = (1 - eps) * loss(chosen, rejected, "robust", eps) + eps * loss(rejected, chosen, "robust", eps)
    assert expected == pytest.approx(loss(chosen, rejected, "sigmoid", 0.0), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_slopes_stay_finite_at_large_margins(name, sign) -> None:
    chosen = torch.tensor(sign * 1e6, dtype=torch.float64, requires_grad=True)
    settings = ObjectiveSettings(loss_type=name, beta=1.0, label_smoothing=least_smoothing(name))
    found = pair_loss(seen(chosen, 0.0), settings)
    (slope,) = torch.autograd.grad(found.sum(), chosen)
    assert torch.isfinite(found).all()
    assert torch.isfinite(slope).all()


def f_prime(divergence: str, u: float, alpha: float) -> float:
    """Of the papers' f, by hand."""
    if divergence == "forward_kl":  # f = -log u, and a constant that makes f'(1) = 0
        return 1 - 1 / u
    if divergence == "js_divergence":  # f = u log u - (u + 1) log((u + 1) / 2)
        return math.log(2 * u / (1 + u))
    return math.log(u) if alpha == 1 else (u ** (alpha - 1) - 1) / (alpha - 1)


DIVERGENCES = [
    ("forward_kl", 0.5),
    ("js_divergence", 0.5),
    *(("alpha_divergence", alpha) for alpha in (-1.0, 0.5, 1.0, 2.0)),
]
DIVERGENT = ["sigmoid", "robust", "hinge", "ipo", "sigmoid_norm", "exo_pair", "discopop"]


class TestDivergences:
    def settings(self, loss_type: str, divergence: str, alpha: float) -> ObjectiveSettings:
        return ObjectiveSettings(
            loss_type=loss_type, beta=0.3, label_smoothing=least_smoothing(loss_type),
            f_divergence_type=divergence, f_alpha_divergence_coef=alpha,  # type: ignore[arg-type]
        )  # fmt: skip

    @pytest.mark.parametrize("loss_type", DIVERGENT)
    @pytest.mark.parametrize(("divergence", "alpha"), DIVERGENCES)
    def test_f_prime_takes_the_place_of_the_log(self, loss_type, divergence, alpha) -> None:
        u, tokens = (1.7, 0.4), (3, 2)
        chosen, rejected = (f_prime(divergence, ratio, alpha) for ratio in u)
        settings = self.settings(loss_type, divergence, alpha)
        found = pair_loss(seen(math.log(u[0]), math.log(u[1]), tokens=tokens), settings)
        expected = closed(loss_type, chosen, rejected, 0.3, least_smoothing(loss_type), tokens)
        assert float(found) == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize(("divergence", "alpha"), DIVERGENCES)
    def test_gradients_are_finite_differences(self, divergence, alpha) -> None:
        settings = self.settings("sigmoid", divergence, alpha)
        sides = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (-1.2, 0.7)]
        assert torch.autograd.gradcheck(lambda a, b: pair_loss(seen(a, b), settings).sum(), sides, atol=1e-8)

    @pytest.mark.parametrize(("divergence", "alpha"), DIVERGENCES)
    @given(logps, logps)
    def test_scores_rise_and_are_0_at_the_reference(self, divergence, alpha, x, y) -> None:
        """f'(1) = 0 and f''(1) = 1 (Jensen and Shannon's: 1/2), so that all begin like DPO."""
        settings = self.settings("sigmoid", divergence, alpha)
        low, high = score(torch.tensor([sorted((x, y))], dtype=torch.float64), settings)[0]
        assert low <= high
        at = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
        value = score(at, settings)
        (slope,) = torch.autograd.grad(value.sum(), at)
        assert float(value.detach()) == 0
        assert float(slope) == (0.5 if divergence == "js_divergence" else 1)

    @pytest.mark.parametrize(("divergence", "alpha"), DIVERGENCES)
    @pytest.mark.parametrize("nats", [-100.0, 100.0])
    def test_float32_stays_finite(self, divergence, alpha, nats) -> None:
        """e^100 is more than it holds."""
        assert torch.isfinite(
            score(torch.full((1, 1), nats), self.settings("sigmoid", divergence, alpha))
        ).all()


class TestSums:
    @given(logps, logps, lengths)
    def test_are_weighted(self, chosen, rejected, tokens) -> None:
        settings = ObjectiveSettings(loss_type=["sigmoid", "sft"], loss_weights=[1.5, 0.2], beta=0.3)
        expected = 1.5 * closed("sigmoid", chosen, rejected, 0.3, 0) - 0.2 * chosen / tokens[0]
        assert float(pair_loss(seen(chosen, rejected, tokens=tokens), settings)) == pytest.approx(expected)

    def test_weights_are_1_unless_said(self) -> None:
        settings = ObjectiveSettings(loss_type=["hinge", "bco_pair"], beta=0.3)
        expected = closed("hinge", -2, 1, 0.3, 0) + closed("bco_pair", -2, 1, 0.3, 0)
        assert float(pair_loss(seen(-2.0, 1.0), settings)) == pytest.approx(expected, rel=1e-12)
        assert settings.losses == [("hinge", 1.0), ("bco_pair", 1.0)]

    def test_a_list_of_one_is_that_loss(self) -> None:
        one, same = (
            ObjectiveSettings(loss_type=["hinge"], loss_weights=[1]),
            ObjectiveSettings(loss_type="hinge"),
        )
        assert float(pair_loss(seen(-2.0, 1.0), one)) == float(pair_loss(seen(-2.0, 1.0), same))

    @pytest.mark.parametrize(
        ("options", "plain"),
        [
            ({}, True),
            ({"loss_type": ["sigmoid"], "loss_weights": [1.0]}, True),
            ({"loss_weights": [0.5]}, False),
            ({"loss_type": ["sigmoid", "sft"]}, False),
            ({"loss_type": "hinge"}, False),
            ({"label_smoothing": 0.1}, False),
            ({"f_divergence_type": "js_divergence"}, False),
        ],
    )
    def test_what_is_plain_dpo(self, options, plain) -> None:
        assert ObjectiveSettings(**options).plain_dpo == plain


def batch(random: torch.Generator, agents: int, pairs: int, **fields: Tensor) -> PairLogProbs:
    """Random log-probabilities and lengths."""
    names = ("chosen", "rejected", "ref_chosen", "ref_rejected")
    made = {n: -20 * torch.rand(agents, pairs, dtype=torch.float64, generator=random) for n in names}
    made |= {f"{n}_tokens": torch.randint(1, 9, (agents, pairs), generator=random) for n in names[:2]}
    return PairLogProbs(**(made | fields))


Place = slice | Tensor


def of(whole: PairLogProbs, agents: Place, pairs: Place) -> PairLogProbs:
    """Some agents' pairs."""
    tensors = {name: getattr(whole, name) for name in PairLogProbs.__slots__}
    return PairLogProbs(**{name: None if t is None else t[agents][:, pairs] for name, t in tensors.items()})


def total(whole: PairLogProbs, settings: ObjectiveSettings) -> Tensor:
    """Each agent's loss, as a training step takes it."""
    assert whole.weights is not None
    return (pair_loss(whole, settings) * whole.weights).sum(1)


EVERY = slice(None)
BATCH_LOSSES = ["aot", "aot_unpaired", "sft"]
seeds = st.integers(0, 10**6)


def random_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestBatches:
    """Losses that look at the whole batch, and all others beside them."""

    def settings(self, loss_type: str) -> ObjectiveSettings:
        return ObjectiveSettings(loss_type=loss_type, beta=0.2, label_smoothing=least_smoothing(loss_type))

    @pytest.mark.parametrize("loss_type", LOSSES)
    @given(seeds, st.integers(1, 6), st.integers(0, 3))
    def test_pairs_of_weight_0_change_nothing(self, loss_type, seed, pairs, fillers) -> None:
        """As they fill up full batches of unequal shards; wherever they stand."""
        random, settings = random_of(seed), self.settings(loss_type)
        weights = torch.zeros(2, pairs + fillers, dtype=torch.float64)
        weights[:, :pairs] = 1 / pairs
        filled = batch(random, 2, pairs + fillers, weights=weights)
        filled.chosen.requires_grad_()
        without = total(of(filled, EVERY, slice(pairs)), settings)
        (expected,) = torch.autograd.grad(without.sum(), filled.chosen)
        shuffled = torch.randperm(pairs + fillers, generator=random)
        for order in (EVERY, shuffled):
            found = total(of(filled, EVERY, order), settings)
            assert torch.allclose(found, without, rtol=1e-12)
            (slope,) = torch.autograd.grad(found.sum(), filled.chosen)
            assert torch.allclose(slope, expected, rtol=1e-12, atol=1e-15)
            assert (slope[:, pairs:] == 0).all()

    @pytest.mark.parametrize("loss_type", LOSSES)
    @given(seeds)
    def test_agents_do_not_see_each_other(self, loss_type, seed) -> None:
        settings, three = self.settings(loss_type), batch(random_of(seed), 3, 5)
        for i in range(3):
            own = pair_loss(of(three, slice(i, i + 1), EVERY), settings)
            assert torch.allclose(pair_loss(three, settings)[i], own[0], rtol=1e-12)

    @pytest.mark.parametrize("loss_type", LOSSES)
    @given(seeds)
    def test_alone_no_pair_sees_another(self, loss_type, seed) -> None:
        settings, three = self.settings(loss_type), batch(random_of(seed), 3, 4)
        found = pair_loss(three, settings, alone=True)
        for i in range(3):
            for j in range(4):
                one = pair_loss(of(three, slice(i, i + 1), slice(j, j + 1)), settings)
                assert float(found[i, j]) == pytest.approx(float(one), rel=1e-12)

    @pytest.mark.parametrize("loss_type", LOSSES)
    def test_a_batch_without_weight_has_no_loss(self, loss_type) -> None:
        empty = batch(random_of(0), 1, 3, weights=torch.zeros(1, 3, dtype=torch.float64))
        assert float(total(empty, self.settings(loss_type))) == 0

    def test_sft_is_a_mean_over_the_tokens_of_a_batch(self) -> None:
        """(6 + 2) / (5 + 1) for weights of 1/2; (3 x 6 + 2) / (3 x 5 + 1) for 3/4 and 1/4."""
        two = batch(
            random_of(0), 2, 2,
            weights=torch.tensor([[0.5, 0.5], [0.75, 0.25]]).double(),
            chosen=torch.tensor([[-6.0, -2.0]] * 2).double(),
            chosen_tokens=torch.tensor([[5, 1]] * 2),
        )  # fmt: skip
        assert total(two, self.settings("sft")).tolist() == pytest.approx([8 / 6, 20 / 16])

    def test_aot_sorts_both_sides(self) -> None:
        """3, 1, 2 against 0, 5, 1: 1 meets 0, 2 meets 1, 3 meets 5, and the loss lies with the policy's pair."""
        zero = torch.zeros(1, 3, dtype=torch.float64)
        own, other = torch.tensor([[3.0, 1.0, 2.0]]).double(), torch.tensor([[0.0, 5.0, 1.0]]).double()
        expected = [log1p_exp(-0.2 * gap) for gap in (3 - 5, 1 - 0, 2 - 1)]
        for loss_type, fields in {
            "aot": {"chosen": own, "rejected": zero, "ref_chosen": other, "ref_rejected": zero},
            "aot_unpaired": {"chosen": own, "rejected": other, "ref_chosen": zero, "ref_rejected": zero},
        }.items():
            found = pair_loss(batch(random_of(0), 1, 3, **fields), self.settings(loss_type))
            assert found[0].tolist() == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize("loss_type", BATCH_LOSSES)
    @given(seeds, st.lists(st.integers(0, 3), min_size=1, max_size=5).filter(any))
    def test_a_weight_of_k_is_a_pair_k_times(self, loss_type, seed, counts) -> None:
        """Weights are unlike where one agent holds shards of all sizes."""
        settings, times = self.settings(loss_type), torch.tensor(counts)
        once = batch(random_of(seed), 1, len(counts), weights=(times / times.sum()).double()[None])
        often = of(once, EVERY, torch.arange(len(counts)).repeat_interleave(times))
        expected = pair_loss(replace(often, weights=None), settings).mean(1)
        assert torch.allclose(total(once, settings), expected, rtol=1e-6)

    @pytest.mark.parametrize("loss_type", BATCH_LOSSES)
    def test_gradients_are_finite_differences(self, loss_type) -> None:
        weights = torch.tensor([[0.5, 0.25, 0.25, 0.0]]).double()
        four = batch(random_of(1), 1, 4, weights=weights)

        def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
            return total(replace(four, chosen=chosen, rejected=rejected), self.settings(loss_type))

        sides = [side.clone().requires_grad_() for side in (four.chosen, four.rejected)]
        assert torch.autograd.gradcheck(loss, sides, eps=1e-6, atol=1e-8)


class TestAccuracy:
    def accuracy(self, h: float, *, dtype: torch.dtype = torch.float32, size: float = 100.0) -> float:
        return float(seen(h - size, -size, (-size, -size)).accuracy(rounding(dtype)))

    def test_ranked(self) -> None:
        assert self.accuracy(0.5) == 1
        assert self.accuracy(-0.5) == 0

    def test_ties_count_one_half(self) -> None:
        assert self.accuracy(0.0) == 0.5
        # The limit: 8 eps (|log pi(y_w)| + |log pi(y_l)|).
        limit = 8 * 2**-23 * 200
        assert self.accuracy(0.9 * limit) == self.accuracy(-0.9 * limit) == 0.5
        assert self.accuracy(1.1 * limit) == 1
        assert self.accuracy(-1.1 * limit) == 0
        assert self.accuracy(0.9 * limit, dtype=torch.float64) == 1

    def test_half_precision_does_not_make_ties(self) -> None:
        """Half a nat between completions of 100 nats is a preference, under a bfloat16 model too."""
        assert self.accuracy(0.5, dtype=torch.bfloat16) == 1
        assert rounding(torch.bfloat16) == rounding(torch.float32) == 2**-23
        assert rounding(torch.float64) == 2**-52

    def test_nan_stays_nan(self) -> None:
        assert math.isnan(self.accuracy(math.nan))

    @given(logps, logps)
    def test_swapping_sides_mirrors_it(self, a, b) -> None:
        forward, backward = seen(a, b).accuracy(1e-16), seen(b, a).accuracy(1e-16)
        assert float(forward + backward) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "sigmiod"}, "did you mean 'sigmoid'"),
        ({"beta": 0.0}, "greater than 0"),
        ({"label_smoothing": 0.5}, "less than 0.5"),
        ({"loss_type": "ipo", "label_smoothing": 0.1}, "has no meaning for loss_type 'ipo'"),
        ({"loss_type": []}, r"found \[\]; allowed: the name of a loss, or a list of names"),
        ({"loss_type": 3}, "found 3; allowed: the name of a loss"),
        ({"loss_type": ["sigmoid", 3]}, "allowed: the name of a loss"),
        ({"loss_type": ["sigmoid", "stf"]}, "did you mean 'sft'"),
        ({"loss_type": ["sft", "sft"]}, "'sft' found twice"),
        ({"loss_type": ["hinge", "sft"], "loss_weights": [1.0]}, r"\[1.0\] found for 2 in loss_type"),
        ({"loss_weights": [1.0, 0.2]}, r"\[1.0, 0.2\] found for 1 in loss_type"),
        ({"loss_type": ["hinge", "sft"], "loss_weights": [1.0, 0.0]}, "allowed: numbers above 0"),
        ({"loss_type": ["ipo", "sft"], "label_smoothing": 0.1}, r"no meaning for loss_type \['ipo', 'sft'\]"),
        ({"loss_type": "exo_pair"}, "label_smoothing 0 leaves exo_pair without bound"),
        ({"discopop_tau": 0.1}, "discopop_tau 0.1 has no meaning for loss_type 'sigmoid'"),
        ({"loss_type": "discopop", "discopop_tau": 0.0}, "greater than 0"),
        ({"f_divergence_type": "kl"}, "'reverse_kl'"),
        ({"f_alpha_divergence_coef": 0.3}, "0.3 has no meaning for f_divergence_type reverse_kl"),
        ({"loss_type": "aot", "f_divergence_type": "forward_kl"}, "no meaning for loss_type 'aot'"),
        ({"loss_type": "sft", "f_divergence_type": "forward_kl"}, "no meaning for loss_type 'sft'"),
        (
            {"loss_type": ["hinge", "aot"], "f_divergence_type": "forward_kl"},
            "no meaning for loss_type 'aot'",
        ),
    ],
)
def test_refused(settings, message) -> None:
    with pytest.raises((InputError, ValidationError), match=message):
        ObjectiveSettings(**settings)


def test_sft_goes_with_a_divergence_of_others() -> None:
    made = ObjectiveSettings(loss_type=["sigmoid", "sft"], f_divergence_type="js_divergence")
    assert made.names == ["sigmoid", "sft"]


def test_a_new_loss_is_one_function() -> None:
    from prefmesh import objectives

    @objectives.loss("margin", uses=("discopop_tau",))
    def margin(log_probs: PairLogProbs, settings: ObjectiveSettings) -> Tensor:
        return -log_probs.margin

    try:
        assert isinstance(margin, Callable)
        found = pair_loss(seen(-1.0, -4.0), ObjectiveSettings(loss_type="margin", discopop_tau=0.2))
        assert float(found) == -3
        with pytest.raises(InputError, match="'margin' is taken"):
            objectives.loss("margin")(margin)
    finally:
        del objectives.LOSSES["margin"], objectives.TRAITS["margin"]
