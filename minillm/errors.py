"""Everything that can go wrong through somebody's input, by name.

Each message says three things: what was given, what is allowed, and what to do. A caller who wants to catch
all of them catches `MinillmError`; the command line prints its message without a traceback.
"""

from __future__ import annotations

from typing import Any


class MinillmError(Exception):
    """Base of every error that wrong input can raise."""


class ConfigError(MinillmError, ValueError):
    """A setting of the engine, the machine or a model's config that cannot work."""


class CheckpointError(MinillmError):
    """A model folder that is missing, incomplete, damaged or inconsistent with its config."""


class UnsupportedModelError(CheckpointError):
    """A model whose architecture this package does not implement."""


class RequestError(MinillmError, ValueError):
    """One request that cannot be served: its prompt or its sampling parameters are at fault."""


def require(right: bool, name: str, value: Any, allowed: str, error: type[MinillmError] = RequestError) -> None:
    """Raise `error`, which names the value and what it must be, unless the value is right."""
    if not right:
        raise error(f"{name}={shown(value)} is not possible: it must be {allowed}.")


def shown(value: Any) -> str:
    """A value in a message: short, and never an error of its own (Python does not print integers of 5,000 digits)."""
    try:
        text = repr(value)
    except Exception:
        text = f"a strange {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."
