"""Compiles what the collected cases will run before the first of them, one process a core: one by one it is most of the time."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from itertools import product

import pytest
import torch

import tessera
from tessera import dispatch
from tessera.cases import Case
from tessera.device import Device
from tessera.errors import Unsupported
from tessera.operands import describe
from tessera.plan import Plan

FEW = 20
"""Cases that are not worth a pool of processes."""


def pytest_collection_finish(session: pytest.Session) -> None:
    found = {_planned(case, dtype) for case, dtype in product(_cases(session), (torch.bfloat16, torch.float16))} - {None}
    if len(found) <= FEW or not torch.cuda.is_available():
        return
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        compiled = sum(pool.map(tessera.warmup, ([plan] for plan in found)))
    print(f"compiled {compiled} kernels for {len(found)} plans")


def _cases(session: pytest.Session) -> dict[Case, None]:
    values = (value for item in session.items if isinstance(item, pytest.Function) and hasattr(item, "callspec")
              for value in item.callspec.params.values())  # fmt: skip
    return dict.fromkeys(value for value in values if isinstance(value, Case))


def _planned(case: Case, dtype: torch.dtype) -> Plan | None:
    """The plan with gradients: its forward is the one without."""
    request = case.request("meta", dtype, requires_grad=True)
    try:
        return dispatch.select(describe(request, "cuda"), Device.of(torch.device("cuda", 0)), "hopper")
    except Unsupported:
        return None
