"""Reading quantised blocks: the twin against the definition, however a sequence was cut into steps."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minillm.attention.metadata import AttentionMetadata
from minillm.config import ModelConfig
from minillm.measure.counters import Counter
from minillm.quantization import attention as quantized
from minillm.quantization.cache import QuantizedCache
from minillm.quantization.formats import FORMATS
from tests.attention.cases import BATCHES, Case, mutant
from tests.cache.definition import attend

CPU = torch.device("cpu")
CHOSEN = [name for name in BATCHES if name not in ("d 80, group 7", "long decodes alone")]


def config_of(case: Case) -> ModelConfig:
    """A model of one layer with the case's heads."""
    return ModelConfig(
        "LlamaForCausalLM", 8, 8, 8, 1, case.heads, case.kv_heads, case.d, 9999, sliding_window=case.window
    )


def make_cache(case: Case, kv_format: str, num_blocks: int, block_size: int) -> QuantizedCache:
    """Everything that nobody has written is NaN, or decodes to it."""
    cache = QuantizedCache(
        config_of(case), FORMATS[kv_format], num_blocks=num_blocks, block_size=block_size, device=CPU
    )
    cache.attention = quantized.quantized_attention
    for tensor in cache.tensors:
        tensor.fill_(torch.nan if tensor.dtype.is_floating_point else 255)
    return cache


def last_step(cases: list[Case], kv_format: str, block_size: int, seed: int, dtype: torch.dtype) -> list[Tensor]:
    """Write each sequence in random steps, all of them side by side; the outputs of the queries of the last step."""
    rng = random.Random(seed)
    counts = [-(-case.kv_len // block_size) for case in cases]
    ids = rng.sample(range(1, sum(counts) + 3), sum(counts))
    tables = [[ids.pop() for _ in range(count)] for count in counts]
    cache = make_cache(cases[0], kv_format, sum(counts) + 3, block_size)
    done, ends = [0] * len(cases), [max(0, case.kv_len - case.q_len) for case in cases]
    kv = [case.tensors(dtype) for case in cases]
    while done != ends:
        news = [rng.randint(0, min(end - start, 3 * block_size)) for start, end in zip(done, ends, strict=True)]
        nows = [start + new for start, new in zip(done, news, strict=True)]
        run(
            cache,
            tables,
            news,
            nows,
            [(torch.zeros(new, *q.shape[1:]), k, v) for new, (q, k, v) in zip(news, kv, strict=True)],
        )
        done = nows
    lengths = [case.q_len for case in cases]
    return list(run(cache, tables, lengths, [case.kv_len for case in cases], kv).split(lengths))


def run(cache: QuantizedCache, tables: Any, q_lens: list[int], kv_lens: list[int], qkv: Any) -> Tensor:
    """One step: all new tokens of all sequences. Padding in front of a sequence has K and V, too."""
    layout = AttentionMetadata.build(tables, q_lens, kv_lens, block_size=cache.block_size)
    q = torch.cat([q for q, _, _ in qkv])
    k, v = (
        torch.cat([newest(x[i], q_len, kv_len) for x, q_len, kv_len in zip(qkv, q_lens, kv_lens, strict=True)])
        for i in (1, 2)
    )
    return cache.attend(layout)(0, q.to(k.dtype), k, v)


def newest(x: Tensor, q_len: int, kv_len: int) -> Tensor:
    """The last q_len of x's first kv_len tokens, `[q_len, kv_heads, d]`; NaN for padding."""
    tokens = x[:, max(0, kv_len - q_len) : kv_len].transpose(0, 1)
    return torch.cat([tokens.new_full((q_len - len(tokens), *tokens.shape[1:]), torch.nan), tokens])


def check(name: str, kv_format: str, seed: int, dtype: torch.dtype = torch.float32, tolerance: float = 2e-5) -> None:
    block_size = [4, 8, 1, 16][seed % 4]
    cases = [Case(**(vars(case) | {"seed": 100 * seed + i})) for i, case in enumerate(BATCHES[name])]
    for case, out in zip(cases, last_step(cases, kv_format, block_size, seed, dtype), strict=True):
        q, k, v = (x.float() for x in case.tensors(dtype))
        expected = attend(q, k, v, FORMATS[kv_format], scale=case.scale, window=case.window)
        torch.testing.assert_close(out.float(), expected, rtol=0, atol=tolerance, msg=lambda m, c=case: f"{c}: {m}")


@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("name", CHOSEN)
def test_the_twin_is_the_definition(name: str, kv_format: str) -> None:
    """However the sequence came to be: the definition knows no steps."""
    for seed in range(2):
        check(name, kv_format, seed)


@pytest.mark.parametrize("kv_format", FORMATS)
def test_in_bfloat16(kv_format: str) -> None:
    """Decoded keys are rounded to bfloat16 for the matrix units, like unquantised ones."""
    check("prefill, chunk, decode, verify", kv_format, 0, torch.bfloat16, tolerance=3e-2)


def largest_intermediate(kv_len: int, q_len: int, kv_format: str) -> int:
    """Bytes of the largest tensor that reading makes."""
    case = Case(q_len, kv_len, heads=4, kv_heads=2)
    cache = make_cache(case, kv_format, 2 + kv_len // 32, 32)
    table = list(range(1, 2 + (kv_len - 1) // 32))
    layout = AttentionMetadata.build([table], [q_len], [kv_len], block_size=32)
    step = cache.attend(layout)
    q, k, v = case.tensors(torch.float32)
    with Counter(kv=cache) as counted:
        step(0, q, newest(k, q_len, kv_len), newest(v, q_len, kv_len))
    return counted.largest[0]


@pytest.mark.parametrize("kv_format", FORMATS)
def test_the_cache_is_never_decoded_as_a_whole(kv_format: str) -> None:
    """Sixteen times the keys, and no larger tensor than before: a tile of 256 keys in float32."""
    tile = 2 * 256 * 64 * 4
    short, long = (largest_intermediate(n, 1, kv_format) for n in (512, 8192))
    assert short == long == tile


# Wrong versions


def check_all(kv_format: str) -> None:
    for name in ("windows", "prefill, chunk, decode, verify"):
        for seed in range(2):
            check(name, kv_format, seed)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("hidden = key > position[:, None]", "hidden = key >= position[:, None]"),  # nobody sees itself
        (
            "hidden = key > position[:, None]",
            "hidden = (key > position[:, None]) & False",
        ),  # no rule
        ("hidden |= key <= position[:, None] - self.window", "hidden |= key < position[:, None] - self.window"),
        ("hidden |= key <= position[:, None] - self.window", "pass"),
        ("int(position[0]) - self.window + 1)", "int(position[-1]) - self.window + 1)"),
        ("[:, start : start + len(tokens)]", "[:, : len(tokens)]"),
        ("torch.arange(rows.start, rows.stop) + self.kv_len - q_len", "torch.arange(rows.start, rows.stop)"),
        ("start, q_len, kv_len, table in zip(starts, ", "start, q_len, kv_len, table in zip([0] * 9, "),
    ],
)
def test_wrong_twins_are_rejected(old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = mutant(quantized, old, new, tmp_path)
    monkeypatch.setattr(quantized, "quantized_attention", wrong.quantized_attention)
    with pytest.raises(AssertionError):
        check_all("int8")
