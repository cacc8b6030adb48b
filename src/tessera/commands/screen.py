"""What the commands share of the terminal: the console, colours, numbers as people read them, endings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.theme import Theme

__all__ = [
    "BAD_INPUT", "UNSUPPORTED",
    "console", "escape", "facts", "fail", "print_json", "progress", "saved", "seconds", "size", "table",
]  # fmt: skip

_Report = TypeVar("_Report")

BAD_INPUT = 2
UNSUPPORTED = 3

_THEME = Theme({"good": "green", "bad": "bold red", "dim": "bright_black", "ours": "bold green", "key": "cyan"})

_NARROWEST = 114
"""Columns that tables are laid out for where the output is no terminal (a file, a pipe)."""


def console() -> Console:
    """Standard output as a rich console."""
    plain = Console(theme=_THEME, highlight=False)
    return plain if plain.is_terminal else Console(theme=_THEME, highlight=False, width=max(plain.width, _NARROWEST))


def errors() -> Console:
    """Standard error as a rich console."""
    return Console(theme=_THEME, highlight=False, stderr=True)


def progress(amount: ProgressColumn | None = None) -> Progress:
    """A bar on standard error, gone when it ends, with the time and how much is done: by default, how many of how many."""
    columns = (TextColumn("{task.description}"), BarColumn(), amount or MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=errors(), transient=True)


def table(*headings: str, title: str | None = None) -> Table:
    """A table with a rule under its head and none elsewhere; a heading that begins with ">" is aligned to the right."""
    made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for heading in headings:
        right = heading.startswith(">")
        made.add_column(heading.removeprefix(">"), justify="right" if right else "left", no_wrap=right)
    return made


def facts(rows: dict[str, str]) -> Table:
    """A table of two columns without a head: what something is called, and what it is."""
    made = table("", "")
    made.show_header = False
    for label, value in rows.items():
        made.add_row(f"[key]{label}[/]", value)
    return made


def print_json(data: Any) -> None:
    """`data` as JSON on standard output, with no colours: for programs."""
    typer.echo(json.dumps(data, indent=1))


def fail(message: str, code: int) -> NoReturn:
    """Print a message on standard error and end with an exit code."""
    errors().print(f"[bad]error[/]  {escape(message)}", soft_wrap=True)
    raise typer.Exit(code)


def saved(read: Callable[[Path], _Report], path: Path) -> _Report:
    """The report that --json wrote, or the end of the command."""
    try:
        return read(path)
    except (OSError, ValueError) as error:
        fail(f"--report={path}: {error}", BAD_INPUT)


def seconds(value: float) -> str:
    """A duration with three digits: 812 us, 16.0 ms, 2.31 s."""
    unit, factor = next(((unit, f) for unit, f in (("s", 1.0), ("ms", 1e-3)) if value >= f), ("us", 1e-6))
    return f"{_three_digits(value / factor)} {unit}"


def size(value: float) -> str:
    """Bytes with three digits: 512 B, 33.6 MB, 8.59 GB."""
    unit, factor = next(((unit, f) for unit, f in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if value >= f), ("B", 1.0))
    return f"{_three_digits(value / factor)} {unit}"


def _three_digits(value: float) -> str:
    return f"{value:,.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f}"
