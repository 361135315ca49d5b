# %% [markdown]
"""
# 03 · The KV cache

**What would be computed again and again?**

35 minutes · needs 01 and 02 · runs offline on a CPU

A language model writes one token at a time, and every new token looks back at all tokens before it. This lesson finds
out how much of that looking back is repeated work, keeps what need not be repeated, and counts what the keeping costs.
"""

# %%
from dataclasses import replace

import torch

from minillm import decode, load_model, load_tokenizer, prefill
from minillm.attention.tiled import attention
from minillm.costs.formulas import kv_bytes_per_token, step_flops
from minillm.costs.steps import decode_step, prefill_step
from minillm.course.claims import CLAIMS, Workbench
from minillm.course.figures import style
from minillm.course.figures.curves import Curve, curves, decode_curve, prefill_curve
from minillm.course.figures.recompute import cache_figure, recompute_triangle
from minillm.course.figures.show import explore, fold, predict, show, show_card, this_machine
from minillm.generate import extend
from minillm.measure.bench import interleaved
from minillm.measure.counters import Counter
from minillm.measure.stepper import StepRunner, weightless
from minillm.measure.units import quantity
from minillm.shapes import named_shape

model = load_model("tiny", device="cpu", dtype="float32", progress=False)
tokenizer = load_tokenizer("tiny")
config = model.config
print(this_machine())

# %% [markdown]
"""
## Predict

A text has 256 tokens, and the model writes the next one. Without a cache this step runs the model on all of them. With a cache
it runs the model on the newest one.

**How many times the FLOPs does the step cost without a cache?** Write your number in place of the dots.
"""

# %%
guess = predict("FLOPs of a step at 256 tokens, without a cache over with one", ..., "×")

# %% [markdown]
"""
## A toy: what changes when a token is added?

One attention layer, four tokens, two numbers per vector. Each token `x` has a query, a key and a value: `x` times a
matrix. We write down keys and values of three tokens, then add a fourth and write them down again.
"""

# %%
x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 1.0]])
to_query, to_key, to_value = (
    torch.eye(2),
    torch.tensor([[0.0, 1.0], [1.0, 0.0]]),
    2 * torch.eye(2),
)

for tokens in (x[:3], x):
    keys, values = tokens @ to_key, tokens @ to_value
    newest = tokens[-1] @ to_query
    output = torch.softmax(newest @ keys.T / 2**0.5, dim=-1) @ values
    print(f"{len(tokens)} tokens: keys {keys.int().tolist()}, values {values.int().tolist()}")
    print(f"  query {newest.int().tolist()} makes the output {output.numpy().round(2)}")

# %% [markdown]
"""
Two things to see. **The old keys and values did not change**: a token's key depends on that token and on those before it, never on
what comes later. And **only the newest query is used**: the outputs of older tokens have served their purpose.

So a step needs the keys and values of all tokens, and the query of one. The keys and values that are kept are the *KV cache*.
Nobody keeps queries.

## The real model, without a cache and with one

The embedded model completes a line of code twice. A hook on the model writes down at which positions it computes in each pass.
First without a cache: every new token is a prefill of everything before it.
"""

# %%
prompt = tokenizer.encode("def area(width, height):\n    return")
passes = []
hook = model.register_forward_pre_hook(lambda _, inputs: passes.append(inputs[1].tolist()))

written = list(prompt)
for _ in range(8):
    logits, _ = prefill(model, written)  # from the first token on, every time
    written.append(int(logits.argmax()))
without_cache = list(passes)

# %% [markdown]
"""
Now with the cache that `prefill` gives back: each step is one `decode`. A copy of the keys is put aside after each step, for
later.
"""

# %%
passes.clear()
logits, cache = prefill(model, prompt)
again, kept = [*prompt, int(logits.argmax())], [(cache.num_tokens, cache.keys.clone())]
while len(again) < len(written):
    logits = decode(model, again[-1], cache)  # one token in
    again.append(int(logits.argmax()))
    kept.append((cache.num_tokens, cache.keys.clone()))
with_cache = list(passes)
hook.remove()

print(repr(tokenizer.decode(written)))
print("the same tokens both times:", again == written)

# %% tags=["thumbnail"]
texts = [tokenizer.decode([token]) for token in written[:-1]]
show(
    recompute_triangle({"No cache": without_cache, "KV cache": with_cache}, texts),
    alt="Two triangles of cells, a row per pass and a column per token. Without a cache every "
    "pass computes all tokens again. With one, the first pass computes the prompt and each "
    "later pass one token; the rest is read.",
)

# %% [markdown]
"""
Compare a row on the left with the same row on the right: the same tokens are needed, and only the last of them is new. Where the
left has blue crosses, the right has orange strokes: **computing is replaced by reading**. The last token of the text is
missing here: it came out of the last pass, and nobody has run the model on it yet.

What would falsify the figure's title: other tokens with the cache than without, or a cross on the right.
"""

# %% [markdown]
"""
## What is in the cache

Every layer has a cache of its own, and in it every key/value head. The shapes of the real tensors:
"""

# %%
layers, kv_heads, places, head_dim = cache.keys.shape
width = cache.keys.element_size()
print(f"keys {[*cache.keys.shape]}: layers, KV heads, places, numbers. Values the same.")
print(f"{config.num_heads} query heads share {kv_heads} KV heads; queries are not kept")
stored = (cache.keys.nbytes + cache.values.nbytes) // cache.capacity
print(f"2 · {layers} · {kv_heads} · {head_dim} · {width} = {stored:,} bytes a token")
print(f"the package's formula says {kv_bytes_per_token(config, width):,}")

# %% [markdown]
"""
## The cache in a dozen lines

The decoder knows no cache. In each layer it calls `attend(layer, q, k, v)` with the new tokens' vectors and takes what
comes back. Who keeps keys and values is the business of `attend`. So here is one:
"""


# %%
class SmallCache:
    """Keys and values of one sequence: in each layer [kv_heads, tokens, head_dim]."""

    def __init__(self, num_layers):
        self.num_tokens = 0
        self.keys, self.values = [None] * num_layers, [None] * num_layers

    def attend(self, layer, q, k, v):
        k, v = k.transpose(0, 1), v.transpose(0, 1)  # heads first
        if self.num_tokens:
            k, v = torch.cat([self.keys[layer], k], 1), torch.cat([self.values[layer], v], 1)
        self.keys[layer], self.values[layer] = k, v  # write first …
        return attention(q, k, v, scale=q.shape[-1] ** -0.5)  # … then all of it is seen


# %% [markdown]
"""The package's own `ContiguousCache` and this one, on random tokens: a prefill of 40, then ten decodes."""

# %%
random_tokens = torch.randint(
    config.vocab_size, (50,), generator=torch.Generator().manual_seed(3)
)
small = SmallCache(config.num_layers)
_, ours = prefill(model, random_tokens[:40].tolist())
extend(model, random_tokens[:40], small)
largest = 0.0
for token in random_tokens[40:]:
    difference = extend(model, token[None], small) - decode(model, int(token), ours)
    largest = max(largest, float(difference.abs().max()))
print(f"largest difference of any logit in ten steps: {largest:.1e}")

# %% [markdown]
"""
Equal up to rounding: float32 has about seven digits. The package's version differs in one thing: it does not concatenate, it
writes into memory that it set aside. The mutants below show why.

## Measure: FLOPs of a step

At several lengths of a text, with every operator counted. `Counter` listens to PyTorch, so it counts what really ran. The
formula counts on paper: 2 FLOPs for each weight and token, and 4 · heads · head_dim in each layer for each pair of a query and a
key that it sees. (Random tokens will do: what is computed does not depend on which they are.)
"""

# %%
lengths = list(range(16, 257, 16))
text = torch.randint(
    config.vocab_size, (256,), generator=torch.Generator().manual_seed(4)
).tolist()
no_cache, with_cache = [], []
for length in lengths:
    with Counter(model) as count:
        prefill(model, text[:length])
    no_cache.append(count.total.flops)
    _, cache = prefill(model, text[: length - 1])
    with Counter(model) as count:
        decode(model, text[length - 1], cache)
    with_cache.append(count.total.flops)

formula_no_cache = [step_flops(config, prefill_step(length)).total for length in lengths]
formula_with_cache = [step_flops(config, decode_step(length)).total for length in lengths]
print("counted = formula, no cache:  ", no_cache == formula_no_cache)
print("counted = formula, with cache:", with_cache == formula_with_cache)

# %%
saved = no_cache[-1] / with_cache[-1]
show(
    curves(
        f"After {lengths[-1]} tokens a step without a cache costs {saved:.0f} times the FLOPs",
        [
            prefill_curve("no cache", lengths, no_cache, formula_no_cache),
            decode_curve("KV cache", lengths, with_cache, formula_with_cache),
        ],
        x="tokens so far",
        y="One step",
        unit="FLOP",
        y_scale="linear",
    ),
    alt="FLOPs of a step against tokens so far, 16 to 256. Without a cache they grow in "
    f"proportion; with one they stay near zero. At the end the ratio is {saved:.0f}.",
)

# %% [markdown]
"""
The blue points climb in proportion to the text, because all of it runs through all weights again. The amber ones are
nearly level and close to the bottom: one token runs through the weights, and only its attention sees a longer past. Points off their lines would
prove the formula wrong. They are integers and must be equal, so this is no matter of noise.
"""

# %%
guess.against(saved)

# %% [markdown]
"""
## And the time?

FLOPs are not seconds. The same two steps by the clock, turn by turn, at several lengths. The best of five turns counts,
because everything else on a machine only ever adds time.
"""

# %%
sizes = [32, 64, 128, 192, 256, 384, 512]
slow, fast = [], []
for size in sizes:
    runs = {
        "no": StepRunner(model, prefill_step(size)),
        "yes": StepRunner(model, decode_step(size)),
    }
    times = interleaved(runs, repeats=5)
    slow.append(times["no"].best)
    fast.append(times["yes"].best)

faster = slow[-1] / fast[-1]
fewer = step_flops(config, prefill_step(512)).total / step_flops(config, decode_step(512)).total
print(this_machine())
print(
    f"after 512 tokens: {quantity(slow[-1], 's')} without a cache, {quantity(fast[-1], 's')} with"
)
print(f"{faster:.0f} times the time, {fewer:.0f} times the FLOPs")

# %%
show(
    curves(
        f"On this machine: {faster:.0f} times as fast with a cache after {sizes[-1]} tokens",
        [prefill_curve("no cache", sizes, slow), decode_curve("KV cache", sizes, fast)],
        x="tokens so far",
        y="One step, best of five",
        unit="s",
        y_scale="linear",
    ),
    alt="Time of a step against tokens so far, 32 to 512, on this machine. Without a cache it "
    f"grows with the text, with one it hardly moves. At the end the ratio is {faster:.0f}.",
)

# %% [markdown]
"""
Compare the two ratios that the cell above printed. If time were FLOPs, they would be the same. A decode step computes so little
that it waits for something else. What for is the question of lesson 05.

## The price is memory

The cache trades computing for memory, and each token of each sequence takes its share:

`bytes per token = 2 (K and V) · layers · KV heads · head_dim · bytes of a number`

The number of **KV heads** is the lever. In *multi-head attention* (MHA) each query head has its own; in *grouped-query
attention* (GQA, Ainslie et al. 2023) a group shares one; in *multi-query attention* (MQA, Shazeer 2019) all share one. Llama 3.1 8B has 32 query heads
and 8 KV heads. We count what one decode step reads with 32, 8 and 1. The models have the right shape and no memory, so a
laptop counts them.
"""

# %%
llama = named_shape("llama-3.1-8b")
contexts = [1000, 4000, 16000, 128000]
variants = {"MHA: 32 KV heads": 32, "GQA: 8 KV heads": 8, "MQA: 1 KV head": 1}
read, predicted = {}, {}
for name, heads in variants.items():
    shape = weightless(replace(llama, num_kv_heads=heads))
    runs = [StepRunner(shape, decode_step(context)) for context in contexts]
    read[name] = []
    for run in runs:
        with Counter(shape, kv=run.cache) as count:
            run()
        read[name].append(count.total.bytes.kv_read)
    predicted[name] = [context * kv_bytes_per_token(shape.config, 2) for context in contexts]
    kib = kv_bytes_per_token(shape.config, 2) / 1024
    print(
        f"{name:17} {kib:4.0f} KiB per token, counted = formula: {read[name] == predicted[name]}"
    )

# %%
mha, gqa, mqa = (values[-1] for values in read.values())
show(
    curves(
        f"Shared KV heads: {mha / gqa:.0f} or {mha / mqa:.0f} times fewer bytes to keep and read",
        [
            Curve(name, contexts, read[name], predicted[name], style.KV_CACHE, marker)
            for name, marker in zip(variants, "^so", strict=True)
        ],
        x="context, tokens",
        y="KV cache read by one decode step of Llama 3.1 8B's shape, bf16",
        unit="B",
        x_scale="log",
    ),
    alt="Bytes of KV cache that a decode step reads, against context from 1,000 to 128,000 "
    "tokens, for 32, 8 and 1 KV heads: parallel straight lines on logarithmic axes, the lower "
    f"ones {mha / gqa:.0f} and {mha / mqa:.0f} times below the highest.",
)

# %% [markdown]
"""
Parallel lines on logarithmic axes: each is proportional to the context, and the distance between them is the number of
KV heads. The number of *query* heads is in none of them. Attention's FLOPs are the same in all three models, for each
query head has scores of its own.

## Explore: the cache fills

These are the keys that were kept while the model completed the line of code above. Each frame is the state after one step.
Move the slider: what is written is never touched again.
"""

# %%
sizes_kept = [length for length, _ in kept]
key_lengths = [keys.norm(dim=-1).mean(dim=1)[:, :24] for _, keys in kept]  # [layers, places]
last = kept[-1][1]
same = all(torch.equal(keys[:, :, :length], last[:, :, :length]) for length, keys in kept)
print("the columns of every step are still the same at the end, bit by bit:", same)
explore(
    lambda step: cache_figure(key_lengths, sizes_kept, step),
    alt="The keys in the cache, a row per layer and a column per token, after prefill and after "
    "later steps: the first columns come at once, then one in each step, and none changes.",
    step=list(range(len(kept))),
)

# %% [markdown]
"""
## On a napkin

A GPU of 80 GB holds Llama 3.1 8B in bf16 (2 bytes a number). The rest of its memory is KV cache. How many tokens fit? How many
conversations of 8,000 tokens is that, and how many would it be if the model had 32 KV heads?

Do it by hand first: 8 billion weights, 128 KiB per token.
"""

# %%
model_bytes = 2 * sum(weight.numel() for weight in weightless(llama).parameters())
room = 80e9 - model_bytes
gqa_tokens, mha_tokens = (
    room / kv_bytes_per_token(replace(llama, num_kv_heads=heads), 2) for heads in (8, 32)
)
fold(
    "Answer",
    f"The weights take {model_bytes / 1e9:.1f} GB, so {room / 1e9:.1f} GB are left. "
    f"With 8 KV heads that is room for **{gqa_tokens:,.0f} tokens**, or "
    f"{gqa_tokens / 8000:.0f} conversations. With 32 KV heads it would be "
    f"{mha_tokens / 8000:.0f}. Memory, not computing, decides how many can talk at once.",
)

# %% [markdown]
"""
## What people say

Four statements about the cache that one hears everywhere, tried on this engine. A bar is what was measured, a tick what the
formula predicted; the verdict is computed from the two.
"""

# %%
bench = Workbench()
for claim in ("B6", "B5"):
    show_card(CLAIMS[claim].card(bench))

# %%
for claim in ("A12", "A13"):
    show_card(CLAIMS[claim].card(bench))

# %% [markdown]
"""
## Your turn

`exercises/ex03_kv_cache.py` · difficulty ●●○○○ · 45 minutes

You write the cache, its attention, and the two phases. Work on it with `minillm lab test ex03`, or run the cell below.

<details><summary>Hint 1: where do I write?</summary>

Behind the `num_tokens` tokens that are there: places `num_tokens` to `num_tokens + q_len`. All layers of a step write to the same
places, so the counter moves once, after the last layer.

</details>

<details><summary>Hint 2: my decode steps are right, my second chunk is wrong</summary>

The queries are the *last* tokens. Query `i` sees the first `num_tokens + i + 1` keys. A mask that starts at the first key
is right only while the cache is empty.

</details>

<details><summary>Hint 3: the text is right at first and drifts away</summary>

Positions. A new token stands at position `num_tokens`, not at 0. The first mutant below shows what that looks like.

</details>
"""

# %%
from minillm.course.lab import check

check("ex03")

# %% [markdown]
"""
## Break it

**Mutant 1: positions start at zero in every step.** Keys in the cache were turned by their position; the new query and key
are turned as if they were the first. Shapes are right, nothing raises, and the first token is right, too: it comes out of
prefill.
"""


# %%
def write(text, start_of):
    """24 greedy tokens; start_of(cache) is the position that the next token is told to have."""
    tokens = tokenizer.encode(text)
    logits, cache = prefill(model, tokens)
    for _ in range(24):
        tokens.append(int(logits.argmax()))
        place = torch.tensor([start_of(cache)])
        hidden = model(torch.tensor(tokens[-1:]), place, cache.attend)
        cache.num_tokens += 1
        logits = model.logits(hidden)[0]
    return tokens


line = "def area(width, height):\n    return width * height\n\ndef volume("
start = len(tokenizer.encode(line))
right = write(line, lambda cache: cache.num_tokens)[start:]
wrong = write(line, lambda cache: 0)[start:]
print("right:", repr(tokenizer.decode(right)))
print("wrong:", repr(tokenizer.decode(wrong)))
agree = next(i for i, pair in enumerate(zip(right, wrong, strict=True)) if len(set(pair)) == 2)
print(f"new tokens that agree before the first difference: {agree}")

# %% [markdown]
"""
**Mutant 2: concatenate at every step.** That is the `SmallCache` above. Its tokens are right. But `torch.cat` makes new
memory and copies everything that was there, in every layer, at every step. We count the bytes that a step moves besides the
weights.
"""

# %%
print("tokens   memory set aside   concatenated")
for size in (128, 256, 512, 1024):
    tokens = torch.arange(size + 1) % config.vocab_size
    _, ours = prefill(model, tokens[:-1].tolist())
    small = SmallCache(config.num_layers)
    extend(model, tokens[:-1], small)
    moved = []
    for some_cache in (ours, small):
        with Counter(model, kv=some_cache) as count:
            extend(model, tokens[-1:], some_cache)
        moved.append((count.total.bytes.total - count.total.bytes.weights) / 1e6)
    print(f"{size:6} {moved[0]:15.1f} MB {moved[1]:11.1f} MB: {moved[1] / moved[0]:.1f} times")

# %% [markdown]
"""
Right tokens, wrong cost: no test of values finds this mutant. A counter does. Over n tokens the copies add up to O(n²) bytes.

## How others do it

* **transformers**, `src/transformers/cache_utils.py`: `DynamicLayer.update` concatenates at every step, like our small cache; `StaticLayer` sets
  memory aside and writes into it.
* **llama.cpp**, `src/llama-kv-cache.cpp`: memory for the whole context is set aside when the model is loaded. Each cell knows its
  position and whose it is, so several sequences can share the memory.
* **vLLM**, `vllm/v1/core/kv_cache_manager.py` and `block_pool.py`: the memory of the GPU is cut into blocks that are handed out as
  sequences grow. Lesson 09 is about that.
* **SGLang**, `python/sglang/srt/mem_cache/memory_pool.py`: a pool with a place per token, and a tree over it that knows which texts
  are in there. Lesson 10 is about that.
* **minillm**, `minillm/cache/contiguous.py`: what you saw here, on one page.

## Three questions

<details><summary>1. Why does nobody cache queries?</summary>

A query is used once, by its own token, in its own step. Keys and values are used by every later token.

</details>

<details><summary>2. A model gets half as many KV heads; query heads stay. What happens to the cache, and to attention's FLOPs?</summary>

The cache has half the bytes. The FLOPs stay: each query head still has a score for each token.

</details>

<details><summary>3. With a cache, what part of a step's FLOPs grows with the text?</summary>

Only attention: the new query meets one more key in each step. All weights are used once per step, however long the text is.

</details>

## Next

The cache gives `decode` its logits. [04 · Sampling](04_sampling.ipynb) turns logits into a token.
"""
