"""What really happened: every operator that PyTorch ran, its FLOPs, the bytes it moved, and in which part of the model.

    with Counter(model, kv=cache) as counted:
        extend(model, tokens, cache)
    counted.total                               # Cost(flops, bytes): compare with minillm.costs.formulas
    counted.by_part(), counted.by_layer()       # where they went
    counted.peak_bytes, counted.largest         # memory of activations

It listens to PyTorch's dispatcher, so it works for any model: ours, a learner's, another library's. It works on the
"meta" device, too, where tensors have a shape and no memory: a laptop counts an 8B model in a second.

An operator is charged for each of its operands once: the traffic of a program that keeps nothing in the processor's
caches from one operator to the next. FLOPs are those of matrix products, by PyTorch's own formulas. Kernels that are
not started through the dispatcher (Triton's) are not seen.
"""

from __future__ import annotations

import re
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from minillm.costs.formulas import Bytes
from minillm.measure.operators import flops_of, name_of, storage_of, traffic_of

ACTIVATIONS, WEIGHTS, KV = "activations", "weights", "kv"
PARTS = {  # the first pattern that a module's path matches names its part
    "head": r"head$",
    "norms": r"norm",
    "embedding": r"embed",
    "mlp": r"mlp|ffn|feed_forward",
    "projections": r"att\w*\.\w+$",
    "attention": r"att",
}


@dataclass(eq=False)
class Region:
    """A piece of memory, and what it holds: known at once for weights and caches, later for what becomes a cache."""

    kind: str = ACTIVATIONS


class Access(NamedTuple):
    """Bytes that an operator read from a region, or wrote to it."""

    region: Region
    num_bytes: int
    write: bool


class Cost(NamedTuple):
    """FLOPs and bytes of some operators."""

    flops: int
    bytes: Bytes


@dataclass(frozen=True)
class Operation:
    """One operator that ran."""

    name: str  # "aten.bmm"
    path: str  # the module that called it, "layers.3.mlp.down"; empty outside of all
    flops: int
    accesses: tuple[Access, ...]

    @property
    def part(self) -> str:
        """A key of `PARTS`, or "other"."""
        return next((part for part, pattern in PARTS.items() if re.search(pattern, self.path)), "other")

    @property
    def layer(self) -> int | None:
        """The number in the module's path; None outside of the layers."""
        number = re.search(r"\.(\d+)(\.|$)", self.path)
        return int(number[1]) if number else None

    def num_bytes(self, kind: str, *, write: bool) -> int:
        """Bytes moved to or from regions of one kind."""
        return sum(a.num_bytes for a in self.accesses if a.region.kind == kind and a.write == write)


class Counter:
    """Counts what runs inside its `with` block.

    model: its parameters and buffers count as weights, and its modules name the places; optional. kv: the cache, or
    anything that holds its tensors (searched through attributes, lists and dictionaries). A cache that is made inside
    the block is named later with `mark_kv`. A cache that makes new tensors in every step is followed.
    """

    def __init__(self, model: nn.Module | None = None, *, kv: object = None) -> None:
        self.operations: list[Operation] = []
        self._kv = kv
        self._paths = {id(module): path for path, module in model.named_modules()} if model else {}
        self._stack = [""]
        self._regions: dict[int, Region] = {}
        self._lives: list[tuple[Region, int]] = []  # bytes that came (+) and went (-), in order
        for tensor in [*model.parameters(), *model.buffers()] if model else []:
            self._region(tensor).kind = WEIGHTS
        self.mark_kv(kv)

    def mark_kv(self, cache: object) -> None:
        """Say that the tensors in `cache` are KV cache, also for what was counted of them so far."""
        for tensor in tensors_in(cache):
            region = self._region(tensor)
            region.kind = KV if region.kind == ACTIVATIONS else region.kind

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        """Name a place by hand, in code without modules: `with counted.within("attention"): …`."""
        self._enter(name)
        try:
            yield
        finally:
            self._leave()

    # Results

    @property
    def total(self) -> Cost:
        """FLOPs and bytes of everything."""
        return _cost(self.operations)

    def by_part(self) -> dict[str, Cost]:
        """The same for each part of the model: the keys of `PARTS`, and "other"."""
        return _grouped(self.operations, lambda operation: operation.part)

    def by_layer(self) -> dict[int | None, Cost]:
        """The same for each layer; None stands for what is outside of the layers."""
        return _grouped(self.operations, lambda operation: operation.layer)

    @property
    def peak_bytes(self) -> int:
        """Most bytes of activations that were alive at the same time, of those made inside the block."""
        return max(accumulate((size for region, size in self._lives if region.kind == ACTIVATIONS), initial=0))

    @property
    def largest(self) -> tuple[int, str, str]:
        """The largest activation that one operator wrote: bytes, operator, place."""
        written = (
            (access.num_bytes, operation.name, operation.path)
            for operation in self.operations
            for access in operation.accesses
            if access.write and access.region.kind == ACTIVATIONS
        )
        return max(written, default=(0, "", ""))

    # Listening

    def __enter__(self) -> Counter:
        self._open = ExitStack()
        before = register_module_forward_pre_hook(lambda module, _: self._enter(self._paths.get(id(module), "")))
        after = register_module_forward_hook(lambda *_: self._leave(), always_call=True)
        self._open.callback(before.remove)
        self._open.callback(after.remove)
        self._open.enter_context(_Listener(self._record))
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.close()
        self.mark_kv(self._kv)

    def _enter(self, path: str) -> None:
        self._stack.append(path or self._stack[-1])

    def _leave(self) -> None:
        self.mark_kv(self._kv)
        self._stack.pop()

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        traffic = traffic_of(func, args, kwargs, out)
        accesses = [Access(self._region(tensor), size, write=False) for tensor, size in traffic.reads]
        accesses += [Access(self._region(tensor, born=True), size, write=True) for tensor, size in traffic.writes]
        if accesses:
            flops = flops_of(func, args, kwargs, out)
            self.operations.append(Operation(str(func._overloadpacket), self._stack[-1], flops, tuple(accesses)))

    def _region(self, tensor: Tensor, *, born: bool = False) -> Region:
        """The region that a tensor lies in. It is forgotten when its memory is freed: the address may be used again."""
        storage = storage_of(tensor)
        if id(storage) not in self._regions:
            region = self._regions[id(storage)] = Region()
            size = storage.nbytes() if born and isinstance(storage, torch.UntypedStorage) else 0
            self._lives.append((region, size))
            weakref.finalize(storage, _died, weakref.ref(self), id(storage), size).atexit = False
        return self._regions[id(storage)]


def _died(counter: weakref.ref[Counter], key: int, size: int) -> None:
    """Note that some memory was freed. Weights live longer than counters, so they must not keep a counter alive."""
    if (living := counter()) is not None:
        living._lives.append((living._regions.pop(key), -size))


class _Listener(TorchDispatchMode):
    """Runs each operator, then hands its arguments and its result to `record`."""

    def __init__(self, record: Callable[[Any, tuple[Any, ...], dict[str, Any], Any], None]) -> None:
        super().__init__()
        self.record = record

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator and record it; an operator that is composed of others is recorded as those."""
        kwargs = kwargs or {}
        if not _is_leaf(func, args):
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        self.record(func, args, kwargs, out)
        return out


def tensors_in(thing: object) -> Iterator[Tensor]:
    """All tensors in a thing: itself, in lists, tuples and dictionaries, and in attributes of objects."""
    todo, seen = [thing], set[int]()
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, Mapping):
            todo.extend(item.values())
        elif isinstance(item, (list, tuple)):
            todo.extend(item)
        elif hasattr(item, "__dict__") and not isinstance(item, type):
            todo.extend(vars(item).values())


def _is_leaf(func: Any, args: tuple[Any, ...]) -> bool:
    """Fused attention stays one operator on the meta device, where there is no kernel to choose."""
    return name_of(func) == "scaled_dot_product_attention" and args[0].is_meta


def _cost(operations: Iterable[Operation]) -> Cost:
    operations = list(operations)

    def moved(kind: str, *, write: bool) -> int:
        return sum(operation.num_bytes(kind, write=write) for operation in operations)

    return Cost(
        flops=sum(operation.flops for operation in operations),
        bytes=Bytes(
            weights=moved(WEIGHTS, write=False),
            kv_read=moved(KV, write=False),
            kv_write=moved(KV, write=True),
            activations=moved(ACTIVATIONS, write=False) + moved(ACTIVATIONS, write=True),
        ),
    )


def _grouped(operations: Iterable[Operation], key: Callable[[Operation], Any]) -> dict[Any, Cost]:
    groups = defaultdict(list)
    for operation in operations:
        groups[key(operation)].append(operation)
    return {name: _cost(group) for name, group in groups.items()}
