"""What a compile spares Triton (tessera.jit.haste) gives what Triton would have got."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from pathlib import Path
from types import FunctionType

import pytest

pytest.importorskip("triton")

from jit_kernels import matmul as kernels
from triton import knobs
from triton.runtime import jit as triton_jit

import tessera.backends.hopper as hopper
from tessera.jit import haste


def functions() -> dict[str, FunctionType]:
    """All functions of Hopper's kernels that Triton compiles."""
    names = [found.name for found in pkgutil.walk_packages(hopper.__path__, f"{hopper.__name__}.")]
    found = {}
    for module in map(importlib.import_module, names):
        for name, value in vars(module).items():
            owned = [value, *vars(value).values()] if isinstance(value, type) else [value]
            for one in owned:
                if isinstance(one, triton_jit.JITCallable) and one.fn.__module__ == module.__name__:
                    found[f"{module.__name__}.{name}.{one.fn.__qualname__}"] = one.fn
    return found


def test_sources_are_those_that_python_finds():
    found = functions()
    assert len(found) > 300
    for name, function in found.items():
        assert haste.source_lines(function) == inspect.getsourcelines(function), name


ODD = '''
def outer():
    """A docstring
whose lines begin anywhere (or end anywhere."""
    return 1


def brackets(
    a,
):
    return (a,
# not at the margin
b)


b = 2


def quiet(a):  # one ) in a comment
    return a

    # the last line


def last(a): return a
'''


def test_where_indentation_does_not_tell_python_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "odd_functions.py").write_text(ODD)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(haste, "_OURS", str(tmp_path))
    module = importlib.import_module("odd_functions")
    for name in ("outer", "brackets", "quiet", "last"):
        function = getattr(module, name)
        assert haste.source_lines(function) == inspect.getsourcelines(function), name


def test_signatures_are_those_that_python_finds():
    def function(a, *, b=1):
        return a, b

    method = triton_jit.JITCallable.parse.__get__(kernels.matmul)
    for one in (function, method, triton_jit.JITCallable.parse, dict.fromkeys, len):
        for _ in range(2):
            assert haste._signature(one) == inspect.signature(one)


def test_others_get_what_they_ask_for(monkeypatch: pytest.MonkeyPatch):
    """The process's settings stay as they are, and a backend that nobody hastens has its own stage."""
    monkeypatch.delenv("TRITON_DISABLE_LINE_INFO", raising=False)

    class Backend:
        def make_llir(self) -> bool:
            return knobs.compilation.disable_line_info

    hastened, other = Backend(), Backend()
    haste.leave_out_places(hastened)
    assert hastened.make_llir()
    assert not other.make_llir()
    assert not knobs.compilation.disable_line_info
    assert triton_jit.inspect.Parameter is inspect.Parameter

    monkeypatch.setenv("TRITON_DISABLE_LINE_INFO", "0")
    asked = Backend()
    haste.leave_out_places(asked)
    assert not asked.make_llir()
