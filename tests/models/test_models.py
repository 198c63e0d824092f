# SPDX-License-Identifier: Apache-2.0
"""Padding and compiled models: what a padded batch or a compiled model gives is what a row by
itself, or the model as it was, gives."""

import oracle
import pytest
import torch
from decoder_cases import KINDS, ROWS, check_rows, padded, tiny

from mikernels.circuits import gradient_components
from mikernels.models.hooks import compiled_part, eager, original
from mikernels.models.padding import with_positions


@pytest.mark.parametrize("options", [{}, {"heads": True, "attribution": True}], ids=["g", "heads"])
@pytest.mark.parametrize("layout", ["left", "right", "both", "mixed"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_padded_batch_are_the_rows_alone(kind, layout, options):
    check_rows(tiny(kind), padded(layout), **options)


@pytest.mark.parametrize("mask", [torch.bool, torch.float32, torch.int32])
def test_masks_of_other_dtypes(mask):
    check_rows(tiny("gpt2"), padded("left", dtype=mask))


def test_given_positions_are_kept():
    model, batch = tiny("gpt2"), padded("left")
    counted = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    expected = gradient_components(model, batch, 7)
    same = gradient_components(model, {**batch, "position_ids": counted}, 7)
    later = gradient_components(model, {**batch, "position_ids": counted + 1}, 7)
    assert all(torch.equal(same[name], expected[name]) for name in expected)
    assert not torch.allclose(later["L0.attn"], expected["L0.attn"])


def test_activations_that_are_not_finite_are_refused():
    for token, value in ((40, torch.nan), (3, torch.inf)):
        model = tiny("gpt2")
        with torch.no_grad():
            model.transformer.wte.weight[token, 5] = value
        with pytest.raises(
            ValueError, match=r"activations must be finite, got nan .* block 0 must"
        ):
            gradient_components(model, padded("left"), 7)
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight[9] = torch.nan
    with pytest.raises(ValueError, match="must return finite logits, got NaN or inf in row 0"):
        gradient_components(model, padded("right"))


class NoPositions(torch.nn.Module):
    def forward(self, input_ids, attention_mask=None, **rest):
        return input_ids


def test_padding_first_needs_a_model_that_takes_positions():
    refused = r"test: attention_mask must have its padding after .*NoPositions, .* in row 0; set"
    with pytest.raises(ValueError, match=refused):
        with_positions("test", NoPositions(), padded("left"))
    given, kept = with_positions("test", NoPositions(), padded("right"))
    assert "position_ids" not in given and torch.equal(
        kept.long(), padded("right")["attention_mask"]
    )
    own = torch.zeros(3, 8, dtype=torch.int64)
    given, _ = with_positions("test", NoPositions(), {**padded("left"), "position_ids": own})
    assert given["position_ids"] is own


def test_opt_derives_the_same_positions_from_the_mask():
    model = tiny("opt", ffn_dim=40, word_embed_proj_dim=24)
    batch = padded("mixed")
    given, kept = with_positions("test", model, batch)
    with torch.no_grad():
        mine, own = model(**given).logits, model(**batch).logits
        assert torch.equal(mine[kept], own[kept])
        for row, tokens in enumerate(ROWS):
            alone = model(torch.tensor([tokens])).logits[0]
            torch.testing.assert_close(mine[row, kept[row]], alone)


def test_masks_refused():
    model, ids = tiny("gpt2"), torch.tensor([[1, 2, 3], [4, 5, 6]])
    for mask, message in (
        (
            [[1, 1, 1], [1, 0, 1]],
            r"before or after the tokens of a row only, got \[1, 0, 1\] in row 1",
        ),
        ([[1, 1, 1], [0, 0, 0]], "with a token in every row, got none in row 1"),
        ([[0.0, 0.0, -1e9], [0.0, 0.0, 0.0]], "1 for a token and 0 for padding, got -1000000000"),
        ([[1.0, 0.5, 1.0], [1.0, 1.0, 1.0]], "1 for a token and 0 for padding, got 0.5"),
        ([[1.0, float("nan"), 1.0], [1.0, 1.0, 1.0]], "1 for a token and 0 for padding, got nan"),
        ([[2, 2, 2], [2, 2, 2]], "1 for a token and 0 for padding, got 2"),
        ([[1, 1], [1, 1]], r"must be \[2, 3\] with 1 for a token .*got \[2, 2\]"),
        ([[[[1, 1, 1]]]], r"must be \[2, 3\] with 1 for a token .*got \[1, 1, 1, 3\]"),
    ):
        with pytest.raises(ValueError, match=f"gradient_components: attention_mask .*{message}"):
            gradient_components(model, {"input_ids": ids, "attention_mask": torch.tensor(mask)})
    with pytest.raises(TypeError, match="attention_mask must be a tensor"):
        gradient_components(model, {"input_ids": ids, "attention_mask": [[1, 1, 1], [1, 1, 1]]})


def whole(model):
    return torch.compile(model, backend="eager")


def in_place(model):
    model.compile(backend="eager")
    return model


def a_block(model):
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    return model


def an_attention(model):
    model.model.layers[1].self_attn.compile(backend="eager")
    return model


def a_function(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


@pytest.mark.parametrize("compile", [whole, in_place, a_block, an_attention, a_function])
def test_components_of_compiled_models(compile):
    torch.compiler.reset()
    ids = torch.tensor([[3, 14, 15, 9, 2], [6, 5, 35, 8, 9]])
    expected = gradient_components(tiny("llama"), ids, heads=True)
    model = compile(tiny("llama"))
    assert compiled_part(model) is not None and compiled_part(original(tiny("llama"))) is None
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    found = gradient_components(model, ids, heads=True)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_the_stance_is_put_back():
    torch.compiler.reset()
    calls = []

    def backend(module, inputs):
        calls.append(1)
        return module.forward

    function = torch.compile(lambda x: x + 1, backend=backend)
    with eager():
        function(torch.ones(2))
    assert not calls
    function(torch.ones(2))
    assert calls


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.o_proj = torch.nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return self.o_proj(x)


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn, self.mlp = Attention(), torch.nn.Linear(4, 4)

    def forward(self, hidden_states):
        x = hidden_states + self.self_attn(hidden_states)
        return x + self.mlp(x)


def test_scripted_parts_are_refused_by_name():
    model = tiny("llama")
    block = torch.jit.trace(Layer(), oracle.randn(2, 4))
    model.model.layers[1] = block
    with pytest.raises(
        ValueError, match=r"got a scripted model.layers.1 with .* inside; code comp"
    ):
        gradient_components(model, torch.tensor([[1, 2, 3]]))
