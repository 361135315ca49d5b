"""The solutions compute what the engine computes, on random inputs: what learners build is what the package runs."""

from __future__ import annotations

import doctest
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from minillm.attention.metadata import AttentionMetadata
from minillm.attention.paged import paged_attention, write_kv
from minillm.attention.reference import naive_attention, visible
from minillm.attention.tiled import tiled_attention
from minillm.cache.blocks import BlockPool
from minillm.config import EngineConfig
from minillm.costs import formulas
from minillm.course.lessons.schedules import request_steps
from minillm.course.lessons.softmax import merge
from minillm.engine.request import Request
from minillm.engine.scheduler import Scheduler
from minillm.engine.verify import given_draft, num_accepted
from minillm.generate import generate
from minillm.model.loader import load_model
from minillm.outputs import RequestMetrics
from minillm.quantization.formats import FORMATS, pack, unpack
from minillm.sampling import SamplingParams, probs_from_logits, sample
from minillm.speculative.ngram import NgramProposer
from tests.exercises.solutions import FILES, ROOT, solution
from tests.families import FAMILIES, random_model

SEEDS = range(5)


@pytest.mark.parametrize("exercise", [name for name in FILES if name != "ex07"])
def test_the_examples_in_docstrings(exercise: str) -> None:
    results = doctest.testmod(solution(exercise))
    assert results.attempted > 0 and results.failed == 0


# 01


@pytest.mark.parametrize("seed", SEEDS)
def test_metrics(seed: int) -> None:
    draw, ex = random.Random(seed), solution("ex01")
    times = [sorted(draw.uniform(1, 9) for _ in range(draw.randint(1, 6))) for _ in range(4)]
    for one in times:
        ours = RequestMetrics(0.5, [one])
        assert (ex.ttft(0.5, one), ex.tpot(one)) == (ours.ttft, ours.tpot), seed
    assert ex.itl(times) == RequestMetrics(0.5, times).itl, seed


@pytest.fixture(scope="module")
def tiny() -> Any:
    return load_model("tiny-draft", dtype="float32", device="cpu")


def tokens_of(seed: int, count: int, vocab: int = 500) -> list[int]:
    return [random.Random(seed * 1000 + i).randrange(vocab) for i in range(count)]


@torch.inference_mode()
@pytest.mark.parametrize("seed", SEEDS)
def test_generate_with_and_without_a_cache(tiny: Any, seed: int) -> None:
    ex01, ex03, prompt = solution("ex01"), solution("ex03"), tokens_of(seed, 9)
    want = list(generate(tiny, prompt, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)))
    logits, cache = ex03.prefill(tiny, prompt[:4])
    assert ex01.generate(lambda tokens: ex03.extend(tiny, tokens, cache), prompt[4:], max_tokens=12) == want, seed
    assert ex01.generate(lambda tokens: ex03.extend(tiny, tokens, ex03.prefill(tiny, prompt[:-1])[1]), [prompt[-1]], 1)
    assert len(logits) == tiny.config.vocab_size


# 02, 06


def heads(seed: int, q_len: int, kv_len: int, group: int = 3, kv_heads: int = 2, d: int = 8) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(q_len, kv_heads * group, d, generator=generator)
    return q, *torch.randn(2, kv_heads, kv_len, d, generator=generator)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("q_len, kv_len", [(1, 1), (1, 37), (16, 16), (7, 30), (20, 41)])
def test_attention(q_len: int, kv_len: int, seed: int) -> None:
    q, k, v = heads(seed, q_len, kv_len)
    for window in (None, 1, 5):
        assert_close(solution("ex02").causal_mask(q_len, kv_len, window), visible(q_len, kv_len, window))
        want = naive_attention(q, k, v, scale=0.3, sliding_window=window)
        assert_close(solution("ex02").grouped_attention(q, k, v, 0.3, window), want)
    want, lse = tiled_attention(q, k, v, scale=0.3)
    for tile in (1, 7, 64):
        out, sums = solution("ex06").tiled_attention(q, k, v, 0.3, tile)
        assert_close(out, want)
        assert_close(sums, lse)


@pytest.mark.parametrize("seed", SEEDS)
def test_softmax_and_merge(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(4, 9, generator=generator) * 100
    scores[1, 2:] = -torch.inf
    assert_close(solution("ex02").softmax(scores), scores.softmax(-1))
    assert solution("ex02").softmax(torch.full((2, 3), -torch.inf)).sum() == 0
    outs, lses = torch.randn(3, 5, 2, 4, generator=generator), torch.randn(3, 5, 2, generator=generator) * 200
    lses[0, 0], lses[:, 1] = -torch.inf, -torch.inf
    outs[:, 1] = 0
    for mine, ours in zip(solution("ex06").merge(outs, lses), merge(outs, lses), strict=True):
        assert_close(mine, ours)


# 04


@pytest.mark.parametrize("seed", SEEDS)
def test_sampling(seed: int) -> None:
    ex, draw = solution("ex04"), random.Random(seed)
    logits = 3 * torch.randn(40, generator=torch.Generator().manual_seed(seed))
    for _ in range(20):
        params = SamplingParams(
            temperature=draw.choice([0.0, 0.3, 1.0, 2.0]),
            top_k=draw.choice([0, 1, 5, 40]),
            top_p=draw.choice([1.0, 0.9, 0.3]),
            min_p=draw.choice([0.0, 0.05, 0.5]),
        )
        probs = ex.top_k(ex.apply_temperature(logits, params.temperature), params.top_k)
        probs = ex.min_p(ex.top_p(probs, params.top_p), params.min_p)
        want = probs_from_logits(logits[None], [params])
        assert_close(probs, want[0], msg=f"seed {seed}, {params}")
        u = draw.choice([0.0, draw.random(), 1 - 2**-53])
        assert ex.sample(want[0], u) == int(sample(want, torch.tensor([u], dtype=torch.float64))), (seed, params, u)


# 05


@pytest.mark.parametrize("family", FAMILIES)
def test_closed_forms(family: str) -> None:
    ex, config = solution("ex05"), random_model(family).config
    if config.sliding_window is not None:
        pytest.skip("the exercise has no sliding window")
    shape = {
        "layers": config.num_layers,
        "hidden": config.hidden_size,
        "intermediate": config.intermediate_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab": config.vocab_size,
    }
    for step in ([(1, 1)], [(7, 7)], [(3, 10), (1, 4), (1, 90)], *request_steps(5, 4)):
        assert ex.step_flops(shape, step) == formulas.step_flops(config, step).total
        ours = formulas.step_bytes(config, step, 2)
        matrices = 2 * formulas.matmul_parameters(config)  # ours has norms, biases and embedding rows, too
        assert ex.step_bytes(shape, step, 2) == matrices + ours.kv_read + ours.kv_write


# 07: in a process of its own, because the interpreter is chosen before Triton is imported


def test_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    checks = Path(__file__).with_name("kernel_checks.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-o", "addopts=", str(checks)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


# 08, 11

Left = list[tuple[int, int]]  # (number of the request, tokens that remain)


def serve(config: EngineConfig, prompts: list[int], outputs: list[int]) -> Iterator[tuple[Left, Left, dict[int, int]]]:
    """Who runs, who waits, and how many tokens the engine's scheduler gives to whom, step by step."""
    scheduler = Scheduler(config, BlockPool(1000, 4, enable_prefix_caching=False))
    for number, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        params = SamplingParams(max_tokens=output)
        scheduler.add(Request(str(number), (number, 0), [0] * prompt, prompt, params, 0.0))
    while list(scheduler):
        running = [(s.order[0], s.num_remaining) for s in scheduler.running]
        waiting = [(s.order[0], s.num_remaining) for s in scheduler.waiting.values()]
        plan = scheduler.schedule()
        yield running, waiting, {s.order[0]: part.num_tokens for s, part in plan.scheduled.items()}
        scheduler.commit(plan, [[0] for _ in plan.samplers])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("policy", ["mixed", "prefill_first"])
def test_scheduling(policy: str, seed: int) -> None:
    """Step by step, the exercise spends the budget as the engine's scheduler does, while blocks are plenty."""
    ex, draw = solution("ex11"), random.Random(seed)
    config = EngineConfig(policy=policy, max_num_batched_tokens=draw.randint(3, 20), max_num_seqs=4)
    prompts = [draw.randint(1, 30) for _ in range(10)]
    outputs = [draw.randint(1, 6) for _ in range(10)]
    rows = []
    for running, waiting, plan in serve(config, prompts, outputs):
        ours = [plan.get(order, 0) for order, _ in running]
        left = [remaining for _, remaining in running]
        if policy == "mixed":
            new = [plan[order] for order, _ in waiting if order in plan]
            want = ours, new
            got = ex.schedule(left, [n for _, n in waiting], config.max_num_batched_tokens, config.max_num_seqs)
            assert got == want, (seed, running, waiting)
        elif any(ours):
            assert ex.schedule_prefill_first(left, config.max_num_batched_tokens) == ours, (seed, running)
        rows.append([plan.get(order, 0) for order in range(10)])
    if policy == "mixed":
        got = ex.simulate(prompts, outputs, [0] * 10, config.max_num_batched_tokens, config.max_num_seqs)
        assert got == rows, seed


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("policy", ["mixed", "static"])
def test_batching(policy: str, seed: int) -> None:
    """With prompts of one token, the exercise's steps are those of the engine's scheduler.

    There, a static batch closes when it begins to decode: whoever wants a single token never does.
    """
    ex, draw = solution("ex08"), random.Random(seed)
    outputs = [draw.randint(2 if policy == "static" else 1, 7) for _ in range(9)]
    steps = [sorted(plan) for _, _, plan in serve(EngineConfig(policy=policy, max_num_seqs=3), [1] * 9, outputs)]
    got = ex.static_schedule(outputs, 3) if policy == "static" else ex.continuous_schedule(outputs, [0] * 9, 3)
    assert got == steps, seed


# 09


@pytest.mark.parametrize("seed", SEEDS)
def test_paged_attention(seed: int) -> None:
    ex, draw = solution("ex09"), random.Random(seed)
    block_size, kv_len = draw.choice([1, 4, 16]), draw.randint(2, 40)
    table = draw.sample(range(1, 50), -(-kv_len // block_size))
    q, k, v = heads(seed, 1, kv_len)
    metadata = AttentionMetadata.build([table], [kv_len], [kv_len], block_size=block_size)
    assert ex.slot_mapping(table, 0, kv_len, block_size) == metadata.slot_mapping.tolist()
    ours, mine = (torch.full((2, 2, 50, block_size, 8), torch.nan) for _ in range(2))
    write_kv(k.transpose(0, 1), v.transpose(0, 1), *ours, metadata)
    ex.write_kv(k.transpose(0, 1), v.transpose(0, 1), *mine, metadata.slot_mapping.tolist())
    assert_close(mine, ours, equal_nan=True)
    decode = AttentionMetadata.build([table], [1], [kv_len], block_size=block_size)
    want = paged_attention(q, *ours, decode, scale=0.3)
    assert_close(ex.paged_decode_attention(q[0], *mine, table, kv_len, 0.3), want[0])


@pytest.mark.parametrize("seed", SEEDS)
def test_block_pool(seed: int) -> None:
    """The exercise's pool has a block for a sequence exactly when the engine's has, through many comings and goings."""
    draw, mine = random.Random(seed), solution("ex09").BlockPool(10)
    ours = BlockPool(10, 4, enable_prefix_caching=False)
    held: list[tuple[Any, list[int]]] = []
    for _ in range(200):
        if held and draw.random() < 0.5:
            table, blocks = held.pop(draw.randrange(len(held)))
            ours.release(table)
            mine.free(blocks)
        else:
            count = draw.randint(1, 4)
            table, _ = ours.open([], [])
            got = mine.allocate(count)
            assert (ours.prepare(table, 0, 4 * count) is None) == (got is None)
            held += [(table, got)] if got else []
        assert mine.num_free == ours.num_free
        taken = [block for _, blocks in held for block in blocks]
        assert len(set(taken)) == len(taken) and 0 not in taken, seed
    with pytest.raises(ValueError):
        mine.free([1, 1])


# 10


@pytest.mark.parametrize("seed", SEEDS)
def test_prefix_match(seed: int) -> None:
    """Whatever the engine's cache knows and forgets, the exercise finds as many tokens in it."""
    ex, draw = solution("ex10"), random.Random(seed)
    pool = BlockPool(12, 2)
    for _ in range(60):
        tokens = [draw.randrange(2) for _ in range(draw.randint(1, 12))]
        cached = {name_of(prefix): block.id for prefix, block in pool.cached.items()}
        table, saved = pool.open(tokens, pool.lookup(tokens))
        names = ex.hash_blocks(tokens, 2)
        assert ex.longest_match(names, cached, len(tokens), 2) == (list(table.blocks), saved), (seed, tokens)
        pool.prepare(table, saved, len(tokens))
        pool.commit(table, tokens, len(tokens))
        pool.release(table)


def name_of(prefix: Any) -> str:
    """The exercise's name of a block that the engine's cache knows."""
    tokens: list[int] = []
    while prefix.parent is not None:
        tokens, prefix = [*prefix.tokens, *tokens], prefix.parent
    return str(solution("ex10").hash_blocks(tokens, 2)[-1])


@pytest.mark.parametrize("seed", SEEDS)
def test_copy_on_write(seed: int) -> None:
    draw, pool = random.Random(seed), BlockPool(20, 1, enable_prefix_caching=False)
    mine = solution("ex10").SharedBlocks(19)
    table, _ = pool.open([], [])
    pool.prepare(table, 0, 4)
    tables = [(table, mine.new(4))]
    for _ in range(30):
        ours, theirs = draw.choice(tables)
        index = draw.randrange(4)
        if draw.random() < 0.3 and len(tables) < 4:
            tables.append((pool.fork(ours), mine.fork(theirs)))
        else:
            copies = pool.prepare(ours, index, index + 1)
            assert bool(copies) == (mine.write(theirs, index) is not None), seed
        assert sorted(block.ref_count for block in pool.blocks[1:]) == sorted(mine.ref_counts), seed


# 12


@pytest.mark.parametrize("seed", SEEDS)
def test_formats(seed: int) -> None:
    ex, generator = solution("ex12"), torch.Generator().manual_seed(seed)
    x = torch.randn(6, 8, generator=generator).to(torch.bfloat16)  # whose ranges the engine stores exactly
    x[2] = 0
    codes, scale = FORMATS["int8"].encode(x)
    mine = ex.quantize_int8(x)
    assert_close(mine[0], codes)
    assert_close(mine[1], scale.float())
    assert_close(ex.dequantize_int8(*mine), FORMATS["int8"].decode(codes, scale))
    packed, *ends = FORMATS["int4"].encode(x)  # so few channels are one group
    levels, *mine_ends = ex.quantize_int4(x, -1)
    assert_close(ex.pack_int4(levels), packed)
    assert_close([end[..., None] for end in mine_ends], [end.float() for end in ends])
    assert_close(ex.dequantize_int4(levels, *mine_ends, -1), FORMATS["int4"].decode(packed, *ends))
    assert_close(ex.quantize_int4(x, -2)[0].T, unpack(FORMATS["int4"].encode(x.T)[0]))  # a range per channel
    levels = torch.randint(0, 16, (3, 10), generator=generator, dtype=torch.uint8)
    assert_close(ex.pack_int4(levels), pack(levels))
    assert_close(ex.unpack_int4(pack(levels)), unpack(pack(levels)))


def test_fp8_rounds_every_number_as_torch_does() -> None:
    """All of E4M3's numbers, the points halfway between, their neighbours, and what is too large."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    levels = codes[codes.isfinite()].unique()
    halves = torch.tensor([(a + b) / 2 for a, b in pairwise(levels.tolist())])
    near = torch.cat([levels, halves, halves * (1 + 1e-6), halves * (1 - 1e-6)])
    assert_close(solution("ex12").round_fp8(near), near.to(torch.float8_e4m3fn).float(), rtol=0, atol=0)
    assert solution("ex12").round_fp8(torch.tensor([1e6, -449.0])).tolist() == [448.0, -448.0]


# 13


@pytest.mark.parametrize("seed", SEEDS)
def test_verification(seed: int) -> None:
    ex, draw, generator = solution("ex13"), random.Random(seed), torch.Generator().manual_seed(seed)
    drafts, choices = tokens_of(seed, 4, vocab=2), tokens_of(seed + 100, 5, vocab=2)
    assert ex.verify_greedy(drafts, choices) == choices[: 1 + num_accepted(drafts, choices)]
    p, q = torch.randn(2, 6, generator=generator).softmax(-1)
    token = draw.randrange(6)
    accept = ex.acceptance_probability(p, q, token)
    mine = (1 - accept) * ex.residual(p, q)
    mine[token] += accept
    assert_close(mine, given_draft(p[None], q[None], torch.tensor([token]))[0])
    assert_close(ex.residual(p, p), p)


@pytest.mark.parametrize("seed", SEEDS)
def test_rejection_sampling_gives_the_target_distribution(seed: int) -> None:
    """Over a grid of random numbers, the first token comes out as often as p says, whatever q is."""
    ex, n, vocab = solution("ex13"), 60, 3
    p, q = torch.randn(2, vocab, generator=torch.Generator().manual_seed(seed)).softmax(-1)
    grid = [(i + 0.5) / n for i in range(n)]
    found = torch.zeros(vocab)
    for draft in range(vocab):
        for accept_u in grid:
            for draw_u in grid:
                first = ex.rejection_sample([draft], torch.stack([p, p]), q[None], [accept_u], draw_u)[0]
                found[first] += q[draft] / n**2
    assert_close(found, p, atol=2 / n, rtol=0)


@pytest.mark.parametrize("seed", SEEDS)
def test_ngrams(seed: int) -> None:
    """A guess where the engine's proposer has one, and equally well founded: as long an end stands there, too."""
    draw = random.Random(seed)
    for _ in range(30):
        tokens = [draw.randrange(3) for _ in range(draw.randint(1, 12))]
        request = Request("r", (0, 0), tokens, len(tokens), SamplingParams(), 0.0)
        ours = NgramProposer(min_match=2).propose({request: 4})
        mine = solution("ex13").propose_ngram(tokens, 4, min_match=2, max_match=12)
        assert bool(mine) == bool(ours), (seed, tokens)
        assert not mine or longest_match(tokens, mine[0]) == longest_match(tokens, ours[request].tokens[0]), tokens


def longest_match(tokens: list[int], following: int) -> int:
    """The longest end of `tokens` that stands earlier with `following` after it."""
    text = [*tokens, following]
    lengths = (
        n for n in range(len(tokens), 0, -1) for s in range(len(tokens) - n) if text[s : s + n + 1] == text[-n - 1 :]
    )
    return next(lengths, 0)
