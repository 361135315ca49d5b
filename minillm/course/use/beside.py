"""Two at once: a learner's function gives the result, the engine's own runs first and must have said the same."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.testing import assert_close

from minillm.errors import LearnerError


def tolerance_of(dtype: torch.dtype) -> float:
    """Absolute and relative, of what is computed in this dtype: in 16 bits the order of the additions shows."""
    return 1e-4 if dtype in (torch.float32, torch.float64) else 2e-2


def known(*_: Any) -> None:
    """Stands for the engine's own function where its result is known already; see `Beside.check`."""


@dataclass
class Beside:
    """A learner's function. Calling it compares its result with the engine's own and returns the learner's.

    name: for messages. tolerance: absolute and relative; 0 for what is exact, such as tokens and blocks. A result that
    differs, and an error that the learner's function raises, become a `LearnerError`.
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
        """The learner's result, whatever it is."""
        self.calls += 1
        try:
            return self.theirs(*args)
        except (LearnerError, KeyboardInterrupt):
            raise  # of another function, that this one goes through; or from the keyboard
        except BaseException as error:  # SystemExit, too
            self._explain(error, args)

    def _explain(self, error: BaseException, args: tuple[Any, ...]) -> NoReturn:
        at = traceback.extract_tb(error.__traceback__)[-1]
        missing = _unwritten(error)
        if missing is not None:
            raise LearnerError(f"{self.name} needs something that is not written yet: {missing}. {_advice(self.name)}")
        raise LearnerError(
            f"{self.name} raised {type(error).__name__} in call {self.calls}, with {described(args)}: {error} "
            f"({at.filename}, line {at.lineno}). {_advice(self.name)}"
        ) from error


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
    """The message of the NotImplementedError behind an error, if there is one: that is what a stub raises."""
    while error is not None:
        if isinstance(error, NotImplementedError):
            return str(error)
        error = error.__cause__ or error.__context__
    return None


def _advice(name: str) -> str:
    return f"To find out why: minillm lab test {name[:4]}"
