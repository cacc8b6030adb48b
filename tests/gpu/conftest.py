"""Compiles what the collected cases will run before the first of them, one process a core: one by one it is most of the time.

With pytest-xdist too: whoever starts the workers collects once before, and they find the kernels on disk.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from itertools import product

import pytest
import torch
from compile_ahead import compile_all, kernels
from serving_simulation import Setting

from tessera.cases import Case
from tessera.device import Device
from tessera.serving.cases import CACHE_CASES, CacheCase

DTYPES = (torch.bfloat16, torch.float16)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """In the process that is going to start workers: a run of its own that collects, and so compiles."""
    config = session.config
    if hasattr(config, "workerinput") or not getattr(config.option, "numprocesses", None) or config.option.collectonly:
        return
    command = [sys.executable, "-m", "pytest", *config.invocation_params.args, "--collect-only", "-q", "-n0"]
    done = subprocess.run(command, capture_output=True, text=True)
    print("".join(f"{line}\n" for line in done.stdout.splitlines() if line.startswith("compiled")), end="")


def pytest_collection_finish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput") or not torch.cuda.is_available():
        return
    device = Device.of(torch.device("cuda", 0))
    requests = (
        case.request("meta", dtype, requires_grad=True) if isinstance(case, Case) else case.request("meta", dtype)
        for case, dtype in _parameters(session)
    )
    compile_all(spec for request in requests for spec in kernels(request, device))


def _parameters(session: pytest.Session) -> dict[tuple[Case | CacheCase, torch.dtype], None]:
    """The cases that the collected tests are parametrised by, by name, in itself or as the setting of a random server."""
    tests = (item for item in session.items if isinstance(item, pytest.Function) and hasattr(item, "callspec"))
    found: dict[tuple[Case | CacheCase, torch.dtype], None] = {}
    for parameters in (test.callspec.params for test in tests):
        dtype = parameters.get("dtype", torch.bfloat16)
        for value in parameters.values():
            found |= dict.fromkeys(_of_parameter(value, dtype))
    return found


def _of_parameter(value: object, dtype: torch.dtype) -> Iterator[tuple[Case | CacheCase, torch.dtype]]:
    if isinstance(value, Case):
        yield from product((value,), DTYPES)
    elif isinstance(value, str) and value in CACHE_CASES:
        yield CACHE_CASES[value], dtype
    elif isinstance(value, CacheCase):
        yield value, dtype
    elif isinstance(value, Setting):
        yield from product(value.cases(), (dtype,))
