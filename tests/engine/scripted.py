"""A model without arithmetic: what a token sees is exactly what it reads through the block table.

The KV of a token is a fingerprint of the KV before it, the token and its position; the next token is a fingerprint of
all the KV that is read. One wrong block, slot, position or copy changes everything after it. It works on the packed
batch, so packing is under test as well.
"""

from __future__ import annotations

from typing import Any

import torch

from minillm.config import EngineConfig, ModelConfig
from minillm.engine.batch import Batch
from minillm.engine.engine import Engine
from minillm.engine.sampler import rows_of
from minillm.engine.scheduler import StepPlan
from minillm.engine.verify import Proposer, accept
from minillm.sampling import SamplingParams
from tests.engine.workloads import EOS, VOCAB, Completions, Workload

CONFIG = ModelConfig("LlamaForCausalLM", VOCAB, 8, 8, 1, 1, 1, 2, max_position_embeddings=256, eos_token_ids=(EOS,))


class ScriptedRunner:
    """Stands in for `ModelRunner`: instead of logits it gives what each row sees."""

    def __init__(self, engine: Engine) -> None:
        self.cache = engine.runner.cache
        self.block_size = engine.pool.block_size
        self.slots: dict[int, int] = {}

    def run(self, batch: Batch) -> list[tuple[int, ...]]:
        self._copy(batch.copies.tolist())
        tokens, positions = batch.tokens.tolist(), batch.positions.tolist()
        slots, ends = batch.metadata.slot_mapping.tolist(), batch.metadata.cu_seqlens_q.tolist()
        seen: list[tuple[int, ...]] = []  # by row: the KV that this token reads, its own included
        for table, start, end in zip(batch.metadata.block_tables.tolist(), ends, ends[1:], strict=False):
            for row in range(start, end):
                before = self._read(table, positions[row])
                self.slots[slots[row]] = hash((before[-1:], tokens[row], positions[row]))
                seen.append((*before, self.slots[slots[row]]))
        return [seen[row] for row in batch.logit_indices.tolist()]

    def _copy(self, copies: list[list[int]]) -> None:
        size = self.block_size
        content = [[self.slots.get(source * size + i, 0) for i in range(size)] for source, _ in copies]
        for (_, target), block in zip(copies, content, strict=True):
            for i, fingerprint in enumerate(block):
                self.slots[target * size + i] = fingerprint

    def _read(self, table: list[int], num_tokens: int) -> tuple[int, ...]:
        size = self.block_size
        return tuple(self.slots.get(table[p // size] * size + p % size, 0) for p in range(num_tokens))


class ScriptedSampler:
    """Stands in for `Sampler`."""

    def sample(self, plan: StepPlan, seen: list[tuple[int, ...]]) -> list[list[int]]:
        rows = zip(seen, rows_of(plan.samplers, plan.drafts), strict=True)
        return accept(plan.drafts, [next_token(kv, request.index) for kv, (request, _) in rows])


def next_token(kv: tuple[int, ...], index: int) -> int:
    return hash((kv, index)) % VOCAB


def alone(prompt: tuple[int, ...], params: SamplingParams, index: int) -> list[int]:
    """What a completion gets that has the machine to itself."""
    kv: tuple[int, ...] = ()
    pending, output = list(prompt), list[int]()
    while not output or (len(output) < params.max_tokens and not params.ends_with(output[-1], (EOS,))):
        for token in pending:
            kv += (hash((kv[-1:], token, len(kv))),)
        pending = [next_token(kv, index)]
        output += pending
    return output


def alone_all(workload: Workload) -> Completions:
    return {
        (str(number), index): alone(request.prompt, request.params, index)
        for number, request in enumerate(workload.requests)
        for index in range(request.params.n)
    }


class _Shape:
    """As much of a decoder as an engine looks at before it runs one."""

    config = CONFIG
    device = torch.device("cpu")
    dtype = torch.float32


def scripted_engine(config: EngineConfig | None = None, proposer: Proposer | None = None, **changes: Any) -> Engine:
    """An engine whose model is scripted; `changes` are fields of `EngineConfig`."""
    config = config or EngineConfig(**({"debug": True} | changes))
    engine = Engine(_Shape(), config, proposer)  # type: ignore[arg-type]
    engine.runner = ScriptedRunner(engine)  # type: ignore[assignment]
    engine.sampler = ScriptedSampler()  # type: ignore[assignment]
    return engine
