"""Compiling without a GPU: what a later process costs, what makes a new binary, and what is refused."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tessera import jit
from tessera.jit import compiler, stages, toolchain

pytest.importorskip("triton")

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))

ARGUMENTS = (
    ("a", jit.Tiles("bf16", (64, 64))),
    ("b", jit.Tiles("bf16", (64, 64))),
    ("c", jit.Tiles("bf16", (64, 64))),
    ("marks_ptr", jit.Pointer("i64")),
    ("scale", jit.Scalar("fp32")),
    ("depth", jit.Scalar("i32")),
    ("mark", jit.Scalar("i64")),
)
CONSTANTS = (("M", 64), ("N", 64), ("K", 64), ("DTYPE", jit.Dtype("bf16")))
SPEC = jit.KernelSpec("jit_kernels.matmul:matmul", ARGUMENTS, CONSTANTS)

PROCESS = """
import json, sys, time
sys.path.insert(0, {tests!r})
import torch
from tessera import jit
from test_jit_compile import SPEC
start = time.perf_counter()
compiled = jit.warmup([SPEC])
seconds = time.perf_counter() - start
print(json.dumps([compiled, seconds, "triton" in sys.modules, "jit_kernels.matmul" in sys.modules]))
"""


def in_new_process(folder: Path, kernels: Path = TESTS) -> tuple[int, float, bool, bool]:
    """warmup([SPEC]) elsewhere: how many it compiled, how long it took, whether Triton and the kernel were imported."""
    path = os.pathsep.join([str(kernels), str(TESTS / "cpu"), *sys.path])
    environment = os.environ | {"TESSERA_CACHE_DIR": str(folder), "PYTHONPATH": path}
    script = PROCESS.format(tests=str(kernels)).replace("from test_jit_compile import SPEC", SPEC_WITHOUT_TRITON)
    ran = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return tuple(json.loads(ran.stdout.splitlines()[-1]))


SPEC_WITHOUT_TRITON = f"""
from tessera.jit import Dtype, KernelSpec, Pointer, Scalar, Tiles
from tessera.jit.spec import Arrangement
SPEC = KernelSpec({SPEC.kernel!r}, {ARGUMENTS!r}, {CONSTANTS!r})
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TESSERA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("TESSERA_CACHE", raising=False)
    monkeypatch.setattr(compiler, "_binaries", {})
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def binary() -> jit.Binary:
    return jit.compile(SPEC)


def test_what_a_binary_tells(binary):
    assert binary.cubin.startswith(b"\x7fELF")
    assert (binary.entry, binary.threads, binary.scratch) == ("matmul", 128, 0)
    assert binary.shared >= 3 * 64 * 64 * 2
    assert binary.descriptors == (jit.Descriptor("bf16", (64, 64), 3),) * 3
    assert 0 < binary.registers <= 255
    assert binary.spills == (0, 0)
    assert "ptxas" in binary.messages
    assert "wgmma.mma_async" in binary.ptx


def test_places_in_the_source_are_kept_where_asked_for_and_change_no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    without = compiler.compile(SPEC).ptx
    monkeypatch.setenv("TRITON_DISABLE_LINE_INFO", "0")
    places = compiler.compile(SPEC).ptx

    def code(text: str) -> list[str]:
        lines = text[: text.index("\n}\n")].splitlines()
        return [line for line in lines if line.strip() and not line.lstrip().startswith((".loc", ".file"))]

    assert "\t.loc" in places
    assert ".loc" not in without
    assert ".debug" not in without
    assert code(places) == code(without)


@pytest.mark.parametrize("name", ["barriers", "compat", "compiler", "haste"])
def test_what_a_kernel_passes_as_it_is_compiled_is_part_of_the_key(name: str):
    module = importlib.import_module(f"tessera.jit.{name}")
    assert Path(module.__file__) in toolchain.source_files("tessera.backends.hopper.forward")


def test_stages_tell_a_threads_own_time():
    found: dict[str, float] = {}

    def work() -> None:
        start = time.perf_counter()
        compiler.compile(SPEC)
        found.update(stages.taken(), all=time.perf_counter() - start)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    whole = found.pop("all")
    assert list(found) == [stages.IMPORTS, stages.FRONT_END, stages.PASSES, stages.PTX, stages.PTXAS]
    assert all(seconds > 0 for seconds in found.values())
    assert 0.5 * whole < sum(found.values()) < whole


def test_a_block_in_rows_is_not_swizzled():
    arguments = (*ARGUMENTS[:2], ("c", jit.Tiles("bf16", (64, 64), jit.Arrangement.ROWS)), *ARGUMENTS[3:])
    in_rows = jit.compile(jit.KernelSpec("jit_kernels.matmul:matmul", arguments, CONSTANTS))
    assert [descriptor.swizzle for descriptor in in_rows.descriptors] == [3, 3, 0]
    assert in_rows.descriptors[2].box == (64, 64)


def test_memory_then_disk_then_compiler(folder):
    before = jit.compiles()
    assert jit.warmup([SPEC, SPEC]) == 1
    compiler._binaries.clear()
    assert jit.warmup([SPEC]) == 0
    assert compiler.obtain(SPEC).ptx is None, "from disk"
    assert jit.compiles() == before + 1
    assert jit.clear_cache() == 1
    compiler._binaries.clear()
    assert jit.warmup([SPEC]) == 1


def test_threads_compile_a_spec_once_and_different_ones_side_by_side(monkeypatch, binary):
    together = threading.Barrier(2, timeout=30)
    compiled: list[jit.KernelSpec] = []

    def slow(spec: jit.KernelSpec) -> jit.Binary:
        compiled.append(spec)
        together.wait()  # opens only when two specs are being compiled at the same time
        return binary

    monkeypatch.setattr(compiler, "compile", slow)
    other = jit.KernelSpec(SPEC.kernel, ARGUMENTS, CONSTANTS, num_warps=8)
    jit.warmup([SPEC, other, SPEC, other, SPEC], threads=5)
    assert sorted(compiled, key=lambda one: one.num_warps) == [SPEC, other]


def test_a_failing_compile_is_raised_after_the_others(folder):
    broken = jit.KernelSpec(SPEC.kernel, ARGUMENTS, CONSTANTS[1:])
    with pytest.raises(TypeError, match="takes a, b, c"):
        jit.warmup([broken, SPEC])
    assert jit.cache_info().entries == 1


def test_a_later_process_needs_neither_triton_nor_time(folder):
    assert in_new_process(folder)[0] == 1
    compiled, seconds, triton, kernel = in_new_process(folder)
    assert (compiled, triton, kernel) == (0, False, False)
    assert seconds < 0.3


def test_ranks_that_start_together_compile_once(folder):
    environment = os.environ | {"TESSERA_CACHE_DIR": str(folder), "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    script = PROCESS.format(tests=str(TESTS)).replace("from test_jit_compile import SPEC", SPEC_WITHOUT_TRITON)
    ranks = [
        subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    answers = [json.loads(rank.communicate(timeout=120)[0].splitlines()[-1]) for rank in ranks]
    assert sum(answer[0] for answer in answers) == 1, answers


def test_an_edit_anywhere_in_the_package_is_a_new_binary(folder, tmp_path):
    shutil.copytree(TESTS / "jit_kernels", tmp_path / "copy" / "jit_kernels")
    assert in_new_process(folder, tmp_path / "copy")[0] == 1
    assert in_new_process(folder, tmp_path / "copy")[0] == 0
    piece = tmp_path / "copy" / "jit_kernels" / "pieces.py"
    piece.write_text(piece.read_text().replace("acc * scale", "acc * (scale + 1)"))
    assert in_new_process(folder, tmp_path / "copy")[0] == 1


def test_the_key_is_made_of_spec_sources_and_compilers(monkeypatch):
    key = toolchain.binary_key(SPEC)
    assert key == toolchain.binary_key(jit.KernelSpec(SPEC.kernel, ARGUMENTS, CONSTANTS))
    others = {
        toolchain.binary_key(jit.KernelSpec(SPEC.kernel, ARGUMENTS, CONSTANTS, num_warps=8)),
        toolchain.binary_key(jit.KernelSpec(SPEC.kernel, ARGUMENTS, (*CONSTANTS[1:], ("M", 128)))),
    }
    for module, name, value in [
        (toolchain, "toolchain_key", lambda: "triton 99"),
        (toolchain, "source_key", lambda _: "edited"),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            others.add(toolchain.binary_key(SPEC))
    assert len(others | {key}) == 5


def test_switches_of_code_generation_are_in_the_key(monkeypatch):
    plain = toolchain.toolchain_key()
    assert f"triton {toolchain.triton_version()}" in plain
    assert "ptxas" in plain
    toolchain.toolchain_key.cache_clear()
    monkeypatch.setenv("DISABLE_LLVM_OPT", "1")
    assert toolchain.toolchain_key() != plain
    toolchain.toolchain_key.cache_clear()


def test_the_version_is_the_one_that_would_be_imported():
    import triton

    assert toolchain.triton_version() == triton.__version__


def test_a_source_edited_under_way_is_not_cached(folder, monkeypatch):
    monkeypatch.setattr(compiler, "hash_sources", lambda _: "edited since")
    assert jit.warmup([SPEC]) == 1
    assert jit.cache_info().entries == 0


def test_misfits_name_what_the_kernel_takes():
    for arguments, constants in [
        (ARGUMENTS[:-1], CONSTANTS),
        (ARGUMENTS[1:2] + ARGUMENTS[:1] + ARGUMENTS[2:], CONSTANTS),
        (ARGUMENTS, CONSTANTS[1:]),
        (ARGUMENTS, (*CONSTANTS, ("EXTRA", 1))),
    ]:
        with pytest.raises(TypeError, match="takes a, b, c, marks_ptr, scale, depth, mark, M, N, K, DTYPE"):
            jit.compile(jit.KernelSpec(SPEC.kernel, arguments, constants))
    with pytest.raises(TypeError, match=r"jit_kernels\.matmul has no nothing"):
        jit.compile(jit.KernelSpec("jit_kernels.matmul:nothing", ARGUMENTS, CONSTANTS))
    with pytest.raises(TypeError, match=r"not a function decorated with gluon\.jit"):
        jit.compile(jit.KernelSpec("jit_kernels.matmul:gl", ARGUMENTS, CONSTANTS))
    with pytest.raises(ModuleNotFoundError):
        jit.warmup([jit.KernelSpec("jit_kernels.absent:matmul", ARGUMENTS, CONSTANTS)])


def test_code_outside_the_key_is_refused(tmp_path, monkeypatch):
    (tmp_path / "outside_pieces.py").write_text(
        "from tessera.jit.compat import gluon\n@gluon.jit\ndef double(x):\n    return x + x\n"
    )
    (tmp_path / "outside_kernel.py").write_text(
        "from outside_pieces import double\nfrom tessera.jit.compat import gl, gluon\n"
        "@gluon.jit\ndef inner(x):\n    return double(x)\n"
        "@gluon.jit\ndef kernel(out_ptr, x):\n    gl.store(out_ptr, inner(x))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = jit.KernelSpec("outside_kernel:kernel", (("out_ptr", jit.Pointer("i32")), ("x", jit.Scalar("i32"))))
    with pytest.raises(TypeError, match=r"outside_pieces\.double, which lies outside"):
        jit.compile(spec)


@pytest.mark.parametrize("used", ["twice(2)", "helpers.twice(2)", "Size.TWO.value"])
def test_plain_code_of_the_project_outside_the_package_is_refused(tmp_path, monkeypatch, used):
    name = f"project{abs(hash(used))}"
    package = tmp_path / name / "kernels"
    package.mkdir(parents=True)
    from tessera.jit import reach

    (tmp_path / name / "__init__.py").touch()
    (tmp_path / name / "helpers.py").write_text(
        "from enum import Enum\ndef twice(x):\n    return 2 * x\nclass Size(Enum):\n    TWO = 4\n"
    )
    (package / "__init__.py").touch()
    (package / "kernel.py").write_text(
        f"import math\nfrom {name} import helpers\nfrom {name}.helpers import Size, twice\n"
        "from tessera.jit.compat import gl, gluon\n"
        f"@gluon.constexpr_function\ndef number():\n    return math.floor({used})\n"
        "@gluon.jit\ndef kernel(out_ptr):\n    gl.store(out_ptr, number())\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = jit.KernelSpec(f"{name}.kernels.kernel:kernel", (("out_ptr", jit.Pointer("i32")),))
    with pytest.raises(TypeError, match=rf"{name}\.helpers\.(twice|Size), which lies outside"):
        jit.compile(spec)
    shutil.move(tmp_path / name / "helpers.py", package / "helpers.py")
    kernel = package / "kernel.py"
    kernel.write_text(kernel.read_text().replace(f"from {name} import helpers", f"from {name}.kernels import helpers")
                      .replace(f"{name}.helpers", f"{name}.kernels.helpers"))  # fmt: skip
    for module in [module for module in sys.modules if module.startswith(name)]:
        del sys.modules[module]
    importlib.invalidate_caches()
    reach.check(spec, importlib.import_module(spec.module).kernel)  # inside, it is no offence


def test_a_change_of_abi_is_refused(monkeypatch):
    monkeypatch.setattr(compiler, "_SCRATCH_POINTERS", (8, 8, 8))
    with pytest.raises(RuntimeError, match="declares parameters"):
        jit.compile(SPEC)


def test_ptxas_speaks_through(monkeypatch, tmp_path):
    from tessera.jit import compat

    tool = tmp_path / "ptxas"
    tool.write_text("#!/bin/sh\necho 'something ptxas says' >&2\nexit 3\n")
    tool.chmod(0o755)
    monkeypatch.setattr(compat, "_ptxas", lambda _: type("Tool", (), {"path": str(tool), "version": "12.8"}))
    with pytest.raises(compat.AssemblerError, match="ended with 3\nsomething ptxas says"):
        jit.compile(SPEC)


def test_hopper_has_the_assembler_of_cuda_12(monkeypatch):
    from triton import knobs

    from tessera.jit import compat

    assert compat._ptxas(90).version.startswith("12.")
    assert compat._ptxas(100).path == compat.get_ptxas(100).path

    class Knobs:
        @property
        def ptxas(self):
            raise RuntimeError("Cannot find ptxas")

    monkeypatch.setattr(knobs, "nvidia", Knobs())
    monkeypatch.setattr(compat, "get_ptxas", lambda capability: f"Triton's for {capability}")
    assert compat._ptxas(90) == "Triton's for 90"  # a wheel without it


def test_without_triton_the_reason_is_said():
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "from tessera import jit\n"
        f"spec = jit.KernelSpec({SPEC.kernel!r}, (('x', jit.Scalar('i32')),))\n"
        "try:\n    jit.compile(spec)\nexcept jit.NoTritonError as error:\n    print(error)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert "Triton is not installed" in ran.stdout, ran.stderr


def test_importing_costs_neither_triton_nor_cuda():
    script = (
        "import sys, tessera, tessera.jit, tessera.jit.gate\n"
        "print('triton' in sys.modules, 'libcuda' in open('/proc/self/maps').read())"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout.split() == ["False", "False"]
