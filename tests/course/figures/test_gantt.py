"""Seats and towers are the engine's own trace: nobody sits in two places, every token is drawn once."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from minillm.course.figures import gantt as module
from minillm.course.figures import style
from minillm.course.figures.gantt import budget_figure, idle_share, seat_gantt, stays
from minillm.course.lessons.schedules import static_batch_steps
from minillm.engine.trace import StepRecord
from minillm.errors import ConfigError
from tests.course.figures.pools import add, busy_engine
from tests.course.figures.tidy import texts_of, untidy


def trace(seed: int, count: int = 8, shortest: int = 1, **changes: object) -> list[StepRecord]:
    """The steps of some requests of different lengths; blocks are scarce unless `num_blocks` says otherwise."""
    rng = random.Random(seed)
    engine = busy_engine(**({"enable_prefix_caching": False, "max_num_seqs": 3} | changes))
    for number in range(count):
        add(engine, str(number), [rng.randrange(6) for _ in range(rng.randint(1, 12))], rng.randint(shortest, 12))
    while engine.has_unfinished:
        engine.step()
    return list(engine.trace)


def check(seed: int) -> None:
    recorded = trace(seed, max_num_batched_tokens=random.Random(seed).choice([4, 16, 64]))
    found = stays(recorded)
    parts = Counter((step, p.request_id, p.phase) for step, record in enumerate(recorded) for p in record.requests)
    assert Counter((step, stay.name, phase) for stay in found for step, phase in stay.parts) == parts, f"{seed=}"
    taken = Counter((stay.seat, step) for stay in found for step in range(stay.start, stay.end))
    assert max(taken.values()) == 1, f"{seed=}: two in one seat"
    assert all(stay.seat < 3 for stay in found), f"{seed=}: as many seats as requests may run"
    assert idle_share(recorded, 3) == pytest.approx(1 - len(taken) / (3 * len(recorded))), f"{seed=}"


def test_seats_hold_everybody_once() -> None:
    start = random.randrange(2**32)
    for seed in range(start, start + 20):
        check(seed)


def test_a_static_batch_is_as_long_as_its_longest() -> None:
    recorded = trace(3, policy="static", num_blocks=200, shortest=2)
    lengths = Counter(p.request_id for record in recorded for p in record.requests)
    steps = static_batch_steps([lengths[str(number)] for number in range(8)], 3)
    assert len(recorded) == steps


def bars(figure: Figure, color: str, panel: int) -> float:
    """Area of everything of this colour in one panel."""
    axes = figure.axes[panel]
    boxes = [p for p in axes.patches if isinstance(p, Rectangle) and to_hex(p.get_facecolor()) == color]
    spans = [
        path.get_extents() for c in axes.collections if to_hex(c.get_facecolor()[0]) == color for path in c.get_paths()
    ]
    return sum(b.get_width() * b.get_height() for b in boxes) + sum(s.width * s.height for s in spans)


def phases(recorded: list[StepRecord], phase: str) -> list[int]:
    return [p.num_scheduled for record in recorded for p in record.requests if p.phase == phase]


def test_gantt_draws_every_step_of_everybody() -> None:
    runs = {"static": trace(1, policy="static", num_blocks=200), "continuous": trace(1, num_blocks=200)}
    figure = seat_gantt(runs, 3)
    for panel, recorded in enumerate(runs.values()):
        for phase, color in (("prefill", style.PREFILL), ("decode", style.DECODE)):
            assert bars(figure, color, panel) == pytest.approx(0.78 * len(phases(recorded, phase)))
    longest, shortest = (len(one) for one in runs.values())
    assert f"8 requests: {longest} steps or {shortest}" in figure.texts[0].get_text()


def test_towers_are_the_tokens_of_each_step() -> None:
    runs = {"whole": trace(2, num_blocks=200), "cut": trace(2, num_blocks=200, max_num_batched_tokens=6)}
    figure = budget_figure(runs, [512, 6])
    for panel, recorded in enumerate(runs.values()):
        for phase, color in (("prefill", style.PREFILL), ("decode", style.DECODE)):
            assert bars(figure, color, panel) == pytest.approx(0.86 * sum(phases(recorded, phase)))
    shown = [text.get_text() for text in texts_of(figure)]
    assert "budget 6" in shown and "budget 512" not in shown, "a line far above the steps is left out"
    assert "The same tokens" in figure.texts[0].get_text()


def test_the_title_counts_what_is_computed_again() -> None:
    recorded = trace(1, num_blocks=8)
    again = sum(part.num_recomputed for record in recorded for part in record.requests)
    title = budget_figure({"few blocks": recorded}, [512]).texts[0].get_text()
    assert again and f"{again} tokens are computed a second time" in title


def test_nothing_overlaps_whatever_is_recorded() -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    for case in range(6):
        budgets = rng.sample([3, 8, 30, 100], rng.randint(1, 3))
        runs = {f"budget {b}": trace(seed + case, rng.randint(1, 9), max_num_batched_tokens=b) for b in budgets}
        assert untidy(seat_gantt(runs, 3)) == [], f"{seed=}, {case=}"
        assert untidy(budget_figure(runs, budgets)) == [], f"{seed=}, {case=}"


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(ConfigError, match="without steps"):
        seat_gantt({"empty": []}, 3)
    with pytest.raises(ConfigError, match="one budget"):
        budget_figure({"one": trace(1)}, [])


@pytest.mark.parametrize("wrong", ["nobody leaves", "one seat"])
def test_the_check_notices(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = stays
    mutants = {
        "nobody leaves": lambda recorded: [
            module.Stay(s.name, number, s.parts) for number, s in enumerate(real(recorded))
        ],
        "one seat": lambda recorded: [module.Stay(s.name, 0, s.parts) for s in real(recorded)],
    }
    monkeypatch.setitem(globals(), "stays", mutants[wrong])
    with pytest.raises(AssertionError):
        for seed in range(10):
            check(seed)
