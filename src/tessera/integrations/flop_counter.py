"""torch's FlopCounterMode counts this package's attention, once this is imported: it knows no operators but torch's own.

    import tessera.integrations.flop_counter

    with torch.utils.flop_counter.FlopCounterMode() as counter:
        model(batch).sum().backward()

What a causal mask or a window leaves out is not counted, which of torch's own attention is counted too; packed sequences count as
if all were equally long. (A module of its own, for torch's takes a quarter of a second to import.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tessera.operands import Request, describe
from tessera.problem import BACKWARD_WORK


@register_flop_formula(torch.ops.tessera.forward, get_raw=True)
def forward_flops(*arguments: Any, out_val: object = None) -> int:
    """Of tessera::forward's arguments."""
    return describe(Request(*arguments)).flops()


@register_flop_formula(torch.ops.tessera.backward, get_raw=True)
def backward_flops(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *arguments: Any, out_val: object = None) -> int:
    """Of tessera::backward's."""
    return int(BACKWARD_WORK * describe(Request(*arguments)).flops())
