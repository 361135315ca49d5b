"""Guess with a smaller model: it writes a few tokens alone, the target checks them all at once.

The draft model has a cache of its own, and uses the engine's parts: packed batches, paged blocks, prefix cache. For
every request of the target it keeps a *twin*: a request of its own whose prompt is all that the target has so far, and
whose generated tokens are the drafts. The catch-up rule of the engine keeps both level: what the twin has not computed
yet is computed when it is next asked. After full acceptance these are the last draft and the bonus token. After a
rejection it is the recovered token, and the twin's KV after that place no longer counts. After a preemption of the
target it is nothing: the twin has lost no KV.
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
    """Drafts written by a smaller model with the target's vocabulary, for all requests in one batch.

    Its logits are processed as the target's are, but its draws come from random streams of their own: a draft that is
    drawn from the stream which later accepts or rejects it would be accepted with the wrong probability. `config` is
    the target engine's. The KV of the drafts stays in the model's dtype: it is small, and twins roll back further than
    quantised blocks allow.
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
        """Up to room[sequence] tokens for each: one pass for the first token of all, one for the second, and so on.

        A long prompt is read in chunks of `max_num_batched_tokens`. A request whose prompt is not read to its end in
        these passes gets fewer drafts or none; so does one without free positions or blocks.
        """
        twins = {self._in_step(sequence): count for sequence, count in room.items()}
        probs: dict[Request, list[Tensor]] = {twin: [] for twin in twins}
        for _ in range(max(room.values(), default=0)):
            self._pass(twins, probs)
        return {sequence: _draft(twin, probs[twin]) for sequence, twin in zip(room, twins, strict=True)}

    def forget(self, sequence: Request) -> None:
        """Free the blocks of a request that has ended."""
        twin = self._twins.pop(sequence, None)
        if twin is not None:
            self.pool.release(twin.table)

    def _in_step(self, sequence: Request) -> Request:
        """The request's twin, with the same tokens. Its KV counts up to the first token in which the two differed.

        The last token is never counted as computed: its logits give the first draft.
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
        """One run of the model: a chunk for each twin that has more to read, a draft for each that has read all."""
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
        """Plan the next tokens of a twin, if there are budget, positions and blocks; idle twins lose their blocks."""
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
        """Append a draft to each twin that has read all, and keep the probabilities that it was drawn from."""
        tokens = sample(probs, [self._generator(twin) for twin in batch.samplers]).tolist()
        for twin, token, row in zip(batch.samplers, tokens, probs, strict=True):
            twin.tokens.append(token)
            drawn[twin].append(row)

    def _generator(self, twin: Request) -> Generator | None:
        """The twin's own random stream: completions count from 0 up, their twins from -1 down."""
        if twin.params.greedy:
            return None
        if twin.generator is None:
            twin.generator = twin.params.generator(-1 - twin.index, twin.seed, self.runner.model.device)
        return twin.generator


def _unborn(sequence: Request) -> Request:
    """A new twin, without tokens and without KV."""
    return replace(sequence, tokens=[], num_prompt=0, num_computed=0, table=BlockTable(), generator=None)


def _draft(twin: Request, probs: list[Tensor]) -> Draft:
    """What a twin has just written. A greedy draft is not drawn, so it has no probabilities to compare with."""
    tokens = twin.tokens[twin.num_prompt :]
    return Draft(tokens, torch.stack(probs) if tokens and not twin.params.greedy else None)
