"""The tree is the blocks' own: who comes after whom, how many hold it; the line of hits is what was measured."""

from __future__ import annotations

import random
import re
from itertools import pairwise

import pytest
from matplotlib.figure import Figure
from numpy.testing import assert_allclose

from minillm.course.figures import prefix as module
from minillm.course.figures.prefix import Tree, hit_figure, prefix_trees
from minillm.errors import ConfigError
from minillm.measure.bench import Timing
from minillm.measure.bench_prefix import PrefixRow
from tests.course.figures.pools import add, busy_engine, forked, shot, story
from tests.course.figures.tidy import texts_of, untidy


def spell(tokens: object) -> str:
    return " ".join(map(str, tokens))  # type: ignore[call-overload]


def words(figure: Figure) -> list[str]:
    return [text.get_text() for text in texts_of(figure)]


def check_tree() -> None:
    for now in story()[0]:
        tree = Tree.of(now)
        assert set(tree.place) == set(now.known) | {b for table in now.tables.values() for b in table}
        for table in now.tables.values():
            assert [tree.place[block][0] for block in table] == list(range(len(table))), "a column is a logical block"
            for parent, child in pairwise(table):
                assert child in tree.children[parent]
        for block, (parent, _) in now.known.items():
            assert not parent or tree.place[block][0] == tree.place[parent][0] + 1
        assert len(set(tree.place.values())) == len(tree.place), "no two blocks in one place"


def test_the_tree_is_the_tables_and_the_names() -> None:
    check_tree()


def test_boxes_say_what_they_hold_and_how_many_hold_them() -> None:
    shots, captions = story()
    figure = prefix_trees(shots[1:2], captions[1:2], spell)
    boxes = {int(m[2]): (m[1], int(m[3])) for m in (re.match(r"(.*)\n(\d+): ×(\d+)$", w) for w in words(figure)) if m}
    assert {block: count for block, (_, count) in boxes.items()} == {b: shots[1].ref_counts[b] for b in boxes}
    first = shots[1].tables["A"][0]
    assert boxes[first] == ("1 2 3 4", 2)
    assert {"A", "B", "C"} <= set(words(figure)), "each name stands where its table ends"


def test_the_title_counts_what_sharing_saves() -> None:
    shots, captions = story()
    entries = sum(len(table) for table in shots[1].tables.values())
    assert (
        f"{shots[1].num_held} blocks do the work of {entries}"
        in prefix_trees(shots, captions, spell).texts[0].get_text()
    )


def test_the_title_says_where_nothing_is_shared() -> None:
    shots, captions = story()
    first, last = (prefix_trees([shots[i]], [captions[i]], spell).texts for i in (0, -1))
    assert first[0].get_text() == "Each block is held by one table" and "bold" not in first[1].get_text()
    assert last[0].get_text().startswith("Nobody holds a block")


def test_a_copy_is_bold() -> None:
    figure = prefix_trees(forked(3), ["read once", "three go on"], spell)
    bold = [patch for patch in figure.axes[1].patches if patch.get_linewidth() == 1.8]
    assert len(bold) == 2, "one of the three keeps the block, two copy it"
    assert not [patch for patch in figure.axes[0].patches if patch.get_linewidth() == 1.8]


def rows(seed: int) -> list[PrefixRow]:
    rng = random.Random(seed)
    cold = rng.lognormvariate(-3, 1)
    shares = sorted({0.0, *(rng.random() for _ in range(rng.randint(1, 5))), 1.0})
    return [
        PrefixRow(512, round(512 * s), min(511, round(512 * s) // 16 * 16),
                  Timing(tuple(cold * (1.05 - s) * rng.uniform(0.9, 1.2) for _ in range(5))))
        for s in shares
    ]  # fmt: skip


def test_points_are_shares_of_the_cold_time() -> None:
    measured = rows(1)
    axes = hit_figure(measured).axes[0]
    points = [container.lines[0].get_xydata()[0] for container in axes.containers]
    expected = [(100 * r.num_cached / 512, 100 * r.share_of_time(measured[0]).median) for r in measured]
    assert_allclose(points, expected)
    assert_allclose(axes.lines[0].get_xydata(), [(0, 100), (100, 0)])


def test_nothing_overlaps_whatever_is_recorded() -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    for case in range(6):
        engine, shots = busy_engine(num_blocks=rng.choice([15, 31])), []
        for name in "ABCDE"[: rng.randint(1, 5)]:
            add(
                engine,
                name,
                [rng.randrange(2) for _ in range(rng.randint(1, 16))],
                rng.randint(1, 9),
                rng.randint(1, 3),
            )
            engine.step()
            shots.append(shot(engine))
        shots = [one for one in shots if one.known or one.tables] or story()[0]
        figure = prefix_trees(shots, [f"step {i}" for i in range(len(shots))], spell)
        assert untidy(figure) == [], f"{seed=}, {case=}"
        assert untidy(hit_figure(rows(seed + case)[:: len(rows(seed + case)) - 1])) == [], f"{seed=}, {case=}"


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(ConfigError, match="captions"):
        prefix_trees(story()[0], ["one"], spell)
    with pytest.raises(ConfigError, match="knows one"):
        prefix_trees([shot(busy_engine())], ["empty"], spell)
    with pytest.raises(ConfigError, match=r"share 0\.0"):
        hit_figure(rows(2)[1:])


@pytest.mark.parametrize("wrong", ["flat", "tables only"])
def test_the_check_notices(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutants: everybody is a first block; what is only remembered is left out."""
    real = Tree.of
    if wrong == "flat":
        monkeypatch.setattr(module, "pairwise", lambda path: [(module.ROOT, block) for block in path[1:]])
    else:
        monkeypatch.setattr(Tree, "of", lambda s: real(type(s)(**(vars(s) | {"known": {}}))))
    with pytest.raises((AssertionError, KeyError)):
        check_tree()
