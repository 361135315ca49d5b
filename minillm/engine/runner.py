"""Runs a packed step through the model."""

from __future__ import annotations

import torch
from torch import Tensor

from minillm.attention import choose_backend
from minillm.cache.paged import BlockTensors, PagedCache, block_bytes, choose_num_blocks
from minillm.config import EngineConfig
from minillm.engine.batch import Batch
<<<<<<< HEAD
from minillm.errors import ConfigError
from minillm.model.decoder import Decoder, inference
from minillm.seams import offer
=======
from minillm.engine.request import Request
from minillm.engine.verify import verify
from minillm.kernels.gpu.graphs import DecodeGraphs
from minillm.model.decoder import Decoder
from minillm.outputs import Logprob
from minillm.quantization.cache import QuantizedCache
from minillm.quantization.formats import get_format
from minillm.sampling import adjust, probs_from_logits


@dataclass(frozen=True)
class Drawn:
    """The new tokens of each of a batch's samplers, and for each token the candidates that its parameters ask for."""

    tokens: list[list[int]]
    logprobs: list[list[dict[int, Logprob]] | None]
>>>>>>> hD


class ModelRunner:
    """A model, its cache, and the step from a batch to logits. Knows nothing of requests, queues or time."""

    def __init__(self, model: Decoder, config: EngineConfig) -> None:
        self.model = model
        self.cache = open_cache(model, config)
        graphs = offer("graphs", model.device.type) if config.cuda_graphs and config.kernels == "auto" else None
        self.graphs = graphs.DecodeGraphs(model, self.cache) if graphs else None

<<<<<<< HEAD
    def run(self, batch: Batch) -> Tensor:
        """Compute the batch's tokens: float32 logits [num_rows, vocab_size] of `batch.logit_indices`."""
        with inference(self.model.device):
            self.cache.copy(batch.copies)
            logits: Tensor | None = self.graphs.logits(batch) if self.graphs else None
            if logits is None:
                hidden = self.model(batch.tokens, batch.positions, self.cache.attend(batch.metadata))
                rows = hidden[batch.logit_indices]
                logits = self.model.logits(rows) if len(rows) else rows
        return logits
=======
    def _replays(self, config: EngineConfig) -> bool:
        """Whether decode steps can be replayed: nothing in them may follow the host's block tables.

        Only the Triton kernels read the device's; and which tails a step writes is found out on the host (int4).
        """
        on_device = self.model.device.type == "cuda" and HAS_TRITON and config.attention in ("auto", "triton")
        return config.cuda_graphs and on_device and self.cache.tails is None

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
            arrival, index = sequence.order
            sequence.generator = sequence.params.generator(
                index, engine_seed=sequence.seed, arrival=arrival, device=self.model.device
            )
        return sequence.generator
>>>>>>> hD


def open_cache(model: Decoder, config: EngineConfig) -> BlockTensors:
    """An empty cache in the format that the configuration names, with the backend that reads it.

<<<<<<< HEAD
    Raises `ConfigError` for a format that nobody offers.
    """
    where = {"device": model.device, "dtype": model.dtype}
    if config.kv_format == "auto":
        per_block = block_bytes(model.config, config.block_size, model.dtype)
        num_blocks = choose_num_blocks(model.config, config, model.device, per_block)
        backend = choose_backend(config.kernels, model.device)
        return PagedCache(model.config, backend, num_blocks=num_blocks, block_size=config.block_size, **where)
    extra = offer("kv_format")
    if extra is None:
        raise ConfigError(f"kv_format={config.kv_format!r} needs minillm.quantization, which is not here. Use 'auto'.")
    per_block = extra.block_bytes(model.config, config.block_size, config.kv_format)
    num_blocks = choose_num_blocks(model.config, config, model.device, per_block)
    sizes = {"num_blocks": num_blocks, "block_size": config.block_size, "kernels": config.kernels}
    cache: BlockTensors = extra.open_cache(model.config, config.kv_format, **sizes, **where)
    return cache
=======

def distributions(logits: Tensor, batch: Batch, process: Callable[..., Tensor] = probs_from_logits) -> Tensor:
    """What each row of logits [rows, vocab_size] is drawn from under its sequence's parameters; float32, as logits."""
    params = [sequence.params for sequence, _ in batch.rows()]
    if any(p.adjusts for p in params):
        logits = torch.stack([_adjusted(row, *whose) for row, whose in zip(logits, batch.rows(), strict=True)])
    return process(logits, params)


def _adjusted(logits: Tensor, sequence: Request, drafts: list[int]) -> Tensor:
    prompt, output = sequence.tokens[: sequence.num_prompt], sequence.tokens[sequence.num_prompt :]
    return adjust(logits, sequence.params, prompt, output + drafts)


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
>>>>>>> hD
