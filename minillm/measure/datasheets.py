"""What manufacturers promise for a few GPUs: for planning ("what if I had one?"), never as the bound of a measurement.

Dense bfloat16 rates, accumulated in float32, without sparsity. Real programs reach 70 to 85 % of the rate and about
90 % of the bandwidth; `minillm doctor` measures what yours reaches.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Datasheet:
    """One GPU on paper."""

    name: str
    read_bandwidth: float  # byte/s
    bfloat16_rate: float  # FLOP/s, dense
    memory_bytes: float

    @property
    def ridge(self) -> float:
        """FLOP per byte at which computing takes as long as reading, on paper."""
        return self.bfloat16_rate / self.read_bandwidth


DATASHEETS = (
    Datasheet("RTX 4090", 1.008e12, 165e12, 24e9),
    Datasheet("A100 40GB", 1.555e12, 312e12, 40e9),
    Datasheet("A100 80GB", 2.039e12, 312e12, 80e9),
    Datasheet("H100 SXM", 3.35e12, 989e12, 80e9),
    Datasheet("H200 SXM", 4.8e12, 989e12, 141e9),
    Datasheet("B200", 8.0e12, 2250e12, 180e9),
)
