"""minillm: an LLM inference engine small enough to read in an afternoon.

    from minillm import LLM, SamplingParams
    print(LLM("tiny").generate("def fib(n):", SamplingParams(temperature=0, max_tokens=64))[0].outputs[0].text)

Start reading at `minillm.generate` (the two phases), then `minillm.model.decoder`, then `minillm.engine`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minillm.errors import MinillmError as MinillmError
    from minillm.generate import decode as decode
    from minillm.generate import prefill as prefill
    from minillm.llm import LLM as LLM
    from minillm.model.loader import load_model as load_model
    from minillm.model.tokenizer import load_tokenizer as load_tokenizer
    from minillm.outputs import CompletionOutput as CompletionOutput
    from minillm.outputs import RequestOutput as RequestOutput
    from minillm.sampling import SamplingParams as SamplingParams

_HOME = {
    "LLM": "llm",
    "SamplingParams": "sampling",
    "RequestOutput": "outputs",
    "CompletionOutput": "outputs",
    "MinillmError": "errors",
    "load_model": "model.loader",
    "load_tokenizer": "model.tokenizer",
    "prefill": "generate",
    "decode": "generate",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: PyTorch takes seconds, and `minillm --help` needs none of it."""
    if name not in _HOME:
        raise AttributeError(f"module 'minillm' has no attribute {name!r}")
    return getattr(importlib.import_module(f"minillm.{_HOME[name]}"), name)
