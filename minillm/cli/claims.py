"""`minillm claims`: well-known claims about prefill and decode, tested on this machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.padding import Padding
from rich.table import Table

from minillm.cli.console import Seed, Threads, use_threads
from minillm.cli.screen import err, out, plain
from minillm.errors import ConfigError

if TYPE_CHECKING:
    from minillm.course.claims import Card
    from minillm.measure.machine import Machine

SIGNS = {"holds": ("✓", "holds", "green"), "holds when": ("◐", "holds when", "yellow"), "wrong": ("✗", "wrong", "red")}
WIDTH = 80


def claims(
    only: Annotated[str, typer.Option(help="Some of the claims, such as A7,B11; all by default.", metavar="ID,…")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the cards as JSON.")] = False,
    threads: Threads = None,
    seed: Seed = 0,
) -> None:
    """Try well-known claims about prefill and decode: prediction, measurement, verdict."""
    from minillm.course.claims import CLAIMS, Workbench

    use_threads(threads)
    ids = _chosen(only, list(CLAIMS))
    bench, cards = Workbench(seed=seed), []
    for id in ids:
        with err.waiting(f"Trying {id} …"):
            cards.append(CLAIMS[id].card(bench))
        if not as_json:
            _print(cards[-1], bench.hardware.machine if CLAIMS[id].depends_on_speed else None)
    if as_json:
        out.data([card.to_json() for card in cards])
    else:
        _print_sum(cards)


def _chosen(only: str, known: Sequence[str]) -> list[str]:
    ids = [part.strip().upper() for part in only.split(",") if part.strip()] or list(known)
    strange = [id for id in ids if id not in known]
    if strange:
        raise ConfigError(f"--only {only}: there is no claim {strange[0]}. There are A1 to A24 and B1 to B15.")
    return ids


def _print(card: Card, machine: Machine | None) -> None:
    """One card: statement, numbers, verdict; about 80 columns."""
    grid = Table.grid()
    grid.add_column(width=4, style="bold")
    grid.add_column()
    grid.add_row(card.claim.id, card.claim.says)
    grid.add_row("", plain(card.claim.formula, "dim"))
    out.print(grid, width=WIDTH)
    table = Table(box=None, pad_edge=False, header_style="dim", width=WIDTH - 4)
    table.add_column("")
    table.add_column("predicted", justify="right", no_wrap=True)
    table.add_column("measured", justify="right", no_wrap=True)
    for finding in card.findings.values():
        predicted = "" if finding.predicted is None else finding.text(finding.predicted)
        table.add_row(finding.what, predicted, finding.text(finding.measured))
    out.print(Padding(table, (0, 0, 0, 4)))
    out.print(Padding(_verdict(card), (0, 0, 0, 4)), width=WIDTH)
    if machine:
        out.print(Padding(plain(f"on this machine: {machine.name}, threads: {machine.threads}", "dim"), (0, 0, 0, 4)))
    out.print()


def _verdict(card: Card) -> Table:
    """The verdict, and where it depends on something, each case with its own."""
    sign, word, color = SIGNS[card.kind]
    grid = Table.grid(padding=(0, 1))
    grid.add_row(plain(sign, f"bold {color}"), plain(word, f"bold {color}"))
    if card.kind == "holds when":
        for name, holds in card.cases.items():
            grid.add_row("✓" if holds else "✗", name)
    if card.kind != "holds":
        grid.add_row("→", card.claim.otherwise)
    return grid


def _print_sum(cards: Sequence[Card]) -> None:
    kinds = Counter(card.kind for card in cards)
    counts = f"Hold: {kinds['holds']}, under a condition: {kinds['holds when']}, wrong: {kinds['wrong']}."
    out.print(plain(f"{len(cards)} claims. ", "bold") + plain(counts), width=WIDTH)
