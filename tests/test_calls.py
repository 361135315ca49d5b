"""Random calls of `LLM.generate` on a pool of four blocks, with prompts and parameters drawn from right and wrong ones.

A call with nothing wrong in it gives what each completion gets alone: its tokens from the plain loop, its end and its
text from the definition in `ended`. A call with anything wrong in it ends as a named error. Either way nothing of it
stays in the engine, which serves the next call.

What to expect is known from the draw: whoever draws a value knows whether it is right, and what it means.
By hand, many more: `pytest tests/test_calls.py --calls 100000`. One call again, by the seed that a failure prints:
`python -c "from tests.test_calls import replay; replay(SEED)"`.
"""

from __future__ import annotations

import array
import codecs
import math
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from torch import Tensor

from minillm import sampling
from minillm.config import KERNELS, POLICIES, EngineConfig, Range
from minillm.engine.engine import Engine
from minillm.engine.request import Request
from minillm.errors import MinillmError, RequestError
from minillm.generate import choose, prefill
from minillm.llm import LLM
from minillm.model.decoder import Decoder
from minillm.model.hf import model_config
from minillm.model.loader import assemble
from minillm.model.tokenizer import Tokenizer
from minillm.outputs import CompletionOutput, Logprob, RequestOutput
from minillm.prompts import read_prompts
from minillm.sampling import SamplingParams
from minillm.speculative import NgramProposer
from minillm.text import OutputProcessor, TextStream
from tests.families import FAMILIES, Drawn

# The vocabulary: letters, a token of two letters, a character of two bytes and one of four, a special token, and one
# that only the model knows.
SPELLED = [b"a", b"b", b"c", b"d", b"ab", b" ", b"\n", *(bytes([byte]) for byte in "é😀".encode()), b"e", b"f", b"g"]
SPELLED += [letter.encode() for letter in "hijklm"]
EOS = len(SPELLED)
VOCAB = EOS + 2
POSITIONS = 24
PIECES = ["a", "b", "ab", "c", " ", "\n", "é", "😀", "<eos>", "hi", "z"]  # of texts; nobody knows z
CALLS_PER_ENGINE = 40


# --- The model, its text, and the oracle: what a completion gets that is alone ---


@cache
def model() -> Decoder:
    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=8)
    shape |= dict(vocab_size=VOCAB, num_key_value_heads=1, eos_token_id=EOS, max_position_embeddings=POSITIONS)
    config = model_config(FAMILIES["smollm2"] | shape | {"initializer_range": 0.5})
    weights = Drawn(config, torch.float32, torch.Generator().manual_seed(0))
    return assemble(config, weights, torch.device("cpu"), torch.float32, kernels="reference")


@cache
def tokenizer() -> Tokenizer:
    """Byte-level BPE with one merge; letters that it does not know are dropped."""
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    named = {bytes([byte]): letters.pre_tokenize_str(chr(byte))[0][0] for byte in b"abcdefghijklm \n"}
    for character in "é😀":
        named |= dict(
            zip((bytes([b]) for b in character.encode()), letters.pre_tokenize_str(character)[0][0], strict=True)
        )
    vocabulary = {"".join(named[bytes([byte])] for byte in token): i for i, token in enumerate(SPELLED)}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    backend.pre_tokenizer, backend.decoder = letters, decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<eos>", special=True)])
    return Tokenizer(backend, eos_token_id=EOS)


def encode(text: str) -> tuple[int, ...]:
    """The token ids of a text, by hand."""
    ids = list[int]()
    for number, part in enumerate(text.split("<eos>")):
        ids += [EOS] * (number > 0)
        known = b"".join(bytes([byte]) for byte in part.encode() if bytes([byte]) in SPELLED)
        while known:
            size = 2 if known.startswith(b"ab") else 1
            ids.append(SPELLED.index(known[:size]))
            known = known[size:]
    return tuple(ids)


def written(tokens: Sequence[int], skip_special: bool, *, final: bool) -> str:
    """The text of these tokens, without a character that is not complete; if `final`, with U+FFFD for it."""
    special = b"" if skip_special else b"<eos>"
    spelled = b"".join(SPELLED[t] if t < EOS else special if t == EOS else b"" for t in tokens)
    return codecs.getincrementaldecoder("utf-8")(errors="replace").decode(spelled, final)


@lru_cache(maxsize=200_000)
def logits_after(tokens: tuple[int, ...]) -> Tensor:
    return prefill(model(), tokens)[0]


@lru_cache(maxsize=20_000)
def logprobs_after(tokens: tuple[int, ...]) -> list[float]:
    return [float(value) for value in logits_after(tokens).log_softmax(-1)]


def stream(prompt: tuple[int, ...], params: SamplingParams, index: int) -> Iterator[int]:
    """The tokens of one completion, from the logits of one pass over all before them; it has no end."""
    output = list[int]()
    while len(prompt) + len(output) <= POSITIONS:
        output.append(choose(logits_after((*prompt, *output)), params, prompt, output, index, (EOS,)))
        yield output[-1]


@dataclass(frozen=True)
class Completion:
    token_ids: list[int]
    text: str
    finish_reason: str | None
    stop_reason: int | str | None


def ended(tokens: Iterable[int], params: SamplingParams) -> Completion:
    """Where a completion ends, by definition, and what its text is.

    At the first token that completes a stop string, the model's end token, a stop token, or max_tokens; in this order.
    A stop string counts if its last character came after min_tokens tokens; of several, the one that begins first,
    then the shortest.
    """
    said, early = list[int](), 0
    for token in tokens:
        said.append(token)
        text = written(said, params.skip_special_tokens, final=False)
        early = len(text) if len(said) <= params.min_tokens else early
        hits = [
            (place, stop)
            for stop in params.stop or ()
            for place in range(len(text))
            if text.startswith(stop, place) and place + len(stop) > early
        ]
        if hits:
            place, stop = min(hits)
            return Completion(said, text[: place + len(stop) * params.include_stop_str_in_output], "stop", stop)
        whole = written(said, params.skip_special_tokens, final=True)
        if token == EOS and not params.ignore_eos:
            return Completion(said, whole, "stop", None)
        if token in (params.stop_token_ids or ()):
            return Completion(said, whole, "stop", token)
        if len(said) == params.max_tokens:
            return Completion(said, whole, "length", None)
    return Completion(said, "", None, None)


# --- Right values, each with what it means, and wrong ones ---

Right = tuple[Any, Any]  # what is handed in, and the plain value that it means
nan, inf = math.nan, math.inf
NO_NUMBER: list[Any] = [nan, inf, -inf, "1", b"1", [1], (), {}, True, False, np.True_, 1j, object(), int]
NO_NUMBER += [np.array([1]), torch.tensor([1.0]), torch.tensor(True), np.float32("nan"), torch.tensor(-inf), 10**5000]
NO_COLLECTION: list[Any] = [5, 1.5, True, b"ab", bytearray(b"ab"), object(), list, torch.tensor(5), iter(())]


def alike(*values: Any) -> list[Right]:
    return [(value, value) for value in values]


def nothing(*values: Any) -> list[Right]:
    return [(value, ()) for value in values]


def floats(*values: float) -> list[Right]:
    """As Python's, NumPy's and PyTorch's; all of them exact in float32."""
    kinds: list[Callable[[float], Any]] = [float, np.float32, np.float64, torch.tensor, np.array]
    return [(kind(value), float(value)) for value in values for kind in kinds]


def ints(*values: int) -> list[Right]:
    return [(kind(value), value) for value in values for kind in (int, np.int64, np.int32, torch.tensor, np.array)]


BOOLS: list[Right] = [(kind(value), value) for value in (True, False) for kind in (bool, np.bool_, torch.tensor)]
NO_BOOL: list[Any] = [None, 0, 1, "True", 1.0, [True], np.int64(1), nan, object()]

RIGHT: dict[str, list[Right]] = {
    "temperature": [*floats(0, 0.5, 1, 2.5), *alike(0, 1, 1e-30, 1.2e-38, 1e30, 3.4e38)],
    "top_p": [*floats(0.25, 0.5, 1), *alike(0.9, 1, 1e-30)],
    "top_k": [*ints(0, -1, 1, 2, 7, 24, 100), *alike(2**31 - 1)],
    "min_p": [*floats(0, 0.25, 1), *alike(0, 1, 0.1, 1e-30)],
    "repetition_penalty": [*floats(0.5, 1, 2), *alike(1, 1e-30, 1e30)],
    "presence_penalty": [*floats(-2, 0, 0.5), *alike(-2, 2)],
    "frequency_penalty": [*floats(-0.5, 0, 1.5), *alike(-2, 2)],
    "logit_bias": [
        *nothing(None, {}, [], ()), ({5: 3}, ((5, 3.0),)), ([(4, 2.0)], ((4, 2.0),)),
        ({0: -100, 1: 100}, ((0, -100), (1, 100))), ({np.int64(2): np.float32(1.5)}, ((2, 1.5),)),
        (MappingProxyType({8: 30}), ((8, 30),)), ({EOS: 8}, ((EOS, 8.0),)), ({VOCAB - 1: 5}, ((VOCAB - 1, 5.0),)),
    ],
    "bad_words": [
        *nothing(None, [], ()), (["ab"], ("ab",)), (("a", "b"), ("a", "b")), ({"é"}, ("é",)),
        ([" "], (" ",)), (["  cd"], ("  cd",)), (np.array(["e", "fg"]), ("e", "fg")),
    ],
    "bad_words_token_ids": [
        *nothing(None, [], ()), ([[0]], ((0,),)), ([(0, 1), [4]], ((0, 1), (4,))),
        (np.array([[2, 3]]), ((2, 3),)), ([torch.tensor([5])], ((5,),)), ([[VOCAB - 1]], ((VOCAB - 1,),)),
    ],
    "seed": [*ints(0, 1, -5, 12), *alike(2**70, 10**5000), (np.uint64(2**64 - 1), 2**64 - 1)],
    "stop": [
        *nothing(None, [], ()), ("a", ("a",)), (["ab", "c"], ("ab", "c")), ({"é"}, ("é",)),
        (("\ufffd",), ("\ufffd",)), (np.array(["d", "e"]), ("d", "e")), (np.str_("f"), ("f",)), ("<eos>", ("<eos>",)),
        (["never seen"], ("never seen",)),
    ],
    "stop_token_ids": [
        *nothing(None, [], ()), ([5], (5,)), ((EOS,), (EOS,)), ({1, 2}, (1, 2)),
        (range(3), (0, 1, 2)), (np.array([6, 7]), (6, 7)), (torch.tensor([8]), (8,)), ([np.int64(9)], (9,)),
        ([10**6], (10**6,)),
    ],
    "include_stop_str_in_output": BOOLS,
    "ignore_eos": BOOLS,
    "skip_special_tokens": BOOLS,
    "logprobs": [*ints(0, 1, 3, 20), *alike(None)],
    "prompt_logprobs": [*ints(0, 2, 20), *alike(None)],
}  # fmt: skip

WRONG: dict[str, list[Any]] = {
    "temperature": [*NO_NUMBER, None, -0.5, -1, 3.5e38, 1e300, 1e-46, 1e-320, np.float64(1e39)],
    "top_p": [*NO_NUMBER, None, 0, 0.0, -0.1, 1.0001, 2, 1e-46],
    "top_k": [*NO_NUMBER, None, -2, 1.0, 2.5, np.float32(1), 2**31, 2**64],
    "min_p": [*NO_NUMBER, None, -0.1, 1.1, 2, 1e-46],
    "repetition_penalty": [*NO_NUMBER, None, 0, -1, 1e31, 1e-31, 0.0],
    "presence_penalty": [*NO_NUMBER, None, 2.1, -2.1, 3, 1e-46, -1e-46],
    "frequency_penalty": [*NO_NUMBER, None, 2.1, -2.1, -3, 1e-46],
    "logit_bias": [
        *NO_COLLECTION, {5: 101}, {5: nan}, {5: -inf}, {5: True}, {5: None}, {5: "1"}, {-1: 1}, {2**40: 1},
        {"5": 1}, {1.0: 1}, {True: 1}, {None: 1}, [5], "ab", [(5,)], [(5, 1, 1)], {5: 1e-46}, {5: [1]}, [None],
    ],
    "bad_words": [*NO_COLLECTION, "ab", "", [""], ["a", ""], [b"a"], [5], [None], [["a"]], ["\ud800"], {"a": 1}],
    "bad_words_token_ids": [
        *NO_COLLECTION, [[]], [[0], []], [0], [[-1]], [[True]], [["a"]], "ab", [[1.0]], [None], ["ab"], {0: [1]},
        [[2**31]], [b"ab"], np.array([1, 2]), np.array([[1.5]]),
    ],
    "seed": [nan, inf, "1", b"1", [1], (), True, 1.0, 1.5, object(), np.array([1]), torch.tensor([1, 2])],
    "stop": [*NO_COLLECTION, "", [""], ["a", ""], [b"a"], [5], [None], [["a"]], "\ud800", ["\udfff"], {"a": 1}],
    "stop_token_ids": [
        *NO_COLLECTION, "ab", [True], [-1], [1.0], ["a"], [2**31], [None], [[1]], {1: 2}, np.array([1.5]), [nan],
        [10**5000], np.array([[1]]), [np.True_],
    ],
    "include_stop_str_in_output": NO_BOOL,
    "ignore_eos": NO_BOOL,
    "skip_special_tokens": NO_BOOL,
    "logprobs": [*NO_NUMBER, -1, 21, 1.0, np.float32(1), 2**64],
    "prompt_logprobs": [*NO_NUMBER, -1, 21, 1.0, np.float64(2), 2**64],
    "max_tokens": [*NO_NUMBER, None, 0, -1, 1.0, np.float32(1), 2**31, 2**64],
    "min_tokens": [*NO_NUMBER, None, -1, 1.0, np.float32(1), 2**31],
    "n": [*NO_NUMBER, None, 0, -1, 1.0, 16385, 2**31],
}  # fmt: skip

# Refused by the model's vocabulary: only where there is a prompt to be served.
FOREIGN: dict[str, list[Any]] = {
    "logit_bias": [{VOCAB: 1}, {0: 1, VOCAB: 1}],
    "bad_words_token_ids": [[[VOCAB]], [[0], [0, 99]]],
}
WRONG = {name: [*values, *FOREIGN.get(name, [])] for name, values in WRONG.items()}

# One prompt that is wrong, alone and among others. ([5] is the prompt 5, so no integer is here.)
WRONG_PROMPTS: list[Any] = [
    None, 1.5, nan, True, 1j, b"ab", bytearray(b"ab"), memoryview(b"ab"), {"a"}, frozenset([1]), object(), str, len, "",
    "zzz", {}, {"prompt": 5}, {"prompt": None}, {"prompt": b"a"}, {"prompt": ""}, {"text": "a"}, {"cache_salt": "x"},
    {"prompt": "a", "images": []}, {"prompt_token_ids": "ab"}, {"prompt_token_ids": 5}, {"prompt_token_ids": []},
    {"prompt_token_ids": [1.0]}, {"prompt_token_ids": {1}}, {"prompt_token_ids": [[1]]}, {"prompt_token_ids": [VOCAB]},
    {"prompt": "a", "prompt_token_ids": []}, {"prompt": "a", "cache_salt": 1}, {"prompt": "a", "cache_salt": b"x"},
    {"prompt": "a", "cache_salt": "\ud800"}, {5: "a"}, [1.0, 2.0], [True], [1, "a"], [1, None], [1, 2.0], [1, [2]],
    [-1], [VOCAB], [1, 2, VOCAB], [2**70], [10**5000], [nan], np.array([]), np.array([1.0]), np.array([True]),
    np.array(["a"]), np.array([[1, 2]]), np.array([None]), np.array([VOCAB]), torch.tensor([]), torch.tensor([1.0]),
    torch.tensor([True]), torch.tensor([[1, 2]]), torch.tensor([-1]), torch.tensor([1j]), "half \ud800 a character",
    {"prompt": "\udfff"},
]  # fmt: skip

WRONG_PARAMS: list[Any] = [{}, {"temperature": 0}, "greedy", 5, SamplingParams, object(), nan, b"", {SamplingParams()}]


# --- A call ---


@dataclass
class Call:
    """What is handed in, and what is expected of it."""

    config: EngineConfig
    prompts: Any
    params: Any  # keywords of SamplingParams, a list of these, or what is handed in as it is
    wrong: str | None = None  # what is wrong, if anything: the name of a field, "prompt" or "sampling_params"
    ids: list[tuple[str | None, tuple[int, ...]]] = field(default_factory=list)  # each prompt's text, if given, and ids
    wishes: list[SamplingParams] = field(default_factory=list)  # what the parameters of each prompt mean


BASES = [tuple(random.Random(seed // 2).choices(range(VOCAB), k=6)) for seed in range(4)]
BASES = [base + tuple(random.Random(seed).choices(range(VOCAB), k=POSITIONS)) for seed, base in enumerate(BASES)]


def draw_config(number: int) -> EngineConfig:
    """Four blocks; engine `number` and its calls are drawn from this number alone."""
    rng = random.Random(f"engine {number}")
    return EngineConfig(
        num_blocks=5,
        block_size=rng.choice([2, 3, 4, 4, 5, 8]),
        max_num_seqs=rng.choice([1, 2, 3, 4, 8]),
        max_num_batched_tokens=rng.choice([1, 4, 8, 8, 16, 16]),
        policy=rng.choice(POLICIES),
        kernels=rng.choice(KERNELS),
        enable_prefix_caching=rng.random() < 0.7,
        num_speculative_tokens=rng.choice([0, 1, 4]),
        adaptive_drafts=rng.random() < 0.5,
        trace_bytes=rng.choice([0, 2**16]),
        seed=rng.choice([0, 7]),
        debug=True,
    )


def draw_call(seed: int) -> Call:
    """The call of this seed, on the engine of its number."""
    rng, config = random.Random(f"call {seed}"), draw_config(seed // CALLS_PER_ENGINE)
    limit = min(POSITIONS, 4 * config.block_size)
    many = rng.choice([0, 1, 1, 1, 1, 1, 2, 2, 3, 4])
    drawn = [draw_prompt(rng, limit) for _ in range(many)]
    if many == 1 and rng.random() < 0.05:
        drawn = [(iter(drawn[0][2]), None, drawn[0][2])]  # its ids, one by one: only as the one prompt of the call
    call = Call(config, None, None, ids=[(text, ids) for _, text, ids in drawn])
    given = [one for one, _, _ in drawn]
    what = rng.choices(["nothing", "field", "prompt", "sampling_params"], [55, 25, 14, 6])[0]
    if what == "prompt":
        call.wrong = what
        too_long = [BASES[0][: limit + 1], list(BASES[1][: limit + 9]), "a" * (limit + 1), [1] * 1000]
        given[rng.randrange(many) if many else 0 : many] = [rng.choice([*WRONG_PROMPTS, *too_long])]
        rng.shuffle(given)
    call.prompts = draw_series(rng, given)
    draw_all_params(rng, call, limit, field=what == "field")
    if what == "sampling_params":
        call.wrong = what
        right = SamplingParams(temperature=0, max_tokens=1)
        counts = [count for count in range(6) if count != many]
        call.params = rng.choice([*WRONG_PARAMS, [right] * rng.choice(counts), (right,) * rng.choice(counts)])
        if rng.random() < 0.3 and many:
            call.params = [right] * (many - 1) + [rng.choice([None, {}, "a", SamplingParams])]
    return call


def draw_series(rng: random.Random, given: list[Any]) -> Any:
    """One prompt by itself, or several in some iterable."""
    if len(given) == 1 and (isinstance(given[0], Iterator) or rng.random() < 0.5):
        return given[0]
    wraps: list[Callable[[Any], Any]] = [list, tuple, iter, lambda many: (one for one in many)]
    return rng.choice(wraps)(given)


def draw_prompt(rng: random.Random, limit: int) -> tuple[Any, str | None, tuple[int, ...]]:
    """A prompt in one of its forms, its text where it has one, and its ids: at most `limit` of them."""
    ids = rng.choice(BASES)[: rng.choice([1, rng.randint(1, limit), rng.randint(1, limit // 2), limit])]
    salt: dict[str, Any] = rng.choice(
        [{}, {}, {"cache_salt": None}, {"cache_salt": ""}, {"cache_salt": "x"}, {"cache_salt": "y"}]
    )
    if rng.random() < 0.4:
        text = "".join(rng.choices(PIECES, k=rng.randint(1, 8)))
        if 0 < len(encode(text)) <= limit:
            return rng.choice([text, {"prompt": text} | salt, MappingProxyType({"prompt": text})]), text, encode(text)
    forms: list[Callable[[Any], Any]] = [list, tuple, np.array, torch.tensor, lambda ids: np.array(ids, dtype=np.uint8)]
    forms += [lambda ids: torch.tensor(ids, dtype=torch.int32), lambda ids: array.array("q", ids)]
    forms += [lambda ids: [np.int64(token) for token in ids], lambda ids: [ids[0], *map(torch.tensor, ids[1:])]]
    given = rng.choice(forms)(ids)
    if rng.random() < 0.5:
        return given, None, ids
    named: str | None = rng.choice([None, None, "another text"])
    return {"prompt_token_ids": given} | salt | ({"prompt": named} if named else {}), named, ids


def draw_all_params(rng: random.Random, call: Call, limit: int, field: bool) -> None:
    """One for all, one for each, or None; with a wrong field in one of them if `field`."""
    rooms = [limit + 1 - len(ids) for _, ids in call.ids]
    prompts = [ids for _, ids in call.ids]
    if rng.random() < 0.05 and not field:
        call.params, call.wishes = None, [SamplingParams()] * len(rooms)
        if min(rooms, default=99) < 16:
            call.wrong = call.wrong or "max_tokens"
    elif rng.random() < 0.5 and rooms:
        place = rng.randrange(len(rooms)) if field else -1
        pairs = [draw_params(rng, call, prompts[i], room, field=i == place) for i, room in enumerate(rooms)]
        call.params, call.wishes = [given for given, _ in pairs], [wish for _, wish in pairs]
    else:
        first = prompts[0] if prompts else (1,)
        call.params, wish = draw_params(rng, call, first, min(rooms, default=limit), field=field, empty=not rooms)
        call.wishes = [wish] * len(rooms)


def draw_params(
    rng: random.Random, call: Call, prompt: tuple[int, ...], room: int, *, field: bool, empty: bool = False
) -> tuple[dict[str, Any], SamplingParams]:
    """Keywords of SamplingParams and what they mean; `room` is the largest max_tokens. `empty`: nobody will ask."""
    drawn = {name: rng.choice(RIGHT[name]) for name in RIGHT if rng.random() < 0.22}
    drawn["max_tokens"] = rng.choice(ints(rng.choice([room, *range(1, min(room, 6) + 1), *range(1, min(room, 3) + 1)])))
    most = drawn["max_tokens"][1]
    if rng.random() < 0.4:
        drawn["min_tokens"] = rng.choice(ints(rng.randint(0, most)))
    if rng.random() < 0.3:
        drawn["n"] = rng.choice(ints(rng.randint(1, min(3, call.config.max_num_seqs))))
    if drawn.get("temperature", (1, 1))[1] != 0 and rng.random() < 0.9:
        drawn.setdefault("seed", rng.choice(RIGHT["seed"]))
    aim(rng, drawn, prompt)
    wish = meaning({name: value for name, (_, value) in drawn.items()})
    given = {name: value for name, (value, _) in drawn.items()}
    if field:
        name = rng.choice(list(WRONG))
        relative: dict[str, list[Any]] = {"max_tokens": [room + 1, 2**31 - 1], "min_tokens": [most + 1]}
        relative["n"] = [call.config.max_num_seqs + 1, 16384]
        wrong = relative[name] if name in relative and not empty and rng.random() < 0.4 else WRONG[name]
        given[name] = rng.choice(wrong)
        if not (empty and any(given[name] is one for one in FOREIGN.get(name, []))):
            call.wrong = call.wrong or name
    return given, wish


def aim(rng: random.Random, drawn: dict[str, Right], prompt: tuple[int, ...]) -> None:
    """Make stop strings and stop tokens of what is going to be said."""
    if rng.random() < 0.6:
        return
    wish = meaning({name: value for name, (_, value) in drawn.items()} | {"stop": (), "stop_token_ids": ()})
    tokens = [token for _, token in zip(range(wish.max_tokens), stream(prompt, wish, 0), strict=False)]
    text = written(tokens, wish.skip_special_tokens, final=True)
    if rng.random() < 0.3:
        chosen = (rng.choice(tokens),)
        drawn["stop_token_ids"] = (list(chosen), chosen)
    if text:
        start = rng.randrange(len(text))
        around = text[max(0, start - rng.randint(0, 2)) : start + rng.randint(1, 4)]
        stops = [text[start : start + rng.randint(1, 3)], around + rng.choice(["", "a", "é"])]
        stops = rng.sample(stops, rng.randint(1, 2))
        drawn["stop"] = (stops, tuple(stops))


def meaning(values: dict[str, Any]) -> SamplingParams:
    """Plain values as parameters, bad words as their tokens."""
    words = values.pop("bad_words", ())
    ids = {encode(space + word.lstrip()) for word in words for space in ("", " ")} - {()}
    known = values.get("bad_words_token_ids", ())
    return SamplingParams(**values | {"bad_words_token_ids": sorted({*ids, *known})})


# --- Making it, and checking what comes of it ---


def make_llm(config: EngineConfig) -> Any:
    llm = LLM.__new__(LLM)
    proposer = NgramProposer(min_match=1) if config.num_speculative_tokens else None
    llm.tokenizer, llm.engine = tokenizer(), Engine(model(), config, proposer)
    llm.processor = OutputProcessor(llm.engine, llm.tokenizer)
    return llm


def hand_in(llm: Any, call: Call) -> list[RequestOutput]:
    params = call.params
    if call.wrong != "sampling_params":
        if isinstance(params, dict):
            params = SamplingParams(**params)
        elif isinstance(params, list):
            params = [SamplingParams(**one) for one in params]
    outputs: list[RequestOutput] = llm.generate(call.prompts, params, progress=False)
    return outputs


def check_call(llm: Any, call: Call) -> str:
    """Make the call and check all of it; returns how it ended: "served", or what was wrong."""
    try:
        outputs = hand_in(llm, call)
    except MinillmError as error:
        assert call.wrong is not None, f"nothing is wrong, but: {error}"
        assert isinstance(error, RequestError) and len(str(error)) < 500, f"{type(error).__name__} says {error}"
        named = call.wrong.replace("bad_words_token_ids", "bad_words")  # refused together by the vocabulary
        assert call.wrong == "prompt" or named in str(error), f"{call.wrong} is wrong, but: {error}"
    else:
        assert call.wrong is None, f"{call.wrong} is wrong, but it was served"
        assert len(outputs) == len(call.ids), f"{len(outputs)} outputs for {len(call.ids)} prompts"
        for (text, ids), wish, output in zip(call.ids, call.wishes, outputs, strict=True):
            check_output(text, ids, wish, output)
    check_empty(llm)
    return call.wrong or "served"


def check_empty(llm: Any) -> None:
    """Nothing of the call is left in the engine."""
    engine = llm.engine
    assert not engine.requests and not llm.processor._live, "a request is left"
    assert not engine.scheduler.running and not engine.scheduler.waiting, "a request is queued"
    assert engine.pool.num_free == engine.pool.num_usable, "blocks are held"
    assert engine.proposer is None or not engine.proposer._indices, "the proposer keeps a request"
    engine.scheduler.check()


def check_output(text: str | None, ids: tuple[int, ...], wish: SamplingParams, output: RequestOutput) -> None:
    assert output.finished and output.prompt_token_ids == list(ids), f"{output.prompt_token_ids} are not {ids}"
    assert output.prompt == text, f"the prompt was {text!r}, not {output.prompt!r}"
    assert [one.index for one in output.outputs] == list(range(wish.n)), "not the completions that were asked for"
    for one in output.outputs:
        known = wish.greedy or wish.seed is not None  # else the tokens are anybody's, but not where they end
        want = ended(stream(ids, wish, one.index) if known else one.token_ids, wish)
        got = Completion(one.token_ids, one.text, one.finish_reason, one.stop_reason)
        assert got == want, f"completion {one.index} of {ids} is\n{got}, not\n{want}"
        check_logprobs(ids, wish, one)
    if wish.prompt_logprobs is None:
        assert output.prompt_logprobs is None
    else:
        assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
        check_told(ids[:1], ids[1:], wish.prompt_logprobs, output.prompt_logprobs[1:])


def check_logprobs(ids: tuple[int, ...], wish: SamplingParams, one: CompletionOutput) -> None:
    if wish.logprobs is None:
        assert one.logprobs is None and one.cumulative_logprob is None
        return
    assert one.logprobs is not None and one.cumulative_logprob is not None
    total = check_told(ids, tuple(one.token_ids), wish.logprobs, one.logprobs)
    assert abs(one.cumulative_logprob - total) < 1e-2


def check_told(before: tuple[int, ...], tokens: tuple[int, ...], count: int, told: Sequence[Any]) -> float:
    """Each token's own log-probability and `count` others, after what stood before it; returns the sum."""
    assert len(told) == len(tokens), "not one entry of log-probabilities for each token"
    total = 0.0
    for place, (token, entries) in enumerate(zip(tokens, told, strict=True)):
        want, own = logprobs_after(before + tokens[:place]), entries[token]
        assert isinstance(own, Logprob) and len(entries) == count + (own.rank > count)
        assert all(abs(entry.logprob - want[other]) < 1e-3 for other, entry in entries.items())
        total += want[token]
    return total


def play(seeds: range) -> Counter[str]:
    """The calls of these seeds, one after the other; how many ended in which way."""
    ends, llm = Counter[str](), None
    for seed in seeds:
        if llm is None or seed % CALLS_PER_ENGINE == 0:
            llm = make_llm(draw_config(seed // CALLS_PER_ENGINE))
        call = draw_call(seed)
        try:
            ends[check_call(llm, call)] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}\n{described(call)}") from error
    return ends


def replay(seed: int) -> None:
    """The call of this seed again, after those that its engine served before it."""
    play(range(seed - seed % CALLS_PER_ENGINE, seed + 1))


def described(call: Call) -> str:
    """All of a call; some of its integers are longer than Python prints."""
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return repr(call)
    finally:
        sys.set_int_max_str_digits(limit)


# --- The tests ---


def test_every_call_ends_as_its_oracle_or_as_a_named_error(pytestconfig: pytest.Config) -> None:
    num_calls = pytestconfig.getoption("--calls")
    ends = play(range(num_calls))
    assert ends["served"] > num_calls / 3 and len(ends) > 12, "not enough of either kind"


def test_calls_have_what_breaks() -> None:
    """Each way to end, and steps that preempt, find prefixes and guess."""
    reasons, steps = Counter[Any](), Counter[str]()
    for number in range(6):
        llm = make_llm(replace(draw_config(number), trace_bytes=2**20))
        for seed in range(number * CALLS_PER_ENGINE, (number + 1) * CALLS_PER_ENGINE):
            call = draw_call(seed)
            for output in [] if call.wrong else hand_in(llm, call):
                reasons.update((one.finish_reason, type(one.stop_reason)) for one in output.outputs)
                steps["hits"] += bool(output.num_cached_tokens)
                steps["several"] += len(output.outputs) > 1
        steps["preempted"] += sum(len(record.preempted) for record in llm.engine.trace)
        steps["guessed"] += sum(part.num_drafts for record in llm.engine.trace for part in record.requests)
    ends = [("length", type(None)), ("stop", type(None)), ("stop", int), ("stop", str)]
    assert all(reasons[end] > 5 for end in ends), reasons
    assert all(steps[what] > 3 for what in ("hits", "several", "preempted", "guessed")), steps


def test_the_tokens_of_a_text_by_hand() -> None:
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices(PIECES, k=rng.randint(0, 9)))
        assert tuple(tokenizer().encode(text)) == encode(text)


@pytest.mark.parametrize(
    ("stop", "min_tokens", "text"),
    [
        (["b"], 0, "a"),
        (["b"], 2, "abdcda"),
        (["d"], 2, "ab"),
        (["d"], 3, "abdc"),
        (["bd"], 2, "a"),  # only its last character came late enough
        (["d", "dcx"], 3, "abdc"),  # the first d may be the beginning of another one, and is too early nevertheless
        (["dc", "bdc", "c"], 0, "a"),
    ],
)
def test_where_a_stop_string_ends_a_text(stop: list[str], min_tokens: int, text: str) -> None:
    """The definition itself, and what streams: a b d c d a b d c d …"""
    tokens = [0, 1, 3, 2, 3, 0]
    params = SamplingParams(stop=stop, min_tokens=min_tokens, max_tokens=6)
    assert ended(tokens, params).text == text
    output = CompletionOutput(0)
    written_so_far = TextStream(output, tokenizer(), params)
    for token in tokens:
        output.token_ids.append(token)
        if written_so_far.push(token):
            break
    else:
        written_so_far.close()
    assert output.text == text


# --- Wrong versions that the calls must tell from the right one ---

_push, _read, _add, _extend, _number = TextStream.push, LLM._read, OutputProcessor.add, Request.extend, sampling._number


def _stops_before_min_tokens(self: TextStream, token: int) -> str | None:
    self.params = replace(self.params, min_tokens=0)
    return _push(self, token)


def _finds_what_came_too_early(self: TextStream, token: int) -> str | None:
    """What was held back is searched again, though min_tokens had passed it over."""
    held, hit = self._held, _push(self, token)
    late = len(self.output.token_ids) > self.params.min_tokens
    return next((stop for stop in self.params.stop or () if hit is None and late and stop in held), hit)


def _leaves_the_first_queued(self: LLM, prompts: Any, params: Any) -> Any:
    """Each is queued as soon as it is read."""
    pairs = read_prompts(prompts, params)
    names, read = [], []
    for pair in pairs:
        prompt, wish = self.processor.encode(*pair)
        names.append(self.engine.add(prompt.token_ids or (), wish))
        read.append((prompt, wish))
    for name in names:
        self.engine.abort(name)
    return read


def _stop_tokens_of_all(self: OutputProcessor, name: str, prompt: Any, params: SamplingParams, mailbox: Any) -> Any:
    """A request ends at the stop tokens of those that came before it."""
    others = {t for r in self.engine.requests.values() for one in r for t in one.params.stop_token_ids or ()}
    return _add(self, name, prompt, replace(params, stop_token_ids={*others, *(params.stop_token_ids or ())}), mailbox)


def _names_its_own_end(self: Request, tokens: list[int], end_ids: tuple[int, ...]) -> list[int]:
    taken = _extend(self, tokens, end_ids)
    if self.finish_reason == "stop" and taken[-1] in (self.params.stop_token_ids or ()):
        self.stop_reason = taken[-1]
    return taken


def _true_is_one(name: str, given: Any, allowed: Range) -> Any:
    return _number(name, int(given) if isinstance(given, bool) and allowed[0] is not bool else given, allowed)


ANOTHER = r"seed \d+: AssertionError: completion \d of [\s\S]*, not\n"
# whose behaviour, the wrong one, how it must be found out, and a seed from which that takes few calls
MUTANTS: list[tuple[Any, str, Callable[..., Any], str, int]] = [
    (TextStream, "push", _stops_before_min_tokens, ANOTHER, 0),
    (TextStream, "push", _finds_what_came_too_early, ANOTHER, 520),
    (LLM, "_read", _leaves_the_first_queued, "a request is left", 40),
    (OutputProcessor, "add", _stop_tokens_of_all, ANOTHER, 80),
    (Request, "extend", _names_its_own_end, ANOTHER, 440),
    (sampling, "_number", _true_is_one, "is wrong, but it was served", 80),
]


@pytest.mark.parametrize(
    ("owner", "name", "wrong", "reason", "start"), MUTANTS, ids=lambda one: getattr(one, "__name__", "")
)
def test_a_wrong_version_is_told_from_the_right_one(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, wrong: Callable[..., Any], reason: str, start: int
) -> None:
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises(AssertionError, match=reason):
        play(range(start, start + 2000))
