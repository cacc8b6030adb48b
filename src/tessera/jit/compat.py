"""The one file that knows Triton's versions (3.6 to 3.9: those that torch 2.11 to 2.15 bring).

Kernel files take Gluon's names from here, the compiler takes its way from a function to PTX. Importing this module
imports Triton, so only kernel files do, and `tessera.jit` when it compiles.

Sources: Triton's `experimental/gluon`, `compiler/compiler.py`, `backends/nvidia/{compiler,driver}.py` at v3.6.0, v3.7.1,
v3.8.0 and v3.9.0. The kernel ABI is the same in all four: a tensor descriptor becomes a 128-byte CUtensorMap by value,
one int32 a dimension (sizes) and one int64 a dimension (strides); constexprs vanish; two pointers (global and profile
scratch) come last.
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, ptx_get_version
from triton.compiler.compiler import make_backend
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language import core
from triton.runtime.jit import JITCallable

from tessera.jit import barriers, haste, ptx, shared_text
from tessera.jit.binary import Descriptor
from tessera.jit.spec import Arrangement, Dtype, KernelSpec, Pointer, Scalar, Tiles
from tessera.jit.stages import FRONT_END, PASSES, PTX, PTXAS, stage

__all__ = [
    "aggregate", "arrive_after_copies", "arrive_after_writes", "arrive_in_cluster", "await_writes", "barrier", "copy_to_shared",
    "fence_async_shared", "gl", "gluon", "init_for_cluster", "let_next_begin", "mbarrier", "meet_cluster", "mma_v2", "place_in",
    "reinterpret", "send_in_cluster", "tma_load", "tma_load_as", "tma_reduce_add", "tma_store", "tma_store_wait",
    "wait_for_previous", "warpgroup_mma", "warpgroup_mma_wait",
]  # fmt: skip

VERSION = tuple(int(part) for part in triton.__version__.split("+")[0].split(".")[:2])

ADDS_PLACES_IN_32_BITS = VERSION >= (3, 9)
"""Whether PTX needs `tessera.jit.operand_places`."""
MERGES_BY_SELECTS = gl.constexpr(VERSION >= (3, 9))
"""Whether LLVM picks by a select what a loop's turn carries on, where it branched before: see pieces/numbers.carried_number."""
SPILLS_SOONER = VERSION >= (3, 9)
"""Whether a main loop that just fits under 3.6 has to do with fewer registers: see pieces/modifiers.spares_registers."""

# Names that moved: thread_barrier -> barrier in 3.7, _aggregate -> aggregate in 3.8, async_copy_* -> async_load and
# async_store in 3.8, where the old names remain, and raise from 3.9 on. So the new name is looked for first.
_aggregate = gluon.aggregate if hasattr(gluon, "aggregate") else core._aggregate
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
copy_to_shared = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
arrive_after_copies = async_copy.mbarrier_arrive
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
tma_store_wait = tma.store_wait


def aggregate(cls: type) -> Any:
    """A record in device code: its annotated fields, which its call takes in their order unless it has an __init__ of its own.
    (Triton makes such an __init__ from 3.8 on.)"""
    if "__init__" not in vars(cls):
        cls.__init__ = _taking(cls.__annotations__)  # type: ignore[misc]
    return _aggregate(cls)


def _taking(fields: dict[str, Any]) -> Callable[..., None]:
    def take(self: Any, *values: Any) -> None:
        for (name, kind), value in zip(fields.items(), values, strict=True):
            setattr(self, name, gl.constexpr(value) if kind is gl.constexpr else value)

    take.__triton_builtin__ = True  # type: ignore[attr-defined]  # nothing for Triton to read
    return take


_ADDRESS_ASM = gl.constexpr(f"{ptx.END}\n\tmov.u32 $0, 0;")


@gluon.constexpr_function
def _mark_asm(words):
    comment = f"{ptx.BEGIN} {words}" if words else ptx.END
    return f"{comment}\n\tmov.u32 $0, 0;"


@gluon.jit
def _mark(words: gl.constexpr):
    """What follows is for jit/ptx.py to change; "" ends that."""
    asm: gl.constexpr = _mark_asm(words)
    gl.inline_asm_elementwise(asm, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def tma_load_as(how: gl.constexpr, tiles, where, bar, shared):
    """tma_load with "evict_first" or "evict_last" (in L2), "multicast 3" (to blocks 0 and 1 of the cluster, a bit each), or
    "only L2" (`bar` and `shared` are left alone)."""
    _mark(how)
    tma_load(tiles, where, bar, shared)
    _mark("")


@gluon.jit
def init_for_cluster(bar, count: gl.constexpr):
    """mbarrier.init by the default partition; the mbarrier's address in shared memory, which Gluon does not tell."""
    _mark("address")
    mbarrier.init(bar, count=count)
    return gl.inline_asm_elementwise(_ADDRESS_ASM, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.constexpr_function
def _place_asm(rank):
    return f"mapa.shared::cluster.u32 $0, $1, {rank};"


@gluon.jit
def place_in(rank: gl.constexpr, address):
    """The address by which all of a cluster reach what its block `rank` has at this address of shared memory."""
    return gl.inline_asm_elementwise(_place_asm(rank), "=r,r", [address], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def arrive_in_cluster(place):
    """One lane of the one warp that calls arrives at an mbarrier of the cluster (see `place_in`)."""
    gl.inline_asm_elementwise(
        "{ .reg .pred first; .reg .u32 lane; mov.u32 lane, %laneid; setp.eq.u32 first, lane, 0;"
        " @first mbarrier.arrive.shared::cluster.b64 _, [$1]; mov.u32 $0, 0; }",
        "=r,r", [place], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def arrive_after_writes(place):
    """Each warp that calls arrives once at an mbarrier of the cluster (see `place_in`): who waits by `await_writes` sees what its
    lanes have written to global memory."""
    gl.inline_asm_elementwise(
        "{ .reg .pred first; .reg .u32 lane; mov.u32 lane, %laneid; setp.eq.u32 first, lane, 0; fence.acq_rel.cluster;"
        " bar.warp.sync 0xffffffff; @first mbarrier.arrive.release.cluster.shared::cluster.b64 _, [$1]; mov.u32 $0, 0; }",
        "=r,r", [place], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def await_writes(bar):
    """Wait for the first lap of an mbarrier that others of the cluster arrive at, and see what they have written."""
    mbarrier.wait(bar, 0)
    gl.inline_asm_elementwise("fence.acq_rel.cluster; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def send_in_cluster(place, number):
    """One lane of the one warp that calls: an int32 to the 4 bytes behind an mbarrier of the cluster, which counts them."""
    gl.inline_asm_elementwise(
        "{ .reg .pred first; .reg .u32 lane; mov.u32 lane, %laneid; setp.eq.u32 first, lane, 0;"
        " @first st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [$1+8], $2, [$1]; mov.u32 $0, 0; }",
        "=r,r,r", [place, number], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


_BEGIN_TEXT = gl.constexpr(f"{shared_text.BEGIN}\n\tmov.u32 $0, {shared_text.NUMBER};")
_SHARE_TEXT = gl.constexpr(f"{shared_text.SHARE}\n\tmov.u32 $0, 0;")
_END_TEXT = gl.constexpr(f"{shared_text.END}\n\tmov.u32 $0, 0;")


@gluon.jit
def begin_shared_text():
    """The first worker partition's, for all that are `share_text` too, from here to `end_shared_text`. Gives the number of the
    warpgroup that runs it, 0 for the default partition, one value a warp."""
    return gl.inline_asm_elementwise(_BEGIN_TEXT, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def share_text():
    """A partition that runs the first worker partition's text (jit/shared_text.py)."""
    gl.inline_asm_elementwise(_SHARE_TEXT, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def end_shared_text():
    gl.inline_asm_elementwise(_END_TEXT, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.constexpr_function
def _meeting_asm():
    wait = "fence.mbarrier_init.release.cluster; barrier.cluster.arrive.release; barrier.cluster.wait.acquire;"
    return f"{ptx.MEETING}\n\t{wait} mov.u32 $0, 0;"


@gluon.jit
def meet_cluster():
    """The blocks of a cluster wait here for one another, and then see one another's mbarriers. Once, before the warps specialise:
    the default partition waits, and jit/ptx.py lets the other warps arrive, which do nothing yet."""
    asm: gl.constexpr = _meeting_asm()
    gl.inline_asm_elementwise(asm, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def wait_for_previous():  # type: ignore[no-untyped-def]
    """Wait until the kernels before this one in the stream are done, and seen (PTX ISA, griddepcontrol). Each warp that reads or
    writes what they do must call it, in a kernel whose spec is `early`."""
    gl.inline_asm_elementwise("griddepcontrol.wait; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def let_next_begin():  # type: ignore[no-untyped-def]
    """The next kernel's blocks may take the room that this one's leave, and wait there, if its spec is `early`."""
    gl.inline_asm_elementwise("griddepcontrol.launch_dependents; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@builtin
def reinterpret(memory, dtype, shape, layout, _semantic=None):  # type: ignore[no-untyped-def]
    """Shared memory seen in another way: `_reinterpret` until 3.8, `reinterpret` from 3.9 on."""
    method = memory.reinterpret if hasattr(memory, "reinterpret") else memory._reinterpret
    return method(dtype, shape, layout, _semantic=_semantic)


if hasattr(tma, "async_atomic_add"):
    tma_reduce_add = tma.async_atomic_add
else:

    @builtin
    def tma_reduce_add(tensor_desc, coord, src, _semantic=None):  # type: ignore[no-untyped-def]
        """Add a block of shared memory to global memory through TMA: Gluon 3.6 and 3.7 have the operation, but no name."""
        from triton._C.libtriton import ir

        coord = _semantic._convert_to_ir_values(coord, require_i64=False)
        _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor_desc.handle, coord, src.handle)


_GLUON_DTYPES = {
    "i8": gl.int8, "u8": gl.uint8, "i16": gl.int16, "u16": gl.uint16, "i32": gl.int32, "u32": gl.uint32,
    "i64": gl.int64, "u64": gl.uint64, "fp8e4nv": gl.float8e4nv, "fp8e5": gl.float8e5, "fp16": gl.float16,
    "bf16": gl.bfloat16, "fp32": gl.float32, "fp64": gl.float64,
}  # fmt: skip


@dataclass(frozen=True)
class Lowered:
    """What Triton made of a spec, before ptxas. Sizes in bytes. `unused_barriers`: see tessera.jit.barriers."""

    ptx: str
    unused_barriers: tuple[str, ...]
    entry: str
    warps: int
    shared: int
    scratch: int
    descriptors: tuple[Descriptor, ...]


@dataclass(frozen=True)
class Assembled:
    """What ptxas made of it: the binary and everything it said (Triton itself hides warnings)."""

    cubin: bytes
    messages: str


class AssemblerError(RuntimeError):
    """ptxas refused its input, or crashed; the message holds its words."""


def _ptxas(capability: int) -> knobs.NvidiaTool:
    """The assembler; for Hopper CUDA 12's under every Triton. 3.9 takes CUDA 13.4's, and still ships 12.9's beside it: of the
    same PTX the newer one makes main loops that spill (benchmarks/LOG.md)."""
    if capability < 100:
        with contextlib.suppress(RuntimeError):  # a Triton without it
            return knobs.nvidia.ptxas
    return get_ptxas(capability)


def lower(spec: KernelSpec, function: Any) -> Lowered:
    """Takes a Gluon function to PTX for the spec's target. No GPU needed. Triton's own errors pass through."""
    from triton._C.libtriton import ir

    backend = make_backend(GPUTarget("cuda", spec.capability, 32))
    haste.leave_out_places(backend)
    options = backend.parse_options(
        {
            "num_warps": spec.num_warps,
            "num_ctas": 1,
            "maxnreg": spec.maxnreg,
            "enable_fp_fusion": spec.fp_fusion,  # 3.9 warns where it is left open, and its default flips in 3.10
            "ptx_version": ptx_get_version(_ptxas(spec.capability).version),
        }
    )
    source = _ast_source(spec, function)
    stages: dict[str, Callable[[Any, dict[str, Any]], Any]] = {}
    backend.add_stages(stages, options, source.language)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    metadata: dict[str, Any] = dict(options.__dict__)
    with stage(FRONT_END):
        module = source.make_ir(
            backend.target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context
        )
    with stage(PASSES):
        module = stages["ttgir"](module, metadata)
        unused_barriers = barriers.unused(str(module))
        module = stages["llir"](module, metadata)
    with stage(PTX):
        module = stages["ptx"](module, metadata)
    described = metadata.get("tensordesc_meta") or []
    tiles = spec.tiles
    if len(described) != len(tiles):
        raise RuntimeError(f"{spec.kernel}: Triton kept {len(described)} of {len(tiles)} tensor descriptors")
    return Lowered(
        ptx=module,
        unused_barriers=unused_barriers,
        entry=metadata["name"],
        warps=metadata["num_warps"],
        shared=metadata["shared"],
        scratch=(metadata.get("global_scratch_size") or 0) + (metadata.get("profile_scratch_size") or 0),
        descriptors=tuple(
            Descriptor(tile.element, tuple(meta["block_size"]), meta["swizzle"])
            for tile, meta in zip(tiles, described, strict=True)
        ),
    )


def _ast_source(spec: KernelSpec, function: Any) -> GluonASTSource:
    """Triton's description of the call, in the order of the function's parameters, nothing specialised on a value."""
    arguments, constants = dict(spec.arguments), dict(spec.constants)
    names: list[str] = function.arg_names
    described = [name for name in names if name not in constants]
    if list(arguments) != described or set(constants) - set(names):
        raise TypeError(
            f"{spec.kernel} takes {', '.join(names)}; the spec gives arguments {', '.join(arguments)} "
            f"and constants {', '.join(constants)} (arguments in the kernel's order, each parameter once)"
        )
    signature, attributes = {}, {}
    for index, name in enumerate(names):
        signature[name] = "constexpr" if name in constants else _type_name(arguments[name])
        argument = arguments.get(name)
        if isinstance(argument, (Pointer, Scalar)) and argument.align > 1:
            attributes[(index,)] = [["tt.divisibility", argument.align]]
    values = {(names.index(name),): _gluon_constant(value) for name, value in constants.items()}
    return GluonASTSource(function, signature, values, attributes)


def _type_name(argument: Pointer | Scalar | Tiles) -> str:
    if isinstance(argument, Pointer):
        return "*" + argument.element
    if isinstance(argument, Scalar):
        return argument.element
    block, dtype = list(argument.block), _GLUON_DTYPES[argument.element]
    if argument.arrangement is Arrangement.ROWS:
        layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=dtype.primitive_bitwidth, rank=len(block))
    else:
        layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    return f"tensordesc<{argument.element}{block},{layout!r}>"


def _gluon_constant(value: Any) -> Any:
    if isinstance(value, Dtype):
        return _GLUON_DTYPES[value.name]
    return tuple(_gluon_constant(item) for item in value) if isinstance(value, tuple) else value


def assemble(spec: KernelSpec, lowered: Lowered) -> Assembled:
    """Runs ptxas as Triton does, but keeps what it says. Raises AssemblerError."""
    flags = ["-lineinfo", "-v", f"--gpu-name={spec.target}"]
    if not spec.fp_fusion:
        flags.append("--fmad=false")
    if VERSION >= (3, 7):
        flags.append("--regAllocOptLevel=2")  # as Triton passes it from 3.7 on, for an error of ptxas 13
    with tempfile.TemporaryDirectory(prefix="tessera-") as folder:
        text, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        text.write_text(lowered.ptx)
        command = [_ptxas(spec.capability).path, *flags, str(text), "-o", str(binary)]
        with stage(PTXAS):
            ran = subprocess.run(command, capture_output=True, text=True)
        if ran.returncode != 0:
            raise AssemblerError(f"{spec.kernel}: ptxas ended with {ran.returncode}\n{ran.stderr[-4000:]}")
        return Assembled(binary.read_bytes(), ran.stderr.replace(folder + "/", ""))


def is_jitted(value: object) -> bool:
    """Whether a global is code that Triton compiles or runs while compiling (jit functions, constexpr functions)."""
    return isinstance(value, JITCallable)
