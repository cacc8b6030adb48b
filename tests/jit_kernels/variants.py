"""The kernels here as the gate sees a backend's, without importing Triton."""

from tessera import jit

TILES = jit.Tiles("bf16", (64, 64))
MATMUL = (
    ("a", TILES),
    ("b", TILES),
    ("c", TILES),
    ("marks_ptr", jit.Pointer("i64")),
    ("scale", jit.Scalar("fp32")),
    ("depth", jit.Scalar("i32")),
    ("mark", jit.Scalar("i64")),
)
SIZES = (("M", 64), ("N", 64), ("K", 64), ("DTYPE", jit.Dtype("bf16")))


def variants() -> tuple[jit.Variant, ...]:
    """One good kernel; then one of each fault: no setmaxnreg, too few registers, one that cannot be compiled, idle barriers."""
    matmul = jit.KernelSpec("jit_kernels.matmul:matmul", MATMUL, SIZES)
    starved = jit.KernelSpec("jit_kernels.matmul:matmul", MATMUL, SIZES, maxnreg=40)
    broken = jit.KernelSpec("jit_kernels.matmul:matmul", MATMUL, SIZES[:-1])
    cluster = jit.KernelSpec("jit_kernels.cluster:cluster_size", (("out_ptr", jit.Pointer("i32")),), cluster=2)
    forgetful = jit.KernelSpec("jit_kernels.forgotten:forgetful", (("out_ptr", jit.Pointer("i32")),))
    return (
        jit.Variant("matmul good", matmul, setmaxnreg=False),
        jit.Variant("matmul demanding", matmul),
        jit.Variant("matmul starved", starved, setmaxnreg=False),
        jit.Variant("matmul broken", broken),
        jit.Variant("cluster plain", cluster, wgmma=False, setmaxnreg=False),
        jit.Variant("cluster demanding", cluster),
        jit.Variant("forgetful", forgetful, wgmma=False, setmaxnreg=False),
    )
