"""Packing: a mixed step, written out by hand."""

from __future__ import annotations

import torch

from minillm.config import EngineConfig
from minillm.engine.batch import Batch
from minillm.engine.engine import Engine
from minillm.engine.scheduler import StepPlan
from minillm.sampling import SamplingParams
from tests.engine.scripted import scripted_engine

CPU = torch.device("cpu")


def mixed_step() -> tuple[Engine, StepPlan, Batch]:
    """A decode, a request that spawns two more, and the first chunk of a long prompt."""
    engine = scripted_engine(EngineConfig(block_size=4, num_blocks=20, max_num_batched_tokens=10))
    endless = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    engine.add([1, 2, 4, 5], endless)
    engine.step()
    engine.add([6, 7], SamplingParams(n=3, temperature=0, max_tokens=9))
    engine.add(list(range(4, 20)), endless)
    plan = engine.scheduler.schedule()
    return engine, plan, Batch.pack(plan, 4, CPU)


def test_a_mixed_step_is_packed_side_by_side() -> None:
    engine, plan, batch = mixed_step()
    decode = engine.scheduler.running[0].tokens[-1]
    assert batch.tokens.tolist() == [decode, 6, 7, 4, 5, 6, 7, 8, 9, 10]
    assert batch.positions.tolist() == [4, 0, 1, 0, 1, 2, 3, 4, 5, 6]
    assert batch.metadata.cu_seqlens_q.tolist() == [0, 1, 3, 10]
    assert batch.metadata.seq_lens.tolist() == [5, 2, 7]
    assert batch.logit_indices.tolist() == [0, 2, 2, 2], "the chunk has no last token yet; three share a row"
    assert [request.order for request in plan.samplers] == [(0, 0), (1, 0), (1, 1), (1, 2)]


def test_slots_are_block_times_size_plus_offset() -> None:
    engine, _, batch = mixed_step()
    tables = [sequence.table.blocks for sequence in engine.scheduler.running]
    places = [(0, 4), (1, 0), (1, 1), *((2, position) for position in range(7))]
    want = [tables[row][position // 4] * 4 + position % 4 for row, position in places]
    assert batch.metadata.slot_mapping.tolist() == want
    assert 0 not in [slot // 4 for slot in want], "trap 25: nobody writes into the dummy block"
