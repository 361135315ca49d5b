"""What FLOPs and bytes mean for time: roofline, ridge, bound on TPOT, utilisation, speculation.

Pure functions of `minillm.costs.formulas` and two numbers of a machine (`minillm.measure.hardware` measures them,
`minillm.measure.datasheets` quotes them).
"""

from __future__ import annotations

from math import inf
from typing import NamedTuple

from minillm.config import ModelConfig
from minillm.costs.formulas import least_bytes, step_bytes, step_flops
from minillm.costs.steps import Step, decode_step


class Roof(NamedTuple):
    """What a machine does at best: FLOP/s and byte/s."""

    flops_per_second: float
    bytes_per_second: float

    @property
    def ridge(self) -> float:
        """FLOP per byte above which computing takes longer than moving (Williams et al. 2009)."""
        return self.flops_per_second / self.bytes_per_second

    def seconds(self, flops: float, num_bytes: float) -> float:
        """No program is faster, not even one that computes and moves at the same time without a gap."""
        return max(flops / self.flops_per_second, num_bytes / self.bytes_per_second)

    def flop_rate(self, intensity: float) -> float:
        """The roof itself: FLOP/s that work of so many FLOP per byte reaches at best."""
        return min(self.flops_per_second, intensity * self.bytes_per_second)

    def mfu(self, flops: float, seconds: float) -> float:
        """Model FLOPs utilisation (Chowdhery et al. 2022): the part of the FLOP/s that necessary products used."""
        return flops / (seconds * self.flops_per_second)

    def mbu(self, num_bytes: float, seconds: float) -> float:
        """Model bandwidth utilisation: the part of the byte/s that necessary traffic used."""
        return num_bytes / (seconds * self.bytes_per_second)


def step_seconds(config: ModelConfig, step: Step, element_bytes: int, roof: Roof) -> float:
    """Seconds that a step takes at least: the longer of its FLOPs and of the bytes that it cannot avoid to read."""
    return roof.seconds(step_flops(config, step).total, least_bytes(config, step, element_bytes))


def tpot_bound(config: ModelConfig, context: int, element_bytes: int, roof: Roof, *, batch: int = 1) -> float:
    """Seconds per output token at least, for each of `batch` sequences of `context` tokens: one decode step."""
    return step_seconds(config, decode_step(context, batch), element_bytes, roof)


# Intensity, in FLOP per byte


def intensity(config: ModelConfig, step: Step, element_bytes: int) -> float:
    """Of a whole step, weights and KV; activations left out."""
    return step_flops(config, step).total / step_bytes(config, step, element_bytes).total


def linear_intensity(rows: int, inputs: int, outputs: int, element_bytes: int) -> float:
    """Of one linear layer: rows · inputs · outputs products over the weight, what goes in and what comes out.

    About 2 · rows / element_bytes while rows are few. Sequences of a batch and tokens of a prompt are the same rows.
    """
    moved = inputs * outputs + rows * (inputs + outputs)
    return 2 * rows * inputs * outputs / (element_bytes * moved)


def ridge_rows(inputs: int, outputs: int, element_bytes: int, ridge: float) -> float:
    """T*: rows from which a linear layer is bound by computing. Infinite where no number of rows is enough.

    With ever more rows a layer's intensity tends to inputs · outputs / (inputs + outputs) · 2 / element_bytes.
    """
    half = ridge * element_bytes / 2
    slack = 1 - half * (1 / inputs + 1 / outputs)
    return half / slack if slack > 0 else inf


def attention_intensity(config: ModelConfig, element_bytes: int, q_len: int = 1) -> float:
    """Of decode attention: each key serves the query heads of its group, whatever the batch and the context.

    In a verification it serves them for each of its q_len queries.
    """
    return 2 * q_len * config.group_size / element_bytes


# Techniques


def quantized_speedup(kv_share: float, shrink: float) -> float:
    """Factor on the bytes of a step whose KV, a part `kv_share` of them, becomes `shrink` times smaller (Amdahl)."""
    return 1 / (1 - kv_share + kv_share / shrink)


def expected_tokens(acceptance: float, drafts: int) -> float:
    """Tokens per verification if each draft is accepted with this probability: (1 - α^(γ+1)) / (1 - α).

    The accepted ones and one from the target itself, so 1 to γ + 1 (Leviathan et al. 2022, arXiv:2211.17192).
    """
    return sum(acceptance**i for i in range(drafts + 1))


def speculative_speedup(acceptance: float, drafts: int, draft_cost: float, verify_cost: float = 1.0) -> float:
    """Speed-up over plain decoding; costs are in plain decode steps: one draft token, one verification.

    `verify_cost` 1 means that checking γ + 1 tokens takes as long as decoding one: true while memory is the bound.
    """
    return expected_tokens(acceptance, drafts) / (drafts * draft_cost + verify_cost)
