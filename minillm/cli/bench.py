"""`minillm bench …`: measurements against a rival and against the machine, in one run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from minillm.cli.console import Device, Dtype, Model, Seed, Threads, number, quantity, use_threads
from minillm.cli.report import Against, JsonFile, check_file, check_rival, lengths, spread, write_report
from minillm.cli.screen import err, out, plain
from minillm.cli.settings import engine_options
from minillm.config import EngineConfig

if TYPE_CHECKING:
    from minillm.measure.bench_latency import LatencyRow
    from minillm.measure.hardware import Hardware
    from minillm.model.decoder import Decoder


@engine_options("kernels")
def latency(
    model: Model = "tiny",
    against: Against = "",
    prompts: Annotated[str, typer.Option(help="Prompt lengths for TTFT.", metavar="N,N,…")] = "128,512",
    contexts: Annotated[str, typer.Option(help="Contexts for TPOT.", metavar="N,N,…")] = "128,1024",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; in each, all take a turn.")] = 10,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    seed: Seed = 0,
    json_file: JsonFile = None,
    **settings: Any,
) -> None:
    """Time to first token and time per output token of one sequence, next to what the machine allows."""
    from minillm.measure.hardware import dtype_name
    from minillm.model.loader import load_model

    use_threads(threads)
    prompt_lengths, context_lengths = lengths("--prompts", prompts), lengths("--contexts", contexts)
    check_rival(against)
    check_file(json_file)
    kernels = EngineConfig(**settings).kernels
    decoder = load_model(model, device=device, dtype=dtype, seed=seed, kernels=kernels)
    rows, hardware = _measure(decoder, against, prompt_lengths, context_lengths, repeats=repeats, seed=seed)
    dtype = dtype_name(decoder.dtype)
    _print(rows, f"{model}, {dtype}, threads: {hardware.machine.threads}, {hardware.machine.name}", repeats)
    if json_file is not None:
        setting = {"model_id": model, "against": against, "repeats": repeats, "seed": seed, "dtype": dtype}
        setting |= {"kernels": kernels}
        write_report(json_file, "latency", setting, hardware, {"rows": [row.to_json() for row in rows]})


def _measure(
    model: Decoder, against: str, prompts: list[int], contexts: list[int], *, repeats: int, seed: int
) -> tuple[list[LatencyRow], Hardware]:
    """All rows, with a line on the terminal that shows the progress."""
    from minillm.measure.bench_latency import LatencyBench, bench_latency
    from minillm.measure.bench_subjects import TransformersSubject
    from minillm.measure.hardware import measure_hardware

    rows: list[LatencyRow] = []
    with err.waiting("Measuring the machine …") as status:
        hardware = measure_hardware(str(model.device))
        status.update(f"Preparing {against or 'the run'} …")
        rivals = {against: TransformersSubject(model.config, model.device, model.dtype)} if against else {}
        bench = LatencyBench(model, hardware, rivals, repeats=repeats, seed=seed)
        for row in bench_latency(bench, prompts=prompts, contexts=contexts):
            rows.append(row)
            status.update(f"{len(rows)} of {len(prompts) + len(contexts)} done, last {row.phase} {row.tokens} …")
    return rows, hardware


def _print(rows: Sequence[LatencyRow], subject: str, repeats: int) -> None:
    out.print(plain(subject, style="bold"))
    for phase, title in (("prefill", "Prefill: TTFT by prompt length, ms"), ("decode", "Decode: TPOT by context, ms")):
        if selected := [row for row in rows if row.phase == phase]:
            out.print(_table(title, selected))
    out.print(_legend(rows, repeats))


def _legend(rows: Sequence[LatencyRow], repeats: int) -> str:
    """How to read the tables, with the peaks that the bounds are computed from."""
    read = max((row.bound.read_bandwidth for row in rows), default=0.0)
    rate = max((row.bound.matmul_rate for row in rows), default=0.0)
    in_cache = "" if all(row.bound.from_memory for row in rows) else " *: fits into the cache, so only FLOPs count."
    return (
        f"Medians (quartiles) of {repeats} rounds, in turns; speed-up: round by round. bound: the time to read all "
        f"bytes, or to compute all FLOPs, at the best rate of the same rounds: up to {quantity(read, 'B/s')} and "
        f"{quantity(rate, 'FLOP/s')}; reached: bound ÷ median.{in_cache}"
    )


def _table(title: str, rows: Sequence[LatencyRow]) -> Table:
    rivals = [name for name in rows[0].timings if name != "minillm"]
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE, padding=0)
    for heading in (
        "tokens",
        "minillm",
        *(column for rival in rivals for column in (rival, "speed-up")),
        "bound",
        "reached",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        cells = [str(row.tokens), spread(1e3, row.timings["minillm"])]
        for rival in rivals:
            cells += [spread(1e3, row.timings[rival]), spread(1, row.speedup(rival))]
        bound = number(1e3 * row.bound.seconds) + ("" if row.bound.from_memory else "*")
        table.add_row(*cells, bound, f"{number(100 * row.share_of_bound())}%")
    return table
