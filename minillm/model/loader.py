"""From a name to a model: the embedded ones, a folder, a hub name, or a random shape.

Weights are read one layer at a time, fused (q, k, v side by side; gate and up side by side) and packed for the CPU
before the next layer is opened, so that the peak stays near the size of the weights themselves. `layout` says which
tensors of a Hugging Face checkpoint make up which tensor of ours: loading and saving both follow it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minillm.config import ModelConfig, token_ids
from minillm.errors import CheckpointError, ConfigError
from minillm.model.decoder import Decoder, RMSNorm
from minillm.model.linear import Linear
from minillm.model.shapes import named_shape

EMBEDDED = Path(__file__).parent.parent / "checkpoints"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class Piece:
    """Where one tensor of ours comes from: rows of `sources`, stacked in order."""

    ours: str  # dotted name in Decoder
    sources: tuple[str, ...]  # names in a Hugging Face checkpoint
    shapes: tuple[tuple[int, ...], ...]  # their shapes
    repeats: tuple[int, ...] = ()  # the norm of queries and keys: one row per head


def layout(config: ModelConfig) -> list[list[Piece]]:
    """The pieces of the whole model, grouped by what is loaded together: ends first, then one group per layer."""
    return [_ends(config)] + [_layer(config, index) for index in range(config.num_layers)]


def _ends(config: ModelConfig) -> list[Piece]:
    table = (config.vocab_size, config.hidden_size)
    pieces = [
        Piece("embedding.weight", ("model.embed_tokens.weight",), (table,)),
        Piece("norm.weight", ("model.norm.weight",), ((config.hidden_size,),)),
    ]
    if not config.tie_word_embeddings:
        pieces.append(Piece("head.weight", ("lm_head.weight",), (table,)))
    return pieces


def _layer(config: ModelConfig, index: int) -> list[Piece]:
    ours, theirs = f"layers.{index}.", f"model.layers.{index}."
    hidden, inner = config.hidden_size, config.intermediate_size
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    qkv = tuple(f"{theirs}self_attn.{name}_proj" for name in "qkv")
    rows = (q_rows, kv_rows, kv_rows)
    pieces = [
        Piece(f"{ours}attention_norm.weight", (f"{theirs}input_layernorm.weight",), ((hidden,),)),
        Piece(f"{ours}mlp_norm.weight", (f"{theirs}post_attention_layernorm.weight",), ((hidden,),)),
        Piece(f"{ours}attention.qkv.weight", tuple(f"{p}.weight" for p in qkv), tuple((r, hidden) for r in rows)),
        Piece(f"{ours}attention.out.weight", (f"{theirs}self_attn.o_proj.weight",), ((hidden, q_rows),)),
        Piece(
            f"{ours}mlp.gate_up.weight",
            (f"{theirs}mlp.gate_proj.weight", f"{theirs}mlp.up_proj.weight"),
            ((inner, hidden),) * 2,
        ),
        Piece(f"{ours}mlp.down.weight", (f"{theirs}mlp.down_proj.weight",), ((hidden, inner),)),
    ]
    if config.qkv_bias:
        pieces.append(Piece(f"{ours}attention.qkv.bias", tuple(f"{p}.bias" for p in qkv), tuple((r,) for r in rows)))
    if config.qk_norm:
        norms = tuple(f"{theirs}self_attn.{name}_norm.weight" for name in "qk")
        heads = (config.num_heads, config.num_kv_heads)
        pieces.append(Piece(f"{ours}attention.qk_norm.weight", norms, ((config.head_dim,),) * 2, heads))
    return pieces


Read = Callable[[str, tuple[int, ...]], Tensor]


class Source(Protocol):
    """Where tensors come from: a checkpoint's files, or a random generator."""

    def open(self) -> AbstractContextManager[Read]:
        """Yield `read(name, shape) -> Tensor`. Leaving the block lets go of the files that were read."""
        ...


class Checkpoint:
    """The safetensors files of a folder, one or sharded. Nothing is ever unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file_of = _index(folder)

    @contextmanager
    def open(self) -> Iterator[Read]:
        with ExitStack() as stack:
            files = functools.cache(lambda name: stack.enter_context(_open_file(self.folder / name)))

            def read(name: str, shape: tuple[int, ...]) -> Tensor:
                if name not in self.file_of:
                    raise CheckpointError(f"{self.folder} has no tensor {name!r}. Is the download complete?")
                tensor = files(self.file_of[name]).get_tensor(name)
                _check_tensor(tensor, name, shape, self.folder / self.file_of[name])
                return tensor

            yield read

    def check_nothing_left(self, used: set[str]) -> None:
        """Refuse tensors that no piece asked for: they would mean that the model computes something else.

        Two kinds are harmless: rotary tables of old checkpoints, and the head of a tied model, which is the embedding.
        """
        surplus = [n for n in self.file_of if n not in used and n != "lm_head.weight" and not n.endswith("inv_freq")]
        if surplus:
            raise CheckpointError(
                f"{self.folder} has {len(surplus)} tensors that its config does not account for, such as "
                f"{sorted(surplus)[0]!r}. Does config.json belong to these weights?"
            )


@dataclass(frozen=True)
class RandomWeights:
    """Normal weights of the config's initial spread, ones for norms: right for time and bytes only."""

    config: ModelConfig
    dtype: torch.dtype
    generator: torch.Generator

    @contextmanager
    def open(self) -> Iterator[Read]:
        def read(name: str, shape: tuple[int, ...]) -> Tensor:
            if name.endswith("norm.weight"):
                return torch.ones(shape, device=self.generator.device)
            tensor = torch.empty(shape, dtype=self.dtype, device=self.generator.device)
            return tensor.normal_(0, self.config.initializer_range, generator=self.generator)

        yield read


def load_model(
    name: str | Path = "tiny",
    *,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    progress: bool = True,
    kernels: str = "auto",
) -> Decoder:
    """Load a model for inference.

    name: "tiny" or "tiny-draft" (embedded), a folder with config.json and safetensors, a hub name such as
    "Qwen/Qwen3-0.6B" (downloaded once), or "random:<shape>" (drawn from `seed`; see `minillm.model.shapes`).
    device "auto" is CUDA where there is one. dtype "auto" is bfloat16 where the device computes in it, else float32.

    Raises CheckpointError (missing, damaged or inconsistent files), UnsupportedModelError (a model outside the
    family), ConfigError (an unknown device or dtype).
    """
    place = choose_device(device)
    kind = choose_dtype(dtype, place)
    if str(name).startswith("random:"):
        config = named_shape(str(name).removeprefix("random:"))
        source: Source = RandomWeights(config, kind, torch.Generator(place).manual_seed(seed))
        return assemble(config, source, place, kind, progress=progress)
    folder = checkpoint_folder(name)
    config = _with_all_end_tokens(ModelConfig.from_hf(read_config(folder)), folder)
    checkpoint = Checkpoint(folder)
    checkpoint.check_nothing_left({s for group in layout(config) for piece in group for s in piece.sources})
    return assemble(config, checkpoint, place, kind, progress=progress)


def assemble(
    config: ModelConfig, source: Source, device: torch.device, dtype: torch.dtype, *, progress: bool = False
) -> Decoder:
    """Build a decoder from a source of tensors, group by group; see the module's docstring for why."""
    with torch.device("meta"):
        model = Decoder(config)
    console = Console(stderr=True)  # stdout is for results
    groups = track(layout(config), "Loading weights", transient=True, disable=not progress, console=console)
    for group in groups:
        with source.open() as read:
            for piece in group:
                _place(model, piece, read, device, dtype)
        _return_freed_memory()
    if config.tie_word_embeddings:
        model.head.weight = model.embedding.weight
        model.head.pack()
    return model.eval().requires_grad_(False)


def _place(model: Decoder, piece: Piece, read: Read, device: torch.device, dtype: torch.dtype) -> None:
    """Read the sources of one piece, fuse them, and put the result into its module, packed where that helps."""
    path, attribute = piece.ours.rsplit(".", 1)
    module = model.get_submodule(path)
    kind = torch.float32 if isinstance(module, RMSNorm) and dtype != torch.float64 else dtype
    parts = [read(name, shape).to(device, kind) for name, shape in zip(piece.sources, piece.shapes, strict=True)]
    if piece.repeats:
        parts = [part.expand(rows, -1) for part, rows in zip(parts, piece.repeats, strict=True)]
    fused = parts[0].clone() if len(parts) == 1 else torch.cat(parts)
    setattr(module, attribute, nn.Parameter(fused, requires_grad=False))
    if isinstance(module, Linear) and attribute == "weight":
        module.pack()


def _return_freed_memory() -> None:
    """Give what was freed back to the system. Between layers, because glibc keeps it otherwise: the unpacked weights
    of many layers would pile up as holes between the packed ones (an eighth of the weights for Qwen3-0.6B)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # a Linux without glibc
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def save_checkpoint(model: Decoder, folder: Path, *, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a Hugging Face folder (config.json, model.safetensors) that `transformers` and `load_model` both read.

    For a model whose weights are not packed, such as one in training.
    """
    tensors: dict[str, Tensor] = {}
    for piece in (piece for group in layout(model.config) for piece in group):
        fused = model.get_parameter(piece.ours).detach()
        if piece.repeats:
            parts = [rows[0] for rows in fused.split(list(piece.repeats))]
        else:
            parts = list(fused.split([shape[0] for shape in piece.shapes]))
        tensors |= {name: part.to("cpu", dtype).contiguous() for name, part in zip(piece.sources, parts, strict=True)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # the library keeps it to its owner; a checkpoint is there to be read
    text = json.dumps(model.config.to_hf(str(dtype).removeprefix("torch.")), indent=2)
    (folder / "config.json").write_text(text + "\n", encoding="utf8")


def checkpoint_folder(name: str | Path) -> Path:
    """The folder that a model name stands for; downloads a hub name once. See `load_model` for the names."""
    if (EMBEDDED / str(name) / "config.json").is_file():
        return EMBEDDED / str(name)
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) and not str(name).startswith("."):
        return _download(str(name))
    embedded = ", ".join(sorted(p.name for p in EMBEDDED.iterdir() if p.is_dir()))
    raise CheckpointError(
        f"No model is called {str(name)!r} and no folder has that path. Give an embedded model ({embedded}), a folder "
        "with config.json and *.safetensors, a hub name such as Qwen/Qwen3-0.6B, or random:<shape>."
    )


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]))
    except Exception as error:  # the hub's client raises half a dozen unrelated types when it is offline
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{name!r} is no folder here and could not be fetched from the hub ({reason}). Check the name and the "
            "network, or give a folder that holds the model."
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """The dictionary in `folder/config.json`."""
    return _read_json(folder / "config.json")


def _with_all_end_tokens(config: ModelConfig, folder: Path) -> ModelConfig:
    """Add the end tokens of generation_config.json: chat models end a turn with one that config.json does not name."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return config
    more = token_ids(_read_json(path).get("eos_token_id"))
    return replace(config, eos_token_ids=tuple(dict.fromkeys(config.eos_token_ids + more)))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing. A model folder needs config.json and *.safetensors.") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}). Download it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, an object is needed. Download it again.")
    return content


def _index(folder: Path) -> dict[str, str]:
    """Which file holds which tensor: from the index of a sharded checkpoint, or from the one file's own header."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _read_json(index).get("weight_map") or {}
        stray = [file for file in weight_map.values() if not isinstance(file, str) or Path(file).name != file]
        if stray or not weight_map:
            raise CheckpointError(f"{index} names no file beside it in its weight_map. Download it again.")
        return dict(weight_map)
    if not (folder / "model.safetensors").is_file():
        other = ", ".join(sorted(p.name for p in folder.glob("*.bin"))) or "none"
        raise CheckpointError(
            f"{folder} has no model.safetensors and no index of shards (pickled weights, which are never loaded: "
            f"{other}). Convert the model to safetensors."
        )
    with _open_file(folder / "model.safetensors") as file:
        return dict.fromkeys(file.keys(), "model.safetensors")


def _open_file(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: a shard that the index names. Download it again.") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or cut short ({error}). Download it again.") from error


def _check_tensor(tensor: Tensor, name: str, shape: tuple[int, ...], path: Path) -> None:
    if tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"{name} in {path} has shape {tuple(tensor.shape)}, config.json asks for {shape}. "
            "Does config.json belong to these weights?"
        )
    if not tensor.is_floating_point():
        raise CheckpointError(f"{name} in {path} is {tensor.dtype}: quantised weights are not supported.")


def choose_device(device: str) -> torch.device:
    """ "auto", "cpu", "cuda" or "cuda:<n>" as a device that exists here."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ConfigError(f"Unknown device {device!r}. Known: 'auto', 'cpu', 'cuda', 'cuda:<n>'.")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device={device!r}, but PyTorch sees no CUDA GPU here. Use device='cpu' or 'auto'.")
    return torch.device(device)


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """A name as a dtype; "auto" is bfloat16 where the device computes in it and float32 elsewhere."""
    if dtype == "auto":
        fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_computes_bfloat16()
        return torch.bfloat16 if fast else torch.float32
    if dtype not in DTYPES:
        raise ConfigError(f"Unknown dtype {dtype!r}. Known: 'auto', {', '.join(map(repr, DTYPES))}.")
    return DTYPES[dtype]


def cpu_computes_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512_BF16 or AMX). Elsewhere it is emulated and slow."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe)() for probe in probes if hasattr(torch.cpu, probe))
