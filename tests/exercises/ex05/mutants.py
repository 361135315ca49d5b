"""Wrong closed forms that people really write. Each explanation completes "This is what comes out when …"."""

from __future__ import annotations

from minillm.course.lab.exercises import Mutant

PAIRS = "q_len * (kv_len - q_len) + q_len * (q_len + 1) // 2"

MUTANTS = (
    Mutant(
        "one_flop_per_weight",
        "a multiply-add counts as one FLOP in the layers, not as two",
        {"layers = 2 * tokens": "layers = tokens"},
    ),
    Mutant(
        "square_of_pairs",
        "every query sees every key: the causal rule is forgotten",
        {PAIRS: "q_len * kv_len"},
    ),
    Mutant(
        "pairs_without_the_past",
        "queries see the new tokens only, not the cached ones",
        {PAIRS: "q_len * (q_len + 1) // 2"},
    ),
    Mutant(
        "blind_to_themselves",
        "a query sees the keys before its own but not its own",
        {PAIRS: "q_len * (kv_len - q_len) + q_len * (q_len - 1) // 2"},
    ),
    Mutant(
        "scores_only",
        "attention's scores are counted and weighing the values is not",
        {"attention = 4 * pairs": "attention = 2 * pairs"},
    ),
    Mutant(
        "attention_of_kv_heads",
        "attention is counted for the key/value heads, while every query head has scores of its own",
        {'pairs * shape["heads"]': 'pairs * shape["kv_heads"]'},
    ),
    Mutant(
        "head_for_every_token",
        "the head runs for every token of a prompt, not for the last one",
        {"head = 2 * len(step)": "head = 2 * tokens"},
    ),
    Mutant(
        "head_once",
        "the head runs once for the whole step, not once for each sequence",
        {"head = 2 * len(step)": "head = 2"},
    ),
    Mutant(
        "weights_per_sequence",
        "every sequence reads the weights for itself, as if nothing were gained by batching",
        {"weights = shape": "weights = len(step) * shape"},
    ),
    Mutant(
        "keys_without_values",
        "keys are counted and values forgotten",
        {"kv_per_token = 2 * shape": "kv_per_token = shape"},
    ),
    Mutant(
        "cache_of_query_heads",
        "the cache is counted with the query heads; grouped queries make it smaller",
        {'shape["layers"] * shape["kv_heads"]': 'shape["layers"] * shape["heads"]'},
    ),
    Mutant(
        "nothing_written",
        "new keys and values are not counted, only those that are read",
        {"sum(q_len + kv_len for": "sum(kv_len for"},
    ),
    Mutant(
        "fraction_turned_round",
        "bytes are divided by FLOPs",
        {
            "return step_flops(shape, step) / step_bytes(shape, step, element_bytes)": "return step_bytes("
            "shape, step, element_bytes) / step_flops(shape, step)"
        },
    ),
    Mutant(
        "one_after_the_other",
        "the times of arithmetic and memory are added; they pass at the same time",
        {
            '(compute, "compute") if': '(compute + memory, "compute") if',
            '(memory, "bandwidth")': '(compute + memory, "bandwidth")',
        },
    ),
    Mutant(
        "the_faster_one",
        "the faster of the two decides",
        {"if compute >= memory else": "if compute <= memory else"},
    ),
    Mutant(
        "names_swapped",
        "the seconds are right and the names of what is waited for are swapped",
        {
            '(compute, "compute") if compute >= memory': '(compute, "bandwidth") if compute > memory',
            '(memory, "bandwidth")': '(memory, "compute")',
        },
    ),
    Mutant(
        "tpot_over_all_tokens",
        "the decode steps are divided by new_tokens, though the first token needs none of them",
        {"/ len(contexts)": "/ new_tokens"},
    ),
    Mutant(
        "a_step_too_many",
        "new_tokens decode steps are counted, but the first token comes out of prefill",
        {"prompt_len + new_tokens)": "prompt_len + new_tokens + 1)"},
    ),
    Mutant(
        "context_stands_still",
        "every decode step is counted at the prompt's length: the cache grows meanwhile",
        {"bound([(1, context)])": "bound([(1, prompt_len)])"},
    ),
)
