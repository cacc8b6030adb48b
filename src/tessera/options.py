"""What a caller may say beside the tensors of a call: the options, their types, and the checks of what other calls take too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any, TypedDict

import torch
from torch import Tensor

from tessera.errors import bad_type, bad_value
from tessera.mask import Mask, check_window_side

Window = tuple[int | None, int | None]


class CommonOptions(TypedDict, total=False):
    """The options of `attention` and `attention_varlen`, described there."""

    causal: bool
    window: Window | None
    softmax_scale: float | None
    softcap: float
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    dropout_p: float
    seed: int | None
    deterministic: bool
    backend: str | None


class DenseOptions(CommonOptions, total=False):
    """The options of `attention` alone."""

    bias: Tensor | None
    mask: Mask | None


class PackedOptions(CommonOptions, total=False):
    """The options of `attention_varlen` alone."""

    seqused_q: Tensor | None
    seqused_k: Tensor | None


DENSE_OPTIONS = frozenset({*DenseOptions.__annotations__, "return_lse"})
PACKED_OPTIONS = frozenset({*PackedOptions.__annotations__, "return_lse"})


ELSEWHERE = {
    "window_size": "window", "return_attn_probs": "return_lse", "return_softmax_lse": "return_lse", "block_table": "page_table",
    "is_causal": "causal", "scale": "softmax_scale", "scaling": "softmax_scale", "attn_mask": "mask", "attn_bias": "bias",
    "s_aux": "sinks", "dropout": "dropout_p", "logits_soft_cap": "softcap", "sliding_window": "window",
}  # fmt: skip
"""What flash_attn, torch, vLLM and Transformers call this package's options."""


def check_options(options: Mapping[str, object], known: frozenset[str]) -> None:
    """What is passed on by name is an option of the call."""
    for name, value in options.items():
        if name not in known:
            shown = type(value).__name__ if isinstance(value, Tensor) else repr(value)
            instead = f"use some of {', '.join(sorted(known))}"
            if ELSEWHERE.get(name) in known:
                instead = f"it is {ELSEWHERE[name]} here (docs/replacing.md)"
            elif name.startswith("max_seqlen"):
                instead = "leave it out: no longest length is asked for"
            raise bad_type(name, shown, "there is no such option", instead)


def check_backend(backend: object) -> None:
    """A backend goes by its name."""
    if backend is not None and not isinstance(backend, str):
        raise bad_type("backend", repr(backend), "backends go by name", "use one of tessera.backend_names(), or None")


def show_options(call: Callable[..., Any], whole: Callable[..., Any]) -> None:
    """help() and editors see the options of a call that only passes them on."""
    parameters = [
        one.replace(kind=one.POSITIONAL_OR_KEYWORD) if one.kind is one.POSITIONAL_ONLY else one
        for one in signature(whole).parameters.values()
        if one.name != "words"
    ]
    vars(call)["__signature__"] = signature(whole).replace(parameters=parameters)


def check_tensor(name: str, value: object) -> None:
    """An argument is a dense tensor."""
    if type(value) is Tensor and value.layout is torch.strided and not value.is_nested:
        return
    if not isinstance(value, Tensor):
        raise bad_type(name, type(value).__name__, "attention runs on tensors", "give a torch.Tensor")
    if value.layout is not torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else value.layout
        why = "attention runs on strided tensors"
        raise bad_type(name, kind, why, "make it dense, or give a nested tensor's values() to attention_varlen")


def right_of(causal: bool | None) -> int | None:
    """The right bound that `causal` means."""
    if isinstance(causal, (Tensor, str)):  # a mask, a name of one
        why = "it is one choice for the whole call"
        raise bad_type("causal", type(causal).__name__, why, "give True or False; masks are a tessera.Mask, or a `bias`")
    return 0 if causal else None


def mask_of(causal: bool, window: Window | None, mask: Mask | None) -> Mask:
    """The mask of a call, its arguments checked and intersected."""
    whole = Mask() if mask is None else mask
    if not isinstance(whole, Mask):
        raise bad_type("mask", type(mask).__name__, "masks are algebra, not tensors", "use tessera.Mask, or `bias` for any other")
    if causal:
        whole = whole & Mask.causal()
    if window is not None:
        if not isinstance(window, tuple) or len(window) != 2:
            raise bad_value("window", window, "a window is a tuple of two sides", "give (left, right), None for no limit")
        left, right = (check_window_side(f"window[{side}]", value) for side, value in enumerate(window))
        whole = whole & Mask(left=left, right=right)
    return whole
