"""Wrong samplers that people really write. Each explanation completes "This is what comes out when …"."""

from __future__ import annotations

from minillm.course.lab.exercises import Mutant

MUTANTS = (
    Mutant(
        "temperature_afterwards",
        "the probabilities are divided by the temperature, and the softmax was taken before: they no longer sum to 1",
        {"torch.softmax(logits.float() / temperature, dim=-1)": "torch.softmax(logits.float(), dim=-1) / temperature"},
    ),
    Mutant(
        "temperature_multiplies",
        "the logits are multiplied by the temperature, which turns its meaning round",
        {"logits.float() / temperature": "logits.float() * temperature"},
    ),
    Mutant(
        "zero_divides",
        "temperature 0 divides by 0",
        {"if temperature == 0:": "if temperature < 0:"},
    ),
    Mutant(
        "zero_shares",
        "temperature 0 shares among all logits that are equally large",
        {"probs[logits.argmax()] = 1.0": "probs[logits == logits.max()] = 1 / (logits == logits.max()).sum()"},
    ),
    Mutant(
        "half_precision_softmax",
        "the softmax is computed in the logits' own dtype, with three digits",
        {"torch.softmax(logits.float() / temperature, dim=-1)": "torch.softmax(logits / temperature, dim=-1).float()"},
    ),
    Mutant(
        "top_k_not_renormalised",
        "what top-k keeps is not divided by its sum",
        {"probs[order[:k]]\n    return kept / kept.sum()": "probs[order[:k]]\n    return kept"},
    ),
    Mutant(
        "top_k_threshold",
        "all tokens as likely as the k-th are kept: more than k, if there are equals",
        {"kept[order[:k]] = probs[order[:k]]": "kept = probs * (probs >= probs[order[min(k, len(probs)) - 1]])"},
    ),
    Mutant(
        "top_k_zero_keeps_none",
        "k = 0 keeps no token, and 0 / 0 is NaN",
        {"if k == 0:": "if k < 0:"},
    ),
    Mutant(
        "top_k_of_the_unlikely",
        "the sort is ascending: the least likely tokens are kept",
        {"order = probs.sort(descending=True, stable=True).indices": "order = probs.sort(stable=True).indices"},
    ),
    Mutant(
        "top_p_drops_the_crossing_token",
        "the token that crosses p is dropped: what is kept never reaches p",
        {"ranked * (mass_before < p)": "ranked * (mass_before + ranked < p)"},
    ),
    Mutant(
        "top_p_not_renormalised",
        "what top-p keeps is not divided by its sum",
        {"(mass_before < p)\n    return kept / kept.sum()": "(mass_before < p)\n    return kept"},
    ),
    Mutant(
        "top_p_in_rank_order",
        "the probabilities come back sorted: they belong to other tokens now",
        {"kept[order] = ranked": "kept[:] = ranked"},
    ),
    Mutant(
        "top_p_unsorted",
        "the mass is summed in the order of the vocabulary, not from the most likely down",
        {"ranked, order = probs.sort(descending=True, stable=True)": "ranked, order = probs, torch.arange(len(probs))"},
    ),
    Mutant(
        "min_p_absolute",
        "the bar is p itself and does not follow the largest probability",
        {"probs >= p * probs.max()": "probs >= p"},
    ),
    Mutant(
        "min_p_not_renormalised",
        "what min-p keeps is not divided by its sum",
        {"probs.max())\n    return kept / kept.sum()": "probs.max())\n    return kept"},
    ),
    Mutant(
        "sample_greedy",
        "the most likely token is taken, whatever u is",
        {"int(torch.searchsorted(sums, u * sums[-1], right=True))": "int(probs.argmax())"},
    ),
    Mutant(
        "sample_hits_impossible",
        "u may equal a running sum: at u = 0 the first token is drawn, likely or not",
        {", right=True": ""},
    ),
    Mutant(
        "sample_off_the_end",
        "u is not scaled by the last sum: near 1 it points behind the last token",
        {"u * sums[-1]": "u"},
    ),
)
