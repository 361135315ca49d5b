"""Attention: one definition, several implementations, and the one place where they are chosen.

A backend is a function `(q, k_pool, v_pool, layout, *, scale, sliding_window=None) -> out` over a packed batch; see
`paged.paged_attention`. All give the same result up to rounding. Each of them loses somewhere: `LOSES` says where.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from minillm.attention import paged
from minillm.attention.metadata import AttentionMetadata
from minillm.attention.paged import attend_spans, paged_attention
from minillm.attention.reference import naive_attention
from minillm.attention.tiled import tiled_attention
from minillm.errors import ConfigError
from minillm.kernels.cpu.contiguous import attention
from minillm.kernels.cpu.sdpa import sdpa_attention

__all__ = ["LOSES", "AttentionMetadata", "PagedAttention", "attention", "get_backend", "paged_attention", "write_kv"]

PagedAttention = Callable[..., Tensor]
HAS_TRITON = find_spec("triton") is not None

LOSES = {
    "auto": "where its thresholds, measured on one machine, do not fit another: name a backend and compare.",
    "naive": "everywhere but in clarity: its score matrix grows with the square of the prompt.",
    "tiled": "with few queries, where starting ten operators per tile costs more than the arithmetic.",
    "sdpa": "with a mask, whose hidden scores it computes, and on a CPU with long prompts in bfloat16.",
    "triton": "on the first call of each shape, which compiles and tunes; without a GPU it cannot run at all.",
}


def get_backend(name: str, device: torch.device | str) -> PagedAttention:
    """The backend `name` (a key of `LOSES`) for `device`.

    "auto" is Triton on a GPU; on a CPU it groups decodes, tiles long prompts and leaves the rest to SDPA. Raises
    `ConfigError` for a name that does not exist or cannot run on the device.
    """
    kind = torch.device(device).type
    if name not in LOSES:
        raise ConfigError(f"attention={name!r} is no backend. Choose one of: {', '.join(LOSES)}.")
    if name == "auto":
        name = "triton" if kind == "cuda" and HAS_TRITON else "auto"
    if name == "triton":
        return _triton_backend(kind)
    if name == "auto":
        return paged_attention if kind == "cpu" else attend_spans
    kernels = {"naive": naive_attention, "tiled": _tiled_output, "sdpa": sdpa_attention}
    return partial(attend_spans, kernel=kernels[name])


def write_kv(k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, layout: AttentionMetadata) -> None:
    """Store k and v `[num_tokens, kv_heads, d]` in the pools `[kv_heads, num_blocks, block_size, d]`, slot by slot."""
    if k.is_cuda and HAS_TRITON:
        from minillm.kernels.gpu.paged import triton_write_kv

        triton_write_kv(k, v, k_pool, v_pool, layout)
    else:
        paged.write_kv(k, v, k_pool, v_pool, layout)


def _triton_backend(kind: str) -> PagedAttention:
    if not HAS_TRITON:
        raise ConfigError("attention='triton' needs the package triton. Install it, or choose attention='auto'.")
    from minillm.kernels.gpu.paged import triton_attention
    from minillm.kernels.gpu.tiles import INTERPRETED

    if kind != "cuda" and not INTERPRETED:
        raise ConfigError(
            f"attention='triton' cannot run on a {kind} device. Choose attention='auto', or set TRITON_INTERPRET=1 "
            "before Python starts to run the kernels in Triton's (very slow) interpreter."
        )
    return triton_attention


def _tiled_output(q: Tensor, k: Tensor, v: Tensor, *, scale: float, sliding_window: int | None = None) -> Tensor:
    return tiled_attention(q, k, v, scale=scale, sliding_window=sliding_window)[0]
