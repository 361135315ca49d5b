"""Which steps a piece of work takes: the shapes that `minillm.costs.formulas` puts a price on.

A step is a list of (q_len, kv_len) pairs, one per sequence: so many new tokens, so many tokens seen by the last of
them. That is all it takes. A prompt of N is (N, N), a chunk of it (C, end of the chunk), a decode (1, context), a
verification of γ drafts (γ + 1, context). A batch has one pair per sequence, and a mixed step just mixes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from minillm.errors import ConfigError, require

Step = Sequence[tuple[int, int]]  # (q_len, kv_len) per sequence; kv_len counts the new tokens, too


def num_tokens(step: Step) -> int:
    """New tokens of a step: the rows of its matrix products.

    Raises `ConfigError` for a sequence that has no new token, or fewer tokens than new ones.
    """
    wrong = [sequence for sequence in step if not 1 <= sequence[0] <= sequence[1]]
    if wrong:
        raise ConfigError(f"{wrong[0]} is no (q_len, kv_len): 1 <= q_len <= kv_len, for kv_len counts new tokens, too.")
    return sum(q_len for q_len, _ in step)


def prefill_step(tokens: int, batch: int = 1) -> Step:
    """`batch` whole prompts at once."""
    return [(tokens, tokens)] * batch


def chunk_steps(tokens: int, chunk: int) -> list[Step]:
    """A prompt cut into chunks: each sees the prefix before it. The last may be shorter."""
    require(chunk >= 1, "chunk", chunk, "at least 1", ConfigError)
    return [[(end - start, end)] for start, end in pairwise([*range(0, tokens, chunk), tokens])]


def decode_step(context: int, batch: int = 1) -> Step:
    """One new token for each of `batch` sequences, which it makes `context` tokens long."""
    return [(1, context)] * batch


def verify_step(context: int, drafts: int, batch: int = 1) -> Step:
    """The newest token and `drafts` guesses after it, scored in one step; the last makes `context` tokens."""
    return [(drafts + 1, context)] * batch
