"""transformers' masks as intervals of keys: what the mask function hands to every layer in place of a dense tensor.

transformers asks for a mask once a forward: a 2-D padding mask, a function of (query, key) and where both stand in the cache. In
nearly all of its masks a row attends to one interval of keys, and the intervals move to the right from row to row: tessera's
own algebra (see tessera.mask). They are handed over as one int32 tensor, (batch, 1, sides, rows):

    (batch, 1, 0, 0)     neither side of a row's interval is bounded: every row attends to every key
    (batch, 1, 1, 0)     one side, the end, and that is the causal diagonal, aligned to the last key
    (batch, 1, 2, rows)  row i attends to the keys [0] <= j < [1]; rows = seqlen_q, or 1 where all rows are alike

A tensor of 4 dimensions is what survives: `generate` makes the mask ahead for a static cache and the model passes 4-D tensors
on as they are; compiled graphs, devices and checkpointing treat it like any other. It says everything, in shapes where a
kernel must know it ahead, so that nothing rests on what a layer says of itself, and a model that would add it to its
scores fails on its shape. Keys are counted as the layer gets them: a static cache's empty end lies outside of every interval.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from tessera.errors import bad_value

SCORES_AT_ONCE = 1 << 22
"""How much of a dense mask is looked at in one step where its intervals are measured: 4 MiB as bool. A window over 8192 x 8192
takes 0.24 s on one CPU core at 1 << 20 and 0.38 s at 1 << 22 (2026-11-21); a GPU wants few steps (not measured)."""


def key_bounds(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    config: object = None,
    **others: Any,
) -> Tensor:
    """A mask function as transformers' AttentionMaskInterface calls it; the parameters' names are its own.

    Row i stands at position q_offset + i, key j at kv_offset + j; `attention_mask` (batch, positions) is False for padding.

    Returns:
        The intervals, int32 (batch, 1, sides, rows) as above; for a mask that is more than intervals in order, which is
        rare, the mask itself, bool (batch, 1, seqlen_q, seqlen_k).

    Raises ValueError for a model that does not take its attention from transformers' AttentionInterface.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling and not takes_attention_from_interface(type(config).__module__):
        why = "this model computes its attention itself and takes none from transformers' AttentionInterface"
        raise bad_value("attn_implementation", f"tessera for {type(config).__name__}", why, 'use "eager"')
    causal, bidirectional = mask_function is causal_mask_function, mask_function is bidirectional_mask_function
    aligned = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    padding = _padding(attention_mask, kv_offset, kv_length)
    # The padding's contents are read on the host, once a forward, as transformers' own mask functions do; a graph can't.
    if padding is None or (not compiling and bool(padding.all())):
        if bidirectional:
            return torch.empty(batch_size, 1, 0, 0, dtype=torch.int32, device=device)
        if causal and aligned:
            return torch.empty(batch_size, 1, 1, 0, dtype=torch.int32, device=device)

    def dense(first: int, last: int) -> Tensor:
        """Rows first <= i < last of the whole mask, (batch, 1, last - first, seqlen_k) bool."""
        arguments = others | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return sdpa_mask(
            batch_size=batch_size, q_length=last - first, kv_length=kv_length, q_offset=q_offset + first, kv_offset=kv_offset,
            mask_function=mask_function, attention_mask=attention_mask, device=device, **arguments,
        )  # fmt: skip

    if causal or bidirectional:
        found = Intervals.all(batch_size, kv_length, device) if padding is None else Intervals.of([padding[:, None]])
        if causal:
            found = found.under_diagonal(q_offset - kv_offset + torch.arange(q_length, device=device))
    else:
        step = q_length if compiling else max(1, SCORES_AT_ONCE // max(1, batch_size * kv_length))
        rows = range(0, q_length, step)
        found = Intervals.of(dense(first, min(first + step, q_length))[:, 0] for first in rows)
    if compiling and found.exact is not None:
        # Checked where the graph runs, without waiting for the device; torch has no public name for it.
        torch._assert_async(found.exact, f"{_NOT_INTERVALS}, and a compiled model can't turn to a dense one: compile with sdpa")
    elif found.exact is not None and not found.exact:
        size = f"({batch_size}, 1, {q_length}, {kv_length})"
        warnings.warn(f"{_NOT_INTERVALS}: it is added to the scores as a dense {size} bias", stacklevel=2)
        return dense(0, q_length)
    return found.packed()


_NOT_INTERVALS = "the attention mask is not one interval of keys a row"


@cache
def takes_attention_from_interface(config_module: str) -> bool:
    """Whether the models of a config, defined in the module named, can be given an attention function; True where unknown.

    transformers keeps configuration_<model>.py beside modeling_<model>.py, accepts any registered name for any model, and
    leaves it to models like Bloom, with attention of their own, to ignore the name: with a mask that they can't read.
    """
    package, _, name = config_module.rpartition(".")
    modeling = sys.modules.get(f"{package}.modeling_{name.removeprefix('configuration_')}")
    if modeling is None or not name.startswith("configuration_"):
        return True
    members = vars(modeling)
    return "ALL_ATTENTION_FUNCTIONS" in members or any(
        getattr(member, "_supports_attention_backend", False) for member in members.values()
    )


def _padding(attention_mask: Tensor | None, kv_offset: int, kv_length: int) -> Tensor | None:
    """(batch, seqlen_k) bool: the 2-D mask of the keys that the layer gets; what lies past the mask's end is padding."""
    if attention_mask is None:
        return None
    missing = max(0, kv_offset + kv_length - attention_mask.shape[-1])
    return torch.nn.functional.pad(attention_mask, (0, missing))[:, kv_offset : kv_offset + kv_length].to(torch.bool)


@dataclass(frozen=True, eq=False)
class Intervals:
    """One interval of keys a row, begin <= j < end, both (batch, rows) and never moving to the left.

    `exact` is a bool tensor () that is False for a mask that is more than that; None where it can't be.
    """

    begin: Tensor
    end: Tensor
    exact: Tensor | None

    @staticmethod
    def all(batch: int, seqlen_k: int, device: torch.device | str) -> Intervals:
        """Every key, in one row for all rows."""
        begin = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        return Intervals(begin, begin + seqlen_k, None)

    @staticmethod
    def of(mask: Iterable[Tensor]) -> Intervals:
        """Of a mask in pieces of rows, each (batch, rows, seqlen_k) bool."""
        spans = [_spans(piece) for piece in mask]
        first, stop, count = (torch.cat(parts, dim=-1) for parts in zip(*spans, strict=True))
        # A row with no key stands where the rows before it end: it stays empty, and the ends stay in order.
        end = stop.cummax(dim=-1).values
        begin = torch.where(count == 0, end, first)
        whole = (stop - first == count) & ((stop == end) | (count == 0))
        rising = (begin[:, 1:] >= begin[:, :-1]).all()
        return Intervals(begin, end, whole.all() & rising)

    def under_diagonal(self, diagonal: Tensor) -> Intervals:
        """Cut at the diagonal: row i, key diagonal[i] (rows,), is the last that it sees."""
        end = torch.minimum(self.end, diagonal + 1)
        return Intervals(torch.minimum(self.begin, end), end, self.exact)

    def packed(self) -> Tensor:
        """As the tensor that layers are given: int32 (batch, 1, 2, rows)."""
        return torch.stack((self.begin, self.end), dim=1)[:, None].to(torch.int32)


def _spans(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(batch, rows, seqlen_k) bool -> each row's first key, one past its last, and how many: 0, 0, 0 for none."""
    count = mask.sum(dim=-1)
    first = mask.max(dim=-1).indices  # of the largest, the first
    stop = mask.shape[-1] - mask.flip(-1).max(dim=-1).indices
    return first, torch.where(count == 0, 0, stop), count
