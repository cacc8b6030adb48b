"""The intervals that layers are given against transformers' own dense mask of the same arguments."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig
from transformers import masking_utils as hf

import tessera.integrations.transformers as integration
import tessera.integrations.transformers_masks as masks
from tessera.integrations.transformers import attention
from tessera.integrations.transformers_masks import Intervals, key_bounds

BATCH = 2
LEFT_PADDING = torch.tensor([3, 0])
DOCUMENTS = torch.tensor([0] * 4 + [1] * 7 + [2] + [3] * 12).expand(BATCH, -1)
IMAGES = torch.tensor([0] * 3 + [-1] * 5 + [1] * 6 + [-1] * 10).expand(BATCH, -1)


def same_document(batch_idx, head_idx, q_idx, kv_idx):
    """As packed sequences'."""
    return DOCUMENTS[batch_idx, q_idx] == DOCUMENTS[batch_idx, kv_idx]


def same_image(batch_idx, head_idx, q_idx, kv_idx):
    """As Gemma 3's: the tokens of an image see all of it."""
    image = IMAGES[batch_idx, q_idx]
    return (image == IMAGES[batch_idx, kv_idx]) & (image >= 0)


def prefix(batch_idx, head_idx, q_idx, kv_idx):
    """As PaliGemma's: the first 9 positions are seen by all."""
    return kv_idx < 9


FUNCTIONS = {
    "causal": hf.causal_mask_function,
    "bidirectional": hf.bidirectional_mask_function,
    "window": hf.sliding_window_causal_mask_function(5),
    "window both ways": hf.sliding_window_bidirectional_mask_function(4),
    "chunks": hf.chunked_causal_mask_function(6, LEFT_PADDING),
    "packed": hf.and_masks(hf.causal_mask_function, same_document),
    "packed, window": hf.and_masks(hf.sliding_window_causal_mask_function(3), same_document),
    "images": hf.or_masks(hf.causal_mask_function, same_image),
    "prefix": hf.or_masks(hf.causal_mask_function, prefix),
}


@dataclass(frozen=True)
class Place:
    """Where queries and keys stand."""

    q_length: int
    kv_length: int
    q_offset: int | Tensor = 0
    kv_offset: int = 0

    def arguments(self) -> dict[str, Any]:
        return vars(self) | {"batch_size": BATCH, "config": LlamaConfig()}


PLACES = {
    "a prompt": Place(24, 24),
    "a step": Place(1, 24, 23),
    "some tokens behind a cache": Place(7, 24, 17),
    "a window's cache": Place(3, 7, 21, 17),
    "a static cache's prompt": Place(10, 24, torch.tensor(0)),
    "a static cache's step": Place(1, 24, torch.tensor(11)),
    "some tokens in a static cache": Place(5, 24, torch.tensor(11)),
}


def padding(side: str, length: int = 24) -> Tensor | None:
    """(batch, length) bool, False for padding; "early end" is how a static cache's mask is shorter than its keys."""
    if side == "none":
        return None
    mask = torch.ones(BATCH, length, dtype=torch.bool)
    if side == "left":
        mask[0, :3] = False
    elif side == "right":
        mask[0, -6:] = False
    elif side == "both":
        mask[0, :3] = mask[0, -6:] = False
    elif side == "everything":
        mask[0] = False
    elif side == "early end":
        mask = mask[:, :16]
    return mask


def expanded(bounds: Tensor, place: Place) -> Tensor:
    """The intervals as (batch, seqlen_q, seqlen_k) bool, by their definition."""
    keys = torch.arange(place.kv_length)
    sides, rows = bounds.shape[2:]
    if (sides, rows) == (0, 0):
        allowed = torch.ones(1, 1, 1, dtype=torch.bool)
    elif (sides, rows) == (1, 0):
        allowed = (keys <= torch.arange(place.kv_length - place.q_length, place.kv_length)[:, None])[None]
    else:
        begin, end = bounds[:, 0].unbind(1)
        allowed = (begin[..., None] <= keys) & (keys < end[..., None])
    return allowed.expand(BATCH, place.q_length, place.kv_length)


@pytest.mark.parametrize("side", ["none", "no", "left", "right", "both", "everything", "early end"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_intervals_are_transformers_own_mask(function: str, place: str, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "SCORES_AT_ONCE", 5 * BATCH * PLACES[place].kv_length)  # 5 rows at a time
    arguments = PLACES[place].arguments() | {
        "mask_function": FUNCTIONS[function], "attention_mask": padding(side), "use_vmap": function == "prefix",
    }  # fmt: skip
    dense = hf.sdpa_mask(**arguments, allow_is_causal_skip=False)[:, 0]
    bounds = key_bounds(**arguments)
    assert bounds.dtype == torch.int32
    assert bounds.shape[:2] == (BATCH, 1)
    assert torch.equal(expanded(bounds, PLACES[place]), dense)


@pytest.mark.parametrize(
    ("function", "place", "side", "shape"),
    [
        ("causal", "a prompt", "none", (1, 0)),
        ("causal", "a prompt", "no", (1, 0)),
        ("causal", "some tokens behind a cache", "no", (1, 0)),
        ("causal", "a window's cache", "no", (1, 0)),
        ("causal", "a prompt", "left", (2, 24)),
        ("causal", "a static cache's prompt", "none", (2, 10)),
        ("causal", "a static cache's step", "none", (2, 1)),
        ("bidirectional", "a prompt", "no", (0, 0)),
        ("bidirectional", "a prompt", "right", (2, 1)),
        ("window", "a prompt", "none", (2, 24)),
        ("window", "a step", "none", (2, 1)),
        ("packed", "a prompt", "none", (2, 24)),
    ],
)
def test_what_kernels_must_know_ahead_stands_in_the_shape(function: str, place: str, side: str, shape: tuple[int, int]) -> None:
    arguments = PLACES[place].arguments() | {"mask_function": FUNCTIONS[function], "attention_mask": padding(side)}
    assert key_bounds(**arguments).shape == (BATCH, 1, *shape)


def test_mask_with_holes_stays_dense() -> None:
    mask = padding("no")
    mask[1, 7] = False
    arguments = PLACES["a prompt"].arguments() | {"attention_mask": mask}
    with pytest.warns(UserWarning, match=r"not one interval .* dense \(2, 1, 24, 24\) bias"):
        result = key_bounds(**arguments)
    assert torch.equal(result, hf.sdpa_mask(**arguments, allow_is_causal_skip=False))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_intervals_say_exactly_what_they_were_made_of_or_that_they_do_not(data: st.DataObject) -> None:
    rows, keys, step = (data.draw(st.integers(1, 6)) for _ in range(3))
    bits = data.draw(st.lists(st.booleans(), min_size=rows * keys, max_size=rows * keys))
    mask = torch.tensor(bits).view(1, rows, keys)
    found = Intervals.of(mask.split(step, dim=1))
    keys_of = torch.arange(keys)
    rebuilt = (found.begin[..., None] <= keys_of) & (keys_of < found.end[..., None])
    in_order = bool((found.begin.diff() >= 0).all() and (found.end.diff() >= 0).all())
    assert bool(found.exact) == (in_order and torch.equal(rebuilt, mask))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_every_mask_of_ordered_intervals_is_exact(data: st.DataObject) -> None:
    rows, keys = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 8))
    ends = [sorted(data.draw(st.lists(st.integers(0, keys), min_size=rows, max_size=rows))) for _ in range(2)]
    begin, end = (torch.tensor(side)[None, :, None] for side in ends)
    keys_of = torch.arange(keys)
    assert Intervals.of([(begin <= keys_of) & (keys_of < end)]).exact


@pytest.mark.parametrize(
    ("family", "takes"), [("bloom", False), ("falcon", False), ("llama", True), ("bert", True), ("paligemma", True)]
)
def test_which_models_take_attention_from_the_interface(family: str, takes: bool) -> None:
    """(PaliGemma has none of its own: it is a vision tower beside a Gemma.)"""
    import_module(f"transformers.models.{family}.modeling_{family}")
    assert masks.takes_attention_from_interface(f"transformers.models.{family}.configuration_{family}") == takes


@pytest.mark.parametrize("module", ["__main__", "mine.configuration_mine", "configuration_mine"])
def test_models_of_unknown_modules_are_let_through(module: str) -> None:
    assert masks.takes_attention_from_interface(module)


LAYER = torch.nn.Module()
Q, K = torch.randn(2, 4, 6, 16), torch.randn(2, 2, 9, 16)
OFFSETS = torch.tensor([0, 6, 12], dtype=torch.int32)


@pytest.mark.parametrize(
    ("mask", "options", "message"),
    [
        (None, {"output_attentions": True}, "output_attentions=True: the probabilities never exist"),
        (None, {"cache": object()}, "cache=object: continuous batching"),
        (None, {"indices": torch.zeros(1)}, "indices=Tensor: sparse attention"),
        (None, {"block_indices": torch.zeros(1)}, "block_indices=Tensor: sparse attention"),
        (None, {"sinks": torch.zeros(2, 4, 6, 1)}, "sinks=Tensor: sinks that differ from query to query"),
        (torch.ones(2, 9, dtype=torch.bool), {}, r"attention_mask=shape \(2, 9\): a layer takes its mask in 4 dimensions"),
        (torch.zeros(2, 1, 2, 6, dtype=torch.int64), {}, "attention_mask=torch.int64: a mask of integers may mean anything"),
        (torch.zeros(2, 1, 4, 6, dtype=torch.int32), {}, "the model computes with its mask"),
        (torch.zeros(2, 1, 2, 5, dtype=torch.int32), {}, "mask.document_begin=shape"),
        (torch.zeros(2, 1, 6, 8), {}, "does not broadcast"),
        (
            torch.zeros(2, 1, 2, 6, dtype=torch.int32), {"cu_seq_lens_q": OFFSETS, "cu_seq_lens_k": OFFSETS},
            "cu_seq_lens_q=batch of 2: offsets run through the tokens of the whole batch",
        ),
    ],
)  # fmt: skip
def test_refused_in_words(mask: Tensor | None, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention(LAYER, Q, K, K, mask, **options)


def test_tokens_behind_the_last_sequence_see_nothing() -> None:
    """As where sequences alone are packed: offsets need not reach to the end, nor intervals be there."""
    q, k = Q[:1], K[:1, :, :6]
    short = torch.tensor([0, 2, 5], dtype=torch.int32)
    everything = torch.tensor([0, 6], dtype=torch.int32).expand(1, 1, 6, 2).mT.contiguous()
    plain, _ = attention(LAYER, q, k, k, None, is_causal=False, cu_seq_lens_q=short, cu_seq_lens_k=short)
    both, _ = attention(LAYER, q, k, k, everything, cu_seq_lens_q=short, cu_seq_lens_k=short)
    torch.testing.assert_close(both, plain)
    assert not both[:, 5].any()


def test_a_layer_without_a_mask_function() -> None:
    """A mask of None, as a model without transformers' masks leaves it: the layer's own causality and window, total size 4."""
    q, k = Q, K[:, :, :6]
    for causal, seen in ((True, lambda i, j: (j <= i) & (i - j < 4)), (False, lambda i, j: (i - j).abs() < 4)):
        i, j = torch.arange(6)[:, None], torch.arange(6)
        keys = k.repeat_interleave(2, dim=1)
        expected = torch.nn.functional.scaled_dot_product_attention(q, keys, keys, attn_mask=seen(i, j)).transpose(1, 2)
        out, probabilities = attention(LAYER, q, k, k, None, is_causal=causal, sliding_window=4)
        torch.testing.assert_close(out, expected)
        assert probabilities is None


@pytest.mark.parametrize(("sides", "causal"), [(0, False), (1, True)])
def test_intervals_overrule_the_layer(sides: int, causal: bool) -> None:
    """Some decoders' layers (BigBird-Pegasus') say that they are not causal."""
    intervals = torch.empty(2, 1, sides, 0, dtype=torch.int32)
    out, _ = attention(LAYER, Q, K, K, intervals, is_causal=not causal, sliding_window=2)
    assert torch.equal(out, attention(LAYER, Q, K, K, None, is_causal=causal)[0])


@pytest.mark.parametrize(("sliding_window", "window"), [(9, (None, 0)), (100, (None, 0)), (8, (7, 0))])
def test_a_window_as_long_as_the_keys_is_none(
    sliding_window: int, window: tuple[int | None, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most models' windows are longer than most prompts, and plain causal attention is the faster kernel."""
    asked: list[Any] = []

    def spy(*_: Tensor, **options: Any) -> Tensor:
        asked.append((options["mask"].left, options["mask"].right))
        return Q.transpose(1, 2)

    monkeypatch.setattr(integration, "dense_attention", spy)
    integration.attention(LAYER, Q, K, K, None, is_causal=True, sliding_window=sliding_window)
    assert asked == [window]


def test_last_stride_other_than_one() -> None:
    strided = Q.transpose(2, 3).contiguous().transpose(2, 3)
    torch.testing.assert_close(attention(LAYER, strided, K, K, None)[0], attention(LAYER, Q, K, K, None)[0])
