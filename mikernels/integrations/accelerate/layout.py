# SPDX-License-Identifier: Apache-2.0
"""Matrices `[m, F]` that lie in memory by feature.

SAELens stores the encoder as `[d, F]`, dictionary_learning the decoder so. Kernels read and write
rows of a feature; with the parameter's storage transposed (its shape stays) neither the matrix nor
its gradient is copied, and Adam's elementwise passes run as before. What `state_dict` gives is
contiguous, as safetensors wants it.
"""

from __future__ import annotations

from typing import Any

import torch

from mikernels.integrations.handle import Handle


def lies_by_feature(t: torch.Tensor) -> bool:
    return t.dim() == 2 and t.T.is_contiguous()


def _lay(t: torch.Tensor) -> torch.Tensor:
    return t.T.contiguous().T


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
    names: list[str],
    optimizers: list[torch.optim.Optimizer],
) -> None:
    """Lays parameters out by feature, with the optimisers' state, until the handle is removed."""
    parameters = [p for n in names if not lies_by_feature(p := module.get_parameter(n))]
    hook = module.register_state_dict_post_hook(_contiguous)
    handle.on_remove(hook.remove)

    def change(to: Any) -> None:
        for p in parameters:
            p.data = to(p.data)
            if p.grad is not None:
                p.grad = to(p.grad)
            for optimizer in optimizers:
                state = optimizer.state.get(p, {})
                for key, value in state.items():
                    if isinstance(value, torch.Tensor) and value.shape == p.shape:
                        state[key] = to(value)

    change(_lay)
    handle.on_remove(lambda: change(torch.Tensor.contiguous))
