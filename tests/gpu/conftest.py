"""Compiles what the collected cases will run before the first of them, one process a core: one by one it is most of the time."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from compile_ahead import compile_all, kernels
from serving_simulation import Setting

from tessera.cases import Case
from tessera.device import Device
from tessera.operands import Request
from tessera.serving.cases import CACHE_CASES, CacheCase
from tessera.serving.operands import CacheRequest


def pytest_collection_finish(session: pytest.Session) -> None:
    """Of pytest-xdist's workers the first to get here compiles, and the others wait for it."""
    if not torch.cuda.is_available():
        return
    worker = getattr(session.config, "workerinput", None)
    if worker is None:
        _compile(session)
        return
    with (Path(tempfile.gettempdir()) / f"tessera-{worker['testrunuid']}").open("a") as done:
        fcntl.flock(done, fcntl.LOCK_EX)
        if not os.fstat(done.fileno()).st_size:
            _compile(session)
            done.write("compiled")


def _compile(session: pytest.Session) -> None:
    device = Device.of(torch.device("cuda", 0))
    tests = (item for item in session.items if isinstance(item, pytest.Function) and hasattr(item, "callspec"))
    compile_all(spec for test in tests for request in _requests(test) for spec in kernels(request, device))


def _requests(test: pytest.Function) -> Iterator[Request | CacheRequest]:
    """Of the cases that a test is parametrised by: by name, in itself or as the setting of a random server."""
    dtype = test.callspec.params.get("dtype", torch.bfloat16)
    for case in (case for value in test.callspec.params.values() for case in _of_parameter(value)):
        if isinstance(case, CacheCase):
            yield case.request("meta", dtype)
        else:
            request = case.request("meta", dtype, requires_grad=test.path.name != "test_hopper_forward.py")
            ordered = test.callspec.params.get("deterministic", "deterministic" in test.originalname)
            yield request._replace(deterministic=ordered)


def _of_parameter(value: object) -> tuple[Case | CacheCase, ...]:
    if isinstance(value, (Case, CacheCase)):
        return (value,)
    if isinstance(value, str) and value in CACHE_CASES:
        return (CACHE_CASES[value],)
    return tuple(value.cases()) if isinstance(value, Setting) else ()
