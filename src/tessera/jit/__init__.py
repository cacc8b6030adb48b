"""Kernels from description to launch: compile (without a GPU too), cache on disk, load, launch in microseconds.

    spec = jit.KernelSpec(kernel="package.module:function", arguments=(...), constants=(...))
    kernel = jit.load(spec, device_index)
    kernel(jit.current_stream(device_index), grid_x, 1, 1, kernel.tiles[0](address, shape, strides), pointer, number)

Importing this imports neither Triton nor CUDA; a compile imports Triton, a launch libcuda.
"""

from tessera.jit.binary import Binary, Descriptor
from tessera.jit.cache import clear as clear_cache
from tessera.jit.cache import info as cache_info
from tessera.jit.compiler import compile, compiles, obtain, warmup
from tessera.jit.later import compile_later, settle
from tessera.jit.launcher import Argument, Kernel, Launch, current_stream, load
from tessera.jit.spec import Arrangement, Dtype, KernelSpec, Pointer, Scalar, Tiles, Variant
from tessera.jit.tensormap import Maps, Place, TileEncoder, why_not_tma
from tessera.jit.toolchain import NoTritonError

__all__ = [
    "Argument", "Arrangement", "Binary", "Descriptor", "Dtype", "Kernel", "KernelSpec", "Launch", "Maps", "NoTritonError",
    "Place", "Pointer", "Scalar", "TileEncoder", "Tiles", "Variant", "cache_info", "clear_cache", "compile", "compile_later",
    "compiles", "current_stream", "load", "obtain", "settle", "warmup", "why_not_tma",
]  # fmt: skip
