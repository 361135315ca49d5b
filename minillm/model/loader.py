"""From a name to a model: the embedded ones, a folder, a hub name, or a random shape.

What the files of a folder hold is compared with its config before anything is allocated. Then weights are read one
tensor of ours at a time, fused (q, k, v side by side; gate and up side by side) and handed to this machine's kernels
before the next is read, so that the peak stays near the size of the weights themselves. `layout` says which tensors of
a Hugging Face checkpoint make up which tensor of ours: loading and saving both follow it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minillm import seams
from minillm.config import KERNELS, ModelConfig
from minillm.errors import CheckpointError, ConfigError, require
from minillm.model.decoder import Decoder, RMSNorm
from minillm.model.hf import check_file, read_config, read_json
from minillm.model.linear import Linear

EMBEDDED = Path(__file__).parent.parent / "checkpoints"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
STORED = ("F64", "F32", "F16", "BF16")  # what safetensors calls them
HARMLESS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")  # tables of old files
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MAX_FILE = 1 << 40  # bytes
MISMATCH = "Does config.json belong to these weights?"
Read = Callable[[str, tuple[int, ...]], Tensor]  # where tensors come from: their name and shape -> the tensor


@dataclass(frozen=True)
class Piece:
    """Where one tensor of ours comes from: rows of `sources`, stacked in order."""

    ours: str  # dotted name in Decoder
    sources: dict[str, tuple[int, ...]]  # names in a Hugging Face checkpoint, and their shapes
    repeats: tuple[int, ...] = ()  # the norm of queries and keys: one row per head


def layout(config: ModelConfig) -> list[Piece]:
    """The pieces of the whole model, in the order in which they are loaded: the ends first, then layer by layer."""
    table, hidden = (config.vocab_size, config.hidden_size), (config.hidden_size,)
    ends = [Piece("embedding.weight", {EMBEDDING: table}), Piece("norm.weight", {"model.norm.weight": hidden})]
    if not config.tie_word_embeddings:
        ends.append(Piece("head.weight", {HEAD: table}))
    return ends + [piece for index in range(config.num_layers) for piece in _layer(config, f"layers.{index}.")]


def _layer(config: ModelConfig, place: str) -> list[Piece]:
    """One layer. A bias comes before its weight, so that a linear layer is complete when its weight is there."""
    heads, d = (config.num_heads, config.num_kv_heads), config.head_dim
    q, kv = (count * d for count in heads)
    qkv = {"self_attn.q_proj": q, "self_attn.k_proj": kv, "self_attn.v_proj": kv}
    hidden, inner = config.hidden_size, config.intermediate_size
    rows: dict[str, dict[str, tuple[int, ...]]] = {
        "attention_norm.weight": {"input_layernorm.weight": (hidden,)},
        "mlp_norm.weight": {"post_attention_layernorm.weight": (hidden,)},
    }
    if config.qkv_bias:
        rows["attention.qkv.bias"] = {f"{name}.bias": (size,) for name, size in qkv.items()}
    if config.qk_norm:
        rows["attention.qk_norm.weight"] = {"self_attn.q_norm.weight": (d,), "self_attn.k_norm.weight": (d,)}
    rows |= {
        "attention.qkv.weight": {f"{name}.weight": (size, hidden) for name, size in qkv.items()},
        "attention.out.weight": {"self_attn.o_proj.weight": (hidden, q)},
        "mlp.gate_up.weight": {"mlp.gate_proj.weight": (inner, hidden), "mlp.up_proj.weight": (inner, hidden)},
        "mlp.down.weight": {"mlp.down_proj.weight": (hidden, inner)},
    }
    theirs = f"model.{place}"
    sources = {ours: {theirs + name: shape for name, shape in shapes.items()} for ours, shapes in rows.items()}
    return [Piece(place + ours, found, heads if "qk_norm" in ours else ()) for ours, found in sources.items()]


class Checkpoint:
    """Reads from the safetensors files of a folder, one or sharded, which hold exactly what a config asks for.

    Nothing is ever unpickled. Raises CheckpointError for a tensor that is missing, has another shape or dtype, or means
    that the model computes something else. Only headers are read for that.
    """

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self.stored: dict[str, tuple[Path, tuple[int, ...], str]] = {}  # file, shape, dtype
        for path in _weight_files(folder):
            with _open_file(path) as file:
                for name in file.keys():  # noqa: SIM118 - no dictionary
                    if name in self.stored:
                        raise CheckpointError(f"{name} is in {path} and in a file before it. Download both again.")
                    header = file.get_slice(name)
                    self.stored[name] = path, tuple(header.get_shape()), header.get_dtype()
        wanted = {name: shape for piece in layout(config) for name, shape in piece.sources.items()}
        for name, shape in wanted.items():
            self._check(name, shape, folder)
        surplus = sorted(name for name in self.stored.keys() - wanted if not HARMLESS.fullmatch(name))
        if surplus == [HEAD] and config.tie_word_embeddings and self._head_is_embedding():
            return
        if surplus:
            more = f"{len(surplus)} tensors that its config.json does not account for"
            raise CheckpointError(f"{folder} has {more}, such as {surplus[0]!r:.80}. {MISMATCH}")

    def __call__(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A view of the file, which is opened for this tensor alone: what was copied from it can leave memory."""
        with _open_file(self.stored[name][0]) as file:
            return file.get_tensor(name)

    def _check(self, name: str, shape: tuple[int, ...], folder: Path) -> None:
        if name not in self.stored:
            raise CheckpointError(f"{folder} has no tensor {name!r}. Is the download complete?")
        path, given, dtype = self.stored[name]
        if given != shape:
            raise CheckpointError(f"{name} in {path} has shape {given!s:.80}, config.json asks for {shape}. {MISMATCH}")
        if dtype not in STORED:
            raise CheckpointError(f"{name} in {path} is {dtype}, not {', '.join(STORED)}: quantised.")

    def _head_is_embedding(self) -> bool:
        """Whether the file of a tied model holds the same table twice, as some do; perhaps in two dtypes."""
        (_, shape, _), (_, given, dtype) = self.stored[EMBEDDING], self.stored[HEAD]
        same = given == shape and dtype in STORED
        return same and bool((self(HEAD, shape) == self(EMBEDDING, shape)).all())


def load_model(
    name: str | Path = "tiny",
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    kernels: str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> Decoder:
    """Load a model for inference.

    name: "tiny" or "tiny-draft" (embedded), a folder with config.json and safetensors, a hub name such as
    "Qwen/Qwen3-0.6B" (downloaded once), or "random:<shape>" (drawn from `seed`; see `minillm.shapes`).
    device "auto" is CUDA where there is one. dtype "auto" is bfloat16 where the device computes in it, else float32.
    kernels "auto" takes what this machine offers for linear layers, "reference" leaves them to PyTorch.

    Raises CheckpointError (missing, damaged or inconsistent files), UnsupportedModelError (a model outside the
    family), ConfigError (an unknown device, dtype or kind of kernels).
    """
    place = choose_device(device)
    kind = choose_dtype(dtype, place)
    require(kernels in KERNELS, "kernels", kernels, f"one of {', '.join(map(repr, KERNELS))}", ConfigError)
    if isinstance(name, str) and name.startswith("random:"):
        extra = seams.need("random_weights", "model", name)
        config, read = extra.draw(name.removeprefix("random:"), place, kind, seed)
    else:
        folder = checkpoint_folder(name)
        config = read_config(folder)
        read = Checkpoint(folder, config)
    return assemble(config, read, place, kind, kernels=kernels, progress=progress)


def assemble(
    config: ModelConfig,
    read: Read,
    device: torch.device,
    dtype: torch.dtype,
    *,
    kernels: str = "auto",
    progress: bool = False,
) -> Decoder:
    """Build a decoder from tensors that `read` gives, piece by piece; see the module's docstring for why.

    Linear layers are packed by an extra of this machine, where there is one.
    """
    with torch.device("meta"):
        model = Decoder(config)
    model.kernels = kernels
    extra = seams.offer("linear", device.type) if kernels == "auto" else None
    pack: Callable[[Linear], None] = extra.pack if extra else lambda linear: None
    console = Console(stderr=True)  # stdout is for results
    for piece in track(layout(config), "Loading weights", transient=True, disable=not progress, console=console):
        path, attribute = piece.ours.rsplit(".", 1)
        module = model.get_submodule(path)
        kind = torch.float32 if isinstance(module, RMSNorm) and dtype != torch.float64 else dtype
        setattr(module, attribute, nn.Parameter(_fused(piece, read, device, kind), requires_grad=False))
        if isinstance(module, Linear) and attribute == "weight":
            pack(module)
    if config.tie_word_embeddings:
        model.head.weight = model.embedding.weight
        pack(model.head)
    return model.eval()


def _fused(piece: Piece, read: Read, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The sources of a piece as one tensor, copied out of their files."""
    parts = [read(name, shape).to(device, dtype) for name, shape in piece.sources.items()]
    if piece.repeats:
        parts = [part.expand(rows, -1) for part, rows in zip(parts, piece.repeats, strict=True)]
    return torch.cat(parts)


def checkpoint_folder(name: str | Path) -> Path:
    """The folder that a model name stands for; downloads a hub name once. See `load_model` for the names.

    A `Path`, and a string with a separator, never stand for an embedded model.
    """
    text, embedded = str(name), sorted(path.name for path in EMBEDDED.iterdir() if path.is_dir())
    if isinstance(name, str) and name in embedded:
        return EMBEDDED / name
    if (folder := Path(os.path.expanduser(text))).is_dir():
        return folder
    if isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        return _download(name)
    others = f"an embedded model ({', '.join(embedded)}), a hub name such as Qwen/Qwen3-0.6B, or random:<shape>"
    raise CheckpointError(f"No model is called {text!r} and no folder has that path. Give a model's folder, {others}.")


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]))
    except Exception as error:  # the hub's client raises half a dozen unrelated types when it is offline
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        what = f"{name!r} is no folder here and could not be fetched from the hub ({reason})"
        raise CheckpointError(f"{what}. Check the name and the network, or give a folder.") from error


def _weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or else the files that the index of a sharded checkpoint names: beside it, nowhere else."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if os.path.lexists(single):
        return [single]
    if not os.path.lexists(index):
        other = ", ".join(sorted(p.name for p in folder.glob("*.bin"))) or "none"
        what = f"{folder} has no model.safetensors and no index of shards"
        raise CheckpointError(f"{what} (pickled weights, which are never loaded: {other}). Convert the model.")
    weight_map = read_json(index).get("weight_map")
    files = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not files or any(not isinstance(file, str) or Path(file).name != file for file in files):
        raise CheckpointError(f"{index} names no file beside it in its weight_map. Download it again.")
    return [folder / file for file in sorted(set(files))]


def _open_file(path: Path) -> safe_open:
    check_file(path, MAX_FILE)
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or cut short ({error!s:.200}). Download it again.") from error


def choose_device(device: str | torch.device) -> torch.device:
    """ "auto", "cpu", "cuda" or "cuda:<n>", or PyTorch's object for one of these, as a device that exists here."""
    device, gpus = str(device), torch.cuda.device_count() if torch.cuda.is_available() else 0
    name = device if device != "auto" else "cuda" if gpus else "cpu"
    known = re.fullmatch(r"cpu|cuda(:\d{1,3})?", name, re.ASCII) is not None
    require(known, "device", device, "'auto', 'cpu', 'cuda' or 'cuda:<n>'", ConfigError)
    there = name == "cpu" or int(name[5:] or 0) < gpus
    require(there, "device", device, f"'cpu' or 'auto': PyTorch sees {gpus or 'no'} CUDA GPU here", ConfigError)
    return torch.device(name)


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """A dtype or its name; "auto" is bfloat16 where the device computes in it and float32 elsewhere."""
    dtype = str(dtype).removeprefix("torch.")
    if dtype == "auto":
        fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else _cpu_computes_bfloat16()
        return torch.bfloat16 if fast else torch.float32
    require(dtype in DTYPES, "dtype", dtype, f"'auto', {', '.join(map(repr, DTYPES))}", ConfigError)
    return DTYPES[dtype]


def _cpu_computes_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512_BF16 or AMX). Elsewhere it is emulated and slow."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)  # bool() is False
