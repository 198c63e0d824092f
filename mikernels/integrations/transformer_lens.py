# SPDX-License-Identifier: Apache-2.0
"""TransformerLens: heads' results by batched products, for one model.

With `use_attn_result`, the attention of a HookedTransformer forms `z * W_O` before it sums over
`d_head`: a tensor `[B, T, H, d_head, d_model]`, 33 MB for each token and layer of Llama-3.1-8B in
bf16, and again in the backward pass. `fast_heads(model)` computes `einsum("bthe,hed->bthd")`
instead, and likewise the q, k and v of split inputs where the installed version forms
`[B, T, H, d_model, d_head]` for them (2.10 to 2.15).

Only that expression is replaced: the model's attention modules get copies of their own methods
whose global name `einops` answers the two rearrangements of the product with an object that can do
nothing but be multiplied and summed. So every hook, cast and special case stays the library's, and
a version that uses the operands in another way fails in an AttributeError or TypeError instead of
giving other numbers. Of methods wrapped by a type checker (jaxtyping's import hook, beartype) it is
the method inside, unchecked meanwhile; other wrappers may compute, and are refused. Checked against
2.10.0, 2.15.4 and 3.9.0; TransformerBridge, the only model of 4.x, has the batched product already.
"""

from __future__ import annotations

import inspect
from types import FunctionType, MethodType
from typing import Any

import torch

from mikernels.integrations.handle import Handle
from mikernels.models.hooks import check_uncompiled
from mikernels.rebind import rebound

__all__ = ["fast_heads"]

# the operands of (z * w).sum(-2), as the library writes them: heads' results, split inputs
ROWS = frozenset(
    f"batch pos head_index {d} -> batch pos head_index {d} 1" for d in ("d_head", "d_model")
)
WEIGHTS = frozenset(
    f"head_index {d} -> 1 1 head_index {d}" for d in ("d_head d_model", "d_model d_head")
)

# of the file names of wrappers that check types and compute nothing
CHECKERS = ("jaxtyping", "beartype", "typeguard")


class _Product:
    def __init__(self, rows: torch.Tensor, weights: torch.Tensor, handle: Handle):
        self._operands = rows, weights
        self._handle = handle

    def sum(self, dim: int) -> torch.Tensor:
        if dim != -2:
            raise TypeError(f"fast_heads: expected the product's sum over -2, got {dim}")
        self._handle.calls += 1
        # contiguous as the sum would be, for hooks that call view
        return torch.einsum("bthi,hio->btho", *self._operands).contiguous()


class _Rows:
    def __init__(self, rows: torch.Tensor, handle: Handle):
        self._rows = rows
        self._handle = handle

    def __mul__(self, weights: torch.Tensor) -> _Product:
        return _Product(self._rows, weights, self._handle)


class _Einops:
    """einops, except that the operands of the broadcast product stay as they are."""

    def __init__(self, einops: Any, handle: Handle):
        self._einops = einops
        self._handle = handle

    def __getattr__(self, name: str) -> Any:
        return getattr(self._einops, name)

    def rearrange(self, tensor: Any, pattern: str, **sizes: int) -> Any:
        if pattern in ROWS:
            return _Rows(tensor, self._handle)
        if pattern in WEIGHTS:
            return tensor
        return self._einops.rearrange(tensor, pattern, **sizes)


def _checked(function: Any) -> Any:
    """What a type checker's wrappers call; any other function itself."""
    while hasattr(function, "__wrapped__"):
        file = getattr(getattr(function, "__code__", None), "co_filename", "")
        if not any(checker in file for checker in CHECKERS):
            break
        function = function.__wrapped__
    return function


def _broadcasts(function: object) -> bool:
    constants = set(getattr(getattr(function, "__code__", None), "co_consts", ()))
    return bool(constants & ROWS) and bool(constants & WEIGHTS)


def _hidden(function: Any) -> bool:
    """Whether the product is in a function that another one wraps."""
    return hasattr(function, "__wrapped__") and _broadcasts(inspect.unwrap(function))


def _products(attention: torch.nn.Module, cfg: Any, handle: Handle) -> dict[str, FunctionType]:
    """The methods of an attention module that form a broadcast product, without it."""
    found: dict[str, FunctionType] = {}
    if getattr(cfg, "load_in_4bit", False):
        return found
    forward: Any = _checked(type(attention).forward)
    if getattr(cfg, "use_attn_result", False) and _broadcasts(forward):
        einops = _Einops(forward.__globals__["einops"], handle)
        found["forward"] = rebound(forward, einops=einops)
    method: Any = _checked(getattr(type(attention), "calculate_qkv_matrices", None))
    linear: Any = _checked(getattr(method, "__globals__", {}).get("complex_attn_linear"))
    split = getattr(cfg, "use_split_qkv_input", False) or getattr(cfg, "use_attn_in", False)
    if split and _broadcasts(linear):
        einops = _Einops(linear.__globals__["einops"], handle)
        fast = rebound(linear, einops=einops)
        found["calculate_qkv_matrices"] = rebound(method, complex_attn_linear=fast)
    return found


def fast_heads(model: torch.nn.Module) -> Handle:
    """Compute this HookedTransformer's heads' results by a batched product.

    All hooks fire as before: `hook_result` with `[B, T, H, d_model]`, and what it returns is what
    is summed. Outputs and gradients are equal up to rounding; in 16 bits they are closer to exact,
    since products are not rounded before the sum. Use as

        with fast_heads(model):
            model.run_with_hooks(...)

    or keep the handle and call `handle.remove()`. A copy of the model made meanwhile stays fast.

    Args:
        model: a HookedTransformer with `use_attn_result` (or with split inputs, where the installed
            version has a broadcast product for those).

    Returns:
        The handle: `replaced` methods, and `calls`, the products computed since.

    Raises:
        TypeError: model is not a TransformerLens model.
        ValueError: it forms no broadcast product, a part of it is compiled, or a method is
            replaced already.
    """
    handle = Handle("fast_heads")
    cfg = getattr(model, "cfg", None)
    if not isinstance(model, torch.nn.Module) or cfg is None:
        raise TypeError(
            f"fast_heads: model must be a TransformerLens model, got {type(model).__name__}"
        )
    check_uncompiled("fast_heads", model)
    heads = [module for module in model.modules() if hasattr(module, "hook_result")]
    plans = [(module, _products(module, cfg, handle)) for module in heads]
    if not any(methods for _, methods in plans):
        wrapper = next((w for w in (type(m).forward for m in heads) if _hidden(w)), None)
        if wrapper is not None:
            fix = f"remove what wraps its forward ({wrapper.__code__.co_filename})"
        elif getattr(cfg, "use_attn_result", False):
            fix = "leave out fast_heads: here they are computed in another way"
        else:
            fix = "call model.set_use_attn_result(True) first"
        raise ValueError(
            f"fast_heads: expected attention that forms heads' results by a broadcast product, got "
            f"a {type(model).__name__} with {len(heads)} attention modules and no such product; "
            f"{fix}"
        )
    for module, methods in plans:
        for name in methods:
            if name in vars(module):
                raise ValueError(
                    f"fast_heads: expected {type(module).__name__}.{name} of the class, got a "
                    f"method of this module's own; remove what replaced it (fast_heads?) first"
                )
    for module, methods in plans:
        for name, function in methods.items():
            handle.replace(module, name, MethodType(function, module))
    return handle
