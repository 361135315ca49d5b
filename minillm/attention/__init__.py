"""Attention: one definition, several implementations, chosen here."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minillm.attention.contiguous import attention
from minillm.attention.layout import PagedLayout
from minillm.attention.paged import paged_attention, write_kv

__all__ = ["PagedAttention", "PagedLayout", "attention", "get_backend", "paged_attention", "write_kv"]

PagedAttention = Callable[..., Tensor]


def get_backend(name: str, device: torch.device | str) -> PagedAttention:
    """The paged attention function that `name` stands for on `device`."""
    return paged_attention
