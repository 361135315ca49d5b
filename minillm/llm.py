"""The front door: prompts in, text out. Names and result objects are vLLM's, so the same four lines run on both.

    llm = LLM("tiny")
    for output in llm.generate(["def fib(n):"], SamplingParams(temperature=0, max_tokens=64)):
        print(output.outputs[0].text, output.metrics.ttft)

The engine behind it knows token ids only. Here they become text, and here stop strings end a completion.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from minillm.config import EngineConfig
from minillm.course.use import Used, plug_in
from minillm.engine.engine import Engine, TokenEvent
from minillm.errors import RequestError
from minillm.model.loader import load_model
from minillm.model.tokenizer import Tokenizer, load_tokenizer
from minillm.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from minillm.prompts import Prompt as OnePrompt
from minillm.prompts import read_prompts
from minillm.sampling import SamplingParams
from minillm.speculative import attach
from minillm.text import TextStream

Prompt = str | Sequence[int] | Mapping[str, Any]  # text, token ids, or vLLM's {"prompt_token_ids": [...]}


@dataclass
class Live:
    """A request in the engine: its result so far, and who writes the text of each completion."""

    output: RequestOutput
    texts: list[TextStream] | None  # None without a tokenizer
    changed: bool = False


class LLM:
    """A model that is ready to write.

    model, device, dtype, seed: as in `load_model`. speculative: who guesses tokens ahead, which are then checked
    several at a time: None (nobody), "ngram" (what followed earlier in the text), "draft" (the embedded draft model) or
    the name of a smaller model with the same tokenizer. num_speculative_tokens: how many at most. adaptive_drafts: one
    more than were right last time, twice as many if all were; False always guesses as many as there may be. use: an
    exercise or a folder of exercises whose functions take the place of the engine's own; `used` then tells which (see
    `minillm.course.use`), and dtype "auto" is float32. The other settings are those of `EngineConfig`; seed also serves
    requests that bring none of their own. Raises what these raise.
    """

    def __init__(
        self,
        model: str | Path = "tiny",
        *,
        device: str = "auto",
        dtype: str = "auto",
        kv_format: str = "auto",
        attention: str = "auto",
        block_size: int | None = None,
        num_blocks: int | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 512,
        policy: str = "mixed",
        enable_prefix_caching: bool = True,
        speculative: str | None = None,
        num_speculative_tokens: int = 4,
        adaptive_drafts: bool = True,
        use: str | Path | None = None,
        seed: int = 0,
        debug: bool = False,
    ) -> None:
        config = EngineConfig(
            kv_format=kv_format,
            block_size=block_size,
            num_blocks=num_blocks,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            policy=policy,
            enable_prefix_caching=enable_prefix_caching,
            attention=attention,
            num_speculative_tokens=num_speculative_tokens,
            adaptive_drafts=adaptive_drafts,
            cuda_graphs=use is None,  # what a graph replays cannot be replaced
            seed=seed,
            debug=debug,
        )
        if use is not None and dtype == "auto":
            dtype = "float32"  # in 16 bits, two ways to compute the same may write different tokens
        self.tokenizer = load_tokenizer(model)
        self.engine = Engine(load_model(model, device=device, dtype=dtype, seed=seed), config)
        if speculative is not None:
            attach(speculative, self.engine, self.tokenizer, device=device, dtype=dtype, seed=seed)
        self.new_metrics: Callable[..., RequestMetrics] = RequestMetrics
        self.used: list[Used] = [] if use is None else plug_in(use, self)
        self._live: dict[str, Live] = {}

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Complete all prompts, batched by the engine; the results stand in the order of the prompts.

        `sampling_params` is one for all, or one per prompt. Raises RequestError for a request that cannot be served,
        before anything is computed.
        """
        requests = self._add_all(prompts, sampling_params)
        total = sum(len(request.output.outputs) for request in requests)
        with Progress(transient=True, disable=not progress, console=Console(stderr=True)) as bar:
            task = bar.add_task("Generating", total=total)
            for _ in self._run(requests):
                done = sum(output.finished for request in requests for output in request.output.outputs)
                bar.update(task, completed=done)
        return [request.output for request in requests]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[RequestOutput]:
        """Yield a request's result whenever it has grown; `outputs[i].delta` is the text that is new.

        It is the same object each time: copy what you want to keep. Leaving the loop early aborts the requests.
        """
        shown: Counter[tuple[str, int]] = Counter()  # characters by completion
        for request in self._run(self._add_all(prompts, sampling_params)):
            for output in request.output.outputs:
                key = request.output.request_id, output.index
                output.delta = output.text[shown[key] :]
                shown[key] = len(output.text)
            yield request.output

    def _run(self, requests: list[Live]) -> Iterator[Live]:
        """Step the engine until these requests are finished, yielding each that has changed.

        Whoever steps takes the events of all requests, so streams and calls of `generate` may interleave.
        """
        try:
            while True:
                if changed := [request for request in requests if request.changed]:
                    for request in changed:
                        request.changed = False
                        yield request
                elif all(request.output.finished for request in requests):
                    return
                else:
                    for event in self.engine.step():
                        self._take(event)
        finally:
            for request in requests:
                self._forget(request)

    def _add_all(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[Live]:
        """Queue all prompts, or none if one of them is refused."""
        requests: list[Live] = []
        try:
            for prompt, wish in read_prompts(prompts, params):
                requests.append(self._add(prompt, wish))
        except RequestError:
            for request in requests:
                self._forget(request)
            raise
        return requests

    def _add(self, prompt: OnePrompt, params: SamplingParams) -> Live:
        arrival = time.perf_counter()
        token_ids = list(prompt.token_ids) if prompt.token_ids is not None else self._encode(prompt.text or "")
        text, params = prompt.text, params.with_bad_words(self.tokenizer.encode) if self.tokenizer else params
        params.check(self.engine.model.config.vocab_size)
        if params.stop_strings and self.tokenizer is None:
            raise RequestError("Stop strings need a tokenizer, and a random model has none. Use stop_token_ids.")
        request_id = self.engine.add(token_ids, params, arrival_time=arrival, salt=prompt.cache_salt)
        outputs = [CompletionOutput(index) for index in range(params.n)]
        metrics = self.new_metrics(arrival, [[] for _ in outputs])
        texts = [TextStream(o, self.tokenizer, params.stop_strings) for o in outputs] if self.tokenizer else None
        self._live[request_id] = Live(RequestOutput(request_id, text, token_ids, outputs, metrics), texts)
        return self._live[request_id]

    def _encode(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise RequestError("A random model has no tokenizer. Give token ids, such as [1, 2, 3], as the prompt.")
        return self.tokenizer.encode(text)

    def _take(self, event: TokenEvent) -> None:
        """Account for the new tokens of one completion: ids, times, text, and whether it is finished."""
        request = self._live[event.request.request_id]
        request.changed = True
        request.output.metrics.first_scheduled_time = event.request.first_scheduled_time
        output = request.output.outputs[event.request.index]
        for position, token in enumerate(event.token_ids):
            output.token_ids.append(token)
            request.output.metrics.token_times[output.index].append(event.time)
            if event.logprobs is not None:
                self._take_logprobs(output, token, event.logprobs[position])
            hit = request.texts[output.index].push(token) if request.texts else None
            if hit is not None:
                output.finish_reason, output.stop_reason = "stop", hit
                self.engine.finish(request.output.request_id, output.index, "stop", hit)
                return
        if event.finish_reason is not None:
            output.finish_reason, output.stop_reason = event.finish_reason, event.request.stop_reason
            if request.texts:
                request.texts[output.index].close()

    def _take_logprobs(self, output: CompletionOutput, token: int, candidates: dict[int, Logprob]) -> None:
        output.cumulative_logprob = (output.cumulative_logprob or 0.0) + candidates[token].logprob
        output.logprobs = output.logprobs or []
        output.logprobs.append({i: _spell(self.tokenizer, i, candidate) for i, candidate in candidates.items()})

    def _forget(self, request: Live) -> None:
        """Drop a request, aborting what is unfinished of it."""
        self.engine.abort(request.output.request_id)
        self._live.pop(request.output.request_id, None)


def _spell(tokenizer: Tokenizer | None, token: int, candidate: Logprob) -> Logprob:
    return candidate if tokenizer is None else replace(candidate, decoded_token=tokenizer.decode([token]))
