# SPDX-License-Identifier: Apache-2.0
"""circuit-tracer's scores and pruning: against a definition, and, as peers, the real package."""

import importlib
import types

import oracle
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mikernels.integrations.circuit_tracer import fast_scores, find_threshold, prune_graph

LAYERS, TOKENS, LOGITS, D, ROWS = 3, 6, 2, 16, 32
THRESHOLDS = [(0.8, 0.98), (0.5, 0.5), (0.95, 0.999), (0.0, 0.0), (0.3, 0.9)]

peers = pytest.mark.peers
pytestmark = [
    pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
]


def random_graph(seed, features=40, density=0.4):
    """Features, errors, tokens, logits: an edge leads from a column to a later row."""
    errors = LAYERS * TOKENS
    n = features + errors + TOKENS + LOGITS
    generator = torch.Generator().manual_seed(seed)
    adjacency = torch.randn(n, n, generator=generator).exp()
    adjacency *= torch.rand(n, n, generator=generator) < density
    adjacency *= torch.rand(n, n, generator=generator).sub(0.5).sign()
    time = torch.cat([torch.rand(features, generator=generator), torch.zeros(n - features)])
    time[-LOGITS:] = 2
    adjacency *= time[:, None] > time
    adjacency[features:-LOGITS] = 0
    return types.SimpleNamespace(
        adjacency_matrix=adjacency,
        input_tokens=torch.arange(TOKENS),
        logit_targets=["a", "b"],
        logit_probabilities=torch.tensor([0.7, 0.2]),
        selected_features=torch.arange(features),
    )


def definition(graph, node_threshold, edge_threshold):
    """In fp64, with the sum of the paths in closed form."""
    a = graph.adjacency_matrix.double().abs()
    n, features = len(a), len(graph.selected_features)
    weights = torch.zeros(n, dtype=torch.float64)
    weights[-LOGITS:] = graph.logit_probabilities.double()

    def influence(a):
        shares = a / a.sum(1, keepdim=True).clamp(min=1e-10)
        sums = torch.linalg.solve((torch.eye(n).double() - shares).T, weights @ shares)
        return shares, sums.where(sums > 1e-12, 0)  # what no path reaches is 0

    def holding(x, fraction):
        ordered = x.flatten().sort(descending=True).values
        sums = ordered.cumsum(0)
        return x >= ordered[int((sums < fraction * sums[-1]).sum())]

    nodes = holding(influence(a)[1], node_threshold)
    nodes[-LOGITS - TOKENS :] = True
    shares, sums = influence(a * nodes * nodes[:, None])
    edges = holding(shares * (sums + weights)[:, None], edge_threshold)
    inner = n - LOGITS - TOKENS
    for _ in range(n):
        kept = nodes.clone()
        kept[:inner] &= edges.any(0)[:inner]
        kept[:features] &= edges.any(1)[:features]
        if not torch.equal(kept, nodes):
            edges &= kept & kept[:, None]
        nodes = kept
    return nodes, edges


@pytest.mark.parametrize("thresholds", [*THRESHOLDS, (1.0, 1.0)])
def test_pruning(thresholds):
    for seed in range(4):
        graph = random_graph(seed)
        with oracle.unchanged(graph.adjacency_matrix):
            nodes, edges, cumulative = prune_graph(graph, *thresholds)
        expected_nodes, expected_edges = definition(graph, *thresholds)
        assert torch.equal(nodes, expected_nodes)
        assert torch.equal(edges, expected_edges)
        assert cumulative.max() == pytest.approx(1)


def test_pruning_of_rows_that_should_be_zero_and_of_none():
    graph = random_graph(5)
    graph.adjacency_matrix[45, 62] = 3.0  # from a token to an error
    nodes, edges = definition(graph, 0.9, 0.9)
    graph_mask = prune_graph(graph, 0.9, 0.9)
    assert torch.equal(graph_mask.node_mask, nodes) and torch.equal(graph_mask.edge_mask, edges)
    graph.adjacency_matrix.zero_()
    assert prune_graph(graph).edge_mask.all() and prune_graph(graph).node_mask.all()


def test_pruning_refuses():
    graph = random_graph(0)
    with pytest.raises(ValueError, match=r"edge_threshold must be in 0..1, got 98"):
        prune_graph(graph, 0.8, 98)
    graph.adjacency_matrix[:2] = 0
    graph.adjacency_matrix[1, 0] = graph.adjacency_matrix[0, 1] = 1.0
    with pytest.raises(RuntimeError, match="without cycles"):
        prune_graph(graph)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pruning_refuses_what_is_not_finite(value):
    for change in ("edge", "probability"):
        graph = random_graph(0)
        if change == "edge":
            graph.adjacency_matrix[-1, 3] = value
        else:
            graph.logit_probabilities[0] = value
        with pytest.raises(ValueError, match="finite edges and probabilities, got influences"):
            prune_graph(graph)


class Context:
    """As of the nnsight backend."""

    def compute_score(self, grads, output_vecs, write_index, read_index=slice(None)):
        products = torch.einsum("bpd,pd->pb", grads.to(output_vecs.dtype)[read_index], output_vecs)
        self._batch_buffer[write_index] += products


class HookContext:
    """As of the TransformerLens backend."""

    def _compute_score_hook(self, hook_name, output_vecs, write_index, read_index=slice(None)):
        def hook(grads, hook):
            products = torch.einsum("bpd,pd->pb", grads[read_index], output_vecs)
            self._batch_buffer[write_index] += products

        return hook_name, hook


class Halved(Context):
    def compute_score(self, grads, output_vecs, write_index, read_index=slice(None)):
        super().compute_score(grads / 2, output_vecs, write_index, read_index)


class Absolute(HookContext):
    def _compute_score_hook(self, hook_name, output_vecs, write_index, read_index=slice(None)):
        return super()._compute_score_hook(hook_name, output_vecs.abs(), write_index, read_index)


def test_contexts_that_score_otherwise_are_refused():
    for kind in (Halved, Absolute):
        with pytest.raises(TypeError, match=rf"fast_scores: {kind.__name__}\..* must add vectors"):
            fast_scores(kind())
    for kind in (Context, HookContext):
        context = kind()
        context._batch_buffer = buffer = torch.zeros(3, 2)
        handle = fast_scores(context)
        assert context._batch_buffer is buffer and not buffer.any()
        handle.remove()


def test_compiled_models_are_refused():
    model = torch.compile(torch.nn.Linear(2, 2), backend="eager")
    model.setup_attribution = lambda: None
    with pytest.raises(ValueError, match="fast_scores: .* got compiled OptimizedModule; give"):
        fast_scores(model)


@peers
@pytest.mark.parametrize("thresholds", THRESHOLDS)
def test_pruning_is_the_library_s(thresholds):
    library = peer("circuit_tracer.graph")
    for seed in range(10, 30):
        graph = random_graph(seed)
        expected = library.prune_graph(graph, *thresholds)
        result = prune_graph(graph, *thresholds)
        assert torch.equal(result.node_mask, expected.node_mask)
        assert torch.equal(result.edge_mask, expected.edge_mask)
        torch.testing.assert_close(result.cumulative_scores, expected.cumulative_scores)
        scores = graph.adjacency_matrix.abs().flatten()
        found = find_threshold(scores, thresholds[1])
        assert found == library.find_threshold(scores, thresholds[1])


def peer(name):
    pytest.importorskip("circuit_tracer", reason="circuit-tracer is not installed")
    with pytest.MonkeyPatch.context() as patch:
        # the one name that the package needs of a huggingface-hub older than 1
        hub = importlib.import_module("huggingface_hub.constants")
        patch.setattr(hub, "HF_HUB_ENABLE_HF_TRANSFER", False, raising=False)
        return importlib.import_module(name)


def make_context(kind, dtype, shuffled):
    """A real context of 50 active features; shuffled as decoders of a cross-layer transcoder."""
    generator = torch.Generator().manual_seed(0)
    active = torch.rand(LAYERS, TOKENS, 30, generator=generator) < 0.1
    matrix = active.to(dtype).to_sparse().coalesce()
    n = matrix._nnz()
    order = torch.randperm(n, generator=generator) if shuffled else torch.arange(n)
    return peer(f"circuit_tracer.attribution.context_{kind}").AttributionContext(
        activation_matrix=matrix,
        error_vectors=oracle.randn(LAYERS, TOKENS, D, dtype=dtype, seed=1),
        token_vectors=oracle.randn(TOKENS, D, dtype=dtype, seed=2),
        decoder_vecs=oracle.randn(n, D, dtype=dtype, seed=3),
        encoder_vecs=oracle.randn(n, D, dtype=dtype, seed=4),
        encoder_to_decoder_map=order,
        decoder_locations=matrix.indices()[:2][:, order],
        logits=torch.zeros(1),
    )


def scores_of(context, dtype, batch=5):
    """The buffer after the gradients of each layer, and of the embedding, went through."""
    context._batch_buffer = torch.ones(context._row_size, batch, dtype=dtype)
    grads = [oracle.randn(batch, TOKENS, D, dtype=dtype, seed=10 + i) for i in range(LAYERS + 1)]
    if hasattr(context, "compute_score"):
        for layer in range(LAYERS):
            context.compute_feature_attributions(layer, grads[layer])
            context.compute_error_attributions(layer, grads[layer])
        context.compute_token_attributions(grads[LAYERS])
    else:
        of = {f"blocks.{i}.out": grads[i] for i in range(LAYERS)} | {"hook_embed": grads[LAYERS]}
        for name, hook in context._make_attribution_hooks("out"):
            hook(of[name], hook=None)
    return context._batch_buffer


@peers
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["transformerlens", "nnsight"])
def test_scores_of_a_context(kind, dtype, shuffled):
    context = make_context(kind, dtype, shuffled)
    eager = scores_of(context, dtype)
    with fast_scores(context) as handle:
        fast = scores_of(context, dtype)
        with pytest.raises(ValueError, match="a method of this context's own"):
            fast_scores(context)
    assert handle.calls == 2 * LAYERS + 1
    assert not {"compute_score", "_compute_score_hook"} & vars(context).keys()
    exact = scores_of(make_context(kind, torch.float64, shuffled), torch.float64)
    if dtype == torch.float32:
        oracle.assert_accurate(fast, exact, eager)
    else:  # the vectors of the oracle are others
        torch.testing.assert_close(fast, eager, rtol=0.02, atol=0.05)


class Gathered(TorchDispatchMode):
    """Whether gradients were gathered at the positions of features: [ROWS, n, D], n > TOKENS."""

    seen = False

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        returned = function(*args, **(kwargs or {}))
        shape = getattr(returned, "shape", ())
        self.seen |= len(shape) == 3 and shape[::2] == (ROWS, D) and shape[1] > TOKENS
        return returned


class Tokenizer:
    vocab_size, all_special_ids, padding_side = 23, [0], "right"

    def decode(self, tokens):
        return str(tokens)


@pytest.fixture(scope="module")
def model():
    lens = pytest.importorskip("transformer_lens", reason="transformer-lens is not installed")
    replacement = peer("circuit_tracer.replacement_model.replacement_model_transformerlens")
    transcoder = peer("circuit_tracer.transcoder.single_layer_transcoder")
    config = lens.HookedTransformerConfig(
        n_layers=LAYERS,
        d_model=D,
        n_ctx=8,
        d_head=8,
        n_heads=2,
        d_mlp=32,
        d_vocab=Tokenizer.vocab_size,
        act_fn="gelu",
        normalization_type="LN",
        seed=0,
        device="cpu",
    )
    layers = {}
    for i in range(LAYERS):
        layers[i] = transcoder.SingleLayerTranscoder(
            D, 48, torch.relu, i, device=torch.device("cpu"), dtype=torch.float32
        )
        with torch.no_grad():
            layers[i].W_enc.copy_(oracle.randn(48, D, seed=i))
            layers[i].W_dec.copy_(oracle.randn(48, D, seed=10 + i))
    transcoders = transcoder.TranscoderSet(layers, "hook_resid_mid", "hook_mlp_out")
    made = replacement.TransformerLensReplacementModel.from_config(config, transcoders)
    made.tokenizer = Tokenizer()
    return made


@peers
def test_attribution_of_a_model(model, monkeypatch):
    monkeypatch.delenv("MIKERNELS_IMPL", raising=False)  # the reference gathers, a chunk at a time
    attribute = peer("circuit_tracer.attribution.attribute").attribute
    tokens = torch.tensor([0, 5, 3, 17, 8, 3])
    with Gathered() as eager:
        expected = attribute(tokens, model, batch_size=ROWS)
    with fast_scores(model) as handle, Gathered() as fast:
        graph = attribute(tokens, model, batch_size=ROWS)
        with pytest.raises(ValueError, match="a method of this model's own"):
            fast_scores(model)
    assert eager.seen and not fast.seen
    assert handle.replaced == 2 and handle.calls > 2 * LAYERS + 1
    assert "setup_attribution" not in vars(model)
    torch.testing.assert_close(graph.adjacency_matrix, expected.adjacency_matrix)
    pruned, library = prune_graph(graph), peer("circuit_tracer.graph").prune_graph(graph)
    assert torch.equal(pruned.node_mask, library.node_mask)
    assert torch.equal(pruned.edge_mask, library.edge_mask)
    with pytest.raises(KeyError), fast_scores(model):
        raise KeyError
    assert "setup_attribution" not in vars(model)


def test_what_has_no_scores():
    with pytest.raises(TypeError, match="ReplacementModel with setup_attribution .* got Linear"):
        fast_scores(torch.nn.Linear(1, 1))

    class Model:
        def setup_attribution(self):
            return Model()

    unknown = Model()
    handle = fast_scores(unknown)
    with pytest.raises(TypeError, match="expected a context with _compute_score_hook"):
        unknown.setup_attribution()
    handle.remove()
    unused = pytest.warns(RuntimeWarning, match="fast_scores: nothing that it replaces")
    with unused, fast_scores(unknown):
        pass
