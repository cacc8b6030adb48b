"""Lines per file, the longest functions, and what is over the house's sizes: `python scripts/size_report.py`.

The limits are for reading, not for failing: what is over one is marked and is to be split by idea. Exit code 0.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILE_LIMIT, KERNEL_FILE_LIMIT = 450, 600
FUNCTION_LIMIT, WARP_ROLE_LIMIT = 60, 80
LONGEST = 12


@dataclass(frozen=True)
class Function:
    """A function's length in lines, from its first decorator to its end; `jitted` for device code."""

    file: str
    line: int
    name: str
    lines: int
    jitted: bool

    @property
    def limit(self) -> int:
        return WARP_ROLE_LIMIT if self.jitted else FUNCTION_LIMIT


def functions(path: Path, file: str) -> Iterator[Function]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            jitted = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
            yield Function(file, first, node.name, (node.end_lineno or first) - first + 1, jitted)


def code_lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def mark(lines: int, limit: int) -> str:
    return f"  over {limit}" if lines > limit else ""


def report() -> Iterator[str]:
    """The report, line by line."""
    sources = sorted((ROOT / "src").rglob("*.py"))
    found: list[Function] = []
    yield "lines  file"
    for path in sources:
        file = path.relative_to(ROOT / "src").as_posix()
        own = list(functions(path, file))
        found += own
        limit = KERNEL_FILE_LIMIT if any(function.jitted for function in own) else FILE_LIMIT
        lines = code_lines(path)
        yield f"{lines:5}  {file}{mark(lines, limit)}"
    found.sort(key=lambda function: -function.lines)
    yield "\nlines  longest functions"
    over = sum(function.lines > function.limit for function in found)
    for function in found[: max(LONGEST, over)]:
        place = f"{function.file}:{function.line} {function.name}"
        yield f"{function.lines:5}  {place}{mark(function.lines, function.limit)}"
    middle = sorted(function.lines for function in found)[len(found) // 2]
    yield f"\n{len(found)} functions, the median of {middle} lines; {over} over their limit"
    yield f"{total(sources):6,} lines in src, {total((ROOT / 'tests').rglob('*.py')):,} in tests, {total(documents()):,} in docs"


def documents() -> Iterator[Path]:
    yield from ROOT.glob("*.md")
    yield from (ROOT / "docs").rglob("*.md")


def total(paths: Iterable[Path]) -> int:
    return sum(code_lines(path) for path in paths)


if __name__ == "__main__":
    print("\n".join(report()))
