"""Where dS is kept for a bias's gradient, and how it becomes that: the host's side of backward_bias.py."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tessera import jit
from tessera.backends.hopper.arguments import reach
from tessera.backends.hopper.backward_config import BackwardConfig
from tessera.backends.hopper.config import Feature
from tessera.backends.hopper.launch import ELEMENTS
from tessera.dropout import keep_scale
from tessera.operands import Operands
from tessera.problem import Bias, Problem

_ALIGNED = 16
"""Keys that change places among themselves under dropout (pieces/lines.py), and a multiple of what TMA's strides are one of."""
_MASKS = (Feature.LEFT, Feature.RIGHT, Feature.KEY_END, Feature.QUERY_END, Feature.DOCUMENTS, Feature.DROPOUT)
"""And dropout, under which keys lie in other places (pieces/lines.py)."""
_ROWS, _KEYS = 8, 512
"""As in backward_bias.py."""
_FAR = 1 << 29
"""As pieces/row_ranges.FAR."""
_LENGTHS = ("key_end", "query_end", "document_begin", "document_end")
_NUMBERS = ("heads", "batch_sharing", "heads_sharing", "seqlen_q", "seqlen_k", "left", "right", "document_stride")


@dataclass(frozen=True)
class PlanesConfig:
    """What the kernel is compiled for: `keys` of a tile and `rows` of a block are those of the main kernel. `adds`: else every
    plane is one of the gradient, and zeros are put where no tile has been."""

    rows: int
    keys: int
    features: tuple[Feature, ...]
    adds: bool


@dataclass(frozen=True)
class KeptScores:
    """dS of a problem (batch, heads, rows, keys) in memory."""

    problem: Problem
    config: BackwardConfig

    @property
    def bias(self) -> Bias:
        bias = self.problem.score.bias
        if bias is None:
            raise ValueError("bias=None: dS is kept for a bias's gradient alone")
        return bias

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """As it lies."""
        shape = self.problem.shape
        return shape.batch, shape.heads_q, shape.seqlen_q, -(-shape.seqlen_k // _ALIGNED) * _ALIGNED

    @property
    def map_form(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Sizes and strides as TMA sees them."""
        batch, heads, rows, line = self.shape
        return (batch * heads, rows, line), (rows * line, line, 1)

    @property
    def is_gradient(self) -> bool:
        """Whether every plane is one of the gradient, in its type."""
        same = self.bias.dtype == self.problem.dtype and self.bias.shape[:2] == self.shape[:2]
        return same and not self.problem.score.dropout_p

    @property
    def scratch(self) -> int:
        """Bytes that are neither inputs nor outputs."""
        return 0 if self.is_gradient else 2 * math.prod(self.shape)

    @property
    def spec(self) -> jit.KernelSpec | None:
        """The kernel behind the main one; None where there is nothing left to do."""
        features = tuple(feature for feature in self.config.features if feature in _MASKS)
        if self.is_gradient and not features:
            return None
        element = ELEMENTS[self.problem.dtype]
        arguments: dict[str, jit.Tiles | jit.Pointer | jit.Scalar] = {
            "ds_ptr": jit.Pointer(element),
            "dbias_ptr": jit.Pointer("fp32" if self.bias.dtype == torch.float32 else element),
            **{name: jit.Pointer("i32", align=4) for name in _LENGTHS},
            **{name: jit.Scalar("i32") for name in _NUMBERS},
            "line": jit.Scalar("i64", align=_ALIGNED),
            "factor": jit.Scalar("fp32"),
        }
        config = PlanesConfig(self.config.rows, self.config.keys, features, not self.is_gradient)
        kernel = "tessera.backends.hopper.backward_bias:add_planes"
        return jit.KernelSpec(kernel, tuple(arguments.items()), (("CONFIG", config),))  # behind all of the main kernel

    def bind(self, device: int, document_stride: int) -> jit.Launch | None:
        """The launch."""
        if self.spec is None:
            return None
        shape, mask = self.problem.shape, self.problem.mask
        planes = self.bias.shape[0] * self.bias.shape[1]
        sharing = (shape.batch // self.bias.shape[0], shape.heads_q // self.bias.shape[1])
        programs = planes * -(-shape.seqlen_q // _ROWS) * -(-shape.seqlen_k // _KEYS)
        numbers = (shape.heads_q, *sharing, shape.seqlen_q, shape.seqlen_k, *reach(mask, _FAR), document_stride)
        factor = keep_scale(self.problem.score.dropout_p)
        return jit.load(self.spec, device).prepare((programs, 1, 1), (*numbers, self.shape[3], factor))

    def room(self, operands: Operands) -> Tensor:
        """Memory for it."""
        return torch.empty(self.shape, dtype=self.problem.dtype, device=operands.q.device)

    def finish(
        self, launch: jit.Launch | None, stream: int, ds: Tensor, lengths: tuple[int, ...], documents: tuple[int, int]
    ) -> Tensor:
        """The bias's gradient, when the main kernel is in the stream. `lengths`: addresses of key_end and query_end."""
        dbias = ds
        if not self.is_gradient:
            dbias = torch.empty((*self.bias.shape[:2], *self.shape[2:]), dtype=self.bias.dtype, device=ds.device)
        if launch is not None:
            launch(stream, (ds.data_ptr(), dbias.data_ptr(), *lengths, *documents))
        return dbias[..., : self.problem.shape.seqlen_k]
