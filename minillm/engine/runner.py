"""Runs a packed step through the model and draws the next tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from minillm import seams
from minillm.attention import HAS_TRITON, get_backend
from minillm.cache.paged import PagedCache, choose_num_blocks
from minillm.config import EngineConfig
from minillm.engine.batch import Batch
from minillm.engine.request import Request
from minillm.engine.verify import verify
from minillm.kernels.gpu.graphs import DecodeGraphs
from minillm.model.decoder import Decoder
from minillm.outputs import Logprob
from minillm.sampling import penalize_repetition, probs_from_logits


@dataclass(frozen=True)
class Drawn:
    """The new tokens of each of a batch's samplers, and for each token the candidates that its parameters ask for."""

    tokens: list[list[int]]
    logprobs: list[list[dict[int, Logprob]] | None]


class ModelRunner:
    """A model, its cache, and the step from a batch to tokens. Knows nothing of requests, queues or time.

    Two rules between logits and tokens are attributes: `process` makes distributions of logits, `verify` tokens of
    these.
    """

    def __init__(self, model: Decoder, config: EngineConfig) -> None:
        self.model = model
        self.process: Callable[..., Tensor] = probs_from_logits
        self.verify: Callable[..., list[list[int]]] = verify
        self.cache = open_cache(model, config)
        self.graphs = DecodeGraphs(model, self.cache) if self._replays(config) else None

    def _replays(self, config: EngineConfig) -> bool:
        """Whether decode steps can be replayed: only the Triton kernels read the device's block tables."""
        on_device = self.model.device.type == "cuda" and HAS_TRITON and config.attention in ("auto", "triton")
        return config.cuda_graphs and on_device

    @torch.inference_mode()
    def run(self, batch: Batch) -> Drawn:
        """Compute the batch's tokens, sample where a sequence reaches its end, and verify what was guessed behind it.

        Tokens come to the host in one transfer: it is the only point of the step that waits for the device.
        """
        logits = self.logits(batch)
        if logits is None:
            return Drawn([], [])
        generators = [self._generator(sequence) for sequence in batch.samplers]
        tokens = self.verify(distributions(logits, batch, self.process), batch.drafts, generators)
        return Drawn(tokens, _logprobs(logits, tokens, batch))

    def logits(self, batch: Batch) -> Tensor | None:
        """Compute the batch's tokens; scores [len(logit_indices), vocab_size], or None if nobody samples."""
        self.cache.copy(batch.copies)
        replayed = self.graphs.logits(batch) if self.graphs else None
        if replayed is None:
            hidden = self.model(batch.tokens, batch.positions, self.cache.attend(batch.layout))
            replayed = self.model.logits(hidden[batch.logit_indices]) if batch.samplers else None
        return replayed if batch.samplers else None

    def _generator(self, sequence: Request) -> Generator | None:
        """The sequence's random stream, made at its first token: ten thousand waiting ones need none yet."""
        if sequence.params.greedy:
            return None
        if sequence.generator is None:
            sequence.generator = sequence.params.generator(sequence.index, sequence.seed, self.model.device)
        return sequence.generator


def open_cache(model: Decoder, config: EngineConfig) -> Any:
    """An empty cache in the format that the configuration names, with the backend that reads it."""
    num_blocks = choose_num_blocks(model.config, config, model.device, model.dtype)
    sizes = {"num_blocks": num_blocks, "block_size": config.kv_block_size}
    if config.kv_format == "auto":
        backend = get_backend(config.attention, model.device)
        return PagedCache(model.config, backend, **sizes, device=model.device, dtype=model.dtype)
    formats: Any = seams.offer("kv_format")
    return formats.open_cache(model.config, config.kv_format, **sizes, device=model.device, dtype=model.dtype)


def distributions(logits: Tensor, batch: Batch, process: Callable[..., Tensor] = probs_from_logits) -> Tensor:
    """What each row of logits [rows, vocab_size] is drawn from under its sequence's parameters; float32, as logits."""
    params = [sequence.params for sequence, _ in batch.rows()]
    if any(p.repetition_penalty != 1 for p in params):
        logits = torch.stack([_penalized(row, *whose) for row, whose in zip(logits, batch.rows(), strict=True)])
    return process(logits, params)


def _penalized(logits: Tensor, sequence: Request, drafts: list[int]) -> Tensor:
    seen = torch.tensor(sequence.tokens + drafts, device=logits.device)
    return penalize_repetition(logits, seen, sequence.params.repetition_penalty)


def _logprobs(logits: Tensor, tokens: list[list[int]], batch: Batch) -> list[list[dict[int, Logprob]] | None]:
    """For each sampler that asks for them: at each new token the most likely ones and itself, under the raw logits."""
    wanted = [sequence.params.logprobs for sequence in batch.samplers]
    if all(count is None for count in wanted):
        return [None] * len(wanted)
    by_sampler = logits.log_softmax(dim=-1).split([1 + len(draft) for draft in batch.drafts])
    return [
        None if count is None else [_top(row, token, count) for row, token in zip(rows, said, strict=False)]
        for rows, said, count in zip(by_sampler, tokens, wanted, strict=True)
    ]


def _top(scores: Tensor, token: int, count: int) -> dict[int, Logprob]:
    values, indices = scores.topk(count)
    ranked = {int(i): Logprob(float(v), rank) for rank, (v, i) in enumerate(zip(values, indices, strict=True), 1)}
    own = Logprob(float(scores[token]), int((scores > scores[token]).sum()) + 1)
    return {token: own} | ranked
