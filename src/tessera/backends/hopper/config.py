"""ForwardConfig: everything that the forward kernel is compiled for, as one frozen record that prints."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

ROWS = 64
"""Query rows of one consumer warpgroup: the M of a Hopper wgmma."""
STAGES, STAGES_WITHOUT_TURNS = 3, 5
"""Stages of K's and V's rings for which there are named barriers, one a stage (pieces/channel.py), beside those of turns and
without. More would share one: a hang, or a stage that is written while it is read."""


def refuse_deep_rings(stages: int, most: int) -> None:
    """Raises for rings of more than `most` stages."""
    if not 1 <= stages <= most:
        deeper = "" if most > STAGES else f", for {STAGES_WITHOUT_TURNS} in a forward whose consumers take no turns"
        raise ValueError(f"stages={stages}: there are named barriers for 1 to {most} of them{deeper}")


class Feature(Enum):
    """What a kernel may be asked beyond softmax(scale Q K^T) V; each is compiled in or absent."""

    VARLEN = "varlen"
    SEQUSED_Q = "seqused_q"
    SEQUSED_K = "seqused_k"
    LEFT = "left"
    RIGHT = "right"
    KEY_START = "key_start"
    KEY_END = "key_end"
    QUERY_END = "query_end"
    DOCUMENTS = "documents"
    SOFTCAP = "softcap"
    SINKS = "sinks"
    SCALE_FIRST = "scale first"
    """A scale that is not positive: the maximum is taken of scaled scores (ALiBi and biases bring that with them)."""
    ALIBI = "alibi"
    BIAS = "bias"
    BIAS_OF_KEYS = "bias of keys"
    """The same for all rows."""
    BIAS_OF_ROWS = "bias of rows"
    """The same for all keys."""
    FLOAT32_BIAS = "float32 bias"
    """Any of these three in float32, not in q's dtype."""
    BIAS_GRADIENT = "bias gradient"
    """In the backward: every block of dS is added to it in float32."""
    KEPT_DS = "dS kept"
    """In the backward too: dS of every sequence and head is stored in 16 bits, which a kernel of its own adds up."""
    DROPOUT = "dropout"


class Overlap(Enum):
    """Which of a block's softmax the product P V of the block before it runs under."""

    WHOLE = "whole"
    """All of it: P of two blocks is alive at once."""
    AT_ONCE = "whole, P at once"
    """The same, and P is taken as S arrives, about the reference as it stands (pieces/softmax.py): S and both P live at once."""
    SCORES = "scores, P at once"
    """None of it, but S = Q K^T: P dies before P is taken at once, which fits 160 registers."""
    MAXIMA = "maxima"
    """The row maxima alone: P dies before the exponentials are taken, which fits 160 registers (three consumers)."""
    DRIFTING = "scores, P at once, without turns"
    """As SCORES, and consumers take no turns: each goes through its own blocks of a window at its own pace (head_dim 64)."""
    NONE = "no softmax of its own"
    """None: a block's S, softmax and P V follow one another, and the other consumers' work fills the tensor cores. S and P
    never live together, so three consumers fit at head_dim 128."""

    @property
    def takes_turns(self) -> bool:
        """Whether the consumers take turns with their products."""
        return self not in (Overlap.NONE, Overlap.DRIFTING)


class Staging(Enum):
    """Where the output tile waits for its TMA store."""

    OWN = "own buffer"
    """The store of a tile runs under the first products of the next."""
    HALVES = "buffer of half its width"
    """The right half waits until the left one has been read: where shared memory is short (head_dim 256)."""
    QUERY = "its Q's place"
    """No buffer: out goes where the tile's Q was, which is free for another Q when the store has read it."""


class Pairing(Enum):
    """Which tiles two programs of a cluster work on at the same time; both need the same blocks of K and V."""

    ROWS = "row blocks"
    """Neighbours."""
    HEADS = "heads"
    """The same rows of two query heads that share a KV head."""


@dataclass(frozen=True)
class ForwardConfig:
    """One variant of the forward. `dims`: the head dim as one or two powers of two (96 = 64 + 32), likewise `dims_v`."""

    consumers: int
    keys: int
    stages: int
    dims: tuple[int, ...]
    dims_v: tuple[int, ...]
    overlap: Overlap
    staging: Staging
    consumer_registers: int
    producer_registers: int
    features: tuple[Feature, ...] = ()
    queries: int = 1
    """Tiles of Q that a consumer has room for. With 2 the next tile's Q is loaded under the work on this one."""

    held: int = 0
    """Parts of Q's head dim, the last ones, that consumers keep in registers over the main loop: shared memory then gives the
    tensor cores K alone for them, where blocks of 64 keys read as much Q as K."""

    stages_bias: bool = False
    """Blocks of a bias in q's type come into shared memory with those of K, by TMA."""

    pairing: Pairing | None = None
    """Programs work in pairs, which load K and V once for both."""

    def __post_init__(self) -> None:
        refuse_deep_rings(self.stages, STAGES if self.overlap.takes_turns else STAGES_WITHOUT_TURNS)
        if self.staging is Staging.QUERY and (self.queries == 1 or self.held or self.dims != self.dims_v):
            raise ValueError("out waits in its Q's place where two of them lie in shared memory, as wide as out is")

    @property
    def cluster(self) -> int:
        """Programs that load K and V together."""
        return 1 if self.pairing is None else 2

    @property
    def rows(self) -> int:
        """Query rows of a tile."""
        return ROWS * self.consumers

    @property
    def tiles_together(self) -> int:
        """Neighbouring row blocks that programs take together."""
        return 2 if self.pairing is Pairing.ROWS else 1

    @property
    def heads_together(self) -> int:
        """Query heads that programs take together."""
        return 2 if self.pairing is Pairing.HEADS else 1

    @property
    def low_rows(self) -> int:
        """Query rows of a low tile, which leaves the last consumer idle."""
        return self.rows - ROWS

    @property
    def has_low_blocks(self) -> bool:
        """Whether a dense sequence's last rows may go by low tiles: where all tiles are equally long otherwise, so that the end
        of the grid is as ragged as one tile is long."""
        return self.consumers == 3 and not {Feature.RIGHT, Feature.VARLEN} & set(self.features)

    @property
    def staged(self) -> tuple[int, ...]:
        """Columns of O's buffer, for each part of the head dim."""
        return tuple(dim // 2 for dim in self.dims_v) if self.staging is Staging.HALVES else self.dims_v

    def shared_bytes(self) -> int:
        """Shared memory of the tiles, in bytes (16-bit elements; barriers not counted)."""
        q, k, v = sum(self.dims) * self.rows * self.queries, sum(self.dims) * self.keys, sum(self.dims_v) * self.keys
        o = 0 if self.staging is Staging.QUERY else sum(self.staged) * self.rows
        bias = self.rows * self.keys if self.stages_bias else 0
        return 2 * (q + o + self.stages * (k + v + bias))

    def __str__(self) -> str:
        dim = "+".join(map(str, self.dims))
        dim += "" if self.dims == self.dims_v else "/" + "+".join(map(str, self.dims_v))
        text = f"{self.rows}x{self.keys} d{dim}, {self.consumers} consumers, {self.stages} stages"
        text += f", PV under {self.overlap.value}, O in {self.staging.value}"
        text += ", Q ahead" if self.queries == 2 else ""
        text += f", {sum(self.dims[-self.held :])} columns of Q held" if self.held else ""
        text += f", pairs of {self.pairing.value}" if self.pairing else ""
        return text + "".join(f", {feature.value}" for feature in self.features)
