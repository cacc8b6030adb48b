"""Small models of random weights, the same under two attention implementations; and the batches they are run on."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

VOCABULARY, SEQLEN, WINDOW = 101, 20, 8

_DECODER = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None,
}  # fmt: skip
_WINDOWED = _DECODER | {"sliding_window": WINDOW}
_ENCODER_DECODER = {"vocab_size": VOCABULARY, "d_model": 64, "pad_token_id": 0, "eos_token_id": None, "decoder_start_token_id": 1}

# name: the model's class, its configuration's class and options. Windows are smaller than the prompts; every second
# layer of Gemma, gpt-oss and Llama-4 attends in a window or in chunks.
_FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _DECODER),
    "mistral": ("MistralForCausalLM", "MistralConfig", _WINDOWED),
    "gemma2": (
        "Gemma2ForCausalLM", "Gemma2Config", _WINDOWED | {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0},
    ),
    "gpt_oss": (
        "GptOssForCausalLM", "GptOssConfig",
        _WINDOWED | {"num_local_experts": 4, "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", _WINDOWED | {"num_hidden_layers": 6}),
    "llama4": (
        "Llama4ForCausalLM", "Llama4TextConfig",
        _DECODER | {"attention_chunk_size": WINDOW, "num_hidden_layers": 4, "intermediate_size_mlp": 64,
        "num_local_experts": 2},
    ),
    "t5": (
        "T5ForConditionalGeneration", "T5Config",
        _ENCODER_DECODER | {"d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4},
    ),
    "bart": (
        "BartForConditionalGeneration", "BartConfig",
        _ENCODER_DECODER | {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64, "forced_eos_token_id": None},
    ),
    "bert": (
        "BertModel", "BertConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
         "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    ),
    "modernbert": (
        "ModernBertModel", "ModernBertConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
         "local_attention": WINDOW, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
         "cls_token_id": 1, "sep_token_id": 2},
    ),
}  # fmt: skip


class Pair(NamedTuple):
    """One model twice, with the same weights."""

    eager: Any
    tessera: Any


def pair(family: str) -> Pair:
    """The family's two models, fresh (a test may train them), in evaluation mode."""
    return Pair(deepcopy(_model(family, "eager")), deepcopy(_model(family, "tessera")))


@cache
def _model(family: str, attn_implementation: str) -> Any:
    model_name, config_name, options = _FAMILIES[family]
    config = getattr(transformers, config_name)(**options, attn_implementation=attn_implementation)
    model = getattr(transformers, model_name)(config).eval()
    # Weights far from zero: attention that is nearly uniform would forgive a wrong mask.
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        spread = 0.2 if parameter.dim() > 1 else 1.0
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return model


def prompt(batch: int = 2, seqlen: int = SEQLEN) -> Tensor:
    """Random token ids, (batch, seqlen) int64."""
    return torch.randint(3, 90, (batch, seqlen), generator=torch.Generator().manual_seed(3))


def padding(side: str, batch: int = 2, seqlen: int = SEQLEN) -> Tensor:
    """A 2-D attention mask, (batch, seqlen) int64: 7 tokens of the first entry are padding, on the side named, or "no"."""
    mask = torch.ones(batch, seqlen, dtype=torch.int64)
    if side != "no":
        mask[0, slice(0, 7) if side == "left" else slice(seqlen - 7, seqlen)] = 0
    return mask


def assert_same(result: Tensor, expected: Tensor) -> None:
    """Equal to float32's rounding through a few layers."""
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5 * max(1.0, expected.abs().max().item()))
