# SPDX-License-Identifier: Apache-2.0
"""HookedTransformers: what is found in them, and gradients against their own hook points."""

import copy
import types
from contextlib import ExitStack

import pytest
import torch
from decoder_cases import IDS, check_rows, hooks_of, padded
from lens_cases import KINDS, lens

from mikernels.circuits import gradient_components
from mikernels.models.decoder import find_decoder
from mikernels.models.watch import Watch

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated"),
]
BOTH = ("ln1", "attn"), ("ln2", "mlp")
# (norm before, writer) of attention and MLP, where they are others
FLOWS = {
    "gemma2": (("ln1", "ln1_post"), ("ln2", "ln2_post")),
    "olmo2": ((None, "ln1"), (None, "ln2")),
    "shortformer": ((None, "attn"), (None, "mlp")),
    "attn only": (("ln1", "attn"), (None, None)),
    "attn only, bare": ((None, "attn"), (None, None)),
}
NORMED = ("gemma2", "olmo2")


def truth(model, ids, target=7):
    """Values and gradients at the library's own hook points, of zeros added there."""
    values, probes = {}, {}

    def probe(x, hook):
        values[hook.name] = x.detach()
        probes[hook.name] = torch.zeros_like(x, requires_grad=True)
        return x + probes[hook.name]

    ends = ("hook_attn_out", "hook_mlp_out", "attn.hook_z")
    names = [name for name in model.hook_dict if name.split(".", 2)[-1] in ends]
    hooks = [(name, probe) for name in names if "mlp" not in name or not model.cfg.attn_only]
    score = model.run_with_hooks(ids, fwd_hooks=hooks)[:, -1, target].sum()
    grads = torch.autograd.grad(score, list(probes.values()))
    return values, dict(zip(probes, grads, strict=True))


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert expected.abs().max() > 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_components_are_the_gradients_at_the_librarys_own_hook_points(kind):
    model = lens(kind)
    values, grads = truth(model, IDS)
    before = hooks_of(model)
    found = gradient_components(model, IDS, 7)
    scaled = gradient_components(model, {"input_ids": IDS}, 7, attribution=True)
    parts = ("attn",) if model.cfg.attn_only else ("attn", "mlp")
    assert list(found) == list(scaled) == [f"L{i}.{part}" for i in range(2) for part in parts]
    for name, grad in found.items():
        point = f"blocks.{name[1]}.hook_{name[3:]}_out"
        close(grad, grads[point])
        close(scaled[name], grads[point] * values[point])
    if kind in NORMED:
        with pytest.raises(ValueError, match=r"block 0 adds what ln1\w* makes of the sum of its h"):
            gradient_components(model, IDS, 7, heads=True)
    else:
        heads = gradient_components(model, IDS, 7, heads=True)
        scaled = gradient_components(model, IDS, 7, heads=True, attribution=True)
        for layer, block in enumerate(model.blocks):
            z, g = values[f"blocks.{layer}.attn.hook_z"], grads[f"blocks.{layer}.attn.hook_z"]
            out = grads[f"blocks.{layer}.hook_attn_out"]
            for h in range(4):
                w = block.attn.W_O[h].detach()
                close(heads[f"L{layer}.h{h}"], g[:, :, h] @ w)
                close(scaled[f"L{layer}.h{h}"], out * (z[:, :, h] @ w))
    assert hooks_of(model) == before and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_found_and_that_padding_changes_nothing(kind):
    model = lens(kind)
    decoder = find_decoder(model, "test", "mend it")
    with ExitStack() as stack:
        watch = Watch(decoder, None, [decoder.w_o(block) for block in decoder.blocks], stack)
        decoder.logits({"input_ids": IDS})
        watch.check()
    assert [block.module for block in decoder.blocks] == list(model.blocks) and decoder.d == 24
    assert (decoder.embedding, decoder.unembedding) == (model.embed, model.unembed)
    assert decoder.final_norm is getattr(model, "ln_final", None)
    assert watch.reader is (decoder.final_norm or model.unembed)
    grouped = 2 if model.cfg.n_key_value_heads else 4
    for block, flow in zip(decoder.blocks, watch.flows, strict=True):
        assert decoder.heads(block) == (4, grouped, 6)
        names = {module: name for name, module in block.module.named_children()} | {None: None}
        found = (
            (names[flow.attention_norm], names[flow.attention_writer]),
            (names[flow.mlp_norm], names[flow.mlp_writer]),
        )
        assert found == FLOWS.get(kind, BOTH)
        assert flow.parallel == ("pythia" in kind)
    check_rows(model, padded("mixed"), heads=kind not in NORMED)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["gpt2", "gpt2, folded", "llama, split", "pythia, split"])
def test_rounding_is_not_refused(kind, dtype):
    model = lens(kind, dtype)
    ids = torch.randint(50, (4, 30), generator=torch.Generator().manual_seed(3))
    found = gradient_components(model, ids, heads=True)
    assert {part.dtype for part in found.values()} == {dtype}


@pytest.mark.parametrize(
    ("point", "claim"),
    [
        ("blocks.1.hook_attn_out", r"the MLP of block 1 must read input \+ attention: got"),
        ("blocks.1.hook_mlp_out", r"block 1 must return input \+ attention \+ mlp: got"),
        ("blocks.1.hook_resid_pre", r"the MLP of block 1 must read input \+ attention: got"),
        ("blocks.0.hook_resid_post", r"block 0 must return input \+ attention \+ mlp: got"),
        ("blocks.0.attn.hook_result", r"the projection of block 0 must return z W_O \+ b"),
        ("ln_final.hook_normalized", None),
        ("blocks.1.attn.hook_z", None),
    ],
)
def test_hooks_that_edit_what_is_written_are_seen(point, claim):
    model = lens("gpt2, folded")
    with model.hooks(fwd_hooks=[(point, lambda x, hook: x * 1.001)]):
        if claim is None:
            found = gradient_components(model, IDS, 7, heads=True)
            _, grads = truth(model, IDS)
            z = grads["blocks.0.attn.hook_z"]
            close(found["L0.h2"], z[:, :, 2] @ model.blocks[0].attn.W_O[2].detach())
        else:
            with pytest.raises(ValueError, match=f"^gradient_components: .*{claim}"):
                gradient_components(model, IDS, 7, heads=True)


def test_models_and_inputs_are_refused():
    model = lens("llama")
    for inputs, target, message in (
        (["text"], None, "inputs must be a tensor of token ids or a mapping .* got list"),
        ({"input_ids": IDS, "position_ids": IDS}, None, r"got \['input_ids', 'position_ids'\]; le"),
        ({"attention_mask": IDS > 0}, None, r"inputs must be input_ids, .*got \['attention_mask'"),
        ({"input_ids": IDS, "attention_mask": 0 * IDS}, None, "with a token in every row"),
        (IDS[0], None, r"input_ids must be \[B, P\], not empty, got \[5\]"),
        (IDS, 50, r"target must be in 0..49 \(vocabulary\), got 50"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^gradient_components: .*{message}"):
            gradient_components(model, inputs, target)
    quantised = lens("llama")
    quantised.blocks[1].attn.W_O = torch.nn.Parameter(
        torch.zeros(288, 1, dtype=torch.uint8), requires_grad=False
    )
    with pytest.raises(ValueError, match=r"W_O of block 1 is quantised \(torch.uint8\)"):
        gradient_components(quantised, IDS, heads=True)
    other = lens("llama")
    other.blocks[1].attn.hook_z = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"or a HookedTransformer, .*: block 1 \(Transformer"):
        gradient_components(other, IDS)
    # says that it is serial, and is not
    lies = lens("pythia, split")
    lies.cfg = copy.deepcopy(lies.cfg)
    lies.cfg.parallel_attn_mlp = False
    with pytest.raises(ValueError, match=r"the MLP of block 0 must read input \+ attention: got"):
        gradient_components(lies, IDS)
    assert hooks_of(lies) == 0


def test_dropped_numbers_and_bridges_are_refused():
    model = lens("gpt2")
    assert model.training  # as the library leaves them
    model.blocks[0].dropout = torch.nn.Dropout(0.1)
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        gradient_components(model, IDS)
    bridge = torch.nn.Module()
    bridge.blocks, bridge.cfg = model.blocks, types.SimpleNamespace(n_layers=2, d_model=24)
    vars(bridge)["original_model"] = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"got Module: it runs a Linear; give its original_model$"):
        gradient_components(bridge, IDS)
