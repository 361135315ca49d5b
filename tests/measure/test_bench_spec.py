"""The speculation bench: its numbers against counts by hand, and its prompts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from minillm.config import EngineConfig
from minillm.engine.engine import Engine
from minillm.errors import ConfigError
from minillm.measure import bench_spec as module
from minillm.measure.bench import Timing
from minillm.measure.bench_spec import SpecRow, bench_prompts, bench_spec, crossover_batch
from minillm.measure.roof import Roof, expected_tokens
from minillm.model.tokenizer import load_tokenizer
from minillm.speculative import DraftModelProposer, NgramProposer, SpecDecodingStats
from tests.engine.test_fuzz import tiny_model

CONFIG = EngineConfig(num_blocks=60, adaptive_drafts=False)
PROMPTS = [[5, 6, 7, 8] * 4, [9, 10] * 8, [11, 12, 13]]


def row(**changes: object) -> SpecRow:
    """100 verifications of 4 guesses: 80, 60, 40, 20 accepted by position, so 80 met a rejection."""
    values: dict[str, object] = {
        "num_drafts": 4,
        "batch": 1,
        "plain": Timing((2.0, 4.0, 6.0)),
        "speculative": Timing((1.0, 1.0, 4.0)),
        "stats": SpecDecodingStats(100, 400, 200, (80, 60, 40, 20), 20),
        "draft_cost": 0.1,
        "verify_cost": 1.5,
        "coverage": 1.0,
    }
    return SpecRow(**(values | changes))  # type: ignore[arg-type]


def test_the_formula_against_numbers_by_hand() -> None:
    one = row()
    alpha = 200 / 280
    assert one.stats.acceptance == pytest.approx(alpha)
    assert one.formula == pytest.approx((1 - alpha**5) / (1 - alpha) / 1.4)
    assert one.formula_as_served == pytest.approx((1 - alpha**5) / (1 - alpha) / 1.9)
    assert one.speedup.median == 2.0, "the median of the ratios of each round: 2, 4, 1.5"
    assert one.stats.mean_acceptance_length == 3.0 and one.stats.draft_acceptance_rate == 0.5
    assert row(coverage=0.0).formula_as_served == 1, "nobody guesses: nothing changes"


def test_expected_tokens_are_those_of_the_paper() -> None:
    table = {(0.6, 3): 2.18, (0.6, 5): 2.38, (0.8, 3): 2.95, (0.8, 5): 3.69, (0.9, 5): 4.69, (0.9, 8): 6.13}
    for (alpha, drafts), want in table.items():
        assert expected_tokens(alpha, drafts) == pytest.approx(want, abs=0.005)


def test_a_target_that_drafts_for_itself_accepts_everything() -> None:
    engine = Engine(tiny_model(), CONFIG, DraftModelProposer(tiny_model(), CONFIG))
    rows = bench_spec(engine, PROMPTS, batch=2, num_drafts=[1, 3], max_tokens=13, repeats=2)
    assert [(one.num_drafts, one.batch, len(one.plain.times)) for one in rows] == [(1, 2, 2), (3, 2, 2)]
    for one in rows:
        assert one.stats.acceptance == 1 and one.coverage == 1
        assert one.stats.mean_acceptance_length == 1 + one.num_drafts, "12 tokens behind the first divide evenly"
        assert one.draft_cost > 0 and one.verify_cost > 0
        assert one.to_json()["acceptance_rate_per_pos"] == (1.0,) * one.num_drafts


def test_no_guess_in_the_plain_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    right = module._row
    monkeypatch.setattr(module, "_row", lambda *args: seen.update({args[0]: args[3]}) or right(*args))
    engine = Engine(tiny_model(), CONFIG, NgramProposer())
    (one,) = bench_spec(engine, PROMPTS, batch=3, num_drafts=[2], max_tokens=9, repeats=1)
    assert 0 < one.coverage <= 1 and one.stats.num_drafts > 0
    assert len(engine.trace) == len(seen[2]), "the last run is the one that is reported"


def test_prompts_come_from_held_out_text(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer("tiny")
    assert tokenizer is not None
    plain, repeated = (bench_prompts(tokenizer, text, 3, 200) for text in module.TEXTS)
    assert [len(ids) for ids in plain + repeated] == [200] * 6
    for ids, again in zip(plain, repeated, strict=True):
        assert again[: module.PASSAGE] == ids[-module.PASSAGE :] == again[module.PASSAGE : 2 * module.PASSAGE]
    with pytest.raises(ConfigError, match="'prose' is unknown"):
        bench_prompts(tokenizer, "prose", 3, 200)
    monkeypatch.setattr(module, "held_out_texts", lambda: ["x = 1\n" * 90, "y\n", "z = 2\n" * 90])
    with pytest.raises(ConfigError, match="2 held-out files have 50 tokens"):
        bench_prompts(tokenizer, "held-out", 3, 50)


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ConfigError, match="give the engine a proposer"):
        bench_spec(Engine(tiny_model(), CONFIG), PROMPTS, batch=1, num_drafts=[2])
    with pytest.raises(ConfigError, match="choose numbers of at least 1"):
        bench_spec(Engine(tiny_model(), CONFIG, NgramProposer()), PROMPTS, batch=1, num_drafts=[0])
    small = replace(CONFIG, trace_bytes=3000)
    with pytest.raises(ConfigError, match="trace_bytes=3000 do not hold all steps"):
        bench_spec(Engine(tiny_model(), small, NgramProposer()), PROMPTS, batch=1, num_drafts=[2], max_tokens=5)


def test_the_crossover_falls_with_the_number_of_guesses() -> None:
    config, roof = tiny_model().config, Roof(flops_per_second=100.0, bytes_per_second=10.0)
    batches = [crossover_batch(config, 4, roof, drafts) for drafts in (1, 3)]
    assert batches[0] == pytest.approx(2 * batches[1])
