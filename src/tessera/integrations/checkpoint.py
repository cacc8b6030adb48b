"""Activation checkpointing that does not run attention's forward twice.

    torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False, context_fn=tessera.integrations.checkpoint.contexts)

Plain checkpointing keeps a block's input alone and runs the whole block again before its backward, attention included: the one
part whose cost grows with the square of the length. But attention's backward computes the scores again anyway; of its
forward it needs out and lse alone, (heads, head_dim_v + 1) numbers a token, as much as one more input of the block. So these
two are saved and everything else is computed again. (The selective recomputation of arXiv 2205.05198, the other way round: there
attention is what is recomputed, because its scores were in memory.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext, create_selective_checkpoint_contexts

SAVED = (torch.ops.tessera.forward.default,)
"""The operators whose results are saved: to be put into a list of your own, for create_selective_checkpoint_contexts."""


def policy(context: SelectiveCheckpointContext, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    """The policy for torch's selective checkpoint: out and lse of tessera::forward are saved, all else is computed again.

    Under torch.compile "all else" is left to the partitioner (PREFER_RECOMPUTE), out and lse are not (MUST_SAVE).
    """
    return CheckpointPolicy.MUST_SAVE if operator in SAVED else CheckpointPolicy.PREFER_RECOMPUTE


def contexts() -> tuple[Any, Any]:
    """`context_fn` of torch.utils.checkpoint.checkpoint with use_reentrant=False: a pair of contexts under `policy`.

    A Hugging Face model takes it as
    `model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})`.
    """
    return create_selective_checkpoint_contexts(policy)
