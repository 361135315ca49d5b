"""What the commands share: options that mean the same everywhere, and tables of facts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from minillm.measure.units import number as number  # here, too, for the commands
from minillm.measure.units import quantity as quantity

Model = Annotated[
    str, typer.Option(help="tiny or tiny-draft (embedded), a folder, a hub name, or random:SHAPE.", metavar="NAME")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="auto, bfloat16, float32 or float16.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; by default what PyTorch takes.")]
Seed = Annotated[int, typer.Option(help="Same seed, same result.")]


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
