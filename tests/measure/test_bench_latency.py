"""The latency bench: its arithmetic on known timings, its turns on fake subjects, and both real subjects made tiny."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

import pytest
import torch

from minillm.costs import formulas
from minillm.costs.steps import decode_step, prefill_step
from minillm.errors import ConfigError
from minillm.measure import bench_latency as module
from minillm.measure import hardware
from minillm.measure.bench import Timing
from minillm.measure.bench_latency import DECODE_STEPS, Bound, LatencyBench, LatencyRow, bench_latency
from minillm.measure.bench_subjects import MinillmSubject, TransformersSubject
from minillm.measure.hardware import Hardware
from minillm.measure.machine import Machine
from minillm.model.decoder import Decoder
from tests.families import random_model

MACHINE = Machine("cpu", "Test CPU", 1, 1, (), (("L3", 100),), 2**23, "2.6")
HARDWARE = Hardware(MACHINE, 1e9, 1e9, {"float32": 1e6, "bfloat16": 1e6}, 1e-6, "2026-01-01")


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "MATMUL_SIZES", (32,))


class Recorder:
    """A subject that only notes what it is asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []

    def prefill(self, token_ids: Sequence[int]) -> None:
        self.calls.append(("prefill", len(token_ids), sum(token_ids)))

    def decode(self, context: int, steps: int) -> None:
        self.calls.append(("decode", context, steps))


def test_a_row_compares_pairs_and_the_bound() -> None:
    timings = {"minillm": Timing((0.02, 0.04, 0.03)), "transformers": Timing((0.06, 0.08, 0.09))}
    row = LatencyRow("decode", 128, timings, Bound(400, 10, read_bandwidth=20000, matmul_rate=1e6))
    assert row.bound.seconds == 0.02
    assert row.share_of_bound() == pytest.approx(2 / 3)
    assert row.share_of_bound("transformers") == pytest.approx(0.25)
    assert row.speedup("transformers") == pytest.approx((2.5, 3, 3))  # pairs 3, 2, 3


def test_the_bound_is_the_slower_resource() -> None:
    assert Bound(1000, 10, read_bandwidth=100, matmul_rate=10).seconds == 10
    assert Bound(1000, 300, read_bandwidth=100, matmul_rate=10).seconds == 30


def test_what_fits_into_the_cache_is_not_bound_by_memory() -> None:
    bound = Bound(1000, 10, read_bandwidth=100, matmul_rate=10, cache_bytes=1000)
    assert not bound.from_memory and bound.seconds == 1


def test_json_holds_every_repeat_and_is_json() -> None:
    timings = {"minillm": Timing((0.001, 0.003)), "transformers": Timing((0.002, 0.003))}
    row = LatencyRow("prefill", 16, timings, Bound(400, 10, 20000, 1e6))
    data = json.loads(json.dumps(row.to_json()))
    assert data["subjects"]["minillm"]["times_ms"] == [1, 3]
    assert data["subjects"]["minillm"]["median_ms"] == 2
    assert data["speedup"]["transformers"]["median"] == 1.5
    assert data["bound_ms"] == 20 and data["tokens"] == 16


def test_all_subjects_get_the_same_prompt_and_the_same_turns() -> None:
    rival = Recorder()
    bench = LatencyBench(random_model(), HARDWARE, {"rival": rival}, repeats=3)
    bench.subjects["minillm"] = ours = Recorder()
    rows = list(bench_latency(bench, prompts=[7, 9], contexts=[5]))
    assert ours.calls == rival.calls
    rounds = 3 + 1
    assert [call[:2] for call in ours.calls[: 2 * rounds]] == [("prefill", 7)] * rounds + [("prefill", 9)] * rounds
    assert [call[:2] for call in ours.calls[2 * rounds :]] == [("prefill", 5)] + [("decode", 5)] * rounds
    assert {call[2] for call in ours.calls[-rounds:]} == {DECODE_STEPS}
    assert [(row.phase, row.tokens) for row in rows] == [("prefill", 7), ("prefill", 9), ("decode", 5)]


def test_tpot_is_the_time_of_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every turn takes 4 s by a fake clock: TTFT is 4 s, TPOT is 4 / DECODE_STEPS. The mutant forgets to divide."""
    monkeypatch.setattr(
        module, "interleaved", lambda turns, *, repeats, sync: {name: Timing((4.0,) * repeats) for name in turns}
    )
    bench = LatencyBench(random_model(), HARDWARE, repeats=2)
    ttft, tpot = bench_latency(bench, prompts=[6], contexts=[6])
    assert ttft.timings["minillm"].median == 4
    assert tpot.timings["minillm"].median == 4 / DECODE_STEPS
    assert tpot.bound.read_bandwidth == pytest.approx(bench.ceilings.bytes_read / 4), "peaks are not divided"


def test_bounds_are_those_of_the_formulas() -> None:
    model = random_model()
    bench = LatencyBench(model, HARDWARE, repeats=1)
    ttft, tpot = bench_latency(bench, prompts=[6], contexts=[6])
    assert ttft.bound.bytes_read == formulas.weight_bytes(model.config, 4, tokens=6)
    assert ttft.bound.flops == formulas.step_flops(model.config, prefill_step(6)).total
    lengths = [6 + step for step in range(1, DECODE_STEPS + 1)]
    mean = sum(formulas.least_bytes(model.config, decode_step(n), 4) for n in lengths) / DECODE_STEPS
    assert abs(tpot.bound.bytes_read - mean) <= formulas.kv_bytes_per_token(model.config, 4) / 2


@pytest.mark.parametrize("prompts, contexts", [([0], []), ([513], []), ([], [505]), ([4, -1], [4])])
def test_lengths_that_do_not_fit_are_refused_before_anything_runs(prompts: list[int], contexts: list[int]) -> None:
    bench = LatencyBench(random_model(), HARDWARE)
    bench.subjects["minillm"] = recorder = Recorder()
    with pytest.raises(ConfigError, match="512 positions"):
        bench_latency(bench, prompts=prompts, contexts=contexts)
    assert recorder.calls == []


@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen2", "qwen3-tied"])
def test_both_subjects_step_through_the_same_lengths(family: str) -> None:
    """After each decode both caches hold context + steps tokens, however often it is repeated."""
    model = random_model(family, sliding_window=None)
    ours, theirs = MinillmSubject(model), TransformersSubject(model.config, model.device, model.dtype)
    prompt = random.Random(0).choices(range(model.config.vocab_size), k=11)
    for subject in (ours, theirs):
        subject.prefill(prompt)
    for context, steps in ((11, 4), (11, 4), (9, 2)):
        ours.decode(context, steps)
        theirs.decode(context, steps)
        assert ours.cache.num_tokens == theirs.cache.get_seq_length() == context + steps


def test_transformers_has_the_same_shape() -> None:
    model = random_model("qwen3-tied", dtype=torch.bfloat16)
    rival = TransformersSubject(model.config, model.device, model.dtype).model
    assert rival.dtype == torch.bfloat16 and rival.config._attn_implementation == "sdpa"
    assert sum(p.numel() for p in rival.parameters()) == _hugging_face_parameters(model)


def _hugging_face_parameters(model: Decoder) -> int:
    config = model.config
    norms = config.num_layers * (2 * config.hidden_size + 2 * config.head_dim) + config.hidden_size
    return formulas.matmul_parameters(config) + norms


def test_a_whole_bench_with_a_rival() -> None:
    model = random_model()
    rivals = {"transformers": TransformersSubject(model.config, model.device, model.dtype)}
    rows = list(bench_latency(LatencyBench(model, HARDWARE, rivals, repeats=2), prompts=[8], contexts=[8]))
    assert [len(row.timings["transformers"].times) for row in rows] == [2, 2]
    assert all(row.bound.seconds > 0 and row.speedup("transformers").median > 0 for row in rows)
