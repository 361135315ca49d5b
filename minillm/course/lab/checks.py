"""Checks as data: a script of calls for the worker, and what the parent expects to come back.

    @check("write", points=2)
    def rows_come_back_in_order(case):
        cache = case.learner.KVCache(case.config, capacity=8)     # nothing runs here: each line is written down
        keys = cache.write(0, k, v)[0]
        case.expect(keys, k.transpose(0, 1), "the rows as they were written")

`case.learner` stands for the learner's module, `case.given` for the helper module of the exercise and `case.torch` for
PyTorch. Reading an attribute, an item, or calling adds a step; the worker carries the steps out in that order, in the
learner's process. Expected values stay in the parent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from minillm.course.lab.compare import difference
from minillm.course.lab.protocol import Limits, Reply, Script
from minillm.course.lab.worker import Tensors, pack

Accepts = Callable[[Any], str | None]


class Ref:
    """Something that will exist in the worker. Using it like the thing itself adds steps to the script."""

    __iter__ = None  # how many items there are is not known yet: take them by their index

    def __init__(self, case: Case, id: int | str, text: str) -> None:
        self._case, self._id, self._text = case, id, text

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            object.__setattr__(self, name, value)
        else:
            self._case._step("set", [self, name, value], "", call=f"{self._text}.{name} = {describe(value)}")

    def __getattr__(self, name: str) -> Ref:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._case._step("get", [self, name], f"{self._text}.{name}".removeprefix("."))

    def __getitem__(self, key: Any) -> Ref:
        return self._case._step("item", [self, key], f"{self._text}[{describe(key)}]")

    def __call__(self, *args: Any, **kwargs: Any) -> Ref:
        return self._case._called("call", self, args, kwargs)


@dataclass(frozen=True)
class Expectation:
    """One value that the script sends at a step, and the parent's judgement of it."""

    step: int
    text: str
    accepts: Accepts
    why: str


class Case:
    """One instance of a check: inputs drawn from a seed, a script that grows, and what is expected of it."""

    def __init__(self, seed: int, ours: ModuleType | None = None) -> None:
        self.seed = seed
        self.ours: Any = ours
        self.generator = torch.Generator().manual_seed(seed)
        self.learner, self.given, self.torch = (
            Ref(self, "learner", ""),
            Ref(self, "given", ""),
            Ref(self, "torch", "torch"),
        )
        self.expectations: list[Expectation] = []
        self._steps: list[dict[str, Any]] = []
        self._tensors: Tensors = {}
        self._calls: list[tuple[int, str]] = []

    # Inputs

    def randn(self, *shape: int) -> Tensor:
        """Normal numbers, float32."""
        return torch.randn(shape, generator=self.generator)

    def randint(self, low: int, high: int, *shape: int) -> Tensor:
        """Whole numbers from `low` to `high` - 1."""
        return torch.randint(low, high, shape, generator=self.generator)

    def integer(self, low: int, high: int) -> int:
        """One whole number from `low` to `high`, both included."""
        return int(self.randint(low, high + 1, 1))

    # What is expected

    def expect(self, value: Ref, expected: Any, why: str = "", *, atol: float = 1e-4, rtol: float = 1e-4) -> None:
        """Expect a value now. Tensors agree within `atol + rtol · |expected|`; everything else is equal, types too."""
        self.require(value, lambda got: difference(got, expected, atol=atol, rtol=rtol), why)

    def require(self, value: Ref, accepts: Accepts, why: str = "") -> None:
        """Send a value now; `accepts` says in the parent what is wrong with it, or None."""
        self.expectations.append(Expectation(len(self._steps), value._text, accepts, why))
        self._step("send", [value], value._text)

    def raises(self, error: str, function: Ref, *args: Any, why: str = "", **kwargs: Any) -> None:
        """Expect a call to raise an error of a class of this name, or of one below it."""
        names = self._called("catch", function, args, kwargs)
        self.require(names, lambda got: _wrong_error(got, error), why)

    def count(self, function: Ref, *args: Any, **kwargs: Any) -> Ref:
        """Call and count: a dictionary of "flops", "largest" (elements of the largest new tensor) and "out".

        The worker counts, beside the learner's code: what comes back can be forged, unlike a value. So a check that
        counts also expects the value in "out".
        """
        return self._called("count", function, args, kwargs)

    # The script

    def script(self, **settings: Any) -> Script:
        """What was written down so far, for the worker."""
        return Script(tuple(self._steps), self._tensors, **settings)

    def calls(self, step: int | None = None) -> tuple[str, ...]:
        """The calls that the script makes, up to a step, as lines to show."""
        return tuple(text for number, text in self._calls if step is None or number <= step)

    def _called(self, kind: str, function: Ref, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Ref:
        words = [*map(describe, args), *(f"{name}={describe(value)}" for name, value in kwargs.items())]
        text = f"{function._text}({', '.join(words)})"
        return self._step(kind, [function, list(args), kwargs], f"{function._text.rpartition('.')[2]}(…)", call=text)

    def _step(self, kind: str, parts: list[Any], text: str, *, call: str = "") -> Ref:
        number = len(self._steps)
        if call:
            self._calls.append((number, call))
        self._steps.append({"do": kind, "id": number, "with": [self._packed(part) for part in parts]})
        return Ref(self, number, text)

    def _packed(self, value: Any) -> Any:
        return pack(value, self._tensors, _reference)


@dataclass(frozen=True)
class Check:
    """A function that fills a case, with its points and limits. Its docstring says what it shows."""

    fill: Callable[[Any], None]
    task: str
    points: int
    hidden: bool
    limits: Limits = field(default_factory=Limits)

    @property
    def name(self) -> str:
        """Name of the function."""
        return self.fill.__name__

    @property
    def title(self) -> str:
        """First line of its docstring."""
        return (self.fill.__doc__ or self.name.replace("_", " ")).strip().splitlines()[0]

    def case(self, seed: int, ours: ModuleType | None = None) -> Case:
        """A case with fresh inputs."""
        case = Case(seed, ours)
        self.fill(case)
        return case


def check(
    task: str, points: int = 1, *, hidden: bool = False, seconds: float = 10.0, memory_mb: int = 512
) -> Callable[[Callable[[Any], None]], Check]:
    """Make a check of a function `fill(case)`. A hidden one is left out when a course is released to learners."""
    limits = Limits(seconds=seconds, memory_bytes=memory_mb << 20)
    return lambda fill: Check(fill, task, points, hidden, limits)


@dataclass(frozen=True)
class Failure:
    """The first expectation that a reply does not meet: the calls up to there, what is wrong, and why it matters."""

    calls: tuple[str, ...]
    what: str
    why: str = ""


def judge(case: Case, reply: Reply) -> Failure | None:
    """What is wrong with the values that came back; None if all of them are as expected."""
    for expectation, value in zip(case.expectations, reply.values, strict=False):
        try:
            wrong = expectation.accepts(value)
        except Exception as error:  # nobody foresaw this value: it is wrong, and no reason for the grader to stop
            wrong = f"got {describe(value)}, which cannot be judged ({type(error).__name__})"
        if wrong:
            return Failure(case.calls(expectation.step), f"{expectation.text}: {wrong}", expectation.why)
    return None


def describe(value: Any) -> str:
    """A value as it stands in the line of a call: a tensor by its type and shape."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, Ref):
        return value._text
    if isinstance(value, tuple):
        return ", ".join(map(describe, value))
    if isinstance(value, list) and any(isinstance(part, (Tensor, list, Ref)) for part in value):
        return f"[{', '.join(map(describe, value[:3]))}{', …' if len(value) > 3 else ''}]"
    if isinstance(value, slice):
        return ":".join("" if part is None else str(part) for part in (value.start, value.stop))
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _reference(value: Any) -> Any:
    if isinstance(value, Ref):
        return {"ref": value._id}
    if isinstance(value, slice):
        return {"slice": [value.start, value.stop, value.step]}
    raise TypeError(f"A script takes numbers, strings, tensors, containers and references, not {type(value).__name__}.")


def _wrong_error(got: Any, error: str) -> str | None:
    if not isinstance(got, list) or error not in got:
        return f"expected {error}, got {got[0] if isinstance(got, list) and got else 'no error'}"
    return None
