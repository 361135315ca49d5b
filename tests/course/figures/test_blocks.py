"""The block map draws the allocator's tables: every cell where it belongs, filled as far as it holds tokens."""

from __future__ import annotations

import random

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle

from minillm.course.figures import blocks as module
from minillm.course.figures.blocks import INSET, block_map, owner_color, pool_strip
from minillm.errors import ConfigError
from tests.course.figures.pools import add, busy_engine, forked, shot, story
from tests.course.figures.tidy import texts_of, untidy


def words(figure: Figure) -> list[str]:
    return [text.get_text() for text in texts_of(figure)]


def cells(figure: Figure, color: str, row: float) -> dict[int, float]:
    """Column of each cell of this colour in one row, and the share of it that is coloured."""
    boxes = [p for p in figure.axes[0].patches if isinstance(p, Rectangle) and to_hex(p.get_facecolor()) == color]
    return {
        round(box.get_x() - INSET): box.get_width() / (1 - 2 * INSET)
        for box in boxes
        if abs(box.get_y() - row) < 1e-9 and box.get_width() > 0
    }


def check_map() -> None:
    now = story()[0][1]
    figure = block_map(now)
    lines = [p.get_path().vertices for p in figure.axes[0].patches if isinstance(p, PathPatch)]
    ends = sorted((round(line[-1][0] + 0.5), round(line[0][0] - 0.5)) for line in lines)
    entries = sorted(block for table in now.tables.values() for block in table)
    assert [block for block, _ in ends] == entries, "each table entry has a line to its block"
    for name in now.tables:
        own = [block for block in now.tables[name] if now.ref_counts[block] == 1]
        shares = cells(figure, owner_color(name), 0)
        for block in own:
            logical = now.tables[name].index(block)
            assert shares[block - 1] == pytest.approx(now.filled(name, logical) / now.block_size)
    shared = [block for block in range(1, 21) if now.ref_counts[block] == 2]
    assert len(shared) == 2 and words(figure).count("×2") == 2
    assert (
        f"{now.num_held} of 20 blocks of 4 tokens are held, {4 * now.num_held} places. Empty: {now.waste},"
        in " ".join(words(figure))
    )


def test_the_map_is_the_tables() -> None:
    check_map()


def test_a_strip_shows_who_holds_what_and_what_is_new() -> None:
    shots, captions = story()
    figure = pool_strip(shots, captions)
    shown = words(figure)
    assert set(captions) <= set(shown)
    for now in shots:
        assert f"{now.num_held} held,\n{now.waste} place{'s' * (now.waste != 1)} empty" in shown
    bold = [p for p in figure.axes[0].patches if p.get_linewidth() == 1.6]
    assert {round(p.get_y()) for p in bold} <= {1, 2, 3}, "nothing is new in the first row"
    new = [b for b in range(1, 21) if not set(shots[1].places(b)) <= set(shots[0].places(b))]
    assert sorted(round(p.get_x() - INSET) + 1 for p in bold if round(p.get_y()) == 1) == new
    assert "none ever moves" in figure.texts[0].get_text()


def test_the_title_sees_a_block_that_moves() -> None:
    strip = pool_strip(forked(2), ["forked", "copied"])
    assert "some move" in strip.texts[0].get_text(), "copy-on-write replaces a block"


def test_nothing_overlaps_whatever_happens() -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    for case in range(3):
        engine, shots = busy_engine(num_blocks=rng.choice([9, 21, 31])), []
        for name in "ABCDEFGH"[: rng.randint(1, 8)]:
            add(engine, name, [rng.randrange(4) for _ in range(rng.randint(1, 16))], rng.randint(1, 12))
            engine.step()
            shots.append(shot(engine))
        shots = shots[:5]
        assert untidy(pool_strip(shots, [f"step {i}" for i in range(len(shots))])) == [], f"{seed=}, {case=}"
        for now in [one for one in shots if one.tables][-1:]:
            assert untidy(block_map(now)) == [], f"{seed=}, {case=}"


def test_nothing_to_draw_is_refused() -> None:
    shots, captions = story()
    with pytest.raises(ConfigError, match="Nobody holds"):
        block_map(shots[-1])
    with pytest.raises(ConfigError, match="captions"):
        pool_strip(shots, captions[:2])
    with pytest.raises(ConfigError, match="snapshot"):
        pool_strip([], [])


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("_logical_places", lambda s: [(i, n, 0) for i, n in enumerate(s.tables)]),
        ("_connect", lambda axes, start, end, color: None),
        ("draw_block", lambda axes, box, snapshot, block, new=False: None),
    ],
)
def test_the_check_notices(name: str, wrong: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutants: only first blocks are drawn; no lines; an empty pool."""
    monkeypatch.setattr(module, name, wrong)
    with pytest.raises((AssertionError, KeyError)):
        check_map()
