"""Tessera: exact attention in tiles. FlashAttention-3 and its family, in Python.

    import tessera
    out = tessera.attention(q, k, v, causal=True)       # (batch, seqlen, heads, head_dim)
    print(tessera.plan(q, k, v, causal=True))            # what ran, and why

Importing this package touches neither CUDA nor Triton.
"""

from tessera.api import attention, attention_varlen, plan, warmup
from tessera.checking import debug
from tessera.dispatch import BACKENDS
from tessera.dropout import dropout_mask
from tessera.errors import Reason, Unsupported
from tessera.mask import Mask
from tessera.partial import merge
from tessera.plan import Plan
from tessera.problem import Problem
from tessera.serving.api import attention_with_kvcache, plan_kvcache
from tessera.serving.cascade import attention_cascade
from tessera.serving.plan import CachePlan
from tessera.serving.problem import CacheProblem

__version__ = "0.1.0"

__all__ = [
    "CachePlan",
    "CacheProblem",
    "Mask",
    "Plan",
    "Problem",
    "Reason",
    "Unsupported",
    "attention",
    "attention_cascade",
    "attention_varlen",
    "attention_with_kvcache",
    "backend_names",
    "debug",
    "dropout_mask",
    "merge",
    "plan",
    "plan_kvcache",
    "warmup",
]


def backend_names() -> tuple[str, ...]:
    """The backends' names in the order in which they are asked."""
    return tuple(BACKENDS)
