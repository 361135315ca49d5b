"""Linear layers at the speed of the CPU's memory: oneDNN's packed weights.

At 1 to 16 rows `F.linear` reaches half of a CPU's read bandwidth or less. oneDNN has kernels that come nearer, but they
want the weight in their own blocked layout, so `pack` converts it once at load. How much that gives depends on the
processor: on one generation of AMD's EPYC the packed kernel reached all of the bandwidth, on the one before 0.7 of it,
which is 1.3 to 1.6 times `F.linear` (one row, bfloat16). Elsewhere, and wherever a quick check says that the packed
kernel is missing or wrong, a Linear stays as it is.

Where it loses: a packed weight cannot be read back cheaply, so tied embeddings keep a dense copy beside it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.model.linear import Linear

PACKED_DTYPES = (torch.float32, torch.bfloat16)
ROWS_HINT = 64  # oneDNN picks one layout for all row counts; this one serves 1 row and 512 alike


def pack(linear: Linear) -> None:
    """Replace the weight by oneDNN's blocked copy and install its kernel, if this machine can. Inference only.

    The bias must be in place: the kernel takes weight and bias as they are now. It does not hold the layer, so that a
    model that nobody uses any more is freed at once.
    """
    weight = linear.weight.detach()
    if weight.device.type == "cpu" and can_pack(weight.dtype):
        _return_freed_memory()
        linear.weight = nn.Parameter(_reorder(weight), requires_grad=False)
        linear.kernel = functools.partial(_product, weight=linear.weight, bias=linear.bias)


def _return_freed_memory() -> None:
    """Give what was freed back to the system. Between weights, because glibc keeps it otherwise: those that were packed
    before would pile up as holes between the packed ones (an eighth of the weights for Qwen3-0.6B)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # a Linux without glibc
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


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
        packed = _product(x, _reorder(weight), None)
    except (RuntimeError, AttributeError, TypeError):
        return False
    tolerance = 1e-4 if dtype == torch.float32 else 0.25  # of values of about 10
    return torch.allclose(packed.float(), F.linear(x.float(), weight.float()), atol=tolerance, rtol=0)


def _reorder(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS_HINT)
