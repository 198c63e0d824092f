# SPDX-License-Identifier: Apache-2.0
"""`Lazy`: a torch.Tensor whose numbers are made when somebody looks.

What it stands for is its `node`, which answers the operations that it knows by methods `op_<name>`;
such a method returns NotImplemented where its arguments are other than it knows. Every operation
that is not answered is given the dense tensor instead: `dense()`, made once, with its gradient.

A node answers only while it says what the tensor is. It does not where the dense one was made and
changed in place (its version), where what it is computed from was changed, or where the tensor's
place in autograd's graph is another one. Views of a tensor, detached ones too, become views of its
dense one, and while there are any nothing is changed in place without it.

Where autograd takes a tensor without asking its type (torch.autograd.Function), it finds a node in
the graph that is entered by `_Enter`: the gradient is that of `dense()`. What such a function
returns, or what somebody makes a leaf, has a gradient of its own: `_Leave`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

# what is known without the numbers: the wrapper itself has it
KNOWN = {
    *("shape", "dtype", "device", "layout", "ndim", "is_sparse", "is_cuda", "is_cpu", "is_meta"),
    *("is_quantized", "is_mkldnn", "is_nested", "is_sparse_csr", "is_xpu", "is_mps", "itemsize"),
    *("requires_grad", "requires_grad_", "grad_fn", "is_leaf", "output_nr", "names", "_version"),
    *("size", "dim", "numel", "nelement", "ndimension", "get_device", "element_size", "is_complex"),
    *("is_floating_point", "is_signed", "is_inference", "has_names", "__len__", "is_conj"),
    *("is_same_size", "_is_view", "is_tensor", "is_contiguous", "stride", "storage_offset"),
    *("__hash__", "is_neg", "_backward_hooks", "_base", "is_shared", "nbytes"),
}
# what makes gradients visible at the tensor itself, which codes do not have
WATCHED = {"retain_grad", "register_hook", "register_post_accumulate_grad_hook", "grad"}
# what takes a dtype and a device from a tensor, and nothing else
LIKE = {"new_tensor", "new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided"}
# what gives the numbers to somebody whose changes no version counts
ESCAPES = {
    *("data", "numpy", "__array__", "__dlpack__", "__cuda_array_interface__", "data_ptr", "set_"),
    *("storage", "untyped_storage", "share_memory_", "_typed_storage"),
}


def version_of(t: torch.Tensor) -> int:
    """What a change in place raises; tensors made in inference mode have no such number."""
    return 0 if t.is_inference() else t._version


# tensors, their versions and where they lie
Snapshot = list[tuple[torch.Tensor, int, int]]


def snapshot(tensors: Sequence[torch.Tensor]) -> Snapshot:
    return [(t, version_of(t), t.data_ptr()) for t in tensors]


def unchanged(before: Snapshot) -> bool:
    """Whether nobody has written to them, or (`p.data = ...`) put other tensors in their place."""
    return all(version_of(t) == v and t.data_ptr() == p for t, v, p in before)


def changed(ledger: Ledger, what: str, shape: Sequence[int]) -> RuntimeError:
    return RuntimeError(
        f"{ledger.name}: {what} needs numbers of a {list(shape)} tensor that nobody has asked for "
        f"yet, and the input or a parameter that they are computed from was changed since; use the "
        f"tensor before the optimizer's step, or report.restore() first"
    )


# of tensors: where they lie and how -> the same numbers elsewhere
Copies = dict[Any, torch.Tensor]


def copy_of(t: torch.Tensor, copies: Copies) -> torch.Tensor:
    key = (t.data_ptr(), t.shape, t.stride(), t.dtype)
    if key not in copies:
        with torch.inference_mode(False):
            copies[key] = t.detach().clone()
    return copies[key]


class Within(threading.local):
    """How many of a library's methods this thread is in."""

    entered = 0

    def __enter__(self) -> None:
        self.entered += 1

    def __exit__(self, *_: object) -> None:
        self.entered -= 1


class Ledger:
    """What was computed without the dense tensor, and what asked for it.

    Attributes:
        calls: products with the encoder that were left.
        dense: name of an operation -> how often it was given a dense tokens x features tensor.
        crowded_from: the share of active pairs from which the dense tensor is made, since codes of
            24 bytes a pair would be no smaller. crowded: how often that was so.
        within: whether this thread is in a call whose products are left, of code that does not
            write to what it reads.
    """

    def __init__(self, name: str):
        self.name = name
        self.calls = 0
        self.dense: Counter[str] = Counter()
        self.crowded_from = 0.1
        self.crowded = 0
        self.within = Within()
        # tensors that may be computed later, by id
        self.unread: dict[int, weakref.ref[Lazy]] = {}

    def keep(self) -> None:
        """Have what may be computed later read copies of parameters that are about to be written to
        past their versions."""
        copies: Copies = {}
        for reference in list(self.unread.values()):
            if (t := reference()) is not None:
                t._read_copies(copies)

    def looked(self, what: str, shape: Sequence[object]) -> None:
        if what not in self.dense:
            warnings.warn(
                f"{self.name}: {what} needs the dense {list(shape)} tensor, which is made for it; "
                f"report.dense counts such operations",
                RuntimeWarning,
                stacklevel=5,
            )
        self.dense[what] += 1


class Node:
    """What a Lazy tensor stands for.

    Attributes:
        shape, dtype, device: of the dense tensor.
        ledger: where looks are counted.
        counted: whether they are: the tensor is one of tokens x features.
    """

    counted = True

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    ledger: Ledger

    def tensors(self) -> list[torch.Tensor]:
        """What it is a function of."""
        raise NotImplementedError

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> Node:
        """The same function of others."""
        raise NotImplementedError

    def sources(self) -> list[torch.Tensor]:
        """What it reads that must not be changed as long as it is asked."""
        return []

    def fresh(self) -> bool:
        """Whether all of its numbers can be had: what they are computed from was not changed."""
        return True

    def reading(self, copies: Copies) -> Node:
        """The same function of copies of the parameters that it reads."""
        return self

    def dense(self) -> torch.Tensor:
        """The numbers, under autograd."""
        raise NotImplementedError

    def detached(self) -> Node:
        return self.with_tensors([t.detach() for t in self.tensors()])

    def op_detach(self) -> Node:
        return self.detached()


class _Enter(torch.autograd.Function):
    """Puts a wrapper into autograd's graph: its gradient is that of the dense tensor."""

    @staticmethod
    def forward(ctx, wrapper, node, *tensors):
        ctx.node = node
        ctx.save_for_backward(*tensors)
        ctx.mark_dirty(wrapper)
        return wrapper

    @staticmethod
    def backward(ctx, grad):
        leaves = [t.detach().requires_grad_(t.requires_grad) for t in ctx.saved_tensors]
        wanted = [t for t in leaves if t.requires_grad]
        with _plainly(), torch.enable_grad():
            dense = ctx.node.with_tensors(leaves).dense()
        grads = iter(torch.autograd.grad(dense, wanted, grad, allow_unused=True))
        return (None, None, *(next(grads) if t.requires_grad else None for t in leaves))


class _Leave(torch.autograd.Function):
    """The dense tensor with the gradient that autograd knows of the wrapper."""

    @staticmethod
    def forward(ctx, wrapper, dense):
        return dense.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Lazy(torch.Tensor):
    """See the module's docstring; made by `lazy(node)`."""

    _node: Node
    # what the node reads, as it was
    _sources: Snapshot
    # made once, and its version then; -1: the node is not asked any more
    _dense: torch.Tensor | None
    _seen: int
    _used: bool
    # what it is a view of, and how that is taken; its own views
    _of: weakref.ref[Lazy] | None
    _how: Callable[[torch.Tensor], torch.Tensor]
    _views: list[weakref.ref[Lazy]]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = _name(func)
        if name in KNOWN or (name == "grad" and _is_leaf(args[0])):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if name in LIKE:
            none = torch.empty(0, dtype=args[0].dtype, device=args[0].device)
            return func(none, *_given(name, args[1:]), **_given(name, kwargs))
        if func is torch.autograd.grad:
            for t in _lazies([args[1:2], kwargs.get("inputs")]):
                t._watch("torch.autograd.grad")
        elif name in WATCHED:
            for t in _lazies(args):
                t._watch(name)
        elif name in ESCAPES:
            for t in _lazies(args):
                t._look(name)
                t._escape()
        elif (found := _answer(func, name, args, kwargs)) is not NotImplemented:
            return found
        return func(*_given(name, args), **_given(name, kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # below autograd: the numbers alone
        if func is torch.ops.aten.detach.default and isinstance(args[0], Lazy):
            return args[0]._shared(lazy(args[0]._node.detached()), torch.Tensor.detach)
        name = func.overloadpacket.__name__
        found = func(*_given(name, args), **_given(name, kwargs or {}))
        return args[0] if func._schema.is_mutable and isinstance(args[0], Lazy) else found

    def _current(self) -> bool:
        """Whether the node says what the tensor is."""
        made = self._dense
        if made is not None and not (version_of(made) == self._seen and self._node.fresh()):
            return False
        return unchanged(self._sources) and self._in_graph() == _has_gradient(self._node)

    def _in_graph(self) -> bool:
        with torch._C.DisableTorchFunctionSubclass():
            return self.requires_grad

    def _shared(self, view: Lazy, how: Callable[[torch.Tensor], torch.Tensor]) -> Lazy:
        """`view` of the same numbers, as one that sees what becomes of them."""
        base = None if self._of is None else self._of()
        if base is not None:
            # of what may outlive this one
            mine = self._how
            return base._shared(view, lambda dense: how(mine(dense)))
        view._of, view._how = weakref.ref(self), how
        self._views.append(weakref.ref(view))
        if self._dense is not None:
            view._keep(self._taken(view))
            if self._seen == -1:
                view._seen = -1
        return view

    def _family(self) -> Iterator[Lazy]:
        for reference in (self._of, *self._views):
            if reference is not None and (t := reference()) is not None:
                yield t

    def _taken(self, view: Lazy) -> torch.Tensor:
        """A view's dense tensor."""
        assert self._dense is not None
        with _plainly(), torch.set_grad_enabled(view._in_graph()):
            return view._how(self._dense)

    def _keep(self, made: torch.Tensor) -> None:
        self._dense = made
        if self._seen != -1:
            self._seen = version_of(made)
        for reference in self._views:
            if (view := reference()) is not None and view._dense is None:
                view._keep(self._taken(view))

    def _escape(self) -> None:
        self._seen = -1
        for t in self._family():
            if t._seen != -1:
                t._escape()

    def _watch(self, name: str) -> None:
        if self._used and name != "grad":
            raise RuntimeError(
                f"{self._node.ledger.name}: {name} must come before the tensor is used, got one "
                f"that went into a product by its codes; call retain_grad() of it in a hook, or "
                f"report.restore() first"
            )
        self._seen = -1

    def _look(self, what: str) -> torch.Tensor:
        if self._dense is None:
            base = None if self._of is None else self._of()
            if base is not None:
                base._look(what)
            else:
                if self._node.counted:
                    self._node.ledger.looked(what, self.shape)
                self._keep(self._made(what))
        made = self._dense
        assert made is not None
        if self._in_graph() and not made.requires_grad:
            # made below autograd, or made a leaf since
            with _plainly(), torch.enable_grad():
                made = self._dense = _Leave.apply(self, made)
        return made

    def _made(self, what: str) -> torch.Tensor:
        """The dense tensor; that nobody asks for a gradient now does not say that nobody will."""
        if not unchanged(self._sources):
            raise changed(self._node.ledger, what, self.shape)
        node = self._node
        if self._in_graph() != _has_gradient(node):
            node = node.detached()
        with _plainly(), torch.enable_grad():
            return node.dense()

    def _read_copies(self, copies: Copies) -> None:
        if self._dense is not None:
            self._escape()
        elif unchanged(self._sources) and self._node.fresh():
            self._node = self._node.reading(copies)
            self._sources = snapshot(self._node.sources())

    def _become(self, node: Node) -> Lazy:
        """Change in place."""
        self._node, self._sources = node, snapshot(node.sources())
        self._dense, self._seen, self._used = None, 0, False
        _enter(self)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return self._look("deepcopy").detach().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._look("pickle").detach().clone().__reduce_ex__(protocol)


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    """What is computed in it is no product of a library's, and may have a gradient."""
    with torch._C.DisableTorchFunction(), torch.inference_mode(False):
        yield


def _has_gradient(node: Node) -> bool:
    return any(t.requires_grad for t in node.tensors())


def _is_leaf(t: Any) -> bool:
    """Whether gradients are collected at the wrapper itself."""
    if not isinstance(t, Lazy):
        return False
    with torch._C.DisableTorchFunctionSubclass():
        return t.requires_grad and t.is_leaf


def lazy(node: Node) -> Lazy:
    if not torch.is_grad_enabled() and _has_gradient(node):
        # a later use of it, with gradients, has none beyond here
        node = node.detached()
    made = torch.Tensor._make_wrapper_subclass(
        Lazy, node.shape, dtype=node.dtype, device=node.device
    )
    made._node, made._dense, made._seen, made._used = node, None, 0, False
    made._sources, made._of, made._views = snapshot(node.sources()), None, []
    if type(node).reading is not Node.reading:
        key, unread = id(made), node.ledger.unread
        unread[key] = weakref.ref(made, lambda _: unread.pop(key, None))
    _enter(made)
    return made


def _enter(made: Lazy) -> None:
    if torch.is_grad_enabled() and made._node.dtype.is_floating_point:
        tensors = made._node.tensors()
        if _has_gradient(made._node):
            with torch._C.DisableTorchFunctionSubclass():
                _Enter.apply(made, made._node, *tensors)


def _name(func: Any) -> str:
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__", "__delete__"):
        return getattr(func.__self__, "__name__", name)
    return name


def _lazies(values: Any) -> Iterator[Lazy]:
    if isinstance(values, Lazy):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _lazies(value)
    elif isinstance(values, dict):
        yield from _lazies(list(values.values()))


def _given(name: str, values: Any) -> Any:
    """`values` with dense tensors in the place of lazy ones."""
    if isinstance(values, Lazy):
        return values._look(name)
    if isinstance(values, list | tuple):
        parts = [_given(name, value) for value in values]
        return type(values)(*parts) if hasattr(values, "_fields") else type(values)(parts)
    if isinstance(values, dict):
        return {key: _given(name, value) for key, value in values.items()}
    return values


# the same operation under its other names
SAME = {
    **{
        f"__{name}__": name
        for name in ("add", "mul", "sub", "matmul", "gt", "ge", "ne", "eq", "abs")
    },
    **{"__radd__": "add", "__rmul__": "mul"},
    **{"__truediv__": "div", "true_divide": "div", "divide": "div", "multiply": "mul"},
    **{"__itruediv__": "idiv", "__rsub__": "rsub", "subtract": "sub", "mm": "matmul"},
    **{"greater": "gt", "greater_equal": "ge", "not_equal": "ne", "__neg__": "neg"},
    **{"__pow__": "pow", "view": "reshape", "absolute": "abs"},
    **{"__getitem__": "getitem", "__setitem__": "setitem"},
}
# with the operands exchanged; of what is not here the second operand cannot be left
REFLECTED = {"add": "add", "mul": "mul", "sub": "rsub"}


# what gives a view, and what gives the tensor itself where it is of that dtype already
VIEWS = {"detach", "getitem", "split", "reshape", "flatten"}
ITSELF = {"contiguous", "to_dense", "to", "type", "float", "double", "bool", "int", "long"}


def _answer(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """What the node of the first lazy argument says, or NotImplemented."""
    if not args:
        return NotImplemented
    name = SAME.get(name, name)
    at = 0
    if name == "rsub":
        # torch.rsub(a, b) is b - a
        args = (args[1], args[0], *args[2:])
        name = "sub"
    if not isinstance(args[0], Lazy):
        at = next((i for i, value in enumerate(args) if isinstance(value, Lazy)), -1)
        if at < 0:
            return NotImplemented
        name = f"where{at}" if name == "where" else REFLECTED.get(name, "")
    owner = args[at]
    if not all(t._current() for t in _lazies(args)) or any(True for _ in _lazies(kwargs)):
        return NotImplemented
    method: Any = getattr(owner._node, f"op_{name}", None)
    if method is None:
        return NotImplemented
    others = (*args[:at], *args[at + 1 :])
    in_place = getattr(method, "in_place", False)
    no_graph = owner._in_graph() and not torch.is_grad_enabled()
    if in_place and (no_graph or next(owner._family(), None) is not None):
        # others see it too, or the graph does not
        return NotImplemented
    if not _fits(method.__func__, others, kwargs):
        return NotImplemented
    with contextlib.suppress(Unknown):
        found = method(*others, **kwargs)
        if found is NotImplemented:
            return found
        owner._used |= torch.is_grad_enabled()
        if in_place:
            return owner._become(found)
        if name in ITSELF and found.dtype == owner.dtype:
            return owner
        made = lazy(found) if isinstance(found, Node) else _wrapped(found)
        if name in VIEWS:
            views = list(_lazies(made))
            for i, view in enumerate(views):
                one = isinstance(made, Lazy)
                how = functools.partial(_part, func, others, kwargs, None if one else i)
                owner._shared(view, how)
        return made
    return NotImplemented


def _part(func: Any, others: Any, kwargs: Any, i: int | None, dense: torch.Tensor) -> torch.Tensor:
    found = func(dense, *others, **kwargs)
    return found if i is None else found[i]


def _fits(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a method takes these arguments (3 us a call)."""
    try:
        _signature(function).bind(None, *args, **kwargs)
    except TypeError:
        return False
    return True


@functools.cache
def _signature(function: Any) -> inspect.Signature:
    return inspect.signature(function)


def _wrapped(found: Any) -> Any:
    if type(found) is tuple or type(found) is list:
        return type(found)(lazy(f) if isinstance(f, Node) else f for f in found)
    return found


class Unknown(Exception):
    """Arguments that a node does not know."""


def known(condition: object) -> None:
    """Has the operation computed on the dense tensor unless the condition holds."""
    if not condition:
        raise Unknown
