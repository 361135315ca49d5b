"""`minillm bench serve` and `bench throughput`: a load on the engine, measured from the side of its clients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn
from rich.table import Table

from minillm.cli.console import Device, Dtype, Model, Seed, Threads, facts, number
from minillm.cli.report import Against, JsonFile, Subject, check_file, check_rival, lengths, spread
from minillm.cli.screen import err, out, plain, words
from minillm.cli.settings import engine_options
from minillm.config import EngineConfig

if TYPE_CHECKING:
    from minillm.engine.engine import Engine
    from minillm.measure.bench_serve import ServeRun
    from minillm.measure.bench_throughput import Throughput
    from minillm.measure.workloads import Workload

WorkloadName = Annotated[str, typer.Option(help="random, nano-vllm, shared-prefix or sharegpt-like.")]
NumPrompts = Annotated[int | None, typer.Option(help="Requests; nano-vllm has 256 by default.", show_default=False)]
InputLen = Annotated[int, typer.Option(help="Prompt tokens: random and shared-prefix.")]
OutputLen = Annotated[int, typer.Option(help="New tokens: random and shared-prefix.")]
RangeRatio = Annotated[float, typer.Option(help="Spread of both lengths, as --convention says.")]
Convention = Annotated[str, typer.Option(help="Whose ranges and arrivals: vllm or sglang.")]
PrefixLen = Annotated[int, typer.Option(help="Tokens of a system prompt: shared-prefix.")]
NumGroups = Annotated[int, typer.Option(help="Different system prompts: shared-prefix.")]
Scale = Annotated[float, typer.Option(help="Multiplies all lengths, to shrink a workload.")]
WHOLE = 2**30  # bytes of trace: all steps of any load that one waits for
SIZES = ("max_num_batched_tokens", "max_num_seqs", "cache_bytes", "kv_format", "kernels")


@engine_options("policy", "enable_prefix_caching", *SIZES)
def serve(
    model: Model = "tiny",
    workload: WorkloadName = "random",
    num_prompts: NumPrompts = None,
    input_len: InputLen = 256,
    output_len: OutputLen = 64,
    range_ratio: RangeRatio = 0.0,
    prefix_len: PrefixLen = 256,
    num_groups: NumGroups = 4,
    scale: Scale = 1.0,
    convention: Convention = "vllm",
    request_rate: Annotated[float, typer.Option(help="Requests per second; inf sends all at once.")] = math.inf,
    burstiness: Annotated[float, typer.Option(help="1 is Poisson; less comes in bursts.")] = 1.0,
    max_concurrency: Annotated[int | None, typer.Option(min=1, help="Requests in the engine at most.")] = None,
    goodput: Annotated[str, typer.Option(help="Limits in ms, such as 'ttft:500 tpot:30'.")] = "",
    percentiles: Annotated[str, typer.Option(help="Percentiles of every latency.", metavar="P,P,…")] = "99",
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    seed: Seed = 0,
    detailed: Annotated[bool, typer.Option("--detailed", help="Each request's times, in the file.")] = False,
    trace: Annotated[Path | None, typer.Option(help="Also write every step; .json for ui.perfetto.dev.")] = None,
    json_file: JsonFile = None,
    **settings: Any,
) -> None:
    """Send requests when they are due; latency and throughput in vLLM's names."""
    from minillm.measure.export import write_chrome, write_jsonl
    from minillm.measure.summary import engine_summary, parse_goodput, summarize
    from minillm.measure.workloads import Workload

    check_file(json_file)
    check_file(trace)
    limits, wanted = parse_goodput(goodput.split()), lengths("--percentiles", percentiles)
    load = Workload(
        name=workload,
        num_prompts=num_prompts or (256 if workload == "nano-vllm" else 64),
        input_len=input_len,
        output_len=output_len,
        range_ratio=range_ratio,
        prefix_len=prefix_len,
        num_groups=num_groups,
        scale=scale,
        convention=convention,
        request_rate=request_rate,
        burstiness=burstiness,
        seed=seed,
    )
    config = EngineConfig(seed=seed, trace_bytes=WHOLE if trace else EngineConfig.trace_bytes, **settings)
    subject = Subject.load(model, device=device, dtype=dtype, seed=seed, threads=threads, kernels=config.kernels)
    engine, run = _serve(subject, config, load, max_concurrency)
    result = summarize(run, goodput=limits, percentiles=wanted, detailed=detailed)
    result |= engine_summary(run) | {"kv_bytes_per_token": engine.runner.cache.bytes_per_token}
    subject.print_title()
    _print_summary(result, load, wanted)
    header = {"endpoint_type": "in-process", "backend": "minillm", "label": None, "tokenizer_id": None}
    setting = {"max_concurrency": max_concurrency, "goodput": limits, "engine": asdict(config), **load.to_json()}
    subject.write(json_file, "serve", header | setting, result)
    if trace is not None:
        write = write_jsonl if trace.suffix == ".jsonl" else write_chrome
        write(engine.trace, trace)
        out.print(
            f"Trace of {len(engine.trace)} of {len(run.steps)} steps:", plain(str(trace.resolve())), soft_wrap=True
        )


def _serve(
    subject: Subject, config: EngineConfig, load: Workload, max_concurrency: int | None
) -> tuple[Engine, ServeRun]:
    """Warm up, then serve the load with a bar on the terminal."""
    from minillm.engine.engine import Engine
    from minillm.measure.bench_serve import serve, warm_up

    engine = Engine(subject.model, config)
    requests = load.requests(subject.model.config.vocab_size)
    warm_up(engine, requests)
    columns = (words(), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with err.bar(*columns, transient=True, refresh_per_second=2) as bar:
        task = bar.add_task("Requests", total=len(requests))
        run = serve(
            engine,
            requests,
            load.due(),
            max_concurrency=max_concurrency,
            progress=lambda finished: bar.update(task, completed=finished),
        )
    return engine, run


def _print_summary(result: dict[str, Any], load: Workload, percentiles: Sequence[int]) -> None:
    rate = "all at once" if load.request_rate == math.inf else f"{number(load.request_rate)} requests/s"
    goodput = result["request_goodput"]
    rows = [
        ("workload", f"{load.name}, seed {load.seed}, convention {load.convention}, {rate}"),
        ("requests", f"{result['completed']} completed, {result['failed']} failed, {number(result['duration'])} s"),
        ("tokens", f"{result['total_input_tokens']} in, {result['total_output_tokens']} out"),
        ("throughput", f"{number(result['request_throughput'])} requests/s, {_token_rates(result)}"),
        ("goodput", "no limits given" if goodput is None else f"{number(goodput)} requests/s within all limits"),
        ("peak", f"{result['max_output_tokens_per_s']:.0f} tokens/s, {result['max_concurrent_requests']} requests"),
        ("prefix cache", f"{100 * result['prefix_hit_rate']:.1f}% of the prompt tokens found"),
        ("preemption", f"{result['num_preemptions']} times, {result['num_recomputed_tokens']} tokens computed again"),
        ("overhead", _overhead(result)),
    ]  # fmt: skip
    out.print(facts("Served", rows))
    out.print(_latency_table(result, percentiles))


def _token_rates(result: dict[str, Any]) -> str:
    return (
        f"{number(result['output_throughput'])} new tokens/s, {number(result['total_token_throughput'])} with prompts"
    )


def _overhead(result: dict[str, Any]) -> str:
    """Share of the time that is not the model: in all steps, and in a full decode step."""
    whole, decode = f"{100 * result['overhead_share']:.1f}% of all steps", result["decode_overhead"]
    if decode is None:
        return whole
    parts = ", ".join(f"{name} {100 * decode[name]:.1f}%" for name in ("schedule", "pack", "commit"))
    step = f"{number(decode['step_ms'])} ms of {decode['batch']} decodes"
    return f"{whole}; {100 * decode['overhead']:.1f}% of a step of {step} ({parts})"


def _latency_table(result: dict[str, Any], percentiles: Sequence[int]) -> Table:
    parts = ["mean", "median", "std", *(f"p{p}" for p in percentiles)]
    names = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2EL"}
    table = Table("ms", title="Latency", title_justify="left", title_style="bold", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for part in parts:
        table.add_column(part, justify="right")
    for key, name in names.items():
        table.add_row(name, *(number(result[f"{part}_{key}_ms"]) for part in parts))
    return table


@engine_options(*SIZES)
def throughput(
    model: Model = "random:smollm2-135m",
    against: Against = "",
    workload: WorkloadName = "random",
    num_prompts: NumPrompts = None,
    input_len: InputLen = 512,
    output_len: OutputLen = 128,
    range_ratio: RangeRatio = 0.0,
    scale: Scale = 1.0,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; in each, all take a turn.")] = 1,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    seed: Seed = 0,
    json_file: JsonFile = None,
    **settings: Any,
) -> None:
    """Tokens per second when all requests are there at once, by default 16 of 512 + 128 tokens."""
    from minillm.engine.engine import Engine
    from minillm.measure.bench_throughput import bench_throughput, transformers_servers
    from minillm.measure.workloads import Workload

    check_file(json_file)
    check_rival(against)
    load = Workload(
        name=workload,
        num_prompts=num_prompts or (256 if workload == "nano-vllm" else 16),
        input_len=input_len,
        output_len=output_len,
        range_ratio=range_ratio,
        scale=scale,
        seed=seed,
    )
    config = EngineConfig(seed=seed, **settings)
    subject = Subject.load(model, device=device, dtype=dtype, seed=seed, threads=threads, kernels=config.kernels)
    requests = load.requests(subject.model.config.vocab_size)
    with err.waiting("Preparing …") as status:
        sizes = {"batch_size": config.max_num_seqs, "max_tokens": config.max_num_batched_tokens}
        rivals = transformers_servers(subject.model, **sizes) if against else {}
        engine = Engine(subject.model, config)
        result = bench_throughput(
            engine, requests, rivals, repeats=repeats, progress=lambda turn: status.update(f"{turn} …")
        )
    subject.print_title()
    _print_throughput(result, load)
    setting = {"against": against, "repeats": repeats, **load.to_json(), "engine": asdict(config)}
    subject.write(json_file, "throughput", setting, result.to_json())


def _print_throughput(result: Throughput, load: Workload) -> None:
    title = f"{load.name}: {load.num_prompts} requests, {result.prompt_tokens} tokens in, {result.new_tokens} out"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True)
    for heading in ("s", "new tokens/s", "with prompts", "speed-up"):
        table.add_column(heading, justify="right")
    for name, timing in result.timings.items():
        rate = result.tokens_per_second(name)
        total = rate * (result.prompt_tokens + result.new_tokens) / result.new_tokens
        speedup = "" if name == "minillm" else f"{spread(1, result.speedup(name))}×"
        table.add_row(name, number(timing.median), number(rate), number(total), speedup)
    out.print(table)
    out.print(
        "Medians (quartiles) of the rounds, in turns. All serve the same requests with the same shape and dtype; no "
        "request ends before it has all its tokens."
    )
    out.print(f"minillm outside the model: {_overhead(result.to_json()['engine'])}.")
