"""Builds the lessons: src/NN_slug.py (jupytext, percent format) becomes NN_slug.ipynb with its outputs.

    python notebooks/build.py            # all of them, one after the other
    python notebooks/build.py 03 05      # these
    python notebooks/build.py --check    # runs nothing: do the committed files fit their sources and the rules?

One direction only: whoever edits a notebook edits its source. A notebook is executed in a fresh kernel on the CPU,
then everything is taken off that differs from one run to the next without saying anything: times of execution, widget
state, cell ids. What is left must keep the rules below, or the build says which cell does not.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from base64 import b64decode
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import NamedTuple

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from PIL import Image
from traitlets.config import Config

FOLDER = Path(__file__).parent
SOURCES, THUMBNAILS = FOLDER / "src", FOLDER / "thumbnails"
CELLS = range(25, 46)
COLUMNS = 98  # of code that fit on a page of 900 pixels
LARGEST = 500_000  # bytes of a notebook
MEMORY = 4e9  # bytes of a kernel
SECONDS = {"07": 90, "15": 90}  # of a run on two cores: reported, never asserted
USUAL_SECONDS = 45
THUMBNAIL, POSTER_WIDTH = (480, 320), 1800  # pixels
POSTER = (("01", "03", "09"), ("05",))  # lessons whose best pictures stand on the project's first page, in columns
WIDGET = "application/vnd.jupyter.widget-view+json"
METADATA = {  # no version: it is the machine's
    "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
    "language_info": {"name": "python"},
}
PRIVATE = re.compile(r"(?:^|[\s'\"(=])(/(?:home|root|tmp|Users|work|usr|opt|var)/[^\s'\"]*)|object at 0x[0-9a-f]+")
LAST_WORDS = """import resource, sys
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))"""


class Run(NamedTuple):
    """What the execution of a notebook took."""

    seconds: float
    peak_bytes: int


def read_source(path: Path) -> NotebookNode:
    """The notebook of a source, not executed: ids follow from the cells' text, so that they move with it."""
    notebook = jupytext.read(path, fmt="py:percent")
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    seen: Counter[str] = Counter()
    for cell in notebook.cells:
        cell.metadata = NotebookNode({key: cell.metadata[key] for key in ("tags",) if key in cell.metadata})
        text = f"{cell.cell_type}\n{cell.source}"
        seen[text] += 1
        cell.id = sha256(f"{text}\n{seen[text]}".encode()).hexdigest()[:12]
    return notebook


def execute(notebook: NotebookNode) -> Run:
    """Run all cells in a fresh kernel, as a learner would who starts it in the folder of the notebooks."""
    notebook.cells.append(nbformat.v4.new_code_cell(LAST_WORDS))
    with TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=300,
            resources={"metadata": {"path": str(FOLDER)}},
            record_timing=False,
            config=Config(KernelManager=_transport(folder)),
        )
        start = perf_counter()
        client.execute()
        seconds = perf_counter() - start
    return Run(seconds, int(notebook.cells.pop().outputs[0].text))


def _transport(folder: str) -> dict[str, str]:
    """Talk to the kernel over files where the system can: two builds at once may be given the same port."""
    return {} if sys.platform == "win32" else {"transport": "ipc", "ip": f"{folder}/kernel"}


def normalise(notebook: NotebookNode) -> None:
    """Take off what differs from run to run, and widgets: a page without a kernel shows the picture beside them."""
    notebook.metadata = nbformat.from_dict(METADATA)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for count, cell in enumerate(code, 1):
        cell.execution_count = count
        cell.metadata.pop("execution", None)
        cell.outputs = [output for output in map(_without_widget, _joined(cell.outputs)) if output]
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = count


def _joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Text that a cell printed in several pieces becomes one: where it is cut is chance."""
    joined: list[NotebookNode] = []
    for output in outputs:
        last = joined[-1] if joined else None
        if last and output.output_type == last.output_type == "stream" and output.name == last.name:
            last.text += output.text
        else:
            joined.append(output)
    return joined


def _without_widget(output: NotebookNode) -> NotebookNode | None:
    faces = output.get("data", {})
    if WIDGET in faces and "image/png" not in faces:
        return None
    faces.pop(WIDGET, None)
    return output


def faults(notebook: NotebookNode) -> Iterator[str]:
    """What breaks a rule, in words; nothing of it needs a run."""
    if len(notebook.cells) not in CELLS:
        yield f"{len(notebook.cells)} cells: a lesson has {CELLS.start} to {CELLS.stop - 1}"
    if "widgets" in notebook.metadata:
        yield "widget state is stored: it is of no use on a page, and large"
    size = len(nbformat.writes(notebook).encode())
    if size > LARGEST:
        yield f"{size:,} bytes: at most {LARGEST:,}"
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    if counts != [*range(1, len(counts) + 1)]:
        yield "not executed from top to bottom"
    for place, cell in enumerate(notebook.cells):
        for fault in _faults_of(cell):
            yield f"cell {place} ({cell.source.strip()[:40]!r}): {fault}"


def _faults_of(cell: NotebookNode) -> Iterator[str]:
    longest = max(map(len, cell.source.splitlines()), default=0)
    if cell.cell_type == "code" and longest > COLUMNS:
        yield f"a line of {longest} columns: the page shows {COLUMNS}"
    if "execution" in cell.metadata:
        yield "holds the time of its execution"
    for output in cell.get("outputs", []):
        faces = output.get("data", {})
        text = "".join([output.get("text", ""), faces.get("text/plain", ""), faces.get("text/html", "")])
        if output.output_type == "error":
            yield f"raised {output.ename}"
        if output.get("name") == "stderr":
            yield f"wrote to stderr: {text[:200]!r}"
        if WIDGET in faces:
            yield "shows a widget that a page without a kernel cannot show"
        if "image/png" in faces and not output.metadata.get("image/png", {}).get("alt", "").strip():
            yield "shows a picture without a text: use minillm.course.figures.show"
        if match := PRIVATE.search(text):
            yield f"names a place on this machine: {match[0].strip()!r}"


def differences(notebook: NotebookNode, source: NotebookNode) -> Iterator[str]:
    """Where a notebook and its source say different things; outputs aside."""
    for place, (ours, theirs) in enumerate(zip(notebook.cells, source.cells, strict=False)):
        if any(ours.get(key) != theirs.get(key) for key in ("cell_type", "source", "id", "metadata")):
            yield f"cell {place} is not that of the source"
    if len(notebook.cells) != len(source.cells):
        yield f"{len(notebook.cells)} cells, the source has {len(source.cells)}"
    if notebook.metadata != source.metadata:
        yield "the notebook's metadata are not those of the build"


def best_picture(notebook: NotebookNode) -> Image.Image:
    """The figure of the cell with the tag "thumbnail"."""
    for cell in notebook.cells:
        pictures = [o.data["image/png"] for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
        if "thumbnail" in cell.metadata.get("tags", []) and pictures:
            return Image.open(BytesIO(b64decode(pictures[0]))).convert("RGB")
    raise SystemExit("No cell with the tag 'thumbnail' shows a picture.")


def write_thumbnail(notebook: NotebookNode, path: Path) -> None:
    """The best picture of a lesson, small: for the map of the course."""
    picture = best_picture(notebook)
    picture.thumbnail(THUMBNAIL, Image.Resampling.LANCZOS)
    _save(picture, path)


def write_poster(path: Path) -> None:
    """The best pictures of some lessons in columns, for the first page of the project; nothing while one is missing."""
    files = [[next(iter(FOLDER.glob(f"{number}_*.ipynb")), None) for number in column] for column in POSTER]
    if not all(file for column in files for file in column):
        return
    columns = [[best_picture(nbformat.read(file, as_version=4)) for file in column] for column in files]
    width = max(picture.width for column in columns for picture in column)
    height = max(sum(picture.height for picture in column) for column in columns)
    poster = Image.new("RGB", (width * len(columns), height), "white")
    for place, column in enumerate(columns):
        top = 0
        for picture in column:
            poster.paste(picture, (place * width, top))
            top += picture.height
    poster.thumbnail((POSTER_WIDTH, height), Image.Resampling.LANCZOS)
    _save(poster, path)


def _save(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    picture.quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


def build(source: Path) -> list[str]:
    """Execute a lesson and write it down; what breaks a rule is returned, and then nothing is written."""
    notebook = read_source(source)
    try:
        run = execute(notebook)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        return [str(error)]
    normalise(notebook)
    found = list(faults(notebook))
    if run.peak_bytes > MEMORY:
        found.append(f"{run.peak_bytes / 1e9:.1f} GB of memory: at most {MEMORY / 1e9:.0f}")
    allowed = SECONDS.get(source.stem[:2], USUAL_SECONDS)
    late = f" (should be at most {allowed})" if run.seconds > allowed else ""
    size = len(nbformat.writes(notebook)) / 1e3
    took = f"{run.seconds:.0f} s{late}, {run.peak_bytes / 1e9:.2f} GB"
    print(f"{source.stem}: {took}, {len(notebook.cells)} cells, {size:.0f} kB", flush=True)
    if not found:
        write_thumbnail(notebook, THUMBNAILS / f"{source.stem[:2]}.png")
        nbformat.write(notebook, target(source))
    return found


def check(source: Path) -> list[str]:
    """Hold the committed notebook against its source and the rules."""
    if not target(source).exists():
        return ["not built yet"]
    notebook = nbformat.read(target(source), as_version=4)
    return [*differences(notebook, read_source(source)), *faults(notebook)]


def target(source: Path) -> Path:
    """Where the notebook of a source lies."""
    return FOLDER / f"{source.stem}.ipynb"


def sources(numbers: list[str] | None = None) -> list[Path]:
    """The sources of these lessons, by number; of all, if none is given."""
    found = sorted(SOURCES.glob("[0-9][0-9]_*.py"))
    missing = set(numbers or []) - {path.stem[:2] for path in found}
    if missing:
        raise SystemExit(f"There is no lesson {', '.join(sorted(missing))} in {SOURCES.name}/.")
    return [path for path in found if not numbers or path.stem[:2] in numbers]


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the lessons from their sources.")
    parser.add_argument("numbers", nargs="*", metavar="NN", help="lessons, such as 03 05; all by default")
    parser.add_argument("--check", action="store_true", help="run nothing: hold the files against sources and rules")
    arguments = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same outputs with and without a GPU
    work, failed = check if arguments.check else build, False
    for source in sources(arguments.numbers):
        for fault in work(source):
            failed = True
            print(f"{source.stem}: {fault}", flush=True)
    if not arguments.check:
        write_poster(THUMBNAILS / "course.png")
    sys.exit(failed)


if __name__ == "__main__":
    main()
