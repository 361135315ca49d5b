"""Fewer bits for a memory: where the levels lie that numbers are rounded to, and what that costs and buys.

Rounding is the same everywhere; what differs is who shares a range. A key is one token's row of channels, and its loud
channels are loud in every row: a range for each row is set by them, and the row's quiet channels pay.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from minillm.course.figures import style
from minillm.errors import ConfigError
from minillm.quantization.formats import Int4, spread

LEFT, RIGHT = 0.85, 1.3  # inches: for the numbers of an axis, and for the words at its end
TOP, MAP, PANEL, ERRORS, GAP = 0.65, 1.5, 1.7, 1.2, 0.5  # inches: above the map, heights of the parts, air between
NEIGHBOURS, CHANNELS = 16, 128  # channels that are magnified; more than the latter are too narrow to be drawn
LEVEL = "#b9bfc8"  # of the levels that numbers are rounded to
ALL = Int4(group=10**6)  # one range for a whole row
OWNERS = {
    "token": False,
    "channel": True,
}  # who has a range of its own: a row of the keys, or of the keys on their side
LINES = {"token": "-", "channel": "--"}
WORDS: dict[str, Any] = {"loc": "left", "size": style.NORMAL, "weight": "normal", "pad": 4}


@style.SHEET
def level_figure(keys: Tensor, *, token: int = -1, where: str = "") -> Figure:
    """Keys [tokens, channels] of one head as a map, one token's on two kinds of 16 levels, and the errors of all.

    Magnified are the quietest neighbouring channels of the token: there it matters whether a range belongs to a token
    or to a channel. `where` names the keys, for instance "layer 2, head 0". Raises ConfigError for keys that are no
    matrix, too wide to be drawn, or of an odd number of channels (two codes share a byte).
    """
    if keys.ndim != 2 or not len(keys) or keys.shape[1] not in range(2, CHANNELS + 1, 2):
        raise ConfigError(
            f"Keys of shape {list(keys.shape)} cannot be drawn. Give the keys of one head, [tokens, channels], with an "
            f"even number of channels up to {CHANNELS}."
        )
    keys, token = keys.detach().float().cpu(), token % len(keys)
    errors = {owner: (_rounded(keys, owner)[0] - keys).square().mean(0).sqrt() for owner in OWNERS}
    figure = style.new_figure(TOP + MAP + PANEL + ERRORS + 2 * GAP + 0.85)
    style.add_title(figure, _level_title(errors))
    wide, near = style.WIDTH - LEFT - RIGHT, _quietest(keys)
    _draw_map(style.add_axes(figure, left=LEFT, top=TOP, width=wide, height=MAP), keys, near, token, where)
    for place, owner in enumerate(OWNERS):
        left = LEFT + place * (wide / 2 + 0.2)
        axes = style.add_axes(figure, left=left, top=TOP + MAP + GAP, width=wide / 2 - 0.2, height=PANEL)
        _draw_levels(axes, keys, owner, near, token)
    top = TOP + MAP + PANEL + 2 * GAP + 0.35
    _draw_errors(style.add_axes(figure, left=LEFT, top=top, width=wide, height=ERRORS), errors)
    return figure


def _rounded(keys: Tensor, owner: str) -> tuple[Tensor, Tensor, Tensor]:
    """Keys as they come back, and the lower and upper end of each number's range, `[tokens, channels]` all."""
    rows = keys.mT if OWNERS[owner] else keys
    rows = torch.cat([rows, rows[:, -1:]], 1) if rows.shape[1] % 2 else rows  # codes come in pairs
    codes, low, high = ALL.encode(rows)
    found = ALL.decode(codes, low, high), *(spread(end, rows.shape[1]) for end in (low, high))
    back, bottom, top = (x.mT[: len(keys)] if OWNERS[owner] else x for x in found)
    return back, bottom, top


def _level_title(errors: dict[str, Tensor]) -> str:
    """What the errors say of the channel in the middle: what it loses if it shares its range with louder ones."""
    shared, own = (float(errors[owner].median()) for owner in ("token", "channel"))
    if shared <= 1.5 * own:  # a range of more numbers is a little wider even if no channel is loud
        return "No channel is loud here: a range for each token does as well as one for each channel"
    return f"A range for each token drowns quiet channels in loud ones: {shared / own:.1f} times the error"


def _quietest(keys: Tensor) -> range:
    """Neighbouring channels whose numbers are smallest."""
    count = min(NEIGHBOURS, keys.shape[1])
    first = int(keys.abs().mean(0).unfold(0, count, 1).mean(1).argmin())
    return range(first, first + count)


def _draw_map(axes: Axes, keys: Tensor, near: range, token: int, where: str) -> None:
    """|key|, a row per token; a frame around the numbers that are magnified below, and a scale beside the map."""
    image = axes.imshow(keys.abs().numpy(), aspect="auto", cmap="cividis", interpolation="nearest")
    axes.set_title(f"size of the keys of {len(keys)} tokens{', ' + where if where else ''}", **WORDS)
    axes.set_ylabel("token")
    frame = Rectangle((near.start - 0.5, token - 0.5), len(near), 1, fill=False, edgecolor="white", lw=1.2)
    axes.add_patch(frame)
    figure = axes.get_figure(root=True)
    assert figure is not None
    bar = style.add_axes(figure, left=style.WIDTH - RIGHT + 0.15, top=TOP, width=0.12, height=MAP)
    figure.colorbar(image, cax=bar)


def _draw_levels(axes: Axes, keys: Tensor, owner: str, near: range, token: int) -> None:
    """One token's quiet numbers as dots, the levels of each channel as dashes, a line to the nearest level."""
    row, rounded, bottom, top = (x[token, near.start : near.stop].numpy() for x in (keys, *_rounded(keys, owner)))
    channels, step = np.array(near), (top - bottom) / 15
    for index in range(16):
        axes.hlines(bottom + index * step, channels - 0.4, channels + 0.4, color=LEVEL, lw=0.8)
    axes.vlines(channels, row, rounded, color=style.INK, lw=1.4)
    axes.plot(channels, row, "o", color=style.KV_CACHE, ms=4)
    steps = " to ".join(dict.fromkeys((f"{step.min():.2g}", f"{step.max():.2g}")))
    axes.set_title(f"a range for each {owner}: steps of {steps}", **WORDS)
    axes.set_xlabel(f"channels in the frame, token {token}", size=style.SMALL)
    axes.set_ylabel("key" if owner == next(iter(OWNERS)) else "")
    edge = 1.15 * float(keys[:, near.start : near.stop].abs().max())
    axes.set_ylim(-edge or -1, edge or 1)


def _draw_errors(axes: Axes, errors: dict[str, Tensor]) -> None:
    """The rounding error in each channel, over all tokens: a line for each owner, with its name at the end."""
    for owner, error in errors.items():
        axes.plot(error.numpy(), LINES[owner], color=style.INK, lw=1.3, drawstyle="steps-mid")
    axes.set_title("rounding error in each channel, root mean square over the tokens", **WORDS)
    axes.set(xlabel="channel of the key", ylabel="error", xlim=(-0.5, len(error) - 0.5))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(0, None)
    for owner, height in zip(errors, style.apart(axes, [float(error[-1]) for error in errors.values()]), strict=True):
        axes.text(1.01, height, f"range per {owner}", transform=axes.transAxes, va="center", size=style.SMALL)
