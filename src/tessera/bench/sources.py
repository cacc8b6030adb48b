"""Real text for a byte-level model: the sources of this Python's standard library."""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

_HELD_OUT = 0.05


@dataclass(frozen=True, eq=False)
class Text:
    """Bytes to learn, and bytes that were held out; uint8, one dimension. `about` says where they come from."""

    learned: Tensor
    held_out: Tensor
    about: str

    def batches(self, seed: int, batch: int, seqlen: int, device: str) -> Batches:
        """An endless row of batches, the same for the same seed."""
        return Batches(self.learned, torch.Generator().manual_seed(seed), batch, seqlen, device)

    def examination(self, batch: int, seqlen: int, device: str) -> Tensor:
        """Evenly spaced pieces of what was held out, int64 (batch, seqlen + 1)."""
        starts = torch.linspace(0, len(self.held_out) - seqlen - 1, batch).long()
        return _pieces(self.held_out, starts, seqlen, device)


@dataclass(frozen=True, eq=False)
class Batches:
    """Random pieces of a text."""

    text: Tensor
    generator: torch.Generator
    batch: int
    seqlen: int
    device: str

    def next(self) -> Tensor:
        """int64 (batch, seqlen + 1)."""
        starts = torch.randint(len(self.text) - self.seqlen, (self.batch,), generator=self.generator)
        return _pieces(self.text, starts, self.seqlen, self.device)


@cache
def standard_library() -> Text:
    """The library's modules (no packages, tests or what was installed beside it), in the order of their names."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(folder.glob("*.py"))
    whole = b"\n".join(path.read_bytes() for path in files)
    digest = hashlib.sha256(whole).hexdigest()[:12]
    about = f"{len(files)} modules of Python {platform.python_version()}, {len(whole)} bytes, sha256 {digest}"
    data = torch.frombuffer(bytearray(whole), dtype=torch.uint8)
    learned = int(len(data) * (1 - _HELD_OUT))
    return Text(data[:learned], data[learned:], about)


def _pieces(text: Tensor, starts: Tensor, seqlen: int, device: str) -> Tensor:
    return text[starts[:, None] + torch.arange(seqlen + 1)].long().to(device, non_blocking=True)
