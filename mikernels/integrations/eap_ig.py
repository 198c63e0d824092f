# SPDX-License-Identifier: Apache-2.0
"""EAP-IG (hannamw/EAP-IG): its edge scores by `edge_scores`, for one model.

The library scores an edge in a gradient hook: the gradient at each reader's input against the
activation differences of all writers before it, by an einsum that first copies those differences,
four times a layer. `make_hooks_and_matrices` here has the library's signature and return value, but
its gradient hooks read the differences in place and add to the scores in fp32: scores in 16 bits
(the library's, for a model in 16 bits) are only the rounding of fp32 sums over all batches.

Two ways to use it. Code of one's own calls `make_hooks_and_matrices` from here. Code that calls
`eap.attribute` (MIB's scripts, say) cannot be given a function: the library looks the name up in
its module. `fast_eap(eap.attribute, model)` puts a substitute there for a `with` block. It passes
every model but this one on to the library's function, so the effect stays with the model, as does
that of `fast_heads`, which belongs beside it:

    with fast_heads(model), fast_eap(eap.attribute, model):
        eap.attribute.attribute(model, graph, dataloader, metric, "EAP-IG-inputs", ig_steps=5)

Nodes and neurons likewise, by `make_node_hooks_and_matrices` or `fast_eap(eap.attribute_node,
model)`: there the gain is the sums in fp32 and the frozen parameters. The differences lie on the
model's device; the library itself keeps scores of nodes on "cuda", whatever that is.

Checked against EAP-IG at 795f560 (2.0.0).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial, wraps
from typing import Any, NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from mikernels._dispatch import accumulate_dtype
from mikernels.integrations.handle import Handle
from mikernels.models.hooks import check_uncompiled
from mikernels.ops.pairs.edges import edge_scores

__all__ = ["fast_eap", "make_hooks_and_matrices", "make_node_hooks_and_matrices"]

NAME = "make_hooks_and_matrices"
LAYERS = ("embed", "pos_embed", "attn", "mlp")
PARAMETERS = ("model", "graph", "batch_size", "n_pos", "scores")
NODE_PARAMETERS = (*PARAMETERS, "neuron")

Hooks = list[tuple[str, Callable[..., Any]]]

# fp32 sums of which score tensors in 16 bits are the rounding
_SUMS = WeakTensorKeyDictionary()


class _Reader(NamedTuple):
    hook: str
    writers: int
    columns: int | slice


def _writers(graph: Any) -> Iterator[tuple[str, int | slice]]:
    """Hooks of the nodes that write, with their places among the activation differences."""
    layers = range(graph.cfg["n_layers"])
    names = ["input", *(name for i in layers for name in (f"a{i}.h0", f"m{i}"))]
    for node in map(graph.nodes.__getitem__, names):
        yield node.out_hook, graph.forward_index(node)


def _readers(graph: Any) -> Iterator[_Reader]:
    """Hooks of the inputs that read, with how many writers precede them and their columns."""
    for i in range(graph.cfg["n_layers"]):
        heads, mlp = graph.nodes[f"a{i}.h0"], graph.nodes[f"m{i}"]
        for hook, letter in zip(heads.qkv_inputs, "qkv", strict=True):
            columns = graph.backward_index(heads, qkv=letter)
            yield _Reader(hook, graph.prev_index(heads), columns)
        yield _Reader(mlp.in_hook, graph.prev_index(mlp), graph.backward_index(mlp))
    logits = graph.nodes["logits"]
    yield _Reader(logits.in_hook, graph.prev_index(logits), graph.backward_index(logits))


def _sums(scores: torch.Tensor) -> torch.Tensor:
    """What to add to: scores, or the fp32 sums of which scores in 16 bits are the rounding."""
    acc = accumulate_dtype(scores.dtype)
    if scores.dtype == acc:
        return scores
    kept = _SUMS.get(scores)
    # anybody may have written to scores, e.g. divided them by the number of examples
    same = partial(torch.allclose, rtol=0.0, atol=0.0, equal_nan=True)
    if kept is None or not same(kept.to(scores.dtype), scores):
        kept = _SUMS[scores] = scores.to(acc)
    return kept


def _differences(graph: Any, into: torch.Tensor, factor: int) -> Hooks:
    """Hooks that add, or subtract, what each node writes."""

    def write(place: int | slice, activations: torch.Tensor, hook: Any) -> None:
        into[:, :, place].add_(activations.detach(), alpha=factor)

    return [(hook, partial(write, place)) for hook, place in _writers(graph)]


def _no_scores(shape: str) -> RuntimeError:
    return RuntimeError(
        f"{NAME}: expected scores {shape} to add to, got None, which is for evaluation; give "
        f"scores, or leave out the gradient hooks"
    )


def make_hooks_and_matrices(
    model: Any,
    graph: Any,
    batch_size: int,
    n_pos: int,
    scores: torch.Tensor | None,
    *,
    count: Callable[[], object] | None = None,
) -> tuple[tuple[Hooks, Hooks, Hooks], torch.Tensor]:
    """The hooks of edge attribution patching, with the library's signature and return value.

    Args:
        model: a HookedTransformer; its `cfg` is read.
        graph: an `eap.graph.Graph`.
        batch_size, n_pos: of the batch that the hooks are for.
        scores: `[n_forward, n_backward]`, to which the gradient hooks add; None for evaluation.
        count: called with each product of a gradient hook.

    Returns:
        (hooks that add activations: run these on corrupted inputs; hooks that subtract them: on
        clean inputs; gradient hooks) and the activation differences `[batch_size, n_pos, n_forward,
        d_model]`, zeros so far. For evaluation of models with norms before and after (Gemma 2)
        corrupted and clean activations are kept apart, in `[2, ...]`.
    """
    cfg = model.cfg
    apart = scores is None and cfg.use_normalization_before_and_after
    shape = (batch_size, n_pos, graph.n_forward, cfg.d_model)
    delta = torch.zeros((2, *shape) if apart else shape, device=cfg.device, dtype=cfg.dtype)
    added, subtracted = (delta[0], delta[1]) if apart else (delta, delta)
    sign = 1 if apart else -1

    def score(reader: _Reader, gradients: torch.Tensor, hook: Any) -> None:
        if scores is None:
            raise _no_scores("[n_forward, n_backward]")
        grads = gradients.detach().to(delta)
        grads = grads[:, :, None] if grads.dim() == 3 else grads
        before, at = slice(reader.writers), reader.columns
        # the logits' column is -1
        columns = at if isinstance(at, slice) else slice(at, at + 1 or None)
        total = _sums(scores)
        edge_scores(delta[:, :, before], grads, out=total[before, columns])
        if total is not scores:
            scores[before, columns] = total[before, columns]
        if count is not None:
            count()

    gradients: Hooks = [(reader.hook, partial(score, reader)) for reader in _readers(graph)]
    return (_differences(graph, added, 1), _differences(graph, subtracted, sign), gradients), delta


def make_node_hooks_and_matrices(
    model: Any,
    graph: Any,
    batch_size: int,
    n_pos: int,
    scores: torch.Tensor | None,
    neuron: bool = False,
    *,
    count: Callable[[], object] | None = None,
) -> tuple[tuple[Hooks, Hooks, Hooks], torch.Tensor]:
    """The hooks of `eap.attribute_node`, with the library's signature and return value.

    A node's score is the inner product of what it writes (corrupted less clean) with the gradient
    there, over examples and positions; of an MLP, as in the library, with the gradient at its
    input.

    Args:
        model, graph, batch_size, n_pos, count: as of make_hooks_and_matrices.
        scores: `[n_forward]`, or `[n_forward, d_model]` with neuron; None for evaluation.
        neuron: a score for each of the d_model numbers that a node writes.

    Returns:
        As of make_hooks_and_matrices.
    """
    cfg = model.cfg
    shape = (batch_size, n_pos, graph.n_forward, cfg.d_model)
    delta = torch.zeros(shape, device=cfg.device, dtype=cfg.dtype)

    def score(place: int | slice, gradients: torch.Tensor, hook: Any) -> None:
        if scores is None:
            raise _no_scores("[n_forward] or, with neuron, [n_forward, d_model]")
        total = _sums(scores)
        # an example at a time, so that products take no more than its activations
        for written, gradient in zip(delta[:, :, place], gradients.detach(), strict=True):
            products = written.to(total.dtype).mul(gradient.to(total)).sum(0)
            total[place] += products if neuron else products.sum(-1)
        if total is not scores:
            scores[place] = total[place]
        if count is not None:
            count()

    hooks = [(hook, place) for hook, place in _writers(graph)]
    for i in range(graph.cfg["n_layers"]):
        hooks[2 + 2 * i] = graph.nodes[f"m{i}"].in_hook, hooks[2 + 2 * i][1]
    gradients: Hooks = [(hook, partial(score, place)) for hook, place in hooks]
    return (_differences(graph, delta, 1), _differences(graph, delta, -1), gradients), delta


def _freeze(model: Any, handle: Handle) -> None:
    """No gradients of parameters; what a layer wrote needs a gradient where it did before."""
    parts = [model, *getattr(model, "blocks", ())]
    layers = [getattr(part, name) for part in parts for name in LAYERS if hasattr(part, name)]
    layers = [layer for layer in layers if any(p.requires_grad for p in layer.parameters())]

    def need(layer: Any, args: Any, written: torch.Tensor) -> torch.Tensor | None:
        if not torch.is_grad_enabled() or written.requires_grad:
            return None
        return written.detach().requires_grad_()

    trained = [p for p in model.parameters() if p.requires_grad]
    handle.on_remove(lambda: [p.requires_grad_() for p in trained])
    for layer in layers:
        handle.on_remove(layer.register_forward_hook(need).remove)
    for parameter in trained:
        parameter.requires_grad_(False)


def fast_eap(module: Any, model: torch.nn.Module, *, freeze: bool = True) -> Handle:
    """Have a module of EAP-IG score this model's edges, or its nodes, with the hooks from here.

    Args:
        module: the module that attributes, `eap.attribute` or `eap.attribute_node`; its name
            `make_hooks_and_matrices` is substituted, for this model only, until the handle is
            removed.
        model: a HookedTransformer.
        freeze: let the parameters not require gradients meanwhile. The library does not use
            them, but computes and stores them: a third of a backward pass, and the memory of the
            model once more.

    Returns:
        The handle, as of `fast_heads`: `calls` counts the products. The end of a `with` block warns
        if there were none, e.g. after a method without gradients ("information-flow-routes").

    Raises:
        TypeError: module does not have the function that this replaces, or model is not a model.
        ValueError: another `fast_eap` of this model is in place, or a part of it is compiled.
    """
    handle = Handle("fast_eap")
    original = getattr(module, NAME, None)
    found = tuple(inspect.signature(original).parameters) if callable(original) else None
    makers = {PARAMETERS: make_hooks_and_matrices, NODE_PARAMETERS: make_node_hooks_and_matrices}
    make: Any = makers.get(found or ())
    if original is None or make is None:
        what = f"no {NAME}" if found is None else f"{NAME}({', '.join(found)})"
        raise TypeError(
            f"fast_eap: expected a module with {NAME}({', '.join(PARAMETERS)}), and neuron for "
            f"nodes, got {getattr(module, '__name__', type(module).__name__)} with {what}; give it "
            f"eap.attribute or eap.attribute_node"
        )
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "cfg"):
        raise TypeError(f"fast_eap: model must be a HookedTransformer, got {type(model).__name__}")
    check_uncompiled("fast_eap", model)
    if getattr(original, "model", None) is model:
        raise ValueError(
            "fast_eap: expected the library's function, got that of another fast_eap of this "
            "model; remove its handle first"
        )

    def count() -> None:
        handle.calls += 1

    @wraps(original)
    def substitute(model: Any, *args: Any, **kwargs: Any) -> Any:
        if model is not substitute.model:  # type: ignore[attr-defined]
            return original(model, *args, **kwargs)
        return make(model, *args, **kwargs, count=count)

    substitute.model = model  # type: ignore[attr-defined]
    if freeze:
        _freeze(model, handle)
    handle.replace(module, NAME, substitute)
    return handle
