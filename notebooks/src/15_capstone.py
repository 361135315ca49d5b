# %% [markdown]
"""
# 15 · Capstone

**Does your engine hold?**

120 minutes with the exercise · needs all lessons before it · runs offline on a CPU

You know every part: attention, the cache, blocks, the scheduler, the sampler. An engine is what happens when they meet a load that is larger than its memory. This lesson puts one such load on the package's engine, looks at it from four
sides at once, and shows how your own parts take their places.
"""

# %%
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from minillm import LLM, load_model
from minillm.config import EngineConfig
from minillm.costs.formulas import kv_bytes_per_token, matmul_parameters
from minillm.costs.steps import decode_step, prefill_step
from minillm.course.claims import CLAIMS, Workbench
from minillm.course.errors import LearnerError
from minillm.course.figures.curves import curves, decode_curve, prefill_curve
from minillm.course.figures.dashboard import load_dashboard
from minillm.course.figures.gantt import seat_gantt
from minillm.course.figures.show import explore, fold, predict, show, show_card, this_machine
from minillm.course.use import plug_in
from minillm.engine.engine import Engine
from minillm.generate import generate
from minillm.measure.bench import quartiles
from minillm.measure.datasheets import DATASHEETS
from minillm.measure.hardware import measure_hardware
from minillm.measure.roof import Roof, step_seconds
from minillm.measure.roofline import measure_roofline
from minillm.measure.workloads import Workload
from minillm.outputs import RequestMetrics
from minillm.sampling import SamplingParams
from minillm.shapes import named_shape

model = load_model("tiny", device="cpu", dtype="float32", progress=False)
config = model.config
bench = Workbench()
print(this_machine())

# %% [markdown]
"""
## Predict

Fourteen requests come at once. Eight may run together, but the engine gets only 20 blocks of 16 tokens for their keys. When blocks run out it *preempts* a request: it throws all of its keys away, and computes them again later.

**How many times as many tokens does it compute as with plenty of blocks?**
"""

# %%
guess = predict("tokens computed with 20 blocks, over those with 100", ..., "×")

# %% [markdown]
"""
## A toy: an engine without a model

Everything an engine decides, with letters in place of tokens. Each step: who is new, who must go, who computes how much, who is done. Memory holds `places` tokens, a step computes `budget`.
"""


# %%
def toy_engine(prompts, new, budget, places, victim=-1, most=40):
    """Who computes in each step, a letter for each token. victim: the seat that is cleared."""
    tokens, done, waiting, running = dict(prompts), dict.fromkeys(prompts, 0), [*prompts], []
    steps = []
    while (waiting or running) and len(steps) < most:
        if waiting and sum(tokens[name] for name in [*running, waiting[0]]) < places:
            running.append(waiting.pop(0))
        while sum(tokens[name] for name in running) > places:
            waiting.insert(0, running.pop(victim))
            done[waiting[0]] = 0  # its tokens stay, its keys do not
        steps.append("")
        for name in sorted(running, key=lambda name: tokens[name] - done[name] > 1):
            count = min(tokens[name] - done[name], budget - len(steps[-1]))
            steps[-1], done[name] = steps[-1] + name * count, done[name] + count
            tokens[name] += count > 0 and done[name] == tokens[name]  # level: draws one
        running = [name for name in running if tokens[name] < prompts[name] + new]
    return steps


toy = {"A": 6, "B": 4, "C": 5}
for places in (40, 16):
    steps = toy_engine(toy, new=6, budget=8, places=places)
    print(f"{places} places: {len(''.join(steps))} tokens in {len(steps)} steps")
    print(" ", " ".join(steps))

# %% [markdown]
"""
With few places somebody's letters stop, and come back later as a whole block: these are its own tokens, computed a second time. Nobody's text is shorter. That is the whole idea, and the engine below differs from it in size only.

## The engine under load

Fourteen requests with random prompts, 8 seats, 64 tokens a step, blocks of 16 tokens. We keep the trace, the tokens and the time of each.
"""

# %%
workload = Workload("random", num_prompts=14, input_len=40, output_len=32, range_ratio=0.6)
load = dict(zip("ABCDEFGHIJKLMN", workload.requests(config.vocab_size), strict=True))


def run_load(blocks):
    """Serve the load on an engine of so many blocks: the engine, tokens and times by request."""
    settings = EngineConfig(
        num_blocks=1 + blocks,  # block 0 is nobody's
        block_size=16,
        max_num_batched_tokens=64,
        max_num_seqs=8,
        enable_prefix_caching=False,
    )
    engine, tokens, metrics = Engine(model, settings), defaultdict(list), {}
    for name, request in load.items():
        metrics[name] = RequestMetrics(time.perf_counter(), [[]])
        engine.add(request.prompt, request.params, request_id=name)
    for event in engine.run():
        name = event.request.request_id
        tokens[name] += event.token_ids
        metrics[name].token_times[0] += [event.time] * len(event.token_ids)
    return engine, tokens, metrics


runs = {blocks: run_load(blocks) for blocks in (100, 20)}
computed = {}
for blocks, (engine, tokens, _) in runs.items():
    computed[blocks] = sum(record.num_tokens for record in engine.trace)
    preempted = [name for record in engine.trace for name in record.preempted]
    print(
        f"{blocks:3} blocks: {len(engine.trace):3} steps, {computed[blocks]} tokens computed, "
        f"{sum(map(len, tokens.values()))} handed out, preempted: {preempted or 'nobody'}"
    )

# %% [markdown]
"""
Does the second engine still say the same? A request's text must not depend on who else is served, on blocks, or on having been preempted: its blocks taken back and its keys computed again (lesson 11). The judge is `generate`, the loop for one request of lesson 03, which knows neither blocks nor neighbours.
"""

# %%
same = runs[20][1] == runs[100][1]
alone = {
    name: list(generate(model, load[name].prompt, load[name].params)) for name in list(load)[:4]
}
print("the same tokens with 20 blocks and with 100:", same)
print("the same as each alone:", {name: alone[name] == runs[20][1][name] for name in alone})

# %% [markdown]
"""
## One load at a glance

The roof of this machine (lesson 05), measured now for a model as small as ours: a processor reads what fits into its caches faster than its
memory. And then all that was recorded of the small engine in one picture.
"""

# %%
hardware = measure_hardware("cpu")
roof = measure_roofline(
    model, hardware, name="tiny", prompts=[64], batches=[1], contexts=[64], repeats=3
).roof
print(this_machine())
engine, tokens, metrics = runs[20]

# %% tags=["thumbnail"]
show(
    load_dashboard(
        list(engine.trace),
        list(metrics.values()),
        config=config,
        num_blocks=engine.pool.num_usable,
        roof=roof,
    ),
    alt="Four panels. A row per request over the engine's steps: a short prompt, then a token a "
    "step; some rows are interrupted by a line and go on with a crossed piece. Blocks held over "
    "the steps, at the limit where somebody is preempted. Every step as a dot under the roof. "
    "Percentiles of the time to first token and of the gaps between tokens.",
)

# %% [markdown]
"""
Read it from the top. **Requests**: a row begins with its prompt and goes on with a token a step. A grey line is a request without blocks. **Blocks**: each triangle stands where the hatched area touches the dashed line, and each has a grey line that
begins above it. **Steps**: one dot each. Decodes stand left, few FLOPs for each byte; the more of them share a step, the further right. How far a dot is below the roof is time that went elsewhere. **Waiting**: first tokens wait until others have given blocks back, which is why TTFT is so much longer than a
gap.

What would falsify it: a triangle with free blocks left, a row without an end, a dot above the roof.
"""

# %%
guess.against(computed[20] / computed[100])

# %% [markdown]
"""
Preempting somebody sounds terrible and costs little, because it happens to the *youngest*, who has least to lose. The expensive part is seen in the steps: with fewer blocks fewer requests share a step, so there are more of them.

## Shapes: what a step is

A step is a list of pairs, new tokens and keys seen. All new tokens lie side by side: there is one matrix product per layer whatever the mix. A step of the load above with prompts and decodes in it:
"""

# %%
mixed = next(
    record
    for record in engine.trace
    if len({part.phase for part in record.requests}) > 1 and len(record.requests) > 3
)
print(f"step {mixed.step}: request  q_len  kv_len  blocks  phase")
for part in mixed.requests:
    print(
        f"{part.request_id:>15} {part.num_scheduled:6} {part.kv_len:7} {len(part.blocks):7}"
        f"  {part.phase}"
    )
rows = sum(part.num_scheduled for part in mixed.requests)
print(f"hidden states [{rows}, {config.hidden_size}], one row per token of anybody")
print(f"logits [{sum(part.num_samples for part in mixed.requests)}, {config.vocab_size}]")

# %% [markdown]
"""
## Measure: a step and its bound

Every step has a bound: its FLOPs over the machine's FLOP/s, or its bytes over byte/s, whichever is longer. Steps of equal size are grouped; points are medians.
"""

# %%
steps = {"decode": defaultdict(list), "prompt": defaultdict(list)}
for record in [record for run in runs.values() for record in run[0].trace]:
    pairs = [(part.num_scheduled, part.kv_len) for part in record.requests]
    kind = "decode" if all(part.phase == "decode" for part in record.requests) else "prompt"
    bound = step_seconds(config, pairs, 4, roof)
    steps[kind][record.num_tokens].append((record.run_time, bound))
points = {
    kind: [
        [size, *(quartiles(list(times)).median for times in zip(*taken, strict=True))]
        for size, taken in sorted(sizes.items())
    ]
    for kind, sizes in steps.items()
}
times = {
    kind: [list(column) for column in zip(*rows, strict=True)] for kind, rows in points.items()
}
print(this_machine())
for kind, (sizes, measured, bounds) in times.items():
    for size, seconds, least in list(zip(sizes, measured, bounds, strict=True))[
        :: len(sizes) - 1
    ]:
        print(
            f"{kind:7} {size:3} tokens: {1e3 * seconds:6.1f} ms, at least {1e3 * least:5.2f} ms, "
            f"{1e6 * seconds / size:6.0f} µs a token"
        )

# %%
sizes, measured, _ = times["decode"]
gain = measured[0] / sizes[0] / (measured[-1] / sizes[-1])
show(
    curves(
        f"{sizes[-1]} requests in a step: {gain:.1f} times the tokens of one in the same time",
        [
            decode_curve("decodes only", *times["decode"]),
            prefill_curve("with a prompt", *times["prompt"]),
        ],
        x="tokens of a step",
        y="Time of a step",
        unit="s",
        x_scale="log",
    ),
    alt="Time of a step against its tokens, for steps of decodes and steps with a prompt, over "
    "the bounds of the roof as lines. Small steps are far above their bound.",
)

# %% [markdown]
"""
The line is what the roof allows; the distance from it is overhead: Python, small operators, waiting for other programs. A tiny model shows mostly that distance. In a model of billions of parameters the line comes up to the points.
Points below their line would say that the roof is wrong.

## Explore: memory

The load under several sizes of memory. A seat is a place in the batch.
"""

# %%
for blocks in (14, 32):
    runs[blocks] = run_load(blocks)
explore(
    lambda blocks: seat_gantt({f"{blocks} blocks": list(runs[blocks][0].trace)}, 8),
    alt="Seats over steps for 14, 20, 32 and 100 blocks. With few blocks most seats stand empty "
    "and the load takes many steps; with plenty all eight are busy.",
    blocks=sorted(runs),
)

# %% [markdown]
"""
## Your parts in it

`plug_in(llm, "exercises/")` takes what you have written in all exercises and puts each function in its place in the engine. The engine's own runs beside it and must say the same, call by call. Nothing has to be finished: what is not written keeps the
engine's own.

```
minillm demo --use exercises/
```

So that this page depends on nobody's files, the next cell writes one function of exercise 09 into a temporary folder: the arithmetic of slots, as lesson 09 has it.
"""

# %%
right_slots = """
def slot_mapping(block_table, start, end, block_size):
    return [block_table[p // block_size] * block_size + p % block_size for p in range(start, end)]
"""
question = ["def area(width, height):\n    return"]
greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
with tempfile.TemporaryDirectory() as folder:
    Path(folder, "ex09_paged_kv.py").write_text(right_slots)
    with_yours = LLM("tiny", device="cpu", dtype="float32")
    used = plug_in(with_yours, folder)
    text = with_yours.generate(question, greedy, progress=False)[0].outputs[0].text
own = LLM("tiny", device="cpu", dtype="float32").generate(question, greedy, progress=False)
for row in used:
    state = (row.why_not or "in place").partition(":")[0]
    print(f"{row.exercise} {', '.join(row.tasks):23} {row.place:24} {state}")
print("writes", repr(text))
print("the same text as the engine's own:", text == own[0].outputs[0].text)

# %% [markdown]
"""
## On a napkin

An H200 (141 GB, 4.8 TB/s, 989 TFLOP/s by its data sheet) serves Llama 3.1 8B in bf16. Requests have 500 tokens of prompt and want 250. How many run at once? How many per second are served at best?
"""

# %%
llama = named_shape("llama-3.1-8b")
h200 = next(sheet for sheet in DATASHEETS if sheet.name.startswith("H200"))
paper = Roof(h200.bfloat16_rate, h200.read_bandwidth)
places = (141e9 - 2 * matmul_parameters(llama)) / kv_bytes_per_token(llama, 2)
batch = int(places / 750)
decode = step_seconds(llama, decode_step(625, batch), 2, paper)
prompt = step_seconds(llama, prefill_step(500), 2, paper)
rate = 1 / (prompt + 250 * decode / batch)
fold(
    "Answer",
    f"{places / 1e3:,.0f} thousand places are left, 750 for each at its longest: "
    f"**{batch:,}** at once. A decode step of all of them takes {1e3 * decode:.0f} ms, a prompt "
    f"{1e3 * prompt:.1f} ms. A request costs one prompt and 250 times its share of a step, "
    f"so at most **{rate:.0f} requests/s** are served, {250 * rate:,.0f} tokens/s. "
    "(Bounds, not measurements.)",
)

# %% [markdown]
"""
## What people say

That efficiency comes from keeping the two phases apart. The engine above has no phases.
"""

# %%
show_card(CLAIMS["B15"].card(bench))

# %% [markdown]
"""
## Your turn

`exercises/ex15_capstone.py` · difficulty ●●●●● · 120 minutes

You write `pack`, `attend_batch`, `reserve`, `commit` and the `Engine` that joins them. Plain parts are given; put your own in their place with `Parts(schedule=…, pool=…, attention=…, choose=…)`. Work on it with `minillm lab test ex15`, or run the cell below.

<details><summary>Hint 1: where do I begin?</summary>

With `pack`: it has no model in it, only lists. The token at position `p` lies in block `table[p // B]` at offset `p % B`. Only a sequence whose *last* token is computed now has a row to draw from.

</details>

<details><summary>Hint 2: with preemption the text changes</summary>

Whoever is preempted keeps its tokens and loses the rest: blocks given back, an empty table, `num_computed = 0`. Take it out of *both* lists, and do not hand it a token in this step.

</details>

<details><summary>Hint 3: my engine never ends</summary>

Preempt the youngest, the last of the running ones, and put it at the head of the queue, before all who have waited less long. Then the oldest always gets on. And sequences that are done must give their blocks back.

</details>
"""

# %%
from minillm.course.lab import check

check("ex15")

# %% [markdown]
"""
## Break it

**Mutant 1: the block's number instead of its first slot.** Somebody forgets `* block_size`. Lesson 09 showed how such texts go wrong in silence. Here the engine's own function runs beside it:
"""

# %%
wrong_slots = right_slots.replace("* block_size + p", "+ p")
with tempfile.TemporaryDirectory() as folder:
    Path(folder, "ex09_paged_kv.py").write_text(wrong_slots)
    try:
        with_wrong = LLM("tiny", device="cpu", dtype="float32")
        plug_in(with_wrong, folder)
        with_wrong.generate(question, greedy, progress=False)
    except LearnerError as error:
        print(str(error).replace(". ", ".\n"))

# %% [markdown]
"""
The first call that differs stops the run and says with which arguments. No text was written that could look right.

**Mutant 2: preempt the oldest.** It holds the most blocks, so it frees the most. In the toy:
"""

# %%
for name, victim in (("youngest", -1), ("oldest", 0)):
    steps = toy_engine(toy, new=6, budget=8, places=16, victim=victim)
    print(f"preempting the {name}: {len(steps)} steps, {len(''.join(steps))} tokens computed")
    print(" ", " ".join(steps))

# %% [markdown]
"""
The oldest has the most to compute again: more tokens, more steps, and A, who came first, ends last. With new requests coming all the time it might never end. The order is not a detail. If the youngest go first, the oldest always gets on, and everybody
is the oldest at some time.

## A map: this engine, vLLM, SGLang

Paths of vLLM are below `vllm/`, those of SGLang below `python/sglang/srt/`. Files move; the names of the things in them stay.

| minillm | vLLM, below it SGLang |
|---|---|
| **a request comes in** |  |
| `llm.py` | `entrypoints/llm.py`<br>`entrypoints/engine.py` |
| `prompts.py`, `sampling.py`, `outputs.py` | `inputs/`, `sampling_params.py`, `outputs.py`<br>`sampling/sampling_params.py`, `managers/io_struct.py` |
| `text.py` | `v1/engine/detokenizer.py`<br>`managers/detokenizer_manager.py` |
| `config.py`, `errors.py` | `config/`<br>`server_args.py`, `configs/model_config.py` |
| `generate.py` (a loop for one) | – |
| **who computes what** |  |
| `engine/engine.py` | `v1/engine/core.py`, `v1/engine/llm_engine.py`<br>`managers/scheduler.py` (its loop) |
| `engine/scheduler.py` | `v1/core/sched/scheduler.py`<br>`managers/scheduler.py`, `managers/schedule_policy.py` |
| `engine/request.py` | `v1/request.py`<br>`managers/schedule_batch.py` (`Req`) |
| `engine/batch.py` | `v1/worker/gpu_input_batch.py`<br>`managers/schedule_batch.py`, `model_executor/forward_batch_info.py` |
| `engine/runner.py`, `sampler.py` | `v1/worker/gpu_model_runner.py`, `v1/sample/sampler.py`<br>`model_executor/model_runner.py`, `layers/sampler.py` |
| `kernels/gpu/graphs.py` | `v1/cudagraph_dispatcher.py`<br>`model_executor/cuda_graph_runner.py` |
| `engine/trace.py` | `v1/metrics/stats.py`<br>`managers/scheduler_metrics_mixin.py` |
| **where keys and values lie** |  |
| `cache/blocks.py` | `v1/core/block_pool.py`, `kv_cache_manager.py`, `kv_cache_utils.py`<br>`mem_cache/allocator.py`, `mem_cache/radix_cache.py` |
| `cache/paged.py` | `v1/worker/gpu_model_runner.py`, `v1/worker/block_table.py`<br>`mem_cache/memory_pool.py` |
| `quantization/cache.py`, `quantization/formats.py` | `--kv-cache-dtype` |
| `cache/contiguous.py`, `measure/snapshot.py` (to learn from) | – |
| **attention** |  |
| `attention/metadata.py` | `v1/attention/backend.py` (metadata)<br>`model_executor/forward_batch_info.py` |
| `attention/paged.py`, `kernels/cpu/paged.py`, `kernels/cpu/attention.py`, `kernels/sdpa.py` | `v1/attention/backends/`<br>`layers/attention/` |
| `kernels/gpu/prefill.py`, `decode.py`, `paged.py`, `tiles.py` | `v1/attention/ops/triton_unified_attention.py`<br>`layers/attention/triton_ops/extend_attention.py`, `decode_attention.py` |
| `quantization/attention.py`, `kernels/gpu/quantized.py` | in the kernels |
| `attention/reference.py`, `tiled.py` (to learn from) | – |
| **the model** |  |
| `model/decoder.py`, `rope.py` | `model_executor/models/llama.py`, `layers/rotary_embedding/`<br>`models/llama.py`, `layers/rotary_embedding.py` |
| `model/linear.py`, `kernels/cpu/linear.py` | `model_executor/layers/linear.py`<br>`layers/linear.py` |
| `model/loader.py`, `hf.py`, `shapes.py` | `model_executor/model_loader/`<br>`model_loader/` |
| `model/tokenizer.py` | `tokenizers/`<br>`managers/tokenizer_manager.py` |
| `course/training/` | – |
| **guessing ahead** |  |
| `engine/verify.py` | `v1/sample/rejection_sampler.py`<br>`speculative/eagle_info.py` |
| `speculative/ngram.py`, `draft.py` | `v1/spec_decode/ngram_proposer.py`, `draft_model.py`<br>`speculative/ngram_worker.py`, `standalone_worker.py` |
| `speculative/tree.py`, `stats.py`, `course/lessons/rounds.py` | `v1/spec_decode/metrics.py`<br>`speculative/eagle_utils.py` (trees) |
| **measuring** |  |
| `measure/bench_serve.py`, `summary.py`, `workloads.py` | `benchmarks/serve.py`, `benchmarks/datasets.py`<br>`python/sglang/bench_serving.py` |
| the rest of `measure/`; `costs/`, `course/`, `cli/` | – |

The large engines have what is missing here: servers, many GPUs, other attentions, adapters, structured output. What is here, they have in the same places. **llama.cpp** has its own cut: `src/llama-context.cpp` runs a batch, `src/llama-kv-cache.cpp` holds
the cells, `tools/server/` schedules.

## Three questions

<details><summary>1. An engine is right for every request alone, and wrong under load. Which parts do you suspect first?</summary>

Those that only a load reaches: blocks given twice, the row a token is drawn from, what a preempted request keeps. Compare each request with itself alone, as above.

</details>

<details><summary>2. With few blocks, a little more tokens and far more steps. Why?</summary>

Few tokens are computed twice. But with fewer blocks fewer requests share a step, and each step reads all weights for fewer of them.

</details>

<details><summary>3. Fourteen requests: what is a P99 of their TTFT?</summary>

Nearly the largest of fourteen numbers. A percentile needs many times more samples than its distance from 100: for P99, thousands.

</details>

## Next

That is all there is in the middle of an engine. Read it: `minillm/engine/engine.py` first, then the map above. And serve something with your own: [docs/use.md](../docs/use.md).
"""
