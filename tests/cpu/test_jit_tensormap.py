"""Tensor maps: what TMA takes, the strides of dimensions that mean nothing, and what is remembered. The driver is a stand-in."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import pytest
import torch

from tessera import Unsupported, jit
from tessera.jit import driver, tensormap
from tessera.jit.binary import Descriptor
from tessera.jit.tensormap import TileEncoder, canonical_strides

DESCRIPTOR = Descriptor("bf16", (1, 64, 64), 3)


class Cuda:
    """Encodes a "map" that holds the address and what it was told, and counts the calls."""

    def __init__(self) -> None:
        self.encoded: list[dict[str, Any]] = []
        self.moved = 0
        self.statuses: list[int] = []

    def cuTensorMapEncodeTiled(
        self, where, element, rank, address, sizes, strides, box, steps, interleave, swizzle, promotion, fill
    ):
        told = {"element": element, "rank": rank, "sizes": list(sizes), "strides": list(strides)[: rank - 1], "box": list(box)}
        self.encoded.append(told | {"steps": list(steps), "swizzle": swizzle, "fill": fill})
        ctypes.memmove(where, b"\xab" * 128, 128)
        return 0

    def cuTensorMapReplaceAddress(self, where, address):
        if self.statuses:
            return self.statuses.pop(0)
        self.moved += 1
        ctypes.memmove(where, (address.value or 0).to_bytes(8, "little"), 8)
        return 0


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    fake = Cuda()
    monkeypatch.setattr(driver, "library", lambda: fake)
    return fake


def reasons(tensor: torch.Tensor, address: int = 4096) -> list[str]:
    return [one.argument for one in jit.why_not_tma(address, tensor.shape, tensor.stride(), tensor.element_size())]


def test_tensors_that_tma_takes():
    qkv = torch.empty(2, 100, 3, 4, 64, dtype=torch.bfloat16)
    assert reasons(qkv[:, :, 1]) == []
    assert reasons(qkv[:, :, 1].transpose(1, 2)) == []
    assert reasons(torch.empty(1, 64, dtype=torch.bfloat16).expand(50, 64)) == []
    assert reasons(torch.empty(900, dtype=torch.bfloat16).as_strided((1, 5, 1, 8), (7, 8, 3, 1))) == [], "sizes of 1"


def test_reasons_why_not():
    assert reasons(torch.empty(4, 64), address=4104) == ["data_ptr"]
    assert reasons(torch.empty(4, 64, 2)[:, :, 0]) == ["stride"]
    assert reasons(torch.empty(4, 12, dtype=torch.bfloat16)) == ["stride"], "24 bytes a row"
    assert reasons(torch.empty(0, 64)) == ["shape"]
    assert reasons(torch.empty(())) == ["shape"]
    assert reasons(torch.empty(1, 1, 1, 1, 1, 8)) == ["shape"]
    assert len(jit.why_not_tma(4097, (4, 12), (13, 2), 2)) == 3, "all reasons, not the first"
    assert jit.why_not_tma(0, (2, 8), (2**40, 1), 2)[0].argument == "stride"


def test_strides_of_single_dimensions_are_made_valid():
    assert canonical_strides((1, 5, 1, 8), (7, 8, 3, 1), 2) == (40, 8, 8, 1)
    assert canonical_strides((1, 100), (13, 1), 2) == (104, 1), "rounded up to 16 bytes"
    assert canonical_strides((2, 3, 64), (0, 64, 1), 2) == (0, 64, 1)
    assert canonical_strides((4, 1), (8, 5), 2) == (8, 1)


def test_the_driver_is_told_dimensions_innermost_first_and_strides_in_bytes(cuda):
    TileEncoder(DESCRIPTOR)(4096, (2, 300, 80), (48000, 160, 1))
    (told,) = cuda.encoded
    assert told["sizes"] == [80, 300, 2]
    assert told["strides"] == [320, 96000]
    assert told["box"] == [64, 64, 1]
    assert told["steps"] == [1, 1, 1]
    assert (told["rank"], told["element"], told["swizzle"], told["fill"]) == (3, 9, 3, 0)


def test_an_argument_is_map_sizes_strides(cuda):
    argument = TileEncoder(DESCRIPTOR)(0x70000, (2, 300, 80), (48000, 160, 1))
    assert len(argument) == 168
    assert int.from_bytes(argument[:8], "little") == 0x70000
    assert argument[8:128] == b"\xab" * 120
    assert memoryview(argument[128:140]).cast("i").tolist() == [2, 300, 80]
    assert memoryview(argument[144:168]).cast("q").tolist() == [48000, 160, 1]


def test_repeated_tensors_cost_a_look_up_and_new_addresses_a_copy(cuda):
    encode = TileEncoder(DESCRIPTOR)
    first = encode(4096, (2, 300, 80), (48000, 160, 1))
    assert encode(4096, (2, 300, 80), (48000, 160, 1)) is first
    assert encode(4096, torch.Size((2, 300, 80)), (48000, 160, 1)) is first
    assert (len(cuda.encoded), cuda.moved) == (1, 1)
    assert encode(8192, (2, 300, 80), (48000, 160, 1)) != first
    assert (len(cuda.encoded), cuda.moved) == (1, 2)
    encode(4096, (2, 301, 80), (48000, 160, 1))
    assert (len(cuda.encoded), cuda.moved) == (2, 3)


def test_a_bound_place_is_a_table_by_address(cuda):
    encode = TileEncoder(DESCRIPTOR)
    place = encode.bind((2, 300, 80), (48000, 160, 1))
    assert place[4096] is encode(4096, (2, 300, 80), (48000, 160, 1))
    assert place is encode.bind(torch.Size((2, 300, 80)), (48000, 160, 1))
    assert dict.get(place, 8192) is None
    assert place[8192] is place[8192]
    assert cuda.moved == 2


def test_the_oldest_are_forgotten_first(cuda, monkeypatch):
    monkeypatch.setattr(tensormap, "ADDRESSES", 2)
    monkeypatch.setattr(tensormap, "PLACES", 2)
    encode = TileEncoder(DESCRIPTOR)
    place = encode.bind((1, 64, 64), (4096, 64, 1))
    for address in (0, 16, 32):
        assert place[address][:8] == address.to_bytes(8, "little")
    assert list(place) == [16, 32]
    for rows in (65, 66):
        encode.bind((1, rows, 64), (4096, 64, 1))
    assert encode.bind((1, 64, 64), (4096, 64, 1)) is not place
    assert place[48][:8] == (48).to_bytes(8, "little"), "who holds a place keeps it"


def test_threads_share_an_encoder(cuda):
    encode = TileEncoder(DESCRIPTOR)
    wrong: list[int] = []

    def work(seed: int) -> None:
        for step in range(500):
            address = 16 * ((step * 7 + seed) % 50)
            if encode(address, (1, 64 + seed % 2, 64), (4096, 64, 1))[:8] != address.to_bytes(8, "little"):
                wrong.append(address)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert (len(cuda.encoded), cuda.moved) == (2, 100)


def test_refusals_carry_their_reasons_and_leave_no_trace(cuda):
    encode = TileEncoder(DESCRIPTOR)
    encode(4096, (1, 64, 64), (4096, 64, 1))
    for address, shape, strides in [(4098, (1, 64, 64), (4096, 64, 1)), (4096, (2, 64, 64), (4095, 64, 1))]:
        for _ in range(2):
            with pytest.raises(Unsupported) as refusal:
                encode(address, shape, strides)
            assert [one.argument for one in refusal.value.refusals["tma"]] in (["data_ptr"], ["stride"])
    with pytest.raises(TypeError, match="rank 3"):
        encode(4096, (64, 64), (64, 1))
    assert len(cuda.encoded) == 1


def test_a_thread_without_a_context_borrows_one(cuda, entered, monkeypatch):
    monkeypatch.setattr(driver, "_retained", [5])
    cuda.statuses = [driver.INVALID_CONTEXT]
    assert len(TileEncoder(DESCRIPTOR)(4096, (1, 64, 64), (4096, 64, 1))) == 168
    assert entered == [5], "never a device that this process does not use"
