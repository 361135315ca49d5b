"""config.json: every field read as transformers reads it, or refused by name. transformers itself is the oracle."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from minillm.config import ModelConfig, RopeScaling
from minillm.errors import CheckpointError, UnsupportedModelError
from minillm.generate import prefill
from minillm.model.hf import FIELDS, model_config, read_config, read_json
from minillm.model.loader import load_model
from tests.families import LLAMA3_ROPE

transformers.logging.set_verbosity_error()
CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
DOCS = Path(__file__).parents[2] / "docs" / "inputs.md"
SMALL: dict[str, Any] = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4
) | dict(num_key_value_heads=2, head_dim=8, max_position_embeddings=256, initializer_range=0.4)


def names_of(config: type) -> set[str]:
    """The fields of one of transformers' configs."""
    return {field.name for field in dataclasses.fields(config)}


@pytest.mark.parametrize("family", CONFIGS)
def test_every_field_of_transformers_has_a_row(family: str) -> None:
    """A field that a new version brings fails here, and somebody decides: used, only some values, or harmless."""
    assert names_of(CONFIGS[family]) <= FIELDS.keys(), "say in fields.json and in docs/inputs.md what happens to these"


@pytest.mark.parametrize("family", CONFIGS)
def test_defaults_are_those_of_transformers(family: str) -> None:
    for field in dataclasses.fields(CONFIGS[family]):
        row = FIELDS[field.name]
        default = row.get("default")
        ours = default.get(family) if isinstance(default, dict) else default
        if row["use"] == "used" and field.name not in ("architectures", "eos_token_id") and "default" in row:
            assert ours == field.default, field.name


def test_the_documentation_lists_every_field() -> None:
    text = DOCS.read_text(encoding="utf8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (used|only|harmless)", text, flags=re.MULTILINE))
    assert rows == {name: row["use"] for name, row in FIELDS.items()}


def test_the_base_class_of_transformers_has_no_other_fields() -> None:
    assert names_of(PreTrainedConfig) <= FIELDS.keys()


ROPES: list[dict[str, Any]] = [
    {},
    {"rope_theta": 5e5},
    {"rope_scaling": None, "rope_theta": 1000000},
    {"rope_scaling": LLAMA3_ROPE, "rope_theta": 5e5},
    {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 3e4}},
    {"rope_scaling": {k: v for k, v in LLAMA3_ROPE.items() if not k.startswith("original")}},
    {"rope_scaling": LLAMA3_ROPE, "original_max_position_embeddings": 32},
    {"rope_scaling": {"type": "default"}, "rope_parameters": LLAMA3_ROPE},
    {"rope_scaling": {"type": "llama3", **{k: v for k, v in LLAMA3_ROPE.items() if k != "rope_type"}}},
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
]


def draw(rng: random.Random) -> dict[str, Any]:
    """A config.json of one family, as older and newer writers leave it: fields missing, null, switched."""
    family = rng.choice(list(CONFIGS))
    hf = SMALL | {"model_type": family, "architectures": [CONFIGS[family].__name__.replace("Config", "ForCausalLM")]}
    for name in rng.sample(sorted(SMALL), rng.choice((0, 0, 1, 2))):
        del hf[name]
    if rng.random() < 0.2:
        hf["num_key_value_heads"] = None
    if rng.random() < 0.2 and family != "qwen3":
        hf["head_dim"] = None
    layers = hf.get("num_hidden_layers", 32)
    hf |= rng.choice(ROPES) if rng.random() < 0.6 else {}
    if rng.random() < 0.6:
        hf |= {"sliding_window": rng.choice((None, 5)), "max_window_layers": rng.choice((0, 2, layers, 99))}
    if rng.random() < 0.6:
        hf["use_sliding_window"] = rng.choice((True, True, False))
    if rng.random() < 0.3:
        kinds = ["full_attention", "sliding_attention"]
        hf["layer_types"] = [rng.choice(kinds)] * layers if rng.random() < 0.6 else [*kinds] * (layers // 2)
    if rng.random() < 0.3:
        other = [("attention_bias", True), ("mlp_bias", True), ("hidden_act", "gelu"), ("hidden_act", "swish")]
        other += [
            ("tie_word_embeddings", True),
            ("attention_dropout", 0.1),
            ("pretraining_tp", 2),
            ("use_cache", False),
        ]
        hf |= dict([rng.choice(other)])
    if rng.random() < 0.2:
        hf.pop("architectures")
    return hf


def facts(theirs: Any) -> dict[str, Any]:
    """What transformers' model computes with, by its config."""
    kinds = getattr(theirs, "layer_types", None)
    window = getattr(theirs, "sliding_window", None)
    layers = theirs.num_hidden_layers
    if theirs.model_type == "llama":
        window = None
    if theirs.model_type in ("llama", "mistral"):
        kinds = ["sliding_attention" if window else "full_attention"] * layers
    theirs.standardize_rope_params()  # as the model does it, now that all fields are there
    rope = theirs.rope_parameters
    return dict(
        sizes=(theirs.vocab_size, theirs.hidden_size, theirs.intermediate_size, layers, theirs.num_attention_heads),
        kv=theirs.num_key_value_heads,
        head_dim=getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads,
        positions=theirs.max_position_embeddings,
        eps=theirs.rms_norm_eps,
        tied=theirs.tie_word_embeddings,
        theta=rope["rope_theta"],
        scaling=None
        if rope["rope_type"] == "default"
        else tuple(rope[field.name] for field in dataclasses.fields(RopeScaling)),
        windows={window if kind == "sliding_attention" else None for kind in kinds},
    )


def our_facts(ours: ModelConfig) -> dict[str, Any]:
    scaling = ours.rope_scaling
    return dict(
        sizes=(ours.vocab_size, ours.hidden_size, ours.intermediate_size, ours.num_layers, ours.num_heads),
        kv=ours.num_kv_heads,
        head_dim=ours.head_dim,
        positions=ours.max_position_embeddings,
        eps=ours.rms_norm_eps,
        tied=ours.tie_word_embeddings,
        theta=ours.rope_theta,
        scaling=None if scaling is None else dataclasses.astuple(scaling),
        windows={ours.sliding_window},
    )


def may_be_refused(hf: dict[str, Any], theirs: Any) -> bool:
    """Whether there is a reason to refuse what transformers reads."""
    rope, family = theirs.rope_parameters, theirs.model_type
    nested = any(isinstance(value, dict) for value in rope.values())
    kinds = hf.get("layer_types")
    impossible = family.startswith("qwen") and kinds and theirs.sliding_window is None and kinds[0] != "full_attention"
    against = family == "mistral" and kinds and {"sliding_attention"} != set(kinds)
    windowless = family == "mistral" and kinds and theirs.sliding_window is None
    return bool(
        nested
        or rope.get("rope_type") not in ("default", "llama3")
        or (hf.get("attention_bias") and family in ("llama", "qwen3"))
        or (hf.get("mlp_bias") and family == "llama")
        or hf.get("hidden_act", "silu") not in ("silu", "swish")
        or len(facts(theirs)["windows"]) > 1
        or len(set(theirs.layer_types if family.startswith("qwen") else [1])) > 1
        or impossible
        or facts(theirs)["head_dim"] % 2
        or against
        or windowless
    )


def compare(hf: dict[str, Any]) -> str:
    """Ours against theirs; returns what happened."""
    try:
        theirs = CONFIGS[hf["model_type"]].from_dict(json.loads(json.dumps(hf)))
    except Exception:  # whatever transformers raises: then we have nothing to load either
        theirs = None
    try:
        ours = model_config(hf)
    except CheckpointError as error:
        possible = theirs is not None and not theirs.num_attention_heads % theirs.num_key_value_heads
        assert not possible or may_be_refused(hf, theirs), f"refused without need: {error}\n{hf}"
        return type(error).__name__
    assert theirs is None or our_facts(ours) == facts(theirs), hf
    return "read"


@pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="the oracle is transformers 5")
@pytest.mark.parametrize("seed", range(4))
def test_configs_are_read_as_transformers_reads_them(seed: int) -> None:
    rng = random.Random(seed)
    seen = [compare(draw(rng)) for _ in range(150)]
    assert {"read", "UnsupportedModelError"} <= set(seen), f"seed {seed} draws too little"


WINDOWED = {"use_sliding_window": True, "sliding_window": 8}
WINDOWS: dict[str, dict[str, Any]] = {
    "mistral by default": {"model_type": "mistral", "sliding_window": "DROP"},
    "mistral without": {"model_type": "mistral", "sliding_window": None},
    "qwen2 all layers": {"model_type": "qwen2", **WINDOWED, "max_window_layers": 0},
    "qwen2 no layer": {"model_type": "qwen2", **WINDOWED, "max_window_layers": 4},
    "qwen2 some layers": {"model_type": "qwen2", **WINDOWED, "max_window_layers": 2},
    "qwen3 all layers": {"model_type": "qwen3", **WINDOWED, "max_window_layers": 0},
    "qwen2 switched off": {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 8},
    "llama ignores it": {"model_type": "llama", "sliding_window": 8},
    "llama3 without its original length": {
        "model_type": "llama",
        "max_position_embeddings": 64,
        "rope_scaling": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    },
    "qwen2 with a field of others": {"model_type": "qwen2", "attention_bias": True, "mlp_bias": True},
    "swish": {"model_type": "llama", "hidden_act": "swish", "pretraining_tp": 2},
}


@pytest.mark.parametrize("case", WINDOWS)
def test_logits_are_those_of_transformers_or_the_model_is_refused(tmp_path: Path, case: str) -> None:
    """The files of transformers, with a config.json as older versions wrote it. The prompt outgrows the window."""
    change = WINDOWS[case]
    torch.manual_seed(0)
    given = {name: value for name, value in change.items() if name != "model_type" and value != "DROP"}
    config = CONFIGS[change["model_type"]](**SMALL | given)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    hf = json.loads((tmp_path / "config.json").read_text())
    for name in ("layer_types", "rope_parameters", *(name for name, value in change.items() if value == "DROP")):
        hf.pop(name, None)
    (tmp_path / "config.json").write_text(json.dumps(hf | {"model_type": change["model_type"]} | given))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32).eval()
    ids = list(range(1, 61))
    if case == "qwen2 some layers":
        with pytest.raises(UnsupportedModelError, match=r"max_window_layers in config\.json, layers differ"):
            load_model(tmp_path, progress=False)
        return
    ours = prefill(load_model(tmp_path, device="cpu", dtype="float32", progress=False), ids)[0]
    with torch.inference_mode():
        torch.testing.assert_close(ours, theirs(torch.tensor([ids])).logits[0, -1], atol=1e-4, rtol=0)


ODD: list[Any] = ["x", "64", -1, 0, 1.5, 10**15, 10**30, float("nan"), float("inf"), True, [], [1], {}, {"a": 1}, [[1]]]


@pytest.mark.parametrize("name", [name for name, row in FIELDS.items() if row["use"] != "harmless"])
def test_any_value_of_a_field_is_read_or_refused_by_name(name: str) -> None:
    base = SMALL | {"architectures": ["Qwen3ForCausalLM"], "use_sliding_window": True, "max_window_layers": 0}
    for value in ODD:
        hf = base | {name: value}
        if name in LLAMA3_ROPE:
            hf = base | {"rope_scaling": LLAMA3_ROPE | {name: value}}
        try:
            model_config(hf)
        except CheckpointError as error:
            assert name in str(error) or isinstance(error, UnsupportedModelError) or "head" in name, (value, str(error))


@pytest.mark.parametrize("gap", ["factor", "low_freq_factor", "high_freq_factor"])
def test_gaps_in_rope_dictionaries_are_named(gap: str) -> None:
    rope = {name: value for name, value in LLAMA3_ROPE.items() if name != gap}
    hf = SMALL | {"architectures": ["LlamaForCausalLM"], "rope_scaling": rope}
    with pytest.raises(CheckpointError, match=rf"rope_scaling in config\.json has {gap}=None; needed: number"):
        model_config(hf)


def damaged(folder: Path, kind: str) -> Path:
    path = folder / "config.json"
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "dangling":
        path.symlink_to("/nowhere/config.json")
    elif kind == "huge":
        path.write_bytes(b" " * (17 << 20))
    elif kind == "deep":
        path.write_text('{"a":' * 100_000)
    else:
        path.write_text({"list": "[1]", "null": "null", "cut": '{"a": ', "digits": "9" * 5000}[kind])
    return path


@pytest.mark.parametrize(
    "kind", ["directory", "fifo", "device", "dangling", "huge", "deep", "list", "null", "cut", "digits"]
)
def test_what_is_no_config_file_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    path = damaged(tmp_path, kind)
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"eos_token_id": "x"}', '{"eos_token_id": [[1]]}', '{"eos_token_id": 0.5}']
)
def test_damaged_generation_configs_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL | {"model_type": "llama"}))
    assert read_config(tmp_path).eos_token_ids == ()
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        read_config(tmp_path)


def test_links_to_files_are_read(tmp_path: Path) -> None:
    """The hub's cache is made of links."""
    (tmp_path / "blob").write_text('{"a": 1}')
    (tmp_path / "config.json").symlink_to("blob")
    assert read_json(tmp_path / "config.json") == {"a": 1}
