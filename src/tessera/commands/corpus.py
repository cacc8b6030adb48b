"""Real text that every Python carries: its licence, its reference (the topics of `help()`), its library's docstrings."""

from __future__ import annotations

import inspect
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

_LONGEST_WORDS = 90
_SHORTEST_WORDS = 8

_MODULES = (
    "bisect", "calendar", "collections", "contextlib", "copy", "csv", "datetime", "decimal", "difflib", "fnmatch", "functools",
    "glob", "gzip", "hashlib", "heapq", "itertools", "json", "linecache", "math", "pickle", "queue", "random", "re", "secrets",
    "shelve", "shutil", "statistics", "string", "struct", "subprocess", "tempfile", "textwrap", "threading", "timeit",
    "urllib.parse", "uuid", "warnings", "weakref", "zipfile",
)  # fmt: skip


@dataclass(frozen=True)
class Passage:
    """A few sentences, and where a person finds them."""

    source: str
    text: str


def passages(most: int) -> list[Passage]:
    """At most `most` passages: evenly drawn from the licence, the docstrings and the reference; the same on every run."""
    licence = _evenly(list(_licence()), most // 16)
    library = _evenly(list(_docstrings()), most * 5 // 8)
    return licence + library + _evenly(list(_reference()), most - len(licence) - len(library))


def _evenly(items: list[Passage], count: int) -> list[Passage]:
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def _licence() -> Iterator[Passage]:
    """Python's licence, from where `license()` looks for it; nothing where a distribution left it out."""
    library = Path(sysconfig.get_path("stdlib"))
    for folder in (library.parent, library):
        for name in ("LICENSE.txt", "LICENSE"):
            if (folder / name).is_file():
                text = (folder / name).read_text(errors="replace")
                yield from (Passage("license()", piece) for piece in _pieces(text))
                return


def _reference() -> Iterator[Passage]:
    topics = import_module("pydoc_data.topics").topics
    for topic in sorted(topics):
        yield from (Passage(f'help("{topic}")', piece) for piece in _pieces(topics[topic]))


def _docstrings() -> Iterator[Passage]:
    seen = set()
    for name in _MODULES:
        try:
            module = import_module(name)
        except ImportError:  # an interpreter built without it
            continue
        for member, value in sorted(vars(module).items()):
            if member.startswith("_") or not (inspect.isroutine(value) or inspect.isclass(value)):
                continue
            text = inspect.getdoc(value) or ""
            first = next(iter(_pieces(text)), None)
            if first is not None and text not in seen:
                seen.add(text)
                yield Passage(f"{name}.{member}", f"{name}.{member}: {first}")


def _pieces(text: str) -> Iterator[str]:
    """Paragraphs put together up to the longest length; those that hold too few words are left out."""
    words: list[str] = []
    for paragraph in [*text.split("\n\n"), None]:
        more = [] if paragraph is None else paragraph.split()
        if words and (paragraph is None or len(words) + len(more) > _LONGEST_WORDS):
            if len(words) >= _SHORTEST_WORDS:
                yield " ".join(words[:_LONGEST_WORDS])
            words = []
        words += more
