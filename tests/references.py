"""Problems that try the online softmax's reference, for the emulated kernel and for the GPU's."""

from __future__ import annotations

import torch

from tessera.cases import Case
from tessera.operands import Request


def rising(dim: int, window: tuple[int | None, int | None], device: str, dtype: torch.dtype, dropout_p: float = 0.0) -> Request:
    """From block to block, last keys first, scores of some rows of a warp rise by up to 2^2885 and of others fall: P about the
    reference so far is then infinite, or infinite in float16 alone, and has to be taken anew."""
    case = Case("rising", head_dim=dim, seqlen_q=600, seqlen_k=600, heads_q=2, heads_kv=2, window=window, dropout_p=dropout_p)
    request = case.request(device, dtype)
    rise = torch.tensor([2000.0, -2000.0, 200.0, -40.0, 40.0, 10.0, 3.0, 0.0]) * dim**0.5
    sign = torch.tensor([1.0, 0.0, -0.05])[torch.randint(0, 3, (600, 2), generator=torch.Generator().manual_seed(3))]
    with torch.no_grad():
        request.k[..., -1] = rise.repeat_interleave(75)[:, None].to(device)
        request.q[..., -1] = sign.to(device)
    return request


def far_below(dim: int, device: str, dtype: torch.dtype) -> Request:
    """One key at the maximum and 8191 others 2^-17 of it: 6% of the row, which is lost where P that small is rounded to 0."""
    request = Case("far below", batch=1, head_dim=dim, seqlen_k=8192, heads_q=1, heads_kv=1, softmax_scale=1.0).request(
        device, dtype
    )
    with torch.no_grad():
        request.q.zero_()[..., 0] = 1.0
        request.k.zero_()[:, -5, :, 0] = 17 * 0.6931471805599453
        request.v.add_(1.0)
    return request
