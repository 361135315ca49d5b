"""Claims about what the two phases are: parallel or serial, who sees whom, what goes in and what comes out."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from minillm.attention import attention
from minillm.attention.naive import attention_map
from minillm.cache.contiguous import ContiguousCache
from minillm.claims.card import Finding, always, claim
from minillm.claims.workbench import Workbench
from minillm.generate import decode, extend, generate, prefill
from minillm.measure.counters import Counter
from minillm.sampling import SamplingParams

CLOSE = 1e-3  # logits that differ by less, in float32, are the same up to rounding


def _difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max())


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
        "difference": Finding(
            "logits, at once against one by one", None, _difference(bench.logits(prompt), one_by_one)
        ),
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
    prefills = [part for step in served.steps for part in step.sequences if part.phase == "prefill"]
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
    change = _difference(bench.logits(prompt)[-1], bench.logits(other)[-1])
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
    while engine.has_unfinished:
        reasons += [event.finish_reason for event in engine.step()]
    return {
        "ended": Finding("requests that ended", 3, 3 - engine.scheduler.num_unfinished),
        "by_token": Finding("of these by an end token", 1, reasons.count("stop")),
        "by_length": Finding("of these by max_tokens", 1, reasons.count("length")),
    }


@claim(
    "A5",
    says="In prefill attention lets all tokens see each other.",
    heard="explainers that mix up encoders and decoders",
    formula="a token at position j reaches the N - j positions from j on",
    otherwise="a token sees itself and what stands before it, never what comes after",
    cases=always(lambda p, m: m["before"] > 0),
)
def everybody_sees_everybody(bench: Workbench) -> dict[str, Finding]:
    prompt = bench.prompt(48)
    other = [*prompt[:20], (prompt[20] + 1) % bench.tiny.config.vocab_size, *prompt[21:]]
    changed = (bench.logits(prompt) != bench.logits(other)).any(-1)
    return {
        "before": Finding("of 20 earlier positions, changed by token 20", 0, int(changed[:20].sum())),
        "after": Finding("of 28 positions from 20 on, changed", 28, int(changed[20:].sum())),
    }


@claim(
    "A6",
    says="A decode step handles one token; it is a batch of one unless requests are batched.",
    heard="explainers that take one token per sequence for a batch of one",
    formula="rows of every linear layer = sequences in the step, each with query length 1",
    otherwise="the query length is 1 per sequence, and a step has a row for each of them",
    cases={
        "one request runs": lambda p, m: m["rows_1"] == 1,
        "several run, as they do in any server": lambda p, m: m["rows_16"] == 1,
    },
)
def one_token_per_step(bench: Workbench) -> dict[str, Finding]:
    rows, queries = {}, set()
    for batch in (1, 16):
        served = bench.serve(bench.engine(), [bench.prompt(8, salt) for salt in range(batch)], [3] * batch)
        rows[batch] = max(step.num_tokens for step in served.decodes)
        queries |= {part.num_scheduled for step in served.decodes for part in step.sequences}
    return {
        "rows_1": Finding("rows of a decode step, 1 request", 1, rows[1]),
        "rows_16": Finding("rows of a decode step, 16 requests", 16, rows[16]),
        "queries": Finding("query length of each sequence", 1, max(queries)),
    }


@claim(
    "A12",
    says="A decode step first attends to the history, then computes its own key and value and appends them.",
    heard="explainers of the KV cache",
    formula="query t sees keys 0 … t: its own is one of them",
    otherwise="key and value come first: a token attends to itself, too",
    cases=always(lambda p, m: m["late"] < CLOSE),
)
def attend_then_append(bench: Workbench) -> dict[str, Finding]:
    prompt = bench.prompt(24)
    expected = bench.logits(prompt)[-1]
    differences = {}
    for late in (False, True):
        _, cache = prefill(bench.tiny, prompt[:-1])
        attend = _late_attend(cache) if late else cache.attend
        with torch.inference_mode():
            hidden = bench.tiny(torch.tensor(prompt[-1:]), torch.tensor([23]), attend)
            differences[late] = _difference(bench.tiny.logits(hidden)[0], expected)
    return {
        "early": Finding("logits against one step, own key first", None, differences[False]),
        "late": Finding("logits against one step, own key last", None, differences[True]),
    }


def _late_attend(cache: ContiguousCache) -> object:
    """A decode step as the claim has it: the history alone is seen, whatever is appended behind it."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache.attend(layer, q, k, v)
        history = slice(0, cache.num_tokens)
        keys, values = cache.keys[layer, :, history], cache.values[layer, :, history]
        return attention(q, keys, values, scale=cache.config.head_dim**-0.5)

    return attend


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
    mixed = sum({part.phase for part in step.sequences} == {"prefill", "decode"} for step in together.steps)
    wrong = sum(
        a != b for ours, theirs in zip(together.tokens, alone, strict=True) for a, b in zip(ours, theirs, strict=True)
    )
    return {
        "mixed": Finding("steps with both phases in them", None, mixed),
        "wrong": Finding("of 20 tokens, other than alone", 0, wrong),
    }


@claim(
    "B2",
    says="A tokenizer cuts words into pieces and marks those inside a word with ##.",
    heard="examples that show BERT's WordPiece for an LLM's input",
    formula="byte-level BPE: pieces are bytes, so every text comes back unchanged",
    otherwise="pieces are strings of bytes, the blank belongs to the word behind it, and nothing is marked",
    cases=always(lambda p, m: m["marked"] > 0),
)
def hash_marks(bench: Workbench) -> dict[str, Finding]:
    texts = ["class Transformer(nn.Module):", "请解释一下", "naïve  café\t🙂\n", "print('##')[2:]"]
    ids = [bench.tokenizer.encode(text) for text in texts]
    pieces = [bench.tokenizer.token_bytes(token) for token in ids[0]]
    back = sum(bench.tokenizer.decode(tokens) == text for tokens, text in zip(ids, texts, strict=True))
    return {
        "marked": Finding("of the pieces of a line of code, marked ##", 0, sum(p.startswith(b"##") for p in pieces)),
        "back": Finding("of 4 texts, back unchanged", 4, back),
    }


@claim(
    "B3",
    says="The model's input is a tensor [batch, sequence, hidden].",
    heard="explainers written for training",
    formula="packed: rows = sum of the lengths; padded: batch · longest",
    otherwise="an engine packs all tokens into one row dimension, and padding is work for nothing",
    cases={
        "all sequences are equally long": lambda p, m: m["equal"] == 3 * 20,
        "lengths differ": lambda p, m: m["ragged"] == 3 * 40,
    },
)
def padded_batches(bench: Workbench) -> dict[str, Finding]:
    def rows(lengths: list[int]) -> int:
        prompts = [bench.prompt(length, salt) for salt, length in enumerate(lengths)]
        engine = bench.engine()
        with Counter(bench.tiny) as counted:
            bench.serve(engine, prompts, [1] * len(lengths))
        embedded = counted.by_part()["embedding"].bytes.weights
        return embedded // (bench.tiny.config.hidden_size * bench.tiny.dtype.itemsize)

    return {
        "equal": Finding("embeddings looked up for prompts of 20, 20, 20", 60, rows([20, 20, 20])),
        "ragged": Finding("embeddings looked up for prompts of 5, 17, 40", 62, rows([5, 17, 40])),
    }


@claim(
    "B4",
    says="Each position attends to all positions before it, and to itself.",
    heard="explainers of masked attention",
    formula="N (N + 1) / 2 pairs per head",
    otherwise="the pairs do not fit",
    cases=always(lambda p, m: m["pairs"] == p["pairs"] and m["own"] == p["own"]),
)
def causal_attention(bench: Workbench) -> dict[str, Finding]:
    maps: list[Tensor] = []

    def watch(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = k.transpose(0, 1), v.transpose(0, 1)
        out, weights = attention_map(q, keys, values, scale=bench.tiny.config.head_dim**-0.5)
        maps.append(weights)
        return out

    bench.logits(bench.prompt(32), watch)
    seen = torch.cat(maps) > 0  # [layers * heads, 32, 32]
    heads = len(seen)
    return {
        "pairs": Finding("pairs with a weight above 0, per head", 32 * 33 // 2, int(seen.sum()) / heads),
        "own": Finding("of these a token with itself", 32, int(seen.diagonal(dim1=1, dim2=2).sum()) / heads),
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
        differences.append(_difference(logits, bench.logits(tokens[: position + 1])[-1]))
        lengths.append(cache.num_tokens)
    return {
        "rows": Finding("tokens fed per step", 1, max(later - earlier for earlier, later in pairwise(lengths))),
        "difference": Finding("logits of 10 steps against prefills", None, max(differences)),
    }
