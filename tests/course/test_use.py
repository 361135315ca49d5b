"""A learner's functions in the engine's place: the same text with right ones, a stop that names wrong ones."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from textwrap import indent
from typing import Any

import pytest

from minillm.cli import main
from minillm.course.errors import LearnerError
from minillm.course.lab.stubs import make_stub
from minillm.course.use import Used, plug_in
from minillm.course.use.table import PLUGS
from minillm.llm import LLM
from minillm.model.loader import load_model
from minillm.sampling import SamplingParams

SOLUTIONS = Path(__file__).parents[2] / "solutions"
FILES = {path.name[:4]: path for path in SOLUTIONS.glob("ex*.py")}
COMMON = list(range(40, 75))  # longer than two blocks: the prefix cache finds all of the first 32 tokens
PROMPTS = [[*COMMON, 5, 6, 5, 6, 5], [9, 8, 7], COMMON[:32], [11, 12] * 10]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=8, ignore_eos=True),
    SamplingParams(temperature=0.8, top_p=0.9, top_k=40, min_p=0.01, seed=3, max_tokens=8, ignore_eos=True),
    SamplingParams(temperature=1.2, n=2, seed=4, max_tokens=6, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=8, ignore_eos=True),
]
SETTINGS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "few blocks, small steps": {"num_blocks": 9, "max_num_batched_tokens": 16, "max_num_seqs": 3},
    "small steps": {"max_num_batched_tokens": 8},
    "without a prefix cache": {"enable_prefix_caching": False},
    "guesses by looking back": {"speculative": "ngram"},
    "guesses by a model": {"speculative": "tiny"},
    "int8": {"kv_format": "int8"},
    "int4": {"kv_format": "int4"},
    "fp8": {"kv_format": "fp8"},
}


@pytest.fixture(autouse=True)
def _models_are_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minillm.llm.load_model", LOAD)
    monkeypatch.setattr("minillm.speculative.load_model", LOAD)


LOAD = cache(load_model)


def serve(model: str = "tiny-draft", use: Path | None = None, **settings: Any) -> tuple[list[list[int]], list[Used]]:
    """All completions, in two rounds, of which the second finds the first one's prefixes."""
    llm = LLM(model, dtype="float32", device="cpu", debug=True, **settings)
    used = plug_in(llm, use) if use else []
    outputs = [out for _ in range(2) for out in llm.generate(PROMPTS, PARAMS, progress=False)]
    for out in outputs:
        assert out.metrics.ttft is not None and out.metrics.tpot is not None and out.metrics.itl
    return [completion.token_ids for out in outputs for completion in out.outputs], used


def in_place(rows: list[Used]) -> set[tuple[str, ...]]:
    return {(row.exercise, *row.tasks) for row in rows if row.why_not is None}


def test_all_solutions_at_once_in_the_trained_model() -> None:
    alone, _ = serve("tiny")
    together, used = serve("tiny", use=SOLUTIONS)
    assert together == alone
    assert len(in_place(used)) >= 14


@pytest.mark.parametrize("setting", SETTINGS)
def test_all_solutions_at_once(setting: str) -> None:
    alone, _ = serve(**SETTINGS[setting])
    together, used = serve(use=SOLUTIONS, **SETTINGS[setting])
    assert together == alone
    COVERED.update(in_place(used))


def test_exercise_02_alone() -> None:
    assert serve(use=FILES["ex02"]) == (serve()[0], [Used("ex02", ("grouped_attention",), PLUGS[2].place, None)])
    COVERED.add(("ex02", "grouped_attention"))


COVERED: set[tuple[str, ...]] = set()


def test_every_plug_was_in_place_in_some_setting() -> None:
    """Triton's runs where there is a GPU, or in the interpreter: see `exercises/kernel_checks.py`."""
    if not COVERED:
        pytest.skip("needs the tests before it")
    assert {(plug.exercise, *plug.tasks) for plug in PLUGS} - COVERED == {("ex07", "attention_kernel")}


# Wrong versions, each with the function that the message must name


def wrong(tmp_path: Path, exercise: str, pieces: Mapping[str, str]) -> Path:
    source = FILES[exercise].read_text(encoding="utf8")
    for old, new in pieces.items():
        assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {exercise}"
        source = source.replace(old, new)
    path = tmp_path / FILES[exercise].name
    path.write_text(source, encoding="utf8")
    return path


MUTANTS: dict[str, tuple[str, str, str]] = {
    "ex01 generate": ("logits = step([tokens[-1]])", "logits = step(prompt + tokens)", "as it comes"),
    "ex01 ttft": ("return token_times[0] - arrival", "return token_times[0]", "as it comes"),
    "ex01 tpot": ("/ (len(token_times) - 1)", "/ len(token_times)", "as it comes"),
    "ex01 itl": ("[later - earlier for", "[earlier - later for", "as it comes"),
    "ex02 grouped_attention": ("arange(kv_len - q_len, kv_len)", "arange(q_len)", "as it comes"),
    "ex03 prefill": ("hidden[-1:]", "hidden[:1]", "as it comes"),
    "ex03 decode": ("    cache.num_tokens += len(tokens)\n", "    cache.num_tokens += 1\n", "as it comes"),
    "ex04 apply_temperature": ("logits.float() / temperature", "logits.float() * temperature", "as it comes"),
    "ex04 sample": ("right=True)", "right=True) + 1", "as it comes"),
    "ex06 tiled_attention": ("l * rescale + w", "l + w", "as it comes"),
    "ex09 slot_mapping": ("* block_size + p % block_size for", "* block_size + p for", "as it comes"),
    "ex09 BlockPool.allocate": ("self.free_blocks.popleft() for", "self.free_blocks[0] for", "without a prefix cache"),
    "ex09 paged_decode_attention": ("slot_mapping(block_table, 0,", "slot_mapping(block_table, 1,", "as it comes"),
    "ex10 longest_match": ("num_tokens - 1))", "num_tokens))", "as it comes"),
    "ex10 FreeQueue.popleft": ("popitem(last=False)", "popitem()", "as it comes"),
    "ex11 schedule": ("key=lambda i: running[i] > 1", "key=lambda i: running[i] == 1", "small steps"),
    "ex12 quantize_int8": ("x * 127 / divisor", "x * 128 / divisor", "int8"),
    "ex12 dequantize_int8": ("scale[..., None] / 127", "scale[..., None] / 128", "int8"),
    "ex12 quantize_int4 and pack_int4": ("low | high << 4", "high | low << 4", "int4"),
    "ex12 unpack_int4": ("packed & 15, packed >> 4", "packed >> 4, packed & 15", "int4"),
    "ex12 round_fp8": ("exponent.clamp(min=-6) - 3", "exponent.clamp(min=-6) - 2", "fp8"),
    "ex13 propose_ngram": ("return text[len(tokens) :]", "return text", "guesses by looking back"),
    "ex13 verify_greedy": ("return choices[: place + 1]", "return choices[:place]", "guesses by looking back"),
    "ex13 acceptance_probability": ("float(p[token] / q[token])", "float(q[token] / p[token])", "guesses by a model"),
    "ex15 Engine": ("if count > 0 and sequence.remaining == 0", "if count > 0", "as it comes"),
}


@pytest.mark.parametrize("function", MUTANTS)
def test_a_wrong_function_is_named(function: str, tmp_path: Path) -> None:
    old, new, setting = MUTANTS[function]
    with pytest.raises(LearnerError, match=f"^{function}"):
        serve(use=wrong(tmp_path, function[:4], {old: new}), **SETTINGS[setting])


def test_wrong_guesses_change_nothing(tmp_path: Path) -> None:
    """A proposer cannot be wrong, only slow: the engine checks every guess."""
    useless = wrong(tmp_path, "ex13", {"return text[len(tokens) :]": "return [0] * count"})
    assert serve(use=useless, speculative="ngram")[0] == serve()[0]


def test_the_message(tmp_path: Path) -> None:
    broken = wrong(tmp_path, "ex02", {"scores = (q @ k.T).float() * scale": "scores = (q @ k.T).float() / scale"})
    with pytest.raises(LearnerError) as caught:
        serve(use=broken)
    message = str(caught.value)
    for part in (
        "ex02 grouped_attention differs",
        "call 1",
        "float32[",
        "The first is at [",
        "Tolerance: 0.0001",
        "lab test ex02",
    ):
        assert part in message, message  # fmt: skip


def test_an_error_is_told_with_its_line(tmp_path: Path) -> None:
    broken = wrong(tmp_path, "ex02", {"    group = heads // kv_heads\n": "    group = heads // 0\n"})
    line = broken.read_text().splitlines().index("    group = heads // 0") + 1
    with pytest.raises(LearnerError, match=f"ZeroDivisionError in call 1.*{broken.name}, line {line}"):
        serve(use=broken)


# Functions that spoil what they are given, or end the run in other ways


def begun(tmp_path: Path, exercise: str, function: str, code: str) -> Path:
    """The solution with some code at the beginning of a function (or of a method), before what is right."""
    source = FILES[exercise].read_text(encoding="utf8")
    at = source.index("# BEGIN SOLUTION", source.index(f"def {function}("))
    line = source.rindex("\n", 0, at) + 1
    path = tmp_path / FILES[exercise].name
    path.write_text(source[:line] + indent(code, source[line:at]) + "\n" + source[line:], encoding="utf8")
    return path


def engine_is_clean(llm: LLM) -> bool:
    """Nothing of an ended run is left in it."""
    llm.engine.scheduler.check()
    return not llm.engine.requests and not list(llm.engine.scheduler) and not llm.processor._live


def stopped(place: Path, **settings: Any) -> str:
    """What a run is stopped with, twice: the error is told, the engine is clean, and the function is still in place."""
    llm = LLM("tiny-draft", dtype="float32", device="cpu", debug=True, **settings)
    plug_in(llm, place)
    messages = []
    for _ in range(2):
        with pytest.raises(LearnerError) as caught:
            llm.generate(PROMPTS, PARAMS, progress=False)
        messages.append(str(caught.value))
        assert engine_is_clean(llm)
    assert messages[0].split(" in call")[0] == messages[1].split(" in call")[0]
    assert sum(block.ref_count for block in llm.engine.pool.blocks) == 0
    return messages[0]


CHANGED: dict[str, tuple[str, str, int]] = {  # function: code at its beginning, setting, the argument that it changes
    "ex02 grouped_attention": ("k.mul_(scale); scale = 1.0", "as it comes", 2),
    "ex04 apply_temperature": ("if temperature > 0: logits.div_(temperature); temperature = 1.0", "as it comes", 1),
    "ex04 sample": ("probs.div_(probs.sum() * 2)", "as it comes", 1),
    "ex06 tiled_attention": ("k.mul_(0.5); q = q * 2", "as it comes", 2),
    "ex09 slot_mapping": ("block_table.append(1)", "as it comes", 1),
    "ex09 paged_decode_attention": ("k_pool.mul_(scale); scale = 1.0", "as it comes", 2),
    "ex09 paged_decode_attention ": ("v_pool[:, [b not in block_table for b in range(v_pool.shape[1])]] = 0", "int", 3),
    "ex10 hash_blocks": ("tokens[-1:] = [0]", "as it comes", 1),
    "ex10 longest_match": ("cached['x'] = 1", "as it comes", 2),
    "ex11 schedule": ("waiting.append(1)", "as it comes", 2),
    "ex13 propose_ngram": ("tokens.append(7)", "guesses by looking back", 1),
    "ex13 verify_greedy": ("choices[-1:] = [7]", "guesses by looking back", 2),
    "ex13 acceptance_probability": ("p.add_(0)[0] += 1", "guesses by a model", 1),
}


@pytest.mark.parametrize("function", CHANGED)
def test_who_changes_its_arguments_is_named(function: str, tmp_path: Path) -> None:
    """They would be views of the engine's own memory: both functions would read what was spoilt, and agree."""
    code, setting, argument = CHANGED[function]
    exercise, name = function.split()
    message = stopped(begun(tmp_path, exercise, name, code), **SETTINGS.get(setting, {}))
    assert re.match(rf"{exercise} .*{name}.* changed its argument {argument} in call ", message), message


def test_who_changes_the_times_of_a_request_is_named(tmp_path: Path) -> None:
    with pytest.raises(LearnerError, match="ex01 ttft changed its argument 2 in call 1"):
        serve(use=begun(tmp_path, "ex01", "ttft", "token_times.append(0.0)"))


@pytest.mark.parametrize("exercise, function", [("ex03", "prefill"), ("ex15", "step")])
def test_who_changes_the_model_is_named(exercise: str, function: str, tmp_path: Path) -> None:
    model = load_model("tiny-draft", dtype="float32", device="cpu")
    code = "m = self.model if 'self' in locals() else model\nnext(m.parameters()).mul_(1 + 2**-20)"
    llm = LLM("tiny-draft", dtype="float32", device="cpu")
    llm.engine.model = model
    with pytest.raises(LearnerError, match=rf"{exercise}_\w+\.py changed the model|{exercise} "):
        plug_in(llm, begun(tmp_path, exercise, function, code))


def test_a_result_that_is_written_to_later_does_no_harm(tmp_path: Path) -> None:
    path = wrong(tmp_path, "ex04", {})
    path.write_text(
        path.read_text(encoding="utf8")
        + "\n\nOWN, LAST = min_p, {}\n\n\ndef min_p(probs, p):\n"
        + "    return LAST.setdefault(len(probs), torch.empty_like(probs)).copy_(OWN(probs, p))\n"
    )
    assert serve(use=path)[0] == serve()[0]


NO_MESSAGE = """
class Strange(Exception):
    def __str__(self): raise self
raise Strange
"""
OWN_CAUSE = """
error = ValueError("\\ud800" + 5000 * "x")
error.__cause__ = KeyError()
error.__cause__.__cause__ = error
raise error
"""
EQUAL = "return type('Equal', ({kind},), {{'__eq__': lambda a, b: True, '__hash__': {kind}.__hash__}})({value})"
COUNTED = "self.n = getattr(self, 'n', 0) + 1\nif self.n == 9: raise RuntimeError('tired')"
NO_CACHE = "without a prefix cache"
NGRAM = "guesses by looking back"

ENDED: dict[str, tuple[str, str, str, str, str]] = {  # exercise, function, code at its beginning, setting, message
    "exits": ("ex04", "sample", "import sys; sys.exit(0)", "", "ex04 sample raised SystemExit in call 1"),
    "has no message": (
        "ex04",
        "sample",
        NO_MESSAGE,
        "",
        r"ex04 sample raised Strange .*\(its message cannot be read\)",
    ),
    "is its own cause": ("ex04", "sample", OWN_CAUSE, "", r"ex04 sample raised ValueError .*\\ud800x{299} \("),
    "equals all": ("ex04", "sample", EQUAL.format(kind="int", value=7), "", "ex04 sample differs"),
    "returns an object": (
        "ex04",
        "sample",
        "return object()",
        "",
        "ex04 sample raised TypeError.*it returned a object",
    ),
    "returns itself": ("ex04", "sample", "x = []; x.append(x); return x", "", "ex04 sample raised RecursionError"),
    "a tired pool": ("ex09", "allocate", COUNTED, NO_CACHE, "ex09 BlockPool.allocate raised RuntimeError.*tired"),
    "a block twice": ("ex09", "allocate", "return [1]", NO_CACHE, "ex09 BlockPool.allocate gave block 1, which is not"),
    "no pool": ("ex09", "__init__", "raise OSError('no')", NO_CACHE, "ex09 BlockPool raised OSError in call 1"),
    "keeps blocks": ("ex09", "free", "raise OSError('no')", NO_CACHE, "ex09 BlockPool.free raised OSError in call 1"),
    "a tired queue": ("ex10", "popleft", COUNTED, "", "ex10 FreeQueue.popleft raised RuntimeError.*tired"),
    "a lying length": ("ex10", "__len__", "return 0", "", "ex10 FreeQueue.__len__ differs"),
    "no queue": ("ex10", "__init__", "raise OSError('no')", "", "ex10 FreeQueue raised OSError in call 1"),
    "an end that fails": (
        "ex10",
        "append",
        "raise OSError('no')",
        "",
        "ex10 FreeQueue.append raised OSError in call 1",
    ),
    "no names": ("ex10", "hash_blocks", "return []", "", "ex10 hash_blocks gave .*no name for each of 2 blocks"),
    "no plan": ("ex11", "schedule", "raise KeyError('x')", "", "ex11 schedule raised KeyError in call 1"),
    "strings": ("ex13", "propose_ngram", "return ['a']", NGRAM, r"ex13 propose_ngram: \['a'\] is no list"),
    "no end": ("ex13", "propose_ngram", "import itertools; return itertools.count()", NGRAM, ".*returned a count"),
    "floats": ("ex13", "propose_ngram", "return [1.5]", NGRAM, r"ex13 propose_ngram: \[1.5\] is no list"),
    "too many": ("ex13", "propose_ngram", "return [1] * (count + 1)", NGRAM, r"ex13 propose_ngram: \[1, .* is no list"),
    "an unknown token": ("ex13", "propose_ngram", "return [10**9]", NGRAM, "ex13 propose_ngram: .* is no list"),
    "a lying list": (
        *(
            "ex13",
            "verify_greedy",
            "return type('L', (list,), {'__len__': lambda s: 3, '__eq__': lambda a, b: True})()",
        ),
        *(NGRAM, "ex13 verify_greedy differs"),
    ),
}


@pytest.mark.parametrize("kind", ENDED)
def test_what_ends_a_run_is_named_and_leaves_nothing(kind: str, tmp_path: Path) -> None:
    exercise, function, code, setting, message = ENDED[kind]
    got = stopped(begun(tmp_path, exercise, function, code), **SETTINGS.get(setting, {}))
    assert re.match(message, got), got
    got.encode()


def test_a_time_that_equals_everything(tmp_path: Path) -> None:
    with pytest.raises(LearnerError, match="ex01 ttft differs"):
        serve(use=begun(tmp_path, "ex01", "ttft", EQUAL.format(kind="float", value="float('nan')")))


@pytest.mark.parametrize("code", ["return torch.tensor(int(probs.argmax()))", "return probs.argmax().numpy()[()]"])
def test_a_number_may_be_a_tensor_or_an_array(code: str, tmp_path: Path) -> None:
    llm = LLM("tiny-draft", dtype="float32", device="cpu")
    plug_in(llm, begun(tmp_path, "ex04", "sample", code))
    want = LLM("tiny-draft", dtype="float32", device="cpu").generate(PROMPTS, PARAMS[0], progress=False)
    got = llm.generate(PROMPTS, PARAMS[0], progress=False)
    assert [out.outputs[0].token_ids for out in got] == [out.outputs[0].token_ids for out in want]


def test_ctrl_c_in_a_learners_function_is_ctrl_c(tmp_path: Path) -> None:
    llm = LLM("tiny-draft", dtype="float32", device="cpu")
    plug_in(llm, begun(tmp_path, "ex04", "sample", "raise KeyboardInterrupt"))
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, PARAMS, progress=False)
    assert engine_is_clean(llm)


def test_leaving_early_while_blocks_cannot_be_given_back(tmp_path: Path) -> None:
    """The error is told, and all requests are gone all the same."""
    llm = LLM("tiny-draft", dtype="float32", device="cpu")
    plug_in(llm, begun(tmp_path, "ex10", "prepend", "raise OSError('no')"))
    stream = llm.stream(PROMPTS, PARAMS)
    while not any(len(completions) == 2 for completions in llm.engine.requests.values()):
        next(stream)
    with pytest.raises(LearnerError, match=r"ex10 FreeQueue\.prepend raised OSError"):
        stream.close()
    assert engine_is_clean(llm)
    assert sum(block.ref_count for block in llm.engine.pool.blocks) == 0


# Files


def stub(tmp_path: Path, exercise: str, solved: str = "") -> Path:
    """The exercise as learners get it, with one block of the solution filled in: the one that contains `solved`."""
    source = FILES[exercise].read_text(encoding="utf8")
    if solved:
        before, _, rest = source.partition("# BEGIN SOLUTION")
        while solved not in rest.partition("# END SOLUTION")[0]:
            block, _, rest = rest.partition("# BEGIN SOLUTION")
            before += f"# BEGIN SOLUTION{block}"
        source = before + rest.replace("# END SOLUTION", "", 1)
    path = tmp_path / FILES[exercise].name
    path.write_text(make_stub(source), encoding="utf8")
    return path


def test_unwritten_tasks_keep_the_engines_own(tmp_path: Path) -> None:
    texts, used = serve(use=stub(tmp_path, "ex04", solved="torch.searchsorted(sums"))
    assert texts == serve()[0]
    assert [row.why_not for row in used] == ["not written yet: apply_temperature, top_k, top_p, min_p", None]


def test_a_stub_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        LearnerError,
        match=r"nothing of it is written yet. Begin with tiled_attention",
    ):
        serve(use=stub(tmp_path, "ex06"))


def test_a_written_function_that_needs_an_unwritten_one(tmp_path: Path) -> None:
    with pytest.raises(
        LearnerError, match=r"ex02 grouped_attention needs something that is not written yet: .*causal_mask"
    ):
        serve(use=stub(tmp_path, "ex02", solved="group = heads // kv_heads"))


BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    "no Python": ("ex06_flash_attention.py", b"def f(:\n", "line 1: invalid syntax"),
    "not UTF-8": ("ex06_flash_attention.py", b'"\xff"', "not UTF-8"),
    "an error on import": ("ex06_flash_attention.py", b"import torch\n\n1 / 0\n", "Line 3: ZeroDivisionError"),
    "a missing package": ("ex06_flash_attention.py", b"import no_such_package\n", "package no_such_package"),
    "another name": ("attention.py", b"", "no exercise: its name should be"),
    "an exercise without a place": ("ex08_batching.py", b"x = 1\n", "it has no place in the engine"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files(kind: str, tmp_path: Path) -> None:
    name, content, message = BAD_FILES[kind]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(LearnerError, match=message):
        plug_in(LLM("tiny-draft"), path)


def test_bad_places(tmp_path: Path) -> None:
    with pytest.raises(LearnerError, match="no such file or folder"):
        plug_in(LLM("tiny-draft"), tmp_path / "exercises")
    with pytest.raises(LearnerError, match="there is no exercise in it"):
        plug_in(LLM("tiny-draft"), tmp_path)


def test_a_folder_does_without_files_whose_packages_are_missing(tmp_path: Path) -> None:
    wrong(tmp_path, "ex02", {})
    (tmp_path / "ex07_gpu_kernels.py").write_text("import no_such_package\n")
    assert serve(use=tmp_path)[1] == [Used("ex02", ("grouped_attention",), PLUGS[2].place, None)]


def test_a_place_that_this_engine_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(LearnerError, match=r"this engine has no place for it.*round_fp8: .*see kv_format='fp8'"):
        plug_in(LLM("tiny-draft"), FILES["ex12"])


def test_the_command_line_tells_what_is_in_place(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["generate", "def f(", "--model", "tiny-draft", "--max-tokens", "3", "--use", str(FILES["ex09"])])
    told = capsys.readouterr().err
    assert ended.value.code == 0
    assert told.index("In place of the engine's own") < told.index("ex09 slot_mapping") < told.index("Left as it is")
    assert told.index("Left as it is") < told.index("ex09 BlockPool") < told.index("TTFT")


def test_the_page_lists_every_function() -> None:
    page = (SOLUTIONS.parent / "docs" / "use.md").read_text(encoding="utf8")
    placed, graded = (set(re.findall(r"`(\w+)`", table)) for table in page.split("Graded, but")[:2])
    assert {task for plug in PLUGS for task in plug.tasks} <= placed
    for path in FILES.values():
        if path.name[:4] in ("ex05", "ex08"):  # listed as a whole
            continue
        names = set(re.findall(r"^(?:def|class) (\w+)", path.read_text(encoding="utf8"), re.M))
        written = {name for name in names if f"{name} is yours" in make_stub(path.read_text(encoding="utf8"))}
        assert written <= placed | graded, path.name
