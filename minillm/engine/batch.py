"""A step as tensors: the tokens of all sequences packed one after the other, without padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.attention import PagedLayout
from minillm.engine.scheduler import StepPlan
from minillm.engine.sequence import Sequence


@dataclass(frozen=True)
class Batch:
    """What the model needs for one step, whatever mixture of chunks and decodes it is.

    `logit_indices` picks the last token of each sequence that samples; spawned completions share a row, and a sequence
    that stays behind has none: sampling from the middle of its prompt would invent a token.
    """

    tokens: Tensor  # [num_tokens] int64
    positions: Tensor  # [num_tokens] int64, absolute
    layout: PagedLayout
    logit_indices: Tensor  # [num_samplers] int64
    samplers: list[Sequence]
    copies: list[tuple[int, int]]  # blocks to copy first, (source, target)

    @classmethod
    def pack(cls, plan: StepPlan, block_size: int, device: torch.device) -> Batch:
        """Lay the scheduled tokens of all sequences side by side."""
        tokens: list[int] = []
        positions: list[int] = []
        logit_indices: list[int] = []
        for part in plan.scheduled.values():
            start, end = part.sequence.num_computed, part.sequence.num_computed + part.num_tokens
            tokens += part.sequence.tokens[start:end]
            positions += range(start, end)
            logit_indices += [len(tokens) - 1] * len(part.samplers)
        parts = plan.scheduled.values()
        layout = PagedLayout.build(
            [part.sequence.table.blocks for part in parts],
            [part.num_tokens for part in parts],
            [part.sequence.num_computed + part.num_tokens for part in parts],
            block_size=block_size,
            device=device,
        )
        return cls(
            tokens=torch.tensor(tokens, device=device),
            positions=torch.tensor(positions, device=device),
            layout=layout,
            logit_indices=torch.tensor(logit_indices, dtype=torch.int64, device=device),
            samplers=plan.samplers,
            copies=plan.copies,
        )
