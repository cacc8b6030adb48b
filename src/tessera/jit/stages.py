"""Where the time of compiling and loading goes: seconds of each stage, one after another in a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

IMPORTS, FRONT_END, PASSES, PTX, PTXAS, LOADING = "imports", "front end", "passes", "PTX", "ptxas", "loading"

_of_thread = threading.local()


@contextmanager
def stage(name: str) -> Iterator[None]:
    """What happens inside is added to the stage's seconds. Stages do not contain each other."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds = vars(_of_thread)
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


def taken() -> dict[str, float]:
    """Seconds of each stage that this thread has been in, in their order."""
    return dict(vars(_of_thread))
