"""Loading: what is right loads exactly, what is wrong is refused with a sentence that says what and where."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minillm.course.training.checkpoint import save_checkpoint
from minillm.errors import CheckpointError, ConfigError, UnsupportedModelError
from minillm.kernels.cpu.linear import can_pack
from minillm.model.decoder import Decoder
from minillm.model.hf import model_config
from minillm.model.linear import Linear
from minillm.model.loader import (
    EMBEDDED,
    assemble,
    checkpoint_folder,
    choose_dtype,
    layout,
    load_model,
)
from tests.families import FAMILIES, Drawn, random_model


def unpacked(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Decoder:
    """A decoder with dense weights, as in training."""
    torch.manual_seed(0)
    model = Decoder(model_config(FAMILIES[family] | changes)).to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.2)
    if model.layers[0].attention.qk_norm is not None:  # one row per query head and one per key head, all the same
        config = model.config
        for layer in model.layers:
            weight = layer.attention.qk_norm.weight.data
            weight[: config.num_heads] = weight[0]
            weight[config.num_heads :] = weight[-1]
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_checkpoint(unpacked("qwen3"), tmp_path, dtype=torch.float32)
    return tmp_path


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("family", ["smollm2", "mistral", "qwen2", "qwen3"])
def test_save_then_load_gives_the_same_logits(tmp_path: Path, family: str) -> None:
    model = unpacked(family)
    save_checkpoint(model, tmp_path, dtype=torch.float32)
    loaded = load_model(tmp_path, device="cpu", dtype="float32", progress=False)
    assert loaded.config == model.config
    tokens = torch.arange(20)
    attend = lambda layer, q, k, v: q + k.mean() + v.mean()  # noqa: E731 - any attention will do here
    with torch.inference_mode():
        torch.testing.assert_close(loaded(tokens, tokens, attend), model(tokens, tokens, attend), atol=1e-4, rtol=1e-4)


def test_norms_stay_float32_and_weights_take_the_dtype(folder: Path) -> None:
    model = load_model(folder, device="cpu", dtype="bfloat16", progress=False)
    assert model.dtype == model.head.weight.dtype == torch.bfloat16
    assert model.norm.weight.dtype == model.layers[0].attention.qk_norm.weight.dtype == torch.float32


def test_end_tokens_come_from_both_config_files(folder: Path) -> None:
    edit_config(folder, eos_token_id=7)
    (folder / "generation_config.json").write_text('{"eos_token_id": [9, 7]}')
    assert load_model(folder, progress=False).config.eos_token_ids == (7, 9)


def test_random_weights_depend_on_the_seed_alone() -> None:
    first, again, other = (random_model("qwen3", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.embedding.weight, again.embedding.weight)
    assert not torch.equal(first.embedding.weight, other.embedding.weight)


def test_missing_folder() -> None:
    with pytest.raises(CheckpointError, match=r"No model is called '\./nowhere'.*embedded model.*hub name"):
        load_model("./nowhere")


def test_missing_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        load_model(folder)


@pytest.mark.parametrize("text", ["{", "[1]", "\x00\xff"])
def test_damaged_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin1"))
    with pytest.raises(CheckpointError, match=r"config\.json (cannot be read|holds a list).*[Dd]ownload it again"):
        load_model(folder)


def test_incomplete_config(folder: Path) -> None:
    edit_config(folder, hidden_size=None)
    with pytest.raises(CheckpointError, match=r"config\.json has hidden_size=None; needed: integer from 1"):
        load_model(folder)


def test_no_weights_names_the_pickles_it_will_not_load(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"never loaded: pytorch_model\.bin.*Convert the model"):
        load_model(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_safetensors(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"damaged or cut short.*Download it again"):
        load_model(folder, progress=False)


def shard(folder: Path, shards: int = 2) -> list[str]:
    """Split the one file of a folder into several, with their index; returns the names of the tensors."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    names = sorted(tensors)
    files = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    path.unlink()
    return names


def test_shards_load_as_one_file(folder: Path) -> None:
    whole = load_model(folder, device="cpu", dtype="float32", kernels="reference", progress=False)
    shard(folder)
    again = load_model(folder, device="cpu", dtype="float32", kernels="reference", progress=False)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_a_tensor_in_two_shards(folder: Path) -> None:
    names = shard(folder)
    one, two = (folder / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    save_file(load_file(one) | {names[1]: load_file(two)[names[1]]}, one)
    with pytest.raises(CheckpointError, match=r"is in .*00002-of-00002.* and in a file before it"):
        load_model(folder, progress=False)


def test_a_tied_head_must_repeat_the_embedding(tmp_path: Path) -> None:
    """Files of tied models may hold the head once more. transformers ties equal ones only, and so do we."""
    save_checkpoint(unpacked("qwen3-tied"), tmp_path, dtype=torch.float32)
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    load_model(tmp_path, progress=False)
    edit_tensors(tmp_path, lambda t: t["lm_head.weight"][-1].add_(1))
    with pytest.raises(CheckpointError, match=r"does not account for.*lm_head\.weight"):
        load_model(tmp_path, progress=False)


def test_rotary_tables_of_old_files_are_harmless(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    load_model(folder, progress=False)
    edit_tensors(folder, lambda t: t.update({"anything.inv_freq": torch.ones(4)}))
    with pytest.raises(CheckpointError, match=r"anything\.inv_freq"):
        load_model(folder, progress=False)


def test_nothing_is_allocated_for_a_model_that_no_machine_holds(folder: Path) -> None:
    """Too many layers, and more numbers than the file has: refused before a layer is made."""
    edit_config(folder, num_hidden_layers=200_000)
    with pytest.raises(CheckpointError, match=r"num_hidden_layers=200000; needed: integer from 1 to 1024"):
        load_model(folder, progress=False)
    edit_config(folder, num_hidden_layers=1024, hidden_size=2**13, intermediate_size=2**15)
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight .* has shape \(131, 48\), config\.json"):
        load_model(folder, progress=False)


def test_a_path_is_never_an_embedded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_checkpoint(unpacked("smollm2"), tmp_path / "tiny")
    for name in ("./tiny", Path("tiny"), str(tmp_path / "tiny"), "tiny/"):
        assert load_model(name, progress=False).config.architecture == "LlamaForCausalLM"
    assert checkpoint_folder("tiny") == EMBEDDED / "tiny"


def test_devices_and_dtypes_as_objects(folder: Path) -> None:
    model = load_model(folder, device=torch.device("cpu"), dtype=torch.float32, progress=False)
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    for wrong in ({"device": torch.device("meta")}, {"dtype": torch.int8}, {"device": None}, {"dtype": 3}):
        with pytest.raises(ConfigError, match="is not possible: it must be"):
            load_model(folder, **wrong)


def test_reference_kernels_leave_every_layer_to_pytorch(folder: Path) -> None:
    def own_kernels(kernels: str) -> set[bool]:
        model = load_model(folder, device="cpu", dtype="float32", kernels=kernels, progress=False)
        return {module.kernel is not None for module in model.modules() if isinstance(module, Linear)}

    assert own_kernels("reference") == {False}
    assert own_kernels("auto") == {can_pack(torch.float32)}
    with pytest.raises(ConfigError, match=r"kernels='fast' is not possible.*'auto', 'reference'"):
        load_model(folder, kernels="fast")


def test_wrong_shape(folder: Path) -> None:
    edit_config(folder, intermediate_size=96)
    with pytest.raises(CheckpointError, match=r"mlp\.\w+_proj.* has shape .* config\.json asks for"):
        load_model(folder, progress=False)


def test_missing_tensor(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.weight"))
    with pytest.raises(CheckpointError, match=r"has no tensor 'model\.layers\.1\.self_attn\.k_proj\.weight'"):
        load_model(folder, progress=False)


def test_surplus_tensor(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=r"1 tensors that its config\.json does not account for.*q_proj\.bias"):
        load_model(folder, progress=False)


def test_quantised_tensor(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(48, dtype=torch.int8)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight .* is I8, not F64.*quantised"):
        load_model(folder, progress=False)


def test_missing_shard(folder: Path) -> None:
    names = shard(folder)
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00003.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model-00001-of-00003\.safetensors is missing"):
        load_model(folder, progress=False)


@pytest.mark.parametrize("weight_map", [None, {}, {"a": "../../etc/passwd"}, {"a": "/etc/passwd"}, {"a": 3}])
def test_hostile_index_cannot_leave_the_folder(folder: Path, weight_map: object) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="names no file beside it"):
        load_model(folder, progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, r"GPT2LMHeadModel is not supported\. Choose a model of Llama"),
        ({"architectures": None, "model_type": None}, r"\(none given\) is not supported"),
        ({"model_type": "qwen2"}, r"the architecture Qwen3ForCausalLM and model_type='qwen2'"),
        ({"hidden_act": "gelu"}, r"hidden_act='gelu'"),
        ({"attention_bias": True}, r"attention_bias"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, r"rope type 'yarn'.*'default', 'llama3'"),
        ({"use_sliding_window": True, "layer_types": ["full_attention"] * 2 + ["sliding_attention"]}, r"layers differ"),
    ],
)
def test_unsupported_models_are_refused_by_name(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(folder, **changes)
    with pytest.raises(UnsupportedModelError, match=message):
        load_model(folder, progress=False)


@pytest.mark.parametrize(("key", "value"), [("num_key_value_heads", 4), ("head_dim", 7)])
def test_impossible_shapes(folder: Path, key: str, value: int) -> None:
    edit_config(folder, **{key: value})
    with pytest.raises(CheckpointError, match=r"Check config\.json"):
        load_model(folder, progress=False)


def test_unknown_dtype_and_device(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"dtype='int3' is not possible: it must be 'auto', 'float32'"):
        load_model(folder, dtype="int3")
    with pytest.raises(ConfigError, match=r"device='tpu' is not possible"):
        load_model(folder, device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="sees no CUDA GPU"):
            load_model(folder, device="cuda")
    assert choose_dtype("auto", torch.device("cpu")) in (torch.bfloat16, torch.float32)


def test_hub_name_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*args: object, **kwargs: object) -> str:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match=r"'some/model' is no folder here and could not be fetched.*not known"):
        checkpoint_folder("some/model")


def test_layout_covers_every_parameter_of_the_decoder() -> None:
    for family in FAMILIES:
        config = model_config(FAMILIES[family])
        names = {piece.ours for piece in layout(config)}
        expected = {name for name, _ in Decoder(config).named_parameters(remove_duplicate=False)}
        assert names == expected - ({"head.weight"} if config.tie_word_embeddings else set())


MEASURE_PEAK = """
import os, sys, threading, time, psutil, torch
from minillm.model.loader import load_model
process = psutil.Process()
peak, done = [0], threading.Event()
def watch():
    while not done.is_set():
        peak[0] = max(peak[0], process.memory_info().rss)
        time.sleep(0.002)
load_model(sys.argv[2], device="cpu", dtype=sys.argv[3], progress=False)   # warm up allocator, oneDNN and imports
before = process.memory_info().rss
thread = threading.Thread(target=watch); thread.start()
model = load_model(sys.argv[1], device="cpu", dtype=sys.argv[3], progress=False)
done.set(); thread.join()
print(peak[0] - before)
"""


@pytest.mark.parametrize(("family", "dtype"), [("smollm2", "bfloat16"), ("llama2", "float32")])
def test_peak_memory_of_loading_stays_near_the_weights(tmp_path: Path, folder: Path, family: str, dtype: str) -> None:
    """Resident memory, mapped files included, in a fresh process, for 250 MB and 600 MB of weights.

    The tied model is the hard case: its embedding, a quarter of the weights, is kept dense beside the packed head.
    """
    shape = dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, vocab_size=32768, head_dim=64)
    heads = dict(num_attention_heads=16, num_key_value_heads=4)
    config = model_config(FAMILIES[family] | shape | heads)
    kind = getattr(torch, dtype)
    big = tmp_path / "big"
    model = Decoder(config).to(kind)
    save_checkpoint(model, big, dtype=kind)
    weights = sum(parameter.numel() * kind.itemsize for parameter in model.parameters())
    command = [sys.executable, "-c", MEASURE_PEAK, str(big), str(folder), dtype]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    peak = int(result.stdout)
    assert peak < 1.3 * weights, f"peak {peak / 1e6:.0f} MB for {weights / 1e6:.0f} MB of weights"


def test_assemble_reads_nothing_twice() -> None:
    config = model_config(FAMILIES["qwen3"])
    reads: list[str] = []

    class Counting(Drawn):
        def __call__(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
            reads.append(name)
            return super().__call__(name, shape)

    assemble(config, Counting(config, torch.float32, torch.Generator()), torch.device("cpu"), torch.float32)
    assert len(reads) == len(set(reads)) == sum(len(piece.sources) for piece in layout(config))
