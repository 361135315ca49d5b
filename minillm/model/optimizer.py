"""The optimizer of the training run: Muon for the matrices, AdamW for the rest.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) replaces the momentum of a weight matrix by the
nearest matrix whose singular values are all one, so that rare directions learn as fast as frequent ones. It needs
about a third fewer tokens than AdamW for the same loss, which is what counts on a CPU; it costs a tenth of a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from minillm.model.decoder import Decoder
from minillm.model.loader import layout

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a quintic that pushes singular values in (0, 1] to about one


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """U Vᵀ of a matrix [rows, cols] = U S Vᵀ, nearly: singular values land between 0.7 and 1.2, by products alone."""
    a, b, c = NEWTON_SCHULZ
    x = matrix / (matrix.norm() + 1e-7)
    wide = x if x.shape[0] <= x.shape[1] else x.T
    for _ in range(steps):
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide if wide.shape == matrix.shape and x.shape[0] <= x.shape[1] else wide.T


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
                self._step_one(weight, group)

    def _step_one(self, weight: Tensor, group: dict[str, Any]) -> None:
        average = self.state[weight].setdefault("average", torch.zeros_like(weight))
        average.lerp_(weight.grad, 1 - group["momentum"])
        ahead = weight.grad.lerp(average, group["momentum"])
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        for part, direction in zip(weight.split(group["rows"]), ahead.split(group["rows"]), strict=True):
            size = max(1.0, part.shape[0] / part.shape[1]) ** 0.5
            part.add_(orthogonalize(direction), alpha=-group["lr"] * size)


def make_optimizers(
    model: Decoder, *, matrix_rate: float, vector_rate: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Muon for the projections, AdamW without decay for the embedding (which is the head, too) and the norms."""
    pieces = [piece for group in layout(model.config) for piece in group]
    rows = {piece.ours: [shape[0] for shape in piece.shapes] for piece in pieces}
    named = {name: p for name, p in model.named_parameters() if name in rows}
    is_matrix = {name: p.ndim == 2 and not name.startswith("embedding") and "norm" not in name for name, p in named.items()}
    matrices = [(p, rows[name]) for name, p in named.items() if is_matrix[name]]
    vectors = [p for name, p in named.items() if not is_matrix[name]]
    return [
        Muon(matrices, lr=matrix_rate, weight_decay=weight_decay),
        torch.optim.AdamW(vectors, lr=vector_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def tie_head_norms(model: Decoder) -> None:
    """Sum the gradients of rows that are one weight in the checkpoint: the norm shared by all query (or key) heads.

    The decoder keeps one row per head to norm queries and keys in one go. Equal rows with equal gradients stay equal.
    """
    for piece in (piece for group in layout(model.config) for piece in group if piece.repeats):
        grad = model.get_parameter(piece.ours).grad
        if grad is not None:
            for rows in grad.split(list(piece.repeats)):
                rows.copy_(rows.sum(0, keepdim=True).expand_as(rows))
