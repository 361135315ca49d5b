"""`minillm bench stall` and `bench prefix`: what two ideas of the engine gain, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from minillm.cli.console import Device, Dtype, Model, Seed, Threads, number
from minillm.cli.report import JsonFile, Subject, check_file, check_plot, lengths, spread
from minillm.cli.screen import err, out, plain

if TYPE_CHECKING:
    from minillm.measure.bench_prefix import PrefixRow
    from minillm.measure.bench_stall import StallRow

Repeats = Annotated[int, typer.Option(min=1, help="Rounds in which every choice takes a turn.")]


def stall(
    model: Model = "random:smollm2-135m",
    budgets: Annotated[str, typer.Option(help="Tokens per step.", metavar="N,N,…")] = "16,24,64,512",
    running: Annotated[int, typer.Option(min=1, help="Sequences that decode.")] = 8,
    context: Annotated[int, typer.Option(min=1, help="Their prompt tokens.")] = 128,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt that arrives.")] = 2048,
    repeats: Repeats = 2,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    seed: Seed = 0,
    detailed: Annotated[bool, typer.Option("--detailed", help="Each token's time, in the file.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Also draw it, to a file such as stall.png.")] = None,
    json_file: JsonFile = None,
) -> None:
    """A long prompt arrives among running decodes: who waits, for each budget of tokens per step."""
    from minillm.course.figures.serving import stall_figure
    from minillm.measure.bench_stall import StallBench

    check_file(json_file)
    plot = check_plot(plot)
    choices = [("mixed", budget) for budget in lengths("--budgets", budgets)] + [("prefill_first", 512)]
    subject = Subject.load(model, device=device, dtype=dtype, seed=seed, threads=threads)
    bench = StallBench(subject.model, choices, num_running=running, context=context, prompt=prompt, seed=seed)
    with err.waiting("Preparing …") as status:
        rows = bench.run(repeats, lambda turn: status.update(f"{turn} …"))
    subject.print_title()
    _print_stall(rows, running, prompt, repeats)
    setting = {"running": running, "context": context, "prompt": prompt, "repeats": repeats, "seed": seed}
    bounds = [bench.bound(row, subject.roof) for row in rows]
    best = [{"bound_ttft_ms": 1e3 * ttft, "bound_itl_ms": 1e3 * gap} for ttft, gap in bounds]
    results = [row.to_json(detailed=detailed) | bound for row, bound in zip(rows, best, strict=True)]
    subject.write(json_file, "stall", setting, {"rows": results})
    if plot is not None:
        stall_figure(rows, prompt, bounds).savefig(plot)
        out.print("Figure:", plain(str(plot.resolve())), soft_wrap=True)


def _print_stall(rows: Sequence[StallRow], running: int, prompt: int, repeats: int) -> None:
    title = f"A prompt of {prompt} tokens arrives among {running} decodes; ms"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for heading in ("policy", "budget", "its TTFT", "worst ITL", "usual", "worst ÷ usual"):
        table.add_column(heading, justify="left" if heading == "policy" else "right", no_wrap=True)
    for row in rows:
        ttft, usual = (number(1e3 * row.spread(name).median) for name in ("ttft", "quiet_itl"))
        worst, ratio = spread(1e3, row.spread("worst_itl")), spread(1, row.spread("ratio"))
        table.add_row(row.policy, str(row.budget), ttft, worst, usual, ratio)
    out.print(table)
    out.print(
        f"Medians (quartiles) of {repeats} arrivals, in turns. worst ITL: the longest gap between two tokens of a "
        "running sequence during the prefill of the prompt; usual: the median gap before the prompt arrived."
    )


def prefix(
    model: Model = "random:smollm2-135m",
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 1024,
    shares: Annotated[str, typer.Option(help="Per cent that the cache knows.", metavar="N,N,…")] = "0,25,50,75,100",
    repeats: Repeats = 5,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    seed: Seed = 0,
    json_file: JsonFile = None,
) -> None:
    """TTFT by the share of a prompt that the prefix cache knows."""
    from minillm.config import EngineConfig
    from minillm.engine.engine import Engine
    from minillm.measure.bench_prefix import bench_prefix

    check_file(json_file)
    parts = [per_cent / 100 for per_cent in lengths("--shares", shares)]
    subject = Subject.load(model, device=device, dtype=dtype, seed=seed, threads=threads)
    engine = Engine(subject.model, EngineConfig(max_num_batched_tokens=prompt))
    with err.waiting("Preparing …") as status:
        rows = bench_prefix(
            engine,
            prompt=prompt,
            shares=parts,
            repeats=repeats,
            seed=seed,
            progress=lambda turn: status.update(f"{turn} …"),
        )
    subject.print_title()
    _print_prefix(rows, subject, repeats)
    setting = {"prompt": prompt, "shares": parts, "repeats": repeats, "seed": seed}
    subject.write(json_file, "prefix", setting, {"rows": [row.to_json() for row in rows]})


def _print_prefix(rows: Sequence[PrefixRow], subject: Subject, repeats: int) -> None:
    title = f"TTFT of a prompt of {rows[0].num_prompt} tokens by what the cache knows"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for heading in ("shared", "found", "TTFT ms", "of the first", "bound ms"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        bound = row.bound(subject.model.config, subject.model.dtype.itemsize, subject.roof)
        ratio = spread(1, row.share_of_time(rows[0]))
        table.add_row(str(row.num_shared), str(row.num_cached), spread(1e3, row.timing), ratio, number(1e3 * bound))
    out.print(table)
    out.print(
        f"Medians (quartiles) of {repeats} rounds, in turns. found: tokens in whole blocks that were not computed "
        "again. bound: the time for the remaining FLOPs, or bytes, at this machine's best rate."
    )
