"""The build takes off what differs from run to run, and sees what breaks a rule; committed notebooks keep them all."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from notebooks.build import WIDGET, check, differences, execute, faults, normalise, read_source, sources

PICTURE = {"image/png": {"alt": "Bars that grow with the context."}}
SOURCE = '''# %% [markdown]
"""
# A lesson

with two paragraphs
"""

# %%
import sys

print("one", flush=True)
print("two", flush=True)

# %% tags=["thumbnail"]
from minillm.course.figures import style
from minillm.course.figures.show import explore


@style.SHEET
def plot(width):
    figure = style.new_figure(1)
    style.add_title(figure, f"{width}")
    return figure


explore(plot, alt="Nothing but a title with the width.", width=[1, 2, 3])
'''


def lesson(**changes: object) -> NotebookNode:
    """A notebook that keeps all rules."""
    pictures = [new_output("display_data", {"image/png": "…", "text/plain": "bars"}, metadata=deepcopy(PICTURE))]
    cells = [new_markdown_cell("# A lesson")]
    cells += [new_code_cell(f"show({i})", execution_count=i, outputs=deepcopy(pictures)) for i in range(1, 30)]
    return new_notebook(cells=cells)


def test_a_good_lesson_has_no_faults() -> None:
    assert list(faults(lesson())) == []


def _spoil(change: Callable[[NotebookNode], object]) -> list[str]:
    notebook = lesson()
    change(notebook)
    return list(faults(notebook))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda n: n.cells[3].outputs[0].metadata.clear(), "without a text"),
        (lambda n: n.cells[3].outputs[0].metadata["image/png"].update(alt=" "), "without a text"),
        (lambda n: n.cells[3].outputs[0].data.update({WIDGET: {"model_id": "1"}}), "widget"),
        (lambda n: n.metadata.update(widgets={"state": {}}), "widget state"),
        (lambda n: n.cells[3].outputs.append(new_output("stream", name="stderr", text="UserWarning")), "stderr"),
        (lambda n: n.cells[3].outputs.append(new_output("error", ename="KeyError")), "KeyError"),
        (lambda n: n.cells[3].outputs.append(new_output("stream", text="in /home/anna/x.py")), "/home/anna"),
        (lambda n: n.cells[3].outputs.append(new_output("stream", text="<Bench object at 0x7f1>")), "0x7f1"),
        (lambda n: n.cells[3].update(execution_count=7), "top to bottom"),
        (lambda n: n.cells[3].metadata.update(execution={"iopub.execute_input": "2026"}), "time of its execution"),
        (lambda n: n.cells[3].outputs[0].data.update({"image/png": "x" * 500_000}), "500,000"),
        (lambda n: n.cells[3].update(source="x = " + 99 * "1"), "103 columns"),
        (lambda n: n.cells.__delitem__(slice(10, None)), "10 cells"),
    ],
)
def test_every_rule_is_seen_when_broken(change: Callable[[NotebookNode], object], word: str) -> None:
    found = _spoil(change)
    assert any(word in fault for fault in found), found


def test_a_run_leaves_nothing_that_differs(tmp_path: Path) -> None:
    path = tmp_path / "01_lesson.py"
    path.write_text(SOURCE, encoding="utf8")
    runs = []
    for _ in range(2):
        notebook = read_source(path)
        execute(notebook)
        normalise(notebook)
        runs.append(nbformat.writes(notebook))
        assert [fault for fault in faults(notebook) if "cells" not in fault] == []
    assert runs[0] == runs[1]
    words, picture = notebook.cells[1].outputs[0], notebook.cells[2].outputs[0]
    assert words.text == "one\ntwo\n"
    assert set(picture.data) == {"image/png", "text/plain"}, "the widget is gone, its picture stays"
    assert picture.metadata["image/png"]["alt"] == "Nothing but a title with the width."


def test_differences_between_notebook_and_source_are_seen(tmp_path: Path) -> None:
    path = tmp_path / "01_lesson.py"
    path.write_text(SOURCE, encoding="utf8")
    source, edited, shorter = (read_source(path) for _ in range(3))
    assert list(differences(edited, source)) == []
    edited.cells[1].source += "\nprint('three')"
    shorter.cells.pop()
    assert "cell 1" in next(differences(edited, source))
    assert "2 cells, the source has 3" in next(differences(shorter, source))


@pytest.mark.parametrize("source", sources(), ids=lambda path: path.stem)
def test_committed_lessons_fit_their_sources_and_the_rules(source: Path) -> None:
    assert check(source) == []
