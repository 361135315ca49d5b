"""Which functions of the course have a place in the engine. Those that are not listed are graded, not plugged in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minillm.course.use.codes import put_fp8, put_int4, put_int8
from minillm.course.use.kernels import (
    put_grouped_attention,
    put_paged_decode,
    put_tiled_attention,
    put_triton_attention,
)
from minillm.course.use.memory import put_block_pool, put_free_queue, put_match, put_slots
from minillm.course.use.rehearsals import rehearse_cache, rehearse_engine, rehearse_loop
from minillm.course.use.requests import put_metrics, put_schedule
from minillm.course.use.tokens import put_process, put_proposer, put_residual, put_sample, put_verify_greedy

if TYPE_CHECKING:
    from minillm.llm import LLM


@dataclass(frozen=True)
class Plug:
    """tasks: what must be written. place: what it replaces. install: does it, or says why it cannot be done here.

    A plug changes an engine from outside: it replaces an object that the engine looks up at each step. The engine
    knows nothing of it.
    """

    exercise: str
    tasks: tuple[str, ...]
    place: str
    install: Callable[[Any, LLM], str | None]


KERNEL, FREE_BLOCKS = "attention of every request", "free blocks"

PLUGS = (
    Plug("ex01", ("generate",), "a loop for one sequence (rehearsed)", rehearse_loop),
    Plug("ex01", ("ttft", "tpot", "itl"), "times of a request", put_metrics),
    Plug("ex02", ("grouped_attention",), KERNEL, put_grouped_attention),
    Plug("ex03", ("KVCache", "prefill", "decode"), "a cache for one sequence (rehearsed)", rehearse_cache),
    Plug("ex04", ("apply_temperature", "top_k", "top_p", "min_p"), "logits to probabilities", put_process),
    Plug("ex04", ("sample",), "probabilities to a token", put_sample),
    Plug("ex06", ("tiled_attention",), KERNEL, put_tiled_attention),
    Plug("ex07", ("attention_kernel",), KERNEL, put_triton_attention),
    Plug("ex09", ("slot_mapping",), "slots of new tokens", put_slots),
    Plug("ex09", ("BlockPool",), FREE_BLOCKS, put_block_pool),
    Plug("ex09", ("paged_decode_attention",), "attention of decode steps", put_paged_decode),
    Plug("ex10", ("hash_blocks", "longest_match"), "search in the prefix cache", put_match),
    Plug("ex10", ("FreeQueue",), FREE_BLOCKS, put_free_queue),
    Plug("ex11", ("schedule",), "tokens per request and step", put_schedule),
    Plug("ex12", ("quantize_int8", "dequantize_int8"), "8-bit codes", put_int8),
    Plug("ex12", ("quantize_int4", "pack_int4", "unpack_int4"), "4-bit codes", put_int4),
    Plug("ex12", ("round_fp8",), "fp8 codes", put_fp8),
    Plug("ex13", ("propose_ngram",), "guesses", put_proposer),
    Plug("ex13", ("verify_greedy",), "how many guesses are accepted", put_verify_greedy),
    Plug("ex13", ("acceptance_probability", "residual"), "draws in the place of a guess", put_residual),
    Plug("ex15", ("Engine",), "a whole engine (rehearsed)", rehearse_engine),
)
