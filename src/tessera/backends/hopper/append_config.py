"""AppendConfig: everything that the append kernel is compiled for."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

HEADS = 4
"""Heads of a token that one program does, a warp each."""


class AppendFeature(Enum):
    """What the kernel may be asked beyond a copy into a contiguous 16-bit cache; each is compiled in or absent."""

    INTERLEAVED = "interleaved"
    HALVES = "halves"
    """The rotary embedding's two styles."""
    PACKED = "packed"
    PAGED = "paged"
    BATCH_INDEX = "batch_index"
    E4M3 = "e4m3"
    K_SCALES = "k_scales"
    V_SCALES = "v_scales"


@dataclass(frozen=True)
class AppendConfig:
    """One variant. `columns`: a power of two that holds a head's columns."""

    columns: int
    features: tuple[AppendFeature, ...] = ()

    def __str__(self) -> str:
        return "".join((f"{self.columns} columns", *(f", {feature.value}" for feature in self.features)))
