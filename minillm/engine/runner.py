"""Runs a packed step through the model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from minillm.attention.paged import choose_backend
from minillm.cache.paged import BlockTensors, PagedCache, choose_num_blocks
from minillm.config import EngineConfig
from minillm.costs.formulas import kv_bytes_per_token
from minillm.engine.batch import Batch
from minillm.model.decoder import Decoder, inference
from minillm.seams import need, offer


class ModelRunner:
    """A model, its cache, and the step from a batch to logits. Knows nothing of requests, queues or time."""

    def __init__(self, model: Decoder, config: EngineConfig) -> None:
        self.model = model
        self.cache = open_cache(model, config)
        graphs = offer("graphs", model.device.type) if config.cuda_graphs and config.kernels == "auto" else None
        self.graphs = graphs.DecodeGraphs(model, self.cache) if graphs else None

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


def open_cache(model: Decoder, config: EngineConfig) -> BlockTensors:
    """An empty cache in the format that the configuration names, with the backend that reads it.

    Raises `ConfigError` for a format that nobody offers.
    """
    if config.kv_format == "auto":
        per_block = config.block_size * kv_bytes_per_token(model.config, model.dtype.itemsize)
        backend = choose_backend(config.kernels, model.device)
        make: Callable[..., BlockTensors] = partial(PagedCache, model.config, backend)
    else:
        extra = need("kv_format", "kv_format", config.kv_format)
        per_block = extra.block_bytes(model.config, config.block_size, config.kv_format)
        make = partial(extra.open_cache, model.config, config.kv_format, kernels=config.kernels)
    num_blocks = choose_num_blocks(model.config, config, model.device, per_block)
    return make(num_blocks=num_blocks, block_size=config.block_size, device=model.device, dtype=model.dtype)
