# %% [markdown]
"""
# 04 · Sampling

**How do logits become a token?**

30 minutes · needs 01 and 03 · runs offline on a CPU

A model ends with a number for each token of its vocabulary. What is written is one token. Between the two lie a few lines of code that decide
whether a text is dull, lively or nonsense, and whether the same request gives the same answer twice.
"""

# %%
from math import log, log2

import torch

from minillm import SamplingParams, load_model, load_tokenizer, prefill
from minillm.cache.contiguous import ContiguousCache
from minillm.course.claims import CLAIMS, Workbench
from minillm.course.figures.sampling import (
    Loop,
    distribution_bars,
    entropy_trace,
    loop_trace,
    repetition,
)
from minillm.course.figures.show import explore, fold, predict, show, show_card, this_machine
from minillm.course.lab import check
from minillm.generate import choose, decode, generate
from minillm.measure.bench import interleaved
from minillm.measure.corpus import held_out_texts
from minillm.sampling import probs_from_logits, sample

model = load_model("tiny", device="cpu", dtype="float32", progress=False)
tokenizer = load_tokenizer("tiny")
vocab = model.config.vocab_size
texts = [tokenizer.decode([token]) for token in range(vocab)]
print(this_machine())

# %% [markdown]
"""
## Predict

A model continues the text `print(` and always takes its most likely token, 72 times. **Which share of the runs of four
tokens in its text has it said before?** Write a number of per cent in place of the dots.
"""

# %%
guess = predict("Share of runs of four tokens that were said before, greedily", ..., "%")

# %% [markdown]
"""
## A toy: four tokens

Logits are any numbers. `softmax` makes them positive and lets them sum to 1: it takes `e` to the power of each, and divides by the
sum. Dividing the logits by a *temperature* first sharpens or flattens what comes out.
"""

# %%
scores = torch.tensor([2.0, 1.0, 0.0, -1.0])
for temperature in (0.5, 1.0, 2.0):
    weights = torch.exp(scores / temperature)
    probs = weights / weights.sum()
    print(f"temperature {temperature}: {[round(p, 2) for p in probs.tolist()]}")

sums = probs.cumsum(0)  # at temperature 2
for u in (0.1, 0.5, 0.9):
    token = int((sums > u).nonzero()[0])
    print(
        f"a random number of {u} draws token {token}: the first sum above it is {sums[token]:.2f}"
    )

# %% [markdown]
"""
That is all of sampling: **lay the probabilities side by side from 0 to 1, throw a random number, see where it falls.** Each
neighbour differs by 1 in its logit, so at temperature 1 each is e = 2.72 times as likely as the next; at 2 only √e times.

Temperature 0 would divide by zero. It is defined as its limit: all on the largest. That is *greedy* decoding.

## The real model

What follows `for item in `? The model gives its opinion on all tokens. Four settings, all of them vLLM's names, reshape it:

* **temperature**: divide the logits.
* **top-k**: keep the k most likely tokens.
* **top-p**: keep the most likely tokens until their sum reaches p; the token that crosses p stays (Holtzman et al. 2019).
* **min-p**: keep tokens that have at least p times the probability of the likeliest (Nguyen et al. 2024).

What is left is made to sum to 1 again.
"""

# %% tags=["thumbnail"]
start = tokenizer.encode("for item in ")
logits, _ = prefill(model, start)


def shaped(**settings):
    """The distribution under these settings."""
    return probs_from_logits(logits[None], [SamplingParams(**settings)])[0]


own = shaped()
panels = {
    "temperature 0.5": shaped(temperature=0.5),
    "temperature 1.5": shaped(temperature=1.5),
    "top-k 4": shaped(top_k=4),
    "top-p 0.5": shaped(top_p=0.5),
    "min-p 0.1": shaped(min_p=0.1),
}
shares = [float(panel.max()) for panel in panels.values()]
show(
    distribution_bars(
        panels,
        own,
        texts,
        title="One opinion, five ways to draw: the likeliest token gets "
        f"{min(shares):.0%} to {max(shares):.0%}",
        ticks="Bars: what is drawn from. Ticks: the model's own distribution, at temperature 1",
    ),
    alt="Five bar charts of the ten likeliest next tokens. Temperature 0.5 sharpens, 1.5 "
    "flattens; top-k, top-p and min-p cut the tail at different places and keep all ratios.",
)

# %% [markdown]
"""
Temperature changes all ratios and cuts nothing. The three cuts change no ratio among the tokens that they keep: bars are longer than
their ticks by one factor. If a bar were shorter than its tick in a panel that cuts, the figure would be wrong.

Cuts differ in what they listen to. top-k always keeps k, whether the model is sure or lost. top-p and min-p keep few tokens where
it is sure, and many where it is not.

## Shapes
"""

# %%
print(f"hidden state of the last position -> logits: [{len(logits)}], {logits.dtype}")
print(f"smallest {logits.min():.1f}, largest {logits.max():.1f}: any numbers, no unit")
print(
    f"probabilities: {list(own.shape)}, sum {own.sum():.6f}; the unit of their log2 is the bit"
)

# %% [markdown]
"""
## The sampler in a dozen lines

For one row of logits. The order is part of the meaning: temperature, then top-k, top-p, min-p, each on what the one before left.
"""


# %%
def small_sampler(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Logits [vocab] -> probabilities [vocab]."""
    probs, order = torch.softmax(logits / temperature, 0).sort(descending=True, stable=True)
    if top_k:
        probs[top_k:] = 0
    probs = probs / probs.sum()
    before = probs.cumsum(0) - probs  # the mass in front of each token
    probs = probs * (before < top_p) * (probs >= min_p * probs[0])
    return torch.zeros_like(probs).scatter(0, order, probs / probs.sum())


generator = torch.Generator().manual_seed(4)
largest = 0.0
for number in range(50):
    row = torch.randn(200, generator=generator) * 3
    settings = dict(temperature=0.2 + number / 25, top_k=number, top_p=0.5 + number / 100)
    theirs = probs_from_logits(row[None], [SamplingParams(**settings)])[0]
    largest = max(largest, float((small_sampler(row, **settings) - theirs).abs().max()))
print(f"largest difference from the package on 50 random rows and settings: {largest:.1e}")

# %% [markdown]
"""
## Are the draws right?

The package draws 4,000 tokens from one distribution. A token of probability p should come up n·p times, give or take a few.
How many too many or too few is normal? Pearson's χ² = Σ (count − n·p)² / (n·p) says it in one number: for k tokens it should be about
k − 1, and far above that the draws are wrong.
"""

# %%
n, some = 4000, shaped(top_k=8)
u = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
drawn = sample(some.expand(n, -1), u)
share = torch.bincount(drawn, minlength=vocab) / n
kept = some > 0
chi_square = float((n * (share - some)[kept] ** 2 / some[kept]).sum())
extra = int(share[~kept].sum())
print(f"χ² = {chi_square:.1f} for {int(kept.sum())} tokens; drawn although cut: {extra}")
show(
    distribution_bars(
        {f"share of {n:,} draws": share},
        some,
        texts,
        title=f"What is drawn is what was promised: {n:,} draws, χ² = {chi_square:.1f}",
        ticks="Bars: counted. Ticks: the probability, the formula's prediction",
        count=8,
    ),
    alt="Eight bars of counted shares end at the ticks of their probabilities, but for chance.",
)

# %% [markdown]
"""
Bars and ticks differ by chance only. In the engine each request has random numbers of its own: a function of its seed and of the
token's position in the text, `params.random(0, position)`. So a request draws the same tokens whoever shares the batch with it.

## How sure is the model, along a text?

*Entropy* is the measure: `−Σ p · log₂ p`, in bits. 0 bits: one token has it all. 3 bits: as unsure as between 8 equal
tokens. We write 40 tokens and note the entropy before each.
"""


# %%
def write(prompt, new, **settings):
    """New tokens; for each its entropy, its surprise and the surprise expected, in bits."""
    params = SamplingParams(max_tokens=new, **settings)
    tokens = tokenizer.encode(prompt)
    length, facts = len(tokens), []
    logits, cache = prefill(model, tokens)
    for _ in range(new):
        bits = -logits.log_softmax(-1) / log(2)  # the surprise of every token
        drawn_from = probs_from_logits(logits[None], [params])[0]
        token = choose(logits, params, tokens[:length], tokens[length:])
        facts.append(
            [float(x) for x in ((-bits).exp2() @ bits, bits[token], drawn_from @ bits)]
        )
        tokens.append(token)
        logits = decode(model, token, cache)
    return tokens[length:], *map(list, zip(*facts, strict=True))


tokens, entropy, _, _ = write("def area(", 40, temperature=0.8, seed=2)
print(repr(tokenizer.decode(tokens)))
show(
    entropy_trace([texts[token] for token in tokens], entropy),
    alt=f"Entropy before each of 40 tokens, from {min(entropy):.1f} to {max(entropy):.1f} "
    "bits: tall before names, short inside words and at line breaks.",
)

# %% [markdown]
"""
Read the words below the tall bars: mostly names. Below the short ones: the rest of a word, a line break, what a bracket asks for.
The settings of a sampler matter at the tall bars only. If the model were equally unsure everywhere, the bars would be level and the title
would name half of the tokens.

## Greedy decoding runs in circles

Taking the likeliest token looks like the best one can do. It is a trap: what was said once is likelier to be said again, for the
model has learnt to copy (its induction head, lesson 02). Nothing breaks the circle, because nothing is left to chance.
"""

# %%
tokens, entropy, surprise, _ = write("print(", 72, temperature=0)
print(repr(tokenizer.decode(tokens)))
loop = Loop.find(tokens)
print(f"from token {loop.start} on, every token is the one {loop.period} places before")
show(
    loop_trace([texts[token] for token in tokens], entropy),
    alt=f"Entropy before each of 72 greedy tokens, and the rounds of a circle of {loop.period} "
    f"tokens. It begins at {entropy[loop.start]:.1f} bits and ends at {entropy[-1]:.1f}.",
)


# %% [markdown]
"""
The lane below the bars counts the rounds of the circle. The first rounds still cost the model some doubt; with each copy in the
text the next one is surer. If greedy decoding were a search for the best text, the bars would not care about rounds.

How much of this text is repetition? We count runs of four tokens that stood in it before.
"""


# %%
def repeated(tokens, size=4):
    """Share of runs of `size` tokens that stood earlier in the text."""
    runs = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
    return sum(run in runs[:i] for i, run in enumerate(runs)) / len(runs)


guess.against(100 * repeated(tokens))

# %% [markdown]
"""
## Measure: what temperature trades

Six prompts, 40 tokens each, at seven temperatures. Two numbers for each: how much of the text was said before, and how much the text *surprises* the
model, in bits per token: `−log₂ p` of the token that was drawn, p at temperature 1. The second has a prediction: before each draw,
the expected surprise is `Σ p_T · (−log₂ p)`, with `p_T` the distribution that is drawn from.
"""

# %%
prompts = ["print(", "def area(", "import os\n", "class Stack:\n", "for item in ", "x = [1, "]
temperatures = [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5]
again, bits, expected = [], [], []
for temperature in temperatures:
    runs = [write(prompt, 40, temperature=temperature, seed=1) for prompt in prompts]
    again.append(sum(repeated(run[0]) for run in runs) / len(runs))
    for column, numbers in ((2, bits), (3, expected)):
        numbers.append(sum(sum(run[column]) for run in runs) / (40 * len(runs)))
    print(
        f"temperature {temperature:4}: {again[-1]:4.0%} said before, "
        f"{bits[-1]:5.2f} bits a token, expected {expected[-1]:5.2f}"
    )

real = tokenizer.encode(next(iter(held_out_texts()))[:4000])[:400]  # never seen in training
with torch.inference_mode():
    cache = ContiguousCache(model.config, capacity=400, device=model.device, dtype=model.dtype)
    hidden = model(torch.tensor(real), torch.arange(len(real)), cache.attend)
    written = (
        model.logits(hidden[:-1]).log_softmax(-1).gather(1, torch.tensor(real[1:])[:, None])
    )
print(
    f"code that people wrote:             {-float(written.mean()) / log(2):5.2f} bits a token"
)

# %%
show(
    repetition(temperatures, again, bits, expected),
    alt=f"Two panels against temperature. Repetition goes from {again[0]:.0%} at 0 to "
    f"{again[-1]:.0%} at 1.5, surprise from {bits[0]:.1f} to {bits[-1]:.1f} bits a token, "
    "beside the predicted line.",
)

# %% [markdown]
"""
Left: cold text repeats itself. Right: hot text surprises, and the points lie on the line as far as chance allows. At temperature 0
there is no chance, and the two are equal by definition. A point far off the line would mean that the sampler draws from something
else than it says. Compare the right panel with what people wrote (the last line that was printed): a text of likeliest tokens surprises far
less than real code does. Holtzman et al. (2019) found the same for prose, and called it the curious case of neural text degeneration.

What does the sampler cost? Sorting is the expensive part, and only the cuts need it.
"""

# %%
rows = torch.randn(16, vocab, generator=torch.Generator().manual_seed(0)) * 3
turns = {}
for name, params in (
    ("greedy", SamplingParams(temperature=0)),
    ("temperature", SamplingParams(temperature=0.8)),
    ("with top-p", SamplingParams(temperature=0.8, top_p=0.9)),
):
    turns[name] = lambda params=params: probs_from_logits(rows, [params] * 16)
for name, timing in interleaved(turns, repeats=15).items():
    print(f"{name:12} {1e6 * timing.best / 16:7.0f} µs per row of {vocab:,} logits")
print(this_machine())

# %% [markdown]
"""
## Explore

The same opinion of the model at three temperatures, cut at several top-p. Where does top-p keep a single token?
"""


# %%
def plot(top_p):
    """Three temperatures, cut at this top-p."""
    panels = {
        f"temperature {temperature}": shaped(temperature=temperature, top_p=top_p)
        for temperature in (0.5, 1.0, 1.5)
    }
    counts = [int((panel > 0).sum()) for panel in panels.values()]
    return distribution_bars(
        panels,
        own,
        texts,
        title=f"top-p {top_p}: "
        + ", ".join(f"{count:,}" for count in counts)
        + " tokens are left",
        ticks="Bars: what is drawn from. Ticks: the model's own distribution",
        count=6,
    )


explore(
    plot,
    alt="The six likeliest next tokens at three temperatures, cut at top-p of 1, 0.9, 0.7, 0.5 "
    "and 0.2: the colder the text, the fewer tokens it takes to reach p.",
    top_p=[1.0, 0.9, 0.7, 0.5, 0.2],
)

# %% [markdown]
"""
## On a napkin

Two tokens have logits 3 and 1. How likely is the first at temperature 1? At which temperature is it nine times as likely as the
other? And how many bits of surprise is a token of probability 1/1000?
"""

# %%
first = torch.softmax(torch.tensor([3.0, 1.0]), 0)[0]
nine = 2 / torch.log(torch.tensor(9.0))
ratio = torch.softmax(torch.tensor([3.0, 1.0]) / nine, 0)
fold(
    "Answer",
    f"e² to 1, so {first:.2f}. Nine to one means that the difference of 2, divided by the "
    f"temperature, is ln 9: temperature {nine:.2f}, and the ratio there is "
    f"{ratio[0] / ratio[1]:.1f}. A token of 1/1000 has log₂ 1000 = {log2(1000):.1f} bits.",
)

# %% [markdown]
"""
## What people say

When does a text end? The end is a token like all others, and the sampler must draw it.
"""

# %%
show_card(CLAIMS["A4"].card(Workbench()))

# %% [markdown]
"""
## Your turn

`exercises/ex04_sampling.py` · difficulty ●●○○○ · 40 minutes

You write temperature, the three cuts, and the draw. Work on it with `minillm lab test ex04`, or run the cell below.

<details><summary>Hint 1: top-p keeps one token too few</summary>

The token that crosses p is kept. A token goes only if those *before* it have reached p already: compare p with the sum in front of
the token, not with the sum that includes it.

</details>

<details><summary>Hint 2: equal tokens</summary>

Sort with `stable=True`: of two equally likely tokens the earlier one goes first, and exactly k remain.

</details>

<details><summary>Hint 3: now and then a token is drawn that was cut</summary>

`u` may be 0, and the sums begin with zeros where the first tokens were cut. The token is the first at which the sum *exceeds* u, not
the first at which it reaches it.

</details>
"""

# %%
check("ex04")

# %% [markdown]
"""
## Break it

**Mutant 1: cut before the temperature.** A colleague swaps two lines: top-p first, then temperature. At temperature 1 nobody
notices. We count how many tokens can be drawn at others.
"""

# %%
print("temperature   right order   swapped")
for temperature in (0.5, 1.0, 1.5):
    right = shaped(temperature=temperature, top_p=0.9)
    cut_first = probs_from_logits(
        shaped(top_p=0.9).log()[None], [SamplingParams(temperature=temperature)]
    )
    print(f"{temperature:11} {int((right > 0).sum()):13} {int((cut_first > 0).sum()):9}")

# %% [markdown]
"""
The swapped version always keeps the same tokens. Whoever asks for a cold text gets a longer tail than they should, and whoever asks for a
hot one is protected from it. Both are defensible; two engines that differ here give different texts for the same settings.

**Mutant 2: the same random number at each token.** "Seed it, so that it is reproducible", inside the loop: somebody forgets
to count the tokens, and each of them is drawn with the number of the first.
"""

# %%
params = SamplingParams(temperature=1.0, seed=17, max_tokens=24, ignore_eos=True)
print("right:", repr(tokenizer.decode(generate(model, start, params))))
tokens = list(start)
for _ in range(24):
    row, _ = prefill(model, tokens)
    tokens.append(choose(row, params, start, []))  # always the number of position 0
print("wrong:", repr(tokenizer.decode(tokens[len(start) :])))
numbers = [f"{params.random(0, position):.3f}" for position in range(4)]
print(f"the right random numbers: {', '.join(numbers)}, …; the wrong: always {numbers[0]}")

# %% [markdown]
"""
It is reproducible, and it is no sampling: the whole text depends on one number. Tokens lie side by side in the order of their ids, so a
small number always picks low ids, whatever the model thinks of them: punctuation, digits, single letters.

## How others do it

* **vLLM**, `vllm/v1/sample/sampler.py` and `ops/topk_topp_sampler.py`: the same order, batched, with FlashInfer's kernels that cut without sorting.
* **SGLang**, `python/sglang/srt/layers/sampler.py`: FlashInfer's kernels, or PyTorch as here.
* **llama.cpp**, `src/llama-sampler.cpp`: a chain of samplers in an order that the user chooses. By default top-k, top-p and min-p come
  *before* temperature: the first mutant, on purpose.
* **transformers**, `src/transformers/generation/logits_process.py`: one class for each setting, in a list.
* **minillm**, `minillm/sampling.py`: one function from logits to probabilities, used by sampler, verifier and figures alike.

## Three questions

<details><summary>1. Does temperature change which token is the likeliest?</summary>

No. Dividing all logits by the same positive number keeps their order. Greedy decoding is the same at every temperature.

</details>

<details><summary>2. top-k 1 and temperature 0: is there a difference?</summary>

Not in the text. Both leave one token. Temperature 0 needs no division, no sorting and no random number.

</details>

<details><summary>3. Entropy 0.1 bits before a token: what do top-p 0.9 and top-k 50 leave?</summary>

top-p a single token, for it holds more than 0.9 alone. top-k leaves fifty, nearly all of them without any chance.

</details>

## Next

Now every part of a step is known. [05 · Roofline](05_roofline.ipynb) asks what the machine waits for while it takes one.
"""
