"""A model's `config.json`: read with care, checked field by field, turned into a `ModelConfig`.

The files of a folder come from strangers. So each is a regular file of a sane size, each field has a type and a range,
and all of this is checked before anything is allocated. `fields.json` says for every field of the supported families
what happens to it. "used": it has a kind, a range, perhaps null, and the default that transformers takes where it is
missing. "only": it changes the numbers, and this decoder computes the listed values alone (`read_by`: the families
that read it at all). "harmless": it changes nothing here. Fields that transformers does not know change nothing either.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from minillm.config import ModelConfig, RopeScaling
from minillm.errors import CheckpointError, UnsupportedModelError

FIELDS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("fields.json").read_text(encoding="utf8"))
KINDS: dict[str, Any] = {"integer": int, "number": (int, float), "switch": bool, "list": list, "object": dict}
FAMILIES = {name: f"{name.title()}ForCausalLM" for name in ("llama", "mistral", "qwen2", "qwen3")}
SAME = tuple(field.name for field in fields(ModelConfig) if field.name in FIELDS and "default" in FIELDS[field.name])
MAX_JSON = 16 << 20  # bytes of a config or an index; the largest published ones have less than one MiB
MAX_TOKEN = 2**31


def check_file(path: Path, most: int) -> None:
    """Raise CheckpointError for what is no regular file (a folder, a device, a pipe) or has more than `most` bytes."""
    if not os.path.isfile(path):
        raise CheckpointError(f"{path} is missing or no regular file (nor a link to one). Download it again.")
    if (size := path.stat().st_size) > most:
        raise CheckpointError(f"{path} has {size} bytes, at most {most} are read. Is it the right file?")


def read_json(path: Path, most: int = MAX_JSON) -> dict[str, Any]:
    """The object in a JSON file of at most `most` bytes. Raises CheckpointError for anything else."""
    check_file(path, most)
    try:
        content = json.loads(path.read_text(encoding="utf8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}). Download it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, an object is needed. Download it again.")
    return content


def read_config(folder: Path) -> ModelConfig:
    """The model of a folder by its config.json, with the end tokens of its generation_config.json as well.

    Chat models end a turn with one that config.json lacks.
    """
    config, path = model_config(read_json(folder / "config.json")), folder / "generation_config.json"
    if not os.path.lexists(path):
        return config
    ends = config.eos_token_ids + _token_ids(read_json(path), path.name)
    return replace(config, eos_token_ids=tuple(dict.fromkeys(ends)))


def model_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Read the dictionary of a `config.json`, of transformers 4 (`rope_theta`) or 5 (`rope_parameters`).

    Raises UnsupportedModelError for a model that computes something else than this decoder, since a model that loads
    and computes something else is worse than one that is refused; CheckpointError for values that no model has.
    """
    family = _family(hf)
    given = {name: _value(hf, name, family) for name, row in FIELDS.items() if name in hf or "default" in row}
    heads, hidden = given["num_attention_heads"], given["hidden_size"]
    theta, scaling = _rope(given, family)
    derived = dict(
        architecture=FAMILIES[family],
        num_layers=given["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=given["num_key_value_heads"] or heads,
        head_dim=given["head_dim"] or _value({"head_dim": hidden // heads}, "head_dim", family),
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        sliding_window=_sliding_window(given, family),
        eos_token_ids=_token_ids(hf, "config.json"),
    )
    return ModelConfig(**{name: given[name] for name in SAME} | derived)


def _family(hf: Mapping[str, Any]) -> str:
    """The family by `architectures`, or by `model_type` where a file has no architectures. Both must agree."""
    names, kind = hf.get("architectures"), hf.get("model_type")
    name = names[0] if isinstance(names, list) and names else names or FAMILIES.get(str(kind), "(none given)")
    family = str(name).removesuffix("ForCausalLM").lower()
    if FAMILIES.get(family) != name:
        known = f"{', '.join(FAMILIES.values())} (Llama 2/3, SmolLM2, TinyLlama, Mistral, Qwen2, Qwen2.5, Qwen3)"
        raise UnsupportedModelError(f"Architecture {name!s:.80} is not supported. Choose a model of {known}.")
    if kind not in (None, family):
        raise UnsupportedModelError(f"config.json has the architecture {name} and model_type={kind!r:.80}. Which one?")
    return family


def _value(hf: Mapping[str, Any], name: str, family: str, where: str = "config.json") -> Any:
    """One field, checked by its row of `fields.json`."""
    row = FIELDS[name]
    default = row.get("default")
    value = hf.get(name, default.get(family) if isinstance(default, dict) else default)
    if "only" in row and value not in row["only"] and family in row.get("read_by", FAMILIES):
        only = " or ".join(map(repr, row["only"]))
        raise UnsupportedModelError(f"{where} has {name}={value!r:.80}; supported is {only}. Choose another model.")
    if "kind" not in row or (value is None and row.get("null")):
        return value
    sane = isinstance(value, KINDS[row["kind"]]) and isinstance(value, bool) == (row["kind"] == "switch")
    if not sane or ("from" in row and not row["from"] <= value <= row["to"]):
        limits = f" from {row['from']:.10g} to {row['to']:.10g}" if "from" in row else ""
        raise CheckpointError(f"{where} has {name}={value!r:.80}; needed: {row['kind']}{limits}. Is the file complete?")
    return float(value) if row["kind"] == "number" else value


def _sliding_window(given: Mapping[str, Any], family: str) -> int | None:
    """The one window of all layers. Mistral windows every layer, Qwen those from `max_window_layers` on, if at all.

    Files of transformers before 4.53 have no `layer_types`; they are derived as transformers does it.
    """
    if family == "llama":
        return None
    layers, mistral = given["num_hidden_layers"], family == "mistral"
    window: int | None = given["sliding_window"] if mistral or given["use_sliding_window"] else None
    full = 0 if mistral else given["max_window_layers"]
    derived = ["full_attention" if window is None or i < full else "sliding_attention" for i in range(layers)]
    kinds = given.get("layer_types") or derived
    if kinds == derived or not mistral:
        if kinds == ["full_attention"] * layers:
            return None
        if kinds == ["sliding_attention"] * layers and window is not None:
            return window
    what = "layers differ or lack a window. Choose a model with full attention, or one window, in all layers"
    raise UnsupportedModelError(f"By sliding_window, layer_types and max_window_layers in config.json, {what}.")


def _rope(given: Mapping[str, Any], family: str) -> tuple[float, RopeScaling | None]:
    """Base and scaling. transformers 5 writes both into `rope_parameters`, 4 wrote two separate keys."""
    name = "rope_scaling" if given.get("rope_scaling") else "rope_parameters"
    original = "original_max_position_embeddings"
    rope = {"rope_theta": given["rope_theta"], original: given["max_position_embeddings"]} | (given.get(name) or {})
    rope |= {original: given[original]} if original in given else {}
    where = f"{name} in config.json"
    theta, _ = (_value(rope, field, family, where) for field in ("rope_theta", "partial_rotary_factor"))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3") or any(isinstance(value, dict) for value in rope.values()):
        what = f"has rope type {kind!r:.80}, or one for each kind of layer"
        raise UnsupportedModelError(f"{where} {what}. Supported: 'default', 'llama3', one for all layers.")
    if kind == "default":
        return theta, None
    scaling = RopeScaling(**{field.name: _value(rope, field.name, family, where) for field in fields(RopeScaling)})
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise CheckpointError(f"{where} has a high_freq_factor that is not above its low_freq_factor. Check {scaling}.")
    return theta, scaling


def _token_ids(hf: Mapping[str, Any], where: str) -> tuple[int, ...]:
    """`eos_token_id`: one token id, several or none."""
    value = hf.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) or not -1 <= i < MAX_TOKEN for i in ids):
        raise CheckpointError(f"{where} has eos_token_id={value!r:.80}; a token id or a list of them is needed.")
    return tuple(ids)
