"""NaN where nobody may read."""

from __future__ import annotations

import torch

NAN = float("nan")


def poison_free_memory() -> None:
    """Leave NaN in what the allocator hands out next."""
    sizes = (1 << 10, 1 << 16, 1 << 18, 1 << 20, 1 << 22)
    blocks = [torch.full((n,), NAN, device="cuda", dtype=torch.float32) for n in (*sizes, *sizes)]
    del blocks
