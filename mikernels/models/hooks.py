# SPDX-License-Identifier: Apache-2.0
"""Running a model so that the hooks on its modules fire.

Compiled code leaves out hooks that were registered after it was compiled, or calls them for some
shapes only. So a model that is watched runs as the Python that it was compiled from.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

NEVER = (
    "code compiled by other means than torch.compile (scripted, exported, captured in a CUDA "
    "graph) fires no hooks: give the model as it was before"
)


class _Stance:
    """torch's stance "force_eager" while anybody needs it; blocks of several threads may end in any
    order."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._forced: Any = None

    @contextmanager
    def forced(self) -> Iterator[None]:
        with self._lock:
            if self._count == 0:
                self._forced = torch.compiler.set_stance("force_eager")
                self._forced.__enter__()
            self._count += 1
        try:
            yield
        finally:
            with self._lock:
                self._count -= 1
                if self._count == 0:
                    self._forced.__exit__(None, None, None)


_STANCE = _Stance()


def eager() -> AbstractContextManager[Any]:
    """While it is entered, whatever `torch.compile` made runs uncompiled, to its own rounding.

    Holds for models, submodules (also `module.compile()`) and functions, in the whole process. Some
    10 us where something was compiled, nothing elsewhere.
    """
    # it is imported by the first torch.compile, and takes a second
    return _STANCE.forced() if "torch._dynamo" in sys.modules else nullcontext()


def original(model: Any) -> Any:
    """What `torch.compile(model)` was made from; any other object itself."""
    return getattr(model, "_modules", {}).get("_orig_mod", model)


def returned(output: Any) -> Any:
    """What a module returned, without what some return beside it (attention weights, router)."""
    return output[0] if isinstance(output, tuple | list) else output


def in_place_of(output: Any, tensor: torch.Tensor) -> Any:
    """What a module returned, with another tensor in the place of `returned`."""
    if isinstance(output, tuple):
        parts = (tensor, *output[1:])
        # a named tuple keeps its names
        return type(output)(*parts) if hasattr(output, "_fields") else parts
    return [tensor, *output[1:]] if isinstance(output, list) else tensor


def compiled_part(model: torch.nn.Module) -> str | None:
    """The name of a module that is compiled or scripted, in words; None without any."""
    for name, module in model.named_modules():
        made = (
            "_orig_mod" in module._modules
            or getattr(module, "_compiled_call_impl", None) is not None
            or isinstance(module, torch.jit.ScriptModule)
            or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
        )
        if made:
            return f"{name} ({type(module).__name__})" if name else type(module).__name__
    return None


def check_uncompiled(where: str, model: torch.nn.Module) -> None:
    """Refuses models of which something is compiled: what is replaced in them may not be seen.

    Raises:
        ValueError: with the place.
    """
    if (part := compiled_part(model)) is not None:
        raise ValueError(
            f"{where}: model must run as Python modules, got compiled {part}; give the model as "
            f"it was before torch.compile or torch.jit"
        )


def _drops(module: torch.nn.Module) -> bool:
    """Whether it is in training mode and drops numbers in it."""
    if isinstance(module, torch.nn.modules.dropout._DropoutNd):
        return module.training and module.p > 0
    rates = (value for name, value in vars(module).items() if "dropout" in name)
    return module.training and any(isinstance(rate, float) and rate > 0 for rate in rates)


def check_eval(where: str, model: torch.nn.Module, dropout_only: bool = False) -> None:
    """Refuses models that drop numbers at random.

    Args:
        dropout_only: training mode by itself says nothing.

    Raises:
        ValueError: in training mode, the whole or a part with dropout.
    """
    if (model.training and not dropout_only) or any(map(_drops, model.modules())):
        raise ValueError(
            f"{where}: model must be in eval mode, got training mode, in which dropout makes "
            f"gradients random; call model.eval()"
        )


def check_one_dtype(where: str, model: torch.nn.Module) -> None:
    """Refuses autocast, under which products are computed in another dtype than the weights'.

    Raises:
        ValueError: within `torch.autocast` of the model's device.
    """
    device = next(model.parameters()).device.type
    if torch.is_autocast_enabled(device):
        dtype = str(torch.get_autocast_dtype(device)).removeprefix("torch.")
        raise ValueError(
            f"{where}: model must compute in the dtype of its weights, got torch.autocast "
            f"({dtype}); call it outside, with model.to(torch.{dtype}) to compute in {dtype}"
        )


def check_fires(where: str, model: torch.nn.Module, watched: Iterable[torch.nn.Module]) -> None:
    """Refuses modules inside of scripted ones, which are not called as modules.

    Raises:
        ValueError: with the place.
    """
    inner: dict[torch.nn.Module, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            inner |= {part: name for part in module.modules() if part is not module}
    for module in watched:
        if module in inner:
            raise ValueError(
                f"{where}: model must run as Python modules, got a scripted "
                f"{inner[module] or 'model'} with {type(module).__name__} inside; {NEVER}"
            )


@contextmanager
def frozen(model: torch.nn.Module) -> Iterator[None]:
    """Gradients on, also within the caller's no_grad and inference_mode; but of no parameter."""
    trained = [p for p in model.parameters() if p.requires_grad]
    # switches gradients on, also within no_grad
    with torch.inference_mode(False):
        try:
            for p in trained:
                p.requires_grad_(False)
            yield
        finally:
            for p in trained:
                p.requires_grad_(True)
