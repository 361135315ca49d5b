"""The two streams that commands print to, and the files that they write.

Three things hold for whatever is printed: text of strangers cannot steer the terminal, no encoding is too small for it,
and nothing is cut off where the terminal is narrow. While a command runs, its screen is its own: what other libraries
print, warn and log does not appear, unless somebody asks for it with `--debug`.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.measure import Measurement
from rich.progress import Progress, ProgressColumn, SpinnerColumn, TextColumn
from rich.segment import Segment
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

from minillm.course.foreign import SIGNS, visible
from minillm.errors import ConfigError

LOOK_ALIKES = str.maketrans(
    dict(zip("✓✗◐·●○×÷−–—→µαγ²“”’│⏎⇥␣", '+x~.*o*/--->uag2""\'|$>_', strict=True)) | {"…": "..."}
)
ANY_WIDTH = 10_000  # columns: more than any table needs
PICTURES = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp")
LEAST_ROOM = 64 << 10  # bytes on the disk, for what any command writes


class Screen(Console):
    """One of the two streams. Plain words stay as they are: nothing in them is taken for markup or an emoji."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False)

    @property
    def signs(self) -> dict[int, Any]:
        """What becomes of single characters: of those that steer a terminal, and of ours that it does not have."""
        return SIGNS if self.encoding.startswith("utf") else {**LOOK_ALIKES, **SIGNS}

    def render_str(self, text: str, **settings: Any) -> Text:
        """A string as text; sequences for a terminal are taken out before its width is measured."""
        return super().render_str(visible(text), **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """All that is printed comes through here, piece by piece."""
        options = options or self.options
        if isinstance(renderable, Table):
            options = options.update(width=max(options.max_width, self._needed(renderable, options)))
        signs = self.signs
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(segment.text.translate(signs), segment.style)

    def _needed(self, table: Table, options: ConsoleOptions) -> int:
        """Columns below which words and numbers would be cut. A terminal that is narrower wraps such lines itself."""
        wide = options.update(width=ANY_WIDTH)
        for column in table.columns:
            if column.overflow != "fold":
                sizes = [Measurement.get(self, wide, cell) for cell in (column.header, *column.cells)]
                column.min_width = max(size.maximum if column.no_wrap else size.minimum for size in sizes)
        return Measurement.get(self, wide, table).minimum

    def print(self, *objects: Any, **settings: Any) -> None:
        """Print, and crop nothing."""
        super().print(*objects, **{"crop": False, **settings})

    def write(self, text: str) -> None:
        """The text as it is, for a pipe or a file behind it."""
        self.file.write(text)

    def data(self, value: Any) -> None:
        """Plain data as JSON, with escapes for what the stream's encoding may not have."""
        utf = self.encoding.startswith("utf")
        self.write(json.dumps(value, indent=1, ensure_ascii=not utf) + "\n")

    def ask(self, prompt: str) -> str:
        """A line from the user. Raises EOFError when there are no more."""
        self.print(plain(prompt, "bold"), end="")
        if sys.stdin is None:
            raise EOFError
        with redirect_stdout(self.file):  # for the line editor, which looks whose terminal it is
            return input()

    def bar(self, *columns: ProgressColumn, **settings: Any) -> Progress:
        """A progress bar that leaves the other streams alone."""
        return Progress(*columns, console=self, redirect_stdout=False, redirect_stderr=False, **settings)

    def waiting(self, text: str) -> Waiting:
        """A line that says what is going on, for as long as a `with` block takes."""
        return Waiting(self.bar(SpinnerColumn("line"), words(), transient=True), text)

    def on_broken_pipe(self) -> None:
        """Whoever read this stream has gone; `main` ends the command."""
        raise BrokenPipeError


class Waiting:
    """A line with a spinner; `update` changes its words."""

    def __init__(self, bar: Progress, text: str) -> None:
        self._bar, self._task = bar, bar.add_task(text, total=None)

    def __enter__(self) -> Waiting:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def update(self, text: str) -> None:
        """Say something else."""
        self._bar.update(self._task, description=text)


out, err = Screen(), Screen(stderr=True)  # progress and errors go to err: a pipe gets results only


def plain(text: str, style: str = "") -> Text:
    """Text of a stranger, a file name, an error: nothing in it is obeyed."""
    return Text(visible(text), style=style)


def words() -> TextColumn:
    """The words beside a progress bar, in which nothing is markup."""
    return TextColumn("{task.description}", markup=False)


class Command(TyperCommand):
    """A command that has the screen for itself while it runs."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        with alone():
            return super().invoke(ctx)


class Commands(typer.Typer):
    """Commands that have the screen for themselves."""

    def command(self, name: str | None = None, **settings: Any) -> Callable[[Any], Any]:
        """Register a command."""
        return super().command(name, **{"cls": Command, **settings})


@contextmanager
def alone() -> Iterator[None]:
    """Keep what other libraries print, warn, log and count off the screen; with `--debug` everything is shown.

    Theirs is what goes to Python's streams. Our commands print to `out` and `err`, which keep the true ones, and so
    does the logger of this project.
    """
    if os.environ.get("MINILLM_DEBUG"):
        yield
        return
    log, handler = logging.getLogger("minillm"), _OnScreen(logging.WARNING)
    nowhere = open(os.devnull, "w", encoding="utf8")  # noqa: SIM115  # stays open: libraries keep it for their last words
    out.file, err.file = sys.stdout, sys.stderr
    log.addHandler(handler)
    try:
        with warnings.catch_warnings(), redirect_stdout(nowhere), redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.removeHandler(handler)
        out.file = err.file = None  # type: ignore[assignment]  # again whatever Python's streams are


class _OnScreen(logging.Handler):
    """What this project's own logger has to say."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message."""
        err.print(plain(record.getMessage()))


def check_destination(path: Path, *, endings: tuple[str, ...] = (), folder: bool = False) -> Path:
    """Refuse what cannot be written, before anybody waits for what would be in it. Returns where it will be written.

    endings: those that are allowed, such as ".png"; a name without any gets the first. folder: the path is a folder,
    which may be still to be made. Raises ConfigError.
    """
    if endings and not path.suffix and path.name:
        path = path.with_name(path.name + endings[0])
    if endings and path.suffix.lower() not in endings:
        raise ConfigError(f"{path} has an ending that cannot be written here. Choose one of {', '.join(endings)}.")
    try:
        there = path.exists()
        place = _existing(path) if folder else path if there else path.resolve().parent
        fits = place.is_dir() == (folder or not there)
        if fits and os.access(place, os.W_OK | (os.X_OK if place.is_dir() else 0)):
            return _check_room(path, place)
    except (OSError, ValueError) as error:  # a name that is too long; a null character
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise ConfigError(f"{path} cannot be written: {reason}. Choose another name.") from None
    kind = "a folder that you may write to" if folder else "a file in a folder that exists and that you may write to"
    raise ConfigError(f"{path} cannot be written. Choose {kind}.")


def _existing(path: Path) -> Path:
    """The path, or what exists of the way to it."""
    path = path.resolve()
    return next(place for place in (path, *path.parents) if place.exists())


def _check_room(path: Path, place: Path) -> Path:
    """Raise ConfigError where the disk is full already."""
    if hasattr(os, "statvfs") and not path.is_char_device() and not path.is_fifo():
        disk = os.statvfs(place)
        if disk.f_blocks and disk.f_bavail * disk.f_frsize < LEAST_ROOM:
            raise ConfigError(f"{path} cannot be written: the disk is full. Make room, or choose another disk.")
    return path
