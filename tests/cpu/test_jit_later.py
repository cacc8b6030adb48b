"""Compiling beside the program."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from tessera import jit
from tessera.jit import compiler, later

SPECS = [jit.KernelSpec("package.module:function", (("n", jit.Scalar("i32")),), (("N", n),)) for n in range(4)]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[jit.KernelSpec]:
    """What is compiled, in order; the last of SPECS can't be."""
    found: list[jit.KernelSpec] = []

    def compile_one(spec: jit.KernelSpec) -> jit.KernelSpec:
        if spec == SPECS[3]:
            raise ValueError("not this one")
        found.append(spec)
        return spec

    monkeypatch.setattr(compiler, "_from_disk_or_compile", compile_one)
    monkeypatch.setattr(compiler, "_binaries", {})
    return found


def test_in_order_and_nothing_twice(compiled: list[jit.KernelSpec]) -> None:
    jit.obtain(SPECS[1])
    jit.compile_later(SPECS)
    jit.settle()
    assert compiled == [SPECS[1], SPECS[0], SPECS[2]]
    jit.compile_later(SPECS[:3])
    jit.settle()
    assert len(compiled) == 3


def test_whoever_asks_goes_on_first(compiled: list[jit.KernelSpec]) -> None:
    jit.compile_later(SPECS[:1])
    assert not compiled
    jit.settle()
    assert compiled == SPECS[:1]


def test_what_fails_beside_the_program_fails_in_the_call_that_needs_it(compiled: list[jit.KernelSpec]) -> None:
    jit.compile_later(SPECS[::-1])
    jit.settle()
    assert compiled == [SPECS[2], SPECS[1], SPECS[0]]
    with pytest.raises(ValueError, match="not this one"):
        jit.obtain(SPECS[3])


def test_a_call_waits_for_what_is_being_compiled(compiled: list[jit.KernelSpec], monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slowly(spec: jit.KernelSpec) -> jit.KernelSpec:
        begun.set()
        assert go_on.wait(10)
        compiled.append(spec)
        return spec

    monkeypatch.setattr(compiler, "_from_disk_or_compile", slowly)
    jit.compile_later(SPECS[:1])
    assert begun.wait(10)
    caller = threading.Thread(target=jit.obtain, args=SPECS[:1])
    caller.start()
    go_on.set()
    caller.join()
    assert compiled == SPECS[:1]
    jit.settle()
    assert later._worker is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_compiles_for_itself(compiled: list[jit.KernelSpec], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parent's thread, which holds the lock of a kernel, is not in it."""
    begun, go_on = threading.Event(), threading.Event()
    parent = os.getpid()

    def slowly(spec: jit.KernelSpec) -> jit.KernelSpec:
        begun.set()
        assert os.getpid() != parent or go_on.wait(10)
        return spec

    monkeypatch.setattr(compiler, "_from_disk_or_compile", slowly)
    jit.compile_later(SPECS[:2])
    assert begun.wait(10)
    child = os.fork()
    if child == 0:
        jit.compile_later(SPECS[1:2])
        jit.settle()
        os._exit(0 if jit.obtain(SPECS[0]) == SPECS[0] and compiler.is_ready(SPECS[1]) else 1)
    go_on.set()
    assert os.waitpid(child, 0)[1] == 0
    jit.settle()


def test_a_process_ends_when_the_kernel_in_work_is_done() -> None:
    """It neither cuts the compiler off nor goes through all that waits."""
    program = """
import threading, time
from tessera import jit
from tessera.jit import compiler
begun = threading.Event()
def slowly(spec):
    begun.set()
    time.sleep(0.5)
    print(dict(spec.constants)["N"], flush=True)
compiler._from_disk_or_compile = slowly
jit.compile_later(jit.KernelSpec("a.b:c", (), (("N", n),)) for n in range(50))
begun.wait()
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout.split() == ["0"]
