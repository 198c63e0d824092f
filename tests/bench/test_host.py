# SPDX-License-Identifier: Apache-2.0
"""What is launched by a call, counted by the tool that times its cost for the host."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from mikernels.bench.gpu import host
from mikernels.kernels.sae.gradients_row_sum import weighted_row_sum


def test_launches_are_counted():
    found = {name: len(host.launches_of(call)) for name, call in host.calls().items()}
    # two sums, each with the shares of hot features; shares, coefficients and update
    assert found.pop("sae_gradients_") == 4 and found.pop("sae_update_") == 3
    assert found.pop("feature_sum") == found.pop("adam_rows_") == 2
    assert set(found.values()) == {1}


@pytest.mark.parametrize("n_features", [300, 32768, 131072])
def test_a_row_sum_is_two_launches(n_features):
    ran = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            ran.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    weights, rows = torch.zeros(n_features), torch.zeros(n_features, 2)
    with Recorder():
        launches = host.launches_of(lambda: weighted_row_sum(weights, rows))
    assert len(launches) == 1 and ran == ["new_empty", "sum"]
