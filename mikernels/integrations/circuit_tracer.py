# SPDX-License-Identifier: Apache-2.0
"""circuit-tracer: attribution scores without gathered gradients, pruning without a sort.

`fast_scores(model)`: for each layer, circuit-tracer gathers the gradients at the positions of the
active features, `[batch, features, d_model]` (24 GB for 512 rows, 10 000 features of a layer and
Gemma 2's 2304), to multiply them with the decoder vectors. Here `positional_dot` reads the
gradients where they are. Contexts that this model makes get their own method; others do not.

`prune_graph(graph)`: circuit-tracer finds the threshold that keeps a fraction of the influence by
sorting all n^2 entries of the edge matrix, of which only the rows of features and logits are not
zero. Here `mass_threshold` finds it in passes over those rows.

The masks are the library's but for its rounding: it sums in fp32, `mass_threshold` exactly. They
may differ in the entries at which the sum is within 1e-7 of the fraction (in 6 of 1 286 465 edges
of a dense graph of 9010 nodes, where fp64 sides with these). At a fraction of 1 the library keeps
every entry or only what fp32 tells from the whole; here all that are not zero stay, down to 1e-16
of the sum.

Checked against circuit-tracer 0.5.0 with both of its backends (nnsight 0.6.1). That of PyPI is a
fork; the original, safety-research/circuit-tracer at v0.5.0, works as well. Which one it is, and
what a subclass makes of it, does not matter: a context's own method is tried on a small example of
integers, and must give the same numbers (0.2 ms a context).
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from mikernels._dispatch import accumulate_dtype
from mikernels.integrations.handle import Handle
from mikernels.models.hooks import check_uncompiled
from mikernels.ops.pairs.positional_dot import positional_dot
from mikernels.ops.select.mass_threshold import mass_threshold

__all__ = ["PruneResult", "fast_scores", "find_threshold", "prune_graph"]

# the method of a context that scores, in the TransformerLens and in the nnsight backend
METHODS = ("_compute_score_hook", "compute_score")


class PruneResult(NamedTuple):
    """The fields of `circuit_tracer.graph.PruneResult`."""

    node_mask: torch.Tensor
    edge_mask: torch.Tensor
    cumulative_scores: torch.Tensor


def _rows(write: Any) -> Any:
    """A slice instead of consecutive indices: what it selects can be added to in place."""
    if not isinstance(write, torch.Tensor) or len(write) == 0:
        return write
    first = int(write[0])
    run = torch.arange(first, first + len(write), device=write.device)
    return slice(first, first + len(write)) if torch.equal(write, run) else write


def _add_scores(
    buffer: torch.Tensor, grads: torch.Tensor, vectors: torch.Tensor, rows: Any, read: Any
) -> None:
    at = read[1] if isinstance(read, tuple) else read
    grads = grads.detach().to(vectors.dtype)
    if isinstance(at, torch.Tensor):
        positions = at.to(grads.device)
    else:
        positions = torch.arange(grads.shape[1], device=grads.device)[at]
    if isinstance(rows, slice) and buffer.dtype == accumulate_dtype(vectors.dtype):
        positional_dot(grads, vectors, positions, out=buffer[rows])
    else:
        buffer[rows] += positional_dot(grads, vectors, positions).to(buffer.dtype)


def _check_scores(context: Any, name: str) -> None:
    """The context's own method must add vectors times gradients at their positions, exactly."""
    grads = torch.arange(24.0).view(2, 3, 4) % 7 - 3
    vectors = torch.arange(8.0).view(2, 4) % 5 - 2
    rows, read = torch.tensor([2, 0]), (slice(None), torch.tensor([2, 1]))
    expected, probe = torch.ones(3, 2), copy.copy(context)
    _add_scores(expected, grads, vectors, rows, read)
    probe._batch_buffer = torch.ones(3, 2)
    method = getattr(type(context), name)
    if name == METHODS[0]:
        method(probe, "probe", vectors, rows, read)[1](grads, hook=None)
    else:
        method(probe, grads, vectors, rows, read)
    if not torch.equal(probe._batch_buffer, expected):
        raise TypeError(
            f"fast_scores: {type(context).__name__}.{name} must add vectors times gradients at "
            f"their positions, got {probe._batch_buffer.tolist()} for {expected.tolist()}; leave "
            f"out fast_scores for this class"
        )


def _accelerate(context: Any, handle: Handle) -> None:
    # the context owns the method, which must not own the context: its tensors are the graph's
    own = weakref.proxy(context)

    def hook_of(
        hook_name: str, output_vecs: torch.Tensor, write_index: Any, read_index: Any = slice(None)
    ) -> tuple[str, Callable[..., None]]:
        rows = _rows(write_index)

        def score(grads: torch.Tensor, hook: Any) -> None:
            handle.calls += 1
            _add_scores(own._batch_buffer, grads, output_vecs, rows, read_index)

        return hook_name, score

    def compute(
        grads: torch.Tensor,
        output_vecs: torch.Tensor,
        write_index: Any,
        read_index: Any = slice(None),
    ) -> None:
        handle.calls += 1
        _add_scores(own._batch_buffer, grads, output_vecs, _rows(write_index), read_index)

    for name, method in zip(METHODS, (hook_of, compute), strict=True):
        if hasattr(type(context), name):
            if name in vars(context):
                raise ValueError(
                    f"fast_scores: expected {type(context).__name__}.{name} of the class, got a "
                    f"method of this context's own; remove the handle that set it first"
                )
            _check_scores(context, name)
            handle.replace(context, name, method)
            return
    raise TypeError(
        f"fast_scores: expected a context with {' or '.join(METHODS)}, got a "
        f"{type(context).__name__} without; this version of circuit-tracer is not supported"
    )


def fast_scores(model: Any) -> Handle:
    """Have the attribution of this replacement model score with `positional_dot`.

        with fast_scores(model):
            graph = circuit_tracer.attribute(prompt, model)

    Args:
        model: a ReplacementModel, whose `setup_attribution` makes contexts; or one context, before
            its hooks are installed.

    Returns:
        The handle: `replaced` methods (the model's and its contexts'), and `calls`, the products.
        A `with` block that scored nothing ends in a warning.

    Raises:
        TypeError: model is neither, or its contexts score otherwise.
        ValueError: another `fast_scores` of it is in place, or a part of it is compiled.
    """
    handle = Handle("fast_scores")
    if any(hasattr(type(model), name) for name in METHODS):
        _accelerate(model, handle)
        return handle
    original = getattr(model, "setup_attribution", None)
    if not callable(original):
        raise TypeError(
            f"fast_scores: expected a ReplacementModel with setup_attribution or an "
            f"AttributionContext, got {type(model).__name__}"
        )
    if "setup_attribution" in vars(model):
        raise ValueError(
            "fast_scores: expected the model's class to have setup_attribution, got a method of "
            "this model's own; remove the handle that set it first"
        )
    if isinstance(model, torch.nn.Module):
        check_uncompiled("fast_scores", model)
    # the class's function and a weak reference, so that the model does not own itself
    own, function = weakref.ref(model), type(model).setup_attribution

    def setup_attribution(*args: Any, **kwargs: Any) -> Any:
        context = function(own(), *args, **kwargs)
        _accelerate(context, handle)
        return context

    handle.replace(model, "setup_attribution", setup_attribution)
    return handle


def find_threshold(scores: torch.Tensor, threshold: float) -> torch.Tensor:
    """`circuit_tracer.graph.find_threshold` without its sort: entries `>= t` hold the fraction."""
    return mass_threshold(scores, threshold)


def _shares(adjacency: torch.Tensor, rows: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    """Of each of these rows, what part of its absolute sum in the columns to keep an entry is."""
    shares = adjacency[rows].abs_()
    if keep is not None:
        shares.masked_fill_(~keep, 0)
    return shares.div_(shares.sum(1, keepdim=True).clamp_(min=1e-10))


def _influence(
    shares: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor, max_steps: int = 1000
) -> torch.Tensor:
    """weights (A + A^2 + ...), of the nilpotent A with these shares as rows."""
    step = weights[rows] @ shares
    total = step.clone()
    for _ in range(max_steps):
        if not step.isfinite().all():
            raise ValueError(
                "prune_graph: graph must have finite edges and probabilities, got influences that "
                "are NaN or inf; check graph.adjacency_matrix and graph.logit_probabilities"
            )
        if not step.any():
            return total
        step = step[rows] @ shares
        total += step
    raise RuntimeError(
        f"prune_graph: expected a graph without cycles, got paths of more than {max_steps} edges; "
        f"check graph.adjacency_matrix"
    )


def prune_graph(
    graph: Any, node_threshold: float = 0.8, edge_threshold: float = 0.98
) -> PruneResult:
    """`circuit_tracer.graph.prune_graph` without the sort of all edges, on the rows not zero.

    Args:
        graph: a `circuit_tracer.graph.Graph`, or an object with its `adjacency_matrix`,
            `input_tokens`, `logit_targets`, `logit_probabilities` and `selected_features`.
        node_threshold: the fraction of the influence on the logits that the kept nodes hold.
        edge_threshold: the same of the edges between them.

    Returns:
        node_mask `[n]`, edge_mask `[n, n]`, and for each node the fraction of the influence that it
        and the nodes before it hold, most influential first.

    Raises:
        ValueError: a threshold is not in 0..1, or influences are negative, NaN or inf.
        RuntimeError: the graph has cycles.
    """
    for name, value in (("node_threshold", node_threshold), ("edge_threshold", edge_threshold)):
        if not 0 <= value <= 1:
            raise ValueError(f"prune_graph: {name} must be in 0..1, got {value}")
    adjacency = graph.adjacency_matrix
    n, device = adjacency.shape[0], adjacency.device
    features, logits = len(graph.selected_features), len(graph.logit_targets)
    inner = n - logits - len(graph.input_tokens)  # features and errors

    rows = torch.arange(n, device=device)
    if not adjacency[features : n - logits].any():
        rows = torch.cat([rows[:features], rows[n - logits :]])
    weights = torch.zeros(n, dtype=torch.float32, device=device)
    weights[n - logits :] = graph.logit_probabilities

    influence = _influence(_shares(adjacency, rows, None), rows, weights)
    nodes = influence >= find_threshold(influence, node_threshold)
    nodes[inner:] = True

    # no influence reaches a node without its column, so its row needs no zeroing
    scores = _shares(adjacency, rows, nodes)
    through = _influence(scores, rows, weights) + weights
    scores *= through[rows, None]
    least = find_threshold(scores, edge_threshold)
    # where nothing has influence, the least is 0 and every entry of every row reaches it
    edges = torch.full((n, n), bool(least <= 0), device=device)
    edges[rows] = scores >= least
    del scores

    while True:
        before = nodes.clone()
        nodes[:inner] &= edges[:, :inner].any(0)
        nodes[:features] &= edges[:features].any(1)
        if torch.equal(nodes, before):
            break
        edges[~nodes] = False
        edges[:, ~nodes] = False

    ordered, order = influence.sort(descending=True)
    cumulative = torch.empty_like(influence)
    cumulative[order] = ordered.cumsum(0) / ordered.sum()
    return PruneResult(nodes, edges, cumulative)
