"""Any Hugging Face causal language model; what is trained, LoRA factors or all weights, is stacked over agents.

The frozen model exists once and is the reference, for the whole run. Stacked parameters enter by `functional_call`.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from prefmesh.errors import InputError
from prefmesh.policies import kernels, lora, residual
from prefmesh.policies.base import BYTES_PER_PASS, ChosenRejected, Params, Rows, Samples
from prefmesh.policies.drawing import Inverse
from prefmesh.policies.encoded import encoded_pairs
from prefmesh.policies.packing import Packed, Reader, Tree, like_lengths
from prefmesh.policies.recompute import recompute
from prefmesh.preferences.encoding import end_id, prompt_ids
from prefmesh.preferences.pairs import Pair, Text
from prefmesh.preferences.tokens import TokenIds, TokenPairs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ACTIVATIONS_PER_LAYER = 16
"""Numbers that a transformer layer keeps for each token, in units of its width: about that many in a GPT-2 or Llama."""


class CausalLMPolicy:
    """`train="lora"` stacks adapters on the frozen model, `train="full"` stacks copies of all its weights.

    `checkpointing`: layers keep their input alone for the backward pass and are computed again in it. `seed`: what A is drawn from
    where it is frozen (`lora.mixing: freeze_a`), and so no agent's parameter.
    """

    usual_pass_bytes = BYTES_PER_PASS

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        *,
        train: Literal["lora", "full"],
        lora_settings: lora.LoraSettings | None = None,
        max_length: int = 512,
        checkpointing: bool = False,
        seed: int = 0,
    ):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.train = train
        self.lora_settings = lora_settings or lora.LoraSettings()
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device
        self.max_length = min(
            max_length, getattr(model.config, "max_position_embeddings", None) or max_length
        )
        self.pass_bytes = self.usual_pass_bytes
        self._fingerprint = _hash_tensors(model.state_dict())
        kernels.quicken(model)
        self.targets = lora.inject(model, self.lora_settings) if train == "lora" else []
        self.frozen_factors: Params = {}
        """A of every layer (1, r, in) where it is frozen."""
        if train == "lora" and self.lora_settings.mixing == "freeze_a":
            self.frozen_factors = {n: t for n, t in self._factors(seed).items() if n.endswith(".lora_A")}
            lora.freeze_a(model, self.frozen_factors)
        self._folds = train == "lora" and self.lora_settings.mixing == "residual"
        if self._folds:
            residual.check(model, self.targets)
        self._runner = _Runner(model)
        self._head_is_plain = _head_is_plain(model)
        self._reader = Reader(model)
        self.packs = self._reads_packed()
        self.checkpointing = checkpointing
        if checkpointing and not recompute(model, self._reader):
            raise InputError(
                f"runtime.gradient_checkpointing: {type(model).__name__} has no layers that transformers checkpoints; allowed: false"
            )

    # ---- parameters

    def initial(self, seed: int) -> Params:
        """LoRA: A drawn, B zero. Full: the reference's own weights. Either way the policy equals the reference."""
        if self.train == "full":
            return {name: tensor.detach().unsqueeze(0) for name, tensor in self.model.named_parameters()}
        own = {
            name: tensor for name, tensor in self._factors(seed).items() if name not in self.frozen_factors
        }
        return own | residual.initial(self.model, self.targets) if self._folds else own

    def _factors(self, seed: int) -> Params:
        # Factors on a half-precision base are kept in float32: their updates would be lost to rounding.
        dtype = self.dtype if self.dtype.itemsize >= 4 else torch.float32
        factors = lora.initial_factors(self.model, self.targets, seed)
        return {name: tensor.to(self.device, dtype) for name, tensor in factors.items()}

    @property
    def turns(self) -> int:
        """2 where B and A alternate."""
        return 2 if self.train == "lora" and self.lora_settings.mixing == "alternate" else 1

    def trained(self, params: Params, round_: int) -> Params:
        """All; where they alternate B in odd rounds, A in even ones: while B is zero, A has no gradient."""
        if self.turns == 1:
            still = self.residuals(params)
            return {name: tensor for name, tensor in params.items() if name not in still}
        factor = ".lora_B" if round_ % 2 else ".lora_A"
        return {name: tensor for name, tensor in params.items() if name.endswith(factor)}

    def factors(self, params: Params) -> Params:
        """A and B, and R as it is; the frozen A as each agent's."""
        if self.train == "full":
            return {}
        agents = _agents(params)
        return {name: tensor.expand(agents, -1, -1) for name, tensor in self.frozen_factors.items()} | params

    def residuals(self, params: Params) -> Params:
        """R of every layer."""
        return residual.residuals(params) if self._folds else {}

    def fingerprint(self) -> str:
        """Hash of the frozen weights and their precision."""
        return f"{self._fingerprint}-{self.dtype}"

    @property
    def tokens_per_pass(self) -> int:
        """How many tokens one pass may hold so that it keeps at most `pass_bytes`."""
        return self.tokens_in(self.pass_bytes)

    def tokens_in(self, bytes_: int) -> int:
        """How many tokens a pass keeps in so many bytes for its backward pass, roughly, logits included where they are kept."""
        config = self.model.config.get_text_config()
        layers, each = config.num_hidden_layers, config.hidden_size * ACTIVATIONS_PER_LAYER
        # Under checkpointing, a layer's input for each, and one layer in full while it is computed again.
        kept = layers * config.hidden_size + each if self.checkpointing else layers * each
        if self.train == "full" or not self._head_is_plain:
            kept = max(kept, config.vocab_size)
        # Padded rows hold every prompt twice, and at most as much again of the longer completion.
        kept *= 1 if self.packs else 2
        return max(1, bytes_ // (kept * self.dtype.itemsize))

    @property
    def frozen_bytes(self) -> int:
        """The frozen model's, and of layers that a pass has with R folded in."""
        again = residual.folded_bytes(self.model, self.targets) if self._folds else 0
        return again + sum(tensor.nbytes for tensor in self.model.parameters())

    @property
    def tokens_per_call(self) -> int:
        """From how many tokens on two calls of the model cost no more than one that is padded to the longer's length.

        Small models: where the work outweighs the calling. Large ones: where the processor multiplies at full speed.
        """
        return max(2**8, 2**23 // self.model.config.get_text_config().hidden_size ** 2)

    @property
    def stacks(self) -> bool:
        """Adapters share the frozen model's pass; full copies are run one after the other."""
        return self.train == "lora"

    # ---- log-probabilities

    def encode(self, pairs: Sequence[Pair]) -> TokenPairs:
        """Tokenise, sharing the prompt's tokens between both sides."""
        return encoded_pairs(pairs, self.tokenizer, self.max_length)

    def log_probs(self, params: Params, data: TokenPairs, rows: Rows) -> ChosenRejected:
        """log pi(y|x) in nats, summed over completion tokens, under each agent's own parameters."""
        trees = [Tree(data.prompt[i], (data.chosen[i], data.rejected[i])) for i in rows.reshape(-1).tolist()]
        scores = self.score(params, trees).view(*rows.shape, 2)
        return scores[..., 0], scores[..., 1]

    @torch.no_grad()
    def reference_log_probs(self, data: TokenPairs, rows: Rows) -> ChosenRejected:
        """The same under the frozen model."""
        return self.log_probs({}, data, rows)

    def score(self, params: Params, trees: list[Tree]) -> Float[Tensor, " completions"]:
        """log pi(completion | prompt) in nats of all completions in turn.

        Trees come agent by agent, equally many each; {} is the reference.
        """
        agents = _agents(params) if params else 1
        if self.train == "full" and params:
            return torch.cat(
                [
                    self._score(row, part, 1)
                    for row, part in zip(_unstack(params), _split(trees, agents), strict=True)
                ]
            )
        return self._score(params, trees, agents)

    def _score(self, params: Params, trees: list[Tree], agents: int) -> Float[Tensor, " completions"]:
        """`score` where `params` are stacked factors, one agent's full weights, or none."""
        params = residual.folded(self.model, params) if self._folds else params
        if self.packs:
            group_tokens = self.tokens_per_call
            calls = [Packed.of(trees, agents, group_tokens=group_tokens, device=self.device)]
            order = None
        else:
            calls, order = self._padded(trees, agents)
        if self._head_is_plain and (self.train == "lora" or not params):
            # One product with the head for all calls: it is large, and pays for itself best on many rows.
            states = torch.cat([self._states(params, call) for call in calls])
            targets = torch.cat([call.targets for call in calls])
            head: Any = self.model.get_output_embeddings()
            token_log_probs = kernels.frozen_head_log_probs(states, head.weight, head.bias, targets)
        else:
            token_log_probs = torch.cat([self._token_log_probs(params, call) for call in calls])
        # Placed in a padded table and summed: the same order of additions on every run and device.
        counts = np.concatenate([call.counts for call in calls])
        row = np.arange(len(counts)) if order is None else order
        sequence, column = np.repeat(row, counts), np.concatenate([np.arange(n) for n in counts])
        table = token_log_probs.new_zeros(len(counts), int(counts.max()))
        index = (torch.as_tensor(sequence, device=self.device), torch.as_tensor(column, device=self.device))
        return table.index_put(index, token_log_probs).sum(1)

    def _padded(
        self, trees: list[Tree], agents: int
    ) -> tuple[list["_Call"], Int[np.ndarray, " completions"]]:
        """For models that cannot read what is packed: every completion behind its prompt, as few calls as pay.

        Sequences of like length share a call, so that little is padded; each call has equally many of every agent. Second:
        the number of each of the calls' completions.
        """
        prompts = [tree.prompt for tree in trees for _ in tree.completions]
        completions = [completion for tree in trees for completion in tree.completions]
        lengths = np.array([len(p) + len(c) for p, c in zip(prompts, completions, strict=True)])
        lengths = lengths.reshape(agents, -1)
        order = np.argsort(-lengths, axis=1, kind="stable")
        widest = np.take_along_axis(lengths, order, axis=1).max(axis=0)
        order += np.arange(agents)[:, None] * order.shape[1]
        parts = [
            order[:, part].reshape(-1) for part in like_lengths(widest, -(-self.tokens_per_call // agents))
        ]
        calls = [_Call.of([prompts[i] for i in part], [completions[i] for i in part]) for part in parts]
        return [call.to(self.device) for call in calls], np.concatenate(parts)

    def _states(self, params: Params, call: "Packed | _Call") -> Float[Tensor, "positions width"]:
        """The hidden states that predict a completion's token."""
        output = self._read(params, "base_model", call)
        return output.last_hidden_state.flatten(0, 1).index_select(0, call.read)

    def _token_log_probs(self, params: Params, call: "Packed | _Call") -> Float[Tensor, " positions"]:
        """log pi of completion tokens in nats, from the model's own logits; the head reads only what predicts them."""
        head: Any = self.model.get_output_embeddings()

        def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (args[0].flatten(0, 1).index_select(0, call.read).unsqueeze(0),)

        hook = head.register_forward_pre_hook(select)
        try:
            output = self._read(params, "forward", call)
        finally:
            hook.remove()
        logits = output.logits.squeeze(0)
        return -F.cross_entropy(logits.to(_summing(logits.dtype)), call.targets, reduction="none")

    def _read(self, params: Params, method: str, call: "Packed | _Call") -> Any:
        if isinstance(call, _Call):
            return self._run(params, method, input_ids=call.ids, attention_mask=call.mask, use_cache=False)
        with self._reader(call):
            return self._run(params, method, input_ids=call.ids, position_ids=call.position, use_cache=False)

    @torch.no_grad()
    def _reads_packed(self) -> bool:
        """Whether this model gives the same log-probabilities to pairs in one row, tried on two of them.

        Not where tokens meet elsewhere than in attention (recurrences, convolutions), or attention is the model's own.
        """
        token = [
            int(i)
            for i in np.random.default_rng(0).integers(1, self.model.config.get_text_config().vocab_size, 16)
        ]
        trees = [Tree(token[:5], (token[5:9], token[9:12])), Tree(token[12:14], (token[3:8], token[14:]))]
        found = []
        for self.packs in (True, False):
            try:
                found.append(self._score({}, trees, 1))
            except (TypeError, ValueError, KeyError, AttributeError, AssertionError, RuntimeError):
                return False
        rounding = 1e-4 if self.dtype.itemsize >= 4 else 2e-2
        return bool(torch.allclose(*found, rtol=rounding))

    def _run(self, params: Params, method: str, **inputs: Any) -> Any:
        """Call the model's `method` with stacked factors, one agent's weights, or nothing in place."""
        placed = {f"model.{name}": tensor for name, tensor in params.items()}
        return functional_call(self._runner, placed, (method,), inputs)

    # ---- samples

    @torch.no_grad()
    def sample(
        self, params: Params, prompts: Sequence[Text], uniform: Float[np.ndarray, "prompts tokens"]
    ) -> Samples:
        """Every agent's completions of the same prompts, drawn at temperature 1 from the whole distribution.

        `uniform`: a number in [0, 1) for each token that may be written; what is drawn is a function of them, whichever
        prompts share a call. {} samples the reference. Prompts are cut on the left to leave room within the model's length.
        """
        max_new_tokens = uniform.shape[1]
        room = self.max_length - max_new_tokens
        ids = prompt_ids(prompts, self.tokenizer, max(1, room))
        padded, mask = _pad([np.array(seq) for seq in ids], side="left")
        texts: list[str] = []
        log_probs, ref_log_probs = [], []
        for agent in range(_agents(params) if params else 1):
            row = {name: tensor[agent : agent + 1] for name, tensor in params.items()}
            with self._generating_plainly():
                written = self._run(
                    {name: tensor[0] for name, tensor in row.items()}
                    if self.train == "full"
                    else residual.folded(self.model, row),
                    "generate",
                    input_ids=padded.to(self.device),
                    attention_mask=mask.to(self.device),
                    # The processor draws; of what it leaves, the best token is the only one.
                    do_sample=False,
                    logits_processor=[Inverse(uniform, padded.shape[1])],
                    max_new_tokens=max_new_tokens,
                    pad_token_id=self.tokenizer.pad_token_id
                    if self.tokenizer.pad_token_id is not None
                    else 0,
                    eos_token_id=end_id(self.tokenizer),
                )
            completions = [
                _until(seq, end_id(self.tokenizer)) for seq in written[:, padded.shape[1] :].tolist()
            ]
            texts += [str(self.tokenizer.decode(seq, skip_special_tokens=True)) for seq in completions]
            trees = [Tree(p, (c,)) for p, c in zip(ids, completions, strict=True)]
            log_probs.append(self._score_in_passes(row, trees))
            ref_log_probs.append(self._score_in_passes({}, trees))
        return Samples(
            texts=texts, log_probs=torch.stack(log_probs), ref_log_probs=torch.stack(ref_log_probs)
        )

    @contextmanager
    def _generating_plainly(self) -> Iterator[None]:
        """Without the penalties, bans and least lengths that a model's `generation_config.json` asks for: `generate`
        fills in from there what it is not told, and the samples would be another distribution's."""
        from transformers import GenerationConfig

        own = self.model.generation_config
        self.model.generation_config = GenerationConfig()
        try:
            yield
        finally:
            self.model.generation_config = own

    def _score_in_passes(self, row: Params, trees: list[Tree]) -> Tensor:
        size = max(1, self.tokens_per_pass // max(tree.tokens + 1 for tree in trees))
        return torch.cat([self.score(row, trees[i : i + size]) for i in range(0, len(trees), size)])


class _Runner(nn.Module):
    """Lets `functional_call` reach any method of the model."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, method: str, **inputs: Any) -> Any:
        return getattr(self.model, method)(**inputs)


@torch.no_grad()
def _head_is_plain(model: "PreTrainedModel") -> bool:
    """Whether the logits are a linear map of the last hidden state and nothing else (no cap, no scale)."""
    head: Any = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return False
    ids = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
    hidden = getattr(model.base_model(input_ids=ids, use_cache=False), "last_hidden_state", None)
    return hidden is not None and torch.equal(head(hidden), model(input_ids=ids, use_cache=False).logits)


class _Call(NamedTuple):
    """Padded sequences, where (flat) a completion's token is predicted, which, and how many each completion has."""

    ids: Int[Tensor, "sequences tokens"]
    mask: Int[Tensor, "sequences tokens"]
    read: Int[Tensor, " positions"]
    targets: Int[Tensor, " positions"]
    counts: Int[np.ndarray, " completions"]

    @classmethod
    def of(cls, prompts: list[TokenIds], completions: list[TokenIds]) -> "_Call":
        """Token t of a completion is predicted at the position before it."""
        ids, mask = _pad([np.array(p + c) for p, c in zip(prompts, completions, strict=True)], side="right")
        where = [
            row * ids.shape[1] + np.arange(len(p) - 1, len(p) + len(c) - 1)
            for row, (p, c) in enumerate(zip(prompts, completions, strict=True))
        ]
        targets = torch.as_tensor(np.concatenate(completions))
        counts = np.array([len(c) for c in completions])
        return cls(ids, mask, torch.as_tensor(np.concatenate(where)), targets, counts)

    def to(self, device: torch.device) -> "_Call":
        """On a device."""
        ids, mask, read, targets = (tensor.to(device) for tensor in self[:-1])
        return _Call(ids, mask, read, targets, self.counts)


def _agents(params: Params) -> int:
    return next(iter(params.values())).shape[0]


def _unstack(params: Params) -> list[Params]:
    """One dict per agent, without the agent axis. `unbind`, unlike indexing, has a gradient of its own size; a view has none."""
    if _agents(params) == 1:
        return [{name: tensor.squeeze(0) for name, tensor in params.items()}]
    rows = {name: tensor.unbind(0) for name, tensor in params.items()}
    return [{name: tensors[i] for name, tensors in rows.items()} for i in range(_agents(params))]


def _split(items: list[Tree], parts: int) -> list[list[Tree]]:
    size = len(items) // parts
    return [items[i * size : (i + 1) * size] for i in range(parts)]


def _pad(sequences: list[np.ndarray], *, side: Literal["left", "right"]) -> tuple[Tensor, Tensor]:
    """Ids padded with 0 and their attention mask; what stands at padded places is never read."""
    width = max(len(seq) for seq in sequences)
    ids = np.zeros((len(sequences), width), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, seq in enumerate(sequences):
        where = slice(0, len(seq)) if side == "right" else slice(width - len(seq), width)
        ids[row, where] = seq
        mask[row, where] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def _until(ids: TokenIds, end: int | None) -> TokenIds:
    """Up to and with the first end-of-text token."""
    return ids[: ids.index(end) + 1] if end in ids else ids


def _summing(dtype: torch.dtype) -> torch.dtype:
    """The precision in which log-probabilities are added up: at least float32."""
    return dtype if dtype.itemsize >= 4 else torch.float32


def _hash_tensors(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
