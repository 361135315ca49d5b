# %% [markdown]
"""
# 09 · Paged KV cache

**Where do the bytes live?**

40 minutes · needs 03 and 08 · runs offline on a CPU

Every request keeps keys and values of all its tokens, and nobody knows beforehand how many tokens that will be. This lesson
gives memory to requests that come, grow and go; counts how much of it stands empty; and cuts it into blocks, so that
nearly none does.
"""

# %%
import random

import torch

from minillm import load_model, load_tokenizer
from minillm.attention.metadata import AttentionMetadata
from minillm.attention.paged import paged_attention, write_kv
from minillm.config import EngineConfig
from minillm.costs.formulas import kv_bytes_per_token, matmul_parameters
from minillm.course.claims import CLAIMS, Workbench
from minillm.course.figures.blocks import block_map, pool_strip
from minillm.course.figures.memory import paging_figure
from minillm.course.figures.show import explore, fold, predict, show, show_card, this_machine
from minillm.course.lessons.paging import measure_paging
from minillm.engine.engine import Engine
from minillm.measure.bench import interleaved, pair_ratio
from minillm.measure.snapshot import PoolSnapshot
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

A server keeps a cache for each conversation. A conversation may become 2,048 tokens long, so the server sets aside 2,048
places for each. Most conversations are shorter. Their lengths spread as in a well-known collection of real ones (ShareGPT).

**What part of the memory stands empty?** Write per cent in place of the dots.
"""

# %%
guess = predict("memory that holds no token, if the longest length is set aside", ..., "%")

# %% [markdown]
"""
## A toy: sixteen places

Requests come and go in a memory of 16 places. First everybody needs a run of neighbours. A dot is a free place.
"""


# %%
def place(memory, name, size):
    """Put a request into the first run of neighbours that is long enough."""
    for start in range(len(memory) - size + 1):
        if set(memory[start : start + size]) == {"."}:
            memory[start : start + size] = name * size
            return True
    return False


memory = list("................")
for name, size in (("A", 5), ("B", 4), ("C", 4)):
    place(memory, name, size)
print("A, B and C came:  ", "".join(memory))
memory = ["." if owner == "B" else owner for owner in memory]
print("B has gone:       ", "".join(memory), f"{memory.count('.')} places are free")
print("D needs 6, fits?  ", place(memory, "D", 6))

# %% [markdown]
"""
Seven places are free and six are needed, and yet D does not fit: they are no neighbours. This is *external fragmentation*.
And the toy was kind. It knew every length beforehand; an engine does not, so it would have to set aside the longest one.

Now the same memory in **blocks** of two places. A request owns a list of blocks, its **block table**. The blocks need not
be neighbours.
"""

# %%
blocks = ["."] * 8
tables = {}
for name, size in (("A", 5), ("B", 4), ("C", 4), ("-B", 0), ("D", 6)):
    if name == "-B":
        for block in tables.pop("B"):
            blocks[block] = "."
    else:
        free = [number for number, owner in enumerate(blocks) if owner == "."]
        tables[name] = free[: -(-size // 2)]  # size / 2, rounded up
        for block in tables[name]:
            blocks[block] = name
    print(f"{name:2}", " ".join(2 * owner for owner in blocks), tables)

# %% [markdown]
"""
D gets what B left and the block at the end: a table holds it together. The price is an empty place in the last block of A. That is
the only kind of waste there is, and it is less than one block for each request.

## The engine's allocator

The package's `BlockPool` does this for the engine. Five requests come at different steps to a pool of 24 blocks of 4 tokens.
After every step we take a snapshot of the pool and of all tables.
"""

# %%
texts = {
    "A": ("def area(width, height):\n    return", 10, 0),  # prompt, new tokens, arrives at step
    "B": ("class Stack:\n    def __init__(self):\n", 24, 0),
    "C": ("import os\nimport sys\n\ndef main(", 14, 2),
    "D": ("for i in range(10):\n    print(i)\n\nwhile", 20, 13),
    "E": ("try:\n    value = int(text)\nexcept", 12, 17),
}
engine = Engine(model, EngineConfig(num_blocks=25, block_size=4, enable_prefix_caching=False))


def snapshot(engine):
    """The pool, and of each running request its table and the tokens whose KV lies there."""
    running = engine.scheduler.running
    holders = {s.request_id: (s.table, s.tokens[: s.num_computed]) for s in running}
    return PoolSnapshot.take(engine.pool, holders)


frames, written, step = [], {name: [] for name in texts}, 0
while step == 0 or engine.has_unfinished:
    for name, (text, new, arrival) in texts.items():
        if arrival == step:
            params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
            engine.add(tokenizer.encode(text), params, request_id=name)
    for event in engine.step():
        written[event.request.request_id] += event.token_ids
    frames.append(snapshot(engine))
    step += 1
print(f"{len(frames)} steps. Tables after step 18:")
for name, table in frames[18].tables.items():
    print(f"  {name}: {len(frames[18].tokens[name])} tokens in blocks {list(table)}")

# %% tags=["thumbnail"]
show(
    block_map(frames[18]),
    alt="Three tables of blocks in a row, and below them the pool of 24 blocks. Lines lead "
    "from each logical block to its physical one; the lines of different requests cross. Only "
    "last blocks are partly filled.",
)

# %% [markdown]
"""
Above, each request as it sees itself: block after block. The number in a block is its place in the pool below. A block is coloured
as far as it holds tokens, so white is waste. Follow the lines of one request: its blocks are wherever others had gone.

What would falsify the title: a request that cannot be placed although enough blocks are free.
"""

# %%
changes = [0] + [
    i for i in range(1, len(frames)) if set(frames[i].tables) != set(frames[i - 1].tables)
][:5]
captions = []
for before, now in zip([None, *changes], changes, strict=False):
    old = set(frames[before].tables) if before is not None else set()
    come, gone = set(frames[now].tables) - old, old - set(frames[now].tables)
    words = [f"{' and '.join(sorted(come))} come{'s' * (len(come) == 1)}"] * bool(come)
    words += [f"{' and '.join(sorted(gone))} gone"] * bool(gone)
    captions.append(f"step {now}: {', '.join(words)}")
show(
    pool_strip([frames[i] for i in changes], captions),
    alt="The pool of 24 blocks when requests came or went, a row for each step. Letters "
    "show who owns a block. Blocks of requests that have gone are taken by those that come.",
)

# %% [markdown]
"""
Time runs downwards. Follow one column: a block belongs to one request, is free, belongs to another. Follow one letter: once given, a
block keeps its place until its request ends. Nothing is ever moved to make room.

## From a position to a place

A *slot* is the place of one token: `slot = table[position // B] · B + position % B`, for blocks of `B` tokens. That is all
the arithmetic there is. The real tensors:
"""

# %%
cache = engine.runner.cache
print(f"keys of one layer {[*cache.keys[0].shape]}: KV heads, blocks, places, numbers")
num_bytes = sum(pool.nbytes for pool in cache.tensors)
print(f"{len(cache.keys)} layers, values the same: {num_bytes / 1e6:.1f} MB in all")
print("block 0 is nobody's: padding is written there, so no kernel needs a special case")

now, size = frames[18], 4
name = next(iter(now.tables))
print(f"\n{name}: table {list(now.tables[name])}")
for position in (0, 3, 4, 9):
    slot = now.tables[name][position // size] * size + position % size
    print(f"  position {position} -> block {slot // size}, slot {slot}")

# %% [markdown]
"""
## Attention through a table

Reading is the same arithmetic: look up the slots, gather keys and values, attend as always. Here it is, and the package's
version beside it, on random tensors with a table in no order at all.
"""

# %%
generator = torch.Generator().manual_seed(0)
heads, kv_heads, head_dim, num_blocks, size = 4, 2, 64, 10, 4
table, length = [7, 2, 9, 4], 14
k_pool, v_pool = (torch.zeros(kv_heads, num_blocks, size, head_dim) for _ in range(2))
k, v = (torch.randn(length, kv_heads, head_dim, generator=generator) for _ in range(2))
query = torch.randn(1, heads, head_dim, generator=generator)

write_kv(
    k, v, k_pool, v_pool, AttentionMetadata.build([table], [length], [length], block_size=size)
)


def read_attention(query, k_pool, v_pool, table, length):
    """The newest token's attention over all tokens of its request: [heads, head_dim]."""
    size = k_pool.shape[2]
    slots = [table[p // size] * size + p % size for p in range(length)]
    keys, values = k_pool.flatten(1, 2)[:, slots], v_pool.flatten(1, 2)[:, slots]
    grouped = query.view(len(keys), -1, query.shape[-1])  # query heads share KV heads
    weights = torch.softmax(grouped @ keys.transpose(1, 2) * head_dim**-0.5, dim=-1)
    return (weights @ values).view(-1, head_dim)


metadata = AttentionMetadata.build([table], [1], [length], block_size=size)
ours = read_attention(query[0], k_pool, v_pool, table, length)
theirs = paged_attention(query, k_pool, v_pool, metadata, scale=head_dim**-0.5)[0]
print(f"largest difference: {(ours - theirs).abs().max():.1e}")

# %% [markdown]
"""
And the text that comes out does not depend on where the bytes lie. The same requests with blocks of 1, 16 and 256 tokens:
"""

# %%
for size in (1, 16, 256):
    other = Engine(model, EngineConfig(cache_bytes=2**24, block_size=size))
    tokens = {name: [] for name in texts}
    for name, (text, new, _) in texts.items():
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        other.add(tokenizer.encode(text), params, request_id=name)
    for event in other.run():
        tokens[event.request.request_id] += event.token_ids
    print(f"blocks of {size:3}: the same tokens as above: {tokens == written}")

# %% [markdown]
"""
## Measure: what stands empty

256 conversations with ShareGPT's mean lengths (synthetic: drawn from a distribution, see `minillm.measure.workloads`). For each block size
the engine's own allocator gives every conversation its blocks, and we count empty places. The formula: a last block is half
empty on average, `(B - 1) / 2` places, if lengths end anywhere.

A cache without blocks needs no code of its own. It is the same thing with **one block as long as the longest conversation
may become**: 2,048 places here.
"""

# %%
requests = Workload("sharegpt-like", num_prompts=256).requests(config.vocab_size)
lengths = [len(request.prompt) + request.max_tokens for request in requests]
sizes = [2**power for power in range(12)]
rows = [measure_paging(lengths, size, num_places=2**16) for size in sizes]
print("block   empty places per conversation   of all places   conversations in")
print(" size       counted         formula        empty           65,536 places")
for row in rows:
    print(
        f"{row.block_size:5} {row.waste:13.1f} {row.waste_predicted:15.1f} "
        f"{100 * row.waste_share:12.1f} % {row.num_fit:15}"
    )

# %%
show(
    paging_figure(rows),
    alt="Left: empty places per request against block size, on the line (B - 1) / 2 from 0 "
    f"to {rows[-1].waste:.0f}. Right: requests that fit in 65,536 places, "
    f"{rows[4].num_fit} with blocks of 16 and {rows[-1].num_fit} with one block each.",
)

# %% [markdown]
"""
Left: points on the line, until a block is as long as a conversation. There lengths no longer end *anywhere* in a block, the formula's condition
fails, and the points leave the line. Right: what it buys. The same memory serves several times as many at once, and lesson
08 showed what that is worth.

The people who had this idea measured the systems of their time: between 20.4 % and 38.2 % of the KV memory held tokens (Kwon et al.
2023, figure 2).
"""

# %%
guess.against(100 * rows[-1].waste_share)

# %% [markdown]
"""
## Why not blocks of one token?

They waste nothing. But a table has an entry per block, and gathering many small pieces is slower than reading a few large ones. One
layer's decode attention for 8 requests of 2,048 tokens, blocks shuffled over the pool, against the same tokens lying side by side:
"""

# %%
context, batch = 2048, 8
q = torch.randn(batch, config.num_heads, config.head_dim)


def one_layer(size, shuffled):
    """A call of attention over blocks of this size, in order or not."""
    needed = context // size
    numbers = list(range(1, 1 + batch * needed))
    if shuffled:
        random.Random(0).shuffle(numbers)
    tables = [numbers[i * needed : (i + 1) * needed] for i in range(batch)]
    shape = (config.num_kv_heads, 1 + batch * needed, size, config.head_dim)
    keys, values = torch.randn(shape), torch.randn(shape)
    metadata = AttentionMetadata.build(tables, [1] * batch, [context] * batch, block_size=size)
    return lambda: paged_attention(q, keys, values, metadata, scale=config.head_dim**-0.5)


runs = {"side by side": one_layer(context, shuffled=False)}
runs |= {f"blocks of {size}": one_layer(size, shuffled=True) for size in (1, 16, 256)}
times = interleaved(runs, repeats=15, warmup=3)
print(this_machine())
for name in list(runs)[1:]:
    low, middle, high = pair_ratio(times[name], times["side by side"])
    print(f"{name:13}: {middle:.2f} times the time ({low:.2f} to {high:.2f})")

# %% [markdown]
"""
Read these as ratios of this machine, with their spread. The paper measured its first GPU kernel to be 20 to 26 % slower than
one without blocks. **Paging makes no kernel faster. It makes room, and room makes batches.** Blocks of 16 are the usual compromise.

## Explore: the pool step by step

The same run as above. Move the slider through its steps.
"""

# %%
busy = [number for number, frame in enumerate(frames) if frame.tables]
explore(
    lambda step: block_map(frames[step]),
    alt="The tables and the pool after several steps of the run: requests come, grow block by "
    "block, and leave; their blocks are taken by others.",
    step=busy,
)

# %% [markdown]
"""
## On a napkin

A GPU of 141 GB runs Llama 3.1 8B in bf16 (16 GB of weights, 128 KiB of KV per token: lesson 03). Conversations are as long as those above, on
average; one may become 8,192 tokens long. How many fit at once if the longest length is set aside? How many with blocks of 16?
"""

# %%
llama = named_shape("llama-3.1-8b")
room = 141e9 - 2 * matmul_parameters(llama)
places = room / kv_bytes_per_token(llama, 2)
mean = sum(lengths) / len(lengths)
reserved, paged = places / 8192, places / (mean + 7.5)
fold(
    "Answer",
    f"{room / 1e9:.0f} GB are left, {places / 1e3:,.0f} thousand places. Set aside: "
    f"{places / 1e3:,.0f}k / 8,192 = **{reserved:.0f}** conversations. In blocks: a conversation "
    f"of {mean:.0f} tokens holds {mean + 7.5:.0f} places on average, so **{paged:,.0f}** fit: "
    f"{paged / reserved:.0f} times as many.",
)

# %% [markdown]
"""
## What people say

Lists of optimisations file paging under bandwidth. The card tries that claim three ways.
"""

# %%
bench = Workbench()
show_card(CLAIMS["A22"].card(bench))

# %% [markdown]
"""
## Your turn

`exercises/ex09_paged_kv.py` · difficulty ●●●○○ · 50 minutes

You write the pool, `blocks_to_add`, `slot_mapping`, `write_kv` and `paged_decode_attention`. Work on it with
`minillm lab test ex09`, or run the cell below.

<details><summary>Hint 1: when does a request need a new block?</summary>

When it has more tokens than its blocks have places: `tokens / B`, rounded *up*, less the blocks that it has. The token that
exactly fills a block needs no new one.

</details>

<details><summary>Hint 2: my attention is right for the first block only</summary>

Position `p` lies in the table's entry `p // B`, and that entry is a number of a block, not of a slot. Multiply by `B`, then add
`p % B`.

</details>

<details><summary>Hint 3: my output changes from run to run</summary>

You read places after the last token. They hold what somebody else left there. Cut at the length, not at the end of the block.

</details>
"""

# %%
from minillm.course.lab import check

check("ex09")

# %% [markdown]
"""
## Break it

**Mutant 1: a block is given to two requests**, as happens when it is given back twice. Two prompts are written at the same time, once with tables of
their own, once with one block in common.
"""


# %%
@torch.inference_mode()
def write_two(tables, prompts, new=16):
    """Greedy tokens of two requests, computed by the model through these tables."""
    cache = Engine(model, EngineConfig(num_blocks=12, block_size=8)).runner.cache
    texts, starts = [list(prompt) for prompt in prompts], [0, 0]
    for _ in range(new):
        spans = [range(start, len(text)) for start, text in zip(starts, texts, strict=True)]
        metadata = AttentionMetadata.build(
            tables, [len(span) for span in spans], [len(text) for text in texts], block_size=8
        )
        tokens = [text[p] for text, span in zip(texts, spans, strict=True) for p in span]
        positions = [p for span in spans for p in span]
        hidden = model(torch.tensor(tokens), torch.tensor(positions), cache.attend(metadata))
        starts = [len(text) for text in texts]
        for text, row in zip(texts, metadata.cu_seqlens_q[1:].tolist(), strict=True):
            text.append(int(model.logits(hidden[row - 1 : row]).argmax()))
    return [tokenizer.decode(text[-new:]) for text in texts]


prompts = [tokenizer.encode(texts[name][0]) for name in "AB"]
right = write_two([[1, 3, 5, 7], [2, 4, 6, 8]], prompts)
wrong = write_two([[1, 3, 5, 7], [2, 3, 6, 8]], prompts)
for name, good, bad in zip("AB", right, wrong, strict=True):
    print(f"{name} right: {good!r}\n  wrong: {bad!r}")

# %% [markdown]
"""
Nothing raises: every slot exists, every shape fits. One request reads the other's keys and goes on from a text that is not its
own. This is why blocks are counted, and why the engine's tests recompute all counts after every step.

**Mutant 2: read to the end of the last block.** The empty places hold zeros in a new cache, and what the last owner left in a used one.
"""

# %%
rounded_up = len(table) * k_pool.shape[2]
outputs = []
for leftover in (0.0, 1.0, -1.0):
    used_keys, used_values = k_pool.clone(), v_pool.clone()
    used_keys[:, 4, 2:] = leftover  # the two places after the last token, in block 4
    used_values[:, 4, 2:] = leftover
    right = read_attention(query[0], used_keys, used_values, table, length)
    wrong = read_attention(query[0], used_keys, used_values, table, rounded_up)
    outputs.append((float(right[0, 0]), float(wrong[0, 0])))
    print(f"leftover {leftover:4}: right {outputs[-1][0]:.4f}, mutant {outputs[-1][1]:.4f}")

# %% [markdown]
"""
The right output never moves; the mutant's depends on who had the block before. In a test with a fresh cache the error is small. In
a server a user's text depends on a stranger's, and never twice in the same way. So tests fill empty places with NaN.

## How others do it

* **vLLM**, `vllm/v1/core/block_pool.py` and `kv_cache_manager.py`: pool and tables on the host; `vllm/v1/worker/block_table.py` carries the
  tables to the GPU and computes slots. Blocks of 16 tokens by default on most devices.
* **SGLang**, `python/sglang/srt/mem_cache/memory_pool.py` and `allocator.py`: a table per request with an entry per *token*; pages of one token
  by default, larger ones where a kernel wants them.
* **llama.cpp**, `src/llama-kv-cache.cpp`: no blocks. Cells of one token in one memory; each knows its position and its sequences, and a mask hides the
  others'.
* **nano-vllm**, `nanovllm/engine/block_manager.py`: the idea on a page, with blocks of 256.
* **minillm**, `minillm/cache/blocks.py` (books, no tensors), `minillm/cache/paged.py` (tensors, no books), `minillm/attention/paged.py`.

## Three questions

<details><summary>1. Does paging make attention of one request faster?</summary>

No. It reads the same bytes, through one more look-up. It makes room for more requests in a batch.

</details>

<details><summary>2. Blocks of 16: what does a request of 33 tokens hold, and what is wasted?</summary>

Three blocks, 48 places. 15 are empty.

</details>

<details><summary>3. Why is a cache without blocks the same as one with very large blocks?</summary>

Because it sets aside the same for everybody. One block as long as the longest request is exactly that, so the same allocator counts both.

</details>

## Next

A table can point to any block. So two tables can point to the same one. [10 · Prefix caching](10_prefix_caching.ipynb)
"""
