# %% [markdown]
"""
# 02 · Attention

**What does a token see?**

40 minutes · needs 01 · runs offline on a CPU

A language model treats tokens one by one, in every layer, with one exception: *attention* is where a token takes something from other
tokens. This lesson computes it by hand for four tokens, then looks into a trained model and finds a head that copies.
"""

# %%
import torch

from minillm import load_model, load_tokenizer
from minillm.attention.reference import masked_attention, naive_attention, visible
from minillm.course.claims import CLAIMS, Workbench
from minillm.course.figures.attention import attention_strip, head_grid, head_map
from minillm.course.figures.curves import curves, prefill_curve
from minillm.course.figures.show import explore, fold, predict, show, show_card, this_machine
from minillm.measure.counters import Counter
from minillm.measure.units import quantity
from minillm.shapes import named_shape

model = load_model("tiny", device="cpu", dtype="float32", progress=False)
tokenizer = load_tokenizer("tiny")
config = model.config
scale = config.head_dim**-0.5
print(this_machine())
heads = f"{config.num_heads} query heads, {config.num_kv_heads} KV heads of {config.head_dim}"
print(f"{config.num_layers} layers, {heads}")

# %% [markdown]
"""
## Predict

The embedded model has 6 layers with 4 attention *heads* each. We will give it 24 random tokens, and then the same 24 once more. While it reads the
second half, a clever head could look for the token that followed last time.

**What part of its attention does the best of 24 heads give to that one token, on average?** Spread evenly over all tokens that it sees (36 on average), it would be
3 %. Write your guess in per cent in place of the dots.
"""

# %%
guess = predict("attention of the best head to what came next last time", ..., "%")

# %% [markdown]
"""
## A toy: four tokens

Every token has three short vectors: a **query** (what it looks for), a **key** (what it can be found by) and a **value** (what it gives). The product
of a query and a key is a **score**. Here they are small enough to check by eye.
"""

# %%
tokens = ["the", "cat", "sat", "down"]
q = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 1.0], [1.0, 2.0]])
k = torch.tensor([[1.0, 0.0], [0.0, 2.0], [2.0, 0.0], [1.0, 1.0]])
v = torch.tensor([[10.0, 0.0], [0.0, 10.0], [-10.0, 0.0], [0.0, -10.0]])

scores = q @ k.T / 2**0.5  # [queries, keys]; divided by the root of the vectors' length
mask = torch.ones(4, 4).tril().bool()  # a token sees itself and what stands before it
weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)  # each row sums to 1
out = weights @ v  # a mixture of values
print("sums of the rows:", weights.sum(-1).tolist())
show(
    attention_strip(tokens, scores=scores, mask=mask, weights=weights, values=v, out=out),
    alt="Attention of four tokens in five panels: scores, the same with the future hidden, "
    "softmax weights whose rows sum to 1, values, and the output. The first token sees only "
    "itself.",
)

# %% [markdown]
"""
Read a row from left to right. The first token sees only itself, so its output is its own value. The last token gives more than half of its weight to “cat”, whose
key points where its query points, so its output has a positive second number.

Check one number by hand: the score of “cat” with itself is 2 · 2 / √2.

## Why the root?

A score is a sum of `d` products. Its spread grows with √d, and a softmax of large numbers is all on one key. Dividing by √d keeps scores at the same
size for every `d`. Random vectors show it:
"""

# %%
generator = torch.Generator().manual_seed(2)
for d in (4, 64, 1024):
    a, b = torch.randn(2, 2000, d, generator=generator)
    raw = (a * b).sum(-1).std()
    print(f"d = {d:4}: scores spread by {raw:5.1f}, after division by √d by {raw / d**0.5:.2f}")

# %% [markdown]
"""
## Who sees whom?

The rule above is a triangle, because there were as many queries as keys. That is the case when a model reads a whole prompt. When it writes, there is one new query
and many older keys. The rule is the same: **the queries are the last tokens**, so the triangle is aligned at the bottom right.
"""

# %%
for q_len, kv_len, what in [
    (4, 4, "a prompt of 4"),
    (2, 4, "2 more tokens after 2"),
    (1, 4, "1 token after 3"),
]:
    print(f"{what}:\n{visible(q_len, kv_len).int()}")

# %% [markdown]
"""
## Heads, and groups of them

A layer does this several times at once, with other vectors: these are its heads. In *grouped-query attention* (Ainslie et al. 2023) neighbouring query heads share the keys and values of one
head. With 4 query heads and 2 key/value heads, queries 0 and 1 read keys 0, queries 2 and 3 read keys 1. The whole of attention, in ten lines:
"""


# %%
def by_hand(q, k, v, mask, scale):
    """q [q_len, heads, d], k, v [kv_heads, kv_len, d] -> output, map [heads, q_len, kv_len]."""
    group = q.shape[1] // k.shape[0]
    outs, maps = [], []
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[head // group].T * scale
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        maps.append(weights)
        outs.append(weights @ v[head // group])
    return torch.stack(outs, dim=1), torch.stack(maps)


# %% [markdown]
"""
| tensor | shape |
|---|---|
| queries, output | `[q_len, heads, d]` |
| keys, values | `[kv_heads, kv_len, d]` |
| scores, weights | `[heads, q_len, kv_len]` |

The package's version is `minillm/attention/reference.py`. Both on random input, in the embedded model's shapes:
"""

# %%
for q_len, kv_len in [(33, 33), (5, 40), (1, 64)]:
    q = torch.randn(q_len, config.num_heads, config.head_dim, generator=generator)
    k, v = torch.randn(2, config.num_kv_heads, kv_len, config.head_dim, generator=generator)
    ours = by_hand(q, k, v, visible(q_len, kv_len), scale)
    theirs = masked_attention(q, k, v, visible(q_len, kv_len), scale=scale)
    gap = max((a - b).abs().max() for a, b in zip(ours, theirs, strict=True))
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, map {list(theirs[1].shape)}"
    print(f"{shapes:55} largest difference {gap:.0e}")

# %% [markdown]
"""
## Look into a trained model

The decoder calls `attend(layer, q, k, v)` in each layer and takes what comes back. So an `attend` that also keeps the maps sees everything. The switch
`off` sets the output of some heads to zero; we will need it soon.
"""


# %%
@torch.inference_mode()
def look(token_ids, off=()):
    """Maps [layers, heads, n, n] and logits [n, vocabulary]; heads in `off` say nothing."""
    maps = []

    def attend(layer, q, k, v):
        seen = visible(len(q), len(k))
        out, weights = masked_attention(
            q, k.transpose(0, 1), v.transpose(0, 1), seen, scale=scale
        )
        maps.append(weights)
        out[:, [head for where, head in off if where == layer]] = 0
        return out

    hidden = model(torch.tensor(token_ids), torch.arange(len(token_ids)), attend)
    return torch.stack(maps), model.logits(hidden)


# %% [markdown]
"""
## Find the head that copies

24 random tokens, twice. There is nothing to understand in them. The only thing that helps to predict the second half is: find the same token in the first half, and look at what *followed* it. A
head that does this is called an **induction head** (Olsson et al. 2022). Its score: the weight from each token of the second half to the token after its first
occurrence, on average.
"""

# %%
LENGTH = 24
once = torch.randint(1000, 4000, (LENGTH,), generator=torch.Generator().manual_seed(0)).tolist()


def induction_scores(off=()):
    """[layers, heads]"""
    maps, _ = look(once + once, off)
    second = torch.arange(LENGTH, 2 * LENGTH - 1)
    return maps[:, :, second, second - LENGTH + 1].mean(-1)


maps, _ = look(once + once)
induction = induction_scores()
layer, head = divmod(int(induction.argmax()), config.num_heads)
best = float(induction.max())
print(f"layer {layer}, head {head}: {best:.2f}")

# %% tags=["thumbnail"]
show(
    head_grid(maps, induction, "induction score"),
    alt="Maps of all 24 heads on 24 random tokens given twice. Most are blurred or bright "
    f"along the diagonal. Layer {layer}, head {head} has a bright line parallel to the "
    f"diagonal, half the text below it: score {best:.2f}.",
)

# %% [markdown]
"""
The framed head draws a line: from each token of the second half to the token *after* its first occurrence, half a text to the left. Two heads of layer 5 do the same, less
clearly. Others have a line right below the diagonal: they look at the token before. In the first layers attention is spread over what came last.

What would falsify it: a line at another distance, or one in the first half, where there is nothing to copy.
"""

# %%
guess.against(100 * best)

# %% [markdown]
"""
## The same head on code

Random tokens are a test. This is what the head is for: a text in which names come again.
"""

# %%
text = """def area(width, height):
    return width * height

def volume(width, height, depth):
    return width *"""
token_ids = tokenizer.encode(text)
texts = [tokenizer.decode([token]) for token in token_ids]
maps, logits = look(token_ids)
show(
    head_map(maps[layer, head], texts, f"Layer {layer}, head {head}"),
    alt=f"Map of layer {layer}, head {head} on two Python functions, a row per token. White "
    "frames mark places after an earlier token like the one that looks. In the second "
    "function they are bright: the last token looks at what followed the first star.",
)

# %% [markdown]
"""
Follow the white frames in the lower half: the second function repeats the first, and the head is always one token ahead of it. In the first function there is nothing to
repeat; there the head rests on the first tokens.

## Does it matter?

A map shows where a head looks, not what comes of it. So switch the copying heads off and see whether the model still knows the next word. As a
control, switch off as many heads of the same layers that do not copy.
"""

# %%
name = token_ids[texts.index(" height")]
heads = [
    (where, which) for where in range(config.num_layers) for which in range(config.num_heads)
]
copying = [one for one in heads if induction[one] > 0.3]
same_layers = [one for one in heads if one[0] in {where for where, _ in copying}]
others = sorted(same_layers, key=lambda one: induction[one])[: len(copying)]
for what, off in {
    "all heads": [],
    "without copying heads": copying,
    "without others": others,
}.items():
    _, logits = look(token_ids, off)
    probabilities = logits[-1].softmax(-1)
    likely = repr(tokenizer.decode([int(probabilities.argmax())]))
    print(
        f"{what:22} P(' height') = {probabilities[name]:.2f}, most likely {likely:10} off: "
        f"{off}"
    )

# %% [markdown]
"""
The next word comes from these few heads. And they are not alone: to find “the token after the same token”, a key has to know which token stood *before* it. That is the work of heads in earlier
layers that look one token back. Without the two best of them, the copying head finds nothing.
"""

# %%
maps, _ = look(once + once)
back = maps.diagonal(offset=-1, dim1=2, dim2=3).mean(-1)  # [layers, heads]: of the token before
back[layer:] = 0
helpers = [divmod(int(i), config.num_heads) for i in back.flatten().topk(2).indices]
for one in helpers:
    print(
        f"layer {one[0]}, head {one[1]} gives {back[one]:.2f} of its weight to the token before"
    )
without = induction_scores(helpers)[layer, head]
print(
    f"induction score of layer {layer}, head {head}: {best:.2f}; without the two: {without:.2f}"
)

# %% [markdown]
"""
## Explore: every head

The same text for each head of the model, cut shorter. The first slider chooses the layer.
"""

# %%
short = token_ids[-16:]
short_maps, _ = look(short)
short_texts = [tokenizer.decode([token]) for token in short]
explore(
    lambda layer, head: head_map(
        short_maps[layer, head], short_texts, f"Layer {layer}, head {head}"
    ),
    alt="Maps of head 2 of layers 0, 2, 3 and 5 on the second function. Attention is spread "
    "in the first layer and sharper in later ones.",
    layer=list(range(config.num_layers)),
    head=[2, 0, 1, 3],
)

# %% [markdown]
"""
## Measure: what the maps cost

Every head had a matrix with a number for each pair of tokens. `Counter` listens to PyTorch and writes down the largest tensor that was made on the way, for one layer of this model.
The formula is `4 bytes · heads · N²`.
"""

# %%
lengths = [64, 128, 256, 512, 1024, 2048]
largest, queries = [], []
for n in lengths:
    q = torch.empty(n, config.num_heads, config.head_dim, device="meta")  # a shape, no memory
    k, v = torch.empty(2, config.num_kv_heads, n, config.head_dim, device="meta")
    with Counter() as counted:
        naive_attention(q, k, v, scale=scale)
    largest.append(counted.largest[0])
    queries.append(q.nbytes)
predicted = [4 * config.num_heads * n**2 for n in lengths]
growth = largest[-1] / largest[-2]
print("counted = formula:", largest == predicted)

# %%
show(
    curves(
        f"Twice the prompt takes {growth:.0f} times the memory for scores",
        [
            prefill_curve("scores", lengths, largest, predicted),
            prefill_curve(
                "queries", lengths, queries, [n * queries[0] / lengths[0] for n in lengths]
            ),
        ],
        x="prompt, tokens",
        y="One layer of the embedded model, float32",
        unit="B",
        x_scale="log",
    ),
    alt="Bytes of scores against prompt length, 64 to 2,048 tokens: a line of slope 2 up to "
    f"{quantity(largest[-1], 'B')}, points on the formula. The queries grow with slope 1 and "
    "are overtaken at 64 tokens.",
)

# %% [markdown]
"""
On logarithmic axes the square is a line of slope 2. The queries, with slope 1, are as large as the scores at 64 tokens (the head size) and soon small beside them. Points off the
line would prove the formula wrong.

Lesson 06 computes the same output without this matrix.

## On a napkin

A prompt of 8,192 tokens for Llama 3.1 8B: 32 query heads, scores in bf16 (2 bytes). How many bytes are the scores of one layer? How many of them does the causal rule hide?
"""

# %%
llama, n = named_shape("llama-3.1-8b"), 8192
size, hidden = 2 * llama.num_heads * n**2, 1 - (n + 1) / (2 * n)
fold(
    "Answer",
    f"{llama.num_heads} · {n:,}² · 2 bytes = **{quantity(size, 'B')}** for one layer of "
    f"{llama.num_layers}. Of N² pairs N (N − 1) / 2 lie in the future: **{hidden:.0%}** of "
    "the numbers are computed to be thrown away.",
)

# %% [markdown]
"""
## What people say

Statements about attention, tried on this model. A bar is what was measured, a tick what the formula predicted; the verdict is computed from the two. The last one is about FLOPs: the scores grow with the square of the
prompt, but the model's matrices have so many more numbers that it takes a very long prompt to notice.
"""

# %%
bench = Workbench()
for claim in ("A5", "B4", "A16"):
    show_card(CLAIMS[claim].card(bench))

# %% [markdown]
"""
## Your turn

`exercises/ex02_attention.py` · difficulty ●●○○○ · 45 minutes

You write `causal_mask`, `softmax`, `attention` and `grouped_attention`. Work on it with `minillm lab test ex02`, or run the cell below.

<details><summary>Hint 1: where does the triangle go?</summary>

Query `i` stands at position `kv_len - q_len + i`, and sees the keys up to its own position. Two `arange` and one comparison make the whole mask.

</details>

<details><summary>Hint 2: my softmax gives NaN</summary>

Take off the row's maximum before `exp`. A row that is −∞ throughout has no maximum to take off: use 0 there, and divide by 1 instead of by 0.

</details>

<details><summary>Hint 3: one group is right, several are wrong</summary>

Neighbours share: query head `h` reads key head `h // group`, not `h % kv_heads`. The second mutant below is the other one.

</details>
"""

# %%
from minillm.course.lab import check

check("ex02")

# %% [markdown]
"""
## Break it

The model writes greedily with an attention of our own, first the right one. Keys and values of earlier steps are kept, so that the first step has a query for every token of the prompt, and each later
step has one query and many keys.
"""


# %%
def write(attention, prompt, new_tokens=24):
    """Greedy text; each step asks for its new tokens only."""
    ids, kept, start = tokenizer.encode(prompt), {}, 0

    def attend(layer, q, k, v):
        new = k.transpose(0, 1), v.transpose(0, 1)
        kept[layer] = (
            [torch.cat(pair, 1) for pair in zip(kept[layer], new, strict=True)]
            if start
            else new
        )
        return attention(q, *kept[layer])

    for _ in range(new_tokens):
        with torch.inference_mode():
            hidden = model(torch.tensor(ids[start:]), torch.arange(start, len(ids)), attend)
            start = len(ids)
            ids.append(int(model.logits(hidden[-1:]).argmax()))
    return tokenizer.decode(ids[-new_tokens:])


print(
    "right:",
    repr(write(lambda q, k, v: by_hand(q, k, v, visible(len(q), k.shape[1]), scale)[0], text)),
)

# %% [markdown]
"""
**Mutant 1: the triangle is aligned top-left.** The prompt is square, so the first word is right. After that there is one query, and it sees the first key only.
"""


# %%
def top_left(q, k, v):
    mask = torch.ones(len(q), k.shape[1]).tril().bool()
    return by_hand(q, k, v, mask, scale)[0]


print("top-left:", repr(write(top_left, text)))

# %% [markdown]
"""
**Mutant 2: query heads take turns** instead of sharing with their neighbours: head 0 reads keys 0, head 1 reads keys 1, head 2 keys 0 again. Shapes are right, rows sum to 1, and with one
key/value head or as many as query heads nothing changes. Only a test with groups notices.
"""


# %%
def taking_turns(q, k, v):
    times = q.shape[1] // k.shape[0]
    return by_hand(
        q, k.repeat(times, 1, 1), v.repeat(times, 1, 1), visible(len(q), k.shape[1]), scale
    )[0]


print("taking turns:", repr(write(taking_turns, text)))

# %% [markdown]
"""
## How others do it

* **PyTorch**, `torch.nn.functional.scaled_dot_product_attention`: `is_causal=True` aligns **top-left**, which is mutant 1 for a decode step; `enable_gqa=True` shares keys as above.
* **vLLM**, `vllm/model_executor/models/llama.py`: `LlamaAttention` projects, rotates and calls `self.attn(q, k, v)`; the backend that it calls knows who sees whom. The backends are in
  `vllm/v1/attention/backends/`.
* **SGLang**, `python/sglang/srt/layers/radix_attention.py`: the same seam, `RadixAttention`; the backends are in `python/sglang/srt/layers/attention/`.
* **llama.cpp**, `src/llama-graph.cpp`, `build_attn_mha`: `ggml_mul_mat`, `ggml_soft_max_ext` with the mask as a tensor, `ggml_mul_mat`.
* **minillm**, `minillm/attention/reference.py`: one page, and the oracle of all faster versions.

## Three questions

<details><summary>1. What is the output of the first token of a text?</summary>

Its own value. It sees only itself, and a softmax over one score is 1.

</details>

<details><summary>2. Why −∞ before the softmax, and not 0 after it?</summary>

Zeros put in afterwards leave rows that sum to less than 1, and how much less depends on what was hidden: the past would feel the future.

</details>

<details><summary>3. Half as many key/value heads: what happens to scores and FLOPs?</summary>

Nothing. Each query head still has a score for each pair. Fewer keys and values are kept and read.

</details>

## Next

While it writes, a model asks about the same keys again and again. [03 · The KV cache](03_kv_cache.ipynb) keeps them.
"""
