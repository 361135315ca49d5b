"""From logits to a token.

What a token is drawn from is made by two functions. `adjust` moves the scores of single tokens: bad words, end tokens
that come too early, biases, penalties. `probs_from_logits` makes probabilities of scores: temperature, top-k, top-p,
min-p, in this order. Whoever needs probabilities (the sampler, the verifier of speculative decoding, a figure) calls
these, so there is one answer to "what is the model's distribution". All of it is float32, and `SamplingParams` accepts
only values that float32 can compute with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from hashlib import blake2b
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from minillm.config import Range, check_number, number
from minillm.errors import RequestError, require

TINY, HUGE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
LARGEST_INT = 2**31 - 1
TOKEN, BIAS = (int, 0, LARGEST_INT), (float, -100, 100)


@dataclass(frozen=True)
class SamplingParams:
    """How one request wants its tokens. Names and defaults are vLLM's; `docs/vllm.md` tells what differs.

    n: completions per prompt. temperature: 0 is greedy. top_k: 0 or -1 keeps all. top_p, min_p: see
    `probs_from_logits`. repetition_penalty, presence_penalty, frequency_penalty, logit_bias (token id to what is added
    to its score), bad_words_token_ids: see `adjust`. bad_words: strings that are never written; `LLM` finds their token
    ids. seed: same seed, same tokens, whoever shares the batch. stop: strings that end the text; they are cut off,
    unless include_stop_str_in_output. stop_token_ids: tokens that end it. ignore_eos: go on after the model's own end
    token. max_tokens, min_tokens: output tokens at most, and before an end token may come. logprobs, prompt_logprobs:
    report the log-probabilities of that many most likely tokens at each step, and of the chosen one; the same for each
    token of the prompt. skip_special_tokens: leave them out of the text.

    Values are frozen when the object is made: numbers of NumPy and PyTorch become Python's, collections tuples, None
    for a collection the empty tuple, logit_bias pairs in the order of the tokens. So it can be hashed and shared.

    Raises RequestError for a value of another type, out of its range, or that float32 takes for 0.
    """

    n: int = number(int, 1, 1, 16384)
    temperature: float = number(float, 1.0, 0, HUGE)
    top_p: float = number(float, 1.0, TINY, 1)
    top_k: int = number(int, 0, -1, LARGEST_INT)
    min_p: float = number(float, 0.0, 0, 1)
    repetition_penalty: float = number(float, 1.0, 1e-30, 1e30)  # a logit that is divided by it stays finite
    presence_penalty: float = number(float, 0.0, -2, 2)
    frequency_penalty: float = number(float, 0.0, -2, 2)
    logit_bias: Mapping[int, float] | Collection[tuple[int, float]] | None = None
    bad_words: Collection[str] | None = None
    bad_words_token_ids: Collection[Sequence[int]] | None = None
    seed: int | None = number(int, None)
    stop: str | Collection[str] | None = None
    stop_token_ids: Collection[int] | None = None
    include_stop_str_in_output: bool = number(bool, False)
    ignore_eos: bool = number(bool, False)
    max_tokens: int = number(int, 16, 1, LARGEST_INT)
    min_tokens: int = number(int, 0, 0, LARGEST_INT)
    logprobs: int | None = number(int, None, 0, 20)
    prompt_logprobs: int | None = number(int, None, 0, 20)
    skip_special_tokens: bool = number(bool, True)

    def __post_init__(self) -> None:
        freeze = partial(object.__setattr__, self)
        for one in fields(self):
            value = getattr(self, one.name)
            if one.metadata and value is not one.default:
                freeze(one.name, _number(one.name, value, one.metadata["range"]))
        freeze("stop", _strings("stop", (self.stop,) if isinstance(self.stop, str) else self.stop))
        freeze("bad_words", _strings("bad_words", self.bad_words))
        freeze("stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        name, words = "bad_words_token_ids", self.bad_words_token_ids
        freeze(name, tuple(_token_ids(name, word) for word in _items(name, words)))
        require(all(self.bad_words_token_ids or ()), name, words, "None or lists of token ids, none of them empty")
        freeze("logit_bias", _biases("logit_bias", self.logit_bias))
        require(self.min_tokens <= self.max_tokens, "min_tokens", self.min_tokens, "at most max_tokens")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def truncates(self) -> bool:
        """Whether any token can be cut off: only then must the vocabulary be sorted."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def adjusts(self) -> bool:
        """Whether `adjust` can change any score."""
        penalties = self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
        return penalties or bool(self.logit_bias or self.bad_words_token_ids or self.min_tokens)

    def ends_with(self, token: int, eos_token_ids: Sequence[int]) -> bool:
        """Whether this token ends the output. It stays part of the token ids, as in vLLM."""
        return token in (self.stop_token_ids or ()) or (token in eos_token_ids and not self.ignore_eos)

    def with_bad_words(self, encode: Callable[[str], Sequence[int]]) -> SamplingParams:
        """The same with the token ids of `bad_words`: each word as a text begins with it, and after a space."""
        if not self.bad_words:
            return self
        texts = [space + word.lstrip() for word in self.bad_words for space in ("", " ")]
        words = {tuple(encode(text)) for text in texts} | {tuple(word) for word in self.bad_words_token_ids or ()}
        return replace(self, bad_words_token_ids=sorted(words - {()}))

    def check(self, vocab_size: int) -> None:
        """Raise RequestError if these parameters do not fit a model with this vocabulary."""
        if self.bad_words and not self.bad_words_token_ids:
            raise RequestError("bad_words need a tokenizer, and there is none. Use bad_words_token_ids.")
        named = {*dict(self.logit_bias or ()), *chain(*(self.bad_words_token_ids or ()))}
        allowed, largest = f"below the vocabulary's size, {vocab_size}", max(named, default=0)
        require(largest < vocab_size, "the largest token id in logit_bias and bad_words", largest, allowed)

    def random(self, index: int, position: int, *, engine_seed: int = 0, arrival: int = 0) -> float:
        """The number in [0, 1) that output token `position` of completion `index` of a request is drawn with.

        An explicit seed names the stream whatever engine serves it. Otherwise the engine's seed and the request's
        arrival number do. All of it is hashed, so that neighbours (seed 0, arrival 1; seed 1, arrival 0) do not meet,
        and counted by position, so that nothing shifts it: who shares the batch, a rejected draft, a preemption, an
        interrupted step, the device. A draft model that guesses for completion i uses index -1 - i.
        """
        name = f"engine {engine_seed:x} {arrival}" if self.seed is None else f"request {self.seed:x}"
        digest = blake2b(f"{name} {index} {position}".encode(), digest_size=8).digest()
        return (int.from_bytes(digest, "big") >> 11) / 2**53  # as many bits as a float64 has


def adjust(
    logits: Tensor, params: SamplingParams, prompt: Sequence[int], output: Sequence[int], end_ids: Sequence[int] = ()
) -> Tensor:
    """The scores of the next token, float32 [vocab], from the model's logits [vocab], which stay as they are.

    In this order, which is vLLM's:

    1. bad_words_token_ids: if the output ends with all of a word but its last token, that token is impossible (-inf).
    2. min_tokens: while the output is shorter, `end_ids` (the model's end tokens) and stop_token_ids are impossible.
    3. logit_bias is added.
    4. repetition_penalty, once for each token of the prompt and of the output: a positive score is divided by it, a
       negative one multiplied. Both move down for a penalty above 1 (Keskar et al. 2019, arXiv:1909.05858).
    5. frequency_penalty, times how often a token stands in the output, is subtracted.
    6. presence_penalty is subtracted for each token of the output, however often it stands there.
    """
    scores = logits.to(torch.float32, copy=True)
    scores[_impossible(params, tuple(output), end_ids, len(logits))] = -math.inf
    if params.logit_bias:
        tokens, biases = zip(*params.logit_bias, strict=True)
        scores[list(tokens)] += torch.tensor(biases, device=scores.device)
    if params.repetition_penalty != 1:
        seen = torch.tensor([*prompt, *output], dtype=torch.int64, device=scores.device)
        scored, penalty = scores[seen], params.repetition_penalty
        scores[seen] = torch.where(scored > 0, scored / penalty, scored * penalty)
    if params.frequency_penalty or params.presence_penalty:
        said = torch.tensor(output, dtype=torch.int64, device=scores.device)
        counts = torch.zeros_like(scores).index_add_(0, said, torch.ones_like(said, dtype=torch.float32))
        scores -= params.frequency_penalty * counts
        scores -= params.presence_penalty * (counts > 0)
    return scores


def _impossible(params: SamplingParams, output: tuple[int, ...], end_ids: Sequence[int], vocab: int) -> list[int]:
    """The tokens that must not come next."""
    words = [word for word in params.bad_words_token_ids or () if len(word) <= len(output) + 1]
    tokens = {word[-1] for word in words if output[len(output) + 1 - len(word) :] == word[:-1]}
    if len(output) < params.min_tokens:
        tokens.update(token for token in (*end_ids, *(params.stop_token_ids or ())) if token < vocab)
    return sorted(tokens)


def probs_from_logits(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """The distribution that row i of logits [rows, vocab] is sampled from, under params[i]; float32 [rows, vocab].

    Temperature divides the logits; 0 gives all mass to the largest (ties: the first). top-k keeps the k most likely
    tokens. top-p keeps the smallest set whose mass reaches p, the crossing token included (Holtzman et al. 2019,
    arXiv:1904.09751). min-p keeps tokens of at least min_p times the most likely one's probability
    (arXiv:2407.01082). Each works on the renormalised result of the one before, row by row.

    The largest logit is subtracted before the division, so no temperature overflows; logits of +inf share all mass. A
    row that is no distribution (a logit is NaN, or all are -inf) comes out with NaN, and `sample` answers -1.
    """
    logits = logits.float()
    largest, first = logits.max(dim=-1, keepdim=True)
    whole = torch.where(largest > -math.inf, 1.0, math.nan)
    probs = torch.zeros_like(logits).scatter_(-1, first, whole)
    if not all(p.greedy for p in params):
        greedy = torch.tensor([p.greedy for p in params], device=logits.device)
        temperature = torch.tensor([p.temperature or 1.0 for p in params], device=logits.device)
        below = (logits - largest).nan_to_num_(0.0, neginf=-math.inf)  # inf - inf is 0 here
        drawn = torch.softmax(below.div_(temperature[:, None] * whole), dim=-1)
        if any(p.truncates for p in params):
            drawn = _truncate(drawn, logits, params)
        probs = torch.where(greedy[:, None], probs, drawn)
    return probs


def _truncate(probs: Tensor, logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Top-k, top-p and min-p on rows sorted by likelihood, back in the vocabulary's order, renormalised.

    Logits are sorted, not probabilities: at high temperatures these are equal where those still differ.
    """
    vocab = probs.shape[-1]
    top_k = torch.tensor([p.top_k if p.top_k > 0 else vocab for p in params], device=probs.device)
    top_p = torch.tensor([p.top_p for p in params], device=probs.device)
    min_p = torch.tensor([p.min_p for p in params], device=probs.device)
    order = logits.argsort(dim=-1, descending=True, stable=True)
    ranked = probs.gather(-1, order) * (torch.arange(vocab, device=probs.device) < top_k[:, None])
    ranked = ranked / ranked.sum(dim=-1, keepdim=True)
    mass_before = ranked.cumsum(dim=-1) - ranked
    keep = (mass_before < top_p[:, None]) | (top_p[:, None] >= 1)
    ranked = ranked * (keep & (ranked >= min_p[:, None] * ranked[:, :1]))
    return torch.zeros_like(probs).scatter_(-1, order, ranked / ranked.sum(dim=-1, keepdim=True))


def sample(probs: Tensor, u: Tensor | None) -> Tensor:
    """A token for each row of probs [rows, vocab], from the numbers u [rows] float64 in [0, 1); int64 [rows].

    It is the first token at which the running sum of the probabilities exceeds u; a token without probability never
    is that one. Sums are float64: in float32 the tail of a large vocabulary would be lost in rounding. u is None where
    every row is greedy, all on one token: then the sums are saved. -1 for a row that is no distribution. No host
    synchronisation.
    """
    if u is None:
        mass, token = probs.max(dim=-1)
        return torch.where(mass > 0, token, -1)
    sums = probs.cumsum(dim=-1, dtype=torch.float64)
    total = sums[:, -1:]
    return torch.where(total > 0, torch.searchsorted(sums, u[:, None] * total, right=True), -1)[:, 0]


def plain(value: Any) -> Any:
    """A number or an array of NumPy or PyTorch as Python's own number or list; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") and not isinstance(value, (type, memoryview)) else value


def is_text(value: Any) -> bool:
    """Whether this is a string that can be encoded. Half a character (a lone surrogate) cannot."""
    return isinstance(value, str) and value.encode(errors="ignore").decode() == value


def _number(name: str, given: Any, allowed: Range) -> Any:
    """A bool, int or float as Python's own."""
    value, kind = plain(given), allowed[0]
    check_number(name, value, allowed, RequestError)
    large = kind is not float or value == 0 or abs(value) >= TINY
    require(large, name, value, f"0 or at least {TINY:.3g} in size, else float32 takes it for 0. Use 0")
    return kind(value)


def _items(name: str, given: Any) -> tuple[Any, ...]:
    """The elements of a collection; None has none."""
    items = () if given is None else plain(given)
    right = isinstance(items, Collection) and not isinstance(items, (str, bytes, bytearray, Mapping))
    require(right, name, given, "None or a list")
    return tuple(items)


def _strings(name: str, given: Any) -> tuple[str, ...]:
    items = _items(name, given)
    require(all(is_text(s) and s for s in items), name, given, "None or strings that are not empty")
    return tuple(str(s) for s in items)


def _token_ids(name: str, given: Any) -> tuple[int, ...]:
    return tuple(_number(name, token, TOKEN) for token in _items(name, given))


def _biases(name: str, given: Any) -> tuple[tuple[int, float], ...]:
    """Pairs of a token id and a number, in the order of the tokens; from a mapping, or from such pairs."""
    pairs = _items(name, given.items() if isinstance(given, Mapping) else given)
    right = all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs)
    require(right, name, given, "a mapping from token ids to numbers")
    return tuple(sorted((_number(name, token, TOKEN), _number(name, bias, BIAS)) for token, bias in pairs))
