# SPDX-License-Identifier: Apache-2.0
"""Operator registration: one schema, one reference, one owner per dispatch key.

`torch.library.define` + `impl` costs 3.9 us a call where `custom_op` costs 10.7 (torch 2.13), and
an `autograd.Function` outside the operator is cheaper than `register_autograd`. The reference is
registered as CompositeExplicitAutograd: an operator never disappears with its compiler.

Operators that write their arguments are guarded once, whatever runs: written tensors must share no
memory, and autograd is told (the version counters that make a stale backward raise). The guard is a
kernel of the BackendSelect key, which every call of real tensors passes, those of inference mode
too; it costs 4 us (2 us without checks), and functional operators have none.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.autograd.graph import increment_version

from mikernels import _ext, _triton
from mikernels._autocast import in_own_dtype
from mikernels._crossover import Dense
from mikernels._memory import check_writes
from mikernels._operands import FLOATS as FLOATS
from mikernels._operands import Operands
from mikernels._operands import accumulate_dtype as accumulate_dtype
from mikernels._ops import add_op_namespace_prefix, ops

LIBRARY = torch.library.Library(add_op_namespace_prefix("").removesuffix("::"), "DEF")
IMPLS = ("cpp", "triton", "cuda", "reference")
OPS: dict[str, Op] = {}
# what is left of a call's dispatch keys behind the guard
_BACKENDS = torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.BackendSelect)


@functools.cache
def _warn_slow(device: str) -> None:
    """Once a process: operators run as plain torch on this kind of device, why, and the mend."""
    if device == "cpu":
        why = _ext.MISSING
    elif device == "cuda":
        why = _triton.missing()
    else:
        why = f"there are none for {device}; move what you compute to the CPU or a CUDA device"
    if why:
        warnings.warn(
            f"mikernels: {device} tensors run in plain PyTorch, several times slower, because the "
            f"kernels are absent: {why} (`mikernels info` shows all)",
            RuntimeWarning,
            stacklevel=2,
        )


class Op:
    """A registered operator, which callers run by calling it.

    Which implementation runs is decided here alone: `impl`, else MIKERNELS_IMPL, else "auto", the
    best one for the device and, where there is a dense alternative, for the sizes. A named one runs
    or raises with the reason. `default` is the operator as registered: for implementations made of
    others, and for measurements of what `auto` decides.

    Args:
        schema, reference, fake: as for `torch.library`.
        triton: launcher of mikernels.kernels ("room.module:function") with the schema's arguments.
            It owns the CUDA dispatch key (ROCm's too) where Triton is installed and CUDA C++ is not
            built; else the reference runs there.
        operands: what its arguments have to be, by name (see mikernels/_operands.py).
        cuda: csrc/cuda/<name>.cu implements it, as the operator <name>_cuda. It owns the CUDA key
            where it was built, on devices that it was built for; Triton's is then <name>_triton.
        cpu: owns the CPU key where the extension is built; for operators that csrc/cpu/ does not
            register itself because they are made of others that it does.
        dense: what "auto" runs where products win over slots. For operators that write nothing.
    """

    def __init__(
        self,
        schema: str,
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        *,
        operands: Mapping[str, str],
        triton: str | None = None,
        cuda: bool = False,
        cpu: Callable[..., Any] | None = None,
        dense: Dense | None = None,
    ):
        self.name = schema.split("(", 1)[0]
        self.schema = schema
        LIBRARY.define(schema)
        self.default = getattr(ops, self.name).default
        arguments = self.default._schema.arguments
        self._names = tuple(a.name for a in arguments)
        self.written = tuple(
            i for i, a in enumerate(arguments) if a.alias_info and a.alias_info.is_write
        )
        optional = {a.name for a in arguments if isinstance(a.type, torch.OptionalType)}
        self.operands = Operands(self.name, self._names, operands, optional)
        self.reference = self._checked(reference)
        self._triton = None if triton is None else self._checked(_triton.launcher(triton))
        LIBRARY.impl(self.name, self._without_kernel, "CompositeExplicitAutograd")
        self._cuda = cuda
        self._cuda_op, self._triton_op = self._on_gpu(fake)
        if cpu is not None and _ext.C is not None:
            LIBRARY.impl(self.name, self._checked(cpu), "CPU")
        # asked here, because torch.compile cannot trace the question
        self._has_cpp = torch._C._dispatch_has_kernel_for_dispatch_key(
            add_op_namespace_prefix(self.name), "CPU"
        )
        self._dense = dense
        self._fake = fake
        # late: what `traced` is may change
        torch.library.register_fake(
            add_op_namespace_prefix(self.name), lambda *args: self.traced(*args), lib=LIBRARY
        )
        if self.written:
            for overload in (self.default, self._cuda_op, self._triton_op):
                if overload is not None:
                    self._guard(overload)
        OPS[self.name] = self

    def _checked(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """`run` behind the checks of its operands, in their own dtype."""

        def checked(*args: Any) -> Any:
            if not torch.compiler.is_compiling():
                self.operands.check(args)
            return run(*args)

        return in_own_dtype(checked)

    def _without_kernel(self, *args: Any) -> Any:
        """The reference where nobody asked for it: on a device whose kernels are absent."""
        _warn_slow(_triton.first_tensor(args).device.type)
        return self.reference(*args)

    def _guard(self, overload: torch._ops.OpOverload) -> None:
        """Checks and version counters for every call of an operator that writes."""

        def guarded(keys: torch._C.DispatchKeySet, *args: Any) -> Any:
            return self._guarded(lambda *a: overload.redispatch(keys & _BACKENDS, *a), args)

        name = overload._schema.name.removeprefix(add_op_namespace_prefix(""))
        LIBRARY.impl(name, guarded, "BackendSelect", with_keyset=True)

    def _guarded(self, run: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        if not self.written:
            return run(*args)
        check_writes(self.name, self._names, args, self.written)
        result = run(*args)
        increment_version([args[i] for i in self.written if args[i] is not None])
        return result

    def _on_gpu(
        self, fake: Callable[..., Any]
    ) -> tuple[torch._ops.OpOverload | None, torch._ops.OpOverload | None]:
        """Registers what runs on a GPU; the operators that CUDA C++ and Triton have by name."""
        launched = self._triton is not None and not _triton.missing()
        built = hasattr(ops, f"{self.name}_cuda")
        if launched or built:
            LIBRARY.impl(self.name, self._on_device, "CUDA")
        if launched and built:
            LIBRARY.define(f"{self.name}_triton{self.schema.removeprefix(self.name)}")
            LIBRARY.impl(f"{self.name}_triton", self._by_triton, "CUDA")

        def named(suffix: str) -> torch._ops.OpOverload:
            name = f"{self.name}_{suffix}"
            torch.library.register_fake(add_op_namespace_prefix(name), fake, lib=LIBRARY)
            return getattr(ops, name).default

        return named("cuda") if built else None, named("triton") if launched and built else None

    def _owner_on_gpu(self, args: tuple[Any, ...]) -> str:
        device = _triton.first_tensor(args).device
        if (
            self._cuda_op is not None
            and not _triton.holds_fp64(args)
            and not _ext.cuda_unsupported(device)
        ):
            return "cuda"
        return "triton" if self._triton is not None and _triton.takes(args) else "reference"

    def _on_device(self, *args: Any) -> Any:
        name = self._owner_on_gpu(args)
        if name == "cuda":
            assert self._cuda_op is not None
            return self._cuda_op(*args)
        if name == "triton":
            return self._by_triton(*args)
        with torch.cuda.device(_triton.first_tensor(args).device):
            return self.reference(*args)

    def _by_triton(self, *args: Any) -> Any:
        assert self._triton is not None
        # Triton launches on the current device
        with torch.cuda.device(_triton.first_tensor(args).device):
            return self._triton(*args)

    def __call__(self, *args: Any, impl: str | None = None, dense: bool = True) -> Any:
        """Run it; `impl` as in `resolve`, `dense=False` by slots whatever their number."""
        name = impl or os.environ.get("MIKERNELS_IMPL") or "auto"
        if name == "auto":
            if self._dense is not None and dense and self._dense.wins(args):
                return self._dense.run(*args)
            return self.default(*args)
        if name == "reference":
            return self._guarded(self.reference, args)
        device = _triton.first_tensor(args).device
        self._require(name, device)
        if name == "cuda":
            assert self._cuda_op is not None
            return self._cuda_op(*args)
        if name == "triton" and not _triton.takes(args):
            raise RuntimeError(
                f"{self.name}: impl='triton' takes float32, bfloat16 and float16 tensors, got "
                f"float64; convert them, or leave impl out"
            )
        if name == "triton" and device.type == "cpu":
            # the interpreter; on a GPU the dispatcher leads to Triton, also under torch.compile
            assert self._triton is not None
            return self._guarded(self._triton, args)
        if name == "triton" and self._triton_op is not None:
            return self._triton_op(*args)
        return self.default(*args)

    def traced(self, *args: Any) -> Any:
        """What torch.compile, torch.export and fake tensors see of a call."""
        return self._fake(*args)

    def owner(self, args: tuple[Any, ...]) -> tuple[str, str]:
        """The implementation that `default` leads to, and why."""
        device = _triton.first_tensor(args).device
        if device.type == "cpu":
            if self._has_cpp:
                return "cpp", "CPU tensors"
            return "reference", f"no C++ for CPU tensors: {self.state('cpp')}"
        if device.type != "cuda":
            return "reference", f"nothing else takes {device.type} tensors"
        name = self._owner_on_gpu(args) if self._cuda_op or self._triton else "reference"
        if name == "cuda":
            return name, "CUDA tensors"
        if _triton.holds_fp64(args):
            return name, "float64, which only the reference takes on a GPU"
        reason = f"no CUDA C++: {_ext.cuda_unsupported(device) if self._cuda_op else 'not built'}"
        if not self._cuda:
            reason = "CUDA tensors, and no CUDA C++ is written"
        if name == "reference":
            why = _triton.unsupported(device) if self._triton else "not written"
            reason = f"{reason}; no Triton: {why}"
        return name, reason

    def choice(self, args: tuple[Any, ...], impl: str | None, dense: bool) -> tuple[str, str]:
        """What a call runs, "dense" or an implementation's name, and why: for people to read."""
        name = impl or os.environ.get("MIKERNELS_IMPL") or "auto"
        if name != "auto":
            return name, f"impl={name!r}" if impl else f"MIKERNELS_IMPL={name}"
        if self._dense is None or not dense:
            name, why = self.owner(args)
        elif self._dense.wins(args):
            name, why = "dense", self._dense.reason(args)
        else:
            name, why = self.owner(args)
            why = f"{why}; {self._dense.reason(args)}"
        return name, f"auto: {why}"

    def run_as(self, name: str, args: tuple[Any, ...]) -> Any:
        """Run what `choice` named, or raise."""
        if name != "dense":
            return self(*args, impl=name)
        if self._dense is None:
            raise ValueError(f"{self.name}: impl must have a dense alternative here, got none")
        return self._dense.run(*args)

    def resolve(self, impl: str | None, device: torch.device) -> str:
        """`impl`, else MIKERNELS_IMPL, else "auto"; a named one is available there or this raises.

        For functions that launch several operators, now or in their backward: the environment is
        asked once, and what cannot run is refused before anything does.
        """
        name = impl or os.environ.get("MIKERNELS_IMPL") or "auto"
        if name not in ("auto", "reference"):
            self._require(name, device)
        return name

    def _require(self, name: str, device: torch.device) -> None:
        """Raises unless the implementation of this name is available on the device."""
        if name not in IMPLS:
            raise ValueError(f"{self.name}: impl must be one of {['auto', *IMPLS]}, got {name!r}")
        state = self.state(name)
        if state != "ready":
            raise RuntimeError(f"{self.name}: impl={name!r} is not available: {state}")
        if name == "triton":
            reason = _triton.unsupported(device)
        elif name == "cuda":
            reason = _ext.cuda_unsupported(device)
        else:
            reason = "" if device.type == "cpu" else f"runs on cpu tensors, got {device}"
        if reason:
            raise RuntimeError(f"{self.name}: impl={name!r} {reason}")

    def state(self, name: str) -> str:
        """As in `backends`, of one."""
        if name == "cpp":
            return "ready" if self._has_cpp else (_ext.MISSING or "not written")
        if name == "triton":
            return "not written" if self._triton is None else _triton.missing() or "ready"
        if name == "cuda":
            if not self._cuda:
                return "not written"
            return "ready" if self._cuda_op is not None else _ext.cuda_missing()
        return "ready"

    def backends(self) -> dict[str, str]:
        """Backend -> "ready", or the reason why it is absent."""
        return {name: self.state(name) for name in ("reference", "cpp", "triton", "cuda")}


def check_floating(op: str, **tensors: torch.Tensor | None) -> None:
    """All given tensors share one supported floating dtype and one device."""
    given = {name: t for name, t in tensors.items() if t is not None}
    first_name, first = next(iter(given.items()))
    for name, t in given.items():
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(t).__name__}")
        if t.dtype not in FLOATS:
            raise TypeError(
                f"{op}: {name} must be float32, bfloat16, float16 or float64, got {t.dtype}; "
                f"convert it with {name}.float()"
            )
        if t.dtype != first.dtype:
            raise TypeError(
                f"{op}: {name} must have the dtype of {first_name} ({first.dtype}), got {t.dtype}; "
                f"convert one of them"
            )
        if t.device != first.device:
            raise ValueError(
                f"{op}: {name} must be on the device of {first_name} ({first.device}), "
                f"got {t.device}; move one of them"
            )


def check_shape(op: str, name: str, tensor: torch.Tensor | None, expected: tuple[int, ...]) -> None:
    """`tensor` is None or has exactly the expected shape."""
    if tensor is not None and not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor is not None and tuple(tensor.shape) != expected:
        raise ValueError(f"{op}: {name} must have shape {list(expected)}, got {list(tensor.shape)}")


def check_out(
    op: str,
    out: torch.Tensor,
    shape: tuple[int, ...],
    dtypes: Sequence[torch.dtype],
    operands: Mapping[str, torch.Tensor | None],
    *,
    differentiable: bool = False,
) -> torch.Tensor:
    """`out` may be added to: of this shape, one of these dtypes and the first operand's device,
    part of no graph, and memory of its own for every entry.

    If the operator is `differentiable`, operands that would be recorded are refused.
    """
    check_shape(op, "out", out, shape)
    like = next(t for t in operands.values() if t is not None)
    if out.dtype not in dtypes:
        expected = " or ".join(map(str, dict.fromkeys(dtypes)))
        raise TypeError(f"{op}: out must be {expected} for {like.dtype} operands, got {out.dtype}")
    if out.device != like.device:
        raise ValueError(f"{op}: out must be on {like.device}, got {out.device}; move it")
    if out.layout != torch.strided:
        raise TypeError(f"{op}: out must be dense, got {out.layout}; pass out.to_dense()")
    if out.requires_grad:
        raise ValueError(f"{op}: out must not require grad; pass out.detach() or leave out out")
    recorded = any(t is not None and t.requires_grad for t in operands.values())
    if differentiable and torch.is_grad_enabled() and recorded:
        raise ValueError(
            f"{op}: with out, nothing is recorded for gradients, got operands that require them; "
            f"call it under torch.no_grad(), or leave out out"
        )
    # what is traced has no memory yet; the operator checks again when it runs
    if not torch.compiler.is_compiling():
        check_writes(op, ("out", *operands), (out, *operands.values()), (0,))
    return out


def check_k(op: str, k: int, limit: int, what: str) -> None:
    """k is an int in 1..limit."""
    if isinstance(k, bool) or not isinstance(k, int | torch.SymInt):
        raise TypeError(f"{op}: k must be an int, got {type(k).__name__}")
    if k < 1 or k > limit:
        raise ValueError(f"{op}: k must be in 1..{limit} ({what}), got {k}")
