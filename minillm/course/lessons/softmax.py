"""The online softmax watched at work, and what it comes to when parts of the keys are computed apart."""

# ruff: noqa: E741
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.attention.tiled import LN2, OnlineSoftmax


@dataclass(frozen=True)
class TileStep:
    """What the online softmax knew after one tile, in natural units: figures replay what happened."""

    queries: range  # of the sequence's queries
    keys: range  # of the sequence's keys
    m: Tensor  # [heads, queries] running maximum of the scaled scores
    l: Tensor  # [heads, queries] running sum of exp(score - m)
    out: Tensor  # [heads, queries, d] running sum of exp(score - m) · v, not yet divided by l


class TileSteps(list[TileStep]):
    """An observer of `tiled_attention` that keeps a copy of what it sees."""

    def __call__(self, queries: range, keys: range, softmax: OnlineSoftmax) -> None:
        running = softmax.m * LN2, softmax.l, softmax.out
        m, l, out = (x.clone().view(-1, len(queries), x.shape[-1]) for x in running)
        self.append(TileStep(queries, keys, m[..., 0], l[..., 0], out))


def merge(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Join attention over disjoint parts of the keys: outs `[parts, ..., d]`, lses `[parts, ...]` -> one of each.

    Part i holds the share exp(lse_i) of the softmax's sum. Shares are taken relative to the largest, since exp of a
    log-sum-exp overflows (Flash-Decoding, 2023). An empty part has lse -inf and weighs nothing.
    """
    largest = lses.amax(0)
    shares = (lses - torch.where(largest.isfinite(), largest, 0.0)).exp()
    total = shares.sum(0)
    weights = shares / total.where(total > 0, 1.0)
    return (outs * weights[..., None]).sum(0), largest + total.log()
