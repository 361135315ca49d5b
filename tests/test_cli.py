"""The command line as people meet it: what they type, what they read, and how it ends when they are wrong."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import minillm.llm
from minillm import LLM, SamplingParams
from minillm.cli import main, screen
from minillm.cli.console import number, quantity
from minillm.course.training.bpe import save_tokenizer, train_tokenizer
from minillm.course.training.checkpoint import save_checkpoint
from minillm.course.training.train import History, TrainConfig
from minillm.measure import hardware
from minillm.measure.machine import describe_machine
from minillm.model.loader import EMBEDDED
from tests.measure.test_hardware import HARDWARE
from tests.model.test_loader import unpacked

COMMANDS = [[], ["demo"], ["generate"], ["chat"], ["doctor"], ["bench"], ["bench", "latency"], ["train"]]
POSITIONS = 512
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights with a tokenizer: it writes nonsense, but it is loaded and run like any other."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(["def f(x):\n    return x + 1\n"], vocab_size=300)
    save_checkpoint(unpacked("qwen3", vocab_size=tokenizer.get_vocab_size()), path)
    save_tokenizer(tokenizer, path)
    return path


@pytest.fixture
def chatty(folder: Path, tmp_path: Path) -> Path:
    """The same model with a chat template."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": CHAT}))
    return tmp_path


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """80 columns, no debugging, an empty cache, ceilings that take no time, and the threads as they were."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("MINILLM_DEBUG", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hardware, "_measure", lambda machine, device: replace(HARDWARE, machine=machine))
    monkeypatch.setattr(hardware, "MATMUL_SIZES", (32,))
    monkeypatch.setattr("minillm.measure.bench_latency.read_buffer", lambda machine, device: _small_buffer())
    screen.out.width = screen.err.width = 80
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def _small_buffer() -> torch.Tensor:
    return torch.ones(4 * hardware.GEMV_COLUMNS, dtype=torch.bfloat16)


def run(*arguments: str | Path) -> int:
    """The exit code of one command; 0 for a command that just returns."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


# What it says about itself


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_fits_80_columns(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*command, "--help") == 0
    text = capsys.readouterr().out
    assert "Usage: minillm" in text and max(map(len, text.splitlines())) <= 80


def test_help_needs_no_heavy_import() -> None:
    program = (
        "import sys\nfrom minillm.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print([name for name in ('torch', 'transformers', 'matplotlib', 'numpy') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip().endswith("[]")


# What it does


@pytest.mark.parametrize("model", ["folder", "tiny"])
def test_demo_writes_measures_and_draws(
    model: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if model == "tiny" and not (EMBEDDED / "tiny").is_dir():
        pytest.skip("the embedded model has not been trained yet")
    name, picture = folder if model == "folder" else model, tmp_path / "timeline.png"
    prompt = "def f(x):\n"
    assert run("demo", "--model", name, "--prompt", prompt, "--max-tokens", "8", "--picture", picture) == 0
    text = capsys.readouterr().out
    llm = LLM(name)
    expected = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=8), progress=False)[0]
    new = len(expected.outputs[0].token_ids)
    assert text.startswith(prompt)
    assert _fact(text, "prompt tokens").startswith(str(len(expected.prompt_token_ids)))
    assert f"one from prefill, {new - 1} from decode steps" in _fact(text, "new tokens")
    assert "s" in _fact(text, "TTFT") and "tokens/s" in _fact(text, "speed")
    assert str(picture) in text.replace("\n", "")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert max(map(len, text[text.index("Measured on") : text.index("Timeline:")].splitlines())) <= 80


def _fact(text: str, name: str) -> str:
    """What a table of facts says about a name."""
    return next(line.strip().removeprefix(name).strip() for line in text.splitlines() if line.strip().startswith(name))


def test_demo_counts_bytes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Known answer: 3 layers x 2 KV heads x head_dim 16, K and V, 4 bytes; 8 new tokens leave 7 in the cache."""
    arguments = ["--dtype", "float32", "--prompt", "x", "--max-tokens", "8", "--picture", tmp_path / "p.png"]
    assert run("demo", "--model", folder, *arguments) == 0
    text = capsys.readouterr().out
    per_token, tokens = 2 * 3 * 2 * 16 * 4, 1 + 8 - 1
    assert _fact(text, "KV cache").split("  ")[0] == quantity(per_token * tokens, "B")
    assert quantity(per_token, "B") + " per token" in _fact(text, "KV cache")


def test_generate_puts_the_text_alone_on_stdout(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", "def f(", "--model", folder, "--max-tokens", "6") == 0
    printed = capsys.readouterr()
    expected = LLM(folder).generate("def f(", SamplingParams(temperature=0, max_tokens=6), progress=False)
    assert printed.out == expected[0].outputs[0].text + "\n"
    assert "6 new" in printed.err and "TTFT" in printed.err


def test_markup_in_a_text_is_text(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run("demo", "--model", folder, "--prompt", "[red]x[/bold]", "--picture", tmp_path / "[p].png") == 0
    assert "[red]x[/bold]" in capsys.readouterr().out


def test_chat_remembers_the_conversation(
    chatty: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[str] = []

    class Listening(LLM):
        def stream(self, prompts_: Any, sampling_params: Any = None) -> Any:
            assert self.tokenizer is not None
            prompts.append(self.tokenizer.decode(prompts_["prompt_token_ids"]))
            return super().stream(prompts_, sampling_params)

    monkeypatch.setattr(minillm.llm, "LLM", Listening)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nagain\n"))
    assert run("chat", "--model", chatty, "--system", "be kind", "--max-tokens", "3", "--temperature", "0") == 0
    assert prompts[0] == "system: be kind\nuser: hello\nassistant:"
    assert prompts[1].startswith(prompts[0]) and prompts[1].endswith("\nuser: again\nassistant:")
    assert capsys.readouterr().err.count("3 new") == 2


def test_a_refusal_within_a_dialogue_is_an_answer(
    chatty: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Questions that fit and questions that do not, in any order: each gets an answer or a reason, and none ends it."""
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    lines = [rng.choice(["hello", "x" * 700, "/forget", "/new"]) for _ in range(8)]
    lines += ["x" * 200] * 3 + ["/forget", "/forget", "hi", "/new", "\udcff \x1b[31m", "hello"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert run("chat", "--model", chatty, "--system", "be kind", "--max-tokens", "3", "--temperature", "0") == 0
    told = capsys.readouterr().err
    asked = sum(not line.startswith("/") for line in lines)
    assert told.count("3 new") + told.count("This question was not kept.") == asked, f"{seed=}"
    assert told.count("earlier questions.") == len(lines) - asked
    assert "The model now sees 0 earlier questions." in told and f"{POSITIONS}" in told and "3 new" in told


def test_doctor_shows_the_ceilings(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor", "--gpus") == 0
    text = capsys.readouterr().out
    assert _fact(text, "read").startswith("40.0 GB/s") and "ridge 20.0" in _fact(text, "matmul bfloat16")
    assert torch.__version__ in _fact(text, "torch")
    assert describe_machine(torch.device("cpu")).name[:20] in text
    assert "promised, not measured" in text and "H200" in text
    assert max(map(len, text.splitlines())) <= 80


def test_bench_compares_and_writes_json(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "latency.json"
    sizes = ["--prompts", "8,16", "--contexts", "24", "--repeats", "3", "--threads", "1"]
    assert run("bench", "latency", "--model", folder, "--against", "transformers", *sizes, "--json", file) == 0
    text = capsys.readouterr().out
    assert "TTFT by prompt length" in text and "TPOT by context" in text and "transformers" in text
    assert max(map(len, text.splitlines()[1:])) <= 80
    report = json.loads(file.read_text())
    assert [(row["phase"], row["tokens"]) for row in report["rows"]] == [
        ("prefill", 8),
        ("prefill", 16),
        ("decode", 24),
    ]
    assert report["hardware"]["machine"]["threads"] == 1 and report["weights"] == "checkpoint"
    for row in report["rows"]:
        assert len(row["subjects"]["transformers"]["times_ms"]) == report["repeats"] == 3


def test_bench_runs_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bench", "latency", "--model", folder, "--prompts", "", "--contexts", "8", "--repeats", "1") == 0
    text = capsys.readouterr().out
    assert "transformers" not in text and "TTFT" not in text and "TPOT" in text


def test_threads_reach_torch(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", "x", "--model", folder, "--max-tokens", "1", "--threads", "1") == 0
    assert torch.get_num_threads() == 1


def test_train_starts_the_run_that_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training itself has its own tests; here it only notes its settings."""
    asked: list[Any] = []

    def train(config: TrainConfig, **settings: Any) -> History:
        asked.extend([config, settings])
        return History(step=5, tokens=640, held_out_losses=[(5, 2.5)])

    monkeypatch.setattr("minillm.course.training.train.train", train)
    out, work = tmp_path / "out", tmp_path / "work"
    assert (
        run("train", "tiny-draft", "--minutes", "3", "--seed", "7", "--out", out, "--work", work, "--no-compile") == 0
    )
    config, settings = asked
    assert (config.shape, config.minutes, config.seed, config.compile) == ("tiny-draft", 3, 7, False)
    assert (config.out, config.work) == (out, work)
    assert settings["command"] == "minillm train tiny-draft --minutes 3 --seed 7"
    assert settings["plot"].parent == work and work.is_dir()
    assert "held-out loss 2.500" in capsys.readouterr().out


# What it says to those who are wrong

WRONG = {
    "no such model": (["demo", "--model", "nope"], "No model is called 'nope'"),
    "no such shape": (["demo", "--model", "random:nope"], "Shapes: smollm2-135m"),
    "an empty prompt": (["demo", "--model", "FOLDER", "--prompt", ""], "prompt is empty"),
    "a prompt too long": (["generate", "x" * 2000, "--model", "FOLDER"], f"{POSITIONS}"),
    "temperature below 0": (["demo", "--model", "FOLDER", "--temperature", "-1"], "temperature=-1.0"),
    "top_p of 0": (["generate", "x", "--model", "FOLDER", "--top-p", "0"], "top_p=0.0"),
    "no tokens": (["generate", "x", "--model", "FOLDER", "--max-tokens", "0"], "max_tokens=0"),
    "unknown dtype": (["demo", "--model", "FOLDER", "--dtype", "int3"], "dtype='int3' is not possible"),
    "unknown device": (["generate", "x", "--model", "FOLDER", "--device", "tpu"], "device='tpu' is not possible"),
    "no folder for the picture": (["demo", "--picture", "/nowhere/p.png"], "/nowhere/p.png cannot be written"),
    "no chat template": (["chat", "--model", "FOLDER"], "no chat template"),
    "a random model to talk to": (["chat", "--model", "random:smollm2-135m"], "no tokenizer"),
    "letters for lengths": (["bench", "latency", "--prompts", "12,x"], "--prompts '12,x' is no list of numbers"),
    "too long a context": (["bench", "latency", "--model", "FOLDER", "--contexts", "510"], f"{POSITIONS} positions"),
    "an unknown rival": (["bench", "latency", "--against", "vllm"], "Choose transformers, or leave it out"),
    "no repeats": (["bench", "latency", "--model", "FOLDER", "--repeats", "0"], "--repeats"),
    "no folder for the numbers": (["bench", "latency", "--json", "/nowhere/x.json"], "/nowhere/x.json cannot be"),
    "an unknown shape to train": (["train", "huge"], "'huge'"),
    "no time to train": (["train", "tiny", "--minutes", "0"], "minutes=0"),
    "an unknown command": (["dance"], "dance"),
    "an unknown option": (["demo", "--colour", "red"], "--colour"),
    "a missing prompt": (["generate"], "prompt"),
    "no threads": (["doctor", "--threads", "0"], "--threads"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_gets_one_clear_message(
    case: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, expected = WRONG[case]
    assert run(*(folder if argument == "FOLDER" else argument for argument in arguments)) == 2
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err + printed.out
    assert expected in " ".join(printed.err.replace("│", " ").split())
    assert max(map(len, printed.err.splitlines())) <= 80


def test_a_damaged_model_is_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert run("generate", "x", "--model", tmp_path) == 2
    assert "no model.safetensors" in " ".join(capsys.readouterr().err.replace("│", " ").split())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    assert run("generate", "x", "--model", tmp_path) == 2
    assert "damaged or cut short" in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_a_hub_name_without_a_network_is_explained(tmp_path: Path) -> None:
    """A process of its own: the hub's client reads its settings when it is imported."""
    surroundings = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "COLUMNS": "80"}
    command = [sys.executable, "-c", "from minillm.cli import main; main()", "generate", "x", "--model", "some/model"]
    result = subprocess.run(command, capture_output=True, text=True, env=surroundings)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "could not be fetched from the hub" in " ".join(result.stderr.replace("│", " ").split())


def _broken(*_: object, **__: object) -> None:
    raise ValueError("boom [/red]")


def test_our_own_faults_are_short_unless_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(minillm.llm, "LLM", _broken)
    assert run("generate", "x") == 1
    message = capsys.readouterr().err
    assert "ValueError: boom [/red]" in message and "--debug" in message and "Traceback" not in message
    with pytest.raises(ValueError, match="boom"):
        run("--debug", "generate", "x")


def test_wrong_input_too_shows_its_traceback_when_asked() -> None:
    with pytest.raises(minillm.MinillmError):
        run("--debug", "generate", "x", "--model", "nope")


def test_an_interrupt_is_no_error_of_ours(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(minillm.llm, "LLM", interrupt)
    assert run("generate", "x") in (1, 130)  # typer's own code, which depends on its version
    assert "Traceback" not in capsys.readouterr().err


# How numbers look


@pytest.mark.parametrize(
    "value, text",
    [
        (0, "0"),
        (1, "1.00"),
        (0.001234, "0.00123"),
        (9.996, "10.0"),
        (12.345, "12.3"),
        (99.96, "100"),
        (12345.6, "12346"),
    ],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    "value, unit, text",
    [
        (44.7e9, "B/s", "44.7 GB/s"),
        (0.0021, "s", "2.10 ms"),
        (3.5e-6, "s", "3.50 µs"),
        (114688, "B", "115 kB"),
        (876e9, "FLOP/s", "876 GFLOP/s"),
        (0, "B", "0 B"),
    ],
)
def test_quantities_have_a_prefix(value: float, unit: str, text: str) -> None:
    assert quantity(value, unit) == text
