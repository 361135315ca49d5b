"""`minillm`, the command line. Each command is a thin shell around what the library does.

Nothing here imports PyTorch before a command runs, so that `--help` answers at once. Wrong input ends with one clear
message and exit code 2, a fault of ours with exit code 1 (of the grader: 3, since 1 says that checks failed); a
traceback is shown only to those who ask (`--debug`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer
from rich.panel import Panel
from rich.text import Text

from minillm.cli.bench import latency
from minillm.cli.claims import claims
from minillm.cli.console import err
from minillm.cli.doctor import doctor
from minillm.cli.kv import kv
from minillm.cli.lab import lab
from minillm.cli.roofline import roofline
from minillm.cli.scheduling import prefix, stall
from minillm.cli.serving import serve, throughput
from minillm.cli.speculation import spec
from minillm.cli.teach import teach
from minillm.cli.train import train
from minillm.cli.write import chat, demo, generate
from minillm.errors import GraderError, MinillmError

WRONG_INPUT, OUR_FAULT, GRADER_FAULT = 2, 1, 3  # of lab and teach, 1 means: not all checks passed

app = typer.Typer(
    name="minillm",
    help="An LLM inference engine small enough to read in an afternoon. Start with: minillm demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench = typer.Typer(help="Measure against a rival and against the machine, in one run.", no_args_is_help=True)
app.command()(demo)
app.command()(generate)
app.command()(chat)
app.command()(doctor)
app.add_typer(bench, name="bench")
app.command()(train)
app.command()(claims)
app.command()(roofline)
app.add_typer(lab, name="lab")
app.add_typer(teach, name="teach")
bench.command()(latency)
bench.command()(serve)
bench.command()(throughput)
bench.command()(stall)
bench.command()(prefix)
bench.command()(spec)
bench.command()(kv)


@app.callback()
def options(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="MINILLM_DEBUG", help="Show the traceback of an error.")
    ] = False,
) -> None:
    if debug:
        os.environ["MINILLM_DEBUG"] = "1"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command (by default the one of this process) and exit."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="minillm")
    except Exception as error:
        if os.environ.get("MINILLM_DEBUG"):
            raise
        if isinstance(error, MinillmError):
            _fail(str(error), GRADER_FAULT if isinstance(error, GraderError) else WRONG_INPUT)
        grades = {"lab", "teach"} & set((sys.argv[1:] if arguments is None else arguments)[:2])
        fault = f"{type(error).__name__}: {error}\nThis should not happen. minillm --debug … shows where."
        _fail(fault, GRADER_FAULT if grades else OUR_FAULT)


def _fail(message: str, code: int) -> NoReturn:
    err.print(Panel(Text(message), title="Error", title_align="left", border_style="red"))
    sys.exit(code)
