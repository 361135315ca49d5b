"""The Triton kernels compile for three generations of GPUs, on a machine that has none.

Registers and shared memory are printed: `pytest -rP tests/kernels/gpu/test_triton_compile.py`.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import pytest

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.backends import nvidia  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from minillm.kernels.gpu import decode as triton_decode  # noqa: E402
from minillm.kernels.gpu import prefill as triton_prefill  # noqa: E402
from minillm.kernels.gpu.decode import MAX_SPLITS, decode_kernel, merge_kernel  # noqa: E402
from minillm.kernels.gpu.paged import store_kernel  # noqa: E402
from minillm.kernels.gpu.prefill import prefill_kernel  # noqa: E402

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that one program may use
TYPES = {"scale_log2": "fp32", "slots_ptr": "*i64", "parts_ptr": "*fp32", "lses_ptr": "*fp32", "lse_ptr": "*fp32"}
CODES = {"plain": None, "int8": "*i8", "fp8": "*u8", "int4": "*u8"}  # what a format's pools hold
UNEVEN = (
    "scale_log2",
    "window",
    "table_width",
    "head_blocks",
    "num_splits",
)  # the others are multiples of 16, as in a real launch
SHAPES: dict[str, dict[str, Any]] = {
    "d 128, group 4": {
        "GROUP": 4, "HEAD_DIM": 128, "D": 128, "BLOCK_SIZE": 16, "WINDOWED": False, "FORMAT": "plain", "GROUPS": 1
    },
    "d 80, group 3, window": {
        "GROUP": 3, "HEAD_DIM": 80, "D": 128, "BLOCK_SIZE": 16, "WINDOWED": True, "FORMAT": "plain", "GROUPS": 1
    },
}  # fmt: skip


def compile_for(arch: int, dtype: str, kernel: Any, constants: dict[str, Any], warps: int = 4, stages: int = 2) -> None:
    """Compile to machine code and print what a program of it needs."""
    kernel = getattr(kernel, "fn", kernel) if hasattr(kernel, "configs") else kernel
    codes = CODES[constants.get("FORMAT", "plain")]
    types = TYPES | ({"k_ptr": codes, "v_ptr": codes} if codes and "FORMAT" in kernel.arg_names else {})
    signature = {
        name: "constexpr" if name in constants else types.get(name) or _type(name, dtype) for name in kernel.arg_names
    }
    even = [i for i, name in enumerate(kernel.arg_names) if name not in constants and name not in UNEVEN]
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in even}),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": warps, "num_stages": stages},
    )
    assert compiled.asm["cubin"]
    registers, stack = _registers_and_stack(compiled.asm["cubin"])
    shared = compiled.metadata.shared
    print(
        f"sm_{arch} {dtype} {kernel.__name__} {constants}, {warps} warps: {registers} registers and "
        f"{stack} bytes of stack per thread, {shared:,} bytes of shared memory"
    )
    assert 0 < registers <= 255 and shared <= SHARED_LIMIT[arch]


def _type(name: str, dtype: str) -> str:
    """Pointers to numbers hold `dtype`, the ends of ranges bfloat16, other pointers int32; the rest are int32."""
    if not name.endswith("_ptr"):
        return "i32"
    if re.fullmatch(r"[kv]_(low|high)_ptr", name):
        return "*bf16"
    return f"*{dtype}" if re.fullmatch(r"(q|k|v|out|k_pool|v_pool)_ptr", name) else "*i32"


def _registers_and_stack(cubin: bytes) -> tuple[int, int]:
    """Registers per thread, and bytes per thread that did not fit into them."""
    tool = Path(str(nvidia.__file__)).parent / "bin" / "cuobjdump"
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return int(found[1]), int(found[2])


@pytest.mark.parametrize("arch", SHARED_LIMIT)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_kernels_compile(arch: int, dtype: str) -> None:
    shape = SHAPES["d 128, group 4"]
    first = triton_prefill.CONFIGS[0]
    compile_for(arch, dtype, prefill_kernel, shape | {"LONG": True} | first.kwargs, first.num_warps, first.num_stages)
    first = triton_decode.CONFIGS[0]
    compile_for(arch, dtype, decode_kernel, shape | {"ROWS": 16} | first.kwargs, first.num_warps, first.num_stages)
    compile_for(arch, dtype, merge_kernel, {"HEAD_DIM": 128, "D": 128, "MAX_SPLITS": MAX_SPLITS})
    compile_for(arch, dtype, store_kernel, {"KV_HEADS": 3, "HEADS": 4, "HEAD_DIM": 128, "D": 128})


@pytest.mark.parametrize("config", triton_prefill.CONFIGS[1:], ids=str)
def test_every_prefill_tile_fits(config: Any) -> None:
    constants = SHAPES["d 128, group 4"] | {"LONG": True} | config.kwargs
    compile_for(90, "bf16", prefill_kernel, constants, config.num_warps, config.num_stages)


@pytest.mark.parametrize("config", triton_decode.CONFIGS[1:], ids=str)
def test_every_decode_tile_fits(config: Any) -> None:
    constants = SHAPES["d 128, group 4"] | {"ROWS": 64} | config.kwargs
    compile_for(90, "bf16", decode_kernel, constants, config.num_warps, config.num_stages)


def test_odd_shapes_compile() -> None:
    config = triton_decode.CONFIGS[0]
    constants = SHAPES["d 80, group 3, window"] | {"ROWS": 16} | config.kwargs
    compile_for(80, "bf16", decode_kernel, constants, config.num_warps, config.num_stages)


@pytest.mark.parametrize("arch", SHARED_LIMIT)
@pytest.mark.parametrize("form", ["int8", "fp8", "int4"])
def test_quantised_caches_compile(arch: int, form: str) -> None:
    """fp8 included on sm_80, where Triton has no e4m3: the kernel reads bytes."""
    shape = SHAPES["d 128, group 4"] | {"FORMAT": form, "GROUPS": 4 if form == "int4" else 1}
    first = triton_prefill.CONFIGS[0]
    compile_for(arch, "bf16", prefill_kernel, shape | {"LONG": True} | first.kwargs, first.num_warps, first.num_stages)
    first = triton_decode.CONFIGS[0]
    compile_for(arch, "bf16", decode_kernel, shape | {"ROWS": 16} | first.kwargs, first.num_warps, first.num_stages)


def test_odd_shapes_of_a_quantised_cache_compile() -> None:
    config = triton_decode.CONFIGS[0]
    constants = SHAPES["d 80, group 3, window"] | {"ROWS": 16, "FORMAT": "int4", "GROUPS": 3} | config.kwargs
    compile_for(80, "bf16", decode_kernel, constants, config.num_warps, config.num_stages)


def test_triton_itself_reads_no_e4m3_on_sm_80() -> None:
    """Why the kernels decode float8 by hand; if this fails, a newer Triton can do it for them."""
    source = ASTSource(_convert, {"x_ptr": "*fp8e4nv", "out_ptr": "*bf16"}, {})
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
    with pytest.raises(Exception, match="fp8e4nv not supported"):
        triton.compile(source, target=GPUTarget("cuda", 80, 32))


@triton.jit
def _convert(x_ptr, out_ptr):  # type: ignore[no-untyped-def]
    tl.store(out_ptr, tl.load(x_ptr).to(tl.bfloat16))
