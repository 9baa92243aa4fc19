"""Text to tokens: one shared prompt, completions that are recovered exactly, one end of text, one cut for both sides."""

import copy
from functools import lru_cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from prefmesh.errors import InputError
from prefmesh.preferences.encoding import encode_pairs, end_id, prompt_ids, render
from prefmesh.preferences.pairs import Pair, Text

ALPHABET = "ab cd"
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@lru_cache(maxsize=1)
def bpe() -> PreTrainedTokenizerFast:
    """A byte-level BPE that merges across spaces, hence across the end of a prompt."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    texts = ["ab ab abc", "a b cab cd", "abcd abcd", "b c d ab", "aab bcd cd ", "ab cd ab cd ab cd"] * 5
    inner.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=270,
            special_tokens=["<end>", "<|user|>", "<|assistant|>", "<bos>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<end>", clean_up_tokenization_spaces=False
    )


def with_template(template: str, **special: str) -> PreTrainedTokenizerFast:
    """The same, but the tokenizer itself puts special tokens around a text."""
    made = copy.deepcopy(bpe())
    ids = [(token, made.convert_tokens_to_ids(token)) for token in ("<end>", "<bos>")]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    for name, token in special.items():
        setattr(made, name, token)
    return made


def pair(prompt: Text, chosen: Text, rejected: Text) -> Pair:
    return Pair(prompt=prompt, chosen=chosen, rejected=rejected, user="u")


texts = st.text(ALPHABET, max_size=12)
completions = st.text(ALPHABET, min_size=1, max_size=12)


def encode(one: Pair, tokenizer: PreTrainedTokenizerFast | None = None, length: int = 512):
    return encode_pairs([one], tokenizer or bpe(), length)


@given(texts, completions, completions)
def test_the_whole_text_is_recovered_and_ends_once(prompt, chosen, rejected) -> None:
    tokenizer = bpe()
    data = encode(pair(prompt, chosen, rejected))
    end = end_id(tokenizer)
    for side, text in ((data.chosen[0], chosen), (data.rejected[0], rejected)):
        start = [] if data.prompt[0] == [end] else data.prompt[0]  # the stand-in for an empty prompt
        assert tokenizer.decode(start + side[:-1]) == prompt + text
        assert side[-1] == end
        assert side.count(end) == 1
        # Tokenised whole: what the model sees is how it would see this text anywhere.
        assert start + side[:-1] == tokenizer(prompt + text)["input_ids"]


@given(texts, completions, completions)
def test_the_prompt_cancels(prompt, chosen, rejected) -> None:
    """Swapping sides swaps completions and leaves the prompt: no prompt token is scored on one side alone."""
    one, other = encode(pair(prompt, chosen, rejected)), encode(pair(prompt, rejected, chosen))
    assert one.prompt[0] == other.prompt[0]
    assert (one.chosen[0], one.rejected[0]) == (other.rejected[0], other.chosen[0])
    assert len(one.prompt[0]) >= 1
    assert (one.completion_tokens == [[len(one.chosen[0]), len(one.rejected[0])]]).all()
    assert one.cost[0] == len(one.prompt[0]) + one.completion_tokens.sum()


def test_a_token_across_the_boundary_belongs_to_both_completions() -> None:
    tokenizer = bpe()

    def tokens(text: str) -> list[str]:
        return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])

    # The prompt ends within a token of its own, which breaks up before "d" and stays before "a".
    assert tokens("ddb c") == ["d", "d", "bĠc"]
    assert tokens("ddb cd") == ["d", "d", "bĠ", "cd"]
    data = encode(pair("ddb c", "d", "a"))
    assert tokenizer.decode(data.prompt[0]) == "dd"
    assert tokenizer.decode(data.chosen[0]) == "b cd<end>"
    assert tokenizer.decode(data.rejected[0]) == "b ca<end>"


def test_an_empty_prompt_is_predicted_from_a_start_token() -> None:
    end = end_id(bpe())
    data = encode(pair("", "ab", "cd"))
    assert list(data.prompt) == [[end]]
    begun = with_template("$A", bos_token="<bos>")
    assert encode(pair("", "ab", "cd"), begun).prompt[0] == [begun.bos_token_id]
    neither = copy.deepcopy(bpe())
    neither.eos_token = None
    with pytest.raises(InputError, match="needs a tokenizer with a BOS or an EOS token"):
        encode(pair("", "ab", "cd"), neither)


def test_special_tokens_of_the_tokenizer_itself() -> None:
    """A tokenizer that frames every text: one beginning, one end, none in the middle."""
    framed = with_template("<bos> $A <end>", bos_token="<bos>")
    bos, end = framed.bos_token_id, framed.eos_token_id
    data = encode(pair("ddb ", "cd", "b"), framed)
    plain = encode(pair("ddb ", "cd", "b"))
    assert data.prompt[0] == [bos, *plain.prompt[0]]
    assert (data.chosen[0], data.rejected[0]) == (plain.chosen[0], plain.rejected[0])
    assert end not in data.prompt[0]
    # To continue a prompt, it must not have ended either.
    assert prompt_ids(["ab "], framed, 20) == [[bos, *bpe()("ab ")["input_ids"]]]
    assert prompt_ids([""], framed, 20) == [[bos]]


class TestCut:
    """Tokens are single letters here: every number below can be counted."""

    @staticmethod
    def letters() -> PreTrainedTokenizerFast:
        vocabulary = {token: i for i, token in enumerate(["<end>", *"abcdefghijklmnopqrstuvwxyz"])}
        inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
        inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")

    def cut(
        self, prompt: str, chosen: str, rejected: str, length: int
    ) -> tuple[str, str, str, tuple[int, int, int]]:
        tokenizer = self.letters()
        data = encode(pair(prompt, chosen, rejected), tokenizer, length)
        sides = [
            "".join(tokenizer.convert_ids_to_tokens(ids[0])).replace("<end>", ".")
            for ids in (data.prompt, data.chosen, data.rejected)
        ]
        return *sides, (data.prompts_cut, data.completions_cut, data.same_after_cut)  # type: ignore[return-value]

    def test_what_fits_stays(self) -> None:
        assert self.cut("abc", "def", "g", 8) == ("abc", "def.", "g.", (0, 0, 0))

    def test_a_long_prompt_is_cut_on_the_left_for_both(self) -> None:
        # 8 tokens: 3 for "fg." on the longer side, so 5 of the prompt, for the shorter side too.
        assert self.cut("abcdefghij", "fg", "k", 8) == ("fghij", "fg.", "k.", (1, 0, 0))

    def test_long_completions_are_cut_on_the_right(self) -> None:
        # A quarter, 2 tokens, is kept for the prompt; 6 are left for each completion.
        assert self.cut("abcdefghij", "klmnopqrst", "u", 8) == ("ij", "klmnop", "u.", (1, 1, 0))

    def test_a_short_prompt_leaves_its_room_to_completions(self) -> None:
        assert self.cut("a", "klmnopqrst", "ulmnopqrst", 8) == ("a", "klmnopq", "ulmnopq", (0, 2, 0))

    def test_completions_that_differ_only_beyond_the_cut_are_counted(self) -> None:
        assert self.cut("a", "klmnopqrst", "klmnopqrsz", 8) == ("a", "klmnopq", "klmnopq", (0, 2, 1))

    @given(st.text("abc", min_size=1, max_size=30), st.text("de", min_size=1, max_size=30), st.text("de", min_size=1, max_size=30), st.integers(8, 40))  # fmt: skip
    def test_never_longer_than_allowed_and_never_empty(self, prompt, chosen, rejected, length) -> None:
        data = encode(pair(prompt, chosen, rejected), self.letters(), length)
        for side in (data.chosen[0], data.rejected[0]):
            assert len(side) >= 1
            assert len(data.prompt[0]) + len(side) <= length
        assert len(data.prompt[0]) >= min(len(prompt), length // 4)


def turn(role: str, content: str) -> tuple[dict[str, str], ...]:
    return ({"role": role, "content": content},)


class TestConversations:
    ask = turn("user", "ab")

    def chat(self) -> PreTrainedTokenizerFast:
        made = copy.deepcopy(bpe())
        made.chat_template = CHAT
        return made

    def test_turns_go_through_the_template(self) -> None:
        tokenizer = self.chat()
        data = encode(pair(self.ask, turn("assistant", "cd"), turn("assistant", "b")), tokenizer)
        assert tokenizer.decode(data.prompt[0]) == "<|user|>ab<end><|assistant|>"
        assert tokenizer.decode(data.chosen[0]) == "cd<end>"
        assert tokenizer.decode(data.rejected[0]) == "b<end>"
        assert prompt_ids([self.ask], tokenizer, 50) == list(data.prompt)

    def test_the_template_alone_decides_on_special_tokens(self) -> None:
        """No beginning beside the template's, no end beside it."""
        framed = with_template("<bos> $A <end>", bos_token="<bos>")
        framed.chat_template = CHAT
        data = encode(pair(self.ask, turn("assistant", "cd"), turn("assistant", "b")), framed)
        assert framed.decode(data.prompt[0] + data.chosen[0]) == "<|user|>ab<end><|assistant|>cd<end>"

    def test_no_template_is_refused(self) -> None:
        with pytest.raises(InputError, match=r"policy\.model: .* no chat template"):
            encode(pair(self.ask, turn("assistant", "cd"), turn("assistant", "b")))
        with pytest.raises(InputError, match="no chat template"):
            render(self.ask, bpe())

    def test_a_mixture_is_refused(self) -> None:
        """What is right for the one, an end-of-text token, is wrong for the other."""
        plain, talk = pair("ab", "c", "d"), pair(self.ask, turn("assistant", "c"), turn("assistant", "b"))
        with pytest.raises(InputError, match=r"pair 2 \(user u\) is a conversation and pair 0 plain text"):
            encode_pairs([plain, plain, talk], self.chat(), 64)
        with pytest.raises(InputError, match=r"pair 1 .* is plain text and pair 0 a conversation"):
            encode_pairs([talk, plain], self.chat(), 64)

    def test_several_turns(self) -> None:
        tokenizer = self.chat()
        talk = (*self.ask, *turn("assistant", "c"), *turn("user", "d"))
        data = encode(pair(talk, turn("assistant", "cd"), turn("assistant", "b")), tokenizer)
        assert (
            tokenizer.decode(data.prompt[0])
            == "<|user|>ab<end><|assistant|>c<end><|user|>d<end><|assistant|>"
        )


def test_nothing() -> None:
    data = encode_pairs([], bpe(), 64)
    assert len(data) == 0
    assert data.completion_tokens.shape == (0, 2)
    assert prompt_ids([], bpe(), 64) == []


def test_prompts_are_cut_on_the_left() -> None:
    whole = prompt_ids(["ab cd ab b d"], bpe(), 512)[0]
    assert prompt_ids(["ab cd ab b d"], bpe(), 2) == [whole[-2:]]
    assert prompt_ids([""], bpe(), 2) == [[end_id(bpe())]]


def test_the_fingerprint_tells_encodings_apart() -> None:
    same, again = (encode(pair("ab", "c", "d")) for _ in range(2))
    assert same.fingerprint() == again.fingerprint()
    others = [pair("ab", "d", "c"), pair("aba", "c", "d"), pair("ab", "c", "dd")]
    prints = {encode(other).fingerprint() for other in others} | {same.fingerprint()}
    assert len(prints) == 4
