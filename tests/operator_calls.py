"""How often tessera's operators run: what the tests of checkpointing count, on the CPU and on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Calls(TorchDispatchMode):
    """How often the operators ran: counted below the checkpoint's own modes, which see them first."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = self.backward = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.forward += func is torch.ops.tessera.forward.default
        self.backward += func is torch.ops.tessera.backward.default
        return func(*args, **(kwargs or {}))
