"""Wrong pagings that people really write. Each explanation completes "This is what comes out when …"."""

from __future__ import annotations

from minillm.course.lab.exercises import Mutant

MUTANTS = (
    Mutant(
        "dummy_given_away",
        "block 0 is handed out like any other, and padding is written over somebody's keys",
        {"deque(range(1, num_blocks))": "deque(range(num_blocks))"},
    ),
    Mutant(
        "latest_first",
        "the block that was given back last is taken first: a stack, not a queue",
        {"self.free_blocks.extend(blocks)": "self.free_blocks.extendleft(blocks)"},
    ),
    Mutant(
        "as_many_as_there_are",
        "a pool with too few blocks gives what it has, and the sequence thinks it has them all",
        {"            return None\n": "            count = self.num_free\n"},
    ),
    Mutant(
        "empty_means_error",
        "a pool with too few blocks breaks in the middle, and those that it took are lost",
        {"if count > self.num_free:": "if False:"},
    ),
    Mutant(
        "freed_twice",
        "a block that is free already is taken back once more, and two sequences will get it",
        {"if len(set(blocks)) < len(blocks) or set(blocks) & set(self.free_blocks):": "if False:"},
    ),
    Mutant(
        "twice_in_one_call",
        "a block that stands in the list twice is taken back twice",
        {"len(set(blocks)) < len(blocks) or ": ""},
    ),
    Mutant(
        "rounded_down",
        "the tokens of the last block that is not full have no place",
        {"(num_tokens + block_size - 1) // block_size": "num_tokens // block_size"},
    ),
    Mutant(
        "always_one_more",
        "a sequence that fills its last block exactly gets another one",
        {"(num_tokens + block_size - 1) // block_size": "num_tokens // block_size + 1"},
    ),
    Mutant(
        "table_not_counted",
        "blocks that the sequence has already are asked for again",
        {"max(0, needed - len(block_table))": "max(0, needed)"},
    ),
    Mutant(
        "below_zero",
        "a table that is longer than needed counts as a negative number of blocks",
        {"max(0, needed - len(block_table))": "needed - len(block_table)"},
    ),
    Mutant(
        "positions_as_slots",
        "positions are taken for slots, as if the blocks were neighbours in order",
        {"[block_table[p // block_size] * block_size + p % block_size for p in": "[p for p in"},
    ),
    Mutant(
        "offset_from_start",
        "offsets are counted from `start`, not from the beginning of the sequence",
        {"for p in range(start, end)]": "for p in range(end - start)]"},
    ),
    Mutant(
        "block_numbers_only",
        "the offset in the block is forgotten: all tokens of a block lie on top of each other",
        {" * block_size + p % block_size": " * block_size"},
    ),
    Mutant(
        "slots_swapped",
        "block and offset are exchanged when a slot is taken apart",
        {"where // block_size, where % block_size": "where % block_size, where // block_size"},
    ),
    Mutant(
        "values_are_keys",
        "the keys are written in the place of the values",
        {"v_pool[:, block, offset] = v.transpose": "v_pool[:, block, offset] = k.transpose"},
    ),
    Mutant(
        "written_in_order",
        "tokens are written to slots 0, 1, 2, …: the slots that were given are not looked at",
        {"torch.tensor(slots, device=k_pool.device)": "torch.arange(len(slots), device=k_pool.device)"},
    ),
    Mutant(
        "whole_blocks",
        "all tokens of the table's blocks are read, those behind the last one, too",
        {
            "slot_mapping(block_table, 0, seq_len, block_size)": "slot_mapping(block_table, 0, len(block_table) * "
            "block_size, block_size)"
        },
    ),
    Mutant(
        "blind_to_itself",
        "the newest token does not see its own key",
        {
            "slot_mapping(block_table, 0, seq_len, block_size)": "slot_mapping(block_table, 0, max(1, seq_len - 1), "
            "block_size)"
        },
    ),
    Mutant(
        "no_scale",
        "the scores are not scaled",
        {".float() * scale": ".float()"},
    ),
    Mutant(
        "heads_take_turns",
        "query heads take turns with the key/value heads, where neighbours share one",
        {
            "grouped = q.view(len(k), -1, q.shape[-1])": "grouped = q.view(-1, len(k), q.shape[-1]).transpose(0, 1)",
            "(weights.to(v.dtype) @ v).view": "(weights.to(v.dtype) @ v).transpose(0, 1).reshape",
        },
    ),
)
