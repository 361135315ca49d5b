"""Claims about waiting: what TTFT and TPOT are made of, and how they grow."""

from __future__ import annotations

from time import perf_counter

from minillm.costs.formulas import step_flops
from minillm.costs.steps import prefill_step
from minillm.course.claims.card import Finding, claim
from minillm.course.claims.workbench import Served, Workbench
from minillm.course.lessons.crossovers import prefill_crossover
from minillm.course.lessons.schedules import request_steps
from minillm.generate import generate, prefill
from minillm.measure.bench_stall import StallBench
from minillm.measure.counters import Counter
from minillm.sampling import SamplingParams


@claim(
    "A14",
    says="Prefill decides the time to the first token.",
    heard="definitions of TTFT",
    formula="TTFT = queue + prefill; prefill's part of the steps, if requests are served one after the other",
    otherwise="the queue decides it, and prefill is what is left",
    cases={
        "nobody is in front": lambda p, m: m["first"] > 50,
        "requests wait for their turn": lambda p, m: m["last"] > 50,
    },
)
def prefill_decides_ttft(bench: Workbench) -> dict[str, Finding]:
    served = bench.serve(bench.engine(max_num_seqs=1), [bench.prompt(20, salt) for salt in range(3)], [8] * 3)
    shares = _prefill_shares(served)
    return {
        "first": Finding("prefill's part of TTFT in steps, 1st of 3", 100, 100 * shares[0], "%"),
        "last": Finding("prefill's part of TTFT in steps, 3rd of 3", 100 / 17, 100 * shares[2], "%"),
    }


def _prefill_shares(served: Served) -> list[float]:
    """For each request: its own prefill steps over all steps until it had its first token."""
    mine: dict[str, list[int]] = {}
    for number, step in enumerate(served.steps, 1):
        for part in step.requests:
            if part.phase == "prefill":
                mine.setdefault(part.request_id, []).append(number)
    return [len(steps) / steps[-1] for steps in mine.values()]


@claim(
    "A15",
    says="Decode decides the time per output token.",
    heard="definitions of TPOT",
    formula="a step takes as long as all its tokens; whose they are does not matter",
    otherwise="the prefill of somebody else sits in the same steps and sets the tail",
    cases={
        "no prompt arrives meanwhile": lambda p, m: m["quiet"] < 2,
        "a long prompt arrives": lambda p, m: m["stalled"] < 2,
    },
    depends_on_speed=True,
)
def decode_decides_tpot(bench: Workbench) -> dict[str, Finding]:
    stall = StallBench(bench.tiny, [("mixed", 2048)], num_running=4, context=32, prompt=1024, seed=bench.seed)
    arrival = stall.run(repeats=1)[0].arrivals[0]
    quiet = sorted(end - start for start, end in arrival.gaps if end <= 0)
    return {
        "quiet": Finding(
            "gaps between tokens, 9th decile over median",
            None,
            quiet[-len(quiet) // 10] / arrival.quiet_itl,
            "×",
        ),
        "stalled": Finding("longest gap during a prefill of 1024, over it", None, arrival.ratio, "×"),
    }


@claim(
    "A16",
    says="Prefill costs O(N²), which is bearable because it runs in parallel.",
    heard="complexity tables",
    formula="linear layers ~ N, attention ~ N²; equal at N* = P_layer / (heads · head_dim) - 1",
    otherwise="the linear layers are most of the work, and they grow with N",
    cases={
        "the prompt is beyond N* (64k to 128k, 8B)": lambda p, m: m["long"] > 3,
        "it is far below (1k to 2k)": lambda p, m: m["short"] > 3,
    },
)
def quadratic_prefill(bench: Workbench) -> dict[str, Finding]:
    model = bench.shape("llama-3.1-8b")

    def growth(tokens: int) -> tuple[float, float]:
        steps = [prefill_step(n) for n in (tokens, 2 * tokens)]
        predicted, counted = (
            [cost(step) for step in steps]
            for cost in (lambda s: step_flops(model.config, s).total, lambda s: bench.count(model, s).total.flops)
        )
        return predicted[1] / predicted[0], counted[1] / counted[0]

    return {
        "short": Finding("FLOPs, 2k tokens over 1k", *growth(1024), "×"),
        "long": Finding("FLOPs, 128k tokens over 64k", *growth(65536), "×"),
        "crossover": Finding(
            "N*: attention is half of the layers' FLOPs",
            prefill_crossover(model.config),
            _crossing(bench),
            "tokens",
        ),
    }


def _crossing(bench: Workbench) -> float:
    """N* from counted FLOPs: attention ~ N (N + 1) and linear layers ~ N of one counted prompt."""
    n = 1024
    parts = bench.count(bench.shape("llama-3.1-8b"), prefill_step(n)).by_part()
    return (n + 1) * (parts["projections"].flops + parts["mlp"].flops) / parts["attention"].flops - 1


@claim(
    "A17",
    says="Decode costs O(L) per step and O(M (N + M)) in all.",
    heard="complexity tables",
    formula="attention: 4 · layers · heads · head_dim · [(M - 1) N + M (M - 1) / 2]",
    otherwise="the linear layers cost more and do not grow with the context",
    cases={
        "only attention is counted": lambda p, m: m["attention"] == p["attention"] and m["bound"] <= 1,
        "all work is counted": lambda p, m: m["share"] > 50,
    },
)
def linear_decode(bench: Workbench) -> dict[str, Finding]:
    config, n, m = bench.tiny.config, 64, 24
    greedy = SamplingParams(temperature=0, max_tokens=m, ignore_eos=True)
    tokens = generate(bench.tiny, bench.prompt(n), greedy)
    next(tokens)
    with Counter(bench.tiny) as counted:
        list(tokens)
    bound = 4 * config.num_layers * config.num_heads * config.head_dim * m * (n + m)
    predicted = [step_flops(config, step) for step in request_steps(n, m)[1:]]
    attention, total = sum(f.attention for f in predicted), sum(f.total for f in predicted)
    measured = counted.by_part()["attention"].flops
    return {
        "attention": Finding("attention of 23 steps after 64 tokens", attention, measured, "FLOP"),
        "bound": Finding("the same over M (N + M) keys", attention / bound, measured / bound, "×"),
        "share": Finding(
            "attention's part of these steps' FLOPs",
            100 * attention / total,
            100 * measured / counted.total.flops,
            "%",
        ),
    }


@claim(
    "B9",
    says="A slow answer is slow because of its prompt, not because of its output.",
    heard="explanations of why prefill is expensive",
    formula="TTFT / (TTFT + (M - 1) TPOT); at the bounds the prompt dominates if N > R · M",
    otherwise="the M - 1 decode steps take longer",
    cases={
        "the prompt is long and the answer short (1024 in, 4 out)": lambda p, m: m["long"] > 50,
        "the prompt is short and the answer long (16 in, 64 out)": lambda p, m: m["short"] > 50,
    },
    depends_on_speed=True,
)
def prompt_is_slow(bench: Workbench) -> dict[str, Finding]:
    def share(prompt: int, new: int) -> float:
        greedy = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        prefill(bench.tiny, bench.prompt(prompt))  # the first prompt of a length pays for choosing kernels
        times = [perf_counter()]
        for _ in generate(bench.tiny, bench.prompt(prompt), greedy):
            times.append(perf_counter())
        return 100 * (times[1] - times[0]) / (times[-1] - times[0])

    return {
        "long": Finding("TTFT's part of the time, 1024 in, 4 out", None, share(1024, 4), "%"),
        "short": Finding("TTFT's part of the time, 16 in, 64 out", None, share(16, 64), "%"),
    }
