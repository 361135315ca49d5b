"""`minillm bench spec`: guessing ahead, measured against its formula."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from minillm.cli.console import Device, Dtype, Model, Seed, Threads, number
from minillm.cli.report import JsonFile, Subject, check_file, lengths
from minillm.cli.screen import err, out
from minillm.errors import ConfigError

if TYPE_CHECKING:
    from minillm.measure.bench_spec import SpecRow


@dataclass(frozen=True)
class Case:
    """A measured row and what it was measured on."""

    proposer: str
    text: str
    adaptive: bool
    row: SpecRow

    @property
    def group(self) -> str:
        return f"{self.proposer}{', adaptive,' if self.adaptive else ''} on {self.text} text"

    @property
    def name(self) -> str:
        return f"{self.group}, γ={self.row.num_drafts}, batch {self.row.batch}"

    def to_json(self) -> dict[str, Any]:
        return {"proposer": self.proposer, "text": self.text, "adaptive": self.adaptive, **self.row.to_json()}


def spec(
    model: Model = "tiny",
    proposers: Annotated[str, typer.Option(help="ngram, draft or a model.", metavar="NAME,…")] = "ngram,draft",
    texts: Annotated[str, typer.Option(help="held-out, repetitive.", metavar="NAME,…")] = "held-out,repetitive",
    drafts: Annotated[str, typer.Option(help="γ: tokens guessed at once.", metavar="N,N,…")] = "2,4,8",
    batches: Annotated[str, typer.Option(help="Sequences side by side.", metavar="N,N,…")] = "1,8",
    prompts: Annotated[int, typer.Option(min=1, help="Prompts, each of another file.")] = 8,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 256,
    tokens: Annotated[int, typer.Option(min=2, help="New tokens of each sequence.")] = 96,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    adaptive: Annotated[bool, typer.Option(help="Also with fewer guesses after wrong ones; γ is the limit.")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds in which every γ takes a turn.")] = 5,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    seed: Seed = 0,
    json_file: JsonFile = None,
) -> None:
    """Speed-up by guessing ahead, for each proposer, text, number of guesses and batch, next to the formula."""
    from minillm.config import EngineConfig
    from minillm.engine.engine import Engine
    from minillm.measure.bench_spec import bench_prompts, bench_spec
    from minillm.model.tokenizer import load_tokenizer
    from minillm.speculative import attach

    check_file(json_file)
    sizes, counts = lengths("--batches", batches), lengths("--drafts", drafts)
    tokenizer = load_tokenizer(model)
    if tokenizer is None:
        raise ConfigError(f"{model!r} has random weights: its acceptance rates mean nothing. Choose a trained model.")
    subject = Subject.load(model, device=device, dtype=dtype, seed=seed, threads=threads)
    serve = partial(bench_spec, num_drafts=counts, max_tokens=tokens, temperature=temperature, repeats=repeats)
    cases: list[Case] = []
    with err.waiting("Preparing …") as status:
        beginnings = {text: bench_prompts(tokenizer, text, max(prompts, *sizes), prompt) for text in _names(texts)}
        for name, rule in product(_names(proposers), (False, True) if adaptive else (False,)):
            config = EngineConfig(max_num_seqs=max(sizes), adaptive_drafts=rule, seed=seed, trace_bytes=2**30)
            engine = Engine(subject.model, config)
            attach(name, engine, tokenizer, device=device, dtype=dtype, seed=seed)
            for text, batch in product(beginnings, sizes):
                status.update(f"{name} on {text} text, batch {batch} …")
                cases += [Case(name, text, rule, row) for row in serve(engine, beginnings[text], batch=batch)]
    subject.print_title()
    _print(cases, subject, counts, repeats)
    setting = {"prompts": prompts, "prompt": prompt, "tokens": tokens, "temperature": temperature, "seed": seed}
    subject.write(json_file, "spec", setting, {"rows": [case.to_json() for case in cases]})


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _print(cases: Sequence[Case], subject: Subject, counts: Sequence[int], repeats: int) -> None:
    for group in dict.fromkeys(case.group for case in cases):
        out.print(_table(group, [case.row for case in cases if case.group == group]))
    out.print(
        f"Medians (quartiles) of {repeats} rounds, pair by pair. formula: E / (γc + 1), E = (1 - α^(γ+1)) / (1 - α). "
        "served: the same, if a verification takes v and a share s of the steps has guesses. len: tokens per "
        "verification. α: share of accepted tokens among those that were checked; 1st…last: accepted by position, per "
        "cent. c, v: time of a guess and of a verification, in plain steps."
    )
    out.print(_crossovers(subject, counts))
    slower = [f"{case.name}: {number(case.row.speedup.median)}" for case in cases if case.row.speedup.median < 1]
    out.print("Slower than without: " + ("; ".join(slower) if slower else "none of these."))


def _crossovers(subject: Subject, counts: Sequence[int]) -> str:
    from minillm.measure.bench_spec import crossover_batch

    size = subject.model.dtype.itemsize
    batches = [(n, crossover_batch(subject.model.config, size, subject.roof, n)) for n in counts]
    return "Predicted batch from which checking takes time (weights from memory, short context): " + ", ".join(
        f"{number(batch)} for γ={count}" for count, batch in batches
    )


def _table(title: str, rows: Sequence[SpecRow]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE, padding=0)
    for heading in ("B", "γ", "speed-up", "formula", "served", "len", "α", "1st…last", "s", "c", "v"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        rates = [f"{100 * rate:.0f}" for rate in row.stats.acceptance_rate_per_pos] or ["–"]
        facts = (row.coverage, row.draft_cost, row.verify_cost)
        table.add_row(
            str(row.batch),
            str(row.num_drafts),
            "{1:.2f} ({0:.2f}–{2:.2f})".format(*row.speedup),
            f"{row.formula:.2f}",
            f"{row.formula_as_served:.2f}",
            f"{row.stats.mean_acceptance_length:.2f}",
            f"{row.stats.acceptance:.2f}",
            f"{rates[0]}…{rates[-1]}",
            *(f"{value:.2f}" for value in facts),
        )
    return table
