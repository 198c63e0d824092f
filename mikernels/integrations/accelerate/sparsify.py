# SPDX-License-Identifier: Apache-2.0
"""sparsify: SparseCoder (top-k, group-max, multi-top-k, transcoders, skip) and its trainer.

Its `fused_encoder` gives activations, indices and all ReLU'd pre-activations, of which the last
become lazy; its `decoder_impl` becomes `sparse_decode`. Of its backward pass two things are known
to be wrong and kept: pre-activations have no gradient, so that AuxK and multi-top-k teach the
encoder nothing, and activations of 0 have one. `correct=True` mends both. Where a token has fewer
than k positive pre-activations, the features that stand for zeros are the library's by the order in
which torch.topk finds them; here they are those of the largest pre-activations.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from types import MethodType
from typing import Any

import torch

from mikernels._autocast import in_own_dtype
from mikernels.integrations.accelerate.plan import Method, Plan, refuse_overrides
from mikernels.integrations.lazy import Ledger
from mikernels.integrations.lazy.codes import dtype_of_product
from mikernels.integrations.lazy.product import leave
from mikernels.integrations.lazy.tensor import lazy
from mikernels.ops.sae.decode import sparse_decode
from mikernels.ops.sae.encode import encode_gradients, encode_op
from mikernels.ops.sae.groupmax_encode import groupmax_encode
from mikernels.rebind import rebound, within
from mikernels.values.codes import SparseCodes

PACKAGE = "sparsify"
NAMES = ("encode", "decode", "forward")
D, F, K = 12, 45, 5


def plan(obj: Any, *, correct: bool = False) -> Plan:
    if isinstance(getattr(obj, "saes", None), dict):
        plans = [plan(sae, correct=correct) for sae in obj.saes.values()]
        if not plans:
            raise ValueError("accelerate: expected a trainer of at least one SparseCoder, got none")
        whole = plans[0]
        for more in plans[1:]:
            whole = whole.with_more(more)
        whole.optimizers = list(getattr(obj, "optimizers", []))
        return whole
    kind = refuse_overrides(obj, PACKAGE, NAMES)
    if kind.__name__ != "SparseCoder" and not hasattr(obj, "encoder"):
        raise TypeError(
            f"accelerate: sparsify's {kind.__name__} is not supported; supported are SparseCoder "
            f"and its trainer"
        )
    return Plan(
        _library(),
        [Method(obj, name, _maker(kind, name, correct)) for name in NAMES],
        [obj],
        [],
        lambda: _twin(kind, obj.cfg),
    )


def _library() -> str:
    try:
        return f"eai-sparsify {version('eai-sparsify')}"
    except PackageNotFoundError:
        return "sparsify (from source)"


def _maker(kind: type, name: str, correct: bool) -> Callable[[Ledger], Callable[..., Any]]:
    function: Any = getattr(kind, name)

    def make(ledger: Ledger) -> Callable[..., Any]:
        def change(inner: Any) -> Any:
            known = inner.__globals__
            used = [name for name in inner.__code__.co_names if name in known]
            stand_ins: dict[str, Any] = {}
            if "fused_encoder" in used:
                stand_ins["fused_encoder"] = _encoder(known["fused_encoder"], ledger, correct)
            if "decoder_impl" in used:
                stand_ins["decoder_impl"] = functools.partial(_decode, known["decoder_impl"])
            return rebound(inner, **stand_ins) if stand_ins else inner

        changed = within(function, change)

        @functools.wraps(changed)
        def run(*args: Any, **kwargs: Any) -> Any:
            with ledger.within:
                return changed(*args, **kwargs)

        return run

    return make


def _encoder(own: Any, ledger: Ledger, correct: bool) -> Callable[..., Any]:
    output: Any = getattr(own, "__globals__", {}).get("EncoderOutput")
    if output is None:
        raise ValueError(
            f"accelerate: {_library()}: expected a fused_encoder that gives an EncoderOutput, got "
            f"{own!r}; this version is not known"
        )

    def fused_encoder(input: Any, weight: Any, bias: Any, k: int, activation: str) -> Any:
        if not _selects(input, weight, k, activation):
            # an error, or for sequences by group indices that are its own
            ledger.looked("fused_encoder", (*input.shape[:-1], len(weight)))
            return own(input, weight, bias, k, activation)
        product = leave(input, weight, bias, ledger).like(relu=True)
        with torch.no_grad():
            if activation == "topk":
                values, indices = product.like(relu=False).op_topk(k, sorted=False)
            else:
                codes = groupmax_encode(*product.operands(), k=k, relu=False)
                values, indices = codes.values.to(product.dtype), codes.indices
        values = _Chosen.apply(values, indices, input, weight, bias, correct)
        return output(values, indices, lazy(product if correct else product.detached()))

    return fused_encoder


class _Chosen(torch.autograd.Function):
    """ReLU of selected pre-activations, with the gradient of the library's encoder: of what it was
    given, not of what autocast made of it, and, unless `correct`, of zeros too."""

    @staticmethod
    def forward(values, indices, x, weight, bias, correct):
        return values.relu()

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, indices, x, weight, bias, ctx.correct = inputs
        ctx.save_for_backward(output, indices, x, weight, bias)

    @staticmethod
    @in_own_dtype
    def backward(ctx, grad):
        values, indices, x, weight, bias = ctx.saved_tensors
        k = indices.shape[-1]
        found = encode_gradients(
            grad.to(weight.dtype).reshape(-1, k),
            x.to(weight.dtype).reshape(-1, x.shape[-1]),
            weight,
            None,
            values.reshape(-1, k),
            indices.reshape(-1, k),
            None,
            ctx.correct,
            [*ctx.needs_input_grad[2:5], False],
            encode_op.resolve(None, x.device),
        )
        pairs = zip(found, (x, weight, bias), strict=False)
        grads = [None if g is None else g.to(t.dtype).reshape(t.shape) for g, t in pairs]
        return None, None, *grads, None


def _selects(x: torch.Tensor, weight: torch.Tensor, k: int, activation: str) -> bool:
    """Whether the library's own encoder selects k features of each token."""
    f = len(weight)
    if not 0 < k <= f or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        return False
    if dtype_of_product(x, weight) is None:
        return False
    return activation == "topk" or (activation == "groupmax" and x.dim() == 2 and f % k == 0)


def _decode(
    own: Any, top_indices: torch.Tensor, top_acts: torch.Tensor, W_dec: torch.Tensor
) -> torch.Tensor:
    """`W_dec` is `[d, F]`, as the library passes it."""
    if top_indices.dim() != 2 or top_acts.dtype != W_dec.dtype:
        # which it does not decode
        return own(top_indices, top_acts, W_dec)
    codes = SparseCodes._trusted(top_acts, top_indices, W_dec.shape[1])
    return sparse_decode(codes, W_dec.mT)


@contextlib.contextmanager
def _eager_decoder(sae: Any, kind: type) -> Iterator[None]:
    """While it is entered a plain object on the CPU decodes by the library's eager decoder: where
    there is a GPU its own would be a kernel for that."""
    plain = not any(name in vars(sae) for name in NAMES)
    put: list[str] = []
    for name in ("decode", "forward") if plain else ():
        function: Any = getattr(kind, name)
        inner = inspect.unwrap(function)
        decoder = inner.__globals__.get("decoder_impl")
        eager = getattr(decoder, "__globals__", {}).get("eager_decode")
        if "decoder_impl" in inner.__code__.co_names and eager not in (None, decoder):
            changed = within(function, functools.partial(rebound, decoder_impl=eager))
            setattr(sae, name, MethodType(changed, sae))
            put.append(name)
    try:
        yield
    finally:
        for name in put:
            delattr(sae, name)


def _twin(kind: Any, cfg: Any) -> tuple[Any, Callable[[Any], dict[str, torch.Tensor]]]:
    changes: dict[str, Any] = {"num_latents": F, "k": K}
    if cfg.multi_topk:
        # four times as many must be there
        changes["k"] = 3
    small = dataclasses.replace(cfg, **changes)
    made = kind(D, small)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        # every token has more positive pre-activations than slots
        made.encoder.bias.add_(1.0)
    x = torch.randn(17, D)
    y = torch.randn(17, D) if cfg.transcode else None
    dead = torch.rand(F) < 0.4

    def step(sae: Any) -> dict[str, torch.Tensor]:
        with _eager_decoder(sae, kind):
            out = sae(x, y, dead_mask=dead)
        (out.fvu + out.auxk_loss / 32 + out.multi_topk_fvu / 8).backward()
        return {
            "sae_out": out.sae_out.detach(),
            "fvu": out.fvu.detach(),
            "auxk_loss": out.auxk_loss.detach(),
            "multi_topk_fvu": out.multi_topk_fvu.detach(),
            "latent_acts": out.latent_acts.detach().sort(-1).values,
            "latent_indices": out.latent_indices.sort(-1).values.float(),
            **{f"gradient of {n}": p.grad for n, p in sae.named_parameters() if p.grad is not None},
        }

    return made, step
