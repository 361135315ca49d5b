"""Wrong attentions that people really write. Each explanation completes "This is what comes out when …"."""

from __future__ import annotations

from minillm.course.lab.exercises import Mutant

MUTANTS = (
    Mutant(
        "top_left",
        "the causal triangle is aligned at the top left: query i sees i + 1 keys, as if nothing came before",
        {"torch.arange(kv_len - q_len, kv_len)[:, None]": "torch.arange(q_len)[:, None]"},
    ),
    Mutant(
        "blind_to_itself",
        "a query sees the keys before its own position but not its own",
        {"key <= position\n": "key < position\n"},
    ),
    Mutant(
        "sees_the_future",
        "the triangle is upside down: each query sees what comes behind it",
        {"key <= position\n": "key >= position\n"},
    ),
    Mutant(
        "window_plus_one",
        "the window counts the keys before a query, not its own: one too many is seen",
        {"key > position - sliding_window": "key >= position - sliding_window"},
    ),
    Mutant(
        "window_forgotten",
        "sliding_window is not looked at",
        {"if sliding_window is not None:": "if False:"},
    ),
    Mutant(
        "no_maximum",
        "exp is taken of the scores as they are, and large ones overflow",
        {"scores - largest.where(largest.isfinite(), 0.0)": "scores"},
    ),
    Mutant(
        "maximum_of_everything",
        "the largest score of the whole tensor is taken off, so that rows far below it become 0",
        {"scores.amax(dim=-1, keepdim=True)": "scores.max()"},
    ),
    Mutant(
        "nan_rows",
        "a row of -inf throughout becomes NaN, because -inf - (-inf) is",
        {"largest.where(largest.isfinite(), 0.0)": "largest"},
    ),
    Mutant(
        "wrong_axis",
        "the softmax runs along the queries: columns sum to 1, not rows",
        {
            "scores.amax(dim=-1, keepdim=True)": "scores.amax(dim=-2, keepdim=True)",
            "weights.sum(dim=-1, keepdim=True)": "weights.sum(dim=-2, keepdim=True)",
        },
    ),
    Mutant(
        "no_scale",
        "the scores are not scaled",
        {".float() * scale": ".float()"},
    ),
    Mutant(
        "divided_by_scale",
        "the scores are divided by the scale",
        {".float() * scale": ".float() / scale"},
    ),
    Mutant(
        "masked_afterwards",
        "hidden weights are set to 0 after the softmax, so that the others no longer sum to 1",
        {'softmax(scores.masked_fill(~mask, float("-inf")))': "softmax(scores) * mask"},
    ),
    Mutant(
        "hidden_scores_are_zero",
        "hidden scores are multiplied by 0, and exp(0) = 1 is a weight like any other",
        {'scores.masked_fill(~mask, float("-inf"))': "scores * mask"},
    ),
    Mutant(
        "mask_turned_round",
        "masked_fill hides where the mask is True, and True means: may be seen",
        {"masked_fill(~mask,": "masked_fill(mask,"},
    ),
    Mutant(
        "heads_take_turns",
        "query head h reads key/value head h % kv_heads, where neighbours share one: h // group",
        {"k[head // group], v[head // group]": "k[head % kv_heads], v[head % kv_heads]"},
    ),
    Mutant(
        "values_of_head_zero",
        "all heads read the values of the first key/value head",
        {"v[head // group]": "v[0]"},
    ),
    Mutant(
        "heads_in_front",
        "the heads are stacked along the first dimension: [heads, q_len, d] instead of [q_len, heads, d]",
        {"torch.stack(outs, dim=1)": "torch.stack(outs, dim=0)"},
    ),
)
