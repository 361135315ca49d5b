"""Claims about the KV cache: who writes it, who reads it, how much of the traffic it is."""

from __future__ import annotations

from dataclasses import replace

from minillm.costs.formulas import Bytes, kv_bytes_per_token, step_bytes, step_flops
from minillm.costs.steps import Step, decode_step
from minillm.course.claims.card import Finding, always, claim
from minillm.course.claims.workbench import Served, Workbench
from minillm.course.lessons.crossovers import kv_crossover
from minillm.course.lessons.schedules import recompute_steps, request_steps
from minillm.generate import generate, prefill
from minillm.measure.counters import Counter
from minillm.measure.roof import quantized_speedup
from minillm.measure.stepper import StepRunner, weightless
from minillm.model.decoder import Decoder
from minillm.quantization.formats import element_bytes
from minillm.sampling import SamplingParams

SHARED, LENGTH = 48, 64  # tokens of two prompts that are the same, of how many


def _same_beginning(bench: Workbench) -> list[Served]:
    """Two prompts with a common beginning, one after the other, on an engine with a prefix cache."""
    engine = bench.engine(enable_prefix_caching=True)
    first, other = bench.prompt(LENGTH), bench.prompt(LENGTH, salt=1)
    return [bench.serve(engine, [prompt], [1]) for prompt in (first, first[:SHARED] + other[SHARED:])]


@claim(
    "A11",
    says="Prefill writes the KV cache from zero, for every token of the prompt.",
    heard="comparisons of the two phases",
    formula="bytes written = (N - cached) · KV bytes per token",
    otherwise="what is cached is read, and only the rest is written",
    cases={
        "nothing of the prompt is cached": lambda p, m: m["first"] == p["first"],
        "its beginning is cached": lambda p, m: m["second"] == p["first"],
    },
)
def prefill_writes_from_zero(bench: Workbench) -> dict[str, Finding]:
    config, per_token = bench.tiny.config, kv_bytes_per_token(bench.tiny.config, 4)
    first, second = (
        sum(step_bytes(config, step.shape, 4).kv_write for step in served.steps) for served in _same_beginning(bench)
    )
    return {
        "first": Finding(f"written for {LENGTH} tokens, none cached", LENGTH * per_token, first, "B"),
        "second": Finding(f"written with {SHARED} cached", (LENGTH - SHARED) * per_token, second, "B"),
    }


@claim(
    "B7",
    says="Prefill cannot use the KV cache: it is what builds it.",
    heard="explanations of why prefill is expensive",
    formula="tokens computed = N - cached",
    otherwise="whoever shares a beginning with an earlier prompt (a system prompt, a conversation) starts after it",
    cases=always(lambda p, m: m["second"] == m["first"]),
)
def prefill_cannot_reuse(bench: Workbench) -> dict[str, Finding]:
    first, second = (sum(step.num_tokens for step in served.steps) for served in _same_beginning(bench))
    return {
        "first": Finding("tokens computed for the first prompt", LENGTH, first),
        "second": Finding(f"for one with the same {SHARED} first", LENGTH - SHARED, second),
    }


@claim(
    "A13",
    says="The longer the text, the more of the cache each decode step reads.",
    heard="comparisons of the two phases",
    formula="KV bytes = context · KV bytes per token, at most a window's; weights do not grow",
    otherwise="a sliding window reads its window and no more",
    cases={
        "attention is full": lambda p, m: m["full"] > 1.5,
        "a sliding window is full": lambda p, m: m["window"] > 1.5,
    },
)
def reads_grow(bench: Workbench) -> dict[str, Finding]:
    def growth(shape: str, context: int) -> tuple[float, float, float]:
        model = bench.shape(shape)
        counted = [bench.count(model, decode_step(c)).total.bytes for c in (context, 2 * context)]
        predicted = [step_bytes(model.config, decode_step(c), 2) for c in (context, 2 * context)]
        all_bytes = [moved._replace(activations=0).total for moved in counted]
        return (
            predicted[1].kv_read / predicted[0].kv_read,
            counted[1].kv_read / counted[0].kv_read,
            all_bytes[1] / all_bytes[0],
        )

    (full, counted_full, everything), (window, counted_window, _) = (
        growth("llama-3.1-8b", 1000),
        growth("mistral-7b", 8000),
    )
    return {
        "full": Finding("KV read, context 2k over 1k, Llama 8B", full, counted_full, "×"),
        "window": Finding("KV read, context 16k over 8k, Mistral 7B", window, counted_window, "×"),
        "all": Finding("KV and weights, 2k over 1k, Llama 8B", None, everything, "×"),
    }


@claim(
    "B5",
    says="Every layer keeps the keys and values of every token.",
    heard="explainers of the KV cache",
    formula="2 · layers · KV heads · head_dim · bytes per element and token; query heads do not count",
    otherwise="the bytes do not fit",
    cases=always(lambda p, m: m["bytes"] == p["bytes"] and m["layers"] == p["layers"]),
)
def every_layer_keeps(bench: Workbench) -> dict[str, Finding]:
    config = bench.tiny.config
    with Counter(bench.tiny) as counted:
        _, cache = prefill(bench.tiny, bench.prompt(40))
    counted.mark_kv(cache)
    written = [cost.bytes.kv_write for cost in counted.by_layer().values() if cost.bytes.kv_write]
    return {
        "bytes": Finding("written by a prompt of 40 tokens", 40 * kv_bytes_per_token(config, 4), sum(written), "B"),
        "layers": Finding("layers that wrote as much as the first", config.num_layers, written.count(written[0])),
    }


@claim(
    "B6",
    says="The cache saves decode from computing everything again.",
    heard="explainers of the KV cache",
    formula="FLOPs of M prefills of N, N + 1, … tokens over those of one prefill and M - 1 decodes",
    otherwise="nothing is saved",
    cases=always(lambda p, m: m["without"] > m["with"]),
)
def cache_saves(bench: Workbench) -> dict[str, Finding]:
    config, prompt, new = bench.tiny.config, bench.prompt(32), 16
    with_cache, without = (
        sum(step_flops(config, step).total for step in steps(len(prompt), new))
        for steps in (request_steps, recompute_steps)
    )
    with Counter(bench.tiny) as counted:
        written = list(generate(bench.tiny, prompt, SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)))
    with Counter(bench.tiny) as again:
        for step in range(new):
            prefill(bench.tiny, prompt + written[:step])
    return {
        "with": Finding("16 tokens after 32, with a cache", with_cache, counted.total.flops, "FLOP"),
        "without": Finding("16 tokens after 32, without", without, again.total.flops, "FLOP"),
    }


@claim(
    "B11",
    says="Decode is bound by memory because every new token reads the whole KV cache.",
    heard="nearly everywhere",
    formula="KV share = B · c · kv / (W + B · c · kv); half of the bytes at B · c = W / kv",
    otherwise="it is the weights that are read",
    cases={
        "batch · context is beyond W / kv": lambda p, m: m["many"] > 50,
        "it is below": lambda p, m: m["one"] > 50,
    },
)
def kv_is_the_cause(bench: Workbench) -> dict[str, Finding]:
    model = bench.shape("llama-3.1-8b")

    def share(context: int, batch: int) -> tuple[float, float]:
        step = decode_step(context, batch)
        counted = bench.count(model, step).total.bytes._replace(activations=0)
        return 100 * step_bytes(model.config, step, 2).kv_share, 100 * counted.kv_share

    return {
        "one": Finding("KV share of bytes, 8B, batch 1, context 1k", *share(1000, 1), "%"),
        "many": Finding("KV share of bytes, 8B, batch 8, context 32k", *share(32000, 8), "%"),
        "crossover": Finding(
            "batch · context at which they are equal", kv_crossover(model.config, 2), _crossing(bench)
        ),
    }


def _crossing(bench: Workbench) -> float:
    """Tokens whose KV is counted to be as many bytes as the counted weights (without norms and embeddings)."""
    counted = bench.count(bench.shape("llama-3.1-8b"), decode_step(1000))
    matrices = sum(counted.by_part()[part].bytes.weights for part in ("projections", "mlp", "head"))
    return matrices / (counted.total.bytes.kv_read / 1000)


@claim(
    "A21",
    says="Quantising the KV cache makes decode move fewer bytes.",
    heard="lists of optimisations for decode",
    formula="1 / (1 - s + s / r) for a share s of the bytes that becomes r times smaller",
    otherwise="the weights are what is moved, and unpacking apart from attention adds traffic of its own",
    cases={
        "KV is about half of the bytes (8B, 131k tokens)": lambda p, m: m["long"] > 1.2,
        "weights are most of them (8B, 1k tokens)": lambda p, m: m["short"] > 1.2,
    },
)
def quantised_cache(bench: Workbench) -> dict[str, Finding]:
    config = bench.shape("llama-3.1-8b").config
    layer = weightless(replace(config, num_layers=1))
    shrink = 2 / element_bytes("int8", config.head_dim)

    def gain(context: int) -> tuple[float, float, float]:
        step = decode_step(context)
        weights = bench.count(bench.shape("llama-3.1-8b"), step).total.bytes.weights
        plain, int8 = (_attention_bytes(layer, step, kv_format) for kv_format in ("auto", "int8"))
        before, after = (moved.kv_read + moved.kv_write for moved in (plain, int8))
        predicted = quantized_speedup(step_bytes(config, step, 2).kv_share, shrink)
        counted = (weights + config.num_layers * before) / (weights + config.num_layers * after)
        return predicted, counted, (int8.activations - plain.activations) / (before - after)

    (short, counted_short, _), (long, counted_long, unpacking) = gain(1024), gain(131072)
    return {
        "short": Finding("bytes, bf16 over int8, context 1k", short, counted_short, "×"),
        "long": Finding("bytes, bf16 over int8, context 131k", long, counted_long, "×"),
        "unpacking": Finding("unpacking by tiles, in caches, per byte saved", None, unpacking, "B"),
    }


def _attention_bytes(layer: Decoder, step: Step, kv_format: str) -> Bytes:
    """What one layer's attention moves, by the engine's own cache and reading."""
    run = StepRunner(layer, step, kv_format=kv_format)
    with Counter(layer, kv=run.cache) as counted:
        run()
    return counted.by_part()["attention"].bytes
