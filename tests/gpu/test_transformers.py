"""A Hugging Face Llama on Hopper: greedy generation, padded on the left, with a dynamic and a static cache; gradients."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tessera.backends.hopper import HopperRunner

os.environ["HF_HUB_OFFLINE"] = "1"

transformers = pytest.importorskip("transformers")

if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

LAYERS, NEW, SEQLEN = 2, 12, 150


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    integration = pytest.importorskip("tessera.integrations.transformers")
    integration.register()
    yield
    integration.unregister()


@pytest.fixture
def hopper_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of the runner's methods ran, one entry a call; its shortcut is a forward."""
    names: list[str] = []
    for name in ("forward", "backward"):
        real = getattr(HopperRunner, name)

        def spied(self: HopperRunner, *arguments: Any, name: str = name, real: Any = real) -> Any:
            names.append(name)
            return real(self, *arguments)

        monkeypatch.setattr(HopperRunner, name, spied)
    real_shortcut = HopperRunner.shortcut

    def shortcut(self: HopperRunner, others: tuple[Any, ...]) -> Any:
        found = real_shortcut(self, others)

        def spied(*inputs: Tensor) -> Tensor:
            names.append("forward")
            return found(*inputs)

        return None if found is None else spied

    monkeypatch.setattr(HopperRunner, "shortcut", shortcut)
    return names


def llama(attn_implementation: str) -> Any:
    """Random weights far from zero: attention that is nearly uniform would forgive a wrong mask."""
    config = transformers.LlamaConfig(
        vocab_size=500, hidden_size=256, intermediate_size=384, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, pad_token_id=0, bos_token_id=1, eos_token_id=None,
        attn_implementation=attn_implementation,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        spread = 0.1 if parameter.dim() > 1 else 1.0
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return model.to("cuda")


def prompt() -> tuple[Tensor, Tensor]:
    """Token ids and their mask, (3, seqlen) each: 0, 37 and 101 tokens of padding on the left."""
    mask = torch.ones(3, SEQLEN, dtype=torch.int64, device="cuda")
    for row, padded in enumerate((0, 37, 101)):
        mask[row, :padded] = 0
    return torch.randint(3, 500, (3, SEQLEN), device="cuda") * mask, mask


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_generation(cache: str, hopper_calls: list[str]) -> None:
    """Each step's logits are no further from float32's on the same tokens than eager attention's, with as much again to spare."""
    ids, mask = prompt()
    model, exact = llama("tessera").bfloat16(), llama("eager")
    model.generation_config.disable_compile = True
    options = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    generated = model.generate(ids, attention_mask=mask, cache_implementation=cache, **options)
    assert len(hopper_calls) == LAYERS * NEW
    mask = torch.cat([mask, mask.new_ones(3, NEW)], dim=1)
    whole = {"attention_mask": mask, "position_ids": positions(mask), "logits_to_keep": NEW + 1}
    right = exact(generated.sequences, **whole).logits[:, :-1]
    eager = llama("eager").bfloat16()(generated.sequences, **whole).logits[:, :-1].float()
    found = torch.stack(generated.logits, dim=1).float()
    assert torch.equal(found.argmax(-1), generated.sequences[:, SEQLEN:])
    for row in range(3):  # of one padding each
        assert (found - right)[row].abs().mean() <= 2 * (eager - right)[row].abs().mean()
    assert (eager - right).abs().mean() < 0.1 * right.std()


def test_gradients(hopper_calls: list[str]) -> None:
    """No further from float32's than eager attention's in the same dtype, with as much again to spare."""
    ids, mask = prompt()
    found = {}
    for name, model in {"ours": llama("tessera").bfloat16(), "eager": llama("eager").bfloat16(), "exact": llama("eager")}.items():
        logits = model(ids, attention_mask=mask, position_ids=positions(mask), use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].float()[mask[:, 1:] == 1], ids[:, 1:][mask[:, 1:] == 1])
        found[name] = torch.autograd.grad(loss, model.model.layers[0].self_attn.q_proj.weight)[0].float()
    assert sorted(hopper_calls) == ["backward"] * LAYERS + ["forward"] * LAYERS
    assert (found["ours"] - found["exact"]).norm() <= 2 * (found["eager"] - found["exact"]).norm()
