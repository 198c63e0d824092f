# SPDX-License-Identifier: Apache-2.0
"""Matrices of features that lie in memory by feature.

SAELens stores the encoder as `[d, F]`, dictionary_learning the decoder so, and some of its encoders
`[F, d]` as a transpose. Kernels read and write rows of a feature; with the parameter's storage laid
out so (its shape stays) neither the matrix nor its gradient is copied, and Adam's elementwise
passes run as before. What `state_dict` gives is contiguous, as safetensors wants it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from mikernels.integrations.handle import Handle


def lies_by_feature(t: torch.Tensor) -> bool:
    return t.dim() == 2 and t.T.is_contiguous()


def _laid(t: torch.Tensor, axis: int) -> torch.Tensor:
    """With the features, of this axis, as rows in memory."""
    return t.T.contiguous().T if axis else t.contiguous()


def _contiguous(module: Any, state: Any, prefix: str, metadata: Any) -> None:
    """Of `state_dict`: what is laid by feature is given out contiguous."""
    for name, t in state.items():
        # with keep_vars they are the parameters themselves
        given = isinstance(t, torch.Tensor) and not isinstance(t, torch.nn.Parameter)
        if given and t.dim() == 2 and name.startswith(prefix):
            state[name] = t.contiguous()


def lay_by_feature(
    handle: Handle,
    module: torch.nn.Module,
    names: dict[str, int],
    optimizers: list[torch.optim.Optimizer],
) -> None:
    """Lays parameters out by feature, with the optimisers' state, until the handle is removed.

    Args:
        names: of parameters, and which of their axes is the features'.
    """
    hook = module.register_state_dict_post_hook(_contiguous)
    handle.on_remove(hook.remove)
    for name, axis in names.items():
        p = module.get_parameter(name)
        if not (lies_by_feature(p) if axis else p.is_contiguous()):
            # what lies neither way comes back contiguous
            before = 1 if lies_by_feature(p) else 0
            _change(p, axis, optimizers)
            handle.on_remove(functools.partial(_change, p, before, optimizers))


def _change(p: torch.nn.Parameter, axis: int, optimizers: list[torch.optim.Optimizer]) -> None:
    p.data = _laid(p.data, axis)
    if p.grad is not None:
        p.grad = _laid(p.grad, axis)
    for optimizer in optimizers:
        state = optimizer.state.get(p, {})
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == p.shape:
                state[key] = _laid(value, axis)
