"""The level figure draws the real codec's levels and errors, and its title says what they say."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from numpy.testing import assert_allclose
from torch import Tensor

from minillm.course.figures.quantization import level_figure
from minillm.errors import ConfigError
from minillm.quantization.formats import Int4
from tests.course.figures.tidy import texts_of, untidy

MAP, TOKEN, CHANNEL, BAR, ERRORS = 0, 2, 3, 1, 4  # places of the axes


def loud_keys(tokens: int = 32, channels: int = 64, loudness: float = 20.0, seed: int = 0) -> Tensor:
    """Gaussian keys, channel 3 much larger than the others."""
    keys = torch.randn(tokens, channels, generator=torch.Generator().manual_seed(seed))
    keys[:, min(3, channels - 1)] *= loudness
    return keys


def by_token(keys: Tensor) -> Tensor:
    """Keys with a range per row, as they come back from the codec."""
    codec = Int4(group=keys.shape[1])
    return codec.decode(*codec.encode(keys))


def by_channel(keys: Tensor) -> Tensor:
    """The same for an even number of rows that lie on their side."""
    return by_token(keys.mT).mT


def title(figure: Figure) -> str:
    return next(text.get_text() for text in texts_of(figure) if text.get_weight() == "bold")


def ways(figure: Figure, place: int) -> np.ndarray:
    """From each number to its nearest level: [channels, 2] heights, of the lines that stand upright."""
    (upright,) = [
        collection
        for collection in figure.axes[place].collections
        if isinstance(collection, LineCollection)
        and all(p.vertices[0][0] == p.vertices[1][0] for p in collection.get_paths())
    ]
    return np.array([path.vertices[:, 1] for path in upright.get_paths()])


def test_numbers_and_their_levels_are_the_codecs() -> None:
    keys = loud_keys()
    figure = level_figure(keys, token=5)
    shown = [int(x) for x in figure.axes[TOKEN].lines[0].get_xdata()]
    assert 3 not in shown and len(shown) == 16, "quiet neighbours are magnified"
    for place, rounded in ((TOKEN, by_token(keys)), (CHANNEL, by_channel(keys))):
        assert_allclose(ways(figure, place), torch.stack([keys[5, shown], rounded[5, shown]], 1), rtol=1e-6)


def test_errors_are_those_of_all_tokens() -> None:
    keys = loud_keys()
    lines = level_figure(keys).axes[ERRORS].lines
    for line, rounded in zip(lines, (by_token(keys), by_channel(keys)), strict=True):
        assert_allclose(line.get_ydata(), (rounded - keys).square().mean(0).sqrt(), rtol=1e-6)


def test_the_title_says_what_the_errors_say() -> None:
    assert "drowns quiet channels" in title(level_figure(loud_keys()))
    assert "No channel is loud" in title(level_figure(loud_keys(loudness=1.0)))


def test_nothing_overlaps_where_there_is_no_error() -> None:
    assert untidy(level_figure(torch.zeros(39, 106), token=22)) == []


def test_nothing_overlaps_whatever_the_keys() -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    for case in range(8):
        keys = loud_keys(rng.randint(1, 200), 2 * rng.randint(1, 64), rng.lognormvariate(1, 2), rng.randrange(99))
        keys *= rng.choice([0.0, 1e-4, 1.0, 300.0])
        figure = level_figure(keys, token=rng.randrange(len(keys)), where=rng.choice(["", "layer 27, head 13"]))
        assert untidy(figure) == [], f"{seed=}, {case=}"


@pytest.mark.parametrize("shape", [(4,), (0, 8), (4, 7), (4, 256)])
def test_what_is_no_head_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="cannot be drawn"):
        level_figure(torch.zeros(shape))
