"""One request: every implementation that the choice may fall on, and the choice itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minillm.attention import tiled
from minillm.cache.contiguous import ContiguousCache
from minillm.config import ModelConfig
from minillm.kernels import sdpa
from minillm.kernels.cpu import attention as module
from minillm.kernels.cpu.attention import attention, decode_attention
from tests.attention.cases import CASES, Case, check, expected, mutant

LONG = {
    "prompt": Case(600, 600, heads=6, kv_heads=2),
    "chunk": Case(520, 700, heads=3, kv_heads=3),
    "chunk in a window": Case(530, 600, window=100),
    "one query, long context": Case(1, 2100, heads=6, kv_heads=2),
    "one query, long context, window": Case(1, 2100, window=50),
}


def run(kernel: Callable[..., Tensor], case: Case, dtype: torch.dtype) -> None:
    out = kernel(*case.tensors(dtype), scale=case.scale, sliding_window=case.window)
    assert out.dtype == dtype
    check(out, expected(case, dtype)[0], case, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kernel", [attention, sdpa.attention], ids=["chosen by shape", "sdpa"])
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_short_requests(case: Case, kernel: Callable[..., Tensor], dtype: torch.dtype) -> None:
    run(kernel, case, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", LONG.values(), ids=list(LONG))
def test_long_requests(case: Case, dtype: torch.dtype) -> None:
    run(attention, case, dtype)


@pytest.mark.parametrize(
    ("case", "dtype", "choice"),
    [
        (Case(1, 500), torch.bfloat16, "sdpa"),
        (Case(1, 3000), torch.bfloat16, "two products"),
        (Case(1, 3000), torch.float32, "sdpa"),
        (Case(20, 3000), torch.bfloat16, "sdpa"),
        (Case(100, 100), torch.bfloat16, "sdpa"),
        (Case(256, 256), torch.bfloat16, "tiles"),
        (Case(256, 256), torch.float32, "sdpa"),
        (Case(600, 600), torch.float32, "tiles"),
        (Case(600, 600), torch.float16, "sdpa"),
    ],
)
def test_the_choice(case: Case, dtype: torch.dtype, choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = list[str]()

    def standing_in(name: str) -> Callable[..., list[Tensor]]:
        def note(*_: object, **__: object) -> list[Tensor]:
            chosen.append(name)
            return [torch.empty(0)]

        return note

    monkeypatch.setattr(sdpa, "attention", standing_in("sdpa"))
    monkeypatch.setattr(module, "tiled_attention", standing_in("tiles"))
    monkeypatch.setattr(module, "decode_attention", standing_in("two products"))
    attention(*case.tensors(dtype), scale=1.0)
    assert chosen == [choice]


def test_who_is_chosen_on_which_device() -> None:
    """On a CPU by shape; where the definition is asked for, that."""

    def chosen(kernels: str, device: str) -> Callable[..., Tensor]:
        config = ModelConfig("LlamaForCausalLM", 50, 24, 32, 3, 6, 2, 8, max_position_embeddings=100)
        where = {"device": torch.device(device), "dtype": torch.float32}
        return ContiguousCache(config, capacity=4, kernels=kernels, **where).attention

    assert chosen("auto", "cpu") is attention
    assert chosen("reference", "cpu") is tiled.attention
    assert chosen("auto", "meta") is sdpa.attention


def test_keys_and_values_may_be_views() -> None:
    """A contiguous cache hands out the first part of a longer buffer; q is a slice of a fused projection."""
    for case in (CASES["group 3"], CASES["one query"], CASES["query shorter than keys"]):
        q, k, v = case.tensors(torch.float32)
        wide = torch.cat([q, q], dim=1)[:, : case.heads]
        out = attention(
            wide,
            *(torch.cat([x, x], 1)[:, : case.kv_len] for x in (k, v)),
            scale=case.scale,
            sliding_window=case.window,
        )
        check(out, expected(case, torch.float32)[0], case, torch.float32)


def test_several_requests_with_one_query_each() -> None:
    cases = [Case(1, 20, heads=6, kv_heads=2, seed=seed) for seed in range(3)]
    q, k, v = zip(*(case.tensors(torch.float64) for case in cases), strict=True)
    bias = torch.zeros(3, 1, 20).double()
    out = decode_attention(torch.cat(q), torch.stack(k, 1), torch.stack(v, 1), bias, scale=cases[0].scale)
    for row, case in zip(out, cases, strict=True):
        check(row[None], expected(case, torch.float64)[0], case, torch.float64)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("q_len == kv_len and not windowed", "not windowed"),  # the kernel's own causal rule is top-left
        ("sliding_window < kv_len", "sliding_window < 0"),
        ("permute(1, 2, 0, 3)", "permute(1, 0, 2, 3)"),
        ("mask.repeat(group, 1)", "mask.repeat_interleave(group, 0)"),
    ],
)
def test_the_oracle_rejects(old: str, new: str, tmp_path: Path) -> None:
    wrong = mutant(sdpa, old, new, tmp_path)

    def all_cases() -> None:
        for case in CASES.values():
            run(wrong.attention, case, torch.float64)

    with pytest.raises(AssertionError):
        all_cases()
