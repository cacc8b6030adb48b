"""What Triton need not do to compile a kernel: two thirds of a kernel's import, a third of its front end, some of its passes.

None of it changes the code (see tessera.jit.ptx for places in the source), and none of it reaches other people's kernels.
"""

from __future__ import annotations

import ast
import inspect
import linecache
import os
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

from triton import knobs
from triton.compiler import code_generator
from triton.compiler.code_generator import CodeGenerator
from triton.compiler.errors import CompilationError
from triton.runtime import jit

_OURS = str(Path(__file__).parents[1]) + os.sep
_signatures: dict[tuple[type, object], inspect.Signature] = {}


class _Instead:
    """A module or a record, but for some names."""

    def __init__(self, whole: object, **instead: object) -> None:
        self._whole = whole
        vars(self).update(instead)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)


def wants_places() -> bool:
    """Whether operations' places in the source are asked for, which profilers and debuggers show."""
    return os.environ.get("TRITON_DISABLE_LINE_INFO") == "0"


def hasten(functions: Iterable[Any]) -> None:
    """Spares Triton what it would do over and over with these functions, for each set of types and constants that a function is
    called with (some 400 times a kernel): parse the source, look through its parameters and its globals; walk through all that it
    uses for a hash; and note each operation's place in the source, unless that is asked for."""
    for function in functions:
        if hasattr(function, "parse") and "parse" not in vars(function):  # functions that run while compiling have none
            function.parse = cache(function.parse)
            if function.fn.__closure__ is None:  # 3.6 looks for what a closure holds, and copies the globals
                function.get_capture_scope = partial(getattr, function.fn, "__globals__")
            function.fn.__signature__ = inspect.signature(function.fn)
        if "hash" in vars(function):
            function.hash = f"{function.fn.__module__}.{function.fn.__qualname__}"
        function.has_places = wants_places()


def _visit_with(visit_with_places: Callable[[CodeGenerator, ast.AST | None], Any]) -> Callable[..., Any]:
    """Triton's way through a syntax tree; through a function's of ours without the places in the source."""

    def visit(self: CodeGenerator, node: ast.AST | None) -> Any:
        if node is None or getattr(self.jit_fn, "has_places", True):
            return visit_with_places(self, node)
        last, self.cur_node = self.cur_node, node
        try:
            result = ast.NodeVisitor.visit(self, node)
        except CompilationError:
            raise
        except Exception as error:
            raise CompilationError(self.jit_fn.src, self.cur_node, repr(error)) from None
        self.cur_node = last
        return result

    return visit


def source_lines(function: Any) -> tuple[list[str], int]:
    """inspect.getsourcelines. That looks for a function's end by Python's tokens, which is most of a kernel file's import; a
    function of ours ends where lines are indented no more. Where brackets or quotes are open there, it is asked after all."""
    code = getattr(function, "__code__", None)
    if code is None or not code.co_filename.startswith(_OURS):
        return inspect.getsourcelines(function)
    lines = _first_function(linecache.getlines(code.co_filename)[code.co_firstlineno - 1 :])
    text = "".join(lines)
    closed = all(text.count(one) == text.count(other) for one, other in ("()", "[]", "{}"))
    if not closed or text.count('"""') % 2 or "'''" in text:
        return inspect.getsourcelines(function)
    return lines, code.co_firstlineno


def _first_function(lines: list[str]) -> list[str]:
    """Decorators and definition that lines begin with, as far as indentation tells."""
    margin, end = None, 0
    for number, line in enumerate(lines):
        text = line.lstrip()
        if not text or text.startswith("#"):
            continue
        indent = len(line) - len(text)
        if margin is None:
            margin = indent if text.startswith("def ") else None
        elif indent <= margin and text[0] not in ")]}":
            break
        end = number + 1
    return lines[:end]


def _signature(function: Any) -> inspect.Signature:
    """inspect.signature, once for each function or method: Triton's front end asks at each call of its own ones."""
    if not isinstance(function, (FunctionType, MethodType)):
        return inspect.signature(function)
    key = type(function), getattr(function, "__func__", function)
    found = _signatures.get(key)
    if found is None:
        found = _signatures[key] = inspect.signature(function)
    return found


CodeGenerator.visit = _visit_with(CodeGenerator.visit)
jit.inspect = _Instead(inspect, getsourcelines=source_lines)
code_generator.inspect = _Instead(inspect, signature=_signature)


def leave_out_places(backend: Any) -> None:
    """Lets a backend of Triton's make LLVM's code without places in the source, unless they are asked for: even where operations
    have none of their own, those of functions are written for each operation, through all of the functions that it was inlined
    from. Triton has a setting for that, which is the process's; so the backend gets the stage with settings of its own."""
    if wants_places():
        return
    stage = type(backend).make_llir
    settings = _Instead(knobs, compilation=_Instead(knobs.compilation, disable_line_info=True))
    without = FunctionType(stage.__code__, {**stage.__globals__, "knobs": settings}, stage.__name__, stage.__defaults__)
    backend.make_llir = MethodType(without, backend)
