"""The two phases of inference in their simplest honest form.

    logits, cache = prefill(model, prompt)      # all prompt tokens in one step: matrix x matrix
    token = int(logits.argmax())                # the first new token comes out of prefill
    logits = decode(model, token, cache)        # one token per step: matrix x vector

Both are `extend`: run new tokens after those in the cache. They differ in how many tokens that is, and that decides
everything else about them. M new tokens take one prefill and M - 1 decode steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from minillm.cache.contiguous import ContiguousCache
from minillm.config import check_prompt
from minillm.model.decoder import Decoder, inference
from minillm.sampling import SamplingParams, adjust, probs_from_logits, sample

SPARE = 64  # tokens of room after a prompt, before the cache has to grow


def extend(model: Decoder, tokens: Tensor, cache: ContiguousCache) -> Tensor:
    """Run tokens [q_len] after the cached ones; float32 logits [vocab_size] of what follows the last of them.

    The one step of inference. Any cut of a sequence into steps gives the same logits, up to rounding.
    """
    with inference(model.device):
        positions = torch.arange(cache.num_tokens, cache.num_tokens + len(tokens), device=tokens.device)
        hidden = model(tokens, positions, cache.attend)
        cache.num_tokens += len(tokens)
        return model.logits(hidden[-1:])[0]


def prefill(model: Decoder, token_ids: Sequence[int]) -> tuple[Tensor, ContiguousCache]:
    """Phase 1: all prompt tokens at once. Returns the logits [vocab_size] of the first new token, and the cache.

    Raises RequestError for an empty prompt, an unknown token id, or more tokens than the model has positions.
    """
    check_prompt(token_ids, model.config)
    room = len(token_ids) + SPARE
    cache = ContiguousCache(model.config, capacity=room, device=model.device, dtype=model.dtype, kernels=model.kernels)
    return extend(model, torch.tensor(token_ids, device=model.device), cache), cache


def decode(model: Decoder, token_id: int, cache: ContiguousCache) -> Tensor:
    """Phase 2: one token in, the logits [vocab_size] of the next one out. The cache grows by this token."""
    return extend(model, torch.tensor([token_id], device=model.device), cache)


def generate(
    model: Decoder, token_ids: Sequence[int], params: SamplingParams | None = None, *, sample_index: int = 0
) -> Iterator[int]:
    """Yield the new tokens, each as soon as it is known. The end token is part of them, as in vLLM.

    Stops after `max_tokens`, at a stop token, or where the model has no more positions. `sample_index` picks the
    random stream of one of several completions.
    """
    params = params or SamplingParams()
    room = model.config.max_position_embeddings - len(token_ids) + 1
    logits, cache = prefill(model, token_ids)
    output: list[int] = []
    for step in range(min(params.max_tokens, room)):
        if step > 0:
            logits = decode(model, output[-1], cache)
        output.append(choose(logits, params, token_ids, output, sample_index, model.config.eos_token_ids))
        yield output[-1]
        if params.ends_with(output[-1], model.config.eos_token_ids):
            return


def choose(
    logits: Tensor,
    params: SamplingParams,
    prompt: Sequence[int],
    output: Sequence[int],
    sample_index: int = 0,
    end_ids: Sequence[int] = (),
) -> int:
    """The token after `prompt` and `output`, drawn from its logits [vocab_size]."""
    if params.adjusts:
        logits = adjust(logits, params, prompt, output, end_ids)
    u = [params.random(sample_index, len(output))]
    numbers = None if params.greedy else torch.tensor(u, dtype=torch.float64, device=logits.device)
    return int(sample(probs_from_logits(logits[None], [params]), numbers))
