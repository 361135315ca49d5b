"""Checks of exercise 03. The oracle has no cache: it runs everything again, which is what a cache must equal."""

from __future__ import annotations

import torch

from minillm.course.lab.checks import Case, check
from minillm.course.lab.exercises import Exercise, Task

EXERCISE = Exercise(
    slug="kv_cache",
    tasks=(
        Task(
            "kv_bytes",
            "How large the cache is",
            hints=(
                "Count the numbers that one token adds in one layer. It has keys and values.",
                "One token, one layer: 2 · kv_heads · head_dim numbers. There are `layers` of these.",
                "return 2 * num_tokens * layers * kv_heads * head_dim * bytes_per_number",
            ),
        ),
        Task(
            "write",
            "Store keys and values",
            hints=(
                "The new tokens stand at positions num_tokens … num_tokens + len(k) - 1. Which dimension is which?",
                "The memory is [layers, kv_heads, capacity, d] and k is [q_len, kv_heads, d]: k.transpose(0, 1) fits.",
                "If end > capacity, make new memory of max(end, 2 * capacity) tokens and copy the old one into its "
                "beginning (torch.nn.functional.pad does both). Then self.keys[layer, :, start:end] = "
                "k.transpose(0, 1), the same for values, and return the first `end` tokens of this layer.",
            ),
        ),
        Task(
            "attend",
            "Let queries see the cache",
            hints=(
                "First write, then read: a token sees itself, too. What write returns is all there is to see.",
                "Query i stands at position num_tokens + i. is_causal=True would align the triangle at the top left, "
                "which is wrong as soon as something is cached: build the mask yourself.",
                "mask = torch.arange(kv_len) <= (num_tokens + torch.arange(q_len))[:, None]. Repeat each key/value "
                "head with repeat_interleave(group, 0), give scaled_dot_product_attention q.transpose(0, 1) and the "
                "mask as attn_mask, and transpose its result back.",
            ),
        ),
        Task(
            "truncate",
            "Take tokens back",
            hints=(
                "Which number decides what is read and where the next token goes?",
                "Set num_tokens. Nothing else changes. Before that, refuse what cannot be.",
                "if not 0 <= num_tokens <= self.num_tokens: raise ValueError(…); self.num_tokens = num_tokens",
            ),
        ),
        Task(
            "phases",
            "Prefill and decode",
            hints=(
                "Both phases are `extend` with another number of tokens.",
                "In extend, positions begin at cache.num_tokens, not at 0. Move the counter after the model has run, "
                "because each layer asks where to write while it runs.",
                "hidden = model(tokens, positions, cache.attend); cache.num_tokens += len(tokens); "
                "return model.logits(hidden[-1:])[0]. prefill makes a KVCache(model.config, capacity=…) first.",
            ),
        ),
    ),
)


def config(case: Case) -> tuple[int, int, int]:
    """Layers, key/value heads and head size, small and all different."""
    return case.integer(2, 3), case.integer(2, 3), 2 * case.integer(2, 4)


def cache(case: Case, layers: int, kv_heads: int, d: int, capacity: int):
    """A learner's empty cache."""
    settings = case.given.SimpleNamespace(num_layers=layers, num_kv_heads=kv_heads, head_dim=d)
    return case.learner.KVCache(settings, capacity=capacity)


def visible_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The oracle: query by query, head by head. q `[q_len, heads, d]`, k and v `[kv_len, kv_heads, d]`."""
    out = torch.empty_like(q)
    group = q.shape[1] // k.shape[1]
    for i in range(len(q)):
        seen = len(k) - len(q) + i + 1
        for head in range(q.shape[1]):
            scores = k[:seen, head // group] @ q[i, head] / q.shape[2] ** 0.5
            out[i, head] = scores.softmax(0) @ v[:seen, head // group]
    return out


def store(case: Case, target, layers: int, tokens: int, kv_heads: int, d: int) -> list[tuple]:
    """Write the same number of new tokens in every layer and move the counter; returns what was written."""
    written = [(case.randn(tokens, kv_heads, d), case.randn(tokens, kv_heads, d)) for _ in range(layers)]
    for layer, (k, v) in enumerate(written):
        target.write(layer, k, v)
    return written


def toy(case: Case):
    """A decoder in the worker and the same one here."""
    layers, kv_heads, d = config(case)
    hidden, vocab = 12, 20
    shapes = ((hidden, 2 * kv_heads * d), (hidden, kv_heads * d), (hidden, kv_heads * d), (2 * kv_heads * d, hidden))
    weights = [[case.randn(*shape) / shape[0] ** 0.5 for shape in shapes] for _ in range(layers)]
    parts = (case.randn(vocab, hidden), weights, kv_heads, d)
    return case.given.ToyDecoder(*parts), case.ours.ToyDecoder(*parts)


def recomputed(model, tokens: list[int]) -> torch.Tensor:
    """Logits behind `tokens` without any cache."""
    attend = lambda layer, q, k, v: visible_attention(q, k, v)  # noqa: E731
    return model.logits(model(torch.tensor(tokens), torch.arange(len(tokens)), attend))[-1]


def tokens(case: Case, count: int) -> list[int]:
    """Token ids of the toy's vocabulary."""
    return case.randint(0, 20, count).tolist()


@check("kv_bytes", points=1)
def bytes_of_a_cache(case: Case) -> None:
    """Bytes of keys and values together"""
    for _ in range(3):
        n, layers, kv_heads, d, size = (case.integer(1, 50) for _ in range(5))
        got = case.learner.kv_bytes(n, layers=layers, kv_heads=kv_heads, head_dim=d, bytes_per_number=size)
        case.expect(got, 2 * n * layers * kv_heads * d * size, "K and V, in every layer, for every key/value head")


@check("write", points=2)
def rows_come_back(case: Case) -> None:
    """What is written comes back, behind what was there"""
    layers, kv_heads, d = config(case)
    target = cache(case, layers, kv_heads, d, capacity=16)
    before = store(case, target, layers, 3, kv_heads, d)
    target.num_tokens = 3
    for layer in reversed(range(layers)):
        k, v = case.randn(2, kv_heads, d), case.randn(2, kv_heads, d)
        got = target.write(layer, k, v)
        case.expect(got[0], rows(before[layer][0], k), "all keys of this layer, oldest first")
        case.expect(got[1], rows(before[layer][1], v), "all values of this layer, oldest first")
    case.expect(target.num_tokens, 3, "write leaves the counter alone: the step moves it, once for all layers")


@check("write", points=2)
def memory_grows(case: Case) -> None:
    """A full memory grows, and nothing in it is lost"""
    layers, kv_heads, d = config(case)
    target = cache(case, layers, kv_heads, d, capacity=4)
    before = store(case, target, layers, 4, kv_heads, d)
    target.num_tokens = 4
    after = store(case, target, layers, 1, kv_heads, d)
    for layer in range(layers):
        k, v = (rows(*pair) for pair in zip(before[layer], after[layer], strict=True))
        case.expect(target.keys[layer, :, :5], k, "keys of every layer, after the memory grew")
        case.expect(target.values[layer, :, :5], v, "values of every layer, after the memory grew")
    case.require(target.capacity, at_least(8), "growing by less than double makes n tokens cost O(n²) copies")


@check("write", points=1, hidden=True)
def memory_grows_as_far_as_needed(case: Case) -> None:
    """One step may need more than twice the memory"""
    layers, kv_heads, d = config(case)
    target = cache(case, layers, kv_heads, d, capacity=1)
    written = store(case, target, layers, 7, kv_heads, d)
    case.expect(target.keys[0, :, :7], rows(written[0][0]), "a step of 7 tokens into a memory of 1")
    case.require(target.capacity, at_least(7))


@check("attend", points=3)
def queries_see_the_cache(case: Case) -> None:
    """A prompt, a chunk and a single token see all that is before them"""
    layers, kv_heads, d = config(case)
    target = cache(case, layers, kv_heads, d, capacity=16)
    written: list[list[tuple]] = [[] for _ in range(layers)]
    for step in (4, 3, 1):
        for layer in range(layers):
            q, k, v = case.randn(step, 2 * kv_heads, d), case.randn(step, kv_heads, d), case.randn(step, kv_heads, d)
            written[layer].append((k, v))
            keys, values = (torch.cat(parts) for parts in zip(*written[layer], strict=True))
            case.expect(
                target.attend(layer, q, k, v),
                visible_attention(q, keys, values),
                f"{step} queries behind {len(keys) - step} cached tokens; layer {layer}",
            )
        target.num_tokens = len(keys)


@check("truncate", points=2)
def taken_back(case: Case) -> None:
    """Tokens taken back are not seen, the next ones take their place"""
    layers, kv_heads, d = config(case)
    target = cache(case, layers, kv_heads, d, capacity=16)
    (k, v), *_ = store(case, target, layers, 6, kv_heads, d)
    target.num_tokens = 6
    target.truncate(2)
    case.expect(target.num_tokens, 2, "6 tokens, truncated to 2")
    new = case.randn(1, 2 * kv_heads, d), case.randn(1, kv_heads, d), case.randn(1, kv_heads, d)
    expected = visible_attention(new[0], torch.cat([k[:2], new[1]]), torch.cat([v[:2], new[2]]))
    case.expect(target.attend(0, *new), expected, "a token behind the two that are left")


@check("truncate", points=1)
def impossible_truncations(case: Case) -> None:
    """A number that cannot be is refused, and 0 is a number that can"""
    target = cache(case, *config(case), capacity=4)
    target.num_tokens = 3
    case.raises("ValueError", target.truncate, 4, why="there are only 3 tokens")
    case.raises("ValueError", target.truncate, -1, why="there is no such number of tokens")
    case.expect(target.num_tokens, 3, "what was refused changes nothing")
    target.truncate(0)
    case.expect(target.num_tokens, 0, "everything may be taken back")


@check("phases", points=2)
def prefill_equals_recomputing(case: Case) -> None:
    """Prefill gives the logits behind the prompt, and a cache with it"""
    theirs, ours = toy(case)
    prompt = tokens(case, 5)
    got = case.learner.prefill(theirs, prompt)
    case.expect(got[0], recomputed(ours, prompt), "logits of what follows the last prompt token")
    case.expect(got[1].num_tokens, 5, "the cache holds the prompt")
    case.expect(theirs.rows, [5], "all prompt tokens go through the model in one call")


@check("phases", points=3)
def decode_equals_recomputing(case: Case) -> None:
    """Decode gives the logits of running everything again, from one token"""
    theirs, ours = toy(case)
    text = tokens(case, 9)
    got = case.learner.prefill(theirs, text[:4])
    for end in range(5, 10):
        step = case.count(case.learner.decode, theirs, text[end - 1], got[1])
        case.expect(step["out"], recomputed(ours, text[:end]), f"token {end} behind {end - 1} cached ones")
        case.require(step["flops"], at_most(decode_flops(ours, end)), "one token's products, and attention")
    case.expect(got[1].num_tokens, 9, "the cache grew by one token a step")
    case.expect(theirs.rows, [4, 1, 1, 1, 1, 1], "a decode step runs one token through the model")


@check("phases", points=2, hidden=True)
def decode_reads_what_is_stored(case: Case) -> None:
    """Whoever changes the cache changes what decode sees"""
    theirs, ours = toy(case)
    prompt, token = tokens(case, 4), tokens(case, 1)[0]
    stored = case.learner.prefill(theirs, prompt)[1]
    stored.values[:, :, :4].mul_(2)
    memory = Remembering()
    ours(torch.tensor(prompt), torch.arange(4), memory.attend)
    memory.kv = {layer: (k, 2 * v) for layer, (k, v) in memory.kv.items()}
    expected = ours.logits(ours(torch.tensor([token]), torch.tensor([4]), memory.attend))[0]
    case.expect(case.learner.decode(theirs, token, stored), expected, "all cached values were doubled before this step")


class Remembering:
    """The simplest memory: everything so far, joined anew in every step."""

    def __init__(self) -> None:
        self.kv: dict[int, tuple] = {}

    def attend(self, layer, q, k, v):
        old = self.kv.get(layer, (k[:0], v[:0]))
        self.kv[layer] = torch.cat([old[0], k]), torch.cat([old[1], v])
        return visible_attention(q, *self.kv[layer])


def decode_flops(model, kv_len: int) -> float:
    """What one token costs, and half as much again: recomputing even two tokens costs more."""
    products = 2 * sum(w.numel() for layer in model.layers for w in layer) + 2 * model.embedding.numel()
    wq = model.layers[0][0]
    return 1.5 * (products + len(model.layers) * 4 * wq.shape[1] * kv_len)


def rows(*parts: torch.Tensor) -> torch.Tensor:
    """Rows `[q_len, kv_heads, d]` as a cache returns them, `[kv_heads, tokens, d]`."""
    return torch.cat(parts).transpose(0, 1)


def at_least(low: float):
    """Accepts numbers from `low` on."""
    return lambda got: None if isinstance(got, int) and got >= low else f"expected {low:g} or more, got {got}"


def at_most(high: float):
    """Accepts numbers up to `high`."""
    return lambda got: (
        None if isinstance(got, (int, float)) and got <= high else f"expected {high:g} or less, got {got}"
    )
