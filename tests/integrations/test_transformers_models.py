"""Whole models under attn_implementation="tessera" against the same weights under "eager"."""

from __future__ import annotations

import pytest
import torch
from tiny_models import SEQLEN, assert_same, padding, pair, prompt
from torch import Tensor
from transformers import BloomConfig, BloomForCausalLM, DynamicCache, StaticCache

import tessera.integrations.transformers as integration
from tessera.integrations.checkpoint import contexts

DECODERS = ("llama", "mistral", "gemma2", "gpt_oss")
MORE_DECODERS = ("gemma3", "llama4")
ENCODERS = ("bert", "modernbert")
ENCODER_DECODERS = ("t5", "bart")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of Tessera's functions that were called."""
    names: list[str] = []

    def spy(name: str) -> None:
        real = getattr(integration, name)

        def called(*args, **options):
            names.append(name)
            return real(*args, **options)

        monkeypatch.setattr(integration, name, called)

    spy("dense_attention")
    spy("attention_varlen")
    return names


@torch.no_grad()
@pytest.mark.parametrize("side", ["no", "left", "right"])
@pytest.mark.parametrize("family", DECODERS + MORE_DECODERS + ENCODERS)
def test_outputs(family: str, side: str, calls: list[str]) -> None:
    models, mask = pair(family), padding(side)
    expected, result = (model(prompt(), attention_mask=mask)[0] for model in models)
    assert_same(result[mask.bool()], expected[mask.bool()])
    assert calls == ["dense_attention"] * models.tessera.config.num_hidden_layers


@torch.no_grad()
@pytest.mark.parametrize("side", ["no", "left", "right"])
@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_outputs_of_encoder_decoders(family: str, side: str, calls: list[str]) -> None:
    """Cross attention, T5's position bias, and a decoder beside an encoder."""
    models, mask = pair(family), padding(side)
    decoder = prompt(seqlen=9)
    expected, result = (model(prompt(), attention_mask=mask, decoder_input_ids=decoder).logits for model in models)
    assert_same(result, expected)
    assert calls == ["dense_attention"] * 6  # 2 layers in the encoder, 2 with cross attention in the decoder


@torch.no_grad()
@pytest.mark.parametrize("side", ["no", "left"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", DECODERS + MORE_DECODERS + ENCODER_DECODERS)
def test_greedy_generation(family: str, cache: str, side: str) -> None:
    mask = padding(side)
    ids = prompt().masked_fill(mask == 0, 0)
    expected, result = (
        model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, cache_implementation=cache)
        for model in pair(family)
    )
    assert result.tolist() == expected.tolist()


@torch.no_grad()
@pytest.mark.parametrize("side", ["no", "left"])
@pytest.mark.parametrize("cache", [DynamicCache, StaticCache])
@pytest.mark.parametrize("family", DECODERS + MORE_DECODERS)
def test_a_prompt_in_pieces(family: str, cache: type, side: str) -> None:
    """Several queries behind a cache that holds some keys already: the diagonal starts in the middle."""
    mask, logits = padding(side), []
    for model in pair(family):
        options = {"max_cache_len": 2 * SEQLEN} if cache is StaticCache else {}
        state = cache(config=model.config, **options)
        pieces = []
        for ids, end in zip(prompt().split([11, 6, 3], dim=1), (11, 17, 20), strict=True):
            positions = torch.arange(end - ids.shape[1], end)[None]
            pieces.append(model(ids, attention_mask=mask[:, :end], past_key_values=state, position_ids=positions))
        logits.append(torch.cat([piece.logits for piece in pieces], dim=1)[mask.bool()])
    assert_same(logits[1], logits[0])


@pytest.mark.parametrize("side", ["no", "right"])
@pytest.mark.parametrize("family", [*DECODERS, "bert"])
def test_gradients_of_a_training_step(family: str, side: str) -> None:
    """Every parameter's, gpt-oss's sinks among them."""
    mask = padding(side)
    models = pair(family)
    for model in models:
        out = model.train()(prompt(), attention_mask=mask)[0]
        (out[mask.bool()] * torch.linspace(-1, 1, out.shape[-1])).mean().backward()
    for (name, mine), theirs in zip(models.tessera.named_parameters(), models.eager.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        if theirs.grad is not None:
            error, scale = (mine.grad - theirs.grad).abs().max(), theirs.grad.abs().max()
            assert error <= 2e-5 * max(1e-3, scale), f"{name}: off by {error:.1e}, at a size of {scale:.1e}"
    if family == "gpt_oss":
        assert models.tessera.model.layers[0].self_attn.sinks.grad.abs().min() > 0


LENGTHS = (7, 9, 4)
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])[None]
OFFSETS = torch.tensor([0, 7, 16, 20], dtype=torch.int32)
# As transformers' collators give them: the longest lengths are 0-d tensors.
PACKED = {
    "cu_seq_lens_q": OFFSETS, "cu_seq_lens_k": OFFSETS, "max_length_q": torch.tensor(9), "max_length_k": torch.tensor(9),
}  # fmt: skip


def one_by_one(model: torch.nn.Module) -> Tensor:
    """The logits of each packed sequence run alone, one after the other."""
    return torch.cat([model(ids).logits for ids in prompt(1).split(LENGTHS, dim=1)], dim=1)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_packed_by_positions(family: str) -> None:
    """(gpt-oss's own mask takes no notice of positions that start again, under any implementation.)"""
    eager, model = pair(family)
    assert_same(model(prompt(1), position_ids=POSITIONS, use_cache=False).logits, one_by_one(eager))


@torch.no_grad()
@pytest.mark.parametrize("positions", [POSITIONS, None], ids=["positions start again", "no positions"])
@pytest.mark.parametrize("family", DECODERS)
def test_packed_by_offsets(family: str, positions: Tensor | None, calls: list[str]) -> None:
    eager, model = pair(family)
    assert_same(model(prompt(1), position_ids=positions, use_cache=False, **PACKED).logits, one_by_one(eager))
    if family == "llama":  # without a window, and where nothing else masks, the sequences run as what they are
        assert set(calls) == {"dense_attention" if positions is not None else "attention_varlen"}


@torch.no_grad()
def test_offsets_run_through_a_batch() -> None:
    eager, model = pair("llama")
    ids = prompt(1)
    offsets = {"cu_seq_lens_q": OFFSETS, "cu_seq_lens_k": OFFSETS}
    in_two_rows = model(ids.view(2, 10), use_cache=False, position_ids=torch.arange(SEQLEN).view(2, 10)[:1], **offsets).logits
    # Position embeddings are relative: what counts is the distance inside of a sequence, except where one goes over two rows.
    alone = one_by_one(eager).view(2, 10, -1)
    assert_same(in_two_rows[0, :7], alone[0, :7])
    assert_same(in_two_rows[1, 6:], alone[1, 6:])


def test_packed_gradients() -> None:
    eager, model = pair("llama")
    model(prompt(1), position_ids=POSITIONS, use_cache=False, **PACKED).logits.square().mean().backward()
    one_by_one(eager).square().mean().backward()
    for mine, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        assert_same(mine.grad, theirs.grad)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_mask_with_holes_is_served_dense(family: str) -> None:
    eager, model = pair(family)
    mask = torch.ones(2, SEQLEN, dtype=torch.int64)
    mask[0, 5], mask[1, 9:12] = 0, 0
    with pytest.warns(UserWarning, match="not one interval of keys a row"):
        result = model(prompt(), attention_mask=mask).logits
    assert_same(result[mask.bool()], eager(prompt(), attention_mask=mask).logits[mask.bool()])


@torch.no_grad()
def test_a_mask_of_the_users_own() -> None:
    """4-D masks pass through transformers as they are: floats are added, bools say where to attend."""
    eager, model = pair("llama")
    allowed = torch.ones(SEQLEN, SEQLEN, dtype=torch.bool).tril() & (torch.arange(SEQLEN) % 3 != 1)
    allowed |= torch.eye(SEQLEN, dtype=torch.bool)
    added = torch.where(allowed, 0.0, torch.finfo(torch.float32).min).expand(2, 1, -1, -1)
    expected = eager(prompt(), attention_mask=added).logits
    assert_same(model(prompt(), attention_mask=added).logits, expected)
    assert_same(model(prompt(), attention_mask=allowed.expand(2, 1, -1, -1)).logits, expected)


def test_dropout_draws_from_torchs_generator() -> None:
    _, model = pair("llama")
    for layer in model.train().model.layers:
        layer.self_attn.attention_dropout = 0.5

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model(prompt(), use_cache=False).logits

    assert torch.equal(run(1), run(1))
    assert (run(1) - run(2)).abs().max() > 0.1
    assert (run(1) - model.eval()(prompt(), use_cache=False).logits).abs().max() > 0.1


@pytest.mark.filterwarnings("ignore::FutureWarning")  # renamed in 5.23
def test_gradient_checkpointing_repeats_the_dropout() -> None:
    gradients = []
    for settings in (None, {}, {"use_reentrant": False, "context_fn": contexts}):
        _, model = pair("llama")
        for layer in model.train().model.layers:
            layer.self_attn.attention_dropout = 0.5
        if settings is not None:
            model.gradient_checkpointing_enable(settings)
        torch.manual_seed(7)
        model(prompt(), use_cache=False).logits.square().mean().backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    assert_same(gradients[1], gradients[0])
    assert_same(gradients[2], gradients[0])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_low_precision(family: str, dtype: torch.dtype) -> None:
    """No further from float32 than eager is in the same dtype, with as much again to spare."""
    eager, model = pair(family)
    mask = padding("left")
    exact = eager(prompt(), attention_mask=mask).logits[mask.bool()]
    theirs, mine = (m.to(dtype)(prompt(), attention_mask=mask).logits[mask.bool()].float() for m in (eager, model))
    assert (mine - exact).abs().mean() <= 2 * (theirs - exact).abs().mean()


@torch.no_grad()
@pytest.mark.parametrize("side", ["no", "left"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_compiled_whole(family: str, side: str) -> None:
    torch._dynamo.reset()
    eager, model = pair(family)
    mask = padding(side)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    result = compiled(prompt(), attention_mask=mask, use_cache=False).logits[mask.bool()]
    assert_same(result, eager(prompt(), attention_mask=mask).logits[mask.bool()])


@torch.no_grad()
def test_compiled_mask_with_holes_is_refused() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(pair("llama").tessera, backend="aot_eager")
    mask = torch.ones(2, SEQLEN, dtype=torch.int64)
    mask[0, 5] = 0
    with pytest.raises(RuntimeError, match="not one interval of keys a row"):
        compiled(prompt(), attention_mask=mask, use_cache=False)


@torch.no_grad()
def test_compiled_generation_with_a_static_cache() -> None:
    """The mask is made outside of the graph, once a step, and passed into it."""
    torch._dynamo.reset()
    eager, model = pair("mistral")
    mask = padding("left")
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    expected = eager.generate(prompt(), **options)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    assert model.generate(prompt(), **options).tolist() == expected.tolist()


def test_output_attentions_is_refused() -> None:
    with pytest.raises(ValueError, match="output_attentions=True: the probabilities never exist in memory"):
        pair("llama").tessera(prompt(), output_attentions=True)


def test_model_with_attention_of_its_own_is_refused() -> None:
    config = BloomConfig(hidden_size=32, n_layer=1, n_head=2, vocab_size=101, attn_implementation="tessera")
    with pytest.raises(ValueError, match="tessera for BloomConfig: this model computes its attention itself"):
        BloomForCausalLM(config)(prompt())
