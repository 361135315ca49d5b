"""Wrong prefix caches that people really write. Each explanation completes "This is what comes out when …"."""

from __future__ import annotations

from minillm.course.lab.exercises import Mutant

MUTANTS = (
    Mutant(
        "no_parent",
        "a name depends on the tokens of its block alone: after another beginning the wrong keys are found",
        {'f"{parent}|{block}"': 'f"{salt}|{block}"'},
    ),
    Mutant(
        "no_salt",
        "the salt is not looked at: everybody shares with everybody",
        {"names, parent = [], salt": 'names, parent = [], ""'},
    ),
    Mutant(
        "partial_block_named",
        "the block that is not full gets a name, too; it will have other tokens in a moment",
        {"range(block_size, len(tokens) + 1, block_size)": "range(block_size, len(tokens) + block_size, block_size)"},
    ),
    Mutant(
        "last_full_block_forgotten",
        "a block that ends with the text has no name",
        {"range(block_size, len(tokens) + 1, block_size)": "range(block_size, len(tokens), block_size)"},
    ),
    Mutant(
        "digits_run_together",
        "nothing stands between the tokens: 1, 23 and 12, 3 have the same name",
        {'",".join(': '"".join('},
    ),
    Mutant(
        "gaps_skipped",
        "known blocks behind an unknown one are taken as well",
        {"            break\n": "            continue\n"},
    ),
    Mutant(
        "everything_saved",
        "a prompt that is known entirely computes nothing, so that there are no logits to continue from",
        {"max(0, min(len(blocks) * block_size, num_tokens - 1))": "len(blocks) * block_size"},
    ),
    Mutant(
        "last_block_dropped",
        "a prompt that is known entirely gives up its whole last block to compute one token",
        {
            "    return blocks, max(0, min(len(blocks) * block_size, num_tokens - 1))": "    if len(blocks) * "
            "block_size >= num_tokens:\n        blocks.pop()\n    return blocks, len(blocks) * block_size"
        },
    ),
    Mutant(
        "blocks_counted",
        "the number of blocks is returned where the number of tokens is asked for",
        {"min(len(blocks) * block_size, num_tokens - 1)": "min(len(blocks), num_tokens - 1)"},
    ),
    Mutant(
        "most_recent_first",
        "the block that was useful last is taken first: a stack",
        {"popitem(last=False)": "popitem()"},
    ),
    Mutant(
        "prepend_appends",
        "a block that nobody can find again goes to the end, and pushes out what is still worth something",
        {"        self.blocks.move_to_end(block, last=False)\n": ""},
    ),
    Mutant(
        "append_prepends",
        "a block that the cache still knows goes to the head and is forgotten at once",
        {
            'it goes to the end."""\n        # BEGIN SOLUTION\n        self.blocks[block] = None': "it goes to the "
            'end."""\n        # BEGIN SOLUTION\n        self.blocks[block] = None\n'
            "        self.blocks.move_to_end(block, last=False)"
        },
    ),
    Mutant(
        "remove_takes_the_head",
        "the head is taken out, not the block that was asked for",
        {"        del self.blocks[block]\n": "        self.blocks.popitem(last=False)\n"},
    ),
    Mutant(
        "fork_is_the_same_list",
        "both sequences have the very same table: what one writes, the other sees",
        {"        return list(table)\n": "        return table\n"},
    ),
    Mutant(
        "fork_not_counted",
        "a fork does not count: the blocks are freed while the other still reads them",
        {"            self.ref_counts[block] += 1\n": "            pass\n"},
    ),
    Mutant(
        "writes_into_shared",
        "a shared block is written where it is, and the other sequence reads it",
        {"if self.ref_counts[source] == 1:": "if True:"},
    ),
    Mutant(
        "always_copies",
        "a block is copied even if nobody else holds it",
        {"if self.ref_counts[source] == 1:": "if False:"},
    ),
    Mutant(
        "source_keeps_its_count",
        "the writer leaves the shared block and is still counted there: it is never free again",
        {"        self.ref_counts[source] -= 1\n": ""},
    ),
    Mutant(
        "copied_for_the_other",
        "source and target are exchanged: the empty block is copied over the full one",
        {"return source, table[index]": "return table[index], source"},
    ),
    Mutant(
        "released_for_all",
        "a block is free as soon as one of its tables lets go",
        {"self.ref_counts[block] -= 1\n        table": "self.ref_counts[block] = 0\n        table"},
    ),
    Mutant(
        "table_not_emptied",
        "a released table still names its blocks",
        {"        table.clear()\n": ""},
    ),
)
