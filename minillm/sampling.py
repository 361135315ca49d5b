"""From logits to a token.

The processed distribution is one function, `probs_from_logits`: repetition penalty, temperature, top-k, top-p, min-p,
in this order. Whoever needs probabilities (the sampler, the verifier of speculative decoding, a figure) calls it, so
there is one answer to "what is the model's distribution". Sampling happens in float32 from exactly these numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from minillm.errors import RequestError

_MIX = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: spreads consecutive numbers over all seeds


@dataclass(frozen=True)
class SamplingParams:
    """How one request wants its tokens. Names and defaults are vLLM's.

    n: completions per prompt. temperature: 0 is greedy. top_k: 0 or -1 keeps all. top_p, min_p: see
    `probs_from_logits`. repetition_penalty: > 1 makes tokens of the prompt and the output less likely. seed: same seed,
    same tokens, whoever shares the batch. stop: strings that end the text (excluded from it). stop_token_ids: tokens
    that end it. ignore_eos: go on after the model's own end token. max_tokens: output tokens at most. logprobs: report
    the log-probabilities of that many most likely tokens at each step, and of the chosen one.

    Raises RequestError for a value that makes no sense.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int = 16
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _check("n", self.n, "an integer of at least 1", _is_int(self.n) and self.n >= 1)
        _check("temperature", self.temperature, "0 or more", _in(self.temperature, 0, float("inf")))
        _check("top_p", self.top_p, "more than 0 and at most 1", _in(self.top_p, 0, 1) and self.top_p > 0)
        _check("top_k", self.top_k, "-1 or 0 (all) or a positive integer", _is_int(self.top_k) and self.top_k >= -1)
        _check("min_p", self.min_p, "between 0 and 1", _in(self.min_p, 0, 1))
        penalty = self.repetition_penalty
        _check("repetition_penalty", penalty, "more than 0", _in(penalty, 0, float("inf")) and penalty > 0)
        _check("seed", self.seed, "None or an integer", self.seed is None or _is_int(self.seed))
        _check(
            "max_tokens", self.max_tokens, "an integer of at least 1", _is_int(self.max_tokens) and self.max_tokens > 0
        )
        _check("logprobs", self.logprobs, "None or 0 to 20", self.logprobs is None or _in(self.logprobs, 0, 20))
        _check(
            "stop",
            self.stop,
            "None or strings that are not empty",
            all(isinstance(s, str) and s for s in self.stop_strings),
        )
        _check(
            "stop_token_ids",
            self.stop_token_ids,
            "None or integers",
            all(_is_int(t) for t in self.stop_token_ids or ()),
        )

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, whatever form it was given in."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def truncates(self) -> bool:
        """Whether any token can be cut off: only then must the vocabulary be sorted."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    def ends_with(self, token: int, eos_token_ids: Sequence[int]) -> bool:
        """Whether this token ends the output. It stays part of the token ids, as in vLLM."""
        return token in (self.stop_token_ids or ()) or (token in eos_token_ids and not self.ignore_eos)

    def generator(self, sample: int, default_seed: int, device: torch.device | str = "cpu") -> Generator:
        """The random stream of completion number `sample` of a request: its own, so that nothing else shifts it.

        `default_seed` serves requests that set no seed.
        """
        seed = default_seed if self.seed is None else self.seed
        return Generator(device).manual_seed((seed + sample * _MIX) % 2**63)


def probs_from_logits(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """The distribution that row i of logits [rows, vocab] is sampled from, under params[i]; float32 [rows, vocab].

    Temperature divides the logits; 0 gives all mass to the largest (ties: the first). top-k keeps the k most likely
    tokens. top-p keeps the smallest set whose mass reaches p, the crossing token included (Holtzman et al. 2019,
    arXiv:1904.09751). min-p keeps tokens of at least min_p times the most likely one's probability
    (arXiv:2407.01082). Each works on the renormalised result of the one before, row by row.
    """
    best = torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
    if all(p.greedy for p in params):
        return best
    greedy = torch.tensor([p.greedy for p in params], device=logits.device)
    temperature = torch.tensor([p.temperature or 1.0 for p in params], device=logits.device)
    probs = torch.softmax(logits.float() / temperature[:, None], dim=-1)
    if any(p.truncates for p in params):
        probs = _truncate(probs, params)
    return torch.where(greedy[:, None], best, probs)


def _truncate(probs: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Top-k, top-p and min-p on rows sorted by probability, back in the vocabulary's order, renormalised."""
    vocab = probs.shape[-1]
    top_k = torch.tensor([p.top_k if p.top_k > 0 else vocab for p in params], device=probs.device)
    top_p = torch.tensor([p.top_p for p in params], device=probs.device)
    min_p = torch.tensor([p.min_p for p in params], device=probs.device)
    ranked, order = probs.sort(dim=-1, descending=True, stable=True)
    ranked = ranked * (torch.arange(vocab, device=probs.device) < top_k[:, None])
    ranked = ranked / ranked.sum(dim=-1, keepdim=True)
    mass_before = ranked.cumsum(dim=-1) - ranked
    keep = (mass_before < top_p[:, None]) | (top_p[:, None] >= 1)
    ranked = ranked * (keep & (ranked >= min_p[:, None] * ranked[:, :1]))
    return torch.zeros_like(probs).scatter_(-1, order, ranked / ranked.sum(dim=-1, keepdim=True))


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make the tokens `seen` [n] less likely in logits [vocab] (Keskar et al. 2019, arXiv:1909.05858).

    Positive logits are divided, negative ones multiplied: both move down for a penalty above 1. A token counts once.
    """
    scores = logits[seen]
    return logits.index_put((seen,), torch.where(scores > 0, scores / penalty, scores * penalty))


def sample(probs: Tensor, generators: Iterable[Generator | None]) -> Tensor:
    """Draw one token per row of probs [rows, vocab]; int64 [rows]. A greedy row, all on one token, needs no generator.

    One uniform number per row, from the row's own stream, drawn before the next generator is asked for. If no row needs
    one, the running sums of the vocabulary are saved, too. No host synchronisation.
    """
    numbers = [None if generator is None else uniform(generator, probs.device) for generator in generators]
    if all(number is None for number in numbers):
        return probs.argmax(dim=-1)
    zero = torch.zeros((), dtype=torch.float64, device=probs.device)
    return pick(probs, torch.stack([zero if number is None else number for number in numbers]))


def pick(probs: Tensor, u: Tensor) -> Tensor:
    """The tokens that the numbers u [rows] float64 in [0, 1) fall on, in rows of probs [rows, vocab]; int64 [rows].

    It is the first token at which the running sum of the probabilities exceeds u; a token without probability never
    is that one. Sums are float64: in float32 the tail of a large vocabulary would be lost in rounding.
    """
    sums = probs.cumsum(dim=-1, dtype=torch.float64)
    tokens = torch.searchsorted(sums, u[:, None] * sums[:, -1:], right=True)
    return tokens[:, 0].clamp_(max=probs.shape[-1] - 1)


def uniform(generator: Generator, device: torch.device) -> Tensor:
    """A float64 in [0, 1)."""
    return torch.rand((), generator=generator, dtype=torch.float64, device=device)


def _check(name: str, value: Any, allowed: str, valid: bool) -> None:
    if not valid:
        raise RequestError(f"{name}={value!r} is not possible: it must be {allowed}.")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _in(value: Any, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
