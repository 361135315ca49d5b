"""Checks of exercise 05. The oracle counts: weight by weight, pair by pair, number by number."""

from __future__ import annotations

from minillm.course.lab.checks import Case, check
from minillm.course.lab.exercises import Exercise, Task

EXERCISE = Exercise(
    slug="roofline",
    tasks=(
        Task(
            "flops",
            "What a step computes",
            hints=(
                "Three sums: weights times tokens, pairs of query and key, and the head. Which of them know q_len?",
                "Query i of a sequence sees kv_len - q_len + i + 1 keys. The head runs once a sequence.",
                "tokens = sum of q_len; pairs = sum of q_len * (kv_len - q_len) + q_len * (q_len + 1) // 2; "
                "2 * tokens * layer_parameters * layers + 4 * pairs * heads * head_dim * layers + 2 * len(step) * head",
            ),
        ),
        Task(
            "bytes",
            "What a step moves",
            hints=(
                "What do the sequences of a step share, and what does each have for itself?",
                "Weights once. Then 2 numbers (K and V) per layer, key/value head and dimension, for every token "
                "that is read (kv_len) or written (q_len).",
                "weights = layers * layer_parameters + head_parameters; kv = 2 * layers * kv_heads * head_dim * "
                "sum(q_len + kv_len); element_bytes * (weights + kv)",
            ),
        ),
        Task(
            "intensity",
            "FLOPs per byte",
            hints=(
                "You have written both sides of this fraction.",
                "FLOPs above, bytes below.",
                "return step_flops(shape, step) / step_bytes(shape, step, element_bytes)",
            ),
        ),
        Task(
            "bound",
            "The slower of the two decides",
            hints=(
                "Two clocks run at the same time. When is the step over?",
                "flops / peak_flops seconds of arithmetic, num_bytes / bandwidth seconds of memory: the larger one.",
                'compute, memory = flops / peak_flops, num_bytes / bandwidth; return (compute, "compute") if compute '
                '>= memory else (memory, "bandwidth")',
            ),
        ),
        Task(
            "latency",
            "TTFT and TPOT at best",
            hints=(
                "Which step gives the first token? How many steps are left for the other new_tokens - 1?",
                "Prefill is one step [(prompt_len, prompt_len)]. Decode steps are [(1, context)] with contexts from "
                "prompt_len + 1 to prompt_len + new_tokens - 1.",
                "bound = lambda step: step_time(step_flops(shape, step), step_bytes(shape, step, element_bytes), "
                "peak_flops, bandwidth)[0]; then bound(prefill), and the mean of bound(decode) over the contexts",
            ),
        ),
    ),
)


def shape_of(case: Case) -> dict[str, int]:
    """A small decoder with grouped queries, all of its numbers different."""
    kv_heads, head_dim = case.integer(2, 3), case.integer(4, 7)
    return {
        "layers": case.integer(2, 5),
        "hidden": case.integer(20, 30),
        "intermediate": case.integer(40, 60),
        "heads": kv_heads * case.integer(2, 3),
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "vocab": case.integer(70, 99),
    }


def step_of(case: Case, sequences: int) -> list[tuple[int, int]]:
    """Chunks behind some cached tokens."""
    lengths = [(case.integer(1, 5), case.integer(0, 6)) for _ in range(sequences)]
    return [(q_len, q_len + cached) for q_len, cached in lengths]


def counted_flops(shape: dict[str, int], step: list[tuple[int, int]]) -> int:
    """Token by token, matrix by matrix, pair by pair."""
    flops = 0
    width, kv_width = shape["heads"] * shape["head_dim"], shape["kv_heads"] * shape["head_dim"]
    matrices = [(shape["hidden"], width), (shape["hidden"], kv_width), (shape["hidden"], kv_width)]
    matrices += [(width, shape["hidden"])] + 3 * [(shape["hidden"], shape["intermediate"])]
    for q_len, kv_len in step:
        for i in range(q_len):
            for _ in range(shape["layers"]):
                flops += sum(2 * rows * columns for rows, columns in matrices)
                flops += (kv_len - q_len + i + 1) * shape["heads"] * (2 * shape["head_dim"] + 2 * shape["head_dim"])
        flops += 2 * shape["vocab"] * shape["hidden"]
    return flops


def counted_bytes(shape: dict[str, int], step: list[tuple[int, int]], element_bytes: int) -> int:
    """Number by number: the weights once, keys and values of every token of every sequence."""
    width, kv_width = shape["heads"] * shape["head_dim"], shape["kv_heads"] * shape["head_dim"]
    layer = 2 * shape["hidden"] * width + 2 * shape["hidden"] * kv_width + 3 * shape["hidden"] * shape["intermediate"]
    numbers = shape["layers"] * layer + shape["vocab"] * shape["hidden"]
    for q_len, kv_len in step:
        for _ in range(shape["layers"]):
            numbers += (kv_len + q_len) * (kv_width + kv_width)
    return numbers * element_bytes


def least_seconds(
    shape: dict[str, int], step: list[tuple[int, int]], size: int, peak: float, bandwidth: float
) -> float:
    """The roofline's bound of a step."""
    return max(counted_flops(shape, step) / peak, counted_bytes(shape, step, size) / bandwidth)


@check("flops", points=3)
def prefill_and_decode(case: Case) -> None:
    """A prompt, and one token behind it"""
    shape, n = shape_of(case), case.integer(5, 12)
    for step in ([(n, n)], [(1, n + 1)]):
        got = case.learner.step_flops(shape, step)
        case.expect(got, counted_flops(shape, step), f"multiply-adds of {step}, counted one by one, times 2")


@check("flops", points=2, hidden=True)
def mixed_steps(case: Case) -> None:
    """Several sequences, some in the middle of their prompt"""
    shape, step = shape_of(case), step_of(case, 4)
    case.expect(
        case.learner.step_flops(shape, step), counted_flops(shape, step), "chunks, decodes and prompts together"
    )


@check("bytes", points=3)
def weights_and_cache(case: Case) -> None:
    """Weights once, keys and values of everybody"""
    shape, n = shape_of(case), case.integer(5, 12)
    for step in ([(1, n)], [(1, n), (1, 2 * n)]):
        got = case.learner.step_bytes(shape, step, element_bytes=2)
        case.expect(got, counted_bytes(shape, step, 2), f"bytes of {step}: sequences share weights, never KV")


@check("bytes", points=2, hidden=True)
def chunks_and_wider_numbers(case: Case) -> None:
    """Chunks read what is cached and write what is new, in any dtype"""
    shape, step = shape_of(case), step_of(case, 3)
    for size in (1, 4):
        got = case.learner.step_bytes(shape, step, element_bytes=size)
        case.expect(got, counted_bytes(shape, step, size), f"{size} bytes per number")


@check("intensity", points=1)
def work_per_byte(case: Case) -> None:
    """FLOPs for each byte that was moved"""
    shape, step = shape_of(case), step_of(case, 2)
    expected = counted_flops(shape, step) / counted_bytes(shape, step, 2)
    case.expect(case.learner.arithmetic_intensity(shape, step, element_bytes=2), expected, "FLOP/byte", rtol=1e-6)


@check("bound", points=2)
def who_is_waited_for(case: Case) -> None:
    """The slower of arithmetic and memory, by name"""
    peak, bandwidth, work = float(case.integer(50, 90)), float(case.integer(3, 9)), float(case.integer(100, 200))
    for factor, name in ((3.0, "compute"), (1 / 3, "bandwidth")):
        flops, moved = work * factor * peak, work * bandwidth
        expected = (max(flops / peak, moved / bandwidth), name)
        got = case.learner.step_time(flops=flops, num_bytes=moved, peak_flops=peak, bandwidth=bandwidth)
        case.expect(
            got, expected, "both work at the same time; the step is over when the slower one is done", rtol=1e-6
        )


@check("bound", points=1, hidden=True)
def at_the_ridge(case: Case) -> None:
    """Where both take equally long"""
    case.expect(case.learner.step_time(64.0, 32.0, 16.0, 8.0), (4.0, "compute"), "the ridge counts as compute")


@check("latency", points=3)
def first_and_later_tokens(case: Case) -> None:
    """TTFT is the prefill, TPOT the mean decode step"""
    shape, prompt, new = shape_of(case), case.integer(6, 20), case.integer(4, 8)
    for peak, bandwidth in ((1e6, 1e9), (1e9, 1e5)):
        decodes = [least_seconds(shape, [(1, c)], 2, peak, bandwidth) for c in range(prompt + 1, prompt + new)]
        expected = (least_seconds(shape, [(prompt, prompt)], 2, peak, bandwidth), sum(decodes) / len(decodes))
        got = case.learner.latency_bounds(shape, prompt, new, 2, peak, bandwidth)
        case.expect(
            got, expected, f"{new} new tokens: one comes out of prefill, {new - 1} take a decode step", rtol=1e-6
        )


@check("latency", points=1, hidden=True)
def the_shortest_answer(case: Case) -> None:
    """Two new tokens: one prefill, one decode step"""
    shape, prompt = shape_of(case), case.integer(6, 20)
    first = least_seconds(shape, [(prompt, prompt)], 4, 1e6, 1e6)
    expected = (first, least_seconds(shape, [(1, prompt + 1)], 4, 1e6, 1e6))
    case.expect(case.learner.latency_bounds(shape, prompt, 2, 4, 1e6, 1e6), expected, "", rtol=1e-6)
