# %% [markdown]
"""
# 06 · FlashAttention

**Can attention avoid the N × N matrix?**

40 minutes · needs 02 and 05 · runs offline on a CPU

Attention gives every token a weight for every earlier token. For N tokens that is a matrix of N × N numbers per head, and
for long prompts it is larger than everything else together. This lesson computes the same output without ever having the matrix,
and finds out what that saves and what it does not.
"""

# %%
from functools import partial

import torch

from minillm import load_model, load_tokenizer
from minillm.attention.reference import naive_attention
from minillm.attention.tiled import tiled_attention
from minillm.costs.formulas import visible_pairs
from minillm.course.claims import CLAIMS, Workbench
from minillm.course.figures.curves import curves, prefill_curve
from minillm.course.figures.show import explore, fold, predict, show, show_card, this_machine
from minillm.course.figures.tiles import TileCost, softmax_strip, tile_cost, tile_order
from minillm.course.lessons.softmax import TileSteps, merge
from minillm.course.lessons.tiles import tiled_keys, tiled_pairs
from minillm.kernels import sdpa
from minillm.measure.bench import interleaved
from minillm.measure.counters import Counter
from minillm.measure.hardware import describe_machine
from minillm.measure.units import quantity
from minillm.shapes import named_shape

model = load_model("tiny", device="cpu", dtype="float32", progress=False)
tokenizer = load_tokenizer("tiny")
print(this_machine())

# %% [markdown]
"""
## Predict

FlashAttention (Dao et al. 2022) is known to be several times faster than attention as the textbook writes it. Take a prompt of 1,024
tokens.

**How many times fewer FLOPs does it need for the same pairs of query and key? And how many times fewer bytes does it move?**
Write your two numbers in place of the dots.
"""

# %%
guess_flops = predict("FLOPs for the same pairs, textbook over tiles", ..., "×")
guess_bytes = predict("bytes moved, textbook over tiles", ..., "×")

# %% [markdown]
"""
## A toy: a softmax that forgets

The obstacle is the softmax. A weight is `exp(score − m) / l`, where `m` is the largest score of the row and `l` the sum of
all `exp(score − m)`. Both are known only after the last key. It seems that all scores must be kept until then.

They need not be. Keep three running values: `m`, `l` and the output not yet divided, `out`. When a new tile raises the maximum
from `m` to `m_new`, everything that was summed so far is too large by the same factor. So multiply it by `exp(m − m_new)`.
Six keys in tiles of two:
"""

# %%
scores = torch.tensor([1.0, 2.0, 0.0, 4.0, 3.0, 1.0])
values = torch.tensor([10.0, 20.0, 30.0, 40.0, 50.0, 60.0])

m, l, out = torch.tensor(-torch.inf), torch.tensor(0.0), torch.tensor(0.0)
for tile in (slice(0, 2), slice(2, 4), slice(4, 6)):
    m_new = torch.maximum(m, scores[tile].max())
    shrink = torch.exp(m - m_new)  # 1 while the maximum stays; 0 at the start
    weights = torch.exp(scores[tile] - m_new)
    l = l * shrink + weights.sum()
    out = out * shrink + weights @ values[tile]
    m = m_new
    print(f"keys {tile.start}–{tile.stop - 1}: m = {m:.0f}   shrink {shrink:.3f}", end="   ")
    print(f"l = {l:.3f}   out = {out:6.2f}")

print(f"\nout / l:           {out / l:.4f}")
print(f"softmax over all:  {scores.softmax(0) @ values:.4f}")

# %% [markdown]
"""
Equal. This is not an approximation: `exp(score − m) · exp(m − m_new)` *is* `exp(score − m_new)`. It is called the **online
softmax** (Milakov and Gimelshein 2018). In memory there were two scores at a time.

Check the second line by hand: the maximum rises from 2 to 4, so the old sum shrinks by exp(−2).

## The same in a trained head

Lesson 02 found a head that copies: layer 4, head 2. We record its queries, keys and values while the model reads a text in
which it has something to copy. An `attend` function that writes down what it is given is all it takes.
"""

# %%
text = """def area(width, height):
    return width * height

def volume(width, height, depth):
    return width *"""
tokens = tokenizer.encode(text)
scale = model.config.head_dim**-0.5
recorded = {}


def attend(layer, q, k, v):
    """q [tokens, heads, d]; k and v become [kv_heads, tokens, d]."""
    recorded[layer] = q, k.transpose(0, 1), v.transpose(0, 1)
    return naive_attention(*recorded[layer], scale=scale)


with torch.inference_mode():
    model(torch.tensor(tokens), torch.arange(len(tokens)), attend)

layer, head = 4, 2
kv_head = head // (model.config.num_heads // model.config.num_kv_heads)
q, k, v = recorded[layer]
q, k, v = q[-1:, head : head + 1], k[kv_head : kv_head + 1], v[kv_head : kv_head + 1]
print("the last token's query", tuple(q.shape), "· keys and values", tuple(k.shape))

# %% [markdown]
"""
`tiled_attention` calls an *observer* after every tile and hands it the running values. `TileSteps` keeps a copy of each, and the
figure replays them: nothing in it is computed again.
"""

# %% tags=["thumbnail"]
steps = TileSteps()
tiled_attention(q, k, v, scale=scale, kv_tile=7, observer=steps)
row = (k[0] @ q[0, 0]) * scale  # all scores at once, to draw what the tiles never held together
exact = naive_attention(q, k, v, scale=scale)[0, 0]
show(
    softmax_strip(steps, row, exact),
    alt=f"{len(steps)} frames, one per tile of seven keys. Bars of exp(score minus m): when a "
    "tile raises the maximum, all earlier bars shrink together. Below, the output moves to the "
    "ticks of exact attention and ends on them.",
)

# %% [markdown]
"""
Look at the second frame: key 13, the last of its tile, is what this head looks for. The maximum rises, and what came before shrinks
to almost nothing. The output jumps to where it belongs and hardly moves afterwards, but nobody could know that before the last key.

What would falsify it: bars of the last frame that do not end at the ticks.

## Shapes

All heads at once; tiles of `R` queries and `K` keys. What the loop holds does not depend on N.
"""

# %%
R, K, N = 64, 64, 1024  # queries and keys of a tile, tokens of a prompt
heads, d = model.config.num_heads, model.config.head_dim
for name, shape in {
    "m and l": [heads, R],
    "out": [heads, R, d],
    "scores of a tile": [heads, R, K],
    "scores of the textbook": [heads, N, N],
}.items():
    print(f"{name:22} {shape!s:16} {torch.Size(shape).numel():>9,} numbers")

# %% [markdown]
"""
## The package's version

`minillm/attention/tiled.py` is the toy with matrices: a tile of queries for a tile of keys, all heads in one product. Here it
is against the textbook, on random input: whole prompts, a chunk after a longer past, one query, grouped heads, tiles that do not
fit.
"""

# %%
generator = torch.Generator().manual_seed(6)
for q_len, kv_len, heads, kv_heads, q_tile, kv_tile in [
    (64, 64, 4, 4, 16, 16),
    (50, 50, 4, 2, 16, 8),
    (20, 75, 8, 2, 7, 13),
    (1, 100, 4, 1, 1, 32),
]:
    q = torch.randn(q_len, heads, 64, generator=generator)
    k, v = torch.randn(2, kv_heads, kv_len, 64, generator=generator)
    ours, _ = tiled_attention(q, k, v, scale=scale, q_tile=q_tile, kv_tile=kv_tile)
    gap = (ours - naive_attention(q, k, v, scale=scale)).abs().max()
    shape = f"{q_len} queries, {kv_len} keys, {heads}/{kv_heads} heads"
    print(f"{shape + f', tiles {q_tile}×{kv_tile}':55} largest difference {gap:.1e}")

# %% [markdown]
"""
Rounding, and nothing else.

## In which order?

For a tile of queries, go through the tiles of keys. Tiles in which *every* key lies in the future of *every* query are skipped: they
would be multiplied by weights of zero. The observer saw which tiles were computed, and when.
"""

# %%
N = 64


def visits(q_tile, kv_tile, q_len=N, kv_len=N):
    """The tiles that one head really computes, in order."""
    seen = TileSteps()
    q, kv = torch.ones(q_len, 1, 4), torch.ones(1, kv_len, 4)
    tiled_attention(q, kv, kv, scale=0.5, q_tile=q_tile, kv_tile=kv_tile, observer=seen)
    return seen


show(
    tile_order(visits(8, 8), N, N),
    alt=f"The {N} by {N} matrix of scores in tiles of 8 by 8, numbered in order. Tiles below "
    "the diagonal are whole, those on it are cut by the causal rule and need a mask, those "
    "above it are white: never computed.",
)

# %% [markdown]
"""
Row by row, as the numbers say. Only tiles on the diagonal pay for a mask. With small tiles, what is computed comes close to what the causal
rule asks for; with one large tile, the whole square is computed. The textbook's version always computes the whole square.

## Explore: tiles of another height

The height of the tiles (queries) is the first slider. What happens to the number of tiles, and to what is computed in vain?
"""

# %%
observed = {(rows, keys): visits(rows, keys) for rows in (1, 4, 16, 64) for keys in (8, 16, 32)}
explore(
    lambda queries_per_tile, keys_per_tile: tile_order(
        observed[queries_per_tile, keys_per_tile], N, N
    ),
    alt="The causal matrix in tiles 1, 4, 16 and 64 queries high. Low tiles follow the "
    "diagonal closely; a tile of all queries computes the whole square, half of it in vain.",
    queries_per_tile=[1, 4, 16, 64],
    keys_per_tile=[8, 16, 32],
)

# %% [markdown]
"""
## Measure: FLOPs

`Counter` listens to PyTorch and counts what really runs. Four query heads, two key/value heads of 64 numbers, float32. First the FLOPs: 4 · d
for each pair of query and key and each head (2 · d for the score, 2 · d to weigh the value).
"""

# %%
HEADS, KV_HEADS, D, N = 4, 2, 64, 1024


def random_qkv(n):
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, HEADS, D, generator=generator), *torch.randn(
        2, KV_HEADS, n, D, generator=generator
    )


def count(kernel, q, k, v):
    """One call under the counter: q, k, v and the output are one account, the rest another."""
    with torch.inference_mode(), Counter(kv=[q, k, v]) as counted:
        out = kernel(q, k, v, scale=scale)
    counted.mark_kv(out)
    return counted


inputs = random_qkv(N)
textbook = count(naive_attention, *inputs)
tiles = count(partial(tiled_attention, q_tile=64, kv_tile=64), *inputs)
per_pair = 4 * HEADS * D
for name, counted, pairs in [
    ("textbook", textbook, N * N),
    ("tiles of 64", tiles, tiled_pairs(N, N, q_tile=64)),
    ("visible pairs only", None, visible_pairs(N, N)),
]:
    flops = per_pair * pairs if counted is None else counted.total.flops
    said = "" if counted is None else f"counted; formula {quantity(per_pair * pairs, 'FLOP')}"
    print(f"{name:20} {pairs:>9,} pairs   {quantity(flops, 'FLOP'):>10}   {said}")
flops_ratio = (textbook.total.flops / (N * N)) / (
    tiles.total.flops / tiled_pairs(N, N, q_tile=64)
)
print(f"\nFLOPs per pair, textbook over tiles: {flops_ratio:.3f}")

# %%
guess_flops.against(flops_ratio)

# %% [markdown]
"""
**For a pair of query and key, FlashAttention saves no FLOP.** What tiles save is the upper triangle, because they know the
causal rule; a textbook version that left it out would save the same. Where there is no triangle (a decode step, or a model that
reads both ways) nothing is left of it. There are even a few operations more, for shrinking; they are no matrix
products and are not counted here.

So why is it faster?

## Measure: bytes

A matrix of N × N scores is too large for a processor's caches. It is written to memory and read again for every operator that
touches it: scale, mask, softmax, product. Scores of a tile are small: they are used up before they leave the cache.
So for the tiles we count what *must* go to memory: queries, keys, values, output. A tile of R queries reads all keys that
it sees once, so the height R decides how often keys are read.
"""

# %%
heights = [32, 64, 128, 256, 512]
costs = []
for height in heights:
    counted = count(partial(tiled_attention, q_tile=height, kv_tile=64), *inputs)
    moved = counted.total.bytes.kv_read + counted.total.bytes.kv_write
    predicted = 4 * (
        2 * N * HEADS * D + N * HEADS + 2 * KV_HEADS * D * tiled_keys(N, N, q_tile=height)
    )
    costs.append(TileCost(height, moved, predicted, counted.peak_bytes))
    shown = f"{quantity(moved, 'B'):>8} counted, {quantity(predicted, 'B'):>8} by the formula"
    print(f"{height:4} queries per tile: {shown}")
naive_cost = TileCost(N, textbook.total.bytes.total, 0, textbook.peak_bytes)
bytes_ratio = naive_cost.moved / costs[1].moved
textbook_moved = quantity(naive_cost.moved, "B")
print(
    f"textbook: {textbook_moved}, {bytes_ratio:.0f} times the bytes of tiles of {costs[1].rows}"
)

# %%
machine = describe_machine(torch.device("cpu"))
caches = [(name, size) for name, size in machine.cache_bytes if name != "L1"]
most, least = (quantity(cost.moved, "B") for cost in (costs[0], costs[-1]))
show(
    tile_cost(costs, naive_cost, caches),
    alt=f"Left: bytes moved against the height of the tiles, {most} at 32 queries down to "
    f"{least} at 512, points on the formula; the score matrix needs {textbook_moved}. Right: "
    "memory held grows in proportion to the height, far below that of the score matrix.",
)

# %% [markdown]
"""
The two panels are the whole trade. **Higher tiles read the keys fewer times** (left) **and hold more scores** (right). The
best height is the largest whose scores still fit into the fastest memory that is large enough: a cache here, *shared memory* on a GPU.
The textbook's matrix stands far above on both sides.

What would falsify it: points off the line on the left. They are integers and must be equal. The panel on the right says whether the
assumption of the left one holds on this machine: what a tile holds must fit into a cache.
"""

# %%
guess_bytes.against(bytes_ratio)

# %% [markdown]
"""
## Memory against the length of the prompt

The largest intermediate of each version, for prompts of 256 to 4,096 tokens. For this the counter needs no memory at all: on
PyTorch's `meta` device tensors have shapes and nothing else.
"""

# %%
lengths = [256, 512, 1024, 2048, 4096]
largest = {"textbook": [], "tiles": []}
for n in lengths:
    shapes = (
        torch.empty(n, HEADS, D, device="meta"),
        *torch.empty(2, KV_HEADS, n, D, device="meta"),
    )
    largest["textbook"].append(count(naive_attention, *shapes).largest[0])
    largest["tiles"].append(
        count(partial(tiled_attention, q_tile=256, kv_tile=256), *shapes).largest[0]
    )
formula = {
    "textbook": [4 * HEADS * n * n for n in lengths],
    "tiles": [4 * HEADS * 256 * 256 for _ in lengths],
}
print("counted = formula:", {name: largest[name] == formula[name] for name in largest})
growth = largest["textbook"][-1] / largest["textbook"][-2]

# %%
show(
    curves(
        f"Twice the prompt, {growth:.0f} times the score matrix; a tile stays a tile",
        [
            prefill_curve("textbook", lengths, largest["textbook"], formula["textbook"]),
            prefill_curve("tiles of 256", lengths, largest["tiles"], formula["tiles"]),
        ],
        x="prompt, tokens",
        y="Largest intermediate, 4 heads, float32",
        unit="B",
        x_scale="log",
    ),
    alt="Largest intermediate against prompt length, 256 to 4,096. The textbook's grows with "
    f"the square, to {quantity(largest['textbook'][-1], 'B')}; that of tiles stays at "
    f"{quantity(largest['tiles'][-1], 'B')}.",
)

# %% [markdown]
"""
A line of slope 2 and a level one. At 256 tokens they meet: a prompt of one tile *is* its score matrix.

## And the time?

Three versions on this machine, in turns, the best of five: the textbook, tiles in PyTorch, and PyTorch's own fused kernel.
"""

# %%
with torch.inference_mode():
    for n in (256, 1024, 2048):
        q, k, v = random_qkv(n)
        kernels = {
            "textbook": naive_attention,
            "tiles": tiled_attention,
            "fused (SDPA)": sdpa.attention,
        }
        runs = {name: partial(kernel, q, k, v, scale=scale) for name, kernel in kernels.items()}
        best = {name: quantity(t.best, "s") for name, t in interleaved(runs, repeats=5).items()}
        print(f"{n:5} tokens: " + ", ".join(f"{name} {time}" for name, time in best.items()))
print(this_machine())

# %% [markdown]
"""
A loop in Python that starts ten operators for every tile is not slower than the textbook on a long prompt, because it spares the
memory. On a short prompt there is nothing to spare. In a GPU kernel the loop costs nothing; that is lesson 07.

## Merge: attention in parts

Tiles of one query were folded one after the other. They can also be computed apart, by different processors, and joined later. For that, each
part has to tell one more number than its output: its **log-sum-exp**, `m + log l`. Part i then holds the share `exp(lse_i) / Σ exp(lse_j)`
of the softmax. Three unequal parts of one context:
"""

# %%
q, k, v = random_qkv(300)
q = q[-1:]  # one query over 300 keys
cuts = [range(0, 50), range(50, 60), range(60, 300)]
parts = [
    tiled_attention(q, k[:, keys.start : keys.stop], v[:, keys.start : keys.stop], scale=scale)
    for keys in cuts
]
outs, lses = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
merged, lse = merge(outs, lses)
whole, whole_lse = tiled_attention(q, k, v, scale=scale)
for keys, part in zip(cuts, lses[:, 0, 0], strict=True):
    share = (part - lse[0, 0]).exp()
    print(f"keys {keys.start:3}–{keys.stop - 1:3}: log-sum-exp {part:.3f}, share {share:.3f}")
print(f"largest difference of the output from one pass: {(merged - whole).abs().max():.1e}")
print(f"largest difference of the log-sum-exp: {(lse - whole_lse).abs().max():.1e}")

# %% [markdown]
"""
## On a napkin

Llama 3.1 8B reads a prompt of 32,768 tokens. It has 32 query heads; numbers are bf16, 2 bytes. How large is the score matrix of
*one* layer? How large is a tile of 128 × 128 scores of one head in float32?
"""

# %%
llama, prompt = named_shape("llama-3.1-8b"), 32_768
matrix, tile = 2 * llama.num_heads * prompt**2, 4 * 128 * 128
fold(
    "Answer",
    f"{llama.num_heads} heads · {prompt:,}² · 2 bytes = **{quantity(matrix, 'B')}** for one "
    f"layer. That is {matrix / 80e9:.1f} times the memory of a GPU of 80 GB. The tile is "
    f"**{quantity(tile, 'B')}**. A multiprocessor of an H100 has 228 KB of shared memory "
    "(NVIDIA's H100 whitepaper): the tile fits, with its queries, keys and values.",
)

# %% [markdown]
"""
## What people say

Two statements from lists of optimisations. A bar is what was measured, a tick what the formula predicted; the verdict is computed from
the two.
"""

# %%
bench = Workbench()
for claim in ("A19", "B13"):
    show_card(CLAIMS[claim].card(bench))

# %% [markdown]
"""
## Your turn

`exercises/ex06_flash_attention.py` · difficulty ●●●●○ · 60 minutes

You write `online_step`, `finish`, `tiled_attention` and `merge`. Work on it with `minillm lab test ex06`, or run the cell below.

<details><summary>Hint 1: where do I begin?</summary>

With `m` at −∞, `l` and `out` at 0. Then the first tile is no special case: `exp(−∞ − m_new)` is 0.

</details>

<details><summary>Hint 2: everything becomes NaN</summary>

A row whose keys are all hidden so far has `m_new = −∞`, and −∞ − (−∞) is NaN. Subtract 0 instead of −∞ in that case:
`exp(−∞ − 0)` is the 0 that you mean.

</details>

<details><summary>Hint 3: right with one tile, wrong with several</summary>

Both `l` *and* `out` have to shrink by `exp(m − m_new)`, before the new tile is added. The first mutant below forgets one of them.

</details>
"""

# %%
from minillm.course.lab import check

check("ex06")

# %% [markdown]
"""
## Break it

**Mutant 1: the output is not shrunk.** `l` is, so the weights no longer belong to the values. The rows go wrong in which the maximum
rises after the first tile, and only those: a test whose largest score comes first finds nothing.
"""


# %%
def online(scores, v, tile, shrink_out=True, subtract=True):
    """The toy, for rows [n, keys]."""
    m, l, out = (
        torch.full((len(scores), 1), -torch.inf),
        torch.zeros(len(scores), 1),
        torch.zeros(len(scores), v.shape[1]),
    )
    for start in range(0, scores.shape[1], tile):
        part = scores[:, start : start + tile]
        m_new = (
            torch.maximum(m, part.amax(1, keepdim=True)) if subtract else torch.zeros_like(m)
        )
        shrink = torch.exp(m - m_new) if start else torch.zeros_like(m)
        weights = torch.exp(part - m_new)
        l = l * shrink + weights.sum(1, keepdim=True)
        out = out * (shrink if shrink_out else 1) + weights @ v[start : start + tile]
        m = m_new
    return out / l


generator = torch.Generator().manual_seed(8)
some, v = torch.randn(1000, 64, generator=generator), torch.randn(64, 8, generator=generator)
right = some.softmax(1) @ v
rising = some[:, 16:].amax(1) > some[:, :16].amax(1)
for name, ours in {
    "right": online(some, v, 16),
    "mutant": online(some, v, 16, shrink_out=False),
}.items():
    error = (ours - right).abs().amax(1)
    for words, rows in {"rises": rising, "stays": ~rising}.items():
        print(f"{name:7} largest error where the maximum {words}: {error[rows].max():.1e}")

# %% [markdown]
"""
**Mutant 2: no maximum is subtracted.** On paper it cancels: `exp(s − m) / Σ exp(s − m)` does not depend on `m`. In float32, exp
overflows above 88.
"""

# %%
for factor in (1, 10, 20, 40):
    ours = online(factor * some, v, 16, subtract=False)
    share = ours.isnan().any(1).float().mean()
    print(f"scores up to {factor * some.max():5.1f}: rows that are NaN {share:4.0%}")

group = model.config.num_heads // model.config.num_kv_heads
real = [
    (q.transpose(0, 1) @ k.repeat_interleave(group, 0).mT).max()
    for q, k, _ in recorded.values()
]
print(f"\nlargest score of this small model on one short text: {scale * max(real):.1f}")

# %% [markdown]
"""
It passes every test with well-behaved numbers, and fails on the day when one score is large. Nothing bounds a score, and the last line
shows what the tiny model reaches on one short text.

## How others do it

* **FlashAttention**, `csrc/flash_attn/src/flash_fwd_kernel.h` (version 2) and `hopper/` (version 3): the loop above in CUDA, a tile in registers and shared memory.
* **PyTorch**, `aten/src/ATen/native/cpu/FlashAttentionKernel.cpp`: the same for CPUs; what `scaled_dot_product_attention` runs.
* **vLLM**, `vllm/v1/attention/backends/flash_attn.py` calls FlashAttention; `vllm/v1/attention/ops/triton_unified_attention.py` is its own in
  Triton; `vllm/v1/attention/ops/merge_attn_states.py` is `merge`.
* **SGLang**, `python/sglang/srt/layers/attention/triton_ops/extend_attention.py`: first the cached prefix, then the new tokens, with one running
  softmax; `merge_state.py` is `merge`.
* **llama.cpp**, `src/llama-graph.cpp`, `build_attn_mha`: one operator, `ggml_flash_attn_ext`, where it is switched on, else the textbook in
  three. `ggml/src/ggml-cuda/fattn.cu` chooses among its kernels.
* **minillm**, `minillm/attention/tiled.py`: what you saw, and on a CPU what prompts really run through.

## Three questions

<details><summary>1. A tile brings no score above m. What has to be rescaled?</summary>

Nothing: `m_new = m`, and `exp(m − m_new)` is 1. The new weights are added to `l` and `out` as they are.

</details>

<details><summary>2. Tiles become twice as high. What happens to the bytes of K and V that are read?</summary>

They halve, nearly: there are half as many tiles of queries, and each reads the keys that it sees once. What a tile holds
doubles.

</details>

<details><summary>3. Two processors have each half of the keys. What do they have to send each other?</summary>

The output of their half (d numbers per query and head) and its log-sum-exp (one number). Never scores, never keys.

</details>

## Next

The loop runs in Python. [07 · GPU kernels](07_gpu_kernels.ipynb) makes a kernel of it.
"""
