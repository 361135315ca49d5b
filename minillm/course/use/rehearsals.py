"""What an engine has no place for: a loop or a cache for one sequence (exercises 01, 03), and an engine (exercise 15).

Before the first request they write a few tokens with the very model that will be served, and must say what
`minillm.generate` says.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any
from zlib import crc32

import torch
from torch import Tensor

from minillm.cache.contiguous import ContiguousCache
from minillm.course.errors import LearnerError
from minillm.course.use.beside import Beside, known, tolerance_of
from minillm.generate import decode, extend, generate, prefill
from minillm.model.decoder import Decoder
from minillm.sampling import SamplingParams

if TYPE_CHECKING:
    from minillm.llm import LLM

PROMPT, NEW_TOKENS, BLOCK_SIZE = list(range(1, 12)), 8, 4


def _unspoilt(rehearse: Callable[[Any, LLM], str | None]) -> Callable[[Any, LLM], str | None]:
    """Rehearsals hand over the model itself, which is too large to copy: compare its weights afterwards."""

    @wraps(rehearse)
    def guarded(module: Any, llm: LLM) -> str | None:
        before = _sums(llm.engine.model)
        why_not = rehearse(module, llm)
        changed = [name for name, value in _sums(llm.engine.model).items() if before.get(name) != value]
        if changed:
            raise LearnerError(
                f"{module.__file__} changed the model while it was rehearsed: {changed[0]} is not what it was. Only "
                "read its weights, and load the model again."
            )
        return why_not

    return guarded


def _sums(model: Decoder) -> dict[str, int]:
    """A checksum of each weight and buffer; some are packed for oneDNN, and have no bytes before they are unpacked."""
    named = [*model.named_parameters(), *model.named_buffers()]
    plain = {name: tensor.to_dense() if tensor.is_mkldnn else tensor.detach() for name, tensor in named}
    return {name: crc32(one.cpu().contiguous().flatten().view(torch.uint8).numpy().data) for name, one in plain.items()}


def _expected(llm: LLM) -> list[int]:
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    return list(generate(llm.engine.model, PROMPT, params))


@_unspoilt
@torch.inference_mode()
def rehearse_loop(module: Any, llm: LLM) -> None:
    """The learner's loop around the engine's model and a contiguous cache."""
    model = llm.engine.model
    room = len(PROMPT) + NEW_TOKENS
    cache = ContiguousCache(model.config, capacity=room, device=model.device, dtype=model.dtype, kernels=model.kernels)

    def step(tokens: list[int]) -> Tensor:
        return extend(model, torch.tensor(tokens, device=model.device), cache)

    Beside("ex01 generate", module.generate, known).check(_expected(llm), step, PROMPT, NEW_TOKENS)


@_unspoilt
@torch.inference_mode()
def rehearse_cache(module: Any, llm: LLM) -> None:
    """The learner's two phases: logits of the prompt, then of one token after the other."""
    model, caches = llm.engine.model, list[Any]()
    tolerance = tolerance_of(model.dtype)
    logits, cache = prefill(model, PROMPT)

    def theirs(prompt: list[int]) -> Tensor:
        out, their_cache = module.prefill(model, prompt)
        caches.append(their_cache)
        return out

    Beside("ex03 prefill", theirs, known, tolerance).check(logits, PROMPT)
    step = Beside("ex03 decode", lambda token: module.decode(model, token, *caches), known, tolerance)
    for token in _expected(llm)[:-1]:
        step.check(decode(model, token, cache), token)


@_unspoilt
def rehearse_engine(module: Any, llm: LLM) -> str | None:
    """The learner's engine serves two requests with a cache for one and a half: one of them is preempted."""
    if llm.engine.model.dtype != torch.float32:
        return "two engines write the same tokens for certain in float32 only; see dtype='float32'"

    def serve(prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        num_blocks = 1 + 3 * (len(PROMPT) + NEW_TOKENS) // (2 * BLOCK_SIZE)
        sizes = {"num_blocks": num_blocks, "block_size": BLOCK_SIZE, "budget": 8, "max_num_seqs": 2}
        engine = module.Engine(llm.engine.model, **sizes)
        for prompt in prompts:
            engine.add(prompt, max_tokens)
        return engine.run()

    Beside("ex15 Engine", serve, known).check([_expected(llm)] * 2, [PROMPT, PROMPT], NEW_TOKENS)
    return None
