"""Attention: one definition, and the place where a faster backend is chosen.

`reference` is the textbook, `tiled` the online softmax, `paged` the definition over blocks. What is faster on a kind of
machine stands in `minillm.kernels` and must give the same result up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minillm.attention.metadata import AttentionMetadata
from minillm.attention.paged import REFERENCE, Backend, paged_attention, write_kv
from minillm.attention.tiled import attention
from minillm.seams import offer

__all__ = [
    "REFERENCE",
    "AttentionMetadata",
    "Backend",
    "attention",
    "choose_attention",
    "choose_backend",
    "paged_attention",
    "write_kv",
]


def choose_attention(kernels: str, device: torch.device) -> Callable[..., Tensor]:
    """Attention of one sequence whose keys lie side by side: this device's, or the definition."""
    extra = offer("attention", device.type) if kernels == "auto" else None
    return extra.attention if extra else attention


def choose_backend(kernels: str, device: torch.device) -> Backend:
    """Attention over blocks: this device's, or the definition."""
    extra = offer("paged_attention", device.type) if kernels == "auto" else None
    return extra.BACKEND if extra else REFERENCE
