# %% [markdown]
"""
# 07 · GPU kernels

**How does the tile loop become a kernel?**

50 minutes · needs 06 · runs offline on a CPU, in Triton's interpreter (Linux)

The tile loop of lesson 06 starts ten operators for every tile, from Python, one after the other. A *kernel* does all of it in one launch, on all processors of a GPU at once. This lesson writes
three kernels in Triton: a softmax, tiled attention, and attention for a decode step. Without a GPU they run in an interpreter: slowly, but number for number.
"""

# %%
import json
import os
from functools import partial
from pathlib import Path

import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported, or it wants a GPU

import triton
import triton.language as tl

from minillm.attention.metadata import AttentionMetadata
from minillm.attention.reference import naive_attention
from minillm.course.claims import CLAIMS, Workbench
from minillm.course.figures.kernels import Part, Program, kernel_speed, merge_tree, program_grid
from minillm.course.figures.show import explore, fold, predict, show, show_card, this_machine
from minillm.course.lessons.softmax import merge
from minillm.kernels.gpu.paged import BACKEND
from minillm.measure.bench import interleaved
from minillm.measure.counters import Counter
from minillm.measure.units import quantity

device = "cuda" if HAS_GPU else "cpu"
generator = torch.Generator().manual_seed(7)


def random(*shape):
    """The same numbers on every device."""
    return torch.randn(*shape, generator=generator).to(device)


print(this_machine())
print(
    "Triton", triton.__version__, "on the GPU" if HAS_GPU else "in its interpreter: no GPU here"
)

# %% [markdown]
"""
## Predict

A softmax of each row of a matrix takes five operators in PyTorch: largest number, subtract it, exp, sum, divide. Each one reads its input from memory and writes its output there.
A kernel can read a row once, do all five, and write the result once.

**How many times the bytes do the five operators move?** Write your number in place of the dots.
"""

# %%
guess = predict("bytes moved by five operators, over one kernel", ..., "×")

# %% [markdown]
"""
## A toy: a loop without order

Take a loop whose rounds do not need each other. Then their order does not matter, and they can run at the same time. Everything that a GPU does well has this shape. The body of the loop is the
kernel, the loop variable is the *program id*, and the number of rounds is the *grid*.
"""

# %%
x = random(6, 5)
out = torch.full_like(x, torch.nan)


def body(program_id):
    """One round: reads one row, writes one row, knows nothing of the others."""
    row = x[program_id]
    weights = torch.exp(row - row.max())
    out[program_id] = weights / weights.sum()


for program_id in torch.randperm(6, generator=generator).tolist():  # in any order
    body(program_id)
print(f"largest difference from torch.softmax: {(out - x.softmax(1)).abs().max():.1e}")

# %% [markdown]
"""
## The same in Triton

A program works on *tiles*: whole ranges of numbers at once, whose length is a power of two. `tl.arange` makes the range, `tl.load` and `tl.store` move it between memory and the
program, and a `mask` switches off what does not exist. Five columns become a tile of eight; the three that do not exist are read as −∞, so that they weigh nothing.
"""


# %%
@triton.jit
def softmax_kernel(x_ptr, out_ptr, columns, WIDTH: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, WIDTH)
    exists = column < columns
    numbers = tl.load(x_ptr + row * columns + column, mask=exists, other=float("-inf"))
    weights = tl.exp(numbers - tl.max(numbers, 0))
    tl.store(out_ptr + row * columns + column, weights / tl.sum(weights, 0), mask=exists)


def softmax(x, kernel=softmax_kernel):
    """One program per row of x [rows, columns]."""
    out = torch.empty_like(x)
    grid = (len(x),)
    kernel[grid](x, out, x.shape[1], WIDTH=triton.next_power_of_2(x.shape[1]))
    return out


print(f"largest difference from torch.softmax: {(softmax(x) - x.softmax(1)).abs().max():.1e}")

# %% [markdown]
"""
The kernel moves each number twice: one `tl.load`, one `tl.store`. What do the five operators move? `Counter` sees every operator of PyTorch. (It does not see kernels, but there the two lines say it.)
"""

# %%
wide = random(64, 512)
with Counter() as counted:
    largest = wide.amax(1, keepdim=True)
    shifted = wide - largest
    weights = shifted.exp()
    total = weights.sum(1, keepdim=True)
    result = weights / total
by_operators, by_kernel = counted.total.bytes.total, 2 * wide.nbytes
ratio = by_operators / by_kernel
print(f"five operators {quantity(by_operators, 'B')}, one kernel {quantity(by_kernel, 'B')}")

# %%
guess.against(ratio)

# %% [markdown]
"""
That is what *fusing* means: not fewer operations, fewer trips. It is the idea of FlashAttention in its smallest form.

## Tiled attention as a kernel

Now the loop of lesson 06. Which of its rounds need each other? Tiles of *keys* do: they are folded into the same `m`, `l` and `out`, one after the other. Tiles of *queries* do not, and heads do
not. So the grid has two axes: **one program for each tile of queries and each head**. Inside, a program loops over the tiles of keys that its queries see.

The last line of the loop writes down when each tile was visited. A real kernel would not, but now the figure can show a launch that took place.
"""


# %%
@triton.jit
def attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, visits_ptr, n, scale,
    ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """q, k, v and out [heads, n, D]; visits [heads, tiles of queries, tiles of keys]."""
    tile, head = tl.program_id(0), tl.program_id(1)
    row, dim = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, D)
    first = head * n * D  # where this head begins
    place = first + row[:, None] * D + dim[None, :]
    q = tl.load(q_ptr + place, mask=row[:, None] < n, other=0.0)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, D], tl.float32)
    end = tl.minimum((tile + 1) * ROWS, n)  # what comes after is the future of every row
    for start in range(0, end, KEYS):
        key = start + tl.arange(0, KEYS)
        there = first + key[:, None] * D + dim[None, :]
        k = tl.load(k_ptr + there, mask=key[:, None] < n, other=0.0)
        v = tl.load(v_ptr + there, mask=key[:, None] < n, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(key[None, :] <= row[:, None], scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, 1))
        shrink = tl.exp(m - m_new)
        weights = tl.exp(scores - m_new[:, None])
        l = l * shrink + tl.sum(weights, 1)
        out = out * shrink[:, None] + tl.dot(weights, v, input_precision="ieee")
        m = m_new
        visit = (head * tl.num_programs(0) + tile) * tl.cdiv(n, KEYS) + start // KEYS
        tl.store(visits_ptr + visit, start // KEYS + 1)
    tl.store(out_ptr + place, out / l[:, None], mask=row[:, None] < n)


# %% [markdown]
"""
| name | shape | where it is, usually |
|---|---|---|
| `q`, `k`, `v`, `out` | `[heads, n, d]` | the GPU's memory |
| `q` of a program | `[ROWS, D]` | registers, for the whole program |
| `k`, `v` of a round | `[KEYS, D]` | shared memory, for one round |
| `scores`, `weights` | `[ROWS, KEYS]` | registers, for one round |
| `m`, `l`, `out` of a program | `[ROWS]`, `[ROWS]`, `[ROWS, D]` | registers, until the end |

Nothing of size n × n is anywhere. Launch it, and hold it against the textbook:
"""


# %%
def launch(q, k, v, rows, keys):
    """Attention of q, k, v [heads, n, d], and the programs that computed it."""
    heads, n, d = q.shape
    tiles, out = triton.cdiv(n, rows), torch.empty_like(q)
    visits = torch.zeros(heads, tiles, triton.cdiv(n, keys), dtype=torch.int32, device=device)
    grid = (tiles, heads)
    attention_kernel[grid](q, k, v, out, visits, n, d**-0.5, ROWS=rows, KEYS=keys, D=d)

    def cut(index, size):
        return range(index * size, min(n, (index + 1) * size))

    programs = [
        Program(
            tile,
            head,
            cut(tile, rows),
            [cut(int(i), keys) for i in visits[head, tile].nonzero()],
        )
        for head in range(heads)
        for tile in range(tiles)
    ]
    return out, programs


q, k, v = random(3, 3, 96, 16)
out, programs = launch(q, k, v, rows=16, keys=16)
exact = naive_attention(q.transpose(0, 1), k, v, scale=16**-0.5).transpose(0, 1)
error = (out - exact).abs().max()
print(f"{len(programs)} programs, largest difference from the textbook: {error:.1e}")

# %% tags=["thumbnail"]
show(
    program_grid(programs),
    alt="Three heads side by side, each a staircase of tiles: six bands, one per program. "
    "Program 0 loops over one tile of keys, program 5 over six. No two bands overlap.",
)

# %% [markdown]
"""
A number is `program_id(0)`, a band is what that program computed: its own rows of the output, and nobody else writes them. So no program waits for another.

But they are not equally long. Under the causal rule the last band has six times the work of the first. If long programs start last, the GPU waits for them at the end with most of its
processors idle. The package's kernel therefore counts backwards: the program that starts first takes the last tile.

What would falsify it: a white tile below the diagonal, or two bands in one place.

## The package's version

`minillm/kernels/gpu/prefill.py` is this kernel with three things more: keys are found through a block table (lesson 09), the query heads of a group are rows of one
tile, so that their keys are read once, and only tiles on an edge pay for a mask. Here it is against the textbook, with grouped heads and a chunk after a longer past.
"""

# %%
BLOCK = 16
for q_len, kv_len in [(80, 80), (40, 112), (1, 96)]:
    q, pools = random(q_len, 4, 32), random(2, 2, kv_len // BLOCK, BLOCK, 32)
    metadata = AttentionMetadata.build(
        [range(kv_len // BLOCK)], [q_len], [kv_len], block_size=BLOCK, device=device
    )
    ours = BACKEND.attend(q, *pools, BACKEND.prepare(metadata, pools[0], 2), scale=32**-0.5)
    exact = naive_attention(q, *pools.flatten(2, 3), scale=32**-0.5)
    error = (ours - exact).abs().max()
    print(f"{q_len:2} queries, {kv_len:3} keys: largest difference {error:.1e}")

# %% [markdown]
"""
## Explore: higher tiles, fewer programs

Higher tiles read the keys fewer times (lesson 06). They also make fewer programs. Each frame is a launch that really took place, on the same 96 tokens.
"""

# %%
q, k, v = random(3, 3, 96, 16)
launches = {rows: launch(q, k, v, rows, keys=16)[1] for rows in (16, 32, 64, 128)}
explore(
    lambda queries_per_tile: program_grid(launches[queries_per_tile]),
    alt="The same prompt with tiles of 16, 32, 64 and 128 queries: 18, 9, 6 and 3 programs. "
    "With the highest tile a program computes the whole square of a head.",
    queries_per_tile=list(launches),
)

# %% [markdown]
"""
A large GPU has over a hundred multiprocessors (an H100 has 132, says NVIDIA's whitepaper). Three programs leave all but three of them idle, however well they read. A long prompt has tiles enough for everybody. A
decode step does not: it has **one query**.

## A decode step: split the keys

With one query per head there is one program per head, and it reads all keys alone. The way out is `merge` of lesson 06: **split the keys**, let each part have a program of its own, and join the
parts by their log-sum-exps. This is Flash-Decoding (Dao et al. 2023). One row of scores is no matrix, so there is no `tl.dot`.
"""


# %%
@triton.jit
def split_kernel(
    q_ptr, k_ptr, v_ptr, outs_ptr, lses_ptr, n, part, scale,
    KEYS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """q [heads, D], k and v [heads, n, D] -> outs [splits, heads, D], lses [splits, heads]."""
    split, head = tl.program_id(0), tl.program_id(1)
    dim = tl.arange(0, D)
    q = tl.load(q_ptr + head * D + dim)
    m, l, out = float("-inf"), 0.0, tl.zeros([D], tl.float32)
    end = tl.minimum(n, (split + 1) * part)
    for start in range(split * part, end, KEYS):
        key = start + tl.arange(0, KEYS)
        there = (head * n + key)[:, None] * D + dim[None, :]
        k = tl.load(k_ptr + there, mask=key[:, None] < end, other=0.0)
        v = tl.load(v_ptr + there, mask=key[:, None] < end, other=0.0)
        scores = tl.where(key < end, tl.sum(q[None, :] * k, 1) * scale, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, 0))
        shrink, weights = tl.exp(m - m_new), tl.exp(scores - m_new)
        l = l * shrink + tl.sum(weights, 0)
        out = out * shrink + tl.sum(weights[:, None] * v, 0)
        m = m_new
    place = split * tl.num_programs(1) + head
    tl.store(outs_ptr + place * D + dim, out / l)
    tl.store(lses_ptr + place, m + tl.log(l))


def split_decode(q, k, v, splits):
    """Outputs [splits, heads, d] and log-sum-exps [splits, heads] of equal parts."""
    heads, n, d = k.shape
    outs = torch.empty(splits, heads, d, device=device)
    lses = torch.empty(splits, heads, device=device)
    part = triton.cdiv(n, splits)
    grid = (splits, heads)
    split_kernel[grid](q, k, v, outs, lses, n, part, d**-0.5, KEYS=16, D=d)
    return outs, lses


# %%
q, (k, v) = 2 * random(2, 32), random(2, 2, 512, 32)
exact = naive_attention(q[None], k, v, scale=32**-0.5)[0]
for splits in (1, 2, 8, 32):
    outs, lses = split_decode(q, k, v, splits)
    error = (merge(outs, lses)[0] - exact).abs().max()
    print(f"{splits:2} parts, {2 * splits:2} programs: largest difference {error:.1e}")

# %% [markdown]
"""
Any number of parts gives the same output. Below are the parts of head 0 with the log-sum-exps that the kernel wrote, merged two by two. (The package's second kernel merges all parts at once; the order does not
matter.)
"""


# %%
def levels(splits, head=0):
    """The parts of one head as the kernel computed them, then merged two by two."""
    outs, lses = split_decode(q, k, v, splits)
    outs, lses, size = outs[:, head], lses[:, head], k.shape[1] // splits
    rows = []
    while True:
        cuts = [range(i * size, (i + 1) * size) for i in range(len(lses))]
        rows.append([Part(keys, float(lse)) for keys, lse in zip(cuts, lses, strict=True)])
        if len(lses) == 1:
            return rows
        pairs = [merge(outs[i : i + 2], lses[i : i + 2]) for i in range(0, len(lses), 2)]
        outs, lses = (torch.stack(both) for both in zip(*pairs, strict=True))
        size *= 2


show(
    merge_tree(levels(8)),
    alt="Eight parts of 64 keys, each with its log-sum-exp and, as a filled level, its share "
    "of the softmax. They are merged to four, two and one; shares add up to 100 per cent.",
)

# %% [markdown]
"""
A part's share is `exp(its log-sum-exp − that of the whole)`. Shares of neighbours add up when they are merged, and the last box is full. A box that is not the sum of those above it would prove the
merge wrong.

The price: each part writes its output and one more number to memory, and a second kernel reads them again. It is small as long as a part has many more keys than one.

## What was measured, and what is missing

Kernels are judged by what they reach of the machine. For a prompt that is arithmetic, for a decode step bandwidth (lesson 05). The files in `benchmarks/results/` were written by `python benchmarks/attention.py`. Each names its hardware and its
date:
"""

# %%
results = Path("../benchmarks/results")
records = [json.loads(path.read_text()) for path in sorted(results.glob("attention*.json"))]


def place(record):
    """Hardware and date of a record."""
    machine = record["hardware"]["machine"]
    return f"{machine['name']}, {machine['cores']} cores, {record['date']}"


for record in records:
    phases = sorted({row["phase"] for row in record["rows"]})
    print(f"{place(record)}: {len(record['rows'])} rows, {', '.join(phases)}")
on_gpu = [record for record in records if record["hardware"]["machine"]["device"] == "cuda"]
print("\nresults from a GPU:", len(on_gpu) or "none yet")

# %%
shown = on_gpu or records  # what a GPU wrote where there is any, else the CPU's


def longest_series(phase):
    """The record with most contexts of one phase, and these rows: nothing else differs."""
    found = {}
    for number, record in enumerate(shown):
        for row in record["rows"]:
            setting = (number, *(row.get(key) for key in ("shape", "dtype", "batch", "blocks")))
            if row["phase"] == phase:
                found.setdefault(setting, []).append(row)
    setting, rows = max(found.items(), key=lambda item: len(item[1]))
    return shown[setting[0]], rows


for phase in ("prefill", "decode"):
    record, rows = longest_series(phase)
    hardware, dtype = record["hardware"], rows[0]["dtype"]
    best = hardware["matmul_rate"][dtype] if phase == "prefill" else hardware["read_bandwidth"]
    setting = f"one layer of {rows[0]['shape']}, {dtype}, batch {rows[0].get('batch', 1)}"
    show(
        kernel_speed(rows, best, f"{place(record)}; {setting}"),
        alt=f"Recorded time and speed of {phase} attention against context, {len(rows)} "
        "contexts, with the best that this machine can do as a line.",
    )

# %% [markdown]
"""
These are CPU kernels: `tiled` and `auto` are ours, `sdpa` and `contiguous` are PyTorch's. The time of a prompt grows with the square of its length, that of a decode step in proportion to the
context. What is reached of the machine changes little. Decode attention stays far below the bandwidth of the memory: on this CPU the kernel is the limit, not the memory.

**A GPU's results are not there yet.** When somebody has run the benchmark on one, its file joins the others, and the cell above draws it instead. Until then this lesson claims nothing about a GPU's speed. If you
have one, the next cell measures on it: the package's decode kernel, one sequence, its keys and values read again and again.
"""

# %%
if HAS_GPU:
    for context in (1024, 8192, 65536):
        count = context // BLOCK
        q, pools = random(1, 32, 128).bfloat16(), random(2, 8, count, BLOCK, 128).bfloat16()
        metadata = AttentionMetadata.build(
            [range(count)], [1], [context], block_size=BLOCK, device=device
        )
        prepared = BACKEND.prepare(metadata, pools[0], 4)
        run = {"triton": partial(BACKEND.attend, q, *pools, prepared, scale=0.1)}
        seconds = interleaved(run, repeats=20, sync=torch.cuda.synchronize)["triton"].median
        rate = quantity(pools.nbytes / seconds, "B/s")
        print(f"context {context:6}: {quantity(seconds, 's')}, {rate}")
else:
    print("No GPU here. The kernels above ran in an interpreter, whose time says nothing.")

# %% [markdown]
"""
## On a napkin

An H100 has 132 multiprocessors (NVIDIA's whitepaper). One sequence decodes with 8 key/value heads; the package packs the query heads of a group into one program. What part of the multiprocessors has work without splitting? Into how
many parts should the keys be cut to have four programs for each of them, and how many keys are in a part at a context of 32,768?
"""

# %%
multiprocessors, kv_heads, context = 132, 8, 32_768
parts = triton.cdiv(4 * multiprocessors, kv_heads)
fold(
    "Answer",
    f"{kv_heads} of {multiprocessors}: **{kv_heads / multiprocessors:.0%}**. Four for each "
    f"are {4 * multiprocessors} programs, so **{parts} parts** for each head, of "
    f"{triton.cdiv(context, parts)} keys. `choose_splits` in "
    "`minillm/kernels/gpu/decode.py` does this sum, and makes no part shorter than 256 "
    f"keys. With {parts} sequences in the batch nothing has to be split.",
)

# %% [markdown]
"""
## What people say

One statement about both kernels. A bar is what was measured, a tick what the formula predicted.
"""

# %%
show_card(CLAIMS["B13"].card(Workbench()))

# %% [markdown]
"""
## Your turn

`exercises/ex07_gpu_kernels.py` · difficulty ●●●●○ · 75 minutes

You write `softmax_kernel`, `attention_kernel` with grouped heads, and `split_kernel`. Work on it with `minillm lab test ex07`, or run the cell below.

<details><summary>Hint 1: where do my pointers go?</summary>

A tensor is a row of numbers to a kernel. Element (i, j) of a `[.., n]` matrix lies at `pointer + i * n + j`. A tile of addresses is a column of row indices plus a row of column indices:
`row[:, None] * n + column[None, :]`.

</details>

<details><summary>Hint 2: right for 32 keys, wrong for 33</summary>

The last tile is only partly there. Mask the load *and* set the scores of what is not there to −∞: a key that was read as 0 has score 0, and a weight.

</details>

<details><summary>Hint 3: the last rows are NaN</summary>

Rows after the last query have no key they may see, so `l` is 0. They are never stored: the mask of `tl.store` keeps them out. If they come out, that mask is wrong.

</details>
"""

# %%
from minillm.course.lab import check

check("ex07")

# %% [markdown]
"""
## Break it

**Mutant 1: what does not exist is read as 0.** For most kernels that is harmless. In a softmax a 0 is a score like any other, and gets a weight that is missing elsewhere. With a width that is a power of two, nothing is wrong.
"""


# %%
@triton.jit
def zero_kernel(x_ptr, out_ptr, columns, WIDTH: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, WIDTH)
    numbers = tl.load(x_ptr + row * columns + column, mask=column < columns, other=0.0)
    weights = tl.exp(numbers - tl.max(numbers, 0))
    tl.store(
        out_ptr + row * columns + column, weights / tl.sum(weights, 0), mask=column < columns
    )


for columns in (4, 5, 8, 9):
    sums = softmax(random(100, columns), kernel=zero_kernel).sum(1)
    print(f"{columns} columns: rows sum to {sums.min():.2f} … {sums.max():.2f}")

# %% [markdown]
"""
**Mutant 2: parts are averaged.** It looks fair, for all parts have equally many keys. But a part's weight is its share of the softmax, not of the keys. The error is small where all keys matter alike, and large where one part holds what the query looks
for.
"""

# %%
k, v = random(2, 2, 512, 32)
for strength in (0.1, 1.0, 4.0):
    q = strength * random(2, 32)
    outs, lses = split_decode(q, k, v, splits=8)
    exact = naive_attention(q[None], k, v, scale=32**-0.5)[0]
    averaged, merged = outs.mean(0), merge(outs, lses)[0]
    errors = [(out - exact).abs().max() / exact.abs().max() for out in (averaged, merged)]
    largest = (lses[:, 0] - lses[:, 0].logsumexp(0)).exp().max()
    wrong, right = errors
    print(
        f"largest share of a part {largest:.2f}: averaged {wrong:.0%} off, merged {right:.0e}"
    )

# %% [markdown]
"""
## How others do it

* **vLLM**, `vllm/v1/attention/ops/triton_unified_attention.py`: one Triton kernel for prompts and decodes together, with a second one that joins the segments of a long context.
* **SGLang**, `python/sglang/srt/layers/attention/triton_ops/`: `extend_attention.py` for prompts, `decode_attention.py` in two stages, split and merge.
* **llama.cpp**, `ggml/src/ggml-cuda/fattn.cu` chooses: `fattn-mma-f16.cuh` on tensor cores, `fattn-vec.cuh` for few queries; `flash_attn_combine_results` in `fattn-common.cuh` merges.
* **FlashAttention**, `csrc/flash_attn/src/flash_fwd_kernel.h`: the same in CUDA, with a split version for decoding.
* **minillm**, `minillm/kernels/gpu/prefill.py`, `triton_decode.py` and the loop that both share, `triton_tiles.py`. Each has a twin in PyTorch that its tests hold it against.

## Three questions

<details><summary>1. Why are tiles of keys a loop inside a program, and tiles of queries programs?</summary>

Tiles of keys are folded into one running maximum, sum and output: each round needs the one before. Tiles of queries share nothing but what they read.

</details>

<details><summary>2. 64 sequences decode together, with 8 key/value heads. Should the keys be split on 132 multiprocessors?</summary>

There are 512 programs already, almost four for each. Splitting would add merging and win nothing.

</details>

<details><summary>3. What does the interpreter tell you about a kernel, and what not?</summary>

Whether its numbers are right, down to masks and order. Nothing of its time, of its memory, or of what a compiler does with it.

</details>

## Next

One prompt fills a GPU, one decode step does not. [08 · Batching](08_batching.ipynb) serves many at once.
"""
