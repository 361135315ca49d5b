"""The core by itself: what `test_alone.py` runs in fresh processes, `python -m tests.alone TASK`, from the root.

A blocked module is hidden from everybody who looks for modules, as if its folder had been deleted or its package never
been installed: an import of it, or of anything below it, raises ModuleNotFoundError with its name.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest

EXTRAS = ("minillm.kernels", "minillm.quantization", "minillm.speculative", "minillm.chat", "minillm.shapes")
ABOVE = ("minillm.measure", "minillm.course", "minillm.cli")
PACKAGES = ("triton", "numba", "matplotlib", "ipywidgets", "typer")

PROMPT = "def fib(n):"
# asked for in words of EngineConfig -> the extra that it needs
NEEDS = {
    "minillm.quantization": {"kv_format": "int8"},
    "minillm.speculative": {"speculative": "ngram"},
    "minillm.shapes": {"model": "random:smollm2-135m"},
}

# The core's own tests are what lies in the folders of its rooms. Left out here, with the reason:
FOLDERS = ("engine", "cache", "attention", "model", "costs")
FILES = ("test_generate", "test_sampling", "test_prompts", "test_outputs", "test_config")
WITH_EXTRAS = {  # the extra is what they compare with, or what makes their input
    "attention/test_paged.py": "holds the definition against the CPU's kernels",
    "attention/test_benchmark.py": "runs the benchmark of attention, which describes the machine by minillm.measure",
    "model/test_tokenizer.py": "trains a tokenizer with minillm.course.training",
    "costs/test_formulas.py": "takes the published shapes of minillm.shapes",
    "model/test_loader.py": "saves checkpoints with minillm.course.training",
    "model/test_folders.py": "damages a checkpoint that minillm.course.training saved",
    "attention/test_backends.py": "holds each backend of minillm.kernels against the definition",
    "engine/test_interrupts.py": "interrupts a step that guesses with minillm.speculative",
    "model/test_embedded.py": "reads held-out text with minillm.measure and the batches of the training",
}
SLOW = {  # they pass as well: `python -m tests.alone tests --slow`
    "engine/test_fuzz.py": "thousands of steps",
    "engine/test_mutants.py": "each wrong engine serves a workload",
    "engine/test_verify.py": "exact enumeration",
    "model/test_parity.py": "imports transformers and builds a model of each family",
    "cache/test_blocks.py": "ten thousand random operations for each mutant",
}


class Without:
    """A finder of modules that does not find these names, and is like the one it stands for in all else."""

    def __init__(self, finder: Any, names: Iterable[str]) -> None:
        self.finder, self.names = finder, frozenset(names)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return None if name in self.names else self.finder.find_spec(name, path, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)


def block(names: Iterable[str]) -> None:
    """Hide these modules and all below them. They must not be loaded yet."""
    names = tuple(names)
    loaded = [module for module in sys.modules for name in names if f"{module}.".startswith(f"{name}.")]
    assert not loaded, f"too late to block them: {loaded} are loaded"
    sys.meta_path = [Without(finder, names) for finder in sys.meta_path]


def serve() -> list[list[int]]:
    """Both front doors: the token ids of a greedy and of a sampled completion, checked against the two phases."""
    import torch

    import minillm
    from minillm import LLM, SamplingParams

    model = minillm.load_model("tiny", device="cpu", dtype="float32", kernels="auto")
    llm = LLM("tiny", device="cpu", dtype="float32")
    sampled = SamplingParams(temperature=0.8, seed=7, max_tokens=12, stop=["\n\n", "return"])
    greedy, drawn = llm.generate(
        [PROMPT, PROMPT], [SamplingParams(temperature=0, max_tokens=12), sampled], progress=False
    )
    with torch.inference_mode():
        logits, cache = minillm.prefill(model, greedy.prompt_token_ids)
        for token in greedy.outputs[0].token_ids:
            assert token == int(logits.argmax()), "the engine's greedy tokens are not those of prefill and decode"
            logits = minillm.decode(model, token, cache)
    assert drawn.outputs[0].finish_reason in ("stop", "length")
    assert not any(stop in drawn.outputs[0].text for stop in ("\n\n", "return"))
    return [list(output.outputs[0].token_ids) for output in (greedy, drawn)]


def refuse_what_is_missing(blocked: Iterable[str]) -> None:
    """Who asks for an extra that is not there is told so by name, when the engine is made."""
    from minillm import LLM
    from minillm.errors import ConfigError

    for extra in set(blocked) & NEEDS.keys():
        for setting, value in NEEDS[extra].items():
            with pytest.raises(ConfigError, match=value) as raised:
                LLM(**{"model": "tiny", "device": "cpu", setting: value})
            assert type(raised.value.__cause__) is not AttributeError


def in_a_fork(task: Callable[[], object]) -> int:
    """Run `task` in a copy of this process, so that it imports minillm afresh; the exit code."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            task()
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def one_is_missing(name: str) -> None:
    block([name])
    serve()
    refuse_what_is_missing([name])


def loaded() -> dict[str, list[str]]:
    """Which packages and extras are loaded by `import minillm`, and after `LLM("tiny")`."""
    import minillm

    names = (*PACKAGES, *EXTRAS, *ABOVE, "transformers", "torch")
    first = [name for name in names if name in sys.modules]
    minillm.LLM("tiny", device="cpu")
    return {"import": first, "LLM": [name for name in names if name in sys.modules]}


def own_tests(*, slow: bool = False) -> list[str]:
    """The files of the core's own tests that need no extra, relative to tests/."""
    from tests.house import PACKAGE

    tests = PACKAGE.parent / "tests"
    paths = [path for folder in FOLDERS for path in sorted((tests / folder).glob("test_*.py"))]
    paths += [path for name in FILES if (path := tests / f"{name}.py").exists()]
    names = [path.relative_to(tests).as_posix() for path in paths]
    return [name for name in names if name not in WITH_EXTRAS and (slow or name not in SLOW)]


def main(task: str, *options: str) -> None:
    if task == "loaded":
        print(json.dumps(loaded()))
    elif task == "without-any":
        block((*EXTRAS, *ABOVE, *PACKAGES))
        print(json.dumps(serve()))
        refuse_what_is_missing(EXTRAS)
    elif task == "without-one":
        import torch  # noqa: F401 — once, before the forks: it takes longer than all the rest

        failed = [name for name in (*EXTRAS, *PACKAGES[:2]) if in_a_fork(lambda name=name: one_is_missing(name))]
        assert not failed, f"without {failed}, each alone, the core does not serve"
    elif task == "tests":
        block((*EXTRAS, *ABOVE, *PACKAGES))
        files = [f"tests/{name}" for name in own_tests(slow="--slow" in options)]
        sys.exit(pytest.main(["-o", "addopts=", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *files]))


if __name__ == "__main__":
    main(*sys.argv[1:])
