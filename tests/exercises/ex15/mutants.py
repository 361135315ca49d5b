"""Wrong engines that people really write. Each explanation completes "This is what comes out when …"."""

from __future__ import annotations

from minillm.course.lab.exercises import Mutant

MUTANTS = (
    Mutant(
        "positions_from_zero",
        "the positions of every chunk begin at 0, as if nothing had been computed before",
        {"batch.positions += positions": "batch.positions += range(count)"},
    ),
    Mutant(
        "blocks_as_neighbours",
        "slots are counted from the first block on, as if the blocks of a sequence were neighbours",
        {
            "[table[p // block_size] * block_size + p % block_size for p in positions]": "[table[0] * block_size + p "
            "for p in positions]"
        },
    ),
    Mutant(
        "every_chunk_speaks",
        "every sequence gets a row of logits, also one in the middle of its prompt",
        {"if count == sequence.remaining:": "if count:"},
    ),
    Mutant(
        "keys_not_there_yet",
        "a sequence is said to have all of its tokens in the cache, not only those up to this step",
        {"batch.kv_lens.append(positions.stop)": "batch.kv_lens.append(len(sequence.tokens))"},
    ),
    Mutant(
        "whole_blocks_read",
        "whole blocks are read, with what lies behind the last token",
        {"reshape(kv_heads, -1, d)[:, :kv_len]": "reshape(kv_heads, -1, d)"},
    ),
    Mutant(
        "blocks_sorted",
        "blocks are read in the order of their numbers, not of the table",
        {"pool[:, table]": "pool[:, sorted(table)]"},
    ),
    Mutant(
        "oldest_leaves",
        "the oldest sequence leaves, and never gets on",
        {"victim = running.pop()\n        num_tokens.pop()": "victim = running.pop(0)\n        num_tokens.pop(0)"},
    ),
    Mutant(
        "computed_without_blocks",
        "whoever leaves still counts its tokens as computed, though their keys are gone",
        {"victim.block_table, victim.num_computed = [], 0": "victim.block_table = []"},
    ),
    Mutant(
        "count_replaced",
        "num_computed becomes the tokens of this step, where these should be added",
        {"sequence.num_computed += count": "sequence.num_computed = count"},
    ),
    Mutant(
        "one_cache_for_all_layers",
        "all layers write to the cache of the first",
        {"self.keys[layer], self.values[layer], batch": "self.keys[0], self.values[0], batch"},
    ),
    Mutant(
        "plain_parts",
        "the engine takes the plain parts, whatever it is given",
        {"self.parts = parts or Parts()": "self.parts = Parts()"},
    ),
    Mutant(
        "padding_block_counted",
        "block 0 is counted as room, though nobody gets it",
        {"self.capacity = (num_blocks - 1) * block_size": "self.capacity = num_blocks * block_size"},
    ),
    Mutant(
        "last_token_stored",
        "room is asked for the last token, too, which is never computed",
        {"needed = len(prompt) + max_tokens - 1": "needed = len(prompt) + max_tokens"},
    ),
)
