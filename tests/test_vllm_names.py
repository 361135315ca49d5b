"""docs/vllm.md against vLLM's recorded names and against our own classes: what "the same as in vLLM" means, exactly."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from minillm.config import EngineConfig
from minillm.errors import MinillmError, RequestError
from minillm.llm import LLM
from minillm.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from minillm.prompts import read_prompts
from minillm.sampling import SamplingParams

HERE = Path(__file__).parent
RECORD = json.loads((HERE / "vllm_fields.json").read_text(encoding="utf-8"))
VLLM: dict[str, list[str]] = RECORD["names"]
PAGE = (HERE.parent / "docs" / "vllm.md").read_text(encoding="utf-8")
VERDICTS = ("same", "differs", "not there")


def public(kind: type) -> set[str]:
    """Fields and properties."""
    properties = {name for name, value in vars(kind).items() if isinstance(value, property)}
    return {one.name for one in dataclasses.fields(kind)} | properties


def arguments(function: object) -> set[str]:
    """Names of parameters; for one that takes `**settings`, those of EngineConfig, too."""
    parameters = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    named = {one.name for one in parameters if one.kind is not one.VAR_KEYWORD} - {"self"}
    passes_on = any(one.kind is one.VAR_KEYWORD for one in parameters)
    return named | ({one.name for one in dataclasses.fields(EngineConfig)} if passes_on else set())


MAPPINGS = ("LLM(**kwargs)", "TextPrompt", "TokensPrompt")  # parts of vLLM's lists, or keys that ours share
PROMPT_KEYS = {"prompt", "prompt_token_ids", "cache_salt"}
OURS: dict[str, set[str]] = {
    "LLM": arguments(LLM.__init__),
    "LLM(**kwargs)": arguments(LLM.__init__),
    "LLM.generate": arguments(LLM.generate),
    "TextPrompt": PROMPT_KEYS,
    "TokensPrompt": PROMPT_KEYS,
    "SamplingParams": {one.name for one in dataclasses.fields(SamplingParams)},
    "RequestOutput": public(RequestOutput),
    "CompletionOutput": public(CompletionOutput),
    "RequestOutput.metrics": public(RequestMetrics),
    "Logprob": public(Logprob),
}


def section(name: str) -> str:
    found = re.search(rf"^## {re.escape(name)}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    assert found, f"docs/vllm.md has no section {name}"
    return found[1]


def rows(name: str) -> list[tuple[str, str, str]]:
    """(vLLM's name, verdict, explanation), one for each name of each row."""
    cells = [
        [c.strip() for c in line.strip().strip("|").split("|")] for line in section(name).splitlines() if "|" in line
    ]
    table = [(names, verdict, how) for names, verdict, how in cells if names.startswith("`")]
    return [(one, verdict, how) for names, verdict, how in table for one in re.findall(r"`([^`]+)`", names)]


def only_here(name: str) -> set[str]:
    found = re.search(r"^Only here: ((?:`\w+`(?:, )?)*)", section(name), re.M)
    return set(re.findall(r"`(\w+)`", found[1])) if found else set()


def test_the_version_is_the_recorded_one() -> None:
    assert f"vLLM {RECORD['vllm']}" in PAGE
    assert re.findall(r"^## (.*)$", PAGE, re.M) == list(VLLM)


@pytest.mark.parametrize("name", VLLM)
def test_every_name_of_vllm_stands_in_exactly_one_row(name: str) -> None:
    assert sorted(one for one, _, _ in rows(name)) == sorted(VLLM[name])


@pytest.mark.parametrize("name", VLLM)
def test_every_row_is_true_of_our_objects(name: str) -> None:
    """What is the same is there, what differs is explained by something that is there, what is not there is not."""
    for vllm, verdict, how in rows(name):
        assert verdict in VERDICTS, vllm
        if verdict == "same":
            assert vllm in OURS[name] and not how, vllm
        elif verdict == "differs":
            counterparts = {vllm, *re.findall(r"`(\w+)`", how)} & OURS[name]
            assert counterparts and how, vllm
        else:
            assert vllm not in OURS[name], vllm


@pytest.mark.parametrize("name", [name for name in VLLM if name not in MAPPINGS])
def test_what_only_we_have_is_listed(name: str) -> None:
    assert only_here(name) == OURS[name] - set(VLLM[name])


def absent(name: str) -> list[str]:
    return [one for one, verdict, _ in rows(name) if verdict == "not there"]


@pytest.mark.parametrize("field", absent("SamplingParams"))
def test_parameters_that_are_not_there_are_refused_by_name(field: str) -> None:
    wish: dict[str, Any] = {field: None}
    with pytest.raises(TypeError, match=field):
        SamplingParams(**wish)


@pytest.mark.parametrize("field", absent("LLM"))
def test_settings_that_are_not_there_are_refused_by_name(field: str) -> None:
    """Before a model is looked for: the folder does not exist."""
    with pytest.raises((TypeError, MinillmError), match=field):
        LLM("/nowhere/at/all", **{field: None})  # type: ignore[arg-type]


@pytest.mark.parametrize("field", absent("LLM.generate"))
def test_arguments_that_are_not_there_are_refused_by_name(field: str) -> None:
    with pytest.raises(TypeError, match=field):
        LLM.generate(None, "x", **{field: None})  # type: ignore[arg-type]


@pytest.mark.parametrize("field", sorted({*absent("TextPrompt"), *absent("TokensPrompt")}))
def test_keys_that_are_not_there_are_refused_by_name(field: str) -> None:
    for prompt in ({"prompt": "x"}, {"prompt_token_ids": [1]}):
        with pytest.raises(RequestError, match=field):
            read_prompts({**prompt, field: None})


@pytest.mark.parametrize(
    ("was", "becomes"),
    [
        ("| `rank` | differs | always a number; None is possible in vLLM |\n", ""),
        ("| `decoded_token` | same | |\n", "| `decoded_token` | same | |\n" * 2),
        ("| `decoded_token` | same | |", "| `decoded_token` | not there | |"),
        ("| `first_token_latency` | differs | `ttft` |", "| `first_token_latency` | same | |"),
        ("| `first_token_latency` | differs | `ttft` |", "| `first_token_latency` | differs | `time_to_first` |"),
        ("Only here: `delta`, `error`.", "Only here: `delta`."),
        ("Only here: `progress`.", "Only here: `progress`, `verbose`."),
    ],
)
def test_a_page_that_is_not_true_is_found(was: str, becomes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert was in PAGE
    monkeypatch.setattr(sys.modules[__name__], "PAGE", PAGE.replace(was, becomes))
    with pytest.raises(AssertionError):
        for name in VLLM:
            test_every_name_of_vllm_stands_in_exactly_one_row(name)
            test_every_row_is_true_of_our_objects(name)
            if name not in MAPPINGS:
                test_what_only_we_have_is_listed(name)
