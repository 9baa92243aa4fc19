"""Log-probabilities of stacked agents, against one plain forward pass per sequence; samples, against the distribution."""

from collections import Counter

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from prefmesh.policies.base import EncodedPairs, Params, Policy, passes
from prefmesh.policies.causal_lm import CausalLMPolicy
from prefmesh.policies.packing import Tree
from prefmesh.preferences.pairs import Pair
from prefmesh.randomness import generator, torch_seeded
from tests import models, problems
from tests.equivalence import naive

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
MORE_FAMILIES = {
    "qwen3": SMALL | {"num_key_value_heads": 2, "head_dim": 8},
    "phi3": SMALL,
    "smollm3": SMALL | {"num_key_value_heads": 2},
    "gemma": SMALL | {"num_key_value_heads": 2, "head_dim": 8},
    # A window shorter than the texts: what is out of it must be out of it here too.
    "mistral": SMALL | {"num_key_value_heads": 2, "sliding_window": 6},
    "gemma3_text": SMALL
    | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6, "num_hidden_layers": 7},
    "phi": SMALL,
    "gpt_neox": SMALL,
    # These attend by code of their own, so their pairs stand in padded rows.
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
}
PADDED = ("bloom", "falcon")


def model(family: str) -> torch.nn.Module:
    if family in models.FAMILIES:
        return models.model(family, dtype="float64")
    config = AutoConfig.for_model(
        family, vocab_size=len(models.WORDS) + 3, max_position_embeddings=128, eos_token_id=0, bos_token_id=0,
        pad_token_id=1, initializer_range=0.2, **MORE_FAMILIES[family],
    )  # fmt: skip
    with torch_seeded(0, "test model"):
        return AutoModelForCausalLM.from_config(config).to(torch.float64).eval()


@pytest.mark.parametrize("family", [*models.FAMILIES, *MORE_FAMILIES])
def test_log_probabilities_are_those_of_one_sequence_at_a_time(family) -> None:
    """Unequal lengths, padding, several agents and pairs in one pass; the prompt's last token predicts the first."""
    policy = CausalLMPolicy(model(family), models.tokenizer(), train="lora", lora_settings=problems.LORA)  # type: ignore[arg-type]
    assert policy.packs == (family not in PADDED)
    data = policy.encode(models.pairs(6))
    assert len(set(map(len, data.prompt))) > 1
    chosen, rejected = policy.reference_log_probs(data, np.array([[0, 1, 2], [3, 4, 5]]))
    plain = model(family)
    with torch.no_grad():
        for i in range(6):
            where = divmod(i, 3)
            for found, side in ((chosen, data.chosen), (rejected, data.rejected)):
                expected = float(naive.sequence_log_prob(plain, data.prompt[i], side[i]))
                assert float(found[where]) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("train", ["lora", "full"])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_stacked_agents_do_not_mix(train, family) -> None:
    """Each agent's log-probabilities, and gradients, are those it has alone, whatever the others hold."""
    policy = problems.causal_lm(train, family, dtype="float64")
    data = policy.encode(models.pairs(6))
    torch.manual_seed(0)
    row = policy.initial(0)
    stacked = {name: t.repeat(3, *[1] * (t.dim() - 1)) for name, t in row.items()}
    stacked = {name: (t + 0.1 * torch.randn_like(t)).requires_grad_() for name, t in stacked.items()}
    rows = np.array([[0, 1], [2, 3], [4, 1]])
    chosen, rejected = policy.log_probs(stacked, data, rows)
    (gradient,) = torch.autograd.grad(
        (chosen[1] - rejected[1]).sum(), [first := next(iter(stacked.values()))]
    )
    assert gradient[1].abs().max() > 0
    assert gradient[0].abs().max() == gradient[2].abs().max() == 0
    assert gradient.shape == first.shape
    for i, alone in enumerate(naive.rows_of({name: t.detach() for name, t in stacked.items()})):
        own_chosen, own_rejected = policy.log_probs(alone, data, rows[i : i + 1])
        assert torch.allclose(chosen[i], own_chosen[0], rtol=1e-10)
        assert torch.allclose(rejected[i], own_rejected[0], rtol=1e-10)


@pytest.mark.parametrize("train", ["lora", "full"])
def test_it_starts_at_the_reference_and_keeps_it(train) -> None:
    policy = problems.causal_lm(train)
    data = policy.encode(models.pairs(4))
    rows = np.arange(4)[None]
    before = torch.stack(policy.reference_log_probs(data, rows))
    start = policy.initial(0)
    assert torch.allclose(torch.stack(policy.log_probs(start, data, rows)), before, rtol=1e-5)
    moved = {name: t + 1 for name, t in start.items()}
    assert not torch.allclose(torch.stack(policy.log_probs(moved, data, rows)), before, rtol=1e-2)
    assert torch.equal(torch.stack(policy.reference_log_probs(data, rows)), before)
    assert isinstance(policy, Policy)
    assert isinstance(data, EncodedPairs)


def test_dropout_is_off_for_policy_and_reference() -> None:
    made = models.model()
    for part in made.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.5
    policy = CausalLMPolicy(made.train(), models.tokenizer(), train="lora")
    data = policy.encode(models.pairs(3))
    first, again = (policy.log_probs(policy.initial(0), data, np.arange(3)[None])[0] for _ in range(2))
    assert torch.equal(first, again)


def test_half_precision_adds_up_in_float32_and_trains_in_float32() -> None:
    policy = problems.causal_lm("lora", dtype="bfloat16")
    start = policy.initial(0)
    assert {t.dtype for t in start.values()} == {torch.float32}
    data = policy.encode(models.pairs(3))
    chosen, _ = policy.log_probs(start, data, np.arange(3)[None])
    assert chosen.dtype == torch.float32
    exact, _ = problems.causal_lm("lora", dtype="float64").reference_log_probs(data, np.arange(3)[None])
    assert torch.allclose(chosen.double(), exact, rtol=0.02)


def test_fingerprints_tell_references_apart() -> None:
    same = {problems.causal_lm(train).fingerprint() for train in ("lora", "full")}
    assert len(same) == 1
    assert problems.causal_lm("lora", seed=1).fingerprint() not in same
    assert problems.causal_lm("lora", dtype="float64").fingerprint() not in same


def test_texts_are_no_longer_than_the_model_reads() -> None:
    assert problems.causal_lm("lora", max_length=512).max_length == 128
    assert problems.causal_lm("lora", max_length=20).max_length == 20


@pytest.mark.parametrize("budget", [1, 40, 1000])
def test_passes_hold_every_pair_once_within_the_budget(budget) -> None:
    policy = problems.causal_lm("lora")
    data = policy.encode(models.pairs(20))
    rows = np.arange(20)[::-1].copy()
    parts = passes(data, rows, budget)
    assert sorted(np.concatenate(parts)) == list(range(20))
    for part in parts:
        padded = len(part) * data.cost[rows[part]].max()
        assert padded <= budget or len(part) == 1


def uniform(prompts: int, tokens: int, seed: int = 0) -> np.ndarray:
    return generator(seed, "test").random((prompts, tokens))


class TestSamples:
    """One-token completions can be enumerated: the next token's distribution is known exactly."""

    PROMPTS = ("w1 w2 w3", "w7", "w5 w6 w7 w8 w9")

    def exact(self, policy: CausalLMPolicy, row: Params, prompt: str) -> np.ndarray:
        """log pi(token | prompt) of all tokens, one by one."""
        ids = models.tokenizer()(prompt)["input_ids"]
        tokens = [[t] for t in range(len(models.tokenizer()))]
        with torch.no_grad():
            return policy.score(row, [Tree(ids, tuple(tokens))]).double().numpy()

    def moved(self, policy: CausalLMPolicy) -> Params:
        torch.manual_seed(0)
        size = 0.3 if policy.train == "lora" else 0.1
        return {name: t + size * torch.randn_like(t) for name, t in policy.initial(0).items()}

    @pytest.mark.parametrize("family", ["gpt2", "llama"])
    @pytest.mark.parametrize("train", ["lora", "full"])
    def test_frequencies_and_kl(self, train, family) -> None:
        policy = problems.causal_lm(train, family)
        # What a model's own generation_config asks for would bend the distribution.
        policy.model.generation_config.repetition_penalty = 9.0
        policy.model.generation_config.top_k = 3
        row = self.moved(policy)
        count = 1500
        drawn = policy.sample(row, list(self.PROMPTS) * count, uniform(3 * count, 1))
        assert policy.model.generation_config.repetition_penalty == 9.0
        log_ratio = (drawn.log_probs - drawn.ref_log_probs)[0].double().numpy()
        for i, prompt in enumerate(self.PROMPTS):
            log_pi, log_ref = self.exact(policy, row, prompt), self.exact(policy, {}, prompt)
            assert np.exp(log_pi).sum() == pytest.approx(1, abs=1e-5)
            # Frequencies of the words, by a chi-square over those that are expected often enough.
            seen = Counter(drawn.texts[i :: len(self.PROMPTS)])
            words = models.tokenizer().convert_ids_to_tokens(list(range(len(log_pi))))
            often = [k for k in range(3, len(words)) if np.exp(log_pi[k]) * count >= 10]
            expected = np.exp(log_pi[often]) * count
            chi2 = ((np.array([seen[words[k]] for k in often]) - expected) ** 2 / expected).sum()
            assert chi2 < len(often) + 5 * np.sqrt(2 * len(often))
            # KL, enumerated and estimated.
            kl = float((np.exp(log_pi) * (log_pi - log_ref)).sum())
            own = log_ratio[i :: len(self.PROMPTS)]
            assert kl > 0.02
            assert abs(own.mean() - kl) < 4 * own.std() / np.sqrt(count)

    def test_the_same_again_and_global_state_untouched(self) -> None:
        policy = problems.causal_lm("lora")
        torch.manual_seed(3)
        before = torch.get_rng_state()
        first, again = (policy.sample({}, self.PROMPTS, uniform(3, 6, 5)) for _ in range(2))
        other = policy.sample({}, self.PROMPTS, uniform(3, 6, 6))
        assert first.texts == again.texts != other.texts
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.allclose(first.log_probs, first.ref_log_probs)

    def test_agents_draw_as_they_do_alone(self) -> None:
        policy = problems.causal_lm("lora")
        start, moved = policy.initial(0), self.moved(policy)
        both = {name: torch.cat([start[name], moved[name]]) for name in start}
        numbers = uniform(3, 5)
        together = policy.sample(both, self.PROMPTS, numbers)
        assert together.log_probs.shape == (2, 3)
        alone = [policy.sample(row, self.PROMPTS, numbers) for row in (start, moved)]
        assert together.texts == alone[0].texts + alone[1].texts
        assert torch.allclose(together.log_probs, torch.cat([one.log_probs for one in alone]))

    def test_prompts_draw_as_they_do_alone(self) -> None:
        policy = problems.causal_lm("lora")
        moved, numbers = self.moved(policy), uniform(3, 5)
        together = policy.sample(moved, self.PROMPTS, numbers)
        for i, prompt in enumerate(self.PROMPTS):
            assert policy.sample(moved, [prompt], numbers[i : i + 1]).texts == together.texts[i : i + 1]

    def test_they_end_with_the_first_end_of_text(self) -> None:
        policy = problems.causal_lm("lora")
        drawn = policy.sample({}, ["w1"] * 300, uniform(300, 12))
        lengths = {len(text.split()) for text in drawn.texts}
        assert min(lengths) < 12  # some ended early
        assert max(lengths) <= 12


def test_plain_text_and_its_user_stay_out_of_the_encoding() -> None:
    """Only texts are encoded: another user's same pair is the same."""
    policy = problems.causal_lm("lora")
    one, other = (Pair(prompt="w1", chosen=" w2", rejected=" w3", user=user) for user in "ab")
    assert policy.encode([one]).fingerprint() == policy.encode([other]).fingerprint()
