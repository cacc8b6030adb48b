"""ALiBi, bias and dropout as kernel arguments: described for the compiler, and taken from a call's operands.

The kernels' side is pieces/modifiers.py, pieces/bias.py and pieces/dropout.py. A bias is read as TMA reads q, k and v: what is
not 16-byte aligned is copied first, as are keys that do not follow one another in memory.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import pad

from tessera import jit
from tessera.backends.hopper.config import ROWS, Feature
from tessera.dropout import DRAWS, keep_scale, threshold
from tessera.operands import Operands
from tessera.problem import Score

_BIASES = frozenset({Feature.BIAS, Feature.BIAS_OF_KEYS, Feature.BIAS_OF_ROWS})
_KINDS = frozenset({Feature.ALIBI, Feature.DROPOUT}) | _BIASES
_BYTES = 16


def are_in(features: tuple[Feature, ...]) -> bool:
    """Whether a kernel of these features takes any of the arguments."""
    return not _KINDS.isdisjoint(features)


def describe(
    features: tuple[Feature, ...],
    element: str,
    arguments: dict[str, jit.Tiles | jit.Pointer | jit.Scalar],
    constants: dict[str, object],
) -> None:
    """Adds the arguments that the features need, and None for the others. `element`: q's type."""
    wide = Feature.FLOAT32_BIAS in features
    align = _BYTES // (4 if wide else 2)
    groups: tuple[tuple[bool, dict[str, jit.Pointer | jit.Scalar]], ...] = (
        (Feature.ALIBI in features, {"slopes": jit.Pointer("fp32", align=4), "slopes_stride": jit.Scalar("i32")}),
        (
            not _BIASES.isdisjoint(features),
            {
                "bias": jit.Pointer("fp32" if wide else element),
                **{f"bias_{dim}": jit.Scalar("i64", align=align) for dim in ("batch", "head", "row")},
            },
        ),
        (
            Feature.DROPOUT in features,
            {**dict.fromkeys(("key_low", "key_high", "threshold"), jit.Scalar("u32")), "keep_scale": jit.Scalar("fp32")},
        ),
    )
    for wanted, group in groups:
        arguments |= group if wanted else {}
        constants |= {} if wanted else dict.fromkeys(group)


def describe_staged(
    stages: bool,
    element: str,
    keys: int,
    arguments: dict[str, jit.Tiles | jit.Pointer | jit.Scalar],
    constants: dict[str, object],
) -> None:
    """The same for a bias that TMA reads, in blocks of 64 rows and `keys` keys."""
    if stages:
        arguments["bias_map"] = jit.Tiles(element, (1, 1, ROWS, keys))
    else:
        constants["bias_map"] = None


def describe_gradient(
    features: tuple[Feature, ...],
    element: str,
    arguments: dict[str, jit.Tiles | jit.Pointer | jit.Scalar],
    constants: dict[str, object],
) -> None:
    """The same for the bias's gradient: blocks of dS as TMA keeps them, or a dense float32 tensor that is added to."""
    strides = dict.fromkeys(("dbias_batch", "dbias_head", "dbias_row"), jit.Scalar("i64"))
    if Feature.KEPT_DS in features:
        arguments["ds_map"] = jit.Tiles(element, (1, ROWS, ROWS))
    else:
        constants["ds_map"] = None
    if Feature.BIAS_GRADIENT in features:
        arguments |= {"dbias": jit.Pointer("fp32"), **strides}
    else:
        constants |= dict.fromkeys(("dbias", *strides))


Staging = Callable[[int, tuple[int, ...], tuple[int, ...]], bytes]
"""What makes TMA's map of an address, sizes and strides."""


def values(score: Score, operands: Operands, kept: list[Tensor | None], staging: Staging | None) -> list[int | float | bytes]:
    """The arguments of one call. `kept`: copies that must live until the kernel is in the stream. `staging`: where TMA reads the
    bias."""
    found: list[int | float | bytes] = []
    maps: list[bytes] = []
    if operands.alibi_slopes is not None:
        slopes = operands.alibi_slopes.contiguous()
        kept.append(slopes)
        found += [slopes.data_ptr(), slopes.shape[1] if slopes.dim() == 2 else 0]
    if operands.bias is not None:
        bias = readable(operands.bias)
        if staging is not None:
            bias = _with_rows(bias)
            sizes = tuple(1 if step == 0 else size for size, step in zip(bias.shape, bias.stride(), strict=True))
            maps.append(staging(bias.data_ptr(), sizes, bias.stride()))
        kept.append(bias)
        found += places(bias)
    if score.dropout_p:
        seed = operands.seed
        found += [seed & 0xFFFFFFFF, seed >> 32, _threshold(score.dropout_p), keep_scale(score.dropout_p)]
    return found + maps


def _with_rows(bias: Tensor) -> Tensor:
    """The bias, or a copy if its rows are one row in memory."""
    return bias if bias.stride(2) or bias.shape[2] == 1 else readable(bias.contiguous())


def _threshold(dropout_p: float) -> int:
    """As pieces/dropout.py wants it: behind the signs of two float16, which say that draws below it are kept."""
    least = threshold(dropout_p)
    return (DRAWS - least) * 0x00800080 | 0x80008000 if least > DRAWS // 2 else least * 0x00800080


def places(bias: Tensor) -> list[int]:
    """Its address, and the strides of batch, heads and rows: 0 where it is broadcast."""
    return [bias.data_ptr(), *(0 if size == 1 else step for size, step in zip(bias.shape[:3], bias.stride(), strict=False))]


def readable(bias: Tensor) -> Tensor:
    """The bias itself, or a copy whose keys follow one another and whose rows begin at 16-byte boundaries."""
    bias = bias.detach()
    step = _BYTES // bias.element_size()
    steps = [stride for size, stride in zip(bias.shape[:3], bias.stride(), strict=False) if size > 1]
    dense = bias.shape[3] == 1 or bias.stride(3) == 1
    if dense and bias.data_ptr() % _BYTES == 0 and not any(stride % step for stride in steps):
        return bias
    keys = bias.shape[3]
    copy: Tensor = pad(bias, (0, -keys % step)) if keys > 1 else bias.repeat(1, 1, 1, step)
    return copy.contiguous()[..., :keys]
