"""A learner's file, from the disk to a tree. The lab and `use` read it here, so that they agree on what can be read.

It is read as Python reads it: a byte order mark, an encoding declared in the first two lines (PEP 263), any line ends.
What cannot be read is a `FileError` that says what is wrong and how to mend it.
"""

from __future__ import annotations

import ast
import codecs
import re
import stat
from pathlib import Path

from minillm.course.errors import LearnerError
from minillm.course.lab.syntax import parse

SOURCE_BYTES = 256 << 10
_DECLARED = re.compile(r"\A(?:[ \t\f]*(?:#[^\n]*)?\n)??[ \t\f]*#[^\n]*?coding[:=][ \t]*([-\w.]+)", re.ASCII)
_ASCII = bytes(range(128))
_OTHER_MARKS = {
    "UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),  # the first of them begins like one of UTF-16
    "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}


class FileError(LearnerError):
    """A learner's file that cannot be read. status: as in a result, "missing", "unreadable" or "syntax"."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status


def read_file(path: Path, name: str) -> bytes:
    """The bytes of a file, called `name` in messages. Raises FileError unless it is a regular file of at most 256 KiB.

    Nothing else is opened: a named pipe would wait for its writer, a device may never end.
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
            raise FileError("unreadable", f"{name} is {kind} and no file. Move it away.")
        with path.open("rb") as file:
            data = file.read(SOURCE_BYTES + 1)
    except FileNotFoundError:
        raise FileError("missing", f"There is no {name}.") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise FileError("unreadable", f"{name} cannot be read: {reason}.") from None
    return check_size(data, name)


def check_size(data: bytes, name: str) -> bytes:
    """The data. Raises FileError for more bytes than a source may have."""
    if len(data) > SOURCE_BYTES:
        raise FileError("unreadable", f"{name} has more than {SOURCE_BYTES:,} bytes; that is the most for a source.")
    return data


def text_of(data: bytes, name: str) -> str:
    """The text of a source; from here on it is UTF-8, and if it declares its encoding, it now says so.

    Raises FileError for what is empty or no text in its encoding.
    """
    for encoding, marks in _OTHER_MARKS.items():
        if data.startswith(marks):
            raise FileError("unreadable", f"{name} is not UTF-8 text but {encoding}. Save it again as UTF-8.")
    if b"\0" in data:
        line = data.count(b"\n", 0, data.index(b"\0")) + 1
        raise FileError("syntax", f"{name}, line {line}: there is a NUL byte. The file is damaged, or it is no text.")
    marked = data.startswith(codecs.BOM_UTF8)
    data = data.removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    declared = _DECLARED.match(data.decode("latin-1"))
    text = _decoded(data, "utf-8" if marked or not declared else declared[1], name)
    if not text.strip():
        raise FileError("missing", f"{name} is empty.")
    if declared := _DECLARED.match(text):
        text = f"{text[: declared.start(1)]}utf-8{text[declared.end(1) :]}"
    return text


def _decoded(data: bytes, encoding: str, name: str) -> str:
    """Data as text. An encoding in which ASCII means something else hides code from readers; it is refused."""
    try:
        if _ASCII.decode(encoding) != _ASCII.decode("ascii"):
            raise LookupError
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        if error.object != data:
            raise FileError("unreadable", _undeclared(name, encoding)) from None
        line = data.count(b"\n", 0, error.start) + 1
        kind = "UTF-8 text" if encoding == "utf-8" else f"text in {encoding}, which it declares"
        message = f"{name} is not {kind}: see line {line}, byte {error.start}. Save it again as UTF-8."
        raise FileError("unreadable", message) from None
    except (LookupError, UnicodeError, ValueError):
        raise FileError("unreadable", _undeclared(name, encoding)) from None


def _undeclared(name: str, encoding: str) -> str:
    return (
        f"{name} declares the encoding {encoding[:40]!r}, which Python does not know for sources. "
        "Save it as UTF-8 and delete the declaration."
    )


def tree_of(text: str, name: str) -> ast.Module:
    """The tree of a source. Raises FileError if Python cannot read it, with the line."""
    try:
        return parse(text)
    except SyntaxError as error:
        line = (error.text or "").rstrip("\n")
        pointer = " " * max((error.offset or 1) - 1, 0) + "^"
        raise FileError("syntax", f"{name}, line {error.lineno}: {error.msg}\n    {line}\n    {pointer}") from None
    except (ValueError, RecursionError, MemoryError):  # brackets without end
        raise FileError("syntax", f"{name} cannot be read as Python: it is nested too deeply.") from None
