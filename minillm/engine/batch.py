"""A step as tensors: the tokens of all sequences packed one after the other, without padding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.attention import AttentionMetadata
from minillm.engine.proposer import Draft
from minillm.engine.request import Request
from minillm.engine.scheduler import StepPlan


@dataclass(frozen=True)
class Batch:
    """What the model needs for one step, whatever mixture of chunks and decodes it is.

    `logit_indices` picks the last token of each sequence that samples, and the drafts behind it; spawned completions
    share a row, and a sequence that stays behind has none: sampling from the middle of its prompt would invent a token.
    """

    tokens: Tensor  # [num_tokens] int64
    positions: Tensor  # [num_tokens] int64, absolute
    layout: AttentionMetadata
    logit_indices: Tensor  # [num_samplers + number of drafts] int64
    samplers: list[Request]
    drafts: list[Draft]  # one for each sampler
    copies: list[tuple[int, int]]  # blocks to copy first, (source, target)

    @classmethod
    def pack(cls, plan: StepPlan, block_size: int, device: torch.device) -> Batch:
        """Lay the scheduled tokens of all sequences side by side."""
        tokens: list[int] = []
        positions: list[int] = []
        logit_indices: list[int] = []
        for part in plan.scheduled.values():
            start = part.request.num_computed
            tokens += part.request.tokens[start : start + part.num_tokens] + part.draft.tokens
            positions += range(start, part.kv_len)
            logit_indices += [*range(len(tokens) - 1 - len(part.draft), len(tokens))] * len(part.samplers)
        parts = plan.scheduled.values()
        layout = AttentionMetadata.build(
            [part.request.table.blocks for part in parts],
            [part.q_len for part in parts],
            [part.kv_len for part in parts],
            block_size=block_size,
            device=device,
        )
        return cls(
            tokens=torch.tensor(tokens, device=device),
            positions=torch.tensor(positions, device=device),
            layout=layout,
            logit_indices=torch.tensor(logit_indices, dtype=torch.int64, device=device),
            samplers=plan.samplers,
            drafts=[part.draft for part in parts for _ in part.samplers],
            copies=plan.copies,
        )

    def rows(self) -> Iterator[tuple[Request, list[int]]]:
        """For each of `logit_indices`: the sequence that goes on there, and the drafts that come before."""
        for sequence, draft in zip(self.samplers, self.drafts, strict=True):
            for count in range(1 + len(draft)):
                yield sequence, draft.tokens[:count]
