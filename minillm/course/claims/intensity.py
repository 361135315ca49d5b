"""Claims about what the machine waits for: computing, moving bytes, or neither."""

from __future__ import annotations

from math import log

from minillm.costs.formulas import least_bytes, matmul_parameters, step_bytes, step_flops, weight_bytes
from minillm.costs.steps import chunk_steps, decode_step, num_tokens
from minillm.course.claims.card import Finding, always, claim
from minillm.course.claims.workbench import Served, Workbench
from minillm.measure.hardware import dtype_name
from minillm.measure.roof import step_seconds

NEAR = 0.5  # of a bound: a step that takes at most twice as long is bound by it


def _growth(bench: Workbench, few: str, many: str) -> tuple[float, float]:
    """Exponent of time in the number of tokens between two timed steps: 1 is bound by computing, 0 by the weights.

    Predicted by the bounds of both, and measured.
    """
    steps, width = bench.timed_steps, bench.timed.dtype.itemsize
    rows = log(num_tokens(steps[many]) / num_tokens(steps[few]))
    bound, slower = (step_seconds(bench.timed.config, steps[name], width, bench.roof) for name in (few, many))
    return log(slower / bound) / rows, log(bench.seconds(many) / bench.seconds(few)) / rows


def _utilisation(bench: Workbench, name: str) -> tuple[float, float]:
    """MFU and MBU of a timed step, in per cent of this machine's measured ceilings."""
    config, step, seconds = bench.timed.config, bench.timed_steps[name], bench.seconds(name)
    mfu = bench.roof.mfu(step_flops(config, step).total, seconds)
    return 100 * mfu, 100 * bench.roof.mbu(least_bytes(config, step, bench.timed.dtype.itemsize), seconds)


@claim(
    "A7",
    says="Prefill multiplies matrices by matrices, so it is bound by computing.",
    heard="comparisons of the two phases",
    formula="linear layers cross the ridge at T* = R / (1 - R (1/K + 1/J)) rows (bf16); time ~ tokens beyond",
    otherwise="below T* the step waits for the weights, however many tokens it has",
    cases={
        "the prompt is much longer than T*": lambda p, m: m["long"] > 0.7,
        "it is shorter than T*": lambda p, m: m["short"] > 0.7,
    },
    depends_on_speed=True,
)
def prefill_computes(bench: Workbench) -> dict[str, Finding]:
    few, many = (num_tokens(bench.timed_steps[f"prefill, {name}"]) for name in ("few", "many"))
    per_token = (bench.seconds("prefill, twice as many") - bench.seconds("prefill, many")) / many
    return {
        "knee": Finding("T*: computing takes as long as reading", bench.knee, bench.seconds("decode") / per_token),
        "short": Finding(f"growth of time, 1 to {few} tokens (1: ∝)", *_growth(bench, "decode", "prefill, few")),
        "long": Finding(
            f"growth of time, {many} to {2 * many} tokens", *_growth(bench, "prefill, many", "prefill, twice as many")
        ),
    }


@claim(
    "B8",
    says="Prefill uses the arithmetic units well and puts little pressure on memory bandwidth.",
    heard="comparisons of the two phases",
    formula="MFU against MBU: which ceiling is nearer",
    otherwise="a short prompt reads all weights for a few rows: bandwidth is what it uses",
    cases={
        "the prompt is much longer than T*": lambda p, m: m["mfu_many"] > m["mbu_many"],
        "it is shorter than T*": lambda p, m: m["mfu_few"] > m["mbu_few"],
    },
    depends_on_speed=True,
)
def prefill_spares_memory(bench: Workbench) -> dict[str, Finding]:
    findings = {}
    for name in ("few", "many"):
        tokens = num_tokens(bench.timed_steps[f"prefill, {name}"])
        mfu, mbu = _utilisation(bench, f"prefill, {name}")
        findings[f"mfu_{name}"] = Finding(f"FLOP/s used by {tokens} tokens", None, mfu, "%")
        findings[f"mbu_{name}"] = Finding(f"bandwidth used by {tokens} tokens", None, mbu, "%")
    return findings


@claim(
    "A8",
    says="Prefill reads the weights once and uses them for all tokens.",
    heard="comparisons of the two phases",
    formula="weights are read once per step: ceil(N / chunk) times",
    otherwise="every chunk reads them again",
    cases={
        "the prompt is one step": lambda p, m: m["whole"] == 1,
        "it is cut into chunks": lambda p, m: m["chunked"] == 1,
    },
)
def weights_once(bench: Workbench) -> dict[str, Finding]:
    model = bench.tiny
    embedding = 64 * model.config.hidden_size * model.dtype.itemsize
    matrices = weight_bytes(model.config, model.dtype.itemsize, 0)

    def passes(chunk: int) -> float:
        counted = sum(bench.count(model, step).total.bytes.weights for step in chunk_steps(64, chunk))
        return (counted - embedding) / matrices

    return {
        "whole": Finding("passes over the weights, 64 tokens at once", 1, passes(64)),
        "chunked": Finding("passes over the weights, in chunks of 16", 4, passes(16)),
    }


@claim(
    "A9",
    says="Decode multiplies a matrix by a vector, so it is bound by memory bandwidth.",
    heard="comparisons of the two phases",
    formula="time ≥ weight and KV bytes / bandwidth; bound by it if it takes at most twice as long",
    otherwise="something else takes longer: starting operators one by one, or a kernel that misses the bandwidth",
    cases={
        "the weights are large": lambda p, m: m["large"] > 100 * NEAR,
        "they are small": lambda p, m: m["small"] > 100 * NEAR,
    },
    depends_on_speed=True,
)
def decode_reads(bench: Workbench) -> dict[str, Finding]:
    tiny, large = (
        least_bytes(model.config, decode_step(128), model.dtype.itemsize) for model in (bench.tiny, bench.timed)
    )
    return {
        "large": Finding(f"bandwidth used, {large / 1e6:.0f} MB per token", 100, _utilisation(bench, "decode")[1], "%"),
        "small": Finding(
            f"bandwidth used, {tiny / 1e6:.0f} MB per token",
            100,
            100 * bench.roof.mbu(tiny, bench.seconds("decode, tiny")),
            "%",
        ),
    }


@claim(
    "A10",
    says="Decode moves tens of gigabytes of weights for a single token, then throws them away.",
    heard="explanations of why decode is slow",
    formula="weight bytes per token = W / batch",
    otherwise="the same pass serves every sequence of the batch",
    cases={
        "one sequence decodes": lambda p, m: m["one"] >= p["weights"],
        "sixteen do": lambda p, m: m["sixteen"] >= p["weights"],
    },
)
def weights_per_token(bench: Workbench) -> dict[str, Finding]:
    model = bench.shape("llama-3.1-8b")

    def per_token(batch: int) -> tuple[float, float]:
        step = decode_step(1000, batch)
        return weight_bytes(model.config, 2, batch) / batch / 1e9, bench.count(
            model, step
        ).total.bytes.weights / batch / 1e9

    parts = bench.count(model, decode_step(1)).by_part()
    matrices = sum(parts[part].bytes.weights for part in ("projections", "mlp", "head"))
    return {
        "weights": Finding(
            "matrices of Llama 8B in bf16", 2 * matmul_parameters(model.config) / 1e9, matrices / 1e9, "GB"
        ),
        "one": Finding("read per token, batch 1", *per_token(1), "GB"),
        "sixteen": Finding("read per token, batch 16", *per_token(16), "GB"),
    }


@claim(
    "A18",
    says="Decode is a teacher who walks to a far ink bottle for every word: one trip over the weights per token.",
    heard="analogies for decode",
    formula="trips per token = 1 / batch; what was written before is read again by each student's teacher",
    otherwise="one trip carries ink for the whole class; only the KV of each student is read on its own",
    cases={
        "one student is taught": lambda p, m: m["one"] == 1,
        "the class is taught together": lambda p, m: m["class"] == 1,
    },
)
def ink_bottle(bench: Workbench) -> dict[str, Finding]:
    def served(batch: int) -> Served:
        return bench.serve(bench.engine(), [bench.prompt(16, salt) for salt in range(batch)], [9] * batch)

    def trips(run: Served) -> float:
        return len(run.decodes) / sum(step.num_tokens for step in run.decodes)

    def memory(run: Served) -> float:
        reads = [step_bytes(bench.tiny.config, step.shape, 4).kv_read for step in run.decodes]
        return sum(reads) / sum(step.num_tokens for step in run.decodes)

    one, many = served(1), served(16)
    return {
        "one": Finding("trips per token, one student", 1, trips(one)),
        "class": Finding("trips per token, sixteen", 1 / 16, trips(many)),
        "kv": Finding("KV read per token, sixteen over one", 1, memory(many) / memory(one), "×"),
    }


@claim(
    "A24",
    says="Prefill needs FLOP/s, decode needs bandwidth.",
    heard="summary tables",
    formula="prefill: time ≥ FLOPs / F; decode: time ≥ bytes / BW",
    otherwise="the nearer ceiling is another one here: look at capacity and overhead, too",
    cases=always(lambda p, m: m["mfu_prefill"] > m["mfu_decode"] and m["mbu_decode"] > m["mbu_prefill"]),
    depends_on_speed=True,
)
def two_ceilings(bench: Workbench) -> dict[str, Finding]:
    findings = {}
    for phase, name in (("prefill", "prefill, many"), ("decode", "decode")):
        mfu, mbu = _utilisation(bench, name)
        findings[f"mfu_{phase}"] = Finding(f"FLOP/s used by {phase}", None, mfu, "%")
        findings[f"mbu_{phase}"] = Finding(f"bandwidth used by {phase}", None, mbu, "%")
    return findings


@claim(
    "B12",
    says="Decode leaves the arithmetic units idle, above all with small batches and long texts.",
    heard="comparisons of the two phases",
    formula="MFU ~ batch while weights are the bytes; context matters once B · c nears W / kv",
    otherwise="as long as weights are most of the bytes, the length of the text changes little",
    cases={
        "the batch is small": lambda p, m: m["one"] < m["sixteen"] / 2,
        "the text is long (1k tokens, batch 1)": lambda p, m: m["long"] < m["one"] / 2,
    },
    depends_on_speed=True,
)
def idle_units(bench: Workbench) -> dict[str, Finding]:
    def mfu(name: str) -> tuple[float, float]:
        config, step = bench.timed.config, bench.timed_steps[name]
        flops = step_flops(config, step).total
        bound = bench.roof.mfu(flops, step_seconds(config, step, bench.timed.dtype.itemsize, bench.roof))
        return 100 * bound, _utilisation(bench, name)[0]

    return {
        "one": Finding("FLOP/s used, batch 1, context 128", *mfu("decode"), "%"),
        "sixteen": Finding("FLOP/s used, batch 16, context 128", *mfu("decode, batch 16"), "%"),
        "long": Finding("FLOP/s used, batch 1, context 1024", *mfu("decode, long context"), "%"),
    }


@claim(
    "B14",
    says="Being memory-bound is something else than being bandwidth-bound.",
    heard="discussions of terms",
    formula="twice the bytes (a wider dtype) take twice the time, several times the FLOPs (rows) take the same",
    otherwise="the time follows the bytes. Capacity is the other limit of memory, and it shows as preemption",
    cases=always(lambda p, m: m["bytes"] <= max(m["flops"], 1.15)),
    depends_on_speed=True,
)
def memory_is_bandwidth(bench: Workbench) -> dict[str, Finding]:
    config, step, wide, narrow = bench.timed.config, decode_step(128), bench.wide, bench.timed.dtype
    twice = least_bytes(config, step, wide.itemsize) / least_bytes(config, step, narrow.itemsize)
    wider, more_rows = (bench.seconds(name) / bench.seconds("decode") for name in ("decode, wide", "prefill, few"))
    rows = num_tokens(bench.timed_steps["prefill, few"])
    served = bench.serve(bench.engine(num_blocks=9), [bench.prompt(24, salt) for salt in range(4)], [12] * 4)
    preempted = sum(len(step.preempted) for step in served.steps)
    return {
        "bytes": Finding(f"time, {dtype_name(wide)} over {dtype_name(narrow)}", twice, wider, "×"),
        "flops": Finding(f"time, {rows} rows over 1", 1, more_rows, "×"),
        "preempted": Finding("preemptions, 4 requests in room for 3", None, preempted),
    }
