"""The roofline draws what was measured, where it belongs, and never runs two texts into each other."""

from __future__ import annotations

import random

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from minillm.costs.formulas import Bytes
from minillm.course.figures import style
from minillm.course.figures.roofline import roofline
from minillm.measure.bench import Timing
from minillm.measure.roof import Roof
from minillm.measure.roofline import Point, RooflineRun
from tests.course.figures.tidy import texts_of, untidy

ROOF = Roof(100e9, 10e9)  # ridge: 10 FLOP/byte


def point(phase: str, batch: int, context: int, intensity: float, share: float, roof: Roof = ROOF) -> Point:
    """A step of this intensity that reaches this share of the roof above it."""
    least = 1_000_000 * batch
    flops = round(intensity * least)
    seconds = flops / (share * roof.flop_rate(intensity))
    predicted = Bytes(weights=least, kv_read=context * batch * 10, kv_write=batch * 10)
    counted = predicted._replace(activations=context * 100)
    return Point(phase, batch, context, Timing((2 * seconds, seconds)), flops, least, predicted, counted)  # type: ignore[arg-type]


def run(*points: Point, roof: Roof = ROOF) -> RooflineRun:
    return RooflineRun("random:shape", "a machine", "float32", roof, 10**6, False, list(points))


def words(figure: Figure) -> list[str]:
    return [text.get_text() for text in texts_of(figure)]


def test_points_stand_where_they_were_measured() -> None:
    figure = roofline(run(point("prefill", 1, 256, 50, 0.8), point("decode", 4, 128, 2, 0.6)))
    prefill, decode = (next(line for line in figure.axes[0].lines if line.get_marker() == m) for m in "os")
    assert prefill.get_xydata()[0].tolist() == pytest.approx([50, 80e9])
    assert decode.get_xydata()[0].tolist() == pytest.approx([2, 12e9])
    assert to_hex(prefill.get_markerfacecolor()) == style.PREFILL
    assert {"256", "4"} <= set(words(figure))


def test_the_roof_is_the_measured_one() -> None:
    figure = roofline(run(point("prefill", 1, 256, 50, 0.8), point("decode", 1, 128, 1, 0.6)))
    corner = figure.axes[0].lines[0].get_xydata()[1].tolist()
    assert corner == [10, 100e9]
    assert {"100 GFLOP/s, float32", "10.0 GB/s from memory", "ridge: 10.0 FLOP/byte"} <= set(words(figure))


@pytest.mark.parametrize(
    "prompt, decode, title",
    [
        ((50, 0.8), (1, 0.6), "A long prompt waits for arithmetic, a lone decode for bytes"),
        ((5, 0.8), (1, 0.6), "A long prompt and a lone decode both wait for bytes"),
        ((50, 0.8), (1, 0.1), "A long prompt waits for arithmetic, a lone decode stays far below the roof"),
        ((50, 0.2), (1, 0.9), "A lone decode waits for bytes, a long prompt stays far below the roof"),
        ((50, 0.2), (1, 0.1), "Neither a long prompt nor a lone decode comes near the roof"),
    ],
)
def test_the_title_says_what_was_measured(prompt: tuple[float, float], decode: tuple[float, float], title: str) -> None:
    figure = roofline(run(point("prefill", 1, 256, *prompt), point("decode", 1, 128, *decode)))
    assert title in words(figure)


def test_the_ledger_is_what_was_counted() -> None:
    one = point("decode", 4, 1000, 2, 0.6)
    ledger = roofline(run(one)).axes[1]
    widths = [bar.get_width() for bars in ledger.containers for bar in bars]
    assert widths == pytest.approx([4.0, 0.04004, 0.1])  # MB of weights, KV and activations
    tick = ledger.collections[0].get_segments()[0]
    assert tick[0][0] == pytest.approx(one.predicted.total / 1e6)
    assert "decode, 4 × context 1000" in words(ledger.figure)  # type: ignore[arg-type]


def test_nothing_overlaps_whatever_is_measured() -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    for case in range(12):
        bandwidth = 10 ** rng.uniform(9, 13)
        roof = Roof(bandwidth * rng.uniform(1, 300), bandwidth)
        points = [
            point("prefill", 1, n, n * rng.uniform(0.5, 1), rng.uniform(0.02, 1), roof)
            for n in sorted(rng.sample(range(1, 4096), rng.randint(1, 5)))
        ]
        for context in rng.sample(range(16, 9999), rng.randint(0, 3)):
            points += [
                point("decode", b, context, b * rng.uniform(0.5, 1), rng.uniform(0.01, 1), roof)
                for b in rng.sample((1, 2, 4, 8, 16, 64, 256), rng.randint(1, 5))
            ]
        assert untidy(roofline(run(*points, roof=roof))) == [], f"{seed=}, {case=}"
