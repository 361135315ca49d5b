"""The screen and the disk: any text on any terminal, other people's noise, pipes that end, disks that are full."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import random
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tqdm import tqdm

from minillm.cli import main, screen
from minillm.cli.console import facts
from minillm.cli.screen import PICTURES, Commands, alone, check_destination, err, out, plain
from minillm.course.foreign import visible
from minillm.errors import ConfigError
from minillm.outputs import RequestMetrics

WORDS = ["alpha", "β", "中文", "[red]", "[/x]", ":smile:", "{x}", "100%", "😀", "a\tb", "\n", "✓", "é"]
SEQUENCES = [
    "\x1b[31m",
    "\x1b[2J",
    "\x1b[1;1H",
    "\x1b]0;title\x07",
    "\x1b]8;;http://x\x1b\\",
    "\x1bc",
    "\x1b(B",
    "\x9b5n",
]
CONTROLS = {
    "\a": "␇",
    "\b": "␈",
    "\r": "␍",
    "\x7f": "␡",
    "\x00": "␀",
    "\x0b": "␋",
    "\x85": "\ufffd",
    "\u202e": "\ufffd",
}
ENCODINGS = ["ascii", "latin-1", "cp1252", "cp437", "shift_jis", "utf-8", "utf-16"]


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MINILLM_DEBUG", "")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)


def run(*words: str) -> int:
    """The exit code of one command; 0 for a command that just returns."""
    try:
        main(words)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def drawn(rng: random.Random) -> tuple[str, str]:
    """Some text of a stranger, and what may be shown of it."""
    pieces = [(word, word) for word in rng.choices(WORDS, k=4)]
    pieces += [(sequence, "") for sequence in rng.choices(SEQUENCES, k=3)]
    pieces += rng.choices(list(CONTROLS.items()), k=3)
    pieces.append((chr(rng.randrange(0xD800, 0xE000)), "\ufffd"))
    rng.shuffle(pieces)
    pieces = [part for piece in pieces for part in (piece, (" ", " "))]  # or \x1b and a word would be a sequence
    return "".join(raw for raw, _ in pieces), "".join(seen for _, seen in pieces)


def test_text_of_strangers_steers_nothing() -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    for case in range(300):
        raw, seen = drawn(rng)
        assert visible(raw) == seen, f"{seed=}, {case=}"
        assert visible(seen) == seen


@pytest.mark.parametrize("text", ["\x1b]0;never ends", "\x1b[", "\x1bPsecret", "\x1b", "\x9d0;title"])
def test_a_sequence_without_an_end_hides_nothing(text: str) -> None:
    shown = visible(text)
    assert "\x1b" not in shown and "\x9d" not in shown
    assert shown.endswith(text.lstrip("\x1b\x9d[]P"))


class Parrot:
    """Stands for an engine: it writes what it was given to write."""

    used: tuple[()] = ()
    says = ""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def stream(self, prompt: Any, params: Any = None) -> Any:
        for letter in self.says:
            completion = SimpleNamespace(delta=letter, text=self.says, token_ids=[1])
            metrics = SimpleNamespace(ttft=0.1, tpot=None)
            yield SimpleNamespace(outputs=[completion], prompt_token_ids=[1], metrics=metrics)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_any_text_on_any_stream(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe gets the text as it is, with escapes for what its encoding does not have."""
    rng = random.Random(len(encoding))
    monkeypatch.setattr("minillm.llm.LLM", Parrot)
    for _ in range(5):
        monkeypatch.setattr(Parrot, "says", drawn(rng)[0])
        raw = [io.BytesIO(), io.BytesIO()]
        for name, file in zip(("stdout", "stderr"), raw, strict=True):
            monkeypatch.setattr(sys, name, io.TextIOWrapper(file, encoding=encoding, newline=""))
        assert run("generate", "x") == 0
        assert raw[0].getvalue() == (Parrot.says + "\n").encode(encoding, "backslashreplace")
        assert "TTFT" in raw[1].getvalue().decode(encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_our_own_signs_on_any_stream(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has no sign there gets one like it, so that columns stay; JSON stays JSON."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, errors="backslashreplace"))
    out.print(facts("✓ γ", [("µ", "×", "→")]))
    sys.stdout.flush()
    assert "\\" not in raw.getvalue().decode(encoding)
    raw.truncate(0), raw.seek(0)
    out.data(values := [*WORDS, "\ud800"])
    sys.stdout.flush()
    assert json.loads(raw.getvalue().decode(encoding)) == values


def test_on_a_terminal_nothing_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text of a model, a file's name, an error, a cell of a table, a line beside a bar."""
    rng = random.Random(5)
    monkeypatch.setattr("minillm.llm.LLM", Parrot)
    monkeypatch.setattr(screen.err, "_force_terminal", None)
    raw, seen = drawn(rng)
    raw, seen = raw.replace("\t", " ").replace("\n", " "), seen.replace("\t", " ").replace("\n", " ")
    monkeypatch.setattr(Parrot, "says", "ok")
    master, slave = pty.openpty()
    with os.fdopen(slave, "w", encoding="utf8", newline="") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.setattr(sys, "stderr", terminal)
        out.width = err.width = 200
        assert out.is_terminal
        out.print(plain(raw), raw)
        out.print(facts(raw, [(raw, raw, raw)]))
        assert run("generate", "x", "--model", raw) == 0
        with err.waiting(raw) as line:
            line.update(raw)
        assert run("lab", "test", raw) == 2
        terminal.flush()
        shown = os.read(master, 1 << 20).decode("utf8")
    out.width = err.width = 80
    ours = shown.replace("\x1b[?25l", "").replace("\x1b[?25h", "").replace("\x1b[2K", "").replace("\x1b[1A", "")
    assert "\x1b" not in ours and "\x07" not in ours and "\x9b" not in ours
    assert seen.split()[0] in ours


def test_narrow_terminals_lose_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """40 columns: words are wrapped, and a line with more numbers than that stays whole."""
    out.width = 40
    try:
        out.print(facts("A title", [("name", "word " * 20, "meaning " * 10)]))
        wrapped = capsys.readouterr().out
        assert max(map(len, wrapped.splitlines())) <= 40 and wrapped.count("word") == 20
        table = facts("Numbers", [("n" * 30, "x"), ("12345.678 (12345.6–12345.9)" + "9" * 20, "y")])
        out.print(table)
        assert "12345.678 (12345.6–12345.9)" + "9" * 20 in capsys.readouterr().out
    finally:
        out.width = 80


# Other people's noise


class Rival:
    """Another library, as loud as they are. What it writes to was there when it was imported, or when it is called."""

    def __init__(self) -> None:
        self.log = logging.Logger("rival")
        self.log.addHandler(logging.StreamHandler())

    def work(self, rng: random.Random) -> None:
        noises = [
            lambda: warnings.warn("rival: this will change", FutureWarning, stacklevel=1),
            lambda: self.log.critical("rival: careful"),
            lambda: logging.getLogger("rival.other").warning("rival: no handler"),
            lambda: print("rival: hello"),
            lambda: print("rival: hello", file=sys.stderr),
            lambda: list(tqdm(range(3), desc="rival")),
            lambda: (warnings.simplefilter("always"), warnings.warn("rival: again", UserWarning, stacklevel=1)),
        ]
        for noise in rng.sample(noises, len(noises)):
            noise()


def noisy(capsys: pytest.CaptureFixture[str], seed: int) -> str:
    app = Commands()

    @app.command()
    def measure() -> None:
        rival = Rival()
        with err.waiting("Measuring …"):
            rival.work(random.Random(seed))
        out.print("the result")
        err.print("the timing")
        logging.getLogger("minillm.measure").warning("said by us")

    @app.command()
    def other() -> None:
        pass

    with pytest.raises(SystemExit):
        app(args=["measure"])
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == "the result"
    assert "the timing" in printed.err
    return printed.out + printed.err


@pytest.mark.parametrize("seed", range(5))
def test_the_screen_is_ours(seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    filters, streams = list(warnings.filters), (sys.stdout, sys.stderr)
    shown = noisy(capsys, seed)
    assert "rival" not in shown and "said by us" in shown
    assert (warnings.filters, (sys.stdout, sys.stderr)) == (filters, streams)
    assert logging.getLogger("minillm").handlers == []


@pytest.mark.filterwarnings("default")
def test_who_debugs_hears_everything(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINILLM_DEBUG", "1")
    assert noisy(capsys, 0).count("rival: ") >= 4


def test_help_and_usage_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """They are printed by the library that parses, which is not silenced for that."""
    assert run("lab", "--help") == 0 and "Usage" in capsys.readouterr().out
    assert run("lab", "hint", "--loud") == 2 and "--loud" in capsys.readouterr().err


def test_an_error_leaves_the_streams_as_they_were() -> None:
    streams = sys.stdout, sys.stderr
    with pytest.raises(ZeroDivisionError), alone():
        raise ZeroDivisionError
    assert (sys.stdout, sys.stderr) == streams


# Pipes and disks


@pytest.mark.parametrize("command", [["generate", "x"], ["--help"], ["lab", "--help"]])
@pytest.mark.parametrize("length", [1, 100_000])
def test_a_reader_who_goes_gets_no_message(
    length: int, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `| head`. 141 is what a shell says of any tool that writes to nobody."""
    monkeypatch.setattr("minillm.llm.LLM", Parrot)
    monkeypatch.setattr(Parrot, "says", "x\n" * length)
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert run(*command) == 141
    assert "Error" not in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the device that is always full is Linux's")
@pytest.mark.parametrize("command", [["generate", "x"], ["--help"], ["lab", "list"]])
def test_a_full_disk_is_told(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("minillm.llm.LLM", Parrot)
    monkeypatch.setattr(Parrot, "says", "x")
    monkeypatch.chdir(Path(__file__).parents[1])
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert run(*command) == 1
        message = " ".join(capsys.readouterr().err.split())
        assert "No space left on device" in message and "should not happen" not in message
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        monkeypatch.setattr(sys, "stderr", full)
        assert run(*command) == 1


def test_nothing_is_said_at_the_interpreter_s_end() -> None:
    """A process of its own: what Python flushes at its end fails once more, and then writes a traceback."""
    program = [sys.executable, "-c", "from minillm.cli import main; main(['--help'])"]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(program, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 1 and "Exception ignored" not in ended.stderr and "Traceback" not in ended.stderr


def test_streams_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minillm.llm.LLM", Parrot)
    monkeypatch.setattr(Parrot, "says", "x")
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert run("generate", "x") == 0


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied", "/x"), OSError(5, "I/O error"), MemoryError()]
)
def test_what_the_machine_refuses_is_not_our_fault(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("minillm.llm.LLM", refuse)
    assert run("generate", "x") == 1
    assert "should not happen" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["x.txt", "x.tar.gz", "x.PNG.exe", "folder", "no/such/p.png", "", ".", "y" * 300, "a\0b.png"]
)
def test_a_destination_that_cannot_be_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ConfigError):
        check_destination(Path(name), endings=PICTURES)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("x.png", "x.png"), ("x.SVG", "x.SVG"), ("plain", "plain.png"), (".hidden", ".hidden.png"), ("v1.pdf", "v1.pdf")],
)
def test_a_picture_goes_where_it_is_told(name: str, expected: str) -> None:
    from matplotlib.figure import Figure

    path = check_destination(Path(name), endings=PICTURES)
    Figure().savefig(path)
    assert path == Path(expected) and path.exists() and len(list(Path.cwd().iterdir())) == 1


def test_destinations_of_every_kind(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for name in ("file", "new.json", "folder/new.json", "/dev/null"):
        assert check_destination(Path(name)) == Path(name)
    for name in ("folder", "new/folder"):
        assert check_destination(Path(name), folder=True) == Path(name)
    for name, folder in (("folder", False), ("file", True), ("file/below", True), ("file/x.json", False)):
        with pytest.raises(ConfigError, match="cannot be written"):
            check_destination(Path(name), folder=folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"], "nothing was made by looking"


def test_a_full_disk_is_told_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_blocks=100, f_bavail=1, f_frsize=512))
    with pytest.raises(ConfigError, match="disk is full"):
        check_destination(Path("x.json"))


BEFORE = {
    "demo": ["demo", "--picture", "x.txt"],
    "kv": ["bench", "kv", "--plot", "x.txt"],
    "stall": ["bench", "stall", "--plot", "x.txt"],
    "roofline": ["roofline", "--plot", "x.txt"],
    "latency": ["bench", "latency", "--json", "no/x.json"],
    "serve": ["bench", "serve", "--json", "no/x.json"],
    "spec": ["bench", "spec", "--json", "no/x.json"],
    "train": ["train", "--out", "file", "--minutes", "1"],
    "grade": ["teach", "grade", ".", "--to", "file/x"],
    "release": ["teach", "release", "file"],
    "submit": ["lab", "submit", "--to", "ex03_kv_cache.py"],
}


@pytest.mark.parametrize("case", BEFORE)
def test_it_is_told_before_the_work(
    case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Nothing is loaded, trained, graded or packed for a file that cannot be written."""

    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("it began to work")

    (tmp_path / "file").write_text("x")
    for place in ("model.loader.load_model", "llm.LLM", "course.training.train.train", "course.lab.bulk.Run"):
        monkeypatch.setattr(f"minillm.{place}", work)
    for place in ("course.lab.release.release", "course.lab.release.pack"):
        monkeypatch.setattr(f"minillm.{place}", work)
    assert run(*BEFORE[case]) == 2
    assert "it began to work" not in capsys.readouterr().err


def test_metrics_have_the_fields_that_the_parrot_has() -> None:
    assert {"ttft", "tpot"} <= set(dir(RequestMetrics))
