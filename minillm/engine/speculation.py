"""How many tokens may be guessed in a step, and how the guesses get into its plan."""

from __future__ import annotations

from collections.abc import Iterable

from minillm.cache.blocks import BlockPool
from minillm.engine.proposer import Proposer
from minillm.engine.request import Request
from minillm.engine.scheduler import Scheduled, StepPlan


def add_drafts(plan: StepPlan, proposer: Proposer, pool: BlockPool, running: Iterable[Request]) -> None:
    """Let the proposer guess behind the sequences that decode in this step, where there is room."""
    room = draft_room(plan, pool, running)
    for sequence, draft in proposer.propose(room).items() if room else ():
        start = plan.scheduled[sequence].kv_len
        copies = pool.prepare(sequence.table, start, start + len(draft))
        if draft and copies is not None:
            plan.add_draft(sequence, draft, copies)


def draft_room(plan: StepPlan, pool: BlockPool, running: Iterable[Request]) -> dict[Request, int]:
    """How many tokens may be guessed for whom; sequences without room are left out.

    Drafts take what everybody else leaves, oldest first: budget that the step does not need, and blocks beyond one for
    each running completion, so that nobody is pushed out for a guess. A first token is not waited for: who has none
    yet gets no drafts.
    """
    room: dict[Request, int] = {}
    budget = plan.budget
    spare = max(0, pool.num_free - sum(sequence.width for sequence in running))
    for sequence, part in plan.scheduled.items():
        held = len(sequence.table.blocks) * pool.block_size - part.kv_len
        count = min(_useful(part), budget, held + spare * pool.block_size)
        if count > 0:
            room[sequence] = count
            budget -= count
            spare -= pool.blocks_for(max(0, count - held))
    return room


def _useful(part: Scheduled) -> int:
    """Guesses worth checking: a step brings one token more than it accepts, and max_tokens is the end."""
    sequence = part.request
    if not part.samplers or sequence.num_generated == 0:
        return 0
    return min(sequence.num_drafts, sequence.params.max_tokens - sequence.num_generated - 1)
