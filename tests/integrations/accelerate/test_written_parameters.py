# SPDX-License-Identifier: Apache-2.0
"""What is written to parameters and inputs past autograd's versions, before somebody looks."""

from collections.abc import Callable

import oracle
import pytest
import torch
from torch import Tensor, nn

from mikernels.integrations.lazy import Ledger, leave_products

N, D, F = 9, 6, 20
FP64 = torch.float64
X = oracle.randn(N, D, seed=1, dtype=FP64)


class Coder(nn.Module):
    """`relu(x w + b)`, as a library would write it."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(oracle.randn(F, D, seed=2, dtype=FP64))
        self.b = nn.Parameter(oracle.randn(F, seed=3, dtype=FP64) - 1)
        self.out = nn.Parameter(oracle.randn(F, D, seed=4, dtype=FP64))

    def encode(self, x: Tensor) -> Tensor:
        return torch.relu(nn.functional.linear(x, self.w, self.b))


def left() -> Coder:
    coder, ledger = Coder(), Ledger("test")
    ledger.crowded_from = 1.0
    coder.encode = leave_products(coder.encode, D, F, ledger)  # type: ignore[method-assign]
    return coder


# of which `_version` says nothing
WRITES: dict[str, Callable[[Coder, Tensor], object]] = {
    "the encoder's data": lambda coder, x: coder.w.data.mul_(2),
    "the bias's data": lambda coder, x: coder.b.data.add_(1),
    "the input's memory": lambda coder, x: x.numpy().fill(0.5),
}
USES: dict[str, Callable[[Coder, Tensor], Tensor]] = {
    "dense": lambda coder, acts: acts.exp(),
    "sum": lambda coder, acts: acts.sum(),
    "decoder": lambda coder, acts: acts @ coder.out,
    "selection": lambda coder, acts: acts.topk(3).values,
    "columns": lambda coder, acts: acts[:, 3:9] @ coder.out[3:9],
}


@pytest.mark.filterwarnings("ignore:test. .* needs the dense:RuntimeWarning")
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("write", WRITES)
def test_numbers_that_are_gone_are_not_given(write, use):
    coder, x = left(), X.clone()
    acts = coder.encode(x)
    WRITES[write](coder, x)
    with pytest.raises(RuntimeError, match="was changed since"):
        USES[use](coder, acts)


@pytest.mark.filterwarnings("ignore:test. .* needs the dense:RuntimeWarning")
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("write", WRITES)
def test_numbers_that_were_made_stay(write, use):
    coder, x = left(), X.clone()
    acts = coder.encode(x)
    wanted = USES[use](coder, Coder().encode(x))
    acts.exp()
    WRITES[write](coder, x)
    torch.testing.assert_close(USES[use](coder, acts), wanted)


@pytest.mark.filterwarnings("ignore:test. .* needs the dense:RuntimeWarning")
@pytest.mark.parametrize("write", WRITES)
def test_numbers_after_a_write_are_those_of_it(write):
    found, wanted = (coder := left()), Coder()
    x, y = X.clone(), X.clone()
    coder.encode(x)
    WRITES[write](found, x)
    WRITES[write](wanted, y)
    torch.testing.assert_close(found.encode(x) @ found.out, wanted.encode(y) @ wanted.out)


@pytest.mark.filterwarnings("ignore:test. .* needs the dense:RuntimeWarning")
def test_what_is_not_a_number_is_not_a_write():
    coder, x = left(), X.clone()
    x[0, 0] = torch.nan
    acts = coder.encode(x)
    torch.testing.assert_close(acts.exp(), Coder().encode(x).exp(), equal_nan=True)
