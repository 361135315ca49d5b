"""Claims about optimisations: what each of them saves, and what it does not."""

from __future__ import annotations

import random
from collections import Counter as Tally
from collections.abc import Callable
from functools import partial

import torch

from minillm.attention.reference import naive_attention
from minillm.attention.tiled import tiled_attention
from minillm.cache.contiguous import ContiguousCache
from minillm.course.claims.card import Finding, always, claim
from minillm.course.claims.workbench import Workbench
from minillm.generate import generate, prefill
from minillm.kernels import sdpa
from minillm.measure.counters import Counter
from minillm.measure.roof import expected_tokens, speculative_speedup
from minillm.sampling import SamplingParams

HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64


def _attention_cost(kernel: Callable[..., object], q_len: int, kv_len: int) -> Counter:
    """One attention call of 8 query heads on 2 KV heads, under the counter."""
    q, k = torch.ones(q_len, HEADS, HEAD_DIM), torch.ones(KV_HEADS, kv_len, HEAD_DIM)
    with torch.inference_mode(), Counter() as counted:
        kernel(q, k, k.clone(), scale=HEAD_DIM**-0.5)
    return counted


@claim(
    "A19",
    says="FlashAttention is an optimisation of the N² of computing.",
    heard="lists of optimisations for prefill",
    formula="every pair is computed either way; the scores never go to memory",
    otherwise="the same FLOPs; it moves fewer bytes and needs no N² memory",
    cases=always(lambda p, m: m["flops"] < 0.9),
)
def flash_saves_flops(bench: Workbench) -> dict[str, Finding]:
    naive, fused = (_attention_cost(kernel, 256, 1024) for kernel in (naive_attention, sdpa.attention))
    tiles = _attention_cost(partial(tiled_attention, q_tile=256, kv_tile=64), 256, 1024)
    return {
        "flops": Finding("FLOPs, fused over naive, 256 × 1024 pairs", 1, fused.total.flops / naive.total.flops, "×"),
        "tiles": Finding("FLOPs, tiles over naive", 1, tiles.total.flops / naive.total.flops, "×"),
        "bytes": Finding("bytes, naive over fused", None, naive.total.bytes.total / fused.total.bytes.total, "×"),
        "largest": Finding(
            "largest intermediate, naive over tiles", 1024 / 64, naive.largest[0] / tiles.largest[0], "×"
        ),
    }


@claim(
    "A23",
    says="Speculative decoding lets a small model guess five tokens at once, and checking them is free.",
    heard="lists of optimisations for decode",
    formula="tokens per round (1 - α^(γ+1)) / (1 - α) over γ · draft + verification, in decode steps",
    otherwise="checking takes longer than it gains: the idle units are busy with the batch",
    cases={
        "one request decodes": lambda p, m: m["speedup_1"] > 1,
        "sixteen requests decode": lambda p, m: m["speedup_16"] > 1,
    },
    depends_on_speed=True,
)
def free_speculation(bench: Workbench) -> dict[str, Finding]:
    acceptance, drafts, draft_cost = 0.8, 5, 0.1
    tokens = _tokens_per_round(bench, acceptance, drafts)
    findings = {
        "tokens": Finding("tokens per round, 80 % of guesses made right", expected_tokens(acceptance, drafts), tokens),
    }
    for batch, name in ((1, ""), (16, ", batch 16")):
        cost = bench.seconds(f"verify{name}") / bench.seconds(f"decode{name}")
        findings[f"cost_{batch}"] = Finding(f"checking 5 guesses over decoding, batch {batch}", 1, cost, "×")
        ideal, real = (speculative_speedup(acceptance, drafts, draft_cost, c) for c in (1.0, cost))
        findings[f"speedup_{batch}"] = Finding(f"speed-up if a guess costs 0.1, batch {batch}", ideal, real, "×")
    return findings


def _tokens_per_round(bench: Workbench, acceptance: float, drafts: int, new: int = 150) -> float:
    """Really verified, with synthetic guesses: the tiny model's own greedy tokens, spoilt at random."""
    rng, prompt = random.Random(bench.seed), bench.prompt(16)
    truth = list(generate(bench.tiny, prompt, SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)))
    _, cache = prefill(bench.tiny, prompt)
    done = 1
    rounds = 0
    while done + drafts < new:
        right = [rng.random() < acceptance for _ in range(drafts)]
        guesses = [
            token if ok else (token + 1) % bench.tiny.config.vocab_size
            for ok, token in zip(right, truth[done:], strict=False)
        ]
        done += 1 + _accepted(bench, cache, truth[done - 1], guesses)
        cache.truncate(len(prompt) + done - 1)
        rounds += 1
    return (done - 1) / rounds


@torch.inference_mode()
def _accepted(bench: Workbench, cache: ContiguousCache, newest: int, guesses: list[int]) -> int:
    """How many of the guesses the model would have chosen itself, found out in one step."""
    positions = torch.arange(cache.num_tokens, cache.num_tokens + 1 + len(guesses))
    hidden = bench.tiny(torch.tensor([newest, *guesses]), positions, cache.attend)
    cache.num_tokens += len(positions)
    chosen = bench.tiny.logits(hidden).argmax(-1).tolist()
    return next((i for i, guess in enumerate(guesses) if guess != chosen[i]), len(guesses))


@claim(
    "B13",
    says="FlashAttention belongs to prefill; the KV cache belongs to decode.",
    heard="tables of optimisations by phase",
    formula="prefill writes N of the N + M - 1 keys; fused attention reads a key once for its whole group of heads",
    otherwise="prefill makes the cache, and decode gains from fused attention, too",
    cases=always(lambda p, m: m["written"] == 0 or m["saved"] <= 1),
)
def one_phase_each(bench: Workbench) -> dict[str, Finding]:
    served = bench.serve(bench.engine(), [bench.prompt(40)], [11])
    by_phase = Tally(part.phase for step in served.steps for part in step.requests for _ in range(part.num_scheduled))
    naive, fused = (_attention_cost(kernel, 1, 1024).total.bytes.total for kernel in (naive_attention, sdpa.attention))
    return {
        "written": Finding(
            "KV written by prefill, 40 in, 11 out",
            80,
            100 * by_phase["prefill"] / by_phase.total(),
            "%",
        ),
        "saved": Finding("bytes of decode attention, naive over fused", None, naive / fused, "×"),
    }
