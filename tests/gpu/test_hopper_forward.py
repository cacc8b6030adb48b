"""The Hopper forward against the oracle: every case it can run, poisoned memory, many tiles a program, repeats bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from planned import planned
from poison import NAN, poison_free_memory
from references import far_below, rising
from torch import Tensor

from tessera import dropout_mask, reference
from tessera.backends.hopper import BACKEND
from tessera.backends.hopper.config import Overlap
from tessera.backends.hopper.launch import ForwardLaunch
from tessera.backends.hopper.plan import forward_family
from tessera.cases import CASES, Case
from tessera.device import Device
from tessera.operands import TENSORS, Request, bind
from tessera.verify import compare

if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

LENGTHS = (100, 1, 700, 33, 512, 0, 257, 900, 64, 31, 5, 1000)
MANY = {"batch": 3, "seqlen_q": 1100, "seqlen_k": 1100, "heads_q": 24, "heads_kv": 8}
PACKED = {"lengths_q": LENGTHS, "lengths_k": LENGTHS, "heads_q": 16, "heads_kv": 4}
MANY_TILES = (
    *(Case(f"d{d}", head_dim=d, **MANY) for d in (64, 72, 96, 128, 192, 256)),
    *(Case(f"d{d} causal", head_dim=d, causal=True, **MANY) for d in (64, 72, 96, 128, 192, 256)),
    Case("d192 v128 causal", head_dim=192, head_dim_v=128, causal=True, **MANY),
    *(Case(f"d{d} v{v}", head_dim=d, head_dim_v=v, causal=d > v, **MANY) for d, v in ((24, 8), (40, 256), (136, 200), (256, 64))),
    *(
        Case(f"d{d} v{v} causal, not aligned", head_dim=d, head_dim_v=v, causal=True, batch=1, seqlen_q=160, seqlen_k=190)
        for d, v in ((96, 64), (64, 96), (160, 128), (128, 96))
    ),
    *(Case(f"d{d} long", head_dim=d, batch=1, seqlen_q=700, seqlen_k=3000, heads_q=36, heads_kv=12) for d in (64, 72, 96, 128)),
    Case("d96 long causal", head_dim=96, batch=1, seqlen_q=700, seqlen_k=3000, heads_q=36, heads_kv=12, causal=True),
    Case("window", head_dim=128, window=(200, 0), **MANY),
    Case("window d64", window=(130, 60), **MANY),
    *(Case(f"wide window, {k} keys", head_dim=128, window=(600, 0), **MANY | {"seqlen_k": k}) for k in (1100, 1130, 1164)),
    *(
        Case(f"d{dim}, {rows} rows, window {window}", head_dim=dim, window=window, **MANY | {"seqlen_q": rows, "seqlen_k": keys})
        for dim in (64, 128)
        for window, rows, keys in (((300, 0), 3000, 3000), ((257, 70), 2500, 2611), ((128, 0), 2900, 1300), ((500, 0), 900, 2900))
    ),
    Case("causal, many keys", head_dim=128, causal=True, batch=1, seqlen_q=4300, seqlen_k=5000, heads_q=6, heads_kv=2),
    Case("window of 1024", head_dim=128, window=(1024, 0), batch=1, seqlen_q=4300, seqlen_k=4300, heads_q=12, heads_kv=4),
    Case("wide window d64", window=(2300, 0), batch=1, seqlen_q=900, seqlen_k=3200, heads_q=36, heads_kv=12),
    Case("varlen causal", causal=True, head_dim=128, **PACKED),
    Case("varlen", **PACKED),
    Case("varlen, not all used", used_k=tuple(length // 2 for length in LENGTHS), **PACKED),
    Case("documents", head_dim=128, documents=(300, 500, 1, 299), causal=True, **MANY),
    Case("padding", key_end=(1000, 0, 1100), key_start=(3, 0, 500), query_end=(900, 1100, 1), **MANY),
    Case("sinks, softcap", sinks=True, softcap=20.0, causal=True, **MANY),
    *(Case(f"d{d} dropout", head_dim=d, dropout_p=0.2, **MANY) for d in (64, 128, 192, 256)),
    *(Case(f"d{d} dropout causal", head_dim=d, dropout_p=0.2, causal=True, **MANY) for d in (64, 256)),
    Case("d256 dropout window", head_dim=256, dropout_p=0.2, window=(300, 20), **MANY),
    Case("varlen, dropout", batch=len(LENGTHS), dropout_p=0.2, causal=True, head_dim=256, **PACKED),
    *(Case(f"d{d} alibi causal", head_dim=d, alibi="batch", causal=True, **MANY) for d in (96, 128)),
    *(Case(f"d{d} bias", head_dim=d, bias=(1, 24, 1100, 1100), **MANY) for d in (128, 192)),
    *(
        Case(f"d{d} all modifiers", head_dim=d, bias=(1, 24, 1100, 1100), alibi="head", dropout_p=0.2, causal=True, **MANY)
        for d in (64, 128, 256)
    ),
    Case("padding left, dropout, bias", key_start=(3, 0, 500), bias=(3, 24, 1100, 1100), dropout_p=0.2, causal=True, **MANY),
    Case("varlen, alibi, dropout", batch=len(LENGTHS), alibi="batch", dropout_p=0.2, causal=True, head_dim=128, **PACKED),
    Case("long alibi", alibi="head", batch=1, seqlen_q=8192, seqlen_k=8192, heads_q=2, heads_kv=2, head_dim=128, causal=True),
    Case("scale below 0", softmax_scale=-0.2, causal=True, **MANY),
)
"""Problems of more tiles than a GPU has multiprocessors: programs go from tile to tile, rings from lap to lap."""

DTYPES = (torch.bfloat16, torch.float16)


def run(request: Request) -> tuple[Tensor, Tensor]:
    _, operands, plan = planned(request)
    poison_free_memory()
    return BACKEND.prepare(plan).forward(operands)


def check(request: Request, clean: Request | None = None) -> None:
    """The tolerance rule; `clean` is the request whose oracle counts, where `request` holds NaN in what must not be read."""
    out, lse = run(request)
    problem, operands = bind(clean or request)
    refs = reference.attention(problem, operands)
    eagers = reference.attention(problem, operands, request.q.dtype)
    for name, result, ref, eager in zip(("out", "lse"), (out, lse), refs, eagers, strict=True):
        compared = compare(name, result, ref, eager)
        assert compared.ok, str(compared)


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_cases(case: Case, dtype: torch.dtype) -> None:
    check(case.request("cuda", dtype))


@pytest.mark.parametrize("case", MANY_TILES, ids=lambda case: case.name)
def test_many_tiles(case: Case) -> None:
    check(case.request("cuda", torch.bfloat16))


LONG = {"batch": 1, "seqlen_q": 4300, "seqlen_k": 10600, "heads_q": 6, "heads_kv": 2}
"""Rows and keys enough, below a diagonal too."""


@pytest.mark.parametrize("case", [
    Case("d192 full", head_dim=192, **LONG),
    *(Case(f"d{d} causal", head_dim=d, causal=True, **LONG) for d in (192, 256)),
    Case("d192 v128 full", head_dim=192, head_dim_v=128, **LONG),
    Case("d128, group of 2, softcap, sinks", head_dim=128, causal=True, softcap=20.0, sinks=True, **LONG | {"heads_kv": 3}),
    Case("d192, group of 6", head_dim=192, causal=True, **LONG | {"heads_kv": 1}),
], ids=lambda case: case.name)  # fmt: skip
def test_programs_in_pairs(case: Case) -> None:
    """Two programs that load for each other give what each gives by itself, bit for bit."""
    request = case.request("cuda", torch.bfloat16)
    check(request)
    problem, operands, plan = planned(request)
    config = plan.forward.config
    assert config.pairing is not None
    alone = ForwardLaunch(problem, replace(config, pairing=None), plan.device.multiprocessors)
    for paired, single in zip(BACKEND.prepare(plan).forward(operands), alone(operands), strict=True):
        assert torch.equal(paired, single)


@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_nan_in_padding_stays_there(dim: int, causal: bool) -> None:
    case = Case("padding", batch=3, seqlen_q=300, seqlen_k=400, head_dim=dim, causal=causal,
                key_start=(0, 70, 130), key_end=(400, 333, 131), query_end=(300, 100, 0))  # fmt: skip
    clean = case.request("cuda", torch.bfloat16)
    q, k, v = clean.q.clone(), clean.k.clone(), clean.v.clone()
    for b in range(3):
        q[b, case.query_end[b] :] = NAN
        for x in (k, v):
            x[b, : case.key_start[b]] = NAN
            x[b, case.key_end[b] :] = NAN
    check(clean._replace(q=q, k=k, v=v), clean)


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
def test_references(dim: int, dtype: torch.dtype) -> None:
    for window in ((None, None), (None, 0), (300, 0)):
        check(rising(dim, window, "cuda", dtype))
    check(far_below(dim, "cuda", dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
@pytest.mark.parametrize("dim", [64, 128, 192, 256])
def test_references_under_dropout(dim: int, dtype: torch.dtype) -> None:
    """P that was taken anew is dropped too."""
    for window in ((None, None), (None, 0), (300, 0)):
        check(rising(dim, window, "cuda", dtype, dropout_p=0.4))


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
def test_references_without_overlap(dtype: torch.dtype) -> None:
    """Where warps vote on their threads' maxima."""
    request = rising(96, (None, None), "cuda", dtype)
    problem, operands = bind(request)
    config = forward_family(problem)[-1]
    assert config.overlap is Overlap.NONE
    results = ForwardLaunch(problem, config, Device.of(request.q.device).multiprocessors)(operands)
    refs, eagers = reference.attention(problem, operands), reference.attention(problem, operands, dtype)
    for name, result, ref, eager in zip(("out", "lse"), results, refs, eagers, strict=True):
        compared = compare(name, result, ref, eager)
        assert compared.ok, str(compared)


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_nan_past_used_lengths_stays_there(dim: int) -> None:
    lengths, used = (90, 150, 300), (60, 0, 257)
    case = Case("used", lengths_q=lengths, lengths_k=lengths, used_k=used, head_dim=dim, causal=True)
    clean = case.request("cuda", torch.bfloat16)
    k, v = clean.k.clone(), clean.v.clone()
    start = 0
    for length, count in zip(lengths, used, strict=True):
        for x in (k, v):
            x[start + count : start + length] = NAN
        start += length
    check(clean._replace(k=k, v=v), clean)


def test_used_queries() -> None:
    """Rows past seqused_q, and rows of no sequence, are 0 and -inf, and the diagonal goes by the used lengths."""
    lengths = (90, 150, 300)
    case = Case("used q", lengths_q=lengths, lengths_k=lengths, head_dim=128, causal=True, sinks=True)
    request = case.request("cuda", torch.bfloat16)
    used = torch.tensor((60, 0, 257), dtype=torch.int32, device="cuda")
    offsets = torch.tensor((0, 90, 240, 520), dtype=torch.int32, device="cuda")
    check(request._replace(seqused_q=used, cu_seqlens_q=offsets))


@pytest.mark.parametrize("case", [
    Case("d64", head_dim=64, seqlen_q=333, seqlen_k=777, heads_q=40, heads_kv=10, causal=True),
    Case("d128", head_dim=128, seqlen_q=1111, seqlen_k=1111, heads_q=20, heads_kv=5),
    Case("d192", head_dim=192, seqlen_q=257, seqlen_k=513, heads_q=40, heads_kv=8, causal=True),
    Case("d128 pairs", head_dim=128, seqlen_q=4300, seqlen_k=10600, heads_q=8, heads_kv=8, causal=True),
    Case("d192 pairs", head_dim=192, seqlen_q=4300, seqlen_k=4300, heads_q=8, heads_kv=4),
    Case("d256 window", head_dim=256, seqlen_q=777, seqlen_k=777, heads_q=25, heads_kv=25, window=(100, 0)),
    Case("varlen", lengths_q=LENGTHS, lengths_k=LENGTHS, head_dim=96, heads_q=16, heads_kv=4, causal=True),
], ids=lambda case: case.name)  # fmt: skip
def test_repeats_bit_for_bit(case: Case) -> None:
    _, operands, plan = planned(case.request("cuda", torch.bfloat16))
    runner = BACKEND.prepare(plan)
    first = runner.forward(operands)
    differs = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        for a, b in zip(first, runner.forward(operands), strict=True):
            differs += (a != b).sum()
    assert differs.item() == 0


@pytest.mark.parametrize("case", MANY_TILES, ids=lambda case: case.name)
def test_out_without_lse(case: Case) -> None:
    """A call that wants no lse writes none, and the same out, also of copies that TMA can't reach."""
    request = case.request("cuda", torch.bfloat16)
    _, operands, plan = planned(request)
    runner = BACKEND.prepare(plan)
    assert runner.shortcut(operands[3:]) is None, "nothing has been launched"
    out, _ = runner.forward(operands)
    shortcut = runner.shortcut(operands[3:])
    offsets = tuple(x for x in request[3:5] if x is not None)
    if case.dropout_p or any(x is not None for x in request[5:TENSORS]):
        assert shortcut is None
        return
    assert shortcut is not None
    inputs = operands[:3]
    assert torch.equal(shortcut(*inputs, *offsets), out)
    misaligned = [torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(x.shape).copy_(x) for x in inputs]
    assert torch.equal(shortcut(*misaligned, *offsets), out)


def test_two_streams_at_once() -> None:
    """Launches that overlap have counters of their own."""
    requests = [Case("a", head_dim=128, seqlen_q=900, seqlen_k=900, heads_q=h, heads_kv=h, causal=True) for h in (20, 33)]
    work = []
    for case in requests:
        _, operands, plan = planned(case.request("cuda", torch.bfloat16))
        runner = BACKEND.prepare(plan)
        work.append((runner, operands, runner.forward(operands)[0], torch.cuda.Stream()))
    torch.cuda.synchronize()
    outs: list[list[Tensor]] = [[], []]
    for _ in range(50):
        for kept, (runner, operands, _, stream) in zip(outs, work, strict=True):
            with torch.cuda.stream(stream):
                kept.append(runner.forward(operands)[0])
    torch.cuda.synchronize()
    for kept, (_, _, expected, _) in zip(outs, work, strict=True):
        assert all(torch.equal(out, expected) for out in kept)


def test_rows_that_tma_cannot_read_are_copied() -> None:
    """Rows of 4 k + ... elements: a fused buffer whose slices are 8-byte aligned only."""
    case = Case("unaligned", head_dim=64, seqlen_q=150, seqlen_k=150)
    request = case.request("cuda", torch.bfloat16)

    def unaligned(x: Tensor) -> Tensor:
        wide = torch.zeros(*x.shape[:-1], x.shape[-1] + 4, dtype=x.dtype, device=x.device)
        wide[..., 4:] = x
        return wide[..., 4:]

    check(request._replace(q=unaligned(request.q), k=unaligned(request.k), v=unaligned(request.v)))


@pytest.mark.parametrize("dim", [64, 128, 192, 256])
@pytest.mark.parametrize("dropout_p", [0.002, 0.5, 0.99])
def test_mask_is_dropouts_own_bit_for_bit(dim: int, dropout_p: float) -> None:
    """With q = 0 every P is 1/Sk, and with a part of the identity for V out shows which are kept."""
    seqlen_q, seqlen_k, heads = 300, 3 * dim + 20, 3
    q, k = (torch.zeros(2, n, heads, dim, dtype=torch.bfloat16, device="cuda") for n in (seqlen_q, seqlen_k))
    expected = dropout_mask(42 << 33, 2, heads, seqlen_q, seqlen_k, dropout_p, "cuda").transpose(1, 2)
    for first in range(0, seqlen_k, dim):
        v = torch.eye(seqlen_k, device="cuda", dtype=torch.bfloat16)[:, first : first + dim]
        columns = v.shape[1]
        v = torch.nn.functional.pad(v, (0, dim - columns))[None, :, None].expand(2, -1, heads, -1).contiguous()
        out, _ = run(Request(q, k, v, dropout_p=dropout_p, seed=42 << 33))
        assert torch.equal(out[..., :columns] != 0, expected[..., first : first + columns])


def test_packed_sequences_draw_by_their_numbers() -> None:
    lengths = (20, 0, 64, 35)
    offsets = torch.tensor((0, *lengths), device="cuda").cumsum(0).int()
    q = torch.zeros(sum(lengths), 2, 64, dtype=torch.bfloat16, device="cuda")
    v = torch.cat([torch.eye(64, device="cuda")[:n] for n in lengths])[:, None].expand(-1, 2, -1).to(torch.bfloat16).contiguous()
    out, _ = run(Request(q, q, v, offsets, offsets, dropout_p=0.5, seed=3))
    drawn = dropout_mask(3, len(lengths), 2, 64, 64, 0.5, "cuda")
    for number, (start, n) in enumerate(zip(offsets.tolist(), lengths, strict=False)):
        assert torch.equal(out[start : start + n, :, :n] != 0, drawn[number, :, :n, :n].transpose(0, 1))


@pytest.mark.parametrize("shape", [(3, 8, 300, 333), (3, 1, 300, 333), (1, 1, 1, 333), (1, 8, 300, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_biases(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Every form, in q's dtype and float32, rows that TMA could not read, -inf and finfo.min in it."""
    case = Case("bias", batch=3, seqlen_q=300, seqlen_k=333, heads_q=8, heads_kv=2, head_dim=128, bias=shape)
    request = case.request("cuda", torch.bfloat16)
    bias = request.bias.to(dtype)
    bias[..., 7:9] = torch.finfo(dtype).min
    bias[..., 2:5] = float("-inf")
    check(request._replace(bias=bias))
    if shape[3] > 1:
        lowest = torch.full_like(bias, torch.finfo(dtype).min)
        out, lse = run(request._replace(bias=lowest))
        uniform = request.v.float().mean(dim=1).repeat_interleave(4, dim=1)[:, None]
        torch.testing.assert_close(out.float(), uniform.expand(out.shape), atol=5e-3, rtol=5e-2)
        assert lse.isfinite().all()


@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    """The last head of the last batch entry, far past 2^31 elements."""
    shape = (9, 16384, 128, 128)
    q, k, v = (torch.empty(shape, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    for x in (q, k, v):
        x[-1, :, -1].normal_()
        x[-1, :, :-1] = 0
    q[:-1], k[:-1], v[:-1] = 0, 0, 0
    out, lse = run(Request(q, k, v, left=512, right=0))
    last = [x[-1:, :, -1:].contiguous() for x in (q, k, v)]
    small, small_lse = run(Request(*last, left=512, right=0))
    assert torch.equal(out[-1:, :, -1:], small)
    assert torch.equal(lse[-1:, -1:], small_lse)
