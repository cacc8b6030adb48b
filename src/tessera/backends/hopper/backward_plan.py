"""Which BackwardConfig a problem gets, and what that was worth."""

from __future__ import annotations

from dataclasses import replace

import torch

from tessera.backends.hopper.backward_config import Adding, BackwardConfig, Division, RowsSeen
from tessera.backends.hopper.bias_planes import gradient_features, has_room, keeps_ds, keeps_ds_at_lengths
from tessera.backends.hopper.config import Feature
from tessera.backends.hopper.plan import MODIFIERS, features_of
from tessera.problem import Layout, Problem, Reproducibility

FEW_KEYS = 512
"""Up to so many keys dQ's zeros and the kernel that rounds it cost more than that the last tile rounds: by default under a
diagonal at head dim 128 (ours / FA3 at 512 1.146 and 1.002; at 64 tile after tile is faster, 1.146 and 1.093), and where an order
is kept anyway (over order alone 1.03 under a diagonal, 0.99 without; at 1k 0.98 and 0.92; H200, 2026-11-21)."""
FEW_ROWS = 1280
"""Where a tile of keys sees up to so many rows, over all heads of a group, its end costs enough to run it under the next one's
start at head dim 128. The second place for K takes a buffer for parts of dQ, which long tiles miss: time over FA3's without and
with, window 256 1.041 and 0.950, full 512 0.964 and 0.886, 1k 0.997 and 0.977, causal 1k 0.973 and 0.946, 2k 0.971 and 0.962;
but full 4k 0.985 and 0.996, 16k 0.98 and 1.03, GQA 32/8 1k 0.785 and 0.794 (H200, 2026-11-21)."""
SOME_ROWS = 2560
MORE_ROWS = 5120
"""Up to so many rows (MORE_ROWS: at head dim 128) full attention's last tiles are not divided: multiprocessors that are left
round dQ meanwhile. Ours / FA3, divided and so: head dim 128 2k 1.038 and 1.066, 4k 1.064 and 1.071; 64 2k 1.036 and 1.056, 4k
1.064 and 1.043; 256 2k 1.033 and 1.041, 4k 1.046 and 1.036 (H200, 2026-11-22)."""
NARROW_WINDOW = 256
APART = 32
"""In an order, under windows of up to NARROW_WINDOW keys, tiles of APART heads come in turn, of whose rows L2 holds what is at
work. With as many heads as its share holds, with 32 and with all of 128, over FlashAttention-3's time: head dim 64, 256 keys at
16k 1.06 to 1.11, 0.98 to 1.00 (all), 4k 1.08 to 1.11, 1.06, 1.11; 128 at 16k 1.06 and 0.98 (all of 16); 1024 keys level at
16k, but head dim 128 at 4k 1.26 of any order for 1.04; 4096 keys 1.07 and 1.20 (H200, 2026-11-22)."""
MANY_TILES = 512
"""With fewer than about four for each multiprocessor those of a head begin together, and wait for one another."""
LEAST_SCALE = 1e-20
"""Below, lse over the scale might be no number in float32."""


def backward_config(problem: Problem) -> BackwardConfig:
    """The configuration for a problem."""
    family = _family(problem, keeps_ds(problem))
    rounded = next((config for config in family if config.adding is Adding.ROUNDED), None)
    if rounded is not None and _rounds(problem, rounded):
        return rounded
    return next(config for config in family if config.rows_seen is RowsSeen.MANY or _few_rows_see(problem, config))


def _rounds(problem: Problem, rounded: BackwardConfig) -> bool:
    """Whether the last tile rounds dQ, where it may."""
    shape = problem.shape
    if not 0 < shape.seqlen_q <= shape.seqlen_k <= FEW_KEYS:  # with fewer keys some rows may see none
        return False
    tiles = shape.batch * shape.heads_kv * -(-shape.seqlen_k // rounded.keys)
    return problem.reproducibility is Reproducibility.BITWISE or tiles >= MANY_TILES


def _short_form(problem: Problem, plain: BackwardConfig) -> BackwardConfig | None:
    """Where few rows see a tile, if that has a form of its own: turns that go on from tile to tile (head dim 128), last tiles not
    divided (64), parts of dQ as in registers, the next one's product under this one's way out (256: time over FA3's without and
    with it at 512 0.975 and 0.959, causal 0.985 and 0.965, 1k 1.013 and 1.006, 0.995 and 0.988, but 2k 0.964 and 0.984; H200,
    2026-11-22)."""
    if plain.adding is not Adding.ANY_ORDER:
        return None
    parts = plain.division is Division.PRODUCTS and problem.shape.head_dim > 192  # the last part's box must begin in dQ
    of_parts = parts and set(plain.features) <= {Feature.RIGHT, Feature.SINKS, Feature.SCALE_FIRST}
    has_one = plain.division is Division.AHEAD or of_parts or (plain.division is Division.TURNS and plain.divides_remainder)
    return replace(plain, rows_seen=RowsSeen.FEW) if has_one else None


def _few_rows_see(problem: Problem, config: BackwardConfig) -> bool:
    """Whether that form pays. At head dim 256 it depends on L2, so on all rows."""
    rows, is_some = problem.shape.group * problem.shape.seqlen_q, config.rows_seen is RowsSeen.SOME
    if config.division is Division.AHEAD:
        return _rows_of_a_tile(problem) <= (MORE_ROWS if is_some else FEW_ROWS)
    is_full = config.division is Division.TURNS and Feature.RIGHT not in config.features
    return rows <= (SOME_ROWS if is_some or is_full else FEW_ROWS)


def _rows_of_a_tile(problem: Problem) -> int:
    """About how many rows a tile of 128 keys sees, over all heads of a group."""
    shape, mask = problem.shape, problem.mask
    rows = shape.group * (shape.seqlen_q if mask.right is None else shape.seqlen_q // 2)
    return rows if mask.left is None else min(rows, _rows_of_a_window(problem))


def _rows_of_a_window(problem: Problem) -> int:
    """The same at any length, where a row sees so many keys to its left and right."""
    mask = problem.mask
    return problem.shape.group * ((mask.left or 0) + max(mask.right or 0, 0) + 128)


def sees_few_keys(problem: Problem) -> bool:
    """Whether no row sees more keys than a narrow window has."""
    left, right = problem.mask.left, problem.mask.right
    return left is not None and left + max(right or 0, 0) <= NARROW_WINDOW


def backward_family(problem: Problem) -> tuple[BackwardConfig, ...]:
    """The configurations that problems like this one have at any length, on which it may depend whether there is room for dS."""
    return tuple(config for keeps in keeps_ds_at_lengths(problem) for config in _family(problem, keeps))


def _family(problem: Problem, keeps: bool) -> tuple[BackwardConfig, ...]:
    """The same, with dS kept or not: one; or two, the first for few rows; or after them that whose last tile rounds dQ. For that
    one tile of keys must be the last that adds to every row, whatever the data. (Under a window each row has another, and tiles
    that look ahead for what they round wait for one another one by one: twice as slow at 16k, H200, 2026-11-21.)"""
    is_bitwise, mask = problem.reproducibility is Reproducibility.BITWISE, problem.mask
    ordered = _divided(problem, Adding.ORDER, keeps)
    plain = ordered if is_bitwise else _divided(problem, Adding.ANY_ORDER, keeps)
    rounded = replace(ordered, adding=Adding.ROUNDED)
    if ordered.division is Division.AHEAD:
        rounded = replace(rounded, division=Division.TURNS)
    forms: tuple[BackwardConfig, ...] = (plain,)
    short = _short_form(problem, plain)
    if short is not None and plain.division is not Division.TURNS and plain.divides_remainder:
        forms = (replace(plain, rows_seen=RowsSeen.SOME), plain)
    if short is not None:
        forms = (short,) if mask.left is not None and _rows_of_a_window(problem) <= FEW_ROWS else (short, *forms)
    is_fast = plain.division is Division.TURNS and plain.takes_tile_after_tile
    pays = not is_fast and (is_bitwise or (mask.right is not None and Feature.SOFTCAP not in plain.features))
    has_last_tile = problem.layout is Layout.DENSE and not mask.bounds and mask.left is None and (mask.right or 0) >= 0
    if pays and has_last_tile and rounded.division is Division.TURNS and Feature.DROPOUT not in ordered.features:
        return *forms, rounded
    return forms


def _divided(problem: Problem, adding: Adding, keeps: bool) -> BackwardConfig:
    """The division of the work that a problem gets."""
    features = (*features_of(problem), *gradient_features(problem, keeps))
    dim, dim_v = _padded(problem.shape.head_dim), _padded(problem.shape.head_dim_v)
    config = BackwardConfig(Division.KEYS, 64, 128, dim, dim_v, 2, 2, adding, features)
    if max(dim, dim_v) == 256:
        # One stage of dO leaves room to double the buffers of P, dS and dQ: 3 to 6% over two (H200, 4k and 16k, 2026-11-21).
        return replace(config, division=Division.PRODUCTS, keys=64, do_stages=1)
    kinds = (MODIFIERS - {Feature.SCALE_FIRST}) & set(features)
    if max(dim, dim_v) == 128 and (
        len(kinds) > 1 or (Feature.BIAS in kinds and not has_room(features, adding is not Adding.ANY_ORDER))
    ):
        # The places of a bias, or two modifiers, do not fit beside dK and dV in one consumer (the compile gate).
        return replace(config, division=Division.PRODUCTS, keys=64)
    # of the modifiers, three consumers have registers for dropout alone, in bfloat16, where key tiles begin at a patch of draws
    fits = not kinds or (kinds == {Feature.DROPOUT} and problem.dtype == torch.bfloat16 and Feature.KEY_START not in features)
    if max(dim, dim_v) == 64 and fits and Feature.SOFTCAP not in features:
        # Over two consumers and 128 keys: 1.05 to 1.13 (H200, 1k and 16k, 2026-11-21). With a softcap's slope 160 registers spill
        # in the loop.
        return replace(config, division=Division.TURNS, keys=192, q_stages=3, do_stages=3)
    if kinds:
        # P ahead with ALiBi or dropout costs 1.01 to 1.05 times this (H200, 4k, 2026-11-21).
        return config
    if dim == dim_v == 128 and Feature.SOFTCAP not in features and not 0 < problem.score.scale < LEAST_SCALE:
        # Over in step: 1.03 to 1.05, 1.03 more for tile after tile up to 2k; in a fixed order over in turn 1.02 to 1.06 (H200,
        # 2026-11-21). A softcap's slope does not fit.
        return replace(config, division=Division.AHEAD)
    if max(dim, dim_v) == 128 and adding is Adding.ORDER:
        # A tile that waits for another's dQ then holds up one consumer and not both: 1.02 to 1.06 over in step (H200, 1k and 16k,
        # 2026-11-21). In any order in step is better: 0.99 to 1.04.
        return replace(config, division=Division.TURNS)
    return config


def _padded(dim: int) -> int:
    """The head dim that a kernel is made for; columns past the tensor's own read as zeros."""
    return next(size for size in (64, 128, 256) if size >= dim)
