"""The dashboard shows the load that was recorded: every step of every request, every block, every percentile."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from minillm.config import ModelConfig
from minillm.costs.formulas import least_bytes, step_flops
from minillm.course.figures import style
from minillm.course.figures.dashboard import load_dashboard, parts_by_request, step_points
from minillm.engine.trace import StepRecord
from minillm.errors import ConfigError
from minillm.measure.roof import Roof
from minillm.measure.units import quantity
from minillm.outputs import RequestMetrics
from minillm.shapes import named_shape
from tests.course.figures.pools import add, busy_engine
from tests.course.figures.tidy import texts_of, untidy

CONFIG: ModelConfig = named_shape("llama-3.1-8b")
ROOF = Roof(1e11, 2e10)


def load(seed: int, num_blocks: int = 9) -> tuple[list[StepRecord], list[RequestMetrics]]:
    """Requests of different lengths on few blocks; the clock counts made-up seconds, so that times are known."""
    rng = random.Random(seed)
    engine = busy_engine(enable_prefix_caching=False, num_blocks=num_blocks, max_num_batched_tokens=8)
    metrics = {str(number): RequestMetrics(0.0, [[]]) for number in range(7)}
    for name in metrics:
        add(engine, name, [rng.randrange(6) for _ in range(rng.randint(1, 8))], rng.randint(6, 16))
    clock = 0.0
    while engine.has_unfinished:
        clock += rng.uniform(0.01, 0.1)
        for event in engine.step():
            metrics[event.request.request_id].token_times[0] += [clock] * len(event.token_ids)
    return [replace(record, run_time=rng.uniform(0.01, 0.1)) for record in engine.trace], list(metrics.values())


def draw(trace: list[StepRecord], metrics: list[RequestMetrics], num_blocks: int = 8) -> Figure:
    return load_dashboard(trace, metrics, config=CONFIG, num_blocks=num_blocks, roof=ROOF)


def spans(figure: Figure, color: str) -> set[tuple[int, int]]:
    """(row, step) of every cell of this colour in the upper panel."""
    found = set()
    for cells in figure.axes[0].collections:
        if to_hex(cells.get_facecolor()[0]) == color:
            boxes = [path.get_extents() for path in cells.get_paths()]
            found |= {(int(box.y0), round(box.x0)) for box in boxes}
    return found


def check(seed: int) -> None:
    trace, metrics = load(seed)
    figure = draw(trace, metrics)
    names = list(parts_by_request(trace))
    for phases, color in ((("prefill", "recompute"), style.PREFILL), (("decode",), style.DECODE)):
        want = {
            (names.index(part.request_id), step)
            for step, record in enumerate(trace)
            for part in record.requests
            if part.phase in phases
        }
        assert spans(figure, color) == want, f"{seed=} {phases}"
    held = [8 - record.num_free_blocks for record in trace]
    outline = figure.axes[1].patches[0].get_path().vertices[1:-1:2, 1]
    assert set(held) == {int(height) for height in outline} - ({0} - set(held)), f"{seed=}"
    gaps = [later - earlier for one in metrics for earlier, later in pairwise(one.token_times[0])]
    first = [one.token_times[0][0] for one in metrics]
    want_texts = [quantity(float(np.percentile(some, p)), "s") for some in (first, gaps) for p in (50, 90, 99)]
    assert [text.get_text() for text in figure.axes[3].texts] == want_texts, f"{seed=}"
    assert untidy(figure) == [], f"{seed=}"


def test_all_panels_show_the_recorded_load() -> None:
    start = random.randrange(2**32)
    for seed in range(start, start + 4):
        check(seed)


def test_a_step_is_its_flops_over_its_bytes_and_its_time() -> None:
    trace, metrics = load(5)
    points = list(step_points(trace, CONFIG, 4))
    for record, (intensity, rate, prompt) in zip(trace, points, strict=True):
        step = [(part.num_scheduled, part.num_computed + part.num_scheduled) for part in record.requests]
        flops = step_flops(CONFIG, step).total
        assert intensity == pytest.approx(flops / least_bytes(CONFIG, step, 4))
        assert rate == pytest.approx(flops / record.run_time)
        assert prompt == any(part.num_computed < part.num_prompt or part.num_recomputed for part in record.requests)
    drawn = [line for line in draw(trace, metrics).axes[2].lines if line.get_linestyle() == "None"]
    assert sorted(x for line in drawn for x in line.get_xdata()) == sorted(x for x, _, _ in points)


def test_who_was_preempted_is_marked_and_counted() -> None:
    trace, metrics = load(5)
    lost = {name for record in trace for name in record.preempted}
    figure = draw(trace, metrics)
    steps = [step + 0.5 for step, record in enumerate(trace) if record.preempted]
    assert lost and list(figure.axes[1].lines[-1].get_xdata()) == steps
    assert any(f"{len(lost)} lost their blocks" in text.get_text() for text in texts_of(figure))
    plenty, times = load(5, num_blocks=60)
    assert any("nobody lost a block" in text.get_text() for text in texts_of(draw(plenty, times, 59)))


def test_nothing_recorded_is_refused() -> None:
    trace, metrics = load(5)
    with pytest.raises(ConfigError, match="0 steps"):
        draw([], metrics)
    with pytest.raises(ConfigError, match="0 gaps"):
        draw(trace, [RequestMetrics(0.0, [[1.0]])])


def test_mutants_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutants: prompts left out of the rows; another percentile than the one that stands beside it."""
    monkeypatch.setattr("minillm.course.figures.dashboard.parts_by_request", _without_prompts)
    with pytest.raises(AssertionError):
        check(5)
    monkeypatch.undo()
    monkeypatch.setattr("minillm.course.figures.dashboard.PERCENTILES", (50, 90, 95))
    with pytest.raises(AssertionError):
        check(5)


def _without_prompts(trace: list[StepRecord]) -> dict[str, list[tuple[int, str]]]:
    parts = parts_by_request(trace)
    return {name: [one for one in some if one[1] == "decode"] for name, some in parts.items()}
