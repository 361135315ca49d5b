"""The front door: prompts in, text out. Names are vLLM's; `docs/vllm.md` says what is the same and what differs.

llm = LLM("tiny")
for output in llm.generate(["def fib(n):"], SamplingParams(temperature=0, max_tokens=64)):
    print(output.outputs[0].text, output.metrics.ttft)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from minillm.config import EngineConfig
from minillm.engine.engine import Engine
from minillm.model.loader import load_model
from minillm.model.tokenizer import load_tokenizer
from minillm.outputs import RequestOutput
from minillm.prompts import Params, Wish, read_prompts
from minillm.seams import need
from minillm.text import Live, OutputProcessor


class LLM:
    """A model that is ready to write.

    model, device, dtype: as in `load_model`. speculative: who guesses tokens ahead, which are then checked several at
    a time: None (nobody), "ngram" (what followed earlier in the text), "draft" (the embedded draft model) or the name
    of a smaller model with the same tokenizer. progress: show a bar while a model is loaded. settings: fields of
    `EngineConfig`, by name. Raises what these raise, and `ConfigError` for a setting that does not exist.
    """

    def __init__(
        self,
        model: str | Path = "tiny",
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        speculative: str | None = None,
        progress: bool = True,
        **settings: Any,
    ) -> None:
        config = EngineConfig.of(settings)
        how = dict[str, Any](device=device, dtype=dtype, progress=progress, seed=config.seed, kernels=config.kernels)
        decoder = load_model(model, **how)
        self.tokenizer = load_tokenizer(model)
        self.engine = Engine(decoder, config)
        if speculative is not None:
            need("proposer", "speculative", speculative).attach(speculative, self.engine, self.tokenizer, **how)
        self.processor = OutputProcessor(self.engine, self.tokenizer)

    def generate(self, prompts: Any, sampling_params: Params = None, *, progress: bool = True) -> list[RequestOutput]:
        """Complete all prompts, batched by the engine; the results stand in the order of the prompts.

        prompts: one or several, in any of the forms of `minillm.prompts`. `sampling_params` is one for all, or one per
        prompt. Raises `RequestError` for a request that cannot be served, before anything is computed.
        """
        wanted = self._read(prompts, sampling_params)
        results: list[RequestOutput] = []
        with Progress(transient=True, disable=not progress, console=Console(stderr=True)) as bar:
            task = bar.add_task("Generating", total=len(wanted))
            for result in self._serve(wanted, results):
                bar.update(task, advance=result.finished)
        return results

    def stream(self, prompts: Any, sampling_params: Params = None) -> Iterator[RequestOutput]:
        """Yield a request's result whenever it has grown; `outputs[i].delta` is the text that is new.

        Raises `RequestError` as `generate`, at once. It is the same object each time: copy what you want to keep.
        Leaving the loop early aborts the requests.
        """
        return self._serve(self._read(prompts, sampling_params), [])

    def _read(self, prompts: Any, params: Params) -> list[Wish]:
        """All prompts in tokens, each with its parameters; nothing is queued yet."""
        return [self.processor.encode(*pair) for pair in read_prompts(prompts, params)]

    def _serve(self, wanted: list[Wish], results: list[RequestOutput]) -> Iterator[RequestOutput]:
        """Queue all requests into `results`, and yield each that has changed, until all are finished.

        Whatever ends the loop, nothing of it stays in the engine; if letting go of one fails, the others go, too.
        """
        names, mailbox = [self.engine.new_id() for _ in wanted], dict[str, Live]()
        try:
            for name, pair in zip(names, wanted, strict=True):
                results.append(self.processor.add(name, *pair, mailbox))
            waiting = len(results)
            while waiting:
                for result in self.processor.step(mailbox):
                    waiting -= result.finished
                    yield result
        finally:
            with ExitStack() as leaving:
                for name in names:
                    leaving.callback(self.processor.drop, name)
