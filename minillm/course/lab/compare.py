"""What differs between a value that came back and the one expected, in a sentence for learners."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minillm.course.lab.protocol import Foreign

SHOWN = 4  # numbers around the first difference


def difference(got: Any, expected: Any, *, atol: float = 1e-4, rtol: float = 1e-4) -> str | None:
    """The first difference; None if there is none. Types must be the same; NaN equals NaN."""
    if isinstance(got, Foreign):
        return f"expected {_kind(expected)}, got an object of class {got.type_name}"
    if isinstance(expected, float) and type(got) is int:
        got = float(got)
    if type(got) is not type(expected):
        return f"expected {_kind(expected)}, got {_kind(got)}"
    if isinstance(expected, Tensor):
        return _tensor_difference(got, expected, atol, rtol)
    if isinstance(expected, dict) and got.keys() == expected.keys():
        got, expected = list(got.values()), [expected[key] for key in got]
    if isinstance(expected, (list, tuple)):
        return _sequence_difference(got, expected, atol, rtol)
    if isinstance(expected, float):
        close = torch.tensor(got).isclose(torch.tensor(expected), atol=atol, rtol=rtol, equal_nan=True)
        return None if close else f"expected {expected:.6g}, got {got:.6g}"
    return None if got == expected else f"expected {expected!r}, got {got!r}"


def _sequence_difference(got: Any, expected: Any, atol: float, rtol: float) -> str | None:
    for i, (ours, theirs) in enumerate(zip(expected, got, strict=False)):
        if wrong := difference(theirs, ours, atol=atol, rtol=rtol):
            return f"item {i}: {wrong}"
    return None if len(got) == len(expected) else f"expected {len(expected)} items, got {len(got)}"


def _tensor_difference(got: Tensor, expected: Tensor, atol: float, rtol: float) -> str | None:
    if got.shape != expected.shape:
        return f"expected shape {list(expected.shape)}, got {list(got.shape)}"
    if got.dtype != expected.dtype:
        return f"expected dtype {expected.dtype}, got {got.dtype}"
    wrong = ~got.double().isclose(expected.double(), atol=atol, rtol=rtol, equal_nan=True)
    if not wrong.any():
        return None
    first = tuple(int(i) for i in wrong.nonzero()[0])
    where = f"first at {list(first)}" if first else "it"
    return (
        f"{int(wrong.sum())} of {wrong.numel()} numbers differ, {where}: "
        f"expected {_row(expected, first)}, got {_row(got, first)}"
    )


def _row(tensor: Tensor, at: tuple[int, ...]) -> str:
    """The number at an index, and the few behind it in its row."""
    if not at:
        return f"{tensor.item():.6g}"
    row = tensor[at[:-1]][at[-1] : at[-1] + SHOWN].tolist()
    more = " …" if at[-1] + SHOWN < tensor.shape[-1] else ""
    return f"{' '.join(f'{number:.4g}' for number in row)}{more}"


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if value is None:
        return "None"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)} items"
    return f"{type(value).__name__} {value!r}"


def same(got: Any, other: Any) -> bool:
    """Whether two values that came back are alike, whatever they were expected to be."""
    return difference(got, other, atol=1e-5, rtol=1e-4) is None
