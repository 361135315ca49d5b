"""The linear layer, whose product an extra may compute.

Decode reads every weight once per token, so a linear layer at one row is a memory test, and machines have their own
ways to pass it. Whoever loads a model may let an extra of this machine install a kernel (`minillm.seams`, seam
"linear"); the extra may also store the weight in its own order. Without one, a Linear is `F.linear`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    """y = x Wᵀ + b for x [rows, in_features] and W [out_features, in_features]."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight: Tensor = nn.Parameter(torch.empty(out_features, in_features))
        self.bias: Tensor | None = nn.Parameter(torch.empty(out_features)) if bias else None
        self.kernel: Callable[[Tensor], Tensor] | None = None  # computes `forward` in place of `F.linear`

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) if self.kernel is None else self.kernel(x)
