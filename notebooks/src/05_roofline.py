# %% [markdown]
"""
# 05 · The roofline

**What is the machine waiting for?**

40 minutes · needs 01 and 03 · runs offline on a CPU

A processor does two things: it computes, and it fetches what it computes with. Both take time, and they happen at once, so a step
takes as long as the slower of the two. This lesson finds out which one that is: for a prompt, for a single new token, for
many at a time, on the machine that you sit at.
"""

# %%
import random
from dataclasses import replace

import torch

from minillm import load_model
from minillm.costs.formulas import step_bytes, step_flops, weight_bytes
from minillm.costs.steps import decode_step
from minillm.course.claims import CLAIMS, Workbench
from minillm.course.figures.curves import curves, decode_curve
from minillm.course.figures.regimes import ledger_growth, one_walk, regime_map
from minillm.course.figures.roofline import roofline
from minillm.course.figures.show import explore, fold, predict, show, show_card, this_machine
from minillm.course.lessons.crossovers import kv_crossover
from minillm.course.lessons.regimes import Site
from minillm.kernels.cpu.linear import pack
from minillm.measure.bench import interleaved
from minillm.measure.counters import Counter
from minillm.measure.datasheets import DATASHEETS
from minillm.measure.hardware import dtype_name, measure_hardware
from minillm.measure.roof import Roof, linear_intensity, tpot_bound
from minillm.measure.roofline import measure_roofline
from minillm.measure.stepper import StepRunner, weightless
from minillm.measure.units import number, quantity
from minillm.model.linear import Linear
from minillm.model.loader import assemble, choose_dtype
from minillm.shapes import RandomWeights, named_shape

print(this_machine())

# %% [markdown]
"""
## Predict

A server writes one token for one user: one decode step. Now sixteen users wait, and the server puts all of them into the same
step: one new token for each.

**How many times as long does the step for sixteen take as the step for one?** Write your number in place of the dots.
"""

# %%
guess = predict("Time of a decode step for 16 sequences over one for 1", ..., "×")

# %% [markdown]
"""
## A toy: how often is a number used?

A matrix of 3 × 2 times one vector, then times four. Count by hand: multiplications and additions (FLOPs), and numbers that have
to be fetched (the matrix and what goes in).
"""

# %%
matrix = torch.tensor([[1, 2], [3, 4], [5, 6]])
for vectors in (torch.ones(2, 1, dtype=int), torch.ones(2, 4, dtype=int)):
    product = matrix @ vectors
    flops = 2 * matrix.numel() * vectors.shape[1]  # a multiplication and an addition each
    fetched = matrix.numel() + vectors.numel()
    print(f"{vectors.shape[1]} vector(s): first column of the result {product[:, 0].tolist()}")
    print(f"  {flops} FLOPs, {fetched} numbers fetched: {flops / fetched:.1f} FLOPs per number")

# %% [markdown]
"""
One vector uses each number of the matrix once. Four vectors use it four times, and it is fetched once all the same. The ratio
FLOP / byte is called *arithmetic intensity*. It is the whole lesson: work with little of it waits for memory, work with much
of it waits for arithmetic.

In a language model the vectors are tokens. **Tokens of a prompt and tokens of a batch are the same thing here: rows.**

## One layer by the clock

A real weight matrix of 4096 × 4096, times 1 to 512 rows, in the type that this machine computes in: bfloat16 where its processor has
units for it, else float32. The line is the slower of two times that the machine was measured to need: reading the matrix, and
computing.
"""

# %%
hardware = measure_hardware("cpu")
dtype = choose_dtype("auto", torch.device("cpu"))
roof = hardware.roof(dtype_name(dtype))
print(this_machine())
print("reads", quantity(roof.bytes_per_second, "B/s"), "from memory")
print("computes", quantity(roof.flops_per_second, "FLOP/s"), "in", dtype_name(dtype))
print("ridge:", number(roof.ridge), "FLOP per byte")

# %%
SIDE, ROWS = 4096, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
layer = Linear(SIDE, SIDE)
layer.weight = torch.nn.Parameter(torch.randn(SIDE, SIDE).to(dtype), requires_grad=False)
pack(layer)
inputs = {rows: torch.randn(rows, SIDE).to(dtype) for rows in ROWS}
with torch.inference_mode():
    times = interleaved({str(n): lambda x=x: layer(x) for n, x in inputs.items()}, repeats=7)
measured = [times[str(rows)].best for rows in ROWS]
least = [roof.seconds(2 * rows * SIDE**2, dtype.itemsize * SIDE**2) for rows in ROWS]
ratio = measured[4] / measured[0]

# %%
show(
    curves(
        f"One weight matrix: {ROWS[4]} rows take {ratio:.1f} times as long as one",
        [decode_curve("a linear layer", ROWS, measured, least)],
        x="rows: tokens of a prompt, or of a batch",
        y=f"4096 × 4096 in {dtype_name(dtype)}, best of seven",
        unit="s",
        x_scale="log",
    ),
    alt="Time of a linear layer against rows, 1 to 512, on logarithmic axes, with the bound that "
    "this machine's bandwidth and arithmetic set: level at first, then rising in proportion.",
)

# %% [markdown]
"""
The line is level as long as reading the matrix takes longer than computing with it: **more rows are free**. Then it bends and
rises in proportion. The bend is at the *ridge*: where FLOPs per byte equal the machine's FLOP/s over its byte/s.

Points below the line would prove that the two measured ceilings are wrong. (One exception: a processor whose cache holds the
whole matrix reads it faster than memory can.) Points above it are what the layer loses to everything else.

## Shapes and units

| quantity | unit | of a linear layer, T rows, K → J, bfloat16 | of a decode step |
|---|---|---|---|
| work | FLOP | 2 · T · K · J | 2 · weights · batch, and attention |
| traffic | byte | 2 · (K·J + T·K + T·J) | weights + batch · context · KV bytes per token |
| intensity | FLOP / byte | about T | about the batch, while the cache is small |
| ridge | FLOP / byte | FLOP/s of the machine over its byte/s | the same |
"""

# %%
for rows in (1, 16, 512):
    intensity = linear_intensity(rows, SIDE, SIDE, 2)
    print(f"{rows:3} rows: {number(intensity)} FLOP per byte in bfloat16")

# %% [markdown]
"""
## The ledger: what one decode step moves

Everybody says that decoding is slow because each token reads the whole KV cache. Here is what a step really moves. The model has
the shape of Llama 3.1 8B and no memory: the counter sees every operator and its operands, a laptop holds no numbers.
"""

# %%
llama = named_shape("llama-3.1-8b")
ghost = weightless(llama)
contexts = [1000, 8000, 32000, 64000, 128000]
counted, formula = [], []
for context in contexts:
    run = StepRunner(ghost, decode_step(context))
    with Counter(ghost, kv=run.cache) as count:
        run()
    counted.append(count.total.bytes)
    formula.append(step_bytes(llama, decode_step(context), 2))
moved = [(b.weights, b.kv_read, b.kv_write) for b in counted]
print("counted = formula:", moved == [(b.weights, b.kv_read, b.kv_write) for b in formula])
print(f"as much KV as matrix weights at {kv_crossover(llama, 2):,.0f} tokens")

# %%
share = 100 * counted[0]._replace(activations=0).kv_share
show(
    ledger_growth(contexts, counted, formula, "Llama 3.1 8B's shape"),
    alt="Stacked bars of the bytes that a decode step moves, for contexts from 1,000 to 128,000 "
    f"tokens. Weights are the same in each; the KV cache grows from {share:.1f} % to over half.",
)

# %% [markdown]
"""
The grey part is there at any context: **every weight is read for every token**. The cache catches up with it only after the
number of tokens that the cell above printed, summed over all sequences of the batch. If the cache were what makes decoding
slow, the first bar would be orange.

## Counted and predicted

The package's closed forms are integers, and so is what the counter counts. Ten random prefills and ten random decode steps of
the embedded model, each with the FLOPs, the weights, the KV read and the KV written:
"""

# %%
tiny = load_model("tiny", device="cpu", dtype="float32", progress=False)
rng, equal = random.Random(5), 0
for trial in range(20):
    length = rng.randint(1, 400)
    step = [(length, length)] if trial % 2 else [(1, length)]
    run = StepRunner(tiny, step)
    with Counter(tiny, kv=run.cache) as count:
        run()
    wanted = [step_flops(tiny.config, step).total, *step_bytes(tiny.config, step, 4)[:3]]
    equal += [count.total.flops, *count.total.bytes[:3]] == wanted
print(f"steps in which all four numbers are equal: {equal} of 20")

# %% [markdown]
"""
## The roofline of this machine

Now whole steps by the clock. The model should be like a large one: matrices that no cache holds, and few of them. We take four
layers of Llama 3.2 1B and an eighth of its vocabulary, with random weights. Right for time, useless for text.

Prefills of several lengths, decode steps of several batches, and the two ceilings take turns, so that all meet the same machine.
"""

# %%
config = replace(named_shape("llama-3.2-1b"), num_layers=4, vocab_size=16384)
weights = RandomWeights(config, dtype, torch.Generator().manual_seed(0))
model = assemble(config, weights, torch.device("cpu"), dtype)
print(
    f"weights: {quantity(weight_bytes(config, dtype.itemsize, 0), 'B')} in {dtype_name(dtype)}"
)
result = measure_roofline(
    model,
    hardware,
    name="four layers of Llama 3.2 1B",
    prompts=[8, 32, 128],
    batches=[1, 2, 4, 8, 16, 32, 64],
    contexts=[128],
    repeats=3,
)
print(this_machine())
for point in result.points:
    name = f"{point.phase}, {point.batch} x {point.context}"
    share, waits = 100 * result.share_of_roof(point), result.waits_for(point)
    print(f"{name:18} {quantity(point.timing.best, 's'):>8} {number(point.intensity):>5} FLOP/B "
          f"{share:3.0f} % of the roof, waits for {waits or 'something else'}")  # fmt: skip

# %% tags=["thumbnail"]
decodes = {p.batch: p for p in result.points if p.phase == "decode"}
show(
    roofline(result),
    alt="The roofline of this machine: a slope for bandwidth, a ceiling for arithmetic. Decode of"
    f" one sequence has {number(decodes[1].intensity)} FLOP per byte and stands far left; larger "
    "batches and longer prompts stand further right and higher, until they meet the ceiling.",
)

# %% [markdown]
"""
Read it from left to right. A lone decode stands at about one FLOP per byte (half of one in float32), far left of the ridge: the slope above it is as high as
*any* program can get there. A batch moves right, because the same weights serve more rows. So does a prompt. **Batch and
prompt length are one axis**: a decode of 32 sequences and a prefill of 32 tokens stand close together.

A point above the roof would prove that a ceiling was measured too low. How far points stay below it is what the program
still loses.
"""

# %%
slower = decodes[16].timing.best / decodes[1].timing.best
guess.against(slower)
print(f"So a token of the batch cost {16 / slower:.1f} times less time than a token alone.")

# %% [markdown]
"""
## A map: bandwidth, arithmetic, overhead, capacity

A decode step has four terms: reading weights, reading the KV caches, computing, and starting operators (Python's and PyTorch's own
work). The largest term is what it waits for. And there is a fifth way to be slow: not to fit
into memory at all.

Three sites: the embedded model here, the model above here, and Llama 3.1 8B on an H200. The overhead of the embedded model is what the
other terms leave unexplained of its measured step. The last site is **on paper**: two numbers from a
data sheet, nothing measured.
"""

# %%
h200 = next(sheet for sheet in DATASHEETS if sheet.name == "H200 SXM")
paper = Roof(h200.bfloat16_rate, h200.read_bandwidth)
memory = hardware.machine.memory_bytes
here = Site("here: four layers of Llama 1B", config, dtype.itemsize, result.roof, memory)
there = Site("H200 on paper: Llama 3.1 8B", llama, 2, paper, h200.memory_bytes)
small = Site("here: tiny", tiny.config, dtype.itemsize, result.roof, memory)

tiny_step = StepRunner(
    load_model("tiny", device="cpu", dtype=dtype, progress=False), decode_step(128)
)
seconds = interleaved({"step": tiny_step}, repeats=20)["step"].best
terms = small.terms(1, 128)
small = replace(small, overhead=max(0.0, seconds - max(terms.values())))
print(f"a step of tiny takes {quantity(seconds, 's')}")
print(f"of this, no other term explains {quantity(small.overhead, 's')}: overhead")

# %%
batches, contexts = [2**i for i in range(11)], [2**i for i in range(6, 18)]
show(
    regime_map([small, here, there], batches, contexts),
    alt="Three maps over batch and context. Small batches and short contexts wait for weights"
    " (or, for tiny, for overhead), long contexts for the KV cache, large batches with short "
    "contexts for arithmetic; beyond a diagonal the caches do not fit into memory.",
)

# %% [markdown]
"""
Along a diagonal from top left to bottom right, batch · context is the same, and so are the bytes of cache: that is why the borders
of the cache run diagonally. The border of arithmetic is upright where weights are what it wins against. And look at the
orange band: once the cache is what is read, **a larger batch never reaches the arithmetic**, because every sequence brings its own
cache.

## Explore: the teacher and the ink bottle

An old picture of decoding: a teacher writes a letter, and the ink stands in a store far away. For every word the teacher walks to the
store. The walk is reading the weights. Each bar below is one term of a step, by formula; the amber one is the step that was
measured above. Move the slider.
"""

# %%
longest = max(point.timing.best for point in decodes.values())
explore(
    lambda batch: one_walk(here, batch, 128, decodes[batch].timing.best, longest),
    alt="Bars of a decode step for batches of 1 to 64: the walk (weights) stays the same, notes "
    "(KV) and writing (arithmetic) grow with the batch, and a word gets cheaper and cheaper.",
    batch=list(decodes),
)

# %% [markdown]
"""
Two things are missing from the old picture. **One walk carries ink for the whole class**: the walk stays, and the time per word
falls. And every pupil's notes are read for that pupil alone: that bar grows with the class, and nobody shares it.

## On a napkin

An H200 reads 4.8 TB/s (its data sheet). Llama 3.1 8B in bf16 reads its grey bar of the ledger above. How many tokens per second can it
write for one user at best? And for 64 users with 8,000 tokens each?
"""

# %%
one = tpot_bound(llama, 1000, 2, paper)
many = tpot_bound(llama, 8000, 2, paper, batch=64)
fold(
    "Answer",
    f"One user: {weight_bytes(llama, 2, 0) / 1e9:.0f} GB over "
    f"{h200.read_bandwidth / 1e12:.1f} TB/s is "
    f"{1e3 * one:.1f} ms, so at most **{1 / one:.0f} tokens per second**. For 64 users the step "
    f"also reads their caches: {1e3 * many:.0f} ms, {1 / many:.0f} tokens per second each and "
    f"**{64 / many:,.0f}** in all. Not 64 times as many: the caches are not shared.",
)

# %% [markdown]
"""
## What people say
"""

# %%
bench = Workbench()
show_card(CLAIMS["B11"].card(bench))

# %%
for claim in ("A18", "A10"):
    show_card(CLAIMS[claim].card(bench))

# %% [markdown]
"""
## Your turn

`exercises/ex05_roofline.py` · difficulty ●●●○○ · 45 minutes

You write the closed forms for FLOPs and bytes of any step, and from them the bounds on TTFT and TPOT. Work on it with
`minillm lab test ex05`, or run the cell below.

<details><summary>Hint 1: what is a step?</summary>

A list of pairs (new tokens, tokens seen by the last of them). A prefill of 100 is `[(100, 100)]`, a decode step of two sequences
`[(1, 101), (1, 51)]`. One function serves both.

</details>

<details><summary>Hint 2: how many pairs does the causal rule let through?</summary>

The first of q new tokens sees `kv_len - q + 1` keys, each next one sees one more. Add them up.

</details>

<details><summary>Hint 3: my bytes are too many by a factor</summary>

Are weights multiplied by the batch? They are read once per step. Are query heads in the cache? Only KV heads are.

</details>
"""

# %%
from minillm.course.lab import check

check("ex05")

# %% [markdown]
"""
## Break it

**Mutant 1: weights are charged for every sequence.** It sounds right: each sequence multiplies with all weights. The prediction then
says that batching is worth nothing. We hold it against the steps that were measured.
"""

# %%
print("batch   measured   formula   mutant (times a step of batch 1)")
for batch, point in decodes.items():
    times_one = point.timing.best / decodes[1].timing.best
    terms, first = here.terms(batch, 128), here.terms(1, 128)
    right = max(terms.values()) / max(first.values())
    wrong = max(batch * first["weights"], *terms.values()) / max(first.values())
    print(f"{batch:5} {times_one:9.1f}× {right:8.1f}× {wrong:7.1f}×")

# %% [markdown]
"""
**Mutant 2: query heads in the cache.** A popular calculator takes the number of query heads for the bytes of the cache. For a model
whose query heads share KV heads, that is too much by the size of the group.
"""

# %%
context = 32000
right = step_bytes(llama, decode_step(context), 2).kv_read
wrong = step_bytes(
    replace(llama, num_kv_heads=llama.num_heads), decode_step(context), 2
).kv_read
with Counter(ghost, kv=(run := StepRunner(ghost, decode_step(context))).cache) as count:
    run()
print(f"counted {quantity(count.total.bytes.kv_read, 'B')}, formula {quantity(right, 'B')}, "
      f"mutant {quantity(wrong, 'B')}: {wrong / right:.0f} times")  # fmt: skip

# %% [markdown]
"""
## How others do it

* **llama.cpp**, `tools/llama-bench/llama-bench.cpp`: measures `pp512` (a prompt of 512) and `tg128` (128 tokens of text) apart, because they are on
  the two sides of the ridge.
* **gpt-fast**, `generate.py`: prints the bandwidth that decoding achieved, weight bytes times tokens per second.
* **vLLM**, `vllm/v1/core/sched/scheduler.py`: a budget of tokens per step, the rows of this lesson, is what its scheduler hands out.
* **SGLang**, `python/sglang/bench_one_batch.py`: times prefill and decode of one static batch, without a scheduler.
* **minillm**, `minillm/costs/formulas.py` and `roof.py`: the closed forms of this lesson; `minillm roofline` draws the figure without a notebook.

## Three questions

<details><summary>1. A new chip has twice the FLOP/s and the same bandwidth. How much faster does one user's text come?</summary>

Hardly at all: a lone decode waits for bytes. Its ridge moves right, and the batch that would use the new arithmetic has to be
twice as large.

</details>

<details><summary>2. Weights in 4 bits instead of 16. What gets faster: a lone decode, or a long prefill?</summary>

The decode, by up to four times: it waits for weights. A long prefill waits for arithmetic, and has as much of it as before.

</details>

<details><summary>3. Why does a batch of 1,000 users with long texts never reach the ridge?</summary>

Each of them brings a cache that nobody shares. Attention's FLOPs per byte of cache are the same for one and for a thousand.

</details>

## Next

Attention over a long prompt moves more bytes than it must: its scores. [06 · FlashAttention](06_flash_attention.ipynb) keeps them in
the processor.
"""
