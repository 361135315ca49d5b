# %% [markdown]
"""
# 10 · Prefix caching

**Why compute a shared prompt twice?**

40 minutes · needs 03 and 09 · runs offline on a CPU

Thousands of requests begin with the same instructions, and every turn of a conversation begins with all turns before it. Their
keys and values are in the cache already, in blocks. This lesson gives blocks names, so that they are found again; lets several
requests hold one block; and measures what that saves, and when it saves nothing.
"""

# %%
import random

from minillm import load_model, load_tokenizer
from minillm.cache import blocks
from minillm.config import EngineConfig
from minillm.costs.formulas import kv_bytes_per_token, step_flops
from minillm.course.claims import CLAIMS, Workbench
from minillm.course.figures.curves import curves, prefill_curve
from minillm.course.figures.prefix import hit_figure, prefix_trees
from minillm.course.figures.show import explore, fold, predict, show, show_card, this_machine
from minillm.engine.engine import Engine
from minillm.measure.bench_prefix import bench_prefix
from minillm.measure.bench_serve import serve
from minillm.measure.snapshot import PoolSnapshot
from minillm.measure.units import quantity
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

A prompt has 512 tokens. The first 384 of them, three quarters, were served before and are still in the cache.

**How long does it take until the first new token, in per cent of the time without the cache?** That time is the TTFT, the time to first
token.
"""

# %%
guess = predict("TTFT with three quarters of the prompt known, over TTFT with none", ..., "%")

# %% [markdown]
"""
## A toy: names for blocks

The keys and values at a position depend on *all* tokens up to it, not only on the token itself. So two blocks with the same tokens may be shared only if
everything before them is the same, too. The trick: the name of a block is a hash of its tokens **and of the name of the block before it**.
"""


# %%
def names_of(tokens, size=2):
    """A name for each full block, chained to the one before."""
    names, parent = [], "start"
    for end in range(size, len(tokens) + 1, size):
        parent = hash((parent, tuple(tokens[end - size : end])))
        names.append(parent)
    return names


known = {}
for text in ("ab cd ef", "ab cd xy", "zz cd ef"):
    names = names_of(list(text.replace(" ", "")))
    found = [name in known for name in names]
    known |= dict.fromkeys(names)
    print(text, "known:", found)

# %% [markdown]
"""
The second text shares two blocks with the first. The third has the block `cd` and the block `ef`, and neither is known: they stand after `zz`. A
look-up walks from the beginning and ends at the first unknown name.

## The tree that the engine keeps

Three requests with a common beginning arrive one after the other at the package's engine, with blocks of 8 tokens. A snapshot after some steps shows
which blocks there are and how many requests hold each: its **reference count**.
"""


# %%
def snapshot(engine):
    """The pool, and of each running request its table and the tokens whose KV lies there."""
    holders = {}
    for s in engine.scheduler.running:
        name = s.request_id if s.params.n == 1 else f"{s.request_id}{s.index}"
        holders[name] = s.table, s.tokens[: s.num_computed]
    return PoolSnapshot.take(engine.pool, holders)


beginning = "import torch\nfrom torch import nn\n\nclass Block(nn.Module):\n"
endings = {
    "A": "    def forward(self, x):\n",
    "B": "    def __init__(self):\n",
    "C": "    pass\n",
}
new_tokens = {"A": 6, "B": 14, "C": 10}
engine = Engine(model, EngineConfig(num_blocks=64, block_size=8))
frames, cached, written = [], {}, {}
for step in range(20):
    name = "ABC"[step // 2] if step in (0, 2, 4) else ""
    if name:
        params = SamplingParams(temperature=0, max_tokens=new_tokens[name], ignore_eos=True)
        engine.add(tokenizer.encode(beginning + endings[name]), params, request_id=name)
    for event in engine.step():
        written.setdefault(event.request.request_id, []).extend(event.token_ids)
        cached[event.request.request_id] = event.request.num_cached
    frames.append(snapshot(engine))
for name, ending in endings.items():
    prompt = len(tokenizer.encode(beginning + ending))
    print(
        f"{name}: {prompt} prompt tokens, {cached[name]} found, {prompt - cached[name]} computed"
    )

# %% tags=["thumbnail"]
moments = {0: "A is read", 4: "B and C have come", 16: "all have ended"}
show(
    prefix_trees([frames[i] for i in moments], list(moments.values()), tokenizer.decode),
    alt="Trees of blocks at three moments. First a chain of blocks held by A. Then the first "
    "blocks are held by three requests and the tree branches after them. At the end nobody "
    "holds a block, and the tree is still remembered.",
)

# %% [markdown]
"""
A box is a block: the beginning of its text, its number in the pool, and how many tables hold it. Dots are blocks that several hold. They were computed once.

The last tree is the surprising one. All requests have ended, all counts are zero, every block is **free**, and still the engine knows what is in it. A free
block is remembered until somebody needs its memory. What would falsify the figure: other text with the cache than without.
"""

# %%
plain = Engine(model, EngineConfig(num_blocks=64, block_size=8, enable_prefix_caching=False))
alone = {}
for name, ending in endings.items():
    params = SamplingParams(temperature=0, max_tokens=new_tokens[name], ignore_eos=True)
    plain.add(tokenizer.encode(beginning + ending), params, request_id=name)
for event in plain.run():
    alone.setdefault(event.request.request_id, []).extend(event.token_ids)
print("the same tokens without a prefix cache:", alone == written)

# %% [markdown]
"""
## One prompt, three continuations

A request may ask for several completions (`n=3`). The prompt is computed once, then the request is *forked*: three tables, the same blocks, the
half-filled last one included. Each is about to write its own token into that block.
"""

# %%
engine = Engine(model, EngineConfig(num_blocks=64, block_size=8))
params = SamplingParams(temperature=1, max_tokens=6, n=3, seed=1, ignore_eos=True)
engine.add(tokenizer.encode("def area(width, height):\n    return"), params, request_id="A")
forked, copies = [], []
for _ in range(4):
    engine.step()
    forked.append(snapshot(engine))
    copies.append(engine.trace[-1].num_copies)
print("blocks copied in each step:", copies)
show(
    prefix_trees(
        forked[:2],
        ["the prompt was read once, for three", "each has written a token of its own"],
        tokenizer.decode,
    ),
    alt="Two trees. First both blocks of the prompt are held by three completions. A step later "
    "the first is still held by three, and the second has become three blocks: two are copies.",
)

# %% [markdown]
"""
This is **copy-on-write**: whoever writes into a block that others hold gets a copy first. The first two copy. For the third there is nothing to copy: nobody
else holds the block any more. Full blocks are never written again, so they are never copied.

## The rules, and the package's version

| a block is … | if … |
|---|---|
| held | at least one table points to it: its reference count is above 0 |
| free | the count is 0. Nothing else frees a block |
| known | it is full, computed, and has a name |
| evicted | it is free and known, its memory is needed, and it was unused for longest |
| writable | one table holds it, and it is not known |

The toy's names and the package's `BlockPool`, on random texts over two letters, so that many beginnings meet:
"""

# %%
rng = random.Random(0)
pool, known, agreed = blocks.BlockPool(2000, 4), set(), 0
for _ in range(200):
    tokens = [rng.randrange(2) for _ in range(rng.randint(1, 24))]
    names = names_of([*map(str, tokens)], size=4)
    hits = next((i for i, name in enumerate(names) if name not in known), len(names))
    table, num_cached = pool.open(tokens, pool.lookup(tokens))
    agreed += num_cached == min(4 * hits, len(tokens) - 1)
    pool.prepare(table, num_cached, len(tokens))
    pool.commit(table, tokens, len(tokens))
    pool.release(table)
    known |= set(names)
print(f"texts for which both find the same number of tokens: {agreed} of 200")

# %% [markdown]
"""
Why `len(tokens) - 1`? A prompt that is known entirely still costs one token: somebody has to run the model on the last one, because its logits are wanted. (The toy
trusts its hash. If two names ever met by chance, it would find too much. So a real cache compares tokens as well, or takes a very long hash.)

## Measure: TTFT against the share that is found

What is found is not computed. If time went with tokens, TTFT would fall like `(N - hit) / N`. Prompts of 512 random tokens, of which more and more were served before, in turns:
"""

# %%
engine = Engine(model, EngineConfig(num_blocks=1200, max_num_batched_tokens=1024))
rows = bench_prefix(engine, prompt=512, shares=(0.0, 0.25, 0.5, 0.75, 1.0), repeats=5)
print(this_machine())
print("found   computed   FLOPs left   TTFT left")
full = step_flops(config, [(512, 512)]).total
for row in rows:
    left = row.num_prompt - row.num_cached
    flops = step_flops(config, [(left, row.num_prompt)]).total / full
    time = row.share_of_time(rows[0]).median
    print(f"{row.num_cached:5} {left:10} {100 * flops:10.1f} % {100 * time:9.1f} %")

# %%
show(
    hit_figure(rows),
    alt="TTFT as a share of that of an unknown prompt, against the share of the prompt that was "
    "found: points near the falling line (N - hit) / N. The last point stays above zero.",
)

# %% [markdown]
"""
Points on the line: a hit saves what its tokens would have cost. Two things keep them above it. The last point computes a single token, and a step has costs that do not depend
on tokens: all weights are read. And the tokens that are left attend to *everything* before them, found or not, so their share of the FLOPs is a little more than their
share of the tokens (see the column above).
"""

# %%
three_quarters = rows[3].share_of_time(rows[0]).median
guess.against(100 * three_quarters)

# %% [markdown]
"""
## When it saves nothing

A cache forgets. Nine groups of requests, each group with a beginning of 64 tokens of its own, in random order. The pool gets smaller and smaller. How much is still found?
"""

# %%
workload = Workload(
    "shared-prefix", num_prompts=36, num_groups=9, prefix_len=64, input_len=16, output_len=2
)
requests = workload.requests(config.vocab_size)
capacities, rates = [8, 16, 24, 32, 40, 48, 64], []
for num_blocks in capacities:
    small = Engine(model, EngineConfig(num_blocks=1 + num_blocks, max_num_seqs=1))
    served = serve(small, requests).served
    rates.append(sum(s.num_cached for s in served) / sum(len(s.request.prompt) for s in served))
best = (36 - 9) * 64 / sum(len(request.prompt) for request in requests)
print(f"at best: all but the first of each group find 64 tokens, {100 * best:.0f} %")

# %%
show(
    curves(
        f"A pool of {capacities[0]} blocks finds {100 * rates[0]:.0f} %, one of {capacities[-1]} "
        f"finds {100 * rates[-1]:.0f} %",
        [prefill_curve("found", capacities, [100 * rate for rate in rates])],
        x="blocks in the pool (the beginnings of all groups take 36)",
        y="Prompt tokens that were found",
        unit="%",
        y_scale="linear",
    ),
    alt="Prompt tokens that were found, against blocks in the pool: few with a small pool, "
    f"rising to {100 * rates[-1]:.0f} per cent when the beginnings of all groups fit.",
)

# %% [markdown]
"""
The beginnings of all groups need 9 · 64 / 16 = 36 blocks. Below that, the block that was unused for longest is given away, and often it is one that would have been wanted soon. A hit rate is a property of
**the load and the pool together**, never of the cache alone. And prompts that differ in the *first* token (a date, a name, a user's id) share nothing at all: put what varies at the end.

## Explore: the tree step by step

The run of A, B and C once more. Blocks come, are shared, are let go, stay remembered.
"""

# %%
explore(
    lambda step: prefix_trees([frames[step]], [f"after step {step}"], tokenizer.decode),
    alt="The tree of blocks after several steps: it grows by branches, counts go up and down, "
    "and what nobody holds stays in the picture.",
    step=[0, 2, 4, 6, 10, 14, 17],
)

# %% [markdown]
"""
## On a napkin

A service runs Llama 3.1 8B in bf16 with instructions of 2,000 tokens, followed by questions of 100. A hundred requests run at the same time. What does the prefix cache save: in FLOPs per
request, and in memory?
"""

# %%
llama = named_shape("llama-3.1-8b")
whole = step_flops(llama, [(2100, 2100)]).total
rest = step_flops(llama, [(100, 2100)]).total
shared = 2000 * kv_bytes_per_token(llama, 2)
fold(
    "Answer",
    f"{quantity(whole, 'FLOP')} become {quantity(rest, 'FLOP')}: **{whole / rest:.0f} times "
    f"fewer** per prompt. The instructions' KV takes {quantity(shared, 'B')}; once instead of "
    f"a hundred times saves **{quantity(99 * shared, 'B')}**, which would hold "
    f"{99 * 2000 / 2100:.0f} more requests that share nothing. FLOPs are saved in time, bytes "
    "in space.",
)

# %% [markdown]
"""
## What people say

Explanations of prefill often say that it builds the cache and so cannot use it. Two cards:
"""

# %%
bench = Workbench()
for claim in ("B7", "A11"):
    show_card(CLAIMS[claim].card(bench))

# %% [markdown]
"""
## Your turn

`exercises/ex10_prefix_caching.py` · difficulty ●●●○○ · 60 minutes

You write `hash_blocks`, `longest_match`, the `FreeQueue` that decides what is forgotten, and `SharedBlocks` with copy-on-write. Work on it with `minillm lab test ex10`, or run the cell below.

<details><summary>Hint 1: my names are equal where they should not be</summary>

The parent's name belongs into the hash. And the first block has a parent, too: the salt, so that two users with different salts share nothing.

</details>

<details><summary>Hint 2: a prompt that is known entirely makes my engine fail</summary>

Somebody must compute the last token. Found is at most `num_tokens - 1`, even if all blocks match.

</details>

<details><summary>Hint 3: when do I copy?</summary>

When you write into a block whose count is above 1: take a new block, copy, lower the old count by one, and put the new number into *your* table. If the count is 1, write.

</details>
"""

# %%
from minillm.course.lab import check

check("ex10")

# %% [markdown]
"""
## Break it

**Mutant 1: names without parents.** Blocks are named by their own tokens alone. Three prompts of two blocks each: *A S*, then *B Q*, then *B S*. The third finds *B*, rightly, and then *S*, whose keys were computed
after *A*.
"""


# %%
class Orphan(blocks.Prefix):
    """A name that forgets what came before."""

    def __hash__(self):
        return hash(self.tokens)

    def __eq__(self, other):
        return self.tokens == other.tokens


pieces = {  # eight tokens each: two blocks make a prompt
    "A": "class Dog:\n    def bark(self):",
    "B": "def add(first, second):\n    total",
    "S": "    return total\n\ndef sub(first",
    "Q": "    print(first + second * 2)",
}


def third_text(name_class):
    """What the engine writes after B S, and how many tokens it found there."""
    right, blocks.Prefix = blocks.Prefix, name_class
    try:
        engine = Engine(model, EngineConfig(num_blocks=64, block_size=8))
        for pair in ("AS", "BQ", "BS"):
            prompt = [token for name in pair for token in tokenizer.encode(pieces[name])[:8]]
            engine.add(prompt, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
            written = []
            for event in engine.run():
                written += event.token_ids
        return tokenizer.decode(written), event.request.num_cached
    finally:
        blocks.Prefix = right


print("right:  {!r}, {} tokens found".format(*third_text(blocks.Prefix)))
print("mutant: {!r}, {} tokens found".format(*third_text(Orphan)))

# %% [markdown]
"""
More hits, lower latency, wrong answers: the dashboard looks better than before. Only a comparison of texts finds it.

**Mutant 2: share, and forget to copy.** The plan says which blocks to copy; this engine ignores it. One prompt, three completions.
"""

# %%
prompt = tokenizer.encode("def area(width, height):\n    return")


def complete(forget):
    """Three completions; with `forget`, planned copies are not made."""
    engine = Engine(model, EngineConfig(num_blocks=64, block_size=8))
    if forget:
        engine.runner.cache.copy = lambda copies: None
    params = SamplingParams(temperature=1, max_tokens=8, n=3, seed=3, ignore_eos=True)
    engine.add(prompt, params)
    tokens = [[], [], []]
    for event in engine.run():
        tokens[event.request.index] += event.token_ids
    return [tokenizer.decode(completion) for completion in tokens]


for right, wrong in zip(complete(False), complete(True), strict=True):
    print(f"right {right!r:40} mutant {wrong!r}")

# %% [markdown]
"""
The last completion is right, since it kept the block; the others read zeros where the end of the prompt should be, from their second token on. With one completion per request, as in most tests, nothing is wrong at all.

## How others do it

* **vLLM**, `vllm/v1/core/block_pool.py` and `kv_cache_utils.py`: `hash_block_tokens` chains a hash as here; free blocks stand in a queue in the order in which they are evicted. On by default.
* **SGLang**, `python/sglang/srt/mem_cache/radix_cache.py`: a real tree over tokens (RadixAttention), whose edges hold texts of any length; it evicts leaves.
* **llama.cpp**, `tools/server/`: a slot keeps the cache of its last prompt, and a new prompt goes to the slot that shares the longest beginning with it.
* **nano-vllm**, `nanovllm/engine/block_manager.py`: the chain of hashes in a dozen lines.
* **minillm**, `minillm/cache/blocks.py`: `Prefix` is the chain, `open` the look-up, `commit` the naming, `prepare` the copying.

## Three questions

<details><summary>1. Two prompts have the same second block and different first ones. Do they share it?</summary>

No. The keys in it depend on the first block. Its name does, too.

</details>

<details><summary>2. All requests have ended. How many blocks are free, and how many hits can the next prompt have?</summary>

All are free. As many as before: free blocks are remembered until their memory is needed.

</details>

<details><summary>3. A cache finds 100 % of a prompt. Why is its TTFT not zero?</summary>

The last token is computed in any case, which reads all weights once, and attends to everything before it.

</details>

## Next

What is not found has to be computed, and a long prompt keeps everybody waiting. [11 · Chunked prefill](11_chunked_prefill.ipynb)
"""
