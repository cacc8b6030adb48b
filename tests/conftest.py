"""What every test shares: one torch thread (the tensors are small, pytest-xdist's workers are the parallelism) and a seed."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
