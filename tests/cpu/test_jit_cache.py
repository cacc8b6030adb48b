"""Binaries on disk: whole or absent, damage seen, one lock between processes, and a place that users choose."""

from __future__ import annotations

import multiprocessing
import os
import time
import warnings
from pathlib import Path

import pytest

from tessera import jit
from tessera.jit import cache
from tessera.jit.binary import Binary, DamagedError, Descriptor, from_bytes, to_bytes

MESSAGES = """ptxas info    : Function properties for entry
    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 168 registers, used 10 barriers"""
BINARY = Binary(
    entry="entry",
    cubin=bytes(range(256)) * 9,
    threads=384,
    shared=197104,
    scratch=0,
    descriptors=(Descriptor("bf16", (1, 1, 64, 64), 3), Descriptor("fp32", (128,), 0)),
    messages=MESSAGES,
    toolchain="triton 3.6.0",
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TESSERA_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TESSERA_CACHE", raising=False)
    return tmp_path


def test_a_binary_survives_the_disk():
    assert from_bytes(to_bytes(BINARY)) == BINARY
    assert cache.write("key", BINARY)
    assert cache.read("key") == BINARY
    assert cache.read("other") is None
    assert (BINARY.registers, BINARY.spills) == (168, (12, 16))


def test_any_changed_or_missing_byte_is_seen():
    whole = to_bytes(BINARY)
    for position in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        with pytest.raises(DamagedError):
            from_bytes(bytes(damaged))
    for end in (0, 5, 40, 60, len(whole) - 1):
        with pytest.raises(DamagedError):
            from_bytes(whole[:end])


def test_a_damaged_entry_is_absent_and_replaced(folder):
    cache.write("key", BINARY)
    (path,) = (folder / cache.LAYOUT).glob("*.bin")
    path.write_bytes(path.read_bytes()[:-3])
    assert cache.read("key") is None
    cache.write("key", BINARY)
    assert cache.read("key") == BINARY


def test_nothing_is_left_beside_the_entries(folder):
    for _ in range(3):
        cache.write("key", BINARY)
    assert [path.name for path in (folder / cache.LAYOUT).iterdir()] == ["key.bin"]


def test_off_means_neither_read_nor_written(folder, monkeypatch):
    cache.write("key", BINARY)
    monkeypatch.setenv("TESSERA_CACHE", "0")
    assert cache.read("key") is None
    assert not cache.write("more", BINARY)
    with cache.lock("key") as held:
        assert not held
    assert "off" in str(jit.cache_info())
    assert len(list((folder / cache.LAYOUT).iterdir())) == 1


def test_a_disk_that_takes_nothing_warns(folder, monkeypatch):
    (folder / "file").write_text("not a folder")
    monkeypatch.setenv("TESSERA_CACHE_DIR", str(folder / "file"))
    with pytest.warns(UserWarning, match="not cached on disk.*TESSERA_CACHE_DIR"):
        assert not cache.write("key", BINARY)
    with warnings.catch_warnings(), cache.lock("key") as held:
        assert not held


def test_a_shared_folder_serves_every_user(folder):
    before = os.umask(0o022)
    try:
        cache.write("key", BINARY)
    finally:
        os.umask(before)
    assert (folder / cache.LAYOUT / "key.bin").stat().st_mode & 0o777 == 0o644


def test_no_home_is_no_cache(monkeypatch):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("TESSERA_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    assert cache.read("key") is None
    with pytest.warns(UserWarning, match="home directory"):
        assert not cache.write("key", BINARY)


def test_where_it_lies(monkeypatch, tmp_path):
    monkeypatch.delenv("TESSERA_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_root() == tmp_path / "xdg" / "tessera"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_root() == tmp_path / ".cache" / "tessera"
    monkeypatch.setenv("TESSERA_CACHE_DIR", "~/mine")
    assert cache.cache_root() == tmp_path / "mine"


def test_info_and_clear(folder):
    assert (jit.cache_info().entries, jit.cache_info().bytes) == (0, 0)
    cache.write("one", BINARY)
    cache.write("two", BINARY)
    with cache.lock("two"):
        pass
    keep = folder / "notes.txt"
    keep.write_text("the user's own")
    info = jit.cache_info()
    assert (info.location, info.entries, info.bytes) == (str(folder), 2, 2 * len(to_bytes(BINARY)))
    assert jit.clear_cache() == 2
    assert jit.cache_info().entries == 0
    assert keep.exists()


def _hold(key: str, held, release) -> None:
    with cache.lock(key) as got:
        held.put(got)
        release.wait(30)


def test_one_process_holds_a_key_and_others_give_up_in_time():
    context = multiprocessing.get_context("spawn")
    held, release = context.Queue(), context.Event()
    process = context.Process(target=_hold, args=("key", held, release))
    process.start()
    assert held.get(timeout=60)
    start = time.monotonic()
    with cache.lock("key", timeout_s=0.2) as got:
        assert not got
    assert 0.2 <= time.monotonic() - start < 5
    with cache.lock("another", timeout_s=0.2) as got:
        assert got
    release.set()
    process.join(30)
    with cache.lock("key", timeout_s=5) as got:
        assert got, "free again when its holder ends"
