# SPDX-License-Identifier: Apache-2.0
"""A double model all in double: transformers takes norms, softmax and routers in single."""

import torch
from torch.overrides import TorchFunctionMode


class Doubles(TorchFunctionMode):
    """Within it, nothing turns a float64 tensor into a float32 one."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64:
            if func is torch.Tensor.float:
                return args[0]
            args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)
