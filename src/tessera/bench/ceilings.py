"""What this machine can do at most, timed as the cells are: a square matrix product and a copy. No kernel passes both."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tessera.bench.timing import Call, Schedule, clock_for, interleaved, quartiles

_SIDE = {"cuda": 8192, "cpu": 1024}
_COPIED_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}


@dataclass(frozen=True)
class Ceilings:
    """`matmul`: floating-point operations a second of torch's matrix product in the grid's dtype; `copy`: bytes a second, each
    byte counted when it is read and when it is written."""

    matmul: float
    copy: float

    def __str__(self) -> str:
        return f"matmul {self.matmul / 1e12:.4g} TFLOP/s, copy {self.copy / 1e9:.4g} GB/s"


def ceilings(device: str, dtype: torch.dtype) -> Ceilings:
    """Both, measured now on this device; its memory is given back."""
    measured = _measured(device, dtype)
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
    return measured


def _measured(device: str, dtype: torch.dtype) -> Ceilings:
    kind = torch.device(device).type
    side, size = _SIDE[kind], _COPIED_BYTES[kind]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source, target = (torch.zeros(size, dtype=torch.int8, device=device) for _ in range(2))
    calls: dict[str, Call] = {"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}
    times = {name: quartiles(list(t)).median for name, t in interleaved(calls, clock_for(device), Schedule.of(device)).items()}
    return Ceilings(2 * side**3 / times["matmul"], 2 * size / times["copy"])
