"""A learner's attention (exercises 02, 06, 07 and 09) in the engine's place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minillm.attention.metadata import AttentionMetadata
from minillm.attention.paged import paged_attention
from minillm.attention.tiled import attention
from minillm.cache.paged import PagedCache
from minillm.course.use.beside import Beside, known, tolerance_of

if TYPE_CHECKING:
    from minillm.llm import LLM

TILE = 16
QUANTISED = "a quantised cache is read by an attention of its own"
WINDOWED = "the model has a sliding window, which the exercise has not"


def put_grouped_attention(module: Any, llm: LLM) -> str | None:
    """Exercise 02 computes every sequence of every step."""
    return _put_kernel("ex02 grouped_attention", module.grouped_attention, llm)


def put_tiled_attention(module: Any, llm: LLM) -> str | None:
    """Exercise 06 computes every sequence of every step, in tiles so small that most prompts have several."""
    if llm.engine.model.config.sliding_window is not None:
        return WINDOWED
    return _put_kernel("ex06 tiled_attention", lambda *args: module.tiled_attention(*args, TILE)[0], llm)


def put_triton_attention(module: Any, llm: LLM) -> str | None:
    """Exercise 07 computes every sequence of every step, where Triton runs."""
    from minillm.kernels.gpu.tiles import INTERPRETED

    config = llm.engine.model.config
    if llm.engine.model.device.type != "cuda" and not INTERPRETED:
        return "Triton needs a GPU, or TRITON_INTERPRET=1 before Python starts"
    if config.sliding_window is not None:
        return WINDOWED
    if config.head_dim < 16 or config.head_dim & (config.head_dim - 1):
        return f"the exercise's heads are a power of two and at least 16, the model's have {config.head_dim}"
    return _put_kernel("ex07 attention_kernel", module.attention, llm)


def _put_kernel(name: str, theirs: Callable[..., Tensor], llm: LLM) -> str | None:
    cache = llm.engine.runner.cache
    if not isinstance(cache, PagedCache):
        return QUANTISED
    beside = Beside(name, theirs, _own_kernel, tolerance_of(llm.engine.model.dtype))

    def kernel(q: Tensor, k: Tensor, v: Tensor, *, scale: float, sliding_window: int | None) -> Tensor:
        out: Tensor = beside(q.contiguous(), k, v, scale, *[] if sliding_window is None else [sliding_window])
        return out

    cache.backend = replace(cache.backend, attend=partial(paged_attention, kernel=kernel))
    return None


def _own_kernel(q: Tensor, k: Tensor, v: Tensor, scale: float, sliding_window: int | None = None) -> Tensor:
    return attention(q, k, v, scale=scale, sliding_window=sliding_window)


def put_paged_decode(module: Any, llm: LLM) -> str | None:
    """Exercise 09 computes the sequences with one query; the others stay as they are."""
    cache = llm.engine.runner.cache
    if not isinstance(cache, PagedCache):
        return QUANTISED
    if llm.engine.model.config.sliding_window is not None:
        return WINDOWED
    own, tolerance = cache.backend, tolerance_of(llm.engine.model.dtype)
    beside = Beside("ex09 paged_decode_attention", module.paged_decode_attention, known, tolerance)

    def attend(
        q: Tensor, k_pool: Tensor, v_pool: Tensor, metadata: AttentionMetadata, *, scale: float, **rest: Any
    ) -> Tensor:
        out = own.attend(q, k_pool, v_pool, metadata, scale=scale, **rest)
        for row, index in _decodes(metadata):
            kv_len = metadata.kv_lens[index]
            used = metadata.tables[index, : -(-kv_len // metadata.block_size)]
            pools, table = _moved([k_pool, v_pool], torch.from_numpy(used))
            out[row] = beside.check(out[row].clone(), q[row], *pools, table, kv_len, scale)
        return out

    cache.backend = replace(own, attend=attend)
    return None


def _decodes(metadata: AttentionMetadata) -> Iterator[tuple[int, int]]:
    """(row of the batch, number of the request) of each request with one query."""
    row = 0
    for index, q_len in enumerate(metadata.q_lens):
        if q_len == 1:
            yield row, index
        row += q_len


def _moved(pools: list[Tensor], blocks: Tensor) -> tuple[list[Tensor], list[int]]:
    """Small pools that hold these blocks [n], last one first, after a block of NaN that nobody owns; and their table.

    A function of the whole pool could read the blocks of others; and copying all of it for each call would take long.
    """
    order = blocks.flip(0).long().to(pools[0].device)
    small = [torch.cat([torch.full_like(pool[:, :1], torch.nan), pool[:, order]], dim=1) for pool in pools]
    return small, list(range(len(blocks), 0, -1))
