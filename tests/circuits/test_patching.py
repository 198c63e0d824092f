# SPDX-License-Identifier: Apache-2.0
"""Runs of a model on a circuit, against such runs by hand: of HookedTransformers by the library's
own hooks; of Hugging Face models with a single edge cut at what the projections return."""

import dataclasses

import pytest
import torch
from decoder_cases import hooks_of, made, padded
from lens_cases import lens

from mikernels.circuits import baseline, patching
from mikernels.circuits.baseline import normed
from mikernels.circuits.patching import Patcher, pruned
from mikernels.models.decoder import find_decoder
from mikernels.models.readers import wire

CLEAN = torch.tensor([[3, 14, 15, 9, 2], [6, 5, 35, 8, 9], [11, 2, 40, 8, 1]])
OTHER = torch.tensor([[3, 17, 15, 21, 2], [6, 5, 33, 8, 4], [12, 2, 40, 8, 3]])
PAIR = (7, 9)


def patcher(model, level="edge", clean=CLEAN, other=OTHER, metric=PAIR, **options):
    return Patcher("test", model, clean, other, metric, level, **options)


def drawn(graph, density, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(len(graph.writers), len(graph.readers), generator=generator) < density
    return pruned(graph, mask)


def by_paths(graph, mask):
    """The edges on paths from the input to the logits, one node after the other."""
    feeds = {r: set(made) for r, made in enumerate(graph.feeds)}
    reached, leads = {0}, {len(graph.readers) - 1}
    edges = mask.nonzero().tolist()
    for _ in range(2 * len(graph.writers)):
        for w, r in edges:
            if w in reached:
                reached |= feeds[r]
            if r in leads:
                leads |= {reader for reader, made in feeds.items() if w in made}
    found = torch.zeros_like(mask)
    for w, r in edges:
        found[w, r] = w in reached and r in leads
    return found


class ByHooks:
    """EAP-IG's definition with TransformerLens' own hooks: of every reader the stream of the run,
    plus what every cut edge changes in it."""

    def __init__(self, model, mask):
        self.model, self.cfg, self.mask = model, model.cfg, mask
        grouped = model.cfg.n_key_value_heads is not None
        whole = grouped and not model.cfg.ungroup_grouped_query_attention
        self.groups = model.cfg.n_key_value_heads if whole else model.cfg.n_heads
        for name in ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in"):
            setattr(model.cfg, name, True)

    def writers(self, store):
        """Hooks that call store with the numbers of writers and what they write."""
        h = self.cfg.n_heads
        yield "blocks.0.hook_resid_pre", lambda x, hook: store(0, x[:, :, None])
        at = 1
        for i in range(self.cfg.n_layers):
            yield (
                f"blocks.{i}.attn.hook_result",
                lambda x, hook, at=at: store(at, x),
            )
            if not self.cfg.attn_only:
                yield (
                    f"blocks.{i}.hook_mlp_out",
                    lambda x, hook, at=at + h: store(at, x[:, :, None]),
                )
            at += h + (not self.cfg.attn_only)

    def readers(self, change):
        column = 0
        for i in range(self.cfg.n_layers):
            for part, n in (("q", self.cfg.n_heads), ("k", self.groups), ("v", self.groups)):
                yield (
                    f"blocks.{i}.hook_{part}_input",
                    lambda x, hook, c=column, n=n: change(x, range(c, c + n)),
                )
                column += n
            if not self.cfg.attn_only:
                yield (
                    f"blocks.{i}.hook_mlp_in",
                    lambda x, hook, c=column: change(x[:, :, None], [c])[:, :, 0],
                )
                column += 1
        yield (
            f"blocks.{self.cfg.n_layers - 1}.hook_resid_post",
            lambda x, hook: change(x[:, :, None], [column])[:, :, 0],
        )

    def run(self, ids, hooks, **inputs):
        with torch.no_grad():
            return self.model.run_with_hooks(ids, fwd_hooks=list(hooks), **inputs)

    def written(self, ids, **inputs):
        found = torch.zeros(*ids.shape, len(self.mask), self.cfg.d_model, dtype=torch.float64)

        def store(at, x):
            found[:, :, at : at + x.shape[2]] = x

        self.run(ids, self.writers(store), **inputs)
        return found

    def value(self, ids, instead, **inputs):
        """The logit difference; instead: `[B, P, W, d]`."""
        moved = torch.zeros(*ids.shape, len(self.mask), self.cfg.d_model, dtype=torch.float64)

        def store(at, x):
            moved[:, :, at : at + x.shape[2]] = instead[:, :, at : at + x.shape[2]] - x

        def change(x, columns):
            cut = (~self.mask[:, list(columns)]).double()
            before = self.allowed[:, list(columns)].double()
            return x + torch.einsum("wr,bpwd->bprd", cut * before, moved)

        logits = self.run(ids, [*self.writers(store), *self.readers(change)], **inputs)
        return logits[:, -1, PAIR[0]] - logits[:, -1, PAIR[1]]


LENS = ("gpt2", "llama", "llama, ungrouped", "pythia", "qwen3", "attn only", "gpt2, folded")


@pytest.mark.parametrize("kind", LENS)
def test_a_run_with_kept_edges_is_that_by_hand(kind):
    model = lens(kind)
    # two circuits side by side
    p = patcher(model, batch=6)
    graph = p.graph
    masks = [drawn(graph, density, seed) for seed, density in enumerate((0.15, 0.5, 0.95))]
    one_cut = graph.allowed()
    one_cut[1, graph.first_reader(1)] = False
    masks.append(one_cut)
    got = p.measure(masks)
    assert [p._size, p._stack] == [3, 2]
    for mask, values in zip(masks, got.values, strict=True):
        assert mask.any()
        oracle = ByHooks(model, mask)
        oracle.allowed = graph.allowed()
        expected = oracle.value(CLEAN, oracle.written(OTHER))
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-10)
        assert (values - got.clean).abs().max() > 1e-4
    assert (got.values[:3] - got.empty).abs().amax(1).min() > 1e-6


@pytest.mark.parametrize("ablation", ["zero", "mean", "mean-positional"])
def test_what_is_cut_may_be_zero_or_a_mean(ablation):
    model = lens("gpt2")
    p = patcher(model, ablation=ablation)
    # of what nothing reaches, f(mean) is not the mean: it is cut
    mask = torch.rand(p.graph.allowed().shape, generator=torch.Generator().manual_seed(2)) < 0.3
    nothing = torch.zeros_like(mask)
    got = p.measure([mask & p.graph.allowed(), nothing])
    for values, kept in zip(got.values, (pruned(p.graph, mask), nothing), strict=True):
        oracle = ByHooks(model, kept)
        oracle.allowed = p.graph.allowed()
        instead = oracle.written(OTHER)
        if ablation == "zero":
            instead = torch.zeros_like(instead)
        else:
            dims = (0,) if ablation == "mean-positional" else (0, 1)
            instead = instead.mean(dims, keepdim=True).expand_as(instead)
        expected = oracle.value(CLEAN, instead)
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(got.values[1], got.empty, rtol=0, atol=1e-12)


def test_edges_on_no_path_are_cut():
    for kind in ("gpt2", "llama", "pythia", "attn only"):
        graph = patcher(lens(kind)).graph
        for seed, density in enumerate((0.03, 0.1, 0.3)):
            mask = torch.rand(graph.allowed().shape, generator=torch.Generator().manual_seed(seed))
            mask = (mask < density) & graph.allowed()
            assert torch.equal(pruned(graph, mask), by_paths(graph, mask))
        nodes = torch.tensor([w != 0 for w in range(len(graph.writers))])
        assert not pruned(graph, nodes).any()
        nodes[0], nodes[3] = True, False
        assert torch.equal(pruned(graph, nodes), nodes)


# where q, k and v of a head begin in a fused layer of 4 heads of 6
FUSED = {
    "gpt2": lambda part, h: 24 * "qkv".index(part) + 6 * h,
    "gpt_neox": lambda part, h: 18 * h + 6 * "qkv".index(part),
}
NAMES = {
    "gpt2": ("attn", "c_proj", "attn.c_attn", "ln_1", "ln_2", None),
    "gpt_neox": ("attention", "dense", "attention.query_key_value", "input_layernorm",
                 "post_attention_layernorm", None),
    "llama": ("self_attn", "o_proj", None, "input_layernorm", "post_attention_layernorm", None),
    "mixtral": ("self_attn", "o_proj", None, "input_layernorm", "post_attention_layernorm", None),
    "gemma2": ("self_attn", "o_proj", None, "input_layernorm", "pre_feedforward_layernorm",
               "post_attention_layernorm"),
    "olmo2": ("self_attn", "o_proj", None, None, None, "post_attention_layernorm"),
}  # fmt: skip
MLP_WRITER = {"gemma2": "post_feedforward_layernorm", "olmo2": "post_feedforward_layernorm"}


def child(module, path):
    for name in path.split("."):
        module = getattr(module, name)
    return module


class ByProjections:
    """A Hugging Face model of which one edge is cut."""

    def __init__(self, kind, model):
        self.kind, self.model = kind, model
        self.blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))

    def run(self, ids, hooks):
        handles = []
        try:
            for module, before, see in hooks:
                if before:

                    def pre(m, args, kwargs, see=see):
                        new = see(args[0] if args else kwargs["hidden_states"])
                        if new is None:
                            return None
                        return (
                            ((new, *args[1:]), kwargs)
                            if args
                            else (args, {**kwargs, "hidden_states": new})
                        )

                    handles.append(module.register_forward_pre_hook(pre, with_kwargs=True))
                else:

                    def post(m, args, out, see=see):
                        return see(out[0] if isinstance(out, tuple) else out)

                    handles.append(module.register_forward_hook(post))
            with torch.no_grad():
                logits = self.model(ids).logits[:, -1]
            return logits[:, PAIR[0]] - logits[:, PAIR[1]]
        finally:
            for handle in handles:
                handle.remove()  # fmt: skip

    def written(self, ids, writer):
        """What one writer writes, `[B, P, d]`."""
        attention, projection, _, _, _, after = NAMES[self.kind]
        found = {}
        if writer == "input":
            hooks = [(self.blocks[0], True, lambda x: found.update(x=x))]
            self.run(ids, hooks)
            return found["x"]
        block = self.blocks[int(writer[1])]
        if writer.endswith("mlp"):
            module = getattr(block, MLP_WRITER.get(self.kind, "mlp"))
            self.run(ids, [(module, False, lambda x: found.update(x=x) or None)])
            return found["x"]
        module = child(block, f"{attention}.{projection}")

        def see(x):
            found.update(z=x)

        def made(x):
            found.update(out=x)

        self.run(ids, [(module, True, see), (module, False, made)])
        weight = module.weight if self.kind == "gpt2" else module.weight.T
        size = weight.shape[0] // 4
        at = slice(int(writer[-1]) * size, int(writer[-1]) * size + size)
        x = found["z"].flatten(2)[..., at] @ weight[at]
        if after is not None:
            norm = getattr(block, after)
            gain = 1 + norm.weight if self.kind == "gemma2" else norm.weight
            x = (
                x
                * gain
                / (
                    found["out"].square().mean(-1, keepdim=True) + self.model.config.rms_norm_eps
                ).sqrt()
            )
        return x

    def cut(self, clean, other, writer, reader):
        """The value without an edge."""
        moved = self.written(other, writer) - self.written(clean, writer)
        attention, _, fused, norm, mlp_norm, _ = NAMES[self.kind]
        if reader == "logits":
            final = [m for n, m in self.model.named_modules()
                     if n.split(".")[-1] in ("norm", "ln_f", "final_layer_norm")][-1]  # fmt: skip
            return self.run(clean, [(final, True, lambda x: x + moved)])
        block = self.blocks[int(reader[1])]
        if reader.endswith("mlp"):
            if mlp_norm is None:
                return self.run(clean, [(block.mlp, True, lambda x: x + moved)])
            return self.run(clean, [(getattr(block, mlp_norm), True, lambda x: x + moved)])
        part, h = reader[-1], int(reader.split(".")[1][-1])
        module = child(block, fused or f"{attention}.{part}_proj")
        size = 6 if fused else module.weight.shape[0] // (4 if part == "q" else 2)
        start = FUSED[self.kind](part, h) if fused else h * size
        at = slice(start, start + size)
        stream = {}

        def instead(out):
            x = stream["x"] + moved
            y = x if norm is None else getattr(block, norm).forward(x)
            return torch.cat([out[..., : at.start], module.forward(y)[..., at],
                              out[..., at.stop :]], -1)  # fmt: skip

        hooks = [(block, True, lambda x: stream.update(x=x)), (module, False, instead)]
        return self.run(clean, hooks)


@pytest.mark.parametrize("kind", list(NAMES))
def test_an_edge_of_a_hugging_face_model_that_is_cut(kind):
    model = made(kind)
    p = patcher(model)
    graph = p.graph
    shared = "kv" if graph.layers[0].groups < 4 else "h"
    edges = (
        ("L0.h1", "L1.h2.q"), ("L0.mlp", f"L2.{shared}1.k"), ("L1.h3", f"L2.{shared}0.v"),
        ("input", "L1.mlp"), ("L1.h0", "L2.mlp"), ("L2.h2", "logits"), ("L1.mlp", "logits"),
    )  # fmt: skip
    masks = []
    for writer, reader in edges:
        mask = graph.allowed()
        mask[graph.writers.index(writer), graph.readers.index(reader)] = False
        masks.append(mask)
    got = p.measure(masks)
    by_hand = ByProjections(kind, model)
    # transformers' RMSNorms compute in fp32
    limit = 1e-10 if NAMES[kind][-1] is None else 1e-5
    for edge, values in zip(edges, got.values, strict=True):
        expected = by_hand.cut(CLEAN, OTHER, *edge)
        assert (values - expected).abs().max() < limit, edge
        assert (values - got.clean).abs().max() > 30 * limit, edge


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gpt2"])
def test_nodes_are_the_edges_between_them(kind):
    model = made(kind)
    nodes = torch.rand(16, generator=torch.Generator().manual_seed(3)) < 0.6
    nodes[0] = True
    of_nodes = patcher(model, "node")
    of_edges = patcher(model)
    edges = nodes[:, None] & of_edges.graph.allowed()
    got, expected = of_nodes.measure([nodes]), of_edges.measure([edges])
    torch.testing.assert_close(got.values, expected.values, rtol=0, atol=1e-11)
    assert (got.values - got.clean).abs().min() > 1e-4


@pytest.mark.parametrize("ablation", ["zero", "mean", "counterfactual"])
def test_nodes_by_hand(ablation):
    """A head and an MLP of a model with norms after both, which write what they do not."""
    model = made("gemma2")
    p = patcher(model, "node", ablation=ablation)
    kept = torch.ones(len(p.graph.writers), dtype=torch.bool)
    kept[[p.graph.writers.index(name) for name in ("L1.h2", "L2.mlp")]] = False
    values = p.measure([kept]).values[0]
    projection, writer = model.model.layers[1].self_attn.o_proj, model.model.layers[2]
    writer = writer.post_feedforward_layernorm
    by_hand, found = ByProjections("gemma2", model), {}
    hooks = [
        (projection, True, lambda x: found.update(z=x)),
        (writer, False, lambda x: found.update(mlp=x) or None),
    ]
    by_hand.run(OTHER, hooks)
    change = {
        "zero": torch.zeros_like,
        "mean": lambda x: x.mean((0, 1), keepdim=True).expand_as(x),
        "counterfactual": lambda x: x,
    }[ablation]
    z = change(found["z"])[..., 16:24]
    hooks = [
        (projection, True, lambda x: torch.cat([x[..., :16], z, x[..., 24:]], -1)),
        (writer, False, lambda x: change(found["mlp"])),
    ]
    torch.testing.assert_close(values, by_hand.run(CLEAN, hooks), rtol=0, atol=1e-10)


@pytest.mark.parametrize("layout", ["left", "right", "mixed"])
@pytest.mark.parametrize("level", ["edge", "node"])
def test_padding_does_not_matter(layout, level):
    model = made("llama")
    batch = padded(layout)
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    first = batch["attention_mask"].int().argmax(1)
    other["input_ids"][range(3), first] = torch.tensor([21, 22, 23])
    for ablation in ("counterfactual", "mean"):
        p = patcher(model, level, batch, other, ablation=ablation)
        mask = drawn(p.graph, 0.7)
        mask = mask if level == "edge" else torch.arange(len(mask)) % 5 != 3
        got = p.measure([mask])
        if ablation == "mean":
            # a mean over tokens: the same of the rows alone
            lengths = batch["attention_mask"].sum(1)
            assert p._base.writes.input.shape == (1, 1, 24)
            rows = [
                Patcher("test", model, CLEAN[:1], other["input_ids"][i, k][None], PAIR, level,
                        ablation="mean")
                for i, k in enumerate(batch["attention_mask"] == 1)
            ]  # fmt: skip
            for row in rows:
                row.measure([])
            means = torch.stack([row._base.writes.input[0, 0] for row in rows])
            expected = (means * lengths[:, None]).sum(0) / lengths.sum()
            torch.testing.assert_close(p._base.writes.input[0, 0], expected)
            continue
        for i, kept in enumerate(batch["attention_mask"] == 1):
            alone = patcher(
                model, level, batch["input_ids"][i, kept], other["input_ids"][i, kept]
            ).measure([mask])
            for name in ("clean", "empty", "values"):
                mine, its = getattr(got, name)[..., i], getattr(alone, name)[..., 0]
                torch.testing.assert_close(mine, its, rtol=0, atol=1e-10)


def test_batches_and_circuits_side_by_side_change_nothing():
    model = made("llama")
    for level in ("edge", "node"):
        every = patcher(model, level)
        masks = [drawn(every.graph, x, 5) for x in (0.2, 0.6, 0.9)]
        if level == "node":
            masks = [torch.arange(16) % n != n - 1 for n in (2, 3, 5)]
        expected = every.measure(masks)
        for batch in (1, 2, 7):
            found = patcher(model, level, batch=batch)
            # the second time what is cut, and both ends, are known
            for _ in range(2):
                got = found.measure(masks)
                torch.testing.assert_close(got.values, expected.values, rtol=0, atol=1e-11)
                torch.testing.assert_close(got.empty, expected.empty, rtol=0, atol=1e-11)
    with torch.inference_mode():
        got = patcher(model, level).measure(masks)
    assert torch.equal(got.values, expected.values) and not got.values.is_inference()
    rows = []

    def metric(logits):
        rows.append(len(logits))
        return logits[:, -1, 3] - logits[:, -1, 3].mean() + logits[:, -1, 4]

    patcher(model, metric=metric, batch=1).measure([drawn(every.graph, 0.5)])
    assert set(rows) == {3}
    # the token that the model predicts on the prompt, also where a circuit predicts another
    found = patcher(model, metric=None).measure([drawn(every.graph, 0.5)])
    with torch.no_grad():
        token = model(CLEAN).logits[:, -1].argmax(-1)
    expected = patcher(model, metric=token).measure([drawn(every.graph, 0.5)])
    assert torch.equal(found.values, expected.values)
    with torch.inference_mode():
        found = patcher(model, metric=token).measure([drawn(every.graph, 0.5)])
    assert torch.equal(found.values, expected.values) and not found.values.is_inference()


@pytest.mark.parametrize("kind", ["gpt2", "olmo", "llama", "gemma2", "lens, LN", "lens, RMS"])
def test_norms_in_fp32_are_the_modules(kind):
    fp32 = torch.float32
    pre = {"normalization_type": f"{kind[6:]}Pre"}
    model = lens("llama", fp32, **pre) if "lens" in kind else made(kind, fp32)
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(2, 5, 3, 24, generator=generator) + 1
    for reading in wire(find_decoder(model, "test", "")).layers:
        assert reading.norm.form is not None
        for norm in (reading.norm, reading.mlp_norm):
            with torch.no_grad():
                torch.testing.assert_close(normed(norm, x), norm.module(x))


def test_a_wrong_sum_is_found_where_it_is(monkeypatch):
    model = made("llama")
    weights = patching.head_weights

    def wrong(wiring):
        found = list(weights(wiring))
        return [found[0], found[1] * 1.001, *found[2:]]

    monkeypatch.setattr(patching, "head_weights", wrong)
    p = patcher(model)
    with pytest.raises(ValueError, match=r"input of L1.mlp, all edges kept, must be the model's"):
        p.measure([drawn(p.graph, 0.5)])
    assert not hooks_of(model)
    monkeypatch.undo()
    cut = baseline.cut

    def off(*given):
        found = cut(*given)
        return dataclasses.replace(found, final=found.final + 1e-6)

    monkeypatch.setattr(baseline, "cut", off)
    with pytest.raises(ValueError, match="after the last block, all nodes cut, must be what takes"):
        patcher(model, "node", ablation="zero").measure([torch.arange(16) > 3])


def test_what_is_refused():
    model = made("gpt2").requires_grad_(True)
    for options, message in (
        ({"ablation": "resample"}, "ablation must be one of counterfactual, zero, mean"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"other": None}, "corrupted must be prompts for ablation 'counterfactual'"),
        ({"other": OTHER[:, :4]}, "corrupted must have the tokens of clean one by one"),
        ({"other": OTHER[:, :4], "ablation": "mean-positional"}, "of as many tokens each"),
        ({"metric": 50}, "target must be in 0..49"),
    ):
        with pytest.raises(ValueError, match=message):
            patcher(model, **options)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(ValueError, match=r"got torch.autocast \(bfloat16\)"),
    ):
        patcher(model)
    constant = patcher(model, metric=lambda logits: logits[:, 0, 0] * 0 + 2)
    with pytest.raises(ValueError, match="metric must be another number .* nothing to explain"):
        constant.measure([])
    assert not hooks_of(model) and all(p.requires_grad for p in model.parameters())
