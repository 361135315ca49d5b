"""`minillm bench spec`: what guessing ahead gains, for each number of guesses and each batch, and where it loses.

The same requests are served with and without guesses, in turns, by one engine: only the guesses differ, and the pairs
of times are compared. Next to the measured speed-up stands the formula of Leviathan et al. (2022, arXiv:2211.17192):
E / (γ · c + 1). Here E is the number of tokens that come out of a verification if each of γ guesses is accepted with
probability α, and one guess takes as long as c plain steps. The formula assumes two things. A verification takes as
long as a plain step: this holds while the step waits for memory; otherwise checking γ + 1 tokens takes v > 1 steps, and
the speed-up is E / (γ · c + v). And there is always a guess: n-grams have one only where the last tokens occurred
before.

Prompts come from text that the models were not trained on. How many guesses are right depends on the kind of text:

* "held-out": Python source as it is.
* "repetitive": a passage again and again, as in edits, tables, or a model that quotes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from statistics import median
from typing import Any

from minillm.config import ModelConfig
from minillm.engine.engine import Engine
from minillm.engine.trace import StepRecord
from minillm.errors import ConfigError
from minillm.measure.bench import Quartiles, Timing, interleaved, pair_ratio
from minillm.measure.corpus import held_out_texts
from minillm.measure.roof import Roof, expected_tokens, ridge_rows, speculative_speedup
from minillm.model.tokenizer import Tokenizer
from minillm.sampling import SamplingParams
from minillm.speculative import SpecDecodingStats

TEXTS = ("held-out", "repetitive")
PASSAGE = 48  # tokens of the passage that "repetitive" repeats
CHARACTERS = 12  # of a file that are tokenized for each token wanted: several times as many as a token has


@dataclass(frozen=True)
class SpecRow:
    """One number of guesses at one batch size: times per run in seconds, and what the engine's records say."""

    num_drafts: int  # γ
    batch: int
    plain: Timing
    speculative: Timing
    stats: SpecDecodingStats
    draft_cost: float  # c: time per guess, in plain steps
    verify_cost: float  # v: time per verification, in plain steps
    coverage: float  # s: share of the decodes for which anything was guessed

    @property
    def speedup(self) -> Quartiles:
        """How many times as long it takes without guesses, round by round."""
        return pair_ratio(self.plain, self.speculative)

    @property
    def formula(self) -> float:
        """Predicted speed-up where checking is free: E(α, γ) / (γ · c + 1)."""
        return speculative_speedup(self.stats.acceptance, self.num_drafts, self.draft_cost)

    @property
    def formula_as_served(self) -> float:
        """Predicted speed-up with what a verification costs, where a share s of the decodes has guesses to verify.

        (1 + s · (E - 1)) / (1 + s · (γ · c + v - 1)), which is E / (γ · c + v) for s = 1.
        """
        gain = expected_tokens(self.stats.acceptance, self.num_drafts) - 1
        cost = self.num_drafts * self.draft_cost + self.verify_cost - 1
        return (1 + self.coverage * gain) / (1 + self.coverage * cost)

    def to_json(self) -> dict[str, Any]:
        return {
            "num_speculative_tokens": self.num_drafts,
            "batch": self.batch,
            "speedup": self.speedup._asdict(),
            "formula": self.formula,
            "formula_as_served": self.formula_as_served,
            **asdict(self.stats),
            "acceptance": self.stats.acceptance,
            "expected_tokens": expected_tokens(self.stats.acceptance, self.num_drafts),
            "draft_acceptance_rate": self.stats.draft_acceptance_rate,
            "mean_acceptance_length": self.stats.mean_acceptance_length,
            "acceptance_rate_per_pos": self.stats.acceptance_rate_per_pos,
            "coverage": self.coverage,
            "draft_cost": self.draft_cost,
            "verify_cost": self.verify_cost,
            "plain_s": self.plain.times,
            "speculative_s": self.speculative.times,
        }


def bench_prompts(tokenizer: Tokenizer, text: str, count: int, tokens: int) -> list[list[int]]:
    """`count` prompts of `tokens` tokens, each from another file that no training has seen.

    Raises `ConfigError` for a kind of text that is none of `TEXTS`, and if too few files are long enough.
    """
    if text not in TEXTS:
        raise ConfigError(f"text={text!r} is unknown. Choose one of {', '.join(map(repr, TEXTS))}.")
    files = (tokenizer.encode(one[: CHARACTERS * tokens]) for one in held_out_texts())
    beginnings = list(islice((ids[:tokens] for ids in files if len(ids) >= tokens), count))
    if len(beginnings) < count:
        raise ConfigError(
            f"Only {len(beginnings)} held-out files have {tokens} tokens, {count} are needed. Ask for fewer or shorter "
            "prompts."
        )
    if text == "held-out":
        return beginnings
    return [(ids[-PASSAGE:] * (tokens // PASSAGE + 1))[:tokens] for ids in beginnings]


def bench_spec(
    engine: Engine,
    prompts: Sequence[list[int]],
    *,
    batch: int,
    num_drafts: Sequence[int],
    max_tokens: int = 128,
    temperature: float = 0.0,
    repeats: int = 5,
) -> list[SpecRow]:
    """Serve the prompts, `batch` at once, without guesses and with each number of them, in turns; one row per number.

    The prompts' KV is in the prefix cache after the first round, which does not count: what is timed is decoding.
    Raises `ConfigError` if the engine has no proposer, for a number below 1, or if its trace does not hold a round.
    """
    if engine.proposer is None or batch < 1 or not num_drafts or min(num_drafts) < 1:
        raise ConfigError(
            f"batch={batch}, num_drafts={list(num_drafts)}, proposer {engine.proposer}: choose numbers of at least 1, "
            "and give the engine a proposer."
        )
    params = SamplingParams(temperature=temperature, max_tokens=max_tokens, ignore_eos=True)
    records: dict[int, list[StepRecord]] = {}
    groups = [prompts[start : start + batch] for start in range(0, len(prompts), batch)]
    turns = {str(count): partial(_serve, engine, groups, params, count, records) for count in (0, *num_drafts)}
    timings = interleaved(turns, repeats=repeats)
    step = median(record.run_time for record in records[0])
    return [_row(count, batch, timings, records[count], step) for count in num_drafts]


def _serve(
    engine: Engine,
    groups: Sequence[Sequence[list[int]]],
    params: SamplingParams,
    count: int,
    records: dict[int, list[StepRecord]],
) -> None:
    """Serve one group of prompts after the other with `count` guesses; keep the records of the last round only."""
    engine.trace.clear()
    names: list[str] = []
    for group in groups:
        names += [engine.add(prompt, params, num_speculative_tokens=count) for prompt in group]
        for _ in engine.run():
            pass
    records[count] = list(engine.trace)
    if not engine.trace or names[0] not in engine.trace[0].admitted:
        raise ConfigError(f"trace_bytes={engine.trace.max_bytes} do not hold all steps of a round. Choose more.")


def _row(
    count: int, batch: int, timings: dict[str, Timing], records: Sequence[StepRecord], plain_step: float
) -> SpecRow:
    checks = [record for record in records if any(part.num_drafts for part in record.requests)]
    guesses = [record.propose_time / max(part.num_drafts for part in record.requests) for record in checks]
    decodes = [part for record in records for part in record.requests if part.num_computed >= part.num_prompt]
    return SpecRow(
        num_drafts=count,
        batch=batch,
        plain=timings["0"],
        speculative=timings[str(count)],
        stats=SpecDecodingStats.of(records),
        draft_cost=median(guesses) / plain_step if guesses else 0.0,
        verify_cost=median(record.run_time for record in checks) / plain_step if checks else 1.0,
        coverage=sum(part.num_drafts > 0 for part in decodes) / max(1, len(decodes)),
    )


def crossover_batch(config: ModelConfig, element_bytes: int, roof: Roof, num_drafts: int) -> float:
    """The batch from which checking γ guesses takes time: B · (γ + 1) rows reach the ridge of the MLP's matrices.

    For short contexts and weights that are read from memory. A model that fits into the processor's cache waits for
    arithmetic from the first row on, and its crossover is lower.
    """
    return ridge_rows(config.hidden_size, config.intermediate_size, element_bytes, roof.ridge) / (num_drafts + 1)
