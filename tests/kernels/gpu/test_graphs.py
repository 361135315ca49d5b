"""Padding and static buffers of replayed decode steps, on the CPU: "replaying" here computes anew from the buffers.

What remains for a GPU is the recording itself. The attention below takes nothing from the host side of the layout,
as a recorded kernel cannot.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from torch import Tensor

from minillm.attention.metadata import AttentionMetadata
from minillm.attention.paged import Backend, paged_attention, write_kv
from minillm.config import POLICIES, EngineConfig
from minillm.engine.engine import Engine
from minillm.generate import generate
from minillm.kernels.gpu import graphs
from minillm.kernels.gpu.graphs import DecodeGraphs, StaticStep, padded_size
from minillm.quantization import attention as twin
from minillm.quantization.cache import QuantizedCache
from minillm.sampling import SamplingParams
from tests.engine.test_fuzz import alone_all, tiny_model
from tests.engine.workloads import Request, Workload, compare, play, random_workload
from tests.quantization.test_engine import alone_all as alone_in_format
from tests.quantization.test_engine import in_format


def from_tensors(metadata: AttentionMetadata) -> AttentionMetadata:
    """What the tensors of a step say, whatever its host side says."""
    return AttentionMetadata.build(
        metadata.block_tables.tolist(),
        metadata.cu_seqlens_q.diff().tolist(),
        metadata.seq_lens.tolist(),
        block_size=metadata.block_size,
    )


def attend(q: Tensor, keys: Tensor, values: Tensor, metadata: AttentionMetadata, **options: Any) -> Tensor:
    return paged_attention(q, keys, values, from_tensors(metadata), **options)


def attend_quantised(group: int, q: Tensor, keys: Any, values: Any, metadata: Any, **options: Any) -> Tensor:
    return twin.quantized_attention(q, keys, values, twin.prepare(from_tensors(metadata), group), **options)


def replaying_engine(config: EngineConfig) -> Engine:
    engine = Engine(tiny_model(), config)
    cache = engine.runner.cache
    if isinstance(cache, QuantizedCache):
        cache.prepare, cache.attention = (
            lambda metadata, _: metadata,
            partial(attend_quantised, cache.config.group_size),
        )
    else:
        cache.backend = Backend(attend, write_kv)  # type: ignore[attr-defined]
    engine.runner.graphs = DecodeGraphs(engine.model, cache)
    return engine


@pytest.fixture(autouse=True)
def compute_instead_of_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return compute

    monkeypatch.setattr(graphs, "capture", capture)


def test_replayed_steps_give_the_tokens_of_running_alone() -> None:
    for seed in range(20):
        for policy in POLICIES:
            workload = random_workload(seed, policy)
            compare(play(replaying_engine(workload.config), workload), alone_all(workload), workload)


@pytest.mark.parametrize("kv_format", ["fp8", "int8", "int4"])
def test_replayed_steps_on_a_quantised_cache(kv_format: str) -> None:
    for seed in range(5):
        for policy in POLICIES:
            workload = in_format(random_workload(seed, policy), kv_format)
            compare(play(replaying_engine(workload.config), workload), alone_in_format(workload), workload)


def serve_a_batch_that_shrinks() -> None:
    """The fourth sequence ends first; the other three grow into its blocks while its row is padding."""
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (20, 20, 20, 3)]
    requests = tuple(Request(tuple(range(i, i + 5)), p) for i, p in enumerate(params))
    config = EngineConfig(block_size=4, num_blocks=40, enable_prefix_caching=False)
    workload = Workload(config, requests)
    want = {(str(i), 0): list(generate(tiny_model(), r.prompt, r.params)) for i, r in enumerate(requests)}
    compare(play(replaying_engine(config), workload), want, workload)


def test_trap_30_padding_writes_into_the_dummy_block_only() -> None:
    serve_a_batch_that_shrinks()


@pytest.mark.parametrize(
    ("num_sequences", "size"), [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (16, 16), (17, 32), (33, 48), (64, 64)]
)
def test_padded_size(num_sequences: int, size: int) -> None:
    assert padded_size(num_sequences) == size


def test_trap_30_rows_and_columns_behind_the_batch_are_padding() -> None:
    """A step of four long sequences, then one of three short ones: nothing of the first may be left."""
    config = EngineConfig(block_size=4, num_blocks=60, enable_prefix_caching=False)
    engine = replaying_engine(config)
    for length, max_tokens in ((20, 3), (21, 4), (4, 5), (5, 5)):
        engine.add([1] * length, SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True))
    for _ in range(4):
        engine.step()
    (step,) = engine.runner.graphs._steps.values()  # type: ignore[union-attr]
    assert len(step.tokens) == 4 and engine.trace[-1].num_tokens == 3
    engine.step()
    assert engine.trace[-1].num_tokens == 2
    two = engine.runner.graphs._steps[2]  # type: ignore[union-attr]
    assert (two.metadata.block_tables[:, 3:] == 0).all()
    assert step.metadata.seq_lens.tolist()[3:] == [1] and step.metadata.slot_mapping.tolist()[3:] == [0]
    assert (step.metadata.block_tables[3] == 0).all() and (step.metadata.block_tables[:, 7:] == 0).all()


def test_trap_30_tables_are_wide_enough_for_the_longest_sequence() -> None:
    config = EngineConfig(block_size=8, num_blocks=100)
    engine = replaying_engine(config)
    longest = engine.model.config.max_position_embeddings
    engine.add([1] * (longest - 1), SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
    list(engine.run())
    assert engine.trace[-1].requests[0].kv_len == longest


def _stale_rows(self: StaticStep, batch: Any) -> None:
    """Copies a batch in and leaves what stands behind it."""
    rows = batch.metadata.block_tables
    self.tokens[: len(rows)] = batch.tokens
    self.positions[: len(rows)] = batch.positions
    self.metadata.slot_mapping[: len(rows)] = batch.metadata.slot_mapping
    self.metadata.seq_lens[: len(rows)] = batch.metadata.seq_lens
    self.metadata.block_tables[: len(rows), : rows.shape[1]] = rows


def test_stale_rows_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding that keeps an old slot writes into a block that someone else owns by now."""
    monkeypatch.setattr(StaticStep, "load", _stale_rows)
    with pytest.raises(AssertionError, match="completion 0"):
        serve_a_batch_that_shrinks()
