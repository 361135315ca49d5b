"""The worker and its sandbox: values come back as they were, limits hold, and scripts do not meet."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from minillm.course.errors import CourseError, GraderError
from minillm.course.lab import isolation
from minillm.course.lab.checks import Case
from minillm.course.lab.compare import same
from minillm.course.lab.protocol import Foreign, Limits, Reply
from minillm.course.lab.sandbox import Sandbox
from minillm.course.lab.worker import LENGTHS, pack, unframe, unpack

REPOSITORY = Path(isolation.__file__).parents[3]


def run(sandbox: Sandbox, source: str, call: str = "f", *args: Any, **limits: Any) -> Reply:
    """Call one function of a source."""
    case = Case(seed=0)
    case.expect(getattr(case.learner, call)(*args), None)
    return sandbox.run(source, case.script(limits=Limits(**limits)))


def value(sandbox: Sandbox, expression: str) -> Any:
    """The value of an expression over there."""
    reply = run(sandbox, f"import os, sys, socket\nf = lambda: ({expression})")
    assert reply.status == "ok", reply
    return reply.values[0]


@pytest.mark.parametrize(
    "sent",
    [
        1,
        -2.5,
        "text ü\n",
        True,
        None,
        [1, [2.0, "x"]],
        (1, (torch.arange(3),)),
        {"a": 1, 2: torch.linspace(-2, 3, 6).view(2, 3)},
        {3, 4},
        torch.zeros(0, 2),
        torch.tensor(3, dtype=torch.int8),
        torch.linspace(-2, 3, 6).view(2, 3).to(torch.bfloat16).T,
        float("inf"),
    ],
    ids=str,
)
def test_values_travel_both_ways(sandbox: Sandbox, sent: Any) -> None:
    (back,) = run(sandbox, "f = lambda x: x", "f", sent).values
    assert same(back, sent), f"{back!r} came back for {sent!r}"


def test_what_is_no_plain_data_comes_back_as_a_name(sandbox: Sandbox) -> None:
    assert value(sandbox, "[type('Odd', (), {})(), {'x': object}]") == [Foreign("Odd"), {"x": Foreign("type")}]


def test_subclasses_of_plain_types_are_no_plain_data(sandbox: Sandbox) -> None:
    """A number that lies about its comparisons must not come back as one."""
    assert value(sandbox, "type('Liar', (int,), {'__eq__': lambda a, b: True})(3)") == Foreign("Liar")


def test_scripts_do_not_meet(sandbox: Sandbox) -> None:
    source = "import torch\n\ndef f():\n    seen = hasattr(torch, 'mark')\n    torch.mark = 1\n    return seen"
    assert [run(sandbox, source).values for _ in range(2)] == [(False,), (False,)]


def test_an_error_is_told_with_the_learner_s_own_line(sandbox: Sandbox) -> None:
    reply = run(sandbox, "import torch\n\ndef f():\n    return torch.ones(2) @ torch.ones(3)")
    assert reply.status == "error" and reply.step == 1
    assert reply.error["type"] == "RuntimeError" and reply.error["line"] == "4" and "@" in reply.error["code"]


def test_values_before_an_error_arrive(sandbox: Sandbox) -> None:
    case = Case(seed=0)
    case.expect(case.learner.one(), 1)
    case.expect(case.learner.two(), 2)
    reply = sandbox.run("one = lambda: 1\ntwo = lambda: 1 / 0", case.script())
    assert reply.status == "error" and reply.values == (1,)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("while True: pass", "timeout"),
        ("import time; time.sleep(60)", "timeout"),
        ("while True: print('x' * 10000)", "timeout"),
        ("import os; os._exit(0)", "crashed"),
        ("import ctypes; ctypes.string_at(0)", "crashed"),
        ("raise SystemExit(0)", "error"),
        ("import sys; sys.exit(0)", "error"),
        ("raise KeyboardInterrupt", "error"),
        (
            "import os\n    for fd in (3, 4):\n        try: os.write(fd, b'x' * 99)\n        except OSError: pass",
            "garbled",
        ),
        ("import torch; return torch.ones(5 << 20)", "garbled"),
        ("open('big', 'wb').write(b'0' * (2 << 20))", "error"),
        ("return [open('/dev/null') for _ in range(100)]", "error"),
        ("import torch; return torch.ones(1 << 29)", "error"),
    ],
)
def test_limits(sandbox: Sandbox, body: str, status: str) -> None:
    """Each way to end is told apart, and the next script does not notice."""
    reply = run(sandbox, f"def f():\n    {body}", seconds=2.0, memory_bytes=256 << 20)
    assert reply.status == status, reply
    assert len(reply.output) < 5000
    assert value(sandbox, "1 + 1") == 2


def test_output_is_kept(sandbox: Sandbox) -> None:
    assert run(sandbox, "def f():\n    print('hello')").output == "hello\n"


def test_our_environment_stays_here(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "x")
    with Sandbox(sandbox.level) as fresh:
        assert value(fresh, "(os.environ.get('SECRET_TOKEN'), os.environ['PATH'])") == (None, "/usr/bin:/bin")


def test_a_file_called_torch_shadows_nothing(sandbox: Sandbox) -> None:
    case = Case(seed=0)
    case.expect(case.learner.f(), 0)
    reply = sandbox.run("import torch\nf = lambda: torch.ones(1).item()", case.script(), name="torch.py")
    assert reply.values == (1.0,)


def test_banned_modules_and_operations(sandbox: Sandbox) -> None:
    for source, error in (
        ("import minillm", "ImportError"),
        ("f = lambda: torch.softmax(torch.ones(2), 0)", "Permission"),
    ):
        case = Case(seed=0)
        case.expect(case.learner.f(), 0)
        script = case.script(banned_modules=("minillm",), banned_operations=("softmax",))
        assert sandbox.run(f"import torch\n{source}", script).error["type"].startswith(error)


def test_counting(sandbox: Sandbox) -> None:
    """2·m·k·n FLOPs of a product; the largest tensor is the product's own."""
    case = Case(seed=0)
    cost = case.count(case.learner.f, torch.ones(3, 4), torch.ones(4, 50))
    case.expect(cost["flops"], 2 * 3 * 4 * 50)
    case.expect(cost["largest"], 150)
    reply = sandbox.run("f = lambda a, b: (a @ b).sum()", case.script())
    assert reply.values == (1200, 150)


class TestNamespace:
    """What a submission can see: Python, and nothing of the course."""

    @pytest.fixture(scope="class")
    def inside(self) -> Any:
        """A worker that hides this repository."""
        if reason := isolation.unavailable("namespace"):
            pytest.skip(reason)
        with Sandbox("namespace", hide=(REPOSITORY,)) as sandbox:
            yield sandbox

    def test_the_course_is_absent(self, inside: Sandbox) -> None:
        for path in (REPOSITORY / "solutions", REPOSITORY / "tests", REPOSITORY / "minillm", Path.home() / ".ssh"):
            seen = value(inside, f"os.listdir({str(path)!r}) if os.path.isdir({str(path)!r}) else []")
            assert seen == [], f"{path} shows {seen}"

    def test_the_package_cannot_be_imported(self, inside: Sandbox) -> None:
        reply = run(inside, "def f():\n    import minillm.generate")
        assert reply.error["type"] in ("ModuleNotFoundError", "ImportError")

    def test_it_sees_its_own_processes_only(self, inside: Sandbox) -> None:
        assert len(value(inside, "[p for p in os.listdir('/proc') if p.isdigit()]")) <= 4

    def test_there_is_no_network(self, inside: Sandbox) -> None:
        assert value(inside, "[name for _, name in socket.if_nameindex()]") in ([], ["lo"])

    def test_nothing_can_be_written_but_in_tmp(self, inside: Sandbox) -> None:
        for path in ("/usr/x", f"{os.path.dirname(os.__file__)}/x", "/x", "/worker.py"):
            assert run(inside, f"def f():\n    open({path!r}, 'w')").status == "error", path

    def test_it_is_nobody(self, inside: Sandbox) -> None:
        if os.getuid() == 0:
            assert value(inside, "(os.getuid(), os.getgid(), os.getgroups())") == (65534, 65534, [])

    def test_it_can_import_what_nobody_imported_before(self, inside: Sandbox) -> None:
        """Also from a virtual environment in a folder that only its owner may read, as `mktemp -d` makes them."""
        assert value(inside, "__import__('torch.utils.benchmark').__name__") == "torch"

    def test_nothing_survives_the_end(self, inside: Sandbox) -> None:
        """A process that leaves its session is ended with its namespace."""
        mark = f"{time.time():.6f}"
        leave = f"os.setsid(); os.execvp('sleep', ['sleep', '{mark}'])"
        run(inside, f"import os\n\ndef f():\n    if os.fork() == 0:\n        {leave}")
        assert mark in everything_running()
        inside.close()
        time.sleep(0.2)
        assert mark not in everything_running()


def test_of_a_private_folder_the_parts_are_bound(tmp_path: Path) -> None:
    """A bound folder keeps its permissions, and nobody may not enter this one."""
    (tmp_path / "lib").mkdir()
    tmp_path.chmod(0o755)
    assert isolation._readable_parts(tmp_path) == [tmp_path]
    tmp_path.chmod(0o700)
    assert isolation._readable_parts(tmp_path) == [tmp_path / "lib"]


def everything_running() -> str:
    return subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout


def test_a_level_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never a weaker one."""
    monkeypatch.setattr(isolation.shutil, "which", lambda name: None)
    isolation.unavailable.cache_clear()
    for level in ("namespace", "container"):
        with pytest.raises(GraderError, match="not available here"):
            Sandbox(level)
    isolation.unavailable.cache_clear()
    with pytest.raises(CourseError, match="no level"):
        Sandbox("none")


def test_container_command() -> None:
    """No network, nothing writable but /tmp, no capabilities, nobody, and of this machine the worker's file alone."""
    line = " ".join(isolation.container("podman", "name", ["triton"]))
    for part in ("--network none", "--read-only", "--cap-drop ALL", "--pids-limit", "--memory", "--user 65534:65534"):
        assert part in line
    assert line.count("--volume") == 1 and "worker.py:/worker.py:ro" in line and line.endswith("/worker.py triton")


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"null", b"\xff\xfe", json.dumps({"sent": 3}).encode()])
def test_made_up_frames_are_refused_or_judged(data: bytes) -> None:
    """Whatever the bytes are, taking them apart ends in a value or an exception that the parent expects."""
    try:
        header, _ = unframe(data, b"\0" * 9 if data.startswith(b"[") else b"")
    except Exception as error:
        assert not isinstance(error, (SystemExit, MemoryError))
    else:
        assert header is None or isinstance(header, (dict, list))


def test_packing_is_its_own_inverse() -> None:
    tensors: dict[str, torch.Tensor] = {}
    thing = {"a": [1, (2, {3})], "b": torch.arange(4).view(2, 2).T}
    data = json.loads(json.dumps(pack(thing, tensors, repr)))
    assert same(unpack(data, tensors, lambda other: other), thing)
    assert LENGTHS.size == 8
