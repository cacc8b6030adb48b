"""Every decode and append kernel that plans choose for the named cases and for what the benchmark times: for the compile gate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from tessera import jit
from tessera.backends.hopper.append_launch import FEW_TOKENS, append_config, append_spec
from tessera.backends.hopper.decode_launch import kernel_spec
from tessera.backends.hopper.decode_plan import decode_plan, why_not
from tessera.backends.hopper.launch import ELEMENTS
from tessera.device import Device
from tessera.problem import Layout
from tessera.serving.cases import CACHE_CASES
from tessera.serving.operands import CacheRequest, describe
from tessera.serving.problem import CacheProblem

LONG = 1 << 17


def variants() -> tuple[jit.Variant, ...]:
    """The variants, each once, by names such as "decode bf16 8x64 d64+64 3 stages boxes of 16 16-bit stream_k paged"."""
    found: dict[str, jit.Variant] = {}
    for problem in _problems():
        if not why_not(problem):
            for variant in _of(problem):
                found.setdefault(variant.spec.text, variant)
    return tuple(found.values())


def _of(problem: CacheProblem) -> Iterator[jit.Variant]:
    element, config = ELEMENTS[problem.dtype], decode_plan(problem, Device.named("h200")).config
    dims = "/".join("+".join(map(str, parts)) for parts in dict.fromkeys((config.dims, config.dims_v)))
    features = " ".join((f"boxes of {config.box}", config.storage.value, *(feature.value for feature in config.features)))
    name = f"decode {element} {config.rows}x{config.keys} d{dims} {config.stages} stages {features}"
    yield jit.Variant(name, kernel_spec(config, problem.dtype), wgmma=False)
    if problem.append is not None:
        if problem.layout is Layout.VARLEN:  # as of many new rows, whose threads do more heads than one
            problem = replace(problem, shape=replace(problem.shape, seqlen_q=FEW_TOKENS + 1))
        spec = append_spec(problem)
        rows = dict(spec.arguments)["k_ptr"].element
        yield jit.Variant(f"append {element} {rows} rows {append_config(problem)}", spec, wgmma=False, setmaxnreg=False)


def _problems() -> Iterator[CacheProblem]:
    for dim in (64, 128, 192, 256):
        yield describe(_request(1, dim))
        yield describe(_request(16, dim))
    for page in (0, 64):  # a share's last tiles under the next kernel's beginning
        yield describe(_request(16, 128, page, rows=8192))
    for rows in (LONG, 512):  # more items than SMs
        yield describe(_request(64, 128, rows=rows))
    wide = _request(16, 128)
    yield describe(wide._replace(left=500))
    for page in (8, 16, 64):
        yield describe(_request(16, 128, page))
    scales = torch.empty(16 * LONG // 64, 1, 8, device="meta")
    yield describe(_request(16, 128, 64, torch.float8_e4m3fn)._replace(k_descale=scales, v_descale=scales))
    for number, case in enumerate(CACHE_CASES.values()):
        request = case.request("cpu", torch.bfloat16)
        yield describe(request)
        # The schedules differ in how work is found, not in the loop: every fifth case shows the other one too.
        if number % 5 == 0 and request.num_splits is None and request.schedule is None:
            yield describe(request._replace(schedule="stream_k"))
    yield describe(CACHE_CASES["one query"].request("cpu", torch.float16))


def _request(batch: int, dim: int, page: int = 0, dtype: torch.dtype = torch.bfloat16, rows: int = LONG) -> CacheRequest:
    """A step of a server, by default with long sequences: its tensors are on meta."""
    places = (batch, rows) if not page else (batch * rows // page, page)
    cache = torch.empty(*places, 8, dim, dtype=dtype, device="meta")
    q = torch.empty(batch, 1, 32, dim, dtype=torch.bfloat16, device="meta")
    table = torch.empty(batch, rows // page, dtype=torch.int32, device="meta") if page else None
    return CacheRequest(q, cache, cache, torch.empty(batch, dtype=torch.int32, device="meta"), page_table=table)
