"""Which configuration for a problem: the head dim bounds what fits, the rows' mean number of keys what pays.

Every threshold below comes from the interleaved grid in benchmarks/LOG.md (one H200, 2026-11-21, 16k tokens, bf16): ratios are
those of the two configurations beside it.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from tessera.backends.hopper.config import Feature, ForwardConfig, Overlap, Pairing, Staging
from tessera.problem import Bias, Layout, Problem

SHARED_LIMIT = 227 * 1024 - 1024
"""Bytes of shared memory a block may have on sm_90, less the barriers."""


MODIFIERS = frozenset(
    {Feature.SCALE_FIRST, Feature.ALIBI, Feature.BIAS, Feature.BIAS_OF_KEYS, Feature.BIAS_OF_ROWS, Feature.DROPOUT}
)
"""What happens to scores beside scale, softcap and mask."""
UNSTAGED = frozenset({Feature.FLOAT32_BIAS, Feature.KEY_START})
"""Where a bias of every score's own does not come by TMA: the innermost coordinate of a TMA box must be a multiple of 16 bytes
(else an illegal instruction), and behind left padding blocks of keys begin anywhere."""


def features_of(problem: Problem) -> tuple[Feature, ...]:
    """What must be compiled in, always in the same order."""
    mask, score = problem.mask, problem.score
    wanted = {
        Feature.VARLEN: problem.layout is Layout.VARLEN,
        Feature.SEQUSED_Q: "seqused_q" in problem.lengths,
        Feature.SEQUSED_K: "seqused_k" in problem.lengths,
        Feature.LEFT: mask.left is not None,
        Feature.RIGHT: mask.right is not None,
        Feature.KEY_START: "key_start" in mask.bounds,
        Feature.KEY_END: "key_end" in mask.bounds,
        Feature.QUERY_END: "query_end" in mask.bounds,
        Feature.DOCUMENTS: "document_begin" in mask.bounds,
        Feature.SOFTCAP: score.softcap > 0,
        Feature.SINKS: score.sinks is not None,
        Feature.SCALE_FIRST: score.scale <= 0 and not score.softcap and score.alibi is None and score.bias is None,
        Feature.ALIBI: score.alibi is not None,
        _form_of(score.bias): score.bias is not None,
        Feature.FLOAT32_BIAS: score.bias is not None and score.bias.dtype == torch.float32,
        Feature.DROPOUT: score.dropout_p > 0,
    }
    return tuple(feature for feature, needed in wanted.items() if needed)


def _form_of(bias: Bias | None) -> Feature:
    """Which of its two last dimensions a bias has."""
    if bias is None or bias.shape[2] > 1 < bias.shape[3]:
        return Feature.BIAS
    return Feature.BIAS_OF_KEYS if bias.shape[3] > 1 else Feature.BIAS_OF_ROWS


def split_dim(dim: int) -> tuple[int, ...]:
    """A head dim as one power of two, or two that waste less: 96 = 64 + 32. Columns past it read as zeros."""
    for parts in ((16,), (32,), (32, 16), (64,), (64, 16), (64, 32), (128,), (128, 16), (128, 32), (128, 64), (256,)):
        if sum(parts) >= dim:
            return parts
    raise ValueError(f"head_dim={dim}: at most 256")


def mean_keys(problem: Problem) -> float:
    """Keys that a row attends to on average, as far as the sizes tell (packed sequences: as if all were equally long)."""
    shape = problem.shape
    per_row = problem.scores() / max(1, shape.heads_q * shape.seqlen_q)
    return per_row if problem.layout is Layout.VARLEN else per_row / max(1, shape.batch)


def forward_config(problem: Problem) -> ForwardConfig:
    """The configuration for a problem."""
    return _config_for(problem, mean_keys(problem), problem.shape.seqlen_q)


def forward_family(problem: Problem) -> tuple[ForwardConfig, ...]:
    """The configurations that problems like this one have at any length: they are compiled together, so that a new length
    never compiles. Each kind of problem has one threshold of length at most, so its two ends are all there is."""
    short, long = _config_for(problem, 0.0, 0), _config_for(problem, float("inf"), 1 << 30)
    return (short,) if short == long else (short, long)


def _config_for(problem: Problem, keys: float, rows: int) -> ForwardConfig:
    """The configuration for `rows` rows that attend to `keys` keys on average."""
    alone = _config_alone(problem, keys)
    pairing = _pairing(alone)
    if pairing is Pairing.ROWS and problem.shape.group % 2 == 0 and _kind(alone) in HEADS_OF:
        pairing = Pairing.HEADS
    blocks = -(-rows // alone.rows)
    if pairing is None or (pairing is Pairing.ROWS and blocks % 2 == 1 and blocks < 100):  # half a pair is work for nothing
        return alone
    enough = PAIRED_FROM[_kind(alone)]
    enough = min(enough, HEADS_FROM) if pairing is Pairing.HEADS else enough
    if keys < enough or rows < min(enough, 4096):
        return alone
    paired = replace(alone, pairing=pairing)
    # d192: with two stages of 64 keys, the way from one program to the other is too long (0.95 to 0.98)
    return replace(paired, stages=3, staging=Staging.HALVES) if len(alone.dims_v) == 2 else paired


PAIRED_FROM = {
    (192, 192, False): 8192, (192, 192, True): 4096, (192, 128, False): 4096, (128, 128, False): 8192, (128, 128, True): 8192,
    (256, 256, True): 8192,
}  # fmt: skip
"""Keys a row from which pairs of programs pay, by head dims and whether rows end at a diagonal. Over single ones, in two runs:
d192 full 1.00 at 4k and 8k, 1.002 at 16k, causal 0.98 at 1k, 1.00 at 4k, 1.01 at 16k; 192/128 full 1.01 at 4k and 8k, causal 1.00
and 1.01; d128 full 0.98 at 1k, 1.00 at 4k, 1.01 at 8k and 16k, causal 0.99 at 4k, 1.00 at 8k and 16k; d256 full 1.00 from 4k on,
causal 0.99, 1.00, 1.02."""
HEADS_OF = ((128, 128, True), (192, 192, True))
"""Kinds of problems whose programs pair by heads: those that were run so."""
HEADS_FROM = 4096
"""Keys from which they do: d128 causal 0.98 at 1k, 0.99 at 2k, 1.00 at 4k, 1.01 to 1.02 at 8k, 1.02 at 16k."""


def _kind(config: ForwardConfig) -> tuple[int, int, bool]:
    return sum(config.dims), sum(config.dims_v), Feature.RIGHT in config.features


def _pairing(config: ForwardConfig) -> Pairing | None:
    """Whether programs may pair. Three consumers don't: d64 0.95, d96 1.00, d128 0.98 to 1.00."""
    plain = set(config.features) <= {Feature.RIGHT, Feature.SOFTCAP, Feature.SINKS}
    return Pairing.ROWS if plain and config.consumers == 2 and _kind(config) in PAIRED_FROM else None


def _config_alone(problem: Problem, keys: float) -> ForwardConfig:
    """The same for programs by themselves."""
    dims, dims_v = split_dim(problem.shape.head_dim), split_dim(problem.shape.head_dim_v)
    widest = max(sum(dims), sum(dims_v))
    features = features_of(problem)
    pairs = ForwardConfig(
        consumers=2, keys=128 if sum(dims_v) <= 128 and sum(dims) <= 192 else 64, stages=3, dims=dims, dims_v=dims_v,
        overlap=Overlap.WHOLE if widest <= 192 else Overlap.MAXIMA, staging=Staging.OWN,
        consumer_registers=240, producer_registers=24, features=features,
    )  # fmt: skip
    if MODIFIERS & set(features):
        return deepest(_with_modifiers(pairs, keys))
    # over P after the maxima: d64 1.07 (512 1.03), d128 causal 1.03 at 512 and 1k, 1.07 from 2k on, full 1.05 to 1.08 (1.02 to
    # 1.07 over three consumers), d96 to 1k and 192/128 1.04, d192 1.04, d256 1.01; windows of 1024 at d128 1.05, at d64 0.99
    pairs = replace(pairs, overlap=Overlap.AT_ONCE if widest <= 192 else Overlap.SCORES)
    triples = _by_three(pairs, Overlap.SCORES)
    # Q ahead: 1.07 (d64), 1.04 (d128), 1.02 (d96) at 512 causal, 1.01 to 1.02 at 1k, 1.00 from 2k on; 0.99 of packed sequences
    pairs = replace(pairs, queries=1 if problem.layout is Layout.VARLEN else 2)
    window = {Feature.LEFT, Feature.RIGHT} <= set(features)
    if widest <= 64:
        if window and keys <= 2048:
            # 64 keys over 128: 17 blocks for a window of 1024 where those take 9 of twice. 1.23 at 256, 1.11 at 512, 1.05 at
            # 1024 (P after the maxima: 1.26, 1.05, 0.96). Consumers stand a block apart: three stages would not load ahead
            return replace(triples, keys=64, overlap=Overlap.DRIFTING, queries=pairs.queries, held=len(dims), stages=5)
        if Feature.RIGHT in features and keys <= 640:
            # 128 rows over 192: causal 1.08 at 1k, 0.97 at 2k, 0.92 at 4k. Q held: 1.015 at 512, 1.02 at 1k
            return deepest(replace(pairs, held=len(dims)))
        if window:
            # P at once over no overlap: 1.13 for a window of 4096 at 16k; 64 keys 0.90 of it
            return deepest(replace(triples, queries=pairs.queries))
        # in float16 over P after the maxima 1.08 to 1.10, wide windows over no overlap 1.13 (H200, 2026-11-22)
        # two Qs over one: full 512 1.045, 1k 1.010 to 1.017, 4k 1.006, 16k 1.00, causal 4k 1.008, packed 1.008
        return deepest(replace(triples, queries=2))
    if dims == dims_v == (128,) and _has_many_keys(problem, features, keys):
        many = replace(triples, keys=64, overlap=Overlap.DRIFTING, stages=4)
        # two Qs over one: windows 1.03, packed 1.00, under a diagonal 0.99
        return many if features == (Feature.RIGHT,) else replace(many, queries=2, staging=Staging.QUERY)
    ragged = _is_ragged(features)
    if widest <= 96 and keys > (2048 if ragged else 1536):
        # three over two: 1.06 at 2k, 1.07 at 4k and 16k full, 1.08 at 16k causal; 0.98 at 1k full, 0.97 at 2k causal
        return replace(triples, overlap=Overlap.NONE, stages=2)
    if sum(dims_v) > 128 and len(dims) == 2:
        # d192, over a part of Q held (full) or none (causal): 1.01 at 4k, 8k and full 16k, 1.015 at causal 16k
        return deepest(replace(pairs, held=len(dims)))
    return deepest(pairs)


def _has_many_keys(problem: Problem, features: tuple[Feature, ...], keys: float) -> bool:
    """Whether three consumers of 64 keys without turns pay at head_dim 128. Over two of 128: windows of 256 1.05, with softcap
    1.085, with sinks 1.04; packed windows 1.05, causal 1.048 (sequences of 2000 rows in the mean), full 0.985; causal 2k 1.00, 4k
    1.003 to 1.007, over pairs 8k 1.014 to 1.022, 16k 1.012 to 1.014, over pairs by heads 1.00; full 0.98 to 1.00; windows of 128
    0.98 to 0.99. In float16 windows of 1024 1.04, causal 16k 0.98; packed not measured there (H200, 2026-11-22)."""
    kinds = set(features)
    if {Feature.LEFT, Feature.RIGHT} <= kinds <= {Feature.LEFT, Feature.RIGHT, Feature.SOFTCAP, Feature.SINKS}:
        return keys > 200
    if problem.dtype is torch.float16:
        return False
    if Feature.VARLEN in kinds:
        return kinds in ({Feature.VARLEN, Feature.RIGHT}, {Feature.VARLEN, Feature.LEFT, Feature.RIGHT}) and keys > 700
    return features == (Feature.RIGHT,) and keys > 2000 and problem.shape.group % 2 == 1


def _by_three(pairs: ForwardConfig, overlap: Overlap) -> ForwardConfig:
    """The same by three consumers, which have 160 registers a thread."""
    return replace(pairs, consumers=3, consumer_registers=160, producer_registers=32, overlap=overlap)


def _with_dropout(pairs: ForwardConfig, keys: float) -> ForwardConfig:
    """Dropout alone: P is taken at once, as without, and dropped when it is there; its halves are joined (launch.py), or d256
    would spill. Over P after the maxima, without overlap, in blocks of 64 keys: d256 1.13 to 1.19, d192 1.15 to 1.19, 192/128
    1.28 to 1.33. Q ahead: causal 512 1.05 to 1.08, 1k 1.02 to 1.04, 4k 1.00 to 1.01, full 1k 1.01 (H200, 2026-11-22)."""
    widest = max(sum(pairs.dims), sum(pairs.dims_v))
    if Feature.KEY_START in pairs.features:  # keys of its own for each score
        return replace(pairs, keys=64 if widest > 128 else pairs.keys, overlap=Overlap.NONE)
    queries = 1 if Feature.VARLEN in pairs.features else 2
    pairs = replace(pairs, overlap=Overlap.AT_ONCE if widest <= 192 else Overlap.SCORES, queries=queries)
    uneven = {Feature.LEFT, Feature.DOCUMENTS} & set(pairs.features) or (Feature.RIGHT in pairs.features and keys <= 640)
    if widest > 64 or uneven:
        return pairs
    return _by_three(pairs, Overlap.SCORES)


def _with_modifiers(pairs: ForwardConfig, keys: float) -> ForwardConfig:
    """What modifiers keep of a tile's rows, and dropout's draws of a block, want registers: fewer keys, or no softmax of its own
    under P V, until nothing spills in the loops (the compile gate, Triton 3.6.0). Three consumers of 64 keys, where shares are
    even, take 1.20 of two's time with a bias of keys, 0.95 with a whole bias (H200, 4k, 2026-11-21)."""
    widest = max(sum(pairs.dims), sum(pairs.dims_v))
    kinds = set(pairs.features) & (MODIFIERS - {Feature.SCALE_FIRST})
    even = not _is_ragged(pairs.features)
    if kinds == {Feature.DROPOUT}:
        return _with_dropout(pairs, keys)
    if widest > 128:
        narrow = widest == 256 and len(kinds) > 1
        # d256, P dying before the exponentials over no overlap: ALiBi causal 4k 1.20, 1k 1.08, a bias of keys 4k 1.05 (H200,
        # 2026-11-22); ALiBi on full rows spills
        cut = {Feature.LEFT, Feature.DOCUMENTS, Feature.KEY_START, Feature.FLOAT32_BIAS} & set(pairs.features)
        fits = kinds == {Feature.BIAS_OF_KEYS} or (kinds == {Feature.ALIBI} and Feature.RIGHT in pairs.features)
        overlap = Overlap.MAXIMA if fits and not cut and pairs.dims == pairs.dims_v == (256,) else Overlap.NONE
        return replace(pairs, keys=32 if narrow else 64, overlap=overlap)
    stages = Feature.BIAS in kinds and not UNSTAGED & set(pairs.features)
    if len(kinds) > 1:
        return replace(pairs, keys=64)
    triples = _by_three(pairs, Overlap.NONE)
    if kinds == {Feature.BIAS} and stages:
        # full and causal, times of none, by TMA: d64 1.54 and 1.54 (64 keys 1.70, 1.65; two consumers 1.83, 1.74; read by
        # threads 2.40, 2.48), d128 1.40 and 1.36 (without overlap 1.51, 1.52; two consumers 1.64, 1.55; by threads 1.83, 2.03;
        # H200, 2026-11-22)
        long = replace(triples, keys=128) if widest <= 64 else replace(triples, keys=64, overlap=Overlap.MAXIMA)
        return replace(long, stages_bias=True)
    if kinds == {Feature.BIAS} and even:
        return replace(triples, keys=64)
    # P dies before the exponentials are taken: at d128 ALiBi 1.11 of none for 1.14, a bias of keys 1.23 for 1.28;
    # at d64 a bias of keys 1.59 for 1.46
    dies = widest == 128 and kinds & {Feature.ALIBI, Feature.BIAS_OF_KEYS}
    return replace(pairs, overlap=Overlap.MAXIMA) if dies else pairs


def _is_ragged(features: tuple[Feature, ...]) -> bool:
    """Whether the consumers' shares of a tile differ."""
    return bool({Feature.RIGHT, Feature.LEFT, Feature.DOCUMENTS} & set(features))


def deepest(config: ForwardConfig) -> ForwardConfig:
    """The same with as much in flight as shared memory has room for: Q's tiles as asked, if not one, then K's and V's stages,
    three at most; half a buffer for O, where a whole one does not fit."""
    room = [(queries, stages) for queries in dict.fromkeys((config.queries, 1)) for stages in (3, 2)]
    candidates = [replace(config, queries=queries, stages=stages) for queries, stages in room]
    if len(config.dims_v) == 1:
        candidates.append(replace(config, queries=1, stages=2, staging=Staging.HALVES))
    for candidate in candidates:
        if candidate.shared_bytes() <= SHARED_LIMIT:
            return candidate
    raise ValueError(f"{config}: no room in shared memory")


LOW = 0.7
"""Time of a low tile (two of three consumers at work) over a tall one's: two alone take 2420 cycles a block at head_dim 128,
three 3520. With low tiles over without (idle consumers then worked past the end): d64 full 512 1.04, 1k 1.05, 2k 1.02, 16k 1.01,
d128 1.01 (H200, 2026-11-21)."""


def tall_blocks(config: ForwardConfig, rows: int, heads: int, multiprocessors: int) -> int:
    """How many row blocks of `rows` rows are tall, so that the grid ends soonest: all heads' tall tiles are drawn first, then the
    low ones, by whoever is free. What low tiles can win is a round's end, so at most two rounds of tall ones are given up."""
    most = rows // (config.rows * config.tiles_together)
    least = max(0, most - 2 * multiprocessors // heads - 2)
    return min(range(most, least - 1, -1), key=lambda tall: _end(config, rows, heads, multiprocessors, tall))


def _end(config: ForwardConfig, rows: int, heads: int, multiprocessors: int, tall: int) -> float:
    """When the last tile ends, in times of a tall tile."""
    rounds, ahead = divmod(tall * heads, multiprocessors)  # `ahead` have one tall tile more
    low = -(-(rows // config.tiles_together - tall * config.rows) // config.low_rows) * heads
    end = float(rounds + (ahead > 0))
    while True:
        slack = end - rounds + 1e-6
        room = (multiprocessors - ahead) * int(slack / LOW) + ahead * int(max(0.0, slack - 1) / LOW)
        if room >= low:
            return end
        steps = [rounds + (int(slack / LOW) + 1) * LOW, rounds + 1 + (int(max(0.0, slack - 1) / LOW) + 1) * LOW]
        end = min(steps)
