"""FlashAttention's idea in PyTorch: softmax over tiles of keys, never a whole row of scores in memory.

A softmax needs the maximum m and the sum l of its row before it can weigh one value, and both are known only after the
last key. The online softmax (Milakov and Gimelshein 2018; Dao et al. 2022) keeps running values instead: when a tile
raises the maximum from m to m', what was summed so far is rescaled by exp(m - m'). One pass, memory for one tile.

On a CPU this is the production path for prompts: matrix products run on the bfloat16 units, buffers stay in the cache,
and tiles that the causal rule hides are never computed.
Loses: for few queries, where starting ten operators per tile costs more than the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import e, log, log2

import torch
from torch import Tensor

from minillm.attention.reference import NEG_INF, accumulator_dtype, naive_attention, oldest_key, tile_mask

Q_TILE, KV_TILE = 256, 256  # of 64 to 512, measured: larger leaves the caches, smaller starts more operators
TILED_QUERIES = 32  # with fewer, starting the operators of a tile costs more than the arithmetic
LN2 = log(2)


def tiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    q_tile: int = Q_TILE,
    kv_tile: int = KV_TILE,
    observer: Callable[[range, range, OnlineSoftmax], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """q `[q_len, heads, d]`, k and v `[kv_heads, kv_len, d]` -> output like q, log-sum-exp `[q_len, heads]`.

    Bottom-right causal; k and v may have any strides. A query that sees no key gets output 0 and log-sum-exp -inf.
    The log-sum-exp of the scaled scores is what joins parts of the keys. `observer` is given the queries, the keys and
    the running values after each tile, so that figures replay what happened.
    """
    q_len, heads, _ = q.shape
    kv_heads, kv_len, _ = k.shape
    offset = kv_len - q_len  # position of query 0
    out, lse = torch.empty_like(q), q.new_empty(q_len, heads, dtype=accumulator_dtype(q.dtype))
    softmax = OnlineSoftmax(q, kv_heads, min(q_tile, q_len), min(kv_tile, kv_len))
    for start in range(0, q_len, q_tile):
        queries = range(start, min(start + q_tile, q_len))
        positions = range(offset + queries.start, offset + queries.stop)
        softmax.begin(q[queries.start : queries.stop], scale)
        for keys in _visible_tiles(positions, kv_tile, sliding_window):
            bias = _bias(positions, keys, sliding_window, softmax.m)
            softmax.fold(k[:, keys.start : keys.stop], v[:, keys.start : keys.stop], bias)
            if observer is not None:
                observer(queries, keys, softmax)
        softmax.finish(out[queries.start : queries.stop], lse[queries.start : queries.stop])
    return out, lse


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, sliding_window: int | None = None) -> Tensor:
    """Causal attention of one sequence, by tiles if it has many queries: `[q_len, heads, d]` like q."""
    if len(q) < TILED_QUERIES:
        return naive_attention(q, k, v, scale=scale, sliding_window=sliding_window)
    return tiled_attention(q, k, v, scale=scale, sliding_window=sliding_window)[0]


class OnlineSoftmax:
    """Running maximum m, sum l and output of one tile of queries; all heads at once, one matrix per key/value head.

    Scores and m are in units of log 2. The buffers serve all tiles of a call: memory fresh from the system costs more
    time than the arithmetic that fills it.
    """

    def __init__(self, q: Tensor, kv_heads: int, q_tile: int, kv_tile: int) -> None:
        _, heads, d = q.shape
        self.kv_heads, self.group = kv_heads, heads // kv_heads
        self.accumulator = accumulator_dtype(q.dtype)
        # q kᵀ, then the weights, in q's dtype for the matrix units
        self.product = q.new_empty(heads * q_tile * kv_tile)
        self.weighted = q.new_empty(heads * q_tile * d)
        exact = q.dtype == self.accumulator
        self.scores = self.product if exact else torch.empty_like(self.product, dtype=self.accumulator)

    def begin(self, q: Tensor, scale: float) -> None:
        """Start on queries `[queries, heads, d]`: the heads of a group become rows that share one key head.

        log2(e) joins the scale, so that weights are powers of 2: exp2 takes half as long as exp.
        """
        by_head = (q * (scale * log2(e))).unflatten(1, (self.kv_heads, self.group)).permute(1, 2, 0, 3)
        self.rows = by_head.flatten(1, 2)
        self.m = self.rows.new_full((*self.rows.shape[:2], 1), NEG_INF, dtype=self.accumulator)
        self.l = torch.zeros_like(self.m)
        self.out = torch.zeros_like(self.rows, dtype=self.accumulator)

    def fold(self, k: Tensor, v: Tensor, bias: Tensor | None) -> None:
        """Add one tile of keys `[kv_heads, keys, d]`; `bias` `[queries, keys]` is -inf where the rule hides a key."""
        shape = (*self.rows.shape[:2], k.shape[1])
        product, scores = _view(self.product, shape), _view(self.scores, shape)
        torch.bmm(self.rows, k.transpose(1, 2), out=product)
        scores.copy_(product)
        if bias is not None:
            scores.unflatten(1, (self.group, -1)).add_(bias)
        m = torch.maximum(self.m, scores.amax(-1, keepdim=True))
        base = m.where(m > NEG_INF, 0.0)  # -inf - (-inf) is NaN, and exp(-inf - 0) is the 0 we mean
        rescale = torch.exp2(self.m - base)
        weights = scores.sub_(base).exp2_()
        self.l.mul_(rescale).add_(weights.sum(-1, keepdim=True))
        weighted = torch.bmm(product.copy_(weights), v, out=_view(self.weighted, self.rows.shape))
        self.out.mul_(rescale).add_(weighted)
        self.m = m

    def finish(self, out: Tensor, lse: Tensor) -> None:
        """Divide by the sum, once, and write `[q_tile, heads, d]` and `[q_tile, heads]`."""
        divided = self.out / self.l.where(self.l > 0, 1.0)
        out.copy_(divided.view(-1, *out.shape[::2]).transpose(0, 1))
        lse.copy_(((self.m + self.l.log2()) * LN2).view(-1, len(lse)).t())


def _visible_tiles(positions: range, kv_tile: int, sliding_window: int | None) -> Iterator[range]:
    """Tiles of keys of which a query sees something: the causal rule ends them, a window lets them start late."""
    for start in range(oldest_key(len(positions), positions.stop, sliding_window), positions.stop, kv_tile):
        yield range(start, min(start + kv_tile, positions.stop))


def _bias(positions: range, keys: range, sliding_window: int | None, like: Tensor) -> Tensor | None:
    """0 where a query sees a key and -inf elsewhere, `[queries, keys]`; None if all see all.

    Added, not filled in: `masked_fill_` with a broadcast mask takes 20 times as long as an addition on a CPU.
    """
    if keys.stop <= positions.start + 1 and (sliding_window is None or keys.start > positions[-1] - sliding_window):
        return None
    mask = tile_mask(positions, keys, sliding_window, like.device)
    return like.new_zeros(mask.shape).masked_fill_(~mask, NEG_INF)


def _view(buffer: Tensor, shape: tuple[int, ...]) -> Tensor:
    return buffer[: torch.Size(shape).numel()].view(shape)
