"""What the commands share: where they print, how numbers look, and options that mean the same everywhere."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from minillm.errors import ConfigError

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)  # progress and errors: a pipe gets results only

PREFIXES = ((12, "T"), (9, "G"), (6, "M"), (3, "k"), (0, ""), (-3, "m"), (-6, "µ"), (-9, "n"))

Model = Annotated[
    str, typer.Option(help="tiny or tiny-draft (embedded), a folder, a hub name, or random:SHAPE.", metavar="NAME")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="auto, bfloat16, float32 or float16.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; by default what PyTorch takes.")]
Seed = Annotated[int, typer.Option(help="Same seed, same result.")]


def number(value: float) -> str:
    """Three significant digits without an exponent: 0.00123, 4.56, 78.9, 12345."""
    digits = 0
    while digits < 9 and 0 < abs(value) * 10**digits < 99.95:
        digits += 1
    return f"{value:.{digits}f}"


def quantity(value: float, unit: str) -> str:
    """Three significant digits and a prefix of the SI: quantity(44.7e9, "B/s") is "44.7 GB/s"."""
    exponent, prefix = next(((e, p) for e, p in PREFIXES if abs(value) >= 10**e), (0, ""))
    return f"{number(value / 10**exponent)} {prefix}{unit}"


def facts(title: str, rows: Iterable[tuple[str, str] | tuple[str, str, str]]) -> Table:
    """A table of facts: what, how much, and what it means."""
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE, show_header=False, pad_edge=False
    )
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(style="dim")
    for row in rows:
        table.add_row(*row)
    return table


def use_threads(threads: int | None) -> None:
    """Let PyTorch compute with this many CPU threads."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def check_writable(path: Path) -> None:
    """Refuse a file that cannot be written before anybody waits for what would be in it. Raises ConfigError."""
    place = path if path.exists() else path.resolve().parent
    if path.is_dir() or not os.access(place, os.W_OK):
        raise ConfigError(f"{path} cannot be written. Choose a file in a folder that exists and that you may write to.")
