"""`minillm roofline`: prefill and decode of a model under the measured roof of this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from minillm.cli.console import Device, Dtype, Model, Seed, Threads, number, quantity
from minillm.cli.report import JsonFile, Subject, check_file, lengths
from minillm.cli.screen import PICTURES, check_destination, err, out, plain

if TYPE_CHECKING:
    from minillm.measure.roofline import Point, RooflineRun


def roofline(
    model: Model = "tiny",
    prompts: Annotated[str, typer.Option(help="Prompt lengths.", metavar="N,N,…")] = "16,64,256",
    batch: Annotated[str, typer.Option(help="Sequences per decode step.", metavar="N,N,…")] = "1,4,16",
    context: Annotated[str, typer.Option(help="Tokens of each decoding sequence.", metavar="N,N,…")] = "128,1024",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; in each, every step takes a turn.")] = 5,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    seed: Seed = 0,
    plot: Annotated[Path, typer.Option(help="Where to draw it.")] = Path("roofline.png"),
    json_file: JsonFile = None,
) -> None:
    """Draw prefill, decode and batches under this machine's measured roof, with the bytes that each step moves."""
    from minillm.course.figures.roofline import roofline as draw
    from minillm.measure.roofline import measure_roofline

    check_file(json_file)
    picture = check_destination(plot, endings=PICTURES)
    lists = {
        "prompts": lengths("--prompts", prompts),
        "batches": lengths("--batch", batch),
        "contexts": lengths("--context", context),
    }
    subject = Subject.load(model, device=device, dtype=dtype, seed=seed, threads=threads)
    with err.waiting("Measuring …"):
        run = measure_roofline(subject.model, subject.hardware, name=model, repeats=repeats, **lists)
    subject.print_title()
    _print(run)
    subject.write(json_file, "roofline", {"repeats": repeats, "seed": seed, **lists}, run.to_json())
    draw(run).savefig(picture)
    out.print("Figure:", plain(str(picture.resolve())), soft_wrap=True)


def _print(run: RooflineRun) -> None:
    """Print the roof, how near to it each step is, and the bytes that each step moves."""
    roof, where = run.roof, "its cache" if run.in_cache else "memory"
    out.print(
        f"Roof: {quantity(roof.flops_per_second, 'FLOP/s')}, {quantity(roof.bytes_per_second, 'B/s')} from {where}, "
        f"ridge {number(roof.ridge)} FLOP/byte"
    )
    times = _table("Under the roof", ("best time", "FLOP/byte", "FLOP/s", "of the roof"))
    ledger = _table("Moved by one step", ("weights", "KV cache", "activations", "formula: weights + KV"))
    for point in run.points:
        name, moved, share = _name(point), point.counted, f"{100 * run.share_of_roof(point):.0f} %"
        rate = quantity(point.flop_rate, "FLOP/s")
        times.add_row(name, quantity(point.timing.best, "s"), number(point.intensity), rate, share)
        sizes = (moved.weights, moved.kv_read + moved.kv_write, moved.activations, point.predicted.total)
        ledger.add_row(name, *(quantity(size, "B") for size in sizes))
    out.print(times, ledger, sep="")


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE, pad_edge=False)
    table.add_column("step", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right")
    return table


def _name(point: Point) -> str:
    return f"prefill {point.context}" if point.phase == "prefill" else f"decode {point.batch} × {point.context}"
