"""Python source that every machine with this project has: what the embedded models learn from, and what they never saw.

The benchmarks of quality take the text that is held out, the training takes the rest; so the corpus stands below both.

The standard library and the installed dependencies, with three rules. Only readable code: no tests, no vendored
copies, no generated files, no tables. Only once: a file that exists twice is read once. And the balance is ours:
the standard library counts twice, and no package gives more than `PACKAGE_BYTES`, or two large ones would be all.

Held out is a part of the standard library alone, chosen by a hash of the file's *name*. The verdict is then the same
on every machine and for every Python version; a hash of the content would hold out, on another version, a slightly
changed copy of a file that the shipped model was trained on.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

STDLIB = "stdlib"
STDLIB_PASSES = 2
PACKAGE_BYTES = 9_000_000
FILE_BYTES = range(200, 200_000)
HELD_OUT_SHARE = 16  # one file in this many

# What `pip install` of this project brings, directly or not; a package that is absent is left out.
PACKAGES = (
    *("torch", "transformers", "numpy", "matplotlib", "huggingface_hub", "safetensors", "ipywidgets", "typer", "rich"),
    *("sympy", "networkx", "jinja2", "fsspec", "filelock", "mpmath", "setuptools", "packaging", "yaml", "tqdm"),
    *("click", "PIL", "fontTools", "pyparsing", "dateutil", "IPython", "traitlets", "jedi", "parso"),
    *("prompt_toolkit", "pygments", "pexpect", "markdown_it", "torchgen", "mpl_toolkits"),
)
SKIPPED_FOLDERS = frozenset(
    ("test", "tests", "testing", "idle_test", "_vendor", "_vendored", "vendor", "third_party", "site-packages")
    + ("encodings", "pydoc_data", "lib2to3", "lexers", "styles", "__pycache__", "_distutils", "dist-packages")
)
GENERATED = re.compile(
    r"do not edit|(auto|automatically|machine)[- ]?generated|generated (by|from|automatically)", re.I
)
LICENCE = re.compile(r"copyright|licen[cs]e", re.I)


@dataclass(frozen=True)
class Document:
    """One source file: `name` is package/path with forward slashes, the same on every machine."""

    name: str
    text: str


def training_documents() -> list[Document]:
    """Every document to train on, in a fixed order; those of the standard library come `STDLIB_PASSES` times."""
    everything = _stdlib()
    held_out = {document.text for document in everything if is_held_out(document.name)}
    stdlib = [document for document in everything if document.text not in held_out]
    seen = held_out | {document.text for document in stdlib}
    documents = stdlib * STDLIB_PASSES
    for package in PACKAGES:
        for document in _first_bytes(_package(package), PACKAGE_BYTES):
            if document.text not in seen:
                seen.add(document.text)
                documents.append(document)
    return documents


def held_out_texts(max_bytes: int | None = None) -> list[str]:
    """Files of the running Python's standard library that no training run of this project reads.

    For perplexity and acceptance rates, offline. Ordered by hash, so that the first `max_bytes` (in whole files)
    are as mixed as the rest. Between Python versions the files differ a little, so compare numbers on one version.
    """
    documents = sorted(_stdlib(is_held_out), key=lambda document: _digest(document.name))
    limit = sum(len(d.text.encode()) for d in documents) if max_bytes is None else max_bytes
    return [document.text for document in _first_bytes(documents, limit)]


def is_held_out(name: str) -> bool:
    """Whether a file of the standard library is kept from training: one in `HELD_OUT_SHARE`, by its name alone."""
    return _digest(name) % HELD_OUT_SHARE == 0


def is_readable_code(text: str) -> bool:
    """Code and prose rather than a table: mostly letters, no giant lines, not written by a program."""
    if GENERATED.search(text[:2000]) or max(map(len, text.splitlines()), default=0) > 400:
        return False
    visible = re.sub(r"\s", "", text)
    return sum(map(str.isalpha, visible)) > 0.6 * len(visible)


def without_licence(text: str) -> str:
    """Drop the comment block at the top if it is a licence: hundreds of copies teach nothing."""
    header = re.match(r"(?:#.*\n|\s*\n)*", text)
    assert header is not None  # the pattern matches the empty string
    return text[header.end() :] if LICENCE.search(header.group()) else text


def _stdlib(wanted: Callable[[str], bool] = lambda name: True) -> list[Document]:
    return list(_documents(STDLIB, Path(sysconfig.get_paths()["stdlib"]), wanted))


def _package(package: str) -> list[Document]:
    """A package's documents, ordered by hash so that a cut takes from everywhere."""
    spec = importlib.util.find_spec(package)
    roots: Sequence[str] = (spec.submodule_search_locations if spec else None) or ()
    documents = [document for root in sorted(roots) for document in _documents(package, Path(root))]
    return sorted(documents, key=lambda document: _digest(document.name))


def _documents(source: str, root: Path, wanted: Callable[[str], bool] = lambda name: True) -> Iterator[Document]:
    """The readable files below a folder whose names are `wanted`; others are not opened."""
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not SKIPPED_FOLDERS.isdisjoint(relative.parts) or path.name.startswith(("test_", "pydoc_data")):
            continue
        name = f"{source}/{relative.as_posix()}"
        text = _read(path) if wanted(name) else None
        if text is not None and is_readable_code(text):
            yield Document(name, without_licence(text))


def _read(path: Path) -> str | None:
    """The file as text with plain newlines, or None if it is empty, huge or no UTF-8."""
    if path.stat().st_size not in FILE_BYTES:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def _first_bytes(documents: Sequence[Document], limit: int) -> Iterator[Document]:
    """Whole documents from the front until `limit` bytes are reached."""
    for document in documents:
        if limit <= 0:
            return
        limit -= len(document.text.encode())
        yield document


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
