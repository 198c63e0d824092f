# SPDX-License-Identifier: Apache-2.0
"""What is found in each kind of decoder, and that what its blocks write adds up to the stream."""

from contextlib import ExitStack
from typing import NamedTuple

import pytest
import torch
from decoder_cases import IDS, OPTIONS, check_rows, hooks_of, made, padded, tiny

from mikernels.circuits import gradient_components
from mikernels.models.decoder import decoder_layers, find_decoder
from mikernels.models.sites import Recorder, Site
from mikernels.models.watch import Watch


class Kind(NamedTuple):
    heads: tuple[int, int, int]
    attention: tuple[str | None, str]
    mlp: tuple[str | None, str]
    ends: tuple[str, str, str] = ("model.embed_tokens", "model.norm", "lm_head")
    parallel: bool = False
    normed: bool = False


ROPE = (("input_layernorm", "self_attn"), ("post_attention_layernorm", "mlp"))
SANDWICH = (
    ("input_layernorm", "post_attention_layernorm"),
    ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)
GPT2 = (("ln_1", "attn"), ("ln_2", "mlp"))
GPT2_ENDS = ("transformer.wte", "transformer.ln_f", "lm_head")
NEOX = (("input_layernorm", "attention"), ("post_attention_layernorm", "mlp"))
NEOX_ENDS = ("gpt_neox.embed_in", "gpt_neox.final_layer_norm", "lm_head")
OPT_ENDS = ("model.decoder.embed_tokens", "model.decoder.final_layer_norm", "lm_head")
# query heads, key and value heads, their size; (norm before, writer) of attention and MLP
KINDS = {
    "llama": Kind((4, 2, 8), *ROPE),
    "qwen2": Kind((4, 2, 6), *ROPE),
    "qwen3": Kind((4, 2, 8), *ROPE),
    "olmo": Kind((4, 2, 6), *ROPE),
    "phi3": Kind((4, 2, 6), *ROPE),
    "mixtral": Kind((4, 2, 6), *ROPE),
    "qwen2_moe": Kind((4, 2, 6), *ROPE),
    "qwen3_moe": Kind((4, 2, 8), *ROPE),
    "gpt2": Kind((4, 4, 6), *GPT2, GPT2_ENDS),
    "gpt_bigcode": Kind((4, 1, 6), *GPT2, GPT2_ENDS),
    "gpt_neox": Kind((4, 4, 6), *NEOX, NEOX_ENDS, parallel=True),
    "gpt_neox, serial": Kind((4, 4, 6), *NEOX, NEOX_ENDS),
    "gptj": Kind((4, 4, 6), GPT2[0], ("ln_1", "mlp"), GPT2_ENDS, parallel=True),
    "cohere": Kind((4, 2, 6), ROPE[0], ("input_layernorm", "mlp"), parallel=True),
    "opt": Kind(
        (4, 4, 6),
        ("self_attn_layer_norm", "self_attn"),
        ("final_layer_norm", "fc2"),
        OPT_ENDS,
    ),
    "gemma2": Kind((4, 2, 8), *SANDWICH, normed=True),
    "gemma3_text": Kind((4, 2, 8), *SANDWICH, normed=True),
    "olmo2": Kind((4, 2, 8), (None, SANDWICH[0][1]), (None, SANDWICH[1][1]), normed=True),
}
assert KINDS.keys() == OPTIONS.keys()


def name_in(block, module):
    return next((name for name, part in block.module.named_modules() if part is module), None)


@pytest.mark.parametrize("name", KINDS)
def test_what_is_found_in_each_kind(name):
    model, kind = made(name), KINDS[name]
    decoder = find_decoder(model, "test", "mend it")
    assert [block.module for block in decoder.blocks] == list(
        next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    )
    assert decoder.d == 24
    ends = (decoder.embedding, decoder.final_norm, decoder.unembedding)
    assert ends == tuple(model.get_submodule(end) for end in kind.ends)
    assert decoder.embedding.weight.shape == decoder.unembedding.weight.shape == (50, 24)
    ends_read = {}

    def keep(end, args, output):
        ends_read[end] = args[0].detach(), output

    with ExitStack() as stack:
        for end in ends:
            stack.callback(end.register_forward_hook(keep).remove)
        watch = Watch(decoder, None, [decoder.w_o(block) for block in decoder.blocks], stack)
        logits = model(IDS, use_cache=False).logits
        watch.check()
    assert hooks_of(model) == 0 and watch.reader is decoder.final_norm
    total = watch.sites[0]["x"].detach().clone()
    for block, flow, site in zip(decoder.blocks, watch.flows, watch.sites, strict=True):
        assert decoder.heads(block) == kind.heads
        found = [
            tuple(name_in(block, module) for module in modules)
            for modules in (
                (flow.attention_norm, flow.attention_writer),
                (flow.mlp_norm, flow.mlp_writer),
            )
        ]
        assert (found, flow.parallel) == ([kind.attention, kind.mlp], kind.parallel)
        w_o, bias = decoder.w_o(block), getattr(block.projection, "bias", None)
        by_head = torch.einsum("bphe,hed->bpd", site["z"].unflatten(-1, w_o.shape[:2]), w_o)
        by_head = by_head if bias is None else by_head + bias
        if not kind.normed:
            torch.testing.assert_close(by_head, site["attn"])
        for part in ("attn", "mlp"):
            assert site[part].abs().max() > 0.1
            total += site[part].detach().reshape(total.shape)
    torch.testing.assert_close(ends_read[decoder.final_norm][0], total)
    x = watch.sites[0]["x"]
    if "opt" not in name and "gpt2" not in name and "bigcode" not in name:
        # without embeddings of positions
        assert torch.equal(ends_read[decoder.embedding][1], x)
    final = ends_read[decoder.final_norm][1]
    expected = final @ decoder.unembedding.weight.T * getattr(model.config, "logit_scale", 1.0)
    bias = getattr(decoder.unembedding, "bias", None)
    torch.testing.assert_close(expected if bias is None else expected + bias, logits)


@pytest.mark.parametrize("name", KINDS)
def test_components_of_each_kind_are_the_gradient_at_what_is_added(name):
    model, kind = made(name), KINDS[name]
    found = gradient_components(model, IDS, 7)
    scaled = gradient_components(model, IDS, 7, attribution=True)
    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    moves, written, handles = {}, {}, []
    for layer, block in enumerate(blocks):
        for part, (_, writer) in (("attn", kind.attention), ("mlp", kind.mlp)):

            def move(module, args, output, key=f"L{layer}.{part}"):
                first = output[0] if isinstance(output, tuple) else output
                written[key] = first.detach().view(2, 5, 24)
                moves[key] = torch.zeros_like(first, requires_grad=True)
                first = first + moves[key]
                return (first, *output[1:]) if isinstance(output, tuple) else first

            handles.append(getattr(block, writer).register_forward_hook(move))
    score = model(IDS, use_cache=False).logits[:, -1, 7].sum()
    grads = dict(zip(moves, torch.autograd.grad(score, list(moves.values())), strict=True))
    for handle in handles:
        handle.remove()
    assert set(found) == set(grads)
    for key, grad in grads.items():
        torch.testing.assert_close(found[key], grad.view(2, 5, 24), rtol=1e-9, atol=1e-12)
        assert found[key].abs().max() > 1e-6
        assert torch.equal(scaled[key], found[key] * written[key])


@pytest.mark.parametrize("name", KINDS)
def test_heads_of_each_kind_add_up_or_are_refused(name):
    model = made(name)
    if KINDS[name].normed:
        reason = r"block 0 adds what post_attention_layernorm makes of the sum of its heads"
        with pytest.raises(ValueError, match=f"^gradient_components: .*{reason}.*; ask for heads="):
            gradient_components(model, IDS, heads=True)
        assert hooks_of(model) == 0 and all(p.requires_grad for p in model.parameters())
        return
    whole = gradient_components(model, IDS, attribution=True)
    grads = gradient_components(model, IDS)
    heads = gradient_components(model, IDS, heads=True, attribution=True)
    decoder = find_decoder(model, "test", "mend it")
    for layer, block in enumerate(decoder.blocks):
        bias = getattr(block.projection, "bias", None)
        rest = 0 if bias is None else bias.detach() * grads[f"L{layer}.attn"]
        total = sum(heads[f"L{layer}.h{h}"] for h in range(4)) + rest
        torch.testing.assert_close(total, whole[f"L{layer}.attn"])
        assert torch.equal(heads[f"L{layer}.mlp"], whole[f"L{layer}.mlp"])


def test_norms_are_known_by_what_they_read_and_not_by_their_names():
    model = made("gemma2")
    for block in model.model.layers:
        block.forward = lambda hidden_states, b=block, **rest: crossed(b, hidden_states, **rest)
    decoder = find_decoder(model, "test", "mend it")
    with ExitStack() as stack:
        watch = Watch(decoder, None, [], stack)
        model(IDS, use_cache=False)
        watch.check()
    for block, flow in zip(model.model.layers, watch.flows, strict=True):
        assert flow.attention_norm is block.post_attention_layernorm
        assert flow.attention_writer is block.input_layernorm
        assert flow.mlp_norm is None and flow.mlp_writer is block.mlp and flow.parallel


def crossed(block, x, **rest):
    """A block in which the norm named after attention is before it, and the other way round."""
    given = block.post_attention_layernorm(x)
    attended = block.input_layernorm(block.self_attn(hidden_states=given, **rest)[0])
    return x + attended + block.mlp(x)


def test_a_list_of_other_things_as_long_as_the_blocks_is_passed_over():
    model = made("llama")
    norms = torch.nn.ModuleList(torch.nn.LayerNorm(24) for _ in range(3))
    model.model._modules = {"norms": norms, **model.model._modules}
    assert decoder_layers(model, "test", "mend it") is model.model.layers
    decoder = find_decoder(model, "test", "mend it")
    assert [block.module for block in decoder.blocks] == list(model.model.layers)
    del model.model.layers
    assert decoder_layers(model, "test", "mend it") is norms


@pytest.mark.parametrize("name", KINDS)
def test_padding_changes_nothing_in_any_kind(name):
    # in double precision Gemma 2's own softmax, in single, makes NaN of a padded row's mask
    dtype, limit = (torch.float32, 1e-5) if name == "gemma2" else (torch.float64, 1e-11)
    check_rows(made(name, dtype), padded("mixed"), limit)


@pytest.mark.parametrize("name", KINDS)
def test_activations_of_each_kind_are_its_hidden_states(name):
    model = made(name, torch.float32)
    hidden = model(IDS, output_hidden_states=True, use_cache=False).hidden_states
    final_norm = model.get_submodule(KINDS[name].ends[1])
    for layer in range(3):
        (found,) = Recorder(model, [Site(layer)], "test").record(IDS).values()
        # after the last block transformers shows what the final norm made of it
        found = final_norm(found) if layer == 2 else found
        assert torch.equal(found, hidden[layer + 1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_rounding_of_no_kind_is_refused(name, dtype):
    model = made(name, dtype)
    ids = torch.randint(50, (4, 30), generator=torch.Generator().manual_seed(3))
    found = gradient_components(model, ids, heads=not KINDS[name].normed)
    assert {part.dtype for part in found.values()} == {dtype}


def added(block, x, **rest):
    """A block whose second norm adds what attention returned to the stream, and returns both."""
    given, x = block.post_attention_layernorm(
        block.self_attn(hidden_states=block.input_layernorm(x), **rest)[0], x
    )
    return x + block.mlp(given)


class AddingNorm(torch.nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.weight, self.norm = norm.weight, norm.forward

    def forward(self, x, stream):
        return self.norm(x + stream), x + stream


def test_norms_that_add_to_the_stream_are_not_writers():
    expected, model = gradient_components(made("llama"), IDS, heads=True), made("llama")
    for block in model.model.layers:
        block.post_attention_layernorm = AddingNorm(block.post_attention_layernorm)
        block.forward = lambda hidden_states, b=block, **rest: added(b, hidden_states, **rest)
    for name, part in gradient_components(model, IDS, heads=True).items():
        torch.testing.assert_close(part, expected[name])


def test_query_heads_that_share_no_whole_number_of_values_are_refused():
    model = made("llama")
    attention = model.model.layers[1].self_attn
    attention.v_proj = torch.nn.Linear(24, 24, dtype=torch.float64)
    decoder = find_decoder(model, "test", "mend it")
    assert decoder.heads(decoder.blocks[0]) == (4, 2, 8)
    with pytest.raises(ValueError, match="^test: .*attention of block 1 has 4 query heads for 3"):
        decoder.heads(decoder.blocks[1])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        # a norm on the stream itself; an attention that adds the stream; a sum in place
        ("opt", {"ffn_dim": 40, "word_embed_proj_dim": 24, "do_layer_norm_before": False}),
        ("bloom", {}),
        ("falcon", {}),
        ("granite", {"residual_multiplier": 0.5}),
    ],
)
def test_streams_written_in_another_way_are_refused_with_the_numbers(kind, options):
    model = tiny(kind, **options)
    sums = r"^gradient_components: .*block 0 must return input \+ attention \+ mlp: got .*expected"
    with pytest.raises(ValueError, match=sums):
        gradient_components(model, IDS)
    assert hooks_of(model) == 0


def test_a_model_without_a_width_is_refused():
    model = made("llama")
    model.config = type("Config", (), {"num_hidden_layers": 3})()
    with pytest.raises(ValueError, match=r"^test: .*config.hidden_size is None; mend it$"):
        find_decoder(model, "test", "mend it")
