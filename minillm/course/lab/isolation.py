"""The levels of isolation, as command lines: what a worker can see, and what ends with it.

    process     a process of its own. It reads what its user can read: fit for one's own laptop, not tamper-proof.
    namespace   bubblewrap: the system and Python read-only, a private /tmp, no network, no environment, its own
                process numbers. This project, its checks and its solutions are not there. Linux.
    container   podman or docker: the same, from an image that holds Python and PyTorch alone.

A level that is not available here is an error; no level ever turns into a weaker one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from minillm.course.errors import CourseError, GraderError
from minillm.course.lab import worker

LEVELS = ("process", "namespace", "container")
IMAGE = "minillm-grader"
PACKAGE = Path(__file__).resolve().parents[2]
PRIVATE_BYTES = 64 << 20
ENVIRONMENT = {
    "HOME": "/tmp",
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "OMP_NUM_THREADS": "1",
    "TRITON_INTERPRET": "1",  # kernels run without a GPU, for everybody in the same way
    "OBJC_DISABLE_INITIALIZE_FORK_SAFETY": "YES",  # macOS: PyTorch is imported before the fork
}


@dataclass(frozen=True)
class Launch:
    """How to start a worker, and how to end what killing its process would leave behind.

    nobody: the worker is root in its namespace, and its scripts can become nobody.
    """

    argv: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    nobody: bool = False
    end: tuple[str, ...] = ()


def check_available(level: str) -> None:
    """Raise CourseError for an unknown level, GraderError for one that is not available on this machine."""
    if level not in LEVELS:
        raise CourseError(f"{level!r} is no level of isolation. Choose one of: {', '.join(LEVELS)}.")
    if reason := unavailable(level):
        raise GraderError(f"Isolation {level!r} is not available here: {reason}")


def launch(level: str, folder: str, preload: Sequence[str], hide: Sequence[Path] = ()) -> Launch:
    """How to start a worker of a level that may write in `folder` and imports `preload` ahead of all scripts.

    hide: folders that a namespace must not show, beside this package and its answers.
    """
    if level == "namespace":
        return Launch([*_bubble(hide), sys.executable, *_python("/worker.py", preload)], nobody=os.getuid() == 0)
    if level == "container":
        engine, name = str(_engine()), Path(folder).name
        return Launch(container(engine, name, preload), dict(os.environ), end=(engine, "kill", name))
    argv = [sys.executable, *_python(str(Path(worker.__file__).resolve()), preload)]
    return Launch(argv, {**ENVIRONMENT, "HOME": folder, "TMPDIR": folder})


@cache
def unavailable(level: str) -> str:
    """Why a level cannot be used on this machine; empty if it can."""
    if level == "namespace":
        return _no_namespace()
    if level == "container":
        return _no_container()
    return ""


def _no_namespace() -> str:
    if shutil.which("bwrap") is None:
        return "bubblewrap is not installed. On Debian and Ubuntu: apt install bubblewrap."
    trial = subprocess.run([*_bubble(), "true"], capture_output=True, text=True, env={}, check=False)
    return f"bubblewrap cannot make namespaces: {trial.stderr.strip()}" if trial.returncode else ""


def _no_container() -> str:
    engine = _engine()
    if engine is None:
        return "neither podman nor docker is installed."
    trial = subprocess.run([engine, "image", "inspect", IMAGE], capture_output=True, text=True, check=False)
    return f"{engine} has no image {IMAGE!r}; docs/teaching.md tells how to build it." if trial.returncode else ""


def _engine() -> str | None:
    return shutil.which("podman") or shutil.which("docker")


def _python(script: str, preload: Sequence[str]) -> list[str]:
    return ["-I", "-B", script, *preload]


def _bubble(hide: Sequence[Path] = ()) -> list[str]:
    """bubblewrap's options. What is bound later lies on top: first the system, then Python, then what hides."""
    options = [str(shutil.which("bwrap")), "--unshare-all", "--die-with-parent", "--clearenv", "--cap-drop", "ALL"]
    if os.getuid() == 0:  # a worker of root makes its scripts nobody's, so that limits on processes count
        options.remove("--unshare-all")
        options += ["--unshare-net", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
        options += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    for name, value in ENVIRONMENT.items():
        options += ["--setenv", name, value]
    options += ["--ro-bind", "/usr", "/usr", "--proc", "/proc", "--dev", "/dev"]
    for name in ("bin", "lib", "lib64", "sbin"):
        path = Path("/", name)
        if path.is_symlink():
            options += ["--symlink", os.readlink(path), str(path)]
        elif path.is_dir():
            options += ["--ro-bind", str(path), str(path)]
    options += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    options += ["--perms", "1777", "--size", str(PRIVATE_BYTES), "--tmpfs", "/tmp"]
    shown = _python_folders()
    for path in shown:
        options += [*_parents(path), "--ro-bind", str(path), str(path)]
    for path in _hidden(shown, hide):
        options += ["--tmpfs", str(path), "--remount-ro", str(path)]
    return [*options, "--ro-bind", str(Path(worker.__file__).resolve()), "/worker.py", "--chdir", "/tmp"]


def _python_folders() -> list[Path]:
    """Where Python and its packages are, without what already lies in /usr."""
    places = {sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), str(Path(sys.executable).parent)}
    folders = sorted({Path(place).absolute() for place in places} | {Path(place).resolve() for place in places})
    folders = [folder for folder in folders if folder.is_dir() and not folder.is_relative_to("/usr")]
    outermost = [f for f in folders if not any(f != other and f.is_relative_to(other) for other in folders)]
    return [part for folder in outermost for part in _readable_parts(folder)]


def _readable_parts(folder: Path) -> list[Path]:
    """What to bind so that nobody can read a folder: what lies in it, if the folder itself is private to its owner."""
    private = folder.stat().st_mode & 0o005 != 0o005
    return sorted(folder.iterdir()) if private else [folder]


def _parents(path: Path) -> list[str]:
    """Make the folders above a path readable to nobody: bubblewrap would copy the permissions from outside."""
    return [word for parent in reversed(path.parents[:-1]) for word in ("--dir", str(parent))]


def _hidden(shown: Sequence[Path], hide: Sequence[Path]) -> list[Path]:
    """Folders that hold answers and would be seen: the course, this package, transformers."""
    spec = find_spec("transformers")
    answers = [*hide, PACKAGE, *map(Path, (spec.submodule_search_locations if spec else None) or ())]
    return [path for path in answers if any(path.is_relative_to(folder) for folder in (*shown, Path("/usr")))]


def container(engine: str, name: str, preload: Sequence[str]) -> list[str]:
    """The command line of a worker in a container. Nothing of this machine is in it but the worker's source."""
    source = f"{Path(worker.__file__).resolve()}:/worker.py:ro"
    options = ["--name", name, "--rm", "--interactive", "--init", "--network", "none", "--read-only"]
    options += ["--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--user", "65534:65534"]
    options += ["--tmpfs", f"/tmp:size={PRIVATE_BYTES}", "--pids-limit", "64", "--memory", "4g"]
    options += ["--volume", source, "--workdir", "/tmp"]
    for variable, value in ENVIRONMENT.items():
        options += ["--env", f"{variable}={value}"]
    return [engine, "run", *options, IMAGE, "python", *_python("/worker.py", preload)]
