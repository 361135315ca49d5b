"""Wrong tiles that people really write. Each explanation completes "This is what comes out when …"."""

from __future__ import annotations

from minillm.course.lab.exercises import Mutant

MUTANTS = (
    Mutant(
        "out_not_rescaled",
        "the output so far is not rescaled when the maximum rises",
        {"out * rescale[:, None] + weights @ v": "out + weights @ v"},
    ),
    Mutant(
        "sum_not_rescaled",
        "the sum so far is not rescaled when the maximum rises",
        {"l * rescale + weights.sum(dim=-1)": "l + weights.sum(dim=-1)"},
    ),
    Mutant(
        "nothing_rescaled",
        "neither the sum nor the output is rescaled when the maximum rises",
        {
            "l * rescale + weights.sum(dim=-1)": "l + weights.sum(dim=-1)",
            "out * rescale[:, None] + weights @ v": "out + weights @ v",
        },
    ),
    Mutant(
        "rescaled_the_wrong_way",
        "the factor is exp(new - old): what should shrink grows",
        {"rescale = torch.exp(m - base)": "rescale = torch.exp(base - m.where(m > NEG_INF, base))"},
    ),
    Mutant(
        "maximum_of_the_tile",
        "the maximum is that of the newest tile alone, not the largest so far",
        {"torch.maximum(m, scores.amax(dim=-1))": "scores.amax(dim=-1)"},
    ),
    Mutant(
        "hidden_rows_are_nan",
        "a row that has seen no key yet turns into NaN: -inf - (-inf)",
        {"base = new_m.where(new_m > NEG_INF, 0.0)": "base = new_m"},
    ),
    Mutant(
        "divided_at_each_tile",
        "the output is divided by the sum after every tile, and again at the end",
        {
            "return new_m, l * rescale + weights.sum(dim=-1), out * rescale[:, None] + weights @ v": "total = l * "
            "rescale + weights.sum(dim=-1)\n    return new_m, total, (out * rescale[:, None] + weights @ v) / total."
            "where(total > 0, 1.0)[:, None]"
        },
    ),
    Mutant(
        "never_divided",
        "the output is not divided by the sum",
        {"return out / l.where(l > 0, 1.0)[:, None], m": "return out, m"},
    ),
    Mutant(
        "nought_by_nought",
        "a row without keys becomes 0 / 0",
        {"out / l.where(l > 0, 1.0)[:, None]": "out / l[:, None]"},
    ),
    Mutant(
        "log_of_the_sum_only",
        "the log-sum-exp lacks the maximum that was taken off",
        {"m + l.log()": "l.log()"},
    ),
    Mutant(
        "top_left",
        "the causal triangle is aligned at the top left: the cached keys before the queries are not counted",
        {"k.shape[1] - q_len + start, tile,": "start, tile,"},
    ),
    Mutant(
        "blind_to_itself",
        "a query does not see its own key",
        {"keys.stop) > position": "keys.stop) >= position"},
    ),
    Mutant(
        "edge_tile_unmasked",
        "nothing is hidden inside a tile: queries see what comes behind them there",
        {".masked_fill(hidden, NEG_INF)": ""},
    ),
    Mutant(
        "every_tile_computed",
        "tiles behind the last query are computed and hidden: right, at twice the work",
        {
            "range(0, first + len(q), tile)": "range(0, len(k), tile)",
            "min(start + tile, first + len(q))": "min(start + tile, len(k))",
        },
    ),
    Mutant(
        "one_large_tile",
        "all keys form one tile: right, and the whole matrix is in memory again",
        {
            "    for start in range(0, first + len(q), tile):\n        keys = slice(start, min(start + tile, first + "
            "len(q)))": "    for start in (0,):\n        keys = slice(0, first + len(q))",
            "    for head in range(heads):\n        for start in range(0, q_len, tile)": "    for head in "
            "range(heads):\n        tile = q_len\n        for start in range(0, q_len, tile)",
        },
    ),
    Mutant(
        "last_tile_dropped",
        "queries or keys behind the last full tile are left out",
        {"range(0, first + len(q), tile)": "range(0, max(1, first + len(q) - tile + 1), tile)"},
    ),
    Mutant(
        "no_scale",
        "the scores are not scaled",
        {"q[rows, head].float() * scale": "q[rows, head].float()"},
    ),
    Mutant(
        "heads_take_turns",
        "query heads take turns with the key/value heads, where neighbours share one",
        {"k[head // group].float(), v[head // group].float()": "k[head % len(k)].float(), v[head % len(k)].float()"},
    ),
    Mutant(
        "plain_mean",
        "parts are averaged as if each held as much of the softmax",
        {"weights = shares / total.where(total > 0, 1.0)": "weights = torch.ones_like(shares) / len(shares)"},
    ),
    Mutant(
        "weights_not_exponential",
        "parts are weighted by their log-sum-exp itself, not by its exponential",
        {"shares = torch.exp(lses - largest.where(largest > NEG_INF, 0.0))": "shares = lses.clamp(min=-1e9).abs()"},
    ),
    Mutant(
        "merge_overflows",
        "the largest log-sum-exp is not taken off before exp",
        {
            "shares = torch.exp(lses - largest.where(largest > NEG_INF, 0.0))": "shares = torch.exp(lses)",
            "largest + total.log()": "total.log()",
        },
    ),
    Mutant(
        "largest_part_only",
        "the joined log-sum-exp is that of the largest part",
        {"largest + total.log()": "largest"},
    ),
    Mutant(
        "empty_parts_are_nan",
        "where all parts are empty, the result is NaN",
        {
            "lses - largest.where(largest > NEG_INF, 0.0)": "lses - largest",
        },
    ),
)
