"""What a compile yields: a `Binary`, and its form on disk, in which any damage shows."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, replace

MAGIC = b"tessera binary 1\n"
_DIGEST_BYTES = hashlib.sha256().digest_size
_REGISTERS = re.compile(r"Used (\d+) registers")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclass(frozen=True)
class Descriptor:
    """How the host must encode a tensor map: `box` is one TMA box, outermost first, `swizzle` CUDA's enum value."""

    element: str
    box: tuple[int, ...]
    swizzle: int


@dataclass(frozen=True)
class Binary:
    """A kernel ready to load. Sizes in bytes.

    `threads` is a block's, all warp-specialised partitions together; `shared` is dynamic shared memory; `scratch` is
    global memory a block wants from the launcher, which gives none. `messages` is what ptxas said, warnings included.
    `ptx` is kept right after a compile only; a binary from the disk cache has None.
    """

    entry: str
    cubin: bytes
    threads: int
    shared: int
    scratch: int
    descriptors: tuple[Descriptor, ...]
    messages: str
    toolchain: str
    ptx: str | None = None

    @property
    def registers(self) -> int:
        """Registers a thread at the launch; setmaxnreg moves them between warpgroups afterwards."""
        match = _REGISTERS.search(self.messages)
        return int(match.group(1)) if match else 0

    @property
    def spills(self) -> tuple[int, int]:
        """Bytes of spill stores and of spill loads in the code, by ptxas' own count."""
        found = [(int(stores), int(loads)) for stores, loads in _SPILLS.findall(self.messages)]
        return max((stores for stores, _ in found), default=0), max((loads for _, loads in found), default=0)


class DamagedError(ValueError):
    """Bytes that are not a binary of this version, or no longer."""


def to_bytes(binary: Binary) -> bytes:
    """The file of a binary: magic, SHA-256 of all that follows, one line of JSON, the cubin."""
    header = asdict(replace(binary, cubin=b"", ptx=None))
    del header["cubin"], header["ptx"]
    content = json.dumps(header).encode() + b"\n" + binary.cubin
    return MAGIC + hashlib.sha256(content).digest() + content


def from_bytes(data: bytes) -> Binary:
    """The binary that `to_bytes` wrote. Raises DamagedError for anything else: cut off, altered, of another version."""
    start = len(MAGIC) + _DIGEST_BYTES
    content = data[start:]
    if not data.startswith(MAGIC) or hashlib.sha256(content).digest() != data[len(MAGIC) : start]:
        raise DamagedError("not a tessera binary, or damaged")
    line, _, cubin = content.partition(b"\n")
    header = json.loads(line)
    descriptors = tuple(Descriptor(one["element"], tuple(one["box"]), one["swizzle"]) for one in header.pop("descriptors"))
    return Binary(cubin=cubin, descriptors=descriptors, **header)
