"""Wrong caches that people really write. Each explanation completes "This is what comes out when …"."""

from __future__ import annotations

from minillm.course.lab.exercises import Mutant

MUTANTS = (
    Mutant(
        "keys_only",
        "the keys are counted and the values forgotten",
        {"return 2 * num_tokens": "return num_tokens"},
    ),
    Mutant(
        "counter_moves_in_write",
        "every layer moves the counter, so that the next layer writes behind tokens that it does not have",
        {
            "        return self.keys[layer, :, :end], self": "        self.num_tokens = end\n"
            "        return self.keys[layer, :, :end], self"
        },
    ),
    Mutant(
        "values_are_keys",
        "the keys are stored in the place of the values",
        {"self.values[layer, :, start:end] = v.transpose": "self.values[layer, :, start:end] = k.transpose"},
    ),
    Mutant(
        "whole_memory_returned",
        "the whole memory is returned, with the garbage behind the last token",
        {
            ":, :end], self.values[layer, :, :end]": ":], self.values[layer, :]",
        },
    ),
    Mutant(
        "only_new_rows",
        "only the new tokens are returned, so that nobody sees what was cached",
        {":, :end], self.values[layer, :, :end]": ":, start:end], self.values[layer, :, start:end]"},
    ),
    Mutant(
        "growth_forgets",
        "new memory replaces the old one and nothing is copied into it",
        {
            "torch.nn.functional.pad(self.keys, (0, 0, 0, room))": "torch.zeros_like(torch.nn.functional.pad("
            "self.keys, (0, 0, 0, room)))"
        },
    ),
    Mutant(
        "growth_by_need",
        "the memory grows to just what is needed, and is copied again at every token",
        {"max(end, 2 * self.capacity)": "end"},
    ),
    Mutant(
        "growth_only_doubles",
        "the memory doubles once, even where a step needs more",
        {"max(end, 2 * self.capacity)": "2 * self.capacity"},
    ),
    Mutant(
        "top_left_mask",
        "the causal triangle is aligned at the top left, as is_causal=True does: query i sees i + 1 keys only",
        {"attn_mask=mask": "is_causal=True"},
    ),
    Mutant(
        "no_mask",
        "there is no mask: prompt tokens see the tokens behind them",
        {", attn_mask=mask": ""},
    ),
    Mutant(
        "blind_to_itself",
        "a query sees the keys before its own position but not its own",
        {"<= position[:, None]": "< position[:, None].clamp(min=1)"},
    ),
    Mutant(
        "wrong_group",
        "query heads take turns with the key/value heads (repeat) where neighbours share one (repeat_interleave)",
        {
            "keys.repeat_interleave(group, 0)": "keys.repeat(group, 1, 1)",
            "values.repeat_interleave(group, 0)": "values.repeat(group, 1, 1)",
        },
    ),
    Mutant(
        "truncate_by",
        "truncate takes its argument as the number of tokens to drop, not to keep",
        {"        self.num_tokens = num_tokens\n": "        self.num_tokens -= num_tokens\n"},
    ),
    Mutant(
        "truncate_anything",
        "truncate does not look at its argument",
        {"if not 0 <= num_tokens <= self.num_tokens:": "if False:"},
    ),
    Mutant(
        "positions_from_zero",
        "positions begin at 0 in every step, so that a decode token thinks it is the first of the text",
        {
            "positions = torch.arange(cache.num_tokens, cache.num_tokens + len(tokens)": "positions = torch.arange("
            "0, len(tokens)"
        },
    ),
    Mutant(
        "counter_stands_still",
        "the counter never moves, so that each step overwrites the one before",
        {"    cache.num_tokens += len(tokens)\n": ""},
    ),
    Mutant(
        "first_row",
        "the logits are those behind the first token of the step, not behind the last",
        {"hidden[-1:]": "hidden[:1]"},
    ),
    Mutant(
        "prefill_token_by_token",
        "the prompt goes through the model one token at a time: right, and as slow as decode",
        {
            "    return extend(model, token_ids, cache), cache": "    for token_id in token_ids:\n"
            "        logits = extend(model, [token_id], cache)\n    return logits, cache"
        },
    ),
    Mutant(
        "decode_runs_everything",
        "decode runs the whole text again: right, but the cache saves nothing",
        {
            "    return extend(model, token_ids, cache), cache": "    cache.text = list(token_ids)\n"
            "    return extend(model, token_ids, cache), cache",
            "    return extend(model, [token_id], cache)": "    cache.text.append(token_id)\n    cache.num_tokens = 0\n"
            "    return extend(model, cache.text, cache)",
        },
    ),
)
