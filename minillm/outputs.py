"""What a request gives back. Names are vLLM's where vLLM has one; `docs/vllm.md` compares field by field."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True)
class Logprob:
    """One candidate of one step: log-probability under the raw logits, rank (1 is the most likely), bytes, and text.

    Bytes and text need a tokenizer. The bytes are exact: two tokens may look alike, and one may be half a character.
    """

    logprob: float
    rank: int
    token_bytes: bytes | None = None

    @property
    def decoded_token(self) -> str | None:
        return None if self.token_bytes is None else self.token_bytes.decode("utf-8", "replace")


@dataclass
class CompletionOutput:
    """One completion of a prompt. `delta` is the text that is new since the last time a stream showed it.

    finish_reason: "stop" (an end token or a stop string), "length" (max_tokens, or the model has no more positions),
    "abort" (the caller left) or "error": its computation failed, `error` says how, and what came before stays.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token or string that ended it; None for the model's own end token
    error: str | None = None  # why finish_reason is "error"
    delta: str = ""

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class RequestMetrics:
    """When the request came and when each of its tokens left, in seconds of one monotonic clock.

    Definitions are vLLM's. A request with several completions has one list of times per completion: its TTFT is the
    first token of any, its TPOT the mean over completions, its ITL all gaps.
    """

    arrival_time: float
    token_times: list[list[float]] = field(default_factory=list)
    first_scheduled_time: float | None = None

    @property
    def queue_time(self) -> float | None:
        """Seconds between arrival and the first step that worked on the request."""
        return None if self.first_scheduled_time is None else self.first_scheduled_time - self.arrival_time

    @property
    def ttft(self) -> float | None:
        """Time to first token, seconds: queue, prefill and sampling."""
        firsts = [times[0] for times in self.token_times if times]
        return min(firsts) - self.arrival_time if firsts else None

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first, seconds: (last - first) / (n - 1). None for a single token.

        The first token comes out of prefill, so n tokens take n - 1 decode steps.
        """
        rates = [(times[-1] - times[0]) / (len(times) - 1) for times in self.token_times if len(times) > 1]
        return sum(rates) / len(rates) if rates else None

    @property
    def itl(self) -> list[float]:
        """Inter-token latencies: every gap between two tokens, seconds."""
        return [later - earlier for times in self.token_times for earlier, later in pairwise(times)]

    @property
    def e2el(self) -> float | None:
        """End-to-end latency, seconds: arrival to the last token."""
        lasts = [times[-1] for times in self.token_times if times]
        return max(lasts) - self.arrival_time if lasts else None


@dataclass
class RequestOutput:
    """A request and its completions so far.

    prompt_logprobs: one entry for each token of the prompt, if they were asked for; the first token has None, as
    nothing comes before it. num_cached_tokens: prompt tokens whose KV was found in the prefix cache; None before the
    request first runs.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int | None = None

    @property
    def finished(self) -> bool:
        return all(output.finished for output in self.outputs)
