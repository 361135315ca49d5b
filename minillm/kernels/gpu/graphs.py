"""Decode steps replayed from CUDA graphs.

A decode step of a small model is hundreds of kernels, each so short that launching them one by one from Python takes
longer than running them. A CUDA graph records the launches once and replays them with a single call. What it replays
is fixed: addresses and shapes. So the step's inputs are copied into buffers that never move, and batches are padded to
a few sizes. Padding rows are legal work, a sequence of one token in the dummy block, so no kernel has a special case.

Wins where launching is the limit: small models, small batches. Loses memory for each size, and the first step of each
size is slow. Chunks of prompts are never replayed: they come in any length, and launching is not their limit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton  # noqa: F401 - without it attention reads tables on the host, which no graph can replay
from torch import Tensor

from minillm.attention.metadata import AttentionMetadata
from minillm.cache.blocks import DUMMY_BLOCK
from minillm.cache.paged import PagedCache
from minillm.engine.batch import Batch
from minillm.model.decoder import Decoder


def padded_size(num_sequences: int) -> int:
    """The next power of two up to 16, the next multiple of 16 from there: few sizes, little waste."""
    if num_sequences <= 16:
        return int(2 ** (num_sequences - 1).bit_length())
    return -(-num_sequences // 16) * 16


@dataclass(frozen=True)
class StaticStep:
    """The inputs of a decode step of fixed size, in memory that stays where it is, and what replays it."""

    tokens: Tensor  # [size]
    positions: Tensor  # [size]
    metadata: AttentionMetadata
    replay: Callable[[], Tensor]  # logits [size, vocab_size], always in the same memory

    def load(self, batch: Batch) -> None:
        """Copy a batch in and make the rows behind it padding. Whatever stood there before is overwritten."""
        for buffer, value in (
            (self.tokens, batch.tokens),
            (self.positions, batch.positions),
            (self.metadata.slot_mapping, batch.metadata.slot_mapping),
        ):
            buffer.zero_()
            buffer[: len(value)] = value
        tables, rows = self.metadata.block_tables, batch.metadata.block_tables
        tables.fill_(DUMMY_BLOCK)
        tables[: len(rows), : rows.shape[1]] = rows
        self.metadata.seq_lens.fill_(1)
        self.metadata.seq_lens[: len(rows)] = batch.metadata.seq_lens


class DecodeGraphs:
    """One captured decode step per padded batch size, made when first needed."""

    def __init__(self, model: Decoder, cache: PagedCache) -> None:
        self.model = model
        self.cache = cache
        self._steps: dict[int, StaticStep] = {}

    def logits(self, batch: Batch) -> Tensor | None:
        """Logits [num_samplers, vocab_size] of a batch in which every sequence has one new token; None for others.

        They stay valid until the next call.
        """
        if max(batch.metadata.q_lens) > 1:
            return None
        size = padded_size(len(batch.metadata.q_lens))
        if size not in self._steps:
            self._steps[size] = self._record(size)
        step = self._steps[size]
        step.load(batch)
        return step.replay()[batch.logit_indices]

    def _record(self, size: int) -> StaticStep:
        """Buffers for `size` sequences of any length that model and cache allow, and the captured computation on them.

        The host-side lengths tell kernels how much work to launch at most; the true ones are in `seq_lens`.
        """
        device, block_size = self.model.device, self.cache.block_size
        longest = min(self.model.config.max_position_embeddings, self.cache.num_blocks * block_size)
        tables = [[DUMMY_BLOCK] * -(-longest // block_size)] * size
        metadata = AttentionMetadata.build(tables, [1] * size, [longest] * size, block_size=block_size, device=device)
        tokens, positions = torch.zeros(2, size, dtype=torch.int64, device=device)
        attend = self.cache.attend(metadata)
        replay = capture(lambda: self.model.logits(self.model(tokens, positions, attend)))
        return StaticStep(tokens, positions, metadata, replay)


def capture(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Record what `compute` launches; the result replays it and returns the same output tensor each time.

    It runs once outside the recording first, on a side stream, so that whatever is built lazily (compiled kernels,
    cuBLAS workspaces) exists before.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        compute()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = compute()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay
