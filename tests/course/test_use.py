"""A learner's functions in the engine's place: the same text with right ones, a stop that names wrong ones."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from minillm.cli import main
from minillm.course.lab.stubs import make_stub
from minillm.course.use import Used, plug_in
from minillm.course.use.table import PLUGS
from minillm.errors import LearnerError
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
