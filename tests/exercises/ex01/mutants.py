"""Wrong loops and metrics that people really write. Each explanation completes "This is what comes out when …"."""

from __future__ import annotations

from minillm.course.lab.exercises import Mutant

MUTANTS = (
    Mutant(
        "everything_again",
        "each step gets the whole text, though the model remembers what it has read",
        {"logits = step([tokens[-1]])": "logits = step(prompt + tokens)"},
    ),
    Mutant(
        "one_step_too_many",
        "the last token is read, too, though nobody asks what follows it",
        {"    return tokens\n    # END": "    step([tokens[-1]])\n    return tokens\n    # END"},
    ),
    Mutant(
        "prompt_returned",
        "the prompt is returned with the new tokens",
        {"    return tokens\n    # END": "    return prompt + tokens\n    # END"},
    ),
    Mutant(
        "one_token_short",
        "the token that comes out of prefill is thrown away, and decoding begins with the prompt's last token",
        {
            "    tokens = [int(logits.argmax())]\n": "    tokens = [prompt[-1]]\n",
            "len(tokens) < max_tokens": "len(tokens) <= max_tokens",
            "    return tokens\n    # END": "    return tokens[1:]\n    # END",
        },
    ),
    Mutant(
        "stop_token_dropped",
        "the stop token is cut off",
        {"    return tokens\n    # END": "    return tokens[:-1] if tokens[-1] == stop_token else tokens\n    # END"},
    ),
    Mutant(
        "stop_token_ignored",
        "the stop token is ignored",
        {" and tokens[-1] != stop_token": ""},
    ),
    Mutant(
        "prompt_token_by_token",
        "the prompt is read token by token, as if prefill were decoding",
        {"    logits = step(prompt)\n": "    for token in prompt:\n        logits = step([token])\n"},
    ),
    Mutant(
        "least_likely",
        "the least likely token is taken while decoding",
        {"tokens.append(int(logits.argmax()))": "tokens.append(int(logits.argmin()))"},
    ),
    Mutant(
        "ttft_without_arrival",
        "the clock starts at 0, not when the request arrives",
        {"return token_times[0] - arrival": "return token_times[0]"},
    ),
    Mutant(
        "ttft_is_e2el",
        "the time to the last token is taken",
        {"return token_times[0] - arrival": "return token_times[-1] - arrival"},
    ),
    Mutant(
        "tpot_over_n",
        "the time is divided by the number of tokens, not of gaps: the first token takes no decode step",
        {"/ (len(token_times) - 1)": "/ len(token_times)"},
    ),
    Mutant(
        "tpot_of_one",
        "a single token gets a TPOT of 0, as if decoding had taken no time",
        {"        return None\n": "        return 0.0\n"},
    ),
    Mutant(
        "itl_is_tpot",
        "the mean gap of each request is returned, which is its TPOT",
        {
            "[later - earlier for times in requests for earlier, later in pairwise(times)]": "[(times[-1] - times[0])"
            " / (len(times) - 1) for times in requests if len(times) > 1]"
        },
    ),
    Mutant(
        "itl_across_requests",
        "the times of all requests are joined first, so that gaps lie between requests, too",
        {
            "[later - earlier for times in requests for earlier, later in pairwise(times)]": "[later - earlier for "
            "earlier, later in pairwise([time for times in requests for time in times])]"
        },
    ),
)
