"""`minillm`, the command line. Each command is a thin shell around what the library does.

Nothing here imports PyTorch before a command runs, so that `--help` answers at once. Wrong input ends with one clear
message and exit code 2. What the machine refuses (a full disk, a folder without permission) and a fault of ours end
with exit code 1; where somebody is graded, 1 says that not all checks passed, and a fault of ours is 3. Who closes the
pipe that we write to, as `| head` does, gets no message and 141, as from other tools. A traceback is shown only to
those who ask (`--debug`).
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, NoReturn

import typer
from rich.panel import Panel

from minillm.cli.bench import latency
from minillm.cli.claims import claims
from minillm.cli.doctor import doctor
from minillm.cli.kv import kv
from minillm.cli.lab import lab
from minillm.cli.roofline import roofline
from minillm.cli.scheduling import prefix, stall
from minillm.cli.screen import Commands, err, plain
from minillm.cli.serving import serve, throughput
from minillm.cli.speculation import spec
from minillm.cli.teach import teach
from minillm.cli.train import train
from minillm.cli.write import chat, demo, generate
from minillm.course.errors import GraderError
from minillm.errors import MinillmError

WRONG_INPUT, OUR_FAULT, GRADER_FAULT = 2, 1, 3  # of lab and teach, 1 means: not all checks passed
READER_GONE = 141  # 128 and the number of SIGPIPE: how a shell says it of any tool
ADVICE = {
    **dict.fromkeys((errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)), "Make room, then run it again."),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "Choose a place that you may write to."),
}

app = Commands(
    name="minillm",
    help="An LLM inference engine small enough to read in an afternoon. Start with: minillm demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench = Commands(help="Measure against a rival and against the machine, in one run.", no_args_is_help=True)
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
    streams = sys.stdout, sys.stderr
    _take_any_text()
    try:
        try:
            app(args=None if arguments is None else list(arguments), prog_name="minillm")
        finally:
            sys.stdout, sys.stderr = streams  # typer puts others there when a pipe breaks
            for stream in filter(None, streams):
                stream.flush()  # here a full disk is told; at the interpreter's end it would be a traceback
    except Exception as error:
        if os.environ.get("MINILLM_DEBUG") and not isinstance(error, BrokenPipeError):
            raise
        grades = {"lab", "teach"} & set((sys.argv[1:] if arguments is None else arguments)[:2])
        _explain(error, GRADER_FAULT if grades else OUR_FAULT)
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):
            _leave(READER_GONE)
        raise


def _take_any_text() -> None:
    """Streams write what their encoding does not have as an escape, and read what is no text as a question mark."""
    for stream, errors in ((sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace"), (sys.stdin, "replace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def _explain(error: Exception, our_fault: int) -> NoReturn:
    """End with a message for an error: wrong input, what the machine refused, or a fault of ours."""
    if isinstance(error, MinillmError):
        _fail(str(error), GRADER_FAULT if isinstance(error, GraderError) else WRONG_INPUT)
    if isinstance(error, BrokenPipeError):
        _leave(READER_GONE)
    if isinstance(error, MemoryError):
        _fail("There is not enough memory. Close other programs, or take a smaller model or batch.", OUR_FAULT)
    if isinstance(error, OSError) and error.errno:
        what = f"{error.strerror or error}: {error.filename or 'while the output was written'}."
        _fail(f"{what} {ADVICE.get(error.errno, 'minillm --debug … shows where.')}", OUR_FAULT)
    _fail(f"{type(error).__name__}: {error}\nThis should not happen. minillm --debug … shows where.", our_fault)


def _fail(message: str, code: int) -> NoReturn:
    with suppress(OSError):  # of the stream for errors itself
        err.print(Panel(plain(message), title="Error", title_align="left", border_style="red"))
    _leave(code)


def _leave(code: int) -> NoReturn:
    """Exit. What a stream cannot take is dropped, or the interpreter would try again and complain."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        except AttributeError:  # there is no such stream
            pass
    sys.exit(code)
