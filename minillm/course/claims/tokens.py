"""Claims about tokens: what one is, what it sees, and what shape many of them have."""

from __future__ import annotations

import torch
from torch import Tensor

from minillm.attention.reference import masked_attention, visible
from minillm.attention.tiled import attention
from minillm.cache.contiguous import ContiguousCache
from minillm.course.claims.card import Finding, always, claim
from minillm.course.claims.workbench import CLOSE, Workbench, difference
from minillm.generate import prefill
from minillm.measure.counters import Counter
from minillm.model.decoder import Attend


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
        queries |= {part.num_scheduled for step in served.decodes for part in step.requests}
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
            differences[late] = difference(bench.tiny.logits(hidden)[0], expected)
    return {
        "early": Finding("logits against one step, own key first", None, differences[False]),
        "late": Finding("logits against one step, own key last", None, differences[True]),
    }


def _late_attend(cache: ContiguousCache) -> Attend:
    """A decode step as the claim has it: the history alone is seen, whatever is appended after it."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache.attend(layer, q, k, v)
        history = slice(0, cache.num_tokens)
        keys, values = cache.keys[layer, :, history], cache.values[layer, :, history]
        return attention(q, keys, values, scale=cache.config.head_dim**-0.5)

    return attend


@claim(
    "B2",
    says="A tokenizer cuts words into pieces and marks those inside a word with ##.",
    heard="examples that show BERT's WordPiece for an LLM's input",
    formula="byte-level BPE: pieces are bytes, so every text comes back unchanged",
    otherwise="pieces are strings of bytes, the blank belongs to the word after it, and nothing is marked",
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
        seen, scale = visible(len(q), keys.shape[1]), bench.tiny.config.head_dim**-0.5
        out, weights = masked_attention(q, keys, values, seen, scale=scale)
        maps.append(weights)
        return out

    bench.logits(bench.prompt(32), watch)
    seen = torch.cat(maps) > 0  # [layers * heads, 32, 32]
    heads = len(seen)
    return {
        "pairs": Finding("pairs with a weight above 0, per head", 32 * 33 // 2, int(seen.sum()) / heads),
        "own": Finding("of these a token with itself", 32, int(seen.diagonal(dim1=1, dim2=2).sum()) / heads),
    }
