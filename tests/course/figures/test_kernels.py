"""Programs lie where they computed, parts are as wide as their keys, speeds are those of the recorded file."""

from __future__ import annotations

import json
import random
from math import log
from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.testing import assert_allclose

from minillm.course.figures import style
from minillm.course.figures.kernels import Part, Program, kernel_speed, merge_tree, program_grid
from minillm.errors import ConfigError
from tests.course.figures.tidy import texts_of, untidy

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"


def programs(heads: int, tiles: int, rows: int = 8, keys: int = 8) -> list[Program]:
    """A causal launch."""
    return [
        Program(
            tile,
            head,
            range(tile * rows, (tile + 1) * rows),
            [range(i * keys, (i + 1) * keys) for i in range(tile + 1)],
        )
        for head in range(heads)
        for tile in range(tiles)
    ]


def words(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in texts_of(figure))


def test_a_program_is_a_band_of_its_tiles() -> None:
    figure = program_grid(programs(2, 3))
    assert len(figure.axes) == 2
    drawn = {(p.get_x(), p.get_y(), p.get_width(), p.get_height()) for p in figure.axes[1].patches}
    assert drawn == {(8 * key, 8 * tile, 8, 8) for tile in range(3) for key in range(tile + 1)}
    assert "6 programs, one for each tile of queries and head; each loops over 1 to 3 tiles of keys" in words(figure)


@pytest.mark.parametrize("heads", [0, 5])
def test_a_launch_that_has_no_room_is_refused(heads: int) -> None:
    with pytest.raises(ConfigError, match="1 to 4"):
        program_grid(programs(heads, 2))


def joined(one: Part, other: Part) -> Part:
    largest = max(one.lse, other.lse)
    total = largest + log(2.718281828459045 ** (one.lse - largest) + 2.718281828459045 ** (other.lse - largest))
    return Part(range(one.keys.start, other.keys.stop), total)


def merged(leaves: list[Part]) -> list[list[Part]]:
    levels = [leaves]
    while len(levels[-1]) > 1:
        row = levels[-1]
        levels.append([joined(*pair) for pair in zip(row[::2], row[1::2], strict=True)])
    return levels


def test_parts_are_as_wide_as_their_keys_and_filled_by_their_share() -> None:
    levels = merged([Part(range(0, 10), log(1.0)), Part(range(10, 40), log(3.0))])
    figure = merge_tree(levels)
    filled = [
        p for p in figure.axes[0].patches if to_hex(p.get_facecolor()) == style.DECODE and isinstance(p, Rectangle)
    ]
    assert [(p.get_x(), p.get_width()) for p in filled] == [(0, 10), (10, 30)]
    assert_allclose([p.get_height() for p in filled], [0.25, 0.75])
    assert "25 %" in words(figure) and "1.10: 75 %" in words(figure) and "1.39: 100 %" in words(figure)


def test_an_unfinished_merge_is_refused() -> None:
    with pytest.raises(ConfigError, match="one part"):
        merge_tree([[Part(range(0, 4), 0.0), Part(range(4, 8), 0.0)]])


def row(phase: str, tokens: int, **speeds: tuple[float, float]) -> dict[str, Any]:
    """A recorded row: for each candidate its median in seconds and its speed."""
    field = {"prefill": "flop_per_s", "decode": "byte_per_s"}[phase]
    results = {name: {"seconds": [0.9 * s, s, 1.1 * s], field: v} for name, (s, v) in speeds.items()}
    return {"phase": phase, "tokens": tokens, "candidates": results}


def test_speeds_are_the_recorded_ones() -> None:
    rows = [row("decode", 4096, ours=(4e-3, 8e9)), row("decode", 1024, ours=(2e-3, 5e9))]
    figure = kernel_speed(rows, 32e9, "some machine, 2026-01-01")
    times, speeds = (axes.containers[0].lines[0].get_xydata() for axes in figure.axes)
    assert_allclose(times, [(1024, 2e-3), (4096, 4e-3)])
    assert_allclose(speeds, [(1024, 5e9), (4096, 8e9)])
    (bound,) = (line for line in figure.axes[0].lines if line.get_marker() == "None" and len(line.get_xdata()) == 2)
    assert_allclose(bound.get_xydata(), [(1024, 5e9 * 2e-3 / 32e9), (4096, 8e9 * 4e-3 / 32e9)])
    assert "decode at context 4,096 reaches 25% of the machine's B/s" in words(figure)
    assert "recorded: some machine, 2026-01-01" in words(figure) and "at best 32.0 GB/s" in words(figure)


@pytest.mark.parametrize("rows", [[], [row("decode", 1, a=(1.0, 1.0)), row("prefill", 1, a=(1.0, 1.0))]])
def test_phases_do_not_mix(rows: list[dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match="phases"):
        kernel_speed(rows, 1.0, "here")


@pytest.mark.parametrize("path", sorted(RESULTS.glob("attention-*.json")), ids=lambda path: path.stem)
def test_every_recorded_result_can_be_drawn(path: Path) -> None:
    record = json.loads(path.read_text())
    hardware = record["hardware"]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for one in record["rows"]:
        groups.setdefault(tuple(one.get(k) for k in ("phase", "dtype", "shape", "batch", "blocks")), []).append(one)
    for (phase, dtype, *_), rows in groups.items():
        ceiling = hardware["matmul_rate"][dtype] if phase == "prefill" else hardware["read_bandwidth"]
        assert untidy(kernel_speed(rows, ceiling, f"{hardware['machine']['name']}, {record['date']}")) == []


def test_nothing_overlaps_whatever_is_drawn() -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    for case in range(6):
        figures = [program_grid(programs(rng.randint(1, 4), rng.randint(1, 12)))]
        cuts = sorted(rng.sample(range(1, 4000), 2 ** rng.randint(1, 4) - 1))
        ranges = [range(a, b) for a, b in zip([0, *cuts], [*cuts, 4000], strict=True)]
        figures.append(merge_tree(merged([Part(keys, rng.uniform(-5, 9)) for keys in ranges])))
        names = rng.sample(["triton", "flash", "cudnn", "naive"], rng.randint(1, 3))
        rows = [
            row(
                "prefill", 512 * 2**i, **{name: (10 ** rng.uniform(-5, 1), 10 ** rng.uniform(10, 15)) for name in names}
            )
            for i in range(rng.randint(1, 7))
        ]
        figures.append(kernel_speed(rows, 10 ** rng.uniform(13, 15), "a machine, 2026-01-01"))
        assert [untidy(figure) for figure in figures] == [[]] * 3, f"{seed=}, {case=}"
