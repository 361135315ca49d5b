"""`minillm bench kv`: what formats of the KV cache buy and cost, next to what the formulas say."""

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
    from minillm.measure.bench_kv import KvQuality, KvRow
    from minillm.model.tokenizer import Tokenizer

OWN = "model's own"  # what "auto" is called in a table


def kv(
    model: Model = "tiny",
    contexts: Annotated[str, typer.Option(help="Contexts for TPOT.", metavar="N,N,…")] = "128,512,2048",
    batch: Annotated[int, typer.Option(min=1, help="Sequences side by side.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds in which every format takes a turn.")] = 10,
    texts: Annotated[int, typer.Option(min=1, help="Pieces of held-out text for perplexity.")] = 8,
    text: Annotated[int, typer.Option(min=2, help="Tokens of each piece.")] = 1024,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    seed: Seed = 0,
    plot: Annotated[Path | None, typer.Option(help="Also draw it, to a file such as kv.png.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Capacity, bytes, TPOT and quality of each format of the KV cache."""
    from minillm.measure.bench_kv import bench_kv
    from minillm.model.tokenizer import load_tokenizer

    check_file(json_file)
    plot = check_plot(plot)
    check_file(plot and _beside(plot))
    sizes, tokenizer = lengths("--contexts", contexts), load_tokenizer(model)
    subject = Subject.load(model, device=device, dtype=dtype, seed=seed, threads=threads)
    with err.waiting("Preparing …") as status:
        rows = bench_kv(
            subject.model,
            contexts=sizes,
            batch=batch,
            repeats=repeats,
            progress=lambda what: status.update(f"{what} …"),
        )
    qualities = _qualities(model, device, tokenizer, texts, text) if tokenizer else []
    subject.print_title()
    _print_cost(rows, batch, repeats)
    _print_quality(model, qualities, texts * text)
    setting = {"batch": batch, "repeats": repeats, "texts": texts, "text": text, "seed": seed}
    results = {"rows": [row.to_json() for row in rows], "quality": [one.to_json() for one in qualities]}
    subject.write(json_file, "kv", setting, results)
    if plot is not None:
        _draw(plot, rows, qualities, batch)


def _qualities(model: str, device: str, tokenizer: Tokenizer, texts: int, text: int) -> list[KvQuality]:
    """In float32, whose rounding does not cover up what the formats do."""
    from minillm.measure.bench_kv import bench_quality
    from minillm.measure.kv_quality import held_out_rows
    from minillm.model.loader import load_model

    trained = load_model(model, device=device, dtype="float32")
    with err.waiting("Preparing …") as status:
        rows = held_out_rows(tokenizer, texts, text)
        return bench_quality(trained, rows, progress=lambda what: status.update(f"{what} …"))


def _print_cost(rows: Sequence[KvRow], batch: int, repeats: int) -> None:
    out.print(_capacity(rows))
    for index, step in enumerate(rows[0].steps):
        out.print(_steps(rows, index, f"A decode step, batch {batch}, context {step.context}"))
    out.print(
        f"Medians (quartiles) of {repeats} rounds, in turns. KV: bytes of keys and values that the step reads and "
        "writes, ranges included, counted and by formula. speed-up: of the whole step, round by round; at most: if "
        "only its bytes took time."
    )


def _capacity(rows: Sequence[KvRow]) -> Table:
    table = _table("Capacity", "bytes per token", "formula", "of own", "tokens per GB")
    for row in rows:
        share = row.allocated_bytes / rows[0].allocated_bytes
        cells = f"{row.allocated_bytes:,}", f"{row.predicted_bytes:,}", f"{share:.3f}", f"{row.tokens_per_gb:,}"
        table.add_row(_name(row.format), *cells)
    return table


def _steps(rows: Sequence[KvRow], index: int, title: str) -> Table:
    table = _table(title, "KV kB", "formula", "TPOT ms", "speed-up", "at most")
    own = rows[0].steps[index]
    for row in rows:
        step = row.steps[index]
        counted, predicted = (one.kv_read + one.kv_write for one in (step.counted, step.predicted))
        cells = [number(counted / 1e3), number(predicted / 1e3), spread(1e3, step.timing), spread(1, step.speedup)]
        table.add_row(_name(row.format), *cells, number(own.predicted.total / step.predicted.total))
    return table


def _print_quality(model: str, qualities: Sequence[KvQuality], num_tokens: int) -> None:
    """Perplexity and errors; for random weights a line that says why there are none."""
    if not qualities:
        out.print(plain(f"\nQuality is not measured: {model} has random weights, which say nothing about it."))
        return
    kinds = list(qualities[-1].errors)
    table = _table("Quality, in float32", "bits", "perplexity", "change", "KL", *kinds)
    for one in qualities:
        change = f"{100 * one.loss(qualities[0]):+.3f} %" if one.errors else "–"
        apart = f"{1e3 * one.divergence:.2f}" if one.errors else "–"
        errors = [f"{one.errors[kind]:.4f}" if one.errors else "–" for kind in kinds]
        table.add_row(_name(one.format), number(one.bits), f"{one.perplexity:.3f}", change, apart, *errors)
    out.print(table)
    out.print(
        f"Perplexity of {num_tokens:,} tokens that the model was not trained on. KL: divergence of its distributions "
        f"from the unquantised ones, thousandths of a nat per token. {', '.join(kinds)}: relative error of "
        "attention's output on such keys. per token: all channels of a head share a range."
    )


def _draw(plot: Path, rows: Sequence[KvRow], qualities: Sequence[KvQuality], batch: int) -> None:
    """What formats buy goes to the file, what they cost beside it."""
    from minillm.course.figures.formats import format_figure, quality_figure

    figures = {plot: format_figure(rows, batch=batch)}
    if qualities:
        figures[_beside(plot)] = quality_figure(qualities)
    for path, figure in figures.items():
        figure.savefig(path)
        out.print("Figure:", plain(str(path.resolve())), soft_wrap=True)


def _beside(plot: Path) -> Path:
    """Where what formats cost is drawn."""
    return plot.with_stem(f"{plot.stem}-quality")


def _name(kv_format: str) -> str:
    return OWN if kv_format == "auto" else kv_format


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("format", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table
