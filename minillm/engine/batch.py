"""A step as tensors: the tokens of all requests packed one after the other, without padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.attention.metadata import AttentionMetadata
from minillm.engine.scheduler import StepPlan


@dataclass(frozen=True)
class Batch:
    """What the model needs for one step, whatever mixture of chunks and decodes it is: tensors only.

    `logit_indices` picks the last token of each request that samples, and the drafts after it; spawned completions
    share a row, and a request that stays behind has none: sampling from the middle of its prompt would invent a token.
    After these rows come those that tell the log-probabilities of prompt tokens. Who samples stands in the `StepPlan`.
    """

    tokens: Tensor  # [num_tokens] int64
    positions: Tensor  # [num_tokens] int64, absolute
    metadata: AttentionMetadata
    logit_indices: Tensor  # [num_rows] int64
    copies: Tensor  # [n, 2] int64: blocks to copy first, (source, target)

    @classmethod
    def pack(cls, plan: StepPlan, block_size: int, device: torch.device) -> Batch:
        """Lay the scheduled tokens of all requests side by side."""
        tokens: list[int] = []
        positions: list[int] = []
        sampled: list[int] = []
        prompt_rows: list[int] = []
        parts = plan.scheduled.values()
        for part in parts:
            start = part.request.num_computed
            prompt_rows += [len(tokens) + position - start for position in part.prompt_rows]
            tokens += part.request.tokens[start : start + part.num_tokens] + part.draft.tokens
            positions += range(start, part.kv_len)
            sampled += [*range(len(tokens) - 1 - len(part.draft), len(tokens))] * len(part.samplers)
        tables = [part.request.table.blocks for part in parts]
        q_lens, kv_lens = [part.q_len for part in parts], [part.kv_len for part in parts]
        metadata = AttentionMetadata.build(tables, q_lens, kv_lens, block_size=block_size, device=device)
        return cls(
            tokens=torch.tensor(tokens, device=device),
            positions=torch.tensor(positions, device=device),
            metadata=metadata,
            logit_indices=torch.tensor(sampled + prompt_rows, dtype=torch.int64, device=device),
            copies=torch.tensor(plan.copies, dtype=torch.int64, device=device).view(-1, 2),
        )
