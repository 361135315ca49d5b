"""Guess with a smaller model: it writes a few tokens alone, the target checks them all at once.

The draft model reads and writes a cache of its own, and is served by the engine's own parts: packed batches, paged
blocks, prefix cache. For every request of the target it has a *twin*. All that the target has said is given to the
twin, and what it generates after that are drafts. The catch-up rule keeps both in step: whatever the twin has not
computed yet is computed when it is next asked. After full acceptance that is the last draft and the bonus token, after
a rejection the recovered token (the twin's KV after it no longer counts), after a preemption of the target nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minillm.cache.blocks import BlockPool
from minillm.config import EngineConfig
from minillm.engine.batch import Batch
from minillm.engine.request import Request
from minillm.engine.runner import ModelRunner
from minillm.engine.sampler import distributions, rows_of, stream_numbers
from minillm.engine.scheduler import StepPlan
from minillm.engine.verify import Draft, num_accepted
from minillm.model.decoder import Decoder, inference
from minillm.sampling import probs_from_logits, sample


@dataclass(eq=False)
class Twin(Request):
    """The draft model's view of a request: the same tokens, then drafts."""

    num_given: int = 0  # tokens that the target has said, the prompt included

    @classmethod
    def of(cls, request: Request) -> Twin:
        """A twin that has not been given any token yet."""
        name, order, num_prompt = request.request_id, request.order, request.num_prompt
        return cls(name, order, [], num_prompt, request.params, request.cache_salt)

    @property
    def index(self) -> int:
        """Completions count from 0 up, their twins from -1 down: each draws from a random stream of its own."""
        return -1 - self.order[1]

    def catch_up(self, request: Request) -> None:
        """Take over the target's tokens. KV counts as far as both have said the same.

        The last token is always left to be computed: what follows it is wanted.
        """
        same = self.num_given + num_accepted(self.tokens[self.num_given :], request.tokens[self.num_given :])
        self.tokens[same:] = request.tokens[same:]
        self.num_given = len(self.tokens)
        self.num_computed = min(self.num_computed, same, self.num_given - 1)


class DraftModelProposer:
    """Drafts written by a model with the target's vocabulary, for all requests side by side.

    Its draws are made from the same processing of its logits as the target's, out of random streams of their own: a
    draft that came from the stream that judges it would be judged with a bias. `config` is the target engine's. Its KV
    stays in the model's dtype, because it is small.
    """

    def __init__(self, model: Decoder, config: EngineConfig | None = None) -> None:
        self.config = replace(config or EngineConfig(), kv_format="auto")
        self.runner = ModelRunner(model, self.config)
        self.pool = BlockPool(
            self.runner.cache.num_blocks,
            self.runner.cache.block_size,
            identity=(model.config, model.dtype),
            enable_prefix_caching=self.config.enable_prefix_caching,
        )
        self._twins: dict[Request, Twin] = {}

    def propose(self, room: Mapping[Request, int]) -> dict[Request, Draft]:
        """Up to room[request] tokens for each: one pass for everybody's first, one for everybody's second …

        A long prompt is read in chunks of `max_num_batched_tokens`; a request that is not level by then, that has no
        more positions, or for which blocks are lacking gets fewer drafts or none.
        """
        twins = {self._in_step(request): count for request, count in room.items()}
        probs: dict[Request, list[Tensor]] = {twin: [] for twin in twins}
        with inference(self.runner.model.device):
            for _ in range(max(room.values(), default=0)):
                self._pass(twins, probs)
        return {request: _draft(twin, probs[twin]) for request, twin in zip(room, twins, strict=True)}

    def forget(self, request: Request) -> None:
        """Free the blocks of a request that has ended."""
        twin = self._twins.pop(request, None)
        if twin is not None:
            self.pool.release(twin.table)

    def reset(self) -> None:
        """Forget all requests, whatever state the pool is in."""
        self._twins.clear()
        self.pool.reset()

    def _in_step(self, request: Request) -> Twin:
        """The request's twin, given all that the target has said, with a table that holds what is known of it."""
        if request not in self._twins:
            self._twins[request] = Twin.of(request)
        twin = self._twins[request]
        twin.catch_up(request)
        if not twin.table.blocks:
            hits = self.pool.lookup(twin.tokens, twin.cache_salt)
            twin.table, twin.num_computed = self.pool.open(twin.tokens, hits, twin.cache_salt)
        return twin

    def _pass(self, twins: Mapping[Twin, int], probs: dict[Request, list[Tensor]]) -> None:
        """One run of the model: chunks for those who are behind, a draft for those who get level."""
        plan = StepPlan(self.config.max_num_batched_tokens)
        for twin, count in twins.items():
            if twin.num_tokens - twin.num_given < count:
                self._schedule(plan, twin, twins)
        if not plan.scheduled:
            return
        logits = self.runner.run(Batch.pack(plan, self.pool.block_size, self.runner.model.device))
        for twin in twins:
            if twin in plan.scheduled:
                twin.num_computed += plan.scheduled[twin].num_tokens
                self.pool.commit(twin.table, twin.tokens, min(twin.num_computed, twin.num_given))
        if plan.samplers:
            self._draw(plan, logits, probs)

    def _schedule(self, plan: StepPlan, twin: Twin, busy: Mapping[Twin, int]) -> None:
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
            plan.add(twin, end - twin.num_computed, copies, 0)

    def _draw(self, plan: StepPlan, logits: Tensor, drawn: dict[Request, list[Tensor]]) -> None:
        """Append a draft to each twin that got level, and keep what it was drawn from."""
        rows = rows_of(plan.samplers, plan.drafts)
        probs = distributions(logits, rows, probs_from_logits, self.runner.model.config.eos_token_ids)
        tokens = sample(probs, stream_numbers(rows, self.config.seed, logits.device)).tolist()
        for twin, token, row in zip(plan.samplers, tokens, probs, strict=True):
            if token >= 0:
                twin.tokens.append(token)
                drawn[twin].append(row)


def _draft(twin: Twin, probs: list[Tensor]) -> Draft:
    """What a twin has just written. A greedy one has drawn nothing: it is as certain as a lookup."""
    tokens = twin.tokens[twin.num_given :]
    return Draft(tokens, torch.stack(probs) if tokens and not twin.params.greedy else None)
