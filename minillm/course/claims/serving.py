"""Claims about serving many: chunks, pages, and a machine for each phase."""

from __future__ import annotations

import torch

from minillm.costs.steps import decode_step
from minillm.course.claims.card import Finding, claim
from minillm.course.claims.workbench import Served, Workbench
from minillm.generate import extend
from minillm.measure.counters import Counter
from minillm.measure.roof import attention_intensity
from minillm.sampling import SamplingParams

LENGTHS = (20, 35, 50, 65, 80, 120, 160, 240)  # prompts of different requests
RESERVED = 256  # tokens that a cache without pages sets aside for each


@claim(
    "A20",
    says="Chunked prefill keeps long prompts from running out of memory and from blocking running decodes.",
    heard="lists of optimisations for prefill",
    formula="tokens per step ≤ budget; activations ~ chunk; KV = N · kv whatever the chunk",
    otherwise="the KV of the prompt has to fit in any case; what does not fit is preempted",
    cases={
        "others wait for the step": lambda p, m: m["step"] > 2,
        "activations are what does not fit": lambda p, m: m["activations"] > 2,
        "the KV cache is what does not fit": lambda p, m: m["kv"] > 2,
    },
)
def chunks_save_memory(bench: Workbench) -> dict[str, Finding]:
    def largest_step(budget: int) -> int:
        engine = bench.engine(max_num_batched_tokens=budget)
        engine.add(bench.prompt(8), SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
        engine.step()
        engine.add(bench.prompt(400, salt=1), SamplingParams(max_tokens=1))
        list(engine.run())
        return max(step.num_tokens for step in engine.trace)

    def run(chunk: int) -> tuple[int, int]:
        """Peak of activations, and KV written."""
        cache = bench.cache(512)
        with Counter(bench.tiny, kv=cache) as counted:
            for start in range(0, 512, chunk):
                extend(bench.tiny, torch.tensor(bench.prompt(512)[start : start + chunk]), cache)
        return counted.peak_bytes, counted.total.bytes.kv_write

    (whole, kv_whole), (chunked, kv_chunked) = run(512), run(64)
    return {
        "step": Finding(
            "largest step of a decode, budget 512 over 64", 401 / 64, largest_step(512) / largest_step(64), "×"
        ),
        "activations": Finding("peak of activations, 512 tokens over 64s", None, whole / chunked, "×"),
        "kv": Finding("KV written, at once over in chunks", 1, kv_whole / kv_chunked, "×"),
    }


@claim(
    "A22",
    says="PagedAttention saves bandwidth: its larger batches turn vectors into matrices.",
    heard="lists of optimisations for decode",
    formula="linear layers: B FLOP/B (bf16); decode attention: heads / KV heads FLOP/B, whatever the batch",
    otherwise="it manages memory: a request reads what it read before, and attention stays where it was",
    cases={
        "it is about the linear layers": lambda p, m: m["linear"] > 2,
        "it is about attention": lambda p, m: m["attention"] > 2,
        "it is about one sequence": lambda p, m: m["paged"] < 0.9,
    },
)
def paging_saves_bandwidth(bench: Workbench) -> dict[str, Finding]:
    model = bench.shape("llama-3.1-8b")

    def intensities(batch: int) -> tuple[float, float]:
        """FLOP/B of the linear layers' weights, and of attention's KV."""
        counted = bench.count(model, decode_step(1000, batch))
        parts = counted.by_part()
        linear = [parts[part] for part in ("projections", "mlp")]
        weights = sum(cost.flops for cost in linear) / sum(cost.bytes.weights for cost in linear)
        return weights, parts["attention"].flops / counted.total.bytes.kv_read

    (linear_1, attention_1), (linear_16, attention_16) = intensities(1), intensities(16)
    tiny, cache = bench.tiny, bench.cache(200)
    extend(tiny, torch.tensor(bench.prompt(99)), cache)
    with Counter(tiny, kv=cache) as contiguous:
        extend(tiny, torch.tensor([1]), cache)
    paged = bench.count(tiny, decode_step(100)).total.bytes.kv_read
    return {
        "linear": Finding("intensity of linear layers, batch 16 over 1", 16, linear_16 / linear_1, "×"),
        "attention": Finding("intensity of attention, batch 16 over 1", 1, attention_16 / attention_1, "×"),
        "group": Finding(
            "intensity of attention, batch 16", attention_intensity(model.config, 2), attention_16, "FLOP/B"
        ),
        "paged": Finding(
            "KV one sequence reads, paged over contiguous", 1, paged / contiguous.total.bytes.kv_read, "×"
        ),
        "held": Finding("KV held by 8 requests, paged over reserved", _in_blocks() / (8 * RESERVED), _held(bench), "×"),
    }


def _in_blocks() -> int:
    """Tokens in whole blocks of 16, one more than the prompt each."""
    return sum(16 * -(-(length + 1) // 16) for length in LENGTHS)


def _held(bench: Workbench) -> float:
    prompts = [bench.prompt(length, salt) for salt, length in enumerate(LENGTHS)]
    served = bench.serve(bench.engine(max_num_batched_tokens=1024), prompts, [2] * len(LENGTHS))
    return 16 * sum(part.first_block + len(part.blocks) for part in served.steps[-1].requests) / (8 * RESERVED)


@claim(
    "B15",
    says="Keeping the phases apart is what makes inference efficient.",
    heard="conclusions of explainers; advertisements for disaggregation",
    formula="passes over the weights for the same work; tokens in the largest step that a decode waits for",
    otherwise="mixed steps fill the batch, and separate ones read all weights for what would have fitted in",
    cases={
        "throughput is the aim": lambda p, m: m["apart"] <= m["mixed"],
        "short gaps between tokens are, with a machine for each phase": lambda p, m: m["own_machine"] < m["worst"],
    },
)
def phases_apart(bench: Workbench) -> dict[str, Finding]:
    """One machine cannot show two: what decoding on its own machine would see is read off the trace."""
    lengths = [8, 14, 20, 26, 11, 17, 23, 9, 15, 21, 27, 12]
    prompts = [bench.prompt(40, salt) for salt in range(len(lengths))]

    def served(policy: str) -> Served:
        return bench.serve(bench.engine(policy=policy, max_num_seqs=4, max_num_batched_tokens=64), prompts, lengths)

    apart, mixed = served("prefill_first"), served("mixed")
    own = max(sum(part.phase == "decode" for part in step.requests) for step in mixed.decodes)
    return {
        "apart": Finding("passes over the weights, phases in own steps", None, len(apart.steps)),
        "mixed": Finding("passes over the weights, mixed steps", None, len(mixed.steps)),
        "worst": Finding(
            "largest step that a decode waits for", 64, max(s.num_tokens for s in mixed.decodes), "tokens"
        ),
        "own_machine": Finding("the same on a machine of its own (simulated)", 4, own, "tokens"),
    }
