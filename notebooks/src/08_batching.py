# %% [markdown]
"""
# 08 · Batching

**Why serve many at once?**

40 minutes · needs 03 and 05 · runs offline on a CPU

To write one token, a model reads all of its weights. To write sixteen tokens for sixteen people, it reads them once as well, if the
sixteen go through it together. This lesson measures what a batch gains and what it costs, and keeps the batch full although people
come and go.
"""

# %%
import random
from dataclasses import replace

from minillm import decode, load_model, load_tokenizer, prefill
from minillm.config import EngineConfig
from minillm.costs.formulas import kv_bytes_per_token, matmul_parameters
from minillm.course.claims import CLAIMS, Workbench
from minillm.course.figures.batching import batch_figure, intensity_figure
from minillm.course.figures.curves import curves, decode_curve
from minillm.course.figures.gantt import idle_share, seat_gantt
from minillm.course.figures.show import explore, fold, predict, show, show_card, this_machine
from minillm.course.lessons.intensity import count_intensity, predict_intensity
from minillm.course.lessons.schedules import continuous_batch_steps, static_batch_steps
from minillm.engine.engine import Engine
from minillm.measure.datasheets import DATASHEETS
from minillm.measure.hardware import measure_hardware
from minillm.measure.roof import Roof, tpot_bound
from minillm.measure.roofline import measure_roofline
from minillm.sampling import SamplingParams
from minillm.shapes import named_shape

model = load_model("tiny", device="cpu", dtype="float32", progress=False)
tokenizer = load_tokenizer("tiny")
print(this_machine())

# %% [markdown]
"""
## Predict

A decode step writes one token for each request in the batch. With one request it takes some time.

**How many times that long does a step take with sixteen requests of 128 tokens?** (A model of 135 million weights, on this machine.)
"""

# %%
guess = predict("time of a decode step, batch 16 over batch 1", ..., "×")

# %% [markdown]
"""
## A toy: two seats, four requests

Four requests want 2, 5, 1 and 3 tokens. The batch has two *seats*: places for requests that run at the same time. A step gives one token to
everybody who sits. The old way starts two requests together and waits until both are done. The new way lets the next one sit down as soon as a seat
is free.
"""


# %%
def serve_toy(wanted, seats, wait_for_all):
    """Rows of names, one per step; a dash is an empty seat."""
    waiting, sitting = list(wanted.items()), []
    while waiting or sitting:
        open_seats = 0 if wait_for_all and sitting else seats - len(sitting)
        sitting += waiting[:open_seats]
        waiting = waiting[open_seats:]
        print("  " + " ".join([name for name, _ in sitting] + ["-"] * (seats - len(sitting))))
        sitting = [(name, left - 1) for name, left in sitting if left > 1]


for wait_for_all, title in ((True, "static batches"), (False, "continuous batching")):
    print(title)
    serve_toy({"A": 2, "B": 5, "C": 1, "D": 3}, seats=2, wait_for_all=wait_for_all)

# %% [markdown]
"""
Eight steps or six, for the same eleven tokens. Dashes are seats that somebody paid for and nobody used. Waiting for the slowest is
*static batching*; filling every free seat at once is *continuous batching* (Orca, Yu et al. 2022).

## The engine's own seats

Twelve requests on the package's engine with four seats. One policy is `static`, the other, `mixed`, is continuous. The engine writes down every step: who took
part, and whether it was a prompt (*prefill*) or a new token (*decode*).
"""

# %%
rng = random.Random(58)
wanted = [rng.choice([4, 6, 8, 10, 14, 24, 36]) for _ in range(12)]
prompts = [rng.choices(range(1, 4000), k=rng.randint(8, 40)) for _ in wanted]


def run_engine(policy, seats):
    """Serve all requests; returns the trace of the steps, and the tokens by request."""
    settings = EngineConfig(
        policy=policy, max_num_seqs=seats, num_blocks=200, enable_prefix_caching=False
    )
    engine = Engine(model, settings)
    for number, (prompt, new) in enumerate(zip(prompts, wanted, strict=True)):
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        engine.add(prompt, params, request_id=str(number))
    tokens = [[] for _ in prompts]
    for event in engine.run():
        tokens[int(event.request.request_id)] += event.token_ids
    return list(engine.trace), tokens


static, static_tokens = run_engine("static", seats=4)
continuous, continuous_tokens = run_engine("mixed", seats=4)
print(f"new tokens wanted: {wanted}, {sum(wanted)} in all")
print(f"steps: {len(static)} static, {len(continuous)} continuous")

# %% tags=["thumbnail"]
show(
    seat_gantt({"static batches": static, "continuous batching": continuous}, 4),
    alt="Two charts of four seats over engine steps. Static batches leave large hatched gaps "
    f"where seats are empty and take {len(static)} steps. Continuous batching fills every seat "
    f"at once and takes {len(continuous)}.",
)

# %% [markdown]
"""
Each cell is one token. Hatched is an empty seat. In the upper chart everybody waits for the longest request of the batch. In the lower one a blue cell follows right after
somebody has left: the next request's prompt goes through the model **in the same step** in which the others decode. What would falsify the picture: a hatched cell in the lower
chart while somebody is still waiting. The only ones are at the end.

A batch that is padded to a common length would *compute* its empty seats. This engine does not; it leaves them out. What is lost there is the chance to share a pass over the weights.

## Shapes: a batch without padding

The requests of a step are *packed*: their tokens lie one after the other, in one long row. Every matrix product sees that row. Only attention has to know where one request ends.
"""

# %%
first = continuous[0]
lengths = [part.num_scheduled for part in first.requests]
print(f"step 0 computes prompts of {lengths} tokens")
print(f"packed: hidden states [{sum(lengths)}, {model.config.hidden_size}]")
padded = len(lengths) * max(lengths)
print(
    f"padded: [{len(lengths)}, {max(lengths)}, ...], {padded} rows: {padded - sum(lengths)} empty"
)

mixed_step = next(
    step for step in continuous if len({part.phase for part in step.requests}) > 1
)
print(f"\nstep {mixed_step.step}, prefill and decode together:")
for part in mixed_step.requests:
    sees = f"{part.num_scheduled:2} tokens, sees {part.kv_len:2}"
    print(f"  request {part.request_id:>2}: {sees} ({part.phase})")

# %% [markdown]
"""
## The same tokens, fewer steps

Who sits beside whom must not change what anybody gets. We compare both runs with each request served *alone*, and the engine's steps with the closed forms of `minillm.course.lessons.schedules`.
(The first token comes out of prefill, so a request takes as many steps as it wants tokens.)
"""

# %%
alone = []
for prompt, new in zip(prompts, wanted, strict=True):
    logits, cache = prefill(model, prompt)
    tokens = [int(logits.argmax())]
    while len(tokens) < new:
        tokens.append(int(decode(model, tokens[-1], cache).argmax()))
    alone.append(tokens)
print("static, continuous and alone agree:", static_tokens == continuous_tokens == alone)
print(f"static: {len(static)} steps, formula {static_batch_steps(wanted, 4)}")
print(f"continuous: {len(continuous)} steps, formula {continuous_batch_steps(wanted, 4)}")

# %% [markdown]
"""
## Measure: how many steps does waiting cost?

It depends on how different the lengths are. For lengths that are exponentially distributed (many short answers, a few very long) the longest of `B` is `H_B = 1 + 1/2 + … + 1/B` times the
mean. So static batches should take `H_B` times the steps. We count 4,000 requests with the functions that just agreed with the engine.
"""

# %%
rng = random.Random(2)
many = [1 + round(rng.expovariate(1 / 200)) for _ in range(4000)]
seats = [1, 2, 4, 8, 16, 32, 64]
counted = [static_batch_steps(many, b) / continuous_batch_steps(many, b) for b in seats]
harmonic = [sum(1 / k for k in range(1, b + 1)) for b in seats]
show(
    curves(
        f"With {seats[-1]} seats, static batches take {counted[-1]:.1f} times the steps",
        [decode_curve("static over\ncontinuous", seats, counted, harmonic)],
        x="seats",
        y="Steps, exponential lengths, line H_B",
        unit="×",
        x_scale="log",
        y_scale="linear",
    ),
    alt="Steps of static batches over those of continuous batching against seats from 1 to 64: "
    f"from 1 to {counted[-1]:.1f}, close to the line of harmonic numbers.",
)

# %% [markdown]
"""
Points a little below the line would mean that continuous batching is not perfect, either: when the queue is empty, seats stay empty. The advantage grows with the batch. So it grew with
the machines.

## Measure: what a fuller step costs

Fewer steps only help if a step with many is not as many times slower. Here is a model of 135 million weights (random ones: right for time, useless for text). Decode steps of several batches take turns, and the
machine's own limits are measured in the same rounds: bytes it can read per second, FLOPs it can do per second. The line is what these two allow at best.
"""

# %%
larger = load_model("random:smollm2-135m", device="cpu", progress=False)
run = measure_roofline(
    larger,
    measure_hardware("cpu"),
    name="smollm2-135m",
    prompts=[],
    batches=[1, 2, 4, 8, 16],
    contexts=[128, 1024],
    repeats=3,
)
print(this_machine())
print(f"weights: {run.weight_bytes / 1e6:.0f} MB. Milliseconds per step:")
for point in run.points:
    print(f"  context {point.context:4}, batch {point.batch:2}: {1e3 * point.timing.best:6.1f}")

# %%
show(
    batch_figure(run),
    alt="Left: tokens per second against batch, rising for both contexts, more slowly for the "
    "longer one. Right: time per token against batch, growing less than the batch does. "
    "Lines show what the machine allows at best.",
)

# %%
short = {point.batch: point.timing.best for point in run.points if point.context == 128}
guess.against(short[16] / short[1])

# %% [markdown]
"""
Squares first: a step for sixteen takes far less than sixteen times a step for one, because the weights are read once for all. That is the gain. Each of the sixteen waits longer for each token than if it were alone:
that is the price. Then the diamonds: with a longer context the price is higher, because **every request brings its own keys and values, and those are shared with nobody**.

## Who gains, and who does not

A step's FLOPs over the bytes it reads is its *intensity*. Above the machine's *ridge* computing is what takes time, below it reading (lesson 05). We count operators of Llama 3.1 8B's shape in
bf16, context 1,000: linear layers over their weights, attention over keys and values.
"""

# %%
llama = named_shape("llama-3.1-8b")
counted = [count_intensity(llama, batch, context=1000) for batch in (1, 4, 16)]
predicted = [predict_intensity(llama, 2**power, context=1000) for power in range(11)]
matrices, per_token = 2 * matmul_parameters(llama), kv_bytes_per_token(llama, 2)
h200 = next(sheet for sheet in DATASHEETS if sheet.name.startswith("H200"))
for row in counted:
    formula = predict_intensity(llama, row.batch, context=1000)
    same = all(abs(a - b) < 1e-6 * b for a, b in zip(row, formula, strict=True))
    found = f"linear {row.linear:.1f}, attention {row.attention:.1f}"
    print(f"batch {row.batch:2}: {found}, counted = formula: {same}")

print(f"matrices {matrices / 1e9:.1f} GB, KV {per_token / 1024:.0f} KiB per token")

# %%
ridges = {"this machine": run.roof.ridge, "an H200 (data sheet)": h200.ridge}
show(
    intensity_figure(counted, predicted, ridges),
    alt="FLOP per byte against batch. Linear layers rise in proportion to it and cross the "
    "ridge of this machine, later that of an H200. Attention stays at 4 for every batch. The "
    "whole step rises, then bends and levels off between them.",
)

# %% [markdown]
"""
"Batching turns vectors into matrices" is true of the grey line. It says nothing about the orange one: 32 query heads share 8 KV heads, so each key that is read serves 4 queries, and never more,
whatever the batch. The whole step lies between. It bends where keys and values become most of what is read, and with this context it never reaches the H200's ridge.

## Explore: seats

The same twelve requests with more and more seats.
"""

# %%
recorded = {
    n: {
        name: run_engine(policy, n)[0]
        for name, policy in (("static", "static"), ("continuous", "mixed"))
    }
    for n in (2, 4, 8)
}
print("seats   steps static   steps continuous   seats empty, static and continuous")
for n, traces in recorded.items():
    waits, flows = traces.values()
    empty = f"{idle_share(waits, n):10.0%} {idle_share(flows, n):8.0%}"
    print(f"{n:5} {len(waits):14} {len(flows):18} {empty}")
explore(
    lambda seats: seat_gantt(recorded[seats], seats),
    alt="Seats over steps for 2 to 8 seats, static and continuous. More seats make both shorter, "
    "and leave more of them empty at the end.",
    seats=list(recorded),
)

# %% [markdown]
"""
## On a napkin

An H200 reads 4.8 TB per second and does 989 TFLOP/s in bf16 (its data sheet). Llama 3.1 8B as counted above, context 1,000. What is the shortest time per token at batch 1, and how many
tokens per second does it write? And at batch 64?
"""

# %%
roof = Roof(h200.bfloat16_rate, h200.read_bandwidth)
one, many_at_once = (tpot_bound(llama, 1000, 2, roof, batch=batch) for batch in (1, 64))
fold(
    "Answer",
    f"Batch 1 reads {matrices / 1e9:.1f} GB for one token: {1e3 * one:.2f} ms, "
    f"{1 / one:.0f} tokens per second. Batch 64 reads the same and {64e3 * per_token / 1e9:.1f} "
    f"GB of KV: {1e3 * many_at_once:.2f} ms, "
    f"**{64 / many_at_once:,.0f} tokens per second**: {64 / many_at_once * one:.0f} times as "
    f"many, while everybody waits {many_at_once / one:.2f} times as long.",
)

# %% [markdown]
"""
## What people say

"Tens of gigabytes for a single token", "a teacher who walks to the ink bottle for every word": two statements that forget the class.
"""

# %%
bench = Workbench()
for claim in ("A10", "A18"):
    show_card(CLAIMS[claim].card(bench))

# %% [markdown]
"""
## Your turn

`exercises/ex08_batching.py` · difficulty ●●○○○ · 45 minutes

You write `static_schedule`, `continuous_schedule`, `occupancy` and a `ContinuousBatcher`, the loop of a server. Work on it with `minillm lab test ex08`, or run the cell below.

<details><summary>Hint 1: in which order do things happen within a step?</summary>

Fill free seats from the queue, oldest first. Then give everybody a token. Then let those who are done leave. A seat that is freed in a step is taken in the next.

</details>

<details><summary>Hint 2: my static schedule is too short</summary>

Nobody joins before *all* of the batch are done. A batch takes as many steps as its longest request wants tokens.

</details>

<details><summary>Hint 3: somebody gets one token too many</summary>

The first token comes out of prefill. After it, the request wants one less.

</details>
"""

# %%
from minillm.course.lab import check

check("ex08")

# %% [markdown]
"""
## Break it

**Mutant 1: padding without a mask.** To put a short prompt beside a long one, it is padded on the left, and attention is not told. Eight zeros before the prompt:
"""


# %%
def greedy(tokens, new=10):
    """New text after these tokens."""
    logits, cache = prefill(model, tokens)
    written = [int(logits.argmax())]
    while len(written) < new:
        written.append(int(decode(model, written[-1], cache).argmax()))
    return tokenizer.decode(written)


for text in ("def area(width, height):\n    return", "for key, value in"):
    tokens = tokenizer.encode(text)
    print(f"alone:  {greedy(tokens)!r}\npadded: {greedy([0] * 8 + tokens)!r}")

# %% [markdown]
"""
The text of a request depends on the length of its neighbour's. It is often not even wrong enough to be noticed.

**Mutant 2: results one row too late.** The packed row has one logit vector per request, and a wrong offset hands each request its neighbour's token.
"""

# %%
engine = Engine(model, EngineConfig(num_blocks=64))
right_run = engine.runner.run
texts = ["def area(width, height):\n    return", "for key, value in", "import numpy as"]
for mutant in (False, True):
    if mutant:
        engine.runner.run = lambda batch: right_run(
            replace(batch, logit_indices=batch.logit_indices.roll(1))
        )
    ids = [
        engine.add(tokenizer.encode(t), SamplingParams(temperature=0, max_tokens=6))
        for t in texts
    ]
    written = {request: [] for request in ids}
    for event in engine.run():
        written[event.request.request_id] += event.token_ids
    for text, tokens in zip(texts, written.values(), strict=True):
        name = "mutant" if mutant else "right"
        print(f"{name:6} …{text[-12:]!r:>16} {tokenizer.decode(tokens)!r}")

# %% [markdown]
"""
With one request at a time nothing is wrong: rolling a list of one changes nothing. So the engine's tests run random mixtures of requests, and compare each with the same request alone.

## How others do it

* **vLLM**, `vllm/v1/core/sched/scheduler.py` decides who takes part; `vllm/v1/worker/gpu_model_runner.py` packs the step. No padding between requests.
* **SGLang**, `python/sglang/srt/managers/scheduler.py` and `schedule_batch.py`: the same idea; a new batch of prompts is merged into the running one.
* **llama.cpp**, `tools/server/`: seats are called slots; `update_slots` fills one batch with the tokens of all of them.
* **transformers**, `src/transformers/generation/continuous_batching/`; its plain `generate` on a list of prompts is a static, padded batch.
* **minillm**, `minillm/engine/scheduler.py` (who), `minillm/engine/batch.py` (packing), `minillm/engine/trace.py` (what the figures are drawn from).

## Three questions

<details><summary>1. Why does a larger batch help decode much more than prefill?</summary>

A prompt of a thousand tokens already has a thousand rows for each weight that is read. A decode has one. Requests of a batch and tokens of a prompt are the same thing to a matrix.

</details>

<details><summary>2. All requests want the same number of tokens and come at once. What does continuous batching gain?</summary>

Nothing in steps: everybody leaves at the same time. It gains when lengths or arrivals differ.

</details>

<details><summary>3. Batch 512, context 32,000. What does the step read most?</summary>

Keys and values: 512 · 32,000 tokens of them, against weights that are read once. More batch no longer helps; fewer KV heads or fewer bits would.

</details>

## Next

A batch of many needs the memory for many caches. [09 · Paged KV cache](09_paged_kv.ipynb)
"""
