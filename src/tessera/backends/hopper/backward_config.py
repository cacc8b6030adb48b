"""BackwardConfig: everything that the backward kernels are compiled for, as one frozen record that prints."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from tessera.backends.hopper.config import ROWS, Feature
from tessera.backends.hopper.plan import UNSTAGED

PART_LINE = 256
"""Values in a line of the workspace, where parts of dQ lie as in registers: 64 rows of four columns (pieces/sums.py)."""
WORK_ROWS = 128
"""Every sequence's rows begin at a multiple of this in the workspace: a multiple of every kernel's row block."""


class Division(Enum):
    """How the consumer warpgroups share the work on a tile of keys."""

    KEYS = "keys"
    """Two consumers in step, 64 keys each: all products of their keys, half of dQ. For head dims up to 128 with modifiers."""
    AHEAD = "keys, P ahead"
    """The same, not in step: P a turn ahead, dQ a turn later. For head dim 128."""
    TURNS = "keys, dQ in turn"
    """Three consumers, 64 keys each, not in step: they take turns at dQ. For head dim 64."""
    PRODUCTS = "products"
    """Three consumers on 64 keys: one has S and dV, one dP and dK, one dQ. For head dims up to 256."""


class PartLayout(Enum):
    """How a part of dQ lies in shared memory and in the workspace."""

    REGISTERS = "registers"
    """As wgmma leaves it, thread after thread: no conflict between shared memory's banks. Ours / FA3 went from 0.91 .. 0.94 to
    0.96 .. 0.99 at head dim 128, and from 0.85 .. 0.94 to 0.93 .. 0.98 at 64 (H200, 1k and 16k, 2026-11-21)."""
    ROWS = "rows"
    """As rows of dQ. At head dim 256 additions in L2 are the limit: so ours / FA3 was 1.01 at 16k, and 0.94 with the other."""


class RowsSeen(Enum):
    """How many rows see a tile of keys: what its end may cost (`_short_form`)."""

    FEW = "few rows a tile"
    SOME = "more rows a tile"  # full attention at head dims 128 and 256
    MANY = "many rows a tile"


class Adding(Enum):
    """How the tiles of keys that see the same rows add up their dQ."""

    ANY_ORDER = "any order"
    """To zeros, each when it comes. A kernel after the main one rounds dQ."""
    ORDER = "order"
    """One after another, the first stores; so runs repeat bit for bit. A kernel after the main one rounds dQ."""
    ROUNDED = "order, rounded"
    """The same, and the last rounds what it adds up: neither zeros nor a kernel after the main one."""


@dataclass(frozen=True)
class BackwardConfig:
    """One variant of the backward. `rows`: query rows of a block; `keys`: keys of a tile; `dim`, `dim_v`: padded head dims."""

    division: Division
    rows: int
    keys: int
    dim: int
    dim_v: int
    q_stages: int
    do_stages: int
    adding: Adding = Adding.ANY_ORDER
    features: tuple[Feature, ...] = ()
    rows_seen: RowsSeen = RowsSeen.MANY

    @property
    def k_places(self) -> int:
        """Places for a tile's K: with two a tile's end runs under the next one's start (backward_onward.py; `brings_v_by_ds`)."""
        return 2 if self.brings_v_by_ds or (self.rows_seen is RowsSeen.FEW and self.division is Division.AHEAD) else 1

    @property
    def consumers(self) -> int:
        """Warpgroups that compute."""
        return 3 if self.division is Division.PRODUCTS else self.keys // ROWS

    @property
    def readers(self) -> int:
        """Consumers that read each block of Q, and of dO: one that does nothing but dQ reads neither."""
        return 2 if self.division is Division.PRODUCTS else self.consumers

    @property
    def takes_tile_after_tile(self) -> bool:
        """Whether there is a program for each multiprocessor, else one for each tile. A tile then begins while the one before
        ends: ours / FA3 at head dim 64 went from 1.017 to 1.146 (causal 512), 0.994 to 1.111 (causal 1k), 0.965 to 1.014 (full
        1k), 0.945 to 1.011 (a window of 1024 at 16k), at 256 from 0.947 to 0.989 (causal 512), 0.975 to 0.988 (full 1k), 0.986
        to 1.017 (causal 4k) and 1.029 to 1.085 (full 16k; H200, 2026-11-21). Beside the places of a bias it spills."""
        if self.adding is Adding.ROUNDED or Feature.BIAS in self.features:
            return False
        wide = self.division is Division.PRODUCTS or self.division is Division.AHEAD
        return wide or (self.division is Division.TURNS and self.consumers == 3)

    @property
    def begins_apart(self) -> bool:
        """Whether tiles that all rows see begin with different rows. Ours / FA3, full, without and with: head dim 64 at 1k 1.008
        and 1.015, 4k 0.997 and 1.007, 16k 1.014 and 1.049; 256 at 1k 0.994 and 1.003, 2k 0.999 and 1.022, 4k 1.027 and 1.034, but
        16k 1.070 and 1.025 (H200, 2026-11-21)."""
        return self.takes_tile_after_tile and self.division is not Division.AHEAD and self.adding is Adding.ANY_ORDER

    @property
    def divides_remainder(self) -> bool:
        """Whether the last tiles, which are fewer than programs, are divided by rows (pieces/remainder.py): where the same rows
        see all, and many. At 16k tokens 2048 tiles are 15.5 rounds, which took 16. Times over FA3's without and with, head dim
        128: 4k 0.972 and 0.956, 16k 0.959 and 0.928; 64: 4k 0.978 and 0.967, but 512 0.909 and 0.947; 256: 2k 0.979 and 0.967, 4k
        0.962 and 0.950, but 1k 0.999 and 1.008 (H200, 2026-11-22)."""
        is_full = set(self.features) <= {Feature.SINKS, Feature.SCALE_FIRST, Feature.DROPOUT}
        many = self.rows_seen is RowsSeen.MANY
        return is_full and many and self.takes_tile_after_tile and self.adding is Adding.ANY_ORDER

    @property
    def counts_tiles(self) -> bool:
        """Whether the tiles that have added to a head's rows are counted, so that these are rounded while others are at work
        (pieces/counts.py). Packed at head dim 64 it pays without a mask alone: ours / FA3, any order, without and with, full 4k
        1.019 and 1.039, 1k 1.028 and 1.043; causal 4k 1.055 and 1.062, but 1k 1.141 and 1.129, 512 1.132 and 1.105 (H200,
        2026-11-22)."""
        band = {Feature.LEFT, Feature.RIGHT} & set(self.features)
        is_packed = Feature.VARLEN in self.features and self.division is Division.TURNS
        pays = not is_packed or (self.adding is Adding.ANY_ORDER and not band)
        return self.takes_tile_after_tile and not self.divides_remainder and pays

    @property
    def stages_bias(self) -> bool:
        """Whether blocks of a bias come into shared memory with those of Q. (Under dropout keys lie in other lines.)"""
        others = {Feature.DROPOUT, *UNSTAGED} & set(self.features)
        return self.division is Division.KEYS and Feature.BIAS in self.features and not others

    @property
    def gradients_of_tile(self) -> int:
        """dK and dV of each 64 keys of a tile."""
        return 2 * (self.keys // ROWS)

    @property
    def values_of_share(self) -> int:
        """Values that a share of a tile leaves: all of these gradients."""
        return self.keys * (self.dim + self.dim_v)

    @property
    def subtracts_by_products(self) -> bool:
        """Whether a further step of S's and dP's products subtracts lse and D (pieces/gradients.py): shared memory then gives 72
        wavefronts for them of a block's 3200, not 260. Times over FA3's without and with: full 512 0.898 and 0.879, 1k 0.965 and
        0.945, 4k 0.962 and 0.942, 16k 0.931 and 0.911, causal 4k 0.968 and 0.954, 16k 0.961 and 0.950, GQA 32/8 4k 0.892 and
        0.848, a window of 1024 keys 0.969 and 0.961, of 256 level. At head dim 64 it is level too (H200, 2026-11-22)."""
        return self.division is Division.AHEAD and Feature.SCALE_FIRST not in self.features

    @property
    def row_words(self) -> int:
        """Words of lse and D for each row in the workspace."""
        return 4 if self.subtracts_by_products else 2

    @property
    def shares_text(self) -> bool:
        """Whether three consumers run one text (jit/shared_text.py). Ours / FA3 at head dim 64 without and with: full 1k 1.037
        and 1.044, 2k 1.039 and 1.055, 4k 1.033 and 1.051, 16k 1.037 and 1.054, causal 512 1.189 and 1.198, 1k 1.133 and 1.164, 2k
        1.080 and 1.096, 4k 1.045 and 1.060, 16k 1.018 and 1.033, packed 1.105 and 1.138. Not where their number is the one
        register too many: a window of 256 1.098 and 1.032, of 1024 1.054 and 1.016; dropout 1.01 of the time. (At head dim 128
        full 1.01 of it, causal level; H200, 2026-11-22.)"""
        wanted = {Feature.RIGHT, Feature.VARLEN, Feature.SINKS, Feature.SCALE_FIRST}
        return self.asks_early and set(self.features) <= wanted

    @property
    def asks_early(self) -> bool:
        """Whether a block's dO, and a tile's K and V, are asked into L2 before their places are free: at short lengths they come
        from memory. Ours / FA3 at head dim 64, without and with: full 512 1.076 and 1.096, 1k 1.028 and 1.036, 4k 1.025 and
        1.026, causal 512 1.178 and 1.197, 1k 1.126 and 1.132, 4k 1.045 and 1.043. At 256, where L2 is nearly the limit, 0.97 of
        it (H200, 2026-11-22)."""
        return self.division is Division.TURNS and self.takes_tile_after_tile and self.adding is Adding.ANY_ORDER

    @property
    def mirrors_keys(self) -> bool:
        """Whether the first consumer has a tile's last 64 keys: it has the most of dQ to do, and a window's first rows see none
        of those. Ours / FA3 at head dim 64, without and with: 256 keys at 16k 1.071 and 1.096, 4k 1.073 and 1.081, 1024 1.038 and
        1.050, 1.032 and 1.043, 4096 1.011 and 1.015; below a diagonal alone 0.996 of it (H200, 2026-11-22)."""
        return self.asks_early and Feature.LEFT in self.features

    @property
    def k_readers(self) -> int:
        """Consumers that read a tile's K. (Divided by products one has dK, and reads V.)"""
        return 2 if self.division is Division.PRODUCTS else self.consumers

    @property
    def writers(self) -> int:
        """Warps that add parts of dQ up in an order (backward_writer.py); in any order the consumers add."""
        if self.adding is Adding.ANY_ORDER:
            return 0
        return 2 if self.takes_tile_after_tile else 1

    @property
    def adders(self) -> int:
        """Consumers that compute parts of dQ."""
        return 1 if self.division is Division.PRODUCTS else self.consumers

    @property
    def sections_take_turns(self) -> bool:
        """Whether sections of heads take turns at two orders of tiles, the longest last and the longest first, so that the grid
        ends evenly: below a diagonal alone a tile's rows are among those of the tile before it, in either order. An order's cost
        at head dim 128, causal, without and with: 16k 1.07 and 1.03, 4k 1.04 and 1.00 (GQA: key_tiles.nth_place); at 256 with two
        sums of dQ (may_have_two_sums) 16k 1.15 and 1.08, 8k 1.10 and 1.02, 4k 1.08 and 1.01. At head dim 64 both are 0.99 (H200,
        2026-11-22)."""
        others = {Feature.LEFT, Feature.DOCUMENTS, Feature.VARLEN} & set(self.features)
        follows = self.division is Division.AHEAD or self.division is Division.PRODUCTS
        is_ordered = self.adding is Adding.ORDER and follows and self.takes_tile_after_tile
        return is_ordered and Feature.RIGHT in self.features and not others

    @property
    def may_have_two_sums(self) -> bool:
        """Whether the tiles of a head may add to two sums of dQ in turn, each in an order of its own. Divided by products tiles
        of 64 keys follow one another by one block of rows, sooner than a mark is set and seen; those of different sums need not
        wait for one another. What that is worth: backward_sizes.FULL_ROWS."""
        others = {Feature.LEFT, Feature.DOCUMENTS, Feature.VARLEN} & set(self.features)
        is_ordered = self.adding is Adding.ORDER and self.division is Division.PRODUCTS
        return is_ordered and self.takes_tile_after_tile and not others

    @property
    def takes_heads_apart(self) -> bool:
        """Whether packed sequences of grouped heads come a head at a time: shortest tiles first, many heads would be at work at
        once, with more rows than L2 holds. An order's cost, packed GQA 32/8 causal: 1.06 and 1.27; full 1.04 and 1.01, one head a
        group 1.02 either way, head dim 256 1.25 and 1.11 (H200, 2026-11-21)."""
        is_ordered = self.adding is Adding.ORDER and self.division is Division.AHEAD
        return is_ordered and {Feature.VARLEN, Feature.RIGHT} <= set(self.features)

    @property
    def sections_in_share(self) -> int:
        """How many sections of heads L2's share holds. Where more than one, the last two are joined: that ends the grid as
        evenly as wide ones do. Ours / FA3, one and so many: head dim 64 causal 512 1.154 and 1.174, 4k 1.028 and 1.044, 16k
        1.008 and 1.015; 256 causal 512 0.993 and 1.019, 1k 0.995 and 1.015, 2k 1.006 and 1.026 (H200, 2026-11-21)."""
        others = {Feature.LEFT, Feature.DOCUMENTS, Feature.VARLEN} & set(self.features)
        if not self.begins_apart or Feature.RIGHT not in self.features or others:
            return 1
        return 2 if self.division is Division.TURNS else 4

    @property
    def part_buffers(self) -> int:
        """Buffers for parts of dQ, over all adders: one each in turns, and where K or a bias has the memory of the second."""
        alone = self.division is Division.TURNS or self.k_places == 2 or (self.stages_bias and self.dim == 128)
        return self.adders if alone else 2 * self.adders

    @property
    def part_columns(self) -> int:
        """Columns of the parts in which dQ is added up."""
        halves = self.dim // 2
        return {Division.KEYS: halves, Division.AHEAD: halves, Division.TURNS: self.dim, Division.PRODUCTS: 64}[self.division]

    @property
    def part_layout(self) -> PartLayout:
        long = self.division is Division.PRODUCTS and self.rows_seen is not RowsSeen.FEW
        return PartLayout.ROWS if long else PartLayout.REGISTERS

    @property
    def keeps_v(self) -> bool:
        """Whether each consumer keeps its keys' V in registers (others, and dropout, have no room): shared memory is the limit.
        Ours / FA3 at head dim 64 went from 0.931 to 0.974 (causal 16k) and from 0.958 to 0.992 (full 4k; H200, 2026-11-21)."""
        return self.division is Division.TURNS and self.dim_v == 64 and Feature.DROPOUT not in self.features

    @property
    def parts_late(self) -> bool:
        """Whether pairs of P come apart when dP is there and not before, in float16 (softmax.to_32_bit_behind). At head dim 64
        ours / FA3 went from 0.810 to 1.030 (full 1k), 0.839 to 1.046 (full 4k), 0.866 to 1.040 (causal 4k) and 0.857 to 1.041 (a
        window of 1024); at 128, where registers were enough, from 1.059 to 1.050 (full 4k; H200, 2026-11-22)."""
        return self.division is Division.TURNS

    @property
    def brings_v_by_ds(self) -> bool:
        """Whether V comes to its registers by a slot of dS's ring, free two blocks before a tile ends; K has V's place too."""
        return self.keeps_v and self.takes_tile_after_tile and self.adding is Adding.ANY_ORDER

    @property
    def parts(self) -> int:
        """Parts of a block of rows."""
        return self.dim // self.part_columns

    def __str__(self) -> str:
        dim = str(self.dim) if self.dim == self.dim_v else f"{self.dim}/{self.dim_v}"
        text = f"{self.rows}x{self.keys} d{dim}, divided by {self.division.value}, {self.q_stages}+{self.do_stages} stages"
        text += {
            Adding.ANY_ORDER: "", Adding.ORDER: ", dQ summed in a fixed order",
            Adding.ROUNDED: ", dQ summed in a fixed order and rounded by its last tile",
        }[self.adding]  # fmt: skip
        if self.rows_seen is RowsSeen.FEW:
            text += f", {self.rows_seen.value}"
        return text + "".join(f", {feature.value}" for feature in self.features)
