"""What one PyTorch operator computes and moves: its FLOPs, and the bytes of each tensor it reads and writes.

Operators declare in their schema what they read and what they write; the rest is a handful of exceptions, which are
listed here. `minillm.measure.counters` asks for every operator that runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from minillm.costs.formulas import visible_pairs

GATHERS = ("index_select", "embedding", "gather", "index")  # read from their first operand only what they return
SCATTERS = {"index_copy_": "source", "index_put_": "values", "scatter_": "src"}  # write only the size of their source
FILLS = ("copy_", "fill_", "zero_", "normal_", "uniform_", "exponential_", "bernoulli_", *SCATTERS)  # never read self
EMPTY = ("empty", "new_empty", "empty_like", "empty_strided")  # memory is taken, nothing is moved
METADATA = ("detach_", "t_", "transpose_", "squeeze_", "unsqueeze_")  # views that change in place how a tensor is seen


class Traffic(NamedTuple):
    """Tensors that an operator read and wrote, with the bytes of each."""

    reads: list[tuple[Tensor, int]]
    writes: list[tuple[Tensor, int]]


def traffic_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Traffic:
    """The traffic of one operator that ran: each operand counted once. Views move nothing."""
    operands = list(_operands(func, args, kwargs))
    touched = {storage_id(tensor) for _, tensor in operands}
    fresh = [tensor for tensor in tree_leaves(out) if isinstance(tensor, Tensor) and storage_id(tensor) not in touched]
    name = name_of(func)
    changed = [tensor for argument, tensor in operands if _is_written(argument)]
    if name in METADATA or not (fresh or changed):
        return Traffic([], [])
    if name in EMPTY:
        return Traffic([], [(tensor, 0) for tensor in fresh])
    read = {id(t): t for argument, t in operands if not (_is_written(argument) and (argument.is_out or name in FILLS))}
    reads = [] if _takes_only_shape(name) else [(tensor, num_bytes(tensor)) for tensor in read.values()]
    writes = [(tensor, num_bytes(tensor)) for tensor in fresh + changed]
    if name in GATHERS:
        reads[0] = (reads[0][0], writes[0][1])
    if name in SCATTERS:
        source = next((t for argument, t in operands if argument.name == SCATTERS[name]), None)
        writes = writes if source is None else [(writes[0][0], num_bytes(source))]
    return Traffic(reads, writes)


def _takes_only_shape(name: str) -> bool:
    """`new_zeros`, `full_like` and their kind ask a tensor for its shape or type, never for what is in it."""
    return name.startswith("new_") or name.endswith("_like")


def flops_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """FLOPs of the matrix product that this operator is; 0 if it is none. A multiply-add is 2."""
    name = name_of(func)
    if name.startswith(("_scaled_dot_product", "scaled_dot_product")) and "backward" not in name:
        return _attention_flops(*args[:3], causal=_argument(func, args, kwargs, "is_causal"))
    if name in _PRODUCTS:
        left, right = (args[i] for i in _PRODUCTS[name])
        return 2 * prod(left.shape) * (right.shape[0] if name == "_linear_pointwise" else 1)
    formula = flop_registry.get(func._overloadpacket)
    return int(formula(*args, **kwargs, out_val=out)) if formula else 0


# Products that torch.utils.flop_counter does not know: which arguments are multiplied. The packed layer's weight is
# [out_features, in_features]; a vector has one column.
_PRODUCTS = {"_linear_pointwise": (0, 1), "mv": (0, 1), "addmv": (1, 2), "dot": (0, 1)}


def _attention_flops(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> int:
    """Scores and weighted values, q `[..., heads, q_len, d]`, k and v `[..., kv_heads, kv_len, d]`.

    With a mask, a kernel also computes the pairs that the mask hides, so all pairs are counted. With its own causal
    rule (top-left) it skips what is hidden, tile by tile, so only the visible pairs are counted.
    """
    q_len, kv_len = q.shape[-2], k.shape[-2]
    full_rows = max(0, q_len - kv_len)  # of a causal rectangle that is higher than wide
    pairs = visible_pairs(q_len - full_rows, min(q_len, kv_len)) + full_rows * kv_len if causal else q_len * kv_len
    return 2 * prod(q.shape[:-2]) * pairs * (q.shape[-1] + v.shape[-1])


def name_of(func: Any) -> str:
    """An operator's name without namespace and overload: "bmm"."""
    return str(func._schema.name.split("::")[1])


def num_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's different elements: an expanded dimension is there once."""
    if tensor.layout != torch.strided:
        return tensor.numel() * tensor.element_size()
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not size)
    return prod(sizes) * tensor.element_size()


def storage_of(tensor: Tensor) -> object:
    """What all views of a tensor share. A packed weight has no storage that can be read, and no views."""
    return tensor.untyped_storage() if tensor.layout == torch.strided else tensor


def storage_id(tensor: Tensor) -> int:
    """The identity of the storage, valid while it lives."""
    return id(storage_of(tensor))


def _operands(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Any, Tensor]]:
    """Every tensor that goes in, with the argument of the schema that it is given for."""
    arguments = func._schema.arguments
    named = [*zip(arguments, args, strict=False), *((a, kwargs[a.name]) for a in arguments if a.name in kwargs)]
    for argument, value in named:
        yield from ((argument, leaf) for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _argument(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """An argument of a call, given or default."""
    position = next(i for i, argument in enumerate(func._schema.arguments) if argument.name == name)
    default = func._schema.arguments[position].default_value
    return args[position] if position < len(args) else kwargs.get(name, default)


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write
