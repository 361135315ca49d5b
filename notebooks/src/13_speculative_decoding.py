# %% [markdown]
"""
# 13 · Speculative decoding

**Can the big model check instead of write?**

45 minutes · needs 04, 05 and 08 · runs offline on a CPU

A decode step reads all weights to write one token. The step would hardly take longer if it had five tokens to work on. So let
somebody cheap guess a few tokens ahead, and let the model check all of them in one step. This lesson builds that, shows
that the text stays exactly the same, and measures what it buys and where it loses.
"""

# %%
import torch

from minillm import SamplingParams, load_model, load_tokenizer, prefill
from minillm.config import EngineConfig
from minillm.costs.steps import verify_step
from minillm.course.claims import CLAIMS, Workbench
from minillm.course.figures import style
from minillm.course.figures.curves import Curve, curves
from minillm.course.figures.lanes import verification_lanes
from minillm.course.figures.show import explore, fold, predict, show, show_card, this_machine
from minillm.course.figures.speculation import (
    Sweep,
    acceptance_lengths,
    output_distributions,
    speedups,
)
from minillm.course.lab import check
from minillm.course.lessons.rounds import rounds
from minillm.engine.engine import Engine
from minillm.engine.verify import given_draft, num_accepted
from minillm.generate import generate
from minillm.measure.bench import interleaved
from minillm.measure.bench_spec import bench_prompts, bench_spec, crossover_batch
from minillm.measure.datasheets import DATASHEETS
from minillm.measure.roof import Roof, expected_tokens, speculative_speedup, step_seconds
from minillm.measure.stepper import StepRunner
from minillm.sampling import probs_from_logits
from minillm.shapes import named_shape
from minillm.speculative import SpecDecodingStats, attach
from minillm.speculative.tree import verify_tree

model = load_model("tiny", device="cpu", dtype="float32", progress=False)
small = load_model("tiny-draft", device="cpu", dtype="float32", progress=False)
tokenizer = load_tokenizer("tiny")
texts = {token: tokenizer.decode([token]) for token in range(model.config.vocab_size)}
GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
print(this_machine())

# %% [markdown]
"""
## Predict

A model of 135 million weights decodes one request. A plain step works on one token. A *check* of four guesses works on
five: the newest token and the four after it. That is five times the arithmetic.

**How many times as long does the check take?** Write your number in place of the dots.
"""

# %%
guess = predict("Time of a step that checks 4 guesses, over a plain step", ..., "×")

# %% [markdown]
"""
## A toy: guess by looking back

The "model" below knows a rhyme by heart and says its next letter. The guesser has never heard of the rhyme. It looks at the last two
letters, finds the place where they stood before, and guesses that the same three letters will follow.
"""

# %%
rhyme = "row row row your boat gently down the stream row row row your boat"
said, checks = rhyme[:8], 0
while len(said) < len(rhyme):
    place = said.rfind(said[-2:], 0, -1)  # where the last two letters stood before
    guesses = said[place + 2 : place + 5] if place >= 0 else ""
    truth = rhyme[len(said) :][: len(guesses) + 1]  # one look: a letter for every place
    right = num_accepted(guesses, truth)
    said, checks = said + truth[: right + 1], checks + 1
    if right:
        print(f"guessed {guesses!r:6} {right} right, so {truth[: right + 1]!r} is said at once")
print(f"{len(rhyme) - 8} letters in {checks} looks at the model, none wrong: {said == rhyme}")

# %% [markdown]
"""
Look at what makes this safe. The guesser decides nothing. At each place the model says its own letter, and a guess counts
only if it is that letter. A wrong guess costs the guesses after it, for they were made for another text. And every look
brings at least one letter, because **the model's own letter at the first wrong place is right by definition**.

The guesses are called *drafts*. Their number is γ (gamma). The token that replaces a wrong draft is *recovered*; the one
after drafts that were all right is a *bonus*.

## The real model

The embedded model completes a class, and an n-gram guesser looks back in the text as in the toy, at the longest end
of it that stood there before. Each round is one step of the engine. Prefill comes first and is left out.
"""


# %%
def serve(who, text, params=GREEDY, **settings):
    """All rounds of one request, in an engine with this guesser."""
    settings = {
        "num_speculative_tokens": 4,
        "adaptive_drafts": False,
        "num_blocks": 200,
    } | settings
    engine = Engine(model, EngineConfig(**settings))
    attach(who, engine, tokenizer, device="cpu", dtype="float32", progress=False)
    return list(rounds(engine, tokenizer.encode(text), params)), engine


point = (
    "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self.y = y\n\n"
    "class Circle:\n    def __init__("
)
looked_up, engine = serve("ngram", point)
print(repr(tokenizer.decode([token for one in looked_up for token in one.said])))

# %% tags=["thumbnail"]
show(
    verification_lanes(looked_up[1:6], texts),
    alt="Five rounds of speculation, two lanes each. Violet cells are accepted guesses, a white "
    "struck-out cell is a rejected one. Amber is the model's own token: recovered in place of "
    "the rejected guess, or a bonus after guesses that were all right.",
)

# %% [markdown]
"""
Read a round from left to right. A violet cell with an **A** is a guess that the model would have written itself. The
first wrong guess is struck out, the ones after it are void, and below it in amber stands what the model says there. The
times on the right are measured: what guessing took, and what the check took, however many guesses were right.

What would prove the figure wrong: an amber token below a guess that says the same.

The second guesser is a *draft model*: the same kind of model with fewer weights, trained on the same text. It
writes four tokens one after the other, and they are checked together.
"""

# %%
area = "def area(width, height):\n    return width * height\n\ndef volume("
written, _ = serve("draft", area)
large, little = (sum(weight.numel() for weight in one.parameters()) for one in (model, small))
print(f"{little:,} weights guess, {large:,} check: {large / little:.1f} times as many")
show(
    verification_lanes(written[3:7], texts),
    alt="Four rounds with a draft model as the guesser. Of four guesses in each round "
    f"{', '.join(str(one.num_accepted) for one in written[3:7])} are accepted.",
)

# %% [markdown]
"""
It guesses where the text has never stood before, which no lookup can. It is wrong more often, and look at the times:
on a CPU a step of a tiny model is mostly overhead, so four draft steps are expensive. We come back to that.

## What a check looks like to the engine

Nothing new. A check is a query of 1 + k tokens in the packed batch, like a chunk of a prompt (lesson 11). It asks for
the logits of all its rows instead of the last. Drafts are written into the KV cache before they are checked; a wrong one is taken
back by a counter.
"""

# %%
part = next(part for record in engine.trace for part in record.requests if part.num_drafts)
print(f"tokens in the cache before the step: {part.num_computed}")
print(
    f"tokens of the step [1 + k]:          {part.num_scheduled}, of them {part.num_drafts} drafts"
)
print(f"rows of logits [1 + k, vocab]:       {[part.num_scheduled, model.config.vocab_size]}")
print(f"keys that the last row sees:         {part.kv_len}")
after = part.num_computed + 1 + part.num_accepted
print(f"accepted: {part.num_accepted}, so {after} tokens of the cache count afterwards")

# %% [markdown]
"""
## Speculation in a dozen lines

One request, greedy, on the contiguous cache of lesson 03. `roll_back` is there for a mutant below; leave it.
"""


# %%
@torch.inference_mode()
def speculate(tokens, new, guesser, roll_back=True):
    """`new` greedy tokens after these; guesser(tokens) -> a few guesses."""
    tokens, end = list(tokens), len(tokens) + new
    _, cache = prefill(model, tokens[:-1])
    while len(tokens) < end:
        guesses = guesser(tokens)
        rows = torch.tensor([tokens[-1], *guesses])
        places = torch.arange(cache.num_tokens, cache.num_tokens + len(rows))
        choices = model.logits(model(rows, places, cache.attend)).argmax(-1).tolist()
        tokens += choices[: num_accepted(guesses, choices) + 1]
        cache.num_tokens = len(tokens) - 1 if roll_back else cache.num_tokens + len(rows)
    return tokens[end - new : end]


def copycat(tokens):
    """Guess that the last four tokens come again."""
    return tokens[-4:]


prompt = tokenizer.encode(point)
plain = list(generate(model, prompt, GREEDY))
print("ours = one by one:       ", speculate(prompt, 40, copycat) == plain)
for name, told in (("n-gram", looked_up), ("draft", serve("draft", point)[0])):
    text = [token for one in told for token in one.said]
    print(f"engine, {name:6} = one by one:", text == plain)

# %% [markdown]
"""
Token for token, whoever guesses: the guesser decides about time, never about text.

## And when tokens are drawn?

With a temperature the model does not choose, it draws (lesson 04). Then "the model would have written the same" has no
meaning. The rule of Leviathan et al. and of Chen et al. (2023) works on probabilities instead. A guess `x` was drawn from the draft
model's distribution `q`; the model's is `p`.

1. Accept `x` with probability `min(1, p(x) / q(x))`: what the draft model likes too much is kept less often.
2. Otherwise draw from `max(p − q, 0)`, made to sum to 1: what the draft model proposes too rarely.

A guess that was not drawn (a lookup) needs neither: draw from `p`, and see whether it is the guess.

Is the result distributed as `p`? For a small vocabulary one need not sample: go through every guess that could be drawn and
everything that could follow, and add up. We take both real models in a real place, and their ten likeliest tokens.
"""

# %%
place = tokenizer.encode(area + "width, ")
free = SamplingParams(temperature=1.0)
logits = [prefill(one, place)[0][None] for one in (model, small)]
pair = [probs_from_logits(one, [free])[0].double() for one in logits]
likeliest = (pair[0] + pair[1]).topk(10).indices
p, q = (one[likeliest] / one[likeliest].sum() for one in pair)


def comes_out(rule, q):
    """Over all guesses x: q(x) times the distribution of the token that comes out for x."""
    guesses = torch.arange(len(p))
    return q @ rule(p.expand(len(p), -1), q.expand(len(p), -1), guesses)


def recover_from_p(p, q, guesses):
    """The mutant: a rejected guess is replaced by a plain draw from p."""
    accept = (p / q).clamp(max=1).gather(-1, guesses[:, None])
    return ((1 - accept) * p).scatter_add(-1, guesses[:, None], accept)


rules = {
    "accept with p / q, recover from max(p − q, 0)": comes_out(given_draft, q),
    "mutant: recover from p": comes_out(recover_from_p, q),
}
off = float((rules["mutant: recover from p"] - p).abs().max())
words = [texts[int(token)].replace(" ", "␣") for token in likeliest]
show(
    output_distributions(p, q, rules, words),
    alt="Two bar charts over ten tokens. With the right rule the bars of what comes out end at "
    f"the ticks of the target. With the mutant they are off by up to {off:.2f}.",
)

# %% [markdown]
"""
**First mutant, broken already.** Recovering from `p` looks harmless: `p` is what we want, after all. But the accepted guesses
have brought their share of `p`, and the mutant hands it out again: look where the circles stand above the ticks. Nothing raises, the text
reads well, and every token that the draft model likes comes too often. Only a test of the *distribution* finds it.

The package's rule in the engine, where guesses of a lookup leave even the random draws untouched:
"""

# %%
warm = SamplingParams(temperature=0.8, top_p=0.95, seed=7, max_tokens=40, ignore_eos=True)
drawn = [token for one in serve("ngram", point, warm)[0] for token in one.said]
print("sampled, n-gram = one by one, same seed:", drawn == list(generate(model, prompt, warm)))

# %% [markdown]
"""
## Measure: what does a check cost?

A model of 135 million random weights, which no cache of the processor holds: a plain step reads them all from memory. We time steps
that check 0 to 8 guesses, for one request and for sixteen. The formula knows two numbers of this machine, byte/s
and FLOP/s, and takes the longer of the two times (lesson 05).
"""

# %%
bench = Workbench()
numbers = [0, 1, 2, 4, 8]
measured, predicted = {}, {}
for batch in (1, 16):
    steps = {count: verify_step(128, drafts=count, batch=batch) for count in numbers}
    runs = {str(count): StepRunner(bench.timed, step) for count, step in steps.items()}
    best = [timing.best for timing in interleaved(runs, repeats=2).values()]
    shape, width = bench.timed.config, bench.timed.dtype.itemsize
    bound = [step_seconds(shape, step, width, bench.roof) for step in steps.values()]
    measured[batch] = [one / best[0] for one in best]
    predicted[batch] = [one / bound[0] for one in bound]
    plain_ms, check_ms = 1e3 * best[0], 1e3 * best[3]
    print(
        f"batch {batch:2}: a plain step {plain_ms:.1f} ms, one that checks 4 {check_ms:.1f} ms"
    )
print(this_machine())

# %%
alone, many = (measured[batch][numbers.index(4)] for batch in (1, 16))
show(
    curves(
        f"Checking 4 guesses takes {alone:.1f} plain steps alone, {many:.1f} in a batch of 16",
        [
            Curve("batch 1", numbers, measured[1], predicted[1], style.DRAFT, "o"),
            Curve("batch 16", numbers, measured[16], predicted[16], style.INK, "s"),
        ],
        x="guesses checked in one step",
        y="Time over that of a plain step of the same batch",
        unit="×",
        y_scale="linear",
    ),
    alt="Time of a check over that of a plain step, against guesses, for batches of 1 and 16. "
    f"At four guesses it is {alone:.1f} for one request and {many:.1f} for sixteen.",
)

# %%
guess.against(alone)

# %% [markdown]
"""
For one request the step waits for weights, and more rows ride along. For sixteen it already works on sixteen rows;
times five is eighty, and now the arithmetic is what it waits for. **Speculation spends arithmetic that would lie idle. A
batch spends it, too.** Points need not lie on the lines, because neither step runs at its bound. Below them the plain step loses
more: it starts as many operators for fewer rows. Above them the check does.

## How far do guesses carry?

If each guess is right with probability α, independently, a check of γ guesses brings
`E = 1 + α + α² + … + α^γ = (1 − α^(γ+1)) / (1 − α)` tokens. We serve held-out Python files, which neither model was trained
on, and count.
"""

# %%
held_out = bench_prompts(tokenizer, "held-out", 8, 192)


def sweep(who, batches, gammas):
    """A row of measurements for each batch and each number of guesses."""
    engine = Engine(model, EngineConfig(adaptive_drafts=False, num_blocks=400))
    attach(who, engine, tokenizer, device="cpu", dtype="float32", progress=False)
    rows = []
    for batch in batches:
        prompts = held_out[: max(2, batch)]
        rows += bench_spec(
            engine, prompts, batch=batch, num_drafts=gammas, max_tokens=24, repeats=1
        )
    return rows


by_gamma = [Sweep(who, sweep(who, [1], [1, 2, 4, 8])) for who in ("ngram", "draft")]
for one in by_gamma:
    stats = one.rows[2].stats
    rates = [round(rate, 2) for rate in stats.acceptance_rate_per_pos]
    print(f"{one.name}, γ=4: {stats.num_drafts} drafts, {stats.num_draft_tokens} draft tokens,")
    print(f"   {stats.num_accepted_tokens} accepted; share by position {rates}")

# %%
lengths = [f"{one.rows[-1].stats.mean_acceptance_length:.1f}" for one in by_gamma]
show(
    acceptance_lengths(by_gamma),
    alt="Tokens per check against γ, counted, beside the curve of the formula. At eight guesses "
    f"n-grams bring {lengths[0]} tokens and the draft model {lengths[1]}; both curves flatten.",
)

# %% [markdown]
"""
The names are vLLM's: a *draft* is one check of several *draft tokens*. The formula gets one α for the whole line. Where points leave it, guesses
are not independent: above it, one right guess makes the next one likelier; below it, guesses further ahead are worse than the first.

## What does it buy, and where does it lose?

A guess costs c plain steps, so the speed-up should be `E / (γ·c + 1)`. That is the formula of the paper, to which a check is as
cheap as a plain step. The dashes put in what a check really took, and for how many steps there was a guess at all.
"""

# %%
by_batch = [
    Sweep(one.name, [one.rows[2], *sweep(one.name, [4, 8], [4])])  # γ = 4 at batch 1 is there
    for one in by_gamma
]
print(this_machine())
print("guesser  γ  batch   measured   formula   as served   c: a guess, in plain steps")
for sweeps in (by_gamma, by_batch):
    for one in sweeps:
        for row in one.rows:
            print(
                f"{one.name:7} {row.num_drafts:2} {row.batch:5} {row.speedup.median:10.2f} "
                f"{row.formula:9.2f} {row.formula_as_served:10.2f} {row.draft_cost:11.2f}"
            )

# %%
extremes = [row.speedup.median for one in (*by_gamma, *by_batch) for row in one.rows]
show(
    speedups(by_gamma, by_batch),
    alt="Two panels of measured speed-ups beside two formulas: against γ at batch 1, and against "
    f"the batch at γ = 4. They lie between {min(extremes):.2f} and {max(extremes):.2f}.",
)

# %% [markdown]
"""
**Where it loses, honestly.** The draft model of this lesson is several times smaller, but on a CPU a guess of it costs a large part of a step,
because both models are too small to wait for memory. The column c says how much. A guess must be much cheaper than a step *in time*;
in weights is not enough. N-grams cost nothing and win where a text repeats itself, which code does. And the larger the
batch, the less a check is for free.

## Two refinements

**Adaptive drafts.** Who was wrong last time guesses less: one token more than were right, twice as many after all were.
The engine does that by default (`adaptive_drafts`). It saves guesses in vain, and pays with more steps:
"""

# %%
print("guesser  drafts     steps  guessed  in vain  tokens per check")
for who in ("ngram", "draft"):
    for adaptive in (False, True):
        settings = EngineConfig(
            num_speculative_tokens=8, adaptive_drafts=adaptive, num_blocks=400
        )
        engine = Engine(model, settings)
        attach(who, engine, tokenizer, device="cpu", dtype="float32", progress=False)
        for one in held_out[:2]:
            list(rounds(engine, one, GREEDY))
        stats = SpecDecodingStats.of(engine.trace)
        vain = stats.num_draft_tokens - stats.num_accepted_tokens
        kind = "adaptive" if adaptive else "always 8"
        print(
            f"{who:8} {kind:9} {len(engine.trace):6} {stats.num_draft_tokens:8} {vain:8} "
            f"{stats.mean_acceptance_length:8.2f}"
        )

# %% [markdown]
"""
It loses where a guess and its check cost next to nothing: a lookup, one request alone. There the additional steps are all it brings.

**Trees.** A chain is a bet on one continuation. A *tree* bets on several: its nodes are packed after the text, each sees its
ancestors only, and stands at the position of its depth. One step checks them all (`minillm.speculative.tree`). Eight
guesses, spent in two ways:
"""


# %%
def chain(text):
    return [list(generate(small, text, SamplingParams(temperature=0, max_tokens=8)))]


def fork(text):
    """The two likeliest next tokens, and three more after each."""
    first = prefill(small, text)[0].topk(2).indices.tolist()
    three = SamplingParams(temperature=0, max_tokens=3)
    return [[token, *generate(small, [*text, token], three)] for token in first]


for guesser in (chain, fork):
    checks, brought, same = 0, 0, True
    for start in held_out[:2]:
        text, (_, cache) = list(start[:64]), prefill(model, start[:63])
        while len(text) < 64 + 32:
            guesses = guesser(text[-48:])
            text += verify_tree(model, text, guesses, cache, GREEDY, num_prompt=64)
            checks += 1
        brought += len(text) - 64
        same &= text[64:96] == list(generate(model, start[:64], GREEDY))[:32]
    print(
        f"{guesser.__name__:5}: {brought / checks:.2f} tokens a check; text unchanged: {same}"
    )

# %% [markdown]
"""
A fork saves the round in which the likeliest first guess is wrong, and is short where it is right. Compare the two numbers: with this
draft model they are close, and a tree needs a mask and moves keys about. So the engine of this course checks chains. EAGLE's heads guess
well enough to fill trees, and one request on a large GPU has arithmetic to spare.

## Explore: another temperature for the guesser

The model's distribution stays, the draft model draws at another temperature. What changes: how many guesses are accepted,
which is the sum of `min(p, q)`. What must not change: the bars.
"""


# %%
def warmer(draft_temperature):
    """The right rule, when the draft model draws its guesses at this temperature."""
    hotter = SamplingParams(temperature=draft_temperature)
    q = probs_from_logits(logits[1], [hotter])[0].double()[likeliest]
    q = q / q.sum()
    accepted = float(torch.minimum(p, q).sum())
    name = f"draft temperature {draft_temperature}: {accepted:.0%} of the guesses are accepted"
    return output_distributions(p, q, {name: comes_out(given_draft, q)}, words)


explore(
    warmer,
    alt="The exact distribution of what comes out while the draft model's temperature changes "
    "from 0.3 to 3. The circles move and the share of accepted guesses with them; the bars stay.",
    draft_temperature=[0.3, 1, 3],
)

# %% [markdown]
"""
## On a napkin

A draft model is right with probability 0.8 and costs a tenth of a step. Which γ is best, and what does it buy? And for Llama 3.1 8B on an
H200: from which batch on does checking four guesses cost?

By hand: E of γ = 4 is 1 + 0.8 + 0.64 + 0.51 + 0.41. For the second part, the ridge of the H200 is 989 TFLOP/s over
4.8 TB/s (data sheet), a weight of 2 bytes makes 2 FLOP for each row, and a check has 5 rows per request.
"""

# %%
speed = {gamma: speculative_speedup(0.8, gamma, 0.1) for gamma in range(1, 13)}
top = max(speed, key=speed.get)
h200 = next(one for one in DATASHEETS if one.name == "H200 SXM")
roof = Roof(h200.bfloat16_rate, h200.read_bandwidth)
batch = crossover_batch(named_shape("llama-3.1-8b"), 2, roof, 4)
fold(
    "Answer",
    f"γ = 4 brings {expected_tokens(0.8, 4):.2f} tokens for 1.4 steps: {speed[4]:.2f} times as "
    f"fast. The best is γ = {top} with {speed[top]:.2f}: beyond it, guesses cost more than they "
    f"bring. On the H200 checking four guesses costs from batch **{batch:.0f}** on, for short "
    "contexts, where attention hardly counts.",
)

# %% [markdown]
"""
## What people say

A statement that one hears often, tried on this machine. A bar is what was measured, a tick what the formula predicted. The model
is the one that was timed above; its guesses are made right at random, four times out of five.
"""

# %%
show_card(CLAIMS["A23"].card(bench))

# %% [markdown]
"""
## Your turn

`exercises/ex13_speculative_decoding.py` · difficulty ●●●●○ · 60 minutes

You write the n-gram guesser, the greedy check, and the rule for drawn guesses. Work on it with `minillm lab test ex13`, or run the cell below.

<details><summary>Hint 1: how many tokens does a check bring?</summary>

One more than were accepted: 1 to γ + 1. If yours brings γ at most, the bonus token is missing.

</details>

<details><summary>Hint 2: my residual is sometimes all zeros</summary>

Then p equals q, and no guess can be rejected but by rounding. Fall back to p instead of dividing by zero.

</details>

<details><summary>Hint 3: the text is right and the distribution is not</summary>

Compare your three numbers with those of the figure above: p(x) / q(x), not the other way round; the residual of p − q, not p; and
both after the same temperature and the same cuts.

</details>
"""

# %%
check("ex13")

# %% [markdown]
"""
## Break it

**Second mutant: the cache is not rolled back.** The keys of rejected guesses stay and count. The next tokens see words that
were never said, and stand at positions that are too far right.
"""

# %%
wrong = speculate(prompt, 40, copycat, roll_back=False)
print("right:", repr(tokenizer.decode(plain)))
print("wrong:", repr(tokenizer.decode(wrong)))
print("tokens that agree before the first difference:", num_accepted(plain, wrong))

# %% [markdown]
"""
It writes, nothing raises, and short tests may pass: where all guesses are accepted there is nothing to roll back. The engine's
own test plays hundreds of random loads with right, wrong and half-right guessers against running alone.

## How others do it

* **vLLM**, `vllm/v1/sample/rejection_sampler.py`: the rule above as Triton kernels; `vllm/v1/spec_decode/ngram_proposer.py` and
  `eagle.py` guess. Its metrics have the names of this lesson.
* **SGLang**, `python/sglang/srt/speculative/eagle_worker.py`: trees of guesses from EAGLE heads, checked with a tree mask.
* **llama.cpp**, `common/speculative.cpp`: a draft model in a context of its own; `examples/lookup` guesses with n-grams.
* **transformers**, `src/transformers/generation/candidate_generator.py`: *assisted generation* and *prompt lookup*, for a batch of one.
* **minillm**, `minillm/engine/verify.py`: one page, with the argument why accepting and recovering are one draw.

## Three questions

<details><summary>1. A guesser that is always wrong: what happens to the text, and what to the time?</summary>

The text stays the same. Each check brings one token, like a plain step, and costs a little more, and guessing comes on top. Adaptive
drafts guess a single token then.

</details>

<details><summary>2. The draft model equals the model. How many guesses are accepted, and is that good?</summary>

All of them, γ + 1 tokens a check. But each guess costs a whole step, so γ + 1 tokens take γ + 1 steps: nothing is won.

</details>

<details><summary>3. Why is it wrong to treat the guess of a lookup as a draw from some other distribution?</summary>

It was not drawn: its q has all mass on one token. Dividing by any other q keeps it too often or too rarely. Draw from p and compare.

</details>

## Next

You have seen every part. [15 · Capstone](15_capstone.ipynb) puts your own parts into one engine.
"""
