"""The optimizer of the training run: Muon for the matrices, AdamW for the rest.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) replaces the momentum of a weight matrix by the
nearest matrix whose singular values are all one, so that rare directions learn as fast as frequent ones. Its authors
report fewer tokens for the same loss, and tokens are what a CPU lacks. The price is a few matrix products per weight
and step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from minillm.model.decoder import Decoder
from minillm.model.linear import Linear
from minillm.model.loader import layout

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a quintic that pushes singular values in (0, 1] to about one


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """U Vᵀ of a matrix [rows, cols] = U S Vᵀ, nearly: singular values land between 0.7 and 1.2, by products alone.

    Computed in bfloat16, like the gradients themselves: the direction of a step needs no more.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).bfloat16()
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Steps of fixed spectral size along the orthogonalised Nesterov momentum, with decoupled weight decay.

    params: (weight, rows) pairs. A fused weight (q, k, v; gate, up) is several matrices stacked by `rows`; each is
    orthogonalised alone.
    """

    def __init__(
        self, params: list[tuple[nn.Parameter, list[int]]], *, lr: float, weight_decay: float, momentum: float = 0.95
    ) -> None:
        groups = [{"params": [weight], "rows": rows} for weight, rows in params]
        super().__init__(groups, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient. `closure` is not used."""
        for group in self.param_groups:
            weight = group["params"][0]
            if weight.grad is not None:
                self._step_one(weight, weight.grad, group)

    def _step_one(self, weight: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        average = self.state[weight].setdefault("average", torch.zeros_like(weight))
        average.lerp_(grad, 1 - group["momentum"])
        ahead = grad.lerp(average, group["momentum"])
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        for part, direction in zip(weight.split(group["rows"]), ahead.split(group["rows"]), strict=True):
            size = max(1.0, part.shape[0] / part.shape[1]) ** 0.5
            part.add_(orthogonalize(direction), alpha=-group["lr"] * size)


def make_optimizers(
    model: Decoder, *, matrix_rate: float, vector_rate: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Muon for the projections, AdamW without decay for the embedding (which is the head, too) and the norms."""
    rows = {piece.ours: [s[0] for s in piece.sources.values()] for piece in layout(model.config)}
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear)} - {
        "head.weight"
    }
    matrices = [(weight, rows[name]) for name, weight in model.named_parameters() if name in linear]
    others = [weight for name, weight in model.named_parameters() if name not in linear]
    return [
        Muon(matrices, lr=matrix_rate, weight_decay=weight_decay),
        torch.optim.AdamW(others, lr=vector_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def tie_head_norms(model: Decoder) -> None:
    """Sum the gradients of rows that are one weight in the checkpoint: the norm shared by all query (or key) heads.

    The decoder keeps one row per head to norm queries and keys in one go. Equal rows with equal gradients stay equal.
    """
    for piece in (piece for piece in layout(model.config) if piece.repeats):
        grad = model.get_parameter(piece.ours).grad
        if grad is not None:
            for rows in grad.split(list(piece.repeats)):
                rows.copy_(rows.sum(0, keepdim=True).expand_as(rows))
