# %% [markdown]
"""
# 11 · Chunked prefill

**Who waits when a long prompt arrives?**

45 minutes · needs 08 and 09 · runs offline on a CPU

Four people watch their answers being written, token by token. A fifth sends a long prompt. If the engine computes all of it in its next step, four answers
stop. If it computes the prompt in pieces, they go on, and the fifth waits longer. This lesson measures both, and finds the knob between them.
"""

# %%
from collections import Counter as Tally

import torch

from minillm import load_model, load_tokenizer, prefill
from minillm.cache.contiguous import ContiguousCache
from minillm.config import EngineConfig
from minillm.costs.formulas import kv_bytes_per_token
from minillm.costs.steps import chunk_steps, decode_step
from minillm.course.claims import CLAIMS, Workbench
from minillm.course.figures.curves import curves, decode_curve, prefill_curve
from minillm.course.figures.gantt import budget_figure
from minillm.course.figures.serving import stall_figure
from minillm.course.figures.show import explore, fold, predict, show, show_card, this_machine
from minillm.engine.engine import Engine
from minillm.generate import extend
from minillm.measure.bench_serve import serve
from minillm.measure.bench_stall import StallBench
from minillm.measure.datasheets import DATASHEETS
from minillm.measure.hardware import measure_hardware
from minillm.measure.roof import Roof, step_seconds
from minillm.measure.summary import summarize
from minillm.measure.workloads import Workload
from minillm.sampling import SamplingParams
from minillm.shapes import named_shape

model = load_model("tiny", device="cpu", dtype="float32", progress=False)
tokenizer = load_tokenizer("tiny")
config = model.config
print(this_machine())

# %% [markdown]
"""
## Predict

The time between two tokens of one answer is the *inter-token latency*, ITL. Four answers are being written when a prompt of 512 tokens arrives, and the engine computes it
in one step.

**How many times as long as usual is the longest gap that the four see?**
"""

# %%
guess = predict("longest gap over the usual one, prompt first and in one step", ..., "×")

# %% [markdown]
"""
## A toy: a budget for each step

Every step may compute so many tokens: its *budget*. Whoever decodes needs one token and goes first. What is left goes to the prompts that wait, in order, and the last of them gets cut.
"""


# %%
def steps_of(prompts, decoding, budget):
    """What each step computes: tokens by request, until all prompts are read."""
    left, steps = dict(prompts), []
    while any(left.values()):
        step = dict.fromkeys(decoding, 1)
        for name, tokens in left.items():
            chunk = min(tokens, budget - sum(step.values()))
            if chunk:
                step[name], left[name] = chunk, tokens - chunk
        steps.append(step)
        decoding = [*decoding, *(name for name in left if not left[name] and name in step)]
        left = {name: tokens for name, tokens in left.items() if tokens}
    return steps


for budget in (64, 8):
    print(f"budget {budget}:", *steps_of({"E": 14, "F": 5}, "ABC", budget), sep="\n  ")

# %% [markdown]
"""
With a budget of 64 one large step does it all. With 8 there are four steps of at most 8 tokens, and A, B and C get a token in each of them. Nothing is computed twice, and the last chunk of E shares its step with
the first of F.

## The engine's steps

The same on the package's engine. Four requests decode; at step 6 two prompts arrive, E with 150 tokens and F with 40. First the policy `prefill_first` with a large budget, then `mixed` with a budget of 48.
"""


# %%
def run_engine(policy, budget, num_blocks=100, new=24):
    """A to D decode when E and F arrive; returns the trace, and the tokens by request."""
    settings = EngineConfig(
        policy=policy,
        max_num_batched_tokens=budget,
        num_blocks=num_blocks,
        enable_prefix_caching=False,
    )
    engine = Engine(model, settings)
    lengths = {"A": (9, new), "B": (12, new), "C": (7, new), "D": (10, new)}
    lengths |= {"E": (150, 6), "F": (40, 6)}  # prompt, new tokens
    generator = torch.Generator().manual_seed(0)
    tokens = {name: [] for name in lengths}
    for step in range(1000):
        for name, (prompt, wanted) in lengths.items():
            if step == (6 if name in "EF" else 0):
                ids = torch.randint(1, 4000, (prompt,), generator=generator).tolist()
                params = SamplingParams(temperature=0, max_tokens=wanted, ignore_eos=True)
                engine.add(ids, params, request_id=name)
        for event in engine.step():
            tokens[event.request.request_id] += event.token_ids
        if not engine.has_unfinished:
            return list(engine.trace), tokens


whole, whole_tokens = run_engine("prefill_first", 512)
chunked, chunked_tokens = run_engine("mixed", 48)
print("the same tokens for everybody:", whole_tokens == chunked_tokens)

# %% tags=["thumbnail"]
show(
    budget_figure(
        {"prompts first, all at once": whole, "decodes first, prompts in chunks": chunked},
        [512, 48],
    ),
    alt="Tokens of each step as stacked bars. Above, one tower of 190 tokens among low steps, "
    "and no decode in it. Below, the same prompts cut into steps of at most 48 tokens, with the "
    "decodes of the others at the foot of each.",
)

# %% [markdown]
"""
A step's height is its work, and work is time. In the upper chart everybody stands still during the tower: there is no amber in it. In the lower one the amber strip never breaks. The blue area is the same in both. What would
falsify the title: different blue areas, or other tokens for anybody (printed above).

## Shapes: what a chunk is

There is no prefill phase in this engine. A request has `num_tokens` tokens, of which `num_computed` are in the cache, and a step moves the second number towards the first. A chunk, a whole prompt and a decode differ in
nothing but two numbers: new tokens (`q_len`) and tokens that the last of them sees (`kv_len`).
"""

# %%
print("request E:  step  q_len  kv_len  phase    draws a token")
for record in chunked:
    for part in record.requests:
        if part.request_id == "E" and record.step < 14:
            print(
                f"{record.step:16} {part.num_scheduled:6} {part.kv_len:7}  {part.phase:8} "
                f"{'yes' if part.num_samples else 'no'}"
            )

# %% [markdown]
"""
Only the chunk that contains the prompt's last token draws one. In the middle of a prompt there is nothing to draw: the next token is known.

## The same logits, computed in pieces

One function, `extend`, takes any number of tokens after those in any cache. Whole, and in chunks of 100 and of 7:
"""

# %%
text = torch.randint(1, 4000, (300,), generator=torch.Generator().manual_seed(5))
right, _ = prefill(model, text.tolist())
for chunk in (100, 7):
    cache = ContiguousCache(config, capacity=300, device=model.device, dtype=model.dtype)
    for start in range(0, 300, chunk):
        logits = extend(model, text[start : start + chunk], cache)
    print(
        f"chunks of {chunk:3}: largest difference of a logit {(logits - right).abs().max():.1e}"
    )

# %% [markdown]
"""
## Measure: what cutting costs

Cutting a prompt of `N` tokens into `n` chunks needs the same pairs of queries and keys. Two things are read more often: the weights, once per *step* instead of once per
prompt; and the keys before each chunk: `kv · N (n + 1) / 2` bytes in all, for equal chunks. Counted on the model, 512 tokens:
"""

# %%
bench = Workbench()
print("chunks   weights read   KV read, counted    formula     FLOPs")
per_token = kv_bytes_per_token(config, 4)
one = None
for chunks in (1, 2, 4, 8, 16):
    steps = chunk_steps(512, 512 // chunks)
    costs = [bench.count(model, step).total for step in steps]
    weights, kv, flops = (
        sum(cost.bytes.weights for cost in costs),
        sum(cost.bytes.kv_read for cost in costs),
        sum(cost.flops for cost in costs),
    )
    one = one or (weights, flops)
    formula = per_token * 512 * (chunks + 1) / 2
    print(
        f"{chunks:6} {weights / one[0]:12.1f} × {kv / 1e6:14.1f} MB {formula / 1e6:9.1f} MB "
        f"{flops / one[1]:8.3f} ×"
    )

# %% [markdown]
"""
One row is off its formula: the whole prompt at once reads 1.5 times the keys. The kernel for long prompts cuts queries into tiles of its own, 256 each, so for it 512 tokens are two chunks in any case. And it computes some pairs that
the causal mask then hides; smaller chunks leave fewer of those, so FLOPs even fall a little.

A chunk of a few tokens reads all weights for little work. While a chunk is small, a step waits for bytes and cutting is expensive; beyond the ridge (lesson 05) a step waits for arithmetic anyway, and cutting costs little. So a good budget is
not small. It is as small as the gaps require.

## Measure: who waits how long

Four requests decode, and a prompt of 512 tokens arrives among them, under several budgets in turns. We note when everybody got tokens. TTFT is the newcomer's time to first token. The line is what this machine allows at best.
"""

# %%
budgets = [16, 32, 64, 128]
stalls = StallBench(
    model,
    [("prefill_first", 1024), *(("mixed", budget) for budget in budgets)],
    num_running=4,
    context=64,
    prompt=512,
)
rows = stalls.run(repeats=2)
roof = measure_hardware("cpu").roof("float32")
print(this_machine())
print("policy         budget   TTFT      others' longest gap")
for row in rows:
    ttft, gap, ratio = (row.spread(name)[1] for name in ("ttft", "worst_itl", "ratio"))
    waits = f"{1e3 * ttft:6.0f} ms {1e3 * gap:7.1f} ms, {ratio:5.1f} × usual"
    print(f"{row.policy:13} {row.budget:6} {waits}")

# %%
show(
    stall_figure(rows, 512, [stalls.bound(row, roof) for row in rows]),
    alt="Marks for every token of four requests over time. With the prompt first there is a "
    "gap as long as its prefill. Below, TTFT against longest gap: smaller budgets "
    "shorten the gap and lengthen the TTFT.",
)

# %%
guess.against(rows[0].spread("ratio")[1])

# %% [markdown]
"""
Each amber mark is a token that somebody got. A stall is where no marks are. The points below are the whole trade: to the right the newcomer waits longer, downwards the others wait less. **There is no best point, only a choice.** A budget far to
the left behaves like no chunks at all; one far to the right pays for reading the weights again and again.

## Goodput: what counts is who was served in time

A service promises limits: a first token within some time, and a mean time per token (TPOT) below another. *Goodput* counts only requests that keep both. A load of random arrivals, at several rates, on two engines:
"""

# %%
workload = {
    "num_prompts": 16,
    "input_len": 256,
    "range_ratio": 0.5,
    "output_len": 12,
    "name": "random",
}
engines = {
    name: Engine(
        model,
        EngineConfig(
            policy=policy,
            max_num_batched_tokens=budget,
            num_blocks=1200,
            enable_prefix_caching=False,
        ),
    )
    for name, policy, budget in (
        ("prompts first", "prefill_first", 1024),
        ("chunks of 64", "mixed", 64),
    )
}
requests = Workload(**workload).requests(config.vocab_size)
single = [serve(engines["prompts first"], requests[:1]) for _ in range(3)][-1].served[0].metrics
limits = {"ttft": 6e3 * single.ttft, "tpot": 3e3 * single.tpot}
capacity = len(requests) / serve(engines["prompts first"], requests).duration
print(this_machine())
print(f"alone: TTFT {1e3 * single.ttft:.0f} ms, TPOT {1e3 * single.tpot:.1f} ms")
print(f"promised: TTFT {limits['ttft']:.0f} ms, TPOT {limits['tpot']:.1f} ms")
print(f"all at once: {capacity:.1f} requests/s")

# %%
loads = [50, 80, 110]  # per cent of what was served when all came at once
kept = {name: [] for name in engines}
for percent in loads:
    load = Workload(**workload, request_rate=percent / 100 * capacity)
    for name, engine in engines.items():
        run = serve(engine, load.requests(config.vocab_size), load.due())
        good = summarize(run, goodput=limits)["request_goodput"] * run.duration / len(requests)
        kept[name].append(100 * good)
        print(f"load {percent:3} %, {name:13}: {100 * good:4.0f} % kept their limits")
first, chunks = (sum(percents) / len(loads) for percents in kept.values())
show(
    curves(
        f"Served in time on this machine: {first:.0f} % prompts first, {chunks:.0f} % in chunks",
        [
            prefill_curve("prompts first", loads, kept["prompts first"]),
            decode_curve("chunks of 64", loads, kept["chunks of 64"]),
        ],
        x="requests offered, % of those served when all came at once",
        y="Requests that kept both limits",
        unit="%",
        y_scale="linear",
    ),
    alt="Per cent of requests that kept their limits against the rate, for an engine that "
    "computes prompts first and one that computes them in chunks.",
)

# %% [markdown]
"""
Which engine is better depends on the limits, on the machine and on this draw of arrivals, so the title above was computed. Change the limits and run the cell again: a tight TPOT favours chunks, a tight TTFT favours whole prompts. This is
why servers leave the budget to whoever runs them.

## When blocks run out

A budget bounds the work of a step. It does not bound memory: every token of a prompt needs its place, however it is cut. The same load with longer answers, 48 tokens for each of A to D, once with 99 blocks of 16 tokens and once with 10:
"""

# %%
plenty, plenty_tokens = run_engine("mixed", 48, new=48)
scarce, scarce_tokens = run_engine("mixed", 48, num_blocks=11, new=48)
preempted = [(record.step, record.preempted) for record in scarce if record.preempted]
computed = Tally()
for record in scarce:
    for part in record.requests:
        computed["again"] += part.num_recomputed
        computed["in all"] += part.num_scheduled
print("preempted:", preempted)
print(f"{computed['in all']} tokens were computed, {computed['again']} of them again")
print("the same tokens for everybody:", scarce_tokens == plenty_tokens)
show(
    budget_figure({"99 blocks": plenty, "10 blocks": scarce}, [48, 48]),
    alt="Tokens of each step with plenty of blocks and with few. With few, there are more "
    "steps, and some prompts are computed a second time.",
)

# %% [markdown]
"""
When a step needs a block and none is free, the *youngest* request gives all of its own back and goes to the head of the queue (*preemption*). Its tokens are kept, their keys are computed again later: crossed blue. The oldest always gets on, so
nobody starves.

## Explore: the budget

The first run of this lesson under more budgets.
"""

# %%
recorded = {budget: run_engine("mixed", budget)[0] for budget in (16, 32, 64, 256)}
explore(
    lambda budget: budget_figure({f"budget {budget}": recorded[budget]}, [budget]),
    alt="Tokens of each step for budgets from 16 to 256: many low steps at first, one tower "
    "at the end, always the same area.",
    budget=list(recorded),
)

# %% [markdown]
"""
## On a napkin

An H200 (4.8 TB/s, 989 TFLOP/s by its data sheet) serves Llama 3.1 8B to 64 decoding requests of 2,000 tokens. A prompt of 32,000 tokens arrives. How long is the longest gap if it goes first, at best? And with a budget of 2,048? How much longer does
the newcomer wait?
"""

# %%
llama = named_shape("llama-3.1-8b")
h200 = next(sheet for sheet in DATASHEETS if sheet.name.startswith("H200"))
paper = Roof(h200.bfloat16_rate, h200.read_bandwidth)
decodes = decode_step(2000, batch=64)
usual = step_seconds(llama, decodes, 2, paper)
at_once = step_seconds(llama, [(32000, 32000)], 2, paper)
pieces = [
    step_seconds(llama, [*decodes, *chunk], 2, paper) for chunk in chunk_steps(32000, 2048 - 64)
]
fold(
    "Answer",
    f"Usually a step takes {1e3 * usual:.1f} ms. The whole prompt takes {at_once:.2f} s, so the "
    f"gap is {at_once / usual:.0f} times the usual one. In {len(pieces)} chunks the longest step "
    f"takes {1e3 * max(pieces):.0f} ms, **{at_once / max(pieces):.0f} times less**, and the "
    f"newcomer's first token comes after {sum(pieces):.2f} s instead of {at_once:.2f} s. Chunks "
    "of this size are beyond the ridge, so cutting costs little. (Bounds, not measurements.)",
)

# %% [markdown]
"""
## What people say

That chunks prevent running out of memory, and that prefill reads the weights once:
"""

# %%
for claim in ("A20", "A8"):
    show_card(CLAIMS[claim].card(bench))

# %% [markdown]
"""
## Your turn

`exercises/ex11_chunked_prefill.py` · difficulty ●●●○○ · 60 minutes

You write `schedule_prefill_first`, `schedule`, `choose_victims` and `simulate`. Work on it with `minillm lab test ex11`, or run the cell below.

<details><summary>Hint 1: in which order is the budget spent?</summary>

First one token for everybody who decodes. Then those whose prompt is half read, oldest first. Then new ones, while there are seats and budget. Stop at zero.

</details>

<details><summary>Hint 2: my steps exceed the budget by a few tokens</summary>

Subtract the decodes *before* you cut the prompt, and cut with what is left, not with the budget.

</details>

<details><summary>Hint 3: whom do I preempt?</summary>

The youngest first, and all of its blocks. Stop as soon as there are enough. Never somebody older than the one who needs the blocks.

</details>
"""

# %%
from minillm.course.lab import check

check("ex11")

# %% [markdown]
"""
## Break it

**Mutant 1: chunks, but prompts go first.** The policy `prefill_first` with a small budget. No step is large, so has the stall gone?
"""

# %%
for policy in ("mixed", "prefill_first"):
    trace, _ = run_engine(policy, 48)
    takes_part = [
        any(part.request_id == "A" and part.phase == "decode" for part in record.requests)
        for record in trace[6:13]
    ]
    print(
        f"{policy:13} A gets a token in steps 6 to 12:",
        *("yes" if t else "-" for t in takes_part),
    )
    print(f"{'':13} largest step: {max(record.num_tokens for record in trace)} tokens")

# %% [markdown]
"""
Every step is small, and A waits through all of them: one long gap in several short steps. Cutting alone does nothing. **Decodes first** is what removes the stall; cutting makes it possible.

**Mutant 2: draw a token after every chunk.** The last row of a chunk has logits, too. Somebody draws from them and goes on.
"""


# %%
@torch.inference_mode()
def write_in_chunks(tokens, chunk, draw_always, new=10):
    """Greedy text after a prompt that is read in chunks."""
    cache = ContiguousCache(config, capacity=200, device=model.device, dtype=model.dtype)
    waiting, written = list(tokens), []
    while len(written) < new:
        now, waiting = waiting[:chunk], waiting[chunk:]
        token = int(extend(model, torch.tensor(now), cache).argmax())
        if draw_always or not waiting:
            written.append(token)
            waiting = [token, *waiting]  # an invented token in the middle of the prompt
    return tokenizer.decode(written)


prompt = tokenizer.encode("class Stack:\n    def push(self, item):\n        self.items.")
for chunk in (100, 8, 4):
    right, wrong = (write_in_chunks(prompt, chunk, draw) for draw in (False, True))
    print(f"chunks of {chunk:3}: right {right!r}\n{'':16}mutant {wrong!r}")

# %% [markdown]
"""
With a chunk that is longer than every prompt of the test, mutant and original are the same. That is how this one gets into a release.

## How others do it

* **vLLM**, `vllm/v1/core/sched/scheduler.py`: one budget, `max_num_batched_tokens`; running requests first, then waiting ones, no phases. Preemption by recomputing.
* **SGLang**, `python/sglang/srt/managers/schedule_policy.py` (`PrefillAdder`) and `--chunked-prefill-size`: prompts are cut; mixing chunks with decodes is an option, `--enable-mixed-chunk`.
* **llama.cpp**, `tools/server/`: `update_slots` puts the tokens of all decoding slots into the batch first, then fills it with prompts up to `n_batch`.
* **Sarathi-Serve** (Agrawal et al., OSDI 2024) gave this its name, "stall-free batching".
* **minillm**, `minillm/engine/scheduler.py`: three policies over one rule, each step within a budget.

## Three questions

<details><summary>1. A prompt does not fit into the cache. Do smaller chunks help?</summary>

No. All of its tokens need their places in the end. Chunks bound the activations and the length of a step, not the KV cache.

</details>

<details><summary>2. Why is a budget of 16 bad for everybody on a GPU?</summary>

Each step reads all weights for 16 tokens, far below the ridge. The prompt takes very many steps, and the decodes of all of them are slower than they need be.

</details>

<details><summary>3. Which step of a chunked prompt draws its first token?</summary>

The one that computes the prompt's last token. Before it, the next token is known.

</details>

## Next

Weights are read once per step, however cut; keys and values are read by everybody. [12 · KV quantization](12_kv_quantization.ipynb) makes them smaller.
"""
