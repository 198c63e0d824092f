# SPDX-License-Identifier: Apache-2.0
"""`with rules(model, preset):`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from mikernels.models.decoder import find_decoder
from mikernels.models.hooks import check_uncompiled, eager
from mikernels.models.parts import Block, first_tensor
from mikernels.models.rules.places import find_places
from mikernels.models.rules.preset import OPTIONAL, Rules, as_rules
from mikernels.models.rules.report import RuleReport
from mikernels.models.rules.scope import Place, Scope, Uncopied

FIX = "leave the rules out, and use the gradients of the model as it is"


def _covering(places: list[Place], layers: Iterable[int] | None) -> list[Place]:
    """Those of these blocks; a module that several share is one place."""
    covered, left = places, set()
    if layers is not None:
        wanted = list(layers) if isinstance(layers, Iterable) else [layers]
        there = {p.layer for p in places if p.layer is not None}
        if not wanted or (unknown := [layer for layer in wanted if layer not in there]):
            raise ValueError(
                f"rules: layers must be some of 0..{max(there, default=-1)} (blocks of the model), "
                f"got {unknown if wanted else []}"
            )
        covered = [p for p in places if p.layer in wanted]
        left = {(type(p), p.key) for p in places if p.layer not in wanted}
    for p in covered:
        if (type(p), p.key) in left:
            raise ValueError(
                f"rules: layers must be all those that share {p.name}, which block {p.layer} does "
                f"with others"
            )
    return list({(type(p), p.key): p for p in covered}.values())


def _counted(block: Block, scope: Scope) -> Callable[[], None]:
    """Reports that a block runs with a gradient to come; returns what ends that."""

    def enter(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        x = first_tensor(args, kwargs)
        if scope.entered() and torch.is_grad_enabled() and x is not None and x.requires_grad:
            scope.report.entered(block.index)

    return Uncopied.hook(block.module.register_forward_pre_hook, enter, with_kwargs=True)


@contextmanager
def rules(
    model: torch.nn.Module,
    preset: str | Rules | None = None,
    *,
    layers: Iterable[int] | None = None,
    attention: str | None = None,
    norm: str | None = None,
    softmax: str | float | None = None,
    query: float | None = None,
    key: float | None = None,
    value: float | None = None,
    activation: str | None = None,
    gate: float | None = None,
    up: float | None = None,
) -> Iterator[RuleReport]:
    """Inside the `with` block the model's backward follows other rules; its forward is unchanged.

    Outputs stay bit for bit, gradients become those of the rules: of inputs, of activations and of
    parameters: first derivatives, one at a time. The model and its modules are as before when the
    block ends, whatever ends it; copies of it are made outside. Others' hooks come after the rules.
    Blocks may be nested (the innermost that says something about a place decides) and are of their
    thread alone. Backward may run after the block, of what was computed in it; what a checkpoint
    (use_reentrant=False) computes again has to be computed in the block and in its thread.

    Args:
        model: a Hugging Face decoder (Llama, Qwen, Gemma, Phi-3, Mixtral, GPT-2, GPT-NeoX, ...) or
            a HookedTransformer of TransformerLens, in eval mode, not compiled.
        preset: "gim", "frozen", "attnlrp", "relp" or "plain" (`PRESETS`), or Rules. With None only
            what follows.
        layers: blocks where the rules hold, all by default; the final norm is of none of them, and
            a module that several share is of all of them.
        attention: how softmax's temperature is computed: "fused", by `attention_gradients`;
            "two-pass", by running the model's own attention twice, at both temperatures; None is
            "fused" where a kernel was built for the device. Both need memory O(T) where the model's
            attention does. "fused" checks that the attention is softmax(q k^T) v; "two-pass" takes
            any, and trusts that its scores are of q, k, scale, soft-cap and mask alone. A
            TransformerLens model forms the pattern, and its rule stands there.
        norm, softmax, query, key, value, activation, gate, up: as in Rules, in place of what the
            preset says.

    Yields:
        RuleReport: of each rule, on how many modules it acted and by how much.

    Raises:
        TypeError, ValueError: for a model that is not recognised, in training mode or compiled; for
            rules that it has no place for (a gate in GPT-2 counts where it was asked for by name),
            before anything is changed. Where a place turns out to compute something else than a
            rule assumes (a norm, a gated product, attention whose weights are not those of its q,
            k and mask), with the numbers; when it first runs, for attention in backward. A gated
            product that is recognised, but has no modules to act on.
        RuntimeError: at the end of the block, for a rule that did not act on a module that ran, or
            on none of a block that ran; for a second derivative, a batch of gradients, a reentrant
            checkpoint, a copy in the block.

    Source: GIM, Edin et al., arXiv 2505.17630, without its model conversion; see PRESETS.

    Example:
        >>> input_ids = tokenizer("Mary and John", return_tensors="pt")["input_ids"]
        >>> with circuits.rules(model, "gim") as report:
        ...     model(input_ids).logits[0, -1, 3].backward()
        >>> print(report)
        rule     value   acted on  of  change of the gradient
        norm     frozen         7   7  ...
        softmax  2.0            3   3  ...
        query    0.25           3   3                    75 %
        ...
    """
    asked = {
        "norm": norm, "softmax": softmax, "query": query, "key": key, "value": value,
        "activation": activation, "gate": gate, "up": up,
    }  # fmt: skip
    said = as_rules(preset, asked)
    if not said.said():
        raise ValueError("rules: preset or a rule must be given, got neither")
    if attention not in (None, "fused", "two-pass"):
        raise ValueError(f"rules: attention must be 'fused' or 'two-pass', got {attention!r}")
    decoder = find_decoder(model, "rules", FIX)
    found = find_places(decoder, attention)
    check_uncompiled("rules", model)
    decoder.check_eval()
    covered = _covering(found, layers)
    places = {rule: {p.name: p.layer for p in covered if rule in p.rules} for rule in said.said()}
    without_mlps = all(block.mlp is None for block in decoder.blocks)
    optional = (*OPTIONAL, "activation") if without_mlps else OPTIONAL
    for rule, names in places.items():
        if not names and not (rule in optional and asked[rule] is None):
            raise ValueError(
                f"rules: {rule} must have a place in the model, got {type(model).__name__} without "
                f"any; leave it out"
            )
    report = RuleReport(said.said(), places)
    scope = Scope(said, covered, report)
    with ExitStack() as stack:
        for block in decoder.blocks:
            stack.callback(_counted(block, scope))
        for place in covered:
            if any(rule in places for rule in place.rules):
                for remove in place.install(scope):
                    stack.callback(remove)
        # a wrapper of torch.compile around the model would leave out hooks
        stack.enter_context(eager())
        stack.enter_context(scope.enter())
        yield report
    # not after an exception
    for rule, name in report.missed():
        raise RuntimeError(
            f"rules: {rule} must act on {name}, which ran without it: its code does not go the way "
            f"that this rule is placed on; leave the rule out"
        )
    for rule, layer, name in report.passed_by():
        raise RuntimeError(
            f"rules: {rule} must act in block {layer}, which ran, got none of its places there "
            f"called as a module ({name}, ...); leave the rule out"
        )
    if not report.any_ran:
        warnings.warn(
            "rules: no gradient was recorded in the `with` block; run the model inside it, with "
            "inputs or parameters that require gradients",
            RuntimeWarning,
            stacklevel=3,
        )
