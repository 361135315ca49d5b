"""From tokens to text that is never taken back: characters complete, stop strings cut off.

`OutputProcessor` is the one place where the engine's tokens become text, and where text ends a completion. `LLM` and a
server put their requests in here and take results out.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from functools import partial

from minillm.engine.engine import Engine, TokenEvent
from minillm.engine.request import Request
from minillm.errors import RequestError
from minillm.model.tokenizer import Detokenizer, Tokenizer
from minillm.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from minillm.prompts import Prompt
from minillm.sampling import SamplingParams


class TextStream:
    """Writes the text of one completion as its tokens come.

    What might be the beginning of a stop string is held back until the next tokens tell. So a reader of the stream
    sees neither half a character nor half a stop string.
    """

    def __init__(self, output: CompletionOutput, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self.output, self.params = output, params
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=params.skip_special_tokens)
        self._held = ""
        self._num_told = 0  # characters

    def push(self, token: int) -> str | None:
        """Add one token. Returns the stop string that it completes, if any: the text then ends before it.

        With `include_stop_str_in_output` it ends after it. No text stops before `min_tokens` tokens.
        """
        known = len(self._held)  # a stop string in the text before it came too early: min_tokens passed it over
        text = self._held + self._detokenizer.push([token])
        stops = self.params.stop or ()
        places = [(text.find(stop, max(0, known + 1 - len(stop))), stop) for stop in stops]
        hits = [(place, stop) for place, stop in places if place >= 0]
        if hits and len(self.output.token_ids) > self.params.min_tokens:
            position, stop = min(hits)
            self.output.text += text[: position + len(stop) * self.params.include_stop_str_in_output]
            self._held = ""
            return stop
        end = len(text) - max((_overlap(text, stop) for stop in stops), default=0)
        self.output.text += text[:end]
        self._held = text[end:]
        return None

    def close(self) -> None:
        """The completion ended without a stop string: show what was held back."""
        self.output.text += self._held + self._detokenizer.flush()
        self._held = ""

    def tell(self) -> None:
        """Make `delta` of the text that is new since the last time."""
        self.output.delta = self.output.text[self._num_told :]
        self._num_told = len(self.output.text)


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(eq=False)
class Live:
    """A request in the engine: its result so far, and who writes the text of each completion."""

    output: RequestOutput
    texts: list[TextStream]  # empty without a tokenizer
    mailbox: dict[str, Live]  # of its owner: by name, what has changed since the owner last looked


class OutputProcessor:
    """Requests in, results with text out. Several callers, each with a mailbox of its own, may take turns.

    tokenizer: None for a model without text.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self._live: dict[str, Live] = {}
        self._events: deque[TokenEvent] = deque()
        self._lock = threading.RLock()

    def encode(self, prompt: Prompt, params: SamplingParams) -> tuple[Prompt, SamplingParams]:
        """The prompt with its token ids, and the parameters with their bad words in tokens; checked by the engine.

        Raises `RequestError` for what the engine could never serve, or what needs a tokenizer if there is none.
        """
        if prompt.token_ids is None or params.stop or params.bad_words:
            if self.tokenizer is None:
                raise RequestError("There is no tokenizer. Give token ids, stop_token_ids and bad_words_token_ids.")
            params = params.with_bad_words(partial(self.tokenizer.encode, add_special_tokens=False))
            if prompt.token_ids is None:
                prompt = replace(prompt, token_ids=tuple(self.tokenizer.encode(prompt.text or "")))
        self.engine.check(prompt.token_ids or (), params)
        return prompt, params

    def add(self, name: str, prompt: Prompt, params: SamplingParams, mailbox: dict[str, Live]) -> RequestOutput:
        """Queue a request that `encode` has seen, under a name of `engine.new_id`. Its result will grow."""
        outputs = [CompletionOutput(index) for index in range(params.n)]
        metrics = RequestMetrics(time.perf_counter(), [[] for _ in outputs])
        result = RequestOutput(name, prompt.text, list(prompt.token_ids or ()), outputs, metrics)
        texts = [TextStream(output, self.tokenizer, params) for output in outputs] if self.tokenizer else []
        with self._lock:
            self._live[name] = Live(result, texts, mailbox)
            self.engine.add(result.prompt_token_ids, params, request_id=name, cache_salt=prompt.cache_salt)
        return result

    def step(self, mailbox: dict[str, Live]) -> list[RequestOutput]:
        """The results of this mailbox that have changed since it was last asked; steps the engine if none has.

        Whoever steps takes the events of all requests, and puts them into everybody's mailboxes. Requests that were
        added to the engine itself are not told here.
        """
        with self._lock:
            if not mailbox:
                self._events.extend(self.engine.step())
            while self._events:
                event = self._events[0]
                if event.request.request_id in self._live:
                    self._take(self._live[event.request.request_id], event.request, event.time)
                self._events.popleft()
            if not mailbox:
                self._end_the_lost()
            changed = list(mailbox.values())
            mailbox.clear()
            for live in changed:
                for text in live.texts:
                    text.tell()
        return [live.output for live in changed]

    def drop(self, name: str) -> None:
        """Forget a request; what is unfinished of it is aborted."""
        with self._lock:
            self._live.pop(name, None)
            self.engine.abort(name)

    def _end_the_lost(self) -> None:
        """End the requests that the engine has let go of without a word: aborted by others."""
        for name, live in self._live.items():
            if name not in self.engine.requests and not live.output.finished:
                for output in live.output.outputs:
                    output.finish_reason = output.finish_reason or "abort"
                live.mailbox[name] = live

    def _take(self, live: Live, request: Request, now: float) -> None:
        """Bring one completion level with what the engine knows of it: ids, times, text, and whether it is finished."""
        result, output = live.output, live.output.outputs[request.index]
        live.mailbox[result.request_id] = live
        result.metrics.first_scheduled_time = request.first_scheduled_time
        result.num_cached_tokens = request.num_cached
        if request.params.prompt_logprobs is not None and request.index == 0:  # nothing comes before the first token
            result.prompt_logprobs = result.prompt_logprobs or [None, *map(self._spell, request.prompt_logprobs)]
        for token in request.tokens[request.num_prompt + len(output.token_ids) :]:
            output.token_ids.append(token)
            result.metrics.token_times[output.index].append(now)
            if request.params.logprobs is not None:
                self._take_logprobs(output, token, request.logprobs[len(output.token_ids) - 1])
            hit = live.texts[output.index].push(token) if live.texts else None
            if hit is not None:
                output.finish_reason, output.stop_reason = "stop", hit
                self.engine.finish(result.request_id, output.index, hit)
                return
        if request.finished:
            output.finish_reason, output.stop_reason = request.finish_reason, request.stop_reason
            output.error = request.error
            if live.texts:
                live.texts[output.index].close()

    def _take_logprobs(self, output: CompletionOutput, token: int, told: dict[int, Logprob]) -> None:
        output.cumulative_logprob = (output.cumulative_logprob or 0.0) + told[token].logprob
        output.logprobs = output.logprobs or []
        output.logprobs.append(self._spell(told))

    def _spell(self, told: dict[int, Logprob]) -> dict[int, Logprob]:
        """Candidates with their bytes, which make their text."""
        if self.tokenizer is None:
            return told
        return {token: replace(one, token_bytes=self.tokenizer.token_bytes(token)) for token, one in told.items()}
