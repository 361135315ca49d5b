"""Engine settings as options of a command.

`EngineConfig` is the only list of them: names, types, defaults and allowed values come from there.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from typing import Any, get_type_hints

import typer

from minillm.config import EngineConfig

HELP = {
    "kernels": "The fastest kernels here, or the definitions",
    "kv_format": "KV cache: auto (the model's dtype), fp8, int8 or int4",
    "policy": "Who goes first",
    "max_num_seqs": "Requests that run at the same time",
    "max_num_batched_tokens": "Tokens per step",
    "enable_prefix_caching": "Reuse the KV of common beginnings",
    "cache_bytes": "KV cache in GiB; by default what the engine chooses",
}


def gib(text: str) -> int:
    """So many GiB in bytes. Raises ValueError for what is no number."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no number of GiB.")
    return int(number * 2**30)


SPELLED: dict[str, tuple[str, dict[str, Any]]] = {  # options that are not called like their field, or read otherwise
    "enable_prefix_caching": ("--prefix-caching/--no-prefix-caching", {}),
    "cache_bytes": ("--cache-gib", {"parser": gib, "metavar": "<float>"}),
}


def engine_options(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command that ends in `**settings` an option for each of these fields; their values arrive there by name.

    What a value may be is checked in one place, where the command makes its `EngineConfig`.
    """

    def with_options(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(**values: Any) -> None:
            command(**values)

        signature = inspect.signature(command, eval_str=True)
        own = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
        run.__signature__ = signature.replace(parameters=[*own, *map(_option, names)])  # type: ignore[attr-defined]
        return run

    return with_options


def _option(name: str) -> inspect.Parameter:
    """The option for one field."""
    (field,) = (one for one in fields(EngineConfig) if one.name == name)
    choices = field.metadata.get("choices", ())
    help = f"{HELP[name]}: {', '.join(choices)}." if choices else f"{HELP[name]}."
    spelled, how = SPELLED.get(name, (f"--{name.replace('_', '-')}", {}))
    option = typer.Option(field.default, spelled, help=help, rich_help_panel="Engine", **how)
    kind = get_type_hints(EngineConfig)[name]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind)
