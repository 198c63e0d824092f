# SPDX-License-Identifier: Apache-2.0
"""Which products are left: those of plain activations `[..., d]` with an encoder `[d, F]`.

While a library's method runs, the norms of the decoder's vectors, which libraries take again and
again, are taken once; their gradient is one pass over the matrix, where autograd makes five (97 ms
of a step at S1, 2 Zen 5 cores).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from mikernels.integrations.lazy.codes import dtype_of_product
from mikernels.integrations.lazy.product import leave
from mikernels.integrations.lazy.tensor import Lazy, Ledger, lazy

MATMUL = ("matmul", "__matmul__", "mm")


class _Norms(torch.autograd.Function):
    @staticmethod
    def forward(w, dim):
        return torch.linalg.vector_norm(w, dim=dim)

    @staticmethod
    def setup_context(ctx, inputs, output):
        w, ctx.dim = inputs
        ctx.save_for_backward(w, output)

    @staticmethod
    def backward(ctx, grad):
        w, norms = ctx.saved_tensors
        # at a norm of 0 the subgradient 0, as torch's
        share = (grad / norms).masked_fill(norms == 0, 0)
        return w * share.unsqueeze(ctx.dim), None


class _Leaving(TorchFunctionMode):
    def __init__(self, d: int, f: int, ledger: Ledger):
        super().__init__()
        self.d, self.f, self.ledger = d, f, ledger
        self.norms: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "linear" and len(args) >= 2 and not kwargs.keys() - {"bias"}:
            x, w = args[:2]
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            if self._encodes(x, w, (self.f, self.d)):
                return lazy(leave(x, w, bias, self.ledger))
        elif name in MATMUL and len(args) == 2 and not kwargs:
            x, w = args
            if self._encodes(x, w, (self.d, self.f)):
                return lazy(leave(x, w.T, None, self.ledger))
        elif name == "norm" and args and self._is_matrix(args[0]):
            found = self._norm(*args, **kwargs)
            if found is not None:
                return found
        return func(*args, **kwargs)

    def _encodes(self, x: Any, w: Any, shape: tuple[int, int]) -> bool:
        return (
            isinstance(x, torch.Tensor)
            and self._is_matrix(w)
            and not isinstance(x, Lazy)
            and tuple(w.shape) == shape
            and x.dim() > 0
            and x.shape[-1] == self.d
            and x.dtype.is_floating_point
            and dtype_of_product(x, w) is not None
        )

    def _is_matrix(self, w: Any) -> bool:
        return isinstance(w, torch.Tensor) and not isinstance(w, Lazy) and w.dim() == 2

    def _norm(
        self,
        w: torch.Tensor,
        p: Any = "fro",
        dim: Any = None,
        keepdim: bool = False,
        dtype: Any = None,
    ) -> torch.Tensor | None:
        if dtype is not None or p not in ("fro", 2, 2.0) or not isinstance(dim, int):
            return None
        dim %= 2
        if w.shape[1 - dim] != self.f or not (w.requires_grad and torch.is_grad_enabled()):
            return None
        key = (id(w), w._version, dim)
        if key not in self.norms:
            # the matrix is kept with it, so that its id stays its own
            self.norms[key] = w, _Norms.apply(w, dim)
        norms = self.norms[key][1]
        return norms.unsqueeze(dim) if keepdim else norms


def _transformed() -> bool:
    """Whether torch.func or forward-mode AD is at work."""
    active = torch._C._functorch.peek_interpreter_stack() is not None
    return active or torch.autograd.forward_ad._current_level >= 0


def leave_products(
    function: Callable[..., Any], d: int, f: int, ledger: Ledger
) -> Callable[..., Any]:
    """`function`, with the products of `[..., d]` with `[d, F]` (or linear's `[F, d]`) left as Lazy
    tensors while it runs."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if ledger.within.entered:
            return function(*args, **kwargs)
        if _transformed():
            # the library knows these transforms, the operators here do not
            ledger.looked("torch.func or forward-mode AD", ("...", f))
            return function(*args, **kwargs)
        with ledger.within, _Leaving(d, f, ledger):
            return function(*args, **kwargs)

    return run
