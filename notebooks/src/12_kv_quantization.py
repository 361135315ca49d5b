# %% [markdown]
"""
# 12 · KV quantisation

**How few bits does a memory need?**

40 minutes · needs 03 and 05 · runs offline on a CPU

The KV cache decides how many conversations fit into memory, and in long ones it is most of what a decode step reads. Each of its
numbers has 16 bits. This lesson stores them in 8 and in 4, finds out where that hurts, and measures what it buys.
"""

# %%
import torch

from minillm import LLM, SamplingParams, load_model, load_tokenizer
from minillm.attention.reference import naive_attention
from minillm.costs.formulas import step_bytes
from minillm.costs.steps import decode_step
from minillm.course.claims import CLAIMS, Workbench
from minillm.course.figures.formats import format_figure, quality_figure
from minillm.course.figures.quantization import level_figure
from minillm.course.figures.show import explore, fold, predict, show, show_card, this_machine
from minillm.generate import extend
from minillm.measure.bench_kv import bench_kv, bench_quality
from minillm.measure.kv_quality import (
    held_out_rows,
    one_sequence,
    perplexity,
    trained_samples,
)
from minillm.measure.roof import quantized_speedup
from minillm.quantization.formats import FORMATS, Int4, PerToken8, element_bytes
from minillm.shapes import named_shape

model = load_model("tiny", device="cpu", dtype="float32", progress=False)
tokenizer = load_tokenizer("tiny")
print(this_machine())

# %% [markdown]
"""
## Predict

A cache of 4 bits has a quarter of the bits of one of 16.

**How many times as many tokens fit into the same memory?** Write your number in place of the dots.
"""

# %%
guess = predict("tokens per GB, 4 bits over 16", ..., "×")

# %% [markdown]
"""
## A toy: four levels

To *quantise* numbers is to allow only a few values, the *levels*, evenly spaced between the smallest and the largest number of a
group. What is stored is the number of the level, the *code*, and once per group the two ends of the *range*. With 2 bits there are
four levels.

Three tokens, three channels, and the last channel is much larger than the others. Who shares a range: the numbers of a token (a row), or
those of a channel (a column)?
"""

# %%
x = torch.tensor([[0.1, 0.4, 9.0], [0.3, 0.2, 7.5], [0.2, 0.1, 8.4]])
for whose, dim in (("a token", 1), ("a channel", 0)):
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    codes = ((x - low) / (high - low) * 3).round()
    back = low + codes * (high - low) / 3
    print(f"a range for {whose}:")
    for row, code in zip(back.tolist(), codes.int().tolist(), strict=True):
        print(f"  codes {code} come back as", *(f"{number:.2f}" for number in row))
    print(f"  largest error in the quiet channels {(back - x)[:, :2].abs().max():.2f}\n")

# %% [markdown]
"""
With a range per token the loud channel takes all levels, and the quiet ones become a single number: what they said is gone. With a
range per channel nobody pays for anybody else.

## The keys of a trained model

Are there such channels in real keys? We run the model on Python source that it has never read and look at the keys of one layer
and head. Loudness is a channel's root mean square. And the values, for comparison.
"""

# %%
text = held_out_rows(tokenizer, 12, 512)
samples = trained_samples(
    model, text[0].tolist()
)  # a sample: one layer's queries, keys, values
layer, head = 2, 0
keys = samples[layer].k[head]  # [tokens, channels]
loudness = keys.square().mean(0).sqrt()
loudest = loudness.topk(3).indices.tolist()
print(f"keys {[*keys.shape]}: tokens, channels")
print(f"loudest channels {loudest}: {[round(float(loudness[c]), 1) for c in loudest]}")
print(f"the channel in the middle: {loudness.median():.2f}")
values = samples[layer].v[head].square().mean(0).sqrt()
print(f"values: loudest channel {values.max():.2f}, in the middle {values.median():.2f}")

# %% tags=["thumbnail"]
block = keys[256:288]
show(
    level_figure(block, token=5, where=f"layer {layer}, head {head}"),
    alt="Top: the keys of 32 tokens as a map; a few channels are bright in every row. Middle: "
    "quiet channels of one token on 16 levels: far apart with a range per token, "
    "close together with one per channel. Bottom: the error in each channel for both.",
)

# %% [markdown]
"""
The bright columns are loud channels: loud for *every* token. Look at the two panels in the middle: the same numbers, the same 16 levels.
On the left the range belongs to the token and reaches from its loudest negative to its loudest positive number; the levels lie so far
apart that the quiet channels hit two or three of them. On the right each channel has its own. The lines at the bottom are the
price. Were the title wrong, they would lie on each other, as they do for keys without loud channels.

That is the insight of KIVI (Liu et al. 2024, arXiv:2402.02750): **keys want a range per channel, values one per token.**

## What an engine can store

A range per channel has a catch. Tokens arrive one by one, and the range of a channel is known when all tokens of a block are there,
not before. Until then the newest keys must be kept exactly, beside the cache, and whoever goes on in the middle of a block (a shared
prefix, a chunk, a rejected guess) must know of them. There is a middle way: a range per token, but for *groups of 32 channels*. A loud
channel then spoils the codes of 31 others instead of all.

What is the middle way worth? The error of attention's output with the keys of all layers stored in each way:
"""


# %%
def round_trip(x, group):
    codec = Int4(group)  # as many neighbouring channels share a range
    return codec.decode(*codec.encode(x))


def by_channel(x):  # the same on blocks of 32 tokens that lie on their side
    return round_trip(x.unflatten(1, (-1, 32)).mT, 32).mT.flatten(1, 2)


ways = {
    "a token": (lambda k: round_trip(k, 64), 4 + 32 / 64),
    "32 channels": (lambda k: round_trip(k, 32), 4 + 32 / 32),
    "16 channels": (lambda k: round_trip(k, 16), 4 + 32 / 16),
    "a channel": (by_channel, 4 + 32 / 32),
}
for whose, (stored, bits) in ways.items():
    errors = []
    for one in samples:
        out, exact = (
            naive_attention(one.q[-64:], k, one.v, scale=1 / 8) for k in (stored(one.k), one.k)
        )
        errors.append(float((out - exact).norm() / exact.norm()))
    print(f"a range for {whose:11}: {bits:.2f} bits, error {sum(errors) / len(errors):.3f}")

# %% [markdown]
"""
Groups lie in between. `minillm` stores groups: a token is written by itself, at once, and nothing else in the engine knows
that keys are quantised.

There are three formats, for keys and values alike. In `int8` and `fp8` each token and head has one scale; with 256 levels
that is enough. (`fp8` are numbers of 8 bits with an exponent, e4m3: their steps grow with the number.) In `int4` each token and head has a
range for every 32 channels, and two codes share a byte. The real tensors of 16 tokens:
"""

# %%
block = samples[layer].k[:, :16]  # [kv_heads, tokens, channels]
for name, codec in FORMATS.items():
    stored = codec.encode(block)
    parts = [f"{str(part.dtype)[6:]} {[*part.shape]}" for part in stored]
    bits = 8 * sum(part.nbytes for part in stored) / block.numel()
    formula = 8 * element_bytes(name, block.shape[2])
    print(f"{name:5}", ", ".join(parts))
    print(f"      {bits:.2f} bits per number, ranges included; by formula {formula:.2f}\n")

# %% [markdown]
"""
## int8 in five lines

One scale per token, its largest magnitude; codes from -127 to 127. The error can be no larger than half a step. Beside it the package's
own: the same, except that it rounds the scale up to 16 bits, so that no number lies outside of its range.
"""


# %%
def quantize(x):
    scale = x.abs().amax(-1, keepdim=True)
    return (x * 127 / scale.where(scale > 0, 1.0)).round().to(torch.int8), scale


def dequantize(codes, scale):
    return codes.float() * scale / 127


x = torch.randn(1000, 64, generator=torch.Generator().manual_seed(1))
codes, scale = quantize(x)
ours = dequantize(codes, scale)
codec = FORMATS["int8"]
theirs = codec.decode(*codec.encode(x))
print(f"largest error, in half steps:      {((ours - x).abs() / (scale / 254)).max():.4f}")
print(f"root mean square error:            {(ours - x).square().mean().sqrt():.5f}")
print(f"of the package's version:          {(theirs - x).square().mean().sqrt():.5f}")
print(f"a token of zeros comes back as     {dequantize(*quantize(torch.zeros(1, 4))).tolist()}")

# %% [markdown]
"""
## However it is cut

A token is written first and read back as it is stored, by its own query too. So it cannot matter how a text is cut into steps: all at
once, in chunks, token by token. We try the three.
"""

# %%
tokens = text[1, :100]
for name in ("int8", "int4"):
    outs, kept = [], []
    for size in (100, 48, 1):
        cache = one_sequence(model, FORMATS[name], capacity=100)
        for part in tokens.split(size):
            logits = extend(model, part, cache)
        outs.append(logits)
        kept.append(torch.cat([cache.keys, cache.values]))
    differ = [float((a != kept[0]).float().mean()) for a in kept]
    apart = [float((a - outs[0]).abs().max()) for a in outs]
    for cut, share, most in zip(("at once", "chunks", "singly"), differ, apart, strict=True):
        print(
            f"{name}, {cut:7}: {100 * share:.2f} % other numbers, logits differ by {most:.0e}"
        )

# %% [markdown]
"""
Chunks change nothing. Token by token a few numbers can be others, and then the logits differ in the second or third digit behind the point. The rule is not
to blame: the unquantised model, too, computes a single token with another order of additions than many, and gets another last
digit. A number that happens to lie halfway between two levels then falls to the other side, and a difference in the seventh digit becomes a whole step. **Rounding is not
continuous.** The answer is just as good, but it is not the same bits.

So quantised caches go together with everything that cuts sequences differently: chunked prefill, shared prefixes, preemption, speculation.

`LLM` takes the format as a parameter. The same prompt in each of them. A format that turns one close decision writes another text from
there on, and that alone does not make it a worse one:
"""

# %%
prompt = (
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item"
)
params = SamplingParams(temperature=0, max_tokens=24)
for name in ("auto", *FORMATS):
    llm = LLM("tiny", kv_format=name, device="cpu", dtype="float32")
    written = llm.generate([prompt], params, progress=False)[0].outputs[0]
    print(f"{name:5}", repr(written.text))

# %% [markdown]
"""
## Measure: what it buys

Bytes per token, bytes of a decode step as the counter saw them, and the time of the step, each beside its formula. The step is one
sequence in bfloat16 at three contexts, and the formats take turns.
"""

# %%
served = load_model("tiny", device="cpu", dtype="bfloat16", progress=False)
rows = bench_kv(served, contexts=[128, 512, 1024], repeats=3)
print(this_machine())
print("format  bytes/token  formula  tokens/GB   KV read at 1024  formula  speed-up")
for row in rows:
    step = row.steps[-1]
    held = f"{row.allocated_bytes:12,} {row.predicted_bytes:8,} {row.tokens_per_gb:10,}"
    read = f"{step.counted.kv_read:14,} {step.predicted.kv_read:10,}"
    print(f"{row.format:6} {held} {read} {step.speedup.median:8.2f}")

# %%
plain, *_, int4 = rows
more = plain.allocated_bytes / int4.allocated_bytes
show(
    format_figure(rows),
    alt="For each format: tokens per GB, bytes of a decode step, and its time against context. "
    f"int4 holds {more:.1f} times the tokens; its steps take "
    f"{1 / int4.steps[-1].speedup.median:.1f} times as long on this machine.",
)

# %% [markdown]
"""
The bars end at their ticks: capacity is what the formula says. Now compare the two upper panels with the lower one. **Fewer bytes are not less time.** The time would fall if the machine
waited for the cache's bytes. This model and its cache are small enough for the processor's own caches, and turning codes back into numbers
takes operators that a plain cache does not need.

On a GPU, where a kernel decodes in registers while it waits for memory, the sign can change; and there, too, not everywhere. No such run is
recorded yet: `benchmarks/kv_decode.py` makes one.
"""

# %%
guess.against(more)

# %% [markdown]
"""
Not 4: the ranges are part of the price. A range serves 32 numbers and has two ends of 16 bits: one bit more for each number.

## Measure: what it costs

*Perplexity* is how many tokens the model hesitates between, on average: the exponential of its mean surprise at each next token. We
measure it on text that it was not trained on, with every key and value read through the format. Beside the formats stands a mutant: int4 with
one range for all channels of a token.

On a text as short as ours most of that is luck: errors push the probabilities of single tokens up and down, and it nearly cancels. So we also
take the *divergence* of the model's distributions from the unquantised ones (Kullback and Leibler's, in thousandths of a nat per token), where nothing cancels.

And the error of attention's output, on three kinds of keys: Gaussian ones, as random weights would make them; Gaussian ones with four
channels that are five times as large; and those of the trained model.
"""

# %%
quality = bench_quality(model, text)
for one in quality:
    change = f"{100 * one.loss(quality[0]):+.2f} %" if one.errors else ""
    print(f"{one.format:14} {one.bits:5.2f} bits, perplexity {one.perplexity:.3f} {change}")
    if one.errors:
        errors = ", ".join(f"{kind} {error:.3f}" for kind, error in one.errors.items())
        print(f"               divergence {1e3 * one.divergence:.2f}, error by keys: {errors}")

# %%
loss = {one.format: 100 * one.loss(quality[0]) for one in quality}
show(
    quality_figure(quality),
    alt="Left: rise of perplexity against bits per number: "
    + ", ".join(f"{name} {loss[name]:+.2f} %" for name in list(loss)[1:])
    + ". Right: error of attention's output by format on Gaussian, outlier and trained keys; "
    "int4 per token stands out on outliers.",
)

# %% [markdown]
"""
Left: a format *below* the line is luck, not virtue, and a tenth of a per cent between two points means nothing yet. The divergence above is what to
compare them by: with one range per token (the empty point) it is half as large again, for half a bit less.

Right: on Gaussian keys (circles) groups gain only what a range of fewer numbers gains, because it is narrower. **Random weights cannot tell a good
format from a bad one**: they have no loud channels. With four of them (squares) the two versions of int4 lie much further apart.

## Explore: other layers

Loud channels are a matter of the layer. Move the slider, and watch the title.
"""

# %%
explore(
    lambda layer: level_figure(
        samples[layer].k[head][256:288], token=5, where=f"layer {layer}"
    ),
    alt="The level figure for the keys of each layer's first head: in some the channels differ "
    "much in loudness and a range per channel gains much, in others less.",
    layer=[0, 2, 5],
)

# %% [markdown]
"""
## On a napkin

Llama 3.1 8B in bf16 on a GPU. With quantisation only the cache shrinks, the weights stay. **What is the most that int4 can speed up a
decode step** at batch 1 and a context of 1,000, and at batch 32 and 8,000? And what would an endlessly small cache give?

You need two numbers from lesson 03: weights of about 15 GB without the embedding, and 128 KiB of KV per token.
"""

# %%
llama = named_shape("llama-3.1-8b")
shrink = 2 / element_bytes("int4", llama.head_dim)
words = []
for batch, context in ((1, 1000), (32, 8000)):
    share = step_bytes(llama, decode_step(context, batch), 2).kv_share
    words.append(
        f"Batch {batch}, context {context:,}: KV is {100 * share:.0f} % of the bytes. int4 is "
        f"{shrink:.1f} times smaller, so the step gets at most "
        f"**{quantized_speedup(share, shrink):.2f} times** as fast; with no KV at all it would "
        f"be {1 / (1 - share):.2f} times."
    )
fold("Answer", " ".join(words))

# %% [markdown]
"""
## What people say
"""

# %%
show_card(CLAIMS["A21"].card(Workbench()))

# %% [markdown]
"""
And the fine print of newer formats. TurboQuant (2025, arXiv:2504.19874) reports quality-neutral caches at 3.5 bits. An independent study by
vLLM and Red Hat (May 2026) found for its 4-bit variant about 3.4 times the capacity, 66 to 80 % of bf16's throughput and one to four points lost on
hard benchmarks; at 3 bits twenty points; and fp8 remained the best default. Capacity goes up, speed goes *down*, and a perplexity that hardly
moves does not mean that reasoning over thousands of tokens is unharmed.
"""

# %% [markdown]
"""
## Your turn

`exercises/ex12_kv_quantization.py` · difficulty ●●●○○ · 50 minutes

You write int8, packing and int4 by groups, and the rounding of fp8. Work on it with `minillm lab test ex12`, or run the cell below.

<details><summary>Hint 1: my token of zeros becomes NaN</summary>

Its scale is 0, and 0 / 0 is NaN. Any divisor does for a group without width, because its only code is 0.

</details>

<details><summary>Hint 2: keys and values come out alike, but one of them is wrong</summary>

Look at the dimension that you reduce over. A range per token reduces over channels (the last dimension), a range per channel over tokens.

</details>

<details><summary>Hint 3: fp8 is right for large numbers and wrong for small ones</summary>

The step between two numbers is 2^(e - 3) for e from -6 to 8. Below 2^-6 it stays what it was there: find the exponent with `torch.frexp`, and do not let it
fall further.

</details>
"""

# %%
from minillm.course.lab import check

check("ex12")

# %% [markdown]
"""
## Break it

**Mutant 1: halves of a byte swapped.** Packing puts channel c into the low half of a byte, unpacking takes it from the high half. All shapes and types
are right, and nothing raises.
"""


# %%
class Swapped(Int4):
    def encode(self, x):
        codes, *ends = super().encode(x)
        return (codes << 4 | codes >> 4, *ends)


few = text[:8, :256]
for name, codec in (("auto", None), ("int4", FORMATS["int4"]), ("swapped", Swapped())):
    print(f"{name:8} perplexity {perplexity(model, few, codec):8.2f}")

# %% [markdown]
"""
**Mutant 2: a unit scale.** Codes of 8 bits, and the scale is simply 1: what engines do when nobody has calibrated it. fp8 then clips at 448 and runs out
of digits near zero; int8 rounds to whole numbers. Whether it hurts depends on how large the numbers happen to be, and that is the trouble. So we
also try the same values a thousand times as small and as large. (A model whose next matrix makes up for it would compute the same.)
"""


# %%
class UnitScale(PerToken8):
    def encode(self, x):
        unit = torch.full_like(super().encode(x)[1], self.largest)
        levels = x.float().clamp(-self.largest, self.largest)
        return (levels if self.dtype.is_floating_point else levels.round()).to(self.dtype), unit


for name in ("fp8", "int8"):
    codec = FORMATS[name]
    unit = UnitScale(codec.dtype, codec.largest)
    for factor in (1.0, 0.001, 1000.0):
        x = factor * samples[layer].v[head]
        own, one = (
            float((c.decode(*c.encode(x)) - x).norm() / x.norm()) for c in (codec, unit)
        )
        print(
            f"{name:4} values × {factor}: error {own:.3f} with scales, {one:.3f} with scale 1"
        )

# %% [markdown]
"""
A scale per token follows its numbers wherever they are. A unit scale is right by accident.

## How others do it

* **vLLM**, `--kv-cache-dtype fp8`: codes are written by `csrc/cache_kernels.cu` and read by the attention kernels. Its scale is one per layer, and 1.0 unless the
  checkpoint brings a calibrated one: the second mutant, as a default.
* **SGLang**, `--kv-cache-dtype fp8_e4m3` or `fp8_e5m2`: `python/sglang/srt/mem_cache/memory_pool.py` holds the codes.
* **llama.cpp**, `-ctk q8_0 -ctv q8_0` and others: keys and values are stored in the formats of its weights, groups of 32 numbers of one token with a scale, as our int4.
* **transformers**, `src/transformers/cache_utils.py`: `QuantizedLayer` keeps the newest tokens exact, so that it can give keys a range per channel, and decodes everything before each
  step: it saves memory, not time.
* **minillm**: `minillm/quantization/formats.py` for the codes, `minillm/quantization/cache.py` for writing them, `minillm/quantization/attention.py` for reading; the Triton kernels decode
  a tile when they load it.

## Three questions

<details><summary>1. Why do values need no range per channel?</summary>

Their channels are about equally loud, as the cell above printed. And a token's value is weighed as a whole: a range per token can be taken out of the sum over channels.

</details>

<details><summary>2. Why is a cache that is decoded as a whole before each step slower than an unquantised one?</summary>

It reads the codes, writes all numbers in 16 bits and reads them again: more bytes than were there before, and the arithmetic on top.

</details>

<details><summary>3. Two requests share a prefix. May one be served in int4 and the other in int8?</summary>

Not from the same blocks: what is stored differs. The format belongs to the key of the prefix cache.

</details>

## Next

Fewer bytes per step is one way to more tokens per second. [13 · Speculative decoding](13_speculative_decoding.ipynb) takes more tokens out of each step.
"""
