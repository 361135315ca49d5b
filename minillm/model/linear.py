"""The linear layer, at the speed of the machine's memory.

Decode reads every weight once per token, so a linear layer at one row is a memory test. On a CPU `F.linear` passes
it badly: at 1 to 16 rows it reaches half of the read bandwidth or less. oneDNN has kernels that come nearer, but they
want the weight in their own blocked layout. `Linear.pack` converts it once at load. How much that gives depends on the
processor: on one generation of AMD's EPYC the packed kernel reached all of the bandwidth, on the one before 0.7 of it,
which is 1.3 to 1.6 times `F.linear` (one row, bfloat16). Elsewhere, and wherever a quick check says that the packed
kernel is missing or wrong, a Linear is `F.linear`.

Where it loses: a packed weight cannot be read back cheaply, so tied embeddings keep a dense copy beside it.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACKED_DTYPES = (torch.float32, torch.bfloat16)
ROWS_HINT = 64  # oneDNN picks one layout for all row counts; this one serves 1 row and 512 alike


class Linear(nn.Module):
    """y = x Wᵀ + b for x [rows, in_features] and W [out_features, in_features]."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)
        self.packed = False

    def forward(self, x: Tensor) -> Tensor:
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)

    def pack(self) -> None:
        """Replace the weight by oneDNN's blocked copy, if this machine can use one. Inference only."""
        weight = self.weight.detach()
        if weight.device.type == "cpu" and can_pack(weight.dtype):
            self.weight = nn.Parameter(_reorder(weight), requires_grad=False)
            self.packed = True

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, packed={self.packed}"


@functools.cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN's packed kernel exists here and agrees with `F.linear`; tried once per dtype.

    The operators are private to PyTorch. So they are believed only after they computed the right numbers.
    """
    if dtype not in PACKED_DTYPES or not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, 96, generator=generator).to(dtype) for rows in (3, 80))
    try:
        packed = torch.ops.mkldnn._linear_pointwise(x, _reorder(weight), None, "none", [], "")
    except (RuntimeError, AttributeError, TypeError):
        return False
    tolerance = 1e-4 if dtype == torch.float32 else 0.25  # of values of about 10
    return torch.allclose(packed.float(), F.linear(x.float(), weight.float()), atol=tolerance, rtol=0)


def _reorder(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS_HINT)
