"""Wrong schedulers that people really write. Each explanation completes "This is what comes out when …"."""

from __future__ import annotations

from minillm.course.lab.exercises import Mutant

MUTANTS = (
    Mutant(
        "nobody_waits",
        "decodes take part beside the prompts: the old way is not that kind",
        {"0 if someone_behind and count == 1 else min(count, budget)": "min(count, budget)"},
    ),
    Mutant(
        "decodes_never",
        "those who decode get nothing even when nobody is behind",
        {"someone_behind = any(count > 1 for count in remaining)": "someone_behind = True"},
    ),
    Mutant(
        "budget_for_each",
        "the old way gives every sequence the whole budget",
        {"        scheduled.append(taken)\n        budget -= taken": "        scheduled.append(taken)"},
    ),
    Mutant(
        "whole_prompts_only",
        "a prompt that does not fit into the budget waits, instead of giving up a chunk",
        {
            "    for i in by_distance:\n        scheduled[i] = min(running[i], budget)": "    for i in by_distance:\n"
            "        scheduled[i] = running[i] if running[i] <= budget else 0"
        },
    ),
    Mutant(
        "oldest_first",
        "the running ones are served by age alone: a long prompt takes the budget that decodes needed",
        {"sorted(range(len(running)), key=lambda i: running[i] > 1)": "range(len(running))"},
    ),
    Mutant(
        "chunks_first",
        "chunks come before decodes: everybody's answer stalls while a prompt is read",
        {"key=lambda i: running[i] > 1)": "key=lambda i: running[i] == 1)"},
    ),
    Mutant(
        "shortest_first",
        "the running ones are sorted by how much remains: a short prompt overtakes an older, longer one",
        {"key=lambda i: running[i] > 1)": "key=lambda i: running[i])"},
    ),
    Mutant(
        "budget_not_spent",
        "what the running ones take is not taken off the budget",
        {"        budget -= scheduled[i]\n": ""},
    ),
    Mutant(
        "waiting_before_chunks",
        "waiting sequences come in before the running ones that are behind have got their chunk",
        {
            "    for i in by_distance:\n": "    spare = max(0, budget - sum(count == 1 for count in running))\n"
            "    newcomers: list[int] = []\n    for count in waiting[: max(0, max_num_seqs - len(running))]:\n"
            "        if spare:\n            newcomers.append(min(count, spare))\n            spare -= newcomers[-1]\n"
            "    budget -= sum(newcomers)\n    for i in by_distance:\n",
            "    return scheduled, admitted": "    return scheduled, newcomers",
        },
    ),
    Mutant(
        "small_ones_overtake",
        "a waiting sequence that does not fit is passed over, and a smaller one behind it comes in",
        {
            "        admitted.append(min(remaining, budget))\n        budget -= admitted[-1]": "        if remaining > "
            "budget:\n            continue\n        admitted.append(remaining)\n        budget -= remaining"
        },
    ),
    Mutant(
        "seats_not_counted",
        "as many waiting ones are admitted as there are seats, though some are taken",
        {"waiting[: max(0, max_num_seqs - len(running))]": "waiting[:max_num_seqs]"},
    ),
    Mutant(
        "admitted_with_nothing",
        "waiting sequences are admitted when the budget is spent, with 0 tokens: they hold a seat and do nothing",
        {"        if budget == 0:\n            break\n": ""},
    ),
    Mutant(
        "oldest_victim",
        "the oldest gives its blocks back: it has waited longest and never gets done",
        {
            "    youngest = len(held) - 1\n": "    youngest = 0\n",
            "youngest >= 0": "youngest < len(held)",
            "        youngest -= 1\n": "        youngest += 1\n",
        },
    ),
    Mutant(
        "largest_victim",
        "whoever holds most gives back first, not the youngest",
        {
            "    youngest = len(held) - 1\n": "    order = sorted(range(len(held)), key=lambda i: held[i])\n"
            "    youngest = len(held) - 1\n",
            "victims.append(youngest)": "victims.append(order[youngest])",
            "held[youngest]": "held[order[youngest]]",
        },
    ),
    Mutant(
        "free_blocks_ignored",
        "the blocks that are free already do not count: more give back than necessary",
        {"    youngest = len(held) - 1\n": "    youngest, num_free = len(held) - 1, 0\n"},
    ),
    Mutant(
        "one_victim_too_many",
        "one gives back although exactly enough is free",
        {"while num_free < needed": "while num_free <= needed"},
    ),
    Mutant(
        "chunks_bring_tokens",
        "every chunk of a prompt brings a new token, not the last one only",
        {"            if remaining[i] == 0:\n": "            if tokens:\n"},
    ),
    Mutant(
        "first_token_extra",
        "the token that comes out of prefill does not count among those that are wanted",
        {"wanted = list(prompts), list(outputs)": "wanted = list(prompts), [n + 1 for n in outputs]"},
    ),
    Mutant(
        "served_before_arrival",
        "requests are served before they arrive",
        {"if arrivals[i] <= len(steps)]": "if arrivals[i] <= len(steps) + 10**6]"},
    ),
    Mutant(
        "idle_steps_skipped",
        "steps in which nobody is there are left out",
        {
            "        steps.append(row)\n": "        if any(row):\n            steps.append(row)\n        else:\n"
            "            arrivals = [arrival - 1 for arrival in arrivals]\n"
        },
    ),
)
