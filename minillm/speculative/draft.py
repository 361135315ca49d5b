"""Guess with a smaller model: it writes a few tokens alone, the target checks them all at once.

The draft model reads and writes a cache of its own, and is served by the engine's own parts: packed batches, paged
blocks, prefix cache. For every sequence of the target it has a *twin*. To the twin all that the target has said is
prompt, and what it generates are drafts. The catch-up rule keeps both in step: whatever the twin has not computed yet
is computed when it is next asked. After full acceptance that is the last draft and the bonus token, after a rejection
the recovered token (the twin's KV behind it no longer counts), after a preemption of the target nothing at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Generator, Tensor

from minillm.cache.blocks import BlockPool, BlockTable
from minillm.config import EngineConfig
from minillm.engine.batch import Batch
from minillm.engine.proposer import Draft
from minillm.engine.request import Request
from minillm.engine.runner import ModelRunner, distributions
from minillm.engine.scheduler import StepPlan
from minillm.engine.verify import num_accepted
from minillm.model.decoder import Decoder
from minillm.sampling import sample


class DraftModelProposer:
    """Drafts written by a model with the target's vocabulary, for all sequences side by side.

    Its draws are made from the same processing of its logits as the target's, out of random streams of their own: a
    draft that came from the stream that judges it would be judged with a bias. `config` is the target engine's. Its KV
    stays in the model's dtype: it is small, and twins roll back further than quantised blocks allow.
    """

    def __init__(self, model: Decoder, config: EngineConfig | None = None) -> None:
        config = config or EngineConfig()
        self.config = replace(config, kv_format="auto", block_size=config.kv_block_size)
        self.runner = ModelRunner(model, self.config)
        self.pool = BlockPool(
            self.runner.cache.num_blocks,
            self.runner.cache.block_size,
            identity=(model.config, model.dtype),
            enable_prefix_caching=self.config.enable_prefix_caching,
        )
        self._twins: dict[Request, Request] = {}

    @torch.inference_mode()
    def propose(self, room: Mapping[Request, int]) -> dict[Request, Draft]:
        """Up to room[sequence] tokens for each: one pass for everybody's first, one for everybody's second …

        A long prompt is read in chunks of `max_num_batched_tokens`; a sequence that is not level by then, that has no
        more positions, or for which blocks are lacking gets fewer drafts or none.
        """
        twins = {self._in_step(sequence): count for sequence, count in room.items()}
        probs: dict[Request, list[Tensor]] = {twin: [] for twin in twins}
        for _ in range(max(room.values(), default=0)):
            self._pass(twins, probs)
        return {sequence: _draft(twin, probs[twin]) for sequence, twin in zip(room, twins, strict=True)}

    def forget(self, sequence: Request) -> None:
        """Free the blocks of a sequence that has ended."""
        twin = self._twins.pop(sequence, None)
        if twin is not None:
            self.pool.release(twin.table)

    def _in_step(self, sequence: Request) -> Request:
        """The sequence's twin, holding the same tokens; KV counts as far as both have said the same.

        The last token is always left to be computed: what follows it is wanted.
        """
        if sequence not in self._twins:
            self._twins[sequence] = _unborn(sequence)
        twin = self._twins[sequence]
        start = twin.num_prompt
        same = start + num_accepted(twin.tokens[start:], sequence.tokens[start:])
        twin.tokens[same:] = sequence.tokens[same:]
        twin.num_prompt = len(twin.tokens)
        twin.num_computed = min(twin.num_computed, same, twin.num_prompt - 1)
        if not twin.table.blocks:
            twin.table, twin.num_computed = self.pool.open(twin.tokens, twin.salt)
        return twin

    def _pass(self, twins: Mapping[Request, int], probs: dict[Request, list[Tensor]]) -> None:
        """One run of the model: chunks for those who are behind, a draft for those who get level."""
        plan = StepPlan(self.config.max_num_batched_tokens)
        for twin, count in twins.items():
            if twin.num_generated < count:
                self._schedule(plan, twin, twins)
        if not plan.scheduled:
            return
        batch = Batch.pack(plan, self.pool.block_size, self.runner.model.device)
        logits = self.runner.logits(batch)
        for twin, part in plan.scheduled.items():
            twin.num_computed += part.num_tokens
            self.pool.commit(twin.table, twin.tokens, min(twin.num_computed, twin.num_prompt))
        if logits is not None:
            self._draw(batch, distributions(logits, batch), probs)

    def _schedule(self, plan: StepPlan, twin: Request, busy: Mapping[Request, int]) -> None:
        """Plan the next tokens of a twin, if there are budget, positions and blocks. Idle twins give up theirs."""
        end = twin.num_computed + min(twin.num_remaining, plan.budget)
        if end == twin.num_computed or end > self.runner.model.config.max_position_embeddings:
            return
        copies = self.pool.prepare(twin.table, twin.num_computed, end)
        if copies is None:
            for idle in self._twins.values() - busy.keys():
                self.pool.release(idle.table)
            copies = self.pool.prepare(twin.table, twin.num_computed, end)
        if copies is not None:
            plan.add(twin, end - twin.num_computed, copies)

    def _draw(self, batch: Batch, probs: Tensor, drawn: dict[Request, list[Tensor]]) -> None:
        """Append a draft to each twin that got level, and keep what it was drawn from."""
        tokens = sample(probs, [self._generator(twin) for twin in batch.samplers]).tolist()
        for twin, token, row in zip(batch.samplers, tokens, probs, strict=True):
            twin.tokens.append(token)
            drawn[twin].append(row)

    def _generator(self, twin: Request) -> Generator | None:
        """The twin's own random stream: completions count from 0 up, their twins from -1 down."""
        if twin.params.greedy:
            return None
        if twin.generator is None:
            arrival, index = twin.order
            device = self.runner.model.device
            twin.generator = twin.params.generator(-1 - index, engine_seed=twin.seed, arrival=arrival, device=device)
        return twin.generator


def _unborn(sequence: Request) -> Request:
    """A twin that has heard nothing yet."""
    return replace(sequence, tokens=[], num_prompt=0, num_computed=0, table=BlockTable(), generator=None)


def _draft(twin: Request, probs: list[Tensor]) -> Draft:
    """What a twin has just written. A greedy one has drawn nothing: it is as certain as a lookup."""
    tokens = twin.tokens[twin.num_prompt :]
    return Draft(tokens, torch.stack(probs) if tokens and not twin.params.greedy else None)
