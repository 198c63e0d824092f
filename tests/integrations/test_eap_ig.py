# SPDX-License-Identifier: Apache-2.0
"""EAP-IG's hooks on a stand-in for its graph: scores, sums in 16 bits, substitution, freezing."""

import types

import oracle
import pytest
import torch

from mikernels.integrations.eap_ig import (
    fast_eap,
    make_hooks_and_matrices,
    make_node_hooks_and_matrices,
)

LAYERS, HEADS, D, BATCH, TOKENS = 2, 3, 24, 4, 5


class StandInGraph:
    """What the hooks use of `eap.graph.Graph`: names, and places of nodes, layer by layer."""

    def __init__(self, layers=LAYERS, heads=HEADS):
        self.cfg = {"n_layers": layers, "n_heads": heads}
        self.n_forward = 1 + layers * (heads + 1)
        self.n_backward = layers * (3 * heads + 1) + 1
        self.nodes = {"input": types.SimpleNamespace(name="input", out_hook="hook_embed")}
        for i in range(layers):
            self.nodes[f"a{i}.h0"] = types.SimpleNamespace(
                name=f"a{i}",
                out_hook=f"blocks.{i}.attn.hook_result",
                qkv_inputs=[f"blocks.{i}.hook_{letter}_input" for letter in "qkv"],
            )
            mlp = {"out_hook": f"blocks.{i}.hook_mlp_out", "in_hook": f"blocks.{i}.hook_mlp_in"}
            self.nodes[f"m{i}"] = types.SimpleNamespace(name=f"m{i}", **mlp)
        last = f"blocks.{layers - 1}.hook_resid_post"
        self.nodes["logits"] = types.SimpleNamespace(name="logits", in_hook=last)

    def _at(self, node):
        layer, heads = int(node.name[1:]), self.cfg["n_heads"]
        return 1 + layer * (heads + 1), layer * (3 * heads + 1)

    def forward_index(self, node):
        if node.name == "input":
            return 0
        first, heads = self._at(node)[0], self.cfg["n_heads"]
        return slice(first, first + heads) if node.name[0] == "a" else first + heads

    def prev_index(self, node):
        if node.name == "logits":
            return self.n_forward
        return self._at(node)[0] + (self.cfg["n_heads"] if node.name[0] == "m" else 0)

    def backward_index(self, node, qkv=None):
        if node.name == "logits":
            return -1
        first, heads = self._at(node)[1], self.cfg["n_heads"]
        if qkv is None:
            return first + 3 * heads
        first += "qkv".index(qkv) * heads
        return slice(first, first + heads)


def stand_in_model(dtype=torch.float32, **cfg):
    config = {"use_normalization_before_and_after": False, "d_model": D, "device": "cpu"} | cfg
    model = torch.nn.Linear(1, 1)
    model.cfg = types.SimpleNamespace(**config, dtype=dtype)
    return model


def activations(graph, dtype, seed):
    """For each hook a tensor as a model would give it, of integers: all results are exact."""
    shapes = {}
    for node in graph.nodes.values():
        heads = (graph.cfg["n_heads"],) if node.name[0] == "a" else ()
        names = [getattr(node, name, None) for name in ("out_hook", "in_hook")]
        names += getattr(node, "qkv_inputs", ())
        shapes |= {name: (BATCH, TOKENS, *heads, D) for name in names if name is not None}
    return {
        hook: oracle.randint(*shape, dtype=dtype, seed=seed + i)
        for i, (hook, shape) in enumerate(shapes.items())
    }


def definition(graph, corrupted, clean, gradients):
    """Scores in fp64, an edge at a time."""
    heads = graph.cfg["n_heads"]
    scores = torch.zeros(graph.n_forward, graph.n_backward, dtype=torch.float64)

    def rows(tensors, hook):
        t = tensors[hook].double()
        return t.reshape(BATCH, TOKENS, -1, D).unbind(2)

    writers = [
        c - k
        for node in graph.nodes.values()
        if hasattr(node, "out_hook")
        for c, k in zip(rows(corrupted, node.out_hook), rows(clean, node.out_hook), strict=True)
    ]
    readers = []
    for i in range(graph.cfg["n_layers"]):
        before = 1 + i * (heads + 1)
        for hook in graph.nodes[f"a{i}.h0"].qkv_inputs:
            readers += [(before, g) for g in rows(gradients, hook)]
        readers += [(before + heads, rows(gradients, graph.nodes[f"m{i}"].in_hook)[0])]
    readers += [(graph.n_forward, rows(gradients, graph.nodes["logits"].in_hook)[0])]
    for column, (before, gradient) in enumerate(readers):
        for row in range(before):
            scores[row, column] = (writers[row] * gradient).sum()
    return scores


def call(hooks, tensors):
    for name, hook in hooks:
        assert hook(tensors[name], hook=types.SimpleNamespace(name=name)) is None


def one_batch(graph, model, scores, seed=0):
    c, k, g = (activations(graph, model.cfg.dtype, seed + 100 * i) for i in range(3))
    made = make_hooks_and_matrices(model, graph, BATCH, TOKENS, scores)
    (corrupted, clean, gradients), delta = made
    assert delta.shape == (BATCH, TOKENS, graph.n_forward, D) and not delta.any()
    with torch.inference_mode():
        call(corrupted, c)
        call(clean, k)
    call(gradients, g)
    return definition(graph, c, k, g)


def edges(graph):
    """How many entries of the scores have a writer before the reader."""
    heads = graph.cfg["n_heads"]
    before = [1 + i * (heads + 1) for i in range(graph.cfg["n_layers"])]
    return sum(3 * heads * b + b + heads for b in before) + graph.n_forward


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores(heads, dtype):
    graph, model = StandInGraph(heads=heads), stand_in_model(dtype)
    scores = torch.zeros(graph.n_forward, graph.n_backward, dtype=dtype)
    expected = one_batch(graph, model, scores) + one_batch(graph, model, scores, seed=7)
    assert torch.equal(scores.double(), expected)
    assert 0.9 * edges(graph) < (scores != 0).sum() <= edges(graph)


def test_scores_in_16_bits_are_the_rounding_of_sums():
    graph, model = StandInGraph(), stand_in_model(torch.bfloat16)
    scores = torch.zeros(graph.n_forward, graph.n_backward, dtype=torch.bfloat16)
    naive, expected = scores.clone(), scores.double()
    for seed in range(8):
        batch = one_batch(graph, model, scores, 1000 * seed)
        expected += batch
        naive += batch.to(torch.bfloat16)
        assert torch.equal(scores, expected.to(torch.bfloat16))
    assert not torch.equal(naive, scores)
    # and what somebody else writes to them counts
    scores /= 2
    halved = scores.double()
    batch = one_batch(graph, model, scores, 1)
    assert torch.equal(scores, (halved + batch).to(torch.bfloat16))


def test_sums_of_the_others_outlive_a_score_that_is_nan():
    graph, model = StandInGraph(), stand_in_model(torch.bfloat16)
    scores = torch.zeros(graph.n_forward, graph.n_backward, dtype=torch.bfloat16)
    scores[-1, 0] = torch.nan  # no edge leads there
    expected = torch.zeros(graph.n_forward, graph.n_backward, dtype=torch.float64)
    for seed in range(8):
        expected += one_batch(graph, model, scores, 1000 * seed)
    expected[-1, 0] = torch.nan
    torch.testing.assert_close(scores, expected.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("apart", [False, True])
def test_evaluation(apart):
    graph, model = StandInGraph(), stand_in_model(use_normalization_before_and_after=apart)
    made = make_hooks_and_matrices(model, graph, BATCH, TOKENS, None)
    (corrupted, clean, gradients), delta = made
    assert delta.shape == ((2,) * apart + (BATCH, TOKENS, graph.n_forward, D))
    first, second = (activations(graph, torch.float32, seed) for seed in (0, 50))
    call(corrupted, first)
    call(clean, second)
    head = graph.forward_index(graph.nodes["a1.h0"])
    a, b = (t["blocks.1.attn.hook_result"] for t in (first, second))
    if apart:
        assert torch.equal(delta[0][:, :, head], a) and torch.equal(delta[1][:, :, head], b)
    else:
        assert torch.equal(delta[:, :, head], a - b)
    with pytest.raises(RuntimeError, match="expected scores .* got None, which is for evaluation"):
        call(gradients[:1], first)


def node_definition(graph, corrupted, clean, gradients, neuron):
    """Scores of nodes in fp64: of an MLP with the gradient at its input."""
    scores = torch.zeros(graph.n_forward, D, dtype=torch.float64)
    for node in graph.nodes.values():
        if node.name != "logits":
            written = (corrupted[node.out_hook] - clean[node.out_hook]).double()
            at = node.in_hook if node.name[0] == "m" else node.out_hook
            product = (written * gradients[at].double()).sum((0, 1))
            scores[graph.forward_index(node)] = product
    return scores if neuron else scores.sum(-1)


@pytest.mark.parametrize("neuron", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_scores_of_nodes(dtype, neuron):
    graph, model = StandInGraph(), stand_in_model(dtype)
    scores = torch.zeros(*((graph.n_forward, D) if neuron else (graph.n_forward,)), dtype=dtype)
    expected = scores.double()
    for seed in (0, 7, 11):
        c, k, g = (activations(graph, dtype, seed + 100 * i) for i in range(3))
        made = make_node_hooks_and_matrices(model, graph, BATCH, TOKENS, scores, neuron=neuron)
        (corrupted, clean, gradients), delta = made
        call(corrupted, c)
        call(clean, k)
        call(gradients, g)
        head = graph.forward_index(graph.nodes["a1.h0"])
        hook = "blocks.1.attn.hook_result"
        assert torch.equal(delta[:, :, head], c[hook] - k[hook])
        expected += node_definition(graph, c, k, g, neuron)
        # in 16 bits, of sums in fp32
        assert torch.equal(scores, expected.to(dtype))
    (_, _, gradients), _ = make_node_hooks_and_matrices(model, graph, BATCH, TOKENS, None)
    with pytest.raises(RuntimeError, match=r"expected scores \[n_forward\] or, with neuron"):
        call(gradients[:1], g)


def test_substitution_for_nodes():
    graph, module, mine = StandInGraph(), types.ModuleType("eap.attribute_node"), stand_in_model()

    def make(model, graph, batch_size, n_pos, scores, neuron=False):
        return "the library's"

    module.make_hooks_and_matrices = make
    scores = torch.zeros(graph.n_forward, D)
    with fast_eap(module, mine) as handle:
        found = module.make_hooks_and_matrices
        assert found(stand_in_model(), graph, BATCH, TOKENS, scores, neuron=True) == "the library's"
        (_, _, gradients), _ = found(mine, graph, BATCH, TOKENS, scores, neuron=True)
        call(gradients, activations(graph, torch.float32, 0))
        with pytest.raises(ValueError, match="got that of another fast_eap of this model"):
            fast_eap(module, mine)
    assert handle.calls == len(gradients) == 2 * LAYERS + 1
    assert module.make_hooks_and_matrices is make


def stand_in_module():
    """A module whose function is looked up where the library looks it up."""
    module = types.ModuleType("eap.attribute")

    def make(model, graph, batch_size, n_pos, scores):
        return "the library's"

    module.make_hooks_and_matrices = make
    module.attribute = lambda *args: module.make_hooks_and_matrices(*args)
    return module


def test_substitution_for_one_model():
    graph, module = StandInGraph(), stand_in_module()
    original = module.make_hooks_and_matrices
    mine, other = stand_in_model(), stand_in_model()
    scores = torch.zeros(graph.n_forward, graph.n_backward)
    with fast_eap(module, mine) as handle:
        assert module.attribute(other, graph, BATCH, TOKENS, scores) == "the library's"
        (_, _, gradients), _ = module.attribute(mine, graph, BATCH, TOKENS, scores)
        with pytest.raises(ValueError, match="got that of another fast_eap of this model"):
            fast_eap(module, mine)
        call(gradients, activations(graph, torch.float32, 0))
        assert not any(p.requires_grad for p in mine.parameters())
    assert handle.replaced == 1 and handle.calls == len(gradients) == 4 * LAYERS + 1
    assert module.make_hooks_and_matrices is original
    assert all(p.requires_grad for p in mine.parameters())


def test_removal_after_an_exception_and_warning():
    module, model = stand_in_module(), stand_in_model()
    original = module.make_hooks_and_matrices
    with pytest.raises(KeyError), fast_eap(module, model):
        raise KeyError
    assert module.make_hooks_and_matrices is original
    unused = pytest.warns(RuntimeWarning, match="fast_eap: nothing that it replaces was computed")
    with unused, fast_eap(module, model, freeze=False):
        assert all(p.requires_grad for p in model.parameters())


def test_refusals():
    module = types.ModuleType("eap.attribute_node")
    with pytest.raises(TypeError, match="got eap.attribute_node with no make_hooks_and_matrices"):
        fast_eap(module, stand_in_model())
    module.make_hooks_and_matrices = lambda model, graph, batch_size, n_pos, scores, layer: None
    with pytest.raises(TypeError, match=r"scores, layer\); give it eap.attribute or"):
        fast_eap(module, stand_in_model())
    with pytest.raises(TypeError, match="model must be a HookedTransformer, got Linear"):
        fast_eap(stand_in_module(), torch.nn.Linear(1, 1))
    compiled = stand_in_model()
    compiled.compile(backend="eager")
    with pytest.raises(ValueError, match="fast_eap: .* got compiled Linear; give the model as it"):
        fast_eap(stand_in_module(), compiled)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated")
@pytest.mark.parametrize("freeze", [False, True])
def test_edge_attribution_patching_of_a_transformer(freeze):
    lens = pytest.importorskip("transformer_lens", reason="transformer-lens is not installed")
    config = lens.HookedTransformerConfig(
        n_layers=LAYERS,
        d_model=D,
        n_ctx=8,
        d_head=D // HEADS,
        n_heads=HEADS,
        d_mlp=2 * D,
        d_vocab=17,
        act_fn="gelu",
        positional_embedding_type="rotary",
        rotary_dim=D // HEADS,
        seed=0,
        device="cpu",
        dtype=torch.float64,
        use_attn_result=True,
        use_split_qkv_input=True,
        use_hook_mlp_in=True,
    )
    model, graph, module = lens.HookedTransformer(config), StandInGraph(), stand_in_module()
    tokens = torch.randint(17, (2, BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    caches = [model.run_with_cache(batch)[1] for batch in tokens]
    gradients = {}
    readers = [name for name in caches[0] if name.endswith(("_input", "mlp_in", "resid_post"))]
    keep = [(name, lambda g, hook: gradients.update({hook.name: g.clone()})) for name in readers]
    with model.hooks(bwd_hooks=keep):
        model(tokens[1], return_type="loss").backward()
    model.zero_grad(set_to_none=True)
    expected = definition(graph, *caches, gradients)

    scores = torch.zeros(graph.n_forward, graph.n_backward, dtype=torch.float64)
    hooks_before = [len(m._forward_hooks) for m in model.modules()]
    with fast_eap(module, model, freeze=freeze) as handle:
        made = module.attribute(model, graph, BATCH, TOKENS, scores)
        (corrupted, clean, backward), _ = made
        with torch.inference_mode(), model.hooks(fwd_hooks=corrupted):
            model(tokens[0])
        with model.hooks(fwd_hooks=clean, bwd_hooks=backward):
            model(tokens[1], return_type="loss").backward()
        assert handle.calls == 4 * LAYERS + 1
        torch.testing.assert_close(scores, expected)
        # as in EAP-IG-activations: q, k, v of layer 0 then have no gradient, frozen or not
        constant = [("hook_embed", lambda t, hook: t.detach())]
        with model.hooks(fwd_hooks=constant, bwd_hooks=backward):
            model(tokens[1], return_type="loss").backward()
        assert handle.calls == 2 * (4 * LAYERS + 1) - 3
    assert all((p.grad is None) == freeze for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert [len(m._forward_hooks) for m in model.modules()] == hooks_before
