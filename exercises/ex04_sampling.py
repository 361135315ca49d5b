"""Exercise 04 · Sampling: how do logits become a token?

You write the sampler: logits to probabilities by temperature, three ways to cut off the unlikely tail, and the draw
itself. Each cut takes probabilities and returns probabilities, so they can stand one behind the other: temperature,
top-k, top-p, min-p, then the draw.

Lesson: 04_sampling · 40 minutes · difficulty ●●○○○
"""

from __future__ import annotations

import torch
from torch import Tensor


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """softmax(logits / temperature): float32 `[vocab]` from logits `[vocab]`.

    Below 1 the likely tokens gain, above 1 the unlikely ones do. Temperature 0 is the limit: all of the probability on
    the largest logit, the first of them if several are equal (and no division by 0).

    >>> apply_temperature(torch.tensor([0.0, 0.0]), temperature=0.7)
    tensor([0.5000, 0.5000])
    >>> apply_temperature(torch.tensor([1.0, 3.0, 3.0]), temperature=0)
    tensor([0., 1., 0.])
    """
    raise NotImplementedError("apply_temperature is yours to write")


def top_k(probs: Tensor, k: int) -> Tensor:
    """Keep the k most likely tokens of probs `[vocab]`, renormalised; k = 0 keeps all.

    Of equally likely tokens the earlier one goes first, so that exactly k remain (`torch.sort` with `stable=True`).

    >>> top_k(torch.tensor([0.2, 0.5, 0.3]), k=2)
    tensor([0.0000, 0.6250, 0.3750])
    """
    raise NotImplementedError("top_k is yours to write")


def top_p(probs: Tensor, p: float) -> Tensor:
    """Keep the smallest set of most likely tokens of probs `[vocab]` whose mass reaches p, renormalised.

    The token that crosses p is kept: a token goes only if those *before* it have reached p already. p = 1 keeps all.
    Also called nucleus sampling (Holtzman et al. 2019).

    >>> top_p(torch.tensor([0.2, 0.5, 0.3]), p=0.6)
    tensor([0.0000, 0.6250, 0.3750])
    """
    raise NotImplementedError("top_p is yours to write")


def min_p(probs: Tensor, p: float) -> Tensor:
    """Keep the tokens of probs `[vocab]` that have at least p times the largest probability, renormalised.

    A sure model keeps few tokens, an unsure one many: the cut follows the shape of the distribution. p = 0 keeps all.

    >>> min_p(torch.tensor([0.1, 0.5, 0.4]), p=0.5)
    tensor([0.0000, 0.5556, 0.4444])
    """
    raise NotImplementedError("min_p is yours to write")


def sample(probs: Tensor, u: float) -> int:
    """The token that the random number 0 <= u < 1 falls on: the first at which the running sum exceeds u.

    Tokens lie side by side on the interval from 0 to 1, each as wide as it is likely; u points at one of them. Sum in
    float64, and scale u by the last sum, which rounding keeps from being 1. A token without probability is never hit.

    >>> probs = torch.tensor([0.0, 0.25, 0.75])
    >>> [sample(probs, u) for u in (0.0, 0.2, 0.3, 0.99)]
    [1, 1, 2, 2]
    """
    raise NotImplementedError("sample is yours to write")
