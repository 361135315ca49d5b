"""Claims about what the two phases are: parallel or serial, what goes in, what comes out, and what ends them."""

from __future__ import annotations

from itertools import pairwise

import torch

from minillm.course.claims.card import Finding, always, claim
from minillm.course.claims.workbench import CLOSE, Workbench, difference
from minillm.generate import decode, extend, generate, prefill
from minillm.sampling import SamplingParams


@claim(
    "A1",
    says="Prefill takes the whole prompt at once, in parallel, and leaves a KV cache behind.",
    heard="explainers of the two phases",
    formula="steps = ceil(prompt / token budget)",
    otherwise="it comes in chunks, and nothing changes: all at once is a choice of the scheduler",
    cases={
        "the prompt fits into the token budget of a step": lambda p, m: m["whole"] == 1 and m["difference"] < CLOSE,
        "it does not fit": lambda p, m: m["chunked"] == 1,
    },
)
def prompt_at_once(bench: Workbench) -> dict[str, Finding]:
    prompt = bench.prompt(48)
    whole, chunked = (
        len(bench.serve(bench.engine(max_num_batched_tokens=budget), [prompt], [1]).steps) for budget in (512, 16)
    )
    cache = bench.cache(48)
    one_by_one = torch.stack([extend(bench.tiny, torch.tensor([token]), cache) for token in prompt])
    return {
        "whole": Finding("steps for 48 tokens, budget 512", 1, whole),
        "chunked": Finding("steps for 48 tokens, budget 16", 3, chunked),
        "difference": Finding("logits, at once against one by one", None, difference(bench.logits(prompt), one_by_one)),
    }


@claim(
    "A2",
    says="The first new token comes out of prefill; decode makes the others.",
    heard="explainers of the two phases, rarely with its consequence",
    formula="decode steps = M - 1, so TPOT divides by M - 1",
    otherwise="the numbers of steps do not fit",
    cases=always(lambda p, m: m["decodes"] == p["decodes"] and m["sampled"] == 1),
)
def first_token_is_prefills(bench: Workbench) -> dict[str, Finding]:
    served = bench.serve(bench.engine(), [bench.prompt(20)], [12])
    prefills = [part for step in served.steps for part in step.requests if part.phase == "prefill"]
    return {
        "decodes": Finding("decode steps for 12 new tokens", 11, len(served.decodes)),
        "sampled": Finding("tokens drawn by the prefill", 1, sum(part.num_samples for part in prefills)),
    }


@claim(
    "A3",
    says="Decoding is strictly serial: a token cannot be computed before the one in front of it.",
    heard="explainers of the two phases",
    formula="γ + 1 positions fit into one step; the guesses that turn out right were computed before they were known",
    otherwise="one step can check several guessed tokens and keep the right ones",
    cases={
        "it is about which token is chosen": lambda p, m: m["change"] > CLOSE,
        "it is about passes over the weights": lambda p, m: m["per_pass"] <= 1,
    },
)
def serial(bench: Workbench) -> dict[str, Finding]:
    prompt = bench.prompt(20)
    other = [*prompt[:-1], (prompt[-1] + 1) % bench.tiny.config.vocab_size]
    change = difference(bench.logits(prompt)[-1], bench.logits(other)[-1])
    written = list(generate(bench.tiny, prompt, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)))
    checked = bench.logits([*prompt, *written[:-1]])[len(prompt) - 1 :].argmax(-1).tolist()
    right = next((i for i, pair in enumerate(zip(checked, written, strict=True)) if pair[0] != pair[1]), len(written))
    return {
        "change": Finding("next logits, if the newest token changes", None, change),
        "per_pass": Finding("tokens confirmed by one pass, 5 right guesses", 6, right),
    }


@claim(
    "A4",
    says="Decoding goes on until the model emits its end token.",
    heard="explainers of the two phases",
    formula="a request ends at an end token, at max_tokens, or when somebody aborts it",
    otherwise="max_tokens, a stop string or an abort ends it",
    cases={
        "the end token is the first to come": lambda p, m: m["by_token"] > 0,
        "something else comes first": lambda p, m: m["by_token"] == m["ended"],
    },
)
def until_the_end_token(bench: Workbench) -> dict[str, Finding]:
    prompt = bench.prompt(20)
    greedy = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    third = list(generate(bench.tiny, prompt, greedy))[2]
    engine = bench.engine()
    engine.add(prompt, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, stop_token_ids=[third]))
    engine.add(prompt, greedy)
    aborted = engine.add(prompt, greedy)
    reasons = [event.finish_reason for event in engine.step()]
    engine.abort(aborted)
    reasons += [event.finish_reason for event in engine.run()]
    return {
        "ended": Finding("requests that ended", 3, 3 - len(engine.requests)),
        "by_token": Finding("of these by an end token", 1, reasons.count("stop")),
        "by_length": Finding("of these by max_tokens", 1, reasons.count("length")),
    }


@claim(
    "B1",
    says="Inference must be split into two phases, because a known prompt and unknown outputs cannot share a process.",
    heard="answers to why there are two phases",
    formula="a decode is a prefill of one token: any mixture of both is a step like any other",
    otherwise="both run in one step, and every request gets the tokens that it gets alone",
    cases=always(lambda p, m: m["mixed"] == 0 or m["wrong"] > 0),
)
def phases_must_be_apart(bench: Workbench) -> dict[str, Finding]:
    prompts = [bench.prompt(8), bench.prompt(60, salt=1)]
    together = bench.serve(bench.engine(max_num_batched_tokens=24), prompts, [10, 10])
    alone = [bench.serve(bench.engine(), [prompt], [10]).tokens[0] for prompt in prompts]
    mixed = sum({part.phase for part in step.requests} == {"prefill", "decode"} for step in together.steps)
    wrong = sum(
        a != b for ours, theirs in zip(together.tokens, alone, strict=True) for a, b in zip(ours, theirs, strict=True)
    )
    return {
        "mixed": Finding("steps with both phases in them", None, mixed),
        "wrong": Finding("of 20 tokens, other than alone", 0, wrong),
    }


@claim(
    "B10",
    says="Decode feeds the newest token, attends to the cache and predicts the next token.",
    heard="explainers of the two phases",
    formula="one row in, the logits of a prefill out",
    otherwise="the logits are not those of a prefill",
    cases=always(lambda p, m: m["rows"] == 1 and m["difference"] < CLOSE),
)
def decode_continues(bench: Workbench) -> dict[str, Finding]:
    tokens = bench.prompt(30)
    _, cache = prefill(bench.tiny, tokens[:20])
    lengths, differences = [20], []
    for position in range(20, 30):
        logits = decode(bench.tiny, tokens[position], cache)
        differences.append(difference(logits, bench.logits(tokens[: position + 1])[-1]))
        lengths.append(cache.num_tokens)
    return {
        "rows": Finding("tokens fed per step", 1, max(later - earlier for earlier, later in pairwise(lengths))),
        "difference": Finding("logits of 10 steps against prefills", None, max(differences)),
    }
