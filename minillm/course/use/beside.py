"""Two at once: a learner's function gives the result, the engine's own runs first and must have said the same.

A learner's function gets copies, never the engine's own memory, and what it returns is copied, too. So whatever it
does to its arguments, or later to its result, the text stays what the comparison saw; and one that changes its
arguments is named.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.testing import assert_close

from minillm.course.errors import LearnerError

MESSAGE = 300  # characters of a learner's error that are shown


def tolerance_of(dtype: torch.dtype) -> float:
    """Absolute and relative, of what is computed in this dtype: in 16 bits the order of the additions shows."""
    return 1e-4 if dtype in (torch.float32, torch.float64) else 2e-2


def known(*_: Any) -> None:
    """Stands for the engine's own function where its result is known already; see `Beside.check`."""


@dataclass
class Beside:
    """A learner's function. Calling it compares its result with the engine's own and returns the learner's.

    name: for messages. tolerance: absolute and relative; 0 for what is exact, such as tokens and blocks. A result that
    differs, arguments that are changed, and an error that the learner's function raises, become a `LearnerError`. Only
    Ctrl-C goes through as it is.
    """

    name: str
    theirs: Callable[..., Any]
    ours: Callable[..., Any]
    tolerance: float = 0.0
    calls: int = 0

    def __call__(self, *args: Any) -> Any:
        return self.check(self.ours(*args), *args)

    def check(self, want: Any, *args: Any) -> Any:
        """The same where the engine's result is known already."""
        got = self.call(*args)
        if wrong := difference(got, want, self.tolerance):
            raise LearnerError(
                f"{self.name} differs from the engine's own in call {self.calls}, with {described(args)}: {wrong} "
                f"Tolerance: {self.tolerance:g}. Up to there the text was the same. {_advice(self.name)}"
            )
        return got

    def call(self, *args: Any) -> Any:
        """The learner's result, whatever it is, in plain types (see `plain`); `args` stay as they are."""
        self.calls += 1
        handed = copied(args)
        try:
            got = plain(self.theirs(*handed))
        except (LearnerError, KeyboardInterrupt):
            raise  # of another function, that this one goes through; of the user
        except BaseException as error:
            self._explain(error, args)
        changed = [place for place, pair in enumerate(zip(handed, args, strict=True), 1) if not same(*pair)]
        if changed:
            raise LearnerError(
                f"{self.name} changed its argument {changed[0]} in call {self.calls}, with {described(args)}. Others "
                f"read it, too: in the engine this would spoil its memory. Compute with a copy, such as x = x * 2 "
                f"instead of x *= 2. {_advice(self.name)}"
            )
        return got

    def _explain(self, error: BaseException, args: tuple[Any, ...]) -> NoReturn:
        at = traceback.extract_tb(error.__traceback__)[-1]
        missing = _unwritten(error)
        if missing is not None:
            raise LearnerError(f"{self.name} needs something that is not written yet: {missing}. {_advice(self.name)}")
        raise LearnerError(
            f"{self.name} raised {type(error).__name__} in call {self.calls}, with {described(args)}: {_said(error)} "
            f"({at.filename}, line {at.lineno}). {_advice(self.name)}"
        ) from error


def copied(value: Any) -> Any:
    """The same once more, sharing no memory that can be changed: tensors, lists, tuples and dicts are copied."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return type(value)(map(copied, value)) if type(value) in (list, tuple) else value


def same(value: Any, original: Any) -> bool:
    """Whether what `copied` gave is still like its original, bit by bit; NaN is like NaN."""
    if isinstance(original, Tensor):
        return value.shape == original.shape and difference(value, original, 0.0) is None
    if isinstance(original, dict):
        return value.keys() == original.keys() and all(same(value[key], original[key]) for key in original)
    if type(original) in (list, tuple):
        return len(value) == len(original) and all(map(same, value, original))
    return value is original or bool(value == original)


def plain(value: Any) -> Any:
    """A learner's result as numbers, strings, lists, tuples, dicts and tensors of our own.

    A class of their own might compare equal to everything; and a tensor that is returned might be written to later.
    Raises `TypeError` for anything else.
    """
    if type(value) is Tensor:
        return value.detach().clone() if value.dim() else value.item()
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, list):
        return [plain(item) for item in list.__iter__(value)]
    if isinstance(value, tuple):
        return tuple(plain(item) for item in tuple.__iter__(value))
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in dict.items(value)}
    if isinstance(value, range):
        return list(value)
    if getattr(value, "shape", None) == () and not isinstance(value, Tensor):
        return plain(value.item())  # a number of NumPy's
    if value is None:
        return None
    raise TypeError(f"it returned a {type(value).__name__}; allowed are numbers, strings, tensors, lists and tuples")


def difference(got: Any, want: Any, tolerance: float) -> str | None:
    """What differs, in a sentence; None if nothing does."""
    if got is None or want is None:
        return None if got is want else f"expected {want}, got {got}."
    try:
        assert_close(got, want, rtol=tolerance, atol=tolerance, equal_nan=True)
    except (AssertionError, TypeError, ValueError) as error:
        return f"{' '.join(str(error).split())} {_first(got, want, tolerance)}".rstrip()
    return None


def _first(got: Any, want: Any, tolerance: float) -> str:
    """Where two tensors of one shape differ first."""
    if not isinstance(got, Tensor) or not isinstance(want, Tensor) or got.shape != want.shape or got.dim() == 0:
        return ""
    wrong = ~got.double().isclose(want.double(), rtol=tolerance, atol=tolerance, equal_nan=True)
    if not wrong.any():
        return ""
    first = tuple(wrong.nonzero()[0].tolist())
    return f"The first is at {list(first)}: {got[first].item():.6g}, the engine has {want[first].item():.6g}."


def described(args: tuple[Any, ...]) -> str:
    """Arguments of a call in a line: tensors by their shapes."""
    return ", ".join(_short(arg) for arg in args) or "no arguments"


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:39]}…"


def _unwritten(error: BaseException | None) -> str | None:
    """The message of the NotImplementedError that an error came from, if there is one: that is what a stub raises."""
    seen = set[int]()
    while error is not None and id(error) not in seen:
        if isinstance(error, NotImplementedError):
            return _said(error)
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def _said(error: BaseException) -> str:
    """The message of a learner's error: short, one that can be printed, and never an error of its own."""
    try:
        text = str(error)[:MESSAGE]
    except KeyboardInterrupt:
        raise
    except BaseException:
        return "(its message cannot be read)"
    return text.encode(errors="backslashreplace").decode()


def _advice(name: str) -> str:
    return f"To find out why: minillm lab test {name[:4]}"
