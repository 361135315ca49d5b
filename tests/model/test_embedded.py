"""The two models that ship: what they weigh, that they are what they say, and that training shows.

The bounds on loss and behaviour are far below what the shipped checkpoints reach (their model cards say it), and far
above what an untrained model does: the last tests are run on one, too, and must fail there.
"""

from __future__ import annotations

import ast
import math
import random
import re
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.course.training.batches import windows
from minillm.course.training.bpe import END_OF_TEXT_ID
from minillm.generate import generate
from minillm.measure.corpus import held_out_texts
from minillm.model.decoder import Decoder
from minillm.model.loader import EMBEDDED, assemble, load_model
from minillm.model.tokenizer import Tokenizer, load_tokenizer
from minillm.sampling import SamplingParams
from tests.families import Drawn

NAMES = ("tiny", "tiny-draft")
PROMPTS = {  # and a name in each that a continuation should use again
    "def fibonacci(n):\n": "n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n": "item",
    "import os\n\n\ndef read_lines(path):\n": "path",
    "def mean(values):\n    total = 0\n    for value in values:\n": "value",
    "def test_sorting():\n    numbers = [3, 1, 2]\n": "numbers",
    "class Point:\n    def __init__(self, x, y):\n        self.x = x\n": "y",
}
CODE = (
    next(iter(PROMPTS)) + "    return n\n\n\nclass Stack:\n    def push(self, item):\n        self.items.append(item)\n"
)


class CausalAttend:
    """One sequence, no cache; keeps the attention weights of every layer, [heads, n, n]."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
        future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        self.weights.append(scores.masked_fill(future, -torch.inf).softmax(-1))
        return torch.einsum("hqk,khd->qhd", self.weights[-1], v)


@cache
def model(name: str) -> Decoder:
    return load_model(name, dtype="float32", device="cpu", progress=False)


@cache
def untrained() -> Decoder:
    config, cpu = model("tiny").config, torch.device("cpu")
    weights = Drawn(config, torch.float32, torch.Generator().manual_seed(0))
    return assemble(config, weights, cpu, torch.float32)


@cache
def tokenizer() -> Tokenizer:
    loaded = load_tokenizer("tiny")
    assert loaded is not None
    return loaded


@cache
def held_out_rows() -> Tensor:
    """A few thousand held-out tokens, [n, 257]."""
    text = "".join(held_out_texts(30_000))[:30_000]
    tokens = np.array(tokenizer().encode(text))
    return windows(tokens, 256, range((len(tokens) - 1) // 256))


def all_logits(decoder: Decoder, ids: list[int], attend: CausalAttend | None = None) -> Tensor:
    hidden = decoder(torch.tensor(ids), torch.arange(len(ids)), attend or CausalAttend())
    return decoder.logits(hidden)


def complete(decoder: Decoder, prompt: str, count: int = 60) -> str:
    """The greedy continuation."""
    params = SamplingParams(temperature=0, max_tokens=count)
    return tokenizer().decode(generate(decoder, tokenizer().encode(prompt), params))


@pytest.mark.parametrize(("name", "limit"), [("tiny", 16_000_000), ("tiny-draft", 2_000_000)])
def test_size(name: str, limit: int) -> None:
    assert (EMBEDDED / name / "model.safetensors").stat().st_size <= limit


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(EMBEDDED / name)
    ids = AutoTokenizer.from_pretrained(folder).encode(CODE)
    assert ids == tokenizer().encode(CODE)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([ids])).logits[0]
    assert (all_logits(model(name), ids) - theirs).abs().max() <= 1e-4


def test_both_models_share_one_tokenizer() -> None:
    files = [(EMBEDDED / name / "tokenizer.json").read_bytes() for name in NAMES]
    assert files[0] == files[1]
    assert (
        len(tokenizer().vocabulary) == model("tiny").config.vocab_size == model("tiny-draft").config.vocab_size == 4096
    )
    assert model("tiny").config.eos_token_ids == (END_OF_TEXT_ID,)


@pytest.mark.parametrize("seed", range(5))
def test_tokenizer_brings_back_random_text(seed: int) -> None:
    rng = random.Random(seed)
    ranges = (range(128), range(0xD800), range(0xE000, 0x110000))  # ASCII, and all but the surrogates
    text = "".join(chr(rng.choice(rng.choice(ranges))) for _ in range(300))
    assert tokenizer().decode(tokenizer().encode(text)) == text, f"seed {seed}"
    data = rng.randbytes(100)
    single = {tokenizer().token_bytes(i): i for i in range(1, 257)}
    assert b"".join(tokenizer().token_bytes(single[bytes([byte])]) for byte in data) == data


@pytest.mark.parametrize("depth", range(1, 6))
def test_an_indentation_is_one_token(depth: int) -> None:
    assert len(tokenizer().encode("\n" + "    " * depth + "x")) == 3


@pytest.mark.parametrize("name", NAMES)
def test_card_says_how_it_was_made(name: str) -> None:
    card = (EMBEDDED / name / "README.md").read_text()
    facts = ("minillm train", "steps", "nats per token", "bits per byte", "cores", "What it is not")
    assert all(fact in card for fact in facts)


def check_loss(decoder: Decoder, bound: float) -> None:
    rows = held_out_rows()
    loss = sum(float(F.cross_entropy(all_logits(decoder, row[:-1].tolist()), row[1:])) for row in rows) / len(rows)
    assert loss < bound, f"{loss:.3f} nats per token"


@pytest.mark.parametrize(("name", "bound"), [("tiny", 3.3), ("tiny-draft", 4.2)])
def test_held_out_loss(name: str, bound: float) -> None:
    check_loss(model(name), bound)


def parsed_lines(prompt: str, completion: str) -> int:
    """Whole lines of the completion in the longest beginning of prompt + completion that is valid Python."""
    lines = (prompt + completion).splitlines()
    given = len(prompt.splitlines())
    for end in range(len(lines) - 1, given, -1):  # the last line may be cut
        try:
            ast.parse("\n".join(lines[:end]))
        except SyntaxError:
            continue
        return end - given
    return 0


def check_completions(decoder: Decoder) -> None:
    """Most prompts continue with at least two lines of valid Python that use a name of the prompt again."""
    good = 0
    for prompt, name in PROMPTS.items():
        completion = complete(decoder, prompt)
        good += parsed_lines(prompt, completion) >= 2 and re.search(rf"\b{name}\b", completion) is not None
    assert good >= 4, f"{good} of {len(PROMPTS)}"


def test_completions_look_like_python() -> None:
    check_completions(model("tiny"))


def induction_scores(decoder: Decoder, length: int = 64) -> Tensor:
    """[layers, heads]: in a random sequence given twice, the attention from a token's second occurrence to the token
    after its first (Olsson et al. 2022, arXiv:2209.11895), averaged over the second half."""
    generator = torch.Generator().manual_seed(0)
    once = torch.randint(1000, 4000, (length,), generator=generator).tolist()
    attend = CausalAttend()
    all_logits(decoder, once + once, attend)
    second = torch.arange(length, 2 * length - 1)
    return torch.stack([weights[:, second, second - length + 1].mean(-1) for weights in attend.weights])


def check_induction(decoder: Decoder) -> None:
    """Some head attends there with a tenth of its weight, ten times what spreading evenly would give."""
    assert induction_scores(decoder).max() > 0.1


def test_a_head_copies_what_came_before() -> None:
    check_induction(model("tiny"))


def agreement(target: Decoder, draft: Decoder) -> float:
    """The share of held-out positions where both models would choose the same token."""
    rows = held_out_rows()[:8, :-1]
    choices = [torch.stack([all_logits(m, row.tolist()).argmax(-1) for row in rows]) for m in (target, draft)]
    return float((choices[0] == choices[1]).float().mean())


def check_agreement(draft: Decoder) -> None:
    assert agreement(model("tiny"), draft) > 0.4


def test_the_draft_often_agrees() -> None:
    check_agreement(model("tiny-draft"))


def test_an_untrained_model_passes_none_of_this() -> None:
    for check in (lambda m: check_loss(m, 4.2), check_completions, check_induction, check_agreement):
        with pytest.raises(AssertionError):
            check(untrained())
