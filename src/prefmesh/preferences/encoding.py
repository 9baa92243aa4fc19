"""Text to tokens: one shared prompt and two completions per pair.

The prompt must cancel between chosen and rejected, so both completions hang on the *same* prompt tokens:
whole texts are tokenised, and the completion starts where they leave the tokenised prompt. Where a token straddles
the boundary it belongs to the completions. What is too long is cut once for both sides.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, cast

from prefmesh.errors import InputError
from prefmesh.preferences.pairs import Pair, Text
from prefmesh.preferences.tokens import Ragged, TokenIds, TokenPairs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_pairs(pairs: Sequence[Pair], tokenizer: "PreTrainedTokenizerBase", max_length: int) -> TokenPairs:
    """Tokenise pairs; completions of plain text end with the end-of-text token.

    Raises `InputError` for a conversation when the tokenizer has no chat template, and for both kinds in one list.
    """
    prompts, chosen, rejected = [], [], []
    prompts_cut = completions_cut = same = 0
    for joint in _joint_ids(pairs, tokenizer):
        prompt, good, bad = _split_at_prompt(*joint, start_id=_start_id(tokenizer))
        room = max_length - min(len(prompt), max(1, max_length // 4))
        completions_cut += (len(good) > room) + (len(bad) > room)
        good, bad = good[:room], bad[:room]
        kept = max_length - max(len(good), len(bad))
        prompts_cut += len(prompt) > kept
        same += good == bad
        prompts.append(prompt[-kept:])
        chosen.append(good)
        rejected.append(bad)
    sides = Ragged.of(prompts), Ragged.of(chosen), Ragged.of(rejected)
    return TokenPairs(*sides, prompts_cut, completions_cut, same)


def render(text: Text, tokenizer: "PreTrainedTokenizerBase", *, generation_prompt: bool = False) -> str:
    """A text as the model reads it: conversations go through the model's chat template."""
    if isinstance(text, str):
        return text
    if not tokenizer.chat_template:
        raise InputError(
            "policy.model: the data holds conversations and the model's tokenizer has no chat template; "
            "allowed: a chat model, or plain-text prompt/chosen/rejected"
        )
    return str(
        tokenizer.apply_chat_template(
            [dict(message) for message in text], tokenize=False, add_generation_prompt=generation_prompt
        )
    )


def prompt_ids(
    prompts: Sequence[Text], tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> list[TokenIds]:
    """Prompts as a policy continues them: cut on the left to `max_length`, never empty."""
    rendered = [render(prompt, tokenizer, generation_prompt=True) for prompt in prompts]
    special = all(isinstance(prompt, str) for prompt in prompts)
    encoded = tokenizer(rendered, add_special_tokens=special, verbose=False)["input_ids"] if rendered else []
    open_ended = _unended([list(ids) for ids in encoded], end_id(tokenizer))  # type: ignore[arg-type]
    return [ids[-max_length:] or [_start_id(tokenizer)] for ids in open_ended]


def _joint_ids(
    pairs: Sequence[Pair], tokenizer: "PreTrainedTokenizerBase"
) -> Iterable[tuple[TokenIds, TokenIds, TokenIds]]:
    """Token ids of prompt, prompt + chosen and prompt + rejected."""
    if not pairs:
        return []
    plain = isinstance(pairs[0].prompt, str)
    for i, pair in enumerate(pairs):
        if isinstance(pair.prompt, str) != plain:
            # Special tokens differ: the template writes a conversation's own.
            kinds = ["a conversation", "plain text"]
            raise InputError(
                f"preferences.source: pair {i} (user {pair.user}) is {kinds[not plain]} and pair 0 {kinds[plain]}; "
                "allowed: one of the two throughout"
            )
    prompts = [render(pair.prompt, tokenizer, generation_prompt=True) for pair in pairs]
    # Text adds to text and turns to turns; the chat template writes its own special tokens.
    chosen = [render(pair.prompt + pair.chosen, tokenizer) for pair in pairs]  # type: ignore[operator]
    rejected = [render(pair.prompt + pair.rejected, tokenizer) for pair in pairs]  # type: ignore[operator]

    def ids(texts: list[str]) -> list[TokenIds]:
        return cast(list[TokenIds], tokenizer(texts, add_special_tokens=plain, verbose=False)["input_ids"])

    end = end_id(tokenizer)

    def ended(sequences: list[TokenIds]) -> list[TokenIds]:
        if not plain or end is None:
            return sequences
        return [[*seq, end] if not seq or seq[-1] != end else list(seq) for seq in sequences]

    return zip(_unended(ids(prompts), end), ended(ids(chosen)), ended(ids(rejected)), strict=True)


def _unended(sequences: list[TokenIds], end: int | None) -> list[TokenIds]:
    """Prompts without an end-of-text token that a tokenizer appended by itself."""
    return [seq[:-1] if len(seq) > 1 and seq[-1] == end else seq for seq in sequences]


def _split_at_prompt(
    prompt: TokenIds, with_chosen: TokenIds, with_rejected: TokenIds, *, start_id: int
) -> tuple[TokenIds, TokenIds, TokenIds]:
    """The prompt tokens that both whole texts begin with, and the two rests."""
    shared = 0
    for a, b, c in zip(prompt, with_chosen, with_rejected, strict=False):
        if not a == b == c:
            break
        shared += 1
    # Both completions keep a token of their own, and the first one needs a token before it to be predicted from.
    shared = min(shared, len(with_chosen) - 1, len(with_rejected) - 1)
    return prompt[:shared] or [start_id], with_chosen[shared:], with_rejected[shared:]


def end_id(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The end-of-text token's id, if there is one."""
    return cast(int | None, tokenizer.eos_token_id)


def _start_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """What stands before a text without prompt: the beginning-of-text token, else the end-of-text token."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return cast(int, token)
    raise InputError(
        "policy.model: an empty prompt needs a tokenizer with a BOS or an EOS token; it has neither"
    )
