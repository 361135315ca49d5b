"""Attention over quantised keys and values on a GPU: the kernels of `paged`, that decode a tile when they load it.

A cache hands over plain tensors, codes and the ends of their ranges, each `[kv_heads, num_blocks, block_size, …]`: the
type of the codes tells the format (int8, float8_e4m3fn, uint8 for two codes of 4 bits), the number of ranges per token
the size of the groups. What they mean is defined in `minillm.quantization.formats`.

Wins where the step waits for memory: codes are a half or a third of the bytes. Loses where it waits for arithmetic,
as in long prompts, because codes have to be decoded in each tile.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from minillm.kernels.gpu.paged import GpuMetadata, attend_stored, prepare

__all__ = ["GpuMetadata", "prepare", "quantized_attention"]


def quantized_attention(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    metadata: GpuMetadata,
    *,
    scale: float,
    sliding_window: int | None = None,
) -> Tensor:
    """Packed attention: q `[num_tokens, heads, d]` -> like q. `metadata` is what `prepare` made."""
    return attend_stored(q, keys, values, metadata, scale=scale, sliding_window=sliding_window)[0]
