"""The design's import rules, checked by reading the source: `python scripts/check_imports.py`. Exit 1 with the offending lines.

1. Imports point one way, down LAYERS. (dispatch defines what a backend must answer and loads backends by name, so in the
   source the backends import dispatch, and nothing below `calls` can reach a backend.)
2. Backends never import each other.
3. The oracle shares nothing with what it judges: reference.py imports problem, mask, dropout and operands' types alone.
4. Triton is imported with a module by the GPU backends and the jit alone; elsewhere, inside functions at most.
5. What only an extra installs (rich, typer, matplotlib, transformers, ...) is imported with a module by that extra's rooms alone.
6. No module is called utils.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "tessera"

# A room may import from its own line and from the lines above it. A room is a module of the package or a subpackage; in
# serving, which walks the same way as the package, each module is one.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("checking", "device", "dropout", "mask", "serving"),
    ("problem",),
    ("operands", "options", "plan", "partial", "serving.problem"),
    ("serving.operands", "serving.contents", "serving.plan"),
    ("jit",),
    ("cases", "dispatch", "reference"),
    ("serving.cases", "serving.dispatch"),
    ("serving.grid", "serving.support"),
    ("backends",),
    ("calls", "serving.calls"),
    ("operators", "serving.operators"),
    ("api", "serving.api"),
    ("serving.cascade",),
    ("__init__",),
    ("verify", "support", "distributed", "integrations"),
    ("serving.verify",),
    ("bench",),
    ("commands",),
    ("cli", "__main__"),
)
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}

REFERENCE_MAY_IMPORT = {"problem", "mask", "dropout", "operands"}
TRITON_ROOMS = ("backends/hopper/", "backends/triton/", "jit/")
EXTRAS = {
    "rich": ("commands/", "cli.py", "bench/"),
    "typer": ("commands/", "cli.py"),
    "matplotlib": ("bench/", "commands/"),
    "pynvml": ("bench/",),
    "transformers": ("integrations/",),
    "numpy": ("bench/", "commands/", "integrations/"),
}


@dataclass(frozen=True)
class Import:
    """One imported module: where it is written, and whether importing the file imports it too."""

    file: str
    line: int
    module: str
    with_file: bool

    def __str__(self) -> str:
        return f"src/{PACKAGE}/{self.file}:{self.line}: imports {self.module}"


def imports_of(path: Path, file: str) -> Iterator[Import]:
    """Every import in a file. `from x import y` counts as x.y where that is a module of this package, else as x."""
    tree = ast.parse(path.read_text(), filename=str(path))
    later = {id(node) for function in _functions(tree) for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for module in _modules(node, file):
                yield Import(file, node.lineno, module, id(node) not in later)


def _functions(tree: ast.AST) -> Iterator[ast.AST]:
    """What does not run when the file is imported: functions, and blocks for type checkers."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        ):
            yield node


def _modules(node: ast.Import | ast.ImportFrom, file: str) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    base = node.module or ""
    if node.level:
        parents = (PACKAGE, *Path(file).parts[:-1])
        base = ".".join((*parents[: len(parents) - node.level + 1], *([base] if base else [])))
    for alias in node.names:
        whole = f"{base}.{alias.name}"
        yield whole if _is_module(whole) else base


def _is_module(name: str) -> bool:
    path = ROOT / "src" / Path(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def room_of(module: str) -> str:
    """tessera.backends.cpu.aten -> backends, tessera.serving.plan -> serving.plan"""
    parts = module.split(".")[1:]
    if not parts:
        return "__init__"
    inner = ".".join(parts[:2])
    return inner if inner in RANK else parts[0]


def complaints(file: str, found: Import) -> Iterator[str]:
    """What the rules have against one import."""
    own = Path(file).with_suffix("").parts
    top = found.module.split(".")[0]
    if top == "triton" and found.with_file and not file.startswith(TRITON_ROOMS):
        yield "Triton is imported with a module by the GPU backends and jit alone"
    if top in EXTRAS and found.with_file and not file.startswith(EXTRAS[top]):
        yield f"{top} comes with an extra: import it inside the function that needs it"
    if top != PACKAGE:
        return
    here, there = room_of(".".join((PACKAGE, *own))), room_of(found.module)
    if here not in RANK or there not in RANK:
        yield f"{here if here not in RANK else there} has no place in LAYERS"
    elif RANK[here] < RANK[there]:
        yield f"imports point one way: {here} stands under {there}"
    target = found.module.split(".")
    if here == there == "backends" and len(own) > 2 and len(target) > 2 and own[1] != target[2]:
        yield "backends never import each other"
    if file == "reference.py" and there not in REFERENCE_MAY_IMPORT:
        yield "the oracle imports " + ", ".join(sorted(REFERENCE_MAY_IMPORT)) + " alone"


def main() -> int:
    """Print what is wrong; the number of offences decides the exit code."""
    source = ROOT / "src" / PACKAGE
    offences = []
    files = sorted(source.rglob("*.py"))
    for path in files:
        file = path.relative_to(source).as_posix()
        if path.stem in ("utils", "util", "helpers"):
            offences.append(f"src/{PACKAGE}/{file}:1: one place per idea: name the file for its idea")
        offences += [f"{found}: {why}" for found in imports_of(path, file) for why in complaints(file, found)]
    print("\n".join(offences) if offences else f"import rules: {len(files)} files, none broken")
    return 1 if offences else 0


if __name__ == "__main__":
    sys.exit(main())
