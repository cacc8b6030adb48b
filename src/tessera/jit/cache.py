"""Binaries on disk: on by default, safe with many processes at once, and never trusted without a check.

Layout, under `cache_root()`: `v1/<key>.bin` (see `binary.to_bytes`) and `v1/<key>.lock`. A file appears by rename, so it is
whole or absent; whoever reads a damaged one compiles again and replaces it. The lock only saves work: ranks that start
together compile a kernel once; a process that waits too long, or can't lock (some network file systems), compiles.

Environment: TESSERA_CACHE_DIR names the root (default: $XDG_CACHE_HOME/tessera or ~/.cache/tessera); TESSERA_CACHE=0
turns the disk cache off.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tessera.jit.binary import Binary, DamagedError, from_bytes, to_bytes

try:
    import fcntl
except ImportError:  # not POSIX: no lock, and so perhaps a compile twice
    fcntl = None  # type: ignore[assignment]

LAYOUT = "v1"
LOCK_TIMEOUT_S = 60.0
"""How long to wait for another process that compiles the same kernel: the largest take about 10 s on a loaded machine."""
_LOCK_POLL_S = 0.02
_NO_DISK = (OSError, RuntimeError)  # RuntimeError: pathlib's, for a user without a home folder


@dataclass(frozen=True)
class Info:
    """The disk cache as `tessera doctor` prints it. `bytes` counts binaries; `enabled` says whether it is read and written."""

    location: str
    enabled: bool
    entries: int
    bytes: int

    def __str__(self) -> str:
        if not self.enabled:
            return f"off (TESSERA_CACHE=0); would lie in {self.location}"
        return f"{self.location}: {self.entries} kernels, {self.bytes / 1e6:.1f} MB"


def enabled() -> bool:
    return os.environ.get("TESSERA_CACHE", "1") != "0"


def cache_root() -> Path:
    """The cache's root folder, which need not exist."""
    chosen = os.environ.get("TESSERA_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "tessera"


def read(key: str) -> Binary | None:
    """The binary of this key, or None: absent, unreadable, damaged, or the cache is off."""
    if not enabled():
        return None
    try:
        return from_bytes(_path(key, "bin").read_bytes())
    except (*_NO_DISK, DamagedError):
        return None


def write(key: str, binary: Binary) -> bool:
    """Stores a binary; False (and a warning, once) where the disk does not take it. Never raises for the disk's sake."""
    if not enabled():
        return False
    try:
        target = _path(key, "bin")
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{key[:16]}.{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            # Not tempfile: its files are for one user, and a folder may be shared by many.
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), "wb") as file:
                file.write(to_bytes(binary))
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except _NO_DISK as error:
        warnings.warn(f"tessera: kernels are not cached on disk ({error}); set TESSERA_CACHE_DIR", stacklevel=2)
        return False
    return True


@contextmanager
def lock(key: str, timeout_s: float = LOCK_TIMEOUT_S) -> Iterator[bool]:
    """Holds the key's lock between processes; yields whether it is held. After `timeout_s`, goes on without it."""
    descriptor = _open_lock(key)
    try:
        yield descriptor is not None and _acquire(descriptor, timeout_s)
    finally:
        if descriptor is not None:
            os.close(descriptor)  # which also unlocks; the empty file stays, for a removed one could be locked twice


def _open_lock(key: str) -> int | None:
    if fcntl is None or not enabled():
        return None
    try:
        path = _path(key, "lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except _NO_DISK:
        return None


def _acquire(descriptor: int, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_LOCK_POLL_S)
        except OSError:
            return False


def clear() -> int:
    """Removes every cached binary (of older layouts too) and returns how many. Binaries already loaded stay usable."""
    removed = 0
    for path in cache_root().glob("v*/*"):
        if path.suffix in (".bin", ".lock", ".tmp"):
            path.unlink(missing_ok=True)
            removed += path.suffix == ".bin"
    return removed


def info() -> Info:
    """Where the cache lies, and what it holds."""
    sizes = [size for path in (cache_root() / LAYOUT).glob("*.bin") if (size := _size(path)) is not None]
    return Info(str(cache_root()), enabled(), len(sizes), sum(sizes))


def _size(path: Path) -> int | None:
    """None where another process has just removed it."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _path(key: str, suffix: str) -> Path:
    return cache_root() / LAYOUT / f"{key}.{suffix}"
