"""What the compile gate builds of the backward: every division, mask and feature that a plan can pick, once each."""

from __future__ import annotations

from dataclasses import replace

import torch

from tessera import jit
from tessera.backends.hopper.backward_launch import finish_spec, main_spec, prepare_spec
from tessera.backends.hopper.backward_plan import backward_config
from tessera.backends.hopper.backward_rows_config import RowsConfig
from tessera.backends.hopper.bias_gradient import KeptScores
from tessera.backends.hopper.config import Feature
from tessera.mask import MaskSpec
from tessera.problem import Alibi, Bias, Gradients, Layout, Problem, Reproducibility, Score, Shape, Sinks

_FULL = MaskSpec()
_CAUSAL = MaskSpec(right=0)
_WINDOW = MaskSpec(left=128, right=0)
_DOCUMENTS = MaskSpec(right=0, bounds=("document_begin", "document_end"))
_PLANE = Bias((1, 1, 1024, 1024), torch.bfloat16, Gradients.INPUTS)
_CONSTANT = Bias((1, 8, 1024, 1024), torch.float32)
_OF_KEYS = Bias((1, 1, 1, 1024), torch.bfloat16, Gradients.INPUTS)
_PADDING = MaskSpec(bounds=("key_start", "key_end", "query_end"))


def _problem(dim: int, dim_v: int, mask: MaskSpec = _FULL, layout: Layout = Layout.DENSE, **score: object) -> Problem:
    return Problem(
        shape=Shape(1, 1024, 1024, 8, 8, dim, dim_v), dtype=torch.bfloat16, score=Score(scale=dim**-0.5, **score),  # type: ignore[arg-type]
        layout=layout, mask=mask, gradients=Gradients.INPUTS,
    )  # fmt: skip


def _named_problems() -> dict[str, Problem]:
    found: dict[str, Problem] = {}
    for dim, dim_v in ((64, 64), (128, 128), (256, 256), (192, 128), (64, 256)):
        name = f"d{dim}" if dim == dim_v else f"d{dim}/{dim_v}"
        found |= {f"{name} full": _problem(dim, dim_v), f"{name} causal": _problem(dim, dim_v, _CAUSAL)}
    for dim in (64, 128, 256):
        full = found[f"d{dim} full"]
        found[f"d{dim} full, few rows"] = full
        found[f"d{dim} full"] = replace(full, shape=replace(full.shape, seqlen_q=4096, seqlen_k=4096))  # last tiles are divided
        found |= {
            f"d{dim} window": _problem(dim, dim, _WINDOW),
            f"d{dim} documents": _problem(dim, dim, _DOCUMENTS),
            f"d{dim} padding": _problem(dim, dim, _PADDING),
            f"d{dim} softcap": _problem(dim, dim, _CAUSAL, softcap=30.0),
            f"d{dim} sinks": _problem(dim, dim, _CAUSAL, sinks=Sinks(Gradients.INPUTS)),
            f"d{dim} varlen": _problem(dim, dim, _CAUSAL, Layout.VARLEN),
            f"d{dim} dropout": _problem(dim, dim, _CAUSAL, dropout_p=0.1),
            f"d{dim} alibi": _problem(dim, dim, _CAUSAL, alibi=Alibi.PER_HEAD),
            f"d{dim} bias": _problem(dim, dim, bias=_PLANE),
            f"d{dim} constant bias in float32": _problem(dim, dim, bias=_CONSTANT),
            f"d{dim} bias of keys, dropout": _problem(dim, dim, bias=_OF_KEYS, dropout_p=0.1),
            f"d{dim} all modifiers": _problem(dim, dim, _CAUSAL, bias=_PLANE, alibi=Alibi.PER_HEAD, dropout_p=0.1),
        }
        if dim < 256:
            found[f"d{dim} bias, padding"] = _problem(dim, dim, _PADDING, bias=_PLANE)
        for name in ("full", "causal", "varlen"):
            found[f"d{dim} {name}, deterministic"] = replace(found[f"d{dim} {name}"], reproducibility=Reproducibility.BITWISE)
        short = found[f"d{dim} full, deterministic"]  # there the last tile rounds
        found[f"d{dim} full, deterministic"] = replace(short, shape=replace(short.shape, seqlen_q=512, seqlen_k=512))
    found["d64 full, varlen"] = _problem(64, 64, _FULL, Layout.VARLEN)
    full = found["d64 full"]
    found["d64 full, dropout"] = replace(full, score=replace(full.score, dropout_p=0.1))
    for dim in (128, 256):
        full = found[f"d{dim} full"]
        found[f"d{dim} full, more rows"] = replace(full, shape=replace(full.shape, seqlen_q=2048, seqlen_k=2048))
    return found


def variants() -> tuple[jit.Variant, ...]:
    """Main kernels for bf16, and the two small ones beside them where they differ."""
    made = []
    small: dict[jit.KernelSpec, str] = {}
    for name, problem in _named_problems().items():
        config = backward_config(problem)
        rows = RowsConfig.of(config)
        made.append(jit.Variant(f"bwd bf16 {name}", main_spec(config, problem.dtype)))
        small.setdefault(prepare_spec(rows, problem.dtype), f"bwd rows bf16 {name}")
        small.setdefault(finish_spec(rows, problem.dtype), f"bwd dq bf16 {name}")
        adding = KeptScores(problem, config).spec if Feature.KEPT_DS in config.features else None
        if adding is not None:
            small.setdefault(adding, f"bwd dbias bf16 {name}")
    for name in ("d64 full", "d64 causal", "d64 window", "d128 causal", "d256 causal"):
        fp16 = replace(_named_problems()[name], dtype=torch.float16)
        made.append(jit.Variant(f"bwd fp16 {name}", main_spec(backward_config(fp16), fp16.dtype)))
    return (*made, *(jit.Variant(name, spec, wgmma=False, setmaxnreg=False) for spec, name in small.items()))
