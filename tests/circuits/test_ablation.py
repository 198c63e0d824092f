# SPDX-License-Identifier: Apache-2.0
"""Ablation, against models whose weights are edited by hand, in double precision."""

import copy
import threading
from functools import partial

import pytest
import torch
from decoder_cases import IDS, hooks_of, letters, made, padded
from lens_cases import lens

from mikernels.circuits import (
    ablate,
    ablation_effect,
    comprehensiveness,
    sufficiency,
)
from mikernels.nn import ReLUSAE, TopKSAE, Transcoder

OTHER = torch.tensor([[3, 14, 21, 9, 2], [6, 5, 35, 30, 9]])
PAIR = (7, 11)
# of each kind: the names of attention and its projection, and of an MLP and its last layer
PATHS = {
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "opt": ("self_attn.out_proj", "fc2"),
    "gemma2": ("self_attn.o_proj", "mlp.down_proj"),
    "qwen2_moe": ("self_attn.o_proj", None),
}


def block(model, layer):
    return next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))[layer]


def edit(layer, rows, mean=None):
    """Nothing of these inputs of a linear layer reaches its output, but their mean."""
    turned = type(layer).__name__ == "Conv1D"
    weight = layer.weight.data if turned else layer.weight.data.T
    if mean is not None:
        bias = 0 if layer.bias is None else layer.bias.data
        layer.bias = torch.nn.Parameter(bias + mean[rows] @ weight[rows])
    weight[rows] = 0


def seen(module, model, batch):
    """What a linear layer reads, `[B, P, n]`."""
    found = []
    handle = module.register_forward_pre_hook(lambda m, args: found.append(args[0]))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return found[0].reshape(*batch["input_ids"].shape, -1)


def positioned(batch):
    """Of a padded batch, the positions that rows have by themselves."""
    mask = batch["attention_mask"]
    return {**batch, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


@pytest.mark.parametrize("kind", PATHS)
def test_heads_neurons_and_parts_by_edited_weights(kind):
    model = made(kind)
    before = hooks_of(model)
    # Gemma 2's softmax is in float32, where the mask of float64 is -inf: NaN at padding before
    layouts = ("right", "right") if kind == "gemma2" else ("mixed", "left")
    batch, others = (positioned(padded(layout)) for layout in layouts)
    tokens = others["attention_mask"] == 1
    kept = batch["attention_mask"] == 1
    width = 8 if kind in ("llama", "gemma2") else 6
    projection, down = PATHS[kind]
    names = [f"L1.h{h}" for h in (3, 0)]
    rows = torch.tensor([i for h in (3, 0) for i in range(h * width, (h + 1) * width)])
    for method in ("zero", "mean"):
        reference = {} if method == "zero" else {"reference": padded(layouts[1])}
        # the heads of one layer, neurons of another
        other = copy.deepcopy(model)
        layer = block(other, 1).get_submodule(projection)
        z = seen(block(model, 1).get_submodule(projection), model, others)[tokens]
        edit(layer, rows, None if method == "zero" else z.mean(0))
        asked = list(names)
        if down is not None:
            layer = block(other, 2).get_submodule(down)
            h = seen(block(model, 2).get_submodule(down), model, others)[tokens]
            edit(layer, torch.tensor([7, 31, 2]), None if method == "zero" else h.mean(0))
            asked += [f"L2.mlp.n{n}" for n in (7, 31, 2)]
        with ablate(model, asked, method, **reference) as found:
            got = logits(model, batch)
        assert list(found) == asked and hooks_of(model) == before
        expected = logits(other, batch)
        assert (expected - logits(model, batch))[kept].abs().max() > 1e-3
        torch.testing.assert_close(got[kept], expected[kept], rtol=1e-10, atol=1e-11)
    # what is written: nothing
    other = copy.deepcopy(model)
    for name in ("attn", "mlp"):
        own = block(other, 0)
        norm = {"attn": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}[name]
        if kind == "gemma2":
            own.get_submodule(norm).weight.data.fill_(-1)
        elif name == "attn" or down is not None:
            last = own.get_submodule(projection if name == "attn" else down)
            last.weight.data.zero_()
            if last.bias is not None:
                last.bias.data.zero_()
        else:
            own.mlp.experts.down_proj.data.zero_()
            own.mlp.shared_expert.down_proj.weight.data.zero_()
    with ablate(model, ["L0.attn", "L0.mlp"], "zero"):
        got = logits(model, batch)
    torch.testing.assert_close(got[kept], logits(other, batch)[kept], rtol=1e-10, atol=1e-11)


def test_what_norms_after_attention_and_mlp_write():
    model, batch = made("gemma2"), {"input_ids": IDS}
    own, found = block(model, 1), {}
    norms = [own.post_attention_layernorm, own.post_feedforward_layernorm]

    def through(ids, hook):
        handles = [norm.register_forward_hook(hook) for norm in norms]
        made = logits(model, {"input_ids": ids})
        for handle in handles:
            handle.remove()
        return made

    through(OTHER, lambda norm, args, out: found.__setitem__(norm, out.mean((0, 1))))
    with ablate(model, ["L1.attn", "L1.mlp"], "mean", reference=OTHER):
        got = logits(model, batch)
    expected = through(IDS, lambda norm, args, out: found[norm].expand_as(out))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)


def test_experts_by_edited_weights_and_their_own_terms():
    model, batch = made("qwen2_moe"), {"input_ids": IDS}
    other = copy.deepcopy(model)
    for expert in (1, 3):
        block(other, 1).mlp.experts.down_proj.data[expert] = 0
    with ablate(model, ["L1.expert3", "L1.expert1"], "zero"):
        got = logits(model, batch)
    torch.testing.assert_close(got, logits(other, batch), rtol=1e-10, atol=1e-12)
    # all experts are what all but the shared one add: by what the module returns for other text
    own = block(model, 1).mlp.experts
    found = []
    handle = own.register_forward_hook(lambda m, args, out: found.append(out))
    logits(model, {"input_ids": OTHER})
    handle.remove()
    means = found[0].mean(0).expand(10, -1)
    every = [f"L1.expert{e}" for e in range(4)]
    for method, options, stands in (
        ("counterfactual", {"counterfactual": OTHER}, found[0]),
        ("mean", {"reference": OTHER}, means),
    ):
        with ablate(model, every, method, **options):
            got = logits(model, batch)
        handle = own.register_forward_hook(lambda m, args, out, stands=stands: stands)
        expected = logits(model, batch)
        handle.remove()
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    # some rows alone, as in effects
    names = {"some": every[:2], "one": every[2:3]}
    table = ablation_effect(model, IDS, PAIR, names, "mean", reference=OTHER)
    for i, group in enumerate(names.values()):
        with ablate(model, group, "mean", reference=OTHER):
            last = logits(model, batch)[:, -1]
        torch.testing.assert_close(table.alone[i], last[:, 7] - last[:, 11])


@pytest.mark.parametrize("kind", ["llama", "gemma2", "solu"])
def test_hooked_transformers_by_edited_weights(kind):
    model = lens(kind)
    other = copy.deepcopy(model)
    own = other.blocks[1]
    found = {}
    with torch.no_grad():
        for name in ("attn.hook_z", "mlp.hook_post"):
            hook = model.blocks[1].get_submodule(name)
            keep = partial(lambda name, m, a, out: found.__setitem__(name, out), name)
            handle = hook.register_forward_hook(keep)
            model(OTHER)
            handle.remove()
        z, post = (x.flatten(0, 1).mean(0) for x in found.values())
        own.attn.b_O += z[2] @ own.attn.W_O[2]
        own.attn.W_O[2] = 0
        own.mlp.b_out += post[5] * own.mlp.W_out[5]
        own.mlp.W_out[5] = 0
        with ablate(model, ["L1.h2", "L1.mlp.n5"], "mean", reference=OTHER):
            got = model(IDS)
        torch.testing.assert_close(got, other(IDS), rtol=1e-10, atol=1e-11)
        whole = model(OTHER)
        with (
            ablate(model, "*", "counterfactual", counterfactual=OTHER),
            ablate(model, "input", "counterfactual", counterfactual=OTHER),
        ):
            torch.testing.assert_close(model(IDS), whole, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("kind", ["gpt_neox", "gemma2", "mixtral", "opt"])
def test_all_of_another_prompt_is_that_prompt(kind):
    """Heads, MLPs and the input are all that the stream is made of."""
    layout = "right" if kind == "gemma2" else "left"
    model, batch = made(kind), positioned(padded(layout))
    twin = {**padded(layout), "input_ids": (7 * batch["input_ids"] + 1) % 50}
    whole, kept = logits(model, positioned(twin)), batch["attention_mask"] == 1
    with ablate(model, ["input", "*"], "counterfactual", counterfactual=twin) as names:
        got = logits(model, batch)
        with pytest.raises(ValueError, match=r"\[3, 8\] tokens, got \[2, 5\]"):
            logits(model, {"input_ids": IDS})
    assert len(names) == 16
    torch.testing.assert_close(got[kept], whole[kept], rtol=1e-10, atol=1e-11)
    # of another prompt: of each row exactly one other
    ids = torch.cat([IDS, OTHER])
    whole = logits(model, {"input_ids": ids})[:, -1]
    chosen = []
    for seed in (0, 1, 0):
        with ablate(model, ["input", "L*"], "resample", reference=ids, seed=seed):
            got = logits(model, {"input_ids": ids})[:, -1]
        chosen.append((got[:, None] - whole).abs().amax(-1).argmin(-1).tolist())
        torch.testing.assert_close(got, whole[chosen[-1]], rtol=1e-10, atol=1e-11)
        assert sorted(chosen[-1]) == [0, 1, 2, 3] and all(a != b for b, a in enumerate(chosen[-1]))
    assert chosen[0] == chosen[2]


@pytest.mark.parametrize("place", ["mlp_out", "residual", "mlp_in"])
def test_features_leave_what_the_sae_does_not_reconstruct(place):
    model = made("llama")
    torch.manual_seed(0)
    sae = TopKSAE(24, 30, 6, dtype=torch.float64)
    if place == "residual":
        sae = ReLUSAE(24, 30, dtype=torch.float64)
    own = block(model, 1)
    module = own if place == "residual" else own.mlp
    features = [4, 17, 2, 29]

    def change(stands, x):
        codes = sae.encode(x).to_dense()
        new = codes.clone()
        new[..., features] = stands
        return x + (new - codes) @ sae.w_dec

    def through(ids, make):
        if place == "mlp_in":
            handle = module.register_forward_pre_hook(lambda m, args: (make(args[0]),))
        else:
            handle = module.register_forward_hook(lambda m, args, out: make(out))
        found = logits(model, {"input_ids": ids})
        handle.remove()
        return found

    acts = []
    through(OTHER, lambda x: acts.append(x) or x)
    with torch.no_grad():
        other = sae.encode(acts[0]).to_dense()[..., features]
    assert (other != 0).any()
    names, saes = [f"1.{place}.f{f}" for f in features], {f"1.{place}": sae}
    for method, options, stands in (
        ("zero", {}, torch.zeros(4, dtype=torch.float64)),
        ("mean", {"reference": OTHER}, other.flatten(0, 1).mean(0)),
        ("mean", {"reference": OTHER, "per_position": True}, other.mean(0)),
        ("counterfactual", {"counterfactual": OTHER}, other),
    ):
        with ablate(model, names, method, saes=saes, **options):
            got = logits(model, {"input_ids": IDS})
        torch.testing.assert_close(got, through(IDS, partial(change, stands)))
    with pytest.raises(ValueError, match=r"features 0\.\.29 .*f30"):
        ablate(model, f"1.{place}.f30", "zero", saes=saes).__enter__()


def test_positions_and_means_by_position():
    model, batch = made("gpt2"), {"input_ids": IDS}
    own = block(model, 1).attn.c_proj
    z = seen(own, model, {"input_ids": OTHER})

    def oracle(value, at):
        def change(module, args):
            x = args[0].clone()
            x[..., 12:18] = torch.where(at[..., None], value[..., 12:18], x[..., 12:18])
            return (x,)

        handle = own.register_forward_pre_hook(change)
        found = logits(model, batch)
        handle.remove()
        return found

    mask = torch.tensor([[0, 1, 0, 0, 1], [1, 0, 0, 0, 0]]).bool()
    columns = torch.tensor([0, 1, 0, 0, 1]).bool()
    every = torch.ones(5, dtype=torch.bool)
    mean = {"kind": "mean", "reference": OTHER}
    for options, value, at in (
        ({**mean, "per_position": True}, z.mean(0), every),
        ({**mean, "per_position": True, "positions": [-1, 1]}, z.mean(0), columns),
        ({**mean, "positions": mask}, z.mean((0, 1)), mask),
        ({"kind": "counterfactual", "counterfactual": OTHER, "positions": mask}, z, mask),
        ({"kind": "zero", "positions": 4}, torch.zeros(24), torch.arange(5) == 4),
    ):
        with ablate(model, "L1.h2", **options):
            got = logits(model, batch)
        torch.testing.assert_close(got, oracle(value, at), rtol=1e-10, atol=1e-12)
    options = {"counterfactual": OTHER, "positions": mask[:1]}
    with ablate(model, "L1.h2", "counterfactual", **options), pytest.raises(ValueError) as error:
        model(IDS)
    assert "[1, 5] tokens, got [2, 5]" in str(error.value)
    with ablate(model, "L1.h2", "zero", positions=[5]), pytest.raises(ValueError, match="-5..4"):
        model(IDS)
    # of a reference without a token at position 0
    short = {"input_ids": IDS, "attention_mask": torch.tensor([[0, 1, 1, 1, 1]] * 2)}
    with ablate(model, "L1.h2", "mean", reference=short, per_position=True):
        model(**positioned(short))
        with pytest.raises(ValueError, match="none at position 0"):
            model(IDS)


def test_gradients_are_those_of_the_edited_model():
    model = made("llama")
    other = copy.deepcopy(model)
    edit(block(other, 1).self_attn.o_proj, torch.arange(8, 16))
    batch = {"input_ids": IDS, "labels": IDS}
    with ablate(model, "L1.h1", "zero"):
        model(**batch).loss.backward()
    other(**batch).loss.backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        expected = q.grad
        if name == "model.layers.1.self_attn.o_proj.weight":
            expected = q.grad.clone()
            expected[:, 8:16] = 0
        torch.testing.assert_close(p.grad, expected, rtol=1e-9, atol=1e-12)


def test_nested_blocks_other_threads_and_what_is_left():
    model, batch = made("llama"), {"input_ids": IDS}
    before = hooks_of(model)
    clean = logits(model, batch)
    z = seen(block(model, 1).self_attn.o_proj, model, {"input_ids": OTHER})
    other = copy.deepcopy(model)
    edit(block(other, 0).self_attn.o_proj, torch.arange(16))
    # the reference is that of the whole model, not of the outer's
    edit(block(other, 1).self_attn.o_proj, torch.arange(8), z.flatten(0, 1).mean(0))
    threads = []
    with ablate(model, ["L0.h0", "L0.h1", "L1.h0"], "zero"):
        with ablate(model, "L1.h0", "mean", reference=OTHER):
            got = logits(model, batch)
        thread = threading.Thread(target=lambda: threads.append(logits(model, batch)))
        thread.start()
        thread.join()
    torch.testing.assert_close(got, logits(other, batch), rtol=1e-10, atol=1e-12)
    assert torch.equal(threads[0], clean) and torch.equal(logits(model, batch), clean)
    with pytest.raises(KeyError), ablate(model, "L*", "zero"):
        raise KeyError
    with pytest.raises(RuntimeError, match="copied"), ablate(model, "L1.mlp", "zero"):
        copy.deepcopy(block(model, 1))
    assert hooks_of(model) == before
    # a low precision stays
    low = made("llama", torch.bfloat16)
    with ablate(low, ["L1.h0", "L1.mlp"], "mean", reference=OTHER):
        assert logits(low, batch).dtype == torch.bfloat16


def test_generates_under_means_and_not_under_prompts_of_a_shape():
    model = made("llama")
    other = copy.deepcopy(model)
    edit(block(other, 1).self_attn.o_proj, torch.arange(32))
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    plain = model.generate(IDS, **options)
    with ablate(model, "L1.h*", "zero"):
        got = model.generate(IDS, **options)
    assert torch.equal(got, other.generate(IDS, **options)) and not torch.equal(got, plain)
    with (
        ablate(model, "L1.h*", "resample", reference=IDS),
        pytest.raises(ValueError, match="'zero' or 'mean'"),
    ):
        model.generate(IDS, **options)


def test_effects_are_those_of_one_ablation_at_a_time():
    model = made("qwen2")
    ids, twins = torch.cat([IDS, IDS.flip(1)]), torch.cat([OTHER, OTHER.flip(1)])
    names = [f"L{i}.h{h}" for i in range(3) for h in (1, 3)] + ["L0.mlp", "L1.mlp.n3"]
    positions = torch.tensor([[0, 1, 0, 0, 1], [1] * 5, [0, 0, 1, 1, 0], [1, 0, 0, 0, 0]]).bool()
    methods = (
        ("counterfactual", {"counterfactual": twins}),
        ("mean", {"reference": twins, "per_position": True, "positions": positions}),
        ("resample", {"reference": ids, "seed": 3}),
    )

    def value(parts, method, options):
        if not parts:
            last = logits(model, {"input_ids": ids})[:, -1]
            return last[:, 7] - last[:, 11]
        with ablate(model, parts, method, **options):
            last = logits(model, {"input_ids": ids})[:, -1]
        return last[:, 7] - last[:, 11]

    clean = value([], "", {})
    for method, options in methods:
        # rows that divide neither prompts nor components
        table = ablation_effect(model, ids, PAIR, names, method, batch=3, **options)
        torch.testing.assert_close(table.clean, clean)
        for i, name in enumerate(names):
            torch.testing.assert_close(table.alone[i], value([name], method, options))
            lost = (clean - table.alone[i]).mean().item()
            assert table.lost[i].value == pytest.approx(lost, abs=1e-12)
        torch.testing.assert_close(table.together, value(names, method, options))
        assert len(str(table).splitlines()) == 2 + len(names) + 1
    whole = ablation_effect(
        model, ids, lambda x: x[:, -1, 7] - x[:, -1, 11], names, method, batch=3, **options
    )
    torch.testing.assert_close(whole.alone, table.alone)
    method, options = methods[0]
    for measure, sizes in ((comprehensiveness, (1, 2, 6)), (sufficiency, (1, 2, 6))):
        found = measure(model, ids, PAIR, names, method, fractions=(0.01, 0.3, 0.75), **options)
        assert found.sizes == sizes
        for row, k in zip(found.values, sizes, strict=True):
            parts = names[:k] if measure is comprehensiveness else names[k:]
            torch.testing.assert_close(row, value(parts, method, options))
        assert found.score.value == pytest.approx((clean - found.values).mean().item(), abs=1e-12)
        assert [one.value for one in found.curve] == pytest.approx(
            (clean - found.values).mean(1).tolist(), abs=1e-12
        )
        assert len(str(found).splitlines()) == 2 + 3 + 1


def test_what_is_not_reached_raises_and_a_model_that_does_not_run_warns():
    model = made("llama")
    own = block(model, 1)
    with ablate(model, "L1.mlp", "zero"), pytest.raises(RuntimeError, match="must be reached"):
        own.forward = lambda x, **_: x
        model(IDS)
    del own.forward
    with (
        pytest.raises(RuntimeError, match="L2.mlp must be reached"),
        ablate(model, "L2.mlp", "zero"),
    ):
        model.config.num_hidden_layers = 2
        model(IDS)
    with (
        pytest.warns(RuntimeWarning, match="did not run") as told,
        ablate(made("llama"), "L1.mlp", "zero"),
    ):
        pass
    assert told[0].filename == __file__


BAD = (
    ("L3.h0", {}, r"layers 0\.\.2, got 'L3.h0'"),
    ("L0.h4", {}, r"heads 0\.\.3 of block 0"),
    ("L0.mlp.n40", {}, r"neurons 0\.\.39 of block 0"),
    ("L0.expert1", {}, r"no module of L0.mlp holds"),
    ("0.mlp_out.f3", {}, r"sites with an SAE"),
    ("head 3", {}, r"components such as"),
    ("L7.*", {}, r"matches none"),
    (["L0.h1", "L0.h*"], {}, r"'L0.h1'; it is named twice"),
    ([], {}, r"at least one component"),
    ([3], {}, r"texts such as"),
    ("L0.h0", {"kind": "average"}, r"kind must be one of"),
    ("L0.h0", {"kind": "mean"}, r"reference must be given for kind='mean'"),
    ("L0.h0", {"kind": "counterfactual"}, r"counterfactual must be given"),
    ("L0.h0", {"reference": IDS}, r"reference must be left out for kind='zero'"),
    ("L0.h0", {"per_position": True}, r"per_position must be of kind='mean'"),
    ("L0.h0", {"kind": "resample", "reference": IDS[:1]}, r"at least 2 prompts of each length"),
    ("L0.h0", {"kind": "mean", "reference": ["a b"]}, r"without a tokenizer"),
    ("L0.h0", {"positions": []}, r"positions must be different columns"),
    ("L0.h0", {"positions": [1, 1]}, r"positions must be different columns"),
    ("0.mlp_out.f3", {"saes": {"0.mlp_out": TopKSAE(8, 16, 2)}}, r"model's width 24, got 8"),
    ("0.mlp_out.f3", {"saes": {"0.mlp_out": Transcoder(24, 16, 2)}}, r"that reconstruct what"),
    ("0.mlp_out.f3", {"saes": {"3.mlp_out": TopKSAE(24, 16, 2)}}, r"a layer in 0\.\.2"),
)


def test_bad_input_is_named_before_the_block_runs():
    model = made("llama")
    for names, options, message in BAD:
        with pytest.raises((TypeError, ValueError), match=f"ablate: .*{message}"):
            ablate(model, names, **{"kind": "zero", **options}).__enter__()
    with pytest.raises(ValueError, match="mixture of experts"):
        ablate(made("mixtral"), "L0.mlp.n3", "zero").__enter__()
    with pytest.raises(ValueError, match=r"experts 0\.\.3"):
        ablate(made("mixtral"), "L0.expert4", "zero").__enter__()
    broken = made("llama")
    block(broken, 0).mlp.down_proj.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="finite"):
        ablate(broken, "L1.mlp", "mean", reference=IDS).__enter__()
    with pytest.raises(ValueError, match="eval mode"):
        ablate(made("llama").train(), "L1.mlp", "zero").__enter__()
    short = IDS[:, :4]
    for options in ({"kind": "counterfactual", "counterfactual": short},
                    {"kind": "resample", "reference": short}):  # fmt: skip
        with pytest.raises(ValueError, match="ablation_effect: .* must have the tokens of"):
            ablation_effect(model, IDS, PAIR, "L0.h0", **options)
    with pytest.raises(ValueError, match=r"positions must be those of the prompts \[2, 5\]"):
        ablation_effect(model, IDS, PAIR, "L0.h0", "zero", positions=IDS[:1] > 0)
    alone = lens("attn only")
    for name in ("L0.mlp", "L0.mlp.n1", "0.mlp_in.f1"):
        with pytest.raises(ValueError, match="L0 has no MLP"):
            ablate(alone, name, "zero", saes={"0.mlp_in": TopKSAE(24, 16, 2)}).__enter__()
    for fractions in ((), (0.5, 0.1), (0.0, 0.5), (0.5, 1.5)):
        with pytest.raises(ValueError, match="fractions must ascend"):
            sufficiency(model, IDS, PAIR, ["L0.h0"], "zero", fractions=fractions)
    with pytest.raises(TypeError, match="best first"):
        comprehensiveness(model, IDS, PAIR, ["L0.h*"], "zero")
    with pytest.raises(ValueError, match="batch must be at least 1"):
        ablation_effect(model, IDS, PAIR, "L0.h0", "zero", batch=0)
    table = ablation_effect(
        model, ["a b c", "b c a d"], PAIR, {"both": "L0.h[01]"}, "zero", tokenizer=letters()
    )
    assert table.names == ("both",) and table.alone.shape == (1, 2)
