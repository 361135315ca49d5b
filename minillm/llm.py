"""The front door: prompts in, text out. Names and result objects are vLLM's, so the same four lines run on both.

llm = LLM("tiny")
for output in llm.generate(["def fib(n):"], SamplingParams(temperature=0, max_tokens=64)):
    print(output.outputs[0].text, output.metrics.ttft)
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.progress import track

from minillm.errors import RequestError
from minillm.generate import check_prompt, generate
from minillm.model.loader import load_model
from minillm.model.tokenizer import load_tokenizer
from minillm.outputs import CompletionOutput, RequestMetrics, RequestOutput
from minillm.sampling import SamplingParams
from minillm.text import TextStream

Prompt = str | Sequence[int] | Mapping[str, Any]  # text, token ids, or vLLM's {"prompt_token_ids": [...]}


class LLM:
    """A model that is ready to write.

    model, device, dtype, seed: as in `load_model`. Raises what it raises.
    """

    def __init__(self, model: str | Path = "tiny", *, device: str = "auto", dtype: str = "auto", seed: int = 0) -> None:
        self.tokenizer = load_tokenizer(model)
        self.model = load_model(model, device=device, dtype=dtype, seed=seed)
        self.seed = seed
        self._num_requests = 0

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | None = None,
        *,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Complete each prompt; the results stand in the order of the prompts.

        Raises RequestError for a prompt that cannot be served, before anything is computed.
        """
        params = sampling_params or SamplingParams()
        requests = [self._request(prompt, params) for prompt in as_list(prompts)]
        for request in track(requests, "Generating", transient=True, disable=not progress):
            for _ in self._run(request, params):
                pass
        return requests

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Yield the growing result of one prompt after each token; `outputs[i].delta` is the text that is new.

        It is the same object each time: copy what you want to keep.
        """
        params = sampling_params or SamplingParams()
        return self._run(self._request(prompt, params), params)

    def _request(self, prompt: Prompt, params: SamplingParams) -> RequestOutput:
        text, token_ids = self._encode(prompt)
        check_prompt(token_ids, self.model.config)
        if params.stop_strings and self.tokenizer is None:
            raise RequestError("Stop strings need a tokenizer, and a random model has none. Use stop_token_ids.")
        self._num_requests += 1
        outputs = [CompletionOutput(index) for index in range(params.n)]
        metrics = RequestMetrics(time.perf_counter(), [[] for _ in outputs])
        return RequestOutput(str(self._num_requests - 1), text, token_ids, outputs, metrics)

    def _encode(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping):
            return None, list(prompt["prompt_token_ids"])
        if not isinstance(prompt, str):
            return None, list(prompt)
        if self.tokenizer is None:
            raise RequestError("A random model has no tokenizer. Give token ids, such as [1, 2, 3], as the prompt.")
        return prompt, self.tokenizer.encode(prompt)

    def _run(self, request: RequestOutput, params: SamplingParams) -> Iterator[RequestOutput]:
        for output in request.outputs:
            text = TextStream(output, self.tokenizer, params.stop_strings) if self.tokenizer else None
            for token in generate(self.model, request.prompt_token_ids, params, sample_index=output.index):
                request.metrics.token_times[output.index].append(time.perf_counter())
                output.delta = ""
                self._take(token, output, params, text)
                yield request
                if output.finished:
                    break

    def _take(self, token: int, output: CompletionOutput, params: SamplingParams, text: TextStream | None) -> None:
        """Account for one new token: ids, text, and whether it was the last."""
        output.token_ids.append(token)
        hit = text.push(token) if text else None
        if hit is not None:
            output.finish_reason, output.stop_reason = "stop", hit
            return
        if params.ends_with(token, self.model.config.eos_token_ids):
            output.finish_reason = "stop"
            output.stop_reason = token if token in (params.stop_token_ids or ()) else None
        elif len(output.token_ids) == params.max_tokens:
            output.finish_reason = "length"
        if output.finished and text:
            text.close()


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, as a list: a string, a mapping or a sequence of integers is one."""
    if isinstance(prompts, (str, Mapping)) or (prompts and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]
