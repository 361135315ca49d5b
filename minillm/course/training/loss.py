"""The training loss: next-token cross entropy over rows of tokens.

The decoder takes packed tokens and knows no batch. So the rows are laid end to end, and `attend` folds them back into
rows for one call of PyTorch's causal attention.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.model.decoder import Decoder

log = logging.getLogger(__name__)

LossFunction = Callable[[Decoder, Tensor], Tensor]


def row_loss(model: Decoder, rows: Tensor) -> Tensor:
    """Mean cross entropy, in nats, of predicting rows[:, 1:] from rows[:, :-1]; rows [batch, length + 1] int64."""
    inputs, targets = rows[:, :-1], rows[:, 1:]
    count, length = inputs.shape
    positions = torch.arange(length, device=rows.device).repeat(count)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.shape[1] // k.shape[1]
        q, k, v = (x.unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v))
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return mixed.transpose(1, 2).flatten(0, 1)

    with torch.autocast(rows.device.type, torch.bfloat16):
        logits = model.logits(model(inputs.reshape(-1), positions, attend))
    return F.cross_entropy(logits, targets.reshape(-1))


@torch.no_grad()
def mean_loss(model: Decoder, rows: Tensor, count: int = 8) -> float:
    """The mean of `row_loss` over rows [n, length + 1], `count` rows at a time."""
    losses = [row_loss(model, part) * len(part) for part in rows.split(count)]
    return float(torch.stack(losses).sum() / len(rows))


def compiled(function: LossFunction) -> LossFunction:
    """`function` through torch.compile, or as it is from the moment that this machine turns out unable to compile."""
    fast: LossFunction | None = torch.compile(function, dynamic=False)

    def call(model: Decoder, rows: Tensor) -> Tensor:
        nonlocal fast
        if fast is not None:
            try:
                return fast(model, rows)
            except Exception as error:  # no C++ compiler, an unsupported Python …: many types, one remedy
                log.warning("torch.compile does not work here (%s); training goes on without it.", type(error).__name__)
                fast = None
        return function(model, rows)

    return call
