"""Wrong speculation that people really write. Each explanation completes "This is what comes out when …"."""

from __future__ import annotations

from minillm.course.lab.exercises import Mutant

MUTANTS = (
    Mutant(
        "shortest_match",
        "the shortest match is taken, where a longer one knows better",
        {
            "range(min(max_match, len(text) - 1), min_match - 1, -1)": "range("
            "min_match, min(max_match, len(text) - 1) + 1)"
        },
    ),
    Mutant(
        "earliest_match",
        "of several equally long matches the earliest is taken, not the latest",
        {"range(len(text) - length - 1, -1, -1)": "range(len(text) - length)"},
    ),
    Mutant(
        "matches_itself",
        "the end of the text is compared with itself, so that a match is always found and nothing follows it",
        {
            "range(len(text) - length - 1, -1, -1)": "range(len(text) - length, -1, -1)",
            "text.append(text[place])": "text.extend(text[place : place + 1])",
        },
    ),
    Mutant(
        "stops_at_the_end",
        "guesses stop where the match runs into the end of the text: a repetition is not continued",
        {
            "for place in range(start + length, start + length + count):\n"
            "                    text.append(text[place])\n                return text[len(tokens) :]": "return "
            "tokens[start + length : start + length + count]"
        },
    ),
    Mutant(
        "match_repeated",
        "the match itself is proposed, not what followed it",
        {"range(start + length, start + length + count)": "range(start, start + count)"},
    ),
    Mutant(
        "min_match_ignored",
        "matches of a single token are taken, too",
        {"len(text) - 1), min_match - 1, -1)": "len(text) - 1), 0, -1)"},
    ),
    Mutant(
        "wrong_draft_kept",
        "the wrong draft itself is kept in place of the model's choice",
        {"return choices[: place + 1]": "return [*choices[:place], draft]"},
    ),
    Mutant(
        "no_recovery",
        "a step ends before the wrong draft: the token that the model said there is thrown away",
        {"return choices[: place + 1]": "return choices[:place]"},
    ),
    Mutant(
        "no_bonus",
        "if all drafts are right, the token behind them is thrown away",
        {"    return list(choices)\n": "    return list(drafts) or list(choices)\n"},
    ),
    Mutant(
        "right_ones_behind",
        "drafts that agree behind a wrong one are counted, too",
        {
            "        if draft != choices[place]:\n            return choices[: place + 1]\n    return list(choices)": ""
            "        if draft != choices[place] and drafts[place + 1 :] != choices[place + 1 : -1]:\n"
            "            return choices[: place + 1]\n    return list(choices)"
        },
    ),
    Mutant(
        "ratio_turned_round",
        "q over p: tokens that the model likes are rejected",
        {"p[token] / q[token]": "q[token] / p[token]"},
    ),
    Mutant(
        "more_than_certain",
        "the ratio is not cut off at 1: no probability",
        {"min(1.0, float(p[token] / q[token]))": "float(p[token] / q[token])"},
    ),
    Mutant(
        "p_alone",
        "a draft is kept with the probability p(token), whatever it was drawn from",
        {"min(1.0, float(p[token] / q[token]))": "float(p[token])"},
    ),
    Mutant(
        "residual_is_p",
        "after a rejection the token is drawn from p: what the draft model likes comes out too often",
        {"more = (p - q).clamp(min=0)": "more = p"},
    ),
    Mutant(
        "residual_not_renormalised",
        "the residual does not sum to 1",
        {"return more / mass if mass > 0 else p": "return more if mass > 0 else p"},
    ),
    Mutant(
        "residual_absolute",
        "the differences count without their sign: what q has more of is drawn, too",
        {"(p - q).clamp(min=0)": "(p - q).abs()"},
    ),
    Mutant(
        "residual_turned_round",
        "what q has more of than p is drawn",
        {"(p - q).clamp(min=0)": "(q - p).clamp(min=0)"},
    ),
    Mutant(
        "empty_residual",
        "p equals q, and 0 / 0 is NaN",
        {"return more / mass if mass > 0 else p": "return more / mass"},
    ),
    Mutant(
        "rejected_draft_kept",
        "the rejected draft stays, and a token is drawn behind it",
        {"[*drafts[:place], draw(": "[*drafts[: place + 1], draw("},
    ),
    Mutant(
        "accepts_the_rest",
        "u is compared the wrong way round: what should stay is rejected",
        {"accept_u[place] >= acceptance": "accept_u[place] < acceptance"},
    ),
    Mutant(
        "bonus_from_the_first_row",
        "the bonus token is drawn from the first row of p, which belongs to the place of the first draft",
        {"draw(p[-1], draw_u)": "draw(p[0], draw_u)"},
    ),
    Mutant(
        "no_bonus_drawn",
        "if all drafts are accepted, no token is drawn behind them",
        {"return [*drafts, draw(p[-1], draw_u)]": "return list(drafts)"},
    ),
    Mutant(
        "first_place_only",
        "all drafts are judged by the distributions of the first place",
        {"acceptance_probability(p[place], q[place], token)": "acceptance_probability(p[0], q[0], token)"},
    ),
)
