"""The contiguous cache: it grows without forgetting, rolls back by a counter, and owns exactly the bytes it says."""

from __future__ import annotations

import pytest
import torch

from minillm.cache.contiguous import ContiguousCache
from minillm.generate import decode, extend, prefill
from tests.families import random_model


def test_growing_keeps_what_was_written() -> None:
    """From a capacity of one token: the same logits as with room for all, and the sizes double."""
    model = random_model("llama3", seed=1)
    tokens = torch.randint(131, (70,), generator=torch.Generator().manual_seed(2))
    roomy = ContiguousCache(model.config, capacity=70, device=model.device, dtype=model.dtype)
    cramped = ContiguousCache(model.config, capacity=1, device=model.device, dtype=model.dtype)
    capacities = set()
    for part in tokens.split([1, 2, 3, 64]):
        torch.testing.assert_close(extend(model, part, cramped), extend(model, part, roomy), atol=0, rtol=0)
        capacities.add(cramped.capacity)
    assert capacities == {1, 3, 6, 70}


@pytest.mark.parametrize("keep", [0, 1, 15, 30])
def test_truncate_is_as_if_the_tokens_had_never_come(keep: int) -> None:
    model = random_model("mistral", seed=3)
    tokens = torch.randint(131, (30,), generator=torch.Generator().manual_seed(4)).tolist()
    _, cache = prefill(model, tokens)
    cache.truncate(keep)
    rolled_back = extend(model, torch.tensor([7, 8, 9]), cache)
    expected, _ = prefill(model, tokens[:keep] + [7, 8, 9])
    torch.testing.assert_close(rolled_back, expected, atol=1e-5, rtol=0)


def test_truncate_refuses_to_invent_tokens() -> None:
    model = random_model()
    _, cache = prefill(model, [1, 2, 3])
    for wrong in (4, -1):
        with pytest.raises(ValueError, match="Cannot truncate a cache of 3 tokens"):
            cache.truncate(wrong)


def test_stale_keys_after_the_counter_are_never_read() -> None:
    """Poison: everything after the counter is NaN, as in memory that was used before."""
    model = random_model(seed=5)
    _, cache = prefill(model, [1, 2, 3, 4, 5, 6])
    cache.truncate(4)
    cache.keys[:, :, 4:] = torch.nan
    cache.values[:, :, 4:] = torch.nan
    assert decode(model, 9, cache).isfinite().all()


def test_keys_before_the_window_are_never_read() -> None:
    """Poison: everything that a sliding window of W tokens hides is NaN."""
    model = random_model("mistral", seed=6)
    window = model.config.sliding_window
    assert window is not None
    _, cache = prefill(model, list(range(window + 9)))
    cache.keys[:, :, :10] = torch.nan  # the next token stands at W + 9 and sees the keys from 10 on
    cache.values[:, :, :10] = torch.nan
    assert decode(model, 9, cache).isfinite().all()
    cache.keys[:, :, 11] = torch.nan
    assert decode(model, 9, cache).isnan().any(), "the oldest key of the window is read"


def test_bytes_per_token() -> None:
    config = random_model("qwen3").config
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        cache = ContiguousCache(config, capacity=10, device=torch.device("cpu"), dtype=dtype)
        per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * size
        assert cache.keys.nbytes + cache.values.nbytes == 10 * per_token
