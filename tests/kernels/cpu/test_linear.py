"""Packed linear layers compute what `F.linear` computes, for any number of rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from minillm.kernels.cpu import linear
from minillm.kernels.cpu.linear import can_pack, pack
from minillm.model.linear import Linear


def make(rows: int, seed: int, dtype: torch.dtype, bias: bool) -> tuple[Linear, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    layer = Linear(72, 100, bias=bias).requires_grad_(False)
    for parameter in layer.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer.to(dtype), torch.randn(rows, 72, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rows", [1, 2, 16, 65])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_equals_plain(dtype: torch.dtype, rows: int, bias: bool) -> None:
    layer, x = make(rows, seed=rows, dtype=dtype, bias=bias)
    weight, plain_bias = layer.weight.double(), None if layer.bias is None else layer.bias.double()
    expected = F.linear(x.double(), weight, plain_bias)
    pack(layer)
    assert (layer.kernel is not None) == (dtype in linear.PACKED_DTYPES and can_pack(dtype))
    error = {torch.float64: 1e-12, torch.float32: 1e-4}.get(dtype, 0.3)
    torch.testing.assert_close(layer(x).double(), expected, atol=error, rtol=0)
    assert layer(x).dtype == dtype


def test_a_wrong_kernel_is_noticed_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: a reordering that loses a row. `can_pack` must see it, and `pack` must leave the layer plain."""
    if not can_pack(torch.float32):
        pytest.skip("this machine has no packed kernel")
    right = linear._reorder
    monkeypatch.setattr(linear, "_reorder", lambda weight: right(weight.roll(1, 0)))
    can_pack.cache_clear()
    try:
        layer, x = make(3, seed=0, dtype=torch.float32, bias=False)
        expected = layer(x)
        pack(layer)
        assert layer.kernel is None
        assert torch.equal(layer(x), expected)
    finally:
        can_pack.cache_clear()


def test_a_missing_kernel_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(weight: torch.Tensor) -> torch.Tensor:
        raise AttributeError("no such operator")

    monkeypatch.setattr(linear, "_reorder", missing)
    can_pack.cache_clear()
    try:
        assert not can_pack(torch.float32)
    finally:
        can_pack.cache_clear()
