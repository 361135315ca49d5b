# %% [markdown]
"""
# 01 · Two phases

**Why does the first token take so long, and the second so little?**

20 minutes · needs PyTorch, and nothing of inference · runs offline on a CPU

Whoever has talked to a language model knows the rhythm: nothing, nothing, and then words come in a steady stream. This lesson shows
where the rhythm comes from, gives its parts their names, and measures them.
"""

# %%
from itertools import pairwise
from time import perf_counter

import torch

from minillm import LLM, SamplingParams, decode, load_model, load_tokenizer, prefill
from minillm.course.claims import CLAIMS, Workbench
from minillm.course.figures.curves import curves, decode_curve, prefill_curve
from minillm.course.figures.show import explore, fold, predict, show, show_card, this_machine
from minillm.course.figures.timeline import request_timeline
from minillm.measure.counters import Counter
from minillm.measure.units import quantity
from minillm.outputs import RequestMetrics

model = load_model("tiny", device="cpu", dtype="float32", progress=False)
tokenizer = load_tokenizer("tiny")
print(this_machine())

# %% [markdown]
"""
## Predict

`tiny` is a small model that was trained on Python source; it comes with this package. We give it a text of 256 tokens (pieces of words) and let it
write on, one token after the other.

**How many times as long as each later token will the first one take?** Write your number in place of the dots. Nobody sees it.
"""

# %%
guess = predict("Time of the first token over the time of a later one, prompt of 256", ..., "×")

# %% [markdown]
"""
## A toy: writing is a loop

A language model is a function: text in, a score for every possible next token out. To write, one takes the best token, appends it,
and asks again. Here is the whole idea with a model of four words. Its table says how well the column follows the row.
"""

# %%
words = ["the", "cat", "sees", "."]
scores = torch.tensor(
    [[0, 5, 1, 0], [1, 0, 4, 2], [6, 1, 0, 3], [1, 0, 0, 0]]  # after "the", "cat", "sees", "."
)
text = [0]
for _ in range(5):
    text.append(int(scores[text[-1]].argmax()))
print(" ".join(words[token] for token in text))

# %% [markdown]
"""
It goes round and round, because this model looks at one word only. A real one looks at all of them: that is what makes its first step
long.

## The real loop

`prefill` runs the model on all tokens of the prompt at once. It gives the scores for the first new token (they are called *logits*), and what the model
remembers of the prompt. `decode` runs it on one more token. We look at the clock whenever a token is ready.
"""


# %%
def write(prompt, new_tokens):
    """Greedy tokens after a prompt, and the time at which each was ready."""
    tokens, arrival, times = [], perf_counter(), []
    logits, memory = prefill(model, prompt)  # phase 1: the whole prompt
    while True:
        tokens.append(int(logits.argmax()))
        times.append(perf_counter())
        if len(tokens) == new_tokens:
            return tokens, RequestMetrics(arrival, [times])
        logits = decode(model, tokens[-1], memory)  # phase 2: one token


source = """
class Circle:
    def __init__(self, radius):
        self.radius = radius

    def area(self):
        return 3.14159 * self.radius * self.radius

    def perimeter(self):
        return 2 * 3.14159 * self.radius


class Square:
    def __init__(self, side):
        self.side = side

    def area(self):
        return self.side * self.side

    def"""
prompt = tokenizer.encode(source)
write(prompt, 4)  # once for nothing: the first run of anything is slow
tokens, metrics = write(prompt, 14)
print(f"{len(prompt)} tokens in, {len(tokens)} tokens out:", repr(tokenizer.decode(tokens)))

# %% tags=["thumbnail"]
show(
    request_timeline(
        metrics,
        prompt_tokens=len(prompt),
        texts=[tokenizer.decode([token]) for token in tokens],
    ),
    alt="One request over time: a blue block, the prefill of the whole prompt, gives the first "
    "token; then an equal amber step for each further token.",
)

# %% [markdown]
"""
The blue block is *prefill*: all prompt tokens in one step. Each amber tooth is one *decode* step: one token in, one token out. **The first new
token comes out of prefill**, so 14 tokens take one prefill and 13 decodes. Count the teeth; a fourteenth would prove this wrong.

## Four numbers with names

Servers of language models are judged by four times. All follow from when a request came and when each of its tokens was ready.

| name | is | what a user feels |
|---|---|---|
| TTFT | first token − arrival | waiting |
| ITL | each gap between two tokens, a list | stutter |
| TPOT | (last token − first token) / (tokens − 1) | speed of writing |
| E2EL | last token − arrival | being done |
"""

# %%
times, arrival = metrics.token_times[0], metrics.arrival_time
ttft = times[0] - arrival
itl = [later - earlier for earlier, later in pairwise(times)]
tpot = (times[-1] - times[0]) / (len(times) - 1)
print(this_machine())
print(f"TTFT {quantity(ttft, 's')}, TPOT {quantity(tpot, 's')}")
print(f"ITL from {quantity(min(itl), 's')} to {quantity(max(itl), 's')}")
print(
    "as the package computes them:",
    (ttft, itl, tpot) == (metrics.ttft, metrics.itl, metrics.tpot),
)
print("TTFT + 13 · TPOT is the whole:", abs(ttft + 13 * tpot - metrics.e2el) < 1e-9)

# %% [markdown]
"""
Why n − 1? The first token belongs to TTFT. What is left are n − 1 steps.

## The package does the same

`LLM` is the engine of this course. It serves many requests at once, and takes great care that nobody notices. For one request it must give what our
loop gave:
"""

# %%
llm = LLM("tiny", device="cpu", dtype="float32")
greedy = SamplingParams(temperature=0, max_tokens=14, ignore_eos=True)
answer = llm.generate([prompt], greedy)[0]
print("the same tokens as our loop:", answer.outputs[0].token_ids == tokens)

# %% [markdown]
"""
## Measure: what does a longer prompt change?

Prompts of 16 to 1024 tokens (random ones: the time does not depend on what they say), 9 new tokens each. The best of three runs counts, for other
programs only ever add time.
"""

# %%
lengths, ttfts, tpots, recorded = [16, 32, 64, 128, 256, 512, 1024], [], [], {}
for length in lengths:
    random_prompt = torch.arange(length).mul(37).remainder(model.config.vocab_size).tolist()
    runs = [write(random_prompt, 9)[1] for _ in range(3)]
    ttfts.append(min(run.ttft for run in runs))
    tpots.append(min(run.tpot for run in runs))
    recorded[length] = min(runs, key=lambda run: run.e2el)
print(this_machine())
for length, first, later in zip(lengths, ttfts, tpots, strict=True):
    print(f"prompt {length:5}: TTFT {quantity(first, 's'):>8}, TPOT {quantity(later, 's'):>8}")

# %%
grows, stays = ttfts[-1] / ttfts[2], tpots[-1] / tpots[2]
show(
    curves(
        f"16 times the prompt: {grows:.0f} times the TTFT, and {stays:.1f} times the TPOT",
        [
            prefill_curve("TTFT", lengths, ttfts),
            decode_curve("TPOT", lengths, tpots),
        ],
        x="prompt, tokens",
        y="On this machine, best of three",
        unit="s",
        x_scale="log",
    ),
    alt="TTFT and TPOT against prompt length, 16 to 1024 tokens, on logarithmic axes. TTFT rises "
    f"with the prompt, from 64 to 1024 tokens {grows:.0f} times; TPOT stays almost level.",
)

# %% [markdown]
"""
The title compares 1024 tokens with 64. TTFT follows the length of the prompt. TPOT hardly does: a decode step runs the model on one token, whatever came
before. If prefill were a loop over single tokens, both would be far apart from the start, and TTFT would be length · TPOT. Is it?
"""

# %%
guess.against(ttfts[lengths.index(256)] / tpots[lengths.index(256)])

# %% [markdown]
"""
## What does one token cost?

Divide TTFT by the tokens of the prompt, and compare with TPOT. Both are then the time of one token.
"""

# %%
each = [ttft / length for ttft, length in zip(ttfts, lengths, strict=True)]
cheaper = tpots[4] / each[4]
show(
    curves(
        f"In a prompt of {lengths[4]}, a token costs {cheaper:.0f} times less than a new token",
        [
            prefill_curve("prompt token", lengths, each),
            decode_curve("new token", lengths, tpots),
        ],
        x="prompt, tokens",
        y="Time of one token: TTFT / prompt tokens, and TPOT",
        unit="s",
        x_scale="log",
    ),
    alt="Time per token against prompt length: that of a prompt token falls as the prompt gets "
    f"longer, that of a new token stays. At 256 tokens they are {cheaper:.0f} times apart.",
)

# %% [markdown]
"""
So the second question of this lesson is the deeper one. The first token takes long because it is many tokens. But *per token* prefill is far cheaper. Is a
prompt token less work?
"""

# %%
with Counter(model) as count:
    _, memory = prefill(model, prompt)
per_prompt_token = count.total.flops / len(prompt)
with Counter(model) as count:
    decode(model, tokens[0], memory)
per_new_token = count.total.flops
print(f"a prompt token: {quantity(per_prompt_token, 'FLOP')}")
print(f"a new token:    {quantity(per_new_token, 'FLOP')}")

# %% [markdown]
"""
(A FLOP is one multiplication or addition of two numbers. The new token has a little more: a score for each word of the vocabulary is made once per step, and
prefill shares that among all its tokens.)

The work is nearly the same, the time is not. **Together, tokens are cheap; alone, a token is expensive.** A prompt is known, so its tokens go together. A new token is not known
before the one in front of it is written, so it goes alone. Nearly everything in this course is about that difference: [lesson 05](05_roofline.ipynb) finds its cause.

## Explore: the same request, longer and longer

The runs from above, each to its own scale. Move the slider and watch what becomes of the blue block.
"""

# %%
explore(
    lambda prompt: request_timeline(recorded[prompt], prompt_tokens=prompt),
    alt="Timelines of requests with prompts of 16 to 1024 tokens and 9 new tokens: the blue"
    " block of prefill takes a growing part of the whole, the amber steps a shrinking one.",
    prompt=lengths,
)

# %% [markdown]
"""
## On a napkin

Take the numbers that this machine measured for a prompt of 1024 tokens. A user asks with 1024 tokens and gets an answer of 200.

How long does the answer take, and which part of it is waiting for the first token? From how many tokens of answer on is writing the longer part?
"""

# %%
total = ttfts[-1] + 199 * tpots[-1]
fold(
    "Answer",
    f"TTFT + 199 · TPOT = {quantity(ttfts[-1], 's')} + 199 · {quantity(tpots[-1], 's')} = "
    f"**{quantity(total, 's')}**, of which {100 * ttfts[-1] / total:.0f} % is waiting. Writing "
    f"is the longer part from about {ttfts[-1] / tpots[-1]:.0f} tokens on: TTFT / TPOT. "
    "So short questions with long answers wait for decode, long documents with short answers "
    "for prefill.",
)

# %% [markdown]
"""
## What people say

Statements about the two phases, tried on this engine. A bar is what was measured, a tick what a formula predicted; the verdict below is computed from the two.
"""

# %%
bench = Workbench()
show_card(CLAIMS["A2"].card(bench))

# %%
show_card(CLAIMS["B10"].card(bench))

# %%
show_card(CLAIMS["A4"].card(bench))

# %% [markdown]
"""
## Your turn

`exercises/ex01_two_phases.py` · difficulty ●○○○○ · 30 minutes

You write the loop, and TTFT, TPOT and ITL from timestamps. Work on it with `minillm lab test ex01`, or run the cell below.

<details><summary>Hint 1: where does the first token come from?</summary>

From the logits that reading the prompt gives. No decode step has happened yet.

</details>

<details><summary>Hint 2: how many steps?</summary>

M tokens: one prefill and M − 1 decodes. The last token is written and never read.

</details>

<details><summary>Hint 3: what if there is only one token?</summary>

Then there is no gap: ITL is empty, and TPOT has nothing to divide.

</details>
"""

# %%
from minillm.course.lab import check

check("ex01")

# %% [markdown]
"""
## Break it

**Mutant 1: TPOT = E2EL / n.** Two mistakes in one short formula: the wait for the first token is in it, and there are only n − 1 gaps. It looks harmless. Here is what
it says about the runs from above:
"""

# %%
for length in (16, 256, 1024):
    run = recorded[length]
    mutant = run.e2el / len(run.token_times[0])
    print(f"prompt {length:5}: TPOT {quantity(run.tpot, 's'):>8}")
    print(f"            mutant {quantity(mutant, 's'):>8}: {mutant / run.tpot:.1f} times")

# %% [markdown]
"""
It calls a machine with long prompts a slow writer, which it is not.

**Mutant 2: the last prompt token is read twice**, once by prefill and once by the first decode step. Shapes are right, nothing raises:
"""

# %%
logits, memory = prefill(model, prompt)
token, broken = prompt[-1], []
for _ in range(14):
    logits = decode(model, token, memory)
    token = int(logits.argmax())
    broken.append(token)
print("right: ", repr(tokenizer.decode(tokens)))
print("mutant:", repr(tokenizer.decode(broken)))

# %% [markdown]
"""
The model believes that the word stands there twice. And the mutant takes one step more than it needs: the first token was there already.

## How others do it

The two phases have the same names nearly everywhere.

* **vLLM**, `vllm/benchmarks/serve.py`: measures TTFT, TPOT, ITL and E2EL of a server, with the definitions above.
* **SGLang**, `python/sglang/bench_serving.py`: the same four. `python/sglang/bench_one_batch.py` times one prefill and each decode.
* **llama.cpp**, `tools/llama-bench/llama-bench.cpp`: reports tokens per second apart for *pp* (prompt processing) and *tg* (text generation).
* **minillm**, `minillm/generate.py`: the loop, on one page; `minillm/outputs.py`: the four numbers.

## Three questions

<details><summary>1. A request writes 100 tokens. How many decode steps?</summary>

99. The first token comes out of prefill.

</details>

<details><summary>2. TTFT is fine and users complain of stutter. Which of the four numbers do you look at?</summary>

ITL, and of it the longest gaps. TPOT is an average, and hides them.

</details>

<details><summary>3. Prefill does 256 tokens in one step. Why does decode not do 256 tokens in one step?</summary>

Because the second new token depends on the first, which nobody knows yet.

</details>

## Next

In both phases a token looks at the tokens before it. [02 · Attention](02_attention.ipynb) shows what it sees there.
"""
