"""Runs a packed step through the model and draws the next tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from minillm.attention import get_backend
from minillm.cache.paged import PagedCache, choose_num_blocks
from minillm.config import EngineConfig
from minillm.engine.batch import Batch
from minillm.engine.graphs import DecodeGraphs
from minillm.engine.sequence import Sequence
from minillm.model.decoder import Decoder
from minillm.outputs import Logprob
from minillm.sampling import penalize_repetition, probs_from_logits, sample


@dataclass(frozen=True)
class Drawn:
    """One token for each of a batch's samplers, and the candidates that its parameters asked to see."""

    tokens: list[int]
    logprobs: list[dict[int, Logprob] | None]


class ModelRunner:
    """A model, its cache, and the step from a batch to tokens. Knows nothing of requests, queues or time."""

    def __init__(self, model: Decoder, config: EngineConfig) -> None:
        self.model = model
        self.cache = PagedCache(
            model.config,
            get_backend(config.attention, model.device),
            num_blocks=choose_num_blocks(model.config, config, model.device, model.dtype),
            block_size=config.block_size,
            device=model.device,
            dtype=model.dtype,
        )
        replays = config.cuda_graphs and model.device.type == "cuda"
        self.graphs = DecodeGraphs(model, self.cache) if replays else None

    @torch.inference_mode()
    def run(self, batch: Batch) -> Drawn:
        """Compute the batch's tokens and sample where a sequence reaches its end.

        Tokens come to the host in one transfer: it is the only point of the step that waits for the device.
        """
        self.cache.copy(batch.copies)
        logits = self._logits(batch)
        if logits is None or not batch.samplers:
            return Drawn([], [])
        tokens = self._sample(logits, batch.samplers)
        return Drawn(tokens.tolist(), _logprobs(logits, tokens, batch.samplers))

    def _logits(self, batch: Batch) -> Tensor | None:
        """Scores [num_samplers, vocab_size] for everybody who samples; None if nobody does."""
        replayed = self.graphs.logits(batch) if self.graphs else None
        if replayed is not None:
            return replayed
        hidden = self.model(batch.tokens, batch.positions, self.cache.attend(batch.layout))
        return self.model.logits(hidden[batch.logit_indices]) if batch.samplers else None

    def _sample(self, logits: Tensor, samplers: list[Sequence]) -> Tensor:
        """Draw one token per row of logits [rows, vocab_size], each from its own distribution and random stream."""
        params = [sequence.params for sequence in samplers]
        if any(p.repetition_penalty != 1 for p in params):
            logits = torch.stack([_penalized(row, sequence) for row, sequence in zip(logits, samplers, strict=True)])
        return sample(probs_from_logits(logits, params), [self._generator(sequence) for sequence in samplers])

    def _generator(self, sequence: Sequence) -> Generator | None:
        """The sequence's random stream, made at its first token: ten thousand waiting ones need none yet."""
        if sequence.params.greedy:
            return None
        if sequence.generator is None:
            sequence.generator = sequence.params.generator(sequence.index, sequence.seed, self.model.device)
        return sequence.generator


def _penalized(logits: Tensor, sequence: Sequence) -> Tensor:
    seen = torch.tensor(sequence.tokens, device=logits.device)
    return penalize_repetition(logits, seen, sequence.params.repetition_penalty)


def _logprobs(logits: Tensor, tokens: Tensor, samplers: list[Sequence]) -> list[dict[int, Logprob] | None]:
    """For each row that asks for them: the most likely tokens and the drawn one, under the model's raw logits."""
    wanted = [sequence.params.logprobs for sequence in samplers]
    if all(count is None for count in wanted):
        return [None] * len(wanted)
    scores = logits.log_softmax(dim=-1)
    return [None if k is None else _top(row, int(t), k) for row, t, k in zip(scores, tokens, wanted, strict=True)]


def _top(scores: Tensor, token: int, count: int) -> dict[int, Logprob]:
    values, indices = scores.topk(count)
    ranked = {int(i): Logprob(float(v), rank) for rank, (v, i) in enumerate(zip(values, indices, strict=True), 1)}
    own = Logprob(float(scores[token]), int((scores > scores[token]).sum()) + 1)
    return {token: own} | ranked
