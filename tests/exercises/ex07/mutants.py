"""Wrong kernels that people really write. Each explanation completes "This is what comes out when …"."""

from __future__ import annotations

from minillm.course.lab.exercises import Mutant

MUTANTS = (
    Mutant(
        "padding_is_zero",
        "columns that do not exist are read as 0, which exp makes 1 of",
        {
            'tl.load(x_ptr + row * num_columns + column, mask=exists, other=float("-inf"))': "tl.load(x_ptr + row * "
            "num_columns + column, mask=exists, other=0.0)"
        },
    ),
    Mutant(
        "maximum_kept",
        "exp is taken before the maximum is off, and overflows",
        {"weights = tl.exp(x - tl.max(x, axis=0))": "weights = tl.exp(x)"},
    ),
    Mutant(
        "top_left",
        "the causal triangle is aligned at the top left: query i sees keys up to i",
        {"position = kv_len - q_len + query": "position = query"},
    ),
    Mutant(
        "blind_to_itself",
        "a query sees the keys before its own position, but not its own",
        {"key[None, :] <= position[:, None]": "key[None, :] < position[:, None]"},
    ),
    Mutant(
        "output_not_rescaled",
        "what was summed so far is not rescaled when a tile raises the maximum",
        {"out = out * rescale[:, None] + tl.dot": "out = out + tl.dot"},
    ),
    Mutant(
        "sum_not_rescaled",
        "the sum of the weights is not rescaled when a tile raises the maximum",
        {"l = l * rescale + tl.sum(weights, axis=1)": "l = l + tl.sum(weights, axis=1)"},
    ),
    Mutant(
        "first_tile_only",
        "the loop ends behind the query's own tile, as if queries and keys began at the same token",
        {
            "end = tl.minimum(kv_len, kv_len - q_len + tl.program_id(0) * TILE + TILE)": "end = tl.program_id(0) * "
            "TILE + TILE"
        },
    ),
    Mutant(
        "wrong_group",
        "query heads take turns with the key/value heads, where neighbours share one",
        {
            "        key = start + tl.arange(0, TILE)\n        rows = (head // GROUP * kv_len + key)[:, None] * D + "
            "dim[None, :]\n        k = tl.load(k_ptr + rows, mask=(key < kv_len)": "        key = start + "
            "tl.arange(0, TILE)\n        rows = (head % (HEADS // GROUP) * kv_len + key)[:, None] * D + dim[None, :]\n"
            "        k = tl.load(k_ptr + rows, mask=(key < kv_len)"
        },
    ),
    Mutant(
        "splits_overlap",
        "a part reads on to the last key, so that keys count twice",
        {"end = tl.minimum(kv_len, (split + 1) * split_len)": "end = kv_len"},
    ),
    Mutant(
        "lse_without_maximum",
        "the log of the sum is stored without the maximum that was taken off",
        {"m + tl.log(l))": "tl.log(l))"},
    ),
)
