"""What a decode step would take if it waited for one thing alone: the longest of these times is what it waits for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minillm.config import ModelConfig
from minillm.costs.formulas import kv_bytes_per_token, least_bytes, step_flops, weight_bytes
from minillm.costs.steps import decode_step
from minillm.measure.roof import Roof

TERMS = ("weights", "KV cache", "arithmetic", "overhead")


@dataclass(frozen=True)
class Site:
    """A model on a machine: what its steps are made of, and what the machine gives."""

    name: str
    config: ModelConfig
    element_bytes: int
    roof: Roof
    memory_bytes: float  # for weights and cache
    overhead: float = 0.0  # s of a step that neither moves nor computes: starting its operators

    def terms(self, batch: int, context: int) -> dict[str, float]:
        """Seconds for each of `TERMS`. No program beats any of them; a bad one may need their sum."""
        step = decode_step(context, batch)
        weights = weight_bytes(self.config, self.element_bytes, batch)
        cached = least_bytes(self.config, step, self.element_bytes) - weights
        seconds = (
            weights / self.roof.bytes_per_second,
            cached / self.roof.bytes_per_second,
            step_flops(self.config, step).total / self.roof.flops_per_second,
            self.overhead,
        )
        return dict(zip(TERMS, seconds, strict=True))

    def fits(self, batch: int, context: int) -> bool:
        """Whether the weights and the caches of all requests fit into the memory."""
        cached = batch * context * kv_bytes_per_token(self.config, self.element_bytes)
        return weight_bytes(self.config, self.element_bytes, 0) + cached <= self.memory_bytes

    def regime(self, batch: int, context: int) -> str:
        """What such a step waits for: one of `TERMS`, or "capacity" where it cannot run at all."""
        if not self.fits(batch, context):
            return "capacity"
        terms = self.terms(batch, context)
        return max(terms, key=terms.__getitem__)

    def regimes(self, batches: Sequence[int], contexts: Sequence[int]) -> list[list[str]]:
        """A row for each context, a column for each batch."""
        return [[self.regime(batch, context) for batch in batches] for context in contexts]
